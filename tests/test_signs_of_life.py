"""The messages of a run while it works, its reaction to signals, and a standard output that cannot be written."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import OPTIONS, ROOT, TINY

import train
from vmrnn import progress
from vmrnn.checkpoint import read_checkpoint
from vmrnn.runtime import EXIT_STOPPED

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


@pytest.fixture
def process(tmp_path):
    """process(*options, **popen) -> a training run in a real process that has logged its first updates."""
    started = []

    def start(*options, until_it_trains=True, **popen):
        command = [sys.executable, "train.py", *OPTIONS, "--epochs", "1000", "--res_dir", tmp_path / "run", *options]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **streams))
        log_file, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 240
        while not (log_file.exists() and log_file.stat().st_size):
            assert started[-1].poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return started[-1]

    yield start
    for each in started:
        if each.poll() is None:
            each.kill()
            each.wait()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_terminals_and_job_systems_save(process, tmp_path, number):
    run = process()
    run.send_signal(number)
    printed, error = run.communicate(timeout=120)
    assert run.returncode == EXIT_STOPPED and f"stopped by {number.name}" in error
    assert f"{number.name}: finishing this update, then saving; about " in printed
    assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]


def test_nohup_is_left_alone(process):
    run = process(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    run.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == EXIT_STOPPED


SLOW_SAVE = """
import time, torch
from vmrnn import checkpoint
whole = torch.save
def save(*arguments, **options):
    print("saving", flush=True)
    time.sleep(3)
    whole(*arguments, **options)
torch.save = save
"""


@pytest.mark.parametrize("presses", [2, 3])
def test_a_second_ctrl_c_while_saving_loses_nothing_and_a_third_ends_at_once(presses, tmp_path):
    code = f"{SLOW_SAVE}\nimport train\nfrom vmrnn.runtime import run_program\nrun_program(lambda: train.main({[*OPTIONS, '--epochs', '1000', '--save_every', '60m', '--res_dir', str(tmp_path / 'run')]}))"
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    log_file, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 240
    while not (log_file.exists() and log_file.stat().st_size):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    while "finishing this update" not in (line := run.stdout.readline()):
        assert line
    while "saving\n" != (line := run.stdout.readline()):
        assert line
    for _ in range(presses - 1):
        time.sleep(0.3)
        run.send_signal(signal.SIGINT)
    printed, error = run.communicate(timeout=120)
    assert "SIGINT again: the save is on its way" in printed
    if presses == 2:
        assert run.returncode == EXIT_STOPPED and read_checkpoint(tmp_path / "run" / "last.pt")["position"]
    else:
        assert run.returncode == 130 and error.endswith("interrupted\n") and "Traceback" not in error
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_a_worker_that_the_system_kills(process, tmp_path):
    run = process("--num_workers", "1")
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    error = run.communicate(timeout=120)[1]
    assert run.returncode == EXIT_STOPPED, error
    assert "a process that prepares batches was killed" in error and "Traceback" not in error
    assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]["epoch"] >= 1


TRAIN = [sys.executable, "train.py", *TINY, "--epochs", "1"]


@pytest.mark.parametrize("where", ["2>&-", ">&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full", "| true"])
def test_streams_that_are_missing_or_full_end_nothing(where, tmp_path):
    command = " ".join([*TRAIN, "--res_dir", str(tmp_path / "x")])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {where}"], cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x" / "best.safetensors").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("where, code", [("2>&-", 2), ("2>/dev/full", 2)])
def test_an_error_without_a_place_to_say_it(where, code):
    done = subprocess.run(["bash", "-c", f"{sys.executable} train.py --scan fast --device cpu {where}"], cwd=ROOT)
    assert done.returncode == code
