"""Forecasts as files: the same values, names, units and coordinates as the input, continued in time."""

import logging
import tracemalloc

import numpy as np
import pytest
import torch
import xarray
from helpers import data_set, shared
from PIL import Image

import predict
import vmrnn
from vmrnn import config as configuration
from vmrnn.checkpoint import save_weights
from vmrnn.data.inputs import open_input
from vmrnn.data.prepare import Preparation
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange

SMALL = dict(
    model="VMRNN-B", patch_size=2, embed_dim=16, depths=[1], d_state=4, input_size=[16], dataset="grid",
    data_range=[250.0, 310.0],
)  # fmt: skip


def save_network(path, **options):
    """A network whose weights are larger than fresh ones, so that its forecasts depend on the past."""
    config = configuration.resolve(None, SMALL | options)
    model = build_model(**config.network_options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_weights(path, model, config.to_dict())
    return model, config


def field(frames=6, height=16, width=20, seed=0):
    """Temperature on a latitude and longitude grid, every 30 minutes, a corner never observed."""
    values = np.random.default_rng(seed).uniform(255, 305, (frames, height, width)).astype(np.float32)
    values[:, :3, :4] = np.nan
    values[1, 8, 8] = np.nan
    times = np.datetime64("2024-02-28T22:00", "ns") + np.arange(frames) * np.timedelta64(30, "m")
    return xarray.Dataset(
        {"t2m": (("time", "lat", "lon"), values, {"units": "K", "long_name": "temperature at 2 m"})},
        {"time": times, "lat": ("lat", np.linspace(50, 40, height), {"units": "degrees_north"}),
         "lon": ("lon", np.linspace(0, 9.5, width), {"units": "degrees_east"})},
        {"institution": "test"},
    )  # fmt: skip


def run(*arguments):
    predict.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_a_field_goes_on_with_its_names_units_and_times(tmp_path, ending):
    if ending == ".zarr":
        pytest.importorskip("zarr")
    save_network(tmp_path / "w.safetensors")
    source = field()
    source.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    output = tmp_path / f"y{ending}"
    common = ("--checkpoint", tmp_path / "w.safetensors", "--device", "cpu", "--input", tmp_path / "x.nc")
    run(*common, "--horizon", 4, "--output", output)
    got = (
        xarray.open_dataset(output, engine="h5netcdf")
        if ending == ".nc"
        else xarray.open_zarr(output, consolidated=False)
    )
    with got:
        assert got.t2m.dims == ("time", "lat", "lon") and got.t2m.attrs["units"] == "K"
        assert got.attrs["institution"] == "test" and got.t2m.attrs["long_name"] == "temperature at 2 m"
        step = np.timedelta64(30, "m")
        np.testing.assert_array_equal(got.time, source.time.values[-1] + step * np.arange(1, 5))
        np.testing.assert_array_equal(got.lead_time, step * np.arange(1, 5))
        assert got.forecast_reference_time.values == source.time.values[-1]
        np.testing.assert_array_equal(got.lat, source.lat)
        assert got.lon.attrs["units"] == "degrees_east"
        stream = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
        for frame in source.t2m.values:
            stream.observe(frame)
        expected = stream.forecast(4)
        missing = np.isnan(source.t2m.values).all(0)
        assert 0 < missing.sum() < 30  # the corner, and not the pixel that was missing once
        np.testing.assert_array_equal(np.isnan(got.t2m.values), np.broadcast_to(missing, expected.shape))
        np.testing.assert_allclose(got.t2m.values[:, ~missing], expected[:, ~missing], rtol=1e-6)


def test_the_last_frames_alone(tmp_path):
    save_network(tmp_path / "w.safetensors")
    field().to_netcdf(tmp_path / "all.nc", engine="h5netcdf")
    field().isel(time=slice(3, None)).to_netcdf(tmp_path / "last.nc", engine="h5netcdf")
    field().isel(time=[1, 3, 5]).to_netcdf(tmp_path / "second.nc", engine="h5netcdf")
    common = ("--checkpoint", tmp_path / "w.safetensors", "--device", "cpu", "--horizon", 3)
    run(*common, "--input", tmp_path / "all.nc", "--last", 3, "--output", tmp_path / "a.nc")
    run(*common, "--input", tmp_path / "last.nc", "--output", tmp_path / "b.nc")
    run(*common, "--input", tmp_path / "all.nc", "--frame_step", 2, "--output", tmp_path / "c.nc")
    run(*common, "--input", tmp_path / "second.nc", "--output", tmp_path / "d.nc")
    one, two, three, four = (xarray.open_dataset(tmp_path / f"{name}.nc", engine="h5netcdf") for name in "abcd")
    xarray.testing.assert_identical(one, two)
    xarray.testing.assert_identical(three, four)
    assert three.lead_time.values[0] == np.timedelta64(1, "h")


def test_many_sequences_give_many_forecasts(tmp_path):
    """(N, T, H, W) of whole numbers: one array of forecasts, each as if its sequence were alone; a film of each."""
    save_network(tmp_path / "w.safetensors", dataset="array", missing_value=[-1.0], data_range=[0.0, 200.0])
    frames = np.random.default_rng(0).integers(0, 200, (3, 5, 16, 12)).astype(np.int16)
    frames[1, :, 2:5, 3:6] = -1
    np.savez_compressed(tmp_path / "x.npz", frames)
    np.save(tmp_path / "x.npy", frames)
    common = ("--checkpoint", tmp_path / "w.safetensors", "--device", "cpu", "--horizon", 2)
    run(*common, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz", tmp_path / "y.gif", tmp_path / "y.nc")
    run(*common, "--input", tmp_path / "x.npy", "--output", tmp_path / "z.npy")
    together = np.load(tmp_path / "y.npz")["forecast"]
    assert together.dtype == np.int16 and together.shape == (3, 2, 16, 12)
    np.testing.assert_array_equal(together, np.load(tmp_path / "z.npy"))
    assert (together[1, :, 3, 4] == -1).all() and (together[0] != -1).all()
    for number in range(3):
        np.save(tmp_path / "one.npy", frames[number])
        run(*common, "--input", tmp_path / "one.npy", "--output", tmp_path / "one.npz", tmp_path / "p.png")
        np.testing.assert_array_equal(np.load(tmp_path / "one.npz")["forecast"], together[number])
        with Image.open(tmp_path / f"y_sequence{number:03d}.gif") as gif:
            assert gif.n_frames == 5 + 2  # the given frames, then the forecast
    assert {path.name for path in tmp_path.glob("p_*.png")} == {"p_001.png", "p_002.png"}
    with xarray.open_dataset(tmp_path / "y.nc", engine="h5netcdf") as got:
        assert got.forecast.dims == ("sequence", "time", "y", "x") and got.lead_time.values.tolist() == [1, 2]


def test_a_frame_of_another_size_is_prepared_as_in_training(tmp_path, caplog):
    """What the network sees in predict.py is the item of the data set; the forecast has the size of the input."""
    model, config = save_network(tmp_path / "w.safetensors", dataset="array", num_frames_input=6, num_frames_output=2)
    frames = field(8, 40, 52).t2m.values
    np.save(tmp_path / "x.npy", frames)
    own = data_set(
        "train", dataset="array", train_data_dir=str(tmp_path / "x.npy"), input_size=[16], data_range=[250.0, 310.0],
        num_frames_input=6, num_frames_output=2, valid_fraction=0.0, test_fraction=0.0, cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    with torch.no_grad():
        expected = rollout(model, own[0][0][None], 2)[0, 5:]
    np.save(tmp_path / "six.npy", frames[:6])
    common = ("--checkpoint", tmp_path / "w.safetensors", "--device", "cpu", "--input", tmp_path / "six.npy")
    with caplog.at_level(logging.INFO, "vmrnn"):
        run(*common, "--horizon", 2, "--output", tmp_path / "y.npy")
    assert "resized to the 16x16 of the training" in caplog.text
    forecast = np.load(tmp_path / "y.npy")
    restored = Preparation.of(config, ValueRange(250.0, 310.0)).restore(expected, (40, 52))[..., 0]
    known = ~np.isnan(forecast)
    assert forecast.shape == (2, 40, 52) and 0.9 < known.mean() < 1
    np.testing.assert_allclose(forecast[known], (250 + 60 * restored)[known], atol=2e-3)
    run(*common, "--horizon", 2, "--own_size", "--output", tmp_path / "own.npy")
    assert np.nanmax(np.abs(np.load(tmp_path / "own.npy") - forecast)) > 0.1


def test_reading_does_not_need_memory_for_the_whole_input(tmp_path):
    """13 MB of frames, one in memory at a time, from an unpacked and from a compressed array."""
    frames = np.zeros((400, 64, 64))
    np.save(tmp_path / "x.npy", frames)
    np.savez_compressed(tmp_path / "x.npz", frames)
    config = configuration.resolve(None, SMALL | {"dataset": "array"})
    for name in ("x.npy", "x.npz"):
        tracemalloc.start()
        (sequence,) = open_input(tmp_path / name, config).sequences
        count = sum(1 for frame in sequence.frames() if frame.shape == (64, 64, 1))
        assert count == 400 and tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_values_far_outside_are_reported_and_no_forecast_of_them_is_believed(tmp_path, caplog):
    save_network(tmp_path / "w.safetensors")
    stream = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
    frame = field(2).t2m.values[0]
    stream.observe(frame)
    assert not caplog.text
    stream.observe(frame - 273.15)  # degrees Celsius
    assert "lie outside the range of the training (250 to 310 as 0 to 1)" in caplog.text
    stream.reset()
    caplog.clear()
    filled = frame.copy()
    filled[5, 5] = 9.97e36
    stream.observe(filled)
    assert "far outside" in caplog.text and "name a fill value with missing_value" in caplog.text
    with pytest.raises(UserError, match="the forecast is not finite after 1 frames"):
        stream.forecast(2)


@pytest.mark.parametrize("transform", [{}, {"transform": "sqrt", "zero_below": 0.001}], ids=["linear", "sqrt"])
def test_values_that_span_next_to_nothing_are_reported(tmp_path, caplog, transform):
    """Metres for millimetres: 0 to 0.05 of a range from 0 to 50. A dry map is no reason to doubt."""
    options = {"data_range": [0.0, 50.0]} | transform
    _, config = save_network(tmp_path / "w.safetensors", **options)
    assert config.transform == transform.get("transform", "none")
    rain = np.random.default_rng(0).uniform(0, 50, (3, 16, 20)).astype(np.float32)
    rain[:, :5, :8], rain[:, 5:10, :8], rain[:, 0, 19] = 0, 50, np.nan
    stream = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
    for frames, said in ((rain, False), (0 * rain, False), (rain / 1000, True)):
        stream.reset()
        caplog.clear()
        for frame in frames:
            stream.observe(frame)
        for _ in range(2):
            stream.forecast(1)
        assert caplog.text.count("3 frames: the values span only 0.1 % of the range of the training") == said
    caplog.clear()
    xarray.Dataset({"rain": (("time", "y", "x"), rain / 1000)}).to_netcdf(tmp_path / "rain.nc", engine="h5netcdf")
    files = ("--input", tmp_path / "rain.nc", "--output", tmp_path / "next.npy")
    run("--checkpoint", tmp_path / "w.safetensors", *files, "--device", "cpu")
    assert "span only 0.1 % of the range of the training" in caplog.text


def test_a_refused_frame_changes_nothing(tmp_path):
    save_network(tmp_path / "w.safetensors")
    stream = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
    good = field(3).t2m.values
    bad = good[0].copy()
    bad[0, 0] = np.inf
    for wrong in (bad[:9], bad[:9].astype(complex), bad[:9].astype(str), bad[:9].astype(object), np.zeros((9, 20, 2))):
        with pytest.raises(UserError):
            stream.observe(wrong)
    plain = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
    for frame in good:
        stream.observe(frame)
        with pytest.raises(UserError):
            stream.observe(bad)
        plain.observe(np.ma.masked_array(np.nan_to_num(frame, nan=-999.0), np.isnan(frame)))
    np.testing.assert_array_equal(stream.forecast(2), plain.forecast(2))
    half = vmrnn.Forecaster(tmp_path / "w.safetensors", device="cpu")
    for frame in good:
        half.observe(torch.from_numpy(frame).bfloat16())
    np.testing.assert_allclose(half.forecast(2), stream.forecast(2), atol=3)


def test_the_real_radar_of_an_australian_station(tmp_path):
    """60 files of one frame each: the forecast opens in xarray with times that go on where the input ends."""
    folder = shared("fields/bom_nc")
    save_network(tmp_path / "w.safetensors", variables=["precipitation"], data_range=[0.0, 5.0])
    common = ("--checkpoint", tmp_path / "w.safetensors", "--device", "cpu", "--last", 3)
    run(*common, "--input", f"{folder}/*.nc", "--horizon", 2, "--output", tmp_path / "y.nc")
    with xarray.open_dataset(tmp_path / "y.nc", engine="h5netcdf") as got:
        last = xarray.open_dataset(sorted(folder.glob("*.nc"))[-1], engine="h5netcdf")
        step = np.timedelta64(10, "m")
        np.testing.assert_array_equal(got.time, last.valid_time.values + step * np.arange(1, 3))
        np.testing.assert_array_equal(got.x, last.x)
        assert got.precipitation.attrs["units"] == last.precipitation.attrs["units"]
        assert got.precipitation.dims == ("time", "y", "x") and got.precipitation.shape == (2, 512, 512)
