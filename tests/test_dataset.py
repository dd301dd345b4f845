"""Moving MNIST and the loader: random draws, motion of the digits, files, samplers."""

import functools
import gc
import gzip
import hashlib
import http.server
import pickle
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, batches, data_set, idx3, shared
from hypothesis import given, settings, strategies as st

import dataset
from dataset import make_loader
from vmrnn.data.draws import split_seed, splitmix64, uniform_draws
from vmrnn.data.moving_mnist import MovingMNIST, MovingMNISTFile, load_digits, resize_digits, select_digits
from vmrnn.data.table import DATASETS
from vmrnn.errors import UserError
from vmrnn.metrics import METRICS, Metrics


@functools.cache
def builtin():
    return load_digits("builtin")


def small(**changes):
    options = dict(length=23, canvas=(20, 28), digit_size=9, num_frames_input=3, num_frames_output=4)
    return MovingMNIST(builtin(), **(options | changes))


# Draws and order


def test_item_contract():
    """float32 (T, C, H, W), inputs then targets, for generated sequences and for a file."""
    inputs, targets = small()[4]
    assert inputs.shape == (3, 1, 20, 28) and targets.shape == (4, 1, 20, 28)
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.max() > 0.5 and inputs.min() == 0


def test_batched_items_equal_single_items():
    data = small()
    keys = [(0, 3), (5, 3), (0, 22), (5, 0)]
    assert_same(data.__getitems__(keys), [data[key] for key in keys])
    assert torch.equal(data[7][0], data[0, 7][0])


def test_samples_differ_by_seed_epoch_and_index():
    data = [small(seed=0)[0], small(seed=1)[0], small()[1, 0], small()[1], small()[0, 1]]
    firsts = [inputs.numpy().tobytes() for inputs, _ in data]
    assert len(set(firsts)) == 4 and firsts[3] == firsts[4]


def test_draws_are_uniform_and_frozen():
    """The draws of a key never change: published figures depend on them."""
    draws = uniform_draws(3, np.zeros(5000, int), np.arange(5000), 4)
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.05
    assert len(np.unique(draws)) == draws.size
    # SplitMix64 of state 1234567, as its reference implementation gives it
    assert splitmix64(np.array([1234567], np.uint64))[0] == 6457827717110365317
    frozen = uniform_draws(1, [2], [3], 2)
    assert frozen.tolist() == [[0.6900230619880093, 0.1956039396269611]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines of 1 or 2 cores
def test_workers_do_not_change_samples():
    """0, 1 and 3 workers give the same batches in two epochs, with workers that persist."""
    expected = None
    for workers in (0, 1, 3):
        loader = make_loader(small(), 4, workers, shuffle=True, seed=5)
        got = []
        for epoch in (0, 1):
            loader.sampler.epoch = epoch
            got.append(batches(loader))
        assert not torch.equal(got[0][0][0], got[1][0][0])
        if expected is None:
            expected = got
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
        assert sum(len(inputs) for inputs, _ in got[0]) == 23


def test_workers_inherit_no_garbage():
    """A worker that frees the frames of a video waits for ever for the threads of the process that decoded it."""
    freed = []

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            freed.append(True)

    gc.disable()
    try:
        Cycle()
        batches(make_loader(small(), 12, 0))
        assert not freed
        iterator = iter(make_loader(small(), 12, 1))
        assert freed
        list(iterator)
    finally:
        gc.enable()


def test_a_loader_leaves_the_handler_of_dead_children_alone():
    """torch's own would raise in the middle of an update."""
    before = signal.getsignal(signal.SIGCHLD)
    assert len(batches(make_loader(small(), 12, 1))) == 2
    assert signal.getsignal(signal.SIGCHLD) is before


def test_resume_inside_an_epoch():
    """A start at 8 of a fresh loader yields exactly the batches after the second of 4."""
    loader = make_loader(small(), 4, shuffle=True, seed=5)
    loader.sampler.epoch = 2
    whole = batches(loader)
    resumed = make_loader(small(), 4, shuffle=True, seed=5)
    resumed.sampler.epoch, resumed.sampler.start = 2, 8
    assert len(resumed) == len(whole) - 2
    assert_same(batches(resumed), whole[2:])


def test_loader_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    next(iter(make_loader(small(), 4, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 45), st.booleans())
@settings(max_examples=50, deadline=None)
def test_ranks_share_the_order(length, world, start, shuffle):
    """Together the ranks yield every position after start once, and interleave to one order."""
    samplers = [dataset.EpochSampler(length, shuffle, 1, rank, world) for rank in range(world)]
    whole = dataset.EpochSampler(length, shuffle, 1)
    for sampler in (*samplers, whole):
        sampler.epoch, sampler.start = 3, start
    keys = list(whole)
    assert len(keys) == len(whole) == max(0, length - start)
    for rank, sampler in enumerate(samplers):
        assert list(sampler) == keys[rank::world] and len(sampler) == len(keys[rank::world])
    assert not shuffle or start or sorted(keys) == [(3, i) for i in range(length)]


def test_validation_is_the_same_in_every_epoch():
    sizes = dict(length=5, input_size=[24], digit_size=9, num_objects=1)
    train, valid, test = (data_set(split, **sizes) for split in ("train", "valid", "test"))
    assert torch.equal(valid[0, 2][0], valid[7, 2][0])
    assert not torch.equal(train[0, 2][0], train[7, 2][0])
    assert not torch.equal(valid[2][0], test[2][0])
    for split, own in (("valid", valid), ("test", test)):  # for every seed, so that runs can be compared
        assert torch.equal(data_set(split, **sizes, seed=5)[2][0], own[2][0])
    streams = [split_seed("valid", 0), split_seed("test", 0), *(split_seed("train", seed) for seed in range(9))]
    assert len(set(streams)) == 11


# Dynamics


def slow_sequence(draws, digits, canvas, total, step_length):
    """One sequence, written as the published generator is: scalars, one digit after the other."""
    height, width = canvas
    size = digits.shape[1]
    frames = np.zeros((total, height, width), np.uint8)
    for which, x, y, theta in draws:
        digit = digits[int(which * len(digits))]
        v_x, v_y = np.cos(theta * 2 * np.pi), np.sin(theta * 2 * np.pi)
        for t in range(total):
            y += v_y * step_length
            x += v_x * step_length
            if x <= 0:
                x, v_x = 0.0, -v_x
            if x >= 1:
                x, v_x = 1.0, -v_x
            if y <= 0:
                y, v_y = 0.0, -v_y
            if y >= 1:
                y, v_y = 1.0, -v_y
            top, left = int(y * (height - size)), int(x * (width - size))
            for r in range(size):
                for c in range(size):
                    old = frames[t, top + r, left + c]
                    frames[t, top + r, left + c] = max(old, digit[r, c])
    return frames


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_frames_equal_the_slow_oracle(data):
    """Any canvas, digits and frames: every pixel is the published loop's, and lies in [0, 1]."""
    size = data.draw(st.integers(1, 9))
    canvas = data.draw(st.tuples(st.integers(size, 24), st.integers(size, 24)))
    frames_in, frames_out = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    count, step = data.draw(st.integers(1, 4)), data.draw(st.floats(0, 1.5))
    seed, epoch = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 2**31))
    digits = np.random.default_rng(0).integers(0, 256, (7, size, size), dtype=np.uint8)
    sequences = MovingMNIST(digits, 9, frames_in, frames_out, canvas, count, size, step, seed)
    inputs, targets = sequences.__getitems__([(epoch, 2), (epoch, 8)])[1]
    assert inputs.shape[0] == frames_in and targets.shape[0] == frames_out
    draws = uniform_draws(seed, [epoch], [8], 4 * count).reshape(count, 4)
    expected = slow_sequence(draws, digits, canvas, frames_in + frames_out, step)
    got = torch.cat((inputs, targets))[:, 0]
    assert torch.equal(got, torch.from_numpy(expected).float() / 255)
    assert got.min() >= 0 and got.max() <= 1


def test_speed_and_reflection():
    """A digit moves 0.1 of the free canvas per frame, and turns round at the walls only."""
    data = small(canvas=(509, 1009), num_frames_input=150, num_frames_output=150, num_objects=1, length=30)
    which, corners = data.trajectories(np.zeros(30, int), np.arange(30))
    place = corners[:, :, 0] / np.array([1000, 500])  # back to [0, 1], within a pixel
    assert place.min() == 0 and place.max() == 1 and which.max() < len(data.digits)
    steps = np.diff(place, axis=1)
    assert np.linalg.norm(steps, axis=-1).max() <= 0.1 + 0.003
    free = ((place > 0) & (place < 1)).all(-1)  # between two free places nothing was clipped
    lengths = np.linalg.norm(steps, axis=-1)[free[:, 1:] & free[:, :-1]]
    np.testing.assert_allclose(lengths, 0.1, atol=0.003)
    turns = (np.sign(steps[:, 1:]) * np.sign(steps[:, :-1])) < 0
    walls = (place == 0) | (place == 1)
    assert turns.any() and (walls[:, 1:-1] | ~turns).all()


# Digits


def test_builtin_digits():
    digits = builtin()
    assert digits.shape == (1797, 8, 8) and digits.dtype == np.uint8
    assert digits.min() == 0 and digits.max() == 255


def test_resized_digits_keep_range_and_ink():
    digits = builtin()[:50]
    for size in (4, 8, 14, 28):
        resized = resize_digits(digits, size)
        assert resized.shape == (50, size, size) and resized.dtype == np.uint8
        assert abs(resized.mean() - digits.mean()) < 0.1 * digits.mean()
    assert np.array_equal(resize_digits(digits, 8), digits)


@pytest.mark.parametrize(
    "count, scheme, train, held_out",
    [
        (60_000, "all", (0, 50_000), (50_000, 60_000)),
        (60_000, "published", (0, 10_000), (10_000, 13_000)),
        (1797, "all", (0, 1497), (1497, 1797)),
        (2, "all", (0, 1), (1, 2)),
        (13_000, "published", (0, 10_000), (10_000, 13_000)),
    ],
)
def test_splits_do_not_share_digits(count, scheme, train, held_out):
    numbers = np.arange(count)
    assert np.array_equal(select_digits(numbers, "train", scheme), numbers[slice(*train)])
    for split in ("valid", "test"):
        chosen = select_digits(numbers, split, scheme)
        assert np.array_equal(chosen, numbers[slice(*held_out)])


@pytest.mark.parametrize("name, pack", [("digits", bytes), ("digits.gz", gzip.compress)])
def test_idx_file_plain_and_gzipped(tmp_path, name, pack):
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 6), dtype=np.uint8)
    (tmp_path / name).write_bytes(pack(idx3(images)))
    assert np.array_equal(load_digits(tmp_path / name), images)


def test_real_mnist():
    digits = load_digits(shared("mnist/train-images-idx3-ubyte.gz"))
    assert digits.shape == (60_000, 28, 28)
    data = MovingMNIST(select_digits(digits, "train"), length=4)
    assert data[3][0].shape == (10, 1, 64, 64)


IMAGES = np.zeros((4, 3, 3), np.uint8)


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "no such file"),
        (b"", "too few"),
        (idx3(IMAGES)[:-1], "4 images of 3x3"),
        (idx3(IMAGES) + b"x", "4 images of 3x3"),
        (idx3(IMAGES, magic=2049), "labels"),
        (idx3(IMAGES, magic=7), "magic 7"),
        (idx3(IMAGES, shape=(0, 3, 3)), "no pixels"),
        (gzip.compress(idx3(IMAGES), mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(idx3(IMAGES), mtime=0)[:20] + b"\xff" * 30, "damaged gzip"),
        (gzip.compress(b"no idx file, as it is", mtime=0), "not an idx3 file"),
    ],
)
def test_bad_digit_files(tmp_path, content, says):
    path = tmp_path / "digits-file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_digits(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_digit_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_digits(tmp_path)


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A local mirror of four tiny MNIST files; yields its folder."""
    from torchvision.datasets import MNIST

    folder = tmp_path / "mirror"
    folder.mkdir()
    images = np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28)
    labels = struct.pack(">2I", 2049, 4) + bytes(4)
    resources = []
    for part in ("train", "t10k"):
        for name, raw in (("images-idx3", idx3(images)), ("labels-idx1", labels)):
            packed = gzip.compress(raw)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(packed)
            resources.append((f"{part}-{name}-ubyte.gz", hashlib.md5(packed).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", resources)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield folder
        server.shutdown()
        thread.join()


def test_download_once(tmp_path, mirror):
    """mnist is fetched into the folder once; the second call does not need the mirror."""
    digits = load_digits("mnist", tmp_path / "data")
    assert digits.shape == (4, 28, 28) and digits[1, 0, 0] == 784 % 256
    files = [path.name for path in (tmp_path / "data").iterdir()]
    assert files == ["train-images-idx3-ubyte.gz"]
    for path in mirror.iterdir():
        path.unlink()
    assert np.array_equal(load_digits("mnist", tmp_path / "data"), digits)


@pytest.mark.parametrize("damage", ["missing", "wrong content", "unreachable"])
def test_failed_download(tmp_path, mirror, damage, monkeypatch):
    """A failed download says what to do instead, and leaves nothing behind."""
    from torchvision.datasets import MNIST

    if damage == "missing":
        (mirror / "train-images-idx3-ubyte.gz").unlink()
    elif damage == "wrong content":
        (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"<html>log in first</html>")
    else:
        monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz.*builtin") as caught:
        load_digits("mnist", tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


# The test file


@pytest.fixture
def sequences():
    return np.random.default_rng(0).integers(0, 256, (6, 3, 5, 8), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["npy", "npz", "named npz"])
def test_sequence_file(tmp_path, sequences, kind):
    """Targets are the frames that follow the inputs; any (frames, sequences, H, W)."""
    path = tmp_path / f"test.{kind[-3:]}"
    if kind == "npy":
        np.save(path, sequences)
    elif kind == "npz":
        np.savez_compressed(path, sequences, other=np.zeros(3))
    else:
        np.savez(path, clips=sequences)
    data = MovingMNISTFile(path, 2, 3)
    assert len(data) == 3 and isinstance(data.frames, np.memmap) == (kind == "npy")
    inputs, targets = data[4, 1]
    assert torch.equal(inputs[:, 0], torch.from_numpy(sequences[:2, 1]).float() / 255)
    assert torch.equal(targets[:, 0], torch.from_numpy(sequences[2:5, 1]).float() / 255)
    assert_same(data.__getitems__([2, (1, 0)]), [data[2], data[0]])
    with pytest.raises(IndexError):
        data[3]
    plain = batches(make_loader(data, 2))
    assert [len(inputs) for inputs, _ in plain] == [2, 1]
    assert_same(batches(make_loader(data, 2, num_workers=1)), plain)


def test_pickled_file_data_set_is_small(tmp_path):
    """Workers started by spawn open the file themselves."""
    np.save(tmp_path / "a.npy", np.ones((20, 50, 64, 64), np.uint8))
    packed = pickle.dumps(MovingMNISTFile(tmp_path / "a.npy"))
    assert len(packed) < 2000 and pickle.loads(packed)[3][0].min() == torch.tensor(1 / 255)


def write_cut(path):
    np.save(path, np.zeros((6, 3, 5, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:-1])


def write_cut_npz(path):
    with open(path, "wb") as file:
        np.savez_compressed(file, np.arange(6 * 3 * 40, dtype=np.uint8).reshape(6, 3, 5, 8))
    path.write_bytes(path.read_bytes()[:-40])


def write_two_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3), b=np.zeros(3))


@pytest.mark.parametrize(
    "write, says",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "not a whole"),
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "not a whole"),
        (lambda path: path.write_bytes(b"GIF89a not an array"), "not a whole"),
        (lambda path: path.mkdir(), "not a whole"),
        (write_cut, "not a whole"),
        (write_cut_npz, "not a whole"),
        (write_two_arrays, r"holds a \(3,\), b \(3,\); name the array of frames with array_key"),
        (lambda path: np.save(path, np.zeros((6, 3, 5, 8))), "float64"),
        (lambda path: np.save(path, np.zeros((6, 5, 8), np.uint8)), r"\(6, 5, 8\)"),
        (lambda path: np.save(path, np.zeros((6, 0, 5, 8), np.uint8)), r"\(6, 0, 5, 8\)"),
        (lambda path: np.save(path, np.zeros((4, 3, 5, 8), np.uint8)), "4 frames.*3 input.*need 5"),
    ],
)
def test_bad_sequence_files(tmp_path, write, says):
    path = tmp_path / ("test.npz" if write in (write_cut_npz, write_two_arrays) else "test.npy")
    write(path)
    with pytest.raises(UserError, match=says) as caught:
        MovingMNISTFile(path, 3, 2)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_standard_test_file_baselines():
    """The two baselines of design.md section 6, to the integer: black 159, last input frame 265."""
    data = data_set("test", test_data_dir=shared("moving_mnist_test_1000.npz"))
    black, last = Metrics(("mse",)), Metrics(("mse",))
    for inputs, targets in make_loader(data, 100):
        black.update(torch.zeros_like(targets), targets)
        last.update(inputs[:, -1:].expand_as(targets), targets)
    assert black.compute()["count"] == 1000
    assert round(black.compute()["mean"]["mse"]) == 159
    assert round(last.compute()["mean"]["mse"]) == 265


# Options


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(dataset="kth2"), "kth2.*moving_mnist"),
        (dict(split="dev"), "dev"),
        (dict(digits_split="half"), "half"),
        (dict(digits_split="published"), "13000.*1797"),
        (dict(input_size=(64, 20)), "28 pixels.*64x20"),
        (dict(num_objects=0), "num_objects = 0"),
        (dict(digit_size=0), "digit_size = 0"),
        (dict(num_frames_output=0), "num_frames_output = 0"),
        (dict(step_length=-0.1), "step_length"),
        (dict(step_length=float("nan")), "step_length"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(UserError, match=says):
        data_set(options.pop("split", "train"), **options)


def test_a_malicious_file_is_not_executed(tmp_path):
    """A pickle under the name of an array is refused, never run."""

    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Touch()))
    np.save(tmp_path / "array.npy", np.array([Touch()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", arr_0=np.array([Touch()], dtype=object))
    for name in ("plain.npy", "array.npy", "zip.npz"):
        with pytest.raises(UserError, match=name):
            MovingMNISTFile(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("step_length", [0.05, 0.1, 0.3])
def test_a_file_with_sequences_before_frames_is_refused(tmp_path, step_length):
    """The order of torchvision's MovingMNIST; with as many frames as sequences, the shape alone does not tell."""
    data = data_set("test", length=20, step_length=step_length)
    sequences = np.stack([(torch.cat(data[i])[:, 0] * 255).round().byte().numpy() for i in range(20)])
    np.save(tmp_path / "wrong.npy", sequences)
    np.save(tmp_path / "right.npy", sequences.swapaxes(0, 1))
    assert torch.equal(MovingMNISTFile(tmp_path / "right.npy")[3][0], data[3][0])
    with pytest.raises(UserError, match=r"wrong.npy: its shape \(20, 20, 64, 64\) .*; write np.swapaxes\(a, 0, 1\)"):
        MovingMNISTFile(tmp_path / "wrong.npy")


def test_test_file_of_another_size(tmp_path, sequences):
    np.save(tmp_path / "a.npy", sequences)
    with pytest.raises(UserError, match=r"5x8.*64x64"):
        data_set("test", test_data_dir=tmp_path / "a.npy", num_frames_input=1, num_frames_output=1)


def test_bad_loader_options_and_keys():
    with pytest.raises(UserError, match="batch_size 0"):
        make_loader(small(), 0)
    for key in (23, -1, (1, 23)):
        with pytest.raises(IndexError):
            small()[key]


def test_table_rows_fit_the_metrics():
    for spec in DATASETS.values():
        assert set(spec.metrics) <= set(METRICS)


def test_each_split_has_its_digits_and_the_test_file_is_for_the_test():
    digits = load_digits("builtin")
    for split in ("train", "valid", "test"):
        options = {} if split == "test" else {"test_data_dir": "absent.npy"}
        data = data_set(split, digit_size=8, **options)
        np.testing.assert_array_equal(data.digits, select_digits(digits, split))


def test_digits_that_shrink_keep_thin_strokes():
    strokes = np.zeros((1, 28, 28), np.uint8)
    strokes[:, ::4] = 255
    assert abs(resize_digits(strokes, 7).mean() - 255 / 4) < 8
