"""Gridded fields: NetCDF, HDF5, Zarr, GRIB and GeoTIFF through xarray, TIFF stacks through tifffile.

    grid = open_grid("radar/*.nc", ["precipitation"])
    grid.shape                      (T, H, W, C)
    for frame in grid.frames():     (H, W, C), in the units of the file, NaN where a value is missing
        ...
    grid.info                       names, units, coordinates, times: GridInfo

The files follow one another in time. A file is read a few frames at a time.
"""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.cache import cached_folder, stamp, write_npy
from vmrnn.data.clips import Clip
from vmrnn.data.grid_fields import check_alike, describe, file_of, opened_dataset
from vmrnn.data.grid_files import choose_variables, format_of, grid_files, split_path
from vmrnn.data.grid_info import GridInfo, label_notes
from vmrnn.data.grid_values import decode, is_netcdf
from vmrnn.data.images import PACKED, lacks_package
from vmrnn.data.times import (
    check_step,
    lead_names,
    moment,
    nearest_frames,
    parse_step,
    runs_without_gap,
    span,
    usual_step,
    whole_months,
)
from vmrnn.errors import UserError
from vmrnn.progress import Bar, counted

BLOCK = 2**22  # values of a variable that are read at once, or more where they are stored in larger pieces


@dataclass
class Grid:
    """An opened gridded field in files. Its description was read. Its values are read by `frames`.

    info          GridInfo; its times are those of all frames in order
    shape         (T, H, W, C) of all frames
    dtype         of the frames: a float type where values may be missing
    breaks        numbers of the frames that begin another sequence: those of a file with a dimension N
    notes         lines that say how the files were read, for a program's start
    parts         list of Part, the files in the order of their frames
    taken         numbers of the frames that are used, counted over all files; None: all
    step          the regular time step at which frames were taken; None: the usual step of the files
    beyond_fill   {variable: number of values beyond its fill value, read as missing}; complete after all
                  frames were read
    """

    info: GridInfo
    shape: tuple
    dtype: np.dtype
    breaks: list
    notes: list
    parts: list
    taken: np.ndarray | None = None
    step: float | None = None
    beyond_fill: Counter = field(default_factory=Counter)

    def sequences(self):
        """(start, stop) of each sequence that stands for itself, a list."""
        return list(pairwise([0, *self.breaks, self.shape[0]]))

    def runs(self):
        """The runs of frames that follow one another without a gap, a list of (start, stop)."""
        if self.info.times is None:
            return self.sequences()
        return [(start + a, start + b) for start, stop in self.sequences()
                for a, b in runs_without_gap(self.info.times[start:stop], self.step)]  # fmt: skip

    def steady(self):
        """Per forcing, whether it is known not to change with time, in every file: see Part.steady."""
        return [all(known) for known in zip(*(part.steady(len(self.info.forcings)) for part in self.parts))]

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
            if bar is not None and len(wanted):
                bar.describe(f"decode {part.path.name}")
            for frame in self.frames_of(part, wanted):
                yield frame
                if bar is not None:
                    bar.update()

    def frames_of(self, part, wanted):
        """Yields the frames with these numbers in one file, which increase. They are read in blocks of one sequence."""
        if len(wanted) == 0:
            return
        with ExitStack() as stack:
            files = [stack.enter_context(opened_dataset(s.path or part.path, s.variable)) for s in part.selections]
            fields = [file.variables[split_path(s.variable)[1]] for s, file in zip(part.selections, files)]
            length = self.block_length(part, fields)
            while len(wanted):
                sequence, start = divmod(int(wanted[0]), part.count)
                stop = min(start + length, part.count)
                here = wanted[wanted < sequence * part.count + stop] - sequence * part.count - start
                wanted = wanted[len(here) :]
                place = {"N": sequence, "T": slice(start, start + int(here[-1]) + 1)}
                block = [self.read(part, s, v, place) for s, v in zip(part.selections, fields)]
                # A field that does not change with time is one frame, which is repeated.
                count = max(map(len, block))
                block = [np.broadcast_to(values, (count, *values.shape[1:])) for values in block]
                yield from np.concatenate(block, axis=3)[here]

    def block_length(self, part, fields):
        """How many frames of a file are read at once: whole compressed pieces of it, so that each is read once."""
        pixels = int(np.prod(self.shape[1:3]))
        pieces = [v.encoding.get("chunksizes") or [1] * v.ndim for v in fields]
        lengths = [dict(zip(s.letters, piece)).get("T", 1) for s, piece in zip(part.selections, pieces)]
        return max(1, BLOCK // pixels, min(max(lengths), 16 * BLOCK // pixels))

    def read(self, part, selection, variable, place):
        """The frames at `place` of the channels of one selection, (n, H, W, c)."""
        roles = dict(zip(variable.dims, selection.letters))
        block = variable.isel({dim: place[letter] for dim, letter in roles.items() if letter in place})
        path = selection.path or part.path
        try:
            values, beyond = decode(block, selection.flags, self.dtype, is_netcdf(path, variable.dims))
        except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
            if lacks_package(error):
                raise UserError(PACKED.format(path)) from error
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: {selection.variable} cannot be read ({reason}); fetch it again") from error
        self.beyond_fill[selection.variable] += beyond
        order = sorted(range(block.ndim), key=lambda i: "TCHW".index(roles[block.dims[i]]))
        values = values.transpose(order).reshape(-1, len_levels(variable, selection.letters), *self.shape[1:3])
        return values[:, list(selection.positions)].transpose(0, 2, 3, 1)


def len_levels(variable, letters):
    """How many levels a variable has: the product of its dimensions C."""
    return int(np.prod([size for size, letter in zip(variable.shape, letters) if letter == "C"], dtype=int))


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
    parts, dtype, odd = [first.part], first.dtype, {}
    for file in counted(files[1:], "look at files", "file"):
        other = describe(file, variables, array_axes, time_from, forcings)
        check_alike(first, other, files[0], file)
        for line in label_notes(other.info.labels, first.info.labels, f"is {{}} in {files[0]}"):
            odd.setdefault(line.partition(" ")[0], f"{file}: {line}")  # of each coordinate once
        dtype = np.result_type(dtype, other.dtype)
        parts.append(other.part)
    parts, times, alone = parts_by_time(parts)
    info = first.info
    info.times, info.calendar = times, parts[0].times.calendar
    info.time_source, info.time_facts = parts[0].times.source, parts[0].times.facts
    lengths = [part.count for part in parts for _ in range(part.sequences)]
    breaks = [int(end) for end in np.cumsum(lengths)[:-1]] if alone else []
    shape = (sum(lengths), *first.fields[0].size[2:], len(info.channels) + len(info.forcings))
    grid = Grid(info, shape, dtype, breaks, [*notes_of(first, files, shape, breaks), *odd.values()], parts)
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
    passed_over = []  # not of the cache, whose content does not depend on it
    files = [*grid_files(path, passed_over), *(file for file, _ in map(file_of, options.forcings) if file)]
    for file in files:
        format_of(file)  # refuses a file that does not exist
    how = (options.variables, options.array_axes, options.time_from, options.time_step, options.forcings)

    def write(folder):
        grid = open_grid(path, *how)
        check_channels(path, grid.info.names, options)
        with Bar("read", grid.shape[0]) as bar:
            write_npy(folder / "frames.npy", grid.frames(bar=bar))
        grid.info.save(folder)
        beyond = [f"{name}: {count} value{'s' * (count > 1)} beyond the fill value, where the NetCDF User Guide "
                  "allows none: read as missing"
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
    return clips, [*index["notes"], *passed_over, *waves]


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
    """Keep only those frames of a Grid that are nearest to a regular step.

    UserError: its frames have no times, or the step has a unit and the times only count frames.
    """
    if grid.info.times is None:
        raise UserError(
            f"{path}: time_step {time_step} needs times, and its frames have none; name them with time_from"
        )
    step = parse_step(time_step, dated=bool(grid.info.calendar))
    taken, times, breaks = [], [], []
    for start, stop in grid.sequences():
        check_step(step, grid.info.times[start:stop], path)
        indices, regular = nearest_frames(grid.info.times[start:stop], step)
        breaks.append(sum(map(len, taken)))
        taken.append(start + indices)
        times.append(regular)
    grid.taken, grid.info.times, grid.step = np.concatenate(taken), np.concatenate(times), step
    grid.breaks = breaks[1:]
    total, grid.shape = grid.shape[0], (len(grid.taken), *grid.shape[1:])
    grid.notes.append(f"time step: {time_step}, of the {total} frames the {len(grid.taken)} nearest")


def parts_by_time(parts):
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
            advice = f"after {before}; name files that follow one another"
            if before == after:
                advice = "in the file itself; sort its frames by time, and keep each once"
            raise UserError(
                f"{after}: time {moment(times[back[0] + 1], parts[0].times.calendar)} comes twice or goes back, "
                f"{advice}"
            )
    if not all(np.all(np.diff(times.reshape(part.sequences, part.count)) > 0) for part, times in zip(parts, rows)):
        raise UserError(f"{parts[0].path}: {parts[0].times.source} goes back in a sequence; leave it out of the file")
    return parts, np.concatenate(rows), True


def notes_of(first, files, shape, breaks):
    """Lines that say how files were read."""
    info, times = first.info, first.info.times
    words = {"N": "sequences", "T": "time", "C": "channels", "H": "rows", "W": "columns"}
    read = ", ".join(f"{dim} as {words[letter]}" for dim, letter in first.fields[0].roles.items())
    units = ", ".join(f"{name} ({info.units(i) or 'no unit'})" for i, name in enumerate(info.names))
    notes = [
        f"{len(files)} file{'s' * (len(files) > 1)}, {shape[0]} frames of {shape[1]}x{shape[2]}, {units}; dimensions: "
        f"{read}"
    ]
    if info.forcings:
        notes.append(f"forcings, given and not forecast: {', '.join(info.forcings)}")
    if times is None:
        order = "the files are in the order of their names" if len(files) > 1 else "the frames are in the file's order"
        notes.append(f"times: none, {order}")
    elif info.calendar:
        step = ""
        if len(times) > 1 and not breaks:
            months, _ = whole_months(times, info.calendar)
            step = f", every {lead_names([usual_step(times)], months)[0] if months else span(usual_step(times))}"
        span_of_all = " to ".join(moment(time, info.calendar) for time in (times.min(), times.max()))
        notes.append(f"times: {span_of_all}{step}, from {first.part.times.source}")
    else:
        notes.append(f"times: the numbers {times.min():g} to {times.max():g}, from {first.part.times.source}")
    if breaks:
        notes.append(f"sequences: {len(breaks) + 1}, each stands for itself")
    if said := "; ".join(dict.fromkeys(f.said for f in first.fields if f.said)):
        notes.append(f"values: the file says {said}, which is not applied")
    flags = sorted({flag for f in first.fields for flag in f.selection.flags})
    if flags:
        notes.append(f"missing: the stored {', '.join(f'{flag:g}' for flag in flags)}, by the file's attributes")
    return notes + [f.doubt for f in first.fields if f.doubt]
