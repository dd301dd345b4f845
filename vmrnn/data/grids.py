"""Gridded fields: NetCDF, HDF5, Zarr, GRIB and GeoTIFF through xarray, TIFF stacks through tifffile.

    grid = open_grid("radar/*.nc", ["precipitation"])
    grid.shape                      (T, H, W, C)
    for frame in grid.frames():     (H, W, C), in the units of the file, NaN where a value is missing
        ...
    grid.info                       names, units, coordinates, times: GridInfo

The files follow one another in time. A file is read a few frames at a time.
"""

import json
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.cache import cached_folder, stamp, write_npy
from vmrnn.data.clips import Clip
from vmrnn.data.grid_axes import is_time, levels_of, read_roles
from vmrnn.data.grid_files import choose_variables, format_of, grid_files, is_field, opened, split_path
from vmrnn.data.grid_info import Channel, GridInfo, import_xarray, plain_attributes
from vmrnn.data.grid_times import FrameTimes, find_times
from vmrnn.data.grid_values import PACKING, decode, missing_flags, stored_type
from vmrnn.data.times import check_step, moment, nearest_frames, parse_step, runs_without_gap, span, usual_step
from vmrnn.errors import UserError
from vmrnn.progress import Bar, counted

BLOCK = 2**22  # values of a variable that are read at once, or more where they are stored in larger pieces


@dataclass(frozen=True)
class Selection:
    """What of one variable makes channels.

    variable    its name in the file
    letters     the roles of its dimensions in order; without N and T, it does not change with time
    positions   of its levels, all dimensions C counted as one
    flags       the stored numbers that mean missing
    path        of the file; None: that of the part that is read
    """

    variable: str
    letters: str
    positions: tuple
    flags: tuple
    path: Path | None = None


@dataclass
class Part:
    """One file of a gridded field: its frames are one sequence (or, where it has a dimension N, several) of `count`."""

    path: Path
    sequences: int
    count: int
    times: FrameTimes

    @property
    def frames(self):
        return self.sequences * self.count


@dataclass
class Grid:
    """An opened gridded field in files. Its description was read. Its values are read by `frames`.

    info          GridInfo; its times are those of all frames in order
    shape         (T, H, W, C) of all frames
    dtype         of the frames: a float type where values may be missing
    breaks        numbers of the frames that begin another sequence: those of a file with a dimension N
    notes         lines that say how the files were read, for a program's start
    taken         numbers of the frames that are used, counted over all files; None: all
    step          the regular time step at which frames were taken; None: the usual step of the files
    beyond_fill   {variable: number of values beyond its fill value, read as missing}; complete after all frames were read
    """

    info: GridInfo
    shape: tuple
    dtype: np.dtype
    breaks: list
    notes: list
    parts: list
    selections: list
    taken: np.ndarray | None = None
    step: float | None = None
    beyond_fill: Counter = field(default_factory=Counter)

    def runs(self):
        """The runs of frames that follow one another without a gap, a list of (start, stop)."""
        edges = [0, *self.breaks, self.shape[0]]
        runs = []
        for start, stop in pairwise(edges):
            times = None if self.info.times is None else self.info.times[start:stop]
            found = [(0, stop - start)] if times is None else runs_without_gap(times, self.step)
            runs += [(start + a, start + b) for a, b in found]
        return runs

    def steady(self):
        """Per forcing, whether it is known not to change with time: it lies in another file or has no time dimension."""
        forced = self.selections[len(self.selections) - len(self.info.forcings) :]
        timed = "T" in self.selections[0].letters
        return [s.path is not None or (timed and "T" not in s.letters) for s in forced]

    def frames(self, start=0, stop=None, bar=None):
        """Yields the frames start to stop, (H, W, C), one at a time; `bar` (vmrnn.progress.Bar) counts them."""
        numbers = np.arange(sum(part.frames for part in self.parts)) if self.taken is None else self.taken
        yield from self.stored_frames(numbers[start:stop], bar)

    def stored_frames(self, numbers, bar):
        """Yields the frames with these numbers in the files, which increase."""
        before = 0
        for part in self.parts:
            wanted = numbers[(before <= numbers) & (numbers < before + part.frames)] - before
            before += part.frames
            if len(wanted) == 0:
                continue
            if bar is not None:
                bar.describe(f"decode {part.path.name}")
            with ExitStack() as stack:
                # How many frames are read at once
                fields = [stack.enter_context(opened_field(s.path or part.path, s.variable)) for s in self.selections]
                pixels = int(np.prod(self.shape[1:3]))
                step = max(1, BLOCK // pixels)
                for selection, variable in zip(self.selections, fields):
                    # A compressed piece is read whole, so that it is read once
                    pieces = variable.encoding.get("chunksizes") or [1] * variable.ndim
                    piece = dict(zip(selection.letters, pieces)).get("T", 1)
                    step = max(step, min(piece, 16 * BLOCK // pixels))
                # Read block after block: frames of one sequence, from the first that is wanted
                while len(wanted):
                    sequence, start = divmod(int(wanted[0]), part.count)
                    stop = min(start + step, part.count)
                    here = wanted[wanted < sequence * part.count + stop] - sequence * part.count - start
                    wanted = wanted[len(here) :]
                    place = {"N": sequence, "T": slice(start, start + int(here[-1]) + 1)}
                    block = [self.read(part, s, v, place) for s, v in zip(self.selections, fields)]
                    # A field that does not change with time is one frame, which is repeated.
                    count = max(map(len, block))
                    block = [np.broadcast_to(values, (count, *values.shape[1:])) for values in block]
                    for frame in np.concatenate(block, axis=3)[here]:
                        yield frame
                        if bar is not None:
                            bar.update()

    def read(self, part, selection, variable, place):
        """The frames at `place` of the channels of one selection, (n, H, W, c)."""
        roles = dict(zip(variable.dims, selection.letters))
        block = variable.isel({dim: place[letter] for dim, letter in roles.items() if letter in place})
        try:
            values, beyond = decode(block, selection.flags, self.dtype)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            path = selection.path or part.path
            raise UserError(f"{path}: {selection.variable} cannot be read ({reason}); fetch it again") from error
        self.beyond_fill[selection.variable] += beyond
        order = sorted(range(block.ndim), key=lambda i: "TCHW".index(roles[block.dims[i]]))
        values = values.transpose(order).reshape(-1, len_levels(variable, selection.letters), *self.shape[1:3])
        return values[:, list(selection.positions)].transpose(0, 2, 3, 1)


def len_levels(variable, letters):
    """How many levels a variable has: the product of its dimensions C."""
    return int(np.prod([size for size, letter in zip(variable.shape, letters) if letter == "C"], dtype=int))


@contextmanager
def opened_dataset(path, variable):
    """The group of a file that holds a variable, as a Dataset. UserError: the variable is not there."""
    group, name = split_path(variable)
    with opened(path, group, name if format_of(path) == "grib" else "") as dataset:
        if name not in dataset.variables:
            found = [f"{group}/{other}".strip("/") for other in dataset.data_vars if is_field(dataset, other)]
            raise UserError(f"{path}: no variable {variable} in it; it has {', '.join(found) or 'no field there'}")
        yield dataset


@contextmanager
def opened_field(path, variable):
    """A variable of a file, still packed, whose values are read when they are asked for."""
    with opened_dataset(path, variable) as dataset:
        yield dataset.variables[split_path(variable)[1]]


def open_grid(path, variables=(), array_axes="", time_from="", time_step="", forcings=()):
    """A gridded field, opened.

    path         a file, a Zarr folder, a folder of files, or a glob; the files follow one another in time
    variables    names in the order of the channels, with the groups in front (image1/image_data), and with a level
                 behind where only one is wanted (u@850); empty: the only field of the file
    array_axes   letters N T C H W of the dimensions in order; "": by name and attributes (read_roles)
    time_from    as in find_times
    time_step    such as 10min: the frames nearest to this regular step are taken (times.nearest_frames); "": all
    forcings     names of fields that follow the variables as channels; one of another file: FILE:NAME. They may have no
                 time dimension

    Returns a Grid. UserError: a file that is missing, damaged or unlike the others, a variable that is not there,
    dimensions or times that have two readings, times that are there twice.
    """
    files = grid_files(path)
    variables = choose_variables(files[0], variables, forcings)
    first = describe(files[0], variables, array_axes, time_from, forcings)
    parts = [first.part]
    for file in counted(files[1:], "look at files", "file"):
        other = describe(file, variables, array_axes, time_from, forcings)
        check_alike(first, other, files[0], file)
        first.dtype = np.result_type(first.dtype, other.dtype)
        parts.append(other.part)
    parts, times, alone = in_order(parts)
    info = first.info
    info.times, info.calendar = times, parts[0].times.calendar
    info.time_source, info.time_facts = parts[0].times.source, parts[0].times.facts
    lengths = [part.count for part in parts for _ in range(part.sequences)]
    breaks = [int(end) for end in np.cumsum(lengths)[:-1]] if alone else []
    shape = (sum(lengths), *first.size[2:], len(info.channels) + len(info.forcings))
    grid = Grid(info, shape, first.dtype, breaks, notes_of(first, files, shape, breaks), parts, first.selections)
    if time_step:
        take_nearest(grid, time_step, path)
    return grid


def grid_clips(path, options):
    """A gridded field, decoded into the cache: frames.npy (T, H, W, C) and its GridInfo beside it.

    path      as in open_grid
    options   vmrnn.config.Config

    Returns (clips, notes): the runs of frames between gaps, and lines that say how the files were read.
    UserError: as open_grid, and another number of channels than input_channels.
    """
    files = [*grid_files(path), *(file for file, _ in map(file_of, options.forcings) if file)]
    for file in files:
        format_of(file)  # refuses a file that does not exist
    how = (options.variables, options.array_axes, options.time_from, options.time_step, options.forcings)

    def write(folder):
        grid = open_grid(path, *how)
        check_channels(path, grid.info.names, options)
        with Bar("read", grid.shape[0]) as bar:
            write_npy(folder / "frames.npy", grid.frames(bar=bar))
        grid.info.save(folder)
        beyond = [f"{name}: {count} value{'s' * (count > 1)} beyond the fill value, where the NetCDF User Guide allows none: "
                  "read as missing"
                  for name, count in grid.beyond_fill.items() if count]  # fmt: skip
        index = {"runs": grid.runs(), "breaks": grid.breaks, "notes": [*grid.notes, *beyond]}
        (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")

    # The names give the order, and perhaps the times
    versions = [[file.as_posix() if "/" in options.time_from else file.name, *stamp(file)] for file in files]
    folder = cached_folder(options.cache_dir, "grid", [versions, *how], write)
    check_channels(path, GridInfo.load(folder).names, options)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    clips = []
    for start, stop in index["runs"]:
        # Sequences that stand for themselves are clips of their own; the runs between gaps are pieces of one clip
        number = sum(start >= edge for edge in index["breaks"])
        name = f"{path} sequence {number}" if index["breaks"] else str(path)
        clips.append(Clip(name, str(folder / "frames.npy"), start, stop))
    waves = ["calendar: hour of the day and day of the year (UTC) are given"] if options.calendar else []
    return clips, [*index["notes"], *waves]


def calendar_of(clips):
    """GridInfo.calendar_features of all frames in the cached file of gridded clips, float32 (T, 4)."""
    info = GridInfo.load(Path(clips[0].path).parent)
    return info.calendar_features(info.times)


def check_channels(path, names, options):
    """UserError if the fields make another number of channels than input_channels."""
    if len(names) != options.input_channels:
        raise UserError(f"{path}: {', '.join(names)} make {len(names)} channels, but input_channels is "
                        f"{options.input_channels}; change it, variables or array_axes")  # fmt: skip


def take_nearest(grid, time_step, path):
    """Keep only those frames of a Grid that are nearest to a regular step. UserError: its frames have no times."""
    step = parse_step(time_step)
    if grid.info.times is None:
        raise UserError(
            f"{path}: time_step {time_step} needs times, and its frames have none; name them with time_from"
        )
    edges, taken, times, breaks = [0, *grid.breaks, grid.shape[0]], [], [], []
    for start, stop in pairwise(edges):
        check_step(step, grid.info.times[start:stop], path)
        indices, regular = nearest_frames(grid.info.times[start:stop], step)
        breaks.append(sum(map(len, taken)))
        taken.append(start + indices)
        times.append(regular)
    grid.taken, grid.info.times, grid.step = np.concatenate(taken), np.concatenate(times), step
    grid.breaks = breaks[1:]
    total, grid.shape = grid.shape[0], (len(grid.taken), *grid.shape[1:])
    grid.notes.append(f"time step: {time_step}, of the {total} frames the {len(grid.taken)} nearest")


@dataclass
class Description:
    """What is in one file.

    info         GridInfo without times
    part         Part
    size         (sequences, frames of each, rows, columns)
    dtype        of all channels together
    selections   list of Selection, one per variable that was asked for
    roles        of the dimensions of the first variable
    facts        what all files must share, {what: text}
    said         what an HDF5 file says of its values that is not applied
    """

    info: GridInfo
    part: Part
    size: tuple
    dtype: np.dtype
    selections: list
    roles: dict
    facts: dict
    said: str


def describe(path, variables, array_axes, time_from, forcings=()):
    """The Description of one file. No values of its fields are read."""
    channels, selections, attributes, dtypes, facts, coordinates, first = [], [], {}, [], {}, {}, None
    for asked, given in [*((name, False) for name in variables), *((name, True) for name in forcings)]:
        place, rest = file_of(asked) if given else (None, asked)
        variable, _, level = rest.partition("@")
        source = place or path  # the file of this variable
        with opened_dataset(source, variable) as dataset:
            name = split_path(variable)[1]
            found = dataset.variables[name]
            if found.dtype.kind not in "buif":
                raise UserError(f"{source}: {variable} holds {found.dtype}, no numbers; name another")
            # Dimensions: those of sequences, time, rows and columns are the same for all, but a forcing may have no time
            roles = read_roles(dataset, name, array_axes if not given else "", source)
            sizes = {letter: found.sizes[dim] for dim, letter in roles.items()}
            size = sizes.get("N", 1), sizes.get("T", 1), sizes["H"], sizes["W"]
            if first:
                check_size(asked, size, roles, variables[0], first[0], given, place, path)
            first = first or (size, roles, find_times(dataset, roles, path, time_from))
            # Channels
            levels = levels_of(dataset, name, roles, level, source)
            if given and len(levels) > 1:
                one = next(iter(levels[0][2].values()))
                raise UserError(f"{source}: the forcing {asked} has {len(levels)} levels; name one: {asked}@{one}")
            if not given:
                channels += [Channel(channel_name(variable, value), variable, at, value) for _, at, value in levels]
                attributes.setdefault(variable, field_attributes(found))
            # Values
            flags, said = missing_flags(source, variable, found.attrs)
            dtypes.append(stored_type(found.dtype, found.attrs, flags))
            positions = tuple(position for position, _, _ in levels)
            selections.append(Selection(variable, "".join(roles.values()), positions, tuple(flags), place))
            # Coordinates
            own = steady_coordinates(dataset, roles)
            if place:
                check_same_place(coordinates, own, first[1], path, place)
            else:
                coordinates = own | coordinates
                file_attributes = plain_attributes(dataset.attrs)
            facts |= {
                f"{variable} units": str(found.attrs.get("units", "")), f"{variable} values": said,
                f"{variable} dimensions": dims_text(found, roles), f"{variable} missing": " ".join(map(str, flags)),
            }  # fmt: skip
    size, roles, times = first
    if times.values is not None and times.values.shape[-1] != size[1]:
        raise UserError(f"{path}: {times.source} has {times.values.shape[-1]} times for {size[1]} frames; name another")
    dims = {letter: plain_dim(dim, letter) for dim, letter in roles.items()}
    steady = import_xarray().Dataset(coords=coordinates, attrs=file_attributes)
    info = GridInfo(
        channels, [file_of(name)[1] for name in forcings], attributes, dims["H"], dims["W"], dims.get("T", "time"),
        {}, "", "", None, steady,
    )  # fmt: skip
    part = Part(path, *size[:2], times)
    return Description(info, part, size, np.result_type(*dtypes), selections, roles, facts, said)


def file_of(forcing):
    """(path or None, name) of a forcing: height, or steady.nc:height for one of another file."""
    path, _, name = forcing.rpartition(":")
    return (Path(path) if path else None), name


def check_size(asked, size, roles, first_name, first_size, given, place, path):
    """UserError if a field has other frames than the first one. A forcing without a time dimension has one frame."""
    steady = given and not {"N", "T"} & set(roles.values())
    if place and not steady:
        raise UserError(f"{place}: the forcing {asked} changes with time: write it into the files of {path}")
    if size[2:] != first_size[2:] or not (steady or size == first_size):
        raise UserError(f"{place or path}: {asked} has {frames_text(size)}, but {first_name} {frames_text(first_size)}; "
                        "name fields that are alike")  # fmt: skip


def check_same_place(coordinates, others, roles, path, other_path):
    """UserError if two files have different coordinates of rows or columns."""
    for dim in (plain_dim(dim, letter) for dim, letter in roles.items() if letter in "HW"):
        ours, theirs = (found[dim][1] if dim in found else None for found in (coordinates, others))
        if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
            raise UserError(f"{other_path}: its coordinate {dim} is not that of {path}; they are of different places")


def channel_name(variable, level):
    """t2m, or u@850 for the level {"level": 850}."""
    values = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in level.values())
    return f"{variable}@{values}" if values else variable


def plain_dim(dim, letter):
    """The name of a dimension in a forecast: HDF5 that names no dimension gets time, y and x."""
    return {"T": "time", "H": "y", "W": "x"}.get(letter, str(dim)) if str(dim).startswith("phony_dim") else str(dim)


def dims_text(variable, roles):
    """The dimensions of a variable that all files must share, as text: not the length of time."""
    return ", ".join(
        f"{plain_dim(dim, letter)} {variable.sizes[dim]}" for dim, letter in roles.items() if letter != "T"
    )


def frames_text(size):
    return f"{size[0] * size[1]} frames of {size[2]}x{size[3]}"


def field_attributes(variable):
    """Attributes of a field as its forecast has them: without those that say how values are packed."""
    facts = plain_attributes({key: value for key, value in variable.attrs.items() if key not in PACKING})
    if "grid_mapping" in variable.encoding:  # the library has decoded it
        facts["grid_mapping"] = variable.encoding["grid_mapping"]
    return facts


def steady_coordinates(dataset, roles):
    """The coordinates and the map projection of a field that do not change with time: {name: (dims, values, attributes)}.

    roles   of the field's dimensions
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = import_xarray().decode_cf(dataset, decode_times=False, mask_and_scale=False, decode_coords="all")
    names = {dim: plain_dim(dim, letter) for dim, letter in roles.items() if letter in "HWC"}
    kept = {}
    for key, coordinate in decoded.coords.items():
        own = [dim for dim in coordinate.dims if dim in roles]
        # Bounds have a dimension of their own
        about = all(dim in names for dim in own) and (own or not coordinate.dims)
        if about and coordinate.dtype.kind in "buifSU" and not is_time(coordinate.variable):
            facts = {k: v for k, v in dataset.variables[key].attrs.items() if k != "coordinates"}
            dims = [names.get(dim, dim) for dim in coordinate.dims]
            kept[str(key)] = (dims, coordinate.values, plain_attributes(facts))
    return kept


def check_alike(first, other, first_path, path):
    """UserError if a file has other channels, sizes, units or coordinates than the first."""
    if other.info.names != first.info.names:
        raise UserError(f"{path}: holds {other.info.names}, but {first_path} {first.info.names}; make them alike")
    for key, value in first.facts.items():
        if other.facts[key] != value:
            raise UserError(f"{path}: {key} {other.facts[key] or 'none'}, but {first_path}: {value or 'none'}; "
                            "make them alike")  # fmt: skip
    for name in (first.info.y, first.info.x):
        ours, theirs = (d.info.coordinates.variables.get(name) for d in (first, other))
        if (ours is None) != (theirs is None) or (ours is not None and not np.array_equal(ours.values, theirs.values)):
            raise UserError(f"{path}: its coordinate {name} is not that of {first_path}; they are of different places")
    mine, its = first.part.times, other.part.times
    if (mine.values is None) != (its.values is None) or mine.calendar != its.calendar:
        ways = f"{its.source or 'none'}, not {mine.source or 'none'}"
        raise UserError(f"{path}: its times are of another kind than those of {first_path} ({ways}); use time_from")


def in_order(parts):
    """Parts in the order of their times.

    Returns (parts, times of all frames or None, whether each sequence of a file stands for itself). Files that each
    count their frames from the start, without a date, stand for themselves, as do several sequences of one file.
    UserError: dates that go back or are there twice.
    """
    alone = any(part.sequences > 1 for part in parts)
    if parts[0].times.values is None:
        return parts, None, alone
    rows = [np.broadcast_to(part.times.values, (part.sequences, part.count)).ravel() for part in parts]
    if not alone:
        order = sorted(range(len(parts)), key=lambda i: rows[i][0])
        times = np.concatenate([rows[i] for i in order])
        back = np.flatnonzero(np.diff(times) <= 0)
        if not len(back):
            return [parts[i] for i in order], times, False
        if parts[0].times.calendar:
            ends = np.cumsum([parts[i].count for i in order])
            before, after = (
                parts[order[int(np.searchsorted(ends, at, "right"))]].path for at in (back[0], back[0] + 1)
            )
            where = f"after {before}" if before != after else "in itself"
            raise UserError(f"{after}: time {moment(times[back[0] + 1])} comes twice or goes back, {where}; "
                            "name files that follow one another")  # fmt: skip
    if not all(np.all(np.diff(times.reshape(part.sequences, part.count)) > 0) for part, times in zip(parts, rows)):
        raise UserError(f"{parts[0].path}: {parts[0].times.source} goes back in a sequence; leave it out of the file")
    return parts, np.concatenate(rows), True


def notes_of(first, files, shape, breaks):
    """Lines that say how files were read."""
    info, times = first.info, first.info.times
    words = {"N": "sequences", "T": "time", "C": "channels", "H": "rows", "W": "columns"}
    read = ", ".join(f"{dim} as {words[letter]}" for dim, letter in first.roles.items())
    units = ", ".join(f"{name} ({info.units(i) or 'no unit'})" for i, name in enumerate(info.names))
    notes = [
        f"{len(files)} file{'s' * (len(files) > 1)}, {shape[0]} frames of {shape[1]}x{shape[2]}, {units}; dimensions: {read}"
    ]
    if info.forcings:
        notes.append(f"forcings, given and not forecast: {', '.join(info.forcings)}")
    if times is None:
        order = "the files are in the order of their names" if len(files) > 1 else "the frames are in the file's order"
        notes.append(f"times: none, {order}")
    elif info.calendar:
        step = f", every {span(usual_step(times))}" if len(times) > 1 and not breaks else ""
        span_of_all = f"{moment(times.min())} to {moment(times.max())}"
        notes.append(f"times: {span_of_all}{step}, from {first.part.times.source}")
    else:
        notes.append(f"times: the numbers {times.min():g} to {times.max():g}, from {first.part.times.source}")
    if breaks:
        notes.append(f"sequences: {len(breaks) + 1}, each stands for itself")
    if first.said:
        notes.append(f"values: as stored; the file says {first.said}, which is not applied")
    flags = sorted({flag for selection in first.selections for flag in selection.flags})
    if flags:
        notes.append(f"missing: the stored {', '.join(f'{flag:g}' for flag in flags)}, by the file's attributes")
    return notes
