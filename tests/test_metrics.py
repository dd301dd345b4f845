"""Metrics against scikit-image, slow oracles, and every way of splitting a batch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.models import AlexNet_Weights, alexnet

from vmrnn import metrics
from vmrnn.data.table import IMAGE_METRICS as DEFAULT
from vmrnn.errors import UserError
from vmrnn.metrics import (
    METRICS,
    Metrics,
    anomaly_correlation,
    better,
    data_unit_rows,
    event,
    figure,
    fractions_skill,
    metric_rows,
)
from vmrnn.values import ValueRange


def frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ssim(pred, true, data_range):
    return figure({1: "ssim", 2: "ssim_dr2"}[data_range], pred, true)


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
    got = ssim(pred, true, data_range)
    assert got.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            assert abs(got[i, t] - slow_ssim(pred[i, t], true[i, t], data_range)) < 1e-9


@pytest.mark.parametrize("level, other", [(0, 0), (1, 1), (0, 1), (0.7, 0.7), (0.999, 1)])
def test_ssim_of_constant_frames(level, other):
    """Variances that are exactly zero, where float32 would leave noise."""
    pred, true = torch.full((1, 12, 9), float(level)), torch.full((1, 12, 9), float(other))
    for data_range in (1, 2):
        got = ssim(pred, true, data_range)
        assert abs(got - slow_ssim(pred, true, data_range)) < 1e-9


def test_ssim_of_a_digit_on_black():
    """Large black areas and sharp edges, as in Moving MNIST; range 2 reads higher."""
    true = torch.zeros(1, 64, 64)
    true[0, 10:30, 20:24] = 1
    pred = true.roll(2, dims=-1) * 0.8
    one, two = ssim(pred, true, 1), ssim(pred, true, 2)
    assert abs(one - slow_ssim(pred, true, 1)) < 1e-9
    assert abs(two - slow_ssim(pred, true, 2)) < 1e-9
    assert one < two < 1


def test_ssim_refuses_frames_below_its_window():
    with pytest.raises(UserError, match=r"6x9.*7x7"):
        ssim(frames(1, 6, 9), frames(1, 6, 9), 1)
    small = Metrics(("mse", "psnr"))  # without ssim, such frames are welcome
    small.update(frames(2, 3, 1, 6, 9), frames(2, 3, 1, 6, 9, seed=1))
    assert small.compute()["count"] == 2
    everything = Metrics(DEFAULT)
    with pytest.raises(UserError):
        everything.update(frames(2, 3, 1, 6, 9), frames(2, 3, 1, 6, 9))
    assert everything.count == 0


def test_errors_by_hand():
    """Sums over C, H, W against means over them."""
    pred, true = torch.zeros(2, 2, 3, 4), torch.full((2, 2, 3, 4), 0.5)
    assert figure("mse", pred, true).tolist() == [6.0, 6.0]
    assert figure("mae", pred, true).tolist() == [12.0, 12.0]
    assert figure("mse_pixel", pred, true).tolist() == [0.25, 0.25]
    assert figure("mae_pixel", pred, true).tolist() == [0.5, 0.5]


def test_psnr_is_scikit_images():
    pred, true = frames(3, 2, 9, 11), frames(3, 2, 9, 11, seed=1)
    expected = [
        peak_signal_noise_ratio(t.double().numpy(), p.double().numpy(), data_range=1)
        for p, t in zip(pred, true, strict=True)
    ]
    np.testing.assert_allclose(figure("psnr", pred, true), expected, rtol=1e-12)


def test_identical_frames_have_psnr_100():
    for name in ("psnr", "psnr_uint8"):
        assert figure(name, frames(1, 9, 9), frames(1, 9, 9)).item() == metrics.MAX_PSNR == 100


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
    got = figure("psnr_uint8", pred, true)
    for i in range(2):
        expected = min(published_psnr(pred[i].numpy(), true[i].numpy()), 100)
        assert abs(got[i].item() - expected) < 1e-9
    assert (got > 24.16).all()


def test_psnr_uint8_wraps_twice():
    """0 against 229: 27 after the first wrap, 27 * 27 = 729, 217 after the second."""
    black, grey = torch.zeros(1, 4, 4), torch.full((1, 4, 4), 229.5 / 255)
    expected = 20 * np.log10(255) - 10 * np.log10(217)
    assert abs(figure("psnr_uint8", black, grey).item() - expected) < 1e-9
    assert abs(figure("psnr_uint8", grey, black).item() - expected) < 1e-9


EVERY = (*DEFAULT, "rmse", *(event(kind, 0.5, 0.5) for kind in ("csi", "pod", "far")))
NAMES = (*DEFAULT, "rmse", "csi_0.5", "pod_0.5", "far_0.5")


def with_holes(frames, share, seed=2):
    """Frames of which about `share` of the pixels are missing."""
    holes = torch.rand(frames.shape, generator=torch.Generator().manual_seed(seed)) < share
    return frames.masked_fill(holes, torch.nan)


@given(st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(1, 9), max_size=4), st.sampled_from([0, 0.01, 0.98]))
@settings(max_examples=30, deadline=None)
def test_batches_and_ranks_do_not_change_the_result(samples, horizon, cuts, missing):
    """One batch, any batches, any ranks (empty ones too): the same sums, hence the same means."""
    pred = frames(samples, horizon, 2, 8, 9)
    true = with_holes(frames(samples, horizon, 2, 8, 9, seed=1), missing)
    whole = Metrics(EVERY)
    whole.update(pred, true)
    edges = sorted({0, samples, *(cut for cut in cuts if cut < samples)})
    ranks = [Metrics(EVERY), Metrics(EVERY), Metrics(EVERY)]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        ranks[i % 2].update(pred[a:b], true[a:b])
    total = Metrics(EVERY)
    total.merge(ranks[0].state())
    total.merge(ranks[1].state())
    total.merge(ranks[2].state())
    expected, got = whole.compute(), total.compute()
    assert got["count"] == expected["count"] == samples
    for name in NAMES:
        assert len(got["per_frame"][name]) == horizon
        for part in ("per_frame", "per_channel", "mean"):
            np.testing.assert_allclose(got[part][name], expected[part][name], rtol=1e-12)
        if missing == 0 and name in DEFAULT:
            np.testing.assert_allclose(got["mean"][name], np.mean(expected["per_frame"][name]), rtol=1e-12)


def test_per_frame_figures_are_the_functions():
    pred, true = frames(4, 3, 1, 16, 16), frames(4, 3, 1, 16, 16, seed=1)
    total = Metrics(DEFAULT)
    total.update(pred, true)
    got = total.compute()["per_frame"]
    for name in set(DEFAULT) - {"ssim", "ssim_dr2"}:
        expected = figure(name, pred, true).mean(dim=0)
        np.testing.assert_allclose(got[name], expected, rtol=1e-12)
    np.testing.assert_allclose(got["ssim"], ssim(pred, true, 1).mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(got["ssim_dr2"], ssim(pred, true, 2).mean(dim=0), rtol=1e-12)


@pytest.mark.parametrize("name, metric", [*zip(NAMES, EVERY)], ids=NAMES)
def test_a_channels_figures_are_those_of_the_channel_alone(name, metric):
    pred, true = frames(2, 3, 2, 9, 12), with_holes(frames(2, 3, 2, 9, 12, seed=1), 0.02)
    together = Metrics((metric,))
    together.update(pred, true)
    for c in range(2):
        alone = Metrics((metric,))
        alone.update(pred[:, :, c : c + 1], true[:, :, c : c + 1])
        assert together.compute()["per_channel"][name][c] == alone.compute()["per_frame"][name]
    assert alone.compute()["per_channel"] == {}


@pytest.mark.parametrize("data_range", [1, 2])
def test_ssim_with_missing_pixels_is_scikit_images_over_whole_windows(data_range):
    pred, true = frames(2, 30, 40), frames(2, 30, 40, seed=1)
    complete = true.double().numpy()
    true[0, 3, 5] = true[1, 20:22, 30] = true[1, :, 0] = torch.nan
    _, similarity = structural_similarity(
        pred.double().numpy(), complete, channel_axis=0, data_range=data_range, full=True
    )
    valid = [
        (c, i, j)
        for c in range(2)
        for i in range(3, 27)
        for j in range(3, 37)
        if not true[c, i - 3 : i + 4, j - 3 : j + 4].isnan().any()
    ]
    expected = np.mean([similarity[place] for place in valid])
    assert len(valid) < 2 * 24 * 34
    assert abs(ssim(pred, true, data_range) - expected) < 1e-9


def test_errors_with_missing_pixels_are_those_of_the_known_ones():
    """Sums over a frame are scaled to all of its pixels, so holes alone do not make a forecast look better."""
    pred, true = frames(4, 2, 9, 11), with_holes(frames(4, 2, 9, 11, seed=1), 0.3)
    error = (pred.double() - true.double()).numpy()
    for name, power in (("mse", 2), ("mae", 1)):
        expected = np.nanmean(np.abs(error) ** power, axis=(1, 2, 3))
        np.testing.assert_allclose(figure(f"{name}_pixel", pred, true), expected, rtol=1e-12)
        np.testing.assert_allclose(figure(name, pred, true), 2 * 9 * 11 * expected, rtol=1e-12)
    for name in ("psnr", "psnr_uint8"):
        known = ~true[0].isnan()
        expected = figure(name, pred[0][known].view(1, 1, -1), true[0][known].view(1, 1, -1))
        np.testing.assert_allclose(figure(name, pred, true)[0], expected, rtol=1e-12)


def test_frames_without_a_known_pixel_are_not_counted():
    pred, true = frames(3, 2, 1, 9, 9), frames(3, 2, 1, 9, 9, seed=1)
    true[1, 0] = torch.nan
    true[:, 1, :, 4, 4] = torch.nan  # of each second frame no window is whole, and all other pixels are known
    total = Metrics(EVERY)
    total.update(pred, true)
    got = total.compute()
    kept = ssim(pred[[0, 2], 0], true[[0, 2], 0], 1).mean()
    assert got["per_frame"]["ssim"] == [pytest.approx(kept.item()), pytest.approx(np.nan, nan_ok=True)]
    assert got["mean"]["ssim"] == got["per_frame"]["ssim"][0]
    expected = [figure("mse", pred[[0, 2], 0], true[[0, 2], 0]).mean(), figure("mse", pred[:, 1], true[:, 1]).mean()]
    np.testing.assert_allclose(got["per_frame"]["mse"], expected, rtol=1e-12)
    np.testing.assert_allclose(got["mean"]["mse"], np.mean(expected), rtol=1e-12)  # lead times count alike
    assert got["count"] == 3


def test_a_forecast_that_is_not_a_number_shows():
    pred, true = frames(2, 2, 1, 9, 9), with_holes(frames(2, 2, 1, 9, 9, seed=1), 0.01)
    pred[0, 0, 0, 0, 0] = torch.nan  # of one lead time
    total = Metrics(("mse", "ssim", "rmse"))
    total.update(pred, true)
    assert all(np.isnan(value) for value in total.compute()["mean"].values())


@pytest.mark.parametrize("missing", [0, 0.2])
def test_events_and_rmse_are_ratios_of_sums(missing):
    """CSI, POD, FAR and RMSE against plain numpy over all pixels of a lead time, not means of frames' ratios."""
    pred, true = frames(5, 3, 1, 6, 7), with_holes(frames(5, 3, 1, 6, 7, seed=1), missing)
    true[0] *= 0.1  # frames without an event at all
    total = Metrics((*(event(kind, 0.7, 0.7) for kind in ("csi", "pod", "far")), "rmse"))
    total.update(pred, true)
    got = total.compute()
    for lead, (p, t) in enumerate([*zip(pred.unbind(1), true.unbind(1)), (pred, true)]):
        p, t = p[~t.isnan()].numpy(), t[~t.isnan()].numpy()
        hits = np.sum((p >= 0.7) & (t >= 0.7))
        misses = np.sum((p < 0.7) & (t >= 0.7))
        false_alarms = np.sum((p >= 0.7) & (t < 0.7))
        expected = {
            "csi_0.7": hits / (hits + misses + false_alarms),
            "pod_0.7": hits / (hits + misses),
            "far_0.7": false_alarms / (hits + false_alarms),
            "rmse": np.sqrt(np.mean((p.astype(np.float64) - t) ** 2)),
        }
        for name, value in expected.items():
            found = got["per_frame"][name][lead] if lead < 3 else got["mean"][name]
            assert found == pytest.approx(value, rel=1e-12), (name, lead)


def test_no_event_at_all_has_no_csi():
    total = Metrics((event("csi", 0.9, 0.9),))
    total.update(torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, 1, 1, 4, 4))
    assert np.isnan(total.compute()["mean"]["csi_0.9"])


def test_lpips_is_the_packages(tmp_path, monkeypatch):
    """With made-up weights where torchvision looks for AlexNet's; without any, a line that says which file."""
    import lpips

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics.lpips_network.cache_clear()
    with pytest.raises(UserError, match=r"weights .*alexnet.* are not there; fetch http"):
        Metrics(("lpips",))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = tmp_path / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    unused = torch.zeros(1)  # the classifier's 235 MB, as a view of one number
    state = {k: unused.expand(v.shape) if k.startswith("classifier") else v for k, v in alexnet().state_dict().items()}
    torch.save(state, weights)
    network = lpips.LPIPS(net="alex", verbose=False).eval()
    pred, true = frames(2, 3, 1, 40, 33), frames(2, 3, 1, 40, 33, seed=1)
    true[0, 2, 0, 0, 0] = torch.nan
    total = Metrics(("lpips",))
    total.update(pred, true)
    for lead in range(3):
        samples = [1] if lead == 2 else [0, 1]
        with torch.no_grad():
            images = (2 * x[samples, lead].repeat(1, 3, 1, 1) - 1 for x in (pred, true))
            expected = network(*images).mean().item()
        assert total.compute()["per_frame"]["lpips"][lead] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="2 channels"):
        total.update(frames(1, 3, 2, 40, 33), frames(1, 3, 2, 40, 33))
    metrics.lpips_network.cache_clear()


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
    total = Metrics(DEFAULT)
    total.update(pred, frames(2, 3, 1, 9, 9))
    assert all(not sums.requires_grad and sums.dtype == torch.float64 for sums in total.sums.values())


def test_misuse_is_refused():
    for name in ("lpips2", "csi", "csi_", "csi_0.5", "hit_0.5"):
        with pytest.raises(UserError, match=rf"{name}'.*thresholds"):
            Metrics(("mse", name))
    with pytest.raises(ValueError, match="no samples"):
        Metrics(DEFAULT).compute()
    total = Metrics(("mse",))
    with pytest.raises(ValueError, match="one shape"):
        total.update(frames(2, 3, 1, 8, 8), frames(2, 1, 1, 8, 8))
    total.update(frames(2, 3, 1, 8, 8), frames(2, 3, 1, 8, 8))
    with pytest.raises(ValueError, match="4 frames after 3"):
        total.update(frames(2, 4, 1, 8, 8), frames(2, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="do not add"):
        total.merge(Metrics(("mae",)).state())


def test_an_event_has_the_number_that_was_typed():
    """Not its value on [0, 1]. The direction of every metric is known from its name, in logs of any age."""
    assert event("csi", 2.0, 0.0625).name == "csi_2" and event("far", 1e-5, 0.3).name == "far_1e-05"
    total = Metrics((event("pod", 2.0, 0.0625),))
    total.update(torch.full((1, 1, 1, 4, 4), 0.0625), torch.full((1, 1, 1, 4, 4), 0.0625))
    assert total.compute()["mean"] == {"pod_2": 1.0}
    directions = {
        "lower": ("mse", "rmse", "far_2", "valid_loss"),
        "higher": ("ssim_dr2", "psnr", "csi_0.0625", "pod_2"),
    }
    for direction, names in directions.items():
        assert {better(name) for name in names} == {direction}
    assert {row.better for row in METRICS.values()} == {"lower", "higher"}


def test_fractions_skill_is_pysteps():
    """Over several frames together, at window sizes from a pixel to more than the frame."""
    spatial = pytest.importorskip("pysteps.verification.spatialscores")
    pred, true = frames(3, 2, 1, 20, 33), frames(3, 2, 1, 20, 33, seed=1)
    pred = torch.nn.functional.avg_pool2d(pred.flatten(0, 1), 5, 1, 2).view_as(pred)  # blurred, as forecasts are
    for window in (1, 5, 9, 41):
        total = Metrics((fractions_skill(2.0, 0.55, window),))
        total.update(pred, true)
        got = total.compute()
        for lead in (0, 1):
            counts = spatial.fss_init(0.55, window)
            for p, t in zip(pred[:, lead, 0], true[:, lead, 0]):
                spatial.fss_accum(counts, p.numpy(), t.numpy())
            assert got["per_frame"][f"fss_2_{window}px"][lead] == pytest.approx(spatial.fss_compute(counts), rel=1e-6)


@pytest.mark.parametrize("window", [1, 5, 9])
def test_fractions_skill_is_that_of_scores(window):
    """The same definition in another library, one field at a time, with values that equal the threshold.

    With zero padding, scores counts one row and one column of windows more, around the pixels just outside the frame at
    the bottom and the right. Our score of frames with such a row and column, without events, is the same number.
    """
    import numpy as np
    import xarray
    from scores.spatial import fss_2d

    pred, true = ((5 * frames(1, 1, 1, 24, 30, seed=seed)).round() for seed in (0, 1))
    total = Metrics((fractions_skill(4.0, 4.0, window),))
    total.update(*(torch.nn.functional.pad(field, (0, 1, 0, 1)) for field in (pred, true)))
    dims = ("y", "x")
    fields = (xarray.DataArray(field[0, 0, 0].double().numpy(), dims=dims) for field in (pred, true))
    expected = fss_2d(
        *fields, event_threshold=4.0, window_size=(window, window), spatial_dims=dims, zero_padding=True,
        threshold_operator=np.greater_equal,
    )  # fmt: skip
    assert total.compute()["mean"][f"fss_4_{window}px"] == pytest.approx(float(expected), rel=1e-9)


def test_frequency_bias_and_equitable_threat_by_hand():
    pred, true = (torch.zeros(1, 1, 1, 10, 10) for _ in range(2))
    pred[0, 0, 0, :4], true[0, 0, 0, 2:5] = 1, 1  # 40 forecast, 30 observed, 20 hits
    true[0, 0, 0, 9, :5] = torch.nan  # 95 known
    total = Metrics([event(kind, 0.5, 0.5) for kind in ("fbias", "ets")])
    total.update(pred, true)
    chance = 30 * 40 / 95
    expected = {"fbias_0.5": 40 / 30, "ets_0.5": (20 - chance) / (20 + 10 + 20 - chance)}
    assert total.compute()["mean"] == pytest.approx(expected, rel=1e-12)
    assert better("fbias_0.5") == "closer to 1"


def test_thresholds_of_channels_in_different_units():
    pred, true = frames(2, 1, 2, 8, 8), frames(2, 1, 2, 8, 8, seed=1)
    rows = metric_rows((), (5.0,), ValueRange((0.0, -10.0), (10.0, 20.0)))
    total = Metrics(rows)
    total.update(pred, true)
    for channel, level in enumerate((0.5, 0.5)):
        alone = Metrics((event("csi", 5.0, level),))
        alone.update(pred[:, :, channel : channel + 1], true[:, :, channel : channel + 1])
        assert total.compute()["per_channel"]["csi_5"][channel] == alone.compute()["per_frame"]["csi_5"]


@pytest.mark.parametrize("low, high", [(250.0, 310.0), ((250.0, -1.0), (310.0, 1.0))])
def test_errors_in_the_units_of_the_data(low, high):
    value_range = ValueRange(low, high)
    pred, true = frames(3, 2, 2, 7, 9), with_holes(frames(3, 2, 2, 7, 9, seed=1), 0.2)
    total = Metrics(data_unit_rows(value_range))
    total.update(pred, true)
    got = total.compute()
    scale = (np.broadcast_to(high, 2) - np.broadcast_to(low, 2)).reshape(2, 1, 1)
    error = (pred.double() - true.double()).numpy() * scale
    for lead in range(2):
        for channel in range(2):
            e = error[:, lead, channel]
            expected = {"mse_data": np.nanmean(e**2), "mae_data": np.nanmean(abs(e)), "bias_data": np.nanmean(e),
                        "rmse_data": np.sqrt(np.nanmean(e**2))}  # fmt: skip
            for name, value in expected.items():
                assert got["per_channel"][name][channel][lead] == pytest.approx(value, rel=1e-9)
    together = np.nanmean(abs(error)) if np.ndim(low) == 0 else np.nan  # kelvins and metres have no common mean
    assert got["mean"]["mae_data"] == pytest.approx(together, nan_ok=True)


def test_weights_of_latitudes():
    latitude = torch.linspace(80, -20, 8, dtype=torch.float64)
    weights = torch.cos(torch.deg2rad(latitude))[:, None].expand(8, 9)
    weights = weights / weights.mean()
    pred, true = frames(2, 3, 1, 8, 9), with_holes(frames(2, 3, 1, 8, 9, seed=1), 0.2)
    total = Metrics(("rmse", "mse", "mae_pixel", "psnr", "psnr_uint8"), weights)
    total.update(pred, true)
    known = ~true.isnan().numpy()
    error, weights = (pred.double() - true.double()).numpy(), np.broadcast_to(weights.numpy(), known.shape)
    got = total.compute()
    squares = np.where(known, error**2, 0) * weights
    assert got["mean"]["rmse"] == pytest.approx(np.sqrt(squares.sum() / (weights * known).sum()), rel=1e-9)
    frame = [squares[i, t].sum() / (weights * known)[i, t].sum() for i in range(2) for t in range(3)]
    assert got["mean"]["mse"] == pytest.approx(72 * np.mean(frame), rel=1e-9)
    assert got["per_frame"]["mae_pixel"][1] == pytest.approx(
        np.mean([np.average(abs(error[i, 1])[known[i, 1]], weights=weights[i, 1][known[i, 1]]) for i in range(2)]),
        rel=1e-9,
    )
    assert got["mean"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(frame)), rel=1e-9)
    wrapped = np.where(known, np.subtract(*((x.nan_to_num() * 255).numpy().astype(np.uint8) for x in (pred, true))), 0)
    squares = (wrapped * wrapped) * weights
    frame = [squares[i, t].sum() / (weights * known)[i, t].sum() for i in range(2) for t in range(3)]
    assert got["mean"]["psnr_uint8"] == pytest.approx(np.mean(10 * np.log10(255**2 / np.array(frame))), rel=1e-9)


def test_anomaly_correlation_is_the_correlation_of_anomalies():
    climatology = with_holes(frames(1, 8, 9, seed=5), 0.1)
    pred, true = frames(3, 2, 1, 8, 9), with_holes(frames(3, 2, 1, 8, 9, seed=1), 0.2)
    rows = torch.linspace(0.1, 1.9, 8, dtype=torch.float64)[:, None].expand(8, 9)
    for weights in (None, rows):
        total = Metrics((anomaly_correlation(climatology),), weights)
        total.update(pred, true)
        known = ~(true + climatology).isnan()
        f, o = ((x.double() - climatology.double())[known].numpy() for x in (pred, true))
        w = np.ones_like(f) if weights is None else weights.expand(known.shape)[known].numpy()
        expected = (w * f * o).sum() / np.sqrt((w * f**2).sum() * (w * o**2).sum())
        assert total.compute()["mean"]["acc"] == pytest.approx(expected, rel=1e-9)
