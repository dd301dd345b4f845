"""Fixtures of all tests. One thread and a fixed seed, so that the suite is the same everywhere."""

import os
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("helpers")  # before its first import: a failed assertion there shows its values

import torch  # noqa: E402
from helpers import ROOT, nan_filled_memory  # noqa: E402


@pytest.fixture(autouse=True)
def same_everywhere():
    torch.set_num_threads(1)  # tensors are tiny: a second thread costs more time than it saves
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as vmrnn.runtime.pick_device does


@pytest.fixture
def nan_filled():
    """For tests of kernels: memory that is allocated without a value holds NaN."""
    with nan_filled_memory():
        yield


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
