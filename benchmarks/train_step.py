"""Whole steps: a training step (rollout, loss, backward, Adam) and one frame forward, seconds and memory.

    python -m benchmarks.train_step                       networks B and D, batch 1 and 4, on the CPU
    python -m benchmarks.train_step --cases D:1 D:1:checkpoint D:1:torch --rounds 5
    python -m benchmarks.train_step --device cuda --cases D:16:bf16 D:16:bf16:mamba D:16:bf16:graph

A case is NETWORK:BATCH and any of: checkpoint, bf16, compile, graph (--cuda_graph), muon (else Adam), mkl (products by
MKL where vmrnn/network/linear.py would take oneDNN), and a scan back end (default: auto; mamba is the published path,
with its stacked and flipped copies). Networks B and D are the published ones (64x64, patch 2, width 128); B4, B8 and D4
are networks for a CPU: NETWORKS below. All have 10 + 10 frames. "CPU" is the CPU time of a training step, of all
threads: on a busy machine it is steadier than the time that passes. "frame" is one frame of a stream, batch 1, as
vmrnn.Forecaster runs it.

Each case runs in a process of its own, so that its peak memory is its own. Every round runs all cases in turn, so that
a machine whose speed drifts treats them alike. The golden tests of every back end used must pass first. Prints a table
of medians over rounds, and adds a line to exps/benchmarks/train_step.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch

from benchmarks.record import record
from benchmarks.timing import cpu_seconds, peak_mib, wall_seconds
from functions import RolloutLoss, Step, mixed_precision
from vmrnn import scan
from vmrnn.errors import UserError
from vmrnn.graphs import GraphedForward, GraphedStep
from vmrnn.network import build_model, compile_model, linear
from vmrnn.optim import make_optimizer
from vmrnn.rollout import Rollout
from vmrnn.runtime import describe_device, pick_device, run_program

FRAMES = 10  # given, and to forecast

OPTIONS = {"checkpoint", "bf16", "compile", "graph", "muon", "mkl"}

# name: network, patch size, width, blocks of B or blocks down and up of D, side of the frames
NETWORKS = {
    "B": ("VMRNN-B", 2, 128, [6], 64),
    "D": ("VMRNN-D", 2, 128, ([2, 6], [6, 2]), 64),
    "B4": ("VMRNN-B", 4, 48, [2], 32),  # configs/quickstart.toml
    "B8": ("VMRNN-B", 8, 128, [3], 64),  # the full task of benchmarks.recipes
    "D4": ("VMRNN-D", 4, 64, ([2], [3]), 64),
}


def back_end_of(case, device):
    """The scan back end of a case, resolved. Raises UserError for a case of unknown words."""
    if case.split(":")[0] not in NETWORKS:
        raise UserError(f"case {case}: the network must be one of {', '.join(NETWORKS)}")
    words = set(case.split(":")[2:]) - OPTIONS
    return scan.resolve(words.pop() if words else "auto", device.type)


def measure(case, device, frames=True):
    """{"step": s, "cpu": s, "peak": MiB, and if frames "frame": s} of one case, in this process."""
    network, batch, *rest = case.split(":")
    back_end = back_end_of(case, device)
    precision = "bf16" if "bf16" in rest else "fp32"
    torch.manual_seed(0)
    name, patch_size, embed_dim, depths, side = NETWORKS[network]
    model = build_model(
        name, patch_size=patch_size, in_chans=1, embed_dim=embed_dim, depths=depths, depths_down=depths[0],
        depths_up=depths[-1], scan=back_end,
    ).to(device)  # fmt: skip
    if "mkl" in rest:
        linear.onednn_is_faster = lambda: False
    if "compile" in rest:
        compile_model(model, device)
    optimizer = make_optimizer(model, "muon" if "muon" in rest else "adam", 1e-4, 0.0, device)
    inputs, targets = torch.rand(2, int(batch), FRAMES, 1, side, side, device=device).unbind(0)

    one_step = Step(Rollout(model, "checkpoint" in rest), RolloutLoss(), device, precision)
    if "graph" in rest:
        one_step = GraphedStep(one_step)

    def step():
        one_step.clear_gradients()
        one_step(inputs, targets)
        optimizer.step()

    step()
    result = {"step": wall_seconds(step), "cpu": cpu_seconds(step), "peak": peak_mib(device)}
    if not frames:
        return result
    model.eval()
    with torch.inference_mode(), mixed_precision(device, precision):
        forward = GraphedForward(model) if "graph" in rest else model
        frame = inputs[:1, 0]
        _, states = forward(frame)
        for _ in range(3):
            forward(frame, states)
        result["frame"] = wall_seconds(lambda: forward(frame, states))
    return result


def profile(case, device):
    """Print where one training step of `case` spends its time on the CPU, by operation."""
    with torch.profiler.profile() as recorded:
        measure(case, device, frames=False)
    rows = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"{describe_device(device)}; {case}, training steps, {total / 1e6:.2f} s of operations")
    for row in rows[:20]:
        own = row.self_cpu_time_total
        print(f"{row.key[:56]:58}{own / 1e3:9.1f} ms{own / total:8.1%}{row.count:8}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["B:1", "B:4", "D:1", "D:1:checkpoint", "D:4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", metavar="CASE", help="measure one case in this process and print JSON")
    parser.add_argument("--profile", metavar="CASE", help="print the operations of one case's training step")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.profile:
        profile(args.profile, device)
        return
    if args.one:
        print(json.dumps(measure(args.one, device)))
        return

    used = " or ".join(sorted({f"{device.type}-{back_end_of(case, device)}" for case in args.cases}))
    gate = [sys.executable, "-m", "pytest", "-q", "tests/test_networks.py", "-k", f"golden and ({used})"]
    if subprocess.run(gate, capture_output=True).returncode:
        sys.exit(f"{' '.join(gate[1:])} fails: no figure from a step that computes something else")
    print(f"{describe_device(device)}; {args.rounds} rounds, medians; {FRAMES} + {FRAMES} frames")
    print(
        f"{'case':30}{'step [s]':>10}{'CPU [s]':>10}{'frames/s':>10}{'peak [MiB]':>12}{'frame forward [ms]':>20}",
        flush=True,
    )
    results, failed = {case: [] for case in args.cases}, {}
    for last in (n == args.rounds - 1 for n in range(args.rounds)):
        for case, rounds in results.items():
            command = [sys.executable, "-m", "benchmarks.train_step", "--one", case, "--device", args.device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:  # such as out of memory: the other cases still run
                failed[case] = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                print(f"{case:30}  failed: {failed[case]}", flush=True)
                continue
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            if last:  # printed at once: nothing is lost if the program is stopped later
                print(row(case, medians_of(rounds)), flush=True)
    medians = {case: medians_of(rounds) for case, rounds in results.items() if rounds}
    record("train_step", {"device": describe_device(device), "medians": medians, "failed": failed})
    sys.exit(1 if failed else 0)


def medians_of(rounds):
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def row(case, medians):
    rate = int(case.split(":")[1]) * 2 * FRAMES / medians["step"]
    return (
        f"{case:30}{medians['step']:10.3f}{medians['cpu']:10.3f}{rate:10.1f}{medians['peak']:12.0f}"
        f"{1e3 * medians['frame']:20.2f}"
    )


if __name__ == "__main__":
    run_program(main)
