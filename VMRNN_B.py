"""Network B: cells at one resolution (VMRNN, arXiv 2403.16536, section 3.4).

Only the wiring: layers are in vmrnn/network/.
"""

import torch.nn as nn

from vmrnn.network.cell import VMRNNCell
from vmrnn.network.checks import check_depths, check_frame, check_network, check_options
from vmrnn.network.patch import PatchInflated, patch_embed


class VMRNN(nn.Module):
    """model(frame, states=None) -> (frame, states): forecasts the next frame from this one and the past.

    img_size        int or (H, W) of the frames. Only checked; any multiple of patch_size works at run time
    patch_size      side of a patch: 2, 4, 8, ...
    in_chans        channels of a frame
    embed_dim       width C; a multiple of 16 if patch_size > 2
    depths          blocks per cell, one number per cell
    drop_rate       dropout after the patch embedding
    attn_drop_rate  dropout inside every block
    drop_path_rate  probability of skipping a block for one sample, the same for all blocks
    d_state         states per channel of the scan
    scan            scan back end, see vmrnn.scan
    cell            class of the cell, with the arguments and the result of VMRNNCell
    out_chans       channels of the forecast, the first of the frame's; the others are forcings, which are given and
                    never forecast. None: all
    base            "motion": the last out_chans channels of a frame are a forecast of the next frame, which the network
                    corrects; "none": it forecasts from nothing
    head            class of the head, with the arguments and the result of PatchInflated

    Frames are (B, in_chans, H, W) in [0, 1], forecasts (B, out_chans, H, W). `states` holds what is kept of the past:
    pass it on unchanged.
    Raises UserError for sizes that cannot work.
    """

    def __init__(self, img_size=None, patch_size=2, in_chans=1, embed_dim=128, depths=(6,), drop_rate=0.0,
                 attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto", cell=VMRNNCell,
                 out_chans=None, base="none", head=PatchInflated):  # fmt: skip
        super().__init__()
        self.in_chans = in_chans
        self.out_chans = out_chans or in_chans
        self.stride = patch_size  # pixels of a frame per position of the coarsest map
        check_network(img_size, patch_size, in_chans, embed_dim, self.stride)
        check_depths(depths=depths)
        check_options(d_state, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        self.ST = nn.Module()  # the published name of everything below
        self.ST.patch_embed = patch_embed(patch_size, in_chans, embed_dim)
        self.ST.dropout = nn.Dropout(drop_rate)
        self.ST.layers = nn.ModuleList(
            cell(embed_dim, drop_path=[drop_path_rate] * depth, dropout=attn_drop_rate, d_state=d_state, scan=scan)
            for depth in depths
        )
        self.ST.patch_inflated = head(patch_size, embed_dim, self.out_chans, base)

    @classmethod
    def from_options(cls, depths, depths_down=None, depths_up=None, **options):
        """The network of a configuration's options. depths_down and depths_up belong to network D and are not used."""
        return cls(depths=depths, **options)

    def encode(self, frame):
        """(B, in_chans, H, W) -> tokens (B, H/p, W/p, C)."""
        check_frame(frame.shape, self.in_chans, self.stride)
        return self.ST.dropout(self.ST.patch_embed(frame))

    def advance(self, tokens, states=None):
        """One step of the recurrence: tokens in, features (B, H/p, W/p, C) and new states out."""
        new_states = []
        for i, cell in enumerate(self.ST.layers):
            tokens, state = cell(tokens, states[i] if states is not None else None)
            new_states.append(state)
        return tokens, tuple(new_states)

    def decode(self, features, frame=None):
        """Features -> the next frame in [0, 1]. frame: the network's input, which a base needs."""
        return self.ST.patch_inflated(features, frame)

    def forward(self, frame, states=None):
        features, states = self.advance(self.encode(frame), states)
        return self.decode(features, frame), states
