"""Random draws that depend on (seed, epoch, index) only.

They are the same at any worker count, after any resume and on any rank.
"""

import numpy as np

from vmrnn.data.table import SPLITS


def split_seed(split, seed):
    """The seed of a split's own random stream. `seed` changes training only; validation and test stay the same."""
    return SPLITS.index(split) + (len(SPLITS) * seed if split == "train" else 0)


def splitmix64(x):
    """The output function of SplitMix64: a bijection of uint64 that mixes every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap around, as they should here
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_draws(seed, epochs, indices, count):
    """`count` numbers in [0, 1) for each (seed, epoch, index), float64 (len(indices), count).

    The draws are hashes of counters. A whole batch is drawn at once, and no draw depends on the draws before it.
    """
    key = np.array([seed % 2**64], np.uint64)
    for counter in (np.asarray(epochs, np.uint64), np.asarray(indices, np.uint64)):
        key = splitmix64(key) ^ counter
    draws = splitmix64(splitmix64(splitmix64(key))[:, None] + np.arange(count, dtype=np.uint64))
    return (draws >> np.uint64(11)) * 2.0**-53


def split_key(key):
    """(epoch, index) of a sample's key. A plain index belongs to epoch 0."""
    return key if isinstance(key, tuple) else (0, key)
