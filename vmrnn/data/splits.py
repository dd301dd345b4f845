"""What the data sets made of files share: how clips are split into training, validation and test."""

from itertools import groupby

from vmrnn.data.draws import split_seed
from vmrnn.data.windows import ClipDataset


def path_of(split, options):
    """The file or folder of one split. A split without a path of its own is in that of the training split."""
    return getattr(options, f"{split}_data_dir") or options.train_data_dir


def frames_wanted(options):
    """(input frames, output frames) of a sequence."""
    return options.num_frames_input, options.num_frames_output


def clip_dataset(split, clips, windows, value_range, options, notes=(), calendar=None):
    """The ClipDataset of one split: drawn at random for training, in order otherwise.

    options   Config
    The other parameters are those of ClipDataset.
    """
    return ClipDataset(
        clips, windows, *frames_wanted(options), options.frame_size, value_range, options.frame_fit,
        random=split == "train", length=options.train_sequences, seed=split_seed(split, options.seed), notes=notes,
        calendar=calendar, moved_channels=options.base_channels,
    )  # fmt: skip


def by_clip(clips):
    """The clips in lists: pieces of one clip, parted at gaps in time, are one list."""
    return [list(pieces) for _, pieces in groupby(clips, key=lambda clip: (clip.name, clip.path, clip.index))]


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
