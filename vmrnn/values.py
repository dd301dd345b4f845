"""The range of stored values: it maps them to the network's scale [0, 1], and forecasts back to stored values."""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from vmrnn.errors import UserError

TRANSFORMS = ("none", "sqrt", "log")
ROUNDING = 1e-3  # how far outside [0, 1] a value may lie by rounding
FAR = 5  # widths of the training range; a value so far from its middle has other units, or is a fill value


@dataclass(frozen=True)
class ValueRange:
    """The stored values that are 0 and 1 to the network, those that mean a missing pixel, and the scale between.

    low          stored value that becomes 0; one number for all channels, or a tuple with one per channel
    high         stored value that becomes 1; larger than low
    missing      stored values that mean missing; NaN always does
    transform    none: the scale is linear
                 sqrt: square root of the value
                 log: log(1 + value / zero_below)
    zero_below   with sqrt and log, a value below this one counts as 0; log needs it above 0
    given        ValueRange of the forcings, with a tuple for low and high: these channels lie behind those that are
                 forecast; None: there are none
    names        of the channels, but for those of `given`, where a file names them
    units        of these channels, "" where a file names none
    levels       of these channels as text, such as 850 hPa, "" where a file names none; (): of an older checkpoint
    step         seconds from one frame of the training to the next; 0: they have no dates
    directions   of the coordinates of rows and columns of the training: rising, falling, or "" where there are none
    labels       what other coordinates of one value said of the fields of the training, such as band 2

    The last six change no value, and ranges that differ only in them are equal.
    Frames are (..., C), channels last, where low and high are tuples. The data set makes the range, the checkpoint
    stores it, and every program that reads or writes values uses it.
    UserError: low or high is not finite, low is not below high, or the transform cannot take them.
    """

    low: float | tuple = 0.0
    high: float | tuple = 1.0
    missing: tuple = ()
    transform: str = "none"
    zero_below: float = 0.0
    given: "ValueRange | None" = None
    names: tuple = field(default=(), compare=False)
    units: tuple = field(default=(), compare=False)
    levels: tuple = field(default=(), compare=False)
    step: float = field(default=0.0, compare=False)
    directions: tuple = field(default=(), compare=False)
    labels: tuple = field(default=(), compare=False)

    def __post_init__(self):
        pairs = list(self.pairs())
        if np.size(self.low) != np.size(self.high):
            raise UserError(f"data_range has {np.size(self.low)} low and {np.size(self.high)} high numbers")
        for low, high in pairs:
            if not (math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)):
                raise UserError(f"data_range is {low:g} {high:g}: give a low and a higher number")
        if self.transform not in TRANSFORMS:
            raise UserError(f"transform is {self.transform!r}: choose one of {', '.join(TRANSFORMS)}")
        if self.transform == "none":
            return
        if self.transform == "log" and not self.zero_below > 0:
            raise UserError(
                "transform log needs zero_below, the value below which a value counts as 0, such as 0.1 mm/h"
            )
        for low, high in pairs:
            if low < 0 or high <= self.zero_below:
                raise UserError(
                    f"transform {self.transform} is for values from 0 upwards that reach above zero_below "
                    f"({self.zero_below:g}), but the range is {low:g} to {high:g}; choose transform none"
                )

    @classmethod
    def of(cls, config, data_range):
        """The range of a configuration, whose missing values and transform count.

        data_range   low and high, or low and high of each channel in turn
        """
        low, high = (
            edges[0] if len(edges) == 1 else edges for edges in (tuple(data_range[::2]), tuple(data_range[1::2]))
        )
        return cls(low, high, tuple(config.missing_value), config.transform, config.zero_below)

    def pairs(self):
        """Yields (low, high): of each channel if the channels have their own ranges, else once."""
        yield from zip(np.atleast_1d(self.low).tolist(), np.atleast_1d(self.high).tolist())

    def __str__(self):
        text = ", ".join(f"{low:g} to {high:g}" for low, high in self.pairs())
        scale = "" if self.transform == "none" else f" on a {self.transform} scale (0 below {self.zero_below:g})"
        return f"{text} as 0 to 1{scale}"

    def is_missing(self, frames):
        """Which stored values mean a missing pixel: bool array of the same shape."""
        mask = np.isnan(frames) if frames.dtype.kind == "f" else np.zeros(frames.shape, bool)
        for value in self.missing:
            mask |= equals(frames, value)
        return mask

    def to_unit(self, frames):
        """Stored values on the network's scale.

        frames   array of any real type and shape, with the forcings as the last channels if there are any

        Returns float32 of the same shape: low becomes 0, high becomes 1, values outside lie outside, a missing value
        is NaN. UserError: infinite values, which would make every sum over them infinite.
        """
        if self.given:
            count = len(self.given.low)
            forecast = replace(self, given=None).to_unit(frames[..., :-count])
            return np.concatenate((forecast, self.given.to_unit(frames[..., -count:])), axis=-1)
        missing = self.is_missing(frames)
        if frames.dtype.kind == "f" and (np.isinf(frames) & ~missing).any():
            raise UserError("the data hold infinite values: write them as NaN, which means missing")
        # float32 holds 16 bits exactly. Wider types are scaled before they are rounded.
        exact = np.float64 if frames.dtype.itemsize > 2 and frames.dtype != np.float32 else np.float32
        values = frames.astype(exact)
        values[missing] = np.nan
        low, high = (self.forward(np.asarray(edge, np.float64)) for edge in (self.low, self.high))
        if self.transform != "none":
            values = self.forward(values)
        values -= low.astype(exact)
        values /= (high - low).astype(exact)
        return values.astype(np.float32, copy=False)

    def forward(self, values):
        """The transform of stored values, an array."""
        if self.transform == "none":
            return values
        values = np.where(values < self.zero_below, 0, np.maximum(values, 0))
        return np.sqrt(values) if self.transform == "sqrt" else np.log1p(values / values.dtype.type(self.zero_below))

    def to_data(self, values, axis=-1):
        """The network's values in the units of the stored ones. NaN stays NaN.

        values   array or tensor
        axis     where its channels are, if low and high are tuples
        """
        if self.transform == "none":
            low, high = (along(axis, values, edge) for edge in (self.low, self.high))
            return values * (high - low) + low
        low, high = (along(axis, values, self.forward(np.asarray(edge, np.float64))) for edge in (self.low, self.high))
        values = values * (high - low) + low
        # The network may forecast less than the transform of 0.
        values = values.clip(min=0)
        if self.transform == "sqrt":
            return values * values
        return (values.exp() if hasattr(values, "exp") else np.exp(values)) * self.zero_below - self.zero_below

    def to_linear(self, values, axis=-1):
        """The network's values on the scale that they would have without the transform. Metrics are computed on it.

        values   array or tensor
        axis     where its channels are, if low and high are tuples
        """
        if self.transform == "none":
            return values
        low, high = (along(axis, values, edge) for edge in (self.low, self.high))
        return (self.to_data(values, axis) - low) / (high - low)

    def threshold(self, value):
        """The threshold of an event on the linear scale of `to_linear`: a float, or a tuple with one float per channel.

        value   the threshold in the units of the stored values

        Stored values are scaled from float32 or from float64, which rounds differently. The smaller result is taken,
        so that a pixel equal to the threshold counts as an event either way. A transform and its inverse round more, so
        the threshold is then lowered by 1e-5 of its size.
        """
        scale = replace(self, missing=(), transform="none", zero_below=0.0, given=None)
        shape = np.shape(self.low)
        scaled = np.minimum(*(scale.to_unit(np.full(shape, value, dtype)) for dtype in ("f4", "f8")))
        if self.transform != "none":
            scaled = scaled - np.abs(scaled) * 1e-5
        return tuple(scaled.tolist()) if shape else float(scaled)

    def to_dict(self):
        """What json can hold; `from_dict` reads it."""
        facts = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return facts | ({"given": self.given.to_dict()} if self.given else {})

    @classmethod
    def from_dict(cls, values):
        """The ValueRange of what to_dict returned."""
        facts = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**facts | ({"given": cls.from_dict(values["given"])} if values.get("given") else {}))


def outside(unit):
    """Which values on the network's scale lie outside [0, 1], and which of them far outside: two bool arrays.

    unit   array or tensor; NaN lies nowhere
    """
    return (unit < -ROUNDING) | (unit > 1 + ROUNDING), abs(unit - 0.5) > FAR


def equals(frames, value):
    """Where stored values equal `value`: bool array.

    A fill value such as -999.9 is often stored as float32 and read as float64, or typed with fewer digits than the type
    holds. Frames of float64 are therefore compared with its float32 as well.
    """
    mask = frames == value
    if frames.dtype == np.float64:
        with np.errstate(over="ignore"):
            mask |= frames == np.float64(np.float32(value))
    return mask


def along(axis, values, edge):
    """A number, or one per channel as an array or tensor that can be combined with `values`, channels at `axis`."""
    if np.ndim(edge) == 0:
        return float(edge)
    after = len(values.shape) - 1 - axis if axis >= 0 else -1 - axis
    edge = np.reshape(edge, (-1, *[1] * after))
    return values.new_tensor(edge) if hasattr(values, "new_tensor") else edge.astype(values.dtype)
