"""A cell of Swin blocks with the gate of VMRNN's cell (SwinLSTM, arXiv 2308.09891)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse

from vmrnn.network.fused import cell_gate
from vmrnn.network.linear import linear

WINDOW = 4  # side of an attention window, as SwinLSTM has it for Moving MNIST
HEAD = 16  # smallest number of channels per attention head
OUTSIDE = -100.0  # added to the attention between positions that must not see each other


def number_of_heads(dim):
    """The largest number of heads that divides `dim` and leaves each at least HEAD channels."""
    return next(heads for heads in range(max(1, dim // HEAD), 0, -1) if dim % heads == 0)


def attention_mask(H, W, shift, like):
    """(windows, positions, positions): 0, or OUTSIDE between positions of a window that are not neighbours in the map.

    H, W    size of the map, before it is padded to whole windows
    shift   (rows, columns) by which the map was shifted before it was padded
    like    a tensor of the dtype and device of the mask

    None if all positions of every window are neighbours.
    """
    if not any(shift) and H % WINDOW == 0 and W % WINDOW == 0:
        return None

    def regions(side, shift):
        """A number per row (or column): 1 for rows that the shift moved around the edge, 2 for padding, else 0."""
        row = torch.arange(-(-side // WINDOW) * WINDOW, device=like.device)
        return (row >= side - shift).to(like.dtype) + (row >= side).to(like.dtype)

    region = regions(H, shift[0])[:, None] * 3 + regions(W, shift[1])
    region = window_partition(region[None, :, :, None], (WINDOW, WINDOW)).flatten(1)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, OUTSIDE).to(like.dtype)


class SwinBlock(SwinTransformerBlock):
    """timm's Swin block for maps of any size, (B, H, W, C) -> (B, H, W, C).

    The first block of a cell also takes the hidden state h and mixes it in before the attention, as VSB does:
    Linear([LN(x), LN(h)]). A side of the map that fits into one window is not shifted. Positions that pad the map to
    whole windows are masked out, so a small map has a window of its own size.

    shifted  whether the windows are shifted by half their side
    The other parameters are those of vmrnn.network.cell.VSB.
    """

    def __init__(self, dim, *, mixes_hidden, shifted, drop_path=0.0, dropout=0.0):
        super().__init__(
            dim,
            input_resolution=(WINDOW, WINDOW),  # not used with the next two
            always_partition=True,
            dynamic_mask=True,
            num_heads=number_of_heads(dim),
            window_size=WINDOW,
            shift_size=WINDOW // 2 if shifted else 0,
            proj_drop=dropout,
            drop_path=drop_path,
        )
        self.attn.relative_position_bias_table._no_weight_decay = True
        if mixes_hidden:
            self.linear = nn.Linear(2 * dim, dim)

    def _attn(self, x):
        B, H, W, C = x.shape
        shift = [0 if side <= WINDOW else own for side, own in zip((H, W), self.shift_size)]
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else x
        x = F.pad(x, (0, 0, 0, -W % WINDOW, 0, -H % WINDOW))
        windows = window_partition(x, self.window_size).flatten(1, 2)
        windows = self.attn(windows, mask=attention_mask(H, W, shift, windows))
        windows = windows.unflatten(1, self.window_size)
        x = window_reverse(windows, self.window_size, *x.shape[1:3])[:, :H, :W]
        return torch.roll(x, shifts=tuple(shift), dims=(1, 2)) if any(shift) else x

    def forward(self, x, h=None):
        u = self.norm1(x)
        if h is not None:
            from_x, from_h = self.linear.weight.chunk(2, dim=1)
            u = linear(u, from_x, self.linear.bias) + linear(self.norm1(h), from_h)
        x = x + self.drop_path1(self._attn(u))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class SwinLSTMCell(nn.Module):
    """cell(x, state) -> h, (h, c): vmrnn.network.cell.VMRNNCell with Swin blocks in place of VSS blocks.

    dim        width C
    drop_path  one rate per block, so its length is the number of blocks
    dropout    dropout inside every block
    unused     d_state and scan, which only cells with a scan need
    """

    def __init__(self, dim, *, drop_path, dropout=0.0, **unused):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, mixes_hidden=i == 0, shifted=i % 2 == 1, drop_path=rate, dropout=dropout)
            for i, rate in enumerate(drop_path)
        )

    def forward(self, x, state=None):
        # As in VMRNNCell: the state stays fp32 under autocast, and a zero h still passes through the layer norm.
        x = x.to(torch.promote_types(x.dtype, self.blocks[0].norm1.weight.dtype))
        h, c = state if state is not None else (torch.zeros_like(x), torch.zeros_like(x))
        o = self.blocks[0](x, h)
        for block in self.blocks[1:]:
            o = block(o)
        h, c = cell_gate(o, c.expand_as(o))
        return h, (h, c)
