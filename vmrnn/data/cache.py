"""The cache of decoded and unpacked data: .npy files to be memory-mapped. A folder's name is a hash of its sources."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from vmrnn.data.arrays import npz_member, unpack
from vmrnn.errors import UserError

CACHE_FORMAT = 14  # part of every key; raise it when the content of the cache, or the way to write it, changes

MAKING = ".making-"  # start of the names of unfinished folders
CONTENTS = "contents.json"  # file in a folder of the cache: what the folder held when it was made
WHOLE_FILES = "whole_files.json"  # beside it: of large files, checksums, and versions when they were last read whole
WHOLE = 2**28  # bytes; of larger source files the checksum covers samples only
SAMPLES, SAMPLE = 256, 2**16  # samples of a large file, bytes per sample
LARGE = SAMPLES * SAMPLE  # bytes; larger files of the cache are not read whole at every start


def cached_folder(cache_dir, label, key, write):
    """The folder in cache_dir that belongs to `key`. It is filled at the first call.

    cache_dir   folder of the cache; made if it does not exist
    label       start of the folder's name, for people
    key         all that the content depends on, as json can hold it
    write       write(folder) fills the folder

    The folder is made under another name and renamed when it is complete. A killed process therefore leaves no folder
    that looks complete, and the next one removes what it left. If two processes make the same folder, the second one
    uses the first one's. A folder with damaged files is made again.
    UserError: cache_dir cannot be written.
    """
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, key]).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{label}-{digest}"
    if is_whole(folder):
        return folder
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        remove_leftovers(cache_dir)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=MAKING) as scratch, FileLock(Path(scratch) / "lock"):
            made = Path(scratch) / folder.name
            made.mkdir()
            write(made)
            (made / CONTENTS).write_text(json.dumps(contents(made)), encoding="utf-8")
            (made / WHOLE_FILES).write_text(json.dumps(large_files(made)), encoding="utf-8")
            if folder.exists() and not is_whole(folder):
                os.rename(folder, Path(scratch) / "damaged")
            try:
                os.rename(made, folder)
            except OSError:
                if not is_whole(folder):  # else another process was first
                    raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{cache_dir}: cannot be written ({reason}); make room or name another cache_dir") from error
    return folder


def contents(folder):
    """{name: [size, checksum of samples]} of the files in a folder of the cache.

    The samples of a file up to LARGE bytes are the whole file.
    """
    facts = {}
    for file in sorted(folder.iterdir()):
        if file.name not in (CONTENTS, WHOLE_FILES):
            size = file.stat().st_size
            facts[file.name] = [size, checksum(file, size, LARGE)]
    return facts


def large_files(folder, known=()):
    """{name: [checksum of the whole, version]} of the files above LARGE bytes in a folder of the cache.

    known   what this function returned before: the checksum of a file whose version is still the same
    """
    facts = {}
    for file in sorted(folder.iterdir()):
        if (size := file.stat().st_size) > LARGE:
            now = list(version(file))
            same = file.name in known and known[file.name][1] == now
            facts[file.name] = [known[file.name][0] if same else checksum(file, size, size), now]
    return facts


def is_whole(folder):
    """Whether a folder of the cache exists and its files are those that it was made with.

    A large file is read whole only if it may have been written since it was last found good. Its samples are
    read always.
    """
    try:
        if json.loads((folder / CONTENTS).read_text(encoding="utf-8")) != contents(folder):
            return False
        known = json.loads((folder / WHOLE_FILES).read_text(encoding="utf-8"))
        found = large_files(folder, known)
        if {name: facts[0] for name, facts in found.items()} != {name: facts[0] for name, facts in known.items()}:
            return False
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return False
    if found != known:
        try:
            (folder / WHOLE_FILES).write_text(json.dumps(found), encoding="utf-8")
        except OSError:  # not ours to write: the next start reads the file whole again
            pass
    return True


def remove_leftovers(cache_dir):
    """Remove the unfinished folders of processes that have ended, however they ended."""
    for scratch in Path(cache_dir).glob(f"{MAKING}*"):
        try:
            # A process takes the lock of its folder a moment after it made the folder.
            if time.time() - scratch.stat().st_mtime > 60:
                with FileLock(scratch / "lock", timeout=0):
                    shutil.rmtree(scratch, ignore_errors=True)
        except (OSError, Timeout):  # its owner lives, or another process removes it
            continue


def identity(path):
    """[size in bytes, checksum], which identify the content of a file wherever it lies, as json can hold them.

    The checksum covers the whole content up to WHOLE bytes. Of a larger file it covers SAMPLES pieces of SAMPLE bytes
    each, evenly spaced, the first and the last bytes among them. A folder, such as a Zarr store, counts with the names,
    sizes and checksums of all files in it.
    UserError: the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = [[file.relative_to(path).as_posix(), *identity(file)] for file in files]
        return [sum(size for _, size, _ in parts), hashlib.sha256(json.dumps(parts).encode()).hexdigest()]
    try:
        key, size = (str(path.resolve()), *version(path)), path.stat().st_size
        if key not in CHECKSUMS:
            CHECKSUMS[key] = checksum(path, size, WHOLE)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another file") from error
    return [size, CHECKSUMS[key]]


def version(path):
    """What changes when a file is written or replaced: its number on the disk, size, and two times in nanoseconds.

    Programs that keep a file's time when they replace it can set the time of modification, but not that of change.
    """
    status = path.stat()
    return tuple(getattr(status, f"st_{key}") for key in ("ino", "size", "mtime_ns", "ctime_ns"))


CHECKSUMS = {}  # version of a file -> its checksum, so that a process computes it once


def checksum(path, size, whole):
    """The checksum of a file of `size` bytes; if these are more than `whole`, of samples of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        if size <= whole:
            while block := f.read(2**20):
                digest.update(block)
        else:
            for start in np.linspace(0, size - SAMPLE, SAMPLES).astype(np.int64):
                f.seek(int(start))
                digest.update(f.read(SAMPLE))
    return digest.hexdigest()


def stamp(path):
    """What must be equal for the cache of a file to be used, as json can hold it.

    If the checksum covers samples only, the time of modification is included: it reveals a change between the samples.
    """
    size, content = identity(path)
    return [size, content, *([os.stat(path).st_mtime_ns] if size > WHOLE else [])]


def write_npy(path, frames):
    """Write frames of equal shape and type as one .npy file (T, *shape). One frame is in memory at a time.

    frames   iterator over arrays, such as (H, W, C)
    """
    with open(path, "wb") as f:
        count = 0
        for frame in frames:
            if count == 0:
                write_header(f, (0, *frame.shape), frame.dtype)
            f.write(np.ascontiguousarray(frame).data)
            count += 1
        f.seek(0)
        write_header(f, (count, *frame.shape), frame.dtype)  # as long as the first: numpy pads for a longer axis 0
        f.flush()
        os.fsync(f.fileno())


def write_header(f, shape, dtype):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, header)


def unpacked(path, array_key, cache_dir):
    """The path of a .npy file with one array of a .npz file, unpacked into the cache.

    array_key   as in arrays.npz_member
    """
    member, _, _ = npz_member(path, array_key)

    def write(folder):
        unpack(path, member, folder / "array.npy")

    return str(cached_folder(cache_dir, Path(path).stem, [stamp(path), member], write) / "array.npy")
