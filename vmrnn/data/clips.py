"""Clips: runs of consecutive frames on disk. Videos and images become clips by being decoded into the cache.

A clip's file is opened memory-mapped for each item. Nothing is loaded whole, and a data set travels to worker
processes as a list of names and numbers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from vmrnn.data.arrays import open_npy
from vmrnn.data.cache import cached_folder, stamp, write_npy
from vmrnn.data.images import image_frames
from vmrnn.data.prepare import resized
from vmrnn.data.videos import video_frames
from vmrnn.errors import UserError


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


@dataclass(frozen=True)
class Source:
    """A clip that is not decoded yet.

    name    for messages
    files   one video, or images in order; an image may have several pages if it is the only one
    video   whether it is a video
    """

    name: str
    files: tuple
    video: bool

    def frames(self, channels):
        """Yields frames (H, W, C)."""
        if self.video:
            return video_frames(self.files[0], channels)
        return image_frames(self.files, channels)


def decode(sources, cache_dir, label, channels, size=None, antialias=True):
    """Clips of the sources, decoded into the cache: frames.npy (T, H, W, C) and index.json.

    sources     list of Source
    label       start of the cache folder's name
    channels    1 (grey) or 3 (RGB)
    size        (H, W) to which frames are resized; None: frames keep their size, which must be the same in all
    antialias   as in prepare.resize

    UserError: a damaged source, or one whose frames have another size or type than those before.
    """
    versions = [[source.name, *map(stamp, source.files)] for source in sources]

    def write(folder):
        clips = []

        def frames(bar):
            first = None
            for number, source in enumerate(sources, 1):
                bar.set_description(f"decode {number}/{len(sources)} {Path(source.name).name}", refresh=False)
                count = 0
                for frame in source.frames(channels):
                    kind = f"{frame.shape[0]}x{frame.shape[1]} {frame.dtype}"
                    first = first or kind
                    if kind != first:
                        raise UserError(f"{source.name}: {kind}, but {sources[0].name}: {first}; make them alike")
                    yield resized(frame, size, antialias)
                    count += 1
                    bar.update()
                clips.append([source.name, count])

        with tqdm(unit="frame", unit_scale=True, leave=False, dynamic_ncols=True, disable=None) as bar:
            write_npy(folder / "frames.npy", frames(bar))
        (folder / "index.json").write_text(json.dumps({"clips": clips}, indent=1), encoding="utf-8")

    folder = cached_folder(cache_dir, label, [versions, channels, size and list(size), antialias], write)
    clips, start = [], 0
    for name, count in json.loads((folder / "index.json").read_text(encoding="utf-8"))["clips"]:
        clips.append(Clip(name, str(folder / "frames.npy"), start, start + count))
        start += count
    return clips
