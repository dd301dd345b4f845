"""Network D: a path of cells down to coarser maps and one back up (VMRNN, arXiv 2403.16536).

Only the wiring; layers are in vmrnn/.
"""

import torch
import torch.nn as nn

from vmrnn.errors import UserError
from vmrnn.network.cell import VMRNNCell
from vmrnn.network.patch import (
    PatchExpanding,
    PatchInflated,
    PatchMerging,
    check_depths,
    check_frame,
    check_network,
    check_options,
    patch_embed,
)


def drop_path_rates(rate, depths):
    """One list of rates a level, rising linearly 0 -> rate over all blocks."""
    rates = torch.linspace(0, rate, sum(depths)).split(depths)
    return [level.tolist() for level in rates]


class VMRNN(nn.Module):
    """model(frame, states=None) -> (frame, states): the next frame from this one and the past.

    img_size           int or (H, W), each a multiple of patch_size * 2**len(depths_downsample);
                       at run time any such size will do
    depths_downsample  VSS blocks of the cell at each level, finest first, e.g. [2, 6]
    depths_upsample    the same for the way up, finest first too, e.g. [6, 2]: the coarsest map's cell
                       has the last entry's blocks
    The others as in VMRNN_B. Widths are embed_dim * 2**level. Drop path rises linearly from 0 over
    the blocks of the way down; the way up takes its own schedule in the order its depths are used.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depths_downsample, depths_upsample,
                 drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto"):  # fmt: skip
        super().__init__()
        check_depths(depths_downsample=depths_downsample, depths_upsample=depths_upsample)
        n = len(depths_downsample)
        if len(depths_upsample) != n:
            raise UserError(f"depths down {depths_downsample} and up {depths_upsample}: give as many levels up as down")
        check_options(d_state, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        self.in_chans, self.stride = in_chans, patch_size * 2**n  # stride: pixels of a frame to one of the coarsest map
        self.img_size = check_network(img_size, patch_size, in_chans, embed_dim, self.stride)

        def cells(widths, depths, rates):
            return nn.ModuleList(
                VMRNNCell(width, depth, rate, attn_drop_rate, d_state, scan)
                for width, depth, rate in zip(widths, depths, rates)
            )

        widths = [embed_dim * 2**level for level in range(n + 1)]
        self.Downsample = nn.Module()  # the published names of the two paths
        self.Downsample.patch_embed = patch_embed(patch_size, in_chans, embed_dim)
        self.Downsample.dropout = nn.Dropout(drop_rate)
        self.Downsample.layers = cells(
            widths[:-1], depths_downsample, drop_path_rates(drop_path_rate, depths_downsample)
        )
        self.Downsample.downsample = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        up_widths = widths[:0:-1]
        self.Upsample = nn.Module()
        self.Upsample.layers = cells(
            up_widths, depths_upsample[::-1], drop_path_rates(drop_path_rate, depths_upsample)[::-1]
        )
        self.Upsample.upsample = nn.ModuleList(PatchExpanding(width) for width in up_widths)
        self.Upsample.Unembed = PatchInflated(patch_size, embed_dim, in_chans)

    def encode(self, frame):
        """(B, in_chans, H, W) -> tokens (B, H/p, W/p, C)."""
        check_frame(frame.shape, self.in_chans, self.stride)
        return self.Downsample.dropout(self.Downsample.patch_embed(frame))

    def advance(self, tokens, states=None):
        """One step of the recurrence: tokens in, features (B, H/p, W/p, C) and new states out."""
        path = [*zip(self.Downsample.layers, self.Downsample.downsample),
                *zip(self.Upsample.layers, self.Upsample.upsample)]  # fmt: skip
        new_states = []
        for i, (cell, resize) in enumerate(path):
            tokens, state = cell(tokens, states[i] if states is not None else None)
            tokens = resize(tokens)
            new_states.append(state)
        return tokens, tuple(new_states)

    def decode(self, features):
        """Features -> frame in (0, 1)."""
        return torch.sigmoid(self.Upsample.Unembed(features))

    def forward(self, frame, states=None):
        features, states = self.advance(self.encode(frame), states)
        return self.decode(features), states
