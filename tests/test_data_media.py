"""Reading videos, images and arrays: what was written comes back, and what is broken says so in one line."""

import numpy as np
import pytest
from helpers import read_frames, shared, write_images, write_video

from vmrnn.data.arrays import npz_member, open_npy
from vmrnn.data.images import image_frames
from vmrnn.data.media import files_in
from vmrnn.data.videos import video_frames
from vmrnn.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 16, 20, 1), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 16, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize("frames", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("ending", [".avi", ".mkv"])
def test_video_comes_back_exactly(tmp_path, frames, ending):
    write_video(tmp_path / f"a{ending}", frames)
    assert np.array_equal(read_frames(tmp_path / f"a{ending}"), frames)


def test_images_come_back_in_the_order_of_their_numbers(tmp_path):
    write_images(tmp_path, COLOUR)  # frame_1 ... frame_12: frame_10 sorts before frame_2 as text
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert np.array_equal(read_frames(tmp_path), COLOUR)


def test_deep_images_keep_their_type(tmp_path):
    deep = (GREY.astype(np.uint16) * 257)[:2]
    write_images(tmp_path, deep)
    frames = read_frames(tmp_path)
    assert frames.dtype == np.uint16 and np.array_equal(frames, deep)


def test_arrays_come_back_with_a_channel_axis(tmp_path):
    values = RNG.normal(size=(4, 5, 6))
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "b.npz", time=np.arange(4), rain=values)
    np.savez(tmp_path / "c.npz", one=values, two=COLOUR)
    assert isinstance(open_npy(tmp_path / "a.npy"), np.memmap)
    for frames in (
        read_frames(tmp_path / "a.npy"),
        read_frames(tmp_path / "b.npz"),
        read_frames(tmp_path / "c.npz", array_key="one"),
    ):
        assert np.array_equal(frames, values[..., None])
    assert np.array_equal(read_frames(tmp_path / "c.npz", array_key="two", input_channels=3), COLOUR)
    assert npz_member(tmp_path / "b.npz") == ("rain", (4, 5, 6), np.float64)


def test_grey_of_colour_and_colour_of_grey(tmp_path):
    write_images(tmp_path / "grey", GREY)
    write_video(tmp_path / "grey.avi", GREY)
    as_colour = np.repeat(GREY, 3, -1)
    assert np.array_equal(list(image_frames(files_in(tmp_path, (".png",)), 3)), as_colour)
    assert np.array_equal(list(video_frames(tmp_path / "grey.avi", 3)), as_colour)
    write_images(tmp_path / "colour", as_colour)
    assert np.array_equal(list(image_frames(files_in(tmp_path / "colour", (".png",)), 1)), GREY)


def test_the_original_kth_and_colour_clips():
    frames = read_frames(shared("kth/person01_handclapping_d1_uncomp.avi"))
    assert frames.shape == (378, 120, 160, 3) and frames.dtype == np.uint8
    assert np.ptp(frames.astype(int), axis=-1).max() <= 1  # grey, stored as colour
    assert read_frames(shared("clips/test_example.avi")).shape == (75, 32, 32, 3)


# What is broken


def half_a_video(folder):
    write_video(folder / "whole.avi", COLOUR, "mpeg4", "yuv420p")
    content = (folder / "whole.avi").read_bytes()
    (folder / "bad.avi").write_bytes(content[: len(content) // 2])


def damaged_video(folder):
    write_video(folder / "whole.avi", COLOUR, "mpeg4", "yuv420p")
    content = bytearray((folder / "whole.avi").read_bytes())
    at = content.index(b"movi") + 1000  # where the frames are
    content[at : at + 200] = RNG.bytes(200)
    (folder / "bad.avi").write_bytes(content)


def images_of_two(first, second):
    def write(folder):
        write_images(folder / "bad", first[:2], "a{}.png")
        write_images(folder / "bad", second[:2], "b{}.png")

    return write


def half_an_image(folder):
    write_images(folder / "bad", GREY[:3])
    content = (folder / "bad" / "frame_2.png").read_bytes()
    (folder / "bad" / "frame_2.png").write_bytes(content[: len(content) // 2])


def half_an_npz(folder):
    np.savez_compressed(folder / "whole.npz", a=RNG.normal(size=(4, 5, 6)))
    content = (folder / "whole.npz").read_bytes()
    (folder / "bad.npz").write_bytes(content[: len(content) // 2])


def npz_under_the_name_of_npy(folder):
    with open(folder / "bad.npy", "wb") as f:
        np.savez(f, a=GREY)


@pytest.mark.parametrize(
    "name, write, says",
    [
        ("bad.avi", half_a_video, "damaged|cut off|cannot be read"),
        ("bad.avi", damaged_video, "damaged|cannot be read"),
        ("bad.avi", lambda folder: (folder / "bad.avi").write_text("no video " * 99), "cannot be read as a video"),
        ("bad.mp4", lambda folder: (folder / "bad.mp4").write_bytes(b""), "cannot be read as a video"),
        ("bad.avi", lambda folder: None, "no such file"),
        ("bad.txt", lambda folder: (folder / "bad.txt").write_text("x"), "its name does not end"),
        ("bad", lambda folder: (folder / "bad").mkdir(), "no images"),
        ("bad/b1.png", images_of_two(GREY, GREY[:, :8]), "8x20 .* after 16x20"),
        ("bad/b1.png", images_of_two(GREY, COLOUR), "3 channels after .* 1 channels"),
        ("bad/frame_2.png", half_an_image, "cannot be read as an image"),
        ("bad.npz", half_an_npz, "not a whole"),
        ("bad.npz", lambda folder: (folder / "bad.npz").write_text("x"), "not a whole"),
        ("bad.npz", lambda folder: np.savez(folder / "bad.npz", a=GREY, b=GREY), "a .*, b .*array_key"),
        ("bad.npz", lambda folder: np.savez(folder / "bad.npz", a=np.arange(3)), "array_key"),
        ("bad.npy", lambda folder: (folder / "bad.npy").write_text("x" * 200), "not a whole"),
        ("bad.npy", npz_under_the_name_of_npy, "npz"),
        ("bad.npy", lambda folder: np.save(folder / "bad.npy", np.arange(3)), r"\(3,\)"),
    ],
)
def test_broken_files_say_so_in_one_line(tmp_path, name, write, says):
    write(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        read_frames(tmp_path / name.split("/")[0])
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_an_array_that_is_not_there(tmp_path):
    np.savez(tmp_path / "a.npz", rain=GREY)
    with pytest.raises(UserError, match="no array 'snow'.*rain"):
        read_frames(tmp_path / "a.npz", array_key="snow")


def test_one_of_several_arrays_is_not_taken_without_a_word(tmp_path):
    np.savez(tmp_path / "a.npz", GREY, GREY[::-1], np.arange(3))
    with pytest.raises(UserError, match=r"holds arr_0 \(.*arr_1 \(.*name the array of frames with array_key"):
        read_frames(tmp_path / "a.npz")
    assert np.array_equal(read_frames(tmp_path / "a.npz", array_key="arr_1"), GREY[::-1])


def test_a_half_written_kth_clip(tmp_path):
    content = shared("kth/person01_jogging_d1_uncomp.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"half\.avi: (frame \d+ is damaged|cut off)"):
        read_frames(tmp_path / "half.avi")
