"""The values of a field: unpacked, and NaN where the file allows none."""

import math
import warnings

import numpy as np

from vmrnn.data.grid_files import NUMBERS, format_of, opened, split_path
from vmrnn.data.grid_info import import_xarray, plain_attributes
from vmrnn.errors import UserError
from vmrnn.values import equals

# Attributes that say how values are packed. Reading uses them up.
PACKING = (*NUMBERS, "_Unsigned", "flag_values", "flag_meanings", "coordinates", "GDAL_NODATA")
# Attributes about the values of a variable, or that name other variables about them. They do not hold for a forecast.
OF_VALUES = ("actual_range", "ancillary_variables")
# Parts of the names, in small letters and without _, of attributes that may say what is missing or how values
# are scaled
HINTS = ("nodata", "fillvalue", "missing", "scale", "scaling", "slope", "intercept", "gain", "offset")


# Attributes of KNMI's and of ODIM's groups that say what is stored, and how it is scaled
MEANINGS = ("image_geo_parameter", "calibration_formulas", "quantity", "gain", "offset", "undetect")


def missing_flags(path, variable, attributes):
    """Stored numbers that mean missing in a file without CF attributes, and what its groups say of its values.

    attributes   of the variable

    Returns (numbers, text). Read are the attributes of KNMI's HDF5 files (calibration) and of ODIM's (what; EUMETNET
    OPERA), and the tag GDAL_NODATA of a TIFF file.
    """
    if "GDAL_NODATA" in attributes:
        return [attributes["GDAL_NODATA"]], ""
    if format_of(path) != "hdf5" or set(attributes) & {*PACKING, "units"}:
        return [], ""
    group, _ = split_path(variable)
    found, said = set(), []
    places = {group, f"{group}/calibration", f"{group}/what", f"{group.rpartition('/')[0]}/what"}
    for place in sorted(places):
        try:
            with opened(path, place.strip("/")) as dataset:
                attributes = plain_attributes(dataset.attrs)
        except UserError:
            continue
        for name in ("calibration_missing_data", "calibration_out_of_image", "nodata"):
            if isinstance(attributes.get(name), int | float):
                found.add(attributes[name])
        said += [f"{name} {attributes[name]}" for name in MEANINGS if name in attributes]
    return sorted(found), ", ".join(said)


def not_applied(attributes, flags):
    """What attributes of a variable say of missing values and scales, and reading does not apply: {name: value}.

    flags   from missing_flags

    Only the names of CF are applied. Other names are many, and what they mean is not certain: some divide by the
    scale. NaN and a missing value that is applied by another name are left out, and so is what cfgrib writes: it
    has applied it.
    """
    named = [number for key in ("_FillValue", "missing_value") for number in np.ravel(attributes.get(key, ()))]
    found = {}
    for name, value in plain_attributes(attributes).items():
        plain = name.lower().replace("_", "")
        if name in PACKING or name.startswith("GRIB_") or not any(hint in plain for hint in HINTS):
            continue
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        try:
            number = float(value)
            if math.isnan(number) or any(
                math.isclose(number, float(other), rel_tol=1e-6) for other in (*named, *flags)
            ):
                continue
        except (TypeError, ValueError):  # a text or several numbers
            pass
        found[name] = value
    return found


def counted_type(dtype, attributes):
    """The type that whole numbers are stored as: _Unsigned names it where the form of the file has no such type."""
    kind = {"true": "u", "false": "i"}.get(str(attributes.get("_Unsigned", "")).lower(), dtype.kind)
    return np.dtype(dtype.str.replace(dtype.kind, kind)) if dtype.kind in "iu" else dtype


def stored_type(dtype, attributes, flags):
    """The type that holds a variable's values once they are unpacked, with NaN where there may be missing ones.

    Whole numbers that are neither packed nor missing anywhere stay as they are. Packed ones of 16 bits fit into float32
    unless its steps are too wide for them; all wider ones become float64.
    """
    if dtype.kind == "f":
        return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)
    dtype = counted_type(dtype, attributes)
    packed = "scale_factor" in attributes or "add_offset" in attributes
    holes = flags or any(key in attributes for key in NUMBERS[2:])
    if not packed and not holes:
        return np.dtype(dtype.str.lstrip("<>|=")) if dtype.kind != "b" else np.dtype(np.uint8)
    scale = abs(float(np.ravel(attributes.get("scale_factor", 1))[0]))
    largest = abs(float(np.ravel(attributes.get("add_offset", 0))[0])) + scale * 2.0 ** (8 * dtype.itemsize)
    fits = dtype.itemsize <= 2 and np.spacing(np.float32(largest)) <= scale / 4
    return np.dtype(np.float32 if fits else np.float64)


def decode(block, flags, dtype, netcdf):
    """The values of a block of a variable: unpacked by xarray, and NaN where the file allows no value.

    block    xarray.Variable, packed, with its attributes
    flags    further stored numbers that mean missing
    dtype    of the result
    netcdf   whether the variable is one of NetCDF (is_netcdf)

    Returns (values, how many values are NaN only because they lie beyond the fill value). Where a NetCDF variable of
    whole numbers has a fill value and no valid range, the NetCDF User Guide ("Attribute Conventions", valid_range) lets
    the fill value bound the range: with -1 as the fill value, -2 is no value either.
    """
    xarray = import_xarray()
    stored = block.values
    attributes = dict(block.attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attributes that xarray leaves out, such as a NaN as the fill of whole numbers
        facts = {key: value for key, value in attributes.items() if key not in ("units", "coordinates", "dtype")}
        dataset = xarray.Dataset({"v": xarray.Variable(block.dims, stored, facts)})
        values = xarray.decode_cf(dataset, decode_times=False, decode_coords=False)["v"].values
    stored = stored.view(counted_type(stored.dtype, attributes))
    wrong = ~valid_values(stored, values, attributes)
    beyond = beyond_fill(stored, attributes) if netcdf else np.zeros(stored.shape, bool)
    # xarray compares -999.9 of a type of 64 bits with values of 32, and -1 with values that _Unsigned makes 255
    named = [value for key in ("_FillValue", "missing_value") for value in np.ravel(attributes.get(key, ()))]
    for flag in (*flags, *named):
        wrong |= equals(stored, counted(flag, stored.dtype, attributes).item())
    count = int((beyond & ~np.isnan(values)).sum()) if beyond.any() else 0
    wrong |= beyond
    values = values.astype(dtype)
    if wrong.any():
        values[wrong] = np.nan
    return values, count


def valid_values(stored, values, attributes):
    """Which values lie in the valid range that the file names; all where it names none."""
    low, high = attributes.get("valid_min"), attributes.get("valid_max")
    if "valid_range" in attributes:
        low, high = np.ravel(attributes["valid_range"])
    fits = np.ones(stored.shape, bool)
    packed = "scale_factor" in attributes or "add_offset" in attributes
    for bound, beyond in ((low, np.less), (high, np.greater)):
        if bound is None:
            continue
        bound = counted(np.ravel(bound)[0], stored.dtype, attributes)
        # CF: the range is of the stored numbers, unless its type is that of the unpacked values
        unpacked = packed and stored.dtype.kind in "iu" and bound.dtype.kind == "f"
        fits &= ~beyond(values if unpacked else stored, bound)
    return fits


def counted(value, dtype, attributes):
    """A whole number of an attribute in the type of the stored ones. With _Unsigned, -6 stands for 65530."""
    value = np.asarray(value)
    return value.astype(dtype) if "_Unsigned" in attributes and value.dtype.kind in "iu" else value


def is_netcdf(path, dims):
    """Whether a variable is one of NetCDF, by the format of its file and the names of its dimensions.

    netCDF names the dimensions of all that it writes into HDF5. Others need not, and xarray then calls them phony.
    """
    kind = format_of(path)
    return kind == "netcdf3" or (kind == "hdf5" and not any(str(dim).startswith("phony_dim") for dim in dims))


def beyond_fill(stored, attributes):
    """Which whole numbers lie beyond the fill value, where no valid range is named."""
    fill = counted(np.ravel(attributes.get("_FillValue", np.nan))[0], stored.dtype, attributes)
    named = any(key in attributes for key in ("valid_min", "valid_max", "valid_range"))
    if named or stored.dtype.kind not in "iu" or not np.isfinite(fill) or fill == 0:
        return np.zeros(stored.shape, bool)
    return stored > fill if fill > 0 else stored < fill
