"""Network D: cells on a path down to coarser maps and on a path back up (VMRNN, arXiv 2403.16536, section 3.4).

Only the wiring: layers are in vmrnn/network/.
"""

import torch.nn as nn
from timm.layers import calculate_drop_path_rates

from vmrnn.errors import UserError
from vmrnn.network.cell import VMRNNCell
from vmrnn.network.checks import check_depths, check_frame, check_network, check_options
from vmrnn.network.patch import PatchExpanding, PatchInflated, PatchMerging, patch_embed


class VMRNN(nn.Module):
    """model(frame, states=None) -> (frame, states): forecasts the next frame from this one and the past.

    img_size           int or (H, W) of the frames. Only checked; at run time any multiple of
                       patch_size * 2**levels works, where levels is the length of depths_downsample
    depths_downsample  blocks per cell on the path down, one number per level, finest level first, such as [2, 6]
    depths_upsample    blocks per cell on the path up, finest level first too, such as [6, 2]: the last number is that
                       of the coarsest map, where the path up begins
    drop_path_rate     probability of skipping a block for one sample. It rises linearly from 0 to this rate over the
                       blocks of depths_downsample, and again over those of depths_upsample, in the order of each list

    The other parameters are those of VMRNN_B. The width of a map is embed_dim * 2**level: the path down begins at level
    0, and the path up at level `levels`.
    Raises UserError for sizes that cannot work.
    """

    def __init__(self, img_size=None, patch_size=2, in_chans=1, embed_dim=128, depths_downsample=(2, 6),
                 depths_upsample=(6, 2), drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16,
                 scan="auto", cell=VMRNNCell, out_chans=None, base="none", head=PatchInflated):  # fmt: skip
        super().__init__()
        # Refuse sizes that cannot work.
        check_depths(depths_downsample=depths_downsample, depths_upsample=depths_upsample)
        levels = len(depths_downsample)
        if len(depths_upsample) != levels:
            raise UserError(f"depths down {depths_downsample} and up {depths_upsample}: give as many levels up as down")
        check_options(d_state, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        self.in_chans = in_chans
        self.out_chans = out_chans or in_chans
        self.stride = patch_size * 2**levels  # pixels of a frame per position of the coarsest map
        check_network(img_size, patch_size, in_chans, embed_dim, self.stride)

        # What both paths use
        def cells(widths, rates_per_cell):
            return nn.ModuleList(
                cell(width, drop_path=rates, dropout=attn_drop_rate, d_state=d_state, scan=scan)
                for width, rates in zip(widths, rates_per_cell)
            )

        def drop_path_rates(depths):
            return calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        widths = [embed_dim * 2**level for level in range(levels + 1)]

        # The path down and the path up, under their published names
        self.Downsample = nn.Module()
        self.Downsample.patch_embed = patch_embed(patch_size, in_chans, embed_dim)
        self.Downsample.dropout = nn.Dropout(drop_rate)
        self.Downsample.layers = cells(widths[:-1], drop_path_rates(depths_downsample))
        self.Downsample.downsample = nn.ModuleList(PatchMerging(width) for width in widths[:-1])
        up_widths = widths[:0:-1]
        self.Upsample = nn.Module()
        self.Upsample.layers = cells(up_widths, drop_path_rates(depths_upsample)[::-1])
        self.Upsample.upsample = nn.ModuleList(PatchExpanding(width) for width in up_widths)
        self.Upsample.Unembed = head(patch_size, embed_dim, self.out_chans, base)

    @classmethod
    def from_options(cls, depths_down, depths_up, depths=None, **options):
        """The network of a configuration's options. depths belongs to network B and is not used."""
        return cls(depths_downsample=depths_down, depths_upsample=depths_up, **options)

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

    def decode(self, features, frame=None):
        """Features -> the next frame in [0, 1]. frame: the network's input, which a base needs."""
        return self.Upsample.Unembed(features, frame)

    def forward(self, frame, states=None):
        features, states = self.advance(self.encode(frame), states)
        return self.decode(features, frame), states
