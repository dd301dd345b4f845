"""No sequence of a video or of images crosses a gap in time, and a regular step can be taken from irregular frames."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images

import predict
from dataset import build_dataset
from vmrnn.checkpoint import save_weights
from vmrnn.config import Config
from vmrnn.data.inputs import open_input
from vmrnn.data.sources import Source
from vmrnn.data.times import (
    calendar_features,
    later_times,
    lead_names,
    parse_step,
    series_of_names,
    times_from_names,
    whole_months,
)
from vmrnn.errors import UserError
from vmrnn.network import build_model


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
        (["20240131_000", "20240131_001"], [0, 1]),  # a day and a counter
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


@pytest.mark.parametrize(
    ("first", "step", "months"),
    [("2019-12", "M", 1), ("2019-12", "3M", 3), ("2018", "Y", 12), ("2019-12-31", "D", 0), ("2019-12-01", "31D", 0)],
)
def test_months_alone_are_counted_in_months(first, step, months):
    times = (np.datetime64(first, step[-1]) + np.arange(4) * np.timedelta64(int(step[:-1] or 1), step[-1])).astype(
        "datetime64[s]"
    )
    seconds = times.astype(np.float64)
    assert whole_months(seconds, "standard")[0] == months and whole_months(seconds, "")[0] == 0
    names = {1: ["1 month", "2 months"], 3: ["3 months", "6 months"], 12: ["1 year", "2 years"]}
    if months:
        assert lead_names([1.0, 2.0], months) == names[months]


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
@pytest.mark.parametrize("place", ["first", "third day at six", "middle", "last day", "last day at six"])
def test_months_are_followed_by_months_in_every_calendar(calendar, place):
    """The year that follows has another February in the standard calendar."""
    cftime = pytest.importorskip("cftime")
    starts = [cftime.datetime(2019 + i // 12, i % 12 + 1, 1, calendar=calendar) for i in range(25)]
    edges = cftime.date2num(starts, "seconds since 1970-01-01", calendar=calendar).astype(float)
    into = {"first": 0, "third day at six": 54 * 3600, "middle": np.diff(edges) / 2, "last day": np.diff(edges) - 86400,
            "last day at six": np.diff(edges) - 64800}  # fmt: skip
    times = edges[:-1] + into[place]
    np.testing.assert_array_equal(later_times(times[:12], 12, calendar), times[12:])
    np.testing.assert_array_equal(later_times(times[:12:3], 4, calendar), times[12::3])
    np.testing.assert_array_equal(later_times(times[6:8], 12, calendar), times[8:20])  # both of 31 days
    days = edges[0] + 86400 * np.arange(20, 50)  # over the end of a month
    np.testing.assert_array_equal(later_times(days[:15], 15, calendar), days[15:])


@pytest.mark.parametrize(
    ("calendar", "year", "days"),
    [("", 2019, 365), ("", 2020, 366), ("standard", 2020, 366), ("noleap", 2020, 365), ("360_day", 2020, 360),
     ("all_leap", 2019, 366)],
)  # fmt: skip
def test_hour_and_day_turn_once_in_a_day_and_in_a_year(calendar, year, days):
    """The ninth day of January at 15:45:36, and the last day but one of the year at six; "": numpy's dates."""
    last = (12, 29 if calendar == "360_day" else 30)
    if calendar:
        cftime = pytest.importorskip("cftime")
        places = ((1, 9, 15, 45, 36), (*last, 6, 0, 0))
        dates = [cftime.datetime(year, *place, calendar=calendar) for place in places]
    else:
        dates = np.array([f"{year}-01-09T15:45:36", f"{year}-12-30T06:00:00"], "datetime64[ns]")
    hours = np.array([(15 + 45 / 60 + 36 / 3600) / 24, 0.25])
    turns = np.array([8 + hours[0], days - 2 + hours[1]]) / days
    angles = 2 * np.pi * np.stack((hours, turns))
    expected = 0.5 + 0.5 * np.stack(
        (np.sin(angles[0]), np.cos(angles[0]), np.sin(angles[1]), np.cos(angles[1])), axis=1
    )
    np.testing.assert_allclose(calendar_features(dates), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "begin"),
    [
        (["camA_000", "camA_001", "camB_000", "camB_001", "camB_002"], [0, 2]),
        (["camA_000", "camA_001", "camB_002", "camB_003"], [0, 2]),
        (["video1_frame8", "video1_frame9", "video2_frame1", "video2_frame2"], [0, 2]),
        (["camA_20240101_2350", "camA_20240102_0000", "camB_20240101_2350", "camB_20240102_0000"], [0, 2]),
        (["20240101_000", "20240101_001", "20240101_002", "20240102_000", "20240102_001"], [0, 3]),
        (["000_1", "000_2", "001_1"], [0, 2]),  # not 000_1, then 000_2 and 001_1
        # One series each
        (["20231231_2350", "20240101_0000", "20240101_0010"], [0]),
        (["0.05", "0.1", "0.15", "1.5", "10.25"], [0]),
        (["1.1", "1.2", "1.9", "1.10"], [0]),
        (["frame_1_1706659200", "frame_2_1706659210", "frame_3_1706659220"], [0]),
        (["sun", "mon", "tue"], [0]),
        (["a_1", "b_1", "c_1"], [0]),
        (["radar_1", "radar_2_v2", "radar_3"], [0]),
    ],
)
def test_series_of_names(names, begin):
    assert [start for start, _ in series_of_names([f"{name}.png" for name in names])] == begin


def test_two_cameras_in_one_folder_are_two_clips(tmp_path):
    write_images(tmp_path / "x" / "clip", grey_levels(5), "camA_{}.png")
    write_images(tmp_path / "x" / "clip", grey_levels(10)[5:], "camB_{}.png")
    found, notes = sequences(tmp_path / "x", tmp_path, dataset="frames")
    assert found == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7], [6, 7, 8], [7, 8, 9]]
    assert any("2 series, which begin at camA_1.png, camB_1.png; each is a clip" in note for note in notes)
    assert not any("gap" in note for note in notes)
    source = open_input(tmp_path / "x" / "clip", Config(input_channels=1))
    assert len(list(source.sequences[0].frames())) == 5 and "only the 5 images of the last series" in source.notes[0]
    assert len(list(open_input(tmp_path / "x" / "clip", Config(), whole=True).sequences[0].frames())) == 10


def test_names_without_times_are_said(tmp_path):
    write_images(tmp_path / "x" / "clip", grey_levels(8), "radar_20240101_00{}0.png")
    for number in (4, 6):
        (tmp_path / "x" / "clip" / f"radar_20240101_00{number}0.png").unlink()
    folder = tmp_path / "x" / "clip"
    assert any("gaps in time" in note for note in sequences(tmp_path / "x", tmp_path, dataset="frames")[1])
    (folder / "radar_20240101_0020.png").rename(folder / "radar_20240101_0020_v2.png")
    for notes in (
        sequences(tmp_path / "x", tmp_path, dataset="frames")[1],
        open_input(folder, Config(input_channels=1)).notes,
    ):
        assert any("no times: 1 of 6 names hold none, such as radar_20240101_0020_v2.png" in note for note in notes)


def test_series_that_lie_between_one_another_are_refused(tmp_path):
    for name in ("left", "right"):
        write_images(tmp_path / "x", grey_levels(6), "{}_" + name + ".png")
    with pytest.raises(UserError, match="1_left.png and 1_right.png have the same number"):
        sequences(tmp_path / "x", tmp_path, dataset="frames")
    with pytest.raises(UserError, match="1_left.png and 1_right.png have the same number"):
        open_input(tmp_path / "x", Config(input_channels=1))
    for names in (["t=-1", "t=0", "t=1"], ["0.05", "0.5"], ["a", "b", "c"]):
        source = Source("x", tuple(Path(f"{name}.png") for name in names), video=False)
        assert source.series() == [source]


def test_clips_of_different_steps_are_said(tmp_path):
    (tmp_path / "x").mkdir()
    for name, step in (("a", 100), ("b", 104), ("c", 20)):
        write_timed_video(tmp_path / "x" / f"{name}.mkv", range(0, 6 * step, step))
    notes = sequences(tmp_path / "x", tmp_path, dataset="video")[1]
    assert any("different steps: b.mkv every 0.104 s, c.mkv every 0.02 s" in note for note in notes)
    (tmp_path / "x" / "c.mkv").unlink()
    assert not any("steps" in note for note in sequences(tmp_path / "x", tmp_path, dataset="video")[1])


def test_a_video_of_another_frame_rate_is_said(tmp_path, caplog):
    """Its forecast reaches less far than that of the training."""
    for name, step in (("a", 100), ("b", 50)):
        write_timed_video(tmp_path / f"{name}.mkv", range(0, 40 * step, step))
    options = Config(
        dataset="video", train_data_dir=str(tmp_path / "a.mkv"), cache_dir=str(tmp_path / "cache"), input_size=[16],
        num_frames_input=2, num_frames_output=1, model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4,
    )  # fmt: skip
    trained = build_dataset("train", options).value_range
    other = replace(options, test_data_dir=str(tmp_path / "b.mkv"))
    line = "frames are 0.05 s apart, but were 0.1 s apart in the training"
    assert any(line in note for note in build_dataset("test", other, trained).notes)
    for same in (options, replace(other, frame_step=2)):
        assert not any("in the training:" in note for note in build_dataset("test", same, trained).notes)
    save_weights(tmp_path / "w.safetensors", build_model(**options.network_options), options.to_dict(), trained)
    forecast = ["--checkpoint", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "x.npy"), "--device", "cpu"]
    caplog.set_level("INFO", "vmrnn")
    for name in "ab":
        caplog.clear()
        predict.main([*forecast, "--input", str(tmp_path / f"{name}.mkv")])
        assert (line in caplog.text) == (name == "b")
    caplog.clear()
    predict.main([*forecast, "--input", str(tmp_path / "b.mkv"), "--frame_step", "2"])
    assert "in the training" not in caplog.text


@pytest.mark.parametrize("time_step", ["", "0.2s"])
def test_only_the_frames_after_the_last_gap_of_a_video_are_continued(tmp_path, time_step):
    write_timed_video(tmp_path / "a.mkv", [0, 100, 200, 90000, 90100, 90200, 90300])
    options = Config(input_channels=1, time_step=time_step)
    source = open_input(tmp_path / "a.mkv", options)
    levels = [int(frame[0, 0, 0]) // 10 for frame in source.sequences[0].frames()]
    assert levels == ([3, 4, 5, 6] if not time_step else [3, 5])
    assert source.notes == [f"1 gap in time: only the {len(levels)} frames after the last are used"]
    assert source.sequences[0].count == len(levels)
    assert len(list(open_input(tmp_path / "a.mkv", options, whole=True).sequences[0].frames())) > len(levels)
