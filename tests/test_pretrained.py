"""The weights in Pretrained/ are what its table says: their hash, and their error on a fixed set of sequences."""

import hashlib
import json

import pytest
from helpers import ROOT

import test as test_program
from vmrnn.forecaster import Forecaster

FOLDER = ROOT / "Pretrained"


def table():
    """The rows of the first table of Pretrained/README.md, dicts by its header."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| file "))
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[start:] if line]
    rows = [row for row in cells[2:] if len(row) == len(cells[0])]
    return [dict(zip(cells[0], row, strict=True)) for row in rows]


def test_every_file_is_in_the_table():
    assert sorted(row["file"] for row in table()) == sorted(p.name for p in FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("row", table(), ids=lambda row: row["file"])
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
