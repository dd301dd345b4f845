"""What a run folder holds is never lost: not by a read error, a damaged log, a picture that fails, or a new start."""

import errno
import json
import os
import stat

import filelock
import numpy as np
import pytest
import torch
from helpers import OPTIONS, TINY

import train
from vmrnn import checkpoint, config as configuration, files, pictures
from vmrnn.checkpoint import read_checkpoint, read_last_checkpoint, save_checkpoint
from vmrnn.errors import UserError
from vmrnn.run_folder import read_log, stamp_of


def contents(folder):
    """{name: bytes} of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def two_saves(tmp_path, monkeypatch):
    """last.pt with the weight 2, and the file before it with the weight 1."""
    monkeypatch.setattr(checkpoint, "READ_PAUSES", (0, 0))
    for weight in (1.0, 2.0):
        save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.tensor([weight])}, "config": None})
    return tmp_path / "last.pt"


class Fails:
    """torch.load, failing with these error numbers first."""

    def __init__(self, *numbers):
        self.numbers, self.load = list(numbers), torch.load

    def __call__(self, *arguments, **options):
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return self.load(*arguments, **options)


def test_a_read_error_that_passes(two_saves, monkeypatch, caplog):
    monkeypatch.setattr(torch, "load", Fails(errno.ESTALE, errno.EACCES))
    content, path = read_last_checkpoint(two_saves)
    assert content["model"]["w"].item() == 2 and path == two_saves
    assert caplog.text.count("trying again") == 2


def test_a_read_error_that_stays_is_refused(two_saves, monkeypatch):
    monkeypatch.setattr(torch, "load", Fails(*[errno.EIO] * 3))
    with pytest.raises(UserError, match="last.pt: cannot be read"):
        read_last_checkpoint(two_saves)


def test_a_missing_file_gives_way_to_the_one_before_it(two_saves, caplog):
    two_saves.unlink()
    content, path = read_last_checkpoint(two_saves)
    assert content["model"]["w"].item() == 1 and path.name == "previous_last.pt" and "last.pt: missing" in caplog.text


def test_only_a_missing_file_has_no_stamp(tmp_path):
    assert stamp_of(tmp_path / "last.pt") is None
    with pytest.raises(OSError, match="name too long"):
        stamp_of(tmp_path / ("x" * 300))


def test_a_checkpoint_of_a_newer_version_is_never_replaced(two_saves, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    save_checkpoint(two_saves, read_checkpoint(two_saves) | {"version": 99})
    monkeypatch.undo()
    before = contents(two_saves.parent)
    with pytest.raises(UserError, match="version 99 is newer"):
        train.main([*OPTIONS, "--res_dir", str(two_saves.parent)])
    assert contents(two_saves.parent) == before


NO_ENTRIES = [
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"null",
    b"[1, 2]",
    b"[" * 10_000,
    b'{"samples": "many", "train_loss": [1]}',
    b"9" * 9000,
]


def test_a_damaged_log_costs_no_epoch(tmp_path, caplog):
    options = [*TINY, "--epochs", "2", "--res_dir", str(tmp_path / "x")]
    train.main([*options, "--epochs", "1"])
    log_file, last = tmp_path / "x" / "log.jsonl", tmp_path / "x" / "last.pt"
    whole = log_file.read_bytes()
    log_file.write_bytes(b"\n".join([*NO_ENTRIES, whole]))
    content = read_checkpoint(last)
    content["position"]["log_size"] = log_file.stat().st_size
    save_checkpoint(last, content)
    train.main([*options, "--resume", "auto"])
    assert read_checkpoint(last)["position"]["epoch"] == 3
    assert caplog.text.count("line 1 is not an entry and is skipped (7 such lines)") == 1
    entries = read_log(log_file)
    assert [entry["epoch"] for entry in entries[1:]] == [1, 1, 2, 2]
    assert (tmp_path / "x" / "loss.png").stat().st_size > 1000


def test_a_log_that_cannot_be_written_or_is_removed_costs_no_epoch(tmp_path, monkeypatch, caplog):
    log_file = tmp_path / "x" / "log.jsonl"
    evaluate = train.evaluate

    def evaluate_and_put_a_folder_in_the_way(*arguments, **options):
        log_file.unlink()
        log_file.mkdir()
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "evaluate", evaluate_and_put_a_folder_in_the_way)
    train.main([*TINY, "--epochs", "1", "--res_dir", str(tmp_path / "x")])
    assert read_checkpoint(tmp_path / "x" / "last.pt")["position"]["epoch"] == 2
    assert "an entry was not written" in caplog.text and "Traceback" not in caplog.text


def test_pictures_that_fail_cost_no_epoch(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise ZeroDivisionError("no pixels")

    for name in ("save_strip", "save_animation", "save_curve"):
        monkeypatch.setattr(pictures, name, fail)
    train.main([*TINY, "--epochs", "2", "--res_dir", str(tmp_path / "x")])
    assert read_checkpoint(tmp_path / "x" / "last.pt")["position"]["epoch"] == 3
    assert (tmp_path / "x" / "best.safetensors").exists()
    for what in ("a picture", "the animation", "the curve"):
        assert f"{what} was not written" in caplog.text
    assert caplog.text.count("(no pixels); training continues") == 6
    assert caplog.text.count("in fail\n") == 6  # a fault in a program shows where it is


@pytest.fixture
def finished(tmp_path):
    train.main([*TINY, "--epochs", "1", "--res_dir", str(tmp_path / "x")])
    return tmp_path / "x"


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_run_that_lost_its_last_checkpoint_is_not_started_anew(finished, resume):
    for name in ("last.pt", "previous_last.pt"):
        (finished / name).unlink(missing_ok=True)
    before = contents(finished)
    with pytest.raises(UserError, match="best.safetensors of a run whose last.pt is gone"):
        train.main([*TINY, *resume, "--res_dir", str(finished)])
    assert contents(finished) == before


def test_the_log_of_a_run_that_was_killed_before_its_first_save_is_kept(finished, caplog):
    log_text = (finished / "log.jsonl").read_bytes()
    for name in ("last.pt", "previous_last.pt", "best.safetensors"):
        (finished / name).unlink()
    options = [*TINY, "--epochs", "1", "--res_dir", str(finished)]
    with pytest.raises(UserError, match="holds the log.jsonl of a run"):
        train.main(options)
    train.main([*options, "--lr", "2e-3", "--resume", "auto"])
    assert (finished / "log.jsonl.kept1").read_bytes() == log_text
    assert "lr = 0.001" in (finished / "config.toml.kept1").read_text()
    assert "kept as log.jsonl.kept1" in caplog.text and "kept as config.toml.kept1" in caplog.text


def test_files_of_the_user_stay(tmp_path, caplog):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    options = [*TINY, "--epochs", "1", "--res_dir", str(folder)]
    (folder / "lock").write_text("mine")
    with pytest.raises(UserError, match="is not the lock of a run"):
        train.main(options)
    assert (folder / "lock").read_text() == "mine"
    (folder / "lock").unlink()
    (tmp_path / "empty").touch()
    (folder / "lock").symlink_to(tmp_path / "empty")
    with pytest.raises((UserError, OSError)):
        train.main(options)
    (folder / "lock").unlink()
    train.main(options)
    assert (folder / "notes.txt").read_text() == "mine" and "already holds notes.txt" in caplog.text


def test_temporary_files_have_names_that_nobody_can_link_to(tmp_path):
    """A link under a name that can be predicted would be followed. The file has the rights that open() would give."""
    names = {files.new_file(tmp_path / "last.pt").name for _ in range(20)}
    assert len(names) == 20 and all(name.startswith(".last.pt.") and name.endswith(".tmp") for name in names)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(files.new_file(tmp_path / "x").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_a_configuration_is_written_whole_or_not_at_all(finished, monkeypatch):
    def full(config, path):
        path.write_text("model = ")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(finished)
    monkeypatch.setattr(configuration, "save_toml", full)
    with pytest.raises(UserError, match="config.toml: cannot be written .*No space left"):
        train.main(["--resume", str(finished), "--epochs", "2"])
    assert contents(finished) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(error, finished, monkeypatch, caplog):
    def acquire(lock):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    train.main(["--resume", str(finished)])
    assert "this file system has no locks; make sure that no other process trains there" in caplog.text


def test_an_entry_is_written_whole_or_not_at_all(finished, start):
    """The kernel refuses to write files beyond a limit, as it does on a full disk."""
    log_file = finished / "log.jsonl"
    before = log_file.read_bytes()
    code = f"""
import json, os, resource, signal
from pathlib import Path
from vmrnn.run_folder import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 20},) * 2)
try:
    RunFolder(Path({str(finished)!r})).append_to_log({{"text": "x" * 100}})
except OSError:
    os._exit(7)
"""
    assert start(finished, code)[1]() == 7
    assert log_file.read_bytes() == before and json.loads(before.splitlines()[-1])


def test_data_that_changed_since_the_run_began(tmp_path):
    frames = np.random.default_rng(0).integers(0, 200, (80, 16, 16)).astype(np.uint8)
    np.save(tmp_path / "rain.npy", frames)
    options = [
        *TINY, "--num_objects", "2", "--digit_size", "28", "--dataset", "array", "--train_data_dir",
        str(tmp_path / "rain.npy"), "--cache_dir",
        str(tmp_path / "cache"), "--train_sequences", "8", "--res_dir", str(tmp_path / "x"), "--data_range", "0", "255",
    ]  # fmt: skip
    train.main([*options, "--epochs", "1"])
    frames[3] += 1
    np.save(tmp_path / "rain.npy", frames)
    with pytest.raises(UserError, match="the data of the run changed since it began: train, valid; bring them back"):
        train.main([*options, "--epochs", "2", "--resume", "auto"])
    frames[3] -= 1
    np.save(tmp_path / "rain.npy", frames)
    train.main([*options, "--epochs", "2", "--resume", "auto"])
