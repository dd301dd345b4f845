"""Frames from files: videos, folders of images, arrays. Values stay in the file's own type and units."""

import math
import os
import re
import tokenize
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vmrnn.errors import UserError

VIDEOS = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
ARRAYS = (".npy", ".npz")

# What numpy and zipfile raise for a file that is damaged or is no array
BROKEN_ARRAY = (OSError, ValueError, EOFError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


def read_frames(path, array_key="", channels=None):
    """All frames of a file, an array (T, H, W, C) in the file's own type and units.

    path        a video, a folder of images in the order of the numbers in their names, or a .npy or .npz file
                (T, H, W[, C]), which is memory-mapped where possible
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
    if suffix not in ARRAYS:
        raise UserError(
            f"{path}: its name does not end as one of {' '.join(VIDEOS + ARRAYS)}; name such a file or a folder of images"
        )
    frames = read_array(path, array_key)
    if frames.ndim not in (3, 4) or frames.dtype.kind not in "buif" or frames.size == 0:
        raise UserError(f"{path}: holds {frames.dtype} {frames.shape}; it must hold numbers (T, H, W) or (T, H, W, C)")
    return frames[..., None] if frames.ndim == 3 else frames


def natural_key(name):
    """Sorts names by the numbers in them: frame9 before frame10."""
    return [int(part) if part.isascii() and part.isdigit() else part for part in re.split(r"([0-9]+)", str(name))]


def files_in(folder, suffixes):
    """The files under a folder with one of the suffixes, hidden ones left out, in natural order of their paths."""
    folder = Path(folder)
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".") and name.lower().endswith(suffixes)]
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def images_in(folder):
    """The images directly in a folder, in natural order; UserError where there is none."""
    found = [path for path in files_in(folder, IMAGES) if path.parent == Path(folder)]
    if not found:
        raise UserError(f"{folder}: no images in it ({' '.join(IMAGES)}); name a folder of images")
    return found


def video_frames(path, channels=None):
    """Yields the frames of a video, uint8 (H, W, C); channels 1 (grey) or 3 (RGB), None: as it is stored.

    UserError: no video, a damaged or cut-off one, frames of different sizes.
    """
    count, first = 0, None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video; name another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                channels = channels or (1 if frame.format.name.startswith("gray") else 3)
                first = first or (frame.height, frame.width)
                if frame.is_corrupt:
                    raise UserError(f"{path}: frame {count} is damaged; fetch or write the file again")
                if (frame.height, frame.width) != first:
                    raise UserError(
                        f"{path}: frame {count} is {frame.height}x{frame.width} after {first[0]}x{first[1]}; "
                        "all frames must have one size"
                    )
                count += 1
                yield frame.to_ndarray(format="gray" if channels == 1 else "rgb24").reshape(*first, channels)
            announced = stream.frames  # 0 where the format does not say
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a video ({one_line(error)}); fetch or write it again") from error
    # Encoders that drop frames announce a few too many
    if count == 0 or count < 0.95 * announced:
        raise UserError(f"{path}: cut off: {count} of {announced} frames; fetch or write the file again")


def image_frames(paths, channels=None):
    """Yields images as frames (H, W, C); channels 1 (grey) or 3 (RGB), None: as they are stored (alpha dropped).

    uint8, or a deeper type where an image has one channel of more than 8 bits.
    UserError: no image, a damaged one, images of different sizes, types or channel counts.
    """
    first = None
    for path in paths:
        try:
            with Image.open(path) as image:
                deep = image.mode[0] in "IF"
                stored = 1 if deep or image.mode in ("1", "L", "LA") else 3
                if not deep:
                    image = image.convert("L" if (channels or stored) == 1 else "RGB")
                frame = np.asarray(image)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{path}: cannot be read as an image ({one_line(error)}); fetch or write it again"
            ) from error
        if deep and channels == 3:
            raise UserError(f"{path}: one channel of {frame.dtype}, but 3 are asked for; choose input_channels 1")
        facts = f"{frame.shape[0]}x{frame.shape[1]} {frame.dtype} of {stored} channels"
        first = first or facts
        if facts != first:
            raise UserError(f"{path}: {facts} after {first}; all images of a clip must be alike")
        yield frame.reshape(*frame.shape[:2], -1)


def read_array(path, array_key=""):
    """The array of a .npy (memory-mapped) or .npz file (array_key as in npz_member), never unpickling.

    UserError: no such array, or a missing, damaged or foreign file.
    """
    if Path(path).suffix.lower() != ".npz":
        return open_npy(path)
    member = npz_member(path, array_key)[0]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[member]
    except BROKEN_ARRAY as error:
        raise broken(path, error) from error


def open_npy(path):
    """The array of a .npy file, memory-mapped, never unpickling; UserError for a missing, damaged or foreign file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a .npy or .npz file") from None
    except BROKEN_ARRAY as error:
        raise broken(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"{path}: a .npz file under the name of a .npy; rename it")
    return array


def npz_member(path, key=""):
    """(name, shape, dtype) of one array of a .npz file, from its header alone.

    key: its name; empty: arr_0, or the only array with three dimensions or more.
    UserError: no such array, or a missing, damaged or foreign file.
    """
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as f:
                    shape, _, dtype = npy_header(f)
                headers[name.removesuffix(".npy")] = shape, dtype
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a .npy or .npz file") from None
    except (*BROKEN_ARRAY, KeyError) as error:
        raise broken(path, error) from error
    listed = ", ".join(f"{name} {shape}" for name, (shape, _) in headers.items()) or "nothing"
    if key and key not in headers:
        raise UserError(f"{path}: no array {key!r} in it, it holds {listed}; name one of them with array_key")
    large = [name for name, (shape, _) in headers.items() if len(shape) >= 3]
    name = key or ("arr_0" if "arr_0" in headers else large[0] if len(large) == 1 else "")
    if not name:
        raise UserError(f"{path}: holds {listed}; name the array of frames with array_key")
    return name, *headers[name]


def npz_rows(path, member):
    """Yields array[0], array[1], ... of one array of a .npz file. One row is in memory at a time.

    member   name of the array, from npz_member
    UserError: a damaged file.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as f:
            shape, fortran_order, dtype = npy_header(f)
            if fortran_order:  # rows are scattered over the file
                yield from read_array(path, member)
                return
            size = dtype.itemsize * math.prod(shape[1:])
            for _ in range(shape[0]):
                row = f.read(size)
                if len(row) < size:
                    raise EOFError(f"{member} ends early")
                yield np.frombuffer(row, dtype).reshape(shape[1:])
    except BROKEN_ARRAY as error:
        if isinstance(error, UserError):
            raise
        raise broken(path, error) from error


def npy_header(f):
    """(shape, fortran_order, dtype) from the start of an open .npy file."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](f)


def broken(path, error):
    return UserError(f"{path}: not a whole .npy or .npz array ({one_line(error)}); fetch or write it again")


def one_line(error):
    return " ".join(str(error).split())[:120]
