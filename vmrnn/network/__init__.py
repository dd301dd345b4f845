"""The networks by name, and the layers that they are wired from."""

from importlib import import_module

import torch

from vmrnn.errors import UserError
from vmrnn.scan.cpu import find_compiler

# Each network is the class VMRNN of a module beside this package, imported when it is built.
NETWORKS = {"VMRNN-B": "VMRNN_B", "VMRNN-D": "VMRNN_D"}


def build_model(model, *, img_size, patch_size, in_chans, embed_dim, depths, depths_down, depths_up, drop_rate=0.0,
                attn_drop_rate=0.0, drop_path_rate=0.1, d_state=16, scan="auto"):  # fmt: skip
    """The network called `model` ("VMRNN-B" uses depths, "VMRNN-D" depths_down and depths_up), on the CPU.

    img_size: (H, W) of the data, or an int; what the patches do not divide, `rollout` pads. The others as in
    VMRNN_B.py and VMRNN_D.py. UserError: sizes that cannot work.
    """
    unit = patch_size * 2 ** (len(depths_down) if model == "VMRNN-D" else 0)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    frame = (tuple(-(-side // max(unit, 1)) * unit for side in sides), patch_size, in_chans, embed_dim)
    rest = (drop_rate, attn_drop_rate, drop_path_rate, d_state, scan)
    network = import_module(NETWORKS[model]).VMRNN
    if model == "VMRNN-B":
        return network(*frame, depths, *rest)
    return network(*frame, depths_down, depths_up, *rest)


def compile_model(model, device):
    """Compile the recurrence step of `model` in place (torch.compile, one graph a frame, no breaks).

    The first steps of a run then take a minute or more; weights and checkpoints are unchanged.
    UserError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and find_compiler() is None:
        raise UserError("--compile on a CPU needs a C++ compiler: install g++ or leave it out")
    model.advance = torch.compile(model.advance, fullgraph=True, dynamic=False)
