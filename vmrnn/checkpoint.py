"""Reading and writing weights and checkpoints: ours, safetensors, and the published files."""

import json
import logging
import pickle
import re
import struct
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vmrnn import checked, config as configuration
from vmrnn.data.table import DATASETS, DIGITS
from vmrnn.errors import UserError
from vmrnn.files import replacing
from vmrnn.network import build_model
from vmrnn.runtime import pick_device
from vmrnn.values import ValueRange

log = logging.getLogger("vmrnn")


class Damaged(UserError):
    """A checkpoint was read to its end and is damaged, or is not a checkpoint."""


# What torch.load, zipfile and safetensors raise for files that are not what they seem.
DAMAGE = (SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, TypeError,
          KeyError, AttributeError, IndexError, AssertionError)  # fmt: skip

FORMAT, VERSION = "vmrnn-checkpoint", 2
READ_PAUSES = (1, 5)  # seconds before the second and the third attempt to read a checkpoint

# Weights of published files that no output depends on. Every VSS block but a cell's first carries an unused
# `linear`, and the decoder carries an unused patch embedding.
DEAD_LINEAR = re.compile(r"(.*\.VSBs\.[1-9]\d*)\.linear\.(weight|bias)")
DEAD_EMBEDDING = "Upsample.patch_embed."


@dataclass(frozen=True)
class Trained:
    """A network from a file.

    model         the network, in evaluation mode, on its device
    config        vmrnn.config.Config that the network was built from
    value_range   ValueRange of the data that the network was trained on; None: the file does not say
    training      options of the training, a dict: those in the file, or those of `config` if the file holds only
                  weights
    """

    model: torch.nn.Module
    config: configuration.Config
    value_range: ValueRange | None
    training: dict


def load_network(path, config=None, device="cpu", **changes):
    """The network of a file of weights.

    path      last.pt or best.safetensors of a run, any other safetensors file, or a published torch.save file
    config    TOML file whose options replace those in the file; a file of bare weights needs it, or `changes`
    device    auto, cpu, cuda, cuda:1, mps or xpu; None: the device of `config`, else auto
    changes   options that replace those of both files, such as scan="torch"

    Returns Trained. The weights are the averaged ones if the run has them. UserError: a file that is missing, damaged
    or does not fit the network, bare weights without a configuration, an unknown option, a device that does not exist.
    """
    content = read_checkpoint(path)
    changes = changes if device is None else changes | {"device": str(device)}
    if content["config"] is None and config is None and not configuration.for_test(changes):
        raise UserError(f"{path}: holds only weights; name the network's configuration with config")
    stored = configuration.for_test(content["config"] or {})
    resolved = configuration.resolve(config, changes, base=stored)
    if resolved.dataset != "moving_mnist":  # the digits of the training say nothing of other data
        others = {key: value for key, value in stored.items() if key not in DIGITS}
        resolved = configuration.resolve(config, changes, base=others)
    device = pick_device(resolved.device)
    weights = weights_of(content)
    check_size(resolved, weights, path)
    model = build_model(**resolved.network_options)
    load_weights(model, weights, path)
    return Trained(model.to(device).eval(), resolved, value_range_of(content, resolved), stored or resolved.to_dict())


def check_size(config, weights, path):
    """UserError: the configuration asks for another network than that of the weights.

    A configuration inside a file from a stranger may ask for a network of any size. The check takes no memory for it.
    """
    blocks = sum(config.depths + config.depths_down + config.depths_up)
    if blocks > 64 + len(weights):
        raise UserError(
            f"{path}: its configuration has {blocks} blocks and its weights {len(weights)} tensors; get it again"
        )
    try:
        with torch.device("meta"):
            skeleton = build_model(**config.network_options)
    except (RuntimeError, OverflowError) as error:  # sizes beyond what can be counted
        raise UserError(
            f"{path}: its configuration asks for a network too large for any memory; get it again"
        ) from error
    matched_weights(skeleton, weights, path)


def value_range_of(content, config):
    """The ValueRange of the data that a checkpoint was trained on, None if it is not known.

    content   what read_checkpoint returned
    config    Config

    If the file stores no range, the range is made from `config`. Otherwise it is the stored one, but `config` may
    differ from the training in two options: missing_value then replaces the missing values, and a data_range that is
    not empty replaces low and high. Names, units and ranges of forcings stay those of the training.
    UserError: another transform or zero_below than in the training, since the network only knows values on that scale.
    """
    stored = content["config"] or {}
    low_high = config.data_range or DATASETS[config.dataset].data_range
    if not content.get("value_range"):
        return ValueRange.of(config, low_high) if low_high else None
    trained = ValueRange.from_dict(content["value_range"])
    keys = ("data_range", "missing_value", "transform", "zero_below")
    changed = [key for key in keys if key in stored and stored[key] != getattr(config, key)]
    for key in ("transform", "zero_below"):
        if key in changed:
            raise UserError(
                f"{key} is {getattr(config, key)}, but the network was trained with {stored[key]}, and its values mean "
                "nothing on another scale; leave it out"
            )
    # An empty data_range does not replace the range: one found in other data would scale values differently.
    if "data_range" in changed and low_high:
        wanted = ValueRange.of(config, low_high)
        trained = replace(trained, low=wanted.low, high=wanted.high)
    if "missing_value" in changed:
        missing = tuple(config.missing_value)
        forcings = replace(trained.given, missing=missing) if trained.given else None
        trained = replace(trained, missing=missing, given=forcings)
    return trained


def load_weights(model, source, name="the state dict"):
    """Copy the weights of `source` into `model`.

    model    a network
    source   a path (published torch.save file, our checkpoint, safetensors) or a state dict
    name     what error messages call a state dict

    The dead weights of published files are dropped, and the prefixes of published names (`module.`, `model.`, and
    `ST.layer` of the KTH and TaxiBJ variants) are mapped. Everything else must match. UserError: names what is missing,
    unexpected or of another shape; the model is then unchanged.
    """
    if isinstance(source, (str, Path)):
        name, source = str(source), weights_of(read_checkpoint(source))
    state = matched_weights(model, source, name)
    try:
        checked.check_finite(state)
    except ValueError as error:
        raise UserError(f"{name}: {error}; the file is damaged, or its training failed: get another") from error
    model.load_state_dict(state)


def matched_weights(model, source, name):
    """The weights of a state dict under the names of `model`. UserError: they do not fit the model."""
    own = model.state_dict()
    state = published_to_ours(source, own)
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} ({tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network)"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    complaints = [f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys]
    if complaints:
        raise UserError(f"{name} does not fit this network: {'; '.join(complaints)}; check model, widths and depths")
    return state


def weights_of(content):
    """The weights to forecast with: the averaged ones (EMA) if the run has them, since they were validated."""
    return content.get("ema") or content["model"]


def shorten(keys, most=3):
    """The first `most` of a list of names, as text."""
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def published_to_ours(state, own):
    """A state dict with the prefixes of published files mapped and their dead weights dropped.

    state   the state dict of a file
    own     the keys of our network; only dead weights of blocks that it has are dropped
    """
    renamed = {}
    for key, value in state.items():
        while key.startswith(("module.", "model.")):
            key = key.split(".", 1)[1]
        key = re.sub(r"^ST\.layer\.", "ST.layers.0.", key)
        dead = DEAD_LINEAR.fullmatch(key)
        if dead and f"{dead[1]}.ln_1.weight" in own:
            continue
        if key.startswith(DEAD_EMBEDDING) and key.replace("Upsample", "Downsample") in own:
            continue
        renamed[key] = value
    return renamed


def find_checkpoint(path, names=("best.safetensors", "last.pt")):
    """The file of weights that a person means: `path`, one of `names` in a folder, or a name without its ending."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise UserError(f"checkpoint {path}: a folder without {' and '.join(names)}; name the file of weights")
        return found[0]
    with_ending = Path(f"{path}.safetensors")
    return with_ending if not path.exists() and with_ending.exists() else path


def read_checkpoint(path):
    """The contents of any file that load_weights takes, on the CPU.

    Returns {"model": state dict, "config": dict or None, ...}; the files of a run hold "value_range" and more.
    A pickle is read with weights_only=True: code in it is refused and not run. UserError: a file that is missing,
    damaged, or holds no state dict.
    """
    path = find_checkpoint(path)
    try:
        return checked_contents(path, read_file(path))
    except checked.Fault as error:
        raise Damaged(f"checkpoint {path}: damaged or not a checkpoint ({error}); get it again") from error


def read_file(path):
    """What a file of weights holds, in the form that its own format gives it. UserError: it is missing or damaged."""
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        # A safetensors file begins with eight bytes of length and JSON.
        return read_safetensors(path) if head[8:] == b"{" else read_pickle(path, zipped=head.startswith(b"PK"))
    except OSError as error:
        last = path.with_name("last.pt")
        hint = f"; {last} has the weights so far" if isinstance(error, FileNotFoundError) and last.exists() else ""
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror or error}){hint}") from error
    except pickle.UnpicklingError as error:
        raise Damaged(
            f"checkpoint {path}: damaged, or holds more than weights, and is not loaded (code in it was not run)"
        ) from error
    except checked.Fault:  # before DAMAGE: it is a ValueError
        raise
    except DAMAGE as error:
        raise Damaged(f"checkpoint {path}: damaged or not a checkpoint; get it again") from error


def read_safetensors(path):
    """The contents of a safetensors file, as those of a checkpoint of ours."""
    with safe_open(path, "pt") as f:
        texts = f.metadata() or {}
        state = {key: f.get_tensor(key) for key in f.keys()}
    checked.check_metadata(state, texts)
    tables = {key: json.loads(texts.get(key, "null")) for key in ("config", "value_range")}
    return {"format": FORMAT, "version": VERSION, "model": state} | tables


def read_pickle(path, zipped):
    """What torch.save has written, a checkpoint of ours or a published file. zipped: whether it is a zip archive."""
    if zipped and (broken := zipfile.ZipFile(path).testzip()):  # torch.load skips this check
        raise checked.Fault(f"the checksum of {broken} in it does not fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as one about the pickle protocol of a file by another program
        return torch.load(path, map_location="cpu", weights_only=True)


def checked_contents(path, content):
    """The contents of a file as read_checkpoint returns them.

    content   what the file holds: a checkpoint of ours, or a state dict, which may lie in one or two dicts

    UserError: a checkpoint of a newer version. checked.Fault: contents that are not what they should be.
    """
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if not {"version", "model", "config"} <= content.keys():
            raise checked.Fault("it is incomplete")
        # A newer version may hold other things, so its contents are not looked at.
        if type(content["version"]) is int and content["version"] > VERSION:
            raise UserError(f"checkpoint {path}: version {content['version']} is newer than this program; update it")
        checked.check_contents(content)
        return content
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise checked.Fault("it holds no state dict")
    return {"model": checked.check_state(content), "config": None}


def save_checkpoint(path, content):
    """Save the contents of a checkpoint, a dict with "model" and "config"; run_folder.RunState makes that of a run.

    The file before this one is kept as `previous_of(path)`.
    """
    with replacing(path, keep=previous_of(path)) as temporary:
        torch.save({"format": FORMAT, "version": VERSION} | content, temporary)


def previous_of(path):
    """The name under which the save before `path` is kept: previous_last.pt beside last.pt."""
    return Path(path).with_name(f"previous_{Path(path).name}")


def read_last_checkpoint(path):
    """Read `path`, or the checkpoint before it if `path` is damaged or missing.

    Returns (content, path of the file that was read). Falling back logs a warning. UserError: neither can be used, or
    `path` exists and cannot be read, or comes from a newer version. Such a file may be whole, and the next save of a
    run that continues from the older file would replace it.
    """
    path, previous = Path(path), previous_of(path)
    try:
        if path.exists() or not previous.exists():
            return read_patiently(path), path
        error = f"{path}: missing"
    except Damaged as damage:
        if not previous.exists():
            raise
        error = damage
    content = read_patiently(previous)
    log.warning("%s: continuing from %s", error, previous)
    return content, previous


def read_patiently(path):
    """read_checkpoint, tried again after a read error: on a network file system it often passes."""
    for seconds in READ_PAUSES:
        try:
            return read_checkpoint(path)
        except UserError as error:
            if not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, FileNotFoundError):
                raise
            log.warning("%s: trying again in %g s", error, seconds)
            time.sleep(seconds)
    return read_checkpoint(path)


def save_weights(path, model, config, value_range=None):
    """Save weights to publish: a safetensors file.

    path          file to write
    model         the network
    config        dict of options, stored in the file's metadata
    value_range   ValueRange of the data, stored beside the configuration
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(config)}
    if value_range is not None:
        metadata["value_range"] = json.dumps(value_range.to_dict())
    metadata["checksum"] = checked.checksum(state, metadata)
    # save_file would make a file that only its owner can read.
    content = safetensors.torch.save(state, metadata=metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
