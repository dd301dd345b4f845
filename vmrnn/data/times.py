"""Times of frames: where they come from, the gaps between them, and the frames of a regular step.

Times are float64 numbers: seconds since 1970-01-01 in a calendar, or, where a file counts its frames without a date,
those numbers.
"""

import re
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.media import natural_key, whole_key
from vmrnn.errors import UserError

EPOCH = "seconds since 1970-01-01"
DAY = 86400  # seconds
STANDARD = ("standard", "gregorian", "proleptic_gregorian")  # calendars that are numpy's from 1582 on
# The units that `parse_step` reads, in seconds; "" is the unit of the times themselves
UNITS = {"": 1, "s": 1, "sec": 1, "second": 1,
         "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}  # fmt: skip
NEAR = 0.4999  # of a step: a frame halfway between two regular times stands for neither
# The forms in which files write a time as text. No other form is guessed: 03/04/2020 has two readings.
TEXT_FORMS = (
    "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%d %H:%M:%S.%f", "%Y-%m-%dT%H:%M",
    "%Y-%m-%d %H:%M", "%Y-%m-%d", "%d-%b-%Y;%H:%M:%S.%f", "%d-%b-%Y %H:%M:%S", "%Y-%m-%d_%H:%M:%S",  # the last is WRF's
)  # fmt: skip
# What each directive of a file name's form stands for
DIRECTIVES = {"Y": r"\d{4}", "y": r"\d{2}", "m": r"\d{2}", "d": r"\d{2}", "H": r"\d{2}", "M": r"\d{2}", "S": r"\d{2}",
              "j": r"\d{3}", "b": "[A-Za-z]{3}", "f": r"\d{1,6}", "s": r"\d{9,11}"}  # fmt: skip


def time_from_text(text):
    """Seconds since 1970-01-01 of a text (UTC unless it says otherwise), or None.

    text   in one of TEXT_FORMS, or digits as in dates_of, with a T or a space before the hours or without
    """
    text = str(text).strip().removesuffix("UTC").strip()
    if text.endswith("Z"):
        text = text[:-1]
    zone = re.search(r"[T ].*([+-])(\d{2}):?(\d{2})$", text)
    offset = 0
    if zone:
        text = text[: zone.start(1)].strip()
        offset = (1 if zone[1] == "+" else -1) * (3600 * int(zone[2]) + 60 * int(zone[3]))
    # strptime takes fewer digits than a form has letters: to it 1230 may be 12:03:00. The count of the digits decides.
    if re.fullmatch(r"\d{8}([T ]?\d+)?", text):
        found = dates_of([re.sub("[T ]", "", text)])
        return found and found[0] - offset
    for form in TEXT_FORMS:
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp() - offset
        except ValueError:
            continue
    return None


def time_from_name(path, form):
    """Seconds since 1970-01-01 (UTC) that the name of a file holds in a form such as %Y%m%d%H%M.

    path   of the file. A form with a slash is looked for in the whole path, others in the file's name.
    form   directives of strptime: %Y %y %m %d %H %M %S %j %b %f, and %s for seconds since 1970

    UserError: an unknown directive, and a name that holds no such time or several.
    """
    text = Path(path).as_posix() if "/" in form else Path(path).name
    parts = re.split("(%.)", form)
    unknown = [part for part in parts[1::2] if part[1] not in DIRECTIVES]
    if unknown or len(parts) == 1:
        known = " ".join(f"%{letter}" for letter in DIRECTIVES)
        raise UserError(f"time_from name:{form}: {' '.join(unknown) or 'no directive'}; the directives are {known}")
    pattern = "".join(DIRECTIVES[part[1]] if i % 2 else re.escape(part) for i, part in enumerate(parts))
    found = set()
    for match in re.finditer(rf"(?<!\d)(?=({pattern})(?!\d))", text):
        try:
            found.add(
                float(match[1]) if form == "%s" else datetime.strptime(match[1], form).replace(tzinfo=UTC).timestamp()
            )
        except ValueError:  # digits that are no time
            continue
    if len(found) != 1:
        raise UserError(f"{path}: time_from name:{form} fits {len(found) or 'no'} place{'s' * (len(found) > 1)} of the "
                        "name; give more of the name around the time")  # fmt: skip
    return found.pop()


def parse_step(text, dated=True):
    """A time step such as 10min, 1h, 30s or 1d in seconds; a bare number is in the unit of the times themselves.

    text    the step
    dated   whether the times are seconds; False: they count frames, and a step with a unit has no meaning

    UserError: another text, a step that is not above zero, or a unit where the times count frames.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    scale = match and (UNITS.get(match[2]) or UNITS.get(match[2].removesuffix("s")))
    if not scale or float(match[1]) <= 0:
        raise UserError(f"time_step {text!r}: give a number and s, min, h or d, such as 10min")
    if match[2] and not dated:
        raise UserError(f"time_step {text}: the frames have no dates, so the step has no unit; give a number such as 2")
    return float(match[1]) * scale


def times_from_names(paths):
    """Times of files by the numbers in their names, float64 (n,); None: the names hold none that increase.

    paths   of files that count on by their names, see series_of_names

    The numbers that stand in all names are read as a date and time together if they can be (20240131_2355), else the
    last one that differs between the names counts the frames.
    """
    found = dates_from_names(paths)
    if found is None:
        counting = [column for column in numbers_in_names(paths) if len(set(column)) > 1]
        found = [float(number) for number in counting[-1]] if counting else None
    times = None if found is None else np.array(found)
    return times if times is not None and increases(times) else None


def names_without_times(paths):
    """The files that keep `times_from_names` from finding times: names with another count of numbers, or else all."""
    counts = [len(re.findall(r"[0-9]+", Path(path).stem)) for path in paths]
    usual = Counter(counts).most_common(1)[0][0]
    return [path for path, count in zip(paths, counts) if count != usual] or list(paths)


def dates_from_names(paths):
    """Seconds since 1970-01-01 of files by the dates in their names, a list of floats; None: no dates that increase."""
    return next((dates for _, dates in dated_columns(paths) if increases(dates)), None)


def dated_columns(paths):
    """Columns of numbers that are dates: yields (number of the first column, seconds since 1970-01-01 of all files)."""
    columns = numbers_in_names(paths)
    for first in range(len(columns)):
        for last in range(len(columns), first, -1):
            texts = ["".join(parts) for parts in zip(*columns[first:last])]
            if found := dates_of(texts):
                yield first, found


def series_of_names(paths):
    """The series of files that count on by their names, a list of (start, stop).

    paths   of files in natural order

    A number or a date in the names counts. Another series begins where the text before it changes, or where it does not
    increase: camA_000.png and what follows, then camB_000.png. Of several numbers that one counts which leaves the
    fewest series, and of equals the last. Names are one series if they do not hold equally many numbers, or if most of
    them would stand alone.
    """
    stems = [Path(path).stem for path in paths]
    readings = []  # of each name, the text before the counting number, and that number
    for first, dates in dated_columns(paths):
        readings.append([(whole_key(stem)[: 2 * first + 1], date) for stem, date in zip(stems, dates)])
    for key in (natural_key, whole_key):
        keys = [key(stem) for stem in stems]
        if len({len(pieces) for pieces in keys}) == 1:
            readings += [[(pieces[:at], pieces[at]) for pieces in keys] for at in range(1, len(keys[0]), 2)]
    cuts = [
        [i for i, (last, this) in enumerate(pairwise(reading), 1) if this[0] != last[0] or this[1] <= last[1]]
        for reading in readings
    ]
    fewest = min(reversed(cuts), key=len, default=[])
    edges = [0, *(fewest if len(fewest) < len(paths) / 2 else []), len(paths)]
    return list(pairwise(edges))


def numbers_in_names(paths):
    """The first number of every name, the second one, and so on, as texts; []: the names do not hold equally many."""
    numbers = [re.findall(r"[0-9]+", Path(path).stem) for path in paths]
    return list(zip(*numbers)) if len({len(row) for row in numbers}) == 1 and len(numbers) > 1 else []


def dates_of(texts):
    """Seconds since 1970-01-01 of texts that are dates: 20240131, or with a time of day; None: not all of them are."""
    form = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(len(texts[0]))
    if form is None or len({len(text) for text in texts}) > 1:
        return None
    try:
        dates = [datetime.strptime(text, form).replace(tzinfo=UTC) for text in texts]
    except ValueError:
        return None
    return [date.timestamp() for date in dates] if all(1900 <= date.year < 2200 for date in dates) else None


def increases(times):
    return bool(np.all(np.diff(times) > 0))


def at_regular_step(timed_frames, step):
    """Of frames with their times those that are nearest to a regular step, with the time that they then stand for.

    timed_frames   iterator over (frame, time), times increasing
    step           of the regular times, which start at the first frame; in the unit of the times

    Yields (frame, regular time). A regular time without a frame less than half a step away is left out.
    """
    start, slot, best = None, None, None
    for frame, time in timed_frames:
        start = time if start is None else start
        here = int(np.floor((time - start) / step + 0.5))
        distance = abs(time - start - here * step)
        if distance >= NEAR * step:
            continue
        if slot is not None and here != slot:
            yield best[1], start + slot * step
            best = None
        if best is None or distance < best[0]:
            best = (distance, frame)
        slot = here
    if best is not None:
        yield best[1], start + slot * step


def check_step(step, times, name):
    """UserError for a regular step that is shorter than that of the frames at `times`."""
    usual = usual_step(times)
    if usual and step < 0.75 * usual:
        raise UserError(
            f"{name}: time_step is {span(step)}, but the frames are {span(usual)} apart; give that or a longer one"
        )


def usual_step(times):
    """The step that most frames are apart: the median of the steps, or None of fewer than two frames."""
    return float(np.median(np.diff(times))) if len(times) > 1 else None


def step_notes(step, trained):
    """A line, in a list, if frames are another step apart than in the training.

    step      seconds from one frame to the next; 0: not known
    trained   the same of the training
    """
    # Months differ by less than a tenth. Their usual steps are medians.
    if not (step and trained) or max(step, trained) <= 1.1 * min(step, trained):
        return []
    return [f"frames are {span(step)} apart, but were {span(trained)} apart in the training: take those of that step "
            "with time_step or frame_step"]  # fmt: skip


def runs_without_gap(times, step=None):
    """The runs of frames between gaps, a list of (start, stop).

    times   float (T,), increasing
    step    that the frames should be apart; None: their usual step

    Two frames are in one run if they are more than half and less than one and a half usual steps apart. Months of 28 to
    31 days are thus one run.
    """
    if len(times) < 2:
        return [(0, len(times))]
    steps, usual = np.diff(times), step or usual_step(times)
    cuts = np.flatnonzero((steps <= 0.5 * usual) | (steps >= 1.5 * usual)) + 1
    edges = [0, *map(int, cuts), len(times)]
    return list(pairwise(edges))


def nearest_frames(times, step):
    """The frames nearest to a regular step, and the times that they then stand for.

    times   float (T,), increasing
    step    of the regular times, which start at the first frame; in the unit of `times`

    Returns (indices, regular times), both (n,). A regular time without a frame less than half a step away is left out,
    so a gap stays a gap.
    """
    indices, regular = zip(*at_regular_step(enumerate(times), step))
    return np.array(indices), np.array(regular)


def later_times(times, count, calendar=None):
    """The times of the `count` frames that follow: the last time plus the usual step, again and again.

    times      float (T,), at least two
    calendar   of the times: "" or None where they count frames, else the CF name

    Frames that are whole calendar months apart go on by months: in the middle of each, or on the same day at the same
    hour, which is the last day of a shorter month.
    UserError: one time alone, whose step is not known.
    """
    if len(times) < 2:
        raise UserError(
            "one frame alone has no time step: the times of those that follow are not known; give two or more"
        )
    months, place = whole_months(times, calendar)
    if months:
        later = month_numbers(times[-1:], calendar) + months * np.arange(1, count + 1)
        starts, lengths = month_spans(later, calendar)
        return starts + place(lengths)
    return times[-1] + usual_step(times) * np.arange(1, count + 1)


def whole_months(times, calendar):
    """How many calendar months frames are apart, and where in its month each lies.

    times      float (T,), at least two
    calendar   of the times: "" where they are no dates, else the CF name

    Returns (months, function of the lengths of months that returns seconds after their starts); (0, None): frames are
    not whole months apart.
    """
    months = month_numbers(times, calendar) if calendar else np.zeros(len(times), int)
    by = np.unique(np.diff(months))
    if len(by) != 1 or by[0] < 1:
        return 0, None
    starts, lengths = month_spans(months, calendar)
    into = times - starts
    day, hour = into.max(), into.max() % DAY
    # The middle is tried first. In July and August it is the same day too, but not in September.
    for place in (
        lambda length: length / 2,
        lambda length: np.minimum(day, length - DAY + hour),
        lambda length: length / 2 // DAY * DAY,
    ):
        if np.allclose(place(lengths), into, rtol=0, atol=1):
            return int(by[0]), place
    return 0, None


def import_cftime(calendar, path="the data"):
    """The module cftime, which has the dates of a calendar that numpy does not have.

    calendar   its CF name
    path       of the file with such times, for the error

    UserError: it is not installed.
    """
    try:
        import cftime
    except ImportError as error:
        raise UserError(f"{path}: times of the calendar {calendar} need another package: pip install cftime") from error
    return cftime


def month_numbers(times, calendar):
    """The months that times lie in, int (T,), counted from January 1970."""
    if calendar in STANDARD:
        return np.round(np.asarray(times) * 1000).astype("datetime64[ms]").astype("datetime64[M]").astype(int)
    dates = import_cftime(calendar).num2date(np.round(times), EPOCH, calendar=calendar)
    return np.array([12 * (date.year - 1970) + date.month - 1 for date in dates])


def month_spans(months, calendar):
    """Starts and lengths of months, both float64 (n,), in seconds.

    months   as month_numbers counts them
    """
    edges = np.stack((months, np.asarray(months) + 1))
    if calendar in STANDARD:
        starts = edges.astype("datetime64[M]").astype("datetime64[s]").astype(np.float64)
    else:
        cftime = import_cftime(calendar)
        dates = [cftime.datetime(1970 + month // 12, month % 12 + 1, 1, calendar=calendar) for month in edges.ravel()]
        starts = np.reshape(cftime.date2num(dates, EPOCH, calendar=calendar), edges.shape).astype(np.float64)
    return starts[0], starts[1] - starts[0]


def calendar_features(dates):
    """Sine and cosine of the hour of the day and of the day of the year, float32 (T, 4), scaled to [0, 1].

    dates   (T,) numpy.datetime64 or cftime dates, UTC
    """
    dates = np.asarray(dates)
    if dates.dtype.kind == "M":
        days, years = dates.astype("datetime64[D]"), dates.astype("datetime64[Y]")
        day = (dates - days) / np.timedelta64(1, "D")
        first, next_first = years.astype("datetime64[D]"), (years + np.timedelta64(1, "Y")).astype("datetime64[D]")
        year = ((days - first) / np.timedelta64(1, "D") + day) / ((next_first - first) / np.timedelta64(1, "D"))
    else:
        day = np.array([(date.hour + date.minute / 60 + date.second / 3600) / 24 for date in dates])
        edges = [[date.replace(year=date.year + n, month=1, day=1) for date in dates] for n in (0, 1)]
        length = np.array([(following - first).days for first, following in zip(*edges)])
        year = (np.array([date.dayofyr - 1 for date in dates]) + day) / length
    angles = 2 * np.pi * np.stack((day, day, year, year), axis=1)
    waves = np.where([True, False, True, False], np.sin(angles), np.cos(angles))
    return (0.5 + 0.5 * waves).astype(np.float32)


WRITTEN_UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}  # the units that `span` writes, in seconds


def span(seconds):
    """A span of time as a person writes it: 300 -> 5 min."""
    for name, size in WRITTEN_UNITS.items():
        if seconds >= size and (seconds / size) % 0.5 == 0:
            return f"{seconds / size:g} {name}"
    return f"{seconds:g} s"


def lead_names(seconds, months=0):
    """Names of lead times, all in the unit of the first one: 10 min, 20 min, ..., 60 min; 1 month, 2 months, ...

    seconds   float (T,), increasing
    months    whole months from one frame to the next, whose seconds differ; 0: they are not whole months apart
    """
    if months:
        size, unit = (12, "year") if months % 12 == 0 else (1, "month")
        counts = [months * i // size for i in range(1, len(seconds) + 1)]
        return [f"{count} {unit}{'s' * (count > 1)}" for count in counts]
    unit = span(seconds[0]).partition(" ")[2]
    return [f"{round(time / WRITTEN_UNITS[unit], 6):g} {unit}" for time in seconds]


def moment(time, calendar="standard"):
    """A time as text, to the second: 1604102400 -> 2020-10-31 00:00:00.

    calendar   CF name of its calendar; "": it is a number and no date
    """
    if not calendar:
        return f"{time:g}"
    if calendar in STANDARD:
        return str(np.datetime64(round(time), "s")).replace("T", " ")
    return import_cftime(calendar).num2date(round(time), EPOCH, calendar=calendar).isoformat(" ", "seconds")
