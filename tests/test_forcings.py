"""Forcings are channels that are given, in the horizon too, and never forecast."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import predict
from dataset import build_dataset
from functions import RolloutLoss, evaluate
from vmrnn.checkpoint import save_weights
from vmrnn.config import Config
from vmrnn.data.ranges import Summary, outside_notes
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange


@pytest.fixture(params=["VMRNN-B", "VMRNN-D"])
def model(request):
    torch.manual_seed(0)
    return build_model(
        request.param, patch_size=2, in_chans=5, out_chans=2, embed_dim=16, depths=[1], depths_down=[1], depths_up=[1],
        drop_path_rate=0.0, scan="torch",
    ).eval()  # fmt: skip


def frames(count, seed):
    return torch.rand(2, count, 5, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_rollout_uses_the_known_forcings_and_nothing_else_of_the_future(model):
    inputs, following = frames(3, 0), frames(4, 1)
    outputs = rollout(model, inputs, 4, following=following)
    assert outputs.shape == (2, 6, 2, 8, 8)

    # By hand, frame by frame
    found, states = [], None
    for frame in inputs.unbind(1):
        output, states = model(frame, states)
        found.append(output)
    for t in range(3):
        output, states = model(torch.cat((found[-1], following[:, t, 2:]), dim=1), states)
        found.append(output)
    torch.testing.assert_close(outputs, torch.stack(found, 1), rtol=1e-4, atol=1e-5)

    other_truth = following.clone()
    other_truth[:, :, :2] = torch.nan
    assert torch.equal(rollout(model, inputs, 4, following=other_truth), outputs)
    other_forcing = following.clone()
    other_forcing[:, 2, 4] += 1  # given with the third forecast, so only the fourth can change
    changed = rollout(model, inputs, 4, following=other_forcing)
    assert torch.equal(changed[:, :5], outputs[:, :5]) and not torch.equal(changed[:, 5], outputs[:, 5])


def test_forcings_that_are_not_given_are_asked_for(model):
    assert rollout(model, frames(3, 0), 1).shape == (2, 3, 2, 8, 8)
    with pytest.raises(UserError, match="has 3 forcings: give those of the 3 frames after"):
        rollout(model, frames(3, 0), 4)


def test_loss_and_metrics_are_of_what_is_forecast(model):
    inputs, targets = frames(3, 0), frames(2, 1)
    other = targets.clone()
    other[:, 1, 2:] = 0.3  # the forcings of the last frame are never fed
    seen = []
    results = [
        evaluate(model, [(inputs, t)], torch.device("cpu"), ("mse",), RolloutLoss(),
        on_batch=lambda *batch: seen.append(batch))
        for t in (targets, other)
    ]  # fmt: skip
    assert results[0] == results[1]
    assert all(tensor.shape[2] == 2 for tensor in seen[0][1:])
    outputs = rollout(model, inputs, 2, following=targets)
    without = (outputs, inputs[:, :, :2], targets[:, :, :2])
    assert RolloutLoss()(outputs, inputs, targets) == RolloutLoss()(*without)
    expected = (outputs[:, 2:] - targets[:, :, :2]).square().sum(dim=(2, 3, 4)).mean().item()
    assert results[0][1]["forecast"]["mean"]["mse"] == pytest.approx(expected, rel=1e-5)


def test_a_forcing_is_held_against_its_own_range():
    """Which lies behind those of the channels that are forecast."""
    ends = [0.0, 0.0], [10.0, 1000.0]  # rain and sun
    summary = Summary(*ends, *ends, frames=1, looked_at=1, pixels=2, missing=0, occurs=[])
    trained = ValueRange(0.0, 10.0, given=ValueRange((0.0,), (1000.0,)))
    assert outside_notes(summary, trained, "test") == []
    (note,) = outside_notes(summary, replace(trained, given=ValueRange((0.0,), (1.0,))), "test")
    assert "0 to 1000 of channel 1 lie in part far outside the range 0 to 1 of the training" in note


# From files


@pytest.fixture
def trained(tmp_path):
    """Files of a field with forcings, and a network for them: (folder, Config, model, ValueRange)."""
    import xarray

    rng = np.random.default_rng(0)
    hours = np.datetime64("2020-03-01T18", "ns") + np.arange(24) * np.timedelta64(1, "h")
    dims, place = ("time", "y", "x"), {"y": np.arange(8.0), "x": np.arange(12.0)}
    whole = xarray.Dataset(
        {
            "rain": (dims, rng.random((24, 8, 12), "f4"), {"units": "mm"}),
            "sun": (dims, rng.random((24, 8, 12), "f4")),
            "height": (("y", "x"), rng.random((8, 12), "f4")),
        },
        place | {"time": hours},
    )
    whole.to_netcdf(tmp_path / "whole.nc", engine="h5netcdf")
    whole.isel(time=slice(20)).to_netcdf(tmp_path / "past.nc", engine="h5netcdf")
    whole.drop_vars(["rain"]).isel(time=slice(20, 24)).to_netcdf(tmp_path / "coming.nc", engine="h5netcdf")
    whole.drop_vars(["rain"]).isel(time=slice(20, 22)).to_netcdf(tmp_path / "short.nc", engine="h5netcdf")
    xarray.Dataset({"mask": (("y", "x"), rng.random((8, 12), "f4"))}, place).to_netcdf(
        tmp_path / "mask.nc", engine="h5netcdf"
    )
    config = Config(
        dataset="grid", train_data_dir=str(tmp_path / "whole.nc"), cache_dir=str(tmp_path / "cache"),
        variables=["rain"],
        forcings=["sun", "height", f"{tmp_path / 'mask.nc'}:mask"], calendar=True, input_size=[8, 12],
        num_frames_input=20,
        num_frames_output=4, valid_fraction=0.0, test_fraction=0.0, model="VMRNN-B", patch_size=2, embed_dim=16,
        depths=[1],
        scan="torch",
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(**config.network_options).eval()
    data = build_dataset("train", config)
    save_weights(tmp_path / "best.safetensors", model, config.to_dict(), data.value_range)
    return tmp_path, config, model, data


def predict_from(folder, *more, **changes):
    options = {
        "checkpoint": "best.safetensors",
        "input": "past.nc",
        "forcing_data": "coming.nc",
        "output": "out.nc",
    } | changes
    arguments = [part for key, name in options.items() if name for part in (f"--{key}", str(folder / name))]
    predict.main([*arguments, "--horizon", "4", "--scan", "torch", "--device", "cpu", *more])


def test_predict_gives_the_network_what_training_gave_it(trained):
    folder, config, model, data = trained
    predict_from(folder)
    inputs, targets = data[0]
    with torch.no_grad():
        outputs = rollout(model, inputs[None], 4, following=targets[None])[0, -4:]
    import xarray

    with xarray.open_dataset(folder / "out.nc") as forecast:
        assert list(forecast.data_vars) == ["rain"]
        expected = data.value_range.to_data(outputs[:, 0].numpy()[..., None])[..., 0]
        np.testing.assert_allclose(forecast["rain"], expected, atol=1e-5)
        assert forecast["time"].values[0] == np.datetime64("2020-03-02T14", "ns")
    predict_from(folder, "--frame_step", "2", "--last", "4", "--horizon", "3")  # frames 13, 15, 17 and 19
    with torch.no_grad():
        outputs = rollout(model, inputs[None, 13::2], 3, following=targets[None, 1::2])[0, -3:]
    with xarray.open_dataset(folder / "out.nc") as forecast:
        expected = data.value_range.to_data(outputs[:, 0].numpy()[..., None])[..., 0]
        np.testing.assert_allclose(forecast["rain"], expected, atol=1e-5)
        assert forecast["time"].values[0] == np.datetime64("2020-03-02T15", "ns")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forcing_data": None}, "needs sun for the 3 frames after the input"),
        ({"forcing_data": "past.nc"}, "holds no sun at 2020-03-02 14:00:00"),
        ({"forcing_data": "short.nc"}, "holds no sun at 2020-03-02 16:00:00"),
        ({"input": "coming.nc"}, "no variable rain"),
        ({"input": "bare.nc"}, "no variable sun in it; it has rain"),
    ],
)
def test_predict_refuses_an_input_that_lacks_a_forcing(trained, changes, message):
    import xarray

    folder = trained[0]
    with xarray.open_dataset(folder / "past.nc") as past:
        past[["rain"]].to_netcdf(folder / "bare.nc", engine="h5netcdf")
    with pytest.raises(UserError, match=message):
        predict_from(folder, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coming: coming.isel(y=slice(None, None, -1)), "its coordinate y is not that of the input"),
        (lambda coming: coming.assign(sun=coming.sun.assign_attrs(units="kW")), "sun is in kW, but in no unit in the "
                                                                                "input"),
        (lambda coming: coming.assign(sun=coming.sun.expand_dims(level=[1, 2], axis=1)), "holds sun@1, sun@2, but .* "
                                                                                         "one level"),
        (lambda coming: pytest.importorskip("cftime") and coming.convert_calendar("noleap"), "its calendar is "
                                                                                             "noleap, that of the "
                                                                                             "input standard"),
    ],
    ids=["turned", "unit", "levels", "calendar"],
)  # fmt: skip
def test_predict_refuses_forcings_that_are_not_those_of_the_input(trained, change, message):
    import xarray

    with xarray.open_dataset(trained[0] / "coming.nc") as coming:
        change(coming).to_netcdf(trained[0] / "changed.nc", engine="h5netcdf")
    with pytest.raises(UserError, match=message):
        predict_from(trained[0], forcing_data="changed.nc")


def test_predict_says_that_forcings_are_of_another_member(trained, caplog):
    import xarray

    folder = trained[0]
    for number, name in enumerate(("past", "coming")):
        with xarray.open_dataset(folder / f"{name}.nc") as source:
            source.assign_coords(number=number).to_netcdf(folder / f"{name}_{number}.nc", engine="h5netcdf")
    with caplog.at_level("INFO", "vmrnn"):
        predict_from(folder, input="past_0.nc", forcing_data="coming_1.nc")
    assert f"{folder / 'coming_1.nc'}: number is 1, but is 0 in the input" in caplog.text


def test_predict_refuses_an_input_with_a_forcing_in_another_unit(trained):
    import xarray

    with xarray.open_dataset(trained[0] / "past.nc") as past:
        past.assign(sun=past.sun.assign_attrs(units="kW")).to_netcdf(trained[0] / "changed.nc", engine="h5netcdf")
    with pytest.raises(UserError, match="sun is in kW, but the network was trained on sun in no unit"):
        predict_from(trained[0], input="changed.nc")


def test_a_damaged_file_of_forcings_is_named(trained):
    """Its header is whole. Its values are not, which shows when they are unpacked."""
    import h5py
    import xarray

    folder, config, _, _ = trained
    path = folder / "mask.nc"
    with xarray.open_dataset(path, engine="h5netcdf") as mask:
        mask = mask.load()
    mask.to_netcdf(path, engine="h5netcdf", encoding={"mask": {"zlib": True}})
    with h5py.File(path) as file:
        piece = file["mask"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[piece.byte_offset : piece.byte_offset + piece.size] = bytes(piece.size)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mask.nc: mask cannot be read .*fetch it again"):
        build_dataset("train", config)
