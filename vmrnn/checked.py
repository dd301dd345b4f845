"""Checks of what a checkpoint holds before anything of it is used. A file may come from a stranger or a broken disk.

Each function raises Fault with what is wrong.
"""

import copy
import hashlib
import json
import math

import torch

from vmrnn.values import ValueRange


class Fault(ValueError):
    """What is wrong with the contents of a file."""


# Tables of our checkpoints, which may also be absent or None.
TABLES = {"config": dict, "value_range": dict, "optimizer": dict, "scaler": dict, "position": dict}
RANGE = ValueRange.__dataclass_fields__.keys()
# Entries of a stored ValueRange that are one value, and those that are lists; low and high may be either
RANGE_SINGLES = {"transform", "zero_below", "step"}
RANGE_LISTS = {"missing", "names", "units", "levels", "directions", "labels"}
RANGE_TEXTS = {"transform", "names", "units", "levels", "directions", "labels"}
METADATA = {"format", "config", "value_range", "checksum"}  # the keys of our safetensors files


def check_contents(content):
    """Check a checkpoint with our format tag: every key has its type, and every weight is a plain tensor.

    content   a dict, as torch.load returned it
    """
    if not all(isinstance(key, str) for key in content):
        raise Fault("a key is not text")
    if type(content["version"]) is not int or content["version"] < 1:
        raise Fault("its version is not a number")
    for key, kind in TABLES.items():
        if not isinstance(content.get(key), kind | None):
            raise Fault(f"its {key} is not a table")
    check_state(content["model"])
    if content.get("ema") is not None:
        check_state(content["ema"])
    if content.get("value_range") is not None:
        check_range(content["value_range"])


def check_range(values):
    """Check the types of a stored ValueRange. Its own rules are checked when it is made."""
    if not isinstance(values, dict) or not {"low", "high"} <= values.keys() <= RANGE:
        raise Fault(f"its value_range has other entries than {', '.join(RANGE)}")
    for key, value in values.items():
        if key == "given":
            if value is not None:
                check_range(value)
            continue
        is_list, kinds = isinstance(value, list), (str,) if key in RANGE_TEXTS else (int, float)
        fits = all(type(item) in kinds for item in (value if is_list else [value]))
        if not fits or key in (RANGE_SINGLES if is_list else RANGE_LISTS):
            raise Fault(f"its value_range has {key} {value!r}")


def check_state(state):
    """Check a state dict: names and plain tensors on the CPU. Returns it."""
    if not isinstance(state, dict) or not state:
        raise Fault("it holds no state dict")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise Fault("the name of a tensor is not text")
        check_tensor(name, tensor)
    return state


def check_tensor(name, tensor):
    """Check that a value is a dense tensor of real numbers on the CPU, whose storage holds all of its elements."""
    if not isinstance(tensor, torch.Tensor):
        raise Fault(f"{name} is not a tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise Fault(f"{name} is not a plain tensor ({tensor.layout} on {tensor.device})")
    if tensor.dtype.is_complex:
        raise Fault(f"{name} holds {tensor.dtype}")
    if not tensor.is_contiguous():
        raise Fault(f"{name} is not stored densely")


def check_finite(state):
    """Check that no weight is NaN or infinite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Fault(f"{name} holds values that are not finite")


def check_like(value, template, name):
    """Check that a value read from a file has the form of a value that this program makes.

    value      what the file holds
    template   a number, a list of numbers, or a dict of such values; its keys and types are the ones that are wanted
    name       what the message calls the value

    Numbers must be 0 or more, and whole numbers below 2**63. Where a float is wanted, and in lists, whole numbers and
    infinity are allowed. NaN never is.
    """
    if isinstance(template, dict):
        if not isinstance(value, dict) or value.keys() != template.keys():
            raise Fault(f"{name} has other entries than {', '.join(map(str, template))}")
        for key in template:
            check_like(value[key], template[key], f"{name} {key}")
    elif isinstance(template, list):
        if not isinstance(value, list):
            raise Fault(f"{name} is not a list")
        for item in value:
            check_like(item, 0.0, name)
    else:
        kinds = (int, float) if type(template) is float else (type(template),)
        if type(value) not in kinds or math.isnan(value) or value < 0 or (type(value) is int and value >= 2**63):
            raise Fault(f"{name} is {value!r}")


def checked_moments(optimizer, state):
    """The stored state of an optimiser, checked and copied, as the "state" of Optimizer.load_state_dict.

    optimizer   a fresh optimiser of the run
    state       {number of the parameter: {name: tensor or value}}; empty: no update was made yet

    torch's fused kernels trust shapes and strides. Every tensor is therefore copied into new memory of its parameter's
    form.
    """
    if not isinstance(state, dict):
        raise Fault("the optimiser's state is not a table")
    if not state:
        return {}
    expected = state_after_an_update(optimizer)
    if state.keys() != expected.keys():
        raise Fault("the optimiser's state is of other parameters")
    copied = {}
    for number, entries in expected.items():
        found = state[number]
        if not isinstance(found, dict) or found.keys() != entries.keys():
            raise Fault(f"the optimiser's state of parameter {number} has other entries than {', '.join(entries)}")
        copied[number] = {
            name: checked_moment(f"the optimiser's {name} of parameter {number}", found[name], template)
            for name, template in entries.items()
        }
    return copied


def checked_moment(name, value, template):
    """One entry of an optimiser's state, checked and copied.

    name       what the message calls it
    value      what the file holds
    template   the entry after an update: a tensor, whose shape the value must have, or a plain value, which it must
               equal
    """
    if not isinstance(template, torch.Tensor):
        if type(value) is not type(template) or value != template:
            raise Fault(f"{name} is {value!r}")
        return value
    check_tensor(name, value)
    if value.shape != template.shape or not value.is_floating_point():
        raise Fault(f"{name} is {value.dtype} {tuple(value.shape)}, not {tuple(template.shape)}")
    if not value.isfinite().all():
        raise Fault(f"{name} holds values that are not finite")
    return torch.empty_like(template, device="cpu").copy_(value)


def state_after_an_update(optimizer):
    """The state that an optimiser has after one update: its names, shapes and types are those of every later one."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    return twin.state_dict()["state"]


def checksum(state, metadata):
    """SHA-256 of weights and of the texts that are stored beside them, as hexadecimal digits.

    state      {name: contiguous tensor}
    metadata   {key: text}, without the checksum itself
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_metadata(state, metadata):
    """Check the checksum in the metadata of a safetensors file. Published and older files have none, and pass."""
    # A damaged name of the checksum must not pass for a file without one.
    if "config" in metadata and metadata.keys() - METADATA:
        raise Fault("its metadata have unknown keys")
    stored = metadata.get("checksum")
    rest = {key: text for key, text in metadata.items() if key != "checksum"}
    if stored is not None and checksum(state, rest) != stored:
        raise Fault("its checksum does not fit its contents")
