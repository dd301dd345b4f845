"""The times of a file's frames: from a coordinate, a scalar variable, an attribute or the file's name."""

import re
import warnings
from dataclasses import dataclass, field

import numpy as np

from vmrnn.data.grid_axes import T_NAMES, facts_of, is_reference, is_time
from vmrnn.data.grid_files import NUMBERS, format_of, open_groups
from vmrnn.data.grid_info import import_xarray, plain_attributes
from vmrnn.data.grid_values import OF_VALUES, PACKING
from vmrnn.data.times import EPOCH, STANDARD, dates_of, import_cftime, time_from_name, time_from_text
from vmrnn.errors import UserError

# Attributes that hold a frame's time where a file has no variable for it
TIME_ATTRIBUTES = ("valid_time", "time", "datetime", "date_time", "nominal_time", "product_datetime_end",
                   "time_coverage_start")  # fmt: skip
# Names of CF for one calendar
SAME_CALENDARS = {"gregorian": "standard", "365_day": "noleap", "366_day": "all_leap"}


def coded_times(values, attributes, path):
    """(times, calendar) of the values of a time variable; calendar "" where they are plain numbers, not dates.

    UserError: a time that is missing, a unit that is none of time.
    """
    xarray = import_xarray()
    values = np.asarray(values)
    if values.dtype.kind in "SUOT":
        seconds = [time_from_text(plain_attributes({"v": value})["v"]) for value in values.ravel()]
        return (None, "") if None in seconds else (np.reshape(seconds, values.shape), "standard")
    if values.dtype.kind not in "iufM":
        return None, ""
    # The values of other attributes, such as bounds, are of no use here
    facts = {key: attributes[key] for key in ("calendar", "_Unsigned", *NUMBERS) if key in attributes}
    stored = xarray.Dataset({"time": xarray.Variable([f"d{i}" for i in range(values.ndim)], values, facts)})
    numbers = xarray.decode_cf(stored, decode_times=False)["time"].values
    if (np.isnat(numbers) if numbers.dtype.kind == "M" else np.isnan(numbers)).any():
        raise UserError(f"{path}: a frame has no time; leave it out or fill in its time")
    unit = re.sub("(?i) since ", " since ", str(attributes.get("units", "")))
    if " as %" in unit:
        raise UserError(f"{path}: its times are in the unit {unit!r}; write them as days since a date (cdo -r copy)")
    if " since " not in unit and values.dtype.kind != "M":
        dates = None if unit else dates_of_numbers(numbers.ravel())
        return (numbers.astype(np.float64), "") if dates is None else (np.reshape(dates, numbers.shape), "standard")
    calendar = str(attributes.get("calendar", "standard")).lower()
    calendar = SAME_CALENDARS.get(calendar, calendar)
    if values.dtype.kind != "M":
        stored["time"].attrs["units"] = unit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dates = xarray.decode_cf(stored)["time"].values
        if dates.dtype.kind != "M":
            cftime = import_cftime(calendar, path)
            return np.asarray(cftime.date2num(dates, EPOCH, calendar=calendar), np.float64), calendar
    except (ValueError, OverflowError) as error:
        if calendar not in STANDARD:
            import_cftime(calendar, path)  # xarray's error does not name the package that is missing
        raise UserError(f"{path}: its times, {unit!r} in the calendar {calendar}, cannot be read; write them as "
                        "days since a date in a calendar of CF (cdo -r copy)") from error  # fmt: skip
    # Such dates lie behind the reform of the calendar, so that the proleptic one is the same
    return dates.astype("datetime64[ns]").astype(np.int64) / 1e9, "standard"


def dates_of_numbers(numbers):
    """Seconds since 1970-01-01 of numbers without a unit that are dates: 20240131, 2024013123, or 202401 for a month.

    None: not all of them are.
    """
    texts = [f"{number:.0f}" for number in numbers]
    if not texts or (numbers != np.round(numbers)).any():
        return None
    return dates_of([text + "01" if len(text) == 6 else text for text in texts])


def joined(variable, axis):
    """A variable of single characters, the form of texts in NetCDF-3 and in WRF, as one of texts; others as they are.

    axis   name of the time dimension, which is not that of the characters
    """
    if variable.dtype != "S1" or variable.ndim == 0 or variable.dims[-1] == axis:
        return variable
    texts = np.ascontiguousarray(variable.values).view(f"S{variable.shape[-1]}")[..., 0]
    return import_xarray().Variable(variable.dims[:-1], texts, variable.attrs)


@dataclass
class FrameTimes:
    """Times of a file's frames: float64 (T,) or (N, T), None where there are none; where from, and of which kind."""

    values: np.ndarray | None = None
    source: str = ""
    calendar: str = ""
    facts: dict = field(default_factory=dict)


def find_times(dataset, roles, path, time_from):
    """The times of a file's frames.

    dataset     the group of the file that holds the field
    roles       of its dimensions (read_roles)
    time_from   "" or name:FORM, attribute:NAME, variable:NAME, which goes before all else

    A time dimension has them in its coordinate or in another variable over it, see best_times. A file with one frame
    and no time dimension has its time in a scalar variable or, if there is none, in an attribute. Its name counts only
    if time_from says so. Times at which forecasts began count only where the file has none for which they hold.
    UserError: time_from names nothing in the file, or two scalar variables may be the time.
    """
    kind, _, wanted = time_from.partition(":")
    if time_from and (kind not in ("name", "attribute", "variable") or not wanted):
        raise UserError(f"time_from {time_from!r}: give name:FORM (name:%Y%m%d%H%M), attribute:NAME or variable:NAME")
    axis = next((dim for dim, letter in roles.items() if letter == "T"), None)
    if axis is not None and dataset.sizes[axis] > 1 and kind not in ("variable", ""):
        raise UserError(f"{path}: time_from {time_from} gives one time, but it has {dataset.sizes[axis]} frames")
    if kind == "variable":
        return scalar_or_axis(dataset, wanted, axis, path)
    # Coordinate of the time dimension, or a variable over it
    if axis is not None and not time_from:
        name = best_times(dataset, roles, axis)
        if name is not None and not (dataset.sizes[axis] == 1 and is_reference(name, dataset.variables[name])):
            return scalar_or_axis(dataset, name, axis, path)
        if dataset.sizes[axis] > 1:
            return FrameTimes()
    # One frame
    if not time_from:
        scalars = [name for name, v in dataset.variables.items() if v.size == 1 and is_time(v)]
        scalars = [name for name in scalars if not is_reference(name, dataset.variables[name])] or scalars
        named = [name for name in scalars if facts_of(dataset.variables[name])["standard_name"] == "time"]
        named = named or [name for name in scalars if name in T_NAMES] or scalars
        if len(named) > 1:
            raise UserError(
                f"{path}: {' and '.join(map(str, named))} may be its time; pick with time_from variable:NAME"
            )
        if named:
            return scalar_or_axis(dataset, named[0], None, path)
    if kind in ("attribute", ""):
        found = time_attribute(dataset, path, wanted)
        if found:
            return found
        if kind:
            raise UserError(f"{path}: no attribute {wanted} in it that holds a time; name another in time_from")
    if kind == "name":
        return FrameTimes(np.array([time_from_name(path, wanted)]), f"the file's name ({wanted})", "standard")
    return FrameTimes()


def best_times(dataset, roles, axis):
    """The name of the variable over the time dimension that holds the times of its frames; None: there is none.

    dataset   the group of the file that holds the field
    roles     of its dimensions
    axis      name of the time dimension

    Times for which the frames hold go before those at which forecasts began; then dates before plain numbers,
    such as hours after the first frame; then the standard_name time or the name valid_time; then the coordinate
    of the dimension; then Times, the name in WRF.
    """
    names = [axis, "valid_time", "Times", *(name for name, v in dataset.variables.items() if is_time(v))]
    found = {name: joined(dataset.variables[name], axis) for name in names if name in dataset.variables}
    over = {name: v for name, v in found.items()
            if axis in v.dims and all(roles.get(dim) in ("N", "T") for dim in v.dims)}  # fmt: skip

    def rank(name):
        facts = facts_of(over[name])
        dated = over[name].dtype.kind in "MSUO" or " since " in facts["units"]
        return is_reference(name, over[name]), not dated, facts["standard_name"] != "time" and name != "valid_time"

    return min(over, key=rank, default=None)


def scalar_or_axis(dataset, name, axis, path):
    """FrameTimes from a variable: over the dimension `axis`, or of one value. UserError: there is none such."""
    if name not in dataset.variables:
        raise UserError(f"{path}: no variable {name} in it; it has {', '.join(map(str, dataset.variables))}")
    variable = joined(dataset.variables[name], axis)
    if axis in variable.dims:
        variable = variable.transpose(..., axis)
    values, calendar = coded_times(variable.values, variable.attrs, path)
    if values is None:
        raise UserError(f"{path}: {name} holds no times; name another with time_from variable:NAME")
    what = f"the coordinate {name}" if axis else f"the variable {name}"
    if is_reference(name, variable):
        what += ", the times at which forecasts began"
    coded = ("units", "calendar") if calendar else ("calendar",)  # a forecast has dates in a unit of its own
    facts = plain_attributes(
        {k: v for k, v in variable.attrs.items() if k not in (*coded, *PACKING, *OF_VALUES, "bounds")}
    )
    return FrameTimes(values if values.ndim else values[None], what, calendar, facts)


def time_attribute(dataset, path, wanted=""):
    """FrameTimes from an attribute of the file, of the field's group or (HDF5) of another group; None: there is none.

    wanted   its name, with its group in front: overview/product_datetime_end; "": one of TIME_ATTRIBUTES
    """
    attributes = dict(dataset.attrs)
    if format_of(path) in ("hdf5", "zarr"):
        attributes = {**group_attributes(path), **attributes}
    for name in [wanted] if wanted else TIME_ATTRIBUTES:
        for key, value in attributes.items():
            if key == name or (key.rpartition("/")[2] == name and not wanted):
                seconds = time_from_text(plain_attributes({"v": value})["v"])
                if seconds is not None:
                    return FrameTimes(np.array([seconds]), f"the attribute {key}", "standard")
    if not wanted and {"what/date", "what/time"} <= set(attributes):  # ODIM
        seconds = time_from_text(f"{attributes['what/date']}{attributes['what/time']}")
        if seconds is not None:
            return FrameTimes(np.array([seconds]), "the attributes what/date and what/time", "standard")
    return None


def group_attributes(path):
    """{group/name: value} of the attributes of all groups of an HDF5 or Zarr file."""
    found = {}
    for group, dataset in open_groups(path).items():
        found |= {f"{group}/{name}".strip("/"): value for name, value in dataset.attrs.items()}
        dataset.close()
    return found
