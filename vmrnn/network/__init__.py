"""The networks and cells by name, and how a network is built."""

from importlib import import_module

import torch

from vmrnn.compiler import find_compiler
from vmrnn.errors import UserError
from vmrnn.network.advection import AdvectionHead
from vmrnn.network.cell import VMRNNCell
from vmrnn.network.conv import ConvLSTMCell
from vmrnn.network.kernels import UsesKernels
from vmrnn.network.patch import PatchInflated
from vmrnn.network.swin import SwinLSTMCell

# A network is the class VMRNN of a module beside this package. The module is imported when the network is built.
NETWORKS = {"VMRNN-B": "VMRNN_B", "VMRNN-D": "VMRNN_D"}

# A cell is a module cell(x, state) -> h, state on maps (B, H, W, C); state is None at the start. Its class is called
# with the width and, by keyword, drop_path (one rate per block), dropout, d_state and scan.
CELLS = {"vss": VMRNNCell, "swin": SwinLSTMCell, "conv": ConvLSTMCell}

# A head is a module head(features, frame) -> forecast, see PatchInflated, whose arguments its class takes.
HEADS = {"plain": PatchInflated, "advection": AdvectionHead}


def build_model(model, *, patch_size, in_chans, embed_dim, depths, depths_down, depths_up, drop_rate=0.0,
                attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto", cell="vss",
                out_chans=None, base="none", head="plain"):  # fmt: skip
    """The network called `model` on the CPU.

    depths       blocks per cell of "VMRNN-B"
    depths_down  blocks per cell on the way down of "VMRNN-D"
    depths_up    blocks per cell on the way up of "VMRNN-D"
    cell         a key of CELLS
    head         a key of HEADS
    The others are those of VMRNN_B.py and VMRNN_D.py.

    Raises UserError for sizes that cannot work.
    """
    return import_module(NETWORKS[model]).VMRNN.from_options(
        patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depths=depths, depths_down=depths_down,
        depths_up=depths_up, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate,
        d_state=d_state, scan=scan, cell=CELLS[cell], out_chans=out_chans, base=base, head=HEADS[head],
    )  # fmt: skip


def compile_model(model, device):
    """Compile one step of the recurrence in place (torch.compile, one graph per frame, no graph breaks).

    The first steps of a run then take a minute or more. Weights and checkpoints stay the same.
    Raises UserError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise UserError("--compile on a CPU needs a C++ compiler: install g++ or leave --compile out")
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.choose_kernels()  # before tracing, which cannot follow the choice
    model.advance = torch.compile(model.advance, fullgraph=True, dynamic=False)
