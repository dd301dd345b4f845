"""Your own data: videos, folders of images, arrays and gridded fields.

video, frames, array and grid return the data set of one split; vmrnn.data.table describes their parameters.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import ARRAYS, find_axes, open_npy
from vmrnn.data.cache import identity, unpacked
from vmrnn.data.clips import Clip, decode, seconds_apart, times_of
from vmrnn.data.grid_info import GridInfo
from vmrnn.data.grids import calendar_of, grid_clips
from vmrnn.data.images import IMAGES, image_notes
from vmrnn.data.media import files_in
from vmrnn.data.prepare import stored_size
from vmrnn.data.ranges import (
    check_data_range,
    check_not_all_missing,
    check_reach,
    forcing_range,
    outside_notes,
    range_of,
    summarize,
)
from vmrnn.data.sources import checked_path, frame_sources, series_note, video_sources
from vmrnn.data.splits import by_clip, clip_dataset, cut_by_file, cut_in_time, frames_wanted, path_of
from vmrnn.data.table import SPLIT_NAMES
from vmrnn.data.times import parse_step, runs_without_gap, span, step_notes, usual_step
from vmrnn.data.videos import VIDEOS
from vmrnn.data.windows import cut_windows, thin
from vmrnn.errors import UserError
from vmrnn.values import ValueRange

BYTE_RANGE = (0.0, 255.0)  # of 8-bit pictures
LOOK = 200  # first frames of a sequence among which the start of the next one is looked for


def video(split, options, value_range=None):
    """A video, or a folder of videos: one clip per video."""
    return own(split, options, value_range, pictures=True)


def frames(split, options, value_range=None):
    """A folder of folders of images: one clip per folder."""
    return own(split, options, value_range, pictures=True)


def array(split, options, value_range=None):
    """A .npy or .npz file, or a folder of them."""
    return own(split, options, value_range)


def grid(split, options, value_range=None):
    """A gridded field: a file, a folder or a glob of files that follow one another in time.

    The value range knows names and units of the fields. UserError: fields of other units, or others by name, than those
    of the training.
    """
    data = own(split, options, value_range)
    info = GridInfo.load(Path(data.clips[0].path).parent)
    if value_range is not None:
        data.notes = [*data.notes, *info.notes(value_range, options)]
    data.value_range = info.named(data.value_range, options, path_of(split, options))
    return data


def own(split, options, value_range, pictures=False):
    """One split of your own data.

    value_range   ValueRange of the training data, if it is known already; None: it is found here
    pictures      True: the range of 8-bit frames is 0 to 255; False: it is that of the training data

    A split without a path of its own is the end of the training path: of each clip's time, or of the list of clips
    (split_by "time" or "file").
    """
    # The clips of the split, and their windows
    path, total = path_of(split, options), sum(frames_wanted(options))
    apart = split != "train" and getattr(options, f"{split}_data_dir")

    all_clips, notes = read_clips(path, options)
    clips = all_clips if apart else part_of(all_clips, split, options)
    notes = [*notes, *gap_notes(all_clips, total), *short_notes(clips, total, split)]
    clips = [clip for clip in clips if len(clip)]  # the part of a very short clip may be empty
    windows = cut_windows(clips, total)
    if not len(windows):
        inputs, outputs = frames_wanted(options)
        alone = len(all_clips) > 1 and max(map(len, all_clips)) == 1
        hint = "(files of one frame each are one clip with dataset frames) " if alone else ""
        raise UserError(
            f"{path}: {sum(map(len, all_clips))} frames in {len(all_clips)} clips {hint}leave no {SPLIT_NAMES[split]} "
            f"sequence of {inputs}+{outputs} frames; ask for fewer, add clips, or change split_by, valid_fraction "
            f"({options.valid_fraction:g}) and test_fraction ({options.test_fraction:g})"
        )
    check_not_all_missing(clips, options.missing_value)

    # The range. The training data are read whole if their range must be found; otherwise a sample of frames is enough.
    bytes_of_pictures = pictures and clips[0].frames().dtype == np.uint8
    data_range = options.data_range or (BYTE_RANGE if bytes_of_pictures else ())
    search = value_range is None and (not data_range or options.forcings)
    summary = summarize(clips, options.missing_value, options.cache_dir, exact=search and split == "train")
    step = seconds_apart(clips) if pictures else 0.0
    if value_range is not None:
        notes += step_notes(step, value_range.step)
    else:
        training, seen = clips, summary
        if search and split != "train":
            training = part_of(read_clips(options.train_data_dir, options)[0] if apart else all_clips, "train", options)
            seen = summarize(training, options.missing_value, options.cache_dir)
        forecast, forced = seen.parted(options.input_channels)
        data_range = data_range or range_of(forecast, training[0].name)
        forcings = forcing_range(forced, options.missing_value)
        value_range = replace(ValueRange.of(options, data_range), given=forcings, step=step)

    # The data set
    check_reach(summary, value_range, clips[0].name)
    if split == "train":
        check_data_range(summary, value_range, clips[0].name)
    notes += summary.notes(options, split) + outside_notes(summary, value_range, split)
    if split != "train":
        windows = thin(windows, getattr(options, f"{split}_sequences"))
    calendar = calendar_of(clips) if options.calendar else None
    return clip_dataset(split, clips, windows, value_range, options, notes, calendar)


def read_clips(path, options):
    """(clips of your own file or folder, every frame_step-th frame of them; lines that say how they were read)."""
    clips, notes = READERS[options.dataset](path, options)
    return [clip.every(options.frame_step) for clip in clips], notes


def part_of(clips, split, options):
    """The clips of one split, out of all clips of the training path.

    clips     all clips, those between gaps in time as pieces
    split     train, valid or test; one with a path of its own takes nothing from here
    options   Config
    """
    fractions = [0.0 if getattr(options, f"{name}_data_dir") else getattr(options, f"{name}_fraction")
                 for name in ("valid", "test")]  # fmt: skip
    if options.split_by == "time":
        return cut_in_time(clips, split, *fractions)
    # The pieces of one video or folder of images show one scene and stay together. The runs of a gridded field do not.
    whole = [[clip] for clip in clips] if options.dataset == "grid" else by_clip(clips)
    return [clip for pieces in cut_by_file(whole, split, *fractions) for clip in pieces]


def gap_notes(clips, total):
    """How many sequences are lost to gaps in time: a list with one line, or an empty one if there is no gap.

    clips   the clips of all splits, parted at gaps
    total   frames of a sequence
    """
    gaps = sum(len(pieces) - 1 for pieces in by_clip(clips))
    if not gaps:
        return []
    whole = [sum(map(len, pieces)) for pieces in by_clip(clips)]
    cost = sum(max(0, length - total + 1) for length in whole) - len(cut_windows(clips, total))
    return [f"{gaps} gap{'s' * (gaps > 1)} in time: no sequence crosses one, which costs {cost} sequences"]


def short_notes(clips, total, split):
    """How many clips give no sequence: a list with one line, or an empty one if all give some.

    clips   the clips of a split, parted at gaps
    total   frames of a sequence
    split   train, valid or test
    """
    whole = by_clip(clips)
    short = [pieces[0].name for pieces in whole if max(map(len, pieces)) < total]
    if not short:
        return []
    return [
        f"{len(short)} of the {len(whole)} clips of the {SPLIT_NAMES[split]} data give no sequence: they have fewer "
        f"than {total} frames in a row, such as {short[0]}"
    ]


def copy_notes(clips, options):
    """How many clips are copies of others, which split_by file may put into two splits: a list of one line or none.

    clips     (name, its files) of each
    options   Config
    """
    if options.split_by != "file":
        return []
    seen, copies = {}, []
    for name, files in clips:
        first = seen.setdefault(tuple(tuple(identity(file)) for file in files), name)
        if first != name:
            copies.append(f"{name} of {first}")
    if not copies:
        return []
    return [
        f"{len(copies)} of {len(clips)} clips hold the same as others, such as {copies[0]}: with split_by file, copies "
        "may be in two splits"
    ]


def video_clips(path, options):
    """Clips of a video, or of the videos in a folder, decoded into the cache."""
    notes = []
    return decoded(video_sources(path, notes), VIDEOS, path, options, notes), notes


def image_clips(path, options):
    """Clips of a folder of folders of images, decoded into the cache."""
    notes = []
    folders = frame_sources(path, notes=notes)
    if folders:
        notes += image_notes(folders[0].files[0])
    sources, said = [], []
    for folder in folders:
        series = folder.series()
        sources += series
        if len(series) > 1:
            said.append(series_note(folder, series) + "; each is a clip of its own")
    notes += first_few(said)
    return decoded(sources, IMAGES, path, options, notes), notes


def first_few(lines, most=4):
    """Lines of one kind; of more than `most`, the first and how many there are."""
    return lines if len(lines) <= most else [*lines[:most], f"... {len(lines)} such lines in all"]


def decoded(sources, endings, path, options, notes):
    """The sources as clips in the cache, parted at gaps in time. Adds a line to `notes` for each irregular clip."""
    if options.input_channels not in (1, 3):
        raise UserError(f"input_channels is {options.input_channels}; {options.dataset} is read as 1 (grey) or 3 (RGB)")
    if not sources:
        raise UserError(f"{path}: nothing in it for dataset {options.dataset} ({' '.join(endings)}); name another path")
    notes += copy_notes([(source.name, source.files) for source in sources], options)
    how = options.input_channels, stored_size(options), True, options.time_step
    clips, pieces = decode(sources, options.cache_dir, options.dataset, *how), []
    untimed, paces = [], {}
    for source, clip, times in zip(sources, clips, times_of(clips)):
        if times is None or len(times) < 2:
            pieces.append(clip)
            if len(clip) > 1 and (source.video or len(source.files) > 1):
                untimed.append(source.no_times())
            continue
        step = parse_step(options.time_step) if options.time_step else None
        pieces += [clip.cut(start, stop) for start, stop in runs_without_gap(times, step)]
        steps = np.diff(times)
        if endings is VIDEOS and not step and np.ptp(steps) > 0.1 * usual_step(times):
            notes.append(f"{clip.name}: its frame rate varies: frames are {steps.min():.3g} to {steps.max():.3g} s "
                         "apart; time_step takes frames at a regular step")  # fmt: skip
        paces.setdefault(usual_step(times), source)
    notes += first_few(untimed)
    if not options.time_step and paces and max(paces) > 1.1 * min(paces):
        slow, fast = (f"{paces[pace].name} every {span(pace) if paces[pace].dated() else format(pace, 'g')}"
                      for pace in (max(paces), min(paces)))  # fmt: skip
        notes.append(f"clips have different steps: {slow}, {fast}; time_step takes frames at one step")
    return pieces


def array_clips(path, options):
    """Clips of a .npy or .npz file, or of a folder of them: one per file, or one per entry of its axis N."""
    path, channels, notes, read, overlaps = checked_path(path), options.input_channels, [], [], []
    files = files_in(path, ARRAYS, notes) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .npy or .npz in it; name another path")
    clips, first_shape = [], None
    for file in files:
        if file.suffix.lower() not in ARRAYS:
            raise UserError(f"{file}: its name does not end as one of {' '.join(ARRAYS)}; name another file")
        is_zip = file.suffix.lower() == ".npz"
        store = unpacked(file, options.array_key, options.cache_dir) if is_zip else str(file)
        array = open_npy(store)
        axes = find_axes(file, array, channels, options.array_axes)
        length = dict(zip(axes, array.shape))
        frame_shape = length["H"], length["W"], array.dtype
        first_shape = first_shape or frame_shape
        if frame_shape != first_shape:
            raise UserError(
                f"{file}: frames of {shape_text(frame_shape)}, but {files[0]}: {shape_text(first_shape)}; make them "
                "alike"
            )
        indices = range(length["N"]) if "N" in axes else [None]
        found = [Clip(str(file), store, 0, length["T"], index, axes=axes) for index in indices]
        clips += found
        overlaps += overlap_note(found)
        if axes not in read:
            read.append(axes)
            notes.append(f"{file}: {array.dtype} {array.shape} read as {', '.join(axes)}")
    return clips, [*notes, *first_few(overlaps), *copy_notes([(str(file), (file,)) for file in files], options)]


def overlap_note(clips):
    """A list of one line if the second sequence of an array begins within the first, else of none.

    clips   of the sequences of one array. Windows that were cut beforehand overlap, and then parts of the array share
            frames
    """
    if len(clips) < 2:
        return []
    first, second = (clip.frames() for clip in clips[:2])
    known = second[0][second[0] == second[0]]  # without NaN
    if not known.size or known.min() == known.max():  # a map without rain is equal to any other
        return []
    for t in range(min(len(first), LOOK)):
        alike = np.array_equal(first[t], second[0], equal_nan=True)
        if alike and np.array_equal(first[t:], second[: len(first) - t], equal_nan=True):
            return [
                f"{clips[0].name}: its sequences overlap: the second begins with frame {t + 1} of the first, so that "
                "parts of this file share frames; write the frames as one sequence"
            ]
    return []


def shape_text(frame_shape):
    return f"{frame_shape[0]}x{frame_shape[1]} {frame_shape[2]}"


READERS = {"video": video_clips, "frames": image_clips, "array": array_clips, "grid": grid_clips}
