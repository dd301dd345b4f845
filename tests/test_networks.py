"""Both networks: published numbers, sizes, what the rollout may see, what is refused."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, ROOT, SHARED, relative_error

from functions import RolloutLoss, mixed_precision
from vmrnn import scan
from vmrnn.checkpoint import load_weights
from vmrnn.errors import UserError
from vmrnn.network import build_model, compile_model
from vmrnn.network.cell import VSB, VMRNNCell
from vmrnn.network.kernels import UsesKernels
from vmrnn.network.ss2d import SS2D
from vmrnn.rollout import rollout
from VMRNN_B import VMRNN as B
from VMRNN_D import VMRNN as D

PUBLISHED = SHARED / "golden"  # numbers of the published code, not part of the project
OWN = ROOT / "tests" / "golden"  # the reference in float64, made by make_golden.py


BACK_ENDS = [
    pytest.param(device, name, id=f"{device}-{name}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in dict.fromkeys(["cpu", DEVICE, *(["cuda"] if torch.cuda.is_available() else [])])
    for name, module in scan.BACKENDS.items()
    if module.can_run(device, torch.float32, 16)[0]
]


def golden_model(file, back_end):
    config = json.loads(str(file["config"]))
    model = build_model(
        config["model"], patch_size=config["patch_size"], in_chans=config["in_chans"],
        embed_dim=config["embed_dim"], depths=config.get("depths"), depths_down=config.get("depths_downsample"),
        depths_up=config.get("depths_upsample"), scan=back_end,
    )  # fmt: skip
    load_weights(model, {key[6:]: torch.from_numpy(file[key]) for key in file if key.startswith("state/")})
    return model.eval()


@pytest.mark.device
@pytest.mark.parametrize("device, back_end", BACK_ENDS)
@pytest.mark.parametrize(
    "path",
    [PUBLISHED / "b_patch2.npz", PUBLISHED / "d_small.npz", OWN / "b_patch8.npz", OWN / "d_odd.npz"],
    ids=lambda p: p.stem,
)
def test_golden_outputs_and_gradients(path, device, back_end):
    if not path.exists():
        assert path.parent != OWN
        pytest.skip("the published code's numbers are not on this machine")
    file = np.load(path)
    model = golden_model(file, back_end).to(device)
    inputs, targets = (torch.from_numpy(file[key]).float().to(device) for key in ("inputs", "targets"))
    outputs = rollout(model, inputs, targets.shape[1])
    assert relative_error(outputs.cpu(), torch.from_numpy(file["outputs"])) <= 2e-5
    loss = RolloutLoss()(outputs, inputs, targets)
    assert abs(loss.item() - float(file["loss"])) <= 2e-5 * float(file["loss"])
    loss.backward()
    gradients = dict(model.named_parameters())
    assert {"grad/" + name for name in gradients} == {key for key in file if key.startswith("grad/")}
    for name, parameter in gradients.items():
        assert relative_error(parameter.grad.cpu(), torch.from_numpy(file["grad/" + name])) <= 2e-4, name


def test_parameter_counts_of_the_paper_without_the_dead_weights():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(B(64, 2, 1, 128, [6])) == 1_050_241
    assert count(D(64, 2, 1, 128, [2, 6], [6, 2])) == 13_395_329


@pytest.mark.parametrize(
    "network, size, channels, options",
    [(B, (24, 16), 3, (4, 3, 16, [1, 2])), (D, (16, 32), 2, (2, 2, 8, [2, 1], [1, 2]))],
    ids=["B", "D"],
)
def test_every_parameter_gets_a_gradient_on_frames_that_are_not_square(network, size, channels, options):
    model = network(size, *options)
    inputs, targets = torch.rand(2, 3, channels, *size), torch.rand(2, 2, channels, *size)
    outputs = rollout(model, inputs, 2)
    assert outputs.shape == (2, 4, channels, *size)
    assert outputs.min() >= 0 and outputs.max() <= 1
    RolloutLoss()(outputs, inputs, targets).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_trained_network_takes_frames_of_another_size():
    model = D(16, 2, 1, 16, [1], [1]).eval()
    assert model(torch.rand(1, 1, 24, 8))[0].shape == (1, 1, 24, 8)
    with pytest.raises(UserError, match="18x16.*multiples of 4"):
        model(torch.rand(1, 1, 18, 16))


def test_the_gate():
    cell = VMRNNCell(16, drop_path=[0.0, 0.0]).eval()
    x, h, c = torch.randn(3, 1, 4, 5, 16).unbind(0)
    o = cell.VSBs[1](cell.VSBs[0](x, h))
    f = torch.sigmoid(o)
    new_c = f * c + f * torch.tanh(o)
    out, (new_h, got_c) = cell(x, (h, c))
    torch.testing.assert_close(got_c, new_c)
    torch.testing.assert_close(new_h, f * torch.tanh(new_c))
    assert out is new_h
    # the first step is that of zero states, layer norm's bias included
    torch.nn.init.normal_(cell.VSBs[0].ln_1.bias)
    torch.testing.assert_close(cell(x)[0], cell(x, (torch.zeros_like(h), torch.zeros_like(c)))[0])


@pytest.mark.parametrize("t_in, horizon", [(1, 3), (3, 1), (4, 2)])
def test_the_rollout_is_the_models_own_calls(t_in, horizon):
    model = B(8, 2, 1, 16, [1]).eval()
    inputs = torch.rand(2, t_in, 1, 8, 8)
    frames, states, frame = [], None, None
    for t in range(t_in + horizon - 1):
        frame, states = model(inputs[:, t] if t < t_in else frame, states)
        frames.append(frame)
    torch.testing.assert_close(rollout(model, inputs, horizon), torch.stack(frames, 1))


def test_forecast_frames_depend_on_all_inputs_and_early_outputs_on_the_past_alone():
    model = D(8, 2, 1, 8, [1], [1]).eval()
    inputs = torch.rand(1, 4, 1, 8, 8)
    base = rollout(model, inputs, 3)
    changed = inputs.clone()
    changed[:, 2] = 1 - changed[:, 2]
    other = rollout(model, changed, 3)
    # batched and single decoding may round differently, hence the tolerance
    torch.testing.assert_close(other[:, :2], base[:, :2])
    assert all((other[:, t] - base[:, t]).abs().max() > 1e-5 for t in range(2, 6))


def test_checkpointed_gradients_are_the_same():
    model = D(8, 2, 1, 8, [1], [1], attn_drop_rate=0.2, drop_path_rate=0.2).train()
    inputs, targets = torch.rand(2, 3, 1, 8, 8), torch.rand(2, 2, 1, 8, 8)
    gradients = []
    for grad_checkpoint in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        RolloutLoss()(rollout(model, inputs, 2, grad_checkpoint), inputs, targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("device, name", [("cpu", "cpu"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)])
def test_compiled_steps_are_one_graph_and_the_same_numbers(device, name):
    ok, reason = scan.BACKENDS[name].can_run(device, torch.float32, 16)
    if not ok:
        pytest.skip(f"torch.compile with the scan of {name}: {reason}")
    device = torch.device(device)
    model = B(8, 2, 1, 16, [1], drop_path_rate=0.0, scan=name).to(device)
    inputs, targets = torch.rand(2, 1, 2, 1, 8, 8).to(device)
    outputs, gradients = [], []
    for compiled in (False, True):
        if compiled:
            compile_model(model, device)  # fullgraph: a graph break raises
        model.zero_grad()
        outputs.append(rollout(model, inputs, 2))
        RolloutLoss()(outputs[-1], inputs, targets).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    assert all(relative_error(b, a) < 1e-4 for a, b in zip(*gradients, strict=True))


@pytest.mark.device
@pytest.mark.parametrize("model", [B(16, 4, 1, 32, [2]), D(16, 2, 1, 16, [1], [1])], ids=["B", "D"])
def test_bf16_is_close_to_fp32_and_frames_states_and_gradients_stay_fp32(model):
    device = torch.device(DEVICE)
    model.to(device)
    inputs, targets = torch.rand(2, 3, 1, 16, 16).to(device), torch.rand(2, 2, 1, 16, 16).to(device)
    outputs, gradients = [], []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model.zero_grad()
        with mixed_precision(device, precision):
            outputs.append(rollout(model, inputs, 2))
        RolloutLoss()(outputs[-1], inputs, targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert outputs[1].dtype == torch.float32 and len(outputs[1].unique()) > 256
    assert 0 < relative_error(outputs[1], outputs[0]) < 0.02
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    with mixed_precision(device, "bf16"):
        states = model(inputs[:, 0])[1]
    assert all(t.dtype == torch.float32 for state in states for t in state)


def test_the_loss_compares_every_output_with_the_frame_that_follows():
    inputs, targets = torch.rand(2, 3, 1, 4, 4), torch.rand(2, 5, 1, 4, 4)
    perfect = torch.cat([inputs, targets], 1)[:, 1:]
    assert RolloutLoss()(perfect, inputs, targets) == 0
    off = perfect + 0.5
    torch.testing.assert_close(RolloutLoss()(off, inputs, targets), torch.tensor(0.75))  # 0.25 + 0.5
    torch.testing.assert_close(RolloutLoss(0.1)(off, inputs, targets), torch.tensor(0.3))


def test_initialisation():
    """A = -(1..N), D = 1, step sizes log-uniform in [1e-3, 1e-1], projections uniform in +-1/sqrt(inputs)."""
    layer = SS2D(128)
    assert torch.equal(layer.A_logs, torch.arange(1, 17.0).log().expand(4 * 256, 16)) and (layer.Ds == 1).all()
    steps = torch.log10(F.softplus(layer.dt_projs_bias))
    assert -3.001 < steps.min() < -2.95 and -1.05 < steps.max() < -0.999
    assert abs(steps.mean() + 2) < 0.06 and abs(steps.std() - 2 / 12**0.5) < 0.03
    for weight, inputs in ((layer.dt_projs_weight, 8), (layer.x_proj_weight, 256)):
        assert 0.98 < weight.abs().max() * inputs**0.5 <= 1.0001 and weight.mean().abs() < 0.03


def test_dropout_and_stochastic_depth():
    x = torch.randn(64, 4, 4, 16)
    block, layer = VSB(16, mixes_hidden=False, drop_path=0.5), SS2D(16, dropout=0.5)
    whole, part = block.eval()(x) - x, block.train()(x) - x
    kept = part.flatten(1).any(1)
    assert 16 < kept.sum() < 48  # of 64 samples
    torch.testing.assert_close(part[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)
    whole, part = layer.eval()(x), layer.train()(x)
    assert 0.45 < (part != 0).float().mean() < 0.55
    torch.testing.assert_close(part[part != 0], 2 * whole[part != 0])
    for model in (B(8, 2, 1, 16, [2], 0.1, 0.2), D(8, 2, 1, 8, [1], [2], 0.1, 0.2)):
        rates = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
        assert len(rates) > 2
        assert all(rate == (0.2 if "self_attention" in name else 0.1) for name, rate in rates.items())
        frame = torch.rand(1, 1, 8, 8)
        share = (model.train().encode(frame) == 0).float().mean() - (model.eval().encode(frame) == 0).float().mean()
        assert 0.02 < share < 0.25


def test_drop_path_rates_follow_the_published_schedule():
    rates = [block.drop_path.drop_prob for cell in B(8, 2, 1, 16, [2, 1]).ST.layers for block in cell.VSBs]
    assert rates == [0.1] * 3
    model = D(16, 2, 1, 8, [2, 1], [1, 2])
    down = [[block.drop_path.drop_prob for block in cell.VSBs] for cell in model.Downsample.layers]
    assert down == [pytest.approx([0, 0.05]), pytest.approx([0.1])]
    up = [[block.drop_path.drop_prob for block in cell.VSBs] for cell in model.Upsample.layers]
    assert up == [pytest.approx([0.05, 0.1]), pytest.approx([0])]  # coarsest first
    assert [len(cell.VSBs) for cell in model.Upsample.layers] == [2, 1]


def test_kernels_are_chosen_once_and_again_when_the_network_moves(monkeypatch):
    asked = []
    resolve = scan.resolve
    monkeypatch.setattr(scan, "resolve", lambda *args: asked.append(args) or resolve(*args))
    model, frame = B(8, 2, 1, 16, [2]), torch.rand(1, 1, 8, 8)
    modules = sum(isinstance(m, UsesKernels) for m in model.modules())
    assert modules == 1 + 2 * 2  # the cell, and two blocks with an SS2D each
    for _ in range(3):
        expected = model(frame)[0]
    assert asked == [("auto", "cpu", torch.float32, 16)] * modules
    model.double()
    assert asked[modules:] == [("auto", "cpu", torch.float64, 16)] * modules
    torch.testing.assert_close(model(frame.double())[0].float(), expected)
    model.to("meta")
    assert len(asked) == 2 * modules  # nothing to run


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_network_compute_the_same(copied):
    model, frame = D(8, 2, 1, 16, [1], [1]).eval(), torch.rand(1, 1, 8, 8)
    expected = model(frame)[0]
    other = copied(model)
    assert torch.equal(other(frame)[0], expected)
    assert {key: value.shape for key, value in other.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_a_network_is_exported():
    model, frame = B(8, 2, 1, 16, [1]).eval(), torch.rand(1, 1, 8, 8)
    states = model(frame)[1]
    exported = torch.export.export(model, (frame, states)).module()
    torch.testing.assert_close(exported(frame, states)[0], model(frame, states)[0])


def test_a_back_end_that_cannot_run_is_refused_when_the_network_moves():
    model = B(8, 2, 1, 16, [1], scan="mamba")  # a network for a GPU can be built on a CPU
    with pytest.raises(UserError, match="CUDA"):
        model.to("cpu")
    with pytest.raises(UserError, match="CUDA"):
        model(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_the_head_undoes_the_patch_embedding(patch):
    model = B(32, patch, 1, 16, [1]).eval()
    assert model(torch.rand(1, 1, 32, 32))[0].shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: B(30, 4, 1, 16, [1]), "30x30.*multiples of 4"),
        (lambda: B(12, 3, 1, 16, [1]), "patch_size 3"),
        (lambda: B(8, 1, 1, 16, [1]), "patch_size 1"),
        (lambda: B(16, 4, 1, 24, [1]), "embed_dim 24.*multiple of 16"),
        (lambda: B(16, 2, 1, 16, []), "depths"),
        (lambda: B(16, 2, 1, 16, [0]), "depths"),
        (lambda: D((16, 20), 2, 1, 16, [1, 1], [1, 1]), "16x20.*multiples of 8"),
        (lambda: D(16, 2, 1, 16, [1, 1], [1]), "as many levels"),
        (lambda: B(0, 2, 1, 16, [1]), "at least 1"),
    ],
)
def test_networks_that_cannot_work_are_refused(build, reason):
    with pytest.raises(UserError, match=reason):
        build()
