"""The 2-D selective scan on a CPU: cpu.cpp, built at first use by the system's C++ compiler.

Environment: CXX names the compiler, VMRNN_CACHE the folder that keeps the builds, VMRNN_CPU_ISA
(avx512, avx2, sse2) an instruction set other than the best one here.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vmrnn.errors import UserError
from vmrnn.scan.op import call, connect
from vmrnn.scan.reference import DIRECTIONS

SOURCE = Path(__file__).with_name("cpu.cpp")
# No -ffast-math: it folds away the rounding trick in exp2 and drops NaN.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=fast", "-w")
# Best first. Other machines (arm: NEON) have one set, the compiler's own default.
ISA_FLAGS = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "sse2": ("-msse2",),
    "default": (),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tasks the backward makes of one batch item's channels, at most, or of a small batch: enough for a
# laptop's cores, few enough that the gradient of dbl, which exists once per range of channels,
# stays small. Independent of the number of threads, so that the result is too.
TASKS = 8


def isas():
    """Names of the instruction sets that run here, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("default",)
    names = ("avx512", "avx2", "sse2")
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return names[names.index(capability) :] if capability in names else ("sse2",)


def cache_folder():
    if "VMRNN_CACHE" in os.environ:
        return Path(os.environ["VMRNN_CACHE"])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmrnn"


def find_compiler():
    """The command of $CXX (which may hold words, as in "ccache g++"), or of c++, g++ or clang++, the first
    that is there; None if none is. UserError for a $CXX that is not there: it was meant."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise UserError(f"CXX={os.environ['CXX']}: not found; set it to a C++ compiler or unset it")
        return command
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def openmp_flags():
    """Ways to get OpenMP, best first; the last is one thread.

    The library must end up with the runtime that torch has loaded, so that both share its threads.
    On Linux that follows from the name libgomp.so.1, which the loader has already resolved. Apple's
    clang has no runtime of its own: torch's libomp is linked.
    """
    if sys.platform == "darwin":
        libomp = Path(torch.__file__).parent / "lib" / "libomp.dylib"
        return (("-Xpreprocessor", "-fopenmp", str(libomp)), ())
    return (("-fopenmp",), ())


def digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def build(isa, sources=(SOURCE,)):
    """Path of the library for one instruction set, compiled unless the cache has it.

    The first source is compiled, the others are what it includes. A build is named scan-<source and
    flags>-<compiler>-<its own checksum>, written under another name and renamed: several processes
    may build at once, and a damaged file shows.
    """
    folder = cache_folder()
    flags = FLAGS + ISA_FLAGS[isa]
    source = digest(*(path.read_text() for path in sources), flags, openmp_flags(), platform.machine(), isa)
    compiler = find_compiler()
    version = compiler and subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    # Without a compiler any compiler's build will do.
    for path in sorted(folder.glob(f"scan-{source}-{digest(compiler, version) if compiler else '*'}-*.lib")):
        if path.stem.rsplit("-", 1)[1] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]:
            return path
        path.unlink(missing_ok=True)
    if compiler is None:
        raise UserError("no C++ compiler: install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "scan.lib"
        for openmp in openmp_flags():
            command = [*compiler, *flags, str(sources[0]), "-o", str(output), *openmp]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise UserError(f"{' '.join(compiler)} failed: {first}; set CXX to GCC 9 or clang 12 or newer")
        checksum = hashlib.sha256(output.read_bytes()).hexdigest()[:16]
        path = folder / f"scan-{source}-{digest(compiler, version)}-{checksum}.lib"
        os.replace(output, path)
    return path


class Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dbl", "weight", "bias", "A", "D")]
    _fields_ += [(name, ctypes.c_int64) for name in ("B", "H", "W", "Di", "N", "R")]


class Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "dbl", "weight", "bias", "A", "D", "partial")]


@functools.cache
def attempt(isa):
    """(the library for one instruction set or None, why not): tried once a process."""
    if isa not in isas():
        return None, f"VMRNN_CPU_ISA={isa} does not run here; choose from {', '.join(isas())}"
    try:
        library = ctypes.CDLL(str(build(isa)))
    except (UserError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return None, str(error)
    # ctypes lets go of the interpreter lock during a call.
    pointer = ctypes.c_void_p
    library.vmrnn_scan_forward.argtypes = (ctypes.POINTER(Problem), ctypes.c_int, pointer, pointer)
    library.vmrnn_scan_backward.argtypes = (
        ctypes.POINTER(Problem), ctypes.c_int, ctypes.c_int64, pointer, pointer, ctypes.POINTER(Gradients),
    )  # fmt: skip
    library.vmrnn_scan_forward.restype = library.vmrnn_scan_backward.restype = None
    return library, ""


def wanted_isa():
    return os.environ.get("VMRNN_CPU_ISA") or isas()[0]


def load():
    """The library. Raises UserError when it cannot be had."""
    library, reason = attempt(wanted_isa())
    if library is None:
        raise UserError(f"scan back end 'cpu' cannot run: {reason}")
    return library


def can_run(device, dtype, d_state):
    if device != "cpu":
        return False, "runs on a CPU only"
    if sys.platform == "win32":
        return False, "not built on Windows: use WSL"
    if dtype not in DTYPES:
        return False, f"{dtype} is not supported: convert to float32"
    library, reason = attempt(wanted_isa())
    if library is None:
        return False, reason
    threads = "" if library.vmrnn_scan_openmp() else "; ONE THREAD ONLY: the compiler has no OpenMP"
    return True, f"fused C++ kernel, {wanted_isa()}{threads}"


def problem(x, dbl, dt_weight, dt_bias, A, D):
    B, H, W, Di = x.shape
    tensors = (x, dbl, dt_weight, dt_bias, A, D)
    return Problem(*(t.data_ptr() for t in tensors), B, H, W, Di, A.shape[-1], dt_weight.shape[-1])


def blocks_of(x):
    return -(-x.shape[-1] // load().vmrnn_scan_channels())


def checkpoint_shape(x, A):
    """The state every T steps, channels and states padded as cpu.cpp wants them."""
    lib = load()
    chunks = -(-x.shape[1] * x.shape[2] // lib.vmrnn_scan_steps())
    group, channels = lib.vmrnn_scan_group(), lib.vmrnn_scan_channels()
    return x.shape[0], blocks_of(x), DIRECTIONS, chunks, -(-A.shape[-1] // group) * group, channels


T = torch.Tensor


@torch.library.custom_op("vmrnn::scan_cpu", mutates_args=(), device_types="cpu")
def scan_op(x: T, dbl: T, dt_weight: T, dt_bias: T, A: T, D: T, save: bool) -> tuple[T, T]:
    """y, and for the backward (if save) the state at the start of every chunk."""
    lib = load()
    tensors = [t.contiguous() for t in (x, dbl, dt_weight, dt_bias, A, D)]
    y = torch.empty_like(tensors[0])
    checkpoints = x.new_empty(checkpoint_shape(x, A) if save else 0)
    lib.vmrnn_scan_forward(
        problem(*tensors), torch.get_num_threads(), y.data_ptr(), checkpoints.data_ptr() if save else None
    )
    return y, checkpoints


@scan_op.register_fake
def _(x, dbl, dt_weight, dt_bias, A, D, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(checkpoint_shape(x, A) if save else 0)


@torch.library.custom_op("vmrnn::scan_cpu_backward", mutates_args=(), device_types="cpu")
def scan_backward_op(
    dy: T, x: T, dbl: T, dt_weight: T, dt_bias: T, A: T, D: T, checkpoints: T
) -> tuple[T, T, T, T, T, T]:
    lib = load()
    tensors = [t.contiguous() for t in (x, dbl, dt_weight, dt_bias, A, D)]
    dy = dy.contiguous()
    B = x.shape[0]
    ranges = max(1, min(blocks_of(x), -(-TASKS // max(B, 1))))
    dx, ddbl = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
    partial = x.new_empty(ranges, *dbl.shape)
    dparameters = [x.new_empty(B, *t.shape) for t in tensors[2:]]
    gradients = Gradients(*(t.data_ptr() for t in (dx, ddbl, *dparameters, partial)))
    lib.vmrnn_scan_backward(
        problem(*tensors), torch.get_num_threads(), ranges, dy.data_ptr(), checkpoints.data_ptr(), gradients
    )
    return dx, ddbl, *(t[0] if B == 1 else t.sum(0) for t in dparameters)


connect(scan_op, scan_backward_op)


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D):
    """As reference.scan_2d; fp32 arithmetic whatever the inputs, y in x's dtype."""
    A = -torch.exp(A_log.float())
    return call(scan_op, *(t.float() for t in (x, dbl, dt_weight, dt_bias, A, D))).to(x.dtype)
