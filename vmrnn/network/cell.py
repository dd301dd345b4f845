"""The recurrent cell: a stack of VSS blocks and one LSTM-style gate (VMRNN, arXiv 2403.16536, section 3.3)."""

import torch
import torch.nn as nn
from timm.layers import DropPath

from vmrnn.network.kernels import UsesKernels
from vmrnn.network.linear import linear
from vmrnn.network.ss2d import SS2D


class VSB(UsesKernels):
    """VSS block: x + DropPath(SS2D(LN(x))), maps (B, H, W, C) -> (B, H, W, C).

    The first block of a cell also takes the hidden state h and mixes it in before SS2D:
    x + DropPath(SS2D(Linear([LN(x), LN(h)]))).

    dim           width C
    mixes_hidden  whether this is a cell's first block. The other blocks have no `linear`: the published code builds
                  one for each of them and never trains it
    drop_path     probability of dropping the whole SS2D of a sample
    dropout       dropout after SS2D
    d_state       states per channel of the scan
    scan          scan back end, see vmrnn.scan
    """

    def __init__(self, dim, *, mixes_hidden, drop_path=0.0, dropout=0.0, d_state=16, scan="auto"):
        super().__init__(scan, d_state)
        self.ln_1 = nn.LayerNorm(dim)
        if mixes_hidden:
            self.linear = nn.Linear(2 * dim, dim)
        self.self_attention = SS2D(dim, d_state=d_state, dropout=dropout, scan=scan)
        self.drop_path = DropPath(drop_path)

    def norm(self, v):
        return self.kernels.norm(v, self.ln_1.weight, self.ln_1.bias, self.ln_1.eps)

    def forward(self, x, h=None):
        u = self.norm(x)
        if h is not None:
            # Linear([u, LN(h)]) as two products: the concatenation is never written to memory.
            from_x, from_h = self.linear.weight.chunk(2, dim=1)
            u = linear(u, from_x, self.linear.bias) + linear(self.norm(h), from_h)
        return x + self.drop_path(self.self_attention(u))


class VMRNNCell(UsesKernels):
    """cell(x, state) -> h, (h, c): x, h and c are maps (B, H, W, C), state is None or (h, c).

    o is the output of the blocks on (x, h). One gate f = sigmoid(o) is the forget, input and output gate:
    c = f (c + tanh(o)), h = f tanh(c).

    dim        width C
    drop_path  one rate per block, so its length is the number of blocks
    The others are those of VSB.
    """

    def __init__(self, dim, *, drop_path, dropout=0.0, d_state=16, scan="auto"):
        super().__init__(scan, d_state)
        options = {"dropout": dropout, "d_state": d_state, "scan": scan}
        self.VSBs = nn.ModuleList(
            VSB(dim, mixes_hidden=i == 0, drop_path=rate, **options) for i, rate in enumerate(drop_path)
        )

    def forward(self, x, state=None):
        # Under autocast the input from a coarser level is bf16. Sums of the blocks, gate and state stay fp32.
        x = x.to(torch.promote_types(x.dtype, self.VSBs[0].ln_1.weight.dtype))
        # A zero h still passes through the layer norm, whose bias then counts.
        h, c = state if state is not None else (torch.zeros_like(x), torch.zeros_like(x))
        o = self.VSBs[0](x, h)
        for block in self.VSBs[1:]:
            o = block(o)
        h, c = self.kernels.cell_gate(o, c.expand_as(o))
        return h, (h, c)
