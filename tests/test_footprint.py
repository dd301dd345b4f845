"""The memory of a training step, counted with fake tensors, against the same step with real ones."""

import json

from benchmarks import footprint
from vmrnn import config as configuration
from vmrnn.network import build_model

SMALL = dict(
    model="VMRNN-D", embed_dim=16, depths_down=[1], depths_up=[2], d_state=4, input_size=[8, 8], num_frames_input=3,
    num_frames_output=2, train_batch_size=2, scan="torch", drop_path_rate=0.2,
)  # fmt: skip


def fake(**options):
    return footprint.fake_footprint(configuration.resolve(None, SMALL | options))


def test_as_a_step_with_real_tensors():
    model = build_model(**configuration.resolve(None, SMALL).network_options)
    assert fake() == footprint.footprint(model, (2, 3, 1, 8, 8), 2)
    assert all(p.grad is not None for p in model.parameters())


def test_forcings_and_a_base_count():
    """Their channels are inputs, and nothing that is forecast."""
    both = dict(forcings=["height"], base="motion", dataset="grid")
    model = build_model(**configuration.resolve(None, SMALL | both).network_options)
    assert fake(**both) == footprint.footprint(model, (2, 3, 3, 8, 8), 2)
    assert fake(**both)["kept"] > fake()["kept"]


def test_memory_grows_with_the_batch_and_less_with_checkpoints():
    one, three = fake(train_batch_size=8), fake(train_batch_size=24)
    weights = sum(p.numel() for p in build_model(**configuration.resolve(None, SMALL).network_options).parameters()) * 4
    assert weights < one["kept"] < one["peak"]
    assert 2.7 < (three["kept"] - weights) / (one["kept"] - weights) <= 3
    assert fake(train_batch_size=24, grad_checkpoint=True)["kept"] < 0.5 * three["kept"]


def test_the_program_counts_the_triton_kernels_where_none_can_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [word for key, value in SMALL.items() if key != "scan" for word in (f"--{key}", *map(str, flat(value)))]
    footprint.main([*small, "--precision", "bf16", "--accumulate", "2"])
    assert "VMRNN-D, batch 1, bf16" in capsys.readouterr().out
    found = json.loads((tmp_path / "exps" / "benchmarks" / "footprint.jsonl").read_text())
    assert 0 < found["kept"] < fake(train_batch_size=1, precision="bf16")["kept"]


def flat(value):
    return value if isinstance(value, list) else [value]
