"""torchrun on a CPU: several gloo processes train as one does, and survive the death of one."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import OPTIONS, ROOT, without_time

import train
from vmrnn import distributed
from vmrnn.checkpoint import read_checkpoint
from vmrnn.run_folder import read_log

# Dropout differs between ranks, as it should; without it the sums are those of one process.
ALIKE = ["--drop_path_rate", "0", "--attn_drop_rate", "0", "--log_train", "1"]
PLAIN = [*OPTIONS, *ALIKE]


@pytest.fixture
def torchrun():
    """torchrun(folder, *options) -> Popen of two processes of train.py; none outlives the test."""
    started = []

    def start(folder, *options, restarts=0):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            f"--max-restarts={restarts}", "--monitor-interval=0.1", "train.py", *options, "--res_dir", str(folder),
        ]  # fmt: skip
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its own
            process.wait()


# Python that goes on in two processes, with the environment that torchrun gives them. The first process waits for both.
FORK = """
others = []
for rank in "01":
    others.append(os.fork())
    if not others[-1]:
        signal.alarm(300)
        os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
        break
else:
    os._exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])) for other in others))
"""


@pytest.fixture(scope="module")
def forked(start):
    """forked(folder, *options, first="") -> exit code of two processes of train.py.

    Forked, so that they do not import everything again. `first` is Python that they run before.
    """

    def run(folder, *options, first=""):
        with socket.create_server(("127.0.0.1", 0)) as server:
            fork = FORK.format(port=server.getsockname()[1])
        return start(folder, f"{fork}\narguments += {[*ALIKE, *options]}\n{first}")[1]()

    return run


@pytest.fixture
def two(forked, tmp_path):
    """two(*options, first="") -> forked(tmp_path / "run", ...)."""
    return functools.partial(forked, tmp_path / "run")


@pytest.fixture(scope="module")
def pair(forked, tmp_path_factory):
    """A run folder of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("pair")
    into_file = (
        f"[os.dup2(os.open({str(folder / 'printed')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), n) for n in (1, 2)]"
    )
    code = forked(folder / "run", first=into_file)
    printed = (folder / "printed").read_text()
    assert code == 0, printed
    assert "effective batch 4 = 2 x 1 parts x 2 processes" in printed
    assert printed.count("run folder") == 1 and "Warning" not in printed  # one of them speaks
    return folder / "run"


def test_two_processes_have_the_loss_curve_of_one(pair, tmp_path):
    train.main([*PLAIN, "--res_dir", str(tmp_path / "one")])
    one, two = (without_time(read_log(folder / "log.jsonl")) for folder in (tmp_path / "one", pair))
    assert len(one) == len(two) == 3 * 6 + 2
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and (a["epoch"], a["step"], a["samples"]) == (b["epoch"], b["step"], b["samples"])
        a.pop("psnr_uint8", None)  # a last bit that crosses a whole number of 255ths changes it by far more
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-5), key


def test_a_run_of_two_processes_goes_on_with_one(two, tmp_path):
    """Stopped after its first epoch; at another world size the data and the batch stay the same."""
    assert two("--epochs", "1", "--schedule", "constant") == 0
    train.main([*PLAIN, "--schedule", "constant", "--res_dir", str(tmp_path / "run")])
    train.main([*PLAIN, "--schedule", "constant", "--res_dir", str(tmp_path / "one")])
    a, b = (read_log(tmp_path / name / "log.jsonl")[-1] for name in ("run", "one"))
    assert a["mse"] == pytest.approx(b["mse"], rel=1e-5) and a["epoch"] == 3


def test_a_killed_process_is_started_again_to_the_same_result(pair, torchrun, tmp_path):
    process = torchrun(tmp_path / "run", *PLAIN, restarts=1)
    log_file = tmp_path / "run" / "log.jsonl"
    while not (log_file.exists() and len(log_file.read_text().splitlines()) > 8):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and "continues  after update" in printed, printed
    a, b = (read_checkpoint(folder / "last.pt") for folder in (pair, tmp_path / "run"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert without_time(read_log(pair / "log.jsonl")) == without_time(read_log(log_file))


FIRST = """
import time
from pathlib import Path
from vmrnn import distributed
found = Path("{found}")
with distributed.processes(torch.device("cpu")), distributed.rank_zero_first():
    if distributed.rank() == 0:
        time.sleep(0.5)
        found.touch()
    seen = found.exists()
os._exit(0 if seen else 3)
"""


def test_the_first_process_prepares_what_the_others_find(two, tmp_path):
    assert two(first=FIRST.format(found=tmp_path / "found")) == 0


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for all programs
    with distributed.processes(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and distributed.world_size() == 1
        assert distributed.all_sum(1, 2.5) == (1, 2.5) and distributed.all_gather("x") == ["x"]


def test_a_batch_that_does_not_divide(two, tmp_path):
    into_file = f"os.dup2(os.open({str(tmp_path / 'error')!r}, os.O_WRONLY | os.O_CREAT), 2)"
    assert two("--train_batch_size", "5", first=into_file) == 2
    assert "error: train_batch_size 5 does not divide among 2 processes" in (tmp_path / "error").read_text()
    assert not (tmp_path / "run").exists()
