"""The 2-D selective scan: its entry point, and the choice of a back end.

A back end is a module with two functions:
scan_2d(x, dbl, dt_weight, dt_bias, A_log, D) -> y    the contract is in reference.py
can_run(device, dtype, d_state) -> (bool, reason)     device is a type such as "cuda"
"""

import logging

import torch

from vmrnn.errors import UserError
from vmrnn.scan import chunked, cpu, mamba, reference, triton_scan

DIRECTIONS = reference.DIRECTIONS
BACKENDS = {"mamba": mamba, "triton": triton_scan, "cpu": cpu, "torch": chunked, "reference": reference}

# What `auto` tries, first to last. Change the order only on numbers from benchmarks/.
ORDER = {"cuda": ("mamba", "triton", "torch"), "cpu": ("cpu", "torch")}
OTHER_DEVICES = ("torch",)

log = logging.getLogger("vmrnn")
_logged = set()
first_use = None  # see register_first_use


def scan_2d(x, dbl, dt_weight, dt_bias, A_log, D, backend="auto"):
    """Selective scan of a feature map in four directions, summed; see `reference.scan_2d` for shapes.

    backend  "auto" or a key of BACKENDS. A named back end that cannot run raises UserError and never falls back.

    The choice is made at every call. A network makes it once: vmrnn/network/kernels.py.
    """
    return run(resolve(backend, x.device.type, x.dtype, A_log.shape[-1]), x, dbl, dt_weight, dt_bias, A_log, D)


def run(name, x, dbl, dt_weight, dt_bias, A_log, D):
    """scan_2d by the back end `name`, a name that `resolve` has returned."""
    check_shapes(x, dbl, dt_weight, dt_bias, A_log, D)
    return BACKENDS[name].scan_2d(x, dbl, dt_weight, dt_bias, A_log, D)


def check_shapes(x, dbl, dt_weight, dt_bias, A_log, D):
    """Raises ValueError if a shape does not fit: a kernel would then read beyond the end of a tensor."""
    *map_shape, Di = x.shape
    K, N, R = DIRECTIONS, A_log.shape[-1], dt_weight.shape[-1]
    expected = {"dbl": (*map_shape, K, R + 2 * N), "dt_weight": (K, Di, R), "dt_bias": (K, Di), "A_log": (K, Di, N),
                "D": (K, Di)}  # fmt: skip
    for (name, shape), tensor in zip(expected.items(), (dbl, dt_weight, dt_bias, A_log, D)):
        if x.ndim != 4 or tuple(tensor.shape) != shape:
            raise ValueError(f"scan: {name} is {tuple(tensor.shape)}, x {tuple(x.shape)} (B, H, W, Di) needs {shape}")


def register_first_use(check):
    """Let `resolve` ask check(name, device, d_state) before it takes a back end that can run.

    The check returns None if the back end may be used, else the reason why not. vmrnn.network registers
    selfcheck.first_use. This package may not import it, because it also checks the layers.
    """
    global first_use
    first_use = check


def usable(name, device, dtype, d_state):
    """(whether a back end may be used, the reason)."""
    ok, reason = BACKENDS[name].can_run(device, dtype, d_state)
    complaint = first_use(name, device, d_state) if ok and first_use else None
    return (False, complaint) if complaint else (ok, reason)


def resolve(backend, device, dtype=torch.float32, d_state=16):
    """The name of the back end that `backend` means, logged the first time.

    backend  "auto" or a key of BACKENDS
    device   type of the device: "cpu", "cuda", ...
    dtype    of the feature map
    d_state  states per channel

    Raises UserError, with the reason, for a name that does not exist or a back end that cannot run.
    """
    if backend == "auto":
        return _first_that_runs(device, dtype, d_state)
    if backend not in BACKENDS:
        raise UserError(f"scan back end {backend!r} does not exist: choose auto, {', '.join(BACKENDS)}")
    ok, reason = usable(backend, device, dtype, d_state)
    if not ok:
        raise UserError(f"scan back end {backend!r} cannot run on {device} here: {reason}")
    _log_once(backend, device, reason)
    return backend


def _first_that_runs(device, dtype, d_state):
    refused = ""
    for name in ORDER.get(device, OTHER_DEVICES):
        ok, reason = usable(name, device, dtype, d_state)
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
