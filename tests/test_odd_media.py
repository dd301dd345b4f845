"""Videos and images as people have them: turned, deep, of many pages, hostile. Every value that is read is checked."""

import importlib.util
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
import tifffile
from helpers import ROOT, data_set, read_frames, shared, write_images, write_video
from PIL import Image

from vmrnn.config import Config
from vmrnn.data.arrays import find_axes
from vmrnn.data.grids import open_grid
from vmrnn.data.images import image_frames, image_notes, page_count
from vmrnn.data.inputs import open_input
from vmrnn.data.media import files_in
from vmrnn.data.prepare import GREY as GREY_WEIGHTS
from vmrnn.data.videos import frame_values, video_frames
from vmrnn.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 16, 20, 1), dtype=np.uint8)


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read_frames(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


# Orientation


def matrix_box(path, entries):
    """Writes the display matrix (a, b, c, d) into the track header of an MP4 file."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4
    assert content[at] == 0  # version: 32-bit times
    a, b, c, d = (round(entry * 65536) for entry in entries)
    content[at + 40 : at + 76] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "entries, turned",
    [
        ((1, 0, 0, 1), lambda f: f),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),  # the phone held upright
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2, (1, 2))),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),
        ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),
        ((1, 0, 0, -1), lambda f: f[:, ::-1]),
        ((0, 1, 1, 0), lambda f: f.transpose(0, 2, 1, 3)),
    ],
)
def test_videos_are_turned_as_their_display_matrix_says(tmp_path, entries, turned):
    path = tmp_path / "a.mp4"
    write_video(path, COLOUR, "mpeg4", "yuv420p")
    stored = read_frames(path)
    matrix_box(path, entries)
    assert np.array_equal(read_frames(path), turned(stored))


def test_a_video_at_another_angle_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", COLOUR, "mpeg4", "yuv420p")
    matrix_box(tmp_path / "a.mp4", (0.7, 0.7, -0.7, 0.7))
    assert "no multiple of 90 degrees" in refusal(tmp_path / "a.mp4")


def test_the_real_phone_video_stands_upright():
    """480x270 stored, 270x480 shown: turned by 90 degrees against the clock."""
    path = shared("media/nasa_13013_rotated.mp4")
    with av.open(str(path)) as container:
        stored = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.array_equal(read_frames(path), np.rot90(stored, 1, (1, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_photographs_are_turned_as_exif_says(tmp_path, orientation, ending):
    """Pillow's own transpositions are the oracle."""
    ways = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 4,
        7: 6,
        8: 2,
    }  # FLIP_LEFT_RIGHT 0, FLIP_TOP_BOTTOM 1, ROTATE_90 2, 180 3, 270 4 ...
    smooth = np.add.outer(np.arange(16) * 8, np.arange(20) * 5).astype(np.uint8)
    image = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / f"a.{ending}", exif=exif, **({"quality": 100} if ending == "jpg" else {}))
    expected = np.asarray(image.transpose(ways[orientation]) if orientation in ways else image)
    (frame,) = image_frames([tmp_path / f"a.{ending}"])
    assert frame.shape[:2] == expected.shape
    assert np.abs(frame[..., 0].astype(int) - expected).max() <= (2 if ending == "jpg" else 0)


# Order of frames


@pytest.mark.parametrize(
    "names",
    [
        ["0.05", "0.1", "0.15", "1.5", "10.25"],
        ["t=-2.5", "t=-1", "t=0", "t=0.5", "t=3"],
        ["-10", "-9", "0", "5"],
        ["x_1e-3", "x_5e-2", "x_1.5e+1"],
        ["2023-12-31", "2024-01-02", "2024-01-10", "2024-02-01"],
        ["frame-9", "frame-10", "frame-11"],
        ["v1.2.9", "v1.2.10", "v1.10.1"],
        ["clip.0009", "clip.0010"],
        ["1.1", "1.2", "1.9", "1.10", "1.11"],
        ["a9b", "a10b", "b1"],
        ["20180616T0006", "20180616T0012"],
    ],
    ids=lambda names: names[0],
)
def test_frames_come_in_the_order_of_their_numbers(tmp_path, names):
    for name in sorted(names):
        (tmp_path / f"{name}.png").write_bytes(b"")
    assert [path.name.removesuffix(".png") for path in files_in(tmp_path, (".png",))] == names


# Images of several pages


def test_all_pages_are_frames(tmp_path):
    images = [Image.fromarray(frame) for frame in COLOUR]
    tifffile.imwrite(tmp_path / "stack.tif", GREY[..., 0].astype(np.uint16) * 200)
    assert np.array_equal(read_frames(tmp_path / "stack.tif"), GREY.astype(np.uint16) * 200)
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True)
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:])
    for name in ("a.webp", "a.png"):
        assert np.array_equal(read_frames(tmp_path / name), COLOUR)


def test_a_picture_before_an_animation_is_no_frame(tmp_path):
    images = [Image.fromarray(frame) for frame in COLOUR]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], default_image=True)
    assert np.array_equal(read_frames(tmp_path / "a.png"), COLOUR[1:])
    assert page_count(tmp_path / "a.png") == len(COLOUR) - 1


@pytest.mark.parametrize(("name", "axes", "form"), [("a.tif", "TCYX", {"imagej": True}), ("a.ome.tif", "TCYX", {}),
                                                    ("a.tif", "QQYX", {})])  # fmt: skip
def test_pages_of_several_axes_are_not_one_clip(tmp_path, name, axes, form):
    pages = np.arange(3 * 2 * 16 * 20, dtype=np.uint16).reshape(3, 2, 16, 20)
    metadata = {} if axes == "QQYX" else {"axes": axes}
    tifffile.imwrite(tmp_path / name, pages, photometric="minisblack", metadata=metadata, **form)
    text = f"axes {axes[0]} 3, {axes[1]} 2, of which one alone can be frames; read it with dataset grid"
    assert text in refusal(tmp_path / name)
    frames = np.stack(list(open_grid(tmp_path / name, array_axes="TCHW").frames()))
    assert np.array_equal(frames, pages.transpose(0, 2, 3, 1))


def test_pages_of_a_pyramid_are_no_frames(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for frame in GREY[:3]:
            file.write(frame[..., 0], photometric="minisblack")
            file.write(frame[::2, ::2, 0], subfiletype=1, photometric="minisblack")
    assert np.array_equal(read_frames(tmp_path / "a.tif"), GREY[:3])


def test_the_real_stack_of_a_thousand_pages(tmp_path):
    path = shared("media/calcium_imaging.tif")
    frames = read_frames(path)
    assert frames.shape == (1000, 30, 40, 1) and np.array_equal(frames[..., 0], tifffile.imread(path))
    data = data_set("train", dataset="frames", train_data_dir=str(path), cache_dir=str(tmp_path), input_size=[30, 40])
    assert len(data.windows) == 800 - 19 and data.value_range.high == frames[:800].max()


def test_stacks_in_one_folder_are_clips_of_their_own(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        tifffile.imwrite(tmp_path / "data" / f"{i}.tif", GREY[..., 0] // 2 + np.uint8(100 * (i == 2)))
    options = dict(dataset="frames", train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"),
                   input_size=[16, 20], split_by="file", num_frames_input=2, num_frames_output=2)  # fmt: skip
    assert [len(data_set(split, **options).clips) for split in ("train", "valid", "test")] == [1, 1, 1]
    tifffile.imwrite(tmp_path / "data" / "3.tif", GREY[0, ..., 0])
    Image.fromarray(GREY[0, ..., 0]).save(tmp_path / "data" / "0.png")
    with pytest.raises(UserError, match="1.tif|0.tif"):
        data_set("train", **options)


def test_a_folder_of_gifs_of_one_frame_is_a_clip(tmp_path):
    write_images(tmp_path / "data", GREY, "{}.gif")
    options = dict(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), input_size=[16, 20],
                   num_frames_input=2, num_frames_output=2)  # fmt: skip
    assert len(data_set("train", dataset="frames", **options).clips) == 1
    with pytest.raises(UserError, match="one clip with dataset frames"):
        data_set("train", dataset="video", **options)
    images = [Image.fromarray(frame[..., 0]).convert("P", palette=Image.Palette.ADAPTIVE) for frame in GREY]
    for i, image in enumerate(images):
        image.save(tmp_path / "data" / f"{i + 1}.gif")
    assert any("palette" in note for note in data_set("train", dataset="frames", **options).notes)


# More than 8 bits


def write_png16(path, frame):
    """A PNG of 16 bits per channel, (H, W, 1 to 4), which Pillow cannot write."""
    height, width, channels = frame.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in frame)
    header = struct.pack(">2I5B", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    pieces = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(pieces))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_its_values(tmp_path, channels):
    frame = RNG.integers(0, 65536, (6, 9, channels)).astype(np.uint16)
    write_png16(tmp_path / "a.png", frame)
    (got,) = image_frames([tmp_path / "a.png"])
    assert got.dtype == np.uint16 and np.array_equal(got, frame[..., : 1 if channels < 3 else 3])


def test_the_real_16_bit_png():
    (frame,) = image_frames([shared("media/gradient_16bit.png")])
    assert (
        frame.dtype == np.uint16 and frame.shape == (48, 64, 3) and (frame % 257 > 0).any()
    )  # 257: what 8 bits would give


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_keeps_its_values(tmp_path, dtype, channels):
    values = (
        RNG.normal(size=(2, 6, 9, channels)) * 50 if "float" in dtype else RNG.integers(-100, 100, (2, 6, 9, channels))
    )
    values = values.astype(dtype) if dtype[0] != "u" else np.abs(values).astype(dtype) + np.iinfo(dtype).max // 2
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", values if channels == 3 else values[..., 0], photometric=photometric)
    got = read_frames(tmp_path / "a.tif")
    assert got.dtype == np.dtype(dtype) and np.array_equal(got, values)


@pytest.mark.parametrize(
    ("dtype", "number", "kept"), [("u1", "255", "f4"), ("i4", "-9999", "f8"), ("f4", "-3.4028234663852886e+38", "f4"),
                                  ("u1", "-9999", "u1"), ("f4", "nan", "f4")])  # fmt: skip
def test_the_missing_value_of_gdal_is_read_as_missing(tmp_path, dtype, number, kept):
    stored = np.arange(54).reshape(6, 9).astype(dtype)
    holes = kept != "u1" and number != "nan"
    if holes:
        stored[:2] = float(number)
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=[(42113, "s", 0, number, True)])
    (frame,) = image_frames([tmp_path / "a.tif"], 1)
    assert frame.dtype == np.dtype(kept) and np.isnan(frame[:2]).all() == holes
    assert np.array_equal(frame[2:, :, 0], stored[2:])
    assert any("GDAL_NODATA" in note for note in image_notes(tmp_path / "a.tif")) == (number != "nan")


@pytest.mark.parametrize("beside", [False, True])
def test_a_mask_of_missing_pixels_is_refused(tmp_path, beside):
    """As GDAL writes it, with GDAL_TIFF_INTERNAL_MASK and without."""
    path, values, known = tmp_path / "a.tif", GREY[0, ..., 0], COLOUR[0, ..., 0] > 99
    with tifffile.TiffWriter(path) as file:
        file.write(values, photometric="minisblack", metadata=None)
        if not beside:
            file.write(known, photometric="mask", subfiletype=4, metadata=None)
    if beside:
        tifffile.imwrite(f"{path}.msk", known.astype(np.uint8) * 255)
    for read in (page_count, image_notes, open_grid, lambda path: list(image_frames([path]))):
        with pytest.raises(UserError, match="is a mask of missing pixels.*gdalwarp"):
            read(path)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "int32", "float32"])
def test_a_tiff_that_pillow_unpacks_keeps_its_values(tmp_path, dtype):
    """tifffile leaves LZW to the package imagecodecs, which is not required."""
    values = (
        RNG.integers(0, 3, (16, 20)) * 127 if dtype in ("bool", "uint8") else RNG.normal(2e4, 4e3, (16, 20))
    ).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.tif", compression="tiff_lzw")
    (frame,) = image_frames([tmp_path / "a.tif"])
    stored = values.astype(np.uint8) * 255 if dtype == "bool" else values
    assert frame.dtype == stored.dtype and np.array_equal(frame[..., 0], stored)


def test_a_tiff_that_needs_a_package_names_it(tmp_path):
    """Pillow would read uint32 as int32, and the reader of gridded fields has no Pillow."""
    if importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((16, 20), np.int32)).save(path, compression="tiff_lzw")
    with pytest.raises(UserError, match="pip install imagecodecs"):
        list(open_grid(path).frames())
    signed, unsigned = (struct.pack("<HHII", 339, 3, 1, kind) for kind in (2, 1))
    content = path.read_bytes()
    assert signed in content
    path.write_bytes(content.replace(signed, unsigned))
    assert "pip install imagecodecs" in refusal(path)


def test_bands_of_a_tiff_are_no_transparency(tmp_path):
    """Only ExtraSamples of kinds 1 and 2 are."""
    values = RNG.integers(0, 256, (6, 9, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified", "unassalpha"])
    (frame,) = image_frames([tmp_path / "a.tif"])
    assert np.array_equal(frame, values[..., :4])
    for channels in (1, 3):
        assert "4 channels of uint8" in refusal(tmp_path / "a.tif", channels=channels)
    tifffile.imwrite(tmp_path / "a.tif", values[..., :3], photometric="minisblack", planarconfig="contig")
    (frame,) = image_frames([tmp_path / "a.tif"], 3)
    assert np.array_equal(frame, values[..., :3])
    assert "3 channels of uint8, but 1" in refusal(tmp_path / "a.tif", channels=1)


def test_what_cannot_be_kept_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "complex.tif", np.ones((6, 9), np.complex64))
    assert "complex64" in refusal(tmp_path / "complex.tif")
    (tmp_path / "deep.ppm").write_bytes(b"P6 2 2 65535\n" + RNG.bytes(24))
    assert "write it as PNG" in refusal(tmp_path / "deep.ppm")
    (tmp_path / "ten.pgm").write_bytes(b"P5 2 2 1023\n" + bytes(8))
    assert "up to 1023" in refusal(tmp_path / "ten.pgm")
    write_png16(tmp_path / "a.png", RNG.integers(0, 65536, (6, 9, 3)).astype(np.uint16))
    assert "input_channels 3" in refusal(tmp_path / "a.png", channels=1)


@pytest.mark.parametrize("pixels", ["gray10le", "gray16le", "gray", "gbrp10le", "gbrp16le"])
def test_deep_video_keeps_its_values(tmp_path, pixels):
    bits = 16 if "16" in pixels else 10 if "10" in pixels else 8
    shape = (5, 16, 20) if pixels.startswith("gray") else (5, 16, 20, 3)
    frames = RNG.integers(0, 2**bits, shape).astype(np.uint8 if bits == 8 else np.uint16)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 20, pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=pixels)))
        container.mux(stream.encode())
    got = read_frames(tmp_path / "a.mkv")
    assert got.dtype == frames.dtype and np.array_equal(got, frames.reshape(*got.shape))


def test_a_video_of_10_bits_has_more_than_256_levels(tmp_path):
    frames = np.repeat((np.arange(64 * 32) // 2).reshape(1, 32, 64).astype(np.uint16), 4, axis=0)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p10le"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray10le")))
        container.mux(stream.encode())
    got = read_frames(tmp_path / "a.mkv", channels=1)
    assert got.dtype == np.uint16 and len(np.unique(got)) > 512


def test_a_deep_frame_becomes_the_same_grey_every_time():
    """Several threads made eight pixels 32768 in one conversion of about 1,000."""
    values = RNG.integers(0, 65536, (30, 40, 3)).astype(np.uint16)
    frame = av.VideoFrame.from_ndarray(values, format="rgb48be")
    luma = values @ GREY_WEIGHTS
    worst = max(np.abs(frame_values(frame, 1)[..., 0] - luma).max() for _ in range(20_000))
    assert worst < 500  # of 65535


# Whole and cut-off videos


def test_deep_videos_of_different_depths_are_refused(tmp_path):
    """Grey of 10 bits keeps its numbers, YUV of 10 bits becomes 16 bits: the same grey would be 512 and 33,516."""
    (tmp_path / "data").mkdir()
    for name, pixels in (("a", "gray10le"), ("b", "yuv420p10le")):
        with av.open(str(tmp_path / "data" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 16, 16, pixels
            for number in range(8):
                frame = av.VideoFrame(16, 16, pixels)
                for plane in frame.planes:
                    plane.update(np.full(plane.buffer_size // 2, 512, np.uint16).tobytes())
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    options = dict(
        dataset="video", cache_dir=tmp_path / "cache", num_frames_input=2, num_frames_output=1, data_range=(0, 1023)
    )
    with pytest.raises(
        UserError, match="b.mkv: 16x16 uint16 of 16 bits, but a.mkv: 16x16 uint16 of 10 bits; make them alike"
    ):
        data_set("train", train_data_dir=tmp_path / "data", input_size=(16, 16), **options)
    assert len(data_set("train", train_data_dir=tmp_path / "data" / "a.mkv", input_size=(16, 16), **options))


def test_frames_that_an_edit_list_hides_are_not_missing():
    frames = read_frames(shared("media/discard_first_keyframe.mp4"))
    assert len(frames) == 25  # of 30 announced


def test_frames_that_are_announced_and_never_there_are_not_missing(tmp_path):
    write_video(tmp_path / "a.avi", COLOUR, "mpeg4", "yuv420p")
    content = bytearray((tmp_path / "a.avi").read_bytes())
    for at in (content.index(b"avih") + 24, content.index(b"strh") + 40):  # total frames of the file, of the stream
        assert struct.unpack_from("<I", content, at)[0] == 12
        struct.pack_into("<I", content, at, 500)
    (tmp_path / "a.avi").write_bytes(content)
    assert len(read_frames(tmp_path / "a.avi")) == 12


@pytest.mark.parametrize(
    "ending, codec", [("avi", "mpeg4"), ("mkv", "ffv1"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("gif", "gif")]
)
@pytest.mark.parametrize("kept", [0.4, 0.8, 0.97])
def test_a_video_that_ends_in_the_middle_is_refused(tmp_path, ending, codec, kept):
    path = tmp_path / f"a.{ending}"
    frames = RNG.integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    options = {"movflags": "faststart"} if ending == "mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = 32, 48
        stream.pix_fmt = {"ffv1": "bgr0", "gif": "rgb8"}.get(codec, "yuv420p")
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_frames(path)) == 40
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert any(word in refusal(path) for word in ("cut off", "damaged", "cannot be read"))


# Files from strangers


def test_no_program_is_started_and_no_address_opened(tmp_path):
    """PostScript under the name of an image, an address and a list of files under the names of videos."""
    (tmp_path / "0001.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print\n%%EOF\n")
    (tmp_path / "list.avi").write_text(f"ffconcat version 1.0\nfile {tmp_path}/secret.avi\n")
    (tmp_path / "playlist.ts").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    write_video(tmp_path / "secret.avi", COLOUR)
    for name in ("0001.png", "list.avi", "playlist.ts"):
        assert "cannot be read" in refusal(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        list(video_frames("http:localhost.avi"))
    code = (
        "import sys, subprocess, os\n"
        "def never(*a, **k): sys.exit('started a program')\n"
        "subprocess.Popen = subprocess.check_call = subprocess.run = os.system = never\n"
        "from vmrnn.data.images import image_frames\n"
        f"try: list(image_frames([{str(tmp_path / '0001.png')!r}]))\nexcept ValueError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bombs_are_refused_by_their_headers(tmp_path):
    side = struct.pack("<2H", 65535, 65535)
    gif = b"GIF89a" + side + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + side + b"\0\x02\x02L\x01\0;"
    (tmp_path / "a.gif").write_bytes(gif)
    assert "65535x65535" in refusal(tmp_path / "a.gif")
    with pytest.raises(UserError, match="65535x65535|4294836225 pixels"):
        list(image_frames([tmp_path / "a.gif"]))
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), np.uint8))
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for tag in (256, 257):  # width, length
        at = (
            content.index(struct.pack("<HH", tag, 3))
            if struct.pack("<HH", tag, 3) in content
            else content.index(struct.pack("<HH", tag, 4))
        )
        content[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 2**20)
    (tmp_path / "a.tif").write_bytes(content)
    assert "1048576x1048576" in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "shape",
    [
        "(2**70, 4, 4)",
        "(-3, 4, 4)",
        "(True, 4, 4)",
        "(10**12, 10**5, 10**5)",
        "(3, 4.0, 4)",
        "('a', 4, 4)",
        "4",
        "(3, 4, 4, 0)",
    ],
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_absurd_headers_of_arrays(tmp_path, shape, ending):
    for power, value in (("2**70", 2**70), ("10**12", 10**12), ("10**5", 10**5)):
        shape = shape.replace(power, str(value))
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    header = header.encode().ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(192)
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        path.write_bytes(content)
    else:
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
    refusal(path)
    with pytest.raises(UserError):
        data_set(
            "train", dataset="array", train_data_dir=str(path), cache_dir=str(tmp_path / "cache"), input_size=[8, 8]
        )


def test_a_zip_that_holds_more_or_less_than_its_header_says(tmp_path):
    import zipfile

    np.save(tmp_path / "a.npy", np.zeros((40, 8, 8), np.uint8))
    for name, content in (
        ("more", (tmp_path / "a.npy").read_bytes() + b"x"),
        ("less", (tmp_path / "a.npy").read_bytes()[:-1]),
    ):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", content)
        with pytest.raises(UserError, match="not as long as its header says"):
            data_set(
                "train", dataset="array", train_data_dir=str(path), cache_dir=str(tmp_path / "c"), input_size=[8, 8]
            )


def test_metadata_in_another_encoding(tmp_path):
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 20, "yuv420p"
        for frame in COLOUR:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.avi").read_bytes()
    assert b"TITLE" in content
    (tmp_path / "a.avi").write_bytes(content.replace(b"TITLE", b"T\xefT\xff\xfe"))
    assert len(read_frames(tmp_path / "a.avi")) == 12


# Arrays


@pytest.mark.parametrize(
    "shape, channels, axes",
    [
        ((40, 8, 10), 1, "THW"),
        ((40, 3, 8, 10), 3, "TCHW"),
        ((40, 8, 10, 3), 3, "THWC"),
        ((5, 40, 8, 10), 1, "NTHW"),
        ((40, 1, 8, 10), 1, "TCHW"),
        ((5, 40, 2, 8, 10), 2, "NTCHW"),
        ((5, 40, 8, 10, 2), 2, "NTHWC"),
    ],
)
def test_the_only_reading_that_fits_is_taken(tmp_path, shape, channels, axes):
    values = RNG.integers(0, 200, shape).astype(np.uint8)
    assert find_axes("a.npy", values, channels) == axes
    np.save(tmp_path / "a.npy", values)
    for named in ("", axes):
        data = data_set(
            "train", dataset="array", train_data_dir=str(tmp_path / "a.npy"), cache_dir=str(tmp_path / "cache"),
            input_size=[8, 10], input_channels=channels, num_frames_input=2, num_frames_output=1, array_axes=named,
            data_range=[0.0, 1.0],
        )  # fmt: skip
        order = [axes.index(axis) for axis in "NTCHW" if axis in axes]
        expected = values.transpose(order).reshape(-1, 40, channels, 8, 10)
        got = np.stack([data.clips[i].frames() for i in range(len(data.clips))]).transpose(0, 1, 4, 2, 3)
        assert np.array_equal(got, expected[:, :32])
        assert any(f"read as {', '.join(axes)}" in note for note in data.notes)


def test_axes_by_name_in_any_order(tmp_path):
    values = RNG.integers(0, 200, (8, 10, 3, 40)).astype(np.uint8)
    np.save(tmp_path / "a.npy", values)
    data = data_set(
        "train", dataset="array", train_data_dir=str(tmp_path / "a.npy"), cache_dir=str(tmp_path / "cache"),
        input_size=[8, 10], input_channels=3, num_frames_input=2, num_frames_output=1, array_axes="HWCT",
    )  # fmt: skip
    assert np.array_equal(data.clips[0].frames(), values.transpose(3, 0, 1, 2)[:32])


@pytest.mark.parametrize(
    "shape, channels, axes, says",
    [
        ((40, 5, 8, 5), 5, "", "may be TCHW or THWC; say which with array_axes"),
        ((40, 64, 64, 3), 1, "", "as THWC 3 channels, but input_channels is 1"),
        ((40, 8, 10, 2), 3, "", "as TCHW 8, as THWC 2 channels, but input_channels is 3.*array_axes"),
        ((40, 8, 10), 1, "TWHC", "3 axes, but array_axes is TWHC"),
        ((40, 8, 10, 2), 1, "THWC", "as THWC has 2 channels"),
        ((40, 8, 10, 2), 1, "THWW", "name each"),
    ],
)
def test_readings_that_do_not_fit_are_shown(shape, channels, axes, says):
    with pytest.raises(UserError, match=says):
        find_axes("a.npy", np.zeros(shape), channels, axes)


def test_objects_and_tables_name_the_way_out(tmp_path):
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros((3, 8, 8)), np.zeros((4, 8, 8))]
    np.save(tmp_path / "a.npy", ragged, allow_pickle=True)
    np.savez(tmp_path / "b.npz", ragged)
    np.save(tmp_path / "c.npy", np.zeros((4, 8, 8), [("rain", "f4")]))
    np.save(tmp_path / "d.npy", np.zeros((4, 8, 8), np.longdouble))
    wide = "float(96|128)" if np.dtype(np.longdouble).itemsize > 8 else "equal"
    for name, says in (("a.npy", "np.stack"), ("b.npz", "np.stack"), ("c.npy", "columns rain"), ("d.npy", wide)):
        with pytest.raises(UserError, match=says):
            data_set("train", dataset="array", train_data_dir=str(tmp_path / name), cache_dir=str(tmp_path / "c"))


# Folders


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    write_images(tmp_path / "elsewhere", GREY[:3])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clip").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    notes = []
    (tmp_path / "elsewhere" / "readme.txt").write_text("x")
    (tmp_path / "elsewhere" / "a.jp2").write_text("x")
    assert [path.name for path in files_in(tmp_path / "data", (".png",), notes)] == [
        "frame_1.png",
        "frame_2.png",
        "frame_3.png",
    ]
    (note,) = notes
    assert "2 files passed over" in note and ".txt 1" in note and ".jp2 1" in note
    write_images(tmp_path / "data", GREY[:2])
    assert open_input(tmp_path / "data", Config()).notes == [
        note,
        f"{tmp_path / 'data'}: 3 images in the folders below it are not read",
    ]


def test_a_tiff_file_without_a_page(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(8))
    assert "a TIFF file without a page" in refusal(tmp_path / "a.tif")
