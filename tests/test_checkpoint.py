"""Weights from every kind of file, strictly; damaged and malicious files; files that cannot be written."""

import os
import pickle
import random
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import vmrnn
from vmrnn import checked, config as configuration
from vmrnn.checkpoint import load_weights, read_checkpoint, read_last_checkpoint, save_checkpoint, save_weights
from vmrnn.errors import UserError
from vmrnn.files import replacing
from vmrnn.network import build_model
from vmrnn.values import ValueRange
from VMRNN_B import VMRNN as B
from VMRNN_D import VMRNN as D


def small_d():
    return D(16, 2, 1, 16, [1, 2], [2, 1])


def published_state(model):
    """What the published code would have saved: our weights and its dead ones."""
    state = dict(model.state_dict())
    for key, value in model.state_dict().items():
        if ".VSBs.0.linear." in key:
            for j in range(1, 3):
                name = key.replace("VSBs.0", f"VSBs.{j}")
                if name.replace("linear.weight", "ln_1.weight").replace("linear.bias", "ln_1.bias") in state:
                    state[name] = torch.randn_like(value)
        if key.startswith("Downsample.patch_embed"):
            state[key.replace("Downsample", "Upsample")] = torch.randn_like(value)
    assert len(state) > len(model.state_dict()) + 4
    return state


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_published_files(tmp_path, prefix):
    source, target = small_d(), small_d()
    assert not same(source, target)
    torch.save({prefix + k: v for k, v in published_state(source).items()}, tmp_path / "trained_model_state_dict")
    load_weights(target, tmp_path / "trained_model_state_dict")
    assert same(source, target)


def test_the_single_cell_of_the_kth_variant():
    source, target = B(16, 2, 1, 16, [2]), B(16, 2, 1, 16, [2])
    load_weights(target, {k.replace("ST.layers.0.", "ST.layer."): v for k, v in source.state_dict().items()})
    assert same(source, target)


def test_our_own_files(tmp_path):
    source = small_d()
    save_weights(tmp_path / "best.safetensors", source, {"embed_dim": 16})
    save_checkpoint(tmp_path / "last.pt", {"model": source.state_dict(), "config": {"embed_dim": 16}, "epoch": 3})
    save_file(dict(source.state_dict()), tmp_path / "plain.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "wrapped.pth")
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "model.pth")
    for name, config in [("best.safetensors", {"embed_dim": 16}), ("last.pt", {"embed_dim": 16}),
                         ("plain.safetensors", None), ("wrapped.pth", None), ("model.pth", None)]:  # fmt: skip
        target = small_d()
        load_weights(target, tmp_path / name)
        assert same(source, target), name
        assert read_checkpoint(tmp_path / name)["config"] == config
    assert read_checkpoint(tmp_path / "last.pt")["epoch"] == 3


def test_fp16_weights_are_loaded_as_the_networks_type():
    source, target = small_d(), small_d()
    load_weights(target, {k: v.half() for k, v in source.state_dict().items()})
    assert all(p.dtype == torch.float32 for p in target.parameters())


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("ST.layers.0.VSBs.0.linear.weight"), "1 missing: ST.layers.0.VSBs.0.linear.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected: extra"),
        # dead in a block, or a network, that has them, and only under this name
        (lambda s: s.update({"ST.layers.0.VSBs.7.linear.weight": torch.ones(3)}), "1 unexpected: .*VSBs.7.linear"),
        (lambda s: s.update({"Upsample.patch_embed.norm.bias": torch.ones(3)}), "1 unexpected: Upsample.patch_embed"),
        (lambda s: s.update({"ST.patch_embed.proj2": torch.ones(1)}), "1 unexpected: ST.patch_embed.proj2"),
        (
            lambda s: s.update({"ST.patch_inflated.Conv.bias": torch.ones(3)}),
            r"another shape: .*\(3,\) in the file, \(1,\)",
        ),
    ],
)
def test_everything_else_is_strict_and_named(change, complaint):
    model = B(16, 2, 1, 16, [2])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    change(state)
    with pytest.raises(UserError, match=complaint):
        load_weights(model, state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # nothing half-loaded


def test_a_checkpoint_of_the_other_network():
    with pytest.raises(UserError, match="does not fit this network: .* missing: .*; .* unexpected: "):
        load_weights(B(16, 2, 1, 16, [2]), small_d().state_dict())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_not_executed(tmp_path):
    torch.save({"weight": Malicious(str(tmp_path / "owned"))}, tmp_path / "new.pt")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Malicious(str(tmp_path / "owned"))))
    for name in ("new.pt", "old.pkl"):
        with pytest.raises(UserError, match=re.escape(name)):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "old.pkl").read_bytes())  # the file is what we say it is
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.safetensors"])
@pytest.mark.parametrize("damage", ["half", "nine bytes", "empty", "noise", "text"])
def test_damaged_files(tmp_path, name, damage):
    path = tmp_path / name
    if name == "last.pt":
        save_checkpoint(path, {"model": small_d().state_dict()})
    else:
        save_weights(path, small_d(), {})
    whole = path.read_bytes()
    path.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "nine bytes": whole[:9],
            "empty": b"",
            "noise": bytes((i * 37 + 11) % 256 for i in range(5000)),
            "text": b"<!DOCTYPE html><html>not found</html>",
        }[damage]
    )
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_files_without_weights(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_checkpoint(tmp_path / "list.pt")
    for read in (read_checkpoint, read_last_checkpoint):
        with pytest.raises(UserError, match="[^_]absent.pt: .*No such file"):
            read(tmp_path / "absent.pt")
    save_checkpoint(tmp_path / "future.pt", {"model": {}, "config": None})
    content = torch.load(tmp_path / "future.pt")
    torch.save(content | {"version": 99}, tmp_path / "future.pt")
    with pytest.raises(UserError, match="version 99"):
        read_checkpoint(tmp_path / "future.pt")


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, name=name: order.append(name) or f(*a))
    for _ in range(2):
        save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.ones(2)}, "config": None})
    assert order == ["fsync", "replace", "fsync", "replace", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes there")
def test_weights_are_for_whoever_may_read_the_folder(tmp_path):
    (tmp_path / "plain").touch()
    save_weights(tmp_path / "best.safetensors", small_d(), {})
    assert (tmp_path / "best.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.ones(2)}, "config": None})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        1 / 0  # noqa: B018
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_without_a_message_names_the_kind_of_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(RuntimeError\)"), replacing(tmp_path / "x"):
        raise RuntimeError


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes there")
@pytest.mark.parametrize("writer", ["save_checkpoint(path, dict(model=state))", "save_weights(path, model, {})"])
def test_a_full_disk(tmp_path, writer, run_forked):
    """In a process that may write 4,096 bytes to a file and no more."""
    code = f"""
import resource, signal
from pathlib import Path
from torch import nn
from vmrnn.checkpoint import save_checkpoint, save_weights
from vmrnn.runtime import run_program
path = Path(r"{tmp_path}") / "last"
model = nn.Linear(100, 100)
state = model.state_dict()
path.write_text("the old file")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
run_program(lambda: {writer})
"""
    done = run_forked("-c", code)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and "last: cannot be written" in done.stderr
    assert (tmp_path / "last").read_text() == "the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("name", ["last.pt", "old.pkl", "best.safetensors"])
def test_no_damage_ends_in_a_traceback(tmp_path, name):
    """Bytes flipped at 60 places: read as it is, or refused in one line."""
    path, rng = tmp_path / name, random.Random(0)
    if name == "last.pt":
        save_checkpoint(path, {"model": small_d().state_dict(), "config": {}})
    elif name == "old.pkl":
        torch.save(small_d().state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save_weights(path, small_d(), {})
    whole, refused = path.read_bytes(), 0
    original = small_d()
    load_weights(original, path)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole) if rng.random() < 0.5 else 4000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        model = small_d()
        try:
            load_weights(model, path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # a zip file's members are under a checksum
            assert name != "last.pt" or same(model, original)
    assert refused > 10


def test_a_fault_of_our_own_checks_is_not_called_damage(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    monkeypatch.setattr(checked, "check_state", lambda state: state["absent"])
    with pytest.raises(KeyError, match="absent"):
        read_checkpoint(tmp_path / "w.pt")


def test_files_that_end_too_soon(tmp_path):
    torch.save(small_d().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    for end in range(0, 3000, 7):
        (tmp_path / "cut.pt").write_bytes(content[:end])
        with pytest.raises(UserError, match="cut.pt: "):
            read_checkpoint(tmp_path / "cut.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "odd.safetensors", metadata={"config": "3"})
    with pytest.raises(UserError, match="odd.safetensors: damaged"):
        read_checkpoint(tmp_path / "odd.safetensors")


def test_a_checkpoint_with_parts_missing(tmp_path):
    torch.save({"format": "vmrnn-checkpoint", "version": 1, "model": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="incomplete"):
        read_checkpoint(tmp_path / "x.pt")


TINY = dict(model="VMRNN-B", patch_size=2, embed_dim=16, depths=[1], d_state=4, input_size=[16], dataset="array")


def test_a_network_from_a_file_alone(tmp_path):
    """Weights, configuration and range come back; options of the machine that trained do not."""
    config = configuration.resolve(None, TINY | {"scan": "mamba", "cache_dir": "gone", "missing_value": [-1.0]})
    source, path = build_model(**config.network_options), tmp_path / "w.safetensors"
    save_weights(path, source, config.to_dict(), ValueRange(-5.0, 20.0, (-1.0,)))
    trained = vmrnn.load_network(path)
    assert same(trained.model, source) and not trained.model.training
    assert trained.value_range == ValueRange(-5.0, 20.0, (-1.0,))
    assert (trained.config.scan, trained.config.cache_dir, trained.config.missing_value) == ("auto", "data/cache", [-1])
    changed = vmrnn.load_network(path, data_range=[0.0, 9.0])
    assert changed.value_range == ValueRange(0.0, 9.0, (-1.0,)) and same(changed.model, source)
    (tmp_path / "c.toml").write_text("missing_value = [7]\ndata_range = [0, 2]\n")
    assert vmrnn.load_network(path, tmp_path / "c.toml").value_range == ValueRange(0.0, 2.0, (7.0,))


def test_the_range_of_the_training_stays_when_the_missing_values_change(tmp_path):
    """The range was found in the training data, so data_range is empty; a test must not find another one."""
    config, path = configuration.resolve(None, TINY), tmp_path / "w.safetensors"
    forcings = ValueRange((0.0,), (4000.0,), names=("orography",), units=("m",))
    trained = ValueRange(250.0, 310.0, given=forcings, names=("t2m",), units=("K",), step=600.0)
    save_weights(path, build_model(**config.network_options), config.to_dict(), trained)
    found = vmrnn.load_network(path, missing_value=[-999.0]).value_range
    expected = replace(trained, missing=(-999.0,), given=replace(forcings, missing=(-999.0,)))
    assert found.to_dict() == expected.to_dict()  # names and units count here
    for change, says in (
        ({"transform": "sqrt"}, "transform is sqrt, but the network was trained with none"),
        ({"transform": "log", "zero_below": 0.1}, "transform is log, but the network was trained with none"),
    ):
        with pytest.raises(UserError, match=says):
            vmrnn.load_network(path, **change)


def test_the_range_of_the_training_stays_when_its_option_is_emptied(tmp_path):
    config = configuration.resolve(None, TINY | {"data_range": [0.0, 50.0], "transform": "log", "zero_below": 0.1})
    trained = ValueRange.of(config, config.data_range)
    save_weights(tmp_path / "w.safetensors", build_model(**config.network_options), config.to_dict(), trained)
    assert vmrnn.load_network(tmp_path / "w.safetensors", data_range=[]).value_range == trained
    with pytest.raises(UserError, match="zero_below is 0.5, but the network was trained with 0.1"):
        vmrnn.load_network(tmp_path / "w.safetensors", zero_below=0.5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"data_range": [1.0, 3.0], "missing_value": [9.0]}, ValueRange(1.0, 3.0, (9.0,))),
        ({"dataset": "taxibj", "input_channels": 2}, ValueRange(-1.0, 1.0)),
        ({"dataset": "moving_mnist"}, None),
    ],
)
def test_the_range_of_files_that_store_none(tmp_path, options, expected):
    config = configuration.resolve(None, TINY | options)
    save_weights(tmp_path / "w.safetensors", build_model(**config.network_options), config.to_dict())
    assert vmrnn.load_network(tmp_path / "w.safetensors").value_range == expected


def test_bare_weights_need_a_configuration(tmp_path):
    config = configuration.resolve(None, TINY)
    model = build_model(**config.network_options)
    torch.save(model.state_dict(), tmp_path / "bare")
    with pytest.raises(UserError, match="bare: holds only weights; name the network's configuration"):
        vmrnn.load_network(tmp_path / "bare", scan="torch")
    assert same(vmrnn.load_network(tmp_path / "bare", **TINY).model, model)


def test_digits_of_the_training_say_nothing_of_other_data(tmp_path):
    config, path = (
        configuration.resolve(None, TINY | {"dataset": "moving_mnist", "num_objects": 1}),
        tmp_path / "w.safetensors",
    )
    save_weights(path, build_model(**config.network_options), config.to_dict())
    assert vmrnn.load_network(path).config.num_objects == 1
    assert vmrnn.load_network(path, dataset="array").config.num_objects == 2
