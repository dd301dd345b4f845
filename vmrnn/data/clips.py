"""Clips of frames on disk and the data set of windows cut from them.

A clip is a run of consecutive frames of one .npy file, which is opened memory-mapped for each item: nothing is loaded
whole, and a data set travels to worker processes as a list of names and numbers. What is no .npy (videos, images,
members of a .npz) is unpacked once into a cache.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from vmrnn.data.draws import split_key, uniform_draws
from vmrnn.data.media import VIDEOS, broken, image_frames, npz_member, open_npy, resize, video_frames
from vmrnn.errors import UserError

CACHE_FORMAT = 1  # part of every key: a new one when what is written, or how, changes


@dataclass(frozen=True)
class Clip:
    """Frames start to stop of the array in `path`: (T, H, W[, C]), or, with `sequence`, (N, T, H, W[, C])."""

    name: str  # for messages: the file or folder that the user named
    path: str
    start: int
    stop: int
    sequence: int | None = None

    def __len__(self):
        return self.stop - self.start

    def part(self, start, stop):
        """Frames start to stop of this clip, as a clip."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def frames(self):
        """A view (T, H, W, C) of the memory-mapped file; nothing is read yet."""
        array = open_npy(self.path)
        array = (array if self.sequence is None else array[self.sequence])[self.start : self.stop]
        return array[..., None] if array.ndim == 3 else array


@dataclass(frozen=True)
class Source:
    """A clip that is still to be decoded: its name, and its file, a video, or its files, images in order."""

    name: str
    files: tuple

    def frames(self, channels):
        if self.files[0].suffix.lower() in VIDEOS:
            return video_frames(self.files[0], channels)
        return image_frames(self.files, channels)


# Cache


def cached_folder(cache_dir, label, facts, write):
    """The folder under cache_dir that belongs to `facts` (what json can hold); write(folder) fills it, once.

    It is made under another name and renamed when whole: a killed process leaves nothing that looks complete, and of
    two that make the same one the second takes the first one's. UserError where cache_dir cannot be written.
    """
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, facts]).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{label}-{key}"
    if folder.is_dir():
        return folder
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".making-") as scratch:
            made = Path(scratch) / folder.name
            made.mkdir()
            write(made)
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{cache_dir}: cannot be written ({reason}); make room or name another cache_dir") from error
    return folder


def stamp(path):
    """What tells one version of a file from another, as json can hold it."""
    status = os.stat(path)
    return [Path(path).name, status.st_size, status.st_mtime_ns]


def decode(sources, cache_dir, label, channels, size=None, antialias=True):
    """Clips of the sources, decoded into the cache by the first who asks: frames.npy (T, H, W, C) and index.json.

    channels: 1 (grey) or 3. size: (H, W) to which frames are resized; None: they stay as they are, and all must be
    alike. antialias: as in media.resize. UserError: a damaged source, or one that is unlike the others.
    """
    facts = [[s.name, *map(stamp, s.files)] for s in sources]

    def write(folder):
        clips = []

        def frames(bar):
            first = None
            for number, source in enumerate(sources, 1):
                bar.set_description(f"decode {number}/{len(sources)} {Path(source.name).name}", refresh=False)
                count = 0
                for frame in source.frames(channels):
                    facts = f"{frame.shape[0]}x{frame.shape[1]} {frame.dtype}"
                    first = first or facts
                    if facts != first:
                        raise UserError(f"{source.name}: {facts}, but {sources[0].name}: {first}; make them alike")
                    yield resized(frame, size, antialias)
                    count += 1
                    bar.update()
                clips.append([source.name, count])

        with tqdm(unit="frame", unit_scale=True, leave=False, dynamic_ncols=True, disable=None) as bar:
            write_npy(folder / "frames.npy", frames(bar))
        (folder / "index.json").write_text(json.dumps({"clips": clips}, indent=1), encoding="utf-8")

    folder = cached_folder(cache_dir, label, [facts, channels, size and list(size), antialias], write)
    clips, start = [], 0
    for name, count in json.loads((folder / "index.json").read_text(encoding="utf-8"))["clips"]:
        clips.append(Clip(name, str(folder / "frames.npy"), start, start + count))
        start += count
    return clips


def resized(frame, size, antialias):
    """A frame (H, W, C) of whole numbers at another size, rounded; as it is where size is None or its own."""
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    values = resize(frame.astype(np.float32).transpose(2, 0, 1)[None], size, antialias)[0].numpy().transpose(1, 2, 0)
    return values if frame.dtype.kind == "f" else np.rint(values).astype(frame.dtype)


def write_npy(path, frames):
    """Writes equal frames (H, W, C) as one .npy (T, H, W, C), holding one at a time."""
    with open(path, "wb") as f:
        count = 0
        for frame in frames:
            if count == 0:
                write_header(f, (0, *frame.shape), frame.dtype)
            f.write(np.ascontiguousarray(frame).data)
            count += 1
        f.seek(0)
        write_header(f, (count, *frame.shape), frame.dtype)  # as long as the first: numpy pads for a longer axis 0
        f.flush()
        os.fsync(f.fileno())


def write_header(f, shape, dtype):
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, facts)


def unpacked(path, key, cache_dir):
    """The path of a .npy with one array of a .npz file (media.npz_member), unpacked into the cache once."""
    member, _, _ = npz_member(path, key)

    def write(folder):
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as packed:
                with open(folder / "array.npy", "wb") as f:
                    shutil.copyfileobj(packed, f, 2**22)
                    f.flush()
                    os.fsync(f.fileno())
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise broken(path, error) from error

    return str(cached_folder(cache_dir, Path(path).stem, [stamp(path), member], write) / "array.npy")


# Windows


def cut_windows(clips, total, strides=None):
    """Windows of `total` frames as (clip, first frame), int64 (n, 2); none crosses a clip.

    strides: frames from one window to the next, for each clip; None: 1. The last frame of a clip is in a window.
    """
    found = [np.empty((0, 2), np.int64)]
    for i, clip in enumerate(clips):
        starts = np.arange(len(clip) - total, -1, -(strides[i] if strides else 1))[::-1]
        found.append(np.stack((np.full_like(starts, i), starts), axis=1))
    return np.concatenate(found)


def thin(windows, length):
    """At most `length` windows, evenly spaced over all."""
    if length >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, length).round().astype(np.int64)]


class ClipDataset(Dataset):
    """Windows of clips: item (inputs, targets), float32 (T, C, H, W), a missing value NaN.

    clips: list of Clip, frames (H, W, C) alike. windows: int64 (n, 2), clip and first frame. size: (H, W) of the items.
    frame_fit: "resize", or "crop": a window of the frame, at random (random=True) or the centre. value_range: the
    ValueRange that scales the stored values.
    random: an epoch is `length` of the windows drawn without replacement, new in each epoch (at most all of them, or,
    where they are cropped, all again and again); otherwise item i is window i. A key is an index or (epoch, index); an item depends on seed and key only.
    UserError: frames that are unlike, too small to crop, of a type that is no number; no windows.
    """

    def __init__(self, clips, windows, num_frames_input, num_frames_output, size, value_range, frame_fit="resize",
                 random=False, length=None, seed=0):  # fmt: skip
        self.clips = clips
        self.windows = windows
        self.num_frames_input = num_frames_input
        self.num_frames_output = num_frames_output
        self.size = tuple(size)
        self.value_range = value_range
        self.frame_fit = frame_fit
        self.random = random
        self.length = len(windows)
        if random and length:
            self.length = length if frame_fit == "crop" else min(length, len(windows))
        self.seed = seed
        self.order = None  # (epoch, its windows in order)
        if frame_fit == "crop":
            height, width = clips[0].frames().shape[1:3]
            if height < size[0] or width < size[1]:
                raise UserError(
                    f"{clips[0].name}: frames of {height}x{width} cannot be cropped to {size[0]}x{size[1]}; "
                    "choose a smaller input_size or frame_fit resize"
                )

    def __len__(self):
        return self.length

    @property
    def data_range(self):
        return [self.value_range.low, self.value_range.high]

    def __str__(self):
        low, high = self.data_range
        return (
            f"{self.length} sequences of {self.num_frames_input}+{self.num_frames_output} frames, of {len(self.windows)} "
            f"in {len(self.clips)} clips ({self.clips[0].name}, ...), {self.size[0]}x{self.size[1]}, "
            f"values {low:g} to {high:g} as 0 to 1"
        )

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a batch of keys, a list; the loader asks for whole batches by this name."""
        return [self.item(*split_key(key)) for key in keys]

    def item(self, epoch, index):
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a data set of {self.length}")
        total = self.num_frames_input + self.num_frames_output
        clip, first = self.windows[self.epoch_order(epoch)[index] if self.random else index]
        frames = self.clips[clip].frames()[first : first + total]
        if self.frame_fit == "crop":
            room = np.array(frames.shape[1:3]) - self.size
            draws = uniform_draws(self.seed, [epoch], [index], 2)[0] if self.random else np.full(2, 0.5)
            y, x = np.minimum((draws * (room + 1)).astype(np.int64), room)
            frames = frames[:, y : y + self.size[0], x : x + self.size[1]]
        values = self.value_range.to_unit(frames).transpose(0, 3, 1, 2)
        values = resize(torch.from_numpy(np.ascontiguousarray(values)), self.size)
        return values[: self.num_frames_input], values[self.num_frames_input :]

    def epoch_order(self, epoch):
        if self.order is None or self.order[0] != epoch:
            generator = np.random.default_rng((self.seed % 2**64, epoch, 1))
            rounds = math.ceil(self.length / len(self.windows))
            orders = [generator.permutation(len(self.windows)) for _ in range(rounds)]
            self.order = epoch, np.concatenate(orders)[: self.length]
        return self.order[1]


def valid_values(clips, missing):
    """Yields (frames looked at, their values that are not missing) over all clips, a few frames at a time."""
    for clip in clips:
        frames = clip.frames()
        step = max(1, 2**24 // frames[:1].size)
        for i in range(0, len(frames), step):
            values = np.array(frames[i : i + step])
            valid = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
            for value in missing:
                valid &= values != value
            yield len(values), values[valid]


def check_not_all_missing(clips, missing):
    """UserError where `clips` hold no value; stops at the first that they do."""
    if not any(len(values) for _, values in valid_values(clips, missing)):
        raise UserError(f"{clips[0].name}: every value is missing; name another file or another missing_value")


def scan_range(clips, missing, cache_dir):
    """(lowest, highest) of the values of `clips` that are not missing, looked for once and kept in the cache.

    UserError: all values are missing, or all the same, or one is infinite.
    """
    stamps = {clip.path: stamp(clip.path) for clip in clips}
    facts = [list(stamps.values()), [[c.path, c.sequence, c.start, c.stop] for c in clips], list(missing)]

    def write(folder):
        low, high = None, None
        with tqdm(total=sum(map(len, clips)), desc="range of values", unit="frame", leave=False, disable=None) as bar:
            for count, values in valid_values(clips, missing):
                if len(values):
                    low = float(values.min() if low is None else min(low, values.min()))
                    high = float(values.max() if high is None else max(high, values.max()))
                bar.update(count)
        (folder / "range.json").write_text(json.dumps([low, high]), encoding="utf-8")

    folder = cached_folder(cache_dir, "range", facts, write)
    low, high = json.loads((folder / "range.json").read_text(encoding="utf-8"))
    if low is None:
        raise UserError(f"{clips[0].name}: every value is missing; name another file or another missing_value")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{clips[0].name}: holds infinite values; write them as NaN")
    if low == high:
        raise UserError(f"{clips[0].name}: every value of the training part is {low:g}; give data_range")
    return low, high
