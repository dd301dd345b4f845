"""KTH, TaxiBJ, Human3.6M and your own data: which frames make which items, on disk and in the cache."""

import os
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same, batches, data_set, shared, write_images, write_video
from matplotlib.figure import Figure

import test as test_program
import train
from dataset import build_dataset, make_loader
from vmrnn import command_line, config as configuration
from vmrnn.data import cache, sources, splits
from vmrnn.data.overlap import overlap_notes
from vmrnn.data.prepare import resize
from vmrnn.data.table import DATASETS
from vmrnn.data.windows import crop_start
from vmrnn.errors import UserError
from vmrnn.metrics import METRICS, Metrics, metric_rows
from vmrnn.values import ValueRange


def numbered(clip, count, height=8, width=10, channels=1):
    """Frames whose every pixel says which they are: 50 * clip + frame."""
    values = np.arange(count, dtype=np.uint8) + np.uint8(50 * clip)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, channels))


def ids(item):
    """The stored values of an item's frames, back from [0, 1] = 0 to 255, one per frame."""
    values = (torch.cat(item) * 255).round().flatten(1)
    assert (values == values[:, :1]).all()
    return values[:, 0].int().tolist()


@pytest.fixture
def own(tmp_path):
    """build(split, **options) with a cache and small frames, for data under tmp_path / "data"."""

    def build(split, **options):
        defaults = dict(
            cache_dir=tmp_path / "cache", train_data_dir=tmp_path / "data", num_frames_input=2, num_frames_output=1,
            input_size=(8, 10),
        )  # fmt: skip
        return data_set(split, **(defaults | options))

    (tmp_path / "data").mkdir()
    return build


# The published data sets


# (channels, height, width), (input, output frames)
LITERATURE = {
    "kth": ((1, 128, 128), (10, 10)),
    "taxibj": ((2, 32, 32), (4, 4)),
    "human36m": ((3, 128, 128), (4, 4)),
}


def literature_starts(numbers, total, step):
    """First positions of the windows of one clip, by the backward walk of the published loaders."""
    starts, index = [], len(numbers) - 1
    while index >= total - 1:
        if numbers[index] - numbers[index - total + 1] == total - 1:
            starts.append(index - total + 1)
            index -= step - 1
        index -= 1
    return starts[::-1]


@pytest.fixture
def kth(own, tmp_path):
    """One clip each of persons 1, 15, 16, 17, 25, each frame with a value of its own."""
    names = ["01_boxing_d1", "15_running_d2", "16_walking_d4", "17_jogging_d3", "25_handwaving_d1"]
    for i, name in enumerate(names):
        write_video(tmp_path / "data" / f"person{name}_uncomp.avi", numbered(i, 11 + i))
    return lambda split, **options: own(split, dataset="kth", **options)


def test_kth_splits_persons_and_never_crosses_clips(kth):
    train_set, valid, test = (kth(split) for split in ("train", "valid", "test"))
    assert sorted(ids(train_set[i]) for i in range(len(train_set))) == [
        [50 * clip + t, 50 * clip + t + 1, 50 * clip + t + 2] for clip in (0, 1) for t in range(11 + clip - 2)
    ]
    assert [ids(valid[i])[0] for i in range(len(valid))] == [100 + t for t in literature_starts(range(13), 3, 3)]
    starts = [150 + t for t in literature_starts(range(14), 3, 3)] + [
        200 + t for t in literature_starts(range(15), 3, 3)
    ]
    assert [ids(test[i])[0] for i in range(len(test))] == starts
    few = kth("valid", valid_sequences=2)  # evenly spaced over the four; training and test stay whole
    assert [ids(few[i])[0] for i in range(len(few))] == [101, 110]
    assert [len(kth(split, valid_sequences=2).windows) for split in ("train", "test")] == [len(train_set), len(test)]


def test_a_test_set_of_its_own_needs_no_training_data(kth, tmp_path):
    """A network is often tested on another machine than the one that it was trained on."""
    test = kth("test", train_data_dir=tmp_path / "absent", test_data_dir=tmp_path / "data")
    assert_same([test[0]], [kth("test")[0]])
    with pytest.raises(UserError, match="absent: no such file .* section KTH, .* --test_data_dir names them"):
        kth("test", test_data_dir=tmp_path / "absent")


def test_kth_longer_forecasts_in_the_test(kth):
    """Jogging every third window, the others adjoining ones, as the published loaders have it, at any length."""
    test = kth("test", num_frames_output=4)
    jogging = [150 + t for t in literature_starts(range(14), 6, 3)]
    waving = [200 + t for t in literature_starts(range(15), 6, 6)]
    assert [ids(test[i]) for i in range(len(test))] == [[s + t for t in range(6)] for s in jogging + waving]
    with pytest.raises(UserError, match="2\\+20 frames, the longest run has 15"):
        kth("test", num_frames_output=20)


def test_kth_from_frames_and_its_gaps(kth, own, tmp_path):
    """Folders of frames give what the videos give; where a number is missing no window goes across."""
    for i, name in enumerate(["person01_boxing_d1", "person15_running_d2"]):
        write_images(tmp_path / "frames" / "x" / f"{name}_uncomp", numbered(i, 11 + i, channels=3), "image_{}_8x10.png")
    from_frames = kth("train", train_data_dir=tmp_path / "frames")
    from_video = kth("train")
    assert_same([from_frames[3, i] for i in range(19)], [from_video[3, i] for i in range(19)])
    (tmp_path / "frames" / "x" / "person01_boxing_d1_uncomp" / "image_5_8x10.png").unlink()
    gaps = kth("train", train_data_dir=tmp_path / "frames")
    firsts = sorted(ids(gaps[i])[0] for i in range(len(gaps)))
    assert firsts == [0, 1, 5, 6, 7, 8, *range(50, 60)]


def test_kth_annotated_frames(kth, tmp_path):
    """With KTH's own list beside the videos only the frames with an action in them are used."""
    (tmp_path / "data" / "00sequences.txt").write_text("The list\n\nperson01_boxing_d1\t\tframes\t1-4, 7-10\n")
    firsts = sorted(ids(item)[0] for item in map(kth("train").__getitem__, range(14)))
    assert firsts == [0, 1, 6, 7, *range(50, 60)]
    (tmp_path / "data" / "00sequences.txt").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="00sequences"):
        kth("train")


def test_kth_real_clips(tmp_path):
    for person in ("01", "17"):
        for action in ("handclapping", "jogging"):
            source = shared(f"kth/person01_{action}_d1_uncomp.avi")
            os.symlink(source, tmp_path / f"person{person}_{action}_d1_uncomp.avi")
    options = dict(dataset="kth", train_data_dir=tmp_path, cache_dir=tmp_path / "cache", input_size=(128, 128))
    train_set = data_set("train", length=10**6, **options)
    assert len(train_set) == (378 - 19) + (415 - 19)
    inputs, targets = train_set[2, 5]
    assert inputs.shape == targets.shape == (10, 1, 128, 128) and 0 <= inputs.min() < inputs.max() - 0.2 < 1
    assert len(data_set("test", num_frames_output=40, **options)) == 378 // 50 + (415 - 50) // 3 + 1
    with pytest.raises(UserError, match="no clip of persons 16 to 16, the valid part"):
        data_set("valid", **options)


def test_resizing_is_bilinear():
    """Pixel centres at (i + 1/2) * old / new - 1/2, weights by distance: what the literature's resizing does."""
    frames = np.random.default_rng(0).random((2, 1, 12, 16), dtype=np.float32)

    def weights(old, new):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))

    expected = weights(12, 13) @ frames @ weights(16, 13).T
    np.testing.assert_allclose(resize(frames, (13, 13), antialias=False), expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_taxibj(own, tmp_path, layout):
    values = {name: np.random.default_rng(0).uniform(-1, 1, (20, 4, 2, 8, 10)) for name in ("X_train", "Y_train")}
    values |= {name: -v[:7] for name, v in zip(("X_test", "Y_test"), values.values())}
    axes = (0, 1, 2, 3, 4) if layout == "channels first" else (0, 1, 3, 4, 2)
    np.savez_compressed(tmp_path / "data" / "dataset.npz", **{k: v.transpose(axes) for k, v in values.items()})
    options = dict(dataset="taxibj", input_channels=2, num_frames_input=4, num_frames_output=4)
    parts = {split: own(split, **options) for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 18, "valid": 2, "test": 7}
    assert parts["train"].value_range == ValueRange(-1.0, 1.0)
    for split, part, first in (("valid", "train", 18), ("test", "test", 0)):
        for i in range(len(parts[split])):
            for got, name in zip(parts[split][i], "XY"):
                expected = (values[f"{name}_{part}"][first + i] + 1) / 2
                np.testing.assert_allclose(got, expected, atol=1e-6)
    shorter = own("test", **(options | dict(num_frames_input=3, num_frames_output=2)))
    assert torch.equal(shorter[0][0], parts["test"][0][0][1:]) and torch.equal(shorter[0][1], parts["test"][0][1][:2])


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(X_train=None), "no array 'X_train'"),
        (dict(X_train=np.full((20, 4, 2, 8, 10), 3.0)), r"outside \[-1, 1\]"),
        (dict(Y_train=np.full((20, 4, 2, 8, 10), 0.5)), r"scaled to \[0, 1\] and not to \[-1, 1\]"),
        (dict(Y_train=np.zeros((19, 4, 2, 8, 10))), "X and Y"),
        (dict(X_train=np.zeros((20, 4, 2, 8, 10), np.uint8)), "X and Y"),
        (dict(X_train=np.zeros((20, 2, 2, 8, 10))), "2\\+4 frames, but 4\\+4"),
        (dict(X_train=np.zeros((20, 4, 2, 9, 9)), Y_train=np.zeros((20, 4, 2, 9, 9))), "9x9"),
    ],
)
def test_taxibj_files_that_are_not(own, tmp_path, change, says):
    arrays = {name: np.zeros((20, 4, 2, 8, 10)) for name in ("X_train", "Y_train")} | change
    np.savez(tmp_path / "data" / "dataset.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(UserError, match=says) as caught:
        own("train", dataset="taxibj", input_channels=2, num_frames_input=4, num_frames_output=4)
    assert "dataset.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["{0}_{1:06d}.png", "{0}/{1:06d}.png", "images/{0}/{0}_{1:06d}.png"])
def test_human36m(own, tmp_path, layout):
    """Subjects 1 and 9, every fifth frame, in any of the layouts; the end of a training clip validates."""
    for i, name in enumerate(["S1_Walking_1.54138969", "S9_Directions.60457274"]):
        for t, frame in enumerate(numbered(i, 100, channels=3), 1):
            path = tmp_path / "data" / layout.format(name, t)
            if t % 5 == 1 or layout.startswith("{0}_"):
                write_images(path.parent, frame[None], path.name)
    options = dict(dataset="human36m", input_channels=3)
    train_set, test = own("train", **options), own("test", **options)
    assert sorted(ids(train_set[i]) for i in range(len(train_set))) == [[t, t + 5, t + 10] for t in range(0, 80, 5)]
    assert [ids(test[i])[0] for i in range(len(test))] == [50 + 5 * t for t in literature_starts(range(20), 3, 3)]
    with pytest.raises(UserError, match="no validation sequence"):
        own("valid", **options)  # a tenth of 20 frames is shorter than 3
    assert ids(own("valid", num_frames_input=1, **options)[0]) == [90, 95]


# Your own data


@pytest.mark.parametrize(
    ("apart", "valid", "said"), [(False, [24], "2 of the 3 clips"), (True, range(28), "1 of the 2 clips")]
)
def test_clips_that_are_too_short_are_counted(own, tmp_path, apart, valid, said):
    """Of a clip of one frame the validation part is empty. That ended in a ZeroDivisionError."""
    for i, count in enumerate((30, 1, 4)):
        write_video(tmp_path / "data" / f"clip{i}.mkv", numbered(i, count))
    options = dict(dataset="video", test_fraction=0.1)
    if apart:
        (tmp_path / "valid").mkdir()
        for i in (0, 1):
            os.link(tmp_path / "data" / f"clip{i}.mkv", tmp_path / "valid" / f"clip{i}.mkv")
        options["valid_data_dir"] = str(tmp_path / "valid")
    part = own("valid", **options)
    assert [ids(part[i])[0] for i in range(len(part))] == list(valid)
    (note,) = [note for note in part.notes if "no sequence" in note]
    assert said in note and "fewer than 3 frames" in note and "clip1.mkv" in note


def test_parts_in_time_share_no_frame(own, tmp_path):
    for i in range(2):
        write_video(tmp_path / "data" / f"clip{i}.mkv", numbered(i, 30))
    options = dict(dataset="video", valid_fraction=0.2, test_fraction=0.3)
    seen = {}
    for split in ("train", "valid", "test"):
        part = own(split, **options)
        seen[split] = {value for i in range(len(part)) for value in ids(part[i])}
    starts = {"train": range(15), "valid": range(15, 21), "test": range(21, 30)}
    assert seen == {split: {50 * i + t for i in (0, 1) for t in frames} for split, frames in starts.items()}
    for split, firsts in (("valid", [15, 65, 68]), ("test", [21, 27, 77])):  # of 4 and of 7 windows in each clip
        part = own(split, **options, **{f"{split}_sequences": 3})
        assert [ids(part[i])[0] for i in range(len(part))] == firsts


def test_parts_by_file_and_folders_of_their_own(own, tmp_path):
    for i in range(3):  # clip10 after clip9
        write_images(tmp_path / "data" / f"clip{i + 8}", numbered(i, 6))
    write_images(tmp_path / "elsewhere" / "clip", numbered(4, 6))
    options = dict(dataset="frames", split_by="file")

    def clips_of(split, **more):
        part = own(split, **(options | more))
        return sorted({value // 50 for i in range(len(part)) for value in ids(part[i])})

    assert [clips_of(split) for split in ("train", "valid", "test")] == [[0], [1], [2]]
    apart = dict(test_data_dir=tmp_path / "elsewhere")
    assert [clips_of(split, **apart) for split in ("train", "valid", "test")] == [[0, 1], [2], [4]]
    apart |= dict(valid_data_dir=tmp_path / "elsewhere")
    assert [clips_of(split, **apart) for split in ("train", "valid", "test")] == [[0, 1, 2], [4], [4]]


def test_clips_that_are_copies_are_counted(own, tmp_path):
    for i, clip in enumerate((0, 1, 0)):
        np.save(tmp_path / "data" / f"{i}.npy", numbered(clip, 30)[..., 0])
        write_images(tmp_path / "data" / f"clip{i}", numbered(clip, 30))
    for dataset, said in (("array", "2.npy of .*0.npy: with"), ("frames", "such as clip2 of clip0: with")):
        for split_by, count in (("file", 1), ("time", 0)):
            notes = own("train", dataset=dataset, split_by=split_by).notes
            found = [note for note in notes if "1 of 3 clips hold the same" in note]
            assert len(found) == count and all(re.search(said, note) for note in found)


@pytest.mark.parametrize(
    ("stride", "said"), [(1, "frame 2 of the first"), (6, "frame 7 of the first"), (8, None), (0, None)]
)
def test_windows_that_were_cut_beforehand_are_seen_to_overlap(own, tmp_path, stride, said):
    """stride 0: maps without rain, which are all equal."""
    frames = np.random.default_rng(0).random((40, 8, 10), np.float32) * (stride > 0)
    frames[:, 0] = np.nan
    np.save(tmp_path / "data" / "a.npy", np.stack([frames[i * stride : i * stride + 8] for i in range(5)]))
    notes = own("train", dataset="array", data_range=[0, 1]).notes
    found = [note.split("begins with ")[1].split(",")[0] for note in notes if "overlap" in note]
    assert found == [said] * (said is not None)


def test_parts_by_file_keep_a_clip_with_a_gap_whole(own, tmp_path):
    """Clips whose image number 7 is missing: both pieces of a clip are of one split."""
    for i in range(3):
        write_images(tmp_path / "data" / f"clip{i}", numbered(i, 12), "f_{:03d}.png")
        (tmp_path / "data" / f"clip{i}" / "f_007.png").unlink()
    seen = {}
    for split in ("train", "valid", "test"):
        part = own(split, dataset="frames", split_by="file")
        seen[split] = {value for i in range(len(part)) for value in ids(part[i])}
    assert seen == {
        split: {50 * i + t for t in range(12) if t != 6} for i, split in enumerate(("train", "valid", "test"))
    }


@pytest.mark.parametrize(
    "trained, tested, says",
    [
        ({}, {}, None),
        ({}, dict(test_fraction=0.075), None),  # fewer frames of the test part
        ({}, dict(test_data_dir="b.npy"), None),
        ({}, dict(test_data_dir="a.npy"), "36 of the 38 sequences hold frames of the training or its validation"),
        ({}, dict(test_fraction=0.5), "16 of the 18 sequences hold frames"),
        (dict(test_data_dir="b.npy"), {}, "2 of the 2 sequences hold frames"),
        (dict(frame_step=2), dict(test_data_dir="a.npy"), "35 of the 38 sequences"),  # even frames, up to frame 34
        (
            dict(train_data_dir="many.npy", split_by="file"),
            dict(train_data_dir="many.npy", split_by="file", test_data_dir="many.npy"),
            "36 of the 54 sequences",  # of two of three clips in one array
        ),
        (dict(valid_data_dir="b.npy"), dict(test_data_dir="b.npy"), "38 of the 38 sequences hold frames"),
        ({}, dict(test_data_dir="."), "1 of the 2 files in .* are also files of the training or its validation"),
        (dict(train_data_dir="gone.npy"), dict(test_fraction=0.5), "test_fraction: not as in .* is not known"),
        (dict(train_data_dir="gone.npy"), {}, None),
    ],
)
def test_frames_of_the_training_in_a_test_are_named(tmp_path, trained, tested, says):
    """40 frames: 32 train, 4 validate, 4 test."""
    for seed, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).random((40, 8, 10)))
    if "many.npy" in tested.values():
        np.save(tmp_path / "many.npy", np.random.default_rng(0).random((3, 20, 8, 10)))

    def config(**paths_and_options):
        paths = {key: str(tmp_path / value) for key, value in paths_and_options.items() if key.endswith("_dir")}
        base = dict(
            dataset="array", train_data_dir=str(tmp_path / "a.npy"), cache_dir=str(tmp_path / "cache"), input_size=[8,
            10],
            num_frames_input=2, num_frames_output=1,
        )  # fmt: skip
        return configuration.Config(**base | paths_and_options | paths)

    options = config(**tested)
    notes = overlap_notes(build_dataset("test", options), "test", options, config(**trained).to_dict())
    assert len(notes) == (says is not None) and (says is None or re.match(says, notes[0])), notes


@pytest.mark.parametrize(
    "dataset, copied, count", [("array", "2.npy", 1), ("frames", "x", 4), ("frames", "renamed", 0)]
)
def test_copies_of_files_of_the_training_are_named(tmp_path, dataset, copied, count):
    """A test folder with a clip of its own and a copy of one of the training. A renamed image may only look alike."""
    for folder, name, seed in (("train", "1", 1), ("test", "other", 2), ("test", copied, 1)):
        values = np.random.default_rng(seed).integers(0, 256, (4, 8, 10, 1), np.uint8)
        if dataset == "array":
            (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / folder / f"{Path(name).stem}.npy", values[..., 0])
        else:
            write_images(tmp_path / folder / name, values, "b_{:03d}.png" if name == "renamed" else "a_{:03d}.png")
    options = configuration.Config(
        dataset=dataset, train_data_dir=str(tmp_path / "train"), test_data_dir=str(tmp_path / "test"), input_size=[8,
        10],
        cache_dir=str(tmp_path / "cache"), num_frames_input=2, num_frames_output=1,
    )  # fmt: skip
    notes = overlap_notes(build_dataset("test", options), "test", options, replace(options, test_data_dir="").to_dict())
    assert len(notes) == (count > 0), notes
    assert not count or re.match(
        rf"{count} of the \d files in .*test are also files of .*, or copies of them: ", notes[0]
    )


def test_the_programs_say_that_a_set_holds_frames_of_the_training(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "vmrnn")
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())  # most of the time
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(0).random((40, 8, 16), np.float32))
    train.main(
        f"--model VMRNN-B --embed_dim 16 --depths 1 --patch_size 4 --dataset array --train_data_dir {path} "
        f"--valid_data_dir {path} --cache_dir {tmp_path / 'cache'} --input_size 8 16 --num_frames_input 2 "
        "--num_frames_output 2 "
        f"--train_sequences 4 --train_batch_size 4 --epochs 1 --device cpu --res_dir {tmp_path / 'run'}".split()
    )
    assert "36 of the 37 sequences hold frames of the training: the figures" in caplog.text
    test_program.main(
        f"--checkpoint {tmp_path / 'run'} --test_data_dir {path} --cache_dir {tmp_path / 'cache'} --device cpu "
        "--strips 1 "
        f"--no-motion --res_dir {tmp_path / 'test'}".split()
    )
    said = "37 of the 37 sequences hold frames of the training or its validation"
    assert said in caplog.text and said in (tmp_path / "test" / "report.html").read_text()


LAYOUTS = {
    "(T, H, W)": ((40, 8, 10), 1),
    "(T, H, W, 1)": ((40, 8, 10, 1), 1),
    "(T, H, W, C)": ((40, 8, 10, 2), 2),
    "(N, T, H, W)": ((3, 40, 8, 10), 1),
    "(N, T, H, W, C)": ((3, 40, 8, 10, 2), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_arrays_scale_to_the_training_part_and_back(own, tmp_path, layout, dtype, ending):
    """Every layout and type: each channel of the training part spans [0, 1], and comes back as it was stored."""
    shape, channels = LAYOUTS[layout]
    values = np.random.default_rng(0).integers(3, 200, shape).astype(dtype)
    time = layout.count("N")
    np.moveaxis(values, time, 0)[-1] = 255 if dtype == np.uint8 else 999  # in the test part only
    (np.savez_compressed if ending == ".npz" else np.save)(tmp_path / f"a{ending}", values)
    options = dict(dataset="array", train_data_dir=tmp_path / f"a{ending}", input_channels=channels)
    test = own("test", **options)
    training = np.moveaxis(values, time, 0)[:32].reshape(-1, channels)
    pairs = list(zip(training.min(axis=0), training.max(axis=0)))
    assert list(test.value_range.pairs()) == pairs and test.value_range == own("train", **options).value_range
    stored = values.reshape(-1, 40, 8, 10, channels).transpose(0, 1, 4, 2, 3)
    windows = [(n, t) for n in range(len(stored)) for t in (36, 37)]
    assert len(test) == len(windows)
    for i, (n, t) in enumerate(windows):
        item = test.value_range.to_data(torch.cat(test[i]).double(), axis=1)
        np.testing.assert_allclose(item, stored[n, t : t + 3], atol=1e-3)


@pytest.mark.parametrize("frame_fit", ["crop", "resize"])
def test_missing_values_become_nan(own, tmp_path, frame_fit):
    values = np.random.default_rng(0).integers(0, 50, (40, 16, 20)).astype(np.int16)
    values[:, 6:9, :] = -32768
    np.save(tmp_path / "a.npy", values)
    options = dict(dataset="array", train_data_dir=tmp_path / "a.npy", missing_value=[-32768.0], frame_fit=frame_fit)
    item = torch.cat(own("test", **options)[0])
    assert own("train", **options).value_range == ValueRange(0.0, 49.0, (-32768.0,)) and item.shape == (3, 1, 8, 10)
    if frame_fit == "crop":  # the centre: rows 4 to 11
        assert torch.equal(item.isnan().all(-1)[0, 0], torch.tensor([r in (2, 3, 4) for r in range(8)]))
    assert item.isnan().any() and not item.isnan().all()
    assert item[~item.isnan()].min() >= 0 and item[~item.isnan()].max() <= 1


def test_nan_and_other_missing_values_in_floats(own, tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 8, 10)).astype(np.float32)
    values[:, 0, 0], values[:, 1, 1] = np.nan, -9999.9
    np.save(tmp_path / "a.npy", values)
    item = torch.cat(own("train", dataset="array", train_data_dir=tmp_path / "a.npy", missing_value=[-9999.9])[0])
    expected = torch.zeros(8, 10, dtype=bool)
    expected[0, 0] = expected[1, 1] = True
    assert (item.isnan() == expected).all()


def test_every_place_of_a_crop_is_equally_likely():
    places = crop_start(3, np.arange(0, 1, 0.001))
    assert np.bincount(places).tolist() == [250] * 4 and crop_start(0, 0.999) == 0
    assert [int(crop_start(room)) for room in (0, 1, 2, 3, 4)] == [0, 1, 1, 2, 2]  # the centre


def test_crops_depend_on_seed_epoch_and_index_only(own, tmp_path):
    """Random places in training, all of them inside and many; the centre in evaluation; the same with any workers."""
    place = np.arange(30 * 40, dtype=np.int32).reshape(30, 40)
    np.save(tmp_path / "a.npy", np.broadcast_to(place, (20, 30, 40)))
    options = dict(
        dataset="array", train_data_dir=tmp_path / "a.npy", frame_fit="crop", data_range=[0.0, 1.0], valid_fraction=0.2,
        length=64,
    )  # fmt: skip
    data = own("train", seed=7, **options)

    def corners(data, epoch):
        found = [torch.cat(data[epoch, i]) for i in range(len(data))]
        for frames in found:
            y, x = divmod(int(frames[0, 0, 0, 0]), 40)
            assert torch.equal(frames, torch.from_numpy(place[y : y + 8, x : x + 10]).float().expand(3, 1, 8, 10))
        return [divmod(int(frames[0, 0, 0, 0]), 40) for frames in found]

    assert len(data) == 64 and len(set(corners(data, 0))) > 50
    assert corners(data, 1) != corners(data, 0) == corners(own("train", seed=7, **options), 0)
    assert corners(own("train", seed=8, **options), 0) != corners(data, 0)
    assert min(y for y, _ in corners(data, 3)) < 4 and max(x for _, x in corners(data, 3)) > 25
    assert set(corners(own("valid", **options), 5)) == {(11, 15)}
    plain, worked = (make_loader(data, 8, workers, shuffle=True) for workers in (0, 2))
    plain.sampler.epoch = worked.sampler.epoch = 2
    assert_same(batches(plain), batches(worked))


def test_an_epoch_is_drawn_without_replacement(own, tmp_path):
    write_video(tmp_path / "data" / "a.mkv", numbered(0, 50))
    whole, part = own("train", dataset="video", length=100), own("train", dataset="video", length=5)
    firsts = [[ids(whole[epoch, i])[0] for i in range(len(whole))] for epoch in (0, 1)]
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(38)) and firsts[0] != firsts[1]
    drawn = {ids(part[epoch, i])[0] for epoch in range(40) for i in range(5)}
    assert len(part) == 5 and len({ids(part[0, i])[0] for i in range(5)}) == 5 and len(drawn) > 30
    assert [ids(own("valid", dataset="video", length=2)[i])[0] for i in range(2)] == [40, 42]


def test_nothing_is_loaded_whole(own, tmp_path):
    """An array of 20 GB on disk (of holes) makes a data set and its items at once, and travels to a worker as names."""
    big = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (20_000, 1000, 1000))
    big[12_345] = 9
    del big
    data = own("train", dataset="array", train_data_dir=tmp_path / "a.npy", data_range=[0.0, 9.0])
    copy = pickle.loads(pickle.dumps(data.clips))
    assert copy[0].frames()[12_345, 0, 0, 0] == 9 and len(pickle.dumps(data.clips)) < 1000
    assert data[0][0].shape == (2, 1, 8, 10)


@pytest.mark.parametrize(
    "options, write, says",
    [
        (dict(dataset="array"), {"a.npy": np.full((40, 8, 10), -1, np.int16)}, r"a\.npy: every value is missing"),
        (
            dict(dataset="array", data_range=[0.0, 1.0]),
            {"a.npy": np.full((40, 8, 10), np.nan)},
            "every value is missing",
        ),
        (dict(dataset="array"), {"a.npy": np.full((40, 8, 10), 3)}, "part is 3; give data_range"),
        (dict(dataset="array"), {"a.npy": np.full((40, 8, 10), np.inf)}, "infinite"),
        (dict(dataset="array"), {"a.npy": np.zeros((40, 8, 10), complex)}, "complex"),
        (dict(dataset="array"), {"a.npy": np.zeros((40, 10))}, r"\(40, 10\)"),
        (
            dict(dataset="array", input_channels=3),
            {"a.npy": np.zeros((40, 8, 10, 2))},
            "2 channels, but input_channels",
        ),
        (dict(dataset="array"), {"a.npy": np.zeros((40, 8, 10)), "b.npy": np.zeros((40, 8, 9))}, r"b\.npy: frames of"),
        (dict(dataset="array"), {"a.npy": np.eye(10)[:2].reshape(2, 2, 5)}, "2 frames in 1 clips leave no training"),
        (dict(dataset="array", array_key="snow"), {"a.npz": np.zeros((40, 8, 10))}, "no array 'snow'"),
        (
            dict(dataset="array", frame_fit="crop", input_size=(9, 9)),
            {"a.npy": np.eye(8)[None]},
            "no training sequence",
        ),
        (
            dict(dataset="array", frame_fit="crop", input_size=[9]),
            {"a.npy": np.ones((40, 8, 10)).cumsum(0)},
            "8x10 cannot be cropped",
        ),
        (dict(dataset="array"), {}, r"data: no \.npy or \.npz"),
        (dict(dataset="video"), {}, "data: nothing in it"),
        (dict(dataset="frames"), {}, "data: nothing in it"),
        (dict(dataset="kth"), {}, "data: no KTH clip"),
        (dict(dataset="human36m", input_channels=3), {}, "data: no frames of subjects"),
        (dict(dataset="taxibj", input_channels=2), {}, r"dataset\.npz: no such file"),
        (dict(dataset="video", train_data_dir="nowhere"), {}, "nowhere: no such file or folder"),
        (dict(dataset="kth", train_data_dir="nowhere"), {}, r"nowhere: .* data/README\.md, section KTH"),
        (dict(dataset="array", train_data_dir="nowhere.npy"), {}, "nowhere.npy: no such file"),
        (dict(dataset="video", input_channels=2), {}, "read as 1 .grey. or 3"),
        (dict(dataset="kth", input_channels=3), {}, "kth has 1"),
        (dict(dataset="kth", data_range=[0.0, 1.0]), {}, "data_range .* kth has one of its own"),
        (dict(dataset="moving_mnist", frame_fit="crop"), {}, "frame_fit .* not for moving_mnist"),
        (dict(dataset="moving_mnist", valid_data_dir="nowhere.npy"), {}, "valid_data_dir .* not for moving_mnist"),
        (dict(dataset="video", num_objects=3), {}, "num_objects is for moving_mnist, not for video"),
        (dict(dataset="array", digit_size=14), {}, "digit_size is for moving_mnist, not for array"),
        (dict(dataset="kth", train_data_dir=".", step_length=0.2), {}, "step_length is for moving_mnist, not for kth"),
        (dict(dataset="frames", array_key="a"), {}, "array_key is for array, moving_mnist, not for frames"),
        (dict(dataset="moving_mnist", test_fraction=0.2), {}, "test_fraction .* not for moving_mnist"),
        (dict(dataset="kth", split_by="file", train_data_dir="."), {}, "split_by .* not for kth"),
        (dict(dataset="taxibj", input_channels=2, valid_fraction=0.2), {}, "valid_fraction .* not for taxibj"),
    ],
)
def test_what_cannot_be_used_says_so_in_one_line(own, tmp_path, options, write, says):
    for name, values in write.items():
        (np.save if name.endswith("npy") else np.savez)(tmp_path / "data" / name, values)
    missing = {} if options["dataset"] != "array" else dict(missing_value=[-1.0])
    with pytest.raises(UserError, match=says) as caught:
        own("train", **(missing | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "scale, offset, says",
    [
        (1.0, 0.0, None),
        (1.2, -56.0, None),  # a wider range than that of the training
        (1.0, -273.15, "the values -23.15 to 36.85 lie outside the range 250 to 310 of the training"),
        (100.0, 0.0, "the values 25000 to 31000 lie outside the range"),
        (7.0, -1500.0, "the values 250 to 670 lie in part far outside the range"),
        (
            0.001,
            260.0,
            "the values 260.25 to 260.31 span only 0.1 % of the range 250 to 310 of the training: check the",
        ),
    ],
)
def test_a_test_in_other_units_than_the_training_is_named(own, tmp_path, scale, offset, says):
    kelvins = np.linspace(250, 310, 40 * 80).reshape(40, 8, 10)
    np.save(tmp_path / "data" / "a.npy", kelvins * scale + offset)
    data = own("test", value_range=ValueRange(250.0, 310.0), dataset="array", test_data_dir=tmp_path / "data" / "a.npy")
    notes = [note for note in data.notes if "of the training" in note]
    assert len(notes) == (says is not None) and (says is None or re.match(f"test data: {says}", notes[0])), notes


def test_a_range_of_rain_for_the_training_on_temperatures_is_refused(own, tmp_path):
    """configs/grid_netcdf.toml has one."""
    np.save(tmp_path / "data" / "a.npy", np.linspace(250, 310, 40 * 80).reshape(40, 8, 10))
    says = r"a\.npy: the values 250 to 297.996 lie outside data_range 0 32, so .*; give --data_range without numbers"
    with pytest.raises(UserError, match=says):
        own("train", dataset="array", data_range=[0.0, 32.0])
    assert own("train", dataset="array", data_range=[290.0, 320.0]).value_range.low == 290


def test_each_channel_is_held_against_its_own_range(own, tmp_path):
    values = np.stack((np.full((40, 8, 10), 280.0), np.full((40, 8, 10), 300.0)), axis=-1)
    np.save(tmp_path / "data" / "a.npy", values)
    data = own("test", value_range=ValueRange((250.0, 0.0), (310.0, 50.0)), dataset="array", input_channels=2)
    (note,) = [note for note in data.notes if "of the training" in note]
    assert "the values 300 to 300 of channel 1 lie outside" in note


def test_clips_of_several_sizes(own, tmp_path):
    write_video(tmp_path / "data" / "a.avi", numbered(0, 20))
    write_video(tmp_path / "data" / "b.avi", numbered(0, 20, height=9))
    with pytest.raises(UserError, match=r"b\.avi: 9x10 uint8, but a\.avi: 8x10 uint8"):
        own("train", dataset="video")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made stays


# The cache


def test_decoded_once_and_again_when_a_file_changes(own, tmp_path, monkeypatch):
    path = tmp_path / "data" / "a.avi"
    write_video(path, numbered(0, 20))
    first = ids(own("train", dataset="video")[0])
    monkeypatch.setattr(sources, "video_frames", None)
    assert ids(own("train", dataset="video")[0]) == first
    monkeypatch.undo()
    write_video(path, numbered(1, 20))
    os.utime(path, ns=(1, 1))
    assert min(ids(own("train", dataset="video")[0])) >= 50


def test_two_processes_may_make_one_cache(tmp_path):
    """Both are inside write at once: one folder stays, whole, and both get it; a failure leaves nothing."""
    barrier, got = threading.Barrier(2), []

    def write(folder):
        (folder / "a").write_text("half")
        barrier.wait()
        (folder / "a").write_text("whole")

    threads = [
        threading.Thread(target=lambda: got.append(cache.cached_folder(tmp_path, "x", [1], write))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] == got[1] and (got[0] / "a").read_text() == "whole" and list(tmp_path.iterdir()) == [got[0]]

    def fail(folder):
        (folder / "a").write_text("half")
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        cache.cached_folder(tmp_path, "x", [2], fail)
    assert list(tmp_path.iterdir()) == [got[0]]


def test_a_cache_that_cannot_be_written(own, tmp_path):
    write_video(tmp_path / "data" / "a.avi", numbered(0, 20))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be written.*cache_dir"):
        own("train", dataset="video", cache_dir=tmp_path / "file")


def test_npy_header_has_room_to_grow(tmp_path):
    """The header is written before the count of frames is known and again after."""
    frames = numbered(0, 123, 3, 2)
    cache.write_npy(tmp_path / "a.npy", iter(frames))
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames)
    sizes = set()
    for count in (0, 10**15):
        with open(tmp_path / "header", "wb") as f:
            cache.write_header(f, (count, 128, 128, 3), np.dtype(np.uint8))
            sizes.add(f.tell())
    assert len(sizes) == 1


# Table, configurations, programs


def test_table_rows_fit_metrics_and_the_log():
    for spec in DATASETS.values():
        assert {"mse", "ssim", "psnr"} <= set(spec.metrics) <= set(METRICS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configurations_fit_the_table(path):
    config = configuration.resolve(path, {})
    if config.dataset in LITERATURE:
        shape, frames = LITERATURE[config.dataset]
        assert (config.input_channels, *config.frame_size) == shape
        assert (config.num_frames_input, config.num_frames_output) == frames
    assert DATASETS[config.dataset].channels in (None, config.input_channels)


def test_infinite_values_where_the_range_is_given(own, tmp_path):
    np.save(tmp_path / "data" / "a.npy", np.full((40, 8, 10), -np.inf))
    with pytest.raises(UserError, match="infinite values: write them as NaN"):
        own("train", dataset="array", data_range=(0, 1))[0]


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(valid_fraction=0.5, test_fraction=0.5), "together below 1"),
        (dict(data_range=[1.0]), "data_range"),
        (dict(data_range=[1.0, 1.0]), "data_range"),
        (dict(data_range=[0.0, float("inf")]), "data_range"),
        (dict(data_range=["a", "b"]), "not a list of numbers"),
        (dict(missing_value=[float("nan")]), "NaN is missing anyway"),
        (dict(split_by="name"), "choose one of time, file"),
    ],
)
def test_wrong_data_options(options, says):
    with pytest.raises(UserError, match=says):
        configuration.resolve(None, options)


def test_lists_of_numbers_in_files_and_on_the_command_line(tmp_path):
    (tmp_path / "c.toml").write_text("data_range = [0, 2.5]\nmissing_value = []\n")
    config = configuration.resolve(tmp_path / "c.toml", {})
    configuration.save_toml(config, tmp_path / "saved.toml")
    assert config.data_range == [0.0, 2.5] and configuration.resolve(tmp_path / "saved.toml", {}) == config
    parser = command_line.Parser("")
    command_line.add_options(parser)
    given = vars(parser.parse_args("--missing_value -32768 -1 --data_range".split()))
    assert given == {"missing_value": [-32768.0, -1.0], "data_range": []}


def test_training_on_an_array_of_your_own(tmp_path, own):
    np.save(tmp_path / "data" / "rain.npy", np.random.default_rng(0).integers(0, 99, (40, 20, 24)))
    train.main(
        "--model VMRNN-B --embed_dim 16 --depths 1 --patch_size 4 --dataset array --train_data_dir "
        f"{tmp_path / 'data'} --cache_dir {tmp_path / 'cache'} --input_size 8 16 --frame_fit crop --num_frames_input "
        "2 --num_frames_output 2 "
        f"--train_sequences 8 --train_batch_size 4 --epochs 1 --device cpu --res_dir {tmp_path / 'run'}".split()
    )
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_a_validation_without_a_target_is_refused(tmp_path):
    values = np.random.default_rng(0).random((40, 8, 16)).astype(np.float32)
    (tmp_path / "train").mkdir(), (tmp_path / "valid").mkdir()
    np.save(tmp_path / "train" / "a.npy", values)
    values[2::4] = values[3::4] = np.nan
    np.save(tmp_path / "valid" / "a.npy", values[:4])
    with pytest.raises(UserError, match="valid: all validation targets are missing"):
        train.main(
            "--model VMRNN-B --embed_dim 16 --depths 1 --patch_size 4 --dataset array --train_data_dir "
            f"{tmp_path / 'train'} --valid_data_dir {tmp_path / 'valid'} --cache_dir {tmp_path / 'cache'} "
            "--input_size 8 16 --num_frames_input 2 --num_frames_output 2 --train_sequences 8 --train_batch_size 4 "
            "--epochs 1 "
            f"--epoch_valid 1 --device cpu --res_dir {tmp_path / 'run'}".split()
        )


def test_by_file_gives_each_part_at_least_one():
    assert [splits.cut_by_file(list("abcde"), split, 0.1, 0.1) for split in ("train", "valid", "test")] == [
        ["a", "b", "c"], ["d"], ["e"],
    ]  # fmt: skip


@pytest.mark.parametrize("low, high", [(0.0, 255.0), (-3.0, 128.0), (0.0, 255.1), (-0.7, 30.3)])
def test_a_value_at_the_threshold_is_an_event(low, high):
    """Whatever the rounding to float32 on the [0, 1] scale does."""
    for threshold in range(int(low) + 1, int(high), 7):
        csi = {row.name: row for row in metric_rows((), [threshold], ValueRange(low, high))}[f"csi_{threshold}"]
        for value, expected in ((threshold, 1.0), (threshold - 1, np.nan)):
            for dtype in (np.int16, np.float32, np.float64):
                frame = torch.from_numpy(ValueRange(low, high).to_unit(np.full((1, 1, 1, 4, 4), value, dtype)))
                meter = Metrics([csi])
                meter.update(frame, frame)
                np.testing.assert_equal(meter.compute()["mean"][f"csi_{threshold}"], expected)
    assert f"a value of {threshold} or more in the units" in str(csi)
    tiny = {row.name: row for row in metric_rows((), [0.001], ValueRange(0.0, 128.0))}["csi_0.001"]
    assert tiny.name == "csi_0.001" and "a value of 0.001 or more in" in str(tiny)


def test_a_program_ends_while_its_loader_has_workers(run_forked):
    """The workers ignore SIGTERM, with which Python would end them."""
    code = """
import numpy as np
from dataset import make_loader
from vmrnn.data.moving_mnist import MovingMNIST
loader = make_loader(MovingMNIST(np.full((3, 8, 8), 9, np.uint8), 4, canvas=(16, 16), digit_size=8), 2, num_workers=1)
print(len(list(loader)))
"""
    done = run_forked("-c", code)
    assert (done.stdout, done.stderr) == ("2\n", "")
