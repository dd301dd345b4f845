"""How stored values become the network's values in [0, 1], and how its forecasts become stored values again."""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from vmrnn.errors import UserError


@dataclass(frozen=True)
class ValueRange:
    """The stored values that are 0 and 1 to the network, and those that mean a missing pixel.

    low       stored value that becomes 0
    high      stored value that becomes 1; larger than low
    missing   stored values that mean missing; NaN always does

    The data set makes it, the checkpoint stores it, and every program that reads or writes values uses it.
    UserError: low or high is not finite, or low is not below high.
    """

    low: float = 0.0
    high: float = 1.0
    missing: tuple = ()

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"data_range is {self.low:g} {self.high:g}: give a low and a higher number")

    def to_unit(self, frames):
        """Stored values as the network's.

        frames   array of any real type and shape

        Returns float32 of the same shape: low becomes 0, high becomes 1, values outside lie outside, a missing value
        is NaN. UserError: infinite values, which would make every sum over them infinite.
        """
        if frames.dtype.kind == "f" and np.isinf(frames).any():
            raise UserError("the data hold infinite values: write them as NaN, which means missing")
        # float32 holds 16 bits exactly. Wider types are scaled before they are rounded.
        exact = np.float64 if frames.dtype.itemsize > 2 and frames.dtype != np.float32 else np.float32
        values = frames.astype(exact)
        values -= self.low
        values /= self.high - self.low
        values = values.astype(np.float32, copy=False)
        for value in self.missing:
            values[frames == value] = np.nan
        return values

    def to_data(self, values):
        """The network's values, an array or a tensor, in the units of the stored ones. NaN stays NaN."""
        return values * (self.high - self.low) + self.low

    def threshold(self, value):
        """The threshold of an event on the network's scale, a float.

        value   the threshold in the units of the stored values

        Stored values are scaled from float32 or from float64, which rounds differently. The smaller result is taken,
        so that a pixel equal to the threshold counts as an event either way.
        """
        scale = replace(self, missing=())
        return min(float(scale.to_unit(np.array(value, dtype))) for dtype in ("f4", "f8"))

    def to_dict(self):
        """What json can hold; `from_dict` reads it."""
        return asdict(self) | {"missing": list(self.missing)}

    @classmethod
    def from_dict(cls, values):
        return cls(values["low"], values["high"], tuple(values["missing"]))
