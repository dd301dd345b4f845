"""Which files make up which part of a data set: KTH, TaxiBJ, Human3.6M, and your own.

Each function returns (clips, windows) of one split, train, valid or test (vmrnn.data.clips). Where the literature knows no
validation part we hold one out of the training part, so that no test sequence ever selects a checkpoint.
"""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from vmrnn.data.clips import Clip, Source, cached_folder, cut_windows, decode, stamp, unpacked, write_npy
from vmrnn.data.media import ARRAYS, IMAGES, VIDEOS, files_in, open_npy
from vmrnn.errors import UserError

KTH_NAME = re.compile(r"(person([0-9]{2})_([a-z]+)_d[1-4])")
# The one person less in training costs a sixteenth of it; a part in time would be shorter than a sequence
KTH_PERSONS = {"train": range(1, 16), "valid": range(16, 17), "test": range(17, 26)}

HUMAN_SUBJECTS = {"train": (1, 5, 6, 7, 8), "valid": (1, 5, 6, 7, 8), "test": (9, 11)}
HUMAN_STEP = 5  # of the 50 frames a second, as the literature takes them
HUMAN_VALID = 0.1  # of each training clip, its end: a whole subject would be a fifth of the training part


def kth(split, folder, size, cache_dir, frames):
    """KTH: the original .avi files, or folders of frames, anywhere under `folder`; grey, resized to `size`.

    persons: KTH_PERSONS. Frames between the repetitions are left out where their numbers are missing in a folder of
    frames, or where `folder` has 00sequences.txt. frames: (input, output). Evaluation takes every third window of
    jogging and running and adjoining ones of the other actions, as the literature does; training takes every window.
    """
    sources = [s for s in video_sources(folder) or frame_sources(folder) if KTH_NAME.search(s.name)]
    if not sources:
        raise UserError(f"{folder}: no KTH clip in it (person01_boxing_d1_uncomp.avi, or folders of frames so named)")
    persons = KTH_PERSONS[split]
    sources = [s for s in sources if int(KTH_NAME.search(s.name)[2]) in persons]
    if not sources:
        raise UserError(
            f"{folder}: no clip of persons {persons[0]} to {persons[-1]}, the {split} part; add their files"
        )
    # As the literature resizes: cv2.resize, bilinear without antialiasing
    clips = decode(sources, cache_dir, "kth", 1, size, antialias=False)
    annotated = kth_annotations(Path(folder) / "00sequences.txt")
    runs = []
    for source, clip in zip(sources, clips):
        name = KTH_NAME.search(source.name)[1]
        if source.files[0].suffix.lower() not in VIDEOS:
            runs += consecutive(clip, source.files, 1)
        else:
            for start, stop in annotated.get(name, [(1, len(clip))]):
                if not 1 <= start <= min(stop, len(clip)):
                    raise UserError(
                        f"{Path(folder) / '00sequences.txt'}: {name} has frames {start}-{stop}, but {source.name} has "
                        f"{len(clip)}; fetch both again"
                    )
                runs.append(clip.part(start - 1, min(stop, len(clip))))
    total = sum(frames)
    fast = [re.search("jogging|running", clip.name) is not None for clip in runs]
    strides = [1 if split == "train" else 3 if quick else total for quick in fast]
    return runs, cut_windows(runs, total, strides)


def kth_annotations(path):
    """{person01_boxing_d1: [(first, last), ...]}: the frames with an action in them, from 1; {} where there is no file."""
    if not path.exists():
        return {}
    found = {}
    for name, ranges in re.findall(r"(person\S+)\s+frames\s+([0-9, \t-]+)", path.read_text(encoding="latin-1")):
        found[name] = [(int(first), int(last)) for first, last in re.findall(r"([0-9]+)-([0-9]+)", ranges)]
    if not found:
        raise UserError(f"{path}: not KTH's list of sequences; fetch it again or remove it")
    return found


def human36m(split, folder, size, cache_dir, frames):
    """Human3.6M: images S1_Directions.54138969_000001.jpg in one folder, or S1_.../000001.jpg; RGB, resized to `size`.

    Subjects: HUMAN_SUBJECTS; every fifth frame (numbers 1, 6, 11, ...). Validation: the last tenth of each training
    clip. Training takes every window of frames = (input, output), evaluation adjoining ones.
    """
    sources, subjects = [], HUMAN_SUBJECTS[split]
    for source in frame_sources(folder, by_prefix=True):
        subject = re.search(r"(?:^|/)S([0-9]+)(?=[_/])", source.name)
        numbers = frame_numbers(source.files)
        files = tuple(file for file, number in zip(source.files, numbers) if number % HUMAN_STEP == 1)
        if files and subject and int(subject[1]) in subjects:
            sources.append(Source(source.name, files))
    if not sources:
        raise UserError(
            f"{folder}: no frames of subjects {', '.join(map(str, subjects))}, the {split} part "
            "(S1_Directions.54138969_000001.jpg or S1_Directions.54138969/000001.jpg); add their files"
        )
    clips = decode(sources, cache_dir, "human36m", 3, size)
    runs = [run for s, clip in zip(sources, clips) for run in consecutive(clip, s.files, HUMAN_STEP)]
    if split != "test":
        runs = in_time(runs, split, HUMAN_VALID, 0.0)
    return runs, cut_windows(runs, sum(frames), [1 if split == "train" else sum(frames)] * len(runs))


def taxibj(split, path, size, cache_dir, frames):
    """TaxiBJ: dataset.npz with X_train, Y_train, X_test, Y_test, floats in [-1, 1], (N, T, 2, 32, 32) or (N, T, 32, 32, 2).

    X the given frames, Y those that follow. Validation: the last tenth of X_train. frames: (input, output), at most
    as many as X and Y have: the last of X, the first of Y.
    """
    path = Path(path)
    path = path / "dataset.npz" if path.is_dir() else path
    part = "test" if split == "test" else "train"
    given, follow = (open_npy(unpacked(path, f"{name}_{part}", cache_dir)) for name in "XY")
    for array in (given, follow):
        if array.ndim != 5 or array.dtype.kind != "f" or len(array) != len(given) or given.shape[2:] != array.shape[2:]:
            raise UserError(f"{path}: holds {given.dtype} {given.shape} and {follow.dtype} {follow.shape} for {part}; "
                            "X and Y must be floats (N, T, 2, 32, 32)")  # fmt: skip
    first = given.shape[2] == 2
    shape = (*given.shape[3:], given.shape[2]) if first else given.shape[2:]
    if shape != (*size, 2):
        raise UserError(
            f"{path}: frames of {shape[0]}x{shape[1]} with {shape[2]} channels; TaxiBJ's are 2x{size[0]}x{size[1]}"
        )
    if frames[0] > given.shape[1] or frames[1] > follow.shape[1]:
        raise UserError(
            f"{path}: sequences of {given.shape[1]}+{follow.shape[1]} frames, but {frames[0]}+{frames[1]} are asked for; "
            "choose fewer num_frames_input or num_frames_output"
        )

    def write(folder):
        def sequences():
            for x, y in zip(given, follow):
                values = np.concatenate((x, y)).astype(np.float32)
                if not np.abs(values).max() <= 1:
                    raise UserError(f"{path}: values outside [-1, 1] in {part}; fetch the scaled data set")
                yield values.transpose(0, 2, 3, 1) if first else values

        write_npy(folder / "frames.npy", sequences())

    store = str(cached_folder(cache_dir, "taxibj", [stamp(path), part], write) / "frames.npy")
    start = given.shape[1] - frames[0]
    clips = [Clip(f"{path} {part}", store, start, start + sum(frames), i) for i in range(len(given))]
    if part == "train":
        cut = len(clips) - round(0.1 * len(clips))
        clips = clips[:cut] if split == "train" else clips[cut:]
    return clips, cut_windows(clips, sum(frames))


def own(dataset, split, folders, frames, channels, size, cache_dir, split_by="time", valid_fraction=0.1, test_fraction=0.1,
        array_key=""):  # fmt: skip
    """Your own data: dataset "video" (a video or a folder of them), "frames" (a folder of folders of images) or "array".

    folders: {"train": path, "valid": path or "", "test": path or ""}; a part without its own path is the end of the
    training path: of each clip's time, or of the list of clips (split_by "time" or "file").
    size: (H, W) to which videos and images are resized in the cache, None: they are kept as they are.
    """
    path = folders[split] or folders["train"]
    if dataset == "array":
        clips = array_clips(path, channels, array_key, cache_dir)
    else:
        sources = video_sources(path) if dataset == "video" else frame_sources(path)
        if not sources:
            kinds = VIDEOS if dataset == "video" else IMAGES
            raise UserError(f"{path}: nothing in it for dataset {dataset} ({' '.join(kinds)}); name another path")
        clips = decode(sources, cache_dir, dataset, channels, size)
    whole = len(clips), sum(map(len, clips))
    if split == "train" or not folders[split]:
        fractions = (0.0 if folders["valid"] else valid_fraction, 0.0 if folders["test"] else test_fraction)
        clips = (in_time if split_by == "time" else by_file)(clips, split, *fractions)
    windows = cut_windows(clips, sum(frames))
    if not len(windows):
        raise UserError(
            f"{path}: {whole[1]} frames in {whole[0]} clips leave no {split} sequence of {frames[0]}+{frames[1]} frames; "
            f"ask for fewer, add clips, or change split_by, valid_fraction ({valid_fraction:g}) and test_fraction "
            f"({test_fraction:g})"
        )
    return clips, windows


def array_clips(path, channels, array_key, cache_dir):
    """Clips of a .npy or .npz file, or of a folder of them: (T, H, W[, C]) one, (N, T, H, W[, C]) N."""
    path = Path(path)
    files = files_in(path, ARRAYS) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .npy or .npz in it; name another path")
    clips, first = [], None
    for file in files:
        if file.suffix.lower() not in ARRAYS:
            raise UserError(f"{file}: its name does not end as one of {' '.join(ARRAYS)}; name another file")
        store = unpacked(file, array_key, cache_dir) if file.suffix.lower() == ".npz" else str(file)
        array = open_npy(store)
        # Four dimensions are (T, H, W, C) where the last one is the channels, else sequences of one channel
        many = array.ndim == 5 or (array.ndim == 4 and channels == 1 and array.shape[3] != 1)
        frame = array.shape[1 + many :]
        if array.dtype.kind not in "buif" or array.size == 0 or array.ndim not in (3, 4, 5):
            raise UserError(
                f"{file}: holds {array.dtype} {array.shape}; it must hold numbers (T, H, W[, C]) or (N, T, H, W[, C])"
            )
        found = frame[2] if len(frame) == 3 else 1
        if found != channels:
            raise UserError(f"{file}: {array.shape} has {found} channels, but input_channels is {channels}; change one")
        first = first or frame
        if frame != first:
            raise UserError(f"{file}: frames of {frame}, but {files[0]}: {first}; make them alike")
        if many:
            clips += [Clip(str(file), store, 0, array.shape[1], i) for i in range(len(array))]
        else:
            clips.append(Clip(str(file), store, 0, len(array)))
    return clips


def in_time(clips, split, valid_fraction, test_fraction):
    """The part of each clip: training first, then validation, then test."""
    parts = []
    for clip in clips:
        test = len(clip) - round(test_fraction * len(clip))
        valid = test - round(valid_fraction * len(clip))
        start, stop = {"train": (0, valid), "valid": (valid, test), "test": (test, len(clip))}[split]
        parts.append(clip.part(start, stop))
    return parts


def by_file(clips, split, valid_fraction, test_fraction):
    """Whole clips: training first, then validation, then test; a part that is asked for has at least one."""
    test = len(clips) - (max(1, round(test_fraction * len(clips))) if test_fraction else 0)
    valid = max(0, test - (max(1, round(valid_fraction * len(clips))) if valid_fraction else 0))
    start, stop = {"train": (0, valid), "valid": (valid, test), "test": (test, len(clips))}[split]
    return clips[start:stop]


def video_sources(path):
    """A video, or the videos under a folder, in natural order."""
    path = existing(path)
    if path.is_file():
        if path.suffix.lower() not in VIDEOS:
            raise UserError(f"{path}: its name does not end as one of {' '.join(VIDEOS)}; name another file")
        return [Source(path.name, (path,))]
    return [Source(file.relative_to(path).as_posix(), (file,)) for file in files_in(path, VIDEOS)]


def frame_sources(path, by_prefix=False):
    """A clip for each folder of images at or under `path`; by_prefix: for each beginning of a name before its number."""
    path = existing(path)
    if path.is_file():
        raise UserError(f"{path}: a file; name a folder of folders of images")
    groups = {}
    for file in files_in(path, IMAGES):
        name = file.parent.relative_to(path).as_posix()
        if by_prefix:
            name = f"{name}/{re.sub(r'[_.-]?[0-9]+[^0-9]*$', '', file.stem)}".removeprefix("./")
        groups.setdefault(name, []).append(file)
    return [Source(name if name != "." else path.name, tuple(files)) for name, files in groups.items()]


def existing(path):
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder; name the data with train_data_dir")
    return Path(path)


def consecutive(clip, files, step):
    """The parts of a clip of images whose numbers are `step` apart: no sequence jumps over missing frames."""
    numbers = frame_numbers(files)
    cuts = [0, *(i for i in range(1, len(numbers)) if numbers[i] - numbers[i - 1] != step), len(numbers)]
    return [clip.part(start, stop) for start, stop in pairwise(cuts)]


def frame_numbers(files):
    """The number of each file's name that counts frames: the last of those that are not the same in all names."""
    columns = list(zip(*(re.findall(r"[0-9]+", file.stem) for file in files)))
    counting = [column for column in columns if len(set(column)) > 1] or columns
    if not counting:
        raise UserError(f"{files[0]}: no frame number in its name; number the frames")
    return [int(number) for number in counting[-1]]
