"""The recipe: schedules, decay, accumulation, averaged weights, precision, missing pixels, what TensorBoard gets."""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, without_time
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import muon as timm_muon
from timm.scheduler import CosineLRScheduler

import test
import train
from benchmarks import curves
from dataset import EpochSampler, build_dataset
from functions import SMALLEST_SCALE, NonFinite, RolloutLoss, Step, evaluate, train_one_epoch
from vmrnn import config as configuration, pictures
from vmrnn.checkpoint import load_network, read_checkpoint
from vmrnn.errors import UserError
from vmrnn.forecaster import Forecaster
from vmrnn.graphs import GraphedStep
from vmrnn.metrics import better
from vmrnn.network import build_model
from vmrnn.optim import Schedule, lr_factor, make_optimizer, parameter_groups
from vmrnn.rollout import Rollout, pad_frames, rollout
from vmrnn.run_folder import RunFolder, read_log


def small(model="VMRNN-B", depths=(1,), drop_path_rate=0.0, embed_dim=16):
    return build_model(
        model, patch_size=4, in_chans=1, embed_dim=embed_dim, depths=list(depths), depths_down=[1],
        depths_up=[1], d_state=4, drop_path_rate=drop_path_rate,
    )  # fmt: skip


@pytest.mark.parametrize("total", [10, 37, 1000])
def test_onecycle_is_torchs(total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert lr_factor(step, "onecycle", 0, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def test_cosine_is_timms():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = CosineLRScheduler(optimizer, t_initial=90, t_in_epochs=False)
    for step in range(90):
        schedule.step_update(step)
        assert lr_factor(step + 10, "cosine", 10, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
    assert [lr_factor(step, "cosine", 10, 100) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1])
    assert lr_factor(0, "onecycle", 1, 9) == 1
    assert [lr_factor(step, "constant", 2, 9) for step in (0, 1, 2, 100)] == [0.5, 1, 1, 1]


def test_the_schedule_of_a_run_ends_with_its_last_update():
    config = configuration.resolve(
        None, {"epochs": 4, "lr": 2.0, "schedule": "wsd", "decay_steps": 5, "warmup_steps": 2}
    )
    schedule = Schedule(config, 3)
    assert [schedule.learning_rate(n) for n in range(12)] == pytest.approx([1, *[2] * 7, 1.6, 1.2, 0.8, 0.4])


def test_what_takes_no_weight_decay():
    model = small("VMRNN-D")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed | plain == set(names.values()) and not decayed & plain
    norms = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.GroupNorm)}
    for key, name in names.items():
        assert (name in plain) == (key in norms or name.endswith(("A_logs", "Ds", "bias"))), name


def test_adam_and_adamw_are_torchs():
    for name, theirs in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make_optimizer(small(), name, 1e-3, 0.1, torch.device("cpu"))) is theirs


MATRICES = tuple(
    f"{layer}.weight" for layer in ("in_proj", "out_proj", "linear", "reduction", "expand", "Unembed.Conv_.0")
)


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_by_equal_ones():
    model = small("VMRNN-D")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, "muon", 1e-3, 100.0, torch.device("cpu"))
    assert all(group["nesterov"] for group in optimizer.param_groups)
    optimizer.step()
    matrices = {name for name in before if name.endswith(MATRICES)}
    assert len(matrices) == 9
    for name, parameter in model.named_parameters():
        decay = 100.0 if parameter.ndim > 1 and not name.endswith(("A_logs", "bias")) else 0.0
        step = (parameter.detach() - before[name] * (1 - 1e-3 * decay)) / 1e-3
        if name in matrices:
            step = step.flatten(1)
            singular = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5)
            assert 0.6 < singular.min() and singular.max() < 1.3, name  # five iterations come this close to 1
        else:  # Adam's first step is the sign of the gradient
            assert 0.5 < step.abs().min() and step.abs().max() < 1.01 * step.abs().min() + 0.01, name


def test_muon_orthogonalizes_in_fp32_on_a_cpu():
    """Muon's step for one matrix, against the same iteration in float64. bf16 would be off by a hundredth."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 16, bias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    before = layer.weight.detach().clone()
    make_optimizer(layer, "muon", 1.0, 0.0, torch.device("cpu")).step()

    coefficients = timm_muon._COEFFICIENTS["quintic"]
    exact = timm_muon.zeropower_via_newtonschulz(layer.weight.grad, 5, coefficients, dtype=torch.float64)
    expected = before - 0.2 * 24**0.5 * exact
    assert (layer.weight.detach() - expected).abs().max() < 1e-5


def run_updates(parts, **options):
    """The weights after two updates of six sequences in `parts` parts."""
    torch.manual_seed(3)
    model = small()
    data = torch.rand(12, 5, 1, 16, 16).split(6 // parts)
    loader = [(frames[:, :3], frames[:, 3:]) for frames in data]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(Rollout(model), RolloutLoss(), torch.device("cpu"), parts=parts, **options)
    done = list(train_one_epoch(step, loader, optimizer, lambda n: 0.1, updates_per_epoch=2))
    return done, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulated_parts_are_the_whole_batch():
    (a, whole), (b, parts) = run_updates(1), run_updates(3)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert [u.loss for u in a] == pytest.approx([u.loss for u in b], rel=1e-6)
    assert [u.grad_norm for u in a] == pytest.approx([u.grad_norm for u in b], rel=1e-4)


def test_an_update_has_the_learning_rate_of_its_number_and_a_clipped_gradient():
    torch.manual_seed(3)
    step = Step(Rollout(small()), RolloutLoss(), torch.device("cpu"))
    optimizer = torch.optim.SGD(step.parameters, lr=0.1)
    loader = [(torch.rand(1, 3, 1, 16, 16), torch.rand(1, 2, 1, 16, 16))] * 2
    updates = train_one_epoch(
        step, loader, optimizer, lambda n: n / 100, updates_per_epoch=3, start=1, epoch_start=30, clip_grad=0.1
    )
    for number in (31, 32):
        before = torch.cat([p.detach().flatten() for p in step.parameters])
        update = next(updates)
        moved = torch.cat([p.detach().flatten() for p in step.parameters]) - before
        assert update.grad_norm > 0.2 and update.step == number - 29
        assert moved.norm().item() == pytest.approx(number / 100 * 0.1, rel=1e-3)


def test_training_and_evaluation_weigh_l1_as_asked():
    torch.manual_seed(3)
    inputs, targets = torch.rand(2, 3, 1, 16, 16), torch.rand(2, 2, 1, 16, 16)
    model = small().eval()
    for weight in (0.0, 0.25):
        expected = RolloutLoss(weight)(rollout(model, inputs, 2), inputs, targets).item()
        assert expected != RolloutLoss()(rollout(model, inputs, 2), inputs, targets).item()
        assert Step(Rollout(model), RolloutLoss(weight), torch.device("cpu"))(inputs, targets).item() == expected
        loss, _ = evaluate(model, [(inputs, targets)], torch.device("cpu"), ("mse",), RolloutLoss(weight))
        assert loss == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_counts_every_sample_once_in_the_precision_asked_for():
    torch.manual_seed(3)
    inputs, targets = torch.rand(3, 3, 1, 16, 16), torch.rand(3, 2, 1, 16, 16)
    model, device = small(drop_path_rate=0.5).eval(), torch.device("cpu")
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    losses = {}
    for precision in ("fp32", "bf16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            outputs = [rollout(model.eval(), *batch[:1], 2) for batch in batches]
        model.train()  # as an epoch leaves it
        samples = [RolloutLoss()(o, *batch).item() for o, batch in zip(outputs, batches)]
        losses[precision], _ = evaluate(model, batches, device, ("mse",), RolloutLoss(), precision)
        assert losses[precision] == pytest.approx((2 * samples[0] + samples[1]) / 3, rel=1e-6)
    assert losses["fp32"] != losses["bf16"]


def test_dropout_draws_from_seed_update_and_rank(monkeypatch):
    keys = []
    monkeypatch.setattr("functions.seed_update", lambda *key: keys.append(key))
    monkeypatch.setattr("functions.distributed.rank", lambda: 5)
    step = Step(Rollout(small()), RolloutLoss(), torch.device("cpu"))
    optimizer = torch.optim.SGD(step.parameters, lr=0.1)
    loader = [(torch.rand(1, 3, 1, 16, 16), torch.rand(1, 2, 1, 16, 16))] * 2
    step.network.eval()  # as a validation leaves it
    list(train_one_epoch(step, loader, optimizer, lambda n: 0.1, updates_per_epoch=3, start=1, epoch_start=30, seed=7))
    assert keys == [(7, 31, 5), (7, 32, 5)] and all(m.training for m in step.network.modules())


def test_dropout_draws_from_the_seed_of_the_run(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr("functions.seed_update", lambda *key: keys.append(key))
    train.main([*TINY, "--epochs", "1", "--seed", "9", "--res_dir", str(tmp_path / "x")])
    assert keys == [(9, n, 0) for n in range(4)]


def test_fp16_scales_gradients_and_comes_close_to_fp32():
    in_fp32, exact = run_updates(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # the first gradients overflow: those updates are skipped
    (first, second), untouched = run_updates(1, precision="fp16", scaler=scaler)
    assert math.isinf(first.grad_norm) or math.isnan(first.grad_norm)
    assert scaler.get_scale() == 2.0**58
    torch.manual_seed(3)
    assert torch.equal(untouched, torch.cat([p.detach().flatten() for p in small().parameters()]))
    updates, half = run_updates(1, precision="fp16", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert [u.grad_norm for u in updates] == pytest.approx([u.grad_norm for u in in_fp32], rel=1e-2)
    assert 0 < (half - exact).abs().max() < 1e-2 * (exact - untouched).abs().max()


def test_gradients_that_no_smaller_scale_makes_finite_end_the_run():
    def loss(outputs, inputs, targets):
        return (outputs - outputs.detach()).sqrt().sum()  # 0, with an infinite gradient

    scaler = torch.amp.GradScaler("cpu", init_scale=2 * SMALLEST_SCALE)
    step = Step(Rollout(small()), loss, torch.device("cpu"), "fp16", scaler=scaler)
    loader = [(torch.rand(1, 3, 1, 16, 16), torch.rand(1, 2, 1, 16, 16))] * 3
    optimizer = torch.optim.SGD(step.parameters, lr=0.1)
    updates = train_one_epoch(step, loader, optimizer, lambda n: 0.1, updates_per_epoch=3)
    assert not math.isfinite(next(updates).grad_norm) and scaler.get_scale() == SMALLEST_SCALE
    with pytest.raises(NonFinite):
        next(updates)


def test_a_run_in_fp16_keeps_its_scale(tmp_path):
    options = [*TINY, "--precision", "fp16", "--epochs", "1", "--res_dir", str(tmp_path / "x")]
    train.main(options)
    saved = read_checkpoint(tmp_path / "x" / "last.pt")["scaler"]
    assert saved["_growth_tracker"] == 4
    train.main([*options, "--epochs", "2", "--resume", "auto"])
    assert read_checkpoint(tmp_path / "x" / "last.pt")["scaler"]["_growth_tracker"] == 8


def values_of(option):
    """(option, value) of every value that the table of options allows."""
    return [(option, value) for value in configuration.FIELDS[option].metadata["choices"]]


@pytest.mark.parametrize(
    ("option", "value"), [*values_of("optimizer"), *values_of("schedule")[1:], *values_of("precision")[1:]]
)
def test_a_resumed_run_is_the_same_bits(option, value, tmp_path, monkeypatch):
    """Killed after the second of four updates. test_resume.py kills whole processes, with one set of options."""
    for name in ("save_strip", "save_animation", "save_curve"):
        monkeypatch.setattr(pictures, name, lambda *arguments, **options: None)
    options = [
        *TINY, "--epochs", "1", "--save_every", "1", "--log_train", "1", "--ema", "0.9", "--warmup_steps", "2",
        "--curriculum", "3", "--weight_decay", "0.1", f"--{option}", value, "--res_dir",
    ]  # fmt: skip
    train.main([*options, str(tmp_path / "whole")])

    save = train.checkpoint.save_checkpoint

    def save_and_die(path, content):
        save(path, content)
        if content["position"]["step"] == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpoint, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.main([*options, str(tmp_path / "resumed")])
    train.main([*options, str(tmp_path / "resumed"), "--resume", "auto"])

    whole, resumed = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "resumed"))
    assert whole["config"][option] == value
    assert resumed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    tensors = [[c["model"], c["ema"], c["optimizer"]["state"], c["scaler"]] for c in (whole, resumed)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    log, resumed_log = (without_time(read_log(tmp_path / name / "log.jsonl")) for name in ("whole", "resumed"))
    assert log == resumed_log and len(log) == 5  # four updates, with their rates, and a validation


def test_wsd_is_constant_and_then_falls_linearly_to_zero_at_the_end_of_the_run():
    factors = [lr_factor(n, "wsd", 10, 100, 20) for n in range(100)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([(100 - n) / 20 for n in range(80, 100)])
    assert lr_factor(89, "wsd", 10, 100) == pytest.approx(11 / 20)  # a fifth of the run, if nothing is given
    assert factors[:50] == [lr_factor(n, "wsd", 10, 1000, 20) for n in range(50)]  # its end may be decided late


def test_the_curriculum_lengthens_the_forecast(tmp_path, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        Step, "__call__", lambda self, i, t, call=Step.__call__: lengths.append(t.shape[1]) or call(self, i, t)
    )
    options = [*TINY, "--num_frames_output", "3", "--curriculum", "6", "--epochs", "2"]
    train.main([*options, "--res_dir", str(tmp_path / "x")])
    assert lengths == [1, 1, 2, 2, 3, 3, 3, 3]


def test_averaged_weights_are_evaluated_and_saved(tmp_path):
    """timm's average with warm-up, followed here by hand over the saved weights of each update."""
    options = [*TINY, "--epochs", "2", "--epoch_valid", "2", "--ema", "0.9", "--save_every", "1"]
    weights = []
    save = train.checkpoint.save_checkpoint

    def save_and_keep(path, content):
        if content["position"]["step"]:
            weights.append({key: value.clone() for key, value in content["model"].items()})
        save(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpoint, "save_checkpoint", save_and_keep)
        train.main([*options, "--res_dir", str(tmp_path / "x")])
    assert len(weights) == 8
    last, best = (read_checkpoint(tmp_path / "x" / name) for name in ("last.pt", "best.safetensors"))
    assert all(torch.equal(last["ema"][key], best["model"][key]) for key in best["model"])
    key = "ST.layers.0.VSBs.0.self_attention.in_proj.weight"
    seed = configuration.resolve(None, {}, base=last["config"]).seed
    torch.manual_seed(seed)
    average = small().state_dict()[key].clone()
    for n, after in enumerate(weights):
        decay = min(0.9, 1 - (1 + n) ** -(2 / 3))
        average.lerp_(after[key], 1 - decay)
    torch.testing.assert_close(last["ema"][key], average)


def test_what_a_run_logs_and_what_its_validation_and_its_test_compare(tmp_path, monkeypatch):
    """In the precision of the run, and on the linear scale of values with a transform."""
    np.save(tmp_path / "x.npy", 50 * np.random.default_rng(0).random((80, 16, 16), np.float32) ** 3)
    options = {
        "model": "VMRNN-B", "patch_size": 4, "embed_dim": 16, "depths": [1], "d_state": 4, "input_size": [16],
        "dataset": "array", "train_data_dir": str(tmp_path / "x.npy"), "cache_dir": str(tmp_path / "cache"),
        "num_frames_input": 3, "num_frames_output": 2, "train_sequences": 8, "train_batch_size": 4, "epochs": 3,
        "epoch_valid": 2, "log_train": 1, "transform": "sqrt", "precision": "bf16", "schedule": "constant",
        "warmup_steps": 4, "lr": 1e-3, "device": "cpu",
    }  # fmt: skip
    epochs, iterate = [], EpochSampler.__iter__
    monkeypatch.setattr(
        EpochSampler, "__iter__", lambda self: epochs.append(self.shuffle * self.epoch) or iterate(self)
    )
    configuration.save_toml(configuration.resolve(None, options), tmp_path / "c.toml")
    train.main(["--config", str(tmp_path / "c.toml"), "--res_dir", str(tmp_path / "x")])
    assert [epoch for epoch in epochs if epoch] == [1, 2, 3]  # each draws anew
    entries = read_log(tmp_path / "x" / "log.jsonl")
    assert [e["lr"] for e in entries if "lr" in e] == pytest.approx([0.00025, 0.0005, 0.00075, *[0.001] * 3])
    validations = [entry for entry in entries if "mse" in entry]
    assert [entry["epoch"] for entry in validations] == [2, 3]

    test.main(["--checkpoint", str(tmp_path / "x" / "last.pt"), "--device", "cpu", "--res_dir", str(tmp_path / "t")])
    tested = json.loads((tmp_path / "t" / "metrics.json").read_text())
    found = {
        "valid": (validations[-1]["valid_loss"], validations[-1]["mse"]),
        "test": (tested["loss"], tested["results"]["forecast"]["mean"]["mse"]),
    }
    trained = load_network(tmp_path / "x" / "last.pt")
    for split, figures in found.items():
        data = build_dataset(split, trained.config, trained.value_range)
        items = [torch.stack(frames) for frames in zip(*(data[i] for i in range(len(data))))]
        expected = []
        for precision in ("bf16", "fp32"):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs = rollout(trained.model, items[0], 2)
            error = outputs[:, -2:].double().square() - items[1].double().square()  # the values are squares of these
            expected.append((RolloutLoss()(outputs, *items).item(), error.square().sum((2, 3, 4)).mean().item()))
        assert figures == pytest.approx(expected[0], rel=1e-5) and figures != pytest.approx(expected[1], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_replays_the_same_steps(monkeypatch):
    """Losses, gradients and stochastic depth of four updates of two parts, recorded and not."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device, found = torch.device("cuda"), []
    for wrap in (lambda step: step, GraphedStep):
        torch.manual_seed(3)
        # Two channels a group of the head's norm: with one the bias before it has rounding for a gradient, which Adam
        # makes as large as any other.
        model = small(drop_path_rate=0.2, depths=(2,), embed_dim=32).to(device)
        loader = [(frames[:, :3], frames[:, 3:]) for frames in torch.rand(24, 5, 1, 16, 16).split(3)]
        step = wrap(Step(Rollout(model), RolloutLoss(), device, "bf16", parts=2))
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        updates = list(train_one_epoch(step, loader, optimizer, lambda n: 1e-3, updates_per_epoch=4, clip_grad=1.0))
        found.append(([(u.loss, u.grad_norm) for u in updates], [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (graphed, same_weights) = found
    assert graphed == [pytest.approx(pair, rel=1e-5) for pair in plain]
    for a, b in zip(weights, same_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_compiled_run_with_batches_of_several_sizes(tmp_path, monkeypatch):
    """Training, a full and a short validation batch; then the test's three sizes: a program for the first frame and one
    for the others each. torch refuses to compile one function more than eight times."""
    compiled = []
    backend = lambda graph, inputs: compiled.append(inputs) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    train.main([*TINY, "--compile", "--valid_batch_size", "4", "--epochs", "1", "--res_dir", str(tmp_path / "x")])
    assert len(compiled) == 6
    torch._dynamo.reset()
    best = str(tmp_path / "x" / "best.safetensors")
    test.main(["--checkpoint", best, "--compile", "--test_batch_size", "4", "--device", "cpu"])
    assert len(compiled) == 12 and len(list((tmp_path / "x").glob("test_*/report.html"))) == 1


def test_what_failed_is_kept(tmp_path):
    with pytest.raises(UserError, match="failed_update_rank0.pt"):
        train.main([*TINY, "--epochs", "4", "--lr", "1e30", "--res_dir", str(tmp_path / "x")])
    failed = read_checkpoint(tmp_path / "x" / "failed_update_rank0.pt")
    assert failed["inputs"].shape == (4, 3, 1, 16, 16) and failed["targets"].shape == (4, 2, 1, 16, 16)
    assert failed["position"]["step"] == 1 and max(v.abs().max() for v in failed["model"].values()) > 1e20


def test_a_full_disk_does_not_hide_that_the_loss_is_not_finite(tmp_path, monkeypatch):
    def full(*arguments):
        raise UserError("no space left")

    monkeypatch.setattr(RunFolder, "save_failed_update", full)
    with pytest.raises(UserError, match="the loss is nan .* lower --lr .*; no space left"):
        train.main([*TINY, "--epochs", "4", "--lr", "1e30", "--res_dir", str(tmp_path / "x")])


def test_weights_that_cannot_be_validated_are_not_where_the_run_goes_on(tmp_path):
    """The one update of the epoch spoils the weights, and last.pt holds them."""
    options = [*TINY, "--epochs", "1", "--train_sequences", "4", "--lr", "1e30", "--res_dir", str(tmp_path / "x")]
    with pytest.raises(UserError, match="the validation loss of epoch 1 is nan: start a new run with a lower --lr"):
        train.main(options)
    run = RunFolder(tmp_path / "x")
    (tmp_path / "x" / "previous_last.pt").touch()
    state = SimpleNamespace(config=None, progress=SimpleNamespace(epoch=3))
    with pytest.raises(UserError, match=r"epoch 3 is nan: continue from .*previous_last.pt in another --res_dir with"):
        train.check_validation(math.nan, math.nan, state, run)


def test_missing_pixels_have_no_say():
    torch.manual_seed(0)
    outputs = torch.rand(2, 4, 1, 8, 8, requires_grad=True)
    inputs, targets = torch.rand(2, 3, 1, 8, 8), torch.rand(2, 2, 1, 8, 8)
    inputs[:, 1, :, :2], targets[0] = float("nan"), float("nan")
    RolloutLoss()(outputs, inputs, targets).backward()
    truth = torch.cat([inputs[:, 1:], targets], 1)
    there = ~truth.isnan()
    samples = [(outputs - truth)[i][there[i]].detach() for i in range(2)]
    expected = sum(e.square().mean() + e.abs().mean() for e in samples) / 2
    assert RolloutLoss()(outputs, inputs, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    halves = [RolloutLoss()(outputs[i : i + 1], inputs[i : i + 1], targets[i : i + 1]) for i in range(2)]
    assert sum(halves).item() / 2 == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(outputs.grad != 0, there)
    outputs = rollout(small(), torch.where(torch.rand(2, 3, 1, 16, 16) < 0.3, float("nan"), 0.5), 2)
    assert outputs.isfinite().all()
    assert RolloutLoss()(torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, 1, 1, 4, 4), targets[:1, :1, :, :4, :4]) == 0


def test_a_run_on_frames_that_do_not_fit(tmp_path):
    train.main([*TINY, "--input_size", "18", "13", "--epochs", "1", "--res_dir", str(tmp_path / "x")])
    assert Forecaster(tmp_path / "x" / "best.safetensors").config.frame_size == (18, 13)


@pytest.mark.parametrize("model, size", [("VMRNN-B", (17, 14)), ("VMRNN-D", (9, 30))])
def test_sides_that_do_not_fit_are_padded_and_cut(model, size):
    model = small(model, drop_path_rate=0.0).eval()
    inputs = torch.rand(2, 3, 1, *size)
    unit = model.stride
    padded = pad_frames(inputs, unit)
    assert padded.shape[-2] % unit == padded.shape[-1] % unit == 0
    assert torch.equal(padded[..., : size[0], : size[1]], inputs)
    assert torch.equal(padded[..., -1, : size[1]], inputs[..., -1, :]) or size[0] % unit == 0
    outputs = rollout(model, inputs, 2)
    assert outputs.shape == (2, 4, 1, *size)
    torch.testing.assert_close(outputs, rollout(model, padded, 2)[..., : size[0], : size[1]])


def test_tensorboard_gets_curves_lead_times_and_pictures(tmp_path):
    options = [*TINY, "--tensorboard", "--log_train", "2", "--res_dir", str(tmp_path / "x")]
    train.main([*options, "--epochs", "1"])
    train.main([*options, "--epochs", "2", "--resume", "auto"])
    events = EventAccumulator(str(tmp_path / "x" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    logged = {"train_loss", "valid_loss", "lr", "grad_norm", "sequences_per_second", "mse", "mse_at/001", "mse_at/002"}
    assert logged <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("grad_norm")] == [2, 4, 6, 8]
    assert [e.step for e in events.Scalars("mse")] == [4, 8]
    log = [e["mse"] for e in read_log(tmp_path / "x" / "log.jsonl") if "mse" in e]
    assert [e.value for e in events.Scalars("mse")] == pytest.approx(log)
    assert set(tags["images"]) == {"forecast/batch 1", "forecast/animation"}
    animation = events.Images("forecast/animation")[-1].encoded_image_string
    assert animation == (tmp_path / "x" / "forecast.gif").read_bytes() and animation.startswith(b"GIF")


def test_curves_of_several_runs(tmp_path, run_forked):
    for name in ("a", "b"):
        train.main([*TINY, "--epochs", "2", "--res_dir", str(tmp_path / name)])
    assert curves.points(tmp_path / "a", "mse")[0] == [16, 32]
    assert curves.BEST[better("fbias_0.5")]([0.2, 0.9, 1.3]) == 0.9
    done = run_forked("-m", "benchmarks.curves", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c.png")
    assert done.returncode == 0 and "32 samples" in done.stdout, done.stderr
    assert (tmp_path / "c.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="not a run folder"):
        curves.points(tmp_path, "mse")
    with pytest.raises(UserError, match="has no csi; choose one of"):
        curves.points(tmp_path / "a", "csi")
