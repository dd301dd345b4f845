"""Overlay the learning curves of runs: validation MSE against samples seen, and against time.

    python -m benchmarks.curves exps/a exps/b                   writes curves.png
    python -m benchmarks.curves exps/* --metric ssim --output ssim.png

Reads log.jsonl of each run folder; seconds are of the run's own machine, pauses left out.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from vmrnn.errors import UserError
from vmrnn.metrics import better
from vmrnn.pictures import save
from vmrnn.run_folder import read_log
from vmrnn.runtime import run_program


def points(run, metric):
    """(samples, seconds, values) of a run's validations, three lists."""
    log_file = Path(run) / "log.jsonl"
    if not log_file.exists():
        raise UserError(f"{run}: not a run folder, it has no log.jsonl; name folders that train.py wrote")
    entries = [e for e in read_log(log_file) if "valid_loss" in e and e.get(metric, 0) is not None]
    if not entries:
        raise UserError(f"{log_file}: holds no validation yet")
    if metric not in entries[0]:
        names = sorted(entries[0].keys() - {"epoch", "step", "samples", "seconds"})
        raise UserError(f"{log_file}: has no {metric}; choose one of {', '.join(names)}")
    return [[e[key] for e in entries] for key in ("samples", "seconds", metric)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--metric", default="mse")
    parser.add_argument("--output", default="curves.png")
    args = parser.parse_args()

    figure = Figure((9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for run in args.runs:
        samples, seconds, values = points(run, args.metric)
        best = (max if better(args.metric) == "higher" else min)(values)
        print(
            f"{run}: {samples[-1]:,} samples, {seconds[-1] / 3600:.2f} h, {args.metric} {values[-1]:.4f}, best {best:.4f}"
        )
        axes[0].plot(samples, values, marker=".", label=run)
        axes[1].plot([s / 3600 for s in seconds], values, marker=".", label=run)
    axes[0].set(xlabel="samples seen", ylabel=f"validation {args.metric}")
    axes[1].set(xlabel="hours")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, args.output)
    print(args.output)


if __name__ == "__main__":
    run_program(main)
