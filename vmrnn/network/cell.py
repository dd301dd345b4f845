"""The recurrent cell: a stack of VSS blocks and one LSTM-style gate (VMRNN, arXiv 2403.16536)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath

from vmrnn.network.ss2d import SS2D


class VSB(nn.Module):
    """VSS block: x + DropPath(SS2D(LN(x))); in a cell's first block LN(x) and LN(h) are mixed first.

    x, h (B, H, W, C) -> (B, H, W, C). `mixes_hidden` says whether it is a cell's first block: the
    others own no `linear`, which the published code builds for all of them and never trains.
    drop_path: rate of dropping the whole SS2D of a sample; dropout: after SS2D; scan: see vmrnn.scan.
    """

    def __init__(self, dim, mixes_hidden, drop_path=0.0, dropout=0.0, d_state=16, scan="auto"):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        if mixes_hidden:
            self.linear = nn.Linear(2 * dim, dim)
        self.self_attention = SS2D(dim, d_state=d_state, dropout=dropout, scan=scan)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, h=None):
        layers = self.self_attention.layers(x)

        def norm(v):
            return layers.norm(v, self.ln_1.weight, self.ln_1.bias, self.ln_1.eps)

        u = norm(x)
        if h is not None:
            # Linear([u, LN(h)]) without writing the concatenation.
            from_x, from_h = self.linear.weight.chunk(2, dim=1)
            u = F.linear(u, from_x, self.linear.bias) + F.linear(norm(h), from_h)
        return x + self.drop_path(self.self_attention(u))


class VMRNNCell(nn.Module):
    """x (B, H, W, C), state None or (h, c) each (B, H, W, C) -> h, (h, c).

    One gate serves as forget, input and output gate: f = sigmoid(o), c = f (c + tanh(o)),
    h = f tanh(c), with o the output of the blocks on (x, h).
    """

    def __init__(self, dim, depth, drop_path, dropout=0.0, d_state=16, scan="auto"):
        """drop_path: the rate of each block, a list of `depth` numbers."""
        super().__init__()
        self.VSBs = nn.ModuleList(
            VSB(dim, mixes_hidden=i == 0, drop_path=drop_path[i], dropout=dropout, d_state=d_state, scan=scan)
            for i in range(depth)
        )

    def forward(self, x, state=None):
        # Under autocast a coarser level's input is bf16, and would make its blocks' sums, gate and state so.
        x = x.to(torch.promote_types(x.dtype, self.VSBs[0].ln_1.weight.dtype))
        # A zero h still passes through the layer norm, whose bias then counts.
        h, c = state if state is not None else (torch.zeros_like(x), torch.zeros_like(x))
        o = self.VSBs[0](x, h)
        for block in self.VSBs[1:]:
            o = block(o)
        h, c = self.VSBs[0].self_attention.layers(o).cell_gate(o, c.expand_as(o))
        return h, (h, c)
