"""What one file of a gridded field holds: its dimensions, channels, types, coordinates and times, but no values."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vmrnn.data.grid_axes import (
    LEAD_NAMES,
    REFERENCE_NAMES,
    is_lead,
    is_reference,
    is_time,
    labels_of,
    levels_of,
    place_names,
    read_roles,
    unlike_place,
)
from vmrnn.data.grid_files import NUMBERS, find_variables, format_of, opened, split_path
from vmrnn.data.grid_info import Channel, GridInfo, import_xarray, plain_attributes, unpacked
from vmrnn.data.grid_times import TIME_ATTRIBUTES, FrameTimes, find_times
from vmrnn.data.grid_values import OF_VALUES, PACKING, missing_flags, not_applied, stored_type
from vmrnn.data.units import same_unit
from vmrnn.errors import UserError


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
    """One file of a gridded field: its frames are one sequence (or, where it has a dimension N, several) of `count`.

    path         of the file
    sequences    how many sequences it holds
    count        frames of each
    times        FrameTimes of the frames
    selections   list of Selection, the variables and then the forcings: a file may have dimensions and levels in an
                 order of its own
    """

    path: Path
    sequences: int
    count: int
    times: FrameTimes
    selections: list

    @property
    def frames(self):
        return self.sequences * self.count

    def steady(self, forcings):
        """Per forcing, whether it is known not to change with time: it lies in another file or has no time dimension.

        forcings   how many there are
        """
        timed = "T" in self.selections[0].letters
        forced = self.selections[len(self.selections) - forcings :]
        return [s.path is not None or (timed and "T" not in s.letters) for s in forced]


@dataclass
class Field:
    """What one file says of one variable that was asked for.

    selection    Selection
    roles        of its dimensions
    size         (sequences, frames of each, rows, columns)
    dtype        of its values once they are unpacked
    channels     list of Channel, one per level
    attributes   that its forecast gets
    said         what the file says of its values that is not applied
    label        the same as one of GridInfo.labels; "": it says nothing
    doubt        a line about values that may be read as missing by mistake; "": there is none
    facts        what all files must share, {what: text}
    """

    selection: Selection
    roles: dict
    size: tuple
    dtype: np.dtype
    channels: list
    attributes: dict
    said: str
    label: str
    doubt: str
    facts: dict


@dataclass
class Description:
    """What is in one file.

    info     GridInfo without times
    part     Part
    fields   list of Field: the variables, then the forcings
    """

    info: GridInfo
    part: Part
    fields: list

    @property
    def dtype(self):
        """The type of all channels together."""
        return np.result_type(*(f.dtype for f in self.fields))


def describe(path, variables, array_axes, time_from, forcings=()):
    """The Description of one file. No values of its fields are read."""
    fields, coordinates, times = [], {}, None
    for asked in (*variables, *forcings):
        given = len(fields) >= len(variables)
        place, name = file_of(asked) if given else (None, asked)
        source = place or path  # the file of this field
        variable, _, level = name.partition("@")
        with opened_dataset(source, variable) as dataset:
            found = describe_field(dataset, variable, level, source, "" if given else array_axes)
            # A field is like the first one, but a forcing may have no time and may lie in another file.
            if fields:
                check_size(asked, found, variables[0], fields[0], given, place, path)
                if not place and not time_from:
                    check_times(asked, found, variables[0], fields[0], dataset, times, path)
            else:
                times = find_times(dataset, found.roles, path, time_from)
            if given and len(found.channels) > 1:
                one = next(iter(found.channels[0].value.values()))
                raise UserError(
                    f"{source}: the forcing {asked} has {len(found.channels)} levels; name one: {asked}@{one}"
                )
            steady = steady_coordinates(dataset, found.roles)
            if fields:
                of = (path, place) if place else (variables[0], f"{path}: {asked}")
                check_same_place(coordinates, fields[0].roles, steady, found.roles, *of)
            if not place:
                coordinates = steady | coordinates
                attributes = plain_attributes({k: v for k, v in dataset.attrs.items() if not of_time(k)})
        found.selection = replace(found.selection, path=place)
        fields.append(found)

    first, forecast = fields[0], fields[: len(variables)]
    count = first.size[1]
    if times.values is not None and times.values.shape[-1] != count:
        raise UserError(f"{path}: {times.source} has {times.values.shape[-1]} times for {count} frames; name another")
    dims = {letter: plain_dim(dim, letter) for dim, letter in first.roles.items()}
    # A dimension of leads or of reference times holds the times of the frames in a forecast
    began = dims.get("T", "").lower() in (*LEAD_NAMES, *REFERENCE_NAMES)
    steady = import_xarray().Dataset(coords=coordinates, attrs=attributes)
    info = GridInfo(
        channels=[channel for f in forecast for channel in f.channels],
        forcings=[file_of(name)[1] for name in forcings],
        given_units=[str(f.attributes.get("units", "")) for f in fields[len(variables) :]],
        given_levels=[f.channels[0].level_text for f in fields[len(variables) :]],
        variables={f.selection.variable: f.attributes for f in forecast},
        y=dims["H"], x=dims["W"], time="time" if times.calendar and began else dims.get("T", "time"),
        coordinates=steady, labels=[*labels_of(steady.coords), *(f.label for f in fields if f.label)],
    )  # fmt: skip
    return Description(info, Part(path, *first.size[:2], times, [f.selection for f in fields]), fields)


def describe_field(dataset, variable, level, path, array_axes):
    """The Field of a variable.

    dataset      the group of the file that holds it
    variable     its name, with the groups in front
    level        as in levels_of
    path         of the file
    array_axes   as in read_roles
    """
    name = split_path(variable)[1]
    found = dataset.variables[name]
    if found.dtype.kind not in "buif":
        raise UserError(f"{path}: {variable} holds {found.dtype}, no numbers; name another")
    if 0 in found.shape:
        shape = ", ".join(f"{dim} {size}" for dim, size in found.sizes.items())
        raise UserError(f"{path}: {variable} is empty ({shape}); leave the file out")
    for key in NUMBERS:
        value = found.attrs.get(key)
        if isinstance(value, str | bytes) or (key == "valid_range" and value is not None and np.size(value) != 2):
            raise UserError(
                f"{path}: {variable} has {key} {str(value)[:40]!r}, which cannot be used; correct the attribute"
            )
    # Dimensions and levels
    roles = read_roles(dataset, name, array_axes, path)
    sizes = {letter: found.sizes[dim] for dim, letter in roles.items()}
    levels = levels_of(dataset, name, roles, level, path)
    channels = [Channel(channel_name(variable, value), variable, at, value, text) for _, at, value, text in levels]
    # Values
    flags, said = missing_flags(path, variable, found.attrs)
    # The groups of HDF5 are not in the file of a forecast, whose numbers are stored ones as well
    attributes = ({"comment": f"stored numbers: {said}"} if said else {}) | field_attributes(found)
    unused = {key: f"{key} {str(value)[:60]}" for key, value in not_applied(found.attrs, flags).items()}
    # Files may differ in how much is missing, such as percent_missing
    alike = ", ".join(filter(None, [said, *(text for key, text in unused.items() if "missing" not in key.lower())]))
    said = ", ".join(filter(None, [said, *unused.values()]))
    doubt = ""
    if format_of(path) == "zarr" and np.ravel(found.attrs.get("_FillValue", np.nan))[0] == 0:
        # Zarr 2 gives every array that is made without one the fill value 0, and xarray takes it for missing
        doubt = (
            f"missing: 0, the fill value of {variable} in Zarr; if 0 is a value, set fill_value to null in its .zarray"
        )
    selection = Selection(variable, "".join(roles.values()), tuple(position for position, *_ in levels), tuple(flags))
    facts = {
        f"{variable} units": str(found.attrs.get("units", "")), f"{variable} values": alike,
        f"{variable} dimensions": dims_text(found, roles), f"{variable} missing": " ".join(map(str, flags)),
        f"{variable} level": "; ".join(dict.fromkeys(channel.level_text for channel in channels)),
    }  # fmt: skip
    return Field(
        selection, roles, (sizes.get("N", 1), sizes.get("T", 1), sizes["H"], sizes["W"]),
        stored_type(found.dtype, found.attrs, flags), channels, attributes, said,
        f"{variable} {alike}" if alike else "", doubt, facts,
    )  # fmt: skip


def file_of(forcing):
    """(path or None, name) of a forcing: height, or steady.nc:height for one of another file."""
    path, _, name = forcing.rpartition(":")
    return (Path(path) if path else None), name


def check_size(asked, found, first_name, first, given, place, path):
    """UserError if a Field has other frames than the first one. A forcing without a time dimension has one frame."""
    steady = given and not {"N", "T"} & set(found.roles.values())
    if place and not steady:
        raise UserError(f"{place}: the forcing {asked} changes with time: write it into the files of {path}")
    if found.size[2:] != first.size[2:] or not (steady or found.size == first.size):
        raise UserError(f"{place or path}: {asked} has {frames_text(found.size)}, but {first_name} "
                        f"{frames_text(first.size)}; name fields that are alike")  # fmt: skip


def check_same_place(coordinates, roles, others, other_roles, name, other):
    """UserError if two fields have different coordinates of rows, columns or pixels.

    coordinates   of the first field, as steady_coordinates has them
    roles         of its dimensions
    others        coordinates of the second field
    other_roles   of its dimensions
    name, other   what the fields are called in the message
    """
    ours, theirs = (import_xarray().Dataset(coords=found) for found in (coordinates, others))
    if coordinate := unlike_place(ours, plane_of(roles), theirs, plane_of(other_roles)):
        raise UserError(f"{other}: its coordinate {coordinate} is not that of {name}; they are of different places")


def check_times(asked, found, first_name, first, dataset, times, path):
    """UserError if a Field of the same file has a time dimension of its own, with other times than the first one.

    asked        what was asked for
    found        its Field
    first_name   of the first field
    first        its Field
    dataset      the group of the file that holds `found`
    times        FrameTimes of the first field
    path         of the file
    """
    axes = [[dim for dim, letter in each.roles.items() if letter == "T"] for each in (first, found)]
    if not axes[1] or axes[0] == axes[1] or times.values is None:
        return
    own = find_times(dataset, found.roles, path, "").values
    if own is not None and not np.array_equal(own, times.values):
        raise UserError(
            f"{path}: {asked} has other times ({axes[1][0]}) than {first_name}; name fields of the same times"
        )


def plane_of(roles):
    """The names of the dimensions of rows and columns in a forecast."""
    return [plain_dim(dim, letter) for wanted in "HW" for dim, letter in roles.items() if letter == wanted]


def channel_name(variable, level):
    """t2m, or u@850 for the level {"level": 850}."""
    values = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in level.values())
    return f"{variable}@{values}" if values else variable


def plain_dim(dim, letter):
    """The name of a dimension in a forecast: HDF5 that names no dimension gets time, y and x."""
    return {"T": "time", "H": "y", "W": "x"}.get(letter, str(dim)) if str(dim).startswith("phony_dim") else str(dim)


def dims_text(variable, roles):
    """The dimensions of a variable that all files must share, as text: not time, and not the place of rows and columns.

    Several dimensions of levels keep their order, which is that of the channels.
    """
    ordered = sorted(roles.items(), key=lambda item: "NCHW".find(item[1]))
    return ", ".join(f"{plain_dim(dim, letter)} {variable.sizes[dim]}" for dim, letter in ordered if letter != "T")


def frames_text(size):
    return f"{size[0] * size[1]} frames of {size[2]}x{size[3]}"


def field_attributes(variable):
    """Attributes that a forecast of a field keeps: not those that say how values are packed, or which they are."""
    facts = plain_attributes({k: v for k, v in variable.attrs.items() if k not in (*PACKING, *OF_VALUES)})
    facts = {key: value for key, value in facts.items() if not key.startswith("STATISTICS_")}  # of GDAL
    if "grid_mapping" in variable.encoding:  # the library has decoded it
        facts["grid_mapping"] = variable.encoding["grid_mapping"]
    return facts


def steady_coordinates(dataset, roles):
    """Coordinates and map projection of a field that do not change with time: {name: (dims, values, attributes)}.

    Without how long before a frame its forecast began, and when: a forecast has these of its own.
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
        timed = is_time(coordinate.variable)
        timed = timed or (not own and (is_lead(key, coordinate) or is_reference(key, coordinate)))
        if about and coordinate.dtype.kind in "buifSU" and not timed:
            facts = {k: v for k, v in dataset.variables[key].attrs.items() if k not in PACKING}
            dims = [names.get(dim, dim) for dim in coordinate.dims]
            kept[str(key)] = (dims, unpacked(dataset.variables[key]), plain_attributes(facts))
    return kept


def of_time(attribute):
    """Whether an attribute of a file is about the times of its own frames, which are not those of a forecast."""
    return attribute in TIME_ATTRIBUTES or attribute.startswith("time_coverage_")


def check_alike(first, other, first_path, path):
    """UserError if a file has other channels, sizes, units or coordinates than the first."""
    if other.info.names != first.info.names:
        raise UserError(f"{path}: holds {other.info.names}, but {first_path} {first.info.names}; make them alike")
    for mine, its in zip(first.fields, other.fields):
        for key, value in mine.facts.items():
            alike = same_unit(its.facts[key], value) if key.endswith(" units") else its.facts[key] == value
            if not alike:
                raise UserError(f"{path}: {key} {its.facts[key] or 'none'}, but {first_path}: {value or 'none'}; "
                                "make them alike")  # fmt: skip
    ours, theirs, dims = first.info.coordinates, other.info.coordinates, (first.info.y, first.info.x)
    in_one = set(place_names(ours, dims)) ^ set(place_names(theirs, dims))
    if name := min(in_one, default=None) or unlike_place(ours, dims, theirs, (other.info.y, other.info.x)):
        raise UserError(f"{path}: its coordinate {name} is not that of {first_path}; they are of different places")
    mine, its = first.part.times, other.part.times
    if (mine.values is None) != (its.values is None) or mine.calendar != its.calendar:
        ways = f"{its.source or 'none'}, not {mine.source or 'none'}"
        raise UserError(f"{path}: its times are of another kind than those of {first_path} ({ways}); use time_from")


@contextmanager
def opened_dataset(path, variable):
    """The group of a file that holds a variable, as a Dataset: still packed, and read when values are asked for.

    UserError: the variable is not there.
    """
    group, name = split_path(variable)
    with opened(path, group, name if format_of(path) == "grib" else "") as dataset:
        if name not in dataset.variables:
            found = ", ".join(find_variables(path)[:20])
            raise UserError(f"{path}: no variable {variable} in it; it has {found or 'no field'}")
        yield dataset
