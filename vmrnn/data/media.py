"""Which files a path names, in which order, and their frames. Values stay in the file's own type and units."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from vmrnn.data.arrays import ARRAYS, read_array
from vmrnn.data.images import IMAGES, image_frames
from vmrnn.data.videos import VIDEOS, video_frames
from vmrnn.errors import UserError

# A whole number, or a decimal number, with an exponent or a sign where it cannot be a part of a word, a date or a version
SIGN = r"(?:(?<![^\s_=(,/])[-+])?"
NUMBER = re.compile(rf"({SIGN}(?<![A-Za-z0-9.])[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![A-Za-z0-9]|\.[0-9])|[0-9]+)")


def read_frames(path, array_key="", channels=None):
    """All frames of a file, an array (T, H, W, C) in the file's own type and units.

    path        a video, an image of several pages, a folder of images in the order of the numbers in their names, or a
                .npy or .npz file (T, H, W[, C]), which is memory-mapped where possible
    array_key   as in npz_member
    channels    of videos and images, as in video_frames: 1, 3 or None

    UserError: a missing, damaged or foreign file, frames of different sizes or channel counts.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return np.stack(list(image_frames(images_in(path), channels)))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a video, a folder of images, a .npy or a .npz")
    if suffix in VIDEOS:
        return np.stack(list(video_frames(path, channels)))
    if suffix in IMAGES:
        return np.stack(list(image_frames([path], channels)))
    if suffix not in ARRAYS:
        raise UserError(
            f"{path}: its name does not end as one of {' '.join(VIDEOS + ARRAYS)}; name such a file or a folder of images"
        )
    frames = read_array(path, array_key)
    if frames.ndim not in (3, 4) or frames.dtype.kind not in "buif" or frames.size == 0:
        raise UserError(f"{path}: holds {frames.dtype} {frames.shape}; it must hold numbers (T, H, W) or (T, H, W, C)")
    return frames[..., None] if frames.ndim == 3 else frames


def natural_key(name):
    """Sorts names by the numbers in them: frame9 before frame10, 0.05 before 0.1, t=-2 before t=-1.

    Dates (2024-01-02), versions (1.2.10) and frame-10 hold whole numbers.
    """
    pieces = NUMBER.split(str(name))
    return [number_of(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def number_of(text):
    return float(text) if re.search("[.eE]", text) else int(text)


def whole_key(name):
    """Sorts names by the whole numbers in them."""
    pieces = re.split(r"([0-9]+)", str(name))
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def in_order(files, folder):
    """Files in natural order of their paths in a folder.

    Where two names would have the same numbers (1.1 and 1.10), the dot is no decimal point.
    """
    names = {file: file.relative_to(folder).as_posix() for file in files}
    keys = {file: natural_key(name) for file, name in names.items()}
    if len({tuple(key) for key in keys.values()}) < len(files):
        keys = {file: whole_key(name) for file, name in names.items()}
    return sorted(files, key=lambda file: (keys[file], names[file]))


def files_in(folder, suffixes, notes=None):
    """The files under a folder with one of the suffixes, in natural order of their paths.

    notes   list to which a line is added, if files are passed over because of their ending

    Links are followed. Hidden files and folders are left out.
    """
    folder = Path(folder)
    taken, passed_over, seen = [], Counter(), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # A folder that is linked into itself would be walked for ever.
        seen.add(os.path.realpath(parent))
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in seen
        ]  # fmt: skip
        for name in names:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                taken.append(Path(parent, name))
            elif not name.startswith("."):
                passed_over[Path(name).suffix.lower() or "no ending"] += 1
    if passed_over and notes is not None:
        endings = ", ".join(f"{ending} {count}" for ending, count in passed_over.most_common(8))
        total = passed_over.total()
        notes.append(f"{folder}: {total} file{'s' * (total > 1)} passed over because of their ending ({endings})")
    return in_order(taken, folder)


def images_in(folder):
    """The images directly in a folder, in natural order; UserError where there is none."""
    found = [path for path in files_in(folder, IMAGES) if path.parent == Path(folder)]
    if not found:
        raise UserError(f"{folder}: no images in it ({' '.join(IMAGES)}); name a folder of images")
    return found
