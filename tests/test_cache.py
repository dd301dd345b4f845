"""The cache of data: when an entry is used again and when it is made anew, and the notes about the values."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import data_set, shared, write_images, write_video

import train
from vmrnn.data import cache, ranges
from vmrnn.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture
def own(tmp_path):
    """build(split, **options) of data in tmp_path / "data", 8x10 frames, 2 -> 1."""

    def build(split, **options):
        defaults = dict(
            dataset="array", cache_dir=str(tmp_path / "cache"), train_data_dir=str(tmp_path / "data"), input_size=[8,
            10],
            num_frames_input=2, num_frames_output=1,
        )  # fmt: skip
        return data_set(split, **(defaults | options))

    (tmp_path / "data").mkdir()
    return build


def same_size_and_time(*paths):
    assert len({path.stat().st_size for path in paths}) == 1
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("kind", ["npz", "video", "frames"])
def test_files_of_equal_name_size_and_time_are_told_apart(own, tmp_path, kind):
    """What any zip, tar or copy that keeps times makes of train/data.npz and test/data.npz."""
    frames = np.repeat(RNG.integers(0, 255, (2, 1, 8, 10, 1), dtype=np.uint8), 12, axis=1)
    for i, split in enumerate(("train", "test")):
        folder = tmp_path / split / "clip"
        if kind == "npz":
            folder.mkdir(parents=True)
            np.savez(folder / "data.npz", frames[i])
        elif kind == "video":
            folder.mkdir(parents=True)
            write_video(folder / "data.avi", frames[i], "rawvideo", "gray")
        else:
            write_images(folder, frames[i], "{}.bmp")
    files = [sorted((tmp_path / split / "clip").iterdir()) for split in ("train", "test")]
    for pair in zip(*files):
        same_size_and_time(*pair)
    options = dict(dataset="array" if kind == "npz" else kind, data_range=[0.0, 255.0])
    options |= dict(train_data_dir=str(tmp_path / "train"), test_data_dir=str(tmp_path / "test"))
    for i, split in enumerate(("train", "test")):
        assert torch.equal(
            (own(split, **options)[0][0] * 255).round()[0, 0].byte(), torch.from_numpy(frames[i, 0, ..., 0])
        )


def test_a_file_that_was_replaced_with_its_time_kept(own, tmp_path):
    paths = [tmp_path / "data" / "a.npz", tmp_path / "other.npz"]
    for i, path in enumerate(paths):
        np.savez(path, np.full((30, 8, 10), i + 3, np.uint8))
    same_size_and_time(*paths)
    assert own("train", data_range=[0.0, 10.0])[0][0].unique() == torch.tensor(0.3)
    os.replace(paths[1], paths[0])
    assert own("train", data_range=[0.0, 10.0])[0][0].unique() == torch.tensor(0.4)


def test_data_that_moved_are_not_decoded_again(own, tmp_path, monkeypatch):
    write_video(tmp_path / "data" / "a.avi", RNG.integers(0, 255, (30, 8, 10, 1), dtype=np.uint8))
    first = own("train", dataset="video")[0]
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    monkeypatch.setattr("vmrnn.data.sources.video_frames", None)
    moved = own("train", dataset="video", train_data_dir=str(tmp_path / "moved"))[0]
    assert torch.equal(first[0], moved[0])


def test_large_files_are_told_apart_by_samples_and_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WHOLE", 10_000)
    monkeypatch.setattr(cache, "SAMPLES", 5), monkeypatch.setattr(cache, "SAMPLE", 100)
    content = RNG.bytes(50_000)
    for name, change in (("a", 0), ("first", 1), ("last", -1), ("between", 1000)):
        changed = bytearray(content)
        if name != "a":
            changed[change if name != "first" else 0] ^= 1
        (tmp_path / name).write_bytes(changed)
        os.utime(tmp_path / name, ns=(1, 1))
    a, first, last, between = (cache.stamp(tmp_path / name) for name in ("a", "first", "last", "between"))
    assert len({tuple(stamp) for stamp in (a, first, last)}) == 3 and between == a
    os.utime(tmp_path / "between", ns=(2, 2))
    assert cache.stamp(tmp_path / "between") != a and cache.identity(tmp_path / "between") == cache.identity(
        tmp_path / "a"
    )


def break_nothing(folder):
    pass


def empty_index(folder):
    (folder / "index.json").write_text("")


def cut_index(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])


def other_index(folder):
    (folder / "index.json").write_text((folder / "index.json").read_text().replace("30", "29"))


def no_frames(folder):
    (folder / "frames.npy").unlink()


def cut_frames(folder):
    content = (folder / "frames.npy").read_bytes()
    (folder / "frames.npy").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("damage", [break_nothing, empty_index, cut_index, other_index, no_frames, cut_frames])
def test_a_damaged_cache_is_made_again(own, tmp_path, damage):
    write_video(tmp_path / "data" / "a.avi", RNG.integers(0, 255, (30, 8, 10, 1), dtype=np.uint8))
    first = own("train", dataset="video")
    (folder,) = (tmp_path / "cache").glob("video-*")
    made = folder.stat().st_mtime_ns
    damage(folder)
    again = own("train", dataset="video")
    assert torch.equal(first[0][0], again[0][0]) and len(again) == len(first) and again.identity == first.identity
    (folder,) = (tmp_path / "cache").glob("video-*")
    assert (folder.stat().st_mtime_ns == made) == (damage is break_nothing)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """(read, file): read() is what the cache gives; its one file is large: samples of it are not the whole."""
    monkeypatch.setattr(cache, "SAMPLES", 5), monkeypatch.setattr(cache, "SAMPLE", 100)
    monkeypatch.setattr(cache, "LARGE", 500)
    content = RNG.bytes(50_000)

    def read():
        folder = cache.cached_folder(
            tmp_path / "cache", "x", [1], lambda folder: (folder / "frames.npy").write_bytes(content)
        )
        return (folder / "frames.npy").read_bytes() == content

    assert read()
    return read, next((tmp_path / "cache").glob("x-*")) / "frames.npy"


def test_a_byte_between_the_samples_of_a_large_cached_file(large):
    """The file keeps its size and its time of modification."""
    read, file = large
    made, damaged = file.stat(), bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(damaged)
    os.utime(file, ns=(made.st_atime_ns, made.st_mtime_ns))
    assert read()


def test_a_large_cached_file_whose_disk_lost_a_sample(large, monkeypatch):
    """Nothing wrote to the file, so its version is the same."""
    read, file = large
    monkeypatch.setattr(cache, "version", lambda path: (0,))
    shutil.rmtree(file.parent)
    assert read()
    damaged = bytearray(file.read_bytes())
    damaged[:50] = bytes(50)
    file.write_bytes(damaged)
    assert read()


def test_a_large_cached_file_is_read_whole_once(large, tmp_path, monkeypatch):
    read, file = large
    whole_reads = []
    checksum = cache.checksum

    def counted(path, size, whole):
        if size == whole:
            whole_reads.append(path.name)
        return checksum(path, size, whole)

    monkeypatch.setattr(cache, "checksum", counted)
    assert read() and not whole_reads
    os.utime(file)  # as good as before, but it may have been written
    for _ in range(2):
        assert read() and whole_reads == ["frames.npy"]
    made = file.stat().st_ino
    (file.parent / cache.WHOLE_FILES).write_text("[")
    assert read() and file.stat().st_ino != made


def test_damaged_ranges_are_found_again(own, tmp_path):
    np.save(tmp_path / "data" / "a.npy", RNG.uniform(0, 5, (40, 8, 10)))
    first = own("train").value_range
    for file in (tmp_path / "cache").glob("values-*/summary.json"):
        file.write_text("[")
    assert own("train").value_range == first


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_stays(own, tmp_path):
    """The owner of a folder holds its lock; the lock of a killed process is free."""
    code = (
        "import sys, time; from filelock import FileLock; "
        "lock = FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); time.sleep(60)"
    )
    processes = []
    for name in ("dead", "living"):
        (tmp_path / "cache" / f".making-{name}").mkdir(parents=True)
        lock = str(tmp_path / "cache" / f".making-{name}" / "lock")
        processes.append(subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"1\n"
        os.utime(tmp_path / "cache" / f".making-{name}", (1, 1))
    processes[0].kill(), processes[0].communicate()  # which closes the pipe, too
    write_video(tmp_path / "data" / "a.avi", RNG.integers(0, 255, (30, 8, 10, 1), dtype=np.uint8))
    own("train", dataset="video")
    assert [path.name for path in (tmp_path / "cache").glob(".making*")] == [".making-living"]
    processes[1].kill(), processes[1].communicate()


@pytest.mark.parametrize("kind", ["npy", "npz", "video"])
def test_data_keep_their_identity_wherever_they_lie(own, tmp_path, kind):
    values = RNG.integers(0, 255, (40, 8, 10, 1), dtype=np.uint8)

    def write(folder, values):
        folder.mkdir(exist_ok=True)
        if kind == "video":
            write_video(folder / "a.avi", values)
        else:
            (np.save if kind == "npy" else np.savez)(folder / f"a.{kind}", values)
        options = dict(dataset="video" if kind == "video" else "array", train_data_dir=str(folder))
        return {split: own(split, **options).identity for split in ("train", "valid", "test")}

    first = write(tmp_path / "data", values)
    assert len(set(first.values())) == 3 and write(tmp_path / "moved", values) == first
    changed = values.copy()
    changed[3, 4, 5] ^= 1
    other = write(tmp_path / "other", changed)
    assert all(other[split] != first[split] for split in first)
    options = dict(dataset="video" if kind == "video" else "array", train_data_dir=str(tmp_path / "data"))
    assert (
        own("train", num_frames_output=3, **options).identity != own("train", num_frames_output=2, **options).identity
    )


# What is said of the values


def test_the_range_and_the_share_of_missing_pixels_are_said(own, tmp_path):
    values = RNG.uniform(0, 50, (40, 8, 10)).astype(np.float32)
    values[:, :2] = -999.9
    np.save(tmp_path / "data" / "a.npy", values.astype(np.float64))  # read as float64, as many formats are
    data = own("train", missing_value=[-999.9, -1.0])
    assert data.value_range.low >= 0 and torch.cat(data[0])[:, :, :2].isnan().all()
    training = values[:32, 2:]
    assert f"train data: values {training.min():g} to {training.max():g}, 25 % missing" in data.notes
    (unused,) = [note for note in data.notes if "occurs nowhere" in note]
    assert "missing_value -1 " in unused and "values" in unused
    test = own("test", missing_value=[-999.9, -1.0])
    assert any("test data" in note for note in test.notes) and not any("nowhere" in note for note in test.notes)


@pytest.mark.parametrize("value, refused", [(-100.0, False), (9.97e36, True), (1e20, True), (-99999.0, True)])
def test_a_value_far_from_all_others_is_no_range(own, tmp_path, value, refused):
    values = RNG.uniform(0, 5, (40, 8, 10))
    values[3, 4, 5] = value
    np.save(tmp_path / "data" / "a.npy", values)
    if refused:
        with pytest.raises(UserError, match=rf"{value:g}.*missing_value".replace("+", r"\+")):
            own("train")
    else:
        assert any(f"{value:g} lies" in note and "missing_value" in note for note in own("train").notes)
    assert own("train", missing_value=[value]).value_range.high < 5.1
    if abs(value) > 1e7:
        with pytest.raises(UserError, match="far outside the range"):
            own("train", data_range=[0.0, 5.0])
    else:
        assert own("train", data_range=[0.0, 5.0]).value_range.high == 5


def test_the_range_of_the_training_is_exact_and_others_are_of_a_sample(own, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "LOOK", 400)  # 5 of 30 frames of 80 values
    values = RNG.random((30, 8, 10)).astype(np.float32)
    values[7, 1, 2], values[11, 1, 2] = 3.0, -2.0
    np.save(tmp_path / "a.npy", values)
    train = own("train", train_data_dir=str(tmp_path / "a.npy"))
    assert (train.value_range.low, train.value_range.high) == (-2.0, 3.0)
    assert not any("of the 30 frames" in note for note in train.notes)
    again = own("test", test_data_dir=str(tmp_path / "a.npy"), value_range=train.value_range)
    assert any("(in 5 of the 30 frames)" in note for note in again.notes)


def test_channels_of_different_units_have_ranges_of_their_own(own, tmp_path):
    values = np.stack([RNG.uniform(*pair, (40, 8, 10)) for pair in ((250, 310), (0, 1e-3), (9e4, 1e5))], axis=-1)
    np.save(tmp_path / "data" / "a.npy", values)
    item = torch.cat(own("train", input_channels=3)[0])
    assert (item.amin((0, 2, 3)) < 0.05).all() and (item.amax((0, 2, 3)) > 0.95).all()
    one = own("train", input_channels=3, data_range=[0.0, 1e5])
    assert torch.cat(one[0])[:, 0].max() < 0.01
    own_ranges = own("train", input_channels=3, data_range=[200.0, 400.0, 0.0, 1.0, 0.0, 1e5])
    assert own_ranges.value_range.low == (200, 0, 0) and own_ranges.value_range.high == (400, 1, 1e5)
    with pytest.raises(UserError, match="2 per channel for input_channels 3"):
        own("train", input_channels=3, data_range=[0.0, 1.0, 0.0, 1.0])


def test_rain_on_a_log_scale(own):
    """The real radar composites, with a threshold: every value comes back."""
    data = own(
        "train", train_data_dir=str(shared("radar/bom_r2_20180616_int16.npz")), missing_value=[-32768.0],
        transform="log", zero_below=2.0, frame_fit="crop", input_size=[64, 64],
    )  # fmt: skip
    values = torch.cat(data[0])
    stored = data.value_range.to_data(values)
    known = ~stored.isnan()
    assert known.any() and ((stored[known] - stored[known].round()).abs() < 1e-2).all()
    assert values[known].max() <= 1 and values[known].min() >= 0


# Data that moved or changed between two starts of a run


def test_a_run_goes_on_with_data_that_moved_and_not_with_data_that_changed(tmp_path):
    values = RNG.uniform(0, 5, (40, 8, 16)).astype(np.float32)
    for name in ("data", "moved", "changed"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", values)
    changed = values.copy()
    changed[10, 3, 3] = changed[10, 3, 4]  # the range stays
    np.save(tmp_path / "changed" / "a.npy", changed)
    start = (
        f"--model VMRNN-B --embed_dim 16 --depths 1 --patch_size 4 --dataset array --cache_dir {tmp_path / 'cache'} "
        f"--input_size 8 16 --num_frames_input 2 --num_frames_output 2 --train_sequences 8 --train_batch_size 4 "
        f"--device cpu --res_dir {tmp_path / 'run'}"
    ).split()
    train.main([*start, "--train_data_dir", str(tmp_path / "data"), "--epochs", "1"])
    on = ["--res_dir", str(tmp_path / "run"), "--resume", "auto"]
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="changed since it began: train"):
        train.main([*on, "--train_data_dir", str(tmp_path / "changed"), "--epochs", "2"])
    with pytest.raises(UserError, match="cannot change test_data_dir"):
        train.main([*on, "--train_data_dir", str(tmp_path / "moved"), "--test_data_dir", "x", "--epochs", "2"])
    train.main([*on, "--train_data_dir", str(tmp_path / "moved"), "--epochs", "2"])
    np.save(tmp_path / "moved" / "a.npy", changed)  # under the same name
    with pytest.raises(UserError, match="changed since it began: train"):
        train.main([*on, "--epochs", "3"])
    # A checkpoint of an older version does not know its data.
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del content["data"]
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match="cannot change train_data_dir"):
        train.main([*on, "--train_data_dir", str(tmp_path / "changed"), "--epochs", "3"])
    train.main([*on, "--epochs", "3"])
