"""Data sets and loaders. Knows nothing of models.

An item is `(inputs, targets)`: float32 tensors (T, C, H, W); the values of DATASETS[name].data_range are scaled to
[0, 1], and a missing value is NaN. A random sample is a function of (seed, epoch, index) only, so it is the same at
any worker count, after any resume and on any rank.

    train = build_dataset("train", train_data_dir="builtin", length=10_000)
    loader = make_loader(train, batch_size=16, num_workers=2, shuffle=True, drop_last=True)
    loader.sampler.epoch = 3
"""

import atexit
import multiprocessing
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from vmrnn.data import splits
from vmrnn.data.clips import ClipDataset, check_not_all_missing, scan_range, thin
from vmrnn.data.moving_mnist import SPLITS, MovingMNIST, MovingMNISTFile, load_digits, select_digits
from vmrnn.data.table import DATASETS, OWN, Spec
from vmrnn.errors import UserError
from vmrnn.values import ValueRange

__all__ = [
    "DATASETS", "EpochSampler", "MovingMNIST", "MovingMNISTFile", "Spec", "build_dataset", "load_digits",
    "make_loader", "select_digits",
]  # fmt: skip


def build_dataset(
    split,
    *,
    dataset="moving_mnist",
    train_data_dir="builtin",
    valid_data_dir="",
    test_data_dir="",
    cache_dir="data/cache",
    length=10000,
    num_frames_input=10,
    num_frames_output=10,
    input_channels=1,
    input_size=(64, 64),
    frame_fit="resize",
    data_range=(),
    missing_value=(),
    array_key="",
    split_by="time",
    valid_fraction=0.1,
    test_fraction=0.1,
    digits_split="all",
    num_objects=2,
    digit_size=28,
    step_length=0.1,
    seed=0,
):
    """The data set of one split: train, valid or test. Its `value_range` is the ValueRange that scales its values.

    train is drawn anew each epoch, `length` sequences of it; valid and test are the same in every epoch, and seed
    moves train alone. valid is at most `length` sequences, evenly spaced; so is test of your own data, while the test
    set of a published data set is used whole. input_size: (H, W) or an int. The other options are those of vmrnn.config.
    UserError: an unknown name, a bad file, sizes that do not fit, too few frames.
    """
    if dataset not in DATASETS:
        raise UserError(f"data set {dataset!r} is unknown; choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    spec = DATASETS[dataset]
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    frames = (num_frames_input, num_frames_output)
    if spec.find and input_channels != spec.shape[0]:
        raise UserError(f"input_channels is {input_channels}, but {dataset} has {spec.shape[0]}; change it")
    if dataset in ("video", "frames") and input_channels not in (1, 3):
        raise UserError(f"input_channels is {input_channels}; {dataset} is read as 1 (grey) or 3 (RGB)")
    if dataset not in OWN:
        if list(data_range) not in ([], list(spec.data_range or [])):
            raise UserError(f"data_range is {list(data_range)}, but {dataset} has one of its own; leave it out")
        if frame_fit != "resize" or missing_value:
            raise UserError(f"frame_fit and missing_value are for {', '.join(OWN)}, not for {dataset}; leave them out")
    # No two splits share their draws, and every seed validates and tests on the same sequences.
    draw_seed = SPLITS.index(split) + (len(SPLITS) * seed if split == "train" else 0)

    if dataset == "moving_mnist":
        if split == "test" and test_data_dir:
            return standard_test_file(test_data_dir, *frames, size, array_key)
        digits = select_digits(load_digits(train_data_dir), split, digits_split)
        return MovingMNIST(
            digits, length, *frames, size, num_objects, digit_size, step_length, draw_seed,
            same_every_epoch=split != "train",
        )  # fmt: skip

    if min(*frames, length) < 1:
        raise UserError(
            f"num_frames_input {frames[0]}, num_frames_output {frames[1]}, length {length}: at least 1 each"
        )
    folders = {"train": train_data_dir, "valid": valid_data_dir, "test": test_data_dir}
    path = folders[split] or train_data_dir
    if spec.find:
        clips, windows = spec.find(split, path, size, cache_dir, frames)
        if not len(windows):
            longest = max(map(len, clips))
            raise UserError(
                f"{path}: no {split} sequence of {frames[0]}+{frames[1]} frames, the longest run has {longest}; ask for fewer"
            )
        data_range = spec.data_range
    else:
        # Frames that are cropped, or have holes that would smear, are kept as they are and fitted item by item
        stored = size if frame_fit == "resize" and not missing_value else None
        options = (frames, input_channels, stored, cache_dir, split_by, valid_fraction, test_fraction, array_key)
        clips, windows = splits.own(dataset, split, folders, *options)
        check_not_all_missing(clips, missing_value)
        data_range = data_range or spec.data_range
        if not data_range and dataset == "frames" and clips[0].frames().dtype == np.uint8:
            data_range = (0.0, 255.0)
        if not data_range:
            training = clips if split == "train" else splits.own(dataset, "train", folders, *options)[0]
            data_range = scan_range(training, missing_value, cache_dir)
    value_range = ValueRange(*map(float, data_range), tuple(missing_value))
    if split == "valid" or (split == "test" and not spec.find):
        windows = thin(windows, length)
    return ClipDataset(
        clips, windows, *frames, size, value_range, frame_fit, random=split == "train", length=length,
        seed=draw_seed,
    )  # fmt: skip


def standard_test_file(path, num_frames_input, num_frames_output, size, array_key):
    data = MovingMNISTFile(path, num_frames_input, num_frames_output, array_key)
    height, width = data.frames.shape[2:]
    if (height, width) != size:
        raise UserError(
            f"{path}: frames of {height}x{width}, but input_size is {size[0]}x{size[1]}; name another file or input_size"
        )
    return data


# Loaders


class EpochSampler(Sampler):
    """Yields the keys (epoch, index) of one epoch, in an order that (seed, epoch) decides.

    The keys carry the epoch, so that it reaches workers that live longer than one. Set `epoch`
    before each pass, and `start`, the first position to yield, to resume inside an epoch; set it
    back to 0 afterwards. Positions count over all ranks: rank r of a world of w takes the
    positions start + r, start + r + w, ... of the one common order; the ranks' counts differ by
    one where w does not divide what is left.
    """

    def __init__(self, length, shuffle=False, seed=0, rank=0, world=1):
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return len(range(self.start + self.rank, self.length, self.world))

    def __iter__(self):
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed % 2**64, self.epoch)).permutation(order)
        for index in order[self.start + self.rank :: self.world]:
            yield self.epoch, int(index)


def ignore_stop_signals(worker):
    # A stop reaches the whole process group; the main process finishes its update, and needs its workers for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    # At its end Python sends SIGTERM to the workers of a loader that is still there, and waits for them.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report each as lost
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(
    dataset,
    batch_size,
    num_workers=0,
    shuffle=False,
    seed=0,
    drop_last=False,
    pin_memory=False,
    rank=0,
    world=1,
):
    """Batches (inputs, targets) of (B, T, C, H, W), the same at any num_workers.

    rank, world: this process' samples are every world-th. pin_memory: for copies to a CUDA GPU that do not wait.
    `loader.sampler.epoch = e` chooses the epoch of the next pass, `.start` its first sample.
    drop_last is for training only: an evaluation counts every sample.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: they must be at least 1 and 0")
    if num_workers:
        atexit.register(kill_workers)
    return DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed, rank, world),
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        # Its own generator: without one every pass would move the global one, and with it the
        # training of a run that was resumed in the middle of an epoch.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
