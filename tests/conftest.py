"""Shared by all tests: one thread and a fixed seed, so the suite is the same everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def same_everywhere():
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as vmrnn.runtime.pick_device does


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--epochs", 1, ...) -> the finished process, started in the repository."""

    def start(*arguments, **environment):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


def relative_error(value, reference):
    """Largest absolute difference over the reference's largest magnitude (0 for two tensors of zeros)."""
    value, reference = value.double(), reference.double()
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()
