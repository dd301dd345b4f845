"""The 2-D selective scan on a CPU: cpu.cpp, built at first use by the system's C++ compiler (vmrnn/compiler.py).

Environment: VMRNN_CPU_ISA (avx512, avx2, sse2) names an instruction set other than the best one of this machine.
"""

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

import torch

from vmrnn import compiler
from vmrnn.errors import UserError
from vmrnn.scan.op import call, connect
from vmrnn.scan.reference import DIRECTIONS

SOURCE = Path(__file__).with_name("cpu.cpp")
# Without -ffast-math, which removes the rounding trick of exp2 and ignores NaN.
FLAGS = ("-std=c++17", "-O3", "-shared", "-ffp-contract=fast", "-w") + (("-fPIC",) if sys.platform != "win32" else ())
# Best first. Other machines than x86-64 use the compiler's default (NEON on ARM).
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "sse2": ("-msse2",),
    "default": (),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tasks of the backward, if the batch is smaller: the channels of each batch item are cut into ranges. Eight keep a
# laptop's cores busy. More would need more memory, since the gradient of dbl exists once per range. The number does not
# depend on the number of threads, so neither do the results.
TASKS = 8


def isas():
    """Names of the instruction sets that run here, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("default",)
    names = ("avx512", "avx2", "sse2")
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return names[names.index(capability) :] if capability in names else ("sse2",)


def build(isa):
    """Path of the library for one instruction set."""
    return compiler.build("scan", (SOURCE,), FLAGS + ISA_FLAGS[isa])


class Problem(ctypes.Structure):
    """struct Problem of cpu.cpp: the inputs and the sizes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dbl", "weight", "bias", "A", "D")]
    _fields_ += [(name, ctypes.c_int64) for name in ("B", "H", "W", "Di", "N", "R")]


class Gradients(ctypes.Structure):
    """struct Gradients of cpu.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dbl", "weight", "bias", "A", "D", "partial")]


@functools.cache
def attempt(isa):
    """(the library for one instruction set, ""), or (None, the reason why not). It is tried once per process."""
    if isa not in isas():
        return None, f"VMRNN_CPU_ISA={isa} does not run here; choose from {', '.join(isas())}"
    try:
        return open_library(build(isa)), ""
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return None, str(error)


def open_library(path):
    """A compiled cpu.cpp."""
    library = ctypes.CDLL(str(path))
    # ctypes lets go of the interpreter lock during a call.
    pointer = ctypes.c_void_p
    library.vmrnn_scan_forward.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, pointer, pointer)
    library.vmrnn_scan_backward.argtypes = (
        ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int64, pointer, pointer, ctypes.POINTER(Gradients),
    )  # fmt: skip
    library.vmrnn_scan_forward.restype = library.vmrnn_scan_backward.restype = None
    return library


def wanted_isa():
    """The name of the instruction set to use."""
    return os.environ.get("VMRNN_CPU_ISA") or isas()[0]


def load():
    """The library. Raises UserError if it cannot be built or opened."""
    library, reason = attempt(wanted_isa())
    if library is None:
        raise UserError(f"scan back end 'cpu' cannot run: {reason}")
    return library


def can_run(device, dtype, d_state):
    if device != "cpu":
        return False, "runs on a CPU only"
    if dtype not in DTYPES:
        return False, f"{dtype} is not supported: convert to float32"
    library, reason = attempt(wanted_isa())
    if library is None:
        return False, reason
    threads = "" if library.vmrnn_scan_openmp() else "; ONE THREAD ONLY: the compiler has no OpenMP"
    return True, f"fused C++ kernel, {wanted_isa()}{threads}"


def problem(x, dbl, dt_weight, dt_bias, A, D):
    """The Problem of tensors that `prepared` has returned. They must outlive it: it holds their addresses."""
    B, H, W, Di = x.shape
    tensors = (x, dbl, dt_weight, dt_bias, A, D)
    return Problem(*(t.data_ptr() for t in tensors), B, H, W, Di, A.shape[-1], dt_weight.shape[-1])


def prepared(x, dbl, dt_weight, dt_bias, A_log, D):
    """The tensors as the kernel takes them: contiguous, A in place of A_log."""
    return [t.contiguous() for t in (x, dbl, dt_weight, dt_bias, -torch.exp(A_log), D)]


def blocks_of(x):
    """Blocks of channels that the kernel works on at a time, the last one padded."""
    return -(-x.shape[-1] // load().vmrnn_scan_channels())


def checkpoint_shape(x, A_log):
    """The state every T steps, with channels and states padded as cpu.cpp pads them."""
    lib = load()
    chunks = -(-x.shape[1] * x.shape[2] // lib.vmrnn_scan_steps())
    group, channels = lib.vmrnn_scan_group(), lib.vmrnn_scan_channels()
    return x.shape[0], blocks_of(x), DIRECTIONS, chunks, -(-A_log.shape[-1] // group) * group, channels


T = torch.Tensor


@torch.library.custom_op("vmrnn::scan_cpu", mutates_args=(), device_types="cpu")
def scan_op(x: T, dbl: T, dt_weight: T, dt_bias: T, A_log: T, D: T, save: bool) -> tuple[T, T]:
    """y, and the state at the start of every chunk for the backward (empty unless `save`). fp32 only."""
    lib = load()
    tensors = prepared(x, dbl, dt_weight, dt_bias, A_log, D)
    y = torch.empty_like(tensors[0])
    checkpoints = x.new_empty(checkpoint_shape(x, A_log) if save else 0)
    lib.vmrnn_scan_forward(
        problem(*tensors), torch.get_num_threads(), y.data_ptr(), checkpoints.data_ptr() if save else None
    )
    return y, checkpoints


@scan_op.register_fake
def _(x, dbl, dt_weight, dt_bias, A_log, D, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(checkpoint_shape(x, A_log) if save else 0)


@torch.library.custom_op("vmrnn::scan_cpu_backward", mutates_args=(), device_types="cpu")
def scan_backward_op(
    dy: T, x: T, dbl: T, dt_weight: T, dt_bias: T, A_log: T, D: T, checkpoints: T
) -> tuple[T, T, T, T, T, T]:
    lib = load()
    tensors = prepared(x, dbl, dt_weight, dt_bias, A_log, D)
    dy = dy.contiguous()
    B = x.shape[0]
    ranges = max(1, min(blocks_of(x), -(-TASKS // max(B, 1))))  # that the channels of a batch item are cut into
    dx, ddbl = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
    partial = x.new_empty(ranges, *dbl.shape)
    dparameters = [x.new_empty(B, *t.shape) for t in tensors[2:]]
    gradients = Gradients(*(t.data_ptr() for t in (dx, ddbl, *dparameters, partial)))
    lib.vmrnn_scan_backward(
        problem(*tensors), torch.get_num_threads(), ranges, dy.data_ptr(), checkpoints.data_ptr(), gradients
    )
    dweight, dbias, dA, dD = (t[0] if B == 1 else t.sum(0) for t in dparameters)
    return dx, ddbl, dweight, dbias, dA * tensors[4], dD


connect(scan_op, scan_backward_op)


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """See `reference.scan_2d`. Computes in fp32 whatever the inputs' dtypes; y has x's dtype."""
    return call(scan_op, *(t.float() for t in (x, dbl, dt_weight, dt_bias, A_log, D))).to(x.dtype)
