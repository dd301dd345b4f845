"""The functions that the blocks and the cell call, chosen once for the device that a network is on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn

from vmrnn import scan
from vmrnn.network import fused, fused_triton


def first_use(name, device, d_state):
    """See selfcheck.first_use."""
    from vmrnn import selfcheck  # not at the top: selfcheck imports this package

    return selfcheck.first_use(name, device, d_state)


scan.register_first_use(first_use)


class Kernels(NamedTuple):
    """One function per layer, all for the same device. Their contracts: vmrnn/scan/reference.py and fused.py."""

    scan: Callable
    norm: Callable
    in_proj: Callable
    conv_silu: Callable
    norm_gate_linear: Callable
    cell_gate: Callable


def kernels_of(name):
    """The Kernels of a scan back end. With the Triton scan the layers around it are Triton kernels as well."""
    layers = fused_triton if name == "triton" else fused
    return Kernels(
        scan=partial(scan.run, name),
        norm=layers.norm,
        in_proj=layers.in_proj,
        conv_silu=layers.conv_silu,
        norm_gate_linear=layers.norm_gate_linear,
        cell_gate=layers.cell_gate,
    )


def kernels_for(backend, device, dtype=torch.float32, d_state=16):
    """The Kernels for a device.

    backend  "auto" or a scan back end, see vmrnn.scan
    device   type of the device, such as "cuda"
    dtype    of the network's parameters
    d_state  states per channel

    Raises UserError if a named back end does not exist or cannot run there.
    """
    return kernels_of(scan.resolve(backend, device, dtype, d_state))


class UsesKernels(nn.Module):
    """Base class of the modules that call `self.kernels`.

    backend  "auto" or a scan back end, see vmrnn.scan
    d_state  states per channel

    The kernels are chosen when the module is moved or converted (.to, .cuda, .double, ...). A module that was never
    moved, a copy and an unpickled module choose them at their first call.
    """

    _kernels = None

    def __init__(self, backend, d_state):
        super().__init__()
        self.backend, self.d_state = backend, d_state

    @property
    def kernels(self):
        if self._kernels is None:
            self.choose_kernels()
        return self._kernels

    @kernels.setter
    def kernels(self, kernels):
        self._kernels = kernels

    def choose_kernels(self):
        parameter = next(self.parameters())
        self._kernels = kernels_for(self.backend, parameter.device.type, parameter.dtype, self.d_state)

    def _apply(self, function, recurse=True):
        """What .to(), .cuda(), .double() and their like call, after nn.Module has moved the parameters."""
        super()._apply(function, recurse)
        self._kernels = None
        if not next(self.parameters()).is_meta:  # shapes alone: there is nothing to run
            self.choose_kernels()
        return self

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kernels"}
