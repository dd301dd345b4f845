"""What the dimensions of a field are: sequences, time, channels, rows, columns.

Names of dimensions are those of CF (https://cfconventions.org, sections 4 and 5) and those that are common in models
and products.
"""

from dataclasses import dataclass

import numpy as np

from vmrnn.data.grid_info import DEGREES_NORTH, direction_of, plain_attributes, unpacked
from vmrnn.errors import UserError

T_NAMES = ("time", "t", "valid_time", "date", "datetime", "month", "year", "day", "hour", "step", "lead_time", "frame",
           "page")  # fmt: skip
REFERENCE_NAMES = ("forecast_reference_time", "reference_time", "reftime", "initial_time", "init_time", "analysis_time")
LEAD_NAMES = ("step", "lead_time", "leadtime", "forecast_period")
Y_NAMES = ("y", "lat", "latitude", "rlat", "nav_lat", "south_north", "northing", "row", "rows", "line", "lines", "nlat",
           "ny", "nj", "j", "height")  # fmt: skip
X_NAMES = ("x", "lon", "long", "longitude", "rlon", "nav_lon", "west_east", "easting", "col", "cols", "column",
           "columns", "pixel", "pixels", "nlon", "nx", "ni", "i", "width")  # fmt: skip
Y_STANDARD = ("latitude", "grid_latitude", "projection_y_coordinate")
X_STANDARD = ("longitude", "grid_longitude", "projection_x_coordinate")
Z_NAMES = ("level", "lev", "levels", "plev", "pressure", "pressure_level", "isobaricinhpa", "isobaricinpa", "height",
           "heightaboveground", "heightabovesea", "altitude", "depth", "sigma", "hybrid", "z")  # fmt: skip
PRESSURES = {"pa": 0.01, "hpa": 1, "mbar": 1, "mb": 1, "millibar": 1, "millibars": 1}  # units in hPa
DEGREES_EAST = ("degrees_east", "degree_east", "degree_e", "degrees_e", "degreee", "degreese")
# Units of coordinates of places: {unit: (what it measures, its size in metres or degrees)}
PLACE_UNITS = {
    **dict.fromkeys(("m", "metre", "meter", "metres", "meters"), ("length", 1)),
    **dict.fromkeys(("km", "kilometre", "kilometer", "kilometres", "kilometers"), ("length", 1000)),
    **dict.fromkeys(("degree", "degrees", *DEGREES_NORTH, *DEGREES_EAST), ("angle", 1)),
    **dict.fromkeys(("rad", "radian", "radians"), ("angle", float(np.rad2deg(1)))),
}


def read_roles(dataset, name, array_axes, path):
    """What each dimension of a variable is: {dimension: N, T, C, H or W}, for sequences, time, channels, rows, columns.

    A dimension is told by the attributes of its coordinate (axis, standard_name, units), then by its name. Where
    neither says which are the rows and columns, they are the last two.
    array_axes   letters for the dimensions in order, such as THW; "": as above

    UserError: dimensions that array_axes does not fit, and ones that have two readings.
    """
    variable = dataset.variables[name]
    shape = ", ".join(f"{dim} {size}" for dim, size in zip(variable.dims, variable.shape))
    hint = f"{path}: {name} has the dimensions ({shape})"
    if array_axes:
        letters = array_axes.upper()
        if len(letters) != variable.ndim or not {"H", "W"} <= set(letters) <= set("NTCHW") or any(
            letters.count(letter) > 1 for letter in "NTHW"
        ):  # fmt: skip
            raise UserError(f"{hint}, which array_axes {array_axes} does not name; give one of N T C H W for each")
        return dict(zip(variable.dims, letters))
    roles = {}
    for letter, by_facts, names in (("H", is_rows, Y_NAMES), ("W", is_columns, X_NAMES), ("T", is_time, T_NAMES)):
        free = [dim for dim in variable.dims if dim not in roles]
        found = [dim for dim in free if by_facts(dataset.variables.get(dim))]
        found = found or [dim for dim in free if str(dim).lower() in names]
        if len(found) > 1:  # dimensions of one value say nothing
            found = [dim for dim in found if dataset.sizes[dim] > 1] or found[:1]
        if len(found) > 1:
            what = {"H": "rows", "W": "columns", "T": "time"}[letter]
            raise UserError(f"{hint}, of which {' and '.join(found)} may be {what}; name them with array_axes")
        roles |= {dim: letter for dim in found}
    free = [dim for dim in variable.dims if dim not in roles]
    named = sorted(roles.values())
    if "H" not in named and "W" not in named and len(free) >= 2:
        roles |= {free[-2]: "H", free[-1]: "W"}
    elif "H" not in named or "W" not in named:
        raise UserError(f"{hint}, of which rows and columns are not known; name them with array_axes")
    free = [dim for dim in variable.dims if dim not in roles]
    if "T" not in named and len(free) == 1 and str(free[0]).startswith("phony_dim"):  # HDF5 that names no dimension
        roles[free[0]] = "T"
    return {dim: roles.get(dim, "C") for dim in variable.dims}


def facts_of(coordinate):
    attributes = coordinate.attrs if coordinate is not None else {}
    return {key: str(attributes.get(key, "")).lower() for key in ("axis", "standard_name", "units")}


def is_rows(coordinate):
    facts = facts_of(coordinate)
    return facts["axis"] == "y" or facts["standard_name"] in Y_STANDARD or facts["units"] in DEGREES_NORTH


def is_columns(coordinate):
    facts = facts_of(coordinate)
    return facts["axis"] == "x" or facts["standard_name"] in X_STANDARD or facts["units"] in DEGREES_EAST


def place_names(coordinates, dims):
    """The names of the coordinates of a Dataset that say where the rows, columns and pixels of a map lie.

    dims   names of the dimensions of rows and columns
    """
    return [
        name
        for name, found in coordinates.variables.items()
        if found.dims and set(found.dims) <= set(dims) and (name in dims or is_rows(found) or is_columns(found))
    ]


@dataclass(frozen=True)
class Place:
    """A coordinate that says where the rows, the columns or the pixels of a map lie.

    name     in its file
    axis     0: it tells rows apart, 1: columns
    flat     whether it has one dimension
    kind     what it measures: its standard_name, or latitude or longitude by its unit; "": the file does not say
    unit     in small letters; "": the file names none
    values   (H, W), (H, 1) or (1, W)
    """

    name: str
    axis: int
    flat: bool
    kind: str
    unit: str
    values: np.ndarray

    @property
    def scale(self):
        """(what it measures, size of its unit): see PLACE_UNITS. Another unit measures what only itself does."""
        return PLACE_UNITS.get(self.unit, (self.unit, 1))

    def unlike(self, other):
        """Whether another coordinate of the same axis has other values.

        Lengths and angles are compared in one unit, and numbers without a unit as if they had that of the other.
        Numbers that differ by less than a hundredth of a step or by rounding to 32 bits are the same, and so are
        longitudes that differ by 360 degrees. Of maps of other sizes, such as a crop or another resolution, only the
        direction is compared.
        """
        ours, theirs = self.values, other.values
        numbers = ours.dtype.kind in "iuf" and theirs.dtype.kind in "iuf"
        if numbers and self.unit and other.unit:
            if self.scale[0] != other.scale[0]:
                return True
            ours, theirs = (place.values * np.float64(place.scale[1]) for place in (self, other))
        if any(a != b and 1 not in (a, b) for a, b in zip(ours.shape, theirs.shape)):
            return numbers and self.direction() * other.direction() < 0
        ours, theirs = np.broadcast_arrays(ours, theirs)
        if not numbers:
            return not np.array_equal(ours, theirs)
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        if "longitude" in (self.kind, other.kind):  # 350 and -10 degrees are one meridian
            theirs = theirs + 360 * np.round((ours - theirs) / 360)
        steps = abs(np.diff(ours, axis=self.axis))
        steps = steps[np.isfinite(steps)]
        near = 0.01 * np.median(steps) if len(steps) else 0
        return not np.allclose(ours, theirs, rtol=2 * np.finfo(np.float32).eps, atol=near + 1e-6, equal_nan=True)

    def beside(self, other):
        """Its name, with the units of both where they are not the same."""
        known = self.unit and other.unit
        return (
            f"{self.name} (in {self.unit}, the other in {other.unit})"
            if known and self.scale != other.scale
            else self.name
        )

    def direction(self):
        """1: its values rise with the number of the row or column; -1: they fall; 0: neither is known."""
        return direction_of(self.values.astype(np.float64).take(0, 1 - self.axis))


def places_of(coordinates, dims):
    """The coordinates of a Dataset that say where the pixels of a map lie, a list of Place.

    dims   names of the dimensions of rows and columns
    """
    found = []
    for name in place_names(coordinates, dims):
        coordinate = coordinates.variables[name].to_base_variable()
        values = coordinate.set_dims(dict.fromkeys(dims, 1) | dict(coordinate.sizes)).transpose(*dims).values
        flat = coordinate.ndim == 1
        axis = dims.index(coordinate.dims[0]) if flat else int(not is_rows(coordinate))
        unit = facts_of(coordinate)["units"]
        found.append(Place(name, axis, flat, kind_of(coordinate), unit, values))
    return sorted(found, key=lambda place: place.name not in dims)


def kind_of(coordinate):
    """What a coordinate measures: see Place."""
    facts = facts_of(coordinate)
    by_unit = {unit: "latitude" for unit in DEGREES_NORTH} | {unit: "longitude" for unit in DEGREES_EAST}
    return facts["standard_name"] or by_unit.get(facts["units"], "")


def unlike_place(ours, dims, theirs, their_dims):
    """The name of a coordinate that puts the pixels of a map elsewhere than those of another map; None: there is none.

    Units that differ stand behind the name.

    ours         xarray.Dataset with the coordinates of a map
    dims         names of its dimensions of rows and columns
    theirs       xarray.Dataset with the coordinates of the other map; the name is that of one of these
    their_dims   names of its dimensions of rows and columns

    Coordinates of rows are compared with coordinates of rows, and those of columns with those of columns: of the
    same name or, if none is, of the same kind or, if none is, the one-dimensional ones. What one of the maps lacks
    is not compared.
    """
    mine, its = places_of(ours, [*dims]), places_of(theirs, [*their_dims])
    for axis in (0, 1):
        pairs = [(a, b) for a in mine for b in its if a.axis == b.axis == axis]
        named = [(a, b) for a, b in pairs if a.name == b.name]
        alike = [(a, b) for a, b in pairs if a.kind and a.kind == b.kind]
        flat = [(a, b) for a, b in pairs if a.flat and b.flat][:1]
        for a, b in named or alike or flat:
            if a.unlike(b):
                return b.beside(a)
    return None


def rows_first(dims, coordinates):
    """The two dimensions of a map, rows first, by the attributes of their coordinates, or else by their names.

    dims          two names
    coordinates   {name: xarray.Variable}

    Where neither says which they are, they are rows and columns in this order.
    """
    by_facts = [(is_rows(coordinates.get(dim)), is_columns(coordinates.get(dim))) for dim in dims]
    by_name = [(str(dim).lower() in Y_NAMES, str(dim).lower() in X_NAMES) for dim in dims]
    for first, last in (by_facts, by_name):
        if any((*first, *last)):
            turned = (first[1] or last[0]) and not (first[0] or last[1])
            return [*reversed(dims)] if turned else [*dims]
    return [*dims]


def is_time(coordinate):
    facts = facts_of(coordinate)
    return facts["axis"] == "t" or facts["standard_name"] == "time" or " since " in facts["units"]


def is_reference(name, coordinate):
    """Whether a coordinate holds the times at which forecasts began, and not those for which they hold."""
    return facts_of(coordinate)["standard_name"] == "forecast_reference_time" or str(name).lower() in REFERENCE_NAMES


def is_lead(name, coordinate):
    """Whether a coordinate says how long before its time a forecast began."""
    return facts_of(coordinate)["standard_name"] == "forecast_period" or str(name).lower() in LEAD_NAMES


def is_vertical(name, coordinate):
    """Whether a coordinate says how high a field lies."""
    facts = facts_of(coordinate)
    upwards = str(coordinate.attrs.get("positive", "")).lower() in ("up", "down")
    return facts["axis"] == "z" or upwards or facts["units"] in PRESSURES or str(name).lower() in Z_NAMES


def scalar_levels(coordinates, names):
    """The heights that a field has without a dimension for them, a list of texts such as "850 hPa".

    coordinates   {name: xarray.Variable}
    names         of the coordinates that belong to the field
    """
    own = {name: coordinates[name] for name in names if name in coordinates}
    return [with_unit(unpacked(v).item(), v) for name, v in own.items() if v.ndim == 0 and is_vertical(name, v)]


def labels_of(coordinates):
    """What scalar coordinates say of a field, such as "band 2": a list of texts, without height and projection.

    coordinates   {name: xarray.DataArray}
    """
    of_maps = {"grid_mapping_name", "crs_wkt"}
    scalars = {name: c for name, c in coordinates.items() if c.ndim == 0 and not of_maps & {*c.attrs}}
    # 1 and 1.0 are one label
    values = {name: f"{c.item():.9g}" if c.dtype.kind == "f" else str(c.item()) for name, c in scalars.items()}
    return [f"{name} {value}" for name, value in values.items() if not is_vertical(name, scalars[name])]


def with_unit(value, coordinate):
    """A value of a coordinate with its unit, as text; all pressures are in hPa, so that 85000 Pa is 850 hPa."""
    unit = str(coordinate.attrs.get("units", ""))
    if not isinstance(value, int | float):
        return str(value)
    if unit.lower() in PRESSURES:
        value, unit = value * PRESSURES[unit.lower()], "hPa"
    return f"{value:g} {'' if unit == '1' else unit}".strip()


def levels_of(dataset, name, roles, level, path):
    """The levels of a variable, a list of (position among all, {dimension: index}, {dimension: value}, text).

    level   as text: the coordinate value of the one that is wanted; "": all

    A dimension of one value is no level that can be picked, but the text names its value too, and the height that the
    field has as a scalar coordinate. The text is "" where the file says neither.
    UserError: there is no such level, or it could be of several dimensions.
    """
    dims = [dim for dim, letter in roles.items() if letter == "C"]
    sizes = [dataset.sizes[dim] for dim in dims]
    values, named = {}, set()
    for dim, size in zip(dims, sizes):
        coordinate = dataset.variables.get(dim)
        values[dim] = (
            plain_attributes({"v": unpacked(coordinate)})["v"] if coordinate is not None else list(range(size))
        )
        if not isinstance(values[dim], list) or len(values[dim]) != size:
            values[dim] = list(range(size))
        elif coordinate is not None:
            named.add(dim)
    # CF: a field names its scalar coordinates. Those of fields that name none stand at the file.
    words = " ".join(
        str(attributes.get("coordinates", "")) for attributes in (dataset.variables[name].attrs, dataset.attrs)
    )
    scalars = scalar_levels(dataset.variables, words.split())
    wide = [dim for dim, size in zip(dims, sizes) if size > 1]
    found = []
    for position, index in enumerate(np.ndindex(*sizes)):
        place = {str(dim): i for dim, i in zip(dims, index)}
        texts = [with_unit(values[dim][i], dataset.variables[dim]) for dim, i in zip(dims, index) if dim in named]
        value = {str(dim): values[dim][place[str(dim)]] for dim in wide}
        found.append((position, place, value, ", ".join(dict.fromkeys([*texts, *scalars]))))
    if not level:
        return found
    if len(wide) != 1:
        raise UserError(
            f"{path}: {name}@{level}: {name} has {len(wide)} dimensions of levels, not one; leave @{level} out"
        )
    picked = [
        entry for entry in found if str(entry[2][str(wide[0])]) == level or same_number(entry[2][str(wide[0])], level)
    ]
    if len(picked) != 1:
        raise UserError(
            f"{path}: {name} has no level {level}; it has {', '.join(map(str, values[wide[0]]))} ({wide[0]})"
        )
    return picked


def same_number(value, text):
    try:
        return float(value) == float(text)
    except ValueError:
        return False
