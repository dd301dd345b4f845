"""Frames of images, upright and in the depth that they are stored in."""

import logging
import math
import re
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import tifffile
from PIL import Image, ImageOps

from vmrnn.data.reading import check_size, local_path, reading
from vmrnn.data.videos import ONE_THREAD
from vmrnn.errors import UserError
from vmrnn.values import equals

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".gif")
# The formats of these endings. Some of Pillow's others start a program on the file.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
ANIMATED = ("PNG", "WEBP", "GIF")  # formats whose pages are frames; those of a JPEG are previews and depth maps
REDUCED, MASK = 1, 4  # bits of TIFF's NewSubfileType: a page of the pyramid, a mask of missing pixels
ORIENTATION = 274  # tag of TIFF and EXIF
PALETTE = "{}: has a palette, whose colours are read; if its numbers are the values, write them as grey"
GDAL_METADATA, GDAL_NODATA = 42112, 42113  # tags of TIFF
PACKED = "{}: its compression needs a further package; pip install imagecodecs, or write it uncompressed"
ALPHA = (1, 2)  # kinds of TIFF's ExtraSamples that are transparency; a sample of kind 0 is a band with values

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would log a line per damaged tag


def image_frames(paths, channels=None):
    """Yields the frames of images, (H, W, C), upright: one per image, or all pages of a TIFF stack or an animation.

    paths      of image files; of several each must hold one frame
    channels   1 (grey) or 3 (RGB); None: as the files store them; an alpha channel is dropped

    The frames are uint8, or what a deeper image stores: bool becomes uint8, all other types stay. Where a TIFF file
    names a number that means missing (GDAL_NODATA), whole numbers become floats, and that number NaN.
    UserError: no image, a damaged one, images of different sizes, types or channel counts, more bits than can be kept.
    """
    first = None
    for path in paths:
        with reading(path, "an image"):
            for number, (frame, stored) in enumerate(pages(path, channels)):
                if len(paths) > 1 and number:
                    raise UserError(f"{path}: holds several frames, and other images of its folder hold one; put it "
                                    "into a folder of its own")  # fmt: skip
                kind = f"{frame.shape[0]}x{frame.shape[1]} {frame.dtype} of {stored} channels"
                first = first or kind
                if kind != first:
                    raise UserError(f"{path}: {kind} after {first}; all images of a clip must be alike")
                yield frame


def page_count(path):
    """How many frames an image file holds."""
    with reading(path, "an image"):
        if is_tiff(path):
            with tifffile.TiffFile(path) as file:
                return len(full_pages(file, path))
        with Image.open(path, formats=FORMATS) as image:
            return len(frame_numbers(image))


def frame_numbers(image):
    """The numbers of the pages of an opened image that are its frames.

    An animated PNG may begin with a picture for programs that show no animation, which is none of its frames.
    """
    count = image.n_frames if image.format in ANIMATED else 1
    return range(1 if count > 1 and image.info.get("default_image") else 0, count)


def image_notes(path):
    """Lines for a program's start on what an image says of its values, a list."""
    with reading(path, "an image"):
        if is_tiff(path):
            return tiff_notes(path)
        with Image.open(path, formats=FORMATS) as image:
            return [PALETTE.format(path)] if image.mode in ("P", "PA") else []


def pages(path, channels):
    """Yields (frame, channels that the file stores) of one image file."""
    if is_tiff(path):
        yield from tiff_pages(path, channels)
        return
    with Image.open(path, formats=FORMATS) as image:
        check_size(path, *image.size)
        if image.format == "PNG" and image.mode != "I;16" and png_depth(path) == 16:
            yield deep_png(path, image, channels)
            return
        check_depth(path, image)
        for number in frame_numbers(image):
            image.seek(number)
            yield pillow_frame(path, image, channels)


def pillow_frame(path, image, channels):
    deep = image.mode[0] in "IF"
    stored = 1 if deep or image.mode in ("1", "L", "LA") else 3
    if deep and channels == 3:
        raise UserError(f"{path}: one channel of {image.mode}, but 3 are asked for; choose input_channels 1")
    picture = ImageOps.exif_transpose(image)
    if not deep:
        picture = picture.convert("L" if (channels or stored) == 1 else "RGB")
    frame = np.asarray(picture)
    return frame.reshape(*frame.shape[:2], -1), stored


def check_depth(path, image):
    """UserError where Pillow would make 8 bits of more."""
    arguments = str(image.tile[0][3]) if image.tile else ""
    if image.mode[0] not in "IF" and ";16" in arguments and image.format != "BMP":
        raise UserError(f"{path}: 16 bits per channel in a form that would lose 8 of them; write it as PNG or TIFF")
    if image.format == "PPM" and image.tile and image.tile[0][0].startswith("ppm"):
        highest = image.tile[0][3]
        highest = highest[-1] if isinstance(highest, tuple) else highest
        if isinstance(highest, int) and highest > 255 and (image.mode[0] not in "IF" or highest != 65535):
            raise UserError(
                f"{path}: values up to {highest}, which cannot be kept in this format; write it as PNG or TIFF"
            )


def png_depth(path):
    with open(path, "rb") as f:
        return f.read(25)[24]


def deep_png(path, image, channels):
    """A PNG of 16 bits per channel with colours or alpha, of which Pillow would make 8 bits."""
    if image.is_animated:
        raise UserError(f"{path}: an animation of 16 bits per channel; write its frames as images of their own")
    with av.open(f"file:{local_path(path)}", format="png_pipe", options={"protocol_whitelist": "file"}) as container:
        decoded = next(container.decode(video=0))
    grey = decoded.format.name.startswith("ya")
    frame = decoded.to_ndarray(format="gray16le" if grey else decoded.format.name, **ONE_THREAD)
    frame = frame.reshape(*frame.shape[:2], -1)[..., : 1 if grey else 3]  # without alpha
    return in_channels(path, oriented(frame, image.getexif().get(ORIENTATION, 1)), channels), frame.shape[2]


def in_channels(path, frame, channels):
    """A frame with the channels that are asked for. UserError: it would have to be made grey or coloured."""
    count = frame.shape[2]
    if channels not in (None, count):
        hint = f"choose input_channels {count}" if count in (1, 3) else "read it with dataset grid"
        raise UserError(f"{path}: {count} channels of {frame.dtype}, but {channels} are asked for; {hint}")
    return frame


def oriented(frame, orientation):
    """A frame turned and mirrored as the tag of TIFF and EXIF says, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        frame = frame.transpose(1, 0, *range(2, frame.ndim))
    across = orientation in (2, 3, 6, 7)
    down = orientation in (3, 4, 7, 8)
    frame = frame[:, ::-1] if across else frame
    return np.ascontiguousarray(frame[::-1] if down else frame)


# TIFF


def is_tiff(path):
    with open(path, "rb") as f:
        return f.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def full_pages(file, path):
    """The pages of a TIFF file that are no smaller copies of others. UserError: as of `refuse_mask`."""
    pages = [page for page in file.pages if not page.subfiletype & REDUCED]
    refuse_mask(file, path)  # behind the pages: where series are known, some pages would be read without their tags
    return pages


def refuse_mask(file, path):
    """UserError for a TIFF file whose missing pixels are named by a mask: a page of it, or a file beside it (GDAL)."""
    beside = Path(f"{path}.msk")
    if beside.exists() or any(series.keyframe.subfiletype & MASK for series in file.series):
        where = f"{beside.name} beside it" if beside.exists() else "one of its pages"
        raise UserError(f"{path}: {where} is a mask of missing pixels, which is not applied; write them as NaN, or as "
                        "the number of GDAL_NODATA (gdalwarp -dstnodata NUMBER)")  # fmt: skip


def tiff_pages(path, channels):
    """Yields (frame, stored channels) of the pages of a TIFF file. Reduced pages are left out."""
    with tifffile.TiffFile(path) as file:
        taken = full_pages(file, path)
        if not taken:
            raise UserError(f"{path}: a TIFF file without a page; fetch or write it again")
        if file.is_imagej and len(taken) == 1 and len(file.series) == 1 and file.series[0].ndim > taken[0].ndim:
            raise UserError(f"{path}: an ImageJ stack with one header for all pages; read it with dataset grid")
        leading = [(axis, size) for axis, size in zip(file.series[0].axes, file.series[0].shape)
                   if axis not in "YXS" and size > 1]  # fmt: skip
        if len(leading) > 1:
            axes = ", ".join(f"{axis} {size}" for axis, size in leading)
            raise UserError(f"{path}: its pages have the axes {axes}, of which one alone can be frames; read it with "
                            "dataset grid, and name its dimensions with array_axes, such as TCHW")  # fmt: skip
        for number, page in enumerate(taken):
            height, width = page.imagelength, page.imagewidth
            check_size(path, width, height)
            plain = page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
            missing = nodata_of(page, path)
            if not plain or page.axes not in ("YX", "YXS", "SYX"):
                # Palettes, inverted grey, other colour spaces: pictures of 8 bits, whose values are not the stored ones
                if page.dtype is None or page.dtype.itemsize > 1 or missing is not None:
                    holes = "" if missing is None else f" with missing values (GDAL_NODATA {missing:g})"
                    raise UserError(f"{path}: page {number} is {page.photometric.name} {page.axes} of "
                                    f"{page.dtype}{holes}; write it as grey or RGB")  # fmt: skip
                yield pillow_page(path, number, channels)
                continue
            try:
                frame = page.asarray()
            except (ValueError, ImportError) as error:
                if not lacks_package(error):
                    raise
                frame, stored = None, 0
                with suppress(OSError):  # a type that Pillow does not know
                    frame, stored = pillow_page(path, number, channels)
                kept = frame is not None and frame.dtype == (np.uint8 if page.dtype == bool else page.dtype)
                if not kept or missing is not None:
                    raise UserError(PACKED.format(path)) from error
                yield frame, stored
                continue
            frame = frame.transpose(1, 2, 0) if page.axes == "SYX" else frame
            frame = frame.reshape(height, width, -1)
            colours = frame.shape[2] - len(page.extrasamples)
            kept = [*range(colours), *(colours + i for i, kind in enumerate(page.extrasamples) if kind not in ALPHA)]
            frame = frame[..., kept] if len(kept) < frame.shape[2] else frame
            if frame.dtype.kind not in "buif":
                raise UserError(f"{path}: page {number} holds {frame.dtype}; real numbers are needed")
            if frame.dtype == bool:
                frame = frame.astype(np.uint8) * np.uint8(255)
                missing = missing and 255 * missing
            frame = with_holes(frame, missing)
            tag = page.tags.get(ORIENTATION)
            frame, stored = oriented(frame, tag.value if tag else 1), frame.shape[2]
            # Grey becomes colours and colours grey. Other bands have no such meaning, and in_channels refuses them.
            coloured = stored == 3 and page.photometric == tifffile.PHOTOMETRIC.RGB
            if frame.dtype == np.uint8 and channels and channels != stored and (coloured or stored == 1):
                picture = Image.fromarray(frame[..., 0] if stored == 1 else frame)
                frame = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
            yield in_channels(path, frame.reshape(*frame.shape[:2], -1), channels), stored


def nodata_of(page, path):
    """The stored number that means missing in a page of a TIFF file, by GDAL's tag; None: none, or NaN.

    UserError: the tag holds no number.
    """
    tag = page.tags.get(GDAL_NODATA)
    text = tag.value if tag else ""
    text = (text.decode("latin-1") if isinstance(text, bytes) else str(text)).strip(" \0")
    if not text:
        return None
    try:
        number = int(text) if re.fullmatch("[-+]?[0-9]+", text) else float(text)
    except ValueError:
        raise UserError(f"{path}: its tag GDAL_NODATA is {text[:40]!r}, no number; correct or remove it") from None
    return None if math.isnan(number) else number


def gdal_scales(page):
    """GDAL's scale and offset of a TIFF page's values: {"scale": "0.1", "offset": "5"}, or of two bands "0.1, 0.01"."""
    tag, found = page.tags.get(GDAL_METADATA), {}
    for role, text in re.findall(r'role="(scale|offset)"[^>]*>([^<]*)<', str(tag.value) if tag else ""):
        found[role] = f"{found[role]}, {text}" if role in found else text
    return found


def with_holes(frame, number):
    """A frame with NaN in place of a number; as it is if the number is None or its type has no such number."""
    if number is None:
        return frame
    whole = frame.dtype.kind in "iu"
    if whole and not np.iinfo(frame.dtype).min <= number <= np.iinfo(frame.dtype).max:
        return frame
    values = frame.astype(np.result_type(frame.dtype, np.float32) if whole else frame.dtype)
    values[equals(frame, number)] = np.nan
    return values


def tiff_notes(path):
    """The lines of `image_notes` for a TIFF file."""
    with tifffile.TiffFile(path) as file:
        if not (taken := full_pages(file, path)):
            return []
        missing, scales = nodata_of(taken[0], path), gdal_scales(taken[0])
    notes = [] if missing is None else [f"{path}: {missing:g} is read as missing, by its tag GDAL_NODATA"]
    said = ", ".join(f"{role} {text}" for role, text in scales.items())
    return notes + ([f"{path}: the file says {said}, which is not applied"] if said else [])


def lacks_package(error):
    """Whether tifffile reported that a page is compressed in a way that only the package imagecodecs unpacks."""
    return re.search("imagecodecs|'compression'", str(error)) is not None


def pillow_page(path, number, channels):
    """One page of a TIFF file as Pillow reads it. Reduced pages count for Pillow."""
    with Image.open(path, formats=("TIFF",)) as image:
        count = -1
        for index in range(image.n_frames):
            image.seek(index)
            count += not int(image.tag_v2.get(254, 0)) & REDUCED
            if count == number:
                return pillow_frame(path, image, channels)
    raise UserError(f"{path}: page {number} cannot be read; write it again")
