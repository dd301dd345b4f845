"""Windows: the sequences of fixed length that are cut from clips, and the data set of them."""

import hashlib
import json
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from vmrnn.data.cache import identity
from vmrnn.data.draws import split_key, uniform_draws
from vmrnn.data.prepare import Preparation
from vmrnn.errors import UserError
from vmrnn.motion import Motion, flow_between

PLACES = 16  # largest number of places that are tried for a random crop
FLOWS = 512  # flows that a data set remembers, of half a MB each or less


def cut_windows(clips, total, strides=None):
    """Windows of `total` frames as (number of the clip, first frame), int64 (n, 2). No window crosses a clip.

    strides   per clip, the frames from one window to the next; None: 1

    The last window of a clip ends with the clip's last frame.
    """
    windows = [np.empty((0, 2), np.int64)]
    for i, clip in enumerate(clips):
        starts = np.arange(len(clip) - total, -1, -(strides[i] if strides else 1))[::-1]
        windows.append(np.stack((np.full_like(starts, i), starts), axis=1))
    return np.concatenate(windows)


def thin(windows, length):
    """At most `length` windows, evenly spaced over all."""
    if length >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, length).round().astype(np.int64)]


def crop_start(room, draw=0.5):
    """The first row or column of a crop, an int or int64 array.

    room   rows or columns of the frame that the crop leaves out, 0 or more
    draw   number from 0 to below 1: 0 is the first place, 0.5 the centre
    """
    return np.minimum((np.asarray(draw) * (np.asarray(room) + 1)).astype(np.int64), room)


class ClipDataset(Dataset):
    """Windows of clips. An item is (inputs, targets), float32 (T, C, H, W); a missing value is NaN.

    clips               list of Clip whose frames (H, W, C) have one shape and type
    windows             int64 (n, 2) from `cut_windows`
    num_frames_input    frames of the inputs
    num_frames_output   frames of the targets
    size                (H, W) of the items
    value_range         ValueRange that scales the stored values to [0, 1]; values outside it lie outside
    frame_fit           "resize": frames of another size are resized
                        "crop": a rectangle of the frame, at a random place (random=True) or at the centre
    random              False: item i is window i
                        True: an epoch draws `length` windows without replacement, and each epoch draws anew.
                        With cropping, `length` may exceed the number of windows; they are then repeated.
    length              items per epoch if `random`; None: as many as there are windows
    seed                of the random draws
    notes               lines that say how the data were read, for a program's start
    calendar            float32 (frames of the clips' file, K): channels in [0, 1] that are the same for all pixels of a
                        frame, behind the others; None: there are none
    moved_channels      number of leading channels whose motion forecast is appended behind all other channels; 0: none.
                        Input frame t gets the forecast of frame t + 1. Target frame t gets the forecast of frame t + 1
                        from the last input. The last target gets zeros

    A key is an index or (epoch, index). An item depends on seed and key only.
    UserError: frames too small to be cropped.
    """

    def __init__(self, clips, windows, num_frames_input, num_frames_output, size, value_range, frame_fit="resize",
                 random=False, length=None, seed=0, notes=(), calendar=None, moved_channels=0):  # fmt: skip
        self.clips = clips
        self.windows = windows
        self.num_frames_input = num_frames_input
        self.num_frames_output = num_frames_output
        self.size = tuple(size)
        self.value_range = value_range
        self.frame_fit = frame_fit
        self.random = random
        self.length = len(windows)
        if random and length:
            self.length = length if frame_fit == "crop" else min(length, len(windows))
        self.seed = seed
        self.notes = notes
        self.calendar = calendar
        self.moved_channels = moved_channels
        self.flows = {}  # the last flows of `flow`, by clip and number of the frame
        self.order = None  # (epoch, its windows in order)
        if frame_fit == "crop":
            height, width = clips[0].frames().shape[1:3]
            if height < size[0] or width < size[1]:
                raise UserError(
                    f"{clips[0].name}: frames of {height}x{width} cannot be cropped to {size[0]}x{size[1]}; "
                    "choose a smaller input_size or frame_fit resize"
                )

    def __len__(self):
        return self.length

    def __str__(self):
        clips = f"{len(self.clips)} clips ({self.clips[0].name}, ...)"
        if len(self.clips) == 1:
            clips = f"one clip ({self.clips[0].name})"
        return (
            f"{self.length} sequences of {self.num_frames_input}+{self.num_frames_output} frames, of "
            f"{len(self.windows)} in {clips}, {self.size[0]}x{self.size[1]}, values {self.value_range}"
        )

    @property
    def identity(self):
        """A checksum of the frames. It is the same for equal data wherever they lie."""
        paths = list(dict.fromkeys(clip.path for clip in self.clips))
        numbers = {path: i for i, path in enumerate(paths)}
        clips = [[numbers[c.path], c.index, c.start, c.stop, c.step, c.axes] for c in self.clips]
        facts = json.dumps([[identity(path) for path in paths], clips]).encode()
        return hashlib.sha256(facts + self.windows.tobytes()).hexdigest()

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a batch of keys, a list. The loader asks for whole batches by this name."""
        return [self.item(*split_key(key)) for key in keys]

    def item(self, epoch, index):
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of a data set of {self.length}")
        total = self.num_frames_input + self.num_frames_output
        clip, first = self.windows[self.epoch_order(epoch)[index] if self.random else index]
        frames = self.clips[clip].frames()[first : first + total]
        whole, place = frames, None
        if self.frame_fit == "crop":
            place = self.place(frames, epoch, index)
            frames = frames[:, *place]
        values = Preparation(frames.shape[-1], self.value_range, self.size).unit(frames)
        if self.calendar is not None:
            numbers = self.clips[clip].start + self.clips[clip].step * np.arange(first, first + total)
            waves = torch.from_numpy(self.calendar[numbers])[:, :, None, None].expand(-1, -1, *self.size)
            values = torch.cat((values, waves), dim=1)
        if self.moved_channels:
            shown = whole if place else values
            values = torch.cat((values, self.moved(shown, self.clips[clip], first, place)), dim=1)
        return values[: self.num_frames_input], values[self.num_frames_input :]

    def moved(self, frames, clip, first, place):
        """The moved channels of an item, (T, C, H, W) at its place.

        frames   the frames of the item: as stored, (T, H, W, C), with a place; else as tensor (T, C, H, W) of an item
        clip     Clip that they are of
        first    number of the first one in the clip
        place    (rows, columns) of the item, slices; None: all
        """
        if place:  # what moves into the item comes from outside of it
            inputs = Preparation(frames.shape[-1], self.value_range, None).unit(frames[: self.num_frames_input])
        else:
            inputs = frames[: self.num_frames_input]
        inputs = inputs[:, : self.moved_channels].numpy()
        numbers = iter(range(first, first + len(inputs)))
        stream = Motion(self.value_range, lambda before, after: self.flow(clip, next(numbers), before, after))
        moved = []
        for t, frame in enumerate(inputs):
            stream.observe(frame)
            moved.append(stream.forecast(1 if t + 1 < len(inputs) else self.num_frames_output, place))
        moved.append(np.zeros_like(moved[0]))
        return torch.from_numpy(np.concatenate(moved))

    def flow(self, clip, number, before, after):
        """The Flow from a frame of a clip to the next one. It is remembered: most frames are in many windows.

        clip            Clip
        number          of the first frame, in the clip
        before, after   both frames, (C, H, W) on the scale [0, 1]
        """
        key = clip, number
        if key not in self.flows:
            if len(self.flows) >= FLOWS:
                self.flows.pop(next(iter(self.flows)))
            self.flows[key] = flow_between(before.mean(0), after.mean(0))
        return self.flows[key]

    def place(self, frames, epoch, index):
        """The rectangle of frames (T, H, W, C) that an item shows, as slices (rows, columns).

        In training, up to PLACES places are drawn, and the first one is taken at which at most half of the first frame
        is missing. If there is none, the place with the fewest missing pixels is taken. Missing pixels teach nothing,
        and most of a radar map is often missing.
        """
        room = np.array(frames.shape[1:3]) - self.size
        draws = uniform_draws(self.seed, [epoch], [index], 2 * PLACES).reshape(-1, 2) if self.random else [[0.5, 0.5]]
        fewest = None
        for y, x in crop_start(room, draws):
            place = slice(y, y + self.size[0]), slice(x, x + self.size[1])
            missing = self.value_range.is_missing(frames[0, *place]).mean() if self.random else 0
            if fewest is None or missing < fewest:
                chosen, fewest = place, missing
            if fewest <= 0.5:
                break
        return chosen

    def epoch_order(self, epoch):
        """The windows of an epoch in its order, int64 (length,)."""
        if self.order is None or self.order[0] != epoch:
            generator = np.random.default_rng((self.seed % 2**64, epoch, 1))
            rounds = math.ceil(self.length / len(self.windows))
            orders = [generator.permutation(len(self.windows)) for _ in range(rounds)]
            self.order = epoch, np.concatenate(orders)[: self.length]
        return self.order[1]
