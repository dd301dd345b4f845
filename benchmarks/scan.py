"""The 2-D scan: every back end that runs here, and the arithmetic's floor, at the networks' shapes.

    python -m benchmarks.scan                 batch 1, 4 and 16
    python -m benchmarks.scan --batches 1     batch 1
    python -m benchmarks.scan --batches 1 --only cpu --cpu_time --against COMMIT
                                              the CPU kernel and that of a commit, by the CPU time of all threads
    python -m benchmarks.scan --device cuda   fp32 and bf16; mamba is the published path, its copies included

A back end must first agree with the reference in float64 (the CPU kernel to 5e-6, y and every gradient). One that does
not gets no figure, and the program ends with an error. Every round measures all back ends in turn, so that a machine
whose speed drifts treats them alike. Medians over rounds: a table, and a line of JSON in exps/benchmarks/scan.jsonl.

infer       forward under no_grad
forward     forward that keeps what a backward needs
both        forward and backward
peak        MiB of GPU memory that forward and backward need besides their inputs
floor       the time of the arithmetic alone. On a CPU: the exp and the multiply-adds of the states in registers, for
            `both` also those of the recomputation and of the backward. On a GPU: the special functions of one pass at
            the GPU's rate (vmrnn/scan/README.md), for `both` those of two
full floor  on a CPU: also the step sizes, D x and the sums over channels, but no maps in memory (floor.cpp)

VMRNN_CPU_ISA=avx2 in the environment measures the CPU kernel and the floors with AVX2.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.record import record
from benchmarks.timing import cpu_seconds, kernel_seconds
from tests.helpers import fresh_scan_inputs, outputs_and_gradients, relative_errors
from vmrnn import compiler, scan
from vmrnn.errors import UserError
from vmrnn.runtime import cpu_name, pick_device, run_program
from vmrnn.scan import DIRECTIONS, cpu, reference

SHAPES = ((32, 256, 8), (16, 512, 16), (8, 1024, 32))  # H = W, Di, R of network D at 64x64, patch 2
D_STATE = 16
LIMITS = {"cpu": 5e-6}  # relative to the largest value; the others: OTHER_LIMIT
OTHER_LIMIT, BF16_LIMIT = 1e-4, 3e-2
REFERENCE_BATCH = 1  # larger ones keep gigabytes
REFERENCE_ROUNDS = 3  # slow enough to be steady
CHECKED_BATCH = 8  # larger ones run the same kernels, and the float64 reference for them takes minutes
COLUMNS = ("infer", "forward", "both")
FLOOR = Path(__file__).with_name("floor.cpp")


def make_inputs(batch, side, Di, R, device, dtype=torch.float32):
    """The scan's inputs as a fresh network has them; x, dbl and dt_weight are of `dtype`, the others fp32."""
    inputs = fresh_scan_inputs(batch, side, side, Di, D_STATE, R, device=device)
    return [t.detach().to(dtype).requires_grad_() if i < 3 else t for i, t in enumerate(inputs)]


def exact(inputs):
    """outputs_and_gradients of the reference in float64."""
    return outputs_and_gradients(reference.scan_2d, [t.detach().double().requires_grad_() for t in inputs])


def extra_mib(function):
    """MiB of GPU memory that `function` needs besides what is allocated already."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def no_grad(function, inputs):
    with torch.no_grad():
        function(*inputs)


def floor_runs(inputs):
    """{name of a floor: its forward, again, and forward + backward} for these shapes."""
    flags = cpu.FLAGS + cpu.ISA_FLAGS[cpu.wanted_isa()]
    library = ctypes.CDLL(str(compiler.build("floor", (FLOOR, cpu.SOURCE), flags)))
    number = ctypes.c_int64
    library.vmrnn_floor.argtypes = (number, ctypes.c_int, ctypes.c_int)
    library.vmrnn_full_floor.argtypes = (number, number, number, ctypes.c_int, ctypes.c_int)
    count, R, threads = inputs[0].numel() * DIRECTIONS, inputs[2].shape[-1], torch.get_num_threads()
    passes = {
        "floor": lambda both: library.vmrnn_floor(count * D_STATE, threads, both),
        "full floor": lambda both: library.vmrnn_full_floor(count, D_STATE, R, threads, both),
    }
    return {name: (lambda f=f: f(0), lambda f=f: f(0), lambda f=f: (f(0), f(1))) for name, f in passes.items()}


OTHER_KERNELS = {}  # name of a back end: the library that takes the place of the CPU kernel's


def library_of(commit):
    """The compiled CPU kernel of a commit of this repository. Raises UserError if there is none."""
    path = cpu.SOURCE.relative_to(Path(__file__).resolve().parents[1]).as_posix()
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], capture_output=True)
    if shown.returncode:
        raise UserError(f"--against {commit}: {shown.stderr.decode().splitlines()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cpu.cpp"
        source.write_bytes(shown.stdout)
        return cpu.open_library(compiler.build("scan", (source,), cpu.FLAGS + cpu.ISA_FLAGS[cpu.wanted_isa()]))


def kernel(name):
    """A context in which the CPU kernel is that of the back end called `name`."""
    return patch.object(cpu, "load", lambda: OTHER_KERNELS[name]) if name in OTHER_KERNELS else nullcontext()


def gpu_floor(inputs, device):
    """Seconds of one pass's special functions at 16 per clock and SM; None if the GPU does not name its clock."""
    gpu = torch.cuda.get_device_properties(device)
    clock = getattr(gpu, "clock_rate", 0)  # kHz
    count = inputs[0].numel() * DIRECTIONS * (D_STATE + 2)
    return count / (gpu.multi_processor_count * 16 * clock * 1e3) if clock else None


def measure(back_ends, shape, batch, device, rounds, dtype=torch.float32, seconds=kernel_seconds):
    """{back end: {"infer": s, "forward": s, "both": s, "error": largest relative error, "peak": MiB on a GPU}}"""
    inputs = make_inputs(batch, *shape, device, dtype)
    expected = exact(inputs) if batch <= CHECKED_BATCH or device.type == "cpu" else None
    runs, results = {}, {}
    for name, function in back_ends.items():
        if name == "reference" and batch > REFERENCE_BATCH:
            continue

        # Nothing is timed that computes something else.
        results[name] = {}
        if expected:
            with kernel(name):
                errors = relative_errors(outputs_and_gradients(function, inputs), expected)
            limit = BF16_LIMIT if dtype == torch.bfloat16 else LIMITS.get(name.split()[0], OTHER_LIMIT)
            wrong = {key: f"{e:.1e}" for key, e in errors.items() if not e <= limit}
            results[name]["error"] = max(errors.values())
            if wrong:
                results[name]["wrong"] = f"{name} differs from the float64 reference at {shape}, batch {batch}: {wrong}"
                continue
        runs[name] = (
            lambda f=function: no_grad(f, inputs),
            lambda f=function: f(*inputs),
            lambda f=function: outputs_and_gradients(f, inputs),
        )
        if device.type == "cuda":
            results[name]["peak"] = extra_mib(runs[name][-1])

    # The floors are further rows.
    if device.type == "cuda" and (floor := gpu_floor(inputs, device)):
        results["floor"] = {"infer": floor, "forward": floor, "both": 2 * floor}
    if "cpu" in back_ends:
        runs |= floor_runs(inputs)
        results |= {"floor": {}, "full floor": {}}

    times = {(name, column): [] for name in runs for column in COLUMNS}
    for r in range(rounds):
        for name, functions in runs.items():
            if name == "reference" and r >= REFERENCE_ROUNDS:
                continue
            for column, function in zip(COLUMNS, functions, strict=True):
                with kernel(name):
                    times[name, column].append(seconds(function, device, at_least=0.05))
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
        cells = [f"{side:>3}x{side:<2} {Di:>5} {batch:>5} {kind}  {name:<13}"]
        cells += [f"{1e3 * r[column]:>9.2f}" for column in COLUMNS]
        for other, ratio in (
            ("reference", lambda a, b: b / a),
            ("floor", lambda a, b: a / b),
            ("full floor", lambda a, b: a / b),
        ):
            cells += [
                f"{ratio(r[column], results[other][column]):>7.2f}" if column in results.get(other, {}) else f"{'-':>7}"
                for column in COLUMNS
            ]
        cells += [f"{r['error']:.1e}" if "error" in r else "", f"{r['peak']:8.0f}" if "peak" in r else ""]
        print(" ".join(cells), flush=True)


def describe(device):
    """The machine and the versions."""
    command = compiler.find_compiler()
    version = command and subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
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
    parser.add_argument("--only", nargs="+", metavar="BACK_END", help="leave the other back ends out")
    parser.add_argument("--against", nargs="+", default=[], metavar="COMMIT", help="CPU kernels of other commits")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time of all threads, on a CPU")
    args = parser.parse_args()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    back_ends = {
        name: module.scan_2d
        for name, module in scan.BACKENDS.items()
        if module.can_run(device.type, torch.float32, D_STATE)[0] and not (on_gpu and name == "reference")
    }
    if args.only:
        back_ends = {name: function for name, function in back_ends.items() if name in args.only}
    for commit in args.against:
        OTHER_KERNELS[f"cpu {commit}"] = library_of(commit)
        back_ends[f"cpu {commit}"] = cpu.scan_2d
    seconds = kernel_seconds
    if args.cpu_time:
        seconds = lambda function, device, at_least: cpu_seconds(function, at_least)  # noqa: E731
    environment = describe(device)
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    ratios = ("times faster than loop", "times the floor", "times the full floor")
    print(f"{'':37} {'milliseconds':>29}" + "".join(f"{title:>24}" for title in ratios))
    titles = "".join(f"{c:>10}" for c in COLUMNS) + "".join(f"{c:>8}" for c in COLUMNS) * 3
    print(f"{'map':>6} {'Di':>5} {'batch':>5} {'type':<4}  {'back end':<13}{titles} error   peak")
    records = []
    for batch in args.batches or ((1, 8, 16, 64) if on_gpu else (1, 4, 16)):
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
                rounds = args.rounds or (7 if batch == 1 and not on_gpu else 3)
                results = measure(back_ends, shape, batch, device, rounds, dtype, seconds)
                print_results(shape, batch, results, dtype)
                side, Di, R = shape
                fixed = {"side": side, "Di": Di, "R": R, "batch": batch, "dtype": str(dtype)}
                records += [{**fixed, "name": n, **r} for n, r in results.items()]
    record("scan", {"environment": environment, "results": records})
    sys.exit(1 if any("wrong" in r for r in records) else 0)


if __name__ == "__main__":
    run_program(main)
