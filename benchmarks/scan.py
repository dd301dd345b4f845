"""The 2-D scan: every back end that runs here, and the arithmetic's floor, at the networks' shapes.

    python -m benchmarks.scan                 batch 1, 4 and 16
    python -m benchmarks.scan --batches 1     batch 1
    python -m benchmarks.scan --device cuda   fp32 and bf16; mamba is the published path, its copies included

Each back end must first agree with the reference in float64 (the CPU kernel to 5e-6, y and every
gradient); one that does not gets no figure and the program fails at its end. Then rounds go over all back ends
in turn, so that a machine whose speed drifts treats them alike. Medians over rounds; a human table,
then one JSON line. infer: forward under no_grad; forward: with the graph for a backward. peak: MiB of
GPU memory that forward and backward take beside their inputs. floor, on a CPU: as many exp and
multiply-add steps in registers, forward, and forward + recompute + backward; on a GPU: the special
functions that one pass needs, at the GPU's rate (vmrnn/scan/README.md), once and twice.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.timing import seconds
from vmrnn import scan
from vmrnn.runtime import cpu_name, pick_device, run_program
from vmrnn.scan import DIRECTIONS, cpu, reference

SHAPES = ((32, 256, 8), (16, 512, 16), (8, 1024, 32))  # H = W, Di, R of network D at 64x64, patch 2
D_STATE = 16
NAMES = ("y", "x", "dbl", "dt_weight", "dt_bias", "A_log", "D")
LIMITS = {"cpu": 5e-6}  # relative to the largest value; the others: OTHER_LIMIT
OTHER_LIMIT, BF16_LIMIT = 1e-4, 3e-2
REFERENCE_BATCH = 1  # larger ones keep gigabytes
REFERENCE_ROUNDS = 3  # slow enough to be steady
QUICK_SECONDS, QUICK_REPEATS = 0.05, 4  # what is quick runs more often in a round
CHECKED_BATCH = 8  # larger ones run the same kernels, and the float64 reference for them takes minutes
COLUMNS = ("infer", "forward", "both")
FLOOR = Path(__file__).with_name("floor.cpp")


def make_inputs(batch, side, Di, R, device, dtype=torch.float32):
    """x, dbl and dt_weight of `dtype`, dt_bias, A_log, D as in a fresh network: dt of 0.001 to 0.1, A = -(1..N)."""
    torch.manual_seed(0)
    K, N = DIRECTIONS, D_STATE
    dt = torch.exp(torch.rand(K, Di) * 4.6 - 6.9)
    inputs = (
        torch.randn(batch, side, side, Di),
        torch.randn(batch, side, side, K, R + 2 * N),
        torch.randn(K, Di, R) * R**-0.5,
        dt + torch.log(-torch.expm1(-dt)),
        torch.log(torch.arange(1.0, N + 1)).repeat(K, Di, 1),
        torch.randn(K, Di),
    )
    inputs = [t.to(device, dtype if i < 3 else None) for i, t in enumerate(inputs)]
    return [t.requires_grad_() for t in inputs]


def outputs_and_gradients(function, inputs, dy):
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def exact(inputs, dy):
    """The reference in float64, one batch item at a time: the loop keeps every state."""
    x, dbl, *parameters = [t.detach().double() for t in inputs]
    results = []
    for i in range(len(x)):
        leaves = [t.requires_grad_() for t in (x[i : i + 1].clone(), dbl[i : i + 1].clone(), *parameters)]
        results.append(outputs_and_gradients(reference.scan_2d, leaves, dy[i : i + 1].double()))
    maps = [torch.cat([r[j] for r in results]) for j in range(3)]
    return maps + [sum(r[j] for r in results) for j in range(3, len(NAMES))]


def relative_error(actual, expected):
    return {
        name: ((a.double() - e).abs().max() / e.abs().max()).item()
        for name, a, e in zip(NAMES, actual, expected, strict=True)
    }


def extra_mib(function):
    """GPU memory that `function` takes beside what is there already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def no_grad(function, inputs):
    with torch.no_grad():
        function(*inputs)


def floor_runs(inputs):
    """The floor's forward and forward + backward for these shapes."""
    library = ctypes.CDLL(str(cpu.build(cpu.wanted_isa(), (FLOOR, cpu.SOURCE))))
    library.vmrnn_floor.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
    count, threads = inputs[0].numel() * DIRECTIONS * D_STATE, torch.get_num_threads()

    def forward():
        library.vmrnn_floor(count, threads, 0)

    def both():
        forward()
        library.vmrnn_floor(count, threads, 1)

    return forward, forward, both


def gpu_floor(inputs, device):
    """Seconds of one pass's special functions at the GPU's rate, 16 a clock on each SM; None if it names no clock."""
    gpu = torch.cuda.get_device_properties(device)
    clock = getattr(gpu, "clock_rate", 0)  # kHz
    count = inputs[0].numel() * DIRECTIONS * (D_STATE + 2)
    return count / (gpu.multi_processor_count * 16 * clock * 1e3) if clock else None


def measure(back_ends, shape, batch, device, rounds, dtype=torch.float32):
    """{back end: {"infer": s, "forward": s, "both": s, "error": largest relative error, "peak": MiB on a GPU}}"""
    inputs = make_inputs(batch, *shape, device, dtype)
    dy = torch.randn_like(inputs[0])
    expected = exact(inputs, dy) if batch <= CHECKED_BATCH or device.type == "cpu" else None
    runs, results = {}, {}
    for name, function in back_ends.items():
        if name == "reference" and batch > REFERENCE_BATCH:
            continue
        results[name] = {}
        if expected:
            errors = relative_error(outputs_and_gradients(function, inputs, dy), expected)
            limit = BF16_LIMIT if dtype == torch.bfloat16 else LIMITS.get(name, OTHER_LIMIT)
            wrong = {key: f"{e:.1e}" for key, e in errors.items() if not e <= limit}
            results[name]["error"] = max(errors.values())
            if wrong:
                results[name]["wrong"] = f"{name} differs from the float64 reference at {shape}, batch {batch}: {wrong}"
                continue
        runs[name] = (
            lambda f=function: no_grad(f, inputs),
            lambda f=function: f(*inputs),
            lambda f=function: outputs_and_gradients(f, inputs, dy),
        )
        for function in runs[name]:  # what is compiled at a first call is not timed
            function()
        if device.type == "cuda":
            results[name]["peak"] = extra_mib(runs[name][-1])
    if device.type == "cuda" and (floor := gpu_floor(inputs, device)):
        results["floor"] = {"infer": floor, "forward": floor, "both": 2 * floor}
    if "cpu" in back_ends:
        runs["floor"] = floor_runs(inputs)
        results["floor"] = {}
    times = {(name, column): [] for name in runs for column in COLUMNS}
    for r in range(rounds):
        for name, functions in runs.items():
            if name == "reference" and r >= REFERENCE_ROUNDS:
                continue
            for column, function in zip(COLUMNS, functions, strict=True):
                first = seconds(function, device)
                repeats = QUICK_REPEATS if first < QUICK_SECONDS else 0
                times[name, column] += [first] + [seconds(function, device) for _ in range(repeats)]
    for (name, column), measured in times.items():
        results[name][column] = statistics.median(measured)
    return results


def print_results(shape, batch, results, dtype):
    side, Di, _ = shape
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for name, r in results.items():
        if "wrong" in r:
            print(r["wrong"], flush=True)
            continue
        cells = [f"{side:>3}x{side:<2} {Di:>5} {batch:>5} {kind}  {name:<10}"]
        cells += [f"{1e3 * r[column]:>9.2f}" for column in COLUMNS]
        for other, ratio in (("reference", lambda a, b: b / a), ("floor", lambda a, b: a / b)):
            cells += [
                f"{ratio(r[column], results[other][column]):>7.1f}" if column in results.get(other, {}) else f"{'-':>7}"
                for column in COLUMNS
            ]
        cells += [f"{r['error']:.1e}" if "error" in r else "", f"{r['peak']:8.0f}" if "peak" in r else ""]
        print(" ".join(cells), flush=True)


def describe(device):
    """The machine and the versions."""
    compiler = cpu.find_compiler()
    version = (
        compiler and subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    )
    return {
        "cpu": cpu_name(),
        "isa": cpu.wanted_isa(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiler": version or "none",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1, 4 and 16; on a GPU 1, 8, 16 and 64")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    modules = {"reference": reference, **scan.BACKENDS, "cpu": cpu}
    back_ends = {
        name: module.scan_2d
        for name, module in modules.items()
        if (not on_gpu if name == "reference" else module.can_run(device.type, torch.float32, D_STATE)[0])
    }
    environment = describe(device)
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"{'':35} {'milliseconds':>29} {'times faster than reference':>23} {'times the floor':>19}")
    titles = "".join(f"{c:>10}" for c in COLUMNS) + "".join(f"{c:>8}" for c in COLUMNS) * 2
    print(f"{'map':>6} {'Di':>5} {'batch':>5} {'type':<4}  {'back end':<10}{titles} error   peak")
    records = []
    for batch in args.batches or ((1, 8, 16, 64) if on_gpu else (1, 4, 16)):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
                rounds = args.rounds or (7 if batch == 1 and not on_gpu else 3)
                results = measure(back_ends, shape, batch, device, rounds, dtype)
                print_results(shape, batch, results, dtype)
                side, Di, R = shape
                fixed = {"side": side, "Di": Di, "R": R, "batch": batch, "dtype": str(dtype)}
                records += [{**fixed, "name": n, **r} for n, r in results.items()]
    print(json.dumps({"benchmark": "scan", "environment": environment, "results": records}))
    sys.exit(1 if any("wrong" in r for r in records) else 0)


if __name__ == "__main__":
    run_program(main)
