"""Metrics against scikit-image, slow oracles, and every way of splitting a batch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vmrnn import metrics
from vmrnn.errors import UserError
from vmrnn.metrics import CONVENTIONS, Metrics


def frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def slow_ssim(pred, true, data_range):
    """scikit-image's, in float64, one frame (C, H, W)."""
    return structural_similarity(pred.double().numpy(), true.double().numpy(), channel_axis=0, data_range=data_range)


@pytest.mark.parametrize("data_range", [1, 2])
@given(
    channels=st.integers(1, 3),
    height=st.integers(7, 40),
    width=st.integers(7, 40),
    noise=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_ssim_is_scikit_images(data_range, channels, height, width, noise, seed):
    true = frames(2, 3, channels, height, width, seed=seed)
    pred = (true + noise * (frames(*true.shape, seed=seed + 1) - 0.5)).clamp(0, 1)
    got = metrics.ssim(pred, true, data_range)
    assert got.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            assert abs(got[i, t] - slow_ssim(pred[i, t], true[i, t], data_range)) < 1e-9


@pytest.mark.parametrize("level, other", [(0, 0), (1, 1), (0, 1), (0.7, 0.7), (0.999, 1)])
def test_ssim_of_constant_frames(level, other):
    """Variances that are exactly zero, where float32 would leave noise."""
    pred, true = torch.full((1, 12, 9), float(level)), torch.full((1, 12, 9), float(other))
    for data_range in (1, 2):
        got = metrics.ssim(pred, true, data_range)
        assert abs(got - slow_ssim(pred, true, data_range)) < 1e-9


def test_ssim_of_a_digit_on_black():
    """Large black areas and sharp edges, as in Moving MNIST; range 2 reads higher."""
    true = torch.zeros(1, 64, 64)
    true[0, 10:30, 20:24] = 1
    pred = true.roll(2, dims=-1) * 0.8
    one, two = metrics.ssim(pred, true, 1), metrics.ssim(pred, true, 2)
    assert abs(one - slow_ssim(pred, true, 1)) < 1e-9
    assert abs(two - slow_ssim(pred, true, 2)) < 1e-9
    assert one < two < 1


def test_ssim_refuses_frames_below_its_window():
    with pytest.raises(UserError, match=r"6x9.*7x7"):
        metrics.ssim(frames(1, 6, 9), frames(1, 6, 9), 1)
    small = Metrics(("mse", "psnr"))  # without ssim, such frames are welcome
    small.update(frames(2, 3, 1, 6, 9), frames(2, 3, 1, 6, 9, seed=1))
    assert small.compute()["count"] == 2
    everything = Metrics()
    with pytest.raises(UserError):
        everything.update(frames(2, 3, 1, 6, 9), frames(2, 3, 1, 6, 9))
    assert everything.count == 0


def test_errors_by_hand():
    """Sums over C, H, W against means over them."""
    pred, true = torch.zeros(2, 2, 3, 4), torch.full((2, 2, 3, 4), 0.5)
    assert metrics.mse(pred, true).tolist() == [6.0, 6.0]
    assert metrics.mae(pred, true).tolist() == [12.0, 12.0]
    assert metrics.mse_pixel(pred, true).tolist() == [0.25, 0.25]
    assert metrics.mae_pixel(pred, true).tolist() == [0.5, 0.5]


def test_psnr_is_scikit_images():
    pred, true = frames(3, 2, 9, 11), frames(3, 2, 9, 11, seed=1)
    expected = [
        peak_signal_noise_ratio(t.double().numpy(), p.double().numpy(), data_range=1)
        for p, t in zip(pred, true, strict=True)
    ]
    np.testing.assert_allclose(metrics.psnr(pred, true), expected, rtol=1e-12)


def test_identical_frames_have_psnr_100():
    for figure in (metrics.psnr, metrics.psnr_uint8):
        assert figure(frames(1, 9, 9), frames(1, 9, 9)).item() == metrics.MAX_PSNR == 100


def published_psnr(pred, true):
    """The published formula as it stands, one frame."""
    mse = np.mean((np.uint8(pred * 255) - np.uint8(true * 255)) ** 2)
    return 20 * np.log10(255) - 10 * np.log10(mse)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 12), st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_psnr_uint8_is_the_published_formula(seed, channels, height, width):
    pred, true = (frames(2, channels, height, width, seed=seed + i) for i in range(2))
    for x in (pred, true):
        x[1] = (x[1] * 255).round() / 255  # frames as they come from files
    got = metrics.psnr_uint8(pred, true)
    for i in range(2):
        expected = min(published_psnr(pred[i].numpy(), true[i].numpy()), 100)
        assert abs(got[i].item() - expected) < 1e-9
    assert (got > 24.16).all()


def test_psnr_uint8_wraps_twice():
    """0 against 229: 27 after the first wrap, 27 * 27 = 729, 217 after the second."""
    black, grey = torch.zeros(1, 4, 4), torch.full((1, 4, 4), 229.5 / 255)
    expected = 20 * np.log10(255) - 10 * np.log10(217)
    assert abs(metrics.psnr_uint8(black, grey).item() - expected) < 1e-9
    assert abs(metrics.psnr_uint8(grey, black).item() - expected) < 1e-9


@given(st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(1, 9), max_size=4))
@settings(max_examples=30, deadline=None)
def test_batches_and_ranks_do_not_change_the_result(samples, horizon, cuts):
    """One batch, any batches, any ranks (empty ones too): the same sums, hence the same means."""
    pred = frames(samples, horizon, 2, 8, 9)
    true = frames(samples, horizon, 2, 8, 9, seed=1)
    whole = Metrics()
    whole.update(pred, true)
    edges = sorted({0, samples, *(cut for cut in cuts if cut < samples)})
    ranks = [Metrics(), Metrics(), Metrics()]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        ranks[i % 2].update(pred[a:b], true[a:b])
    total = Metrics()
    total.merge(ranks[0])
    total.merge(ranks[1].state())
    total.merge(ranks[2])
    expected, got = whole.compute(), total.compute()
    assert got["count"] == expected["count"] == samples
    for name in CONVENTIONS:
        assert len(got["per_frame"][name]) == horizon
        np.testing.assert_allclose(got["per_frame"][name], expected["per_frame"][name], rtol=1e-12)
        np.testing.assert_allclose(got["mean"][name], expected["mean"][name], rtol=1e-12)
        np.testing.assert_allclose(got["mean"][name], np.mean(expected["per_frame"][name]), rtol=1e-12)


def test_per_frame_figures_are_the_functions():
    pred, true = frames(4, 3, 1, 16, 16), frames(4, 3, 1, 16, 16, seed=1)
    total = Metrics()
    total.update(pred, true)
    got = total.compute()["per_frame"]
    for name in set(CONVENTIONS) - {"ssim", "ssim_dr2"}:
        expected = getattr(metrics, name)(pred, true).mean(dim=0)
        np.testing.assert_allclose(got[name], expected, rtol=1e-12)
    np.testing.assert_allclose(got["ssim"], metrics.ssim(pred, true, 1).mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(got["ssim_dr2"], metrics.ssim(pred, true, 2).mean(dim=0), rtol=1e-12)


def test_large_batches_go_in_parts():
    """A batch above the part size gives what its samples give one by one."""
    pred, true = frames(3, 2, 1, 1100, 700), frames(3, 2, 1, 1100, 700, seed=1)
    names = ("mse", "psnr_uint8")
    whole, single = Metrics(names), Metrics(names)
    whole.update(pred, true)
    for i in range(3):
        single.update(pred[i : i + 1], true[i : i + 1])
    assert whole.compute() == single.compute()


def test_forecasts_with_gradients_and_half_precision():
    pred = frames(2, 3, 1, 9, 9).bfloat16().requires_grad_()
    total = Metrics()
    total.update(pred, frames(2, 3, 1, 9, 9))
    assert not total.sums.requires_grad and total.sums.dtype == torch.float64


def test_misuse_is_refused():
    with pytest.raises(UserError, match="lpips2"):
        Metrics(("mse", "lpips2"))
    with pytest.raises(ValueError, match="no samples"):
        Metrics().compute()
    total = Metrics(("mse",))
    with pytest.raises(ValueError, match="one shape"):
        total.update(frames(2, 3, 1, 8, 8), frames(2, 1, 1, 8, 8))
    total.update(frames(2, 3, 1, 8, 8), frames(2, 3, 1, 8, 8))
    with pytest.raises(ValueError, match="4 frames after 3"):
        total.update(frames(2, 4, 1, 8, 8), frames(2, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="do not add"):
        total.merge(Metrics(("mae",)))
