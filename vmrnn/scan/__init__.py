"""The one entry point for the 2-D selective scan and the one place that chooses a back end.

Every back end is a module with `scan_2d(x, dbl, dt_weight, dt_bias, A_log, D) -> y`, the contract of
`reference.scan_2d`, and `can_run(device, dtype, d_state) -> (bool, reason)`.
"""

import logging
from functools import cache

import torch

from vmrnn.errors import UserError
from vmrnn.scan import chunked, cpu, mamba, reference, triton_scan

DIRECTIONS = reference.DIRECTIONS
BACKENDS = {"mamba": mamba, "triton": triton_scan, "cpu": cpu, "torch": chunked, "reference": reference}

# What `auto` tries, first to last; change it only on numbers from benchmarks/.
ORDER = {"cuda": ("mamba", "triton", "torch"), "cpu": ("cpu", "torch")}
OTHER_DEVICES = ("torch",)

log = logging.getLogger("vmrnn")
_logged = set()


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D, backend="auto"):
    """Four-direction selective scan of a feature map, summed; see `reference.scan_2d` for shapes.

    backend: "auto" or a key of BACKENDS. A named one that cannot run raises UserError and never
    falls back.
    """
    check_shapes(x, dbl, dt_weight, dt_bias, A_log, D)
    name = resolve(backend, x.device.type, x.dtype, A_log.shape[-1])
    return BACKENDS[name].scan_2d(x, dbl, dt_weight, dt_bias, A_log, D)


def check_shapes(x, dbl, dt_weight, dt_bias, A_log, D):
    """ValueError unless the shapes belong together: a kernel would read beyond a tensor's end."""
    *map_shape, Di = x.shape
    K, N, R = DIRECTIONS, A_log.shape[-1], dt_weight.shape[-1]
    expected = {"dbl": (*map_shape, K, R + 2 * N), "dt_weight": (K, Di, R), "dt_bias": (K, Di), "A_log": (K, Di, N),
                "D": (K, Di)}  # fmt: skip
    for (name, shape), tensor in zip(expected.items(), (dbl, dt_weight, dt_bias, A_log, D)):
        if x.ndim != 4 or tuple(tensor.shape) != shape:
            raise ValueError(f"scan: {name} is {tuple(tensor.shape)}, x {tuple(x.shape)} (B, H, W, Di) needs {shape}")


# The choice is made while tracing, from constants, so a compiled graph holds the kernel alone.
@torch.compiler.assume_constant_result
def resolve(backend, device, dtype=torch.float32, d_state=16):
    """The name of the back end that `backend` means on `device` ("cpu", "cuda", ...); asked once, then remembered.

    Raises UserError for a name that does not exist or cannot run, with the reason.
    """
    return choose(backend, device, dtype, d_state)


@cache  # every block asks at every frame: without it a tenth of a small network's frame
def choose(backend, device, dtype, d_state):
    if backend == "auto":
        return _first_that_runs(device, dtype, d_state)
    if backend not in BACKENDS:
        raise UserError(f"scan back end {backend!r} does not exist: choose auto, {', '.join(BACKENDS)}")
    ok, reason = BACKENDS[backend].can_run(device, dtype, d_state)
    if not ok:
        raise UserError(f"scan back end {backend!r} cannot run on {device} here: {reason}")
    _log_once(backend, device, reason)
    return backend


def available(device="cpu", dtype=torch.float32, d_state=16):
    """{name: (can run, reason)} of every back end for `device`, in no order of preference."""
    return {name: module.can_run(device, dtype, d_state) for name, module in BACKENDS.items()}


def _first_that_runs(device, dtype, d_state):
    refused = ""
    for name in ORDER.get(device, OTHER_DEVICES):
        ok, reason = BACKENDS[name].can_run(device, dtype, d_state)
        if ok:
            break
        refused += f"; not {name}: {reason}"
    _log_once(name, device, reason + refused)
    return name


def _log_once(name, device, reason):
    if (name, device) not in _logged:
        _logged.add((name, device))
        slow = name in ("torch", "reference")
        log.log(
            logging.WARNING if slow else logging.INFO,
            "scan       %s on %s (%s%s)",
            name,
            device,
            "SLOW: " if slow else "",
            reason,
        )
