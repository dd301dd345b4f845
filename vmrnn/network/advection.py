"""A head that moves the last frame instead of drawing the next one from nothing (CDNA, arXiv 1605.07157)."""

import torch
import torch.nn.functional as F
from einops import rearrange

from vmrnn.errors import UserError
from vmrnn.network.linear import Linear
from vmrnn.network.patch import PatchInflated

MOVES = 2  # copies of the last frame, so that two things can cross in one patch
REACH = 4  # pixels, the farthest that a copy can move per frame and axis; the digits of Moving MNIST move 3.6


class AdvectionHead(PatchInflated):
    """head(features (B, H/p, W/p, C), frame (B, in_chans, H, W)) -> the forecast (B, out_chans, H, W) in [0, 1].

    A pixel of the forecast is a weighted mean of MOVES copies of the last frame and of one frame that the network
    draws. The network chooses the weights for every pixel, and the filters that move the copies for every patch (see
    advect). A filter is a softmax: one large tap shifts the patch by whole pixels, several taps blur it.

    This differs from the paper, which has ten filters for the whole frame. Those are not separable; these are.

    The parameters are those of PatchInflated. Only the first out_chans channels of the frame are moved.
    Raises UserError for a base: this head has its own.
    """

    def __init__(self, patch_size, dim, out_chans, base="none"):
        if base != "none":
            raise UserError(f"base {base}, head advection: both start from the last frame; leave one out")
        super().__init__(patch_size, dim, out_chans + MOVES + 1)
        self.patch_size, self.out_chans = patch_size, out_chans
        self.filters = Linear(dim, MOVES * 2 * (2 * REACH + 1))

    def forward(self, features, frame):
        own, weights = self.logits(features).split((self.out_chans, MOVES + 1), dim=1)
        filters = self.filters(features)
        # bf16 has too few bits for a frame, and autocast would move the frame in it.
        with torch.autocast(features.device.type, enabled=False):
            filters = filters.to(own.dtype).unflatten(-1, (MOVES, 2, -1)).softmax(dim=-1)
            copies = advect(frame[:, : self.out_chans].to(own.dtype), filters, self.patch_size)
            frames = torch.cat((copies, torch.sigmoid(own)[:, None]), dim=1)
            return (weights.softmax(dim=1)[:, :, None] * frames).sum(dim=1)


def advect(frames, filters, patch):
    """Copies of frames, each patch of them filtered by two one-dimensional filters.

    frames    (B, C, H, W); pixels outside count as zero
    filters   (B, H/p, W/p, M, 2, K), K odd: for every patch and copy the filter along a column and that along a row.
              copy[y, x] = sum over i, j of filters[0, i] filters[1, j] frame[y + i - K // 2, x + j - K // 2]
    patch     p, side of a patch in pixels

    Returns (B, M, C, H, W).
    """
    K = filters.shape[-1]
    height, width = filters.shape[1:3]
    side = patch + K - 1  # of what the filters of a patch reach
    around = F.unfold(frames, side, padding=K // 2, stride=patch)
    around = rearrange(around, "b (c i j) (h w) -> b h w 1 c i j", i=side, j=side, h=height, w=width)
    # Filtering a column is a product with a matrix (patch, side) whose row y holds the filter from place y on. Written
    # one after another, the rows are the filter and `patch` zeros, again and again.
    bands = F.pad(filters, (0, patch)).tile(patch)[..., : patch * side].unflatten(-1, (patch, side))
    along_columns, along_rows = bands.unsqueeze(4).unbind(dim=5)  # (B, H/p, W/p, M, 1, patch, side)
    moved = along_columns @ around @ along_rows.transpose(-1, -2)
    return rearrange(moved, "b h w m c y x -> b m c (h y) (w x)")
