"""Which files make up which split of a data set: KTH, TaxiBJ, Human3.6M, your own videos, images, arrays and fields.

Each function named in vmrnn.data.table is called as find(split, options, value_range) and returns the data set of one
split, train, valid or test. Where the literature has no validation split, we hold one out of the training split, so
that no test sequence ever selects a checkpoint.
"""

import re
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import ARRAYS, find_axes, npz_member, npz_rows, open_npy
from vmrnn.data.cache import cached_folder, stamp, unpacked, write_npy
from vmrnn.data.clips import Clip, Source, decode, seconds_apart, series_note, times_of
from vmrnn.data.draws import split_seed
from vmrnn.data.grid_info import GridInfo
from vmrnn.data.grids import calendar_of, grid_clips
from vmrnn.data.images import IMAGES, image_notes, page_count
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
from vmrnn.data.table import DATASETS, SPLIT_NAMES
from vmrnn.data.times import parse_step, runs_without_gap, span, step_notes, usual_step
from vmrnn.data.videos import VIDEOS
from vmrnn.data.windows import ClipDataset, cut_windows, thin
from vmrnn.errors import UserError
from vmrnn.values import ValueRange

BYTE_RANGE = (0.0, 255.0)

KTH_NAME = re.compile(r"(person([0-9]{2})_([a-z]+)_d[1-4])")
# Hold out person 16: it costs 1/16 of the training data. Cutting each clip in time would leave pieces shorter than one
# sequence.
KTH_PERSONS = {"train": range(1, 16), "valid": range(16, 17), "test": range(17, 26)}

HUMAN_SUBJECTS = {"train": (1, 5, 6, 7, 8), "valid": (1, 5, 6, 7, 8), "test": (9, 11)}
HUMAN_STEP = 5  # every fifth of the 50 frames per second, as in the literature
# The last 10 % of each training clip. Holding out a subject would cost 20 % of the training data.
HUMAN_VALID = 0.1


def path_of(split, options):
    """The file or folder of one split. A split without a path of its own is in that of the training split."""
    return getattr(options, f"{split}_data_dir") or options.train_data_dir


def frames_wanted(options):
    """(input frames, output frames) of a sequence."""
    return options.num_frames_input, options.num_frames_output


# Published data sets


def kth(split, options, value_range=None):
    """KTH: the original .avi files, or folders of frames, anywhere under the folder; grey, resized to input_size.

    Splits: KTH_PERSONS. Frames between the repetitions of an action are left out if their numbers are missing in a
    folder of frames, or if the folder has 00sequences.txt. Validation and test take every third window of jogging and
    running, and adjoining windows of the other actions, as the literature does. Training takes every window.
    """
    folder = path_of(split, options)
    sources = [s for s in video_sources(folder) or frame_sources(folder) if KTH_NAME.search(s.name)]
    if not sources:
        raise UserError(
            f"{folder}: no KTH clip in it (person01_boxing_d1_uncomp.avi, or folders of frames so named); data/README.md, "
            "section KTH, says where to get them"
        )
    persons = KTH_PERSONS[split]
    sources = [s for s in sources if int(KTH_NAME.search(s.name)[2]) in persons]
    if not sources:
        raise UserError(
            f"{folder}: no clip of persons {persons[0]} to {persons[-1]}, the {split} part; add their files"
        )
    clips = decode(sources, options.cache_dir, "kth", 1, options.frame_size, DATASETS["kth"].antialias)
    # Cut each clip to the frames with an action in them.
    annotated = kth_annotations(Path(folder) / "00sequences.txt")
    runs = []
    for source, clip in zip(sources, clips):
        name = KTH_NAME.search(source.name)[1]
        if not source.video:
            runs += consecutive(clip, source.files, 1)
        else:
            for start, stop in annotated.get(name, [(1, len(clip))]):
                if not 1 <= start <= min(stop, len(clip)):
                    raise UserError(
                        f"{Path(folder) / '00sequences.txt'}: {name} has frames {start}-{stop}, but {source.name} has "
                        f"{len(clip)}; fetch both again"
                    )
                runs.append(clip.cut(start - 1, min(stop, len(clip))))
    total = sum(frames_wanted(options))
    fast = [re.search("jogging|running", clip.name) is not None for clip in runs]
    strides = [1 if split == "train" else 3 if quick else total for quick in fast]
    return published(split, runs, cut_windows(runs, total, strides), options)


def kth_annotations(path):
    """{person01_boxing_d1: [(first, last), ...]}: the frames with an action, counted from 1. {} if there is no file."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="latin-1")
    ranges = {}
    for name, numbers in re.findall(r"(person\S+)\s+frames\s+([0-9, \t-]+)", text):
        ranges[name] = [(int(first), int(last)) for first, last in re.findall(r"([0-9]+)-([0-9]+)", numbers)]
    if not ranges:
        raise UserError(f"{path}: not KTH's list of sequences; fetch it again or remove it")
    return ranges


def human36m(split, options, value_range=None):
    """Human3.6M: images S1_Directions.54138969_000001.jpg in one folder, or S1_.../000001.jpg; RGB, resized to input_size.

    Splits: HUMAN_SUBJECTS; validation is the last tenth of each training clip. Every fifth frame is used (numbers 1, 6,
    11, ...). Training takes every window, validation and test take adjoining ones.
    """
    folder = path_of(split, options)
    sources, subjects = [], HUMAN_SUBJECTS[split]
    for source in frame_sources(folder, by_prefix=True):
        subject = re.search(r"(?:^|/)S([0-9]+)(?=[_/])", source.name)
        numbers = frame_numbers(source.files)
        files = tuple(file for file, number in zip(source.files, numbers) if number % HUMAN_STEP == 1)
        if files and subject and int(subject[1]) in subjects:
            sources.append(Source(source.name, files, video=False))
    if not sources:
        raise UserError(
            f"{folder}: no frames of subjects {', '.join(map(str, subjects))}, the {split} part "
            "(S1_Directions.54138969_000001.jpg or S1_Directions.54138969/000001.jpg); add their files, see data/README.md, "
            "section Human3.6M"
        )
    clips = decode(sources, options.cache_dir, "human36m", 3, options.frame_size)
    runs = [run for s, clip in zip(sources, clips) for run in consecutive(clip, s.files, HUMAN_STEP)]
    if split != "test":
        runs = cut_in_time(runs, split, HUMAN_VALID, 0.0)
    total = sum(frames_wanted(options))
    strides = [1 if split == "train" else total] * len(runs)
    return published(split, runs, cut_windows(runs, total, strides), options)


def taxibj(split, options, value_range=None):
    """TaxiBJ: dataset.npz with X_train, Y_train, X_test, Y_test, floats in [-1, 1].

    Each array is (N, T, 2, 32, 32) or (N, T, 32, 32, 2). X holds the inputs and Y the frames that follow;
    num_frames_input takes the last frames of X, num_frames_output the first of Y. Validation is the last
    tenth of X_train.
    """
    path = Path(path_of(split, options))
    path = path / "dataset.npz" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file; data/README.md, section TaxiBJ, says where to get it")
    set_name = "test" if split == "test" else "train"
    inputs, outputs = frames_wanted(options)

    # Check the two arrays by their headers.
    members, shapes, dtypes = zip(*(npz_member(path, f"{name}_{set_name}") for name in "XY"))
    x_shape, y_shape = shapes
    alike = all(len(s) == 5 and s[0] == x_shape[0] and s[2:] == x_shape[2:] for s in shapes)
    if not alike or any(dtype.kind != "f" for dtype in dtypes):
        raise UserError(f"{path}: holds {dtypes[0]} {x_shape} and {dtypes[1]} {y_shape} for {set_name}; "
                        "X and Y must be floats (N, T, 2, 32, 32)")  # fmt: skip
    channels_first = x_shape[2] == 2
    height, width, channels = (*x_shape[3:], x_shape[2]) if channels_first else x_shape[2:]
    if (height, width, channels) != (*options.frame_size, 2):
        raise UserError(
            f"{path}: frames of {height}x{width} with {channels} channels; TaxiBJ's are "
            f"2x{options.frame_size[0]}x{options.frame_size[1]}"
        )
    if inputs > x_shape[1] or outputs > y_shape[1]:
        raise UserError(
            f"{path}: sequences of {x_shape[1]}+{y_shape[1]} frames, but {inputs}+{outputs} are asked for; "
            "choose fewer num_frames_input or num_frames_output"
        )

    def write(folder):
        def sequences():
            low = np.inf
            for x, y in zip(*(npz_rows(path, member) for member in members)):
                values = np.concatenate((x, y)).astype(np.float32)
                if not np.abs(values).max() <= 1:
                    raise UserError(f"{path}: values outside [-1, 1] in {set_name}; fetch the scaled data set")
                low = min(low, values.min())
                yield values.transpose(0, 2, 3, 1) if channels_first else values
            if low >= 0:  # in the data set most values are near -1: hardly any taxis
                raise UserError(f"{path}: no value below 0 in {set_name}, so it is scaled to [0, 1] and not to [-1, 1]; write "
                                "2 v - 1 in place of each value v")  # fmt: skip

        write_npy(folder / "frames.npy", sequences())

    store = str(cached_folder(options.cache_dir, "taxibj", [stamp(path), set_name], write) / "frames.npy")
    start = x_shape[1] - inputs
    clips = [Clip(f"{path} {set_name}", store, start, start + inputs + outputs, i) for i in range(x_shape[0])]
    if split != "test":
        first_valid = len(clips) - round(0.1 * len(clips))
        clips = clips[:first_valid] if split == "train" else clips[first_valid:]
    return published(split, clips, cut_windows(clips, inputs + outputs), options)


def published(split, clips, windows, options):
    """The data set of one split of a published data set, whose value range is in the table.

    Validation takes at most valid_sequences windows; the test set is used whole.
    """
    if not len(windows):
        inputs, outputs = frames_wanted(options)
        raise UserError(
            f"{path_of(split, options)}: no {SPLIT_NAMES[split]} sequence of {inputs}+{outputs} frames, the longest run has "
            f"{max(map(len, clips))}; ask for fewer"
        )
    if split == "valid":
        windows = thin(windows, options.valid_sequences)
    return clip_dataset(split, clips, windows, ValueRange(*DATASETS[options.dataset].data_range), options)


def clip_dataset(split, clips, windows, value_range, options, notes=(), calendar=None):
    return ClipDataset(
        clips, windows, *frames_wanted(options), options.frame_size, value_range, options.frame_fit,
        random=split == "train", length=options.train_sequences, seed=split_seed(split, options.seed), notes=notes,
        calendar=calendar, moved_channels=options.base_channels,
    )  # fmt: skip


# Your own data


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
    windows = cut_windows(clips, total)
    notes = [*notes, *gap_notes(all_clips, total)]
    if not len(windows):
        inputs, outputs = frames_wanted(options)
        alone = len(all_clips) > 1 and max(map(len, all_clips)) == 1
        hint = "(files of one frame each are one clip with dataset frames) " if alone else ""
        raise UserError(
            f"{path}: {sum(map(len, all_clips))} frames in {len(all_clips)} clips {hint}leave no {SPLIT_NAMES[split]} sequence of "
            f"{inputs}+{outputs} frames; ask for fewer, add clips, or change split_by, valid_fraction "
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


def by_clip(clips):
    """The clips in lists: pieces of one clip, parted at gaps in time, are one list."""
    return [list(pieces) for _, pieces in groupby(clips, key=lambda clip: (clip.name, clip.path, clip.index))]


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
            notes.append(f"{clip.name}: its frame rate varies: frames are {steps.min():.3g} to {steps.max():.3g} s apart; "
                         "time_step takes frames at a regular step")  # fmt: skip
        paces.setdefault(usual_step(times), source)
    notes += first_few(untimed)
    if not options.time_step and paces and max(paces) > 1.1 * min(paces):
        slow, fast = (f"{paces[pace].name} every {span(pace) if paces[pace].dated() else format(pace, 'g')}"
                      for pace in (max(paces), min(paces)))  # fmt: skip
        notes.append(f"clips have different steps: {slow}, {fast}; time_step takes frames at one step")
    return pieces


def array_clips(path, options):
    """Clips of a .npy or .npz file, or of a folder of them: one per file, or one per entry of its axis N."""
    path, channels, notes, said = checked_path(path), options.input_channels, [], []
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
                f"{file}: frames of {shape_text(frame_shape)}, but {files[0]}: {shape_text(first_shape)}; make them alike"
            )
        indices = range(length["N"]) if "N" in axes else [None]
        clips += [Clip(str(file), store, 0, length["T"], index, axes=axes) for index in indices]
        if axes not in said:
            said.append(axes)
            notes.append(f"{file}: {array.dtype} {array.shape} read as {', '.join(axes)}")
    return clips, notes


def shape_text(frame_shape):
    return f"{frame_shape[0]}x{frame_shape[1]} {frame_shape[2]}"


READERS = {"video": video_clips, "frames": image_clips, "array": array_clips, "grid": grid_clips}


def cut_in_time(clips, split, valid_fraction, test_fraction):
    """One split of each clip in time: training first, then validation, then test.

    The pieces of a clip that is parted at gaps are cut as one clip.
    """
    cut = []
    for pieces in by_clip(clips):
        length = sum(map(len, pieces))
        test = length - round(test_fraction * length)
        valid = test - round(valid_fraction * length)
        start, stop = {"train": (0, valid), "valid": (valid, test), "test": (test, length)}[split]
        for piece in pieces:
            if len(pieces) == 1 or (start < len(piece) and stop > 0):
                cut.append(piece.cut(max(start, 0), min(stop, len(piece))))
            start, stop = start - len(piece), stop - len(piece)
    return cut


def cut_by_file(clips, split, valid_fraction, test_fraction):
    """The elements of one split of a list of clips: training first, then validation, then test.

    A split with a fraction above 0 gets at least one clip.
    """
    test = len(clips) - (max(1, round(test_fraction * len(clips))) if test_fraction else 0)
    valid = max(0, test - (max(1, round(valid_fraction * len(clips))) if valid_fraction else 0))
    start, stop = {"train": (0, valid), "valid": (valid, test), "test": (test, len(clips))}[split]
    return clips[start:stop]


# Files of a folder


def video_sources(path, notes=None):
    """A video, or the videos in a folder, in natural order: list of Source.

    notes   as in media.files_in
    """
    path = checked_path(path)
    if path.is_file():
        if path.suffix.lower() not in VIDEOS:
            raise UserError(f"{path}: its name does not end as one of {' '.join(VIDEOS)}; name another file")
        return [Source(path.name, (path,), video=True)]
    return [Source(file.relative_to(path).as_posix(), (file,), video=True) for file in files_in(path, VIDEOS, notes)]


def frame_sources(path, by_prefix=False, notes=None):
    """The folders of images at or under `path`, or an image of several pages: list of Source.

    by_prefix   one Source per folder and per beginning of a file's name, up to the last number in it
    notes       as in media.files_in

    A folder of images of one page each is one Source. If the first image of a folder has several pages, each image of
    it is a Source.
    """
    path = checked_path(path)
    if path.is_file():
        if path.suffix.lower() not in IMAGES:
            raise UserError(f"{path}: a file; name a folder of folders of images, or an image of several pages")
        return [Source(path.name, (path,), video=False)]
    groups = {}
    for file in files_in(path, IMAGES, notes):
        name = file.parent.relative_to(path).as_posix()
        if by_prefix:
            name = f"{name}/{re.sub(r'[_.-]?[0-9]+[^0-9]*$', '', file.stem)}".removeprefix("./")
        groups.setdefault(name, []).append(file)
    sources = []
    for name, files in groups.items():
        if not by_prefix and page_count(files[0]) > 1:
            sources += [Source(file.relative_to(path).as_posix(), (file,), video=False) for file in files]
        else:
            sources.append(Source(name if name != "." else path.name, tuple(files), video=False))
    return sources


def checked_path(path):
    """`path` as a Path. UserError: it does not exist."""
    if not Path(path).exists():
        raise UserError(
            f"{path}: no such file or folder; name the data with --train_data_dir (test.py: --test_data_dir)"
        )
    return Path(path)


def consecutive(clip, files, step):
    """Pieces of a clip of images in which file numbers are `step` apart. No sequence then crosses missing frames."""
    numbers = frame_numbers(files)
    cuts = [0, *(i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] != step), len(numbers)]
    return [clip.cut(start, stop) for start, stop in pairwise(cuts)]


def frame_numbers(files):
    """The frame number of each file. A name may hold several numbers; the last one that differs between files counts."""
    columns = list(zip(*(re.findall(r"[0-9]+", file.stem) for file in files)))
    counting = [column for column in columns if len(set(column)) > 1] or columns
    if not counting:
        raise UserError(f"{files[0]}: no frame number in its name; number the frames")
    return [int(number) for number in counting[-1]]
