"""Colours of fields: what a reader of the scale would say of a pixel is its value."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from vmrnn import config as configuration
from vmrnn.colours import MISSING_FIELD, RAIN_COLOURS, Look, rain_edges, shrunk
from vmrnn.data.times import lead_names
from vmrnn.errors import UserError
from vmrnn.pictures import frame_names
from vmrnn.values import ValueRange


def rain(**options):
    """(the Look of 4 frames of rain from 0 to 60 mm/h, these frames on the scale [0, 1])."""
    value_range = ValueRange(0.0, 60.0, names=("rain rate",), units=("mm/h",), **options)
    frames = np.linspace(0, 60, 4 * 30 * 40, dtype=np.float32).reshape(4, 1, 30, 40)
    unit = value_range.to_unit(frames.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return Look.of(configuration.Config(dataset="grid"), value_range, [unit]), unit, frames


@pytest.mark.parametrize("options", [{}, {"transform": "log", "zero_below": 0.1}])
def test_a_class_of_rain_has_the_values_between_its_edges(options):
    look, unit, frames = rain(**options)
    assert look.edges == (0.2, 0.5, 1, 2, 5, 10, 20, 50) and look.label == "rain rate [mm/h]"
    unit[0, 0, 0, 0] = np.nan
    painted = look.paint(look.values(unit))
    np.testing.assert_array_equal(painted[0, 0, 0], np.float32(MISSING_FIELD))
    for value, colour in ((0.15, 0), (0.3, 1), (7.0, 5), (30.0, 7), (55.0, 8)):
        place = np.unravel_index(np.abs(frames - value).argmin(), frames.shape)
        assert to_hex(painted[place[0], place[2], place[3]]) == RAIN_COLOURS[colour], value
    colours, ticks = look.scale()
    assert [to_hex(colour) for colour in colours] == list(RAIN_COLOURS)
    assert ticks[0] == (pytest.approx(1 / 9), "0.2") and ticks[-1] == (pytest.approx(8 / 9), "50")


def test_edges_are_round_numbers_up_to_the_largest():
    assert rain_edges(60.0)[-1] == 50 and rain_edges(4.9)[-1] == 2 and rain_edges(0.005)[-1] == 0.005
    assert all(edges == sorted(edges) and len(edges) == 8 for edges in ([*rain_edges(x)] for x in (0.0, 0.3, 1e6)))


@pytest.mark.parametrize(
    "dataset, options, name, unit, colours",
    [
        ("grid", {}, "t2m", "K", "viridis"),
        ("grid", {}, "precipitation", "kg m-2", "rain"),
        ("array", {}, "", "", "viridis"),
        ("array", {"transform": "log", "zero_below": 0.1}, "", "", "rain"),
        ("array", {"input_channels": 3}, "", "", "grey"),
        ("video", {}, "", "", "grey"),
        ("moving_mnist", {}, "", "", "grey"),
    ],
)
def test_which_colours_data_have(dataset, options, name, unit, colours):
    config = configuration.Config(dataset=dataset, **options)
    value_range = ValueRange(0.0, 9.0, names=(name,) * bool(name), units=(unit,) * bool(unit))
    frames = [np.random.default_rng(0).random((2, config.input_channels, 8, 8), dtype=np.float32)]
    look = Look.of(config, value_range, frames)
    assert look.colours == colours
    if look.colours == "viridis":
        assert 8.5 < look.high <= 9.0 and 0 <= look.low < 0.5  # in the units of the data
    assert Look.of(config, value_range, frames, "magma").colours == "magma"
    with pytest.raises(UserError, match="--colours ugly: choose auto, grey, rain or"):
        Look.of(config, value_range, frames, "ugly")


def test_large_frames_become_means_of_what_is_known():
    values = np.arange(2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7, 1)
    values[0, 0, 0] = values[1, 4, 6] = np.nan
    small = shrunk(values, 4)
    assert small.shape == (2, 3, 4, 1) and shrunk(values, 7) is values
    assert small[0, 0, 0, 0] == np.float32(16 / 3) and small[1, 0, 1, 0] == values[1, :2, 2:4].mean()
    assert small[0, 2, 3, 0] == values[0, 4, 6, 0] and np.isnan(small[1, 2, 3, 0])


def test_lead_times_have_one_unit():
    assert lead_names([600.0 * step for step in (1, 3, 6, 12)]) == ["10 min", "30 min", "60 min", "120 min"]
    assert lead_names([21600.0, 86400.0]) == ["6 h", "24 h"]
    assert frame_names(3, ["10 min", "20 min"]) == (["-20 min", "-10 min", "0 min"], ["+10 min", "+20 min"])
    assert frame_names(2, ["1", "2", "3"]) == (["-1", "0"], ["+1", "+2", "+3"])
