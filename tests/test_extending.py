"""docs/extending.md is true: its code is put into a copy of the project, which then trains and tests with all of it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^`([\w./]+)`(, a new file)?:$", re.MULTILINE)
SECTIONS = [
    "A new cell", "A new head", "A new network", "A new loss", "A new option", "A new metric", "A new data set",
    "A new file format", "A new logger", "A new scan back end",
]  # fmt: skip


def blocks(section):
    """[(path, "python" or "diff", text)] of a section; a block belongs to the file that is named last before it."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    found = []
    for block in BLOCK.finditer(text):
        path, new = FILE.findall(text[: block.start()])[-1]
        assert (block[1] == "python") == bool(new), path
        found.append((path, block[1], block[2]))
    return found


def apply(folder, path, kind, text):
    """Write a new file, or replace the one place that holds the lines with - by the lines with +."""
    file = folder / path
    if kind == "python":
        assert not file.exists(), path
        file.write_text(text, encoding="utf-8")
        return
    before, after = ("".join(f"{line[1:]}\n" for line in text.splitlines() if line[0] == sign) for sign in "-+")
    content = file.read_text(encoding="utf-8")
    assert len(before) + len(after) + text.count("\n") == len(text), "each line starts with - or +"
    assert content.count(before) == 1, f"{path} does not hold once: {before}"
    file.write_text(content.replace(before, after), encoding="utf-8")


def test_the_page_has_these_sections_and_two_files_are_enough():
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == SECTIONS
    for section in SECTIONS:
        assert 1 <= len({path for path, *_ in blocks(section)}) <= 2, section


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with every block of the page in it."""
    folder = tmp_path_factory.mktemp("extended") / "copy"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "exps", "results", "cache", "tests", "build")
    shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for section in SECTIONS:
        for block in blocks(section):
            apply(folder, *block)
    return folder


def run(folder, *arguments):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRAIN_AND_TEST = """
import runpy, sys
import numpy as np
import pytest
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")

from dataset import build_dataset
from vmrnn.config import Config
with open("a.cam", "wb") as file:
    file.write(np.uint32([8, 10]).tobytes() + np.arange(40 * 8 * 10, dtype=np.uint16).tobytes())
options = {"train_data_dir": "a.cam", "input_size": [8, 10], "num_frames_input": 2, "num_frames_output": 1}
inputs, targets = build_dataset("train", Config(dataset="cam", **options))[0]
assert inputs.shape == (2, 1, 8, 10) and inputs[1, 0, 0, 0] > inputs[0, 0, 7, 9]
with open("a.cam", "ab") as file:
    file.write(b"x")
with pytest.raises(ValueError, match="a.cam: not a header and whole frames"):
    build_dataset("train", Config(dataset="cam", **options))
sys.exit(pytest.main(["-v", "tests/test_networks.py", "-k", "cpu-double"]))
"""


def test_a_run_with_everything_on_the_page(extended):
    """Everything that the page adds, such as a data set, a network and a scan, in a training and in a test.

    The new back end is held to the reference by the tests of the project, which take every row of the table.
    """
    # Training and the test of the back end share a process, which spares the second its imports.
    printed = run(
        extended, "-c", TRAIN_AND_TEST, "--dataset", "waves", "--model", "VMRNN-G", "--cell", "two_gates", "--head",
        "blend", "--patch_size", 4, "--embed_dim", 16,
        "--depths", 1, "--d_state", 4, "--input_size", 16, "--num_frames_input", 3, "--num_frames_output", 2,
        "--train_sequences", 16, "--valid_sequences", 4, "--train_batch_size", 4, "--epochs", 2, "--epoch_valid", 1,
        "--lr", "1e-3", "--schedule", "cosine", "--lr_floor", "9e-4", "--huber_delta", 0.1, "--table", "--scan",
        "double",
        "--device", "cpu", "--log_train", 1, "--res_dir", "run",
    )  # fmt: skip
    assert re.search(r"[1-9]\d* passed", printed)
    assert "double on cpu (plain torch in float64)" in printed and "waves in other directions" in printed
    entries = [json.loads(line) for line in (extended / "run" / "log.jsonl").read_text().splitlines()]
    assert min(entry["lr"] for entry in entries if "lr" in entry) == 9e-4
    validations = [entry for entry in entries if "valid_loss" in entry]
    assert all(0 < entry["bright"] < 3 for entry in validations)
    rows = (extended / "run" / "table.csv").read_text().splitlines()
    assert len(rows) == 3 and "bright" in rows[0] and rows[1].startswith("1,")
    printed = run(extended, "test.py", "--checkpoint", "run/best.safetensors", "--device", "cpu", "--strips", 1)
    assert "Huber loss with delta 0.1" in printed
    (report,) = (extended / "run").glob("test_*/metrics.json")
    results = json.loads(report.read_text())
    assert results["results"]["black frame"]["mean"]["bright"] == 0
    assert results["config"]["model"] == "VMRNN-G" and "closer to 1 is better" in results["conventions"]["bright"]
