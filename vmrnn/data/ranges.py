"""The lowest and highest value of clips, and whether they hold any value at all."""

import json
import math

import numpy as np
from tqdm import tqdm

from vmrnn.data.cache import cached_folder, stamp
from vmrnn.errors import UserError


def valid_values(clips, missing):
    """Yields (number of frames, their values that are not missing), a few frames at a time, over all clips."""
    for clip in clips:
        frames = clip.frames()
        step = max(1, 2**24 // frames[:1].size)
        for i in range(0, len(frames), step):
            values = np.array(frames[i : i + step])
            valid = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
            for value in missing:
                valid &= values != value
            yield len(values), values[valid]


def check_not_all_missing(clips, missing):
    """UserError if every value of `clips` is missing. Reading stops at the first value that is not."""
    if not any(len(values) for _, values in valid_values(clips, missing)):
        raise UserError(f"{clips[0].name}: every value is missing; name another file or another missing_value")


def scan_range(clips, missing, cache_dir):
    """(lowest, highest) of the values of `clips` that are not missing. The cache keeps the result.

    UserError: all values are missing, or all are equal, or one is infinite.
    """
    versions = {clip.path: stamp(clip.path) for clip in clips}
    key = [list(versions.values()), [[c.path, c.index, c.start, c.stop, c.step] for c in clips], list(missing)]

    def write(folder):
        low, high = None, None
        with tqdm(total=sum(map(len, clips)), desc="range of values", unit="frame", leave=False, disable=None) as bar:
            for count, values in valid_values(clips, missing):
                if len(values):
                    low = float(values.min() if low is None else min(low, values.min()))
                    high = float(values.max() if high is None else max(high, values.max()))
                bar.update(count)
        (folder / "range.json").write_text(json.dumps([low, high]), encoding="utf-8")

    folder = cached_folder(cache_dir, "range", key, write)
    low, high = json.loads((folder / "range.json").read_text(encoding="utf-8"))
    if low is None:
        raise UserError(f"{clips[0].name}: every value is missing; name another file or another missing_value")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{clips[0].name}: holds infinite values; write them as NaN")
    if low == high:
        raise UserError(f"{clips[0].name}: every value of the training part is {low:g}; give data_range")
    return low, high
