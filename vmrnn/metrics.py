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

import numpy as np
import torch
import torch.nn.functional as F

from vmrnn.errors import UserError
from vmrnn.values import ValueRange

WINDOW = 7  # pixels, the side of SSIM's window
MAX_PSNR = 100.0  # dB; identical frames get it instead of infinity, as if their mean squared error were 1e-10
UNIT_RANGE = ValueRange()
LPIPS_SMALLEST = 31  # pixels; smaller frames vanish in AlexNet's strides


class Comparison:
    """A batch of forecasts and the truth. Intermediate results that several metrics use are computed once.

    pred      forecasts (..., C, H, W)
    true      truths of the same shape, NaN where a pixel is missing
    weights   (H, W), weights of the pixels in sums of errors, mean 1, such as cosines of latitudes; None:
              all have equal weight

    Sums have a last dimension of rows: row 0 is the whole frame. With several channels, rows 1 to C are the channels.
    """

    def __init__(self, pred, true, weights=None):
        self.known = ~true.isnan()
        self.pred, self.weights = pred, weights
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

    def weighted(self, values):
        """Sums of a map over each row, each pixel with its weight."""
        return self.rows(values if self.weights is None else values * self.weights)

    @cached_property
    def pixels(self):
        """Number of known pixels of each row, or the sum of their weights."""
        return self.weighted(self.known)

    @cached_property
    def error(self):
        return self.pred.double() - self.true.double()

    @cached_property
    def errors(self):
        """Sums of squared and of absolute errors of each row."""
        return self.weighted(self.error.square()), self.weighted(self.error.abs())

    def event_maps(self, threshold):
        """(events of the forecast, events of the truth), bool maps; a missing pixel has none.

        threshold   smallest value of an event: one number, or a tuple with one per channel
        """
        if threshold not in self._events:
            level = torch.tensor(threshold, dtype=torch.float32, device=self.pred.device).view(-1, 1, 1)
            self._events[threshold] = tuple((x.float() >= level) & self.known for x in (self.pred, self.true))
        return self._events[threshold]

    def events(self, threshold):
        """(hits, misses, false alarms, known pixels) of each row."""
        if ("counts", threshold) not in self._events:
            forecast, observed = self.event_maps(threshold)
            cases = (forecast & observed, ~forecast & observed, forecast & ~observed, self.known)
            self._events["counts", threshold] = tuple(map(self.rows, cases))
        return self._events["counts", threshold]

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
    family       (name, convention) shown once for all rows whose names differ only in a number, such as csi_X for csi_1
                 and csi_5; None: the row has a line of its own
    """

    name: str
    convention: str
    better: str
    terms: Callable
    finish: Callable = torch.divide
    pooled: bool = False
    prepare: Callable | None = None
    family: tuple | None = None

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
    """PSNR in dB with peak 1, at most MAX_PSNR: (..., rows)."""
    return (-10 * (c.errors[0] / c.pixels).log10()).clamp(max=MAX_PSNR)


def psnr_uint8(c):
    """PSNR in dB as the published KTH figures have it: (..., rows).

    The frames become uint8. Their difference wraps modulo 256, and so does its square: 0 against 229 counts as an error
    of 217. No square is above 249, hence no figure is below 24.2 dB.
    """
    # .to(torch.uint8) rounds down, as np.uint8 does in the published code.
    difference = (c.pred.float() * 255).to(torch.uint8) - (c.true.float() * 255).to(torch.uint8)
    error = c.weighted((difference * difference).double()) / c.pixels
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
METRICS = {row.name: row for row in [
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
           "lower", per_frame(lpips, lambda c: c.rows(c.known) == c.size),
           prepare=lambda: lpips_network(torch.device("cpu"))),
]}

# Scores of events at a threshold: what they are, which direction is better, their value from the sums.
EVENTS = {
    "csi": ("critical success index, hits / (hits + misses + false alarms)", "higher",
            lambda hits, misses, alarms, pixels: hits / (hits + misses + alarms)),
    "pod": ("probability of detection, hits / (hits + misses)", "higher",
            lambda hits, misses, alarms, pixels: hits / (hits + misses)),
    "far": ("false alarm ratio, false alarms / (hits + false alarms)", "lower",
            lambda hits, misses, alarms, pixels: alarms / (hits + alarms)),
    "fbias": ("frequency bias, (hits + false alarms) / (hits + misses)", "closer to 1",
              lambda hits, misses, alarms, pixels: (hits + alarms) / (hits + misses)),
    "ets": ("equitable threat score: the critical success index without the hits that chance gives", "higher",
            lambda hits, misses, alarms, pixels: equitable_threat(hits, misses, alarms, pixels)),
}
# Scores of events that need more than their counts.
FRACTIONS = "fss"
# fmt: on


def equitable_threat(hits, misses, alarms, pixels):
    """The equitable threat score. `chance` is the number of hits of a random forecast with as many events."""
    chance = (hits + misses) * (hits + alarms) / pixels
    return (hits - chance) / (hits + misses + alarms - chance)


def typed(number):
    """The text of a number as the user typed it: 2.0 gives "2"."""
    return repr(float(number)).removesuffix(".0")


def event(kind, threshold, unit_value):
    """The row of a score of events.

    kind         a key of EVENTS
    threshold    a value from here on is an event, in the units of the data; part of the row's name, such as csi_2
    unit_value   the same threshold on the network's scale
    """
    convention, better, finish = EVENTS[kind]

    return Metric(
        f"{kind}_{typed(threshold)}",
        f"{convention}; counted over the pixels of all frames together, event: a value of {typed(threshold)} or more "
        "in the units of the data",
        better,
        lambda comparison: comparison.events(unit_value),
        finish,
        pooled=True,
        family=(f"{kind}_X", f"{convention}; event: a value of X or more; {better} is better"),
    )


def fractions_skill(threshold, unit_value, window):
    """The row of a fractions skill score (Roberts and Lean 2008), such as fss_2_9px.

    threshold    see event
    unit_value   see event
    window       side of the square that the shares of events are compared in, an odd number of pixels

    1 - sum((f - o)^2) / sum(f^2 + o^2) over the windows around all pixels; f and o are the shares of events in the
    window, pixels outside the frame and missing ones counted as none. The sums run over all frames together,
    as in pysteps.
    """

    def terms(c):
        shares = []
        for events in c.event_maps(unit_value):
            maps = events.double().flatten(0, -3)
            for sides in ((1, window), (window, 1)):
                padding = [side // 2 for side in sides]
                maps = F.avg_pool2d(maps, sides, stride=1, padding=padding)
            shares.append(maps.unflatten(0, events.shape[:-2]))
        forecast, observed = shares
        return c.rows((forecast - observed).square()), c.rows(forecast.square() + observed.square())

    return Metric(
        f"{FRACTIONS}_{typed(threshold)}_{window}px",
        f"fractions skill score in windows of {window}x{window} pixels, event: a value of {typed(threshold)} or more "
        "in the units of the data",
        "higher",
        terms,
        lambda differences, squares: 1 - differences / squares,
        pooled=True,
        family=(
            f"{FRACTIONS}_X_Npx",
            "fractions skill score of these events in windows of NxN pixels; higher is better",
        ),
    )


def data_unit_rows(value_range):
    """The rows of errors in the units of the data: mean squared, mean absolute, root mean square, and bias.

    value_range   ValueRange of the data. If its channels have their own ranges, they may have different units, and the
                  whole frame then has no figure.
    """
    low, high = np.atleast_1d(value_range.low), np.atleast_1d(value_range.high)
    width = torch.from_numpy((high - low).astype(np.float64))

    def scaled(power, sums):
        def terms(c):
            values, scale = c.weighted(sums(c.error)), (width**power).to(c.pred.device)
            if len(scale) == 1:
                return values * scale, c.pixels
            whole = torch.full_like(scale[:1], torch.nan)  # rows are the frame and then the channels
            return values * torch.cat((whole, scale))[: values.shape[-1]], c.pixels

        return terms

    where = "over the pixels of all frames together, in the units of the data"
    return (
        Metric("mse_data", f"mean squared error {where}, squared", "lower", scaled(2, torch.square), pooled=True),
        Metric("mae_data", f"mean absolute error {where}", "lower", scaled(1, torch.abs), pooled=True),
        Metric(
            "rmse_data",
            f"root mean squared error {where}",
            "lower",
            scaled(2, torch.square),
            lambda squares, pixels: (squares / pixels).sqrt(),
            pooled=True,
        ),
        Metric(
            "bias_data", f"mean of forecast minus truth {where}", "closer to 0", scaled(1, lambda e: e), pooled=True
        ),
    )


def anomaly_correlation(climatology):
    """The row of the anomaly correlation: the correlation of forecast and truth, both minus a climatology.

    climatology   tensor (C, H, W) on the network's linear scale; NaN: no climatology there
    """

    def terms(c):
        mean = climatology.to(c.pred.device).double()
        known = c.known & ~mean.isnan()
        forecast, observed = (torch.where(known, x.double() - mean, 0) for x in (c.pred, c.true))
        return tuple(map(c.weighted, (forecast * observed, forecast.square(), observed.square())))

    return Metric(
        "acc",
        "anomaly correlation, of forecast and truth minus the climatology, over the pixels of all frames together",
        "higher",
        terms,
        lambda products, forecast, observed: products / (forecast * observed).sqrt(),
        pooled=True,
    )


def metric_rows(names, thresholds=(), value_range=UNIT_RANGE, lpips=False, windows=(), data_units=False):
    """The metrics of an experiment, a tuple of rows.

    names         names of METRICS, in the order of the tables
    thresholds    thresholds of events in the units of the data. If there are any, rmse is added, and a row of each
                  score for each threshold
    value_range   ValueRange of the data
    lpips         whether to add lpips
    windows       sides of the windows of the fractions skill score, for each threshold
    data_units    whether to add the errors in the units of the data

    UserError: an unknown name.
    """
    rows = [row_of(name) for name in (*names, *(["rmse"] if thresholds else []), *(["lpips"] if lpips else []))]
    for value in thresholds:
        level = value_range.threshold(value)
        rows += [event(kind, value, level) for kind in EVENTS]
        rows += [fractions_skill(value, level, window) for window in windows]
    rows += data_unit_rows(value_range) if data_units else ()
    return tuple({row.name: row for row in rows}.values())


def row_of(name):
    """The row of METRICS called `name`; a Metric is returned as it is. UserError: an unknown name."""
    if isinstance(name, Metric):
        return name
    if name not in METRICS:
        raise UserError(f"metric {name!r} is unknown; choose of {', '.join(METRICS)}, or thresholds for events")
    return METRICS[name]


def better(name):
    """Which direction is better, as in Metric.better.

    name   a name in log.jsonl: of a metric, of a score of events, or of a loss
    """
    kind = name.split("_")[0]
    if kind in EVENTS:
        return EVENTS[kind][1]
    return METRICS[name].better if name in METRICS else "lower"


def figure(name, pred, true):
    """The figure of each frame, float64 (...). NaN: the frame has nothing to compare.

    name   a name of METRICS, or a Metric
    pred   forecasts (..., C, H, W)
    true   truths, see Comparison
    """
    row = row_of(name)
    return row.finish(*row.terms(Comparison(pred, true)))[..., 0]


class Metrics:
    """Metrics over many samples, per lead time, of whole frames and of their channels.

    metrics   rows, or names of METRICS
    weights   of the pixels, see Comparison

        metrics = Metrics(("mse", "ssim", event("csi", 0.5, 0.5)))
        metrics.update(pred, true)     # any number of times
        metrics.compute()["mean"]["mse"]

    Only sums are kept, so the result does not depend on how samples were batched or spread over processes: send
    `state()`, and `merge` what arrives. UserError: an unknown name, a metric that cannot run on this machine.
    """

    def __init__(self, metrics, weights=None):
        self.metrics, self.weights = tuple(map(row_of, metrics)), weights
        self.names = tuple(metric.name for metric in self.metrics)
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
        weights = None if self.weights is None else self.weights.to(pred.device)
        # A few million pixels at a time: float64 copies of a large batch need not fit in memory.
        part = max(1, 2**21 // pred.shape[1:].numel())
        for p, t in zip(pred.split(part), true.split(part), strict=True):
            comparison = Comparison(p, t, weights)
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
        return {"names": self.names, "count": self.count, "sums": sums}

    def merge(self, state):
        """Add the state() of another Metrics."""
        if tuple(state["names"]) != self.names:
            raise ValueError(f"metrics {state['names']} do not add to {self.names}")
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
