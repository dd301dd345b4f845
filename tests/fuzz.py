"""Damaged and hostile files and options: each is read or refused with a UserError, and nothing else happens.

    python -m tests.fuzz --minutes 10           all kinds in turn, from a new seed, which is printed
    python -m tests.fuzz --kind png --seed 7    one kind

A case is a whole file, of which a few bytes are changed, cut out, doubled or moved. tests/test_fuzz.py runs some
cases of every kind.
"""

import argparse
import gzip
import logging
import random
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from vmrnn import command_line, config as configuration
from vmrnn.checkpoint import load_network, save_checkpoint, save_weights
from vmrnn.data.inputs import open_input
from vmrnn.data.moving_mnist import load_digits
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.run_folder import read_log

NETWORK = {"model": "VMRNN-B", "patch_size": 2, "embed_dim": 16, "depths": [1], "d_state": 2, "input_size": [16, 16]}
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
# Bytes that length and type fields do not expect
ODD = [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\0" * 8, b"\xff\xff\xff\x7f", b"-1", b"9" * 20, b'"', b"[" * 50]
WORDS = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "inf",
    "9" * 400,
    "1.5",
    "true",
    "a" * 5000,
    "\x00",
    "\udcff",
    "..",
    "[1]",
    "٣",
    "0x10",
]


def write_npy(path):
    np.save(path, FRAMES)


def write_npz(path):
    np.savez_compressed(path, FRAMES)


def write_png(path):
    Image.fromarray(FRAMES[0]).save(path)


def write_gif(path):
    first, *rest = (Image.fromarray(frame) for frame in FRAMES)
    first.save(path, save_all=True, append_images=rest)


def write_tif(path):
    first, *rest = (Image.fromarray(frame) for frame in FRAMES)
    first.save(path, save_all=True, append_images=rest, compression="tiff_deflate")


def write_avi(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "gray"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


def write_idx(path):
    header = b"".join(n.to_bytes(4, "big") for n in (2051, *FRAMES.shape))
    path.write_bytes(gzip.compress(header + FRAMES.tobytes()))


def network():
    torch.manual_seed(0)
    config = configuration.resolve(None, NETWORK)
    return build_model(**config.network_options), config


def write_safetensors(path):
    model, config = network()
    save_weights(path, model, config.to_dict())


def write_pt(path):
    model, config = network()
    save_checkpoint(path, {"model": model.state_dict(), "config": config.to_dict()})


def write_toml(path):
    path.write_text(configuration.to_toml(configuration.Config()))


def write_log(path):
    path.write_text('{"epoch": 1, "step": 4, "samples": 16, "train_loss": 0.5}\n' * 4)


def read_frames(path):
    config = configuration.resolve(None, {"dataset": "array" if path.suffix in (".npy", ".npz") else "video"})
    for sequence in open_input(path, config).sequences:
        for frame in sequence.frames():
            assert frame.ndim in (2, 3)


# kind: (writes a whole file, reads a file)
KINDS = {
    "npy": (write_npy, read_frames),
    "npz": (write_npz, read_frames),
    "png": (write_png, read_frames),
    "gif": (write_gif, read_frames),
    "tif": (write_tif, read_frames),
    "avi": (write_avi, read_frames),
    "gz": (write_idx, lambda path: load_digits(str(path))),
    "safetensors": (write_safetensors, load_network),
    "pt": (write_pt, load_network),
    "toml": (write_toml, lambda path: configuration.resolve(path, {})),
    "jsonl": (write_log, read_log),
}


def mutated(content, draw):
    """`content` with one to four changes, most of them in its first bytes, where headers are."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(content), draw.choice((64, 512, 10**9))) + 1)
        length = draw.choice((1, 1, 2, 8, 100))
        change = draw.randrange(6)
        if change == 0:
            del content[at:]
        elif change == 1:
            del content[at : at + length]
        elif change == 2:
            content[at:at] = content[at : at + length]
        elif change == 3:
            content[at : at + length] = draw.randbytes(length)
        elif change == 4 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        else:
            odd = draw.choice(ODD)
            content[at : at + len(odd)] = odd
    return bytes(content)


def fuzz_file(kind, draw, folder, cases):
    """`cases` mutated files of one kind; returns (how many were read, how many refused)."""
    write, read = KINDS[kind]
    whole = Path(folder) / f"whole.{kind}"
    write(whole)
    content, counts = whole.read_bytes(), [0, 0]
    for _ in range(cases):
        path = Path(folder) / f"case.{kind}"
        path.write_bytes(mutated(content, draw))
        counts[outcome(lambda: read(path), path.read_bytes())] += 1  # noqa: B023
    return counts


def fuzz_options(draw, cases):
    """`cases` command lines of one to five odd options; returns (how many were taken, how many refused)."""
    parser = command_line.Parser("")
    command_line.add_options(parser)
    names, counts = list(configuration.FIELDS), [0, 0]
    for _ in range(cases):
        line = []
        for _ in range(draw.randint(1, 5)):
            name = draw.choice(names)
            name = draw.choice((name, name, name, name.replace("_", "-"), name[:-1], draw.choice(WORDS)))
            line += [f"--{name}", *draw.choices(WORDS, k=draw.randint(0, 3))]
        counts[outcome(lambda: configuration.resolve(None, vars(parser.parse_args(line))), line)] += 1  # noqa: B023
    return counts


def outcome(call, case):
    """0 if the call succeeds, 1 if it is refused with one line. AssertionError, with the case: anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except UserError as refused:
        assert len(str(refused).splitlines()) == 1, f"not one line: {refused!r} for {case!r}"
        return 1
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} for {case[:2000]!r}") from error
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--kind", choices=[*KINDS, "options"])
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # a skipped line of a log is no fault
    print("seed", args.seed, flush=True)
    draw, until, counts, faults = random.Random(args.seed), time.monotonic() + 60 * args.minutes, {}, {}
    kinds = [args.kind] if args.kind else [*KINDS, "options"]
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            for kind in kinds:
                try:
                    found = fuzz_options(draw, 20) if kind == "options" else fuzz_file(kind, draw, folder, 5)
                    counts[kind] = [a + b for a, b in zip(counts.get(kind, (0, 0)), found)]
                except AssertionError as fault:
                    origin = traceback.extract_tb((fault.__cause__ or fault).__traceback__)[-1]
                    faults.setdefault(
                        (kind, type(fault.__cause__).__name__, origin.name, origin.lineno), str(fault)[:300]
                    )
    for kind, (read, refused) in counts.items():
        print(f"{kind:12} {read} read, {refused} refused")
    for place, text in faults.items():
        print("FAULT", *place, text)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
