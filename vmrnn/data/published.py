"""The published data sets that come as files: KTH, TaxiBJ and Human3.6M.

kth, human36m and taxibj return the data set of one split; vmrnn.data.table describes their parameters. Where the
literature has no validation split, a part of the training split is held out, so that no test sequence ever selects a
checkpoint.
"""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import npz_member, npz_rows
from vmrnn.data.cache import cached_folder, stamp, write_npy
from vmrnn.data.clips import Clip, decode
from vmrnn.data.sources import Source, frame_sources, video_sources
from vmrnn.data.splits import clip_dataset, cut_in_time, frames_wanted, path_of
from vmrnn.data.table import DATASETS, SPLIT_NAMES
from vmrnn.data.windows import cut_windows, thin
from vmrnn.errors import UserError
from vmrnn.values import ValueRange

KTH_NAME = re.compile(r"(person([0-9]{2})_([a-z]+)_d[1-4])")
# Hold out person 16: it costs 1/16 of the training data. Cutting each clip in time would leave pieces shorter than one
# sequence.
KTH_PERSONS = {"train": range(1, 16), "valid": range(16, 17), "test": range(17, 26)}
HUMAN_SUBJECTS = {"train": (1, 5, 6, 7, 8), "valid": (1, 5, 6, 7, 8), "test": (9, 11)}
HUMAN_STEP = 5  # every fifth of the 50 frames per second, as in the literature
# The last 10 % of each training clip. Holding out a subject would cost 20 % of the training data.
HUMAN_VALID = 0.1


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
            f"{folder}: no KTH clip in it (person01_boxing_d1_uncomp.avi, or folders of frames so named); "
            "data/README.md, section KTH, says where to get them"
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
    """Human3.6M: images S1_Directions.54138969_000001.jpg in one folder, or S1_.../000001.jpg; RGB, resized.

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
            "(S1_Directions.54138969_000001.jpg or S1_Directions.54138969/000001.jpg); add their files, see "
            "data/README.md, section Human3.6M"
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
                raise UserError(f"{path}: no value below 0 in {set_name}, so it is scaled to [0, 1] and not to [-1, "
                                "1]; write 2 v - 1 in place of each value v")  # fmt: skip

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
            f"{path_of(split, options)}: no {SPLIT_NAMES[split]} sequence of {inputs}+{outputs} frames, the longest "
            f"run has {max(map(len, clips))}; ask for fewer"
        )
    if split == "valid":
        windows = thin(windows, options.valid_sequences)
    return clip_dataset(split, clips, windows, ValueRange(*DATASETS[options.dataset].data_range), options)


def consecutive(clip, files, step):
    """Pieces of a clip of images in which file numbers are `step` apart. No sequence then crosses missing frames."""
    numbers = frame_numbers(files)
    cuts = [0, *(i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] != step), len(numbers)]
    return [clip.cut(start, stop) for start, stop in pairwise(cuts)]


def frame_numbers(files):
    """The frame number of each file: of several numbers in a name, the last one that differs between files."""
    columns = list(zip(*(re.findall(r"[0-9]+", file.stem) for file in files)))
    counting = [column for column in columns if len(set(column)) > 1] or columns
    if not counting:
        raise UserError(f"{files[0]}: no frame number in its name; number the frames")
    return [int(number) for number in counting[-1]]
