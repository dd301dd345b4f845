"""The messages of a run while it works, its reaction to signals, and a standard output that cannot be written."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TINY
from torch._utils import ExceptionWrapper

import train
from vmrnn import progress
from vmrnn.checkpoint import read_checkpoint
from vmrnn.errors import UserError
from vmrnn.runtime import EXIT_STOPPED, KILLED_WORKER, LESS_MEMORY, is_dead_worker, run_program

LINE = r"epoch \d/2  \d+ %, [\d.e+]+ frames/s, about \d+ s left(, about \d+ s of the run left)?"


def test_a_line_per_minute_where_no_bar_is_seen(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0)
    caplog.set_level(logging.INFO, "vmrnn")
    train.main([*TINY, "--epochs", "2", "--accumulate", "2", "--res_dir", str(tmp_path / "x")])
    lines = [record.getMessage() for record in caplog.records]
    training = [line for line in lines if re.fullmatch(LINE, line)]
    assert len(training) == 16 and "of the run left" in training[-1]
    assert "  100 %, " in training[7] and "about 0 s left" in training[7]
    assert re.fullmatch(r"validate 1  100 %, .*frames/s, about 0 s left", [x for x in lines if "validate 1  " in x][-1])
    epoch = next(line for line in lines if line.startswith("epoch 1/2  train loss"))
    assert re.search(r"\d+ s done, about \d+ s of the run left$", epoch)
    caplog.clear()
    train.main([*TINY, "--epochs", "2", "--resume", "auto", "--res_dir", str(tmp_path / "x")])
    assert "2 of 2 epochs are done: --epochs N trains further" in caplog.text


def test_work_that_nothing_counts_shows_that_it_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    caplog.set_level(logging.INFO, "vmrnn")
    with progress.still_running("compiling"):
        deadline = time.monotonic() + 20
        while "compiling  0 s so far" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "compiling  0 s so far" in caplog.text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (400_000, "5 days")],
)
def test_times_as_a_person_writes_them(seconds, text):
    assert progress.duration(seconds) == text


class Run:
    """A training run, forked from a process that has imported everything. `first` is Python that it runs before."""

    def __init__(self, start, folder, first):
        self.folder, self.code = folder, None
        streams = (f"os.dup2(os.open({str(folder / name)!r}, os.O_WRONLY | os.O_CREAT), {number})"
                   for number, name in ((1, "printed"), (2, "errors")))  # fmt: skip
        self.pid, self.ended = start(folder / "run", "\n".join([*streams, first]))

    @property
    def printed(self):
        return (self.folder / "printed").read_text()

    @property
    def errors(self):
        return (self.folder / "errors").read_text()

    def wait(self):
        """The exit code."""
        if self.code is None:
            self.code = self.ended()
        return self.code

    def until(self, condition):
        deadline = time.monotonic() + 240
        while not condition():
            os.kill(self.pid, 0)  # it has not ended
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def forked(start, tmp_path):
    """forked(*options, first="") -> a Run."""
    started = []

    def fork(*options, first=""):
        started.append(Run(start, tmp_path, f"arguments += {list(options)}\n{first}"))
        return started[-1]

    yield fork
    for run in started:
        if run.code is None:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()


@pytest.fixture
def process(forked, tmp_path):
    """process(*options, first="") -> a Run that has logged its first updates and would go on for long."""

    def start(*options, first=""):
        run, log_file = forked("--epochs", "1000", *options, first=first), tmp_path / "run" / "log.jsonl"
        run.until(lambda: log_file.exists() and log_file.stat().st_size)
        return run

    return start


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_terminals_and_job_systems_save(process, tmp_path, number):
    run = process()
    os.kill(run.pid, number)
    assert run.wait() == EXIT_STOPPED and f"stopped by {number.name}" in run.errors
    assert f"{number.name}: finishing this update, then saving; about " in run.printed
    assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]


def test_nohup_is_left_alone(process):
    run = process(first="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    os.kill(run.pid, signal.SIGHUP)
    time.sleep(1)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == EXIT_STOPPED and "stopped by SIGTERM" in run.errors


SLOW_SAVE = """
import time
whole = torch.save
def save(*arguments, **options):
    print("saving", flush=True)
    time.sleep(3)
    whole(*arguments, **options)
torch.save = save
"""


@pytest.mark.parametrize("presses", [2, 3])
def test_a_second_ctrl_c_while_saving_loses_nothing_and_a_third_ends_at_once(presses, process, tmp_path):
    run = process("--save_every", "60m", first=SLOW_SAVE)
    os.kill(run.pid, signal.SIGINT)
    run.until(lambda: "finishing this update" in run.printed and "saving\n" in run.printed)
    for _ in range(presses - 1):
        time.sleep(0.3)
        os.kill(run.pid, signal.SIGINT)
    assert run.wait() == (EXIT_STOPPED if presses == 2 else 130)
    assert "SIGINT again: the save is on its way" in run.printed
    if presses == 2:
        assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]
    else:
        assert run.errors.endswith("interrupted\n") and "Traceback" not in run.errors
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep absent")
def test_a_worker_that_the_system_kills(process, tmp_path):
    run = process("--num_workers", "1")
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert run.wait() == EXIT_STOPPED, run.errors
    assert "a process that prepares batches was killed" in run.errors and "Traceback" not in run.errors
    assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]["epoch"] >= 1


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device", "/x: y"), "error: [Errno 28] No space left on device: '/x: y'"),
        (UserError("a.npy: damaged"), "error: a.npy: damaged"),
        (MemoryError("9 GiB"), f"error: out of memory (9 GiB); {LESS_MEMORY}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_a_worker_reports_ends_in_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_program(as_of_a_worker(error).reraise)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"{line}\n")


def test_an_error_that_a_worker_reports_is_no_dead_worker():
    with pytest.raises(EOFError) as caught:
        as_of_a_worker(EOFError("a film is cut off")).reraise()
    assert is_dead_worker(EOFError()) and not is_dead_worker(caught.value)


def as_of_a_worker(error):
    """The error as a loader's worker sends it to the main process."""
    try:
        raise error
    except Exception:
        return ExceptionWrapper(where="in DataLoader worker process 0")


WORKER_IS_KILLED = """
import os, signal
import torch
from dataset import make_loader
from vmrnn.runtime import run_program

class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

run_program(lambda: list(make_loader(Killed(), 1, num_workers=1)))
"""


def test_a_killed_worker_of_another_program_than_train_ends_in_one_line(run_forked):
    done = run_forked("-c", WORKER_IS_KILLED)
    assert (done.returncode, done.stderr) == (2, f"error: {KILLED_WORKER}\n")


FULL = "os.dup2(os.open('/dev/full', os.O_WRONLY), {})"


@pytest.mark.parametrize(
    "first",
    [
        FULL.format(1),
        f"{FULL.format(1)}; {FULL.format(2)}",
        "a, b = os.pipe(); os.dup2(b, 1); os.close(a); os.close(b)",
    ],
    ids=["full", "both full", "pipe that nobody reads"],
)
def test_streams_that_fail_end_nothing(first, forked, tmp_path):
    run = forked("--epochs", "1", first=first)
    assert run.wait() == 0, run.errors
    assert (tmp_path / "run" / "best.safetensors").exists() and "Traceback" not in run.errors
    assert run.errors.count("the standard output cannot be written") == (0 if "2)" in first else 1)


def test_streams_that_are_missing_end_nothing(tmp_path):
    """In a real process, since Python then starts without them."""
    command = " ".join([sys.executable, "train.py", *TINY, "--epochs", "1", "--res_dir", str(tmp_path / "x")])
    assert subprocess.run(["bash", "-c", f"{command} >&- 2>&-"], cwd=ROOT).returncode == 0
    assert (tmp_path / "x" / "best.safetensors").exists()


@pytest.mark.parametrize("first", ["os.close(2); sys.stderr = None", FULL.format(2)], ids=["missing", "full"])
def test_an_error_without_a_place_to_say_it(first, forked):
    assert forked("--scan", "fast", first=first).wait() == 2
