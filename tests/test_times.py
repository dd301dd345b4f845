"""No sequence of a video or of images crosses a gap in time, and a regular step can be taken from irregular frames."""

from fractions import Fraction

import numpy as np
import pytest
from helpers import write_images

from dataset import build_dataset
from vmrnn.config import Config
from vmrnn.data.times import later_times, parse_step, times_from_names
from vmrnn.errors import UserError


def grey_levels(count):
    """Frames of one grey level each, ten times the number of the frame."""
    return np.broadcast_to(10 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 16, 16, 1))


def write_timed_video(path, milliseconds):
    """A lossless video whose frames are shown at these times."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=1000)
        stream.height = stream.width = 16
        stream.pix_fmt, stream.time_base = "gray", Fraction(1, 1000)
        for frame, time in zip(grey_levels(len(milliseconds)), milliseconds):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[..., 0]), format="gray")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def sequences(path, tmp_path, **changes):
    """(numbers of the frames of each training sequence, notes)."""
    given = {"num_frames_input": 2, "num_frames_output": 1, "input_size": [16, 16], "valid_fraction": 0.0,
             "test_fraction": 0.0, "cache_dir": str(tmp_path / "cache"), "train_data_dir": str(path)}  # fmt: skip
    data = build_dataset("train", Config(**given | changes))
    items = (data[i] for i in range(len(data)))
    found = sorted([round(float(frame[0, 0, 0]) * 25.5) for part in item for frame in part] for item in items)
    return found, data.notes


def test_a_video_with_a_varying_frame_rate_is_noticed(tmp_path):
    times = [0, 100, 200, 310, 400, 1000, 1100, 1210]
    write_timed_video(tmp_path / "a.mkv", times)
    found, notes = sequences(tmp_path / "a.mkv", tmp_path, dataset="video")
    assert found == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7]]
    assert any("frame rate varies: frames are 0.09 to 0.6 s apart" in note for note in notes)
    assert any("1 gap in time" in note and "costs 2 sequences" in note for note in notes)
    found, notes = sequences(tmp_path / "a.mkv", tmp_path, dataset="video", time_step="0.2s")
    assert found == [[0, 2, 4]]  # of 0, 0.2 and 0.4 s; 1.0 and 1.2 s alone are too short
    with pytest.raises(UserError, match="time_step is 0.05 s, but the frames are 0.1 s apart"):
        sequences(tmp_path / "a.mkv", tmp_path, dataset="video", time_step="0.05s")


def test_images_with_missing_numbers_are_parted_and_others_are_not(tmp_path):
    write_images(tmp_path / "numbers" / "clip", grey_levels(8), "frame_{}.png")
    for missing in (4, 5):
        (tmp_path / "numbers" / "clip" / f"frame_{missing}.png").unlink()
    with pytest.raises(UserError, match="time_step 2s: the frames have no dates"):
        sequences(tmp_path / "numbers", tmp_path, dataset="frames", time_step="2s")
    assert sequences(tmp_path / "numbers", tmp_path, dataset="frames", time_step="2", num_frames_input=1)[0] == [[0, 2]]
    found, notes = sequences(tmp_path / "numbers", tmp_path, dataset="frames")
    assert found == [[0, 1, 2], [5, 6, 7]] and any("1 gap in time" in note for note in notes)
    for number in (6, 7, 8):  # the same images under other names have no gap
        (tmp_path / "numbers" / "clip" / f"frame_{number}.png").rename(
            tmp_path / "numbers" / "clip" / f"frame_{number - 2}.png"
        )
    found, notes = sequences(tmp_path / "numbers", tmp_path, dataset="frames")
    assert len(found) == 4 and not any("gap" in note for note in notes)
    folder = tmp_path / "dates" / "clip"
    write_images(folder, grey_levels(5), "{}.png")
    for i, name in enumerate(["20231231_2350", "20240101_0000", "20240101_0010", "20240101_0020", "20240101_0030"], 1):
        (folder / f"{i}.png").rename(folder / f"radar_{name}_v2.png")
    found, notes = sequences(tmp_path / "dates", tmp_path, dataset="frames")
    assert len(found) == 3 and not any("gap" in note for note in notes)
    found, _ = sequences(tmp_path / "dates", tmp_path, dataset="frames", time_step="20min")
    assert found == [[0, 2, 4]]


@pytest.mark.parametrize(
    ("names", "times"),
    [
        (["a_9", "a_10", "a_12"], [9, 10, 12]),
        (["20240131", "20240201"], [1706659200, 1706745600]),
        (["2024-01-31 2355", "2024-02-01 0000"], [1706745300, 1706745600]),
        (["0.05", "0.1", "0.15"], None),
        (["a", "b"], None),
        (["a_1_2", "a_3"], None),
    ],
)
def test_times_from_names(names, times):
    found = times_from_names([f"{name}.png" for name in names])
    assert found is None if times is None else list(found) == times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10min", 600), ("10 minutes", 600), ("1 hour", 3600), ("2d", 172800), ("0.2s", 0.2), ("3", 3)],
)
def test_a_time_step_in_every_unit_and_without_one(text, seconds):
    assert parse_step(text) == seconds


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
@pytest.mark.parametrize("place", ["first", "third day at six", "middle", "last day"])
def test_months_are_followed_by_months_in_every_calendar(calendar, place):
    """The year that follows has another February in the standard calendar."""
    cftime = pytest.importorskip("cftime")
    starts = [cftime.datetime(2019 + i // 12, i % 12 + 1, 1, calendar=calendar) for i in range(25)]
    edges = cftime.date2num(starts, "seconds since 1970-01-01", calendar=calendar).astype(float)
    into = {"first": 0, "third day at six": 54 * 3600, "middle": np.diff(edges) / 2, "last day": np.diff(edges) - 86400}
    times = edges[:-1] + into[place]
    np.testing.assert_array_equal(later_times(times[:12], 12, calendar), times[12:])
    np.testing.assert_array_equal(later_times(times[:12:3], 4, calendar), times[12::3])
    np.testing.assert_array_equal(later_times(times[6:8], 12, calendar), times[8:20])  # both of 31 days
    days = edges[0] + 86400 * np.arange(20, 50)  # over the end of a month
    np.testing.assert_array_equal(later_times(days[:15], 15, calendar), days[15:])
