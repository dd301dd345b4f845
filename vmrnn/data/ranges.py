"""What values clips hold: ranges of channels, the share of missing pixels, and values that look like fill values."""

import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from vmrnn.data.cache import cached_folder, stamp
from vmrnn.errors import UserError
from vmrnn.progress import Bar
from vmrnn.values import ValueRange, equals, outside

BLOCK = 2**22  # values that are read at once
LOOK = 2**28  # values that are looked at where the range need not be exact
APART, FAR_APART = 10, 1000  # widths of all other values between them and one that looks like a fill value
SMALL = 0.02  # of the range: values that span less may be metres for millimetres, or shares of 1 for per cent
REACH = 1e6  # widths of the range between it and a value that no network can be given


@dataclass
class Summary:
    """The values of clips, per channel where there is a list.

    low, high             lowest and highest value that is not missing; None: all are missing
    next_low, next_high   lowest and highest value but for those that equal low or high; None: there is none
    frames, looked_at     number of frames, and of those that were read
    pixels, missing       number of values that were read, and of the missing ones among them
    occurs                per named missing value, how often it occurs
    """

    low: list
    high: list
    next_low: list
    next_high: list
    frames: int
    looked_at: int
    pixels: int
    missing: int
    occurs: list

    def notes(self, options, split):
        """Lines for the start of a program: the range, the share of missing pixels, and what is odd about them."""
        ranges = ", ".join(
            "no value" if low is None else f"{low:g} to {high:g}" for low, high in zip(self.low, self.high)
        )
        looked = "" if self.looked_at == self.frames else f" (in {self.looked_at} of the {self.frames} frames)"
        lines = [f"{split} data: values {ranges}, {100 * self.missing / self.pixels:.3g} % missing{looked}"]
        for value, times in zip(options.missing_value, self.occurs):
            if not times and split == "train":
                lines.append(
                    f"missing_value {value:g} occurs nowhere in the {split} data{looked}, whose values are {ranges}"
                )
        for channel, extreme, distance in self.apart():
            if distance > APART:
                lines.append(
                    f"the value {extreme:g}{self.of_channel(channel)} lies {distance:.3g} times as far out as all "
                    "others reach: name it with missing_value if it means missing, or give data_range"
                )
        return lines

    @property
    def ends(self):
        """Lowest and highest value of each channel, float64 (2, C).

        NaN where all values are missing, and for infinite values, which are refused where frames are read.
        """
        ends = np.array([self.low, self.high], np.float64)  # None becomes NaN
        return np.where(np.isinf(ends), np.nan, ends)

    def of_channel(self, channel):
        """The end of a phrase that names a channel; "" if there is only one."""
        return f" of channel {channel}" if len(self.low) > 1 else ""

    def parted(self, count):
        """The summaries of the first `count` channels and of the others."""
        lists = ("low", "high", "next_low", "next_high")
        first, others = (
            {name: getattr(self, name)[part] for name in lists} for part in (slice(count), slice(count, None))
        )
        return replace(self, **first), replace(self, **others)

    def apart(self):
        """Yields (channel, extreme, distance).

        extreme    the lowest or the highest value
        distance   from its neighbour, divided by the range of all other values
        """
        rows = zip(self.low, self.high, self.next_low, self.next_high)
        for channel, (low, high, next_low, next_high) in enumerate(rows):
            if low is None or next_low is None or next_high is None:
                continue
            for extreme, neighbour, other in ((low, next_low, high), (high, next_high, low)):
                width = abs(neighbour - other)
                if width > 0:
                    yield channel, extreme, abs(extreme - neighbour) / width


def check_reach(summary, value_range, name):
    """UserError for values so far outside the range that a network could make nothing of the frames that hold them.

    summary       Summary of a split
    value_range   ValueRange of the training data
    name          of the data, for messages
    """
    pairs = list(value_range.pairs())
    pairs = pairs * len(summary.low) if len(pairs) == 1 else pairs
    for channel, (low, high) in enumerate(pairs):
        for value in (summary.low[channel], summary.high[channel]):
            if value is not None and REACH * (high - low) < abs(value - (low + high) / 2) < math.inf:
                raise UserError(
                    f"{name}: holds the value {value:g} in channel {channel}, far outside the range {low:g} to "
                    f"{high:g} of the training data; name it with missing_value if it means missing"
                )


def beyond(summary, value_range):
    """Which channels of a Summary have no value inside the range, and which have one far outside it: two bool (C,)."""
    units = value_range.to_unit(summary.ends)
    nearest = np.clip(0.5, *units)  # the place between both ends that is nearest to the middle of the range
    return outside(nearest)[0], outside(units)[1].any(axis=0)


def check_data_range(summary, value_range, name):
    """UserError for training data without a value inside data_range, such as temperatures with a data_range of rain.

    summary       Summary of the training data
    value_range   ValueRange that is made of the option data_range
    name          of the data, for messages
    """
    pairs = list(value_range.pairs())
    for channel in np.flatnonzero(beyond(summary, value_range)[0]):
        (low, high), given = summary.ends[:, channel], pairs[channel if len(pairs) > 1 else 0]
        raise UserError(
            f"{name}: the values {low:g} to {high:g}{summary.of_channel(channel)} lie outside data_range {given[0]:g} "
            f"{given[1]:g}, so the network could not tell them apart; give --data_range without numbers for the range "
            "of the data, or check the units"
        )


def outside_notes(summary, value_range, split):
    """Lines about channels whose values may be in other units than those of the training.

    summary       Summary of a split
    value_range   ValueRange of the training data
    split         train, valid or test

    All values of such a channel lie outside the range of the training, some of them lie far outside, or they span less
    than the share SMALL of it.
    """
    none_inside, far = beyond(summary, value_range)
    given = list(value_range.given.pairs()) if value_range.given else []
    pairs = list(value_range.pairs())
    pairs = pairs * (len(summary.low) - len(given)) if len(pairs) == 1 else pairs
    lines = []
    for channel, ((low, high), trained) in enumerate(zip(summary.ends.T, pairs + given)):
        values = f"{split} data: the values {low:g} to {high:g}{summary.of_channel(channel)}"
        trained_range = f"the range {trained[0]:g} to {trained[1]:g} of the training"
        share = (high - low) / (trained[1] - trained[0])
        if none_inside[channel] or far[channel]:
            what = "outside" if none_inside[channel] else "in part far outside"
            lines.append(
                f"{values} lie {what} {trained_range}; name a fill value with missing_value, or check the units"
            )
        elif 0 < share < SMALL:
            lines.append(f"{values} span only {100 * share:.2g} % of {trained_range}: check the units")
    return lines


def blocks(clips, step=1):
    """Yields arrays (n, H, W, C) of every `step`-th frame of clips, a few at a time."""
    for clip in clips:
        frames = clip.frames()[::step]
        count = max(1, BLOCK // frames[:1].size)
        for i in range(0, len(frames), count):
            yield np.array(frames[i : i + count])


def check_not_all_missing(clips, missing):
    """UserError if every value of `clips` is missing. Reading stops at the first value that is not."""
    scale = ValueRange(missing=tuple(missing))
    if all(scale.is_missing(block).all() for block in blocks(clips)):
        raise UserError(f"{clips[0].name}: every value is missing; name another file or another missing_value")


def summarize(clips, missing, cache_dir, exact=True):
    """The Summary of clips. The cache keeps it.

    missing   values that mean missing
    exact     True: all frames are read; False: of many frames some, evenly spaced
    """
    frame = clips[0].frames()[:1]
    total = sum(map(len, clips))
    step = 1 if exact else max(1, math.ceil(total * frame.size / LOOK))
    versions = {clip.path: stamp(clip.path) for clip in clips}
    key = [list(versions.values()), [[c.path, c.index, c.start, c.stop, c.step] for c in clips], list(missing), step]

    def write(folder):
        summary = read_summary(clips, missing, step, total, frame.shape[-1])
        (folder / "summary.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")

    folder = cached_folder(cache_dir, "values", key, write)
    return Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def read_summary(clips, missing, step, total, channels):
    scale = ValueRange(missing=tuple(missing))
    ends = [(None, None, None, None)] * channels  # low, next_low, next_high, high
    summary = Summary([], [], [], [], total, 0, 0, 0, [0] * len(missing))
    with Bar("range of values", -(-total // step)) as bar:
        for block in blocks(clips, step):
            absent = scale.is_missing(block)
            for channel in range(channels):
                values = block[..., channel][~absent[..., channel]]
                ends[channel] = merged(ends[channel], values)
            summary.looked_at += len(block)
            summary.pixels += block.size
            summary.missing += int(absent.sum())
            summary.occurs = [n + int(equals(block, value).sum()) for n, value in zip(summary.occurs, missing)]
            bar.update(len(block))
    summary.low, summary.next_low, summary.next_high, summary.high = map(list, zip(*ends))
    return summary


def merged(ends, values):
    """(low, next low, next high, high) of values seen so far and of more values, an array without missing ones."""
    distinct = {end for end in ends if end is not None}
    if len(values):
        low, high = values.min(), values.max()
        between = values[(values != low) & (values != high)]
        distinct |= {float(low), float(high)}
        if len(between):
            distinct |= {float(between.min()), float(between.max())}
    ordered = sorted(distinct)
    if len(ordered) < 2:
        return (*ordered, None, None, *ordered) if ordered else (None,) * 4
    return ordered[0], ordered[1], ordered[-2], ordered[-1]


def forcing_range(summary, missing):
    """ValueRange of forcings, by the Summary of them in the training data; None if there are none.

    A forcing that is the same everywhere is allowed, and one that is missing everywhere.
    """
    if not summary.low:
        return None
    low = tuple(0.0 if value is None else value for value in summary.low)
    high = tuple(value if value is not None and value > below else below + 1 for below, value in zip(low, summary.high))
    return ValueRange(low, high, tuple(missing))


def range_of(summary, name):
    """Low and high of each channel in turn, the data_range of a Summary of training data.

    name   of the data, for messages
    UserError: all values of a channel are missing or equal, one is infinite, or one lies so far from all others that
    these would all be the same to the network.
    """
    pairs = []
    for channel, (low, high) in enumerate(zip(summary.low, summary.high)):
        where = summary.of_channel(channel)
        if low is None:
            raise UserError(f"{name}: every value{where} is missing; name another file or another missing_value")
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{name}: holds infinite values; write them as NaN")
        if low == high:
            raise UserError(f"{name}: every value{where} of the training part is {low:g}; give data_range")
        pairs += [low, high]
    for channel, extreme, distance in summary.apart():
        if distance > FAR_APART:
            raise UserError(
                f"{name}: the value {extreme:g}{summary.of_channel(channel)} lies {distance:.3g} times as far out as "
                "all others reach; name it with missing_value if it means missing, or give data_range"
            )
    return pairs
