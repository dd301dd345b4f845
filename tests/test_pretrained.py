"""The weights in Pretrained/ are what its table says: their hash, and their error on a fixed set of sequences."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import ROOT, shared

import test as test_program
from vmrnn.baselines import motion
from vmrnn.forecaster import Forecaster

FOLDER = ROOT / "Pretrained"


def table(first):
    """The rows of the table of Pretrained/README.md whose first column has this name, dicts by its header."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    header, _, *cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return [dict(zip(header, row, strict=True)) for row in cells]


def test_every_file_is_in_a_table():
    named = [row["file"] for row in table("file")] + [row["radar file"] for row in table("radar file")]
    assert sorted(named) == sorted(p.name for p in FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("row", table("file"), ids=lambda row: row["file"])
def test_the_table_tells_the_truth(row, tmp_path):
    """On 16 sequences of scikit-learn's digits, which are always there; the same command is in the README."""
    path = FOLDER / row["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    test_program.main([
        "--checkpoint", str(path), "--train_data_dir", "builtin", "--test_data_dir", "", "--test_sequences", "16",
        "--device", "cpu", "--strips", "1", "--res_dir", str(tmp_path),
    ])  # fmt: skip
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results["forecast"]["mean"]["mse"] == pytest.approx(float(row["check"]), rel=1e-3)
    assert results["forecast"]["mean"]["mse"] < results["black frame"]["mean"]["mse"]
    assert Forecaster(path).model.in_chans == 1  # no further flags


@pytest.mark.parametrize("row", table("radar file"), ids=lambda row: row["radar file"])
def test_the_radar_network_beats_motion_on_an_hour_that_it_never_saw(row):
    """The last sequence of the event of 2018, in mm/h, on the whole map; the same lines are in the README."""
    path = FOLDER / row["radar file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
    frames = np.load(shared("radar/bom_r2_20180616_int16.npz"))["frames"][-10:] * np.float32(0.5)
    forecaster = Forecaster(path, device="cpu")
    for frame in frames[:5]:
        forecaster.observe(frame)
    mse = np.square(forecaster.forecast(5) - frames[5:]).mean()
    assert mse == pytest.approx(float(row["check"]), rel=1e-2)
    moved = motion(torch.from_numpy(np.sqrt(frames[None, :5, None] / 64)), 5)[0, :, 0].numpy()
    assert mse < np.square(64 * moved**2 - frames[5:]).mean()
