"""What several test files need. A test file imports from here and never from another test file."""

import os
import struct
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

# For tests
from vmrnn.selfcheck import outputs_and_gradients, relative_error, relative_errors, scan_inputs  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
DEVICE = os.environ.get("VMRNN_TEST_DEVICE", "cpu")  # python -m pytest -m device --device mps

# What `make test-fast` leaves out: compilers, Triton's interpreter, real processes. Files and single tests, of more
# than about 3 s of CPU time, the longest first.
SLOW = (
    "test_training::test_a_compiled_run_with_batches_of_several_sizes", "test_training::test_curves_of_several_runs",
    "test_scan_triton", "test_triton_layers", "test_signs_of_life", "test_distributed", "test_resume", "test_selfcheck",
    "test_extending", "test_programs", "test_cells::test_compiled_steps_are_one_graph",
    "test_networks::test_compiled_steps_are_one_graph_and_the_same_numbers", "test_scan_cpu::test_one_openmp_runtime",
    "test_scan_cpu::test_damaged_cache_entry_is_rebuilt", "test_scan_cpu::test_concurrent_builds",
    "test_scan_cpu::test_a_compiler_of_several_words",
    "test_install", "test_deployment", "test_cross",
    "test_imports::test_importing_the_programs_does_nothing", "test_checkpoint::test_a_full_disk",
    "test_baselines::test_motion_beats_the_last_frame_on_real_radar",
    "test_cache::test_a_run_goes_on_with_data_that_moved_and_not_with_data_that_changed",
    "test_checked::test_a_run_does_not_resume_from_crafted_contents",
    "test_predict::test_a_real_process_and_its_default_output", "test_advection::test_training_and_test",
    "test_data_sets::test_a_program_ends_while_its_loader_has_workers", "test_data_sets::test_nothing_is_loaded_whole",
    "test_fetch::test_a_killed_download_leaves_nothing_that_looks_whole",
    "test_fetch::test_the_command_says_what_went_wrong",
    "test_base::test_training_test_and_forecast",
)  # fmt: skip

SCAN_NAMES = ("x", "dbl", "dt_weight", "dt_bias", "A_log", "D")


def shared(name):
    """The path of a file or folder in ../shared/data, real data that is not part of the project.

    The test is skipped where it is absent.
    """
    import pytest  # not at the top: benchmarks use the functions below without it

    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{path} does not exist: this real data is not ours to redistribute")
    return path


# Tensors


def assert_small(errors, tolerance):
    """errors: {name: relative error}. NaN is not small."""
    assert errors
    for name, error in errors.items():
        assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}"


def assert_close(values, references, tolerance):
    """Two dictionaries of tensors: same names, same shapes, relative error at most `tolerance`."""
    assert_small(relative_errors(values, references), tolerance)


def assert_identical(values, references):
    """Two dictionaries of tensors: same names, same bits."""
    assert values.keys() == references.keys()
    for name, value in values.items():
        assert torch.equal(value, references[name]), name


@contextmanager
def nan_filled_memory():
    """Fill what torch.empty, torch.empty_like and Tensor.new_empty return with NaN.

    A kernel that reads memory before writing it, or leaves a part of a result unwritten, then shows.
    """

    # The first use of torch.device as a context keeps a list of the functions that make tensors. With the wrappers in
    # that list, torch.empty would ignore the device "meta" later, in another test, and take all memory.
    with torch.device("cpu"):
        torch.empty(0)

    def poisoned(function):
        def wrapper(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return wrapper

    with (
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield


# The scan

# Shape letters, in this order everywhere: B batch, H and W map, Di channels, N states, R rank of the step size.
SCAN_SHAPES = [
    (2, 5, 7, 24, 16, 3),
    (1, 1, 1, 8, 1, 1),
    (1, 1, 9, 17, 5, 2),
    (3, 40, 3, 16, 8, 1),
    (1, 8, 8, 32, 16, 2),
]


def fresh_scan_inputs(B, H, W, Di, N, R, dtype=torch.float32, device="cpu", seed=0):
    """As scan_inputs, with the step sizes (0.001 to 0.1) and decay rates (near 1 to N) of a network before training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    tensors = [t.detach() for t in scan_inputs(B, H, W, Di, N, R, seed=seed)]
    dt = torch.exp(uniform(-6.9, -2.3, 4, Di))
    tensors[3] = dt + torch.log(-torch.expm1(-dt))
    tensors[4] = torch.log(torch.arange(1.0, N + 1) * uniform(0.5, 2, 4, Di, N))
    return [t.to(device, dtype).requires_grad_() for t in tensors]


# Data


def data_set(split, length=None, value_range=None, **options):
    """build_dataset with its options as keywords: `length` sequences of the split, of built-in digits by default."""
    from dataset import build_dataset
    from vmrnn.config import Config

    if length is not None:
        options[f"{split}_sequences"] = length
    return build_dataset(split, Config(**({"train_data_dir": "builtin"} | options)), value_range)


def batches(loader):
    return [(inputs.clone(), targets.clone()) for inputs, targets in loader]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def idx3(images, magic=2051, shape=None):
    return struct.pack(">4I", magic, *(shape or images.shape)) + images.tobytes()


def write_video(path, frames, codec="ffv1", pixels=None):
    """A video of frames (T, H, W, C). The codec ffv1 keeps every value."""
    import av

    grey = frames.shape[-1] == 1
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels or ("gray" if grey else "bgr0")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame[..., 0] if grey else frame, format="gray" if grey else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_images(folder, frames, name="frame_{}.png"):
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).save(folder / name.format(i))


def read_frames(path, channels=None, **options):
    """All frames of a file, an array (T, H, W, C) in the file's own type and units.

    channels   of a video, an image or a folder of images: 1, 3, or None for those that are stored
    options    options of Config on how an array is read
    """
    import numpy as np

    from vmrnn.config import Config
    from vmrnn.data.images import IMAGES, image_frames
    from vmrnn.data.inputs import open_input
    from vmrnn.data.media import images_in
    from vmrnn.data.videos import VIDEOS, video_frames

    ending = path.suffix.lower()
    if ending in VIDEOS and not path.is_dir():
        frames = video_frames(path, channels)
    elif ending in IMAGES or path.is_dir():
        frames = image_frames(images_in(path) if path.is_dir() else [path], channels)
    else:
        frames = open_input(path, Config(dataset="array", **options)).sequences[0].frames()
    return np.stack(list(frames))


# A run that takes a second
TINY = [
    "--model", "VMRNN-B", "--patch_size", "4", "--embed_dim", "16", "--depths", "1", "--d_state", "4",
    "--train_data_dir", "builtin", "--input_size", "16", "--digit_size", "8", "--num_objects", "1",
    "--num_frames_input", "3", "--num_frames_output", "2", "--train_sequences", "16", "--valid_sequences", "6",
    "--test_sequences", "6", "--train_batch_size", "4", "--epoch_valid", "1", "--device", "cpu", "--lr", "1e-3",
]  # fmt: skip

# Everything that has a state: stochastic depth, dropout, a schedule, moments, averaged weights, accumulation.
OPTIONS = [
    "--model", "VMRNN-B", "--patch_size", "4", "--embed_dim", "16", "--depths", "2", "--d_state", "4",
    "--train_data_dir", "builtin", "--input_size", "16", "--digit_size", "8", "--num_objects", "1",
    "--num_frames_input", "3", "--num_frames_output", "2", "--train_sequences", "27", "--valid_sequences", "5",
    "--train_batch_size", "4", "--valid_batch_size", "2", "--epochs", "3", "--epoch_valid", "2", "--log_train", "4",
    "--attn_drop_rate", "0.1", "--drop_path_rate", "0.2", "--optimizer", "muon", "--schedule", "onecycle",
    "--ema", "0.9", "--accumulate", "2", "--save_every", "2", "--device", "cpu", "--resume", "auto",
]  # fmt: skip

# A process that has imported everything and forks the runs: a start then takes a moment, not seconds.
# Reads a line of arguments and of Python to run first, answers with the pid, then with the exit status.
FORKS = """
import json, os, signal, sys
import sklearn.datasets, torch
torch.set_num_threads(1)
import train
from vmrnn.runtime import run_program
# nohup ignores SIGHUP, and a shell ignores SIGINT for a job in the background. Tests of signals need both.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    arguments, first = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exec(first)
        try:
            run_program(lambda: train.main(arguments))
        except SystemExit as ended:
            os._exit(ended.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# Python for a forked process, which then does what Python does with these arguments.
AS_PYTHON = """
import runpy
signal.alarm(300)
os.environ.update({environment!r})
for number, name in (1, "out"), (2, "err"):
    os.dup2(os.open(os.path.join({folder!r}, name), os.O_WRONLY | os.O_CREAT), number)
program, *sys.argv[:] = {arguments!r}
if program == "-c":
    exec(sys.argv.pop(0), {{"__name__": "__main__"}})
elif program == "-m":
    sys.modules.pop(sys.argv[0], None)  # runpy would warn that it is imported already
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.argv.insert(0, program)
    runpy.run_path(program, run_name="__main__")
sys.exit()
"""

# Python that runs `code` in several processes at the same time and fails if one of them does.
AT_ONCE = """
import os, subprocess, sys
code, others = {code!r}, []
if not hasattr(os, "fork"):
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range({count})]
    sys.exit(any([other.wait() for other in others]))
for _ in range({count}):
    others.append(os.fork())
    if not others[-1]:
        exec(code, {{}})
        sys.exit()
sys.exit(any([os.waitpid(other, 0)[1] for other in others]))
"""


def without_time(entries):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]
