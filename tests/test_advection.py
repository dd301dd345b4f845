"""--head advection: a forecast is a mixture of moved copies of the last frame and of a frame that the network draws."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, assert_identical

import test as test_program
import train as train_program
from vmrnn import config as configuration
from vmrnn.checkpoint import load_network
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.network.advection import MOVES, REACH, AdvectionHead, advect
from vmrnn.network.patch import PatchInflated
from vmrnn.rollout import rollout

PATCH, TAPS = 2, 2 * REACH + 1


def random_filters(*shape):
    return torch.randn(*shape, MOVES, 2, TAPS, dtype=torch.float64).softmax(-1).requires_grad_()


def test_advect_is_its_formula_and_so_are_its_gradients():
    """Against a loop over pixels, with three channels and sides that differ."""
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 6, 10, dtype=torch.float64, requires_grad=True)
    filters = random_filters(2, 3, 5)
    copies = advect(frames, filters, PATCH)
    padded = F.pad(frames, [REACH] * 4)
    expected = torch.zeros(2, MOVES, 3, 6, 10, dtype=torch.float64)
    for y in range(6):
        for x in range(10):
            columns, rows = filters[:, y // PATCH, x // PATCH].unbind(2)
            window = padded[:, :, y : y + TAPS, x : x + TAPS]
            expected[..., y, x] = torch.einsum("bmi,bmj,bcij->bmc", columns, rows, window)
    torch.testing.assert_close(copies, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(copies)
    got, wanted = (torch.autograd.grad((x * weights).sum(), (frames, filters)) for x in (copies, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("down, right", [(0, 0), (1, -3), (-REACH, REACH)])
def test_a_filter_of_one_tap_is_a_shift(down, right):
    frames = torch.rand(1, 1, 12, 12)
    filters = torch.zeros(1, 6, 6, 1, 2, TAPS)
    filters[..., 0, REACH - down] = filters[..., 1, REACH - right] = 1
    moved = torch.zeros(12 + 2 * REACH, 12 + 2 * REACH)
    moved[REACH + down :, REACH + right :][:12, :12] = frames[0, 0]
    assert torch.equal(advect(frames, filters, PATCH)[0, 0, 0], moved[REACH:-REACH, REACH:-REACH])


def test_the_weights_choose_between_the_frames():
    """All weight on the drawn frame: the plain head. All on a copy: that copy. Only channels of the forecast move."""
    torch.manual_seed(0)
    head = AdvectionHead(4, 16, 1)
    features, frame = torch.randn(2, 3, 5, 16), torch.rand(2, 2, 12, 20)
    drawn = PatchInflated(4, 16, 1)
    drawn.Conv_.load_state_dict(head.Conv_.state_dict())
    drawn.Conv.load_state_dict({"weight": head.Conv.weight[:, :1], "bias": head.Conv.bias[:1]})
    filters = head.filters(features).unflatten(-1, (MOVES, 2, TAPS)).softmax(-1)
    frames = [*advect(frame[:, :1], filters, 4).unbind(1), drawn(features)]
    for i, expected in enumerate(frames):
        with torch.no_grad():
            head.Conv.bias[1:] = torch.where(torch.arange(MOVES + 1) == i, 100.0, -100.0)
        torch.testing.assert_close(head(features, frame), expected)
    with torch.no_grad():  # bf16 rounds to a hundredth: a frame is not moved in it
        head.Conv.bias[1:] = torch.tensor([100.0, -100.0, -100.0])
        head.filters.weight.zero_()
        head.filters.bias.view(MOVES, 2, TAPS).copy_(100.0 * (torch.arange(TAPS) == REACH))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(features, frame), frame[:, :1])


@pytest.mark.parametrize("model", ["VMRNN-B", "VMRNN-D"])
def test_a_rollout_learns_through_its_own_forecasts(model):
    """Every parameter has a gradient, in bf16 too, and forecasts stay in [0, 1] on a frame of another size."""
    torch.manual_seed(0)
    options = {"model": model, "patch_size": 2, "embed_dim": 8, "depths": [1], "depths_down": [1], "depths_up": [1]}
    config = configuration.resolve(None, options | {"d_state": 2, "head": "advection"})
    network = build_model(**config.network_options)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            outputs = rollout(network, torch.rand(2, 2, 1, 12, 9), 3)
        assert outputs.dtype == torch.float32 and 0 <= outputs.min() and outputs.max() <= 1
        network.zero_grad()
        outputs.square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_a_base_is_refused():
    config = configuration.resolve(None, {"head": "advection", "base": "motion"})
    with pytest.raises(UserError, match="leave one out"):
        build_model(**config.network_options)


def test_training_and_test(tmp_path):
    """The weights file knows its head, and a resumed run equals one that was not stopped."""
    head = [*TINY, "--head", "advection"]
    train_program.main([*head, "--epochs", "2", "--res_dir", str(tmp_path / "whole")])
    for epochs in ("1", "2"):
        train_program.main([*head, "--epochs", epochs, "--resume", "auto", "--res_dir", str(tmp_path / "parts")])
    whole, parts = (load_network(tmp_path / name / "best.safetensors").model for name in ("whole", "parts"))
    assert_identical(whole.state_dict(), parts.state_dict())
    test_program.main(["--checkpoint", str(tmp_path / "whole/best.safetensors"), "--res_dir", str(tmp_path / "test")])
    results = json.loads((tmp_path / "test" / "metrics.json").read_text())["results"]
    assert results["forecast"]["mean"]["mse"] > 0
