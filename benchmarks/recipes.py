"""Training recipes at equal samples: the published one, and others part by part, several seeds each.

    python -m benchmarks.recipes --digits mnist                     about 2 minutes per run on one core
    python -m benchmarks.recipes --digits mnist --only published 'onecycle 6e-3, curriculum' --seeds 2
    python -m benchmarks.recipes --digits mnist --task full --only 'muon 3e-3, curriculum, little L1' --seeds 1
    python -m benchmarks.recipes --digits mnist --equal_time --only 'muon 6e-3, curriculum, little L1' 'batch 8, 6e-3'

The small task: one digit of 14 pixels on a 32x32 canvas, 5 -> 5 frames, network B (patch 4, width 48, 2 blocks). The
full task: Moving MNIST, two digits on 64x64, 10 -> 10 frames, network B (patch 8, width 128, 3 blocks), half an hour
per run. Both train on 6,400 sequences, in updates of 16 if the recipe's name does not say otherwise.

Every run is a process of `python train.py`. Run folders stay under --folder, so a benchmark that was stopped continues
where it was. Figures are those of `python test.py` on the same held-out digits for every recipe (1,000 sequences of the
small task, 200 of the full one): MSE and ssim, means over the seeds, then the MSE of every seed. CPU seconds are those
of the training processes.

--equal_time adds a second table: every recipe with as many sequences as it trains on in the CPU time that the first
recipe took for 6,400.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.record import record
from vmrnn.runtime import cpu_name, run_program

COMMON = {
    "model": "VMRNN-B", "train_sequences": 1600, "valid_sequences": 256, "valid_batch_size": 64, "train_batch_size": 16,
    "epochs": 4, "epoch_valid": 1, "device": "cpu",
}  # fmt: skip
TASKS = {
    "small": COMMON | {
        "patch_size": 4, "embed_dim": 48, "depths": [2], "input_size": [32], "num_objects": 1, "digit_size": 14,
        "num_frames_input": 5, "num_frames_output": 5,
    },
    "full": COMMON | {"patch_size": 8, "embed_dim": 128, "depths": [3]},
}  # fmt: skip
SEQUENCES = {"small": 1000, "full": 200}  # of the test
PUBLISHED = {
    "optimizer": "adam",
    "lr": 1e-4,
    "schedule": "constant",
    "drop_path_rate": 0.1,
    "digits_split": "published",
}
CURRICULUM = {"curriculum": 240}  # 60 % of the updates
EMA = {"ema": 0.995}
MSE = {"l1_weight": 0.0}
LITTLE_L1 = {"l1_weight": 0.1}
MUON = {"optimizer": "muon"}


def small_updates(batch, lr):
    """Muon with a tenth of the L1 in updates of `batch` sequences: the same samples, 16 / batch times the updates."""
    return recipe("onecycle", lr, **MUON, **LITTLE_L1) | {"train_batch_size": batch, "curriculum": 240 * 16 // batch}


def with_sequences(options, share):
    """The options of a run on `share` times the sequences, with the curriculum over the same share of its updates."""
    batch = options["train_batch_size"]
    sequences = round(options["train_sequences"] * share / batch) * batch
    curriculum = options.get("curriculum", 0) * sequences // options["train_sequences"]
    return options | {"train_sequences": sequences, "curriculum": curriculum}


def recipe(schedule, lr, **others):
    decay = {"optimizer": "adamw", "weight_decay": 0.01, "clip_grad": 1.0, "drop_path_rate": 0.0}
    return decay | {"schedule": schedule, "lr": lr} | others


RECIPES = {
    "published": PUBLISHED,
    "published, lr 3e-3": PUBLISHED | {"lr": 3e-3},
    "onecycle 3e-3": recipe("onecycle", 3e-3),
    "onecycle 3e-3, curriculum": recipe("onecycle", 3e-3, **CURRICULUM),
    "onecycle 3e-3, curriculum, EMA": recipe("onecycle", 3e-3, **CURRICULUM, **EMA),
    "constant 3e-3, curriculum": recipe("constant", 3e-3, **CURRICULUM),
    "constant 3e-3, curriculum, EMA": recipe("constant", 3e-3, **CURRICULUM, **EMA),
    "onecycle 6e-3, curriculum": recipe("onecycle", 6e-3, **CURRICULUM),
    "onecycle 1.2e-2, curriculum": recipe("onecycle", 1.2e-2, **CURRICULUM),
    "published, mse": PUBLISHED | MSE,
    "onecycle 1.2e-2, curriculum, mse": recipe("onecycle", 1.2e-2, **CURRICULUM, **MSE),
    "muon 6e-3, curriculum": recipe("onecycle", 6e-3, **CURRICULUM, **MUON),
    "muon 3e-3, curriculum, mse": recipe("onecycle", 3e-3, **CURRICULUM, **MUON, **MSE),
    "muon 6e-3, curriculum, mse": recipe("onecycle", 6e-3, **CURRICULUM, **MUON, **MSE),
    "muon 3e-3, curriculum, little L1": recipe("onecycle", 3e-3, **CURRICULUM, **MUON, **LITTLE_L1),
    "muon 6e-3, curriculum, little L1": recipe("onecycle", 6e-3, **CURRICULUM, **MUON, **LITTLE_L1),
    "muon 1.2e-2, curriculum, mse": recipe("onecycle", 1.2e-2, **CURRICULUM, **MUON, **MSE),
    "batch 8, 6e-3": small_updates(8, 6e-3),
    "batch 4, 6e-3": small_updates(4, 6e-3),
    "batch 4, 3e-3": small_updates(4, 3e-3),
    "batch 2, 3e-3": small_updates(2, 3e-3),
    "batch 2, 1.5e-3": small_updates(2, 1.5e-3),
    "batch 1, 1.5e-3": small_updates(1, 1.5e-3),
}


def judge(folder, digits, options, sequences):
    """{metric: mean, "black": MSE of a black frame, "cpu": CPU seconds of the training} of one run.

    The run is made, continued, or found finished in `folder`.
    """
    report, cost = folder / "test" / "metrics.json", folder / "cpu_seconds"
    if not report.exists():
        command = [sys.executable, "train.py", "--resume", "auto", "--res_dir", str(folder), "--train_data_dir", digits]
        for key, value in options.items():
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        before = children_seconds()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        spent = float(cost.read_text()) if cost.exists() else 0.0  # by a start that was stopped during the test
        cost.write_text(f"{spent + children_seconds() - before:.2f}")
        # digits_split: no recipe has trained on the last 10,000 of all
        test = ["--digits_split", "all", "--test_sequences", str(sequences), "--train_data_dir", digits]
        command = [sys.executable, "test.py", "--checkpoint", str(folder / "best.safetensors"), *test]
        command += ["--res_dir", str(report.parent)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = json.loads(report.read_text())["results"]
    return results["forecast"]["mean"] | {
        "black": results["black frame"]["mean"]["mse"],
        "cpu": float(cost.read_text()),
    }


def children_seconds():
    """CPU seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="mnist", help="as train.py's --train_data_dir")
    parser.add_argument("--task", choices=TASKS, default="small")
    parser.add_argument("--folder", type=Path, default=Path("exps/recipes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--equal_time", action="store_true", help="a second table, at equal CPU time")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    task, sequences = TASKS[args.task], SEQUENCES[args.task]
    results = {}

    def table(title, shares):
        """Train and print the recipes, each on its share of the task's sequences. Returns their mean CPU seconds."""
        print(f"{title}\n{'recipe':34}{'sequences':>10}{'CPU s':>8}{'MSE':>8}{'ssim':>8}   MSE of each seed")
        rows, seconds = results.setdefault(title, {}), {}
        for name in args.only:
            share = shares.get(name, 1.0)
            options = with_sequences(task | RECIPES[name], share)
            folder = args.folder / args.task / name.replace(", ", "-").replace(" ", "_")
            if share != 1:
                folder = folder.with_name(f"{folder.name}_share_{share:.3f}")
            runs = [
                judge(folder / str(seed), args.digits, options | {"seed": seed}, sequences)
                for seed in range(args.seeds)
            ]
            rows[name] = [{key: run[key] for key in ("mse", "mae", "ssim", "black", "cpu")} for run in runs]
            mse, ssim, seconds[name] = (statistics.mean(run[key] for run in runs) for key in ("mse", "ssim", "cpu"))
            trained = options["epochs"] * options["train_sequences"]
            print(
                f"{name:34}{trained:>10,}{seconds[name]:8.0f}{mse:8.2f}{ssim:8.3f}   "
                + "".join(f"{run['mse']:8.2f}" for run in runs),
                flush=True,
            )
        print(f"{'a black frame':52}{runs[0]['black']:8.2f}")
        return seconds

    print(f"{cpu_name()}, torch {torch.__version__}; the {args.task} task")
    seconds = table("equal samples", {})
    if args.equal_time:
        first = seconds[args.only[0]]
        table(f"equal CPU time, that of {args.only[0]}", {name: first / spent for name, spent in seconds.items()})
    record("recipes", {"task": task, "recipes": RECIPES, "results": results})


if __name__ == "__main__":
    run_program(main)
