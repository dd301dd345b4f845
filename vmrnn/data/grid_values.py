"""The values of a field: unpacked, and NaN where the file allows none."""

import warnings

import numpy as np

from vmrnn.data.grid_files import format_of, opened, split_path
from vmrnn.data.grid_info import import_xarray, plain_attributes
from vmrnn.errors import UserError

# Attributes that say how values are packed. Reading uses them up.
PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "valid_min", "valid_max", "valid_range",
           "_Unsigned", "flag_values", "flag_meanings", "coordinates")  # fmt: skip


def missing_flags(path, variable, attributes):
    """Stored numbers that mean missing in an HDF5 file without CF attributes, and what the file says of its values.

    attributes   of the variable

    Returns (numbers, text). Read are the attributes of KNMI's files (calibration) and of ODIM's (what; EUMETNET OPERA).
    """
    if format_of(path) != "hdf5" or set(attributes) & {*PACKING, "units"}:
        return [], ""
    group, _ = split_path(variable)
    found, said = set(), []
    places = {f"{group}/calibration", f"{group}/what", f"{group.rpartition('/')[0]}/what"}
    for place in sorted(places):
        try:
            with opened(path, place.strip("/")) as dataset:
                attributes = plain_attributes(dataset.attrs)
        except UserError:
            continue
        for name in ("calibration_missing_data", "calibration_out_of_image", "nodata"):
            if isinstance(attributes.get(name), int | float):
                found.add(attributes[name])
        said += [f"{name} {attributes[name]}" for name in ("calibration_formulas", "gain", "offset", "undetect")
                 if name in attributes]  # fmt: skip
    return sorted(found), ", ".join(said)


def stored_type(dtype, attributes, flags):
    """The type that holds a variable's values once they are unpacked, with NaN where there may be missing ones.

    Whole numbers that are neither packed nor missing anywhere stay as they are. Packed ones of 16 bits fit into float32
    unless its steps are too wide for them; all wider ones become float64.
    """
    if dtype.kind == "f":
        return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)
    packed = "scale_factor" in attributes or "add_offset" in attributes
    holes = flags or any(key in attributes for key in PACKING[2:7])
    if not packed and not holes:
        return np.dtype(dtype.str.lstrip("<>|=")) if dtype.kind != "b" else np.dtype(np.uint8)
    scale = abs(float(np.ravel(attributes.get("scale_factor", 1))[0]))
    largest = abs(float(np.ravel(attributes.get("add_offset", 0))[0])) + scale * 2.0 ** (8 * dtype.itemsize)
    fits = dtype.itemsize <= 2 and np.spacing(np.float32(largest)) <= scale / 4
    return np.dtype(np.float32 if fits else np.float64)


def decode(block, flags, dtype):
    """The values of a block of a variable: unpacked by xarray, and NaN where the file allows no value.

    block   xarray.Variable, packed, with its attributes
    flags   further stored numbers that mean missing
    dtype   of the result

    Returns (values, how many lie beyond the fill value and are left out for that alone). Where a variable of whole
    numbers has a fill value and no valid range, the NetCDF User Guide ("Attribute Conventions", valid_range) lets the
    fill value bound the range: with -1 as the fill value, -2 is no value either.
    """
    xarray = import_xarray()
    stored = block.values
    attributes = dict(block.attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attributes that xarray leaves out, such as a NaN as the fill of whole numbers
        facts = {key: value for key, value in attributes.items() if key not in ("units", "coordinates", "dtype")}
        dataset = xarray.Dataset({"v": xarray.Variable(block.dims, stored, facts)})
        values = xarray.decode_cf(dataset, decode_times=False, decode_coords=False)["v"].values
    if str(attributes.get("_Unsigned", "")).lower() == "true" and stored.dtype.kind == "i":
        stored = stored.view(stored.dtype.str.replace("i", "u"))
    wrong = ~valid_values(stored, values, attributes)
    beyond = beyond_fill(stored, attributes)
    for flag in flags:
        wrong |= stored == flag
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
        bound = np.ravel(bound)[0]
        # CF: the range is of the stored numbers, unless its type is that of the unpacked values
        unpacked = packed and stored.dtype.kind in "iu" and np.asarray(bound).dtype.kind == "f"
        fits &= ~beyond(values if unpacked else stored, bound)
    return fits


def beyond_fill(stored, attributes):
    """Which whole numbers lie beyond the fill value, where no valid range is named."""
    fill = np.ravel(attributes.get("_FillValue", np.nan))[0]
    named = any(key in attributes for key in ("valid_min", "valid_max", "valid_range"))
    if named or stored.dtype.kind not in "iu" or not np.isfinite(fill) or fill == 0:
        return np.zeros(stored.shape, bool)
    if str(attributes.get("_Unsigned", "")).lower() == "true":
        fill = np.asarray(fill).astype(stored.dtype)
    return stored > fill if fill > 0 else stored < fill
