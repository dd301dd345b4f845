"""Files of gridded fields as xarray datasets whose values are still packed: NetCDF, HDF5, Zarr, GRIB, GeoTIFF, TIFF.

The format is told by a file's content. xarray and the optional readers are imported when they are needed.
"""

import glob
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile

from vmrnn.data.grid_axes import is_columns, is_rows
from vmrnn.data.grid_info import import_xarray
from vmrnn.data.images import gdal_scales, nodata_of, refuse_mask
from vmrnn.data.media import files_in, in_natural_order
from vmrnn.errors import UserError

GRIDS = (".nc", ".nc4", ".cdf", ".netcdf", ".h5", ".hdf5", ".he5", ".hdf", ".zarr", ".grib", ".grib2", ".grb", ".grb2",
         ".tif", ".tiff")  # fmt: skip


def grid_files(path, notes=None):
    """The files of a gridded field in natural order: a file or Zarr folder itself, those in a folder, or of a glob.

    notes   as in media.files_in

    UserError: there is none.
    """
    folder = Path(path)
    if folder.is_file() or is_zarr(folder):
        return [folder]
    if folder.is_dir():
        stores = [store for store in folder.rglob("*.zarr") if is_zarr(store)]
        stores = [s for s in stores if not any(part.startswith(".") for part in s.relative_to(folder).parts)]  # hidden
        files = files_in(folder, GRIDS, notes, set(stores))
        found = in_natural_order([*files, *stores], folder)
    else:
        found = in_natural_order([Path(name) for name in glob.glob(str(path), recursive=True)], folder.anchor)
    if not found:
        raise UserError(f"{path}: no such file, no folder with {' '.join(GRIDS)} in it, no glob that fits a file")
    return found


def is_zarr(path):
    return path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata"))


def format_of(path):
    """netcdf3, hdf5, zarr, grib or tiff, by the first bytes of a file. UserError: none of them."""
    if path.is_dir():
        return "zarr"
    try:
        with open(path, "rb") as f:
            head = f.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another file") from error
    if head.startswith((b"CDF\x01", b"CDF\x02")):
        return "netcdf3"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head.startswith(b"GRIB"):
        return "grib"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    known = {b"CDF\x05": "a NetCDF file in the CDF-5 form: write it as NetCDF-4 (nccopy -k nc4)",
             b"\x0e\x03\x13\x01": "an HDF4 file: write it as HDF5 (h4toh5)"}  # fmt: skip
    raise UserError(f"{path}: {known.get(head[:4], 'not a whole NetCDF, HDF5, Zarr, GRIB or TIFF file')}")


# What open_groups understands. It decodes in spite of decode_cf=False.
UNDECODED = {"mask_and_scale": False, "decode_times": False, "decode_timedelta": False, "concat_characters": False,
             "decode_coords": False}  # fmt: skip
# Many stores have no summary of their metadata, and xarray would warn of it. On a disk it saves next to nothing.
ZARR = {"engine": "zarr", "consolidated": False}
# Attributes of packed values that are numbers, and that some programs write as text
NUMBERS = ("scale_factor", "add_offset", "_FillValue", "missing_value", "valid_min", "valid_max", "valid_range")


@contextmanager
def opened(path, group="", variable=""):
    """One group of a file as an xarray.Dataset whose values are still packed and are read when they are asked for.

    group      of an HDF5 or Zarr file, "" for its root
    variable   in a GRIB file, which holds variables of different kinds that do not fit into one Dataset

    UserError: a damaged file, a group that is not there, a library that is not there.
    """
    xarray = import_xarray()
    kind = format_of(path)
    options = {"decode_cf": False, "cache": False}
    try:
        if kind == "tiff":
            store = open_tiff(path)
        elif kind == "netcdf3":
            store = xarray.open_dataset(path, engine="scipy", **options)
        elif kind == "hdf5":
            store = xarray.open_dataset(path, engine="h5netcdf", group=group or None, phony_dims="access", **options)
        elif kind == "zarr":
            store = xarray.open_dataset(path, group=group or None, chunks=None, **ZARR, **options)
        else:
            keys = {"filter_by_keys": {"cfVarName": variable}} if variable else {}
            store = xarray.open_dataset(path, engine="cfgrib", backend_kwargs={"indexpath": "", **keys}, **options)
    except UserError:
        raise
    except Exception as error:  # each library has its own kinds
        raise UserError(cannot_open(path, kind, group, error)) from error
    try:
        for stored in store.variables.values():
            if stored.dtype.kind in "buif":
                stored.attrs.update(as_numbers(stored.attrs))
        yield store.assign(inherited(path, group, store)) if group else store
    finally:
        store.close()


def inherited(path, group, store):
    """The coordinates of a group's variables that lie in the groups above it, {name: xarray.Variable}.

    store   Dataset of the group

    In NetCDF-4 a group has the dimensions of all groups above it, and so their coordinates. If two groups have a
    coordinate of one name, that of the nearer group counts.
    """
    keys = ("coordinates", "grid_mapping")
    named = {word for v in store.variables.values() for key in keys for word in str(v.attrs.get(key, "")).split()}
    wanted, found = {*store.sizes, *named} - {*store.variables}, {}
    while group and wanted:
        group = group.rpartition("/")[0]
        with opened(path, group) as above:
            # A dimension of another size is another one of the same name
            found |= {name: v.load() for name, v in above.variables.items()
                      if name in wanted and v.sizes.items() <= store.sizes.items()}  # fmt: skip
        wanted -= {*found}
    return found


def as_numbers(attributes):
    """Those of NUMBERS that are written as text and are numbers: {name: number, or an array of several}."""
    found = {}
    for name in NUMBERS:
        text = attributes.get(name)
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        words = re.split(r"[\s,]+", text.strip()) if isinstance(text, str) else ()
        try:
            # Python's int keeps whole numbers apart from others
            numbers = [float(word) if re.search("[.eEnN]", word) else int(word) for word in words]
        except ValueError:
            continue
        if numbers:
            found[name] = np.array(numbers) if len(numbers) > 1 else np.array(numbers)[0]
    return found


def cannot_open(path, kind, group, error):
    """One line for what went wrong when a file was opened."""
    text = " ".join(str(error).split())[:160]
    needs = {"hdf5": "h5netcdf[h5py]", "zarr": "zarr", "grib": "cfgrib", "netcdf3": "scipy", "tiff": "rioxarray"}[kind]
    if isinstance(error, ImportError) or "unrecognized engine" in text or ("engine" in text and "install" in text):
        return f"{path}: to read it, pip install '{needs}'"
    if group and ("group" in text.lower() or isinstance(error, KeyError)):
        return f"{path}: no group {group!r} in it; name the data set by its whole path with variables"
    if kind == "grib" and "filter_by_keys" in text:
        return f"{path}: holds several kinds of fields; name those you want with variables ({text})"
    return f"{path}: cannot be read as {kind} ({type(error).__name__}: {text}); fetch or write it again"


def open_tiff(path):
    """A TIFF file as a Dataset: a GeoTIFF through rasterio, a stack of pages through tifffile.

    The pages of a stack are the dimension `page` of the variable `image`. Reduced copies of a page (the levels of a
    pyramid) are left out. UserError: as of images.refuse_mask, and bands of different scales.
    """
    xarray = import_xarray()
    file = tifffile.TiffFile(path)
    refuse_mask(file, path)
    if 34735 in file.pages[0].tags:  # the keys of a map projection
        file.close()
        store = xarray.open_dataset(path, engine="rasterio", mask_and_scale=False, decode_coords="all", cache=False)
        for name, variable in store.variables.items():
            # The library passes on a scale and an offset that all bands share. Others would be left out.
            if {"scales", "offsets"} & set(variable.attrs):
                store.close()
                raise UserError(f"{path}: the bands of {name} have different scales or offsets; write their values as "
                                "they are (gdal_translate -unscale -ot Float32)")  # fmt: skip
        return store
    whole = file.series[0]  # its first level is the pages at their full size
    leading = [letter for letter in whole.axes if letter not in "YXSC"]
    letters = {"Y": "y", "X": "x", "S": "sample", "C": "channel", "T": "time"}
    if len(leading) == 1:
        letters |= {leading[0]: "page"}
    dims = [letters.get(letter, f"axis_{letter.lower()}") for letter in whole.axes]
    dims = [f"{dim}{i}" if dims.count(dim) > 1 else dim for i, dim in enumerate(dims)]  # several of unknown meaning, Q
    # Plain pages one behind the other are one array of the file; others are read page by page
    plain = whole.dataoffset is not None
    pages = tifffile.memmap(path, series=0, mode="r") if plain else lazy_pages(whole)
    facts, missing = gdal_scales(whole.keyframe), nodata_of(whole.keyframe, path)
    if missing is not None:
        facts["GDAL_NODATA"] = missing
    store = xarray.Dataset({"image": xarray.Variable(dims, pages, facts)})
    store.set_close(file.close)
    return store


def lazy_pages(series):
    """A series of TIFF pages as an array for xarray, which reads the pages that are asked for."""
    from xarray.backends import BackendArray
    from xarray.core.indexing import IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

    class Pages(BackendArray):
        shape, dtype = series.shape, np.dtype(series.dtype)

        def __getitem__(self, key):
            return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self.read)

        def read(self, key):
            page = series.keyframe.shape
            leading = self.shape[: len(self.shape) - len(page)]
            numbers = np.arange(np.prod(leading, dtype=int)).reshape(leading)[key[: len(leading)]]
            rest = key[len(leading) :]
            found = [series.asarray(key=int(number)).reshape(page)[rest] for number in np.ravel(numbers)]
            return np.stack(found).reshape(*np.shape(numbers), *found[0].shape)

    return LazilyIndexedArray(Pages())


def split_path(variable):
    """(group, name) of a variable: image1/image_data is image_data in the group image1."""
    group, _, name = variable.strip("/").rpartition("/")
    return group, name


def is_field(dataset, name):
    """Whether a variable is a field: numbers over two dimensions or more that are no bounds and no coordinates."""
    variable = dataset.variables[name]
    keys = ("bounds", "climatology", "coordinates")
    about = {word for v in dataset.variables.values() for key in keys for word in str(v.attrs.get(key, "")).split()}
    sizes = [size for size in variable.shape if size > 1]
    known = name in about or name in variable.dims or is_rows(variable) or is_columns(variable)
    return variable.dtype.kind in "buif" and len(sizes) >= 2 and not known


def find_variables(path):
    """The names of all fields of a file, those in groups with their group in front."""
    if format_of(path) == "grib":
        return grib_variables(path)
    if format_of(path) not in ("hdf5", "zarr"):
        with opened(path) as dataset:
            return [str(name) for name in dataset.data_vars if is_field(dataset, name)]
    found = []
    for group, dataset in open_groups(path).items():
        found += [f"{group}/{name}".strip("/") for name in dataset.data_vars if is_field(dataset, name)]
        dataset.close()
    return found


def grib_variables(path):
    """The names of all fields of a GRIB file, which may be of kinds that do not fit into one Dataset."""
    try:
        import cfgrib

        datasets = cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": ""})
        return [str(name) for dataset in datasets for name in dataset.data_vars if is_field(dataset, name)]
    except Exception as error:
        raise UserError(cannot_open(path, "grib", "", error)) from error


def open_groups(path):
    """{group: its Dataset} of all groups of an HDF5 or Zarr file; to be closed by the caller."""
    kind = format_of(path)
    options = {"engine": "h5netcdf", "phony_dims": "access"} if kind == "hdf5" else ZARR
    try:
        return import_xarray().open_groups(path, **UNDECODED, **options)
    except Exception as error:
        raise UserError(cannot_open(path, kind, "", error)) from error


def choose_variables(path, variables, forcings=()):
    """`variables`, or the only field of the file that is no forcing. UserError: it has none or several."""
    if variables:
        return list(variables)
    found = [name for name in find_variables(path) if name not in forcings]
    if len(found) != 1:
        raise UserError(
            f"{path}: holds {', '.join(found[:20]) or 'no field'}; pick with variables, in the order of the channels"
            if found
            else f"{path}: holds no field of two dimensions or more; name another file"
        )
    return found
