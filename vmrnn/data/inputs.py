"""The frames that predict.py continues, read one at a time from any file that the data sets read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import ARRAYS, find_axes, npz_member, npz_rows, open_npy, read_array, whole
from vmrnn.data.grid_axes import unlike_place
from vmrnn.data.grid_files import GRIDS, grid_files, is_zarr
from vmrnn.data.grid_info import label_notes, unlike_level
from vmrnn.data.grids import open_grid
from vmrnn.data.images import IMAGES, image_frames, image_notes
from vmrnn.data.media import images_in
from vmrnn.data.sources import Source, series_note
from vmrnn.data.table import DATASETS
from vmrnn.data.times import increases, moment, parse_step, runs_without_gap, usual_step
from vmrnn.data.units import same_unit
from vmrnn.data.videos import VIDEOS
from vmrnn.errors import UserError


@dataclass
class Sequence:
    """Frames that follow one another.

    read     read() yields all frames in order, (H, W, C)
    count    number of frames; None: only reading tells
    times    float64 (count,), see vmrnn.data.times; None: the frames have no times
    apart    seconds from one frame to the next of a video or of images; 0: not known
    """

    read: Callable
    count: int | None = None
    times: np.ndarray | None = None
    apart: float = 0.0

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

    dataset     the data set that would read it in a training: video, frames, array or grid
    sequences   list of Sequence, each of which gets a forecast of its own
    many        whether the file has an axis of sequences, and so has the forecast
    info        GridInfo of a gridded field; None for other files
    notes       lines that say how the file was read
    steady      per forcing, whether it does not change with time (Grid.steady)
    """

    dataset: str
    sequences: list
    many: bool = False
    info: object = None
    notes: list = field(default_factory=list)
    steady: list = field(default_factory=list)


def open_input(path, config, whole=False):
    """The frames of a file or folder, as an Input.

    path     a video, a folder of images, .npy, .npz, or a gridded field: a file, a folder of files, a Zarr
             store or a glob
    config   Config of the network; its options on how files are read count
    whole    True: all frames count; False: of frames with gaps in time only those after the last gap, which can
             be continued

    UserError: a missing, damaged or foreign file.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix in IMAGES and (suffix not in GRIDS or DATASETS[config.dataset].pictures) and file.is_file():
        read = Sequence(lambda: image_frames([file], picture_channels(config)))
        return Input("frames", [read], notes=image_notes(file))
    if config.dataset == "grid" or suffix in GRIDS or is_zarr(file) or holds_grids(file):
        return grid_input(path, config, whole)
    if file.is_dir():
        notes = []
        return image_input(images_in(file, notes), config, whole, notes)
    if not file.exists():
        raise UserError(
            f"{path}: no such file or folder; name a video, a folder of images, an array or a gridded field"
        )
    if suffix in VIDEOS:
        notes = []
        return Input("video", [picture_sequence(Source(file.name, (file,), True), config, whole, notes)], notes=notes)
    if suffix in ARRAYS:
        return array_input(file, config)
    raise UserError(
        f"{path}: its name does not end as one of {' '.join((*VIDEOS, *ARRAYS, *GRIDS))}; name such a file or a "
        "folder of images"
    )


def holds_grids(folder):
    """Whether this is a folder with files of gridded fields and no images."""
    endings = {file.suffix.lower() for file in folder.iterdir()} if folder.is_dir() else set()
    return not endings.isdisjoint(GRIDS) and endings.isdisjoint(IMAGES)


def image_input(images, config, whole, notes):
    """A folder of images. If their names count several series, only the last one is continued."""
    source = Source(images[0].parent.name, tuple(images), False)
    notes += image_notes(images[0])
    series = source.series()
    if len(series) > 1 and not whole:
        notes.append(
            f"{series_note(source, series)}; only the {len(series[-1].files)} images of the last series are used"
        )
        source = series[-1]
    return Input("frames", [picture_sequence(source, config, whole, notes)], notes=notes)


def picture_sequence(source, config, whole, notes):
    """A video or images, at the regular step of time_step if there is one.

    whole   as in open_input
    notes   list to which lines are added that say how the frames were read

    The times of a video are known only once it was decoded, so it is decoded twice, a frame at a time.
    """
    channels, step = picture_channels(config), config.time_step

    def read(first=0):
        return (frame for frame, _ in islice(source.timed_frames(channels, step), first, None))

    one = len(source.files) == 1  # a video, or an image that may have several pages
    count = None if one or step else len(source.files)
    if whole or (one and not source.video):
        return Sequence(read, count)
    if source.video or step:
        times = [time for _, time in source.timed_frames(channels, step)]
    else:
        times = source.named_times() or [None]
    if None in times or not increases(times):
        notes.append(source.no_times())
        return Sequence(read, count)
    runs = runs_without_gap(times, parse_step(step) if step else None)
    first, stop = runs[-1]
    if len(runs) > 1:
        gaps = f"{len(runs) - 1} gap{'s' * (len(runs) > 2)} in time"
        notes.append(f"{gaps}: only the {stop - first} frames after the last are used")
    apart = usual_step(times) if source.dated() and len(times) > 1 else 0.0
    return Sequence(lambda: read(first), stop - first, apart=apart)


def picture_channels(config):
    """The channels that pictures are decoded to, as in training; None: as they are stored."""
    return config.input_channels if config.input_channels in (1, 3) else None


def grid_input(path, config, whole):
    """A gridded field. Its sequences each get a forecast. Of runs between gaps in time only the last is continued."""
    how = (config.variables, config.array_axes, config.time_from, config.time_step)
    grid = open_grid(path, *how, config.forcings)
    if len(grid.info.names) != config.input_channels:
        raise UserError(
            f"{path}: {', '.join(grid.info.names)} make {len(grid.info.names)} channels, but the network takes "
            f"{config.input_channels}; name others with --variables"
        )
    many, runs, notes = bool(grid.breaks), grid.runs(), list(grid.notes)
    grid_files(path, notes)  # adds which files are passed over
    if many and not whole:
        # The runs of a sequence end where the next one begins; its last run is the one to continue.
        ends = [*grid.breaks, grid.shape[0]]
        runs = [run for run in runs if run[1] in ends]
    elif len(runs) > 1 and not whole:
        notes.append(
            f"{len(runs) - 1} gaps in time: only the {runs[-1][1] - runs[-1][0]} frames after the last are used"
        )
        runs = runs[-1:]
    times = grid.info.times
    sequences = [
        Sequence(lambda a=a, b=b: grid.frames(a, b), b - a, None if times is None else times[a:b]) for a, b in runs
    ]
    return Input("grid", sequences, many, grid.info, notes, grid.steady())


def coming_forcings(source, config, last_frame, times, count, path=None):
    """The forcings of the frames to forecast, (count, H, W, F); None if the network has none.

    source       Input, a gridded field
    config       Config of the network
    last_frame   (H, W, C + F), the last one observed; what does not change with time is taken from it
    times        of the frames to forecast, float64 (count or more,); None: there are none
    count        frames whose forcings are needed
    path         file, folder or glob with those that change with time, at these times or, without times, in order

    Adds a line to the notes of `source` for a scalar coordinate, such as band, that has another value than in it.
    UserError: a forcing that changes with time and is not given for one of the frames.
    """
    if not config.forcings or count < 1:
        return None
    # Forcings that do not change with time are those of the last frame.
    given = np.repeat(last_frame[None, ..., -len(config.forcings) :], count, axis=0)
    changing = [i for i, steady in enumerate(source.steady) if not steady]
    if not changing:
        return given

    # Open the file of the others.
    names = [config.forcings[i] for i in changing]
    if path is None:
        raise UserError(
            f"the network needs {', '.join(names)} for the {count} frames after the input; name a file that holds it "
            "with --forcing_data"
        )
    grid = open_grid(path, names, config.array_axes, config.time_from)
    if grid.shape[1:3] != given.shape[1:3]:
        raise UserError(f"{path}: its maps are {grid.shape[1]}x{grid.shape[2]}, those of the input {given.shape[1]}x"
                        f"{given.shape[2]}; they must be the same")  # fmt: skip
    if len(grid.info.names) != len(names):
        raise UserError(f"{path}: holds {', '.join(grid.info.names)}, but the network takes one level each of "
                        f"{', '.join(names)}; leave the other levels out")  # fmt: skip
    for name, unit, number in zip(names, grid.info.all_units, changing):
        if not same_unit(unit, wanted := source.info.given_units[number]):
            raise UserError(f"{path}: {name} is in {unit or 'no unit'}, but in {wanted or 'no unit'} in the input; "
                            "write it in the same unit")  # fmt: skip
    for name, level, number in zip(names, grid.info.levels, changing):
        if unlike_level(level, wanted := source.info.given_levels[number]):
            raise UserError(f"{path}: {name} is at {level}, but at {wanted} in the input; give the same level")
    plane, other = (source.info.y, source.info.x), (grid.info.y, grid.info.x)
    if coordinate := unlike_place(source.info.coordinates, plane, grid.info.coordinates, other):
        raise UserError(f"{path}: its coordinate {coordinate} is not that of the input; they are of different places")
    said = label_notes(grid.info.labels, source.info.labels, "is {} in the input")
    source.notes += [line for line in (f"{path}: {line}" for line in said) if line not in source.notes]
    # Find the frame of each time. Without times the frames are taken in order.
    numbers = range(count)
    if times is not None and grid.info.times is not None:
        if grid.info.calendar != source.info.calendar:
            raise UserError(f"{path}: its calendar is {grid.info.calendar or 'none'}, that of the input "
                            f"{source.info.calendar or 'none'}; write the same")  # fmt: skip
        numbers = [int(np.abs(grid.info.times - time).argmin()) for time in times[:count]]
        wide = np.abs(grid.info.times[numbers] - times[:count]) > 1e-3 * usual_step(times)
        if wide.any():
            raise UserError(
                f"{path}: holds no {', '.join(names)} at {moment(times[int(wide.argmax())], grid.info.calendar)}; the "
                "forecast needs it"
            )
    elif grid.shape[0] < count:
        raise UserError(f"{path}: holds {grid.shape[0]} frames of {', '.join(names)}; the forecast needs {count}")
    given = given.astype(np.result_type(given.dtype, grid.dtype))
    for t, number in enumerate(numbers):
        given[t][..., changing] = next(grid.frames(number, number + 1))
    return given


def array_input(file, config):
    """A .npy or .npz file: one sequence, or one per entry of its axis N."""
    # The header, and a reader of one row at a time
    if file.suffix.lower() == ".npz":
        member, shape, dtype = npz_member(file, config.array_key)
        with whole(file):
            array = np.broadcast_to(np.empty((), dtype), shape)  # of this shape and type, and no memory
        reader = RowReader(lambda: npz_rows(file, member))
    else:
        array = reader = open_npy(file)
    axes = input_axes(file, array, config)
    first = axes[0]
    if first not in "NT":  # no rows to read one after another
        reader = read_array(file, config.array_key)
    length = dict(zip(axes, array.shape))
    notes = [f"{array.dtype} {array.shape} read as {', '.join(axes)}"]

    def frames(index):
        """Yields the frames of one sequence, (H, W, C); index: its place along N, or None."""
        if first == "T" and index is None:
            for t in range(length["T"]):
                yield frame_of(reader[t], axes[1:])
            return
        whole = reader[index] if first == "N" else reader
        rest = axes[1:] if first == "N" else axes
        if "N" in rest:
            whole, rest = whole.take(index, rest.index("N")), rest.replace("N", "")
        for t in range(length["T"]):
            yield frame_of(whole.take(t, rest.index("T")), rest.replace("T", ""))

    if "N" not in axes:
        return Input("array", [Sequence(lambda: frames(None), length["T"])], notes=notes)
    sequences = [Sequence(lambda i=i: frames(i), length["T"]) for i in range(length["N"])]
    return Input("array", sequences, many=True, notes=notes)


def input_axes(file, array, config):
    """The axes of an array, as letters. A network of grey frames also takes colours, and one of colours grey frames."""
    try:
        return find_axes(file, array, config.input_channels, config.array_axes)
    except UserError:
        if config.input_channels not in (1, 3):
            raise
        try:
            return find_axes(file, array, 4 - config.input_channels, config.array_axes)
        except UserError:
            pass
        raise


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


def frame_of(array, axes):
    """An array with the axes H, W and perhaps C in any order as a frame (H, W, C)."""
    array = array.transpose([axes.index(axis) for axis in "HWC" if axis in axes])
    return array if "C" in axes else array[..., None]
