"""The best possible forecast of Moving MNIST."""

import numpy as np
import pytest

from benchmarks import limit
from vmrnn.data.moving_mnist import MovingMNIST, load_digits


def sequences(count, **options):
    sizes = {"num_frames_input": 3, "num_frames_output": 2, "canvas": (20, 20), "digit_size": 14, "num_objects": 1}
    return MovingMNIST(load_digits("builtin"), count, **sizes | options)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(limit, "DIRECTIONS", 2048)
    monkeypatch.setattr(limit, "POSITIONS", 256)


def test_possible_paths_are_those_that_the_generator_draws(monkeypatch):
    """Against rejection: of many generated sequences those that begin at the same pixels."""
    monkeypatch.setattr(limit, "SAMPLES", 4000)
    data = sequences(400_000, step_length=0.3)
    corners = data.trajectories(np.zeros(len(data), np.int64), np.arange(len(data)))[1][:, :, 0]
    places, which, counts = np.unique(corners[:, :3], axis=0, return_inverse=True, return_counts=True)
    paths, generator = limit.Paths(data), np.random.default_rng(0)
    for place in np.argsort(counts)[-2:]:
        drawn = corners[which.ravel() == place, 3:].reshape(-1, 4)
        possible = limit.possible_corners(paths, places[place], generator).reshape(-1, 4)
        names = np.unique(np.concatenate((drawn, possible)), axis=0)
        shares = [[(found == name).all(1).mean() for name in names] for found in (drawn, possible)]
        assert np.abs(np.subtract(*shares)).sum() / 2 < (len(names) / min(len(drawn), 4000)) ** 0.5


def test_shifts_are_found():
    frames = np.random.default_rng(0).random((5, 16, 16))
    frames[:, :6], frames[:, :, :6], frames[:, -6:], frames[:, :, -6:] = 0, 0, 0, 0
    shifts = np.array([(0, 0), (5, -5), (-3, 1), (0, 4), (-5, 5)])
    moved = np.stack([np.roll(frame, shift, (0, 1)) for frame, shift in zip(frames, shifts)])
    np.testing.assert_array_equal(limit.nearest_shifts(frames, moved), shifts)


def test_the_least_error():
    generator = np.random.default_rng(0)
    assert limit.least_errors(sequences(4, step_length=0), generator) == pytest.approx(0, abs=1e-20)  # nothing moves
    data = sequences(40, canvas=(32, 32), num_objects=2)
    least = limit.least_errors(data, generator)
    frames = np.stack([np.concatenate(data[i])[:, 0] for i in range(len(data))])
    moved = ((frames[:, 3:] - frames[:, 2:3]) ** 2).sum((2, 3))
    assert 0 < least.mean() < moved.mean() / 2 and least[:, 0].mean() < least[:, 1].mean()
