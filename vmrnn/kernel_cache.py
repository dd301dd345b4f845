"""The user's cache folder for what this program trusts: compiled kernels, and results of checks.

Whoever can write there decides what this program runs. So the folder and its files are used only if they belong to this
user and nobody else can write them, as ssh treats its keys. Environment: VMRNN_CACHE names the folder.
"""

import atexit
import functools
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

import platformdirs

log = logging.getLogger("vmrnn")

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder():
    """The folder for trusted files. It exists and can be written.

    If the user's own folder cannot be used, it is a temporary one of this process, and a warning says why.
    """
    return _folder(os.environ.get("VMRNN_CACHE", "").strip())


@functools.cache  # one warning and one temporary folder per process
def _folder(named):
    folder = Path(named or platformdirs.user_cache_dir("vmrnn", appauthor=False))
    reason = _prepare(folder, may_change=not named)
    if reason is None:
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="vmrnn-"))  # only this user can read or write it
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    advice = "name another folder with VMRNN_CACHE" if not named else "change VMRNN_CACHE"
    log.warning(
        "cache      %s is not used: %s. Kernels are compiled anew for every process; %s", folder, reason, advice
    )
    return temporary


def _prepare(folder, may_change):
    """Make the folder, for this user alone. Returns None, or the reason why it cannot be trusted or written.

    may_change  whether permissions of an existing folder may be changed: of ours, not of one that the user named
    """
    try:
        if not folder.is_absolute() and str(folder).startswith("~"):
            return "this user has no home folder"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if may_change and is_own(folder) and folder.stat().st_mode & OTHERS_WRITE:
            folder.chmod(0o700)
        reason = distrust(folder)
        if reason:
            return reason
        for parent in folder.resolve().parents:
            mode = parent.stat().st_mode
            if hasattr(os, "getuid") and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"everybody can write {parent}, and so replace it"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def is_own(path):
    """Whether a file or folder belongs to this user. Windows keeps each user's cache folder apart by itself."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def distrust(path):
    """Why an existing file or folder is not to be trusted, or None."""
    if not is_own(path):
        return "it belongs to another user"
    if hasattr(os, "getuid") and path.stat().st_mode & OTHERS_WRITE:
        return "other users can write it (chmod 700 changes that)"
    return None
