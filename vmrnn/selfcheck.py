"""Do the kernels compute the right numbers on this machine?

    python -m vmrnn.selfcheck      every scan back end on every device of this machine, as a table for a bug report

Each back end and the layers around it are compared with plain torch in float64 on the CPU: outputs and every gradient,
on small maps. The Triton kernels are also checked by themselves when they are chosen for the first time on a GPU
(`first_use`). A process of its own does that, so that a kernel that crashes or hangs harms nothing else.
"""

import argparse
import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from vmrnn import scan
from vmrnn.errors import UserError, first_line
from vmrnn.files import replacing
from vmrnn.kernel_cache import cache_folder, distrust
from vmrnn.network import fused, fused_triton
from vmrnn.runtime import describe_device
from vmrnn.scan import chunked

log = logging.getLogger("vmrnn")

SECONDS = 300  # after which a check is given up
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value; faults that were seen are far larger
BUSY = ("busy or unavailable", "out of memory")  # the GPU has no room for a second process

# {case: (B, H, W, Di, R), dtype}; N is the network's. The second has a sequence that the Triton kernels split, and step
# sizes that they do not make themselves.
CASES = {
    "odd sizes": ((1, 5, 7, 40, 3), torch.float32),
    "split sequence": ((1, 16, 10, 24, 17), torch.float32),
    "bf16": ((2, 4, 6, 32, 2), torch.bfloat16),
}

LAYERS = ("norm", "conv_silu", "norm_gate_linear", "cell_gate")


def scan_inputs(B, H, W, Di, N, R, dtype=torch.float64, device="cpu", seed=0):
    """x, dbl, dt_weight, dt_bias, A_log, D of a scan, drawn so that every input matters. They require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(B, H, W, Di),
        normal(B, H, W, 4, R + 2 * N),
        normal(4, Di, R) * R**-0.5,
        normal(4, Di) - 2,
        normal(4, Di, N),
        normal(4, Di),
    )
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def outputs_and_gradients(function, inputs):
    """{name: tensor}: the outputs of function(*inputs), then the gradient with respect to each input.

    The gradients are those of the sum of all outputs, each element weighted by a fixed normal draw that bf16 can
    hold. Two calls on the same shapes use the same weights, whatever their dtype.
    """
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {f"gradient of input {i}": t for i, t in enumerate(gradients)}


def relative_error(value, reference):
    """Largest absolute difference, divided by the largest magnitude of the reference; 0 for two tensors of zeros."""
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def relative_errors(values, references):
    """{name: relative error} of two dictionaries of tensors with the same names and shapes."""
    assert values.keys() == references.keys()
    for name, value in values.items():
        assert value.shape == references[name].shape, f"{name}: {value.shape}, not {references[name].shape}"
    return {name: relative_error(value, references[name]) for name, value in values.items()}


def in_double(inputs):
    """Copies of tensors in float64 on the CPU, which require gradients."""
    return [t.detach().cpu().double().requires_grad_() for t in inputs]


def check_scan(name, device, shape, dtype, d_state):
    """{output or gradient: relative error} of one scan back end."""
    B, H, W, Di, R = shape
    inputs = scan_inputs(B, H, W, Di, d_state, R, dtype, device)
    got = outputs_and_gradients(scan.BACKENDS[name].scan_2d, inputs)
    return relative_errors(got, outputs_and_gradients(chunked.scan_2d, in_double(inputs)))


def layer_case(layers, layer, shape):
    """(function, shapes of its inputs, how many of them have half precision under autocast) of one layer.

    layers   fused or fused_triton
    layer    one of LAYERS
    shape    (B, H, W, C) of the map
    """
    C = shape[-1:]
    return {
        "norm": (lambda x, w, b: layers.norm(x, w, b, 1e-5), [shape, C, C], 0),
        "conv_silu": (layers.conv_silu, [shape, (*C, 1, 3, 3), C], 1),
        "norm_gate_linear": (
            lambda y, z, w, b, out: layers.norm_gate_linear(y, z, w, b, 1e-5, out),
            [shape, shape, C, C, (7, *C)],
            2,
        ),
        "cell_gate": (layers.cell_gate, [shape, shape], 0),
    }[layer]


def check_layer(layers, layer, device, shape, dtype):
    """{output or gradient: relative error} of one layer, with the dtypes that autocast to `dtype` gives its inputs."""
    function, shapes, halves = layer_case(layers, layer, shape)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(s, generator=generator).to(device, dtype if i < halves else torch.float32).requires_grad_()
        for i, s in enumerate(shapes)
    ]
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        got = outputs_and_gradients(function, inputs)
    plain, _, _ = layer_case(fused, layer, shape)
    return relative_errors(got, outputs_and_gradients(plain, in_double(inputs)))


def checks_of(name, device, d_state=16):
    """Yields the checks of a back end: (what, case, function without arguments that returns the errors, limit)."""
    layers = fused_triton if name == "triton" else fused
    for case, (shape, dtype) in CASES.items():
        limit = LIMITS[dtype]
        yield "scan", case, functools.partial(check_scan, name, device, shape, dtype, d_state), limit
        if case != "split sequence":  # the layers know no sequence
            for layer in LAYERS:
                yield layer, case, functools.partial(check_layer, layers, layer, device, shape[:4], dtype), limit


def complaint_of(check, limit):
    """(what is wrong, or None; the largest error, or None) of one check."""
    try:
        errors = check()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}", None
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    if errors[worst] <= limit:
        return None, errors[worst]
    return f"{worst} differs by {errors[worst]:.1e} of its largest value (allowed {limit:g})", errors[worst]


def check_all(name, device, d_state=16):
    """(what is wrong first, or None; the largest error of all)."""
    largest = 0.0
    for what, case, check, limit in checks_of(name, device, d_state):
        complaint, error = complaint_of(check, limit)
        if complaint:
            return f"{what}, {case}: {complaint}", error
        largest = max(largest, error)
    return None, largest


# The check at first use


def facts(device, d_state):
    """Everything that the result of a check depends on, as text."""
    gpu = torch.cuda.get_device_properties(device) if torch.cuda.is_available() else "no GPU"
    driver = Path("/proc/driver/nvidia/version")
    sources = [fused.__file__, fused_triton.__file__, __file__]
    sources += sorted(Path(scan.__file__).parent.glob("*.py"))
    return "\0".join([
        str(gpu), driver.read_text() if driver.exists() else "", torch.__version__, str(torch.version.cuda),
        str(torch.version.hip), getattr(scan.triton_scan.triton, "__version__", "none"), str(d_state),
        os.environ.get("TRITON_INTERPRET", ""), *(Path(source).read_text(encoding="utf-8") for source in sources),
    ])  # fmt: skip


def in_own_process(name, device, d_state):
    """check_all in a process of its own; what is wrong, or None."""
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "vmrnn.selfcheck", "--one", name, str(device), str(d_state)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the check did not end within {SECONDS} s"
    try:
        complaint = json.loads(done.stdout.splitlines()[-1])["complaint"]
    except (IndexError, ValueError, KeyError, TypeError):
        lines = done.stderr.strip().splitlines() or ["nothing printed"]
        return f"the check ended with exit code {done.returncode}: {lines[-1]}"
    if complaint and any(words in complaint for words in BUSY):
        return check_all(name, device, d_state)[0]
    return complaint


@functools.cache  # once per process
def first_use(name, device, d_state=16):
    """Returns None if a back end may be used on a device, else the reason why not.

    name     scan back end; all but "triton" are accepted unchecked
    device   type of the device; its current one is checked
    d_state  states per channel

    A check that was passed is remembered in the user's cache folder, for this GPU, driver, torch, Triton and source of
    the kernels. A check that failed is made again by every process.
    """
    if name != "triton":
        return None
    device = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    key = hashlib.sha256(facts(device, d_state).encode()).hexdigest()[:16]
    passed = cache_folder() / f"selfcheck-{key}.json"
    if passed.exists() and not distrust(passed):
        return None
    log.info("selfcheck  the Triton kernels run on this GPU for the first time: comparing them with torch")
    start = time.perf_counter()
    complaint = in_own_process(name, device, d_state)
    if complaint:
        log.warning("selfcheck  THE TRITON KERNELS ARE WRONG ON THIS GPU: %s", complaint)
        log.warning("selfcheck  please report this with what python -m vmrnn.selfcheck prints")
        return f"its check failed: {complaint}"
    log.info("selfcheck  passed in %.0f s", time.perf_counter() - start)
    try:
        with replacing(passed) as temporary:
            temporary.write_text(json.dumps({"passed": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
            temporary.chmod(0o600)
    except UserError as error:  # such as a full disk: the next process checks again
        log.warning("selfcheck  %s", error)
    return None


# The table


def devices():
    """The devices of this machine that back ends run on."""
    found = ["cpu"]
    found += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    found += ["xpu"] if hasattr(torch, "xpu") and torch.xpu.is_available() else []
    return found


def describe():
    """Lines on the machine and the versions."""
    yield from (describe_device(torch.device(device)) for device in devices())
    triton = scan.triton_scan.triton
    version = triton.__version__ if triton else "not installed"
    yield f"Triton {version}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("BACK_END", "DEVICE", "D_STATE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as vmrnn.runtime.pick_device does
    if args.one:
        name, device, d_state = args.one
        complaint, error = check_all(name, device, int(d_state))
        print(json.dumps({"complaint": complaint, "error": error}))
        return
    for line in describe():
        print(line)
    print(f"{'device':8}{'back end':11}{'what':18}{'case':16}{'error':>9}{'seconds':>9}  result")
    failed = 0
    for device in devices():
        for name, module in scan.BACKENDS.items():
            if name == "reference":  # not for use
                continue
            ok, reason = module.can_run(torch.device(device).type, torch.float32, 16)
            if not ok:
                print(f"{device:8}{name:11}not checked: {reason}")
                continue
            for what, case, check, limit in checks_of(name, device):
                start = time.perf_counter()
                complaint, error = complaint_of(check, limit)
                seconds = time.perf_counter() - start
                failed += complaint is not None
                error = f"{error:9.1e}" if error is not None else f"{'-':>9}"
                print(f"{device:8}{name:11}{what:18}{case:16}{error}{seconds:9.2f}  {complaint or 'ok'}", flush=True)
    print(f"{failed} checks failed" if failed else "all checks passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
