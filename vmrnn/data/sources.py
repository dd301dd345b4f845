"""Sources: the videos and the folders of images that a path names, before they are decoded."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from vmrnn.data.images import IMAGES, image_frames, page_count
from vmrnn.data.media import NUMBER, files_in
from vmrnn.data.times import (
    at_regular_step,
    check_step,
    dates_from_names,
    names_without_times,
    parse_step,
    series_of_names,
    times_from_names,
)
from vmrnn.data.videos import VIDEOS, video_frames
from vmrnn.errors import UserError


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

    def timed_frames(self, channels, time_step=""):
        """Yields (frame (H, W, C), its time or None): seconds of a video, the numbers or dates in the names of images.

        channels    1 (grey), 3 (RGB) or None (as they are stored)
        time_step   such as 0.2s: only the frames nearest to this regular step, with the times that they then stand for;
                    "": all

        UserError, with a time_step: a frame has no time, the times do not increase, the step is too short, or it has a
        unit and the names of the images only count them.
        """
        if not time_step:
            yield from self.all_frames(channels)
            return
        step, times = parse_step(time_step, self.dated()), []

        def checked():
            for frame, time in self.all_frames(channels):
                if time is None or (times and time <= times[-1]):
                    raise UserError(
                        f"{self.name}: its frames have no times that increase, which time_step needs; leave it out"
                    )
                times.append(time)
                yield frame, time

        yield from at_regular_step(checked(), step)
        check_step(step, times, self.name)

    def all_frames(self, channels):
        """Yields what `timed_frames` yields without a time step."""
        if self.video:
            times = []
            for frame in video_frames(self.files[0], channels, times):
                yield frame, times[-1]
            return
        times = self.named_times()
        for i, frame in enumerate(image_frames(self.files, channels)):
            yield frame, None if times is None else times[i]

    def series(self):
        """The series of a folder of images, a list of Source: one, or several whose names count on for themselves.

        UserError: several series, such as two cameras, whose images lie between one another: 000_left.png,
        000_right.png.
        """
        runs = [(0, 1)] if len(self.files) == 1 else series_of_names(self.files)
        if len(runs) == 1:
            seen = {}
            for file in self.files:
                numbers = tuple(NUMBER.findall(file.stem))  # as texts: 1.1 and 1.10 are two
                if numbers and numbers in seen:
                    raise UserError(f"{self.name}: {seen[numbers].name} and {file.name} have the same number, so the "
                                    "images are no one series; put each series into a folder of its own")  # fmt: skip
                seen[numbers] = file
            return [self]
        return [replace(self, name=f"{self.name}/{self.files[start].stem}", files=self.files[start:stop])
                for start, stop in runs]  # fmt: skip

    def dated(self):
        """Whether the times of the frames are seconds, and no mere numbers."""
        return self.video or dates_from_names(self.files) is not None

    def no_times(self):
        """The line that says why the frames have no times and what that means."""
        odd = [] if self.video else names_without_times(self.files)
        why = (
            f"{len(odd)} of {len(self.files)} names hold none, such as {odd[0].name}" if odd else "the video holds none"
        )
        return f"{self.name}: no times: {why}; gaps between the frames are not seen"

    def named_times(self):
        """The times of the images by their names, a list of floats; None: a video, or names without times."""
        times = None if self.video else times_from_names(self.files)
        return None if times is None else times.tolist()


def series_note(folder, series):
    """The start of a line that says that the images of a folder, a Source, are several series."""
    firsts = ", ".join(part.files[0].name for part in series[:4]) + (", ..." if len(series) > 4 else "")
    return f"{folder.name}: the names count {len(series)} series, which begin at {firsts}"


def video_sources(path, notes=None):
    """A video, or the videos in a folder, in natural order: list of Source.

    notes   as in media.files_in
    """
    path = checked_path(path)
    if path.is_file():
        if path.suffix.lower() not in VIDEOS:
            raise UserError(f"{path}: its name does not end as one of {' '.join(VIDEOS)}; name another file")
        return [Source(path.name, (path,), video=True)]
    return [Source(file.relative_to(path).as_posix(), (file,), video=True) for file in files_in(path, VIDEOS, notes)]


def frame_sources(path, by_prefix=False, notes=None):
    """The folders of images at or under `path`, or an image of several pages: list of Source.

    by_prefix   one Source per folder and per beginning of a file's name, up to the last number in it
    notes       as in media.files_in

    A folder of images of one page each is one Source. If the first image of a folder has several pages, each image of
    it is a Source.
    """
    path = checked_path(path)
    if path.is_file():
        if path.suffix.lower() not in IMAGES:
            raise UserError(f"{path}: a file; name a folder of folders of images, or an image of several pages")
        return [Source(path.name, (path,), video=False)]
    groups = {}
    for file in files_in(path, IMAGES, notes):
        name = file.parent.relative_to(path).as_posix()
        if by_prefix:
            name = f"{name}/{re.sub(r'[_.-]?[0-9]+[^0-9]*$', '', file.stem)}".removeprefix("./")
        groups.setdefault(name, []).append(file)
    sources = []
    for name, files in groups.items():
        if not by_prefix and page_count(files[0]) > 1:
            sources += [Source(file.relative_to(path).as_posix(), (file,), video=False) for file in files]
        else:
            sources.append(Source(name if name != "." else path.name, tuple(files), video=False))
    return sources


def checked_path(path):
    """`path` as a Path. UserError: it does not exist."""
    if not Path(path).exists():
        raise UserError(
            f"{path}: no such file or folder; name the data with --train_data_dir (test.py: --test_data_dir)"
        )
    return Path(path)
