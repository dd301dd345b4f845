"""Arrays of .npy and .npz files. Nothing is ever unpickled."""

import math
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np

from vmrnn.data.reading import reading
from vmrnn.errors import UserError

ARRAYS = (".npy", ".npz")


def read_array(path, array_key=""):
    """The array of a .npy (memory-mapped) or .npz file (array_key as in npz_member).

    UserError: no such array, a missing, damaged or foreign file, more than fits into memory.
    """
    if not str(path).lower().endswith(".npz"):
        return open_npy(path)
    member, shape, dtype = npz_member(path, array_key)
    need, free = math.prod(shape) * dtype.itemsize, free_memory()
    if free and need > 0.8 * free:
        raise UserError(f"{path}: {member} would take {need / 2**30:.3g} GiB of {free / 2**30:.3g} GiB free memory; "
                        "write it as .npy, which is not loaded whole")  # fmt: skip
    with whole(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[member]


def free_memory():
    """Bytes of memory that can still be used, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def open_npy(path):
    """The array of a .npy file, memory-mapped. UserError: a missing, damaged or foreign file."""
    with whole(path):
        with open(path, "rb") as file:
            if not file.read(6).startswith((b"\x93NUMPY", b"PK")):
                raise ValueError("it begins otherwise")  # np.load would advise to unpickle it
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path}: a .npz file under the name of a .npy; rename it")
    return array


def npz_member(path, key=""):
    """(name, shape, dtype) of one array of a .npz file, from its header alone.

    key   the array's name; empty: the only array with three dimensions or more

    UserError: no such array, or a missing, damaged or foreign file.
    """
    headers = {}
    with whole(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as f:
                shape, _, dtype = npy_header(f)
            headers[name.removesuffix(".npy")] = shape, dtype
    listed = ", ".join(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
    if key and key not in headers:
        raise UserError(f"{path}: no array {key!r} in it, it holds {listed}; name one of them with array_key")
    large = [name for name, (shape, _) in headers.items() if len(shape) >= 3]
    few = large or [name for name in headers if name == "arr_0"]
    name = key or (few[0] if len(few) == 1 else "")
    if not name:
        raise UserError(f"{path}: holds {listed}; name the array of frames with array_key")
    if headers[name][1].hasobject:
        raise UserError(f"{path}: {name} holds Python objects, such as arrays of different sizes; {AS_NUMBERS}")
    return name, *headers[name]


AS_NUMBERS = "write it as one array of numbers (np.stack), or one .npy file per clip"


def find_axes(path, array, channels, axes=""):
    """What the axes of an array are, as letters: N sequences, T frames, C channels, H rows, W columns, such as "NTHWC".

    path       for messages
    array      of the file
    channels   channels per frame that the array must have
    axes       the letters, if they are named; "": the only reading that fits `channels`

    UserError: no numbers, no reading that fits, or several; the message shows them.
    """
    shape = array.shape
    if array.dtype.kind not in "buif" or array.dtype.itemsize > 8 or array.size == 0 or not 3 <= array.ndim <= 5:
        if array.dtype.names:
            raise UserError(f"{path}: a table with the columns {', '.join(array.dtype.names)}; {AS_NUMBERS}")
        raise UserError(
            f"{path}: holds {array.dtype} {shape}; it must hold real numbers of at most 64 bits (T, H, W[, C]) or (N, "
            "T, H, W[, C])"
        )

    def channels_of(letters):
        return shape[letters.index("C")] if "C" in letters else 1

    if axes:
        letters = axes.upper()
        if len(letters) != array.ndim or len(set(letters)) != len(letters) or not {*"THW"} <= {*letters} <= {*"NTCHW"}:
            raise UserError(f"{path}: {shape} has {array.ndim} axes, but array_axes is {axes}; name each with one of "
                            "N T C H W, T H W among them")  # fmt: skip
        if channels_of(letters) != channels:
            raise UserError(f"{path}: {shape} as {letters} has {channels_of(letters)} channels, but input_channels is "
                            f"{channels}; change one of them")  # fmt: skip
        return letters
    readings = READINGS[array.ndim]
    if array.ndim == 3 and channels == 1:
        return "THW"
    # Sides of up to 4 pixels are taken for channels, and a sequence has more than one frame.
    fitting = [
        letters for letters in readings
        if channels_of(letters) == channels
        and min(shape[letters.index(side)] for side in "HW") > 4 and shape[letters.index("T")] > 1
    ]  # fmt: skip
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{path}: {shape} may be {' or '.join(fitting)}; say which with array_axes")
    found = ", ".join(f"as {letters} {channels_of(letters)}" for letters in readings)
    raise UserError(f"{path}: {shape} has {found} channels, but input_channels is {channels}; change it, or name the "
                    f"axes with array_axes, such as {readings[0]}")  # fmt: skip


READINGS = {3: ("THW",), 4: ("NTHW", "TCHW", "THWC"), 5: ("NTCHW", "NTHWC")}  # number of axes -> what they may be


def npz_rows(path, member):
    """Yields array[0], array[1], ... of one array of a .npz file. One row is in memory at a time.

    member   name of the array, from npz_member

    UserError: a damaged file.
    """
    with whole(path), zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as f:
        shape, fortran_order, dtype = npy_header(f)
        if fortran_order:  # the rows are scattered over the file
            yield from read_array(path, member)
            return
        size = dtype.itemsize * math.prod(shape[1:])
        for _ in range(shape[0]):
            row = f.read(size)
            if len(row) < size:
                raise EOFError(f"{member} ends early")
            yield np.frombuffer(row, dtype).reshape(shape[1:])


def unpack(path, member, target):
    """Unpack one array of a .npz file into the .npy file `target`, a block at a time.

    UserError: a damaged file, one that is not as long as its header says, or longer than the disk has room for.
    """
    with open(target, "wb") as f:
        for block in unpacked_blocks(path, member, shutil.disk_usage(Path(target).parent).free):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())


def unpacked_blocks(path, member, room):
    """Yields the bytes of one array of a .npz file as those of a .npy file; room: bytes that may be written."""
    with whole(path), zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as packed:
        shape, fortran_order, dtype = npy_header(packed)
        left = math.prod(shape) * dtype.itemsize
        if left > room:
            raise UserError(f"{path}: {member} unpacks to {left / 2**30:.3g} GiB, but the cache has room for "
                            f"{room / 2**30:.3g} GiB; make room or name another cache_dir")  # fmt: skip
        header, start = (
            {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran_order, "shape": shape},
            BytesIO(),
        )
        np.lib.format.write_array_header_2_0(start, header)
        yield start.getvalue()
        while left and (block := packed.read(min(left, 2**22))):
            left -= len(block)
            yield block
        if left or packed.read(1):
            raise EOFError(f"{member} is not as long as its header says")


def npy_header(f):
    """(shape, fortran_order, dtype) from the start of an open .npy file. ValueError: an impossible one."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = readers[version](f)
    if not all(type(side) is int and 0 <= side < 2**48 for side in shape) or math.prod(shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"its header says {dtype} {shape}")
    return shape, fortran_order, dtype


@contextmanager
def whole(path):
    """Turn what numpy and zipfile raise for a damaged or foreign file into a UserError of one line."""
    with reading(path, ".npy or .npz array", "not a whole"):
        try:
            yield
        except ValueError as error:
            if not re.search("Object arrays|Python objects", str(error)):
                raise
            raise UserError(f"{path}: holds Python objects, such as arrays of different sizes; {AS_NUMBERS}") from error
