"""How the values of frames become colours: grey or RGB for pictures, a scale with a unit for fields."""

import re
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize, to_rgb

from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError

GREY, RAIN, FIELD = "grey", "rain", "viridis"  # of pictures, of rain, of all other fields (perceptually uniform)
MISSING = (0.78, 0.82, 0.88)  # colour of a missing pixel of a picture; no grey frame holds it
MISSING_FIELD = (0.6, 0.6, 0.6)  # of a field; no scale of colours holds it
# Colours of the classes of rain, the first one below the smallest edge.
RAIN_COLOURS = ("#f4f4f4", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#31a354", "#ffe38f", "#ff9326", "#cc4c02")
# Names and units of fields that are rain
IS_RAIN = r"rain|precip|prcp|\btp\b|^mm(/| |$)|^kg m-2"
LEAST_HIGH = 0.01  # smallest value that is shown as white, so that noise stays dark
SHARE = 0.999  # this share of the values lies within the scale


@dataclass(frozen=True)
class Look:
    """The colours of the frames of one data set.

    colours       "grey" (three channels are shown as RGB), "rain", or the name of a colour map of matplotlib
    low, high     values at the ends of the scale, in the units of the picture
    edges         values at which a class of rain begins; () for other colours
    label         name and unit of the values, such as precipitation [kg m-2]; "" for pictures
    unit          unit of differences
    value_range   ValueRange that gives a field its units; None: values stay on the scale [0, 1]
    """

    colours: str = GREY
    low: float = 0.0
    high: float = 1.0
    edges: tuple = ()
    label: str = ""
    unit: str = "of the scale [0, 1]"
    value_range: object = None

    @classmethod
    def of(cls, config, value_range, frames, colours="auto"):
        """The look of a data set.

        config        Config
        value_range   ValueRange of the data
        frames        list of frames (T, C, H, W) on the scale [0, 1]: their values lie within the colours' scale
        colours       "auto": rain for fields whose name or unit says so or whose transform is log, viridis for other
                      fields, grey for all else

        UserError: colours that do not exist.
        """
        if colours not in ("auto", GREY, RAIN) and colours not in colormaps:
            raise UserError(
                f"--colours {colours}: choose auto, grey, rain or a colour map of matplotlib, such as {FIELD}"
            )
        is_field = DATASETS[config.dataset].field and not (config.dataset == "array" and config.input_channels == 3)
        name, unit = (texts[0] if texts else "" for texts in (value_range.names, value_range.units))
        if colours == "auto":
            is_rain = config.transform == "log" or any(re.search(IS_RAIN, text.lower()) for text in (name, unit))
            colours = GREY if not is_field else RAIN if is_rain else FIELD
        if colours == GREY:
            return cls(high=white_level(frames))
        own = value_range if is_field else None
        label = " ".join(filter(None, (name or "value", unit and f"[{unit}]"))) if is_field else ""
        scale = cls(
            colours, label=label, unit=(unit or "in the units of the data") if is_field else cls.unit, value_range=own
        )
        return scale.fitted([scale.values(each) for each in frames])

    def fitted(self, values):
        """The same look with a scale for some values, a list of arrays."""
        known = np.concatenate([array[np.isfinite(array)] for array in values] or [np.zeros(1)])
        low, high = np.quantile(known, (1 - SHARE, SHARE)).tolist() if known.size else (0.0, 1.0)
        if self.colours == RAIN:
            edges = rain_edges(high)
            return replace(self, low=0.0, high=edges[-1], edges=edges)
        return replace(self, low=low, high=high if high > low else low + 1)

    def values(self, frames):
        """What is shown of frames (T, C, H, W) on the scale [0, 1]: float32 (T, H, W, 1 or 3) in `label`'s unit."""
        if self.value_range is None:
            return shown_channels(frames)
        values = self.value_range.to_data(np.asarray(frames, dtype=np.float32), axis=1)
        return np.asarray(values[:, :1], dtype=np.float32).transpose(0, 2, 3, 1)

    def paint(self, values):
        """Values (..., 1 or 3) as colours, float32 (..., 3) in [0, 1]. A missing pixel has a colour of its own."""
        missing = np.isnan(values).any(-1, keepdims=True)
        if self.colours == GREY:
            return np.where(missing, np.float32(MISSING), (values / self.high).clip(0, 1))
        painted = self.colour_map()(self.norm()(values.mean(-1)))[..., :3].astype(np.float32)
        return np.where(missing, np.float32(MISSING_FIELD), painted)

    def colour_map(self):
        """matplotlib's colour map."""
        if self.colours == RAIN:
            return ListedColormap(RAIN_COLOURS)
        return colormaps["gray" if self.colours == GREY else self.colours]

    def norm(self):
        """matplotlib's way from values to the colour map."""
        if self.colours == RAIN:
            return BoundaryNorm(self.edges, len(RAIN_COLOURS), extend="both")
        return Normalize(self.low, self.high)

    def scale(self):
        """The scale from its low to its high end: (colours (n, 3), [(place from 0 to 1, text of a tick)])."""
        if self.colours == RAIN:
            count = len(RAIN_COLOURS)
            return np.array([to_rgb(c) for c in RAIN_COLOURS]), [
                ((i + 1) / count, f"{e:g}") for i, e in enumerate(self.edges)
            ]
        ticks = [(place, f"{self.low + place * (self.high - self.low):.3g}") for place in (0, 0.5, 1)]
        return self.colour_map()(np.linspace(0, 1, 64))[:, :3], ticks


def rain_edges(largest):
    """Edges of the classes of rain: numbers of the sequence 1, 2, 5, 10, 20, 50, ... up to `largest`."""
    steps = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    last = max([i for i, step in enumerate(steps) if step <= largest * (1 + 1e-6)], default=0)
    last = max(last, len(RAIN_COLOURS) - 2)
    return tuple(float(f"{step:g}") for step in steps[last - len(RAIN_COLOURS) + 2 : last + 1])


def shown_channels(frames):
    """(T, C, H, W) -> float32 (T, H, W, 3 or 1). Three channels are colours. Of any other number the first is shown."""
    frames = np.asarray(frames, dtype=np.float32)
    return (frames if frames.shape[1] == 3 else frames[:, :1]).transpose(0, 2, 3, 1)


def white_level(frames):
    """The value to show as white for some fields (T, C, H, W): 1, or less if the values are small, such as rain."""
    frames = list(map(shown_channels, frames))
    largest = nearly_largest(frames)
    return 1.0 if largest > 0.5 or any(f.shape[-1] == 3 for f in frames) else max(LEAST_HIGH, largest)


def nearly_largest(arrays):
    """The 99.9th percentile of some arrays without their NaN, at least 0."""
    values = np.concatenate([np.zeros(1, np.float32), *(array.ravel() for array in arrays)])
    return float(np.nanquantile(values, SHARE))


def shrunk(values, side):
    """Values (T, H, W, C) with at most `side` rows and columns: each is the mean of the known ones of a square."""
    T, H, W, C = values.shape
    k = -(-max(H, W) // side)
    if k == 1:
        return values
    padded = np.full((T, -(-H // k) * k, -(-W // k) * k, C), np.nan, np.float32)
    padded[:, :H, :W] = values
    squares = padded.reshape(T, padded.shape[1] // k, k, padded.shape[2] // k, k, C)
    known = ~np.isnan(squares)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing is known there
        return np.where(known, squares, 0).sum((2, 4)) / known.sum((2, 4)).astype(np.float32)
