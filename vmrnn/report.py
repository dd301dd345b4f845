"""report.html of a test: one file that shows everything. It needs neither the internet nor a server.

The page is vmrnn/report.html with a JSON object put in. The script of the page draws tables, curves and the player.
"""

import base64
import hashlib
import importlib.metadata
import io
import math
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vmrnn.colours import GREY, Look, shrunk
from vmrnn.data.fetch import STANDARD, STANDARD_MD5
from vmrnn.files import replacing
from vmrnn.pictures import UNITS, counted_leads, error_limit, signed_colours
from vmrnn.run_folder import strict_json

TEMPLATE = Path(__file__).with_name("report.html")
PLACEHOLDER = '"the data"'  # the template has it where the JSON object belongs
SPRITE_WIDTH = 4096  # pixels; some browsers refuse wider images
PLAYER_SIDE = 320  # pixels, the longest side of a frame in the player; larger frames are averaged

# Published figures by data set. "setting": options that must be equal for a comparison. "metrics": what is compared.
# "rows": {network: (parameters in millions, source, figures)}. The parameters of VMRNN are those of the published
# weights, unused ones included.
OPENSTL = "OpenSTL, video_benchmarks.md"
PUBLISHED = {
    "moving_mnist": {
        "setting": {
            "num_frames_input": 10, "num_frames_output": 10, "input_size": [64, 64], "num_objects": 2, "digit_size": 28,
        },
        "metrics": ["mse", "ssim_dr2"],
        "rows": {
            "VMRNN-D": (15.3, "arXiv 2403.16536", [16.46, 0.9645]),
            "SwinLSTM-D": (20.2, "arXiv 2308.09891; 2410.04733, table 2", [17.7, 0.962]),
            "SimVPv2": (46.8, f"arXiv 2211.12509; {OPENSTL}", [15.05, 0.9675]),
            "PredRNN++ (2000 epochs)": (38.6, OPENSTL, [14.07, 0.9698]),
            "PredFormer": (25.3, "arXiv 2410.04733, table 2", [12.4, 0.973]),
        },
    },
    "taxibj": {
        "setting": {"num_frames_input": 4, "num_frames_output": 4, "input_size": [32, 32], "input_channels": 2},
        "metrics": ["mse", "mae", "ssim_dr2"],
        "rows": {"VMRNN-B": (2.6, "arXiv 2403.16536", [0.2887, 14.69, 0.9858])},
    },
}  # fmt: skip


# Conventions that only published figures use, and the data sets whose published figures use them.
PUBLISHED_ONLY = {"ssim_dr2": ("moving_mnist", "taxibj", "kth", "human36m"), "psnr_uint8": ("kth",)}


def is_compared(name, config):
    """Whether a metric belongs into a short table of a test with this configuration, a dict."""
    return name not in PUBLISHED_ONLY or config["dataset"] in PUBLISHED_ONLY[name]


def published(config, mean):
    """The published figures beside those of this test.

    config   dict of options
    mean     {metric: figure} of this test

    Returns a dict, or None if no published figures are of the same task:
    metrics   names of the figures
    rows      [network, parameters, source, figures...] of each network, the smallest error first
    own       the figures of this test
    note      a sentence that says whether the test set is the published one
    """
    table = PUBLISHED.get(config["dataset"])
    if table is None or any(config[key] != value for key, value in table["setting"].items()):
        return None
    if config["dataset"] == "moving_mnist":
        file = config["test_data_dir"]
        if file and (file == STANDARD or md5(file) == STANDARD_MD5):
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
    rows = sorted(table["rows"].items(), key=lambda row: row[1][2][0])
    return {
        "metrics": table["metrics"],
        "rows": [[name, f"{size} M", source, *figures] for name, (size, source, figures) in rows],
        "own": [mean.get(name, math.nan) for name in table["metrics"]],
        "note": note,
    }


def md5(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


# The baselines in a sentence.
BASELINE_NAMES = {
    "black frame": "a black frame",
    "last input frame": "the last input frame repeated",
    "motion": "the last input frame moved along the optical flow",
}


def main_metrics(names):
    """The metrics that the page shows first, four at most; the others are folded."""
    chosen = [name for name in names if name in ("mse", "ssim", "psnr") or name.startswith("csi_")]
    return (chosen or list(names))[:4]


def headline(results):
    """The result in one sentence, such as "85 % less squared error than a black frame; SSIM 0.88.".

    results   {label: Metrics.compute()}, the forecast first

    "" where no squared error of a baseline is known and above 0.
    """
    (_, own), *baselines = ((label, result["mean"]) for label, result in results.items())
    parts = []
    for label, other in baselines:
        error, reference = own.get("mse", math.nan), other.get("mse", math.nan)
        if math.isfinite(error) and math.isfinite(reference) and reference > 0:
            parts.append(f"{compared(error / reference)} {BASELINE_NAMES.get(label, label)}")
    if not parts:
        return ""
    text = "; ".join(parts)
    ssim = own.get("ssim", math.nan)
    return text + (f"; SSIM {ssim:.2f}." if math.isfinite(ssim) else ".")


def compared(ratio):
    """A ratio of squared errors in words, up to the name of what it is compared with."""
    percent = round(100 * (1 - ratio))
    if percent == 100:
        return "more than 99 % less squared error than" if ratio > 0 else "no squared error, unlike"
    if percent > 0:
        return f"{percent} % less squared error than"
    return f"{-percent} % more squared error than" if percent < 0 else "the same squared error as"


def pick(errors):
    """The sequences to show: {"best": index, "median": index, "worst": index}, each index once.

    errors   the error of each sequence; NaN (nothing to compare) is never picked
    """
    order = sorted((i for i, error in enumerate(errors) if not math.isnan(error)), key=errors.__getitem__)
    roles = {}
    for role, rank in (("best", 0), ("worst", -1), ("median", (len(order) - 1) // 2)):
        if order and order[rank] not in roles.values():
            roles[role] = order[rank]
    return {role: roles[role] for role in ("best", "median", "worst") if role in roles}


def versions():
    """{name: version} of the software that the figures depend on."""
    found = {"Python": platform.python_version(), "system": platform.platform()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "timm")}
    if revision := git_revision():
        found["code"] = revision
    return found


def git_revision():
    """The commit of the code, with -dirty if files were changed since; "" outside a checkout of this project."""
    # An installed package may lie inside the checkout of another project, which does not track its files.
    tracked = ["git", "ls-files", "--error-unmatch", TEMPLATE.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for command in (tracked, describe):
            done = subprocess.run(command, cwd=TEMPLATE.parent, capture_output=True, text=True)
            if done.returncode:
                return ""
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()


class Shown(NamedTuple):
    """One sequence of the test set that the report shows.

    role                        best, median or worst
    index                       position in the test set
    errors                      mse of each lead time, (T,), as the table of the report computes it
    inputs, targets, forecast   tensors (T, C, H, W) in [0, 1] on the CPU, NaN for missing pixels
    """

    role: str
    index: int
    errors: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    forecast: torch.Tensor


def for_player(shown, look, limit):
    """What the player needs of one sequence.

    shown   Shown
    look    Look
    limit   errors from here on get the full colour
    """
    frames = shown.inputs, shown.targets, shown.forecast
    truth, following, expected = (shrunk(look.values(each), PLAYER_SIDE) for each in frames)
    return {
        "role": shown.role,
        "index": shown.index,
        "given": len(shown.inputs),
        "size": list(truth.shape[1:3]),
        "mse": shown.errors.tolist(),
        "truth": sprite(look.paint(np.concatenate([truth, following]))),
        "forecast": sprite(look.paint(expected)),
        "error": sprite(signed_colours(expected, following, limit)),
    }


def sprite(images):
    """Pictures (T, H, W, 1 or 3) in [0, 1] in one PNG, row by row: {"columns": pictures per row, "uri": data URI}."""
    T, H, W, _ = images.shape
    columns = max(1, min(T, SPRITE_WIDTH // W))
    pixels = np.zeros((-(-T // columns) * H, columns * W, 3), np.uint8)
    for t, image in enumerate(images):
        y, x = t // columns * H, t % columns * W
        pixels[y : y + H, x : x + W] = (255 * image.clip(0, 1)).round()
    picture = Image.fromarray(pixels)
    if (pixels == pixels[..., :1]).all():
        picture = picture.convert("L")
    elif few := picture.convert("RGB").getcolors(256):
        picture = with_palette(pixels, [colour for _, colour in few])
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return {"columns": columns, "uri": data_uri(file.getvalue())}


def with_palette(pixels, colours):
    """Pixels (H, W, 3) of 256 colours at most as an image with a palette, which is a third of the size."""
    colours = np.unique(np.array(colours, np.uint32) @ (65536, 256, 1))
    picture = Image.fromarray(np.searchsorted(colours, pixels @ np.uint32((65536, 256, 1))).astype(np.uint8), "P")
    picture.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8).tobytes())
    return picture


def scale_of(look):
    """The colours of a scale for the page: {"label", "gradient": a gradient of CSS, "ticks": [[place, text]]}."""
    colours, ticks = look.scale()
    count = len(colours)
    names = [f"rgb({' '.join(str(round(255 * float(part))) for part in colour)})" for colour in colours]
    stops = [f"{name} {100 * i / count:.4g}% {100 * (i + 1) / count:.4g}%" for i, name in enumerate(names)]
    return {"label": look.label, "gradient": f"linear-gradient(90deg, {', '.join(stops)})", "ticks": ticks}


def data_uri(png):
    """The bytes of a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_report(
    path, *, title, facts, conventions, results, sequences, config, command, look=None, leads=None, channels=None,
    spectrum=None,
):  # fmt: skip
    """Write the page.

    path          file to write
    title         heading
    facts         {label: text}, what was tested
    conventions   {metric: what it measures}
    results       {label: Metrics.compute()}, the forecast first
    sequences     list of Shown
    config        dict of options
    command       the exact command line
    look          Look; None: grey
    leads         names of the lead times, such as 10 min; None: they are counted
    channels      names of the channels; None: they are counted
    spectrum      a PNG of the power spectra to show; None: none
    """
    first = next(iter(results.values()))
    look = look or Look()
    limit = error_limit([(look.values(shown.forecast), look.values(shown.targets)) for shown in sequences], look)
    page = {
        "title": title,
        "headline": headline(results),
        "facts": facts,
        "conventions": conventions,
        "main_metrics": main_metrics(list(first["mean"])),
        "units": UNITS,
        "results": results,
        "published": published(config, first["mean"]),
        "sequences": [for_player(shown, look, limit) for shown in sequences],
        "white": look.high if look.colours == GREY else 1.0,
        "scale": scale_of(look) if look.label else None,
        "limit": limit,
        "limit_unit": look.unit,
        "channels": config["input_channels"],
        "channel_names": channels or [f"channel {c}" for c in range(config["input_channels"])],
        "leads": leads or counted_leads(len(next(iter(first["per_frame"].values())))),
        "spectrum": data_uri(Path(spectrum).read_bytes()) if spectrum else None,
        "config": config,
        "versions": versions(),
        "command": command,
    }
    # "</script>" in a text would end the page's JSON early
    text = strict_json(page).replace("<", "\\u003c")
    with replacing(path) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, text), encoding="utf-8")
