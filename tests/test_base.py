"""--base motion: the network is given the last frame moved along the optical flow, and corrects it."""

import json

import numpy as np
import pytest
import torch
from helpers import data_set
from scipy.ndimage import gaussian_filter

import predict as predict_program
import test as test_program
import train as train_program
from functions import RolloutLoss
from vmrnn import config as configuration
from vmrnn.baselines import motion
from vmrnn.checkpoint import save_weights
from vmrnn.errors import UserError
from vmrnn.forecaster import Forecaster
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange

OPTIONS = dict(
    model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4, drop_path_rate=0.0, dataset="array",
    base="motion",
    data_range=[0.0, 10.0], input_size=[24, 32], frame_fit="crop", num_frames_input=4, num_frames_output=3,
    valid_fraction=0.35, test_fraction=0.35, train_sequences=4, test_batch_size=2, valid_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options of 28 frames of 40x48 in which a smooth field moves and fades, with a hole."""
    folder = tmp_path_factory.mktemp("base")
    field = gaussian_filter(np.random.default_rng(0).normal(size=(140, 140)), 4)
    field = 8 * (field - field.min()) / np.ptp(field)
    frames = np.stack([0.98**t * field[60 - 2 * t :, 60 - t :][:40, :48] for t in range(28)])
    frames[:, 3, 5] = np.nan
    np.save(folder / "x.npy", frames.astype(np.float32))
    return OPTIONS | {"train_data_dir": str(folder / "x.npy"), "cache_dir": str(folder / "cache")}


def network(options, loud=True):
    """A network of these options; loud: its last layer is not zero, as if it was trained."""
    torch.manual_seed(0)
    model = build_model(**configuration.resolve(None, options).network_options).eval()
    if loud:
        torch.nn.init.normal_(model.ST.patch_inflated.Conv.weight, std=0.05)
    return model


def test_an_untrained_network_is_the_motion_baseline(options):
    """On whole maps; the outputs before the forecast are the frames moved by one step, of what was seen until then."""
    item = data_set("test", **options | {"input_size": [40, 48]})[0]
    inputs, targets = (frames[None] for frames in item)
    assert inputs.shape == (1, 4, 2, 40, 48) and targets.shape == (1, 3, 2, 40, 48)
    outputs = rollout(network(options, loud=False), inputs, 3, following=targets)
    assert torch.equal(outputs[:, 3:], motion(inputs[:, :, :1], 3))
    for t in (0, 1, 2):
        assert torch.equal(outputs[:, t : t + 1], motion(inputs[:, : t + 1, :1], 1))


def test_the_base_of_a_field_that_does_not_begin_at_0_is_the_baseline(options, tmp_path):
    """The data set, the baseline and a stream take the nearest value where it is not known what flows in."""
    options = options | {"input_size": [40, 48], "data_range": [-5.0, 10.0]}
    data = data_set("test", **options)
    inputs, targets = (frames[None] for frames in data[0])
    expected = motion(inputs[:, :, :1], 3, data.value_range)
    assert expected.min() > 0.2
    model, config = network(options, loud=False), configuration.resolve(None, options)
    assert torch.equal(rollout(model, inputs, 3, following=targets)[:, 3:], expected)
    save_weights(tmp_path / "w.safetensors", model, config.to_dict(), data.value_range)
    forecaster = Forecaster(tmp_path / "w.safetensors", device="cpu")
    first = int(data.windows[0][1])
    for frame in np.asarray(data.clips[0].frames()[first : first + 4, ..., 0]):
        forecaster.observe(frame)
    torch.testing.assert_close(torch.from_numpy(forecaster.forecast_in_unit(3)[..., 0]), expected[0, :, 0])


def test_every_clip_has_the_flow_of_its_own_frames(options, tmp_path):
    """Of two clips that move against one another, in one data set."""
    frames = np.load(options["train_data_dir"])[:10]
    (tmp_path / "data").mkdir()
    for name, clip in {"a": frames, "b": frames[::-1]}.items():
        np.save(tmp_path / "data" / f"{name}.npy", clip)
    paths = {"train_data_dir": str(tmp_path / "data"), "test_data_dir": str(tmp_path / "data")}
    data = data_set("test", **options | paths | {"input_size": [40, 48]})
    for number in (0, 4):  # the first windows of the two
        inputs, targets = (part[None] for part in data[number])
        assert torch.equal(inputs[:, -1:, 1:], motion(inputs[:, :, :1], 1))


def test_a_crop_has_the_base_of_the_whole_map(options):
    """So that what moves into the crop comes from the map, not from nothing."""
    whole, crop = (data_set("test", **options | {"input_size": size})[0] for size in ([40, 48], [24, 32]))
    for large, small in zip(whole, crop):
        torch.testing.assert_close(small, large[..., 8:32, 8:40], equal_nan=True)
    assert crop[0][:, 1].abs().max() > 0


def test_a_test_on_crops_says_that_the_baseline_sees_less(options):
    for size, said in (([24, 32], True), ([40, 48], False)):
        config = configuration.resolve(None, options | {"input_size": size})
        about = test_program.about_motion(
            {"motion": motion}, config, data_set("test", **options | {"input_size": size})
        )
        assert ("--input_size 40 48" in about.get("motion", "")) == said


def test_the_forecaster_forecasts_as_the_rollout(options, tmp_path):
    """A stream of frames, and an untouched state after a forecast."""
    model, config = network(options), configuration.resolve(None, options)
    save_weights(tmp_path / "w.safetensors", model, config.to_dict(), ValueRange(0.0, 10.0))
    data = data_set("test", **options | {"input_size": [40, 48]})
    inputs, targets = (frames[None] for frames in data[0])
    expected = rollout(model, inputs, 3, following=targets)[0, 3:, 0]
    forecaster = Forecaster(tmp_path / "w.safetensors", device="cpu")
    first = int(data.windows[0][1])
    for frame in np.asarray(data.clips[0].frames()[first : first + 4, ..., 0]):
        forecaster.observe(frame)
    for _ in range(2):
        torch.testing.assert_close(torch.from_numpy(forecaster.forecast(3)) / 10, expected, atol=1e-5, rtol=0)
    assert (expected - motion(inputs[:, :, :1], 3)[0, :, 0]).abs().max() > 0.01


def test_training_test_and_forecast(options, tmp_path):
    """From the command line: a resumed run has the weights of an uninterrupted one, and the file needs no flags."""
    configuration.save_toml(configuration.resolve(None, options), tmp_path / "c.toml")

    def train(name, *arguments):
        train_program.main([
            "--config", str(tmp_path / "c.toml"), "--res_dir", str(tmp_path / name), "--epoch_valid", "1", "--device",
            "cpu",
            "--train_batch_size", "2", "--optimizer", "adamw", "--lr", "3e-3", *arguments,
        ])  # fmt: skip
        return torch.load(tmp_path / name / "last.pt", weights_only=True)

    whole = train("whole", "--epochs", "2")
    train("parts", "--epochs", "1")
    parts = train("parts", "--epochs", "2", "--resume", "auto")
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name
    best = str(tmp_path / "whole" / "best.safetensors")
    test_program.main(["--checkpoint", best, "--device", "cpu", "--strips", "1", "--res_dir", str(tmp_path / "test")])
    results = json.loads((tmp_path / "test" / "metrics.json").read_text())["results"]
    assert results["forecast"]["mean"]["mse"] != results["motion"]["mean"]["mse"]
    predict_program.main([
        "--checkpoint", best, "--input", options["train_data_dir"], "--horizon", "4", "--device", "cpu", "--output",
        str(tmp_path / "next.npy"),
    ])  # fmt: skip
    assert np.load(tmp_path / "next.npy").shape == (4, 40, 48)


def test_a_base_needs_clips():
    with pytest.raises(UserError, match="base is for kth.*not for moving_mnist"):
        data_set("train", base="motion", train_data_dir="builtin")


def test_a_forecast_stays_in_range_and_learns_from_outside(options):
    """Below 0 it is clipped, but its gradient still says that it is too low."""
    model, frame = network(options, loud=False), torch.zeros(1, 2, 8, 8)
    model.ST.patch_inflated.Conv.bias.data.fill_(-0.5)
    frame = model(frame)[0]
    assert not frame.any()
    (frame - 1).square().sum().backward()
    assert model.ST.patch_inflated.Conv.bias.grad < -1


def test_bright_pixels_weigh_more():
    truth = torch.tensor([0.0, 0.5, 1.0, torch.nan]).view(1, 1, 1, 2, 2)
    outputs = torch.tensor([0.1, 0.7, 0.7, 0.3]).view(1, 1, 1, 2, 2)
    expected = (0.1**2 * 1 + 0.2**2 * 3 + 0.3**2 * 5) / 3
    loss = RolloutLoss(0.0, 4.0)(outputs, truth[:, :1], truth)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    expected += 0.5 * (0.1 * 1 + 0.2 * 3 + 0.3 * 5) / 3
    assert RolloutLoss(0.5, 4.0)(outputs, truth[:, :1], truth).item() == pytest.approx(expected, rel=1e-6)
