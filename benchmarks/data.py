"""Speed of the Moving MNIST generator and of its loader, on one thread.

    python -m benchmarks.data

Every figure is a median over `SECONDS` seconds. Prints a table, and a line of JSON in exps/benchmarks/data.jsonl.
"""

import argparse
import platform

import numpy as np
import torch

from benchmarks.record import record
from benchmarks.timing import wall_seconds
from dataset import make_loader
from vmrnn.data.moving_mnist import MovingMNIST, load_digits, select_digits
from vmrnn.runtime import cpu_name

SECONDS = 2.0  # per figure
LENGTH = 2048  # sequences per pass
BATCH = 16


def generate(data):
    """One pass without the loader."""
    for start in range(0, len(data), BATCH):
        data.__getitems__(range(start, start + BATCH))


def load(loader):
    """One pass of the loader, with its shuffling and its copy into one batch."""
    for _ in loader:
        pass


def rate(work):
    """Sequences per second of work(), which makes LENGTH of them."""
    return LENGTH / wall_seconds(work, SECONDS)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    digits = select_digits(load_digits("builtin"), "train")
    rates = {}
    for name, options in {
        "10+10 frames, 64x64, 2 digits": {},
        "5+5 frames, 32x32, 1 digit": {
            "num_frames_input": 5,
            "num_frames_output": 5,
            "canvas": (32, 32),
            "num_objects": 1,
            "digit_size": 14,
        },
    }.items():
        data = MovingMNIST(digits, LENGTH, **options)
        rates[f"{name}: generated"] = rate(lambda data=data: generate(data))
        loader = make_loader(data, BATCH, shuffle=True)
        rates[f"{name}: loaded, 0 workers"] = rate(lambda loader=loader: load(loader))

    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + f"; batches of {BATCH}")
    for name, value in rates.items():
        print(f"{name:<52} {value:>9,.0f} sequences/s")
    record("data", {**machine, "batch": BATCH, "sequences_per_s": {k: round(v) for k, v in rates.items()}})


if __name__ == "__main__":
    main()
