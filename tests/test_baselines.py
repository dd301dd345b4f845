"""The baselines, on fields whose motion is known and on real radar."""

import numpy as np
import pytest
import torch
from helpers import shared
from scipy.ndimage import gaussian_filter

from functions import compare
from vmrnn.baselines import BASELINES, black, last_frame, motion
from vmrnn.motion import Flow, advect, without_missing, zero_is_nothing
from vmrnn.values import ValueRange


def moving_field(steps, frames, size=(96, 120), seed=0):
    """A smooth random field that moves by `steps` (rows, columns) per frame: (1, frames, 1, H, W) in [0, 1]."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(300, 300)), 6)
    field = (field - field.min()) / np.ptp(field)
    rows, columns = ([100 - step * t for t in range(frames)] for step in steps)
    views = [field[y : y + size[0], x : x + size[1]] for y, x in zip(rows, columns)]
    return torch.from_numpy(np.stack(views)[None, :, None].astype(np.float32))


@pytest.mark.parametrize("steps", [(2, 0), (0, -3), (-2, 3)])
def test_motion_follows_a_moving_field(steps):
    """Away from the borders, over which unknown pixels enter."""
    frames = moving_field(steps, 9)
    inputs, targets = frames[:, :4], frames[:, 4:]
    inner = (..., slice(20, -20), slice(20, -20))
    errors = [(f(inputs, 5) - targets)[inner].abs().mean() for f in (motion, last_frame)]
    assert errors[0] < 0.15 * errors[1]


def test_motion_of_a_field_that_stands_still_is_the_last_frame():
    frames = moving_field((0, 0), 3)
    torch.testing.assert_close(motion(frames, 4), last_frame(frames, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(motion(frames[:, :1], 2), last_frame(frames, 2), atol=1e-5, rtol=0)
    assert torch.equal(
        last_frame(moving_field((2, 1), 3), 2), moving_field((2, 1), 3)[:, -1:].expand(-1, 2, -1, -1, -1)
    )


@pytest.mark.parametrize("coarse", [1, 2, 4])
def test_pixels_are_traced_backwards_step_by_step(coarse):
    """A flow that grows with the column, in pixels of a coarser map: a pixel comes from x, 0.9 x, 0.81 x, ..."""
    x = np.arange(64, dtype=np.float32)
    steps = np.zeros((2, 48 // coarse, 64 // coarse), np.float32)
    steps[1] = 0.1 * x.reshape(-1, coarse).mean(1) / coarse
    frame = np.stack((np.tile(x, (48, 1)), np.repeat(np.arange(48, dtype=np.float32)[:, None], 64, 1)))
    moved = advect(frame, Flow(steps, coarse), 3, [False, False])
    for n in range(3):
        np.testing.assert_allclose(moved[n, 0, :, 8:60], np.tile(x * 0.9 ** (n + 1), (48, 1))[:, 8:60], rtol=1e-4)
        np.testing.assert_allclose(moved[n, 1], frame[1])
    place = slice(5, 20), slice(30, 50)
    np.testing.assert_array_equal(advect(frame, Flow(steps, coarse), 3, [False, False], place), moved[:, :, *place])


def test_a_missing_pixel_gets_the_nearest_known_value_or_nothing():
    frame = np.array([[[1, np.nan, np.nan, 5], [1, np.nan, 4, 5]]] * 2 + [[[np.nan] * 4] * 2], np.float32)
    assert without_missing(frame, [False, True, False]).tolist() == [
        [[1, 1, 4, 5], [1, 1, 4, 5]], [[1, 0, 0, 5], [1, 0, 4, 5]], [[0] * 4] * 2
    ]  # fmt: skip
    assert zero_is_nothing(ValueRange((250.0, 0.0), (310.0, 64.0)), 2) == [False, True]
    assert zero_is_nothing(ValueRange(0.05, 64.0, transform="log", zero_below=0.1), 2) == [True, True]


def test_channels_move_together_and_missing_pixels_are_0():
    frames = moving_field((2, 1), 4).repeat(2, 1, 3, 1, 1)
    frames[0, :, 1, 3:5, 7] = torch.nan
    forecast = motion(frames, 2)
    assert forecast.shape == (2, 2, 3, 96, 120) and forecast.dtype == torch.float32 and not forecast.isnan().any()
    torch.testing.assert_close(forecast[1, :, 0], forecast[1, :, 2])
    assert last_frame(frames, 2)[0, :, 1, 3:5, 7].tolist() == [[0, 0], [0, 0]]
    assert not black(frames, 2).any() and black(frames, 2).shape == (2, 2, 3, 96, 120)
    assert BASELINES["motion"] is motion


def test_what_is_not_known_is_nothing_only_where_0_means_nothing():
    """A channel that begins at 250 K, and one that begins at 0 mm/h: both move out of the frame, 3 pixels per frame."""
    frames = (0.2 + 0.8 * moving_field((0, -3), 6)).repeat(1, 1, 2, 1, 1)
    value_range = ValueRange((250.0, 0.0), (310.0, 64.0))
    warm, rain = motion(frames[:, :4], 2, value_range)[0, -1]
    assert (rain[:, -4:] == 0).all() and warm[:, -4:].min() > 0.2
    assert torch.equal(warm[8:-8, :-8], rain[8:-8, :-8])
    error = (warm - frames[0, -1, 0]).square().mean()
    assert error < 0.3 * (last_frame(frames[:, :4], 1)[0, 0, 0] - frames[0, -1, 0]).square().mean()
    frames[:, :, :, 40:44, 50:54] = torch.nan
    for forecast in (motion, last_frame):
        warm, rain = forecast(frames[:, :4], 2, value_range)[0, -1]
        assert warm.min() > 0.2 and rain[40:44, 40:60].min() == 0  # the hole moves with the field


def test_motion_beats_the_last_frame_on_real_radar():
    """The three sequences of the README, whole maps, in units of 0.05 kg/m2 in 6 minutes."""
    frames = np.load(shared("radar/bom_r2_20180616_int16.npz"))["frames"].astype(np.float32) / 32
    sequences = torch.from_numpy(np.stack([frames[start : start + 10] for start in (49, 50, 51)])[:, :, None])
    inputs, targets = sequences[:, :5], sequences[:, 5:]
    found = {}
    for forecast in (motion, last_frame):
        got = forecast(inputs, 5)
        mse = (got - targets).square().sum((-1, -2)).mean().item()
        csi = [
            ((got >= level) & (targets >= level)).sum() / ((got >= level) | (targets >= level)).sum()
            for level in (2 / 32, 10 / 32)
        ]
        found[forecast] = mse, *(value.item() for value in csi)
    assert found[last_frame] == pytest.approx((5919.1, 0.528, 0.204), abs=0.1, rel=2e-3)
    assert found[motion] == pytest.approx((2550, 0.70, 0.40), rel=0.02)


def test_baselines_do_not_see_the_transform_of_a_network():
    """The same frames on the scale of two networks: the figures of the baselines are the same."""
    frames, results = (moving_field((2, -1), 7) - 0.5).clamp(min=0), []  # as sparse as rain
    for transform in ("none", "sqrt"):
        value_range = ValueRange(0.0, 64.0, transform=transform)
        scaled = torch.from_numpy(value_range.to_unit(64 * frames.numpy()))
        batches = [scaled.split((4, 3), 1)]
        results.append(
            compare(
                lambda inputs, targets: last_frame(inputs, targets.shape[1]), batches, torch.device("cpu"),
                ["mse_pixel"], baselines=BASELINES, value_range=value_range,
            )
        )  # fmt: skip
    for label in BASELINES:
        first, second = (result[label]["per_frame"]["mse_pixel"] for _, result in results)
        assert second == pytest.approx(first, rel=1e-4)
