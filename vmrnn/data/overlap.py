"""Which sequences of a validation or test set hold frames that the network was trained on."""

from dataclasses import replace
from pathlib import Path

from vmrnn.data.arrays import ARRAYS
from vmrnn.data.cache import LARGE, checksum
from vmrnn.data.grid_files import grid_files
from vmrnn.data.images import IMAGES
from vmrnn.data.media import files_in
from vmrnn.data.own import part_of, read_clips
from vmrnn.data.splits import path_of
from vmrnn.data.table import DATASETS
from vmrnn.data.videos import VIDEOS
from vmrnn.errors import UserError

ENDINGS = {"video": VIDEOS, "frames": IMAGES, "array": ARRAYS}
SPLITTING = ("train_data_dir", "valid_data_dir", "test_data_dir", "split_by", "valid_fraction", "test_fraction",
             "frame_step", "digits_split")  # fmt: skip


def overlap_notes(data, split, options, training):
    """Lines about frames of the training in a validation or test set; [] if none are found.

    data       data set of the split, from dataset.build_dataset
    split      valid or test. For the test, frames of the validation count too, since they selected the checkpoint
    options    Config that the data set was made with
    training   options of the training, a dict

    Frames are known by their files and their numbers, and files of another path by their content as well, see `copies`.
    Copies within one path are those of own.copy_notes. The data sets of the literature have splits of their own, which
    no option changes.
    """
    if training.get("dataset", options.dataset) != options.dataset:
        return []
    apart = getattr(options, f"{split}_data_dir")
    trained = replace(options, **{name: training[name] for name in SPLITTING if name in training})
    if not apart and trained == options:
        return []  # parts of one path share no frame
    if options.dataset == "moving_mnist":
        if not apart and (options.digits_split, trained.digits_split) == ("published", "all"):
            return [
                "digits_split is published, but was all in the training: the digits of the test trained the network"
            ]
        return []
    if not DATASETS[options.dataset].own:
        return []

    changed = [name for name in ("split_by", "valid_fraction", "test_fraction")
               if getattr(options, name) != getattr(trained, name)]  # fmt: skip
    if not apart and changed and not files_of(trained.train_data_dir, options.dataset):
        return [f"{', '.join(changed)}: not as in the training, whose data {trained.train_data_dir} are not there: "
                "whether the sequences hold frames of the training is not known"]  # fmt: skip

    path = path_of(split, options)
    frames, shared = frames_of_training(path, split, options, trained)
    total, seen = data.num_frames_input + data.num_frames_output, 0
    for number, first in data.windows:
        clip = data.clips[number].cut(first, first + total)
        seen += not frames.get((clip.path, clip.index), set()).isdisjoint(range(clip.start, clip.stop, clip.step))
    what = "the training or its validation" if split == "test" else "the training"
    notes = []
    if seen:
        notes.append(
            f"{seen} of the {len(data.windows)} sequences hold frames of {what}: the figures are not those of unseen "
            "data"
        )
    if shared:
        notes.append(
            f"{len(shared)} of the {len(files_of(path, options.dataset))} files in {path} are also files of {what}, "
            "or copies of them: "
            "the figures may not be those of unseen data"
        )
    return notes


def frames_of_training(path, split, options, trained):
    """What a path has in common with the training, and for a test with the validation.

    path      of the data set of the split
    split     valid or test
    options   Config that the data set was made with
    trained   Config with the paths and fractions of the training

    Returns ({(path, index) of a clip: numbers of its frames}, the files in common or copied). The first is known only
    where both are the same files, so that their frames have the same numbers; the second is for all other paths.
    """
    parts = [("train", trained.train_data_dir, False)]
    if split == "test":
        parts.append(("valid", trained.valid_data_dir or trained.train_data_dir, bool(trained.valid_data_dir)))
    files, frames, shared = files_of(path, options.dataset), {}, set()
    for part, place, whole in parts:
        others = files_of(place, options.dataset)
        if not others or others != files:
            shared |= (others & files) | copies(files, others, named=options.dataset == "frames")
            continue
        clips, _ = read_clips(path, replace(options, frame_step=trained.frame_step))
        for clip in clips if whole else part_of(clips, part, trained):
            frames.setdefault((clip.path, clip.index), set()).update(range(clip.start, clip.stop, clip.step))
    return frames, shared


def copies(files, others, named=False):
    """The files whose content one of `others` has too, a set. Folders, such as Zarr stores, are not compared.

    files, others   sets of absolute paths
    named           whether a copy has the same name as well. Images without rain are alike at any time

    Only files of equal size are read, and of one above LARGE bytes samples.
    """

    def key(file, size):
        return size, checksum(file, size, LARGE), named and file.name

    ours, theirs = ([(file, file.stat().st_size) for file in some if file.is_file()] for some in (files, others))
    sizes = {size for _, size in ours} & {size for _, size in theirs}
    known = {key(file, size) for file, size in theirs if size in sizes}
    return {file for file, size in ours if size in sizes and key(file, size) in known}


def files_of(path, dataset):
    """The files that a data set reads at a path, a set of absolute paths without links; empty if there are none."""
    path = Path(path)
    try:
        if dataset == "grid":
            found = grid_files(path)
        else:
            found = [path] if path.is_file() else files_in(path, ENDINGS[dataset])
    except UserError:  # no such file
        return set()
    return {file.resolve() for file in found}
