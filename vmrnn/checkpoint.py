"""Reading and writing weights and checkpoints: ours, safetensors, and the published files."""

import json
import logging
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vmrnn.errors import UserError
from vmrnn.files import replacing

log = logging.getLogger("vmrnn")

# What torch.load, zipfile and safetensors raise for files that are not what they seem.
DAMAGE = (SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, TypeError, KeyError,
          AttributeError, IndexError, AssertionError)  # fmt: skip

FORMAT, VERSION = "vmrnn-checkpoint", 2

# Weights of published files that no output depends on: every block but a cell's first carries a
# `linear`, and the way up a patch embedding.
DEAD_LINEAR = re.compile(r"(.*\.VSBs\.[1-9]\d*)\.linear\.(weight|bias)")
DEAD_EMBEDDING = "Upsample.patch_embed."


def load_weights(model, source, name="the state dict"):
    """Load `source` into `model`, strictly.

    source: a path (published torch.save file, our checkpoint, safetensors) or a state dict, `name` in errors. Drops
    exactly the published files' dead weights and maps their prefixes (`module.`, `model.`, the single
    `ST.layer` of the KTH and TaxiBJ variants). Raises UserError that names what is missing,
    unexpected or of another shape; the model is then untouched.
    """
    if isinstance(source, (str, Path)):
        name, source = str(source), weights_of(read_checkpoint(source))
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
    found = [f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise UserError(f"{name} does not fit this network: {'; '.join(found)}; check model, widths and depths")
    model.load_state_dict(state)


def weights_of(content):
    """The weights to test and to forecast with: of a run with averaged weights those, as its validations had them."""
    return content.get("ema") or content["model"]


def shorten(keys, most=3):
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def published_to_ours(state, own):
    """A state dict with the published files' prefixes mapped and their dead weights dropped.

    own: our network's keys; what is dead belongs to a block, or a way up, that it has.
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


def read_checkpoint(path):
    """{"model": state dict, "config": dict or None, ...} from any file load_weights takes, on the CPU.

    A pickle is read with weights_only=True: code in it is refused, never run. Raises UserError for a
    file that is missing, damaged or holds no state dict.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if head[8:] == b"{":  # eight bytes of length, then JSON
            with safe_open(path, "pt") as f:
                config = json.loads((f.metadata() or {}).get("config", "null"))
                if not isinstance(config, dict | None):
                    raise TypeError("the configuration is no table")
                return {"model": {key: f.get_tensor(key) for key in f.keys()}, "config": config}
        if head.startswith(b"PK") and (broken := zipfile.ZipFile(path).testzip()):  # torch.load skips the check
            raise UserError(f"checkpoint {path}: damaged ({broken}); get it again")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path}: damaged, or holds more than weights, and is not loaded (code in it was not run)"
        ) from error
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"checkpoint {path}: damaged or not a checkpoint; get it again") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if not {"version", "model", "config"} <= content.keys():
            raise UserError(f"checkpoint {path}: incomplete; get it again")
        if content["version"] > VERSION:
            raise UserError(f"checkpoint {path}: version {content['version']} is newer than this program; update it")
        return content
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"checkpoint {path}: holds no state dict")
    return {"model": content, "config": None}


def save_checkpoint(path, **content):
    """Everything a run needs to go on (see train.py); the file before this one stays as `previous_of(path)`."""
    with replacing(path, keep=previous_of(path)) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)


def previous_of(path):
    return Path(path).with_name(f"previous_{Path(path).name}")


def read_last_checkpoint(path):
    """(content, path) of `path`, or, where that is damaged or gone, of the one before it, with a warning."""
    path, previous = Path(path), previous_of(path)
    try:
        return read_checkpoint(path), path
    except UserError as error:
        if not previous.exists():
            raise
        content = read_checkpoint(previous)
        log.warning("%s: going on from %s", error, previous)
        return content, previous


def save_weights(path, model, config):
    """Weights to publish: safetensors with the configuration inside."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    # Not save_file, which makes files that only their owner can read.
    content = safetensors.torch.save(state, metadata={"format": "pt", "config": json.dumps(config)})
    with replacing(path) as temporary:
        temporary.write_bytes(content)
