"""The cells of --cell in network B: trained at equal parameters, then at equal CPU time. Also --head and --d_state.

    python -m benchmarks.cells --digits mnist                       the small task of benchmarks.recipes, three seeds
    python -m benchmarks.cells --digits mnist --task full --seeds 1
    python -m benchmarks.cells --digits mnist --cells vss vss-advection --rates 3e-3
    python -m benchmarks.cells --digits mnist --cells vss vss-4-states --rates 3e-3

Each cell has its own width and depth, chosen so that the networks have equally many parameters (within 5 %). Everything
else is the same: task, recipe (Muon, a tenth of the L1, a curriculum) and sequences. The first table trains every cell
on the same sequences. The learning rate is the best of --rates with seed 0, for each cell on its own. The second table
trains the same networks at the same rates with as much CPU time as the first cell took in the first table: CPU seconds
per update are measured once, all cells in turn, and give every cell its number of sequences.

Every run is a process of `python train.py`. Run folders stay under --folder, so a benchmark that was stopped continues
where it was. Figures are those of `python test.py` on the same held-out digits: means over the seeds, and the MSE of
every seed. Also: CPU milliseconds per frame of a forecast with batch 1, CPU milliseconds per frame and sequence of
training, and the memory per frame and sequence that training keeps for the backward pass (benchmarks.footprint).
"""

import argparse
import json
import os
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.footprint import fake_footprint
from benchmarks.recipes import SEQUENCES, TASKS, judge, small_updates, with_sequences
from benchmarks.record import record
from benchmarks.timing import cpu_seconds
from functions import RolloutLoss, Step
from vmrnn import config as configuration
from vmrnn.network import build_model
from vmrnn.rollout import Rollout
from vmrnn.runtime import cpu_name, run_program

SIZES = {
    "small": {
        "vss": {"cell": "vss", "embed_dim": 80, "depths": [2]},
        "swin": {"cell": "swin", "embed_dim": 80, "depths": [2]},
        "conv": {"cell": "conv", "embed_dim": 32, "depths": [3]},
        "vss-advection": {"cell": "vss", "embed_dim": 80, "depths": [2], "head": "advection"},
        "vss-4-states": {"cell": "vss", "embed_dim": 80, "depths": [2], "d_state": 4},
        "vss-1-state": {"cell": "vss", "embed_dim": 80, "depths": [2], "d_state": 1},
    },
    "full": {
        "vss": {"cell": "vss", "embed_dim": 128, "depths": [4]},
        "swin": {"cell": "swin", "embed_dim": 112, "depths": [5]},
        "conv": {"cell": "conv", "embed_dim": 80, "depths": [2]},
        "vss-advection": {"cell": "vss", "embed_dim": 128, "depths": [4], "head": "advection"},
        "vss-4-states": {"cell": "vss", "embed_dim": 128, "depths": [4], "d_state": 4},
        "vss-1-state": {"cell": "vss", "embed_dim": 128, "depths": [4], "d_state": 1},
    },
}
BATCH = 4  # sequences per update
ROUNDS = 5  # of the measurement of CPU time


def options_of(task, cell, rate, share=1.0):
    """The options of a training run. share: of the task's sequences."""
    return with_sequences(TASKS[task] | SIZES[task][cell] | small_updates(BATCH, rate), share)


def config_of(task, cell):
    """The Config of a training run, at any learning rate."""
    return configuration.resolve(None, options_of(task, cell, 1e-3))


def costs(task, cells):
    """What each cell costs, {cell: {figure: value}}. Times are medians over rounds that take the cells in turn.

    parameters   of the network
    train        CPU seconds of training per frame and sequence
    forecast     CPU seconds per frame
    memory       bytes that training keeps for the backward pass, per frame and sequence
    """
    calls, found = {}, {}  # calls: {(cell, what): (function, frames that it computes)}
    for cell in cells:
        config = config_of(task, cell)
        model = build_model(**config.network_options)
        frames = torch.rand(BATCH, config.num_frames_input + config.num_frames_output, 1, *config.frame_size)
        inputs, targets = frames.split((config.num_frames_input, config.num_frames_output), 1)
        steps = BATCH * (frames.shape[1] - 1)
        step = Step(Rollout(model), RolloutLoss(0.1), torch.device("cpu"))
        step(inputs, targets)
        first = frames[:1, 0]
        states = model(first)[1]
        calls[cell, "train"] = partial(step, inputs, targets), steps
        calls[cell, "forecast"] = partial(torch.inference_mode()(model.forward), first, states), 1
        weights = sum(p.numel() for p in model.parameters())
        kept = fake_footprint(config)["kept"] - 4 * weights
        found[cell] = {"parameters": weights, "memory": kept / steps}
    rounds = [{key: cpu_seconds(call) for key, (call, _) in calls.items()} for _ in range(ROUNDS)]
    for (cell, what), (_, computed) in calls.items():
        found[cell][what] = statistics.median(times[cell, what] for times in rounds) / computed
    return found


def once(path, function):
    """What function() returned when it was first called: JSON, kept in `path`."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(function()))
    return json.loads(path.read_text())


def figures(folder, digits, options, sequences):
    """{"mse", "ssim", "last": MSE at the last lead time} of one run."""
    means = judge(folder, digits, options, sequences)
    per_frame = json.loads((folder / "test" / "metrics.json").read_text())["results"]["forecast"]["per_frame"]
    return {"mse": means["mse"], "ssim": means["ssim"], "last": per_frame["mse"][-1]}


def print_row(cell, runs, rate, sequences, cost):
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    print(
        f"{cell:14}{cost['parameters']:>10,}{rate:>9g}{sequences:>11,}"
        f"{mean['mse']:8.2f}{mean['ssim']:8.3f}{mean['last']:8.2f}"
        f"{1e3 * cost['forecast']:10.2f}{1e3 * cost['train']:9.2f}{cost['memory'] / 2**20:8.2f}   "
        + "".join(f"{run['mse']:8.2f}" for run in runs),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="mnist", help="as train.py's --train_data_dir")
    parser.add_argument("--task", choices=TASKS, default="small")
    parser.add_argument("--cells", nargs="+", default=["vss", "swin", "conv"], choices=list(SIZES["small"]))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--folder", type=Path, default=Path("exps/cells"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root, sequences = args.folder / args.task, SEQUENCES[args.task]
    cost = once(root / f"costs_{'_'.join(args.cells)}.json", lambda: costs(args.task, args.cells))
    header = (
        "cell          parameters     rate  sequences     MSE    ssim    last  forecast    train  memory"
        "   MSE of each seed"
    )

    def run(cell, rate, seed, share=1.0):
        options = options_of(args.task, cell, rate, share) | {"seed": seed}
        name = f"{cell}_{rate:g}" + (f"_share_{share:.3f}" if share != 1 else "")
        return figures(root / name / str(seed), args.digits, options, sequences), options

    print(f"{cpu_name()}, torch {torch.__version__}, one thread; the {args.task} task, updates of {BATCH}")
    print(f"equal parameters\n{header}")
    rates, results = {}, {"equal parameters": {}, "equal CPU time": {}}
    for cell in args.cells:
        tried = {rate: run(cell, rate, 0)[0] for rate in args.rates}
        rates[cell] = min(tried, key=lambda rate, tried=tried: tried[rate]["mse"])
        runs = [run(cell, rates[cell], seed)[0] for seed in range(args.seeds)]
        options = options_of(args.task, cell, rates[cell])
        print_row(cell, runs, rates[cell], options["epochs"] * options["train_sequences"], cost[cell])
        results["equal parameters"][cell] = {"rate": rates[cell], "runs": runs, "tried": tried}

    print(f"equal CPU time, {args.cells[0]}'s in the table above\n{header}")
    for cell in args.cells:
        share = cost[args.cells[0]]["train"] / cost[cell]["train"]
        runs = [run(cell, rates[cell], seed, share)[0] for seed in range(args.seeds)]
        options = options_of(args.task, cell, rates[cell], share)
        print_row(cell, runs, rates[cell], options["epochs"] * options["train_sequences"], cost[cell])
        results["equal CPU time"][cell] = {"share": share, "runs": runs}
    print("forecast: CPU ms per frame; train: CPU ms per frame and sequence; memory: MiB per frame and sequence")
    record("cells", {"task": args.task, "sizes": SIZES[args.task], "cost": cost, **results})


if __name__ == "__main__":
    run_program(main)
