"""Gridded fields: values, times and coordinates are those of the files, and what has two readings is refused."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray
from helpers import shared
from scipy.io import netcdf_file

from dataset import build_dataset
from vmrnn.config import Config
from vmrnn.data import grids
from vmrnn.data.grid_axes import unlike_place
from vmrnn.data.grid_files import grid_files
from vmrnn.data.grid_info import GridInfo, direction_of
from vmrnn.data.grid_values import stored_type
from vmrnn.data.grids import grid_clips, open_grid
from vmrnn.data.inputs import open_input
from vmrnn.data.times import (
    calendar_features,
    later_times,
    nearest_frames,
    runs_without_gap,
    time_from_name,
    time_from_text,
)
from vmrnn.data.units import same_unit
from vmrnn.errors import UserError
from vmrnn.field_facts import FieldFacts, climatology, latitude_weights
from vmrnn.forecast_files import Forecast
from vmrnn.forecast_store import StoredFields
from vmrnn.values import ValueRange

KELVINS = [200.0, 350.0]  # a range that holds the values of `field`
SIX_HOURS = np.arange("2020-01-01", "2020-01-03", dtype="datetime64[6h]").astype("datetime64[ns]")


def field(times=SIX_HOURS, height=9, width=12, dims=("time", "latitude", "longitude"), name="t2m", seed=0):
    """A field on a grid of latitudes and longitudes with random values, an xarray.Dataset."""
    sizes = {"time": len(times), "latitude": height, "longitude": width}
    values = np.random.default_rng(seed).normal(280, 5, [sizes[dim] for dim in dims]).astype(np.float32)
    coordinates = {
        "time": times,
        "latitude": ("latitude", np.linspace(60, 50, height), {"units": "degrees_north"}),
        "longitude": ("longitude", np.linspace(0, 11, width), {"units": "degrees_east"}),
    }
    return xarray.Dataset({name: (dims, values, {"units": "K"})}, coordinates)


def write(dataset, path, **options):
    dataset.to_netcdf(path, engine="h5netcdf", **options)
    return str(path)


def write_stored(path, stored, facts):
    """A NetCDF file whose variable v holds these numbers (time, y, x) and attributes."""
    with h5py.File(path, "w") as f:
        f["v"] = stored
        for i, (name, length) in enumerate(zip(("time", "y", "x"), stored.shape)):
            f[name] = np.arange(length, dtype="f8")
            f[name].make_scale(name)
            f["v"].dims[i].attach_scale(f[name])
        for key, value in facts.items():
            typed = isinstance(value, str | bytes | np.generic)
            own = stored.dtype if key not in ("scale_factor", "add_offset") else "f8"
            f["v"].attrs[key] = value if typed else np.asarray(value, own)


def read(grid):
    """All frames, (T, H, W, C)."""
    frames = np.stack(list(grid.frames()))
    assert frames.shape == grid.shape and frames.dtype == grid.dtype
    return frames


def seconds(times):
    return np.asarray(times).astype("datetime64[ns]").astype(np.int64) / 1e9


# Values


@pytest.mark.parametrize(
    ("stored", "facts", "missing"),
    [
        # The fill value bounds the range where no range is named (NetCDF User Guide): -2 is a flag
        (np.array([0, 1, 40, -1, -2, 300], "i2"), {"scale_factor": 0.05, "add_offset": 0.0, "_FillValue": -1}, [3, 4]),
        (np.array([0, 1, 254, 255, 7, 9], "u1"), {"_FillValue": 255}, [3]),
        (np.array([-5, 0, 9, 99, 100, 3], "i2"), {"valid_range": [0, 99], "scale_factor": 2.0}, [0, 4]),
        (np.array([-5, 0, 9, 99, 100, 3], "i4"), {"valid_max": 98, "missing_value": 9}, [2, 3, 4]),
        # A named range stands in the fill value's place
        (np.array([0, 1, 40, -1, -2, 300], "i2"), {"_FillValue": -1, "valid_range": [-5, 400]}, [3]),
        # CF: a limit of the unpacked type is one of the unpacked values, here 4.5 and 49.5
        (np.array([-5, 0, 9, 99, 100, 3], "i2"), {"valid_max": np.float32(5), "scale_factor": 0.5}, [3, 4]),
        (np.array([-5.5, 1e20, 0, np.nan, 1, 2], "f4"), {"_FillValue": 1e20}, [1, 3]),
        # A fill of 0 bounds nothing: negative values of a field are values
        (np.array([-5, 0, 9, -7, 100, 3], "i2"), {"_FillValue": 0}, [1]),
        # Numbers of another type than the values, and numbers as text
        (np.array([-999.9, 0, 9, 1, 2, 3], "f4"), {"missing_value": np.float64(-999.9)}, [0]),
        (np.array([-999.9, 0, 9, 1, 2, 3], "f4"), {"missing_value": "-999.9", "valid_range": "1, 8"}, [0, 1, 2]),
        (np.array([-5, 0, 9, 7, 100, 3], "i2"), {"missing_value": b"7", "scale_factor": "0.5"}, [3]),
    ],
    ids=["flag beyond fill", "fill at the top", "valid range", "valid max and missing value", "fill in a named range",
         "unpacked valid max", "float fill", "fill 0", "wide missing value", "text", "text of packed values"],
)  # fmt: skip
def test_values_are_unpacked_and_what_the_file_allows_not_is_missing(tmp_path, stored, facts, missing):
    write_stored(tmp_path / "a.nc", stored.reshape(1, 2, 3), facts)
    found = read(open_grid(tmp_path / "a.nc", ["v"])).ravel()
    expected = stored.astype(np.float64) * float(facts.get("scale_factor", 1)) + facts.get("add_offset", 0)
    expected[missing] = np.nan
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(
    ("stored", "facts", "expected"),
    [
        (np.array([0, 127, -128, -2], "i1"), {"_Unsigned": "true"}, [0, 127, 128, 254]),
        (np.array([0, 127, -128, -2], "i1"), {"_Unsigned": "true", "missing_value": -2}, [0, 127, 128, np.nan]),
        (np.array([0, 4095, -6, -1], "i2"), {"_Unsigned": "true", "valid_range": [0, -6]}, [0, 4095, 65530, np.nan]),
        (np.array([0, 127, 128, 254], "u1"), {"_Unsigned": "false"}, [0, 127, -128, -2]),
    ],
    ids=["unsigned", "missing value", "valid range of GOES", "signed"],
)
def test_signs_are_those_that_the_file_says(tmp_path, stored, facts, expected):
    """NetCDF-3 has no unsigned numbers, and OPeNDAP no signed bytes."""
    write_stored(tmp_path / "a.nc", stored.reshape(1, 2, 2), facts)
    np.testing.assert_array_equal(read(open_grid(tmp_path / "a.nc", ["v"])).ravel(), expected)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"SCALING_FACTOR": 100.0, "MISSING_VALUE": -8000, "UNITS": "C"}, "SCALING_FACTOR 100, MISSING_VALUE -8000"),
        ({"nodata": -8000, "gain": 0.5, "offset": 0}, "nodata -8000, gain 0.5, offset 0"),
        ({"FillValue": -8000, "Slope": 0.5, "Intercept": 2.0}, "FillValue -8000, Slope 0.5, Intercept 2"),
        # Applied by another name, applied by cfgrib, or nothing of the kind
        ({"_FillValue": -8000, "CodeMissingValue": "-8000", "GRIB_missingValue": 9.0, "long_name": "a"}, ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_that_are_not_those_of_cf_are_said(tmp_path, facts, said):
    stored = np.array([-8000, 0, 1, 2], "i2").reshape(1, 2, 2)
    write_stored(
        tmp_path / "a.nc", stored, {key: v if isinstance(v, str | int) else np.float64(v) for key, v in facts.items()}
    )
    notes = [note for note in open_grid(tmp_path / "a.nc", ["v"]).notes if "not applied" in note]
    found = notes[0].removeprefix("values: the file says ").removesuffix(", which is not applied") if notes else ""
    assert sorted(found.replace(".0", "").split(", ")) == sorted(said.split(", "))


def test_the_missing_value_and_the_scale_of_gdal(tmp_path):
    """A TIFF stack without the keys of a map."""
    import tifffile

    stored = np.array([[[0, 255], [7, 9]]] * 2, "u1")
    metadata = '<GDALMetadata><Item name="SCALE" sample="0" role="scale">0.1</Item></GDALMetadata>'
    tags = [(42112, "s", 0, metadata, True), (42113, "s", 0, "255", True)]
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", metadata=None, extratags=tags)
    grid = open_grid(tmp_path / "a.tif")
    np.testing.assert_array_equal(read(grid)[0, ..., 0], [[0, np.nan], [7, 9]])
    assert "values: the file says scale 0.1, which is not applied" in grid.notes
    assert "missing: the stored 255, by the file's attributes" in grid.notes


def test_bands_of_different_scales_are_refused(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("rioxarray")
    place = {"crs": "EPSG:4326", "transform": rasterio.transform.from_origin(0, 60, 0.1, 0.1)}
    for scales, refused in (((0.1, 0.1), False), ((0.1, 0.01), True)):
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", height=4, width=4, count=2, dtype="uint8", **place
        ) as file:
            file.write(np.full((2, 4, 4), 50, "u1"))
            file.scales = scales
        if refused:
            with pytest.raises(UserError, match="different scales or offsets"):
                open_grid(tmp_path / "a.tif")
        else:
            np.testing.assert_allclose(read(open_grid(tmp_path / "a.tif")), 5)


def test_wide_types_and_whole_numbers_keep_their_values(tmp_path):
    values = {"i4": 2**31 - 1 - np.arange(6), "u2": 65535 - np.arange(6), "f8": 1 + np.arange(6) * 1e-12}
    for dtype, numbers in values.items():
        array = numbers.astype(dtype).reshape(1, 2, 3)
        xarray.Dataset({"v": (("time", "y", "x"), array)}).to_netcdf(tmp_path / f"{dtype}.nc", engine="h5netcdf")
        found = read(open_grid(tmp_path / f"{dtype}.nc"))
        np.testing.assert_array_equal(found[..., 0], array)


@pytest.mark.parametrize("form", ["hdf5", "zarr"])
def test_the_fill_value_bounds_values_in_netcdf_alone(tmp_path, form):
    stored = np.array([0, 1, 40, -1, -2, 300], "i2").reshape(1, 2, 3)
    if form == "zarr":
        pytest.importorskip("zarr")
        dataset = xarray.Dataset({"v": (("time", "y", "x"), stored, {"_FillValue": np.int16(-1)})})
        dataset.to_zarr(tmp_path / "a", zarr_format=2)
    else:
        with h5py.File(tmp_path / "a", "w") as f:  # without names of dimensions, unlike what netCDF writes
            f["v"] = stored
            f["v"].attrs["_FillValue"] = np.int16(-1)
    grid = open_grid(tmp_path / "a", ["v"])
    np.testing.assert_array_equal(read(grid).ravel(), [0, 1, 40, np.nan, -2, 300])
    assert not grid.beyond_fill["v"]


@pytest.mark.parametrize(
    "packed, scale, offset, unpacked",
    [("i2", 0.01, 0.0, "f4"), ("u2", 0.01, 0.0, "f4"), ("i2", 1e-4, 300.0, "f8"), ("i4", 0.01, 0.0, "f8")],
)
def test_unpacked_numbers_have_a_type_that_tells_all_of_them_apart(packed, scale, offset, unpacked):
    dtype = stored_type(np.dtype(packed), {"scale_factor": scale, "add_offset": offset}, [])
    limits = np.iinfo(packed)
    for stored in (limits.min + np.arange(5000), limits.max - np.arange(5000)):
        assert len(np.unique((stored * scale + offset).astype(dtype))) == 5000
    assert dtype == np.dtype(unpacked)


def test_bom_radar_against_h5py():
    folder = shared("fields/bom_nc")
    files = sorted(folder.glob("*.nc"))[:8]
    grid = open_grid(str(folder / "66_20201031_00*.nc"), ["precipitation"])
    frames = read(grid)
    flags = 0
    for frame, time, file in zip(frames, grid.info.times, files):
        with h5py.File(file) as f:
            stored = f["precipitation"][:].astype(np.float64)
            assert time == f["valid_time"][()]
        flags += (stored == -2).sum()
        expected = np.where(stored >= 0, stored * 0.05, np.nan).astype(np.float32)
        np.testing.assert_array_equal(frame[..., 0], expected)
    assert flags == grid.beyond_fill["precipitation"] == 1
    assert np.nanmin(frames) == 0
    assert grid.info.time_source == "the variable valid_time" and grid.info.units(0) == "kg m-2"


def test_knmi_radar_against_h5py():
    folder = shared("fields/knmi_h5")
    files = sorted(folder.glob("*.h5"))[:3]
    grids = [
        open_grid(str(folder / "*2010082600[01][05].h5"), ["image1/image_data"], time_from=time_from)
        for time_from in ("", "name:%Y%m%d%H%M", "attribute:overview/product_datetime_end")
    ]
    frames = read(grids[0])
    for frame, file in zip(frames, files):
        with h5py.File(file) as f:
            stored = f["image1/image_data"][:]
        np.testing.assert_array_equal(frame[..., 0], np.where(stored == 65535, np.nan, stored.astype(np.float32)))
    expected = seconds(np.datetime64("2010-08-26")) + 300 * np.arange(4)
    for grid in grids:
        np.testing.assert_array_equal(grid.info.times, expected)
    forecast = grids[0].info.dataset(frames)["image1_image_data"]  # its numbers are those of the file: 0.01 mm
    assert "ACCUMULATED_PRECIPITATION_[MM], calibration_formulas GEO=0.01*PV+0.0" in forecast.attrs["comment"]


def test_era_interim_against_scipy():
    path = shared("fields/eraint_uvz.nc")
    netcdf = netcdf_file(path, mmap=False)
    grid = open_grid(path, ["z@500", "u", "v@850"])
    assert grid.info.names == ["z@500", "u@200", "u@500", "u@850", "v@850"]
    assert grid.info.latitude[0] == 90 and grid.shape == (2, 241, 480, 5)
    frames = read(grid)
    for channel, (name, level) in enumerate([("z", 1), ("u", 0), ("u", 1), ("u", 2), ("v", 2)]):
        stored = netcdf.variables[name]
        expected = stored[:, level] * stored.scale_factor + stored.add_offset
        np.testing.assert_array_equal(frames[..., channel], expected.astype(np.float32))


def test_tiff_stack_against_tifffile(tmp_path):
    import tifffile

    path = shared("media/calcium_imaging.tif")
    np.testing.assert_array_equal(read(open_grid(path))[..., 0], tifffile.imread(path))
    # Compressed pages are read one by one
    pages = np.random.default_rng(0).integers(0, 2**16, (5, 16, 16), "u2")
    tifffile.imwrite(tmp_path / "pages.tif", pages, compression="zlib", photometric="minisblack")
    grid = open_grid(tmp_path / "pages.tif")
    np.testing.assert_array_equal(read(grid)[..., 0], pages)
    np.testing.assert_array_equal(np.stack(list(grid.frames(2, 4)))[..., 0], pages[2:4])


# Dimensions


def test_dimensions_are_found_in_any_order(tmp_path):
    plain = field()
    write(plain, tmp_path / "a.nc")
    write(plain.transpose("longitude", "time", "latitude"), tmp_path / "b.nc")
    odd = {"latitude": "row_of_map", "longitude": "column_of_map", "time": "when"}
    facts = plain.rename(odd)
    facts["when"].attrs["axis"], facts["row_of_map"].attrs["axis"], facts["column_of_map"].attrs["axis"] = "TYX"
    write(facts, tmp_path / "c.nc")
    expected = plain["t2m"].values
    for name in "abc":
        np.testing.assert_array_equal(read(open_grid(tmp_path / f"{name}.nc"))[..., 0], expected)


def test_latitudes_and_levels_are_those_that_the_file_says(tmp_path):
    """Packed, in radians, or with rows and columns in another order than the field."""
    expected = np.linspace(60, 50, 9)[:, None]
    whole = field()
    write(whole, tmp_path / "packed.nc", encoding={"latitude": {"dtype": "i2", "scale_factor": 0.25}})
    angles = ("latitude", np.deg2rad(expected[:, 0]), {"units": "radian", "standard_name": "latitude"})
    write(whole.assign_coords(latitude=angles), tmp_path / "radian.nc")
    pixels = (("longitude", "latitude"), np.tile(expected, 12).T, {"units": "degrees_north"})
    write(whole.drop_vars(["latitude", "longitude"]).assign_coords(lat=pixels), tmp_path / "turned.nc")
    for name, rounding in (("packed", 0.125), ("radian", 1e-9), ("turned", 1e-9)):
        latitude = open_grid(tmp_path / f"{name}.nc").info.latitude
        np.testing.assert_allclose(latitude, np.broadcast_to(expected, latitude.shape), atol=rounding)
    levels = whole.expand_dims(level=[500.0, 850.0], axis=1)
    write(levels, tmp_path / "levels.nc", encoding={"level": {"dtype": "i2", "scale_factor": 50.0}})
    assert open_grid(tmp_path / "levels.nc").info.names == ["t2m@500", "t2m@850"]


def test_a_group_has_the_coordinates_of_the_groups_above(tmp_path):
    """The dimensions are those of the root; the group between uses none of them."""
    whole = field(SIX_HOURS[[0, 1, 2, 5]])
    path = write(whole.drop_vars("t2m").assign(height=2.0), tmp_path / "a.nc")
    steady = whole.drop_vars(["time", "latitude", "longitude"])
    steady["t2m"].attrs["coordinates"] = "height"
    write(steady, path, mode="a", group="b/c")
    grid = open_grid(path)
    assert grid.info.names == ["b/c/t2m"] and grid.runs() == [(0, 3), (3, 4)]
    np.testing.assert_array_equal(grid.info.times, seconds(whole.time))
    np.testing.assert_array_equal(grid.info.latitude[:, 0], whole.latitude)
    assert grid.info.coordinates["height"] == 2
    np.testing.assert_array_equal(read(grid)[..., 0], whole["t2m"])


def test_coordinates_of_pixels_are_no_fields(tmp_path):
    pixels = (("latitude", "longitude"), np.ones((9, 12)))
    whole = field().drop_vars(["latitude", "longitude"]).assign_coords(lat=pixels, lon=pixels)
    whole.to_netcdf(tmp_path / "a.nc", engine="scipy")
    write(whole, tmp_path / "b.nc")
    for name in ("a.nc", "b.nc"):
        assert open_grid(tmp_path / name).info.names == ["t2m"]


def test_array_axes_name_the_dimensions(tmp_path):
    values = np.random.default_rng(0).random((3, 4, 5, 6, 2)).astype("f4")  # sequences, rows, columns, time, channels
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["group/data"] = values
    with pytest.raises(UserError, match="NHW"):
        open_grid(tmp_path / "a.h5", ["group/data"], "NHW")
    grid = open_grid(tmp_path / "a.h5", ["group/data"], "NHWTC")
    expected = values.transpose(0, 3, 1, 2, 4).reshape(18, 4, 5, 2)
    np.testing.assert_array_equal(read(grid), expected)
    assert grid.runs() == [(0, 6), (6, 12), (12, 18)]
    np.testing.assert_array_equal(np.stack(list(grid.frames(4, 14))), expected[4:14])


def test_readings_that_are_not_clear_are_refused(tmp_path):
    two = field().assign(tp=field()["t2m"])
    write(two, tmp_path / "two.nc")
    with pytest.raises(UserError, match="t2m, tp; pick with variables"):
        open_grid(tmp_path / "two.nc")
    with pytest.raises(UserError, match="no variable sst in it; it has t2m, tp"):
        open_grid(tmp_path / "two.nc", ["sst"])
    both = xarray.Dataset({"v": (("time", "step", "y", "x"), np.zeros((2, 3, 4, 5)))})
    write(both, tmp_path / "both.nc")
    with pytest.raises(UserError, match="time and step may be time; name them with array_axes"):
        open_grid(tmp_path / "both.nc")
    assert open_grid(tmp_path / "both.nc", array_axes="NTHW").runs() == [(0, 3), (3, 6)]
    with pytest.raises(UserError, match="no level 3; it has 0, 1"):
        write(xarray.Dataset({"v": (("time", "level", "y", "x"), np.zeros((2, 2, 4, 5)))}), tmp_path / "level.nc")
        open_grid(tmp_path / "level.nc", ["v@3"])


def test_units_alone_tell_rows_from_columns(tmp_path):
    """Names of dimensions as NCL gives them to fields of GRIB files."""
    whole = field().rename(latitude="g0_lat_1", longitude="g0_lon_2").transpose("time", "g0_lon_2", "g0_lat_1")
    write(whole, tmp_path / "a.nc")
    assert open_grid(tmp_path / "a.nc").shape == (len(SIX_HOURS), 9, 12, 1)


def test_latitudes_of_pixels_in_the_group_above_are_no_field(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["lat"] = np.zeros((4, 5))
        f["lat"].attrs["units"] = "degrees_north"
        f["data/rain"] = np.zeros((3, 4, 5))
    assert open_grid(tmp_path / "a.h5").info.names == ["data/rain"]


# Files


def test_files_follow_one_another_in_time(tmp_path):
    whole = field()
    for name, part in (("b", slice(0, 3)), ("a", slice(3, 8))):  # names in another order than times
        write(whole.isel(time=part), tmp_path / f"{name}.nc")
    grid = open_grid(tmp_path)
    np.testing.assert_array_equal(read(grid)[..., 0], whole["t2m"].values)
    np.testing.assert_array_equal(grid.info.times, seconds(SIX_HOURS))
    write(whole.isel(time=slice(2, 3)), tmp_path / "c.nc")
    with pytest.raises(UserError, match="2020-01-01 12:00:00 comes twice .* after .*b.nc; name files that follow"):
        open_grid(tmp_path)
    write(whole.isel(time=[0, 2, 1]), tmp_path / "d.nc")
    with pytest.raises(UserError, match="2020-01-01 06:00:00 .* in the file itself; sort its frames by time"):
        open_grid(tmp_path / "d.nc")


def test_files_whose_numbers_are_ambiguous_are_in_the_order_of_arrays(tmp_path):
    """1.1 and 1.10 are no decimal numbers, or they would be one."""
    names = ["1.1.nc", "1.9.nc", "1.10.nc"]
    for name in names:
        write(field(SIX_HOURS[:1]).drop_vars("time"), tmp_path / name)
    relative = os.path.relpath(tmp_path)
    for path in (tmp_path, tmp_path / "*.nc", f"{relative}/*.nc"):
        assert [file.name for file in grid_files(path)] == names


def test_files_that_are_passed_over_are_named(tmp_path):
    """The files inside a Zarr store are parts of it."""
    write(field(SIX_HOURS[:3]), tmp_path / "a.nc")
    (tmp_path / "b.zarr").mkdir()
    for name in ("b.zarr/.zgroup", "b.zarr/0.0", "read.me", "old.nc4.bz2"):
        (tmp_path / name).write_text("x")
    notes = []
    assert [file.name for file in grid_files(tmp_path, notes)] == ["a.nc", "b.zarr"]
    assert "2 files passed over" in notes[0] and ".me 1" in notes[0] and ".bz2 1" in notes[0]
    shutil.rmtree(tmp_path / "b.zarr")
    config = Config(dataset="grid", cache_dir=str(tmp_path / ".cache"))
    assert notes[0] in grid_clips(tmp_path, config)[1] and notes[0] in open_input(tmp_path, config).notes
    (tmp_path / "read.me").unlink()  # after which the cache is used again
    assert any("1 file passed over" in note for note in grid_clips(tmp_path, config)[1])


def test_each_file_has_dimensions_and_levels_in_its_own_order(tmp_path):
    whole = xarray.concat(
        [field(seed=i).expand_dims(level=[level]) for i, level in enumerate((1000.0, 850, 500))], "level"
    )
    write(whole.isel(time=slice(0, 3)), tmp_path / "a.nc")
    write(whole.isel(time=slice(3, 5), level=slice(None, None, -1)), tmp_path / "b.nc")
    write(whole.isel(time=slice(5, 8)).transpose("latitude", "level", "longitude", "time"), tmp_path / "c.nc")
    expected = whole["t2m"].sel(level=[500, 1000]).transpose("time", "latitude", "longitude", "level")
    np.testing.assert_array_equal(read(open_grid(tmp_path, ["t2m@500", "t2m@1000"])), expected)


@pytest.mark.parametrize("form", ["dimension", "scalar", "unit"])
def test_fields_of_one_series_and_of_one_network_are_of_one_level(tmp_path, form):
    def at(level, times, **facts):
        facts, one = {"units": "hPa"} | facts, field(times)
        if form == "scalar":
            return one.assign_coords(plev=((), level, facts))
        levels = [level, level + 1] if form == "unit" else [level]
        return one.expand_dims(plev=levels).assign_coords(plev=("plev", levels, facts))

    other = at(850.0, SIX_HOURS[4:], units="m") if form == "unit" else at(500.0, SIX_HOURS[4:])
    write(at(850.0, SIX_HOURS[:4]), tmp_path / "a.nc")
    write(other, tmp_path / "b.nc")
    write(at(85000.0, SIX_HOURS[4:], units="Pa"), tmp_path / "same.nc")
    with pytest.raises(UserError, match="t2m level (500 hPa|850 m; 851 m), but .*a.nc: 850 hPa"):
        open_grid(tmp_path / "[ab].nc")
    variables = {"variables": ["t2m"], "input_channels": 2 if form == "unit" else 1}
    trained = build_dataset(
        "train", options(tmp_path / "a.nc", tmp_path, **variables, num_frames_output=1, data_range=KELVINS)
    ).value_range
    test = options(tmp_path / "a.nc", tmp_path, **variables, test_data_dir=str(tmp_path / "b.nc"))
    with pytest.raises(UserError, match="is at (500 hPa|850 m), but the network was trained on t2m.* at 850 hPa"):
        build_dataset("test", test, trained)
    assert build_dataset("test", test, replace(trained, levels=())).value_range.levels == ()  # an older checkpoint
    if form == "scalar":
        build_dataset("test", replace(test, test_data_dir=str(tmp_path / "same.nc")), trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.assign_coords(latitude=d.latitude + 1), "coordinate latitude"),
        (lambda d: d.assign_coords(lat2=d.lat2 + 1), "coordinate lat2"),
        (lambda d: d.drop_vars("lat2"), "coordinate lat2"),
        (lambda d: d.assign(t2m=d.t2m.assign_attrs(units="degC")), "t2m units degC, but .*: K"),
        (lambda d: d.isel(longitude=slice(6)), "longitude 6"),
        (lambda d: d.drop_vars("time"), "times"),
        (lambda d: d.convert_calendar("noleap"), "its times are of another kind than"),
    ],
    ids=["coordinate", "pixels", "pixels missing", "unit", "size", "time", "calendar"],
)
def test_files_that_are_unlike_are_refused(tmp_path, change, message):
    if "of another kind" in message:
        pytest.importorskip("cftime")
    pixels = np.tile(np.linspace(60, 50, 9), (12, 1)).T
    whole = field().assign_coords(lat2=(("latitude", "longitude"), pixels, {"units": "degrees_north"}))
    write(whole.isel(time=slice(3)), tmp_path / "a.nc")
    write(change(whole.isel(time=slice(3, 8))), tmp_path / "b.nc")
    with pytest.raises(UserError, match=message):
        open_grid(str(tmp_path / "*.nc"))


def test_files_that_cannot_be_read_say_why(tmp_path):
    write(field(), tmp_path / "whole.nc")
    content = (tmp_path / "whole.nc").read_bytes()
    for name, data, message in (
        ("cut.nc", content[:200], "cannot be read as hdf5"),
        ("text.nc", b"no field at all", "not a whole NetCDF"),
        ("old.hdf", b"\x0e\x03\x13\x01" + content, "HDF4"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_grid(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        open_grid(tmp_path / "*.grib")


def test_a_file_without_frames_is_named(tmp_path):
    write(field(SIX_HOURS[:2]), tmp_path / "a.nc")
    write(field(SIX_HOURS[:0]), tmp_path / "b.nc")
    with pytest.raises(UserError, match="b.nc: t2m is empty .time 0, latitude 9, longitude 12.; leave the file out"):
        open_grid(tmp_path)


def test_a_missing_library_is_named_with_its_installation(tmp_path):
    try:
        import cfgrib  # noqa: F401

        pytest.skip("cfgrib is installed")
    except ImportError:
        (tmp_path / "a.grib").write_bytes(b"GRIB" + bytes(100))
        with pytest.raises(UserError, match="pip install 'cfgrib'"):
            open_grid(tmp_path / "a.grib", ["t2m"])


def test_zarr_holds_what_netcdf_holds(tmp_path):
    pytest.importorskip("zarr")
    whole = field()
    whole.to_zarr(tmp_path / "a.zarr")
    grid = open_grid(tmp_path / "a.zarr")
    np.testing.assert_array_equal(read(grid)[..., 0], whole["t2m"].values)
    np.testing.assert_array_equal(grid.info.times, seconds(SIX_HOURS))


# Times


def test_a_fill_value_of_zarr_that_nobody_chose_is_said(tmp_path):
    """Zarr 2 makes 0 the fill value of an array that is made without one: dry pixels would be missing, unsaid."""
    zarr = pytest.importorskip("zarr")
    for number, (form, fill, said) in enumerate(((2, 0, True), (2, None, False), (3, 0, False))):
        group = zarr.open_group(tmp_path / f"{number}.zarr", mode="w", zarr_format=form)
        names = {"dimension_names": ("time", "y", "x")} if form == 3 else {}
        rain = group.create_array("rain", shape=(2, 3, 4), dtype="f4", fill_value=fill, **names)
        rain.attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
        rain[:] = np.arange(24.0).reshape(2, 3, 4) // 2
        grid = open_grid(tmp_path / f"{number}.zarr")
        assert np.isnan(read(grid)).sum() == 2 * said
        assert any("missing: 0, the fill value of rain in Zarr" in note for note in grid.notes) == said


def test_times_of_single_frames(tmp_path):
    """From a scalar variable, else from an attribute, else from the name; time_from goes before all."""
    frame = field().isel(time=0, drop=True)
    with_variable = frame.assign(valid_time=SIX_HOURS[1]).assign_attrs(time="2020-01-01T12:00:00Z")
    with_attribute = frame.assign_attrs(time="2020-01-01T12:00:00Z")
    sources = {}
    for name, dataset in (("variable", with_variable), ("attribute", with_attribute), ("name", frame)):
        path = tmp_path / name / "radar_9_20200101_1800.nc"
        path.parent.mkdir()
        write(dataset, path)
        time_from = "name:%Y%m%d_%H%M" if name == "name" else ""
        info = open_grid(path, time_from=time_from).info
        sources[name] = (info.time_source, info.times[0])
        info = open_grid(path, time_from="name:%Y%m%d_%H%M").info
        assert info.times[0] == seconds(SIX_HOURS)[3]
    assert sources["variable"] == ("the variable valid_time", seconds(SIX_HOURS)[1])
    assert sources["attribute"] == ("the attribute time", seconds(SIX_HOURS)[2])
    assert sources["name"] == ("the file's name (%Y%m%d_%H%M)", seconds(SIX_HOURS)[3])
    grid = open_grid(tmp_path / "name")
    assert grid.info.times is None and "times: none" in grid.notes[1]
    with h5py.File(tmp_path / "odim.h5", "w") as f:
        f["dataset1/data1/data"] = np.zeros((9, 12))
        f.create_group("what").attrs.update({"date": "20200101", "time": "180000"})
    info = open_grid(tmp_path / "odim.h5").info
    assert (info.time_source, info.times[0]) == ("the attributes what/date and what/time", seconds(SIX_HOURS)[3])


def initial(times):
    """When forecasts for these times began."""
    return times - np.timedelta64(6, "h")


def valid(dim, **facts):
    return {"valid_time": (dim, SIX_HOURS, facts)}


REFERENCE, VALID = {"standard_name": "forecast_reference_time"}, {"standard_name": "time"}
LEAD = {"standard_name": "forecast_period"}
# What a forecast holds instead of the time coordinate of its field: {layout: (coordinates, new name of the dimension)}
LAYOUTS = {
    "initial times": ({"time": ("time", initial(SIX_HOURS), REFERENCE), **valid("time", **VALID)}, "time"),
    "no standard names": ({"time": ("time", initial(SIX_HOURS)), **valid("time")}, "time"),
    "named initial": (
        {"initial_time": ("initial_time", initial(SIX_HOURS)), "time": ("initial_time", SIX_HOURS, VALID)},
        "initial_time",
    ),
    "no standard name and no known name": (
        {"initial_time": ("initial_time", initial(SIX_HOURS)), "verification": ("initial_time", SIX_HOURS)},
        "initial_time",
    ),
    "leads": ({"step": ("step", np.arange(8), LEAD), "time": SIX_HOURS[0], **valid("step")}, "step"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_times_are_those_for_which_forecasts_hold(tmp_path, layout):
    coordinates, dim = LAYOUTS[layout]
    whole = field().rename({} if dim == "time" else {"time": dim}).drop_vars(dim).assign_coords(coordinates)
    whole = whole.assign_coords(forecast_period=((), 6.0, LEAD | {"units": "hours"}), height=((), 2.0, {"units": "m"}))
    info = open_grid(write(whole.assign_attrs(time_coverage_end="2020-01-02", title="a title"), tmp_path / "a.nc")).info
    np.testing.assert_array_equal(info.times, seconds(SIX_HOURS))
    frames = np.zeros((1, 2, 9, 12, 1))
    times = [info.times, info.times]
    written = Forecast(frames, ValueRange(), np.dtype("f4"), False, info, times, 1, None, None).dataset()
    np.testing.assert_array_equal(written["time"], SIX_HOURS[-1] + np.timedelta64(6, "h") * np.arange(1, 3))
    assert written["t2m"].dims[0] == "time" and written["forecast_reference_time"] == SIX_HOURS[-1]
    assert set(written.coords) == {"time", "lead_time", "forecast_reference_time", "height", "latitude", "longitude"}
    assert written.attrs == {"Conventions": "CF-1.7", "title": "a title"}


def test_one_frame_has_the_time_for_which_it_holds(tmp_path):
    coordinates = {"time": ("time", initial(SIX_HOURS[:1]), REFERENCE), "valid_time": SIX_HOURS[0]}
    info = open_grid(write(field(SIX_HOURS[:1]).assign_coords(coordinates), tmp_path / "a.nc")).info
    assert (info.time_source, info.times[0]) == ("the variable valid_time", seconds(SIX_HOURS)[0])
    began = field().assign_coords(time=("time", SIX_HOURS, REFERENCE))
    assert "the times at which forecasts began" in open_grid(write(began, tmp_path / "b.nc")).notes[1]


HOURS = {"units": "hours since 2020-01-01"}


@pytest.mark.parametrize(
    ("values", "facts", "said"),
    [
        ([0, 2], HOURS | {"scale_factor": 0.5}, "2020-01-01 00:00:00 to 2020-01-01 01:00:00"),
        ([0, 2], {"units": "Hours Since 2020-01-01"}, "2020-01-01 00:00:00 to 2020-01-01 02:00:00"),
        ([0, 24], HOURS | {"calendar": "360_day"}, "2020-01-01 00:00:00 to 2020-01-02 00:00:00"),
        (["2020-01-01T00:00:00", "2020-01-01T02:00"], {}, "2020-01-01 00:00:00 to 2020-01-01 02:00:00"),
        ([0, np.nan], HOURS | {"calendar": "noleap"}, "a frame has no time"),
        (
            [20200131, 20200201],
            {"units": "day as %Y%m%d.%f"},
            "in the unit 'day as %Y%m%d.%f'; write them as days since",
        ),
        ([0, 1], {"units": "months since 2000-01-01"}, "cannot be read; write them as days since a date"),
    ],
    ids=["packed", "capitals", "360 days", "text", "missing", "no unit since a date", "months"],
)
def test_times_are_those_that_the_file_says(tmp_path, values, facts, said):
    if facts.get("calendar") == "360_day":
        pytest.importorskip("cftime")
    path = tmp_path / "a.nc"
    write(field(range(2)).assign_coords(time=("time", values, facts)), path)
    try:
        found = open_grid(path).notes[1]
    except UserError as error:
        found = str(error)
    assert said in found


def test_a_calendar_that_needs_another_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cftime", None)
    write(field(range(2)).assign_coords(time=("time", [0, 24], HOURS | {"calendar": "360_day"})), tmp_path / "a.nc")
    with pytest.raises(UserError, match="a.nc: times of the calendar 360_day need another package: pip install cftime"):
        open_grid(tmp_path / "a.nc")


def test_calendars_of_two_names_are_one(tmp_path):
    for i, calendar in enumerate(("gregorian", "standard", "proleptic_gregorian")):
        write(field(SIX_HOURS[2 * i : 2 * i + 2]), tmp_path / f"{i}.nc", encoding={"time": {"calendar": calendar}})
    assert np.array_equal(open_grid(tmp_path).info.times, seconds(SIX_HOURS[:6]))


def test_a_time_in_a_name_has_one_reading():
    assert time_from_name("RAD_NL25_RAP_5min_201008260005.h5", "%Y%m%d%H%M") == 1282781100
    assert time_from_name("2020/10/31/0010.nc", "%Y/%m/%d/%H%M") == 1604103000
    with pytest.raises(UserError, match="fits no place"):
        time_from_name("a_20201331.nc", "%Y%m%d")
    with pytest.raises(UserError, match="fits 2 places"):
        time_from_name("20200101_20200102.nc", "%Y%m%d")
    with pytest.raises(UserError, match="%Q"):
        time_from_name("a.nc", "%Q")
    assert time_from_text("26-AUG-2010;00:05:00.000") == 1282781100
    assert time_from_text("2020-10-31T01:10:00+01:00") == 1604103000
    assert time_from_text("2020-10-30T18:40:00-05:30") == 1604103000
    assert time_from_text("03/04/2020") is None
    for text, seconds in {"20201031": 0, "2020103112": 12 * 3600, "202010311230": 45000, "20201031T1230": 45000,
                          "20201031 123005": 45005, "20201031123005": 45005}.items():  # fmt: skip
        assert time_from_text(text) == 1604102400 + seconds, text
    assert (
        time_from_text("121512") is None and time_from_text("1604102400") is None
    )  # a time of day, seconds since 1970


@pytest.mark.parametrize(
    ("numbers", "dates"),
    [
        ([20240131, 20240201, 20240202], ["2024-01-31", "2024-02-01", "2024-02-02"]),
        ([2023123118, 2024010100, 2024010106], ["2023-12-31T18", "2024-01-01T00", "2024-01-01T06"]),
        ([202312.0, 202401.0, 202402.0], ["2023-12", "2024-01", "2024-02"]),
        ([202411, 202412, 202413], None),  # there is no month 13
        ([1990, 1991, 1992], None),
        ([20240131.5, 20240132, 20240133], None),
    ],
)
def test_whole_numbers_that_are_dates(tmp_path, numbers, dates):
    """As numbers they would count 69 steps from the end of January to the first of February."""
    path = write(field(range(3)).assign_coords(time=numbers), tmp_path / "a.nc")
    info = open_grid(path).info
    assert info.calendar == ("standard" if dates else "")
    np.testing.assert_array_equal(info.times, seconds(np.array(dates, "M8[ns]")) if dates else numbers)
    with_unit = field(range(3)).assign_coords(time=("time", numbers, {"units": "seconds"}))
    assert open_grid(write(with_unit, tmp_path / "b.nc")).info.calendar == ""


@pytest.mark.parametrize("form", ["CDF1", "HDF5"])
@pytest.mark.parametrize(("name", "dim", "separator"), [("Times", "Time", "_"), ("time", "time", " ")])
def test_times_that_are_texts_of_single_characters(tmp_path, form, name, dim, separator):
    """WRF, and every text in NetCDF-3."""
    texts = [str(time)[:19].replace("T", separator) for time in SIX_HOURS]
    characters, values = np.array(texts, "S19").view("S1").reshape(-1, 19), field()["t2m"].values
    axes = {dim: len(texts), "length": 19, "y": 9, "x": 12}
    path = tmp_path / "a.nc"
    if form == "CDF1":
        with netcdf_file(path, "w") as f:
            for axis, size in axes.items():
                f.createDimension(axis, size)
            f.createVariable(name, "c", (dim, "length"))[:] = characters
            f.createVariable("t2m", "f4", (dim, "y", "x"))[:] = values
    else:
        stored = xarray.Dataset({name: (dim, np.array(texts, "S19")), "t2m": ((dim, "y", "x"), values)})
        stored.to_netcdf(path, engine="h5netcdf")
        with h5py.File(path) as f:
            assert f[name].dtype == "S1" and f[name].shape == characters.shape
    for time_from in ("", f"variable:{name}"):
        grid = open_grid(path, ["t2m"], time_from=time_from)
        np.testing.assert_array_equal(grid.info.times, seconds(SIX_HOURS))
        np.testing.assert_array_equal(read(grid)[..., 0], values)


def test_gaps_and_a_regular_step(tmp_path):
    minutes = np.array([0, 10, 20, 31, 40, 70, 80, 91])
    times = np.datetime64("2020-01-01", "ns") + minutes * np.timedelta64(60, "s")
    whole = field(times)
    write(whole, tmp_path / "a.nc")
    assert open_grid(tmp_path / "a.nc").runs() == [(0, 5), (5, 8)]
    grid = open_grid(tmp_path / "a.nc", time_step="20min")
    # 0, 20, 40, (60 is missing: the nearest, 70, is as near to 80), 80, 100 (91)
    np.testing.assert_array_equal(grid.info.times - grid.info.times[0], np.array([0, 20, 40, 80, 100]) * 60)
    np.testing.assert_array_equal(read(grid)[..., 0], whole["t2m"].values[[0, 2, 4, 6, 7]])
    assert grid.runs() == [(0, 3), (3, 5)]
    minutes = np.array([0, 10, 60, 70, 120, 130])  # one hour from one frame that is taken to the next
    write(field(np.datetime64("2020-01-01", "ns") + minutes * np.timedelta64(60, "s")), tmp_path / "pairs.nc")
    assert open_grid(tmp_path / "pairs.nc", time_step="20min").runs() == [(0, 1), (1, 2), (2, 3)]
    assert runs_without_gap([0, 1, 2, 2.4, 3.4, 4.4]) == [(0, 3), (3, 6)]  # too near: a clock that was set back
    with pytest.raises(UserError, match="5 min, but the frames are 10 min apart"):
        open_grid(tmp_path / "a.nc", time_step="5min")
    write(field(np.arange(6)), tmp_path / "counted.nc")
    with pytest.raises(UserError, match="time_step 2s: the frames have no dates"):
        open_grid(tmp_path / "counted.nc", time_step="2s")
    assert len(open_grid(tmp_path / "counted.nc", time_step="2").info.times) == 3
    months = seconds(np.arange("2020-01", "2021-01", dtype="datetime64[M]"))
    assert runs_without_gap(months) == [(0, 12)]
    np.testing.assert_array_equal(
        later_times(months, 2, "standard"), seconds(np.array(["2021-01-01", "2021-02-01"], "datetime64[D]"))
    )
    indices, _ = nearest_frames(np.array([0.0, 9, 10, 11, 20]), 10)
    assert list(indices) == [0, 2, 4]


# What a forecast is written with


def test_sequences_are_read_in_blocks_and_at_a_regular_step(tmp_path, monkeypatch):
    """Three sequences of seven frames in one file; a block holds two frames."""
    numbers = np.arange(21.0).reshape(3, 7)
    values = np.broadcast_to(numbers[..., None, None], (3, 7, 8, 9))
    source = xarray.Dataset({"v": (("run", "time", "y", "x"), values)}, {"time": np.arange(7.0)})
    path = write(source, tmp_path / "a.nc")
    monkeypatch.setattr(grids, "BLOCK", 2 * 8 * 9)
    for step, places, breaks in (("", range(7), [7, 14]), ("2", [0, 2, 4, 6], [4, 8])):
        grid = open_grid(path, array_axes="NTHW", time_step=step)
        expected = numbers[:, places].ravel()
        assert read(grid)[:, 3, 4, 0].tolist() == expected.tolist()
        assert [frame[3, 4, 0] for frame in grid.frames(3, 10)] == expected[3:10].tolist()  # as predict.py reads a run
        assert grid.breaks == breaks and grid.sequences() == [(0, breaks[0]), tuple(breaks), (breaks[1], len(expected))]
        assert grid.info.times.tolist() == [*places] * 3


def test_a_forecast_has_names_units_and_coordinates_of_the_input(tmp_path):
    whole = field().expand_dims(level=[850, 1000, 500], axis=1)
    whole = whole * xarray.DataArray([1.0, 1.1, 0.9], dims="level").astype("f4")
    whole["t2m"].attrs |= {"units": "K", "grid_mapping": "crs"}
    whole = whole.assign(crs=((), 0, {"grid_mapping_name": "latitude_longitude"})).assign_attrs(title="a title")
    path = write(whole, tmp_path / "a.nc", encoding={"t2m": {"dtype": "i2", "scale_factor": 0.01, "_FillValue": -1}})
    grid = open_grid(path)
    assert grid.info.names == ["t2m@850", "t2m@1000", "t2m@500"]
    grid.info.save(tmp_path)
    info = GridInfo.load(tmp_path)
    frames = read(grid)
    frames[0, 2, 3] = np.nan
    info.dataset(frames, info.next_times(info.times, 8)).to_netcdf(tmp_path / "forecast.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "forecast.nc") as forecast:
        np.testing.assert_array_equal(forecast["t2m"].transpose("time", "latitude", "longitude", "level"), frames)
        np.testing.assert_array_equal(forecast["time"], SIX_HOURS + np.timedelta64(48, "h"))
        for name in ("latitude", "longitude", "level"):
            np.testing.assert_array_equal(forecast[name], whole[name])
        assert forecast["latitude"].attrs["units"] == "degrees_north" and forecast["t2m"].attrs["units"] == "K"
        assert forecast.attrs["title"] == "a title"
        assert forecast["crs"].attrs["grid_mapping_name"] == "latitude_longitude"
    crop = info.dataset(frames[:, :4, :5], None)
    assert crop["t2m"].shape == (8, 3, 4, 5) and "latitude" not in crop.coords


def test_a_forecast_is_a_field_of_cf(tmp_path):
    """As it is stored: what belongs to a field is named as CF has it. What is true of the input alone is left out."""
    whole = field().expand_dims(level=[500]).transpose("time", "level", ...)
    whole = whole.assign_coords(
        level=("level", [500], {"units": "hPa"}), crs=((), 0, {"grid_mapping_name": "latitude_longitude"})
    )
    whole["bounds_of_rows"] = ("latitude", "two"), np.zeros((9, 2))
    whole.latitude.attrs["bounds"] = "bounds_of_rows"
    whole.t2m.attrs |= {
        "grid_mapping": "crs",
        "actual_range": [1.0, 2.0],
        "ancillary_variables": "q",
        "STATISTICS_MEAN": "3",
    }
    whole.time.attrs["actual_range"] = [1.0, 2.0]
    info = open_grid(write(whole, tmp_path / "a.nc"), ["t2m"]).info
    unit = np.zeros((1, 2, 9, 12, 1), np.float32)
    for ending in (".nc", ".zarr"):
        if ending == ".zarr" and pytest.importorskip("zarr"):
            how = {"engine": "zarr", "consolidated": False}
        else:
            how = {"engine": "h5netcdf"}
        path = tmp_path / f"b{ending}"
        Forecast(unit, ValueRange(), unit.dtype, False, info, [info.times]).save(path)
        with xarray.open_dataset(path, decode_cf=False, **how) as stored:
            facts = {name: variable.attrs for name, variable in stored.variables.items()}
            assert stored.sizes == {"time": 2, "latitude": 9, "longitude": 12, "two": 2}
            assert stored.level.values == 500 and stored.level.attrs == {"units": "hPa"}
        assert {key: value for key, value in facts["t2m"].items() if key != "_FillValue"} == {
            "units": "K", "grid_mapping": "crs", "coordinates": "forecast_reference_time lead_time level",
        }  # fmt: skip
        assert facts["latitude"] == {"units": "degrees_north", "bounds": "bounds_of_rows"}
        assert (facts["time"]["standard_name"], facts["time"]["axis"]) == ("time", "T")
        assert "actual_range" not in facts["time"] and "_FillValue" not in facts["bounds_of_rows"]
        assert open_grid(path, ["t2m"]).info.levels == ["500 hPa"]


def test_files_that_count_from_their_start_stand_for_themselves(tmp_path):
    for name in "ab":
        write(field(np.arange(4), seed=ord(name)), tmp_path / f"{name}.nc")
    grid = open_grid(tmp_path)
    assert grid.runs() == [(0, 4), (4, 8)] and "sequences: 2" in grid.notes[2]


def test_a_forecast_after_numbered_frames_keeps_their_unit(tmp_path):
    """Hours since the start, without a date."""
    hours = ("time", np.arange(4), {"units": "hours"})
    info = open_grid(write(field(range(4)).assign_coords(time=hours), tmp_path / "a.nc")).info
    unit = np.zeros((1, 2, 9, 12, 1), np.float32)
    Forecast(unit, ValueRange(), unit.dtype, False, info, [info.times]).save(tmp_path / "b.nc")
    with xarray.open_dataset(tmp_path / "b.nc", engine="h5netcdf", decode_timedelta=True) as forecast:
        assert "standard_name" not in forecast.forecast_reference_time.attrs  # CF: that is a date
        for name, expected in {"time": [4, 5], "lead_time": [1, 2], "forecast_reference_time": 3}.items():
            np.testing.assert_array_equal(forecast[name], np.array(expected, "m8[h]"))


# Data sets


def options(path, tmp_path, **changes):
    given = {"num_frames_input": 2, "num_frames_output": 2, "input_size": [9, 12], "valid_fraction": 0.0,
             "test_fraction": 0.0, "data_range": [0.0, 1.0]}  # fmt: skip
    return Config(dataset="grid", train_data_dir=str(path), cache_dir=str(tmp_path / "cache"), **given | changes)


def numbered(hours):
    """A field whose values are the number of the frame, at these hours of a day."""
    times = np.datetime64("2020-01-01", "ns") + np.array(hours) * np.timedelta64(3600, "s")
    dataset = field(times)
    dataset["t2m"][:] = np.arange(len(hours))[:, None, None]
    return dataset


def sequences(data_set):
    """The numbers of the frames of each window, in order."""
    items = (data_set[i] for i in range(len(data_set)))
    return sorted([int(frame[0, 0, 0]) for part in item for frame in part] for item in items)


def test_no_sequence_crosses_a_gap(tmp_path):
    write(numbered([*range(6), *range(9, 15), 20]), tmp_path / "a.nc")
    train = build_dataset("train", options(tmp_path / "a.nc", tmp_path))
    assert sequences(train) == [list(range(i, i + 4)) for i in (0, 1, 2, 6, 7, 8)]
    # 13 frames in one piece would hold 10 sequences
    assert any("2 gaps in time" in note and "costs 4 sequences" in note for note in train.notes)
    every_second = build_dataset("train", options(tmp_path / "a.nc", tmp_path, frame_step=2, num_frames_output=1))
    assert sequences(every_second) == [[0, 2, 4], [6, 8, 10]]
    regular = build_dataset("train", options(tmp_path / "a.nc", tmp_path, time_step="3h", num_frames_output=1))
    # Hours 0, 3, 6 (nearest: 5), 9, 12, 15 (14), 21 (20); nothing is near to 18
    assert sequences(regular) == [[0, 3, 5], [3, 5, 6], [5, 6, 9], [6, 9, 11]]


def test_the_times_of_a_sequence_are_those_of_its_frames(tmp_path):
    """Every second frame, of two runs between which there is a gap. The channels of the calendar are of these times."""
    hours = np.array([*range(8), *range(11, 20)])
    write(numbered(hours), tmp_path / "a.nc")
    config = options(tmp_path / "a.nc", tmp_path, frame_step=2, test_data_dir=str(tmp_path / "a.nc"), calendar=True)
    data = build_dataset("test", config)
    facts, found = FieldFacts.of(data, config), sequences(data)
    assert found == [[0, 2, 4, 6], [8, 10, 12, 14], [10, 12, 14, 16]]
    times = 1577836800 + 3600.0 * hours[found]  # from 2020-01-01
    assert np.array_equal(facts.times, times[:, 1]) and np.array_equal(facts.valid, times[:, 2:])
    assert facts.lead_names(2) == ["2 h", "4 h"]
    for item in (data[i] for i in range(3)):
        frames = torch.cat(item)
        moments = np.datetime64("2020-01-01") + hours[frames[:, 0, 0, 0].int().numpy()].astype("m8[h]")
        assert np.array_equal(frames[:, 1:, 5, 7], calendar_features(moments))


def test_a_forecast_begins_after_the_last_gap(tmp_path):
    """Of a field, and of each of its sequences that stand for themselves."""
    path = write(numbered([0, 1, 2, 6, 7, 8, 9, 20, 21]), tmp_path / "a.nc")
    runs = np.arange(10.0).reshape(2, 5, 1, 1)
    times = {"time": [0.0, 1.0, 2.0, 5.0, 6.0]}
    both = xarray.Dataset({"v": (("run", "time", "y", "x"), np.tile(runs, (1, 1, 8, 9)))}, times)
    several = write(both, tmp_path / "b.nc")

    def found(path, whole=False, **more):
        source = open_input(path, options(path, tmp_path, **more), whole)
        return [[int(frame[0, 0, 0]) for frame in sequence.frames()] for sequence in source.sequences], source

    numbers, source = found(path)
    assert numbers == [[7, 8]] and source.sequences[0].times.tolist() == seconds(numbered([20, 21]).time).tolist()
    assert source.notes[-1] == "2 gaps in time: only the 2 frames after the last are used"
    assert found(path, whole=True)[0] == [[0, 1, 2], [3, 4, 5, 6], [7, 8]]
    assert found(several, array_axes="NTHW")[0] == [[3, 4], [8, 9]]
    assert found(several, True, array_axes="NTHW")[0] == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]


def test_splits_are_parts_of_the_whole_time(tmp_path):
    """Not of each run between gaps: a run of a few frames would have no sequence left."""
    write(numbered([*range(10), *range(12, 22)]), tmp_path / "a.nc")
    found = {}
    for split in ("train", "valid", "test"):
        config = options(tmp_path / "a.nc", tmp_path, valid_fraction=0.3, test_fraction=0.2)
        found[split] = sequences(build_dataset(split, config))
    assert found["train"] == [list(range(i, i + 4)) for i in range(7)]  # frames 0 to 9
    assert found["valid"] == [list(range(i, i + 4)) for i in range(10, 13)]
    assert found["test"] == [list(range(i, i + 4)) for i in (16,)]


def test_runs_of_a_field_are_parts_by_file(tmp_path):
    write(numbered([*range(6), *range(9, 14), *range(17, 22)]), tmp_path / "a.nc")
    config = options(tmp_path / "a.nc", tmp_path, split_by="file", valid_fraction=0.3, test_fraction=0.3)
    found = [sequences(build_dataset(split, config)) for split in ("train", "valid", "test")]
    assert found == [[list(range(i, i + 4)) for i in firsts] for firsts in ((0, 1, 2), (6, 7), (11, 12))]


def test_options_that_do_not_fit_are_refused(tmp_path):
    write(numbered(range(8)), tmp_path / "a.nc")
    with pytest.raises(UserError, match="t2m make 1 channels, but input_channels is 3"):
        build_dataset("train", options(tmp_path / "a.nc", tmp_path, input_channels=3))
    with pytest.raises(UserError, match="variables is for grid, not for moving_mnist"):
        build_dataset("train", Config(variables=["t2m"]))


# Forcings


def forced(tmp_path):
    """A field with a forcing that changes with time, one that does not, and one that lies in another file."""
    whole = numbered(range(30))
    whole["sun"] = whole["t2m"] * 2 + 1
    whole["height"] = whole["t2m"].isel(time=0, drop=True) + 7
    write(whole, tmp_path / "a.nc")
    mask = xarray.Dataset({"mask": whole["height"] - 5}).drop_vars("time", errors="ignore")
    write(mask, tmp_path / "steady.nc")
    return tmp_path / "a.nc", ["sun", "height", f"{tmp_path / 'steady.nc'}:mask"]


def test_forcings_follow_the_forecast_channels(tmp_path):
    path, forcings = forced(tmp_path)
    grid = open_grid(path, ["t2m"], forcings=forcings)
    assert grid.info.names == ["t2m"] and grid.info.forcings == ["sun", "height", "mask"]
    numbers = np.arange(30.0)
    expected = np.stack((numbers, 2 * numbers + 1, np.full(30, 7.0), np.full(30, 2.0)), axis=1)
    np.testing.assert_array_equal(read(grid)[:, 3, 4], expected)
    assert grid.steady() == [False, True, True]
    with xarray.open_dataset(path) as whole:  # files of one frame do not say what changes from file to file
        write(whole.isel(time=0, drop=True), tmp_path / "one.nc")
    assert open_grid(tmp_path / "one.nc", ["t2m"], forcings=["sun", "height"]).steady() == [False, False]
    config = options(path, tmp_path, variables=["t2m"], forcings=forcings, calendar=True, input_size=[8, 12])
    inputs, targets = build_dataset("train", config)[0]
    assert inputs.shape[1] == targets.shape[1] == 1 + config.forcing_channels == 8
    hour, day = (4 * np.pi / 24 * 0.5 * i for i in (1, 0))
    first = build_dataset("valid", options(path, tmp_path, variables=["t2m"], calendar=True, valid_data_dir=str(path)))[
        3
    ]
    hours = np.arange(3, 5) / 24  # of 1 January 2020
    for i, (turn, wave) in enumerate([(hours, np.sin), (hours, np.cos), (hours / 366, np.sin), (hours / 366, np.cos)]):
        np.testing.assert_allclose(first[0][:, 1 + i, 0, 0], 0.5 + 0.5 * wave(2 * np.pi * turn), atol=1e-6)


@pytest.mark.parametrize(
    ("forcings", "message"),
    [
        (["soil"], "no variable soil"),
        (["u"], "has 2 levels; name one: u@500"),
        (["{}/a.nc:sun"], "changes with time"),
        (["{}/other.nc:mask"], "coordinate latitude"),
    ],
)
def test_forcings_that_do_not_fit_are_refused(tmp_path, forcings, message):
    path, _ = forced(tmp_path)
    with xarray.open_dataset(path) as whole:
        levels = whole["t2m"].expand_dims(level=[500, 850], axis=1)
        write(whole.assign(u=levels), tmp_path / "b.nc")
    with xarray.open_dataset(tmp_path / "steady.nc") as steady:
        write(steady.assign_coords(latitude=steady.latitude + 1), tmp_path / "other.nc")
    with pytest.raises(UserError, match=message):
        open_grid(tmp_path / "b.nc", ["t2m"], forcings=[name.format(tmp_path) for name in forcings])


def test_fields_of_one_file_have_the_same_places_and_times(tmp_path):
    """Their sizes are the same, and their dimensions are of their own."""
    own = {"time": "time1", "latitude": "lat1", "longitude": "lon1"}
    other = field(seed=1).rename(own | {"t2m": "tp"})
    turned = other.isel(lat1=slice(None, None, -1))
    later = other.assign_coords(time1=other.time1 + np.timedelta64(3, "h"))
    messages = {
        "places": (turned, "places.nc: tp: its coordinate lat1 is not that of t2m; they are of different places"),
        "times": (later, "times.nc: tp has other times .time1. than t2m; name fields of the same times"),
    }
    for name, (wrong, message) in messages.items():
        path = write(field().merge(wrong), tmp_path / f"{name}.nc")
        with pytest.raises(UserError, match=message):
            open_grid(path, ["t2m", "tp"])
        with pytest.raises(UserError, match=message):
            open_grid(path, ["t2m"], forcings=["tp"])
    right = read(open_grid(write(field().merge(other), tmp_path / "right.nc"), ["t2m", "tp"]))
    np.testing.assert_array_equal(right[..., 1], other.tp)
    assert open_grid(tmp_path / "times.nc", ["t2m", "tp"], time_from="variable:time").shape == (8, 9, 12, 2)


def renamed(dataset):
    return dataset.rename(latitude="lat", longitude="lon")


def bare(dataset):
    """Without attributes of its coordinates."""
    dataset = renamed(dataset)
    return dataset.assign_coords(lat=dataset.lat.values, lon=dataset.lon.values)


def of_pixels(dataset):
    """Its dimensions have no coordinates, but its pixels have."""
    dataset = dataset.rename_dims(latitude="y", longitude="x").drop_indexes(["latitude", "longitude"])
    over = {"y": dataset.sizes["y"], "x": dataset.sizes["x"]}
    return dataset.assign_coords({n: dataset[n].variable.set_dims(over) for n in ("latitude", "longitude")})


FORMS = {"same names": lambda dataset: dataset, "other names": renamed, "bare": bare, "pixels": of_pixels}


@pytest.mark.parametrize("form", FORMS)
def test_a_field_of_other_places_is_told_whatever_its_coordinates_are_called(form):
    ours, change = field(), FORMS[form]
    plane = "latitude", "longitude"

    def unlike(theirs):
        theirs = change(theirs)
        return unlike_place(ours, plane, theirs, theirs["t2m"].dims[1:])

    assert unlike(ours) is None and unlike(field(height=5)) is None  # the second is another resolution
    for number, dim in enumerate(plane):
        name = change(ours)["t2m"].dims[1 + number] if form != "pixels" else dim
        assert unlike(ours.isel({dim: slice(None, None, -1)})) == name
        assert unlike(ours.assign_coords({dim: ours[dim] + 0.1})) == name
        assert unlike(ours.isel({dim: slice(7, 1, -1)})) == name
    assert unlike_place(ours, plane, xarray.Dataset(), ("y", "x")) is None


def on_plane(unit, size, **sizes):
    """A field on a plane, 9x12 pixels of 10 m, 5,000 km north of its origin; coordinates in a unit of `size` metres."""
    dataset = field(**sizes).rename(latitude="y", longitude="x")
    rows, columns = dataset.sizes["y"], dataset.sizes["x"]
    facts = {"units": unit} if unit else {}
    return dataset.assign_coords(
        y=("y", (5e6 - 10.0 * np.arange(rows)) / size, facts), x=("x", 10.0 * np.arange(columns) / size, facts)
    )


def test_coordinates_are_compared_in_one_unit():
    ours, plane = on_plane("m", 1), ("y", "x")

    def unlike(theirs):
        return unlike_place(ours, plane, theirs, theirs["t2m"].dims[1:])

    for theirs in (on_plane("km", 1000), on_plane("Metres", 1), on_plane("", 1), on_plane("km", 1000, height=5)):
        assert unlike(theirs) is None
    assert unlike(on_plane("km", 1)) == "y (in km, the other in m)"  # the same numbers
    assert unlike(on_plane("", 1000)) == "y"
    assert unlike(on_plane("1", 1)) == "y (in 1, the other in m)"
    assert unlike(field()) == "latitude (in degrees_north, the other in m)"
    radians = field().assign_coords(latitude=("latitude", np.deg2rad(field().latitude.values), {"units": "radian"}))
    assert unlike_place(field(), ("latitude", "longitude"), radians, ("latitude", "longitude")) is None


def test_a_shift_by_less_than_a_pixel_is_told_far_from_the_origin():
    ours, plane = on_plane("m", 1), ("y", "x")
    assert unlike_place(ours, plane, ours.assign_coords(y=ours.y - 5), plane) == "y"
    assert unlike_place(ours, plane, ours.assign_coords(y=ours.y.astype(np.float32)), plane) is None


def test_longitudes_that_cross_the_date_line_rise(tmp_path):
    """170, ..., 179, -180, -179 are the meridians 170 to 181."""
    plain = field().assign_coords(longitude=("longitude", np.arange(170.0, 182), {"units": "degrees_east"}))
    wrapped = plain.assign_coords(longitude=(plain.longitude + 180) % 360 - 180)
    wrapped.longitude.attrs["units"] = "degrees_east"
    plane = "latitude", "longitude"
    for theirs in (wrapped, wrapped.isel(longitude=slice(5, None))):
        assert unlike_place(plain, plane, theirs, plane) is None
        assert unlike_place(plain, plane, theirs.isel(longitude=slice(None, None, -1)), plane) == "longitude"
    assert open_grid(write(wrapped, tmp_path / "a.nc")).info.directions == ("falling", "rising")


@pytest.mark.parametrize(
    ("values", "direction"),
    [([1, 2, 4], 1), ([4, 2, 1], -1), ([3, 3], 0), ([5], 0), ([np.nan, 1, 2, np.nan], 1), ([np.nan, np.nan], 0)],
)
def test_the_direction_of_a_coordinate(values, direction):
    assert direction_of(np.array(values)) == direction


def test_a_steady_forcing_of_another_file_has_coordinates_of_other_names(tmp_path):
    whole = field()
    steady = renamed(whole.isel(time=0, drop=True).rename(t2m="z"))
    write(whole, tmp_path / "a.nc")
    write(steady.transpose("lon", "lat"), tmp_path / "z.nc")
    write(steady.isel(lat=slice(None, None, -1)), tmp_path / "turned.nc")
    found = read(open_grid(tmp_path / "a.nc", ["t2m"], forcings=[f"{tmp_path}/z.nc:z"]))
    np.testing.assert_array_equal(found[3, ..., 1], whole["t2m"][0])
    with pytest.raises(UserError, match="turned.nc: its coordinate lat is not that of .*a.nc"):
        open_grid(tmp_path / "a.nc", ["t2m"], forcings=[f"{tmp_path}/turned.nc:z"])


def test_a_climatology_is_of_the_places_of_the_test_set(tmp_path):
    whole = field()
    info = open_grid(write(whole, tmp_path / "a.nc")).info
    config = options(tmp_path / "a.nc", tmp_path)
    write(renamed(whole), tmp_path / "b.nc")
    write(whole.isel(latitude=slice(None, None, -1)), tmp_path / "c.nc")
    value_range = ValueRange(250.0, 310.0)
    climatology(tmp_path / "b.nc", config, value_range, info)
    with pytest.raises(UserError, match="--climatology .*c.nc: its coordinate latitude is not that of the test set"):
        climatology(tmp_path / "c.nc", config, value_range, info)


def test_a_climatology_is_cropped_as_the_test_is(tmp_path):
    """The margins are odd. One that has the size of the crop is taken as it is, and another one is refused."""
    whole = field(height=15, width=21)
    path = write(whole, tmp_path / "a.nc")
    config = options(path, tmp_path, frame_fit="crop", input_size=[8, 12], data_range=KELVINS, test_data_dir=path)
    data = build_dataset("test", config)
    info, stored = GridInfo.load(os.path.dirname(data.clips[0].path)), (15, 21)
    shown = data[0][0][0, 0]  # the first frame
    write(whole.isel(time=[0]), tmp_path / "first.nc")
    crop = climatology(tmp_path / "first.nc", config, data.value_range, info, stored)
    torch.testing.assert_close(crop[0], shown, rtol=0, atol=1e-6)
    write(whole.isel(time=[0], latitude=slice(4, 12), longitude=slice(5, 17)), tmp_path / "crop.nc")
    torch.testing.assert_close(climatology(tmp_path / "crop.nc", config, data.value_range, info, stored), crop)
    write(field(height=30, width=42), tmp_path / "large.nc")
    with pytest.raises(UserError, match=r"its frames become \(1, 30, 42\), but those of the test are \(1, 8, 12\)"):
        climatology(tmp_path / "large.nc", config, data.value_range, info, stored)


def test_the_weights_of_a_crop_are_those_of_its_rows(tmp_path):
    """21 rows of which 8 are shown: the margin is odd."""
    dataset = field(height=21, width=16)
    dataset["t2m"][:] = dataset.latitude
    config = options(
        write(dataset, tmp_path / "a.nc"),
        tmp_path,
        input_size=[8, 16],
        frame_fit="crop",
        data_range=[0.0, 1.0],
        test_fraction=0.5,
    )
    data = build_dataset("test", config)
    weights = data[0][0][0, 0].double().deg2rad().cos()
    info = GridInfo.load(os.path.dirname(data.clips[0].path))
    torch.testing.assert_close(latitude_weights(info, config), weights / weights.mean(), atol=1e-6, rtol=0)


def test_random_crops_show_values_where_most_of_the_map_is_missing(tmp_path):
    whole = field(SIX_HOURS, height=24, width=30)
    whole["t2m"][:, :, 12:] = np.nan  # the right side
    whole["t2m"][:, 14:] = np.nan  # and what lies below
    write(whole, tmp_path / "a.nc")
    config = options(
        tmp_path / "a.nc", tmp_path, frame_fit="crop", input_size=[7, 7], data_range=KELVINS, train_sequences=64
    )
    data = build_dataset("train", config)
    missing = [data[3, i][0][0].isnan().float().mean() for i in range(64)]
    assert max(missing) <= 0.5 and len({float(share) for share in missing}) > 2  # still at different places
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(data[3, 5], data[3, 5]))


def test_a_network_is_given_the_fields_of_its_training(tmp_path):
    whole = field()
    write(whole, tmp_path / "a.nc")
    write(whole.rename(t2m="sst"), tmp_path / "name.nc")
    write(whole.assign(t2m=whole.t2m.assign_attrs(units="degC")), tmp_path / "unit.nc")
    trained = build_dataset("train", options(tmp_path / "a.nc", tmp_path, data_range=KELVINS)).value_range
    assert ValueRange.from_dict(trained.to_dict()) == trained and trained.units == ("K",)
    for name, message in (
        ("name", "holds sst, but the network was trained on t2m"),
        ("unit", "is in degC, but .* in K"),
    ):
        with pytest.raises(UserError, match=message):
            build_dataset(
                "test", options(tmp_path / "a.nc", tmp_path, test_data_dir=str(tmp_path / f"{name}.nc")), trained
            )
    write(whole.assign(v=whole.t2m), tmp_path / "two.nc")
    two = dict(input_channels=2, test_data_dir=str(tmp_path / "two.nc"))
    trained_on_two = replace(trained, names=("t2m", "v"), units=("K", "K"))
    with pytest.raises(
        UserError, match="holds v, t2m, but the network was trained on t2m, v; name them .* in this order"
    ):
        build_dataset("test", options(tmp_path / "a.nc", tmp_path, variables=["v", "t2m"], **two), trained_on_two)
    named = options(tmp_path / "a.nc", tmp_path, test_data_dir=str(tmp_path / "name.nc"), variables=["sst"])
    assert len(build_dataset("test", named, trained)) == 5


def test_another_step_and_turned_maps_are_said(tmp_path):
    write(field(), tmp_path / "a.nc")
    trained = build_dataset("train", options(tmp_path / "a.nc", tmp_path, data_range=KELVINS)).value_range
    assert ValueRange.from_dict(trained.to_dict()).step == 6 * 3600
    turned = field(SIX_HOURS[0] + np.arange(8) * np.timedelta64(3600, "s")).isel(latitude=slice(None, None, -1))
    path = write(turned, tmp_path / "b.nc")
    notes = build_dataset("test", options(tmp_path / "a.nc", tmp_path, test_data_dir=path), trained).notes
    assert "frames are 1 h apart, but were 6 h apart in the training" in notes[-2]
    assert "the coordinate latitude is rising, but was falling in the training" in notes[-1]
    config = options(tmp_path / "a.nc", tmp_path, test_data_dir=path, frame_step=2)
    assert "frames are 2 h apart, but were 6 h" in build_dataset("test", config, trained).notes[-2]
    same = build_dataset("test", options(tmp_path / "a.nc", tmp_path, test_data_dir=str(tmp_path / "a.nc")), trained)
    assert not any("in the training" in note for note in same.notes)


def test_another_band_is_said(tmp_path):
    """The name of the field and its unit are the same, and a scalar coordinate alone tells them apart."""
    crs = ((), 0, {"grid_mapping_name": "latitude_longitude"})
    first, second = (
        write(field().assign_coords(band=band, height=2.0, crs=crs), tmp_path / f"{band}.nc") for band in (1, 2)
    )
    trained = build_dataset("train", options(first, tmp_path, data_range=KELVINS)).value_range
    assert ValueRange.from_dict(trained.to_dict()).labels == ("band 1",)
    said = [
        build_dataset("test", options(first, tmp_path, test_data_dir=path), trained).notes for path in (first, second)
    ]
    said = [[note for note in notes if "in the training" in note] for notes in said]
    assert said == [[], ["band is 2, but was 1 in the training: make sure that it is the same field"]]


@pytest.mark.parametrize(("quantity", "gain"), [("RATE", 0.5), ("DBZH", 0.4)])
def test_stored_numbers_of_another_meaning_are_said(tmp_path, quantity, gain):
    """ODIM: values keep their stored numbers, so a rate and a reflectivity have no unit and the same name."""
    for folder, what in (("a", ("DBZH", 0.5)), ("b", (quantity, gain))):
        (tmp_path / folder).mkdir()
        for minute in range(0, 50, 10):
            with h5py.File(tmp_path / folder / f"{minute:02d}.h5", "w") as f:
                f["dataset1/data1/data"] = np.random.default_rng(minute).integers(0, 200, (9, 12)).astype("u1")
                f.create_group("what").attrs.update(date="20200101", time=f"00{minute:02d}00")
                f.create_group("dataset1/data1/what").attrs.update(quantity=what[0], gain=what[1], offset=-32.0)
    name = "dataset1/data1/data"
    how = {"variables": [name], "input_size": [9, 12], "test_data_dir": str(tmp_path / "b")}
    trained = build_dataset("train", options(tmp_path / "a", tmp_path, **how)).value_range
    said = build_dataset("test", options(tmp_path / "a", tmp_path, **how), trained).notes[-1]
    assert said == (f"{name} is quantity {quantity}, gain {gain}, offset -32.0, but was quantity DBZH, gain 0.5, "
                    "offset -32.0 in the training: make sure that it is the same field")  # fmt: skip


def test_another_band_is_said_of_files_that_are_read_beside_others(tmp_path):
    """Of a climatology, of another method's forecasts, and of further files of a series. 1.0 is band 1."""

    def banded(name, band, hours=0):
        times = SIX_HOURS[:2] + np.timedelta64(hours, "h")
        return write(field(times).assign_coords(band=band, quality=0.5), tmp_path / name)

    first, same, other = banded("a.nc", 1), banded("b.nc", 1.0), banded("c.nc", 2)
    info, value_range = open_grid(first).info, ValueRange(*KELVINS, labels=("band 1",))
    config, notes = options(first, tmp_path, input_size=[9, 12]), []
    for path in (same, other):
        climatology(path, config, value_range, info, notes=notes)
    assert notes == [f"--climatology {other}: band is 2, but is 1 in the test set: make sure that it is the same field"]
    held = [StoredFields(Path(path), 1, (2, 1, 9, 12), FieldFacts(info)).notes[:-1] for path in (same, other)]
    assert held == [[], ["band is 2, but is 1 in the test set: make sure that it is the same field"]]
    banded("d1.nc", 2, 12)
    last = banded("d2.nc", 3, 24)
    series = [note for note in open_grid(tmp_path / "d*.nc").notes if "make sure" in note]
    assert series == [f"{last}: band is 3, but is 2 in {tmp_path / 'd1.nc'}: make sure that it is the same field"]


@pytest.mark.parametrize(
    "texts",
    ["m/s m.s-1 m.s^-1 m*s**-1 s-1·m", "mm/h mm/hr mm.hour-1", "kg/m2/s kg.m-2.s-1 s-1.kg.m-2", "W/m2.K W.m-2.K"],
)
def test_a_unit_has_several_spellings(texts):
    spellings = texts.split()
    assert all(same_unit(a, b) for a in spellings for b in (*spellings, spellings[0].replace(".", " ")))


@pytest.mark.parametrize("unit", ["", "1", "K", "m", "mm", "m s-1", "m s-2", "m/s/kg", "m s", "0.1 mm", "degC", "%"])
def test_another_unit_is_told(unit):
    others = {"", "1", "K", "m", "mm", "m/s", "m/s2", "m/(s kg)", "s*m-1", "mm 0.1", "C", "%"}
    assert {other for other in others if same_unit(unit, other)} <= {
        unit,
        *{"m s-1": ["m/s"], "m s-2": ["m/s2"]}.get(unit, ()),
    }


def test_fields_in_a_unit_that_is_spelled_in_another_way_are_those_of_the_training(tmp_path):
    """As ERA5 writes it and as CF does, in files of one series and in a test."""
    for i, unit in enumerate(("m s**-1", "m s-1", "m/s", "km/s")):
        wind = field(SIX_HOURS[2 * i : 2 * i + 2], name="u")
        write(wind.assign(u=wind.u.assign_attrs(units=unit)), tmp_path / f"{i}.nc")
    series = options(f"{tmp_path}/[01].nc", tmp_path, data_range=KELVINS, valid_fraction=0.0, test_fraction=0.0)
    trained = build_dataset("train", series).value_range
    assert trained.units == ("m s**-1",)
    alone = dict(num_frames_input=1, num_frames_output=1)
    assert (
        len(build_dataset("test", options(tmp_path, tmp_path, test_data_dir=str(tmp_path / "2.nc"), **alone), trained))
        == 1
    )
    with pytest.raises(UserError, match="is in km/s, but the network was trained on u in m s"):
        build_dataset("test", options(tmp_path, tmp_path, test_data_dir=str(tmp_path / "3.nc"), **alone), trained)
    with pytest.raises(UserError, match=r"3.nc: u units km/s, but .*0.nc: m s\*\*-1; make them alike"):
        open_grid(f"{tmp_path}/[03].nc")


def test_a_climatology_is_the_mean_of_all_frames_in_the_units_of_the_data(tmp_path):
    whole = field(SIX_HOURS[[0, 1, 2, 5, 6, 7]])
    whole.t2m[1, 2, 3] = np.nan
    path = write(whole, tmp_path / "a.nc")
    config = options(path, tmp_path, input_size=[9, 12])
    value_range = ValueRange(250.0, 310.0, names=("t2m",), units=("K",))
    mean = value_range.to_data(climatology(path, config, value_range)[0].numpy())
    np.testing.assert_allclose(mean, whole.t2m.mean("time"), rtol=1e-5)
    on_roots = ValueRange(0.0, 400.0, transform="sqrt", names=("t2m",), units=("K",))
    mean = 400 * climatology(path, config, on_roots)[0].numpy()  # anomalies are of the values, not of their roots
    np.testing.assert_allclose(mean, whole.t2m.mean("time"), rtol=1e-5)
    with pytest.raises(UserError, match="t2m is in K, but the network was trained on t2m in degC"):
        climatology(path, config, replace(value_range, units=("degC",)))


def test_predict_reads_a_folder_of_fields_for_a_network_that_was_trained_on_arrays(tmp_path):
    for i in range(2):
        write(field(SIX_HOURS[4 * i : 4 * i + 4], seed=i), tmp_path / f"{i}.nc")
    (tmp_path / "readme.txt").write_text("of the provider")
    source = open_input(tmp_path, Config(dataset="array"))
    assert source.info.names == ["t2m"] and sum(1 for _ in source.sequences[0].frames()) == 8


def test_fields_name_themselves_to_a_network_that_was_trained_on_arrays(tmp_path):
    path = write(field(), tmp_path / "a.nc")
    trained = ValueRange(250.0, 310.0)
    test_set = build_dataset("test", options(path, tmp_path, test_data_dir=path), trained)
    assert (test_set.value_range.names, test_set.value_range.units) == (("t2m",), ("K",))
    assert "whether they were t2m in K is not checked" in test_set.notes[-1]
    assert replace(test_set.value_range, names=(), units=()) == trained
