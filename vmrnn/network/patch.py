"""The layers between frames and maps (B, H, W, C): patch embedding, merging, expanding and the head."""

import torch
import torch.nn as nn
from einops import rearrange
from timm.layers import PatchEmbed

from vmrnn.errors import UserError, range_complaint
from vmrnn.network.linear import Linear


def check_network(img_size, patch_size, in_chans, embed_dim, stride):
    """Raises UserError, with the reason, for a network that cannot be built.

    img_size  int, (H, W), or None where the size is not known yet
    stride    pixels of a frame per position of the coarsest map
    The others are those of the networks.
    """
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise UserError(f"patch_size {patch_size}: the head doubles the map, so it must be 2, 4, 8, ...")
    if min(in_chans, embed_dim) < 1:
        raise UserError(f"in_chans {in_chans}, embed_dim {embed_dim}: both must be at least 1")
    if patch_size > 2 and embed_dim % 16:
        raise UserError(
            f"embed_dim {embed_dim}: with patch_size {patch_size} the head's GroupNorm needs a multiple of 16"
        )
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"img_size {img_size}: give an int or (height, width), at least 1")
        check_frame_size(*size, stride)


def check_frame(shape, in_chans, stride):
    """Raises UserError unless frames of `shape` (B, C, H, W) fit a network of in_chans channels and that stride."""
    if shape[1] != in_chans:
        raise UserError(f"frames of {shape[1]} channels, but the network takes {in_chans}; set --input_channels")
    check_frame_size(*shape[2:], stride)


def check_frame_size(H, W, stride):
    if H % stride or W % stride:
        raise UserError(
            f"frames of {H}x{W}: height and width must be multiples of {stride}, "
            "patch_size doubled by each merging level"
        )


def check_depths(**depths):
    """Raises UserError unless every value is a list of numbers of blocks."""
    for name, blocks in depths.items():
        if not isinstance(blocks, list | tuple) or not blocks or any(not isinstance(d, int) or d < 1 for d in blocks):
            raise UserError(f"{name} {blocks}: give a list of whole numbers, at least 1, one for each cell")


def check_options(d_state, **rates):
    """Raises UserError unless d_state is at least 1 and every rate in [0, 1)."""
    if complaint := range_complaint(d_state, at_least=1):
        raise UserError(f"d_state {d_state}: {complaint}")
    for name, rate in rates.items():
        if complaint := range_complaint(rate, at_least=0, below=1):
            raise UserError(f"{name} {rate}: {complaint}")


def patch_embed(patch_size, in_chans, embed_dim):
    """(B, in_chans, H, W) -> (B, H/p, W/p, embed_dim): strided convolution, then LN. H, W: any multiples of p."""
    return PatchEmbed(
        img_size=None,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
    )


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C).

    The four neighbours are taken in the order (0,0), (1,0), (0,1), (1,1), as (row, column).
    """

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(rearrange(x, "b (h p1) (w p2) c -> b h w (p2 p1 c)", p1=2, p2=2)))


class PatchExpanding(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, C/2)."""

    def __init__(self, dim):
        super().__init__()
        self.expand = Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x):
        return self.norm(rearrange(self.expand(x), "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=2, p2=2))


def doubling_convolution(in_chans, out_chans):
    """(B, in_chans, H, W) -> (B, out_chans, 2H, 2W)."""
    return nn.ConvTranspose2d(in_chans, out_chans, 3, stride=2, padding=1, output_padding=1)


class PatchInflated(nn.Module):
    """The head: features (B, H/p, W/p, C) and the network's input -> the forecast (B, out_chans, H, W) in [0, 1].

    patch_size   p, side of a patch in pixels
    dim          width C
    out_chans    channels of the forecast
    base         "none": a forecast is the sigmoid of the logits. "motion": their tanh is added to the base, the last
                 out_chans channels of the input; the last layer starts at zero, so that an untrained network does not
                 change its base

    It doubles the map log2(p) times. The published code doubles it p // 4 + 1 times, which is the same for p = 2, 4 and
    8, but five times instead of four for p = 16.
    """

    def __init__(self, patch_size, dim, out_chans, base="none"):
        super().__init__()
        self.base = base
        inner = []
        for _ in range(patch_size.bit_length() - 2):
            inner += [doubling_convolution(dim, dim), nn.GroupNorm(16, dim), nn.LeakyReLU(0.2)]
        self.Conv_ = nn.Sequential(*inner)
        self.Conv = doubling_convolution(dim, out_chans)
        if base != "none":
            nn.init.zeros_(self.Conv.weight)
            nn.init.zeros_(self.Conv.bias)

    def logits(self, features):
        x = self.Conv(self.Conv_(rearrange(features, "b h w c -> b c h w")))
        return x.to(torch.promote_types(x.dtype, torch.float32))  # the 8 bits of bf16 are too few for a frame

    def forward(self, features, frame=None):
        """frame: the network's input (B, in_chans, H, W), which a base needs."""
        logits = self.logits(features)
        if self.base == "none":
            return torch.sigmoid(logits)
        corrected = frame[:, -logits.shape[1] :] + torch.tanh(logits)
        # Clipped, but with the gradient of the unclipped sum: dry pixels would learn nothing otherwise.
        return corrected + (corrected.clamp(0, 1) - corrected).detach()
