"""How good a forecast is: figures per frame, and their sums over a data set.

Frames are float tensors (..., C, H, W) on the network's scale [0, 1]. NaN in the truth is a missing pixel, which no
metric counts. A frame without known pixels has no figure.

A metric is one row of METRICS. It gives some sums per frame (`terms`) and says how they become a figure (`finish`), so
that the figure of any set of frames comes from the sums over the set.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from vmrnn.errors import UserError
from vmrnn.values import ValueRange

WINDOW = 7  # pixels, the side of SSIM's window
MAX_PSNR = 100.0  # dB; identical frames get it instead of infinity, as if their mean squared error were 1e-10
UNIT_RANGE = ValueRange()
LPIPS_SMALLEST = 31  # pixels; smaller frames vanish in AlexNet's strides


class Comparison:
    """A batch of forecasts beside the truth. What several metrics need is computed once.

    pred   forecasts (..., C, H, W)
    true   truths of the same shape, NaN where a pixel is missing

    Sums have a last dimension of rows: row 0 is the whole frame. Where there are several channels, rows 1 to C are the
    channels.
    """

    def __init__(self, pred, true):
        self.known = ~true.isnan()
        self.pred = pred
        self.true = torch.where(self.known, true, pred)  # a missing pixel has no error
        self._events = {}

    def rows(self, values):
        """Sums of a map (..., C, H, W) over each row: (..., rows)."""
        channels = values.sum(dim=(-2, -1))
        frame = channels.sum(dim=-1, keepdim=True)
        return frame if channels.shape[-1] == 1 else torch.cat((frame, channels), dim=-1)

    @cached_property
    def size(self):
        """Number of pixels of each row, missing ones too."""
        return self.rows(torch.ones_like(self.known))

    @cached_property
    def pixels(self):
        """Number of known pixels of each row."""
        return self.rows(self.known)

    @cached_property
    def errors(self):
        """Sums of squared and of absolute errors of each row."""
        error = self.pred.double() - self.true.double()
        return self.rows(error.square()), self.rows(error.abs())

    def events(self, threshold):
        """(hits, misses, false alarms) of each row. An event is a value of `threshold` or more."""
        if threshold not in self._events:
            forecast, observed = self.pred.float() >= threshold, self.true.float() >= threshold
            cases = (forecast & observed, ~forecast & observed, forecast & ~observed)
            self._events[threshold] = tuple(self.rows(case & self.known) for case in cases)
        return self._events[threshold]

    @cached_property
    def window_means(self):
        """Means of x, y, xx + yy and xy over every window of SSIM, each (..., C, H - 6, W - 6)."""
        height, width = self.pred.shape[-2:]
        if min(height, width) < WINDOW:
            raise UserError(
                f"SSIM: frames of {height}x{width} are smaller than its {WINDOW}x{WINDOW} window; "
                "use larger frames or leave ssim and ssim_dr2 out of the metrics"
            )
        x, y = self.pred.double(), self.true.double()  # variances are small differences of large numbers
        maps = torch.stack((x, y, x * x + y * y, x * y)).flatten(1, -3)
        maps = F.avg_pool2d(maps, (1, WINDOW), stride=1)
        maps = F.avg_pool2d(maps, (WINDOW, 1), stride=1)
        return maps.unflatten(1, self.pred.shape[:-2])

    @cached_property
    def known_windows(self):
        """Where a window of SSIM holds no missing pixel, (..., C, H - 6, W - 6)."""
        missing = (~self.known).float().flatten(0, -3)
        missing = F.max_pool2d(F.max_pool2d(missing, (1, WINDOW), stride=1), (WINDOW, 1), stride=1)
        return (missing == 0).unflatten(0, self.known.shape[:-2])


@dataclass(frozen=True)
class Metric:
    """One row of the table of metrics.

    name         its name in tables, log.jsonl and metrics.json
    convention   what it measures, in one line
    better       "lower" or "higher", or another end of the sentence "... is better"
    terms        Comparison -> tuple of sums, each (..., rows); they add up over frames
    finish       the sums over some frames, one argument each -> the figure
    pooled       True: the mean over lead times comes from the sums over all of them. False: it is the mean of the
                 lead times' figures, and the terms are (sum of the frames' figures, number of frames)
    prepare      called once before the first frame; raises UserError if the metric cannot run on this machine
    """

    name: str
    convention: str
    better: str
    terms: Callable
    finish: Callable = torch.divide
    pooled: bool = False
    prepare: Callable | None = None

    def __str__(self):
        return f"{self.convention}; {self.better} is better"


def per_frame(figures, counts=lambda c: c.pixels > 0):
    """The terms of a mean over frames of figures(comparison), over the frames where counts(comparison).

    counts must depend on the truth alone: a forecast that is NaN must show in the result.
    """

    def terms(comparison):
        values, counted = figures(comparison), counts(comparison)
        return torch.where(counted, values, 0), counted

    return terms


def psnr(c):
    return (-10 * (c.errors[0] / c.pixels).log10()).clamp(max=MAX_PSNR)


def psnr_uint8(c):
    """PSNR as the published KTH figures have it.

    The frames become uint8. Their difference wraps modulo 256, and so does its square: 0 against 229 counts as an error
    of 217. No square is above 249, hence no figure is below 24.2 dB.
    """
    # .to(torch.uint8) rounds down, as np.uint8 does in the published code.
    difference = (c.pred.float() * 255).to(torch.uint8) - (c.true.float() * 255).to(torch.uint8)
    error = c.rows((difference * difference).double()) / c.pixels
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR)


def ssim(data_range):
    """The terms of structural similarity as skimage.metrics.structural_similarity defines it by default.

    7x7 uniform window, sample covariance, K1 0.01, K2 0.03. The mean is over the windows that lie inside the frame and
    hold no missing pixel, then over channels.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    sample = WINDOW**2 / (WINDOW**2 - 1)  # the sample's covariance, not the population's

    def figures(c):
        mean_x, mean_y, mean_squares, mean_product = c.window_means
        product = mean_x * mean_y
        squares = mean_x.square() + mean_y.square()
        similarity = (2 * product + c1) * (2 * sample * (mean_product - product) + c2)
        similarity /= (squares + c1) * (sample * (mean_squares - squares) + c2)
        return c.rows(torch.where(c.known_windows, similarity, 0)) / c.rows(c.known_windows)

    return per_frame(figures, lambda c: c.rows(c.known_windows) > 0)


@functools.cache
def lpips_network(device):
    """The LPIPS network on `device`. Nothing is downloaded. UserError: its package or its weights are missing."""
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


def lpips(c):
    """LPIPS distance of frames with 1 or 3 channels, and of each channel as a grey frame.

    UserError: the package or its weights are missing, another number of channels, frames too small.
    """
    channels, height, width = c.pred.shape[-3:]
    if channels not in (1, 3) or min(height, width) < LPIPS_SMALLEST:
        raise UserError(
            f"metric lpips: frames of {channels} channels and {height}x{width}; it takes 1 or 3 channels of "
            f"{LPIPS_SMALLEST} pixels or more: leave it out"
        )
    network = lpips_network(c.pred.device)
    rows = [(c.pred, c.true), *(zip(c.pred.split(1, -3), c.true.split(1, -3)) if channels > 1 else ())]
    distances = []
    for pair in rows:
        images = (frames.float().flatten(0, -4).expand(-1, 3, -1, -1) for frames in pair)
        distances.append(network(*images, normalize=True).double().view(c.pred.shape[:-3]))
    return torch.stack(distances, dim=-1)


def whole_frame(sums, c):
    """The sum over a frame as if its missing pixels had the mean of the known ones."""
    return sums * (c.size / c.pixels.double())


# fmt: off
METRICS = [
    Metric("mse", "squared error summed over C, H, W of a frame (the field's convention)", "lower",
           per_frame(lambda c: whole_frame(c.errors[0], c))),
    Metric("mae", "absolute error summed over C, H, W of a frame (the field's convention)", "lower",
           per_frame(lambda c: whole_frame(c.errors[1], c))),
    Metric("mse_pixel", "squared error, mean over the pixels of a frame", "lower",
           per_frame(lambda c: c.errors[0] / c.pixels)),
    Metric("mae_pixel", "absolute error, mean over the pixels of a frame", "lower",
           per_frame(lambda c: c.errors[1] / c.pixels)),
    Metric("ssim", "SSIM, 7x7 uniform window, data_range 1, right for [0, 1] images", "higher", ssim(1.0)),
    Metric("ssim_dr2", "SSIM, 7x7 uniform window, data_range 2, as published; reads higher than ssim", "higher",
           ssim(2.0)),
    Metric("psnr", "PSNR in dB, peak 1, mean of the frames' values, each at most 100", "higher", per_frame(psnr)),
    Metric("psnr_uint8", "PSNR in dB as published: uint8 errors that wrap around, never below 24.2", "higher",
           per_frame(psnr_uint8)),
    Metric("rmse", "root of the squared error's mean over the pixels of all frames together, on the [0, 1] scale",
           "lower", lambda c: (c.errors[0], c.pixels), lambda squares, pixels: (squares / pixels).sqrt(), pooled=True),
    Metric("lpips", "LPIPS 0.1 of AlexNet, grey frames as grey colours; frames with a missing pixel are left out",
           "lower", per_frame(lpips, lambda c: c.pixels == c.size),
           prepare=lambda: lpips_network(torch.device("cpu"))),
]

# Scores of events at a threshold: what they are, which direction is better, their value from the sums.
EVENTS = {
    "csi": ("critical success index, hits / (hits + misses + false alarms)", "higher",
            lambda hits, misses, false_alarms: hits / (hits + misses + false_alarms)),
    "pod": ("probability of detection, hits / (hits + misses)", "higher",
            lambda hits, misses, false_alarms: hits / (hits + misses)),
    "far": ("false alarm ratio, false alarms / (hits + false alarms)", "lower",
            lambda hits, misses, false_alarms: false_alarms / (hits + false_alarms)),
}
# fmt: on
METRICS = {row.name: row for row in METRICS}


def event(kind, threshold, unit_value):
    """The row of a score of events.

    kind         a key of EVENTS
    threshold    a value from here on is an event, in the units of the data; part of the row's name, such as csi_2
    unit_value   the same threshold on the network's scale
    """
    convention, better, finish = EVENTS[kind]
    number = repr(float(threshold)).removesuffix(".0")
    return Metric(
        f"{kind}_{number}",
        f"{convention}; counted over the pixels of all frames together, event: a value of {number} or more in the units "
        "of the data",
        better,
        lambda comparison: comparison.events(unit_value),
        finish,
        pooled=True,
    )


def metric_rows(names, thresholds=(), value_range=UNIT_RANGE, lpips=False):
    """The metrics of an experiment, a tuple of rows.

    names         names of METRICS, in the order of the tables
    thresholds    thresholds of events in the units of the data; any adds rmse and, per threshold, a row of each score
    value_range   ValueRange of the data
    lpips         whether to add lpips

    UserError: an unknown name.
    """
    rows = [row_of(name) for name in (*names, *(["rmse"] if thresholds else []), *(["lpips"] if lpips else []))]
    events = [event(kind, value, value_range.threshold(value)) for value in thresholds for kind in EVENTS]
    return tuple({row.name: row for row in (*rows, *events)}.values())


def row_of(name):
    """The row of METRICS called `name`; a Metric is returned as it is. UserError: an unknown name."""
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise UserError(f"metric {name!r} is unknown; choose of {', '.join(METRICS)}, or thresholds for events")
    return METRICS[name]


def better(name):
    """Which direction is better, "lower" or "higher", of a name in log.jsonl: a metric, an event of any threshold, a loss."""
    kind = name.split("_")[0]
    if kind in EVENTS:
        return EVENTS[kind][1]
    return METRICS[name].better if name in METRICS else "lower"


def figure(name, pred, true):
    """The figure of each frame by the metric `name`, float64 (...). Frames as in Comparison; NaN: nothing to compare."""
    row = row_of(name)
    return row.finish(*row.terms(Comparison(pred, true)))[..., 0]


class Metrics:
    """Metrics over many samples, per lead time, of whole frames and of their channels.

    metrics   rows, or names of METRICS

        metrics = Metrics(("mse", "ssim", event("csi", 0.5, 0.5)))
        metrics.update(pred, true)     # any number of times
        metrics.compute()["mean"]["mse"]

    Only sums are kept, so the result does not depend on how samples were batched or spread over processes: send
    `state()`, and `merge` what arrives. UserError: an unknown name, a metric that cannot run on this machine.
    """

    def __init__(self, metrics):
        self.metrics = tuple(map(row_of, metrics))
        for metric in self.metrics:
            if metric.prepare:
                metric.prepare()  # fails now, not after a day of training
        self.count = 0
        self.sums = None  # {name: float64 (terms, rows, T)}, on the device of the first batch

    @torch.no_grad()
    def update(self, pred, true):
        """Add a batch of forecasts and truths, both (B, T, C, H, W) in [0, 1]; NaN in the truth is a missing pixel."""
        if pred.shape != true.shape or pred.ndim != 5:
            raise ValueError(
                f"forecast {tuple(pred.shape)} and truth {tuple(true.shape)} must have one shape (B, T, C, H, W)"
            )
        if pred.device.type == "mps":  # has no float64
            pred, true = pred.cpu(), true.cpu()
        # A few million pixels at a time: float64 copies of a large batch need not fit in memory.
        part = max(1, 2**21 // pred.shape[1:].numel())
        for p, t in zip(pred.split(part), true.split(part), strict=True):
            comparison = Comparison(p, t)
            sums = {
                metric.name: torch.stack([term.double().sum(dim=0).T for term in metric.terms(comparison)])
                for metric in self.metrics
            }
            self._add(len(p), sums)

    def _add(self, count, sums):
        held = self.sums or {name: torch.zeros_like(new) for name, new in sums.items()}
        for name, new in sums.items():
            (_, rows, frames), (_, new_rows, new_frames) = held[name].shape, new.shape
            if (rows, frames) != (new_rows, new_frames):
                raise ValueError(f"{new_frames} frames after {frames}, or {new_rows} rows of channels after {rows}")
        self.sums = {name: held[name] + new.to(held[name].device) for name, new in sums.items()}
        self.count += count

    def state(self):
        """{"names", "count", "sums": {name: float64 (terms, rows, T) on the CPU}, None before any batch}."""
        sums = None if self.sums is None else {name: held.cpu() for name, held in self.sums.items()}
        return {"names": tuple(metric.name for metric in self.metrics), "count": self.count, "sums": sums}

    def merge(self, other):
        """Add the sums of another Metrics, or of its state()."""
        state = other.state() if isinstance(other, Metrics) else other
        names = self.state()["names"]
        if tuple(state["names"]) != names:
            raise ValueError(f"metrics {state['names']} do not add to {names}")
        if state["sums"] is not None:
            self._add(state["count"], state["sums"])

    def compute(self):
        """The figures of all samples.

        Returns {"count": samples, "mean": {name: float}, "per_frame": {name: [float per lead time]},
        "per_channel": {name: [[float per lead time] per channel]}}; per_channel is empty for one channel.
        `mean` averages the lead times that have a figure, with equal weight. Pooled metrics come from the sums over all
        lead times instead. NaN: nothing to compare, or no event.
        """
        if self.count == 0:
            raise ValueError("no samples to compute metrics of")
        result = {"count": self.count, "mean": {}, "per_frame": {}, "per_channel": {}}
        for metric in self.metrics:
            sums = self.sums[metric.name].cpu()
            figures = metric.finish(*sums)  # (rows, T)
            if metric.pooled:
                mean = metric.finish(*sums[:, 0].sum(dim=-1))
            else:
                _, counts = sums[:, 0]
                mean = figures[0][counts > 0].mean()
            result["mean"][metric.name] = mean.item()
            result["per_frame"][metric.name] = figures[0].tolist()
            if len(figures) > 1:
                result["per_channel"][metric.name] = figures[1:].tolist()
        return result
