"""Frames of videos, upright and in the depth that they are stored in."""

import struct

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from vmrnn.data.reading import MAX_PIXELS, check_size, local_path, reading
from vmrnn.errors import UserError

VIDEOS = (".avi", ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".ts", ".gif")
# The demuxers of these endings. Others open further files or addresses that a file names.
DEMUXERS = "avi,mov,matroska,asf,mpeg,mpegvideo,mpegts,m4v,gif"
PYAV = int(av.__version__.split(".")[0])
# For a title that is not UTF-8. PyAV 19 has no such argument and reads every title.
LENIENT = {"metadata_errors": "replace"} if PYAV < 19 else {}
# Since 17, PyAV lets several threads convert the colours of a frame. One grey frame of 16 bits in about 1,000 then
# holds eight wrong pixels.
ONE_THREAD = {"threads": 1} if PYAV >= 17 else {}


def video_frames(path, channels=None, times=None):
    """Yields the frames of a video, (H, W, C), upright.

    path       a local file
    channels   1 (grey) or 3 (RGB); None: as the file stores them
    times      list to which the time of each frame is appended, seconds or None

    8-bit frames are uint8. Frames of 9 to 16 bits are uint16: grey and planar RGB keep their numbers, all others are
    converted to the range of 16 bits.
    UserError: no video, a damaged or cut-off one, frames of different sizes, a turn by no multiple of 90 degrees.
    """
    count, packets, announced, first = 0, 0, 0, None
    with reading(path, "a video"):
        with open(path, "rb") as f:
            head = f.read(10)
        if head[:3] == b"GIF":  # its decoder takes memory for a whole frame before it says how large one is
            check_size(path, *struct.unpack("<2H", head[6:]))
        with opened(path) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video; name another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            announced = 0 if head[:3] == b"GIF" else stream.frames  # 0: the container does not say at its start
            for packet in container.demux(stream):
                packets += packet.size > 0
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise UserError(f"{path}: frame {count} is damaged; fetch or write the file again")
                    check_size(path, frame.width, frame.height)
                    values = upright(frame_values(frame, channels), frame, path)
                    channels, first = values.shape[2], first or values.shape
                    if values.shape != first:
                        raise UserError(
                            f"{path}: frame {count} is {values.shape[0]}x{values.shape[1]} after "
                            f"{first[0]}x{first[1]}; all frames must have one size"
                        )
                    if times is not None:
                        times.append(frame.time)
                    count += 1
                    yield values
    # Some files announce frames that are never shown, and edit lists hide frames. Only a file that is shorter than its
    # container says is cut off.
    if count == 0 or ((announced == 0 or packets < announced) and ends_early(path)):
        raise UserError(f"{path}: cut off after {count} frames; fetch or write the file again")


def opened(path):
    """The container of a local video, which opens nothing else."""
    options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    return av.open(f"file:{local_path(path)}", **LENIENT, options=options)


def bits_of(path, channels):
    """The bits of the values that `video_frames` yields: those of the file where it keeps the numbers, else 8 or 16.

    channels   1 or 3
    UserError: no video.
    """
    with reading(path, "a video"), opened(path) as container:
        frame = next(container.decode(video=0))
    bits = max(component.bits for component in frame.format.components)
    return bits if bits <= 8 or keeps_numbers(frame.format.name, channels) else 16


def keeps_numbers(kind, channels):
    """Whether frames of a pixel format of more than 8 bits keep their numbers."""
    return (kind.startswith("gray") and channels == 1) or (kind.startswith("gbrp") and channels == 3)


def frame_values(frame, channels):
    """The values of a decoded frame, (H, W, C), whole numbers."""
    kind = frame.format.name
    grey = kind.startswith(("gray", "ya", "mono"))
    channels = channels or (1 if grey else 3)
    deep = max(component.bits for component in frame.format.components) > 8
    if deep and keeps_numbers(kind, channels):
        values = frame.to_ndarray()
    elif deep:
        values = frame.to_ndarray(format="gray16le" if channels == 1 else "rgb48le", **ONE_THREAD)
    else:
        values = frame.to_ndarray(format="gray" if channels == 1 else "rgb24", **ONE_THREAD)
    return values.reshape(frame.height, frame.width, channels)


def upright(values, frame, path):
    """A frame turned and mirrored as its display matrix says. Phones store videos as the camera was held."""
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return values
    # Column p and row q of the stored frame are shown at column a p + c q and row b p + d q.
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    if b == c == 0 and a and d:
        across, down = a < 0, d < 0
    elif a == d == 0 and b and c:
        values = values.transpose(1, 0, 2)
        across, down = c < 0, b < 0
    else:
        raise UserError(f"{path}: to be shown at an angle that is no multiple of 90 degrees; write it upright")
    values = values[::-1] if down else values
    return np.ascontiguousarray(values[:, ::-1] if across else values)


def ends_early(path):
    """Whether the container of a video says that the file should be longer than it is. False: it does not say."""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(0)
        head = f.read(12)
        if head[:4] == b"RIFF":
            return riff_end(f) > size
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot"):
            return box_end(f, size) > size
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return matroska_end(f) > size
        if head[:3] == b"GIF":
            f.seek(max(0, size - 64))
            return not f.read().rstrip(b"\0").endswith(b";")
    return False


def riff_end(f):
    """Where the last RIFF chunk of an AVI file ends, by its header."""
    end = 0
    while True:
        f.seek(end)
        head = f.read(8)
        if len(head) < 8 or head[:4] != b"RIFF":
            return end
        length = int.from_bytes(head[4:], "little")
        if length in (0, 2**32 - 1):  # written as a stream
            return 0
        end += 8 + length + length % 2 if end + 8 + length < f.seek(0, 2) else 8 + length


def box_end(f, size):
    """Where the last top-level box of an MP4 file ends, by its header."""
    end = 0
    while end < size:
        f.seek(end)
        head = f.read(16)
        if len(head) < 8 or not head[4:8].isascii():
            return end  # something else behind the last box
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:16], "big") if length == 1 else length
        if length < 8:  # 0: up to the end of the file
            return size
        end += length
    return end


def matroska_end(f):
    """Where the segment of a Matroska file ends, by its header."""
    f.seek(4)
    header = element_length(f)
    f.seek(header, 1)
    if f.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = element_length(f)
    return 0 if length is None else f.tell() + length


def element_length(f):
    """The length of a Matroska element at the file's position; None: unknown, as in a live stream."""
    first = f.read(1)[0]
    more = 8 - first.bit_length()
    value = int.from_bytes(bytes([first & (0x7F >> more)]) + f.read(more), "big")
    return None if value == 2 ** (7 * (more + 1)) - 1 else value
