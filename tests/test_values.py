"""Stored values are scaled to [0, 1] and back, and frames are prepared for the network."""

import math

import numpy as np
import pytest
import torch
from helpers import data_set, read_frames, write_images, write_video
from hypothesis import given, settings, strategies as st

from vmrnn.config import Config
from vmrnn.data.prepare import Preparation
from vmrnn.errors import UserError
from vmrnn.values import ValueRange, outside

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("transform, zero_below", [("none", 0.0), ("sqrt", 0.0), ("sqrt", 0.1), ("log", 0.1)])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_values_come_back(transform, zero_below, data):
    """Whatever the range: 0 and what is not below the threshold comes back; what is below counts as 0."""
    high = data.draw(st.floats(1, 1e4))
    values = np.array(data.draw(st.lists(st.floats(0, high), min_size=1, max_size=20)))
    scale = ValueRange(0.0, high, (), transform, zero_below)
    unit = scale.to_unit(values)
    expected = values if transform == "none" else np.where(values < zero_below, 0, values)
    assert unit.dtype == np.float32 and -1e-6 <= unit.min() and unit.max() <= 1 + 1e-6
    for back in (scale.to_data(unit), scale.to_data(torch.from_numpy(unit)).numpy()):
        np.testing.assert_allclose(back, expected, rtol=1e-5, atol=1e-5 * high)
    np.testing.assert_allclose(scale.to_linear(unit), expected / high, atol=2e-5)
    assert ValueRange.from_dict(scale.to_dict()) == scale


def test_small_rain_is_not_squeezed():
    """A tenth of the largest value lies at a tenth without a transform, and at a third and more with one."""
    tenth = np.array(10.0)
    none, root, log = (ValueRange(0, 100, (), *kind) for kind in (("none",), ("sqrt", 0.1), ("log", 0.1)))
    assert none.to_unit(tenth) == pytest.approx(0.1)
    assert root.to_unit(tenth) == pytest.approx(math.sqrt(0.1)) and log.to_unit(tenth) > 0.6


def test_edges_of_the_scale():
    for transform in ("sqrt", "log"):
        scale = ValueRange(0, 100, (), transform, 0.1)
        assert scale.to_unit(np.array([0.1]))[0] > 0  # it is not below zero_below
        assert scale.to_data(np.array([-0.2])) == 0  # a network of another kind may forecast less than 0
    assert outside(np.array([-4.6, -4.4, 5.4, 5.6, np.nan]))[1].tolist() == [True, False, False, True, False]
    assert outside(np.array([-0.01, 0, 1, 1.01, np.nan]))[0].tolist() == [True, False, False, True, False]
    infinite = ValueRange(0, 2, (np.inf,)).to_unit(np.array([np.inf, 1.0]))
    assert np.isnan(infinite[0]) and infinite[1] == 0.5


def test_each_channel_has_its_range():
    scale = ValueRange((250.0, 0.0), (310.0, 50.0))
    frames = np.array([[[280.0, 25.0], [250.0, 50.0]]], np.float32)
    unit = scale.to_unit(frames)
    np.testing.assert_allclose(unit, [[[0.5, 0.5], [0.0, 1.0]]])
    np.testing.assert_allclose(scale.to_data(unit), frames)
    first = torch.from_numpy(unit).permute(2, 0, 1)  # (C, H, W)
    assert torch.equal(scale.to_data(first, axis=0), torch.from_numpy(frames).permute(2, 0, 1))
    assert scale.threshold(280.0) == (0.5, pytest.approx(5.6))
    assert ValueRange.from_dict(scale.to_dict()) == scale


@pytest.mark.parametrize("transform, zero_below", [("none", 0.0), ("sqrt", 0.05), ("log", 0.05)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_pixel_at_the_threshold_is_an_event_on_every_scale(transform, zero_below, dtype):
    scale = ValueRange(0.0, 57.3, (), transform, zero_below)
    for value in np.arange(0.1, 50, 0.3):
        level = scale.threshold(float(value))
        pixels = scale.to_linear(torch.from_numpy(scale.to_unit(np.array([value, value * 0.999], dtype))))
        assert (pixels >= level).tolist() == [True, False]


@pytest.mark.parametrize("value", [-999.9, 1e20, 9.96921e36, -3.4e38, 0.1])
def test_a_missing_value_that_was_stored_as_float32_matches(value):
    stored = np.full((2, 2), value, np.float32)
    for frames in (stored, stored.astype(np.float64), np.full((2, 2), value)):
        assert ValueRange(0, 1, (value,)).is_missing(frames).all()
        assert np.isnan(ValueRange(0, 1, (value,)).to_unit(frames)).all()
    assert not ValueRange(0, 1, (value,)).is_missing(np.full(2, np.nextafter(np.float32(value), np.float32(0)))).any()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((0, 1, (), "log"), "log needs zero_below"),
        ((-1, 1, (), "sqrt"), "values from 0 upwards"),
        ((0, 1, (), "cube"), "choose one of none, sqrt, log"),
        (((0, 0), (1, 0)), "0 0: give a low"),
        (((0, 0), (1,)), "2 low and 1 high"),
    ],
)
def test_ranges_that_cannot_be(arguments, says):
    with pytest.raises(UserError, match=says):
        ValueRange(*arguments)


# Frames


CASES = {
    "videos, smaller": (dict(dataset="video", input_channels=3), 3),
    "colour as grey": (dict(dataset="video"), 3),
    "images, grey as colour": (dict(dataset="frames", input_channels=3), 1),
    "arrays": (dict(dataset="array", input_channels=3), 3),
    "missing values": (dict(dataset="video", missing_value=[7.0]), 1),
    "square roots": (dict(dataset="array", input_channels=1, transform="sqrt"), 1),
}


@pytest.mark.parametrize("case", CASES)
def test_one_way_from_the_file_to_the_network(tmp_path, case):
    """Frames of another size and kind: what the data set makes of them is what Preparation makes of them one by one."""
    options, channels = CASES[case]
    frames = RNG.integers(0, 256, (12, 20, 26, channels), dtype=np.uint8)
    path = tmp_path / "data" / "clip"
    path.mkdir(parents=True)
    if options["dataset"] == "video":
        write_video(path / "a.mkv", frames)
        file = path / "a.mkv"
    elif options["dataset"] == "frames":
        write_images(path, frames)
        file = path
    else:
        np.save(path / "a.npy", frames)
        file = path / "a.npy"
    options = options | dict(
        train_data_dir=str(path), cache_dir=str(tmp_path / "cache"), input_size=[8, 10], num_frames_input=2,
        num_frames_output=1, valid_fraction=0.0, test_fraction=1 / 4,
    )  # fmt: skip
    data = data_set("test", **options)
    prepare = Preparation.of(Config(**options), data.value_range)
    expected = torch.cat(data[0])
    got = torch.stack([prepare(frame) for frame in read_frames(file, channels=prepare.channels)[-3:]])
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1))
    assert prepare.restore(got, (20, 26)).shape == (3, 20, 26, prepare.channels)


def test_a_network_of_crops_sees_frames_at_their_own_size():
    prepare = Preparation.of(Config(dataset="video", frame_fit="crop", input_size=[8, 8]), ValueRange(0, 255))
    assert prepare(np.zeros((20, 30), np.uint8)).shape == (1, 20, 30)


def test_masked_frames_keep_their_mask_and_tensors_are_frames():
    prepare = Preparation(1, ValueRange(0, 10), None)
    masked = np.ma.array([[1, 2], [-9999, 4]], mask=[[0, 0], [1, 0]])
    values = prepare(masked)
    assert values.isnan().tolist() == [[[False, False], [True, False]]] and values[0, 1, 1] == torch.tensor(0.4)
    assert prepare(np.ma.array([[5, 5]])).tolist() == [[[0.5, 0.5]]]
    assert prepare(torch.full((2, 2), 5.0, dtype=torch.bfloat16)).unique().tolist() == [0.5]


@pytest.mark.parametrize(
    "frame, says",
    [
        (np.zeros((2, 2), complex), "complex128: give real numbers"),
        (np.zeros((2, 2), "M8[s]"), "real numbers"),
        (np.array([["a", "b"]]), "real numbers"),
        (np.zeros((2, 2), [("a", "f4")]), "named columns"),
        (np.zeros((2, 2), object), "object: give real numbers"),
        ([[1, 2], [3]], "different lengths"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((2, 2, 5)), r"takes \(H, W, 1\)"),
        (np.zeros((0, 2)), "shape"),
    ],
)
def test_what_is_no_frame_says_so_in_one_line(frame, says):
    with pytest.raises(UserError, match=says) as caught:
        Preparation(1, ValueRange(), None)(frame)
    assert "\n" not in str(caught.value)
