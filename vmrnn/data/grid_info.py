"""What is known of a gridded field beside its values, and how a forecast becomes a field of the same kind."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from vmrnn.data.times import EPOCH, calendar_features, later_times, step_notes, usual_step
from vmrnn.data.units import same_unit
from vmrnn.errors import UserError

INDEX, COORDINATES = "grid.json", "grid.nc"  # the files of a GridInfo beside the cached frames


def import_xarray():
    """The module xarray, imported at the first use: it takes a second, and only gridded fields need it."""
    try:
        import xarray
    except ImportError as error:
        raise UserError("gridded fields are read with xarray: pip install xarray 'h5netcdf[h5py]'") from error
    return xarray


def unpacked(variable):
    """The values of a coordinate, an xarray.Variable whose values are still packed."""
    dataset = import_xarray().Dataset({"v": variable})
    return import_xarray().decode_cf(dataset, decode_times=False, decode_coords=False)["v"].values


def direction_of(values):
    """1 if the values of a coordinate (n,) rise, -1 if they fall, else 0. Longitudes that jump to -180 rise."""
    steps = np.diff(values.astype(np.float64))
    known = steps[np.isfinite(steps)]  # maps of latitudes may lack those of their corners
    return int(np.sign(np.median(known))) if len(known) else 0


def unlike_level(level, other):
    """Whether two levels, as Channel.level_text, are known and not the same. A unit that one lacks is not compared."""
    known = level and other and level != other
    return bool(known) and not (level.startswith(f"{other} ") or other.startswith(f"{level} "))


def label_notes(labels, others, other):
    """Lines about scalar coordinates that have another value than the same ones of other fields.

    labels   of these fields, from grid_axes.labels_of
    others   of the other fields
    other    what is said of their value, such as "was {} in the training"
    """
    known = dict(label.split(" ", 1) for label in others)
    return [
        f"{name} is {value}, but {other.format(known[name])}: make sure that it is the same field"
        for name, value in (label.split(" ", 1) for label in labels)
        if value != known.get(name, value)
    ]


def facts_of_training(value_range):
    """(names, units, levels) of the channels of a ValueRange. One of an older checkpoint has no levels, only ""."""
    return value_range.names, value_range.units, value_range.levels or ("",) * len(value_range.names)


@dataclass(frozen=True)
class Channel:
    """One channel of the frames.

    name         such as t2m, or u@850 for one level of a variable with several
    variable     in the file, with the groups in front of it: image1/image_data
    level        {dimension: position} where the variable has dimensions beside time, y and x
    value        {dimension: coordinate value at that position}
    level_text   the level with its unit, such as 850 hPa, where a dimension or a scalar coordinate names it;
                 "": none does
    """

    name: str
    variable: str
    level: dict = field(default_factory=dict)
    value: dict = field(default_factory=dict)
    level_text: str = ""


@dataclass
class GridInfo:
    """Names, units, coordinates and times of the frames of a gridded field.

    channels      list of Channel that are forecast, in the order of the frames' last axis
    forcings      names of the channels behind them, which are given and never forecast
    given_units   of the forcings, "" where the file names none
    given_levels  of the forcings, as Channel.level_text
    variables     {variable: its attributes} of what is forecast, units among them, without those that say how
                  values are packed
    y, x          names of the dimensions of rows and columns
    coordinates   xarray.Dataset of all that does not change with time: coordinates of y and x, the map projection, and
                  the attributes of the file
    time          name of the time dimension of a forecast
    time_facts    attributes of the time coordinate, with a unit only where its numbers are no dates
    time_source   where the times come from, in words; "" where frames have no times
    calendar      CF name of the times' calendar; "" where they count frames and are no dates
    labels        what scalar coordinates say of the fields, see grid_axes.labels_of, and of each variable what the
                  file says of its values that is not applied, such as image_data gain 0.5
    times         float64 (T,), see vmrnn.data.times; None where frames have no times
    """

    channels: list
    forcings: list
    variables: dict
    y: str
    x: str
    coordinates: object
    time: str = "time"
    time_facts: dict = field(default_factory=dict)
    time_source: str = ""
    calendar: str = ""
    given_units: list = field(default_factory=list)
    given_levels: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    times: np.ndarray | None = None

    @property
    def names(self):
        """The names of the channels that are forecast."""
        return [channel.name for channel in self.channels]

    def units(self, channel):
        """The unit of a channel, "" where the file names none."""
        return str(self.variables[self.channels[channel].variable].get("units", ""))

    @property
    def all_units(self):
        return [self.units(channel) for channel in range(len(self.channels))]

    @property
    def levels(self):
        """The level of each channel as text, "" where the file names none."""
        return [channel.level_text for channel in self.channels]

    def named(self, value_range, options, path):
        """The ValueRange with names, units and levels of the fields: those of the training, or these where it has none.

        value_range   of the training; it has no names if the network was trained on arrays
        options       Config
        path          of these fields, for messages

        UserError: the fields are not those of the training, by unit, by order, by level (one that is asked for as u@500
        is meant) or, if no variables are named, by name.
        """
        if not value_range.names:
            given = value_range.given
            if given and self.forcings:
                given = replace(given, names=tuple(self.forcings), units=tuple(self.given_units),
                                levels=tuple(self.given_levels))  # fmt: skip
            return replace(
                value_range, names=tuple(self.names), units=tuple(self.all_units), levels=tuple(self.levels),
                given=given, step=self.step(options), directions=self.directions, labels=tuple(self.labels),
            )  # fmt: skip
        fields = [*zip(self.names, self.all_units, self.levels, *facts_of_training(value_range))]
        given, forcings = value_range.given, []
        if given and self.forcings:
            forcings = [*zip(self.forcings, self.given_units, self.given_levels, *facts_of_training(given))]
        for name, unit, _, trained_name, trained_unit, _ in (*fields, *forcings):
            if not same_unit(unit, trained_unit):
                raise UserError(f"{path}: {name} is in {unit or 'no unit'}, but the network was trained on "
                                f"{trained_name} in {trained_unit or 'no unit'}; give the same field, or write the "
                                "same unit if both mean one")  # fmt: skip
        for name, _, _, trained_name, _, _ in fields:
            if name != trained_name and name in value_range.names:
                raise UserError(f"{path}: holds {', '.join(self.names)}, but the network was trained on "
                                f"{', '.join(value_range.names)}; name them with variables in this order")  # fmt: skip
            if name != trained_name and not options.variables:
                raise UserError(f"{path}: holds {name}, but the network was trained on {trained_name}; name it with "
                                "variables if it is the same")  # fmt: skip
        asked = {variable.partition("@")[0] for variable in options.variables if "@" in variable}
        for name, _, level, trained_name, _, trained_level in (*fields, *forcings):
            meant = name != trained_name and name.partition("@")[0] in asked
            if unlike_level(level, trained_level) and not meant:
                raise UserError(f"{path}: {name} is at {level}, but the network was trained on {trained_name} at "
                                f"{trained_level}; give the same level, or leave its coordinate out of the file if it "
                                "makes no difference")  # fmt: skip
        return value_range

    def notes(self, value_range, options):
        """Lines about what is not as in the training, or cannot be compared with it.

        value_range   of the training
        options       Config
        """
        if not value_range.names:
            fields = ", ".join(f"{name} in {unit or 'no unit'}" for name, unit in zip(self.names, self.all_units))
            return [f"the network was trained on data without units: whether they were {fields} is not checked"]
        lines = step_notes(self.step(options), value_range.step)
        lines += label_notes(self.labels, value_range.labels, "was {} in the training")
        for dim, direction, trained in zip((self.y, self.x), self.directions, value_range.directions):
            if direction and trained and direction != trained:
                lines.append(f"the coordinate {dim} is {direction}, but was {trained} in the training: turn the maps")
        return lines

    def step(self, options):
        """Seconds from one frame that is taken to the next; 0: the frames have no dates."""
        if not self.calendar or self.times is None or len(self.times) < 2:
            return 0.0
        return usual_step(self.times) * options.frame_step

    @property
    def directions(self):
        """Whether the coordinates of rows and columns are rising or falling; "" where there are none."""
        found = []
        for name in (self.y, self.x):
            values = self.coordinates[name].values if name in self.coordinates.coords else np.zeros(0)
            known = values.ndim == 1 and values.dtype.kind in "iuf"
            found.append({1: "rising", -1: "falling"}.get(direction_of(values), "") if known else "")
        return tuple(found)

    @property
    def latitude(self):
        """Latitude of each row (H, 1), column (1, W) or pixel (H, W), in degrees; None where the file has none."""
        for coordinate in self.coordinates.variables.values():
            facts, dims = coordinate.attrs, coordinate.dims
            unit = str(facts.get("units", "")).lower()
            if facts.get("standard_name") == "latitude" or unit in DEGREES_NORTH:
                if dims and set(dims) <= {self.y, self.x}:
                    sizes = dict.fromkeys((self.y, self.x), 1) | dict(coordinate.sizes)
                    values = np.asarray(coordinate.set_dims(sizes).transpose(self.y, self.x).values, np.float64)
                    return np.rad2deg(values) if unit in ("rad", "radian", "radians") else values
        return None

    def next_times(self, times, count):
        """The times of the `count` frames that follow frames at `times`, float64 (count,)."""
        return later_times(times, count, self.calendar)

    def decoded_times(self, times):
        """Times as numpy or cftime dates, or as the numbers of the file where it counts frames."""
        if not self.calendar:
            whole = np.rint(times)
            return whole.astype(np.int64) if np.array_equal(whole, times) else np.asarray(times)
        xarray = import_xarray()
        coded = xarray.Variable("time", np.asarray(times), {"units": EPOCH, "calendar": self.calendar})
        return xarray.decode_cf(xarray.Dataset({"time": coded}))["time"].values

    def lead_time(self, valid, reference):
        """The coordinate of the lead times of forecasts: (values (T,), attributes).

        valid       times of the forecast frames of each sequence, float64 (S, T)
        reference   time of the last given frame of each sequence, float64 (S,)

        Sequences whose lead times differ by a second or more, as those of months do, have the numbers of the
        frames instead.
        """
        leads = valid - reference[:, None]
        if np.ptp(leads, axis=0).max() >= 1:
            return np.arange(1, leads.shape[1] + 1), {"long_name": "number of the forecast frame", "units": "1"}
        facts = {"standard_name": "forecast_period", "long_name": "time since the last given frame"}
        if not self.calendar:
            return leads[0], facts | self.time_unit
        return np.round(leads[0] * 1e9).astype("timedelta64[ns]"), facts

    @property
    def time_unit(self):
        """{"units": ...} of times that are numbers without a date; {} where they have none, or are dates."""
        return {key: self.time_facts[key] for key in ("units",) if key in self.time_facts}

    def calendar_features(self, times):
        """Sine and cosine of the hour of the day and of the day of the year (UTC), float32 (T, 4), scaled to [0, 1].

        UserError: times that are no dates.
        """
        if not self.calendar:
            raise UserError("calendar: the frames have no dates, from which hour and day would come; leave it out")
        return calendar_features(self.decoded_times(times))

    def dataset(self, frames, times=None, extra=()):
        """Frames as an xarray.Dataset with the names, units, coordinates and attributes of the input.

        frames   float (..., H, W, C) in the units of the data; NaN where a value is missing
        times    float64 (T,), T being the length of the axis before H; None: no time coordinate
        extra    names of the axes before time, such as ("sequence",)

        Rows and columns get the coordinates of the file where there are as many as in the file. A variable with levels
        has them back as a dimension, and one level alone is a scalar coordinate. The attributes are those of CF.
        """
        xarray = import_xarray()
        # Coordinates that fit the frames: of other sizes than the file's, such as crops, rows and columns have none
        sizes = dict(zip((self.y, self.x), frames.shape[-3:-1]))
        fits = {name: v for name, v in self.coordinates.coords.items()
                if all(sizes.get(dim, size) == size for dim, size in v.sizes.items())}  # fmt: skip
        alone = {dim for channel in self.channels for dim in channel.level if dim not in channel.value}
        fits = {name: v.isel({dim: 0 for dim in v.dims if dim in alone}) for name, v in fits.items()}
        if times is not None:
            dated = {"standard_name": "time", "axis": "T"} if self.calendar else {}
            fits[self.time] = (self.time, self.decoded_times(times), dated | self.time_facts)
        # Variables: with their levels as a dimension, or each level for itself
        axes, found = (*extra, self.time), {}
        levels = self.shared_levels()
        for variable, facts in self.variables.items():
            places = [i for i, channel in enumerate(self.channels) if channel.variable == variable]
            name, dim = variable.replace("/", "_"), levels[variable]
            if dim:
                values = np.stack([frames[..., i] for i in places], axis=-3)
                found[name] = ((*axes, dim, self.y, self.x), values, facts)
                of_dim = self.coordinates[dim].attrs if dim in self.coordinates.coords else {}
                fits[dim] = (dim, [self.channels[i].value[dim] for i in places], of_dim)
            else:
                for i in places:
                    value = self.channels[i].value
                    label = self.channels[i].name.replace("/", "_")
                    found[label if value else name] = ((*axes, self.y, self.x), frames[..., i], facts | value)
        whole = xarray.Dataset(found, fits, {"Conventions": "CF-1.7"} | self.coordinates.attrs)
        for name, variable in whole.variables.items():
            # Where xarray looks for them: it would list projections and bounds among the coordinates of the fields
            variable.encoding = {
                key: variable.attrs.pop(key) for key in ("grid_mapping", "bounds") if key in variable.attrs
            }
            if name in whole.coords:
                variable.encoding["_FillValue"] = None  # coordinates have none, and xarray would write NaN
        return whole

    def shared_levels(self):
        """{variable: its one dimension of levels, or None}: None where variables have different levels of one name."""
        found, values = {}, {}
        for variable in self.variables:
            channels = [channel for channel in self.channels if channel.variable == variable]
            dims = {tuple(channel.value) for channel in channels}
            (dim,) = dims if len(dims) == 1 else (None,)
            found[variable] = dim[0] if dim and len(dim) == 1 else None
            if found[variable]:
                values.setdefault(dim[0], set()).add(tuple(channel.value[dim[0]] for channel in channels))
        return {variable: dim if dim and len(values[dim]) == 1 else None for variable, dim in found.items()}

    def save(self, folder):
        """Writes it beside the frames in `folder`; `load` reads it."""
        facts = {key: value for key, value in vars(self).items() if key not in ("coordinates", "times", "channels")}
        facts["channels"] = [asdict(channel) for channel in self.channels]
        facts["times"] = None if self.times is None else [float(time) for time in self.times]
        (Path(folder) / INDEX).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        self.coordinates.to_netcdf(Path(folder) / COORDINATES, engine="h5netcdf")

    @classmethod
    def load(cls, folder):
        """What `save` wrote into `folder`; None where there is none, so of frames that are no gridded field."""
        index = Path(folder) / INDEX
        if not index.exists():
            return None
        facts = json.loads(index.read_text(encoding="utf-8"))
        facts["channels"] = [Channel(**channel) for channel in facts["channels"]]
        facts["times"] = None if facts["times"] is None else np.array(facts["times"])
        with import_xarray().open_dataset(Path(folder) / COORDINATES, engine="h5netcdf", decode_cf=False) as stored:
            # NetCDF does not tell a coordinate from a variable unless a field names it
            stored.attrs.pop("coordinates", None)
            return cls(coordinates=stored.load().set_coords(list(stored.data_vars)), **facts)


DEGREES_NORTH = ("degrees_north", "degree_north", "degree_n", "degrees_n", "degreen", "degreesn")


def plain_attributes(attributes):
    """Attributes as json and NetCDF can both hold: texts, numbers and lists of them; others as their text."""
    kept = {}
    for name, value in attributes.items():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, np.ndarray | np.generic):
            value = value.tolist() if np.asarray(value).dtype.kind in "biufU" else str(value)
        if isinstance(value, bool) or value is None or isinstance(value, dict):
            value = str(value)
        if isinstance(value, list | tuple):
            kinds = {type(part) for part in value}
            value = list(value) if len(kinds) == 1 and kinds <= {int, float, str} and value else str(value)
        kept[str(name)] = value if isinstance(value, int | float | str | list) else str(value)
    return kept
