"""The best possible forecast of Moving MNIST: how small the MSE can be, whatever the network.

    python -m benchmarks.limit --digits mnist
    python -m benchmarks.limit --digits mnist --num_objects 1
    python -m benchmarks.limit --digits mnist --num_objects 1 --checkpoint Pretrained/one_digit_small.safetensors

Digits are drawn at whole pixels, but they move on the real line. The given frames leave several positions and
directions possible, and so several forecasts. The forecast with the least expected MSE is the mean of all of them. It
is computed here for the test sequences of `python test.py`, with everything known but the real positions and
directions: the digits, the pixels where they were drawn in the given frames, and the rules of their motion. It cannot
be beaten, except by chance.

A grid of directions and of first positions stands for all of them. A grid twice as fine changed the figures by less
than a twentieth.

--checkpoint, with one digit: what the first forecast frame of a network knows. The true frame is the last given frame,
shifted by whole pixels. The forecast is compared with every such shift.
"""

import argparse

import numpy as np
import torch

from dataset import build_dataset
from vmrnn import config as configuration
from vmrnn.checkpoint import load_network
from vmrnn.errors import UserError
from vmrnn.progress import counted
from vmrnn.rollout import rollout
from vmrnn.runtime import run_program

DIRECTIONS, POSITIONS = 8192, 1024  # of the grid; a quarter turn must be a whole number of directions
SAMPLES = 1024  # of the possible forecasts of a sequence
REACH = 5  # pixels: digits of 28 on 64x64 move by less than 4 per frame


class Paths:
    """All paths of one coordinate of one digit on a grid, and those that fit what was seen.

    data   MovingMNIST with a square canvas

    pixels[d, p, t] is the pixel at frame t of a digit that starts at position p and moves by the cosine of direction d.
    """

    def __init__(self, data):
        self.given = data.num_frames_input
        free = data.canvas[0] - data.digits.shape[1]
        total = self.given + data.num_frames_output
        angle = 2 * np.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
        step = np.repeat(data.step_length * np.cos(angle)[:, None], POSITIONS, axis=1)
        position = np.repeat((np.arange(POSITIONS) + 0.5)[None] / POSITIONS, DIRECTIONS, axis=0)
        self.pixels = np.empty((DIRECTIONS, POSITIONS, total), np.int8)
        for t in range(total):  # as MovingMNIST.trajectories
            position += step
            step = np.where((position <= 0) | (position >= 1), -step, step)
            np.clip(position, 0, 1, out=position)
            self.pixels[..., t] = position * free
        # One number stands for the pixels of all given frames, so that a path is found by a binary search.
        self.powers = (free + 1) ** np.arange(self.given, dtype=np.int64)
        keys = sum(power * self.pixels[..., t].ravel() for t, power in enumerate(self.powers))
        self.order = np.argsort(keys)
        self.keys = keys[self.order]

    def fitting(self, seen):
        """(directions, positions) of the paths that pass the pixels `seen`, (given,)."""
        first, last = (np.searchsorted(self.keys, seen @ self.powers, side) for side in ("left", "right"))
        return np.divmod(self.order[first:last], POSITIONS)


def possible_corners(paths, seen, generator):
    """Pixels of the frames to forecast, (SAMPLES, frames, 2), each as probable as any other.

    paths       Paths
    seen        pixels (x, y) of a digit in the given frames, (given, 2)
    generator   numpy.random.Generator

    A direction of x is a quarter turn ahead of that of y, since sin(a) = cos(a - pi / 2).
    """
    x, y = (paths.fitting(seen[:, axis]) for axis in (0, 1))
    y = (y[0] + DIRECTIONS // 4) % DIRECTIONS, y[1]
    # A direction is as probable as it has pairs of positions.
    pairs = np.bincount(x[0], minlength=DIRECTIONS) * np.bincount(y[0], minlength=DIRECTIONS)
    if not pairs.any():
        raise ValueError("no path on the grid fits: it is too coarse")
    found = np.empty((SAMPLES, paths.pixels.shape[2] - paths.given, 2), np.int64)
    for i, direction in enumerate(generator.choice(DIRECTIONS, SAMPLES, p=pairs / pairs.sum())):
        along_x, along_y = (generator.choice(a[1][a[0] == direction]) for a in (x, y))
        found[i, :, 0] = paths.pixels[direction, along_x, paths.given :]
        found[i, :, 1] = paths.pixels[(direction - DIRECTIONS // 4) % DIRECTIONS, along_y, paths.given :]
    return found


def least_errors(data, generator):
    """Squared error of the best forecast of each sequence and frame, summed over pixels, (sequences, frames)."""
    paths, errors = Paths(data), []
    for index in counted(range(len(data)), "best forecasts", "sequence"):
        which, corners = data.trajectories(np.array([0]), np.array([index]))
        truth = data.render(which, corners)[0, data.num_frames_input :] / 255
        seen = corners[0, : data.num_frames_input]
        possible = np.stack([possible_corners(paths, seen[:, k], generator) for k in range(data.num_objects)], axis=2)
        frames = data.render(np.repeat(which, SAMPLES, axis=0), possible)
        errors.append(((frames.mean(0) / 255 - truth) ** 2).sum((1, 2)))
    return np.array(errors)


def nearest_shifts(last, frames):
    """The shift of the last given frame that is nearest to a frame, as (rows, columns), int (sequences, 2).

    last, frames   (sequences, H, W)
    """
    height, width = last.shape[1:]
    around = np.pad(last, ((0, 0), (REACH, REACH), (REACH, REACH)))
    shifts = [(y, x) for y in range(-REACH, REACH + 1) for x in range(-REACH, REACH + 1)]
    distances = [((around[:, REACH - y : REACH - y + height, REACH - x : REACH - x + width] - frames) ** 2).sum((1, 2))
                 for y, x in shifts]  # fmt: skip
    return np.array(shifts)[np.argmin(distances, axis=0)]


def first_frames(checkpoint, data):
    """Print how often the first forecast frame of a network is nearest to the right shift, and its MSE."""
    model = load_network(checkpoint).model
    inputs, targets = (np.stack(part) for part in zip(*data.__getitems__(range(len(data)))))
    with torch.inference_mode():
        forecast = [rollout(model, part, 1)[:, -1, 0] for part in torch.from_numpy(inputs).split(20)]
    forecast, truth, last = torch.cat(forecast).numpy(), targets[:, 0, 0], inputs[:, -1, 0]
    errors = ((forecast - truth) ** 2).sum((1, 2))
    right = nearest_shifts(last, truth)
    off = np.abs(nearest_shifts(last, forecast) - right).max(1)
    changed = np.abs(nearest_shifts(inputs[:, -2, 0], last) - right).max(1)
    print(f"first frame of {checkpoint}: MSE {errors.mean():.2f}")
    for name, pixels in ("the forecast's shift is off by", off), ("the true shift changes by", changed):
        for label, where in ("0 pixels", pixels == 0), ("1 pixel", pixels == 1), ("more", pixels > 1):
            mse = errors[where].mean() if where.any() else np.nan
            print(f"  {name} {label}: {100 * where.mean():.1f} %, MSE {mse:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="mnist", help="as train.py's --train_data_dir")
    parser.add_argument("--num_objects", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--checkpoint", help="a network whose first forecast frame is looked at")
    args = parser.parse_args()
    if args.checkpoint and args.num_objects != 1:
        raise UserError("--checkpoint: the shifts of several digits are not compared; add --num_objects 1")
    options = {"train_data_dir": args.digits, "num_objects": args.num_objects, "test_sequences": args.sequences}
    data = build_dataset("test", configuration.resolve(None, options))
    if args.checkpoint:
        first_frames(args.checkpoint, data)
        return
    errors = least_errors(data, np.random.default_rng(0))
    spread = errors.mean(1).std() / len(errors) ** 0.5
    print(f"{data}")
    print(f"least MSE {errors.mean():.2f} +- {spread:.2f}; by frame " + " ".join(f"{e:.1f}" for e in errors.mean(0)))


if __name__ == "__main__":
    run_program(main)
