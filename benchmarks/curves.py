"""Overlay the learning curves of runs: validation MSE against samples seen, and against time.

    python -m benchmarks.curves exps/a exps/b                   writes exps/curves.png
    python -m benchmarks.curves exps/* --metric ssim --output exps/ssim.png

Reads log.jsonl of each run folder; seconds are of the run's own machine, pauses left out.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from vmrnn.errors import UserError
from vmrnn.metrics import better
from vmrnn.pictures import LINES, UNITS, save
from vmrnn.run_folder import read_log
from vmrnn.runtime import run_program

# The best of a list of values, by the words of `better`
BEST = {"lower": min, "higher": max, "closer to 1": lambda values: min(values, key=lambda value: abs(value - 1))}


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
    parser.add_argument("--output", type=Path, default=Path("exps/curves.png"), help="(default: exps/curves.png)")
    args = parser.parse_args()

    # One line per run, in the colours of the other pictures
    figure = Figure((9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, run in enumerate(args.runs):
        samples, seconds, values = points(run, args.metric)
        best = BEST[better(args.metric)](values)
        print(
            f"{run}: {samples[-1]:,} samples, {seconds[-1] / 3600:.2f} h, {args.metric} {values[-1]:.4f}, "
            f"best {best:.4f}"
        )
        style = {"marker": ".", "label": run}
        if len(args.runs) <= len(LINES):
            style |= dict(zip(("color", "linestyle"), LINES[number]))
        axes[0].plot(samples, values, **style)
        axes[1].plot([s / 3600 for s in seconds], values, **style)

    # Axes, and a legend that covers no line
    unit = f" [{UNITS[args.metric]}]" if args.metric in UNITS else ""
    axes[0].set(xlabel="samples seen [thousands]", ylabel=f"validation {args.metric}{unit}")
    axes[0].xaxis.set_major_formatter(lambda samples, _: f"{samples / 1000:g}")
    axes[1].set(xlabel="time of the run [hours]")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].set_title(f"{better(args.metric)} is better", fontsize=9, loc="right")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=min(3, len(labels)), frameon=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, args.output)
    print(args.output)


if __name__ == "__main__":
    run_program(main)
