"""What test.py writes for experts: forecasts of the whole test set, figures of others' forecasts, fields' facts."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import xarray
from helpers import data_set
from matplotlib.figure import Figure

import predict as predict_program
import test as test_program
from vmrnn import config as configuration
from vmrnn.checkpoint import save_weights
from vmrnn.data.grids import open_grid
from vmrnn.errors import UserError
from vmrnn.field_facts import FieldFacts
from vmrnn.forecast_files import Forecast
from vmrnn.forecast_store import ForecastWriter, StoredFields, StoredForecasts
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.spectrum import Spectrum
from vmrnn.values import ValueRange

OPTIONS = dict(
    model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4, input_size=[16, 20], num_frames_input=3,
    num_frames_output=2, dataset="grid", data_range=[250.0, 310.0], valid_fraction=0.0, test_fraction=0.5,
    test_batch_size=3, thresholds=[280.0], fss_windows=[5],
)  # fmt: skip


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """(folder, options, network): 24 frames of a moving temperature field on a latitude grid, and a network."""
    folder = tmp_path_factory.mktemp("field")
    y, x, t = np.meshgrid(np.arange(16), np.arange(20), np.arange(24), indexing="ij")
    values = (280 + 25 * np.sin((x - t) / 3) * np.cos(y / 4)).transpose(2, 0, 1).astype(np.float32)
    values[:, 0, :5] = np.nan
    times = np.datetime64("2024-01-31T00:00", "ns") + np.arange(24) * np.timedelta64(10, "m")
    xarray.Dataset(
        {"t2m": (("time", "lat", "lon"), values, {"units": "K"})},
        {"time": times, "lat": ("lat", np.linspace(85, 10, 16), {"units": "degrees_north"}), "lon": np.arange(20.0)},
    ).to_netcdf(folder / "x.nc", engine="h5netcdf")
    options = OPTIONS | {"train_data_dir": str(folder / "x.nc"), "cache_dir": str(folder / "cache")}
    config = configuration.resolve(None, options)
    model = build_model(**config.network_options).eval()
    save_weights(folder / "w.safetensors", model, config.to_dict(), ValueRange(250.0, 310.0))
    return folder, options, model


def run(folder, *arguments, draw=True):
    """test.py in this process; returns what metrics.json holds. Two thirds of the time go into drawing curves."""
    with nullcontext() if draw else patch.object(Figure, "savefig", lambda figure, path, **_: Path(path).touch()):
        return run_and_draw(folder, *arguments)


def run_and_draw(folder, *arguments):
    test_program.main(["--device", "cpu", "--strips", "1", "--res_dir", str(folder), *map(str, arguments)])
    return json.loads((folder / "metrics.json").read_text())


def expected_arrays(options, model):
    """(inputs, truths, forecasts) of the test set in kelvins, (N, T, C, H, W)."""
    data = data_set("test", **options)
    items = [data[i] for i in range(len(data))]
    inputs, targets = (torch.stack(frames) for frames in zip(*items))
    with torch.no_grad():
        forecast = rollout(model, inputs, 2)[:, 2:]
    return [(250 + 60 * frames).numpy() for frames in (inputs, targets, forecast)]


def test_an_old_zarr_is_refused(field, tmp_path, monkeypatch):
    """zarr 2, which pip chooses beside an old NumPy."""
    monkeypatch.delattr(pytest.importorskip("zarr").Group, "create_array")
    arguments = ["--checkpoint", field[0] / "w.safetensors", "--save_forecasts", tmp_path / "all.zarr"]
    with pytest.raises(UserError, match="needs zarr 3, not"):
        run(tmp_path / "out", *arguments)
    assert not (tmp_path / "all.zarr").exists()


@pytest.mark.parametrize("ending", [".npz", ".nc", ".zarr"])
def test_the_forecasts_of_the_whole_test_set(field, tmp_path, ending):
    folder, options, model = field
    if ending == ".zarr":
        pytest.importorskip("zarr")
    path = tmp_path / f"all{ending}"
    run(tmp_path / "out", "--checkpoint", folder / "w.safetensors", "--save_forecasts", path, draw=ending == ".nc")
    expected = expected_arrays(options, model)
    if ending == ".npz":
        found = np.load(path)
    elif ending == ".nc":
        found = xarray.load_dataset(path, engine="h5netcdf")
    else:
        found = xarray.open_zarr(path, consolidated=False)
    for name, values in zip(("input", "truth", "forecast"), expected):
        np.testing.assert_allclose(np.asarray(found[name]), values, atol=1e-3)
    assert len(expected[0]) == 8
    if ending != ".npz":
        assert found.forecast.dims == ("sequence", "time", "channel", "lat", "lon")
        assert found.channel.values.tolist() == ["t2m"] and found.forecast.attrs["units"] == "K"
        np.testing.assert_array_equal(found.lead_time, np.timedelta64(10, "m") * np.arange(1, 3))
        # The test part is frames 12 to 23; the last input of its first sequence is frame 14.
        assert found.forecast_reference_time.values[0] == np.datetime64("2024-01-31T02:20")
        np.testing.assert_allclose(found.lat, np.linspace(85, 10, 16))
    assert not list(tmp_path.glob(".all*"))  # nothing half-written is left


def test_frames_without_times_are_counted_from_the_last_input(tmp_path):
    writer = ForecastWriter(tmp_path / "x.nc", 1, ValueRange(), FieldFacts())
    found = writer.coordinates([(3, 1, 4, 5), (2, 1, 4, 5), (2, 1, 4, 5)])
    assert found.input_time.values.tolist() == [-2, -1, 0] and found.lead_time.values.tolist() == [1, 2]


def test_the_same_forecasts_from_a_file_give_the_same_figures(field, tmp_path):
    """test.py --forecasts on what --save_forecasts wrote, in every layout; without the network."""
    folder, options, model = field
    own = run(
        tmp_path / "own", "--checkpoint", folder / "w.safetensors", "--save_forecasts", tmp_path / "all.npz", draw=False
    )
    forecast = np.load(tmp_path / "all.npz")["forecast"]
    np.save(tmp_path / "last.npy", np.moveaxis(forecast, 2, -1))
    np.save(tmp_path / "grey.npy", forecast[:, :, 0])
    np.savez(tmp_path / "named.npz", forecast=forecast)
    configuration.save_toml(configuration.resolve(None, options), tmp_path / "c.toml")
    for name in ("all.npz", "last.npy", "grey.npy", "named.npz"):
        other = run(
            tmp_path / "other", "--forecasts", tmp_path / name, "--config", tmp_path / "c.toml", draw=name == "all.npz"
        )
        for label, figures in own["results"].items():
            for metric, value in figures["mean"].items():
                got = other["results"][label]["mean"][metric]
                assert got == value or got == pytest.approx(value, rel=1e-4, abs=1e-6), (label, metric)
        assert other["loss"] is None and "motion" in other["results"]
    # The sequences of the report, in any order
    test_set = data_set("test", **options)
    facts = FieldFacts.of(test_set, configuration.resolve(None, options))
    for name in ("all.npz", "last.npy"):
        stored = StoredForecasts(tmp_path / name, "", 8, (2, 1, 16, 20), test_set.value_range, facts)
        roles = {"best": 5, "worst": 2, "median": 6}
        for shown in test_program.forecast_again(roles, torch.arange(8), stored, test_set, torch.device("cpu")):
            assert roles[shown.role] == shown.index == shown.errors
            np.testing.assert_allclose(250 + 60 * shown.forecast.numpy(), forecast[shown.index], atol=1e-3)
            np.testing.assert_array_equal(shown.targets, test_set[shown.index][1])
    np.save(tmp_path / "holes.npy", np.where(np.isnan(np.load(tmp_path / "all.npz")["truth"]), np.nan, forecast))
    run(tmp_path / "other", "--forecasts", tmp_path / "holes.npy", "--config", tmp_path / "c.toml")
    with pytest.raises(
        UserError, match=r"holds float32 \(7, 2, 16, 20\), but the test set has 8 sequences of 2 frames"
    ):
        np.save(tmp_path / "few.npy", forecast[:7, :, 0])
        run(tmp_path / "other", "--forecasts", tmp_path / "few.npy", "--config", tmp_path / "c.toml")
    with pytest.raises(UserError, match="holds NaN"):
        np.save(tmp_path / "nan.npy", forecast[:, :, 0] * np.nan)
        run(tmp_path / "other", "--forecasts", tmp_path / "nan.npy", "--config", tmp_path / "c.toml")
    with pytest.raises(UserError, match="--checkpoint, or another method's --forecasts"):
        run(tmp_path / "other")


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_forecasts_of_a_field_are_found_by_name_and_time(field, tmp_path, ending):
    """What --save_forecasts wrote, in another order, and what predict.py wrote of one sequence."""
    folder, options, model = field
    if ending == ".zarr":
        pytest.importorskip("zarr")
    configuration.save_toml(configuration.resolve(None, options), tmp_path / "c.toml")
    path = tmp_path / f"all{ending}"
    own = run(tmp_path / "own", "--checkpoint", folder / "w.safetensors", "--save_forecasts", path, draw=False)
    with xarray.open_dataset(path, decode_timedelta=True, **how_to_open(path)) as stored:
        turned = stored.load().isel(sequence=slice(None, None, -1)).transpose(..., "lon", "lat")
    turned.to_netcdf(tmp_path / "turned.nc", engine="h5netcdf")
    for name in (path.name, "turned.nc"):
        other = run(tmp_path / "other", "--forecasts", tmp_path / name, "--config", tmp_path / "c.toml", draw=False)
        assert other["results"]["forecast"]["mean"] == pytest.approx(
            own["results"]["forecast"]["mean"], rel=1e-4, abs=1e-6
        )
    # Frames 12 to 14 give 15 and 16. The test set has these five frames only, and the others of `all` are not used.
    with xarray.open_dataset(folder / "x.nc", engine="h5netcdf") as source:
        source.isel(time=slice(12, 15)).to_netcdf(tmp_path / "given.nc", engine="h5netcdf")
        source.isel(time=slice(12, 17)).to_netcdf(tmp_path / "five.nc", engine="h5netcdf")
    predict_program.main([
        "--checkpoint", str(folder / "w.safetensors"), "--input", str(tmp_path / "given.nc"), "--horizon", "2",
        "--output", str(tmp_path / f"next{ending}"), "--device", "cpu",
    ])  # fmt: skip
    figures = [
        run(tmp_path / "one", "--forecasts", tmp_path / name, "--config", tmp_path / "c.toml", "--test_data_dir",
            tmp_path / "five.nc", draw=name == "all.nc")["results"]["forecast"]["mean"]
        for name in (f"next{ending}", path.name)
    ]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)


def how_to_open(path):
    return {"engine": "zarr", "consolidated": False} if path.suffix == ".zarr" else {"engine": "h5netcdf"}


def test_forecasts_that_do_not_fit_the_field_are_refused(field, tmp_path):
    folder, options, model = field
    configuration.save_toml(configuration.resolve(None, options), tmp_path / "c.toml")
    times = np.datetime64("2024-01-31T02:20", "ns") + np.arange(8) * np.timedelta64(10, "m")
    lead = np.timedelta64(10, "m") * np.arange(1, 3)
    right = xarray.Dataset(
        {"t2m": (("sequence", "time", "lat", "lon"), np.full((8, 2, 16, 20), 280, np.float32))},
        {"forecast_reference_time": ("sequence", times), "lead_time": ("time", lead), "lat": np.linspace(85, 10, 16)},
    )
    for number, (wrong, message) in enumerate((
        (right.isel(sequence=slice(1, None)), "has no forecast from 2024-01-31T02:20:00"),
        (right.isel(lat=slice(1, None)), "holds 8 forecasts of 2 frames, 15x20, but the test set has 2 frames"),
        (right.assign_coords(lead_time=right.lead_time * 2), r"its lead times are \[1200.0, 2400.0\] s"),
        (right.assign_coords(lead_time=right.lead_time - lead[0]), r"its lead times are \[0.0, 600.0\] s"),
        (right.assign(t2m=right.t2m.assign_attrs(units="degC")), "t2m is in degC, but in K in the test set"),
        (right.isel(lat=slice(None, None, -1)), "its coordinate lat is not that of the test set"),
        (right.rename(t2m="rain"), "holds rain, but the test set needs t2m"),
        (right.drop_vars("forecast_reference_time").isel(sequence=[0]), "holds 1 forecasts without times"),
        (right.rename(time="step"), r"has the dimensions .*; they must be"),
    )):  # fmt: skip
        wrong.to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf")
        with pytest.raises(UserError, match=message):
            run(tmp_path / "x", "--forecasts", tmp_path / f"{number}.nc", "--config", tmp_path / "c.toml")


def test_channels_of_forecasts_are_found_by_their_names(tmp_path):
    dims, values = ("time", "lat", "lon"), np.arange(2 * 8 * 9, dtype=np.float32).reshape(2, 8, 9)
    field = xarray.Dataset({"hours": (dims, values, {"units": "hours"}), "rain": (dims, values + 1000)})
    field.to_netcdf(tmp_path / "field.nc", engine="h5netcdf")
    facts = FieldFacts(open_grid(tmp_path / "field.nc", ["hours", "rain"]).info)
    field.drop_attrs().to_dataarray("channel", name="forecast").sel(channel=["rain", "hours"]).to_netcdf(
        tmp_path / "swapped.nc"
    )
    for name in ("field.nc", "swapped.nc"):
        found = StoredFields(tmp_path / name, 1, (2, 2, 8, 9), facts).row(0)
        np.testing.assert_array_equal(found, np.stack((values, values + 1000), axis=1))
    with pytest.raises(UserError, match="its channels are rain, hours, but those of the test set are hours, snow"):
        facts.info.channels[1] = replace(facts.info.channels[1], name="snow")
        StoredFields(tmp_path / "swapped.nc", 1, (2, 2, 8, 9), facts)


def test_rows_and_columns_of_forecasts_are_told_by_their_coordinates(field):
    """Under the names of the test set or others; at other places they are refused."""
    folder, _, _ = field
    facts = FieldFacts(open_grid(folder / "x.nc").info)
    with xarray.open_dataset(folder / "x.nc", engine="h5netcdf") as source:
        right = source[["t2m"]].isel(time=slice(2)).load()
    other = right.rename(lat="latitude", lon="longitude")
    for forecast in (right, other.transpose("time", "longitude", "latitude")):
        forecast.to_netcdf(folder / "f.nc", engine="h5netcdf")
        found = StoredFields(folder / "f.nc", 1, (2, 1, 16, 20), facts).row(0)
        np.testing.assert_array_equal(found[:, 0], right.t2m)
    other.isel(latitude=slice(None, None, -1)).to_netcdf(folder / "f.nc", engine="h5netcdf")
    with pytest.raises(UserError, match="its coordinate latitude is not that of the test set"):
        StoredFields(folder / "f.nc", 1, (2, 1, 16, 20), facts)


def test_members_of_an_ensemble_keep_their_own_forecasts(tmp_path):
    """Two members with the same two reference times: each sequence gets its own forecast, or the file is refused."""
    times = np.datetime64("2024-01-31", "ns") + np.arange(4) * np.timedelta64(1, "h")
    values = np.zeros((4, 8, 9), np.float32)
    xarray.Dataset({"t2m": (("time", "lat", "lon"), values)}, {"time": times}).to_netcdf(tmp_path / "field.nc")
    info = open_grid(tmp_path / "field.nc", ["t2m"]).info
    members = [0, 1, 0, 1]
    facts = FieldFacts(info, info.times[members], info.times[members][:, None] + 3600.0, 3600.0)
    numbered = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None, None], (4, 1, 8, 9))
    right = xarray.Dataset(
        {"t2m": (("sequence", "time", "lat", "lon"), numbered)},
        {"forecast_reference_time": ("sequence", times[members]), "lead_time": ("time", [np.timedelta64(1, "h")])},
    )
    right.to_netcdf(tmp_path / "right.nc", engine="h5netcdf")
    found = StoredFields(tmp_path / "right.nc", 4, (1, 1, 8, 9), facts)
    assert [found.row(i).mean() for i in range(4)] == [0, 1, 2, 3]
    assert found.notes == ["sequences share their reference times: forecasts are taken in the order of the test set"]
    apart = FieldFacts(info, info.times[:2], facts.valid[:2], 3600.0)
    for number, (chosen, facts_of_test) in enumerate((([0, 2, 1, 3], facts), ([0, 1], facts), ([0, 1, 2, 3], apart))):
        right.isel(sequence=chosen).to_netcdf(tmp_path / f"{number}.nc", engine="h5netcdf")
        with pytest.raises(UserError, match="share a reference time, .* in the order of the test set"):
            StoredFields(tmp_path / f"{number}.nc", len(facts_of_test.times), (1, 1, 8, 9), facts_of_test)


@pytest.mark.parametrize("ending", [".nc", ".zarr"])
def test_forecasts_of_months_hold_for_their_own_months(tmp_path, ending):
    """Months differ in length. What --save_forecasts and predict.py write is scored at its own time."""
    if ending == ".zarr":
        pytest.importorskip("zarr")
    months = np.arange("2024-01", "2024-11", dtype="datetime64[M]").astype("datetime64[ns]")
    values = np.random.default_rng(0).normal(280, 5, (10, 16, 20)).astype(np.float32)
    source = xarray.Dataset({"t2m": (("time", "lat", "lon"), values, {"units": "K"})}, {"time": months})
    source.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    options = OPTIONS | {"train_data_dir": str(tmp_path / "x.nc"), "cache_dir": str(tmp_path / "cache")}
    options |= {"test_data_dir": str(tmp_path / "x.nc")}
    test_set, config = data_set("test", **options), configuration.resolve(None, options)
    facts, path = FieldFacts.of(test_set, config), tmp_path / f"all{ending}"
    assert facts.lead_names(2) == ["1 month", "2 months"]
    assert any("every 1 month, from the coordinate time" in note for note in test_set.notes)
    frames = [torch.stack(parts) for parts in zip(*(test_set[i] for i in range(len(test_set))))]
    with ForecastWriter(path, len(test_set), test_set.value_range, facts) as writer:
        writer(*frames, frames[1])
    with xarray.open_dataset(path, decode_timedelta=True, **how_to_open(path)) as found:
        np.testing.assert_array_equal(found.forecast_reference_time, months[2:-2])
        np.testing.assert_array_equal(found.valid_time, np.stack((months[3:-1], months[4:]), axis=1))
        assert found.lead_time.values.tolist() == [1, 2] and found.channel_units.values.tolist() == ["K"]
    # Of January to March, April and May
    shape = (2, 1, 16, 20)
    given = [facts.info.times[:3]]
    own = Forecast(
        np.zeros((1, 2, 16, 20, 1), np.float32), test_set.value_range, values.dtype, False, facts.info, given
    )
    assert own.lead_names() == ["1 month", "2 months"]
    own.save(tmp_path / f"next{ending}")
    first = replace(facts, times=facts.times[:1], valid=facts.valid[:1])
    for name in (path.name, f"next{ending}"):
        StoredFields(tmp_path / name, 1, shape, first)


def test_figures_in_kelvins_with_weights_of_latitudes(field, tmp_path):
    folder, options, model = field
    (tmp_path / "out").mkdir()
    for name in ("forecast_0099.png", "forecast_001.png"):  # of an earlier test, and of predict.py
        (tmp_path / "out" / name).touch()
    plain = run(tmp_path / "out", "--checkpoint", folder / "w.safetensors", "--climatology", folder / "x.nc")
    assert not (tmp_path / "out" / "forecast_0099.png").exists()
    assert (tmp_path / "out" / "forecast_001.png").exists()
    weighted = run(tmp_path / "out2", "--checkpoint", folder / "w.safetensors", "--latitude_weights")
    _, truth, forecast = expected_arrays(options, model)
    error = forecast - truth
    weights = np.broadcast_to(np.cos(np.deg2rad(np.linspace(85, 10, 16)))[:, None], error.shape)
    known = ~np.isnan(error)
    for found, w in ((plain, np.ones_like(error)), (weighted, weights)):
        mean = found["results"]["forecast"]["mean"]
        expected = {"mae_data": np.average(abs(error[known]), weights=w[known]),
                    "bias_data": np.average(error[known], weights=w[known]),
                    "rmse_data": np.sqrt(np.average(error[known] ** 2, weights=w[known]))}  # fmt: skip
        for name, value in expected.items():
            assert mean[name] == pytest.approx(value, rel=1e-4), name
    assert plain["lead_times"] == ["10 min", "20 min"]
    with xarray.open_dataset(folder / "x.nc", engine="h5netcdf") as source:
        mean = source.t2m.mean("time").values
    f, o = ((x - mean)[known] for x in (forecast, truth))
    assert plain["results"]["forecast"]["mean"]["acc"] == pytest.approx(
        (f * o).sum() / np.sqrt((f**2).sum() * (o**2).sum()), rel=1e-4
    )
    assert {"csi_280", "fbias_280", "ets_280", "fss_280_5px"} <= plain["results"]["forecast"]["mean"].keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "10 min" in page and "t2m" in page and (tmp_path / "out" / "spectrum.png").exists()


def test_latitudes_are_asked_of_data_without_them(tmp_path):
    options = dict(
        model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4, input_size=[16], num_frames_input=3,
        num_frames_output=2, train_data_dir="builtin", digit_size=8, num_objects=1, test_sequences=2,
    )  # fmt: skip
    config = configuration.resolve(None, options)
    save_weights(tmp_path / "w.safetensors", build_model(**config.network_options), config.to_dict())
    with pytest.raises(UserError, match="no coordinate of latitude"):
        run(tmp_path / "out", "--checkpoint", tmp_path / "w.safetensors", "--latitude_weights")


def test_a_plane_wave_has_its_power_at_its_wavenumber():
    x = torch.arange(64) / 64
    wave = (0.5 + 0.3 * torch.sin(2 * torch.pi * 5 * x)).expand(1, 2, 1, 64, 64)
    spectrum = Spectrum()
    spectrum.update("truth", wave)
    spectrum.update("truth", torch.full((3, 2, 1, 64, 64), torch.nan))  # frames with holes do not count
    power = spectrum.compute()["truth"]
    assert power.shape == (2, 33)
    rings = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64)).round()
    for k, expected in ((0, 0.25), (5, 2 * 0.15**2 / (rings == 5).sum()), (9, 0)):
        assert power[0, k] == pytest.approx(expected, abs=1e-9)


def test_blur_takes_power_from_small_scales_alone():
    noise = torch.rand(4, 1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    spectrum = Spectrum()
    spectrum.update("truth", noise)
    spectrum.update("forecast", torch.nn.functional.avg_pool2d(noise.flatten(0, 1), 3, 1, 1).view_as(noise))
    power = spectrum.compute()
    ratio = power["forecast"][0] / power["truth"][0]
    assert ratio[2:5].min() > 0.6 and ratio[20:].max() < 0.2
