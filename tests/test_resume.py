"""A run that is killed, stopped or damaged anywhere ends with the same weights, log and pictures, bit for bit."""

import os
import random
import re
import signal
import time

import pytest
import torch
from helpers import AS_PYTHON, OPTIONS, without_time

import train
from vmrnn.checkpoint import previous_of, read_checkpoint, save_checkpoint
from vmrnn.errors import UserError
from vmrnn.run_folder import read_log
from vmrnn.runtime import EXIT_STOPPED, Stopped


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """(folder of a run that nothing interrupted, the seconds it took)."""
    for folder in (tmp_path_factory.mktemp("whole") / name for name in ("slow start", "run")):
        begun = time.monotonic()
        assert start(folder)[1]() == 0
    return folder, time.monotonic() - begun


def assert_same(whole, other):
    """Weights, averaged weights, optimiser, scheduler's position, log, pictures and published weights."""
    a, b = (read_checkpoint(folder / "last.pt") for folder in (whole, other))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part
    for key, moments in a["optimizer"]["state"].items():
        moments_b = b["optimizer"]["state"][key]
        assert moments.keys() == moments_b.keys()
        assert all(torch.equal(*map(torch.as_tensor, (moments[name], moments_b[name]))) for name in moments)
    (at_a,), (at_b,) = without_time([a["position"]]), without_time([b["position"]])
    assert at_a | {"log_size": 0} == at_b | {"log_size": 0}
    assert without_time(read_log(whole / "log.jsonl")) == without_time(read_log(other / "log.jsonl"))
    best_a, best_b = (read_checkpoint(folder / "best.safetensors")["model"] for folder in (whole, other))
    assert all(torch.equal(best_a[key], best_b[key]) for key in best_a)
    pictures = ["loss.png", "forecast.gif", *(f"pictures/{p.name}" for p in (whole / "pictures").iterdir())]
    assert len(pictures) == 2 + 2
    for name in pictures:
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    assert {p.name for p in whole.iterdir()} == {p.name for p in other.iterdir()}


def test_twenty_kills_at_random_moments(whole, start, tmp_path):
    folder, seconds = whole
    seed = random.randrange(2**32)
    print("seed of the moments:", seed)  # shown if the test fails
    moments, kills, runs = random.Random(seed), 0, 0
    while kills < 20:
        runs, status = runs + 1, None
        while status != 0:
            pid, wait = start(tmp_path / str(runs))
            if kills < 20:
                time.sleep(moments.uniform(0, 0.5 * seconds))
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it has ended
            status = wait()
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        assert_same(folder, tmp_path / str(runs))


# Python that ends the process in the third save, at a moment that chance would hardly find.
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
# In the second save of last.pt
IN_A_SAVE = """
import torch
saved = []
whole_save, whole_replace = torch.save, os.replace
def save(content, path, **rest):
    whole_save(content, path, **rest)
    saved.append(path)
    if len(saved) == 2:
        {after_save}
def replace(source, target):
    if len(saved) == 2 and "last.pt" in str(source) and {replace_name!r} in str(target):
        {before_replace}
    whole_replace(source, target)
torch.save = save
os.replace = replace
"""


@pytest.mark.parametrize(
    "moment",
    [
        {"after_save": f"os.truncate(path, os.path.getsize(path) // 2); {DIE}"},
        {"after_save": DIE},
        {"before_replace": DIE, "replace_name": "previous"},
        {"before_replace": DIE, "replace_name": "/last.pt"},
    ],
    ids=["half written", "written", "before the first rename", "between the renames"],
)
def test_a_kill_in_the_middle_of_a_save(whole, start, tmp_path, moment):
    first = IN_A_SAVE.format(**{"after_save": "pass", "before_replace": "pass", "replace_name": "-"} | moment)
    assert start(tmp_path / "run", first)[1]() == -signal.SIGKILL
    assert any(".tmp" in p.name for p in (tmp_path / "run").iterdir())
    assert start(tmp_path / "run")[1]() == 0
    assert_same(whole[0], tmp_path / "run")


def test_a_crash_while_a_picture_is_drawn_costs_no_epoch(whole, start, tmp_path):
    """Nothing but the end of the epoch saves here. A crash in a library is no error that Python could catch."""
    first = (
        "arguments += ['--save_every', '1000']; from vmrnn import pictures; "
        f"pictures.save_strip = lambda *_, **options: {DIE}"
    )
    assert start(tmp_path / "run", first)[1]() == -signal.SIGKILL
    position = read_checkpoint(tmp_path / "run" / "last.pt")["position"]
    assert (position["epoch"], position["step"]) == (2, 6)
    assert start(tmp_path / "run")[1]() == 0
    assert_same(whole[0], tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_and_saves(whole, start, tmp_path, number):
    """To the process and its workers together, as schedulers and terminals send it."""
    command = ["train.py", *OPTIONS, "--num_workers", "1", "--res_dir", str(tmp_path / "run")]
    as_python = AS_PYTHON.format(arguments=command, environment={}, folder=str(tmp_path))
    pid, wait = start(tmp_path, f"os.setsid()\n{as_python}")
    log_file = tmp_path / "run" / "log.jsonl"
    while not (log_file.exists() and log_file.stat().st_size):
        os.kill(pid, 0)  # it has not ended
        time.sleep(0.01)
    os.killpg(pid, number)
    code, error = wait(), (tmp_path / "err").read_text()
    assert code == EXIT_STOPPED, error
    assert re.fullmatch(rf"stopped by {number.name} in epoch \d after update \d; .*--resume auto continues\n", error)
    assert start(tmp_path / "run")[1]() == 0
    assert_same(whole[0], tmp_path / "run")


def test_a_signal_cuts_an_evaluation_off_and_it_is_run_again(whole, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def signalled(*arguments, on_batch, **rest):
        def on_batch_signalled(step, *frames):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            on_batch(step, *frames)

        return evaluate(*arguments, on_batch=on_batch_signalled, **rest)

    arguments = [*OPTIONS, "--res_dir", str(tmp_path / "run")]
    monkeypatch.setattr(train, "evaluate", signalled)
    with pytest.raises(Stopped, match="in epoch 2 after update 6"):
        train.main(arguments)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before
    train.main(arguments)
    assert_same(whole[0], tmp_path / "run")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """Arguments of a run that was stopped in its second epoch."""
    arguments = [*OPTIONS, "--res_dir", str(tmp_path / "run")]
    save, saves = train.checkpoint.save_checkpoint, iter(range(6))

    def save_and_die(path, content):
        save(path, content)
        if next(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoint, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments)
    monkeypatch.undo()
    return arguments


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_it_used(whole, stopped, tmp_path, caplog):
    last = tmp_path / "run" / "last.pt"
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 64):  # up to 63 bytes may be padding, which holds nothing
        content[place] ^= 1
    last.write_bytes(content)
    caplog.set_level("INFO", "vmrnn")
    train.main(stopped)
    assert re.search(r"last.pt: damaged .*: continuing from .*previous_last.pt", caplog.text)
    kept = tmp_path / "run" / "last.pt.kept1"
    assert kept.read_bytes() == content
    kept.unlink()
    assert_same(whole[0], tmp_path / "run")


def test_two_damaged_checkpoints_end_the_program(stopped, tmp_path):
    for path in (tmp_path / "run" / "last.pt", previous_of(tmp_path / "run" / "last.pt")):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="previous_last.pt: damaged"):
        train.main(stopped)


def test_a_full_disk_leaves_the_last_checkpoint_whole(whole, stopped, tmp_path, start):
    """The kernel refuses to write files beyond a limit, as it does on a full disk."""
    last = tmp_path / "run" / "last.pt"
    before = last.read_bytes()
    limit = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE"
    assert start(tmp_path / "run", f"{limit}, ({len(before) // 2},) * 2)")[1]() == 2
    assert last.read_bytes() == before and not [p for p in last.parent.iterdir() if p.name.endswith(".tmp")]
    assert start(tmp_path / "run")[1]() == 0
    assert_same(whole[0], tmp_path / "run")


def test_two_processes_do_not_train_in_one_folder(start, tmp_path):
    pid, wait = start(tmp_path / "run")
    log_file = tmp_path / "run" / "log.jsonl"
    while not (log_file.exists() and log_file.stat().st_size):
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="another process trains there"):
        train.main([*OPTIONS, "--res_dir", str(tmp_path / "run")])
    os.kill(pid, signal.SIGCONT)
    assert wait() == 0


def test_a_second_start_in_one_process_does_not_open_the_folder_to_others(start, tmp_path, monkeypatch):
    """A record lock of the process would be lost as soon as any of its files on the lock is closed."""
    arguments, evaluate, codes = [*OPTIONS, "--res_dir", str(tmp_path / "run")], train.evaluate, []

    def evaluate_meanwhile(*arguments_of_evaluate, **options):
        if not codes:
            codes.append(None)
            with pytest.raises(UserError, match="another process trains there"):
                train.main(arguments)
            codes.append(start(tmp_path / "run")[1]())
        return evaluate(*arguments_of_evaluate, **options)

    monkeypatch.setattr(train, "evaluate", evaluate_meanwhile)
    train.main(arguments)
    assert codes == [None, 2]


def test_a_run_that_another_process_took_further_meanwhile_is_not_taken_back(stopped, tmp_path, monkeypatch):
    """The folder is locked after the data are prepared, which may take minutes."""
    build, first = train.build_dataset, []

    def build_meanwhile(*arguments, **options):
        if not first:
            first.append(True)
            train.main(stopped)
        return build(*arguments, **options)

    monkeypatch.setattr(train, "build_dataset", build_meanwhile)
    with pytest.raises(UserError, match="another process trained there while"):
        train.main(stopped)
    assert read_checkpoint(tmp_path / "run" / "last.pt")["position"]["epoch"] == 4


def test_what_other_programs_are_writing_stays(stopped, tmp_path):
    theirs = tmp_path / "run" / "test" / ".report.html.1.tmp"
    theirs.parent.mkdir()
    theirs.touch()
    ours = tmp_path / "run" / ".last.pt.1.tmp"
    ours.touch()
    train.main(stopped)
    assert theirs.exists() and not ours.exists()


def test_a_damaged_checkpoint_under_another_name_of_its_folder(whole, stopped, tmp_path, monkeypatch):
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    monkeypatch.chdir(tmp_path)
    options = stopped[: stopped.index("--resume")]
    train.main([*options, "--resume", str(last), "--res_dir", "run"])
    (tmp_path / "run" / "last.pt.kept1").unlink()
    assert_same(whole[0], tmp_path / "run")


def test_a_signal_before_the_first_update(tmp_path, monkeypatch):
    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "build_dataset", signalled)
    with pytest.raises(Stopped, match="before the first update"):
        train.main([*OPTIONS, "--res_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_second_sigterm_does_not_change_the_exit_code(run_forked):
    code = """
import os, signal, time
from vmrnn.runtime import Stopped, StopSignals, run_program
def main():
    with StopSignals() as signals:
        signals.deferred = True
        signal.raise_signal(signal.SIGTERM)
        raise Stopped("stopped")
try:
    run_program(main)
finally:
    signal.raise_signal(signal.SIGTERM)
"""
    assert run_forked("-c", code).returncode == EXIT_STOPPED


def test_a_checkpoint_goes_on_in_its_own_folder_unless_another_is_named(stopped, tmp_path):
    last = str(tmp_path / "run" / "last.pt")
    assert train.parse_arguments(["--resume", last])[0].res_dir == str(tmp_path / "run")
    assert train.parse_arguments(["--resume", last, "--res_dir", "./results"])[0].res_dir == "./results"


def test_a_run_goes_on_in_another_folder(whole, stopped, tmp_path):
    """With its own log and its own best; the first folder stays as it is."""
    last = tmp_path / "run" / "last.pt"
    content = read_checkpoint(last)
    content["position"]["best_mse"] = 0.0  # no epoch will be better
    save_checkpoint(last, content)
    before = last.read_bytes()
    options = stopped[: stopped.index("--resume")]
    train.main([*options, "--resume", str(last), "--res_dir", str(tmp_path / "other")])
    assert last.read_bytes() == before and (tmp_path / "other" / "best.safetensors").exists()
    a, b = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole[0], tmp_path / "other"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    entries = without_time(read_log(whole[0] / "log.jsonl"))
    assert without_time(read_log(tmp_path / "other" / "log.jsonl")) == entries[3:]
