"""Data sets and loaders. Knows nothing of models.

An item is `(inputs, targets)`: float32 tensors (T, C, H, W). The data set's `value_range` says which stored values
became 0 and 1; a missing value is NaN. A random sample depends on (seed, epoch, index) only, so it is the same at any
worker count, after any resume and on any rank.

    config = vmrnn.config.Config(train_data_dir="builtin", train_sequences=10_000)
    loader = make_loader(build_dataset("train", config), batch_size=16, num_workers=2, shuffle=True, drop_last=True)
    loader.sampler.epoch = 3
"""

import gc
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from vmrnn.config import Config
from vmrnn.data.table import DATASETS, DIGITS, OWN, SPLITS
from vmrnn.errors import UserError
from vmrnn.runtime import ignore_stop_signals, keep_child_handler, kill_workers_at_exit

FROM_FILES = tuple(name for name in DATASETS if name != "moving_mnist")  # it generates its sequences

# Options that only some data sets use. With another data set they are refused, not silently ignored.
ONLY_FOR = dict.fromkeys(DIGITS, ("moving_mnist",)) | {
    "valid_data_dir": FROM_FILES,
    "split_by": OWN,
    "valid_fraction": OWN,
    "test_fraction": OWN,
    "variables": ("grid",),
    "time_from": ("grid",),
    "array_axes": ("grid", "array"),
    "array_key": ("array", "moving_mnist"),
    "time_step": ("grid", "video", "frames"),
    "forcings": ("grid",),
    "calendar": ("grid",),
    "frame_step": OWN,
    "frame_fit": OWN,
    "missing_value": OWN,
    "transform": OWN,
    "base": FROM_FILES,
}
DEFAULTS = Config()


def build_dataset(split, config, value_range=None):
    """The data set of one split.

    split         train, valid or test
    config        vmrnn.config.Config; the options of its group "data" count
    value_range   for your own data: ValueRange of the training data, if it is known already. None: it is made from the
                  option data_range or, if that is empty, found in the training data

    `train` is drawn anew in each epoch, train_sequences per epoch. `valid` and `test` are the same in every epoch and
    for every seed. They hold at most valid_sequences and test_sequences, evenly spaced; the test set of a published
    data set is used whole.
    UserError: an option that does not fit the data set, a bad file, sizes that do not fit, too few frames.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    name, spec = config.dataset, DATASETS[config.dataset]
    if not spec.own:
        if spec.channels not in (None, config.input_channels):
            raise UserError(f"input_channels is {config.input_channels}, but {name} has {spec.channels}; change it")
        if list(config.data_range) not in ([], list(spec.data_range or [])):
            raise UserError(f"data_range is {list(config.data_range)}, but {name} has one of its own; leave it out")
    for option, data_sets in ONLY_FOR.items():
        if name not in data_sets and getattr(config, option) != getattr(DEFAULTS, option):
            raise UserError(f"{option} is for {', '.join(data_sets)}, not for {name}; leave it out, or set dataset")
    option = f"{split}_data_dir" if getattr(config, f"{split}_data_dir") else "train_data_dir"
    path = getattr(config, option)
    if spec.section and not Path(path).exists():
        raise UserError(
            f"{path}: no such file or folder; data/README.md, section {spec.section}, says where to get the data, and "
            f"--{option} names them"
        )
    find = pkgutil.resolve_name(spec.find)
    return find(split, config, value_range)


# Loaders


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Yields the keys (epoch, index) of one epoch, in an order that (seed, epoch) decides.

    length    samples of the data set
    shuffle   False: the order of the data set
    seed      seed of the order
    rank      number of this process, which takes the positions start + rank, start + rank + world, ...
    world     number of processes

    Set `epoch` before each pass. To resume inside an epoch, set `start` to the first position of the common order that
    is still to come, and back to 0 afterwards. The keys carry the epoch, because workers live longer than one epoch.
    The number of samples of two ranks differs by at most one.
    """

    length: int
    shuffle: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0

    def __len__(self):
        return len(range(self.start + self.rank, self.length, self.world))

    def __iter__(self):
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed % 2**64, self.epoch)).permutation(order)
        for index in order[self.start + self.rank :: self.world]:
            yield self.epoch, int(index)


class Loader(DataLoader):
    """A DataLoader that reports a dead worker when the next batch is asked for, and at no other moment."""

    def __iter__(self):
        if self.num_workers:
            # Workers are forked. If a worker's garbage collector freed a video decoder of this process, it would wait
            # for ever for threads that only this process has. So all garbage is collected before the fork.
            gc.collect()
        with keep_child_handler():
            return super().__iter__()


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

    dataset        from `build_dataset`
    batch_size     sequences per batch of this process
    num_workers    processes that make batches; 0: this process makes them
    shuffle        see EpochSampler
    seed           see EpochSampler
    drop_last      leave out an incomplete last batch; for training only, since an evaluation counts every sample
    pin_memory     page-locked memory, so that copies to a CUDA GPU do not wait
    rank           see EpochSampler
    world          see EpochSampler

    `loader.sampler.epoch` chooses the epoch of the next pass, `loader.sampler.start` its first sample.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: they must be at least 1 and 0")
    if num_workers:
        kill_workers_at_exit()
    return Loader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), shuffle, seed, rank, world),
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        # From Python 3.14 on, the default is a server process that forks the workers. It would import everything
        # again, and a signal to all processes would end it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        # Without a generator of its own every pass would advance the global one, and a run that is resumed in the
        # middle of an epoch would train differently.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
