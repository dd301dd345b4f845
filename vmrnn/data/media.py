"""Which files a path names, and in which order."""

import os
import re
from collections import Counter
from pathlib import Path

from vmrnn.data.images import IMAGES
from vmrnn.errors import UserError

# A whole number, or a decimal number, with an exponent or a sign where it cannot be a part of a word, a date
# or a version
SIGN = r"(?:(?<![^\s_=(,/])[-+])?"
NUMBER = re.compile(rf"({SIGN}(?<![A-Za-z0-9.])[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![A-Za-z0-9]|\.[0-9])|[0-9]+)")


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


def in_natural_order(files, folder):
    """Files in natural order of their paths in a folder.

    Where two names would have the same numbers (1.1 and 1.10), the dot is no decimal point.
    """
    names = {file: file.relative_to(folder).as_posix() for file in files}
    keys = {file: natural_key(name) for file, name in names.items()}
    if len({tuple(key) for key in keys.values()}) < len(files):
        keys = {file: whole_key(name) for file, name in names.items()}
    return sorted(files, key=lambda file: (keys[file], names[file]))


def files_in(folder, suffixes, notes=None, without=()):
    """The files under a folder with one of the suffixes, in natural order of their paths.

    notes     list to which a line is added, if files are passed over because of their ending
    without   paths of folders that are not searched

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
            and Path(parent, name) not in without
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
    return in_natural_order(taken, folder)


def images_in(folder, notes=None):
    """The images directly in a folder, in natural order.

    notes   list to which a line is added for files that are passed over, and for images in folders below this one

    UserError: there is none.
    """
    found = files_in(folder, IMAGES, notes)
    here = [path for path in found if path.parent == Path(folder)]
    if not here:
        raise UserError(f"{folder}: no images in it ({' '.join(IMAGES)}); name a folder of images")
    if notes is not None and (below := len(found) - len(here)):
        notes.append(f"{folder}: {below} image{'s' * (below > 1)} in the folders below it are not read")
    return here
