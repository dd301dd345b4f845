"""How good a forecast is: per-frame figures, and their sums over a data set.

Frames are float tensors (..., C, H, W) with values in [0, 1], the network's scale. A NaN in the truth is a
missing pixel and is left out of every figure; a frame without valid pixels gives NaN and is not
counted. Most figures are computed per frame, shape (...), float64, and averaged over frames and
sequences. POOLED ones are ratios of sums over the pixels of all frames.
"""

import functools
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from vmrnn.errors import UserError

CONVENTIONS = {
    "mse": "squared error summed over C, H, W of a frame (the field's convention); lower is better",
    "mae": "absolute error summed over C, H, W of a frame (the field's convention); lower is better",
    "mse_pixel": "squared error, mean over the pixels of a frame; lower is better",
    "mae_pixel": "absolute error, mean over the pixels of a frame; lower is better",
    "ssim": "SSIM, 7x7 uniform window, data_range 1, right for [0, 1] images; higher is better",
    "ssim_dr2": "SSIM, 7x7 uniform window, data_range 2, as published; reads higher than ssim",
    "psnr": "PSNR in dB, peak 1, mean of the frames' values, each at most 100; higher is better",
    "psnr_uint8": "PSNR in dB as published: uint8 errors that wrap around, never below 24.2",
    "rmse": "root of the squared error's mean over the pixels of all frames together, on the [0, 1] scale; lower is better",
    "lpips": "LPIPS 0.1 of AlexNet, grey frames as grey colours; frames with a missing pixel are left out; lower is better",
}

# For each threshold on the [0, 1] scale: csi_0.25 counts a pixel as an event where its value is 0.25 or more.
EVENTS = {
    "csi": "critical success index, hits / (hits + misses + false alarms); higher is better",
    "pod": "probability of detection, hits / (hits + misses); higher is better",
    "far": "false alarm ratio, false alarms / (hits + false alarms); lower is better",
}
EVENT_NAME = re.compile(r"(csi|pod|far)_(-?\d*\.?\d+(?:e[+-]?\d+)?)")

DEFAULT = ("mse", "mae", "mse_pixel", "mae_pixel", "ssim", "ssim_dr2", "psnr", "psnr_uint8")
WINDOW = 7  # pixels, the side of SSIM's window
MAX_PSNR = 100.0  # dB: what identical frames get instead of infinity, as if their MSE were 1e-10
FRAME = (-3, -2, -1)  # the dimensions of a frame: C, H, W
LPIPS_SMALLEST = 31  # pixels: what AlexNet's strides leave one position of


def event(name):
    """(kind, threshold on the [0, 1] scale) of a name such as csi_0.25; None for any other name."""
    match = EVENT_NAME.fullmatch(name)
    return (match[1], float(match[2])) if match else None


def convention(name, data_range=None):
    """What the metric `name` is, one line. UserError for an unknown name.

    data_range: the data's (low, high) that became [0, 1]; thresholds are then given in the data's units.
    """
    if found := event(name):
        kind, threshold = found
        low, high = data_range or (0, 1)
        level = f"{low + threshold * (high - low):g} {'in the units of the data' if data_range else 'of [0, 1]'}"
        return f"{EVENTS[kind]}; counted over the pixels of all frames together, event: a value of {level} or more"
    if name not in CONVENTIONS:
        known = [*CONVENTIONS, *(f"{kind}_THRESHOLD" for kind in EVENTS)]
        raise UserError(f"metric {name!r} is unknown; choose of {', '.join(known)}")
    return CONVENTIONS[name]


def pooled(name):
    """Whether a metric is a ratio of sums over all pixels rather than a mean over frames."""
    return name == "rmse" or event(name) is not None


def known(pred, true):
    """(truth with missing pixels replaced by the forecast's, so that they add no error; where it was known)."""
    valid = ~true.isnan()
    return torch.where(valid, true, pred), valid


def mean_over_known(error, valid):
    """Mean of `error` (0 where not valid) over a frame's known pixels: (...), NaN where there are none."""
    return error.sum(dim=FRAME) / valid.sum(dim=FRAME)


def mse(pred, true):
    """Squared error summed over C, H, W; with missing pixels, their mean over the known times the number of all."""
    true, valid = known(pred, true)
    return summed((pred.double() - true.double()).square(), valid)


def mae(pred, true):
    """Absolute error summed over C, H, W; with missing pixels as mse."""
    true, valid = known(pred, true)
    return summed((pred.double() - true.double()).abs(), valid)


def summed(error, valid):
    pixels = math.prod(error.shape[-3:])
    return error.sum(dim=FRAME) * (pixels / valid.sum(dim=FRAME, dtype=torch.float64))


def mse_pixel(pred, true):
    """Squared error, mean over the known pixels of C, H, W."""
    true, valid = known(pred, true)
    return mean_over_known((pred.double() - true.double()).square(), valid)


def mae_pixel(pred, true):
    """Absolute error, mean over the known pixels of C, H, W."""
    true, valid = known(pred, true)
    return mean_over_known((pred.double() - true.double()).abs(), valid)


def psnr(pred, true):
    """Peak signal-to-noise ratio in dB for a peak of 1, at most MAX_PSNR."""
    return (-10 * mse_pixel(pred, true).log10()).clamp(max=MAX_PSNR)


def psnr_uint8(pred, true):
    """PSNR in dB as the published KTH figures have it, at most MAX_PSNR.

    The frames become uint8; their difference wraps modulo 256 and so does its square: 0 against
    229 counts as an error of 217. No square is above 249, hence no figure below 24.2 dB.
    """
    true, valid = known(pred, true)
    # .to(torch.uint8) rounds down, as np.uint8 does in the published code
    difference = (pred.float() * 255).to(torch.uint8) - (true.float() * 255).to(torch.uint8)
    error = mean_over_known((difference * difference).double(), valid)
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR)


def rmse_terms(pred, true):
    """(squared error summed over a frame's known pixels, their number)."""
    true, valid = known(pred, true)
    return (pred.double() - true.double()).square().sum(dim=FRAME), valid.sum(dim=FRAME)


def event_terms(pred, true, kind, threshold):
    """(numerator, denominator) of a frame's CSI, POD or FAR: sums of its hits, misses and false alarms."""
    true, valid = known(pred, true)
    forecast, observed = pred.float() >= threshold, true.float() >= threshold
    hits, misses, false_alarms = (
        (cases & valid).sum(dim=FRAME) for cases in (forecast & observed, ~forecast & observed, forecast & ~observed)
    )
    return {
        "csi": (hits, hits + misses + false_alarms),
        "pod": (hits, hits + misses),
        "far": (false_alarms, hits + false_alarms),
    }[kind]


def ssim(pred, true, data_range):
    """Structural similarity as skimage.metrics.structural_similarity defines it by default.

    7x7 uniform window, sample covariance, K1 0.01, K2 0.03; mean over the places where the
    window lies inside the frame and holds no missing pixel, then over channels.
    UserError: frames smaller than the window.
    """
    true, valid = known(pred, true)
    return ssim_of_moments(window_moments(pred, true), known_windows(valid), data_range)


def window_moments(pred, true):
    """Window means E[x], E[y], E[xx + yy], E[xy] of frames, each (..., C, H - 6, W - 6)."""
    height, width = pred.shape[-2:]
    if min(height, width) < WINDOW:
        raise UserError(
            f"SSIM: frames of {height}x{width} are smaller than its {WINDOW}x{WINDOW} window; "
            "use larger frames or leave ssim and ssim_dr2 out of the metrics"
        )
    x, y = pred.double(), true.double()  # variances are differences: float32 loses them
    maps = torch.stack((x, y, x * x + y * y, x * y)).flatten(1, -3)
    maps = F.avg_pool2d(maps, (1, WINDOW), stride=1)
    maps = F.avg_pool2d(maps, (WINDOW, 1), stride=1)
    return maps.unflatten(1, pred.shape[:-2])


def known_windows(valid):
    """Where the 7x7 window of a map (..., C, H, W) of known pixels holds no missing one: (..., C, H - 6, W - 6)."""
    missing = (~valid).float().flatten(0, -3)
    missing = F.max_pool2d(F.max_pool2d(missing, (1, WINDOW), stride=1), (WINDOW, 1), stride=1)
    return (missing == 0).unflatten(0, valid.shape[:-2])


def ssim_of_moments(moments, valid, data_range):
    """SSIM per frame from window_moments and known_windows; both serve every data_range."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    sample = WINDOW**2 / (WINDOW**2 - 1)  # the sample's covariance, not the population's
    mean_x, mean_y, mean_squares, mean_product = moments
    product = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    similarity = (2 * product + c1) * (2 * sample * (mean_product - product) + c2)
    similarity /= (squares + c1) * (sample * (mean_squares - squares) + c2)
    return mean_over_known(torch.where(valid, similarity, 0), valid)


@functools.cache
def lpips_network(device):
    """The LPIPS network on `device`. UserError if its package or its weights are not there; nothing is fetched."""
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise UserError("metric lpips: its package is not installed; pip install lpips or leave it out") from error
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.IMAGENET1K_V1.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not weights.is_file():
        raise UserError(f"metric lpips: its weights {weights} are not there; fetch {url} or leave it out")
    return LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)


def lpips(pred, true):
    """LPIPS distance of frames with 1 or 3 channels; NaN for a frame with a missing pixel.

    UserError: the package or its weights are not there, another number of channels, frames too small.
    """
    channels, height, width = pred.shape[-3:]
    if channels not in (1, 3) or min(height, width) < LPIPS_SMALLEST:
        raise UserError(
            f"metric lpips: frames of {channels} channels and {height}x{width}; it takes 1 or 3 channels of "
            f"{LPIPS_SMALLEST} pixels or more: leave it out"
        )
    true, valid = known(pred, true)
    network = lpips_network(pred.device)
    images = (x.float().flatten(0, -4).expand(-1, 3, -1, -1) for x in (pred, true))
    distance = network(*images, normalize=True).double().view(pred.shape[:-3])
    return torch.where(valid.all(dim=FRAME), distance, torch.nan)


FIGURES = {
    "mse": mse, "mae": mae, "mse_pixel": mse_pixel, "mae_pixel": mae_pixel, "psnr": psnr, "psnr_uint8": psnr_uint8,
    "lpips": lpips,
}  # fmt: skip
SSIM_RANGES = {"ssim": 1.0, "ssim_dr2": 2.0}


def terms(pred, true, names):
    """{name: (numerators, denominators)}, each (...), of frames (..., C, H, W).

    The metric of any set of frames is the numerators' sum over the denominators' (for rmse its root).
    A mean over frames has the frame's figure over 1, or 0 over 0 where there was nothing to compare.
    """
    found = {}
    filled, valid = known(pred, true)
    moments = windows = None
    if SSIM_RANGES.keys() & set(names):
        moments, windows = window_moments(pred, filled), known_windows(valid)
    for name in names:
        if name == "rmse":
            found[name] = rmse_terms(pred, true)
        elif event(name):
            found[name] = event_terms(pred, true, *event(name))
        elif name in SSIM_RANGES:
            figures = ssim_of_moments(moments, windows, SSIM_RANGES[name])
            found[name] = counted_figures(figures, windows.any(dim=FRAME))
        else:
            compared = valid.all(dim=FRAME) if name == "lpips" else valid.any(dim=FRAME)
            found[name] = counted_figures(FIGURES[name](pred, true), compared)
    return found


def counted_figures(figures, compared):
    # By what is known, not by what is NaN: a forecast that is NaN must show
    return torch.where(compared, figures, 0), compared


class Metrics:
    """The metrics `names` over samples, per lead time, of frames and of their channels.

    Sums and counts add up, so the result does not depend on how samples were batched or spread
    over ranks: send `state()`, and `merge` what arrives.

        metrics = Metrics(("mse", "ssim", "csi_0.5"))
        metrics.update(pred, true)     # (B, T, C, H, W) in [0, 1], NaN in true: missing; any number of times
        metrics.compute()["mean"]["mse"]

    UserError: an unknown name, or lpips where it cannot run.
    """

    def __init__(self, names=DEFAULT):
        for name in names:
            convention(name)  # refuses an unknown one
        if "lpips" in names:
            lpips_network(torch.device("cpu"))  # now, not after a day of training
        self.names = tuple(names)
        self.count = 0
        # float64 (names, 1 + channels, T), on the device of the first batch: first the whole frame, then, where
        # there are several, each channel
        self.sums = self.counts = None

    @torch.no_grad()
    def update(self, pred, true):
        """Adds a batch of forecasts and truths, both (B, T, C, H, W)."""
        if pred.shape != true.shape or pred.ndim != 5:
            raise ValueError(
                f"forecast {tuple(pred.shape)} and truth {tuple(true.shape)} must have one shape (B, T, C, H, W)"
            )
        if pred.device.type == "mps":  # has no float64
            pred, true = pred.cpu(), true.cpu()
        # In parts of a few million pixels: float64 copies of a large batch need not fit in memory
        part = max(1, 2**21 // pred.shape[1:].numel())
        for p, t in zip(pred.split(part), true.split(part), strict=True):
            rows = [self._summed(p, t)]
            if p.shape[2] > 1:
                rows += [self._summed(*channel) for channel in zip(p.split(1, 2), t.split(1, 2), strict=True)]
            sums, counts = (torch.stack(r, dim=1) for r in zip(*rows, strict=True))
            self._add(len(p), sums, counts)

    def _summed(self, pred, true):
        """Numerators and denominators summed over a batch, each (names, T)."""
        found = terms(pred, true, self.names)
        sums, counts = zip(*(found[name] for name in self.names), strict=True)
        return [torch.stack([figures.double().sum(dim=0) for figures in parts]) for parts in (sums, counts)]

    def _add(self, count, sums, counts):
        if self.sums is None:
            self.sums, self.counts = sums, counts
        elif self.sums.shape != sums.shape:
            held, new = self.sums.shape, sums.shape
            raise ValueError(f"{new[2]} frames after {held[2]}, or {new[1]} rows of channels after {held[1]}")
        else:
            self.sums = self.sums + sums.to(self.sums.device)
            self.counts = self.counts + counts.to(self.counts.device)
        self.count += count

    def state(self):
        """{"names", "count", "sums" and "counts": float64 (names, 1 + channels, T) on the CPU, None before any batch}."""
        sums, counts = (None if t is None else t.cpu() for t in (self.sums, self.counts))
        return {"names": self.names, "count": self.count, "sums": sums, "counts": counts}

    def merge(self, other):
        """Adds the sums of another Metrics, or of its state()."""
        state = other.state() if isinstance(other, Metrics) else other
        if tuple(state["names"]) != self.names:
            raise ValueError(f"metrics {state['names']} do not add to {self.names}")
        if state["sums"] is not None:
            self._add(state["count"], state["sums"], state["counts"])

    def compute(self):
        """{"count": samples, "mean": {name: float}, "per_frame": {name: [float per lead time]},
        "per_channel": {name: [[float per lead time] per channel]}}; per_channel is empty for one channel.

        The mean is over the lead times that have a figure, each counting alike; pooled metrics (rmse, csi_...)
        are of the sums over all of them. NaN: nothing to compare, or for csi_... no event.
        """
        if self.count == 0:
            raise ValueError("no samples to compute metrics of")
        result = {"count": self.count, "mean": {}, "per_frame": {}, "per_channel": {}}
        for name, sums, counts in zip(self.names, self.sums.cpu(), self.counts.cpu(), strict=True):
            figures, together = sums / counts, sums[0].sum() / counts[0].sum()  # (1 + channels, T), scalar
            if name == "rmse":
                figures, together = figures.sqrt(), together.sqrt()
            mean = together if pooled(name) else figures[0][counts[0] > 0].mean()
            result["mean"][name] = mean.item()
            result["per_frame"][name] = figures[0].tolist()
            if len(figures) > 1:
                result["per_channel"][name] = figures[1:].tolist()
        return result
