"""Forecasting a stream and a file: the same as a rollout, in the units of the data, whatever the frame size."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers import read_frames
from PIL import Image
from safetensors.torch import save_file

import predict
import vmrnn
from vmrnn import config as configuration
from vmrnn.checkpoint import save_checkpoint, save_weights
from vmrnn.data.inputs import Input
from vmrnn.data.prepare import as_channels, as_type
from vmrnn.data.times import later_times
from vmrnn.errors import UserError
from vmrnn.forecast_files import Forecast
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange

SMALL = dict(
    patch_size=2, embed_dim=16, depths=[1], depths_down=[1, 1], depths_up=[1, 1], d_state=4, input_size=[16, 16],
    device="cpu",
)  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """trained(channels=2, ...) -> (network, path of its weights with their configuration)."""

    def make(**options):
        config = configuration.resolve(None, SMALL | options)
        model = build_model(**config.network_options).eval()
        with torch.no_grad():  # fresh weights forecast much the same frame from any past
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_weights(tmp_path / "w.safetensors", model, config.to_dict())
        return model, tmp_path / "w.safetensors"

    return make


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model", ["VMRNN-B", "VMRNN-D"])
@pytest.mark.parametrize("size", [(16, 16), (13, 21)])
def test_a_stream_is_a_rollout(trained, model, size):
    """Frame by frame, at any moment, and as if no forecast had been asked for before."""
    network, path = trained(model=model, input_channels=2)
    unit = network.stride
    inputs = torch.rand(1, 5, 2, *size)
    padded = inputs.numpy()
    padded = np.pad(padded, ((0, 0),) * 3 + tuple((0, -n % unit) for n in size), "edge")
    stream = vmrnn.Forecaster(path, device="cpu", own_size=True)
    for t in range(5):
        stream.observe(inputs[0, t].permute(1, 2, 0).numpy())
        got = stream.forecast(3)
        with torch.no_grad():
            expected = rollout(network, torch.from_numpy(padded[:, : t + 1]), 3)[0, t:, :, : size[0], : size[1]]
        assert got.shape == (3, *size, 2) and got.dtype == np.float32
        close(got, expected.permute(0, 2, 3, 1))
        close(stream.forecast(1), got[:1])
    assert np.abs(got[0] - got[2]).max() > 1e-3  # the test could not fail on frames that stand still
    assert repr(stream) == f"<Forecaster: {model} on cpu, frames of {size[0]}x{size[1]}x2, 5 observed>"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_stream_on_a_graph_is_the_same_stream(trained):
    """Frames, forecasts between them, another stream of another size, and the first size again."""
    _, path = trained(model="VMRNN-D")
    plain, graphed = (vmrnn.Forecaster(path, device="cuda", cuda_graph=on, own_size=True) for on in (False, True))
    for size in ((16, 16), (24, 16), (16, 16)):
        for frame in np.random.default_rng(0).random((4, *size), dtype=np.float32):
            for stream in (plain, graphed):
                stream.observe(frame)
            close(graphed.forecast(3), plain.forecast(3))
            close(graphed.forecast(1), plain.forecast(1))
        plain.reset()
        graphed.reset()


def test_frames_are_in_the_units_of_the_data(trained):
    _, path = trained(data_range=[-40.0, 60.0], missing_value=[-999.0])
    frames = np.random.default_rng(0).integers(-40, 61, (4, 16, 16)).astype(np.int16)
    frames[1, 3, 4] = -999
    as_float = frames.astype(np.float64)
    as_float[1, 3, 4] = np.nan
    dark = frames.copy()
    dark[1, 3, 4] = -40  # what the network sees of a missing pixel: 0
    forecasts = []
    for values in (frames, as_float, dark):
        stream = vmrnn.Forecaster(path, device="cpu")
        for frame in values:
            stream.observe(frame)
        forecasts.append(stream.forecast(2))
    assert forecasts[0].shape == (2, 16, 16)
    close(forecasts[0] / 100, forecasts[1] / 100)
    close(forecasts[0] / 100, forecasts[2] / 100)
    unit = vmrnn.Forecaster(path, device="cpu")
    unit.value_range = None
    for frame in dark:
        unit.observe(((frame + 40.0) / 100).astype(np.float32))
    close((forecasts[0] + 40) / 100, unit.forecast(2))


def test_without_a_range_bytes_are_0_to_255_and_floats_0_to_1(trained):
    _, path = trained()
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)
    stream, unit = vmrnn.Forecaster(path, device="cpu"), vmrnn.Forecaster(path, device="cpu")
    for frame in frames:
        stream.observe(frame)
        unit.observe(frame / 255)
    close(stream.forecast(2) / 255, unit.forecast(2))
    with pytest.raises(UserError, match="uint8 after others"):
        unit.observe(frames[0])
    unit.reset()
    for frame in frames:
        unit.observe(frame)
    close(unit.forecast(2), stream.forecast(2))
    unit.reset()
    for wrong in (frames[0].astype(np.int64), frames[0].astype(np.float32), frames[0] / -255):
        with pytest.raises(UserError, match=f"{wrong.dtype} with values from .* knows no data range"):
            unit.observe(wrong)


def test_a_missing_value_outside_0_to_1_is_missing_without_a_range(trained):
    _, path = trained(missing_value=[-999.0])
    stream, holes = vmrnn.Forecaster(path, device="cpu"), vmrnn.Forecaster(path, device="cpu")
    stream.value_range = holes.value_range = None
    frame = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    named, nan = frame.copy(), frame.copy()
    named[2, 3], nan[2, 3] = -999.0, np.nan
    stream.observe(named)
    holes.observe(nan)
    assert np.array_equal(stream.forecast(2), holes.forecast(2), equal_nan=True)
    with pytest.raises(UserError, match="knows no data range"):
        stream.observe(frame - 999.0)


def test_pixels_that_were_never_seen(trained):
    """Those that are missing in every frame, in every channel that is forecast."""
    _, path = trained(input_channels=2)
    forecaster, frames = (
        vmrnn.Forecaster(path, device="cpu"),
        np.random.default_rng(0).random((2, 16, 16, 2), np.float32),
    )
    frames[:, 0, 0] = frames[:, 1, 1, 0] = frames[0, 2, 2] = frames[1, 3, 3] = np.nan
    for frame in frames:
        forecaster.observe(frame)
    assert np.argwhere(forecaster.never_seen).tolist() == [[0, 0]]
    _, path = trained(dataset="grid", forcings=["sun"])
    forecaster = vmrnn.Forecaster(path, device="cpu")
    forecaster.observe(np.where([True, False], frames[0], 0.5))
    assert np.argwhere(forecaster.never_seen).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_memory_does_not_grow_with_the_stream(trained):
    _, path = trained()
    stream = vmrnn.Forecaster(path, device="cpu")

    def held(value):
        if torch.is_tensor(value):
            return value.untyped_storage().nbytes()
        if isinstance(value, dict | list | tuple):
            return sum(map(held, value.values() if isinstance(value, dict) else value))
        return 0

    sizes = []
    for _ in range(6):
        stream.observe(np.zeros((16, 16)))
        stream.forecast(2)
        sizes.append(held({key: value for key, value in vars(stream).items() if key != "model"}))
    assert len(set(sizes)) == 1 and sizes[0] > 0


def test_what_a_stream_refuses(trained, tmp_path):
    model, path = trained(input_channels=2)
    stream = vmrnn.Forecaster(path, device="cpu")
    with pytest.raises(UserError, match="before observe"):
        stream.forecast(1)
    with pytest.raises(UserError, match=r"\(16, 16, 1\): the network takes \(H, W, 2\)"):
        stream.observe(np.zeros((16, 16)))
    stream.observe(np.zeros((16, 16, 2)))
    with pytest.raises(UserError, match=r"\(16, 18, 2\) after frames of \(16, 16, 2\)"):
        stream.observe(np.zeros((16, 18, 2)))
    with pytest.raises(UserError, match="cuda_graph is for a CUDA GPU, and the device is cpu"):
        vmrnn.Forecaster(path, device="cpu", cuda_graph=True)
    with pytest.raises(UserError, match="0 frames"):
        stream.forecast(0)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"bare.safetensors: holds only weights"):
        vmrnn.Forecaster(tmp_path / "bare.safetensors")
    configuration.save_toml(configuration.resolve(None, SMALL | {"input_channels": 2}), tmp_path / "c.toml")
    vmrnn.Forecaster(tmp_path / "bare.safetensors", config=tmp_path / "c.toml", device="cpu")


def run_predict(*arguments):
    predict.main([str(a) for a in arguments])


def test_a_file_in_and_files_out(trained, tmp_path):
    """uint8 frames of a size that no patch divides: the array, the GIF and the film hold the stream's forecast."""
    _, path = trained()
    frames = np.random.default_rng(0).integers(0, 256, (14, 13, 18), dtype=np.uint8)
    np.save(tmp_path / "x.npy", frames)
    outputs = [tmp_path / "deep" / f"next{ending}" for ending in (".npz", ".gif", ".mp4")]
    common = ("--checkpoint", path, "--device", "cpu", "--horizon", 4)
    run_predict(*common, "--input", tmp_path / "x.npy", "--output", *outputs)
    stream = vmrnn.Forecaster(path, device="cpu")
    for frame in frames:
        stream.observe(frame)
    expected = stream.forecast(4)
    with np.load(outputs[0]) as file:
        forecast = file["forecast"]
    assert forecast.dtype == np.uint8 and forecast.shape == (4, 13, 18)
    assert (forecast == np.rint(expected)).all()
    with Image.open(outputs[1]) as gif:
        assert gif.n_frames == 10 + 4 and gif.size == (18 * 14, 20 + 13 * 14 + 10)  # label and bar
        shown = []
        for t in range(gif.n_frames):
            gif.seek(t)
            shown.append(np.asarray(gif.convert("L"))[20:-10][7::14, 7::14].astype(int))
    # The last ten given frames, then the forecast
    assert np.abs(np.array(shown) - np.concatenate([frames[-10:], forecast]).astype(int)).max() <= 2  # a palette
    film = read_frames(outputs[2])
    assert film.shape == (14, 20 + 13 * 14 + 10, 18 * 14, 3)
    assert np.abs(film[12, 20:-10][7::14, 7::14].mean(-1) - forecast[2]).max() <= 8  # lossy
    with av.open(str(outputs[2])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    np.save(tmp_path / "grey.npy", np.repeat(frames[..., None], 3, -1))  # a film's three colours
    run_predict(*common, "--input", tmp_path / "grey.npy", "--output", tmp_path / "colours.npz")
    assert np.abs(np.load(tmp_path / "colours.npz")["forecast"].astype(int) - forecast).max() <= 1
    with pytest.raises(UserError, match="'mamba' cannot run on cpu"):
        run_predict(*common, "--input", tmp_path / "x.npy", "--scan", "mamba")


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_the_forecast_has_the_inputs_type_and_units(trained, tmp_path, dtype):
    _, path = trained(data_range=[100.0, 40000.0])  # beyond what int16 holds
    np.savez(tmp_path / "x.npz", frames=np.full((3, 16, 16), 5000, dtype), other=np.zeros(3))
    output = tmp_path / "y.npz"
    run_predict(
        "--checkpoint", path, "--device", "cpu", "--horizon", 2, "--input", tmp_path / "x.npz", "--output", output
    )
    stream = vmrnn.Forecaster(path, device="cpu")
    for _ in range(3):
        stream.observe(np.full((16, 16), 5000.0))
    forecast = np.load(output)["forecast"]
    assert forecast.dtype == dtype
    if dtype == np.int16:
        assert (forecast == np.rint(stream.forecast(2)).clip(max=2**15 - 1)).all()
    else:
        np.testing.assert_allclose(forecast, stream.forecast(2), rtol=1e-5)


def test_whole_numbers_have_the_missing_value_where_nothing_was_seen():
    unit = np.array([0.5, np.nan], np.float32).reshape(1, 1, 1, 2, 1)
    for dtype in ("u1", "i2"):
        found = Forecast(unit, ValueRange(0.0, 200.0, (7.0, 9.0)), np.dtype(dtype)).array()
        assert found.dtype == dtype and found.tolist() == [[[100, 7]]]


def test_lead_times_count_from_the_last_frame_in_frames_of_the_input():
    forecast = Forecast(np.zeros((1, 2, 4, 4, 1), np.float32), ValueRange(), np.dtype("f4"), step=3)
    assert forecast.dataset().lead_time.values.tolist() == [3, 6] and forecast.lead_names() is None
    times = np.array([0.0, 600.0, 1200.0])
    info = SimpleNamespace(times=times, calendar="standard", next_times=later_times)
    assert replace(forecast, info=info, times=[times]).lead_names() == ["10 min", "20 min"]


def test_a_forecast_of_yes_and_no():
    np.testing.assert_array_equal(as_type(np.array([0.01, 0.49, 0.5, 1.0]), np.dtype(bool)), [0, 0, 1, 1])


def test_a_run_with_averaged_weights_forecasts_with_them(tmp_path):
    """So do test.py and --init_from: they are what the run's validations saw."""
    first, second = (build_model(**configuration.resolve(None, SMALL).network_options) for _ in range(2))
    content = {"model": first.state_dict(), "config": configuration.resolve(None, SMALL).to_dict()}
    save_checkpoint(tmp_path / "last.pt", content | {"ema": second.state_dict()})
    save_checkpoint(tmp_path / "plain.pt", content | {"ema": None})
    for name, weights in (("last.pt", second), ("plain.pt", first)):
        got = vmrnn.Forecaster(tmp_path / name, device="cpu").model.state_dict()
        assert all(torch.equal(got[key], value) for key, value in weights.state_dict().items())


def test_colours_become_grey_for_a_network_of_one_channel():
    frame = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    grey = as_channels(frame, 1)
    expected = np.asarray(Image.fromarray(frame).convert("L")).astype(int)
    assert grey.dtype == np.uint8 and np.abs(grey[..., 0] - expected).max() <= 1
    assert as_channels(frame, 3) is frame


def test_a_real_process_and_its_default_output(trained, tmp_path, run, run_forked):
    _, path = trained()
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(3):
        Image.fromarray(np.full((16, 16), 40 * t, np.uint8)).save(folder / f"{t}.png")
    output = tmp_path / "frames_forecast.npz"  # beside the weights
    done = run("predict.py", "--checkpoint", path, "--input", folder)
    assert done.returncode == 0 and "3 frames of 16x16, uint8" in done.stdout, done.stderr
    assert str(output) in done.stdout and np.load(output)["forecast"].shape == (10, 16, 16)  # as in the training
    done = run_forked("predict.py", "--checkpoint", path, "--input", tmp_path / "absent.mp4", "--horizon", 2)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "absent.mp4" in done.stderr


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--horizon", "0"], "--horizon 0"),
        (["--horizon", "2", "--output", "x.avi"], "x.avi: its name must end as one of .npz .gif .mp4"),
        (["--horizon", "2", "--output", "x.npz"], "x.npz: is the input"),
    ],
)
def test_what_the_program_refuses(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        predict.parse_arguments(["--checkpoint", "w", "--input", "x.npz", *arguments])


@pytest.mark.parametrize(
    "option, name, complaint",
    [
        (("--time_step", "10min"), "x.npy", "--time_step: is for grid, video, frames, but .*x.npy is read as array"),
        (("--variables", "rain"), "x.npy", "--variables: is for grid, "),
        (("--array_key", "rain"), "x.png", "--array_key: is for array, but .*x.png is read as frames"),
    ],
)
def test_an_option_of_other_files_is_refused(trained, tmp_path, option, name, complaint):
    """It changed nothing, without a word."""
    _, path = trained()
    np.save(tmp_path / "x.npy", np.zeros((3, 16, 16), np.uint8))
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=complaint):
        predict.main(["--checkpoint", str(path), "--input", str(tmp_path / name), *option])


@pytest.mark.parametrize("name", ["radar", "radar/", "radar/*.nc"])
def test_a_field_in_any_form_of_its_name_becomes_a_field_by_default(tmp_path, name):
    (tmp_path / "radar").mkdir()
    args = predict.parse_arguments(["--checkpoint", "exps/w", "--input", f"{tmp_path}/{name}"])
    assert predict.default_output(args, Input("grid", [], info=object())) == Path("exps/radar_forecast.nc")
    assert predict.default_output(args, Input("array", [])) == Path("exps/radar_forecast.npz")
