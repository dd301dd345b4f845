"""The mean of the weights of several files of one network.

    python -m benchmarks.average exps/a/best.safetensors exps/b/best.safetensors --output mean.safetensors

Weights that one run started from, and those that it ended with, often have a mean with a smaller error than either
(model soups, arXiv 2203.05482). The configuration is that of the first file.
"""

import argparse
from pathlib import Path

import torch

from vmrnn.checkpoint import load_network, save_weights
from vmrnn.runtime import run_program


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    first, *others = [load_network(path) for path in args.files]
    states = [trained.model.state_dict() for trained in (first, *others)]
    mean = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    first.model.load_state_dict(mean)
    save_weights(args.output, first.model, first.config.to_dict(), first.value_range)
    print(f"the mean of {len(args.files)} files is in {args.output}")


if __name__ == "__main__":
    run_program(main)
