"""Network B: cells at one resolution (VMRNN, arXiv 2403.16536). Only the wiring; layers are in vmrnn/."""

import torch
import torch.nn as nn

from vmrnn.network.cell import VMRNNCell
from vmrnn.network.patch import PatchInflated, check_depths, check_frame, check_network, check_options, patch_embed


class VMRNN(nn.Module):
    """model(frame, states=None) -> (frame, states): the next frame from this one and the past.

    img_size    int or (H, W), each a multiple of patch_size; at run time any such size will do
    patch_size  2, 4, 8, ...
    in_chans    channels of a frame
    embed_dim   width C; a multiple of 16 if patch_size > 2
    depths      VSS blocks of each cell, e.g. [6]
    drop_rate, attn_drop_rate   dropout after the patch embedding and after each SS2D
    drop_path_rate              the same for every block
    scan        scan back end, see vmrnn.scan

    Frames are (B, in_chans, H, W) in [0, 1]. `states` is opaque. Raises UserError for sizes that
    cannot work.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depths, drop_rate=0.0, attn_drop_rate=0.0,
                 drop_path_rate=0.1, d_state=16, scan="auto"):  # fmt: skip
        super().__init__()
        self.in_chans, self.stride = in_chans, patch_size  # stride: pixels of a frame to one of the coarsest map
        self.img_size = check_network(img_size, patch_size, in_chans, embed_dim, self.stride)
        check_depths(depths=depths)
        check_options(d_state, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        self.ST = nn.Module()  # the published name of everything below
        self.ST.patch_embed = patch_embed(patch_size, in_chans, embed_dim)
        self.ST.dropout = nn.Dropout(drop_rate)
        self.ST.layers = nn.ModuleList(
            VMRNNCell(embed_dim, depth, [drop_path_rate] * depth, attn_drop_rate, d_state, scan) for depth in depths
        )
        self.ST.patch_inflated = PatchInflated(patch_size, embed_dim, in_chans)

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

    def decode(self, features):
        """Features -> frame in (0, 1)."""
        return torch.sigmoid(self.ST.patch_inflated(features))

    def forward(self, frame, states=None):
        features, states = self.advance(self.encode(frame), states)
        return self.decode(features), states
