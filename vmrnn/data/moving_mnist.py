"""Moving MNIST: digits, sequences generated from them, and the sequences of a test file."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import Dataset

from vmrnn.data.arrays import read_array
from vmrnn.data.cache import identity
from vmrnn.data.draws import split_key, split_seed, uniform_draws
from vmrnn.data.fetch import STANDARD, fetch_mnist, fetch_standard
from vmrnn.data.prepare import resize
from vmrnn.errors import UserError
from vmrnn.values import ValueRange


def moving_mnist(split, options, value_range=None):
    """The data set of one split; a row of vmrnn.data.table.

    Training draws new sequences in each epoch. Validation, and the test unless test_data_dir names a file or is
    `standard`, are the same sequences in every epoch, of digits that training does not use.
    """
    lengths = options.num_frames_input, options.num_frames_output
    if split == "test" and options.test_data_dir:
        path = options.test_data_dir
        data = MovingMNISTFile(fetch_standard() if path == STANDARD else path, *lengths, options.array_key)
        height, width = data.frames.shape[2:]
        if (height, width) != options.frame_size:
            raise UserError(
                f"{data.path}: frames of {height}x{width}, but input_size is "
                f"{options.frame_size[0]}x{options.frame_size[1]}; name another file or input_size"
            )
        return data
    digits = select_digits(load_digits(options.train_data_dir), split, options.digits_split)
    return MovingMNIST(
        digits, getattr(options, f"{split}_sequences"), *lengths, options.frame_size, options.num_objects,
        options.digit_size, options.step_length, split_seed(split, options.seed), same_every_epoch=split != "train",
    )  # fmt: skip


# Digits


def load_digits(source, download_dir="data"):
    """Handwritten digits as uint8 (n, h, w): 0 is the background, 255 is full ink.

    source         path of an idx3 file, plain or gzipped
                   "mnist": 60,000 digits of 28x28, fetched into download_dir once
                   "builtin": 1,797 digits of 8x8 that come with scikit-learn; needs no network
    download_dir   folder for "mnist"

    UserError: a missing, damaged or foreign file, or a download that failed.
    """
    if source == "builtin":
        from sklearn.datasets import load_digits as sklearn_digits

        return np.rint(sklearn_digits().images * (255 / 16)).astype(np.uint8)
    if source == "mnist":
        source = fetch_mnist(download_dir)
    return read_idx3(source)


def read_idx3(path):
    """The images of an idx3 file, plain or gzipped, as uint8 (n, h, w)."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name an idx3 file of digits, or use `mnist` or `builtin`") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name an idx3 file, or set dataset for other data"
        ) from error
    if raw[:2] == b"\x1f\x8b":  # by content, not by name: browsers unpack and keep the .gz
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 16:
        raise UserError(f"{path}: {len(raw)} bytes are too few for an idx3 file; fetch it again")
    magic, count, rows, cols = (int(n) for n in np.frombuffer(raw, ">u4", 4))
    if magic == 2049:
        raise UserError(f"{path}: holds labels; name the file of images (...-images-idx3-ubyte)")
    if magic != 2051:
        raise UserError(f"{path}: not an idx3 file of images (magic {magic}, not 2051)")
    if count * rows * cols == 0:
        raise UserError(f"{path}: holds no pixels ({count} images of {rows}x{cols}); fetch it again")
    if len(raw) - 16 != count * rows * cols:
        raise UserError(
            f"{path}: {len(raw) - 16} bytes of pixels, but its header says {count} images of "
            f"{rows}x{cols} = {count * rows * cols}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, rows, cols)


def select_digits(digits, split, scheme="all"):
    """The digits of one split: those of training, or the held-out ones that valid and test share.

    scheme   "all": the first 50,000 of 60,000 train, the other 10,000 are held out; fewer digits are cut at 5/6 as well
             "published": 0-9,999 train, 10,000-12,999 are held out
    """
    if scheme == "published":
        cut, end = 10_000, 13_000
    else:
        end = min(len(digits), 60_000)
        cut = end * 5 // 6
    if end > len(digits) or cut == 0:
        raise UserError(
            f"digits_split {scheme} needs at least {13_000 if scheme == 'published' else 2} "
            f"digits and there are {len(digits)}; choose more digits or another digits_split"
        )
    return digits[:cut] if split == "train" else digits[cut:end]


def resize_digits(digits, size):
    """Digits (n, h, w) as uint8 (n, size, size), bilinear; antialiased if they shrink."""
    if digits.shape[1:] == (size, size):
        return np.ascontiguousarray(digits)
    resized = np.empty((len(digits), size, size), np.uint8)
    for i in range(0, len(digits), 4096):  # 60,000 digits at once would take 190 MB as floats
        some = resize(digits[i : i + 4096, None], (size, size))
        resized[i : i + 4096] = some[:, 0].round_().clamp_(0, 255).numpy()
    return resized


# Data sets


class MovingMNIST(Dataset):
    """Generated sequences of bouncing digits. An item is (inputs, targets), float32 (T, 1, H, W) in [0, 1].

    digits              uint8 (n, h, w); resized once to digit_size x digit_size
    length              sequences per epoch
    num_frames_input    frames of the inputs
    num_frames_output   frames of the targets
    canvas              (H, W)
    num_objects         digits per sequence
    digit_size          side of a digit, pixels
    step_length         how far a digit moves per frame, as a fraction of the free canvas
    seed                of the random draws; different seeds give independent sequences
    same_every_epoch    True: the epoch of the key is ignored, as validation needs it

    A key is an index or (epoch, index).
    UserError: digits that are larger than the canvas.
    """

    notes = ()  # nothing to say of how the data were read

    def __init__(
        self,
        digits,
        length,
        num_frames_input=10,
        num_frames_output=10,
        canvas=(64, 64),
        num_objects=2,
        digit_size=28,
        step_length=0.1,
        seed=0,
        same_every_epoch=False,
    ):
        if digit_size > min(canvas):
            raise UserError(
                f"Moving MNIST: digits of {digit_size} pixels do not fit a canvas of "
                f"{canvas[0]}x{canvas[1]}; choose a smaller digit_size or larger frames"
            )
        self.value_range = ValueRange()  # the values are in [0, 1] from the start
        self.digits = resize_digits(digits, digit_size)
        self.length = length
        self.num_frames_input = num_frames_input
        self.num_frames_output = num_frames_output
        self.canvas = tuple(canvas)
        self.num_objects = num_objects
        self.step_length = step_length
        self.seed = seed
        self.same_every_epoch = same_every_epoch

    def __len__(self):
        return self.length

    def __str__(self):
        frames = f"{self.num_frames_input}+{self.num_frames_output} frames"
        return (
            f"{self.length} generated sequences of {frames}, {self.canvas[0]}x{self.canvas[1]}, {self.num_objects} "
            f"digit{'s' * (self.num_objects > 1)} each, drawn from {len(self.digits)}, seed {self.seed}"
        )

    @property
    def identity(self):
        """A checksum of the digits."""
        return hashlib.sha256(self.digits.tobytes()).hexdigest()

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a batch of keys, a list. The loader asks for whole batches by this name."""
        epochs, indices = np.array([split_key(key) for key in keys], np.int64).T
        if indices.min() < 0 or indices.max() >= self.length:
            raise IndexError(f"sample {indices} of a data set of {self.length}")
        if self.same_every_epoch:
            epochs = np.zeros_like(epochs)
        frames = self.render(*self.trajectories(epochs, indices))
        return as_items(frames, self.num_frames_input, self.num_frames_output)

    def trajectories(self, epochs, indices):
        """Numbers of the digits (B, K), and the pixel (x, y) of their corners (B, T, K, 2)."""
        height, width = self.canvas
        size = self.digits.shape[1]
        draws = uniform_draws(self.seed, epochs, indices, 4 * self.num_objects)
        draws = draws.reshape(len(indices), self.num_objects, 4)  # digit, x, y, direction
        which = (draws[..., 0] * len(self.digits)).astype(np.int64)
        position = draws[..., 1:3].copy()
        angle = draws[..., 3] * (2 * np.pi)
        step = self.step_length * np.stack((np.cos(angle), np.sin(angle)), axis=-1)
        total = self.num_frames_input + self.num_frames_output
        corners = np.empty((len(indices), total, self.num_objects, 2), np.int64)
        for t in range(total):
            position += step  # before the first frame as well: the published generator moves, then draws
            step = np.where((position <= 0) | (position >= 1), -step, step)
            np.clip(position, 0, 1, out=position)
            corners[:, t] = position * (width - size, height - size)  # rounds down
        return which, corners

    def render(self, which, corners):
        """Frames uint8 (B, T, H, W): the digits at their corners, overlaid by maximum."""
        size = self.digits.shape[1]
        batch, total = corners.shape[:2]
        frames = np.zeros((batch, total, *self.canvas), np.uint8)
        # The view holds every place that a digit can take, so that one indexed assignment draws all frames.
        places = sliding_window_view(frames, (size, size), axis=(2, 3), writeable=True)
        for k in range(self.num_objects):
            x, y = corners[:, :, k, 0], corners[:, :, k, 1]
            at = (np.arange(batch)[:, None], np.arange(total), y, x)
            digit = self.digits[which[:, k], None]  # (B, 1, size, size)
            places[at] = digit if k == 0 else np.maximum(places[at], digit)
        return frames


class MovingMNISTFile(Dataset):
    """The sequences of a test file. An item is (inputs, targets), float32 (T, 1, H, W) in [0, 1].

    path                .npy (opened memory-mapped) or .npz, uint8 (frames, sequences, H, W), as in mnist_test_seq.npy
    num_frames_input    frames of the inputs: the first ones of a sequence
    num_frames_output   frames of the targets: those that follow
    array_key           as in arrays.npz_member

    A key is an index or (epoch, index).
    UserError: a missing, damaged or foreign file, too few frames, or sequences before frames.
    """

    notes = ()  # nothing to say of how the data were read

    def __init__(self, path, num_frames_input=10, num_frames_output=10, array_key=""):
        self.path, self.array_key = path, array_key
        self.value_range = ValueRange()
        self.num_frames_input = num_frames_input
        self.num_frames_output = num_frames_output
        self.frames = open_sequences(path, array_key)
        check_order(path, self.frames)
        total = num_frames_input + num_frames_output
        if len(self.frames) < total:
            raise UserError(
                f"{path}: sequences of {len(self.frames)} frames, but {num_frames_input} input + "
                f"{num_frames_output} output frames need {total}; ask for fewer"
            )

    def __len__(self):
        return self.frames.shape[1]

    def __str__(self):
        total, count, height, width = self.frames.shape
        return (
            f"{count} sequences of {self.path}, {self.num_frames_input}+{self.num_frames_output} "
            f"of {total} frames, {height}x{width}"
        )

    def __getstate__(self):
        # A pickled memory map is a full copy. Workers started by spawn open the file themselves instead.
        return self.__dict__ | {"frames": None}

    def __setstate__(self, state):
        self.__dict__.update(state, frames=open_sequences(state["path"], state["array_key"]))

    @property
    def identity(self):
        """A checksum of the file."""
        return identity(self.path)[1]

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a batch of keys, a list. The loader asks for whole batches by this name."""
        indices = np.array([split_key(key)[1] for key in keys])
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"sample {indices} of a data set of {len(self)}")
        total = self.num_frames_input + self.num_frames_output
        frames = np.ascontiguousarray(self.frames[:total, indices].swapaxes(0, 1))
        return as_items(frames, self.num_frames_input, self.num_frames_output)


def open_sequences(path, array_key):
    """The uint8 array (frames, sequences, H, W) of a .npy or .npz file."""
    frames = read_array(path, array_key)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.size == 0:
        raise UserError(
            f"{path}: holds {frames.dtype} {frames.shape}; it must hold uint8 (frames, sequences, height, width)"
        )
    return frames


def check_order(path, frames):
    """UserError: the first axis counts sequences and the second one frames, as in torchvision's MovingMNIST.

    path     of the file, for messages
    frames   uint8 (frames, sequences, H, W)

    The shape does not tell, so a sample of frames is read. Neighbours in time are alike, neighbouring sequences are
    not: in the test sequences of Moving MNIST the mean absolute difference in time is 0.7 times that between sequences.
    """
    if min(frames.shape[:2]) < 2:
        return
    t, n = (np.linspace(0, count - 2, min(count - 1, 16)).round().astype(np.int64) for count in frames.shape[:2])
    here = frames[np.ix_(t, n)].astype(np.float32)
    along_first, along_second = (abs(frames[np.ix_(*places)] - here).mean() for places in ((t + 1, n), (t, n + 1)))
    if along_second < 0.85 * along_first:
        raise UserError(
            f"{path}: its shape {frames.shape} must be (frames, sequences, height, width), but frames that follow one "
            "another lie along the second axis; write np.swapaxes(a, 0, 1) instead"
        )


def as_items(frames, num_frames_input, num_frames_output):
    """uint8 frames (B, T, H, W) as a list of B items (inputs, targets), each float32 (T, 1, H, W) in [0, 1]."""
    # numpy converts and divides in one pass, and starts no threads that would compete with the model's.
    values = torch.from_numpy(np.divide(frames, np.float32(255), dtype=np.float32))
    inputs, targets = values.unsqueeze(2).split((num_frames_input, num_frames_output), dim=1)
    return list(zip(inputs, targets, strict=True))
