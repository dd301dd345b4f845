"""Crafted and damaged checkpoints: refused in one line before anything of them is used."""

import copy
import random

import pytest
import torch
from helpers import TINY as TINY_RUN
from safetensors.torch import save_file

import train
import vmrnn
from vmrnn import config as configuration
from vmrnn.checked import check_like, checked_moments
from vmrnn.checkpoint import read_checkpoint, save_checkpoint, save_weights
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.optim import make_optimizer
from vmrnn.values import ValueRange

TINY = dict(model="VMRNN-B", patch_size=2, embed_dim=16, depths=[1], d_state=4, input_size=[16], dataset="array")


@pytest.fixture
def network():
    return build_model(**configuration.resolve(None, TINY).network_options)


def saved(path, model):
    save_weights(path, model, configuration.resolve(None, TINY).to_dict(), ValueRange(0.0, 5.0))
    return path


def test_every_flipped_bit_of_weights_is_noticed(tmp_path, network):
    """The header, the texts and the weights: 150 single bits, and blocks of zeroes."""
    good = saved(tmp_path / "w.safetensors", network).read_bytes()
    generator = random.Random(0)
    places = [generator.randrange(8 * len(good)) for _ in range(100)]
    places += [generator.randrange(8 * 3000) for _ in range(50)]  # the header
    bad = tmp_path / "bad.safetensors"
    for place in places:
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            vmrnn.load_network(bad)
    weights = 8 + int.from_bytes(good[:8], "little")  # where they begin
    for start in range(weights, len(good) - 512, len(good) // 20):
        bad.write_bytes(good[:start] + bytes(512) + good[start + 512 :])
        with pytest.raises(UserError, match="checksum does not fit"):
            vmrnn.load_network(bad)
    bad.write_bytes(good)
    vmrnn.load_network(bad)


def test_published_files_have_no_checksum_and_load(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "plain.safetensors", {"format": "pt"})
    assert vmrnn.load_network(tmp_path / "plain.safetensors", **TINY).config.embed_dim == 16


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, network, value):
    with torch.no_grad():
        network.ST.patch_embed.proj.bias[3] = value
    with pytest.raises(UserError, match=r"ST\.patch_embed\.proj\.bias holds values that are not finite"):
        vmrnn.load_network(saved(tmp_path / "w.safetensors", network))


def content_of(network):
    return {"model": network.state_dict(), "ema": None, "config": configuration.resolve(None, TINY).to_dict()}


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda c: c.update(model=[1]), "no state dict"),
        (lambda c: c.update(model={}), "no state dict"),
        (lambda c: c.update(ema={3: torch.ones(2)}), "not text"),
        (lambda c: c.update(config=[1]), "config is not a table"),
        (lambda c: c.update(config="x"), "config is not a table"),
        (lambda c: c.update(value_range=3), "value_range is not a table"),
        (lambda c: c.update(value_range={"low": "a"}), "value_range"),
        (lambda c: c.update(value_range={"low": [1.0], "high": 2.0, "missing": 3, "transform": []}), "value_range"),
        (
            lambda c: c.update(value_range={"low": 0.0, "high": 1.0, "transform": "log", "zero_below": [0.1]}),
            "zero_below",
        ),
        (lambda c: c.update(value_range={"low": 0.0, "high": 1.0, "missing": 3}), "has missing 3"),
        (lambda c: c.update(optimizer=3), "optimizer is not a table"),
        (lambda c: c.update(position=[]), "position is not a table"),
        (lambda c: c.update(version="2"), "version"),
        (lambda c: c.update(version=None), "version"),
        (lambda c: c["model"].update(a=3), "a is not a tensor"),
        (lambda c: c["model"].update({"ST.patch_embed.proj.bias": torch.ones(1).expand(16)}), "not stored densely"),
        (lambda c: c["model"].update(a=torch.ones(3, device="meta")), "not a plain tensor"),
        (lambda c: c["model"].update(a=torch.ones(3).to_sparse()), "not a plain tensor|not loaded"),
        (lambda c: c["model"].update(a=torch.ones(3, dtype=torch.complex64)), "complex"),
        (lambda c: c["config"].update(embed_dim=2**20), "another shape"),
        (lambda c: c["config"].update(embed_dim=2**30), "too large"),
        (lambda c: c["config"].update(depths=[10**9]), "blocks"),
        (lambda c: c["config"].update(depths=[[]]), "depths"),
        (lambda c: c["config"].update(embed_dim="16"), "embed_dim"),
        (lambda c: c["config"].update({7: 3}), "unknown key"),
    ],
)
def test_crafted_contents_end_in_one_line(tmp_path, network, change, complaint):
    content = content_of(network)
    change(content)
    save_checkpoint(tmp_path / "last.pt", content)
    with pytest.raises(UserError, match=complaint) as refused:
        vmrnn.load_network(tmp_path / "last.pt")
    assert "last.pt" in str(refused.value) or "checkpoint" in str(refused.value)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_moments_are_copied_or_refused(network, name):
    """A crafted one would let torch's fused kernels write beyond its memory."""
    device = torch.device("cpu")
    optimizer = make_optimizer(network, name, 1e-3, 0.01, device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    fresh = make_optimizer(network, name, 1e-3, 0.01, device)
    copied = checked_moments(fresh, state)
    for number, entries in state.items():
        for entry, value in entries.items():
            assert torch.equal(torch.as_tensor(copied[number][entry]), torch.as_tensor(value)), (number, entry)
    assert checked_moments(fresh, {}) == {}

    number = max(state, key=lambda n: next(v for v in state[n].values() if torch.is_tensor(v) and v.dim()).numel())
    entry = next(key for key, value in state[number].items() if torch.is_tensor(value) and value.dim())
    shape = state[number][entry].shape
    wrong = {
        "another shape": torch.zeros(1),
        "one element, expanded": torch.zeros(1).expand(shape),
        "whole numbers": torch.zeros(shape, dtype=torch.int32),
        "complex": torch.zeros(shape, dtype=torch.complex64),
        "not finite": torch.full(shape, torch.nan),
        "meta": torch.zeros(shape, device="meta"),
        "sparse": torch.zeros(shape).to_sparse(),
        "a number": 0.0,
    }
    for value in wrong.values():
        with pytest.raises(ValueError, match=f"optimiser's {entry} of parameter {number}|{entry}"):
            checked_moments(fresh, state | {number: state[number] | {entry: value}})
    for crafted in ([], {0: []}, {-1: {}}, state | {number: {}}, {key: state[key] for key in list(state)[1:]}):
        with pytest.raises(ValueError, match="optimiser's state"):
            checked_moments(fresh, crafted)


def test_values_have_the_form_of_a_template():
    template = {"epoch": 1, "loss": 0.0, "best": float("inf"), "window": [], "on": True}
    good = {"epoch": 3, "loss": 2, "best": 1.5, "window": [1.0, 2.0], "on": False}
    check_like(good, template, "position")
    for change in (
        {"epoch": 1.5}, {"epoch": "1"}, {"epoch": -1}, {"epoch": 2**70}, {"epoch": True}, {"loss": float("nan")},
        {"window": 3}, {"window": ["a"]}, {"on": 1}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="position"):
            check_like(good | change, template, "position")


def test_random_changes_of_a_checkpoints_contents(tmp_path, network):
    """Values of other types anywhere in the contents: the network loads, or one line says why not."""
    strange = [None, 3, -1, 1e400, "x", [], {}, [{}], True, torch.ones(2), (1, 2), b"x", torch.float16, 10**30]
    generator = random.Random(1)
    for _ in range(60):
        content = content_of(network)
        table = generator.choice([content, content["config"], content["model"]])
        table[generator.choice(list(table))] = generator.choice(strange)
        save_checkpoint(tmp_path / "last.pt", content)
        try:
            vmrnn.load_network(tmp_path / "last.pt")
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        read_or_refused(tmp_path / "last.pt")


def read_or_refused(path):
    try:
        read_checkpoint(path)
    except UserError:
        pass


def test_a_run_does_not_resume_from_crafted_contents(tmp_path):
    """A real run, whose last.pt was changed: one line, and the file stays as it is."""
    arguments = [*TINY_RUN, "--epochs", "1", "--res_dir", str(tmp_path / "run")]
    train.main(arguments)
    last = tmp_path / "run" / "last.pt"
    good = torch.load(last, weights_only=True)

    def crafted(change):
        content = copy.deepcopy(good)
        change(content)
        torch.save(content, last)
        return last.read_bytes()

    first = next(iter(good["optimizer"]["state"]))
    changes = [
        (lambda c: c["optimizer"]["state"][first].update(exp_avg=torch.zeros(1)), "exp_avg of parameter"),
        (lambda c: c["optimizer"]["state"][first].update(exp_avg=torch.zeros(1).expand(4, 4)), "not stored densely"),
        (lambda c: c["optimizer"].pop("state"), "optimiser's state is not a table"),
        (lambda c: c["optimizer"]["state"].pop(first), "other parameters"),
        (lambda c: c["position"].update(epoch="1"), "the position epoch"),
        (lambda c: c["position"].update(epoch=-3), "the position epoch"),
        (lambda c: c["position"].pop("step"), "the position has other entries"),
        (lambda c: c["model"].update({next(iter(c["model"])): torch.full((1,), torch.nan)}), "another shape"),
    ]
    for change, complaint in changes:
        before = crafted(change)
        with pytest.raises(UserError, match=complaint):
            train.main([*arguments[:-4], "--epochs", "2", "--resume", str(last), "--res_dir", str(tmp_path / "run")])
        assert last.read_bytes() == before
    crafted(lambda content: None)
    train.main([*arguments[:-4], "--epochs", "2", "--resume", str(last), "--res_dir", str(tmp_path / "run")])
