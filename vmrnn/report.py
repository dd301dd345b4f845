"""report.html of a test: one file that shows everything without a network or a server.

The page is vmrnn/report.html with a JSON object put in; its own script draws tables, curves and the player.
"""

import base64
import hashlib
import importlib.metadata
import io
import json
import math
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vmrnn.files import replacing
from vmrnn.metrics import figure
from vmrnn.pictures import as_images, error_limit, signed_colours, white_level

TEMPLATE = Path(__file__).with_name("report.html")
PLACE = '"the data"'  # of the JSON object in the template
SPRITE_WIDTH = 4096  # pixels; wider ones are refused by some browsers

# Figures that others published, by data set: what must be equal for a comparison, and what is compared.
PUBLISHED = {
    "moving_mnist": {
        "setting": {
            "num_frames_input": 10, "num_frames_output": 10, "input_size": [64, 64], "num_objects": 2, "digit_size": 28,
        },
        "metrics": ["mse", "ssim_dr2"],
        "rows": {
            "VMRNN-D": [16.46, 0.9645],
            "SwinLSTM-D": [17.7, 0.962],
            "SimVPv2": [15.05, 0.9675],
            "PredRNN++ (2000 epochs)": [14.07, 0.9698],
            "PredFormer": [11.7, 0.975],
        },
    },
    "taxibj": {
        "setting": {"num_frames_input": 4, "num_frames_output": 4, "input_size": [32, 32], "input_channels": 2},
        "metrics": ["mse", "mae", "ssim_dr2"],
        "rows": {"VMRNN-B": [0.2887, 14.69, 0.9858]},
    },
}  # fmt: skip
MOVING_MNIST_MD5 = "be083ec986bfe91a449d63653c411eb2"  # of mnist_test_seq.npy


def published(config, mean):
    """The published table beside this run's means: {"metrics", "rows", "note"}; None where nothing is comparable.

    config: a dict. The note says whether the test set is the published one.
    """
    table = PUBLISHED.get(config["dataset"])
    if table is None or any(config[key] != value for key, value in table["setting"].items()):
        return None
    if config["dataset"] == "moving_mnist":
        file = config["test_data_dir"]
        if file and md5(file) == MOVING_MNIST_MD5:
            note = "The test set is the published one, mnist_test_seq.npy, by its md5 sum."
        else:
            note = (
                "The test set is NOT the published one: the published figures are of the 10,000 sequences of "
                "mnist_test_seq.npy. The figures below are of other sequences and do not compare exactly."
            )
    else:
        note = (
            "The published figures are of the split X_test of dataset.npz. Whether this test set is the same file "
            "was not checked."
        )
    rows = {"this checkpoint": [mean.get(name, math.nan) for name in table["metrics"]]} | table["rows"]
    return {"metrics": table["metrics"], "rows": [[name, *row] for name, row in rows.items()], "note": note}


def md5(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


def pick(errors):
    """{"best": index, "median": index, "worst": index} of sequences by their errors, each index once.

    A NaN, of a sequence with nothing to compare, is never picked.
    """
    order = sorted((i for i, error in enumerate(errors) if not math.isnan(error)), key=errors.__getitem__)
    roles = {}
    for role, place in (("best", 0), ("worst", -1), ("median", (len(order) - 1) // 2)):
        if order and order[place] not in roles.values():
            roles[role] = order[place]
    return {role: roles[role] for role in ("best", "median", "worst") if role in roles}


def versions():
    """{what: version} of what the figures depend on."""
    found = {"Python": platform.python_version(), "system": platform.platform()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "timm")}
    if revision := git_revision():
        found["code"] = revision
    return found


def git_revision():
    """The commit of the code, with -dirty where files were changed; "" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=TEMPLATE.parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def sequence(role, index, inputs, targets, forecast, white, limit):
    """What the player needs of one sequence, frames (T, C, H, W) in [0, 1].

    white: the value that is shown as white. limit: errors are coloured up to +-limit.
    """
    return {
        "role": role,
        "index": index,
        "given": len(inputs),
        "size": list(inputs.shape[-2:]),
        "mse": figure("mse", forecast, targets).tolist(),
        "truth": sprite(as_images(torch.cat([inputs, targets]) / white)),
        "forecast": sprite(as_images(forecast / white)),
        "error": sprite(signed_colours(forecast, targets, limit)),
    }


def sprite(images):
    """{"columns", "uri"}: pictures (T, H, W, 3) in [0, 1] row by row in one PNG, as a data URI."""
    T, H, W, _ = images.shape
    columns = max(1, min(T, SPRITE_WIDTH // W))
    pixels = np.zeros((-(-T // columns) * H, columns * W, 3), np.uint8)
    for t, image in enumerate(images):
        y, x = t // columns * H, t % columns * W
        pixels[y : y + H, x : x + W] = (255 * image.clip(0, 1)).round()
    picture = Image.fromarray(pixels)
    if (pixels == pixels[..., :1]).all():
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return {"columns": columns, "uri": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}


def write_report(path, *, title, facts, conventions, results, sequences, config, command):
    """Write the page.

    facts: {label: text}, shown under the title. conventions: {metric: text}. results: {label: Metrics.compute()},
    the forecast's first. sequences: [(role, index, inputs, targets, forecast)], tensors (T, C, H, W) in [0, 1] on the
    CPU, NaN for missing pixels. config: a dict. command: the exact command line.
    """
    first = next(iter(results.values()))
    limit = error_limit([(forecast, targets) for *_, targets, forecast in sequences])
    white = white_level([targets for *_, targets, _ in sequences])
    page = {
        "title": title,
        "facts": facts,
        "conventions": conventions,
        "results": results,
        "published": published(config, first["mean"]),
        "sequences": [sequence(*parts, white, limit) for parts in sequences],
        "white": white,
        "limit": limit,
        "channels": config["input_channels"],
        "config": config,
        "versions": versions(),
        "command": command,
    }
    # "</script>" in a text would end the page's JSON early
    text = strict_json(page).replace("<", "\\u003c")
    with replacing(path) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text), encoding="utf-8")


def strict_json(value, indent=None):
    """JSON with null for numbers that are not finite, which the format does not know."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)
