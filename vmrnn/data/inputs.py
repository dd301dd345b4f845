"""The frames that predict.py continues, read one at a time from any file that the data sets read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vmrnn.data.grid_files import GRIDS, is_zarr
from vmrnn.data.grids import open_grid
from vmrnn.data.media import ARRAYS, VIDEOS, image_frames, images_in, npz_member, npz_rows, open_npy, video_frames
from vmrnn.errors import UserError


@dataclass
class Sequence:
    """Frames that follow one another.

    read     read() yields all frames in order, (H, W, C)
    count    number of frames; None: only reading tells
    times    float64 (count,), see vmrnn.data.times; None: the frames have no times
    """

    read: Callable
    count: int | None = None
    times: np.ndarray | None = None

    def frames(self, step=1, last=None):
        """Yields every `step`-th frame, counted back from the last one; of those the `last` last ones (None: all)."""
        if (step == 1 and last is None) or self.count == 0:
            yield from self.read()
            return
        if self.count is None:
            self.count = sum(1 for _ in self.read())
        taken = self.taken(step, last)
        yield from (frame for i, frame in enumerate(self.read()) if i in taken)

    def taken(self, step=1, last=None):
        """The numbers of the frames that `frames` yields, a range; the count must be known."""
        first = (self.count - 1) % step
        if last is not None:
            first = max(first, self.count - 1 - step * (last - 1))
        return range(first, self.count, step)


@dataclass
class Input:
    """What a file holds.

    sequences   list of Sequence, each of which gets a forecast of its own
    many        whether the file has an axis of sequences, and so has the forecast
    info        GridInfo of a gridded field; None for other files
    notes       lines that say how the file was read
    """

    sequences: list
    many: bool = False
    info: object = None
    notes: list = field(default_factory=list)


def open_input(path, config):
    """The frames of a file or folder, as an Input.

    path     a video, a folder of images, .npy, .npz, or a gridded field
    config   Config of the network; its options on how files are read count

    UserError: a missing, damaged or foreign file.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if config.dataset == "grid" or suffix in GRIDS or is_zarr(file):
        return grid_input(path, config)
    if file.is_dir():
        images = images_in(file)
        return Input([Sequence(lambda: image_frames(images, picture_channels(config)), len(images))])
    if not file.exists():
        raise UserError(
            f"{path}: no such file or folder; name a video, a folder of images, an array or a gridded field"
        )
    if suffix in VIDEOS:
        return Input([Sequence(lambda: video_frames(file, picture_channels(config)))])
    if suffix in ARRAYS:
        return array_input(file, config)
    raise UserError(
        f"{path}: its name does not end as one of {' '.join((*VIDEOS, *ARRAYS, *GRIDS))}; name such a file or a folder of "
        "images"
    )


def picture_channels(config):
    """The channels that pictures are decoded to, as in training; None: as they are stored."""
    return config.input_channels if config.input_channels in (1, 3) else None


def grid_input(path, config):
    """A gridded field. Its sequences each get a forecast. Of runs between gaps in time only the last one is continued."""
    grid = open_grid(path, config.variables, config.array_axes, config.time_from, config.time_step)
    if len(grid.info.names) != config.input_channels:
        raise UserError(
            f"{path}: {', '.join(grid.info.names)} make {len(grid.info.names)} channels, but the network takes "
            f"{config.input_channels}; name others with --variables"
        )
    many, runs, notes = bool(grid.breaks), grid.runs(), list(grid.notes)
    if many:
        # The runs of a sequence end where the next one begins; its last run is the one to continue.
        ends = [*grid.breaks, grid.shape[0]]
        runs = [run for run in runs if run[1] in ends]
    elif len(runs) > 1:
        notes.append(
            f"{len(runs) - 1} gaps in time: only the {runs[-1][1] - runs[-1][0]} frames after the last are used"
        )
        runs = runs[-1:]
    times = grid.info.times
    sequences = [
        Sequence(lambda a=a, b=b: grid.frames(a, b), b - a, None if times is None else times[a:b]) for a, b in runs
    ]
    return Input(sequences, many, grid.info, notes)


def array_input(file, config):
    """A .npy or .npz: (T, H, W[, C]) is one sequence, (N, T, H, W[, C]) are N."""
    if file.suffix.lower() == ".npz":
        member, shape, dtype = npz_member(file, config.array_key)
        rows, whole = (lambda: npz_rows(file, member)), None
    else:
        whole = open_npy(file)
        shape, dtype, rows = whole.shape, whole.dtype, lambda: iter(whole)
    if len(shape) not in (3, 4, 5) or dtype.kind not in "buif" or 0 in shape:
        raise UserError(f"{file}: holds {dtype} {shape}; it must hold numbers (T, H, W[, C]) or (N, T, H, W[, C])")
    channels = {config.input_channels, 1, 3} if config.input_channels in (1, 3) else {config.input_channels}
    many = len(shape) == 5 or (len(shape) == 4 and shape[3] not in channels and config.input_channels == 1)
    if not many:
        return Input([Sequence(lambda: map(with_channels, rows()), shape[0])])
    reader = RowReader(rows) if whole is None else whole
    sequences = [Sequence(lambda i=i: map(with_channels, iter(reader[i])), shape[1]) for i in range(shape[0])]
    return Input(sequences, many=True)


class RowReader:
    """Row i of rows() as reader[i]. Rows that are asked for in order are read once; one row is in memory at a time."""

    def __init__(self, rows):
        self.rows, self.number = rows, -1

    def __getitem__(self, number):
        if self.number < 0 or number < self.number:
            self.iterator, self.number = iter(self.rows()), -1
        while self.number < number:
            self.row, self.number = next(self.iterator), self.number + 1
        return self.row


def with_channels(frame):
    return frame[..., None] if frame.ndim == 2 else frame
