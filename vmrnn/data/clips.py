"""Clips: runs of consecutive frames on disk. Videos and images become clips by being decoded into the cache.

A clip's file is opened memory-mapped for each item. Nothing is loaded whole, and a data set travels to worker
processes as a list of names and numbers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import open_npy
from vmrnn.data.cache import cached_folder, stamp, write_npy
from vmrnn.data.prepare import resized
from vmrnn.data.times import increases, usual_step
from vmrnn.data.videos import bits_of
from vmrnn.errors import UserError
from vmrnn.progress import Bar


@dataclass(frozen=True)
class Clip:
    """Frames `start` to `stop` of an array on disk.

    name    for messages: the file or folder that the user named
    path    .npy file
    index   the place along the axis N; None: the array has no such axis
    step    1: all frames; k: every k-th
    axes    what the array's axes are, as letters in order: N sequences, T frames, H rows, W columns, C channels
            "": THW or THWC, or with an index NTHW or NTHWC
    """

    name: str
    path: str
    start: int
    stop: int
    index: int | None = None
    step: int = 1
    axes: str = ""

    def __len__(self):
        return len(range(self.start, self.stop, self.step))

    def cut(self, start, stop):
        """Frames start to stop of this clip, as a clip."""
        first, last = self.start + start * self.step, self.start + stop * self.step
        return replace(self, start=first, stop=min(last, self.stop))

    def every(self, step):
        """Every step-th frame of this clip, as a clip."""
        return replace(self, step=self.step * step)

    def frames(self):
        """A view (T, H, W, C) of the memory-mapped file. Reading starts when values are used."""
        array = open_npy(self.path)
        axes = self.axes or ("THWC" if self.index is None else "NTHWC")[: array.ndim]
        # Basic indexing keeps the memory map; [None] makes the axis of a single channel.
        array = array[tuple(self.index if axis == "N" else slice(None) for axis in axes)]
        axes = axes.replace("N", "")
        array = array.transpose([axes.index(axis) for axis in "THWC" if axis in axes])
        array = array[self.start : self.stop : self.step]
        return array if "C" in axes else array[..., None]


def decode(sources, cache_dir, label, channels, size=None, antialias=True, time_step=""):
    """Clips of the sources, decoded into the cache: frames.npy (T, H, W, C) and index.json, which `times_of` reads.

    sources     list of Source
    label       start of the cache folder's name
    channels    1 (grey) or 3 (RGB)
    size        (H, W) to which frames are resized; None: frames keep their size, which must be the same in all
    antialias   as in prepare.resize
    time_step   as in Source.timed_frames

    UserError: a damaged source, one whose frames have another size, type or depth than those before, or one whose
    times do not fit time_step.
    """
    # The names of images tell their times: an image that gets another name is at another time
    versions = [[source.name, source.named_times(), *map(stamp, source.files)] for source in sources]

    def write(folder):
        clips = []

        def frames(bar):
            first = None
            for number, source in enumerate(sources, 1):
                bar.describe(f"decode {number}/{len(sources)} {Path(source.name).name}")
                times, depth = [], ""
                for frame, time in source.timed_frames(channels, time_step):
                    # Some deep videos keep their numbers and others are converted, so that one grey would be two values
                    if source.video and frame.dtype == np.uint16 and not times:
                        depth = f" of {bits_of(source.files[0], frame.shape[2])} bits"
                    kind = f"{frame.shape[0]}x{frame.shape[1]} {frame.dtype}{depth}"
                    first = first or kind
                    if kind != first:
                        raise UserError(f"{source.name}: {kind}, but {sources[0].name}: {first}; make them alike")
                    yield resized(frame, size, antialias)
                    times.append(time)
                    bar.update()
                known = None not in times and increases(times)
                clips.append([source.name, len(times), times if known else None, source.dated()])

        with Bar("decode") as bar:
            write_npy(folder / "frames.npy", frames(bar))
        (folder / "index.json").write_text(json.dumps({"clips": clips}, indent=1), encoding="utf-8")

    folder = cached_folder(cache_dir, label, [versions, channels, size and list(size), antialias, time_step], write)
    clips, start = [], 0
    for name, count, _, _ in json.loads((folder / "index.json").read_text(encoding="utf-8"))["clips"]:
        clips.append(Clip(name, str(folder / "frames.npy"), start, start + count))
        start += count
    return clips


def times_of(clips):
    """The times of the frames of each clip that `decode` returned, a list of float64 (T,) or None."""
    index = json.loads((Path(clips[0].path).parent / "index.json").read_text(encoding="utf-8"))
    return [None if times is None else np.array(times) for _, _, times, _ in index["clips"]]


def seconds_apart(clips):
    """Seconds from one frame to the next of the first decoded clip that has times in seconds; 0: none has."""
    index = json.loads((Path(clips[0].path).parent / "index.json").read_text(encoding="utf-8"))
    known = (times for _, _, times, dated in index["clips"] if dated and times and len(times) > 1)
    return next((usual_step(times) * clips[0].step for times in known), 0.0)
