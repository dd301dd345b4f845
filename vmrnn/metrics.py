"""How good a forecast is: per-frame figures, and their sums over a data set.

Every figure is computed per frame, then averaged over frames and sequences. Frames are float
tensors (..., C, H, W) with values in [0, 1]; a per-frame figure has the shape (...), float64.
"""

import math

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
}

WINDOW = 7  # pixels, the side of SSIM's window
MAX_PSNR = 100.0  # dB: what identical frames get instead of infinity, as if their MSE were 1e-10


def mse(pred, true):
    """Squared error summed over C, H, W."""
    return (pred.double() - true.double()).square().sum(dim=(-3, -2, -1))


def mae(pred, true):
    """Absolute error summed over C, H, W."""
    return (pred.double() - true.double()).abs().sum(dim=(-3, -2, -1))


def mse_pixel(pred, true):
    """Squared error, mean over C, H, W."""
    return (pred.double() - true.double()).square().mean(dim=(-3, -2, -1))


def mae_pixel(pred, true):
    """Absolute error, mean over C, H, W."""
    return (pred.double() - true.double()).abs().mean(dim=(-3, -2, -1))


def psnr(pred, true):
    """Peak signal-to-noise ratio in dB for a peak of 1, at most MAX_PSNR."""
    return (-10 * mse_pixel(pred, true).log10()).clamp(max=MAX_PSNR)


def psnr_uint8(pred, true):
    """PSNR in dB as the published KTH figures have it, at most MAX_PSNR.

    The frames become uint8; their difference wraps modulo 256 and so does its square: 0 against
    229 counts as an error of 217. No square is above 249, hence no figure below 24.2 dB.
    """
    # .to(torch.uint8) rounds down, as np.uint8 does in the published code
    difference = (pred.float() * 255).to(torch.uint8) - (true.float() * 255).to(torch.uint8)
    error = (difference * difference).double().mean(dim=(-3, -2, -1))
    return (20 * math.log10(255) - 10 * error.log10()).clamp(max=MAX_PSNR)


def ssim(pred, true, data_range):
    """Structural similarity as skimage.metrics.structural_similarity defines it by default.

    7x7 uniform window, sample covariance, K1 0.01, K2 0.03; mean over the places where the
    window lies inside the frame, then over channels.
    UserError: frames smaller than the window.
    """
    return ssim_of_moments(window_moments(pred, true), data_range)


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


def ssim_of_moments(moments, data_range):
    """SSIM per frame from window_moments; the same moments serve every data_range."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    sample = WINDOW**2 / (WINDOW**2 - 1)  # the sample's covariance, not the population's
    mean_x, mean_y, mean_squares, mean_product = moments
    product = mean_x * mean_y
    squares = mean_x.square() + mean_y.square()
    similarity = (2 * product + c1) * (2 * sample * (mean_product - product) + c2)
    similarity /= (squares + c1) * (sample * (mean_squares - squares) + c2)
    return similarity.mean(dim=(-3, -2, -1))


def per_frame(pred, true, names):
    """{name: figures (...)} of frames (..., C, H, W)."""
    figures = {}
    simple = {
        "mse": mse,
        "mae": mae,
        "mse_pixel": mse_pixel,
        "mae_pixel": mae_pixel,
        "psnr": psnr,
        "psnr_uint8": psnr_uint8,
    }
    moments = window_moments(pred, true) if {"ssim", "ssim_dr2"} & set(names) else None
    for name in names:
        if name in simple:
            figures[name] = simple[name](pred, true)
        else:
            figures[name] = ssim_of_moments(moments, {"ssim": 1.0, "ssim_dr2": 2.0}[name])
    return figures


class Metrics:
    """Sums of per-frame figures over samples, per lead time, and the count of samples.

    Sums and counts add up, so the result does not depend on how samples were batched or spread
    over ranks: send `state()`, and `merge` what arrives.

        metrics = Metrics()
        metrics.update(pred, true)     # (B, T, C, H, W) in [0, 1]; any number of times
        metrics.compute()["mean"]["mse"]
    """

    def __init__(self, names=tuple(CONVENTIONS)):
        for name in names:
            if name not in CONVENTIONS:
                raise UserError(f"metric {name!r} is unknown; choose of {', '.join(CONVENTIONS)}")
        self.names = tuple(names)
        self.count = 0
        self.sums = None  # float64 (names, T), on the device of the first batch

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
            figures = per_frame(p, t, self.names)  # each (b, T)
            self._add(len(p), torch.stack([figures[name].sum(dim=0) for name in self.names]))

    def _add(self, count, sums):
        if self.sums is not None and self.sums.shape != sums.shape:
            raise ValueError(f"{sums.shape[1]} frames after {self.sums.shape[1]}")
        self.sums = sums if self.sums is None else self.sums + sums.to(self.sums.device)
        self.count += count

    def state(self):
        """{"names", "count", "sums": float64 (names, T) on the CPU, None before the first batch}."""
        sums = None if self.sums is None else self.sums.cpu()
        return {"names": self.names, "count": self.count, "sums": sums}

    def merge(self, other):
        """Adds the sums of another Metrics, or of its state()."""
        state = other.state() if isinstance(other, Metrics) else other
        if tuple(state["names"]) != self.names:
            raise ValueError(f"metrics {state['names']} do not add to {self.names}")
        if state["sums"] is not None:
            self._add(state["count"], state["sums"])

    def compute(self):
        """{"count": samples, "mean": {name: float}, "per_frame": {name: [float per lead time]}}."""
        if self.count == 0:
            raise ValueError("no samples to compute metrics of")
        means = self.sums.cpu() / self.count  # (names, T)
        return {
            "count": self.count,
            "mean": dict(zip(self.names, means.mean(dim=1).tolist(), strict=True)),
            "per_frame": dict(zip(self.names, means.tolist(), strict=True)),
        }
