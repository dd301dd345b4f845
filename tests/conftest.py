"""Fixtures of all tests. One thread and a fixed seed, so that the suite is the same everywhere.

`make test` shares the files out among several processes of pytest-xdist. The tests of a file stay together, since they
share fixtures. What a test writes lies in its tmp_path, and a port is one that the system chose.
"""

import json
import os
import subprocess
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process that a test starts

pytest.register_assert_rewrite("helpers")  # before its first import: a failed assertion there shows its values

import torch  # noqa: E402
from helpers import AS_PYTHON, FORKS, OPTIONS, ROOT, SLOW, nan_filled_memory  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--device", help="another device for the tests marked `device`: mps, xpu, cuda")


def pytest_configure(config):
    # Test files read it when they are imported.
    os.environ["VMRNN_TEST_DEVICE"] = config.getoption("--device") or "cpu"


def pytest_collection_modifyitems(items):
    """Mark slow tests, and start their files first, the longest before the others.

    Started last, a long file would keep one process busy after the others have ended. The order in a file stays.
    """
    files = [name.split("::")[0] for name in SLOW]
    for item in items:
        if item.path.stem in SLOW or f"{item.path.stem}::{item.originalname}" in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: files.index(item.path.stem) if item.path.stem in files else len(files))


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
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


@pytest.fixture(scope="session")
def start():
    """start(folder, first) -> (pid, wait): a run in `folder` in a process of its own; wait() is its exit status."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked here, which Windows cannot")
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def start_one(folder, first=""):
            print(json.dumps([[*OPTIONS, "--res_dir", str(folder)], first]), file=server.stdin, flush=True)
            return int(server.stdout.readline()), lambda: int(server.stdout.readline())

        yield start_one
        server.kill()


@pytest.fixture(scope="session")
def run_forked(request, run, tmp_path_factory):
    """As `run`, without the seconds of the imports: a process of its own, forked from one that has imported everything.

    It runs the program or the code as Python would, as __main__ and to the end of the process. `run` is for what the
    imports themselves do.
    """
    if not hasattr(os, "fork"):
        return run
    start = request.getfixturevalue("start")

    def start_one(*arguments, **environment):
        folder = tmp_path_factory.mktemp("streams")
        first = AS_PYTHON.format(arguments=[*map(str, arguments)], environment=environment, folder=str(folder))
        code = start(folder, first)[1]()
        printed, errors = ((folder / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(arguments, code, printed, errors)

    return start_one
