"""Radially averaged power spectra of forecast and truth: they show how much a forecast is blurred."""

import numpy as np
import torch
from matplotlib.figure import Figure

from vmrnn.pictures import LINES, TRUTH, save


class Spectrum:
    """Mean power by wavenumber and lead time, over all frames without a missing pixel.

    Wavenumber k is the number of waves per longest side of a frame. Power at k is the mean of |FFT|^2 over the ring of
    wavenumbers that round to k, averaged over channels.
    """

    def __init__(self):
        self.sums, self.count = {}, {}

    @torch.no_grad()
    def update(self, label, frames):
        """Add frames (B, T, C, H, W) to the sums of `label`, such as "truth"."""
        height, width = frames.shape[-2:]
        rings = rings_of(height, width).to(frames.device)
        whole = ~frames.isnan().flatten(2).any(-1)  # (B, T)
        power = torch.fft.fft2(frames.float().nan_to_num(), norm="forward").abs().square().mean(2).flatten(2)
        power = torch.where(whole[..., None], power, 0).sum(0).double()  # (T, H * W)
        last = min(height, width) // 2
        found = torch.zeros(len(power), last + 1, dtype=torch.float64, device=power.device)
        inside = rings <= last
        found.index_add_(1, rings[inside], power[:, inside])
        found /= torch.bincount(rings[inside], minlength=last + 1)
        self.sums[label] = self.sums.get(label, 0) + found.cpu()
        self.count[label] = self.count.get(label, 0) + whole.sum(0).cpu()

    def compute(self):
        """{label: (T, K) mean power, wavenumbers 0 to K - 1}; NaN at lead times without a whole frame."""
        return {label: (self.sums[label] / self.count[label][:, None]).numpy() for label in self.sums}

    def draw(self, path, leads):
        """Draw the first, the middle and the last lead time as a PNG.

        path    file to write
        leads   the name of each lead time
        """
        found = self.compute()
        steps = len(leads)
        shown = sorted({0, (steps - 1) // 2, steps - 1})
        figure = Figure((3.4 * len(shown), 3), layout="constrained")
        axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axis, step in zip(axes, shown):
            for label, power in found.items():
                colour = TRUTH if label == "truth" else LINES[0][0]
                axis.plot(np.arange(1, power.shape[1]), power[step, 1:], label=label, color=colour)
            axis.set(title=f"lead time {leads[step]}", xlabel="waves per frame", xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("mean power")
        axes[0].legend(fontsize=8)
        save(figure, path)


def rings_of(height, width):
    """The wavenumber that each element of an FFT of (height, width) rounds to, int64 (height * width,)."""
    side = max(height, width)
    y, x = (torch.fft.fftfreq(n) * side for n in (height, width))
    return (y[:, None].square() + x.square()).sqrt().round().long().flatten()
