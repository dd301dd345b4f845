"""A cell of plain ConvLSTM layers (arXiv 1506.04214)."""

import torch
import torch.nn as nn

KERNEL = 3  # side of the filters. The paper has 5 on maps of 16x16; patches make the maps here smaller


class ConvLSTM(nn.Module):
    """One layer: x (B, H, W, C), state (h, c) -> h, (h, c).

    i, f, g, o = Conv([x, h]);  new c = sigmoid(f) c + sigmoid(i) tanh(g);  new h = sigmoid(o) tanh(new c).
    The paper also has weights from c to the gates, one per position. They are left out, as in most implementations,
    because a network with them takes maps of one size only.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, 4 * dim, KERNEL, padding=KERNEL // 2)

    def forward(self, x, state):
        h, c = state
        # A permuted channels-last map is what the convolution takes: nothing is copied.
        gates = self.conv(torch.cat((x, h), -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        i, f, g, o = gates.to(c.dtype).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h, c)


class ConvLSTMCell(nn.Module):
    """cell(x, states) -> h, states: ConvLSTM layers one after the other, each with a state of its own.

    dim        width C
    drop_path  its length is the number of layers; the rates are not used, since the layers have no path to drop
    dropout    dropout of the output of every layer
    unused     d_state and scan, which only cells with a scan need
    """

    def __init__(self, dim, *, drop_path, dropout=0.0, **unused):
        super().__init__()
        self.layers = nn.ModuleList(ConvLSTM(dim) for _ in drop_path)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, states=None):
        x = x.to(torch.promote_types(x.dtype, self.layers[0].conv.weight.dtype))  # fp32 under autocast
        zeros = torch.zeros_like(x)
        new_states = []
        for i, layer in enumerate(self.layers):
            x, state = layer(x, states[i] if states is not None else (zeros, zeros))
            x = self.dropout(x)
            new_states.append(state)
        return x, tuple(new_states)
