"""The two programs on real input, and what they say to bad input."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY
from PIL import Image
from torch.cuda._utils import _get_device_index

import test as test_program
import train
from vmrnn import command_line, config as configuration
from vmrnn.checkpoint import find_checkpoint, read_checkpoint, save_weights
from vmrnn.data.table import SPLITS
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.run_folder import read_log
from vmrnn.runtime import pick_device, run_program


def fails(program, arguments, capsys):
    """The one line a program ends with, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: program.main([str(a) for a in arguments]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_forked):
    """A run folder made by a real process."""
    folder = tmp_path_factory.mktemp("run") / "x"
    done = run_forked("train.py", *TINY, "--epochs", 2, "--res_dir", folder, "--tensorboard", "--log_train", 3)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_says_what_runs_and_leaves_a_whole_run_folder(trained):
    folder, printed = trained
    for word in ("device     cpu", "scan  ", "parameters", "16 sequences", "effective batch 4", "MSE"):
        assert word in printed, printed
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["step"]) for e in entries] == [(1, 3), (1, 4), (1, 4), (2, 3), (2, 4), (2, 4)]
    assert {"mse", "ssim", "ssim_dr2", "psnr", "psnr_uint8", "valid_loss", "epoch_loss"} <= entries[-1].keys()
    for three, one, epoch in (entries[:3], entries[3:]):  # the curve has every update once
        assert (3 * three["train_loss"] + one["train_loss"]) / 4 == pytest.approx(epoch["epoch_loss"])
    assert configuration.resolve(folder / "config.toml", {}).embed_dim == 16
    assert read_checkpoint(folder / "best.safetensors")["config"]["depths"] == [1]
    assert read_checkpoint(folder / "last.pt")["position"]["epoch"] == 3
    for picture in ("loss.png", "forecast.gif", "pictures/epoch0001_batch0001.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 100
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_testing_a_checkpoint_with_its_own_configuration(trained, run_forked):
    folder, _ = trained
    done = run_forked("test.py", "--checkpoint", folder / "best.safetensors", "--strips", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "test_moving_mnist_2" / "metrics.json").read_text())
    results = report["results"]
    assert results["forecast"]["count"] == 6 and len(results["forecast"]["per_frame"]["mse"]) == 2
    assert results["forecast"]["mean"]["mse"] == pytest.approx(np.mean(results["forecast"]["per_frame"]["mse"]))
    for name, value in results["black frame"]["mean"].items():
        if name != "psnr_uint8":  # the short table has it only where published figures use it
            assert f"{value:.4f}" in done.stdout and name in done.stdout
    assert "psnr_uint8" not in done.stdout and done.stdout.count("\nssim_dr2: SSIM") == 1
    with Image.open(folder / "test_moving_mnist_2" / "forecast.gif") as gif:
        assert gif.n_frames == 5
    assert {p.name for p in (folder / "test_moving_mnist_2").glob("*.png")} == {
        "forecast_0000.png", "forecast_0001.png", "lead_times.png", "spectrum.png",
    }  # fmt: skip


def test_a_file_of_sequences_is_tested_whole(trained, tmp_path):
    np.save(tmp_path / "seq.npy", np.random.default_rng(0).integers(0, 256, (7, 9, 16, 16), dtype=np.uint8))
    arguments = ["--checkpoint", trained[0], "--test_data_dir", tmp_path / "seq.npy", "--test_sequences", "8"]
    with pytest.raises(UserError, match="--test_sequences 8: this test set has 9 sequences, and all of them count"):
        test_program.main([*map(str, arguments), "--device", "cpu"])


def test_testing_a_published_file_on_a_test_file(trained, tmp_path, capsys, caplog):
    """A plain state dict and flags; the standard file's layout."""
    folder, _ = trained
    state = read_checkpoint(folder / "best.safetensors")["model"]
    torch.save(state, tmp_path / "trained_model_state_dict")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "seq.npy", rng.integers(0, 256, (7, 9, 16, 16), dtype=np.uint8))
    test_program.main([
        "--checkpoint", str(tmp_path / "trained_model_state_dict"), *TINY, "--test_data_dir",
        str(tmp_path / "seq.npy"), "--test_sequences", "9", "--test_batch_size", "2", "--strips", "3", "--l1_weight",
        "2",
        "--res_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert len(list((tmp_path / "out").glob("forecast_*.png"))) == 3  # of two batches
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    frames = np.load(tmp_path / "seq.npy")[3:5] / 255
    assert report["results"]["forecast"]["count"] == 9  # no batch dropped
    assert report["results"]["black frame"]["mean"]["mse"] == pytest.approx((frames**2).sum((2, 3)).mean(), rel=1e-5)


def test_weights_to_start_from(trained, tmp_path):
    folder, _ = trained
    options = [*TINY, "--epochs", "1", "--lr", "0", "--res_dir", str(tmp_path / "y")]
    train.main([*options, "--checkpoint_path", str(folder / "best.safetensors")])
    before, after = (read_checkpoint(d / "best.safetensors")["model"] for d in (folder, tmp_path / "y"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_lowers_the_loss(tmp_path):
    train.main([*TINY, "--epochs", "3", "--lr", "1e-2", "--train_sequences", "64", "--res_dir", str(tmp_path / "x")])
    losses = [entry["epoch_loss"] for entry in read_log(tmp_path / "x" / "log.jsonl") if "epoch_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_every_option_of_network_and_data_reaches_them():
    config = configuration.resolve(None, {})
    assert config.network_options.keys() == inspect.signature(build_model).parameters.keys()
    files = [*(ROOT / "vmrnn" / "data").glob("*.py"), ROOT / "vmrnn" / "values.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    read = {*re.findall(r"\b(?:options|config)\.(\w+)", source), "input_size"}  # as frame_size
    read |= {f"{split}_data_dir" for split in SPLITS}  # getattr(options, f"{split}_data_dir")
    assert config.of_scope("data").keys() <= read


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_parses_and_builds(path):
    config = configuration.resolve(path, {})
    build_model(**config.network_options)
    assert path.read_text().startswith("#"), "a config opens with its command and what to expect"


def test_the_published_command_line_is_understood():
    line = (
        "--res_dir ./exps/x --model VMRNN-D --epochs 500 --lr 5e-5 --train_batch_size 8 --valid_batch_size 8 "
        "--test_batch_size 8 --epoch_valid 5 --log_train 200 --log_valid 200 --patch_size 2 --embed_dim 128 --depths 6 "
        "--depths_down 2 6 --depths_up 6 2 --drop_path_rate 0.1 --num_workers 4 --seed 1 --device cpu"
    )
    config, weights, state = train.parse_arguments([*line.split(), "--checkpoint_path", "w"])
    assert (config.depths, config.depths_down, config.lr, weights, state) == ([6], [2, 6], 5e-5, "w", None)


def test_defaults_then_file_then_flags(tmp_path):
    (tmp_path / "c.toml").write_text("lr = 1\nembed_dim = 32\ndepths = [1, 2]\n")
    config = configuration.resolve(tmp_path / "c.toml", {"embed_dim": 48}, base={"epochs": 7, "lr": 0.5})
    assert (config.epochs, config.lr, config.embed_dim, config.depths) == (7, 1.0, 48, [1, 2])
    configuration.save_toml(config, tmp_path / "saved.toml")
    assert configuration.resolve(tmp_path / "saved.toml", {}) == config


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("embed_dims = 3", "unknown key 'embed_dims'"),
        ('lr = "fast"', "lr = 'fast' is not float"),
        ("depths = 6", "depths = 6 is not a list of integers"),
        ("depths = []", "is not a list of integers"),
        ("epochs = true", "epochs = True is not int"),
        ("epochs = 1.5", "is not int"),
        ("tensorboard = 1", "is not bool"),
        ('model = "VMRNN-C"', "choose one of VMRNN-B, VMRNN-D"),
        ("epochs = 0", "epochs = 0: must be at least 1"),
        ("drop_path_rate = 1.0", "must be in"),
        ("lr = -1", "zero or more"),
        ("lr = nan", "finite"),
        ("input_size = [64, 64, 64]", "one side or height and width"),
        ('variables = ["rain\\u0001"]', "holds signs that are not text"),
        ("epochs", "not a TOML file"),
    ],
)
def test_wrong_configurations(tmp_path, text, complaint):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        configuration.resolve(tmp_path / "c.toml", {})


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--config", "absent.toml"], "absent.toml: cannot be read"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
        (["--thresholds", "nan"], "thresholds = .*must be finite"),
        (["--patch_size", "3"], "patch_size 3"),
        (["--input_channels", "3"], "frames of 1 channels, but the network takes 3"),
        (["--digit_size", "20"], "digits of 20 pixels do not fit"),
        (["--device", "cuda:7"], "--device cuda:7: not there"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta: not there"),
        (["--seed", str(2**64)], "below 2"),
        (["--input_size", "4"], "7 pixels or more"),
        (["--input_size", "2000000", "2000000"], "out of memory"),
        (["--embed_dim", "1600000"], "out of memory"),
        (["--res_dir", "x\udcff"], "holds signs that are not text"),
        (["--cuda_graph"], "--cuda_graph needs a CUDA GPU"),
        (["--save_every", "often"], "save_every = 'often': give updates"),
        (["--accumulate", "3"], "train_batch_size 4 does not divide among 1 processes with 3 parts"),
        (["--scan", "mamba"], "'mamba' cannot run on cpu"),
        (["--scan", "fast"], "'fast' does not exist"),
        (["--train_data_dir", "absent"], "absent"),
        (["--train_sequences", "3"], "train_sequences"),
        (["--digits_split", "published"], "13,?000"),
        (["--dataset", "nothing"], "invalid choice: 'nothing'"),
        (["--checkpoint", "absent.pt"], "absent.pt: cannot be read"),
        (["--resume", "absent.pt"], "absent.pt: cannot be read"),
    ],
)
def test_train_refuses_bad_input(arguments, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = fails(train, [*TINY, "--res_dir", tmp_path / "x", *arguments], capsys)
    assert re.search(complaint, line), line
    assert not (tmp_path / "x").exists()  # not even an empty folder


@pytest.mark.parametrize("name, index", [("cuda", 1), ("cuda:0", 0), ("auto", 1)])
def test_a_gpu_has_an_index(name, index, monkeypatch):
    """torch.cuda.set_device takes no other; two GPUs are pretended, of which the second is the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert pick_device(name) == torch.device("cuda", index)
    assert chosen == ([] if name == "auto" else [index])


def test_a_run_is_never_overwritten_by_accident(trained, tmp_path, capsys):
    folder, _ = trained
    before = (folder / "log.jsonl").read_text()
    assert "already holds a run" in fails(train, [*TINY, "--res_dir", folder], capsys)
    assert "holds only weights" in fails(
        train, [*TINY, "--res_dir", tmp_path, "--resume", folder / "best.safetensors"], capsys
    )
    assert (folder / "log.jsonl").read_text() == before


def test_a_resumed_run_takes_lr_from_the_command_line_and_the_rest_from_the_checkpoint(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    resume = ["--res_dir", str(folder), "--resume", "auto"]
    assert "cannot change embed_dim, num_objects; leave them" in fails(
        train, [*resume, "--num_objects", "2", "--embed_dim", "32"], capsys
    )
    # Of one's own data the test's part is cut from the same file: naming another moves the borders.
    assert "cannot change test_data_dir" in fails(train, [*resume, "--test_data_dir", "x.npy"], capsys)
    assert "already holds a run" in fails(train, ["--res_dir", folder, "--resume", trained[0] / "last.pt"], capsys)
    with open(folder / "log.jsonl", "a") as f:
        f.write('{"epoch": 3, "step": 2, "train_loss": 1}\n{"epoch": 3, "st')  # killed in epoch 3
    train.main([*resume, "--epochs", "3", "--lr", "0", "--weight_decay", "0.5"])  # no --config, none of TINY
    before, after = (read_checkpoint(d / "last.pt") for d in (trained[0], folder))
    assert after["position"]["epoch"] == 4 and after["config"]["embed_dim"] == 16 and after["config"]["lr"] == 0
    assert [g["weight_decay"] for g in after["optimizer"]["param_groups"]] == [0.5, 0]
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in before["model"])  # lr 0
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["step"]) for e in entries[-4:]] == [(2, 4), (3, 3), (3, 4), (3, 4)]


def test_a_finished_run_says_what_continues_it(trained, tmp_path, caplog):
    """In a folder with a space, with fewer --epochs than are done, and without the weights that the run began with."""
    folder = tmp_path / "my run"
    shutil.copytree(trained[0], folder)
    caplog.set_level("INFO", "vmrnn")
    train.main(["--res_dir", str(folder), "--resume", "auto", "--epochs", "1", "--init_from", "gone.safetensors"])
    assert "--resume auto --epochs 3 trains further" in caplog.text and "changed    epochs 2 -> 1\n" in caplog.text
    assert f'python test.py --checkpoint "{folder / "best.safetensors"}"' in caplog.text


def test_the_page_lists_what_a_resumed_run_may_change():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    section = re.search(r"^### What a resumed run may change\n(.*?)^##", page, re.DOTALL | re.MULTILINE)[1]
    listed = [name for line in section.splitlines() if line.startswith("- ") for name in re.findall(r"`(\w+)`", line)]
    assert sorted(listed) == sorted(name for name, f in configuration.FIELDS.items() if f.metadata["resume"])


def test_a_run_without_best_weights_yet(trained, tmp_path):
    shutil.copy(trained[0] / "last.pt", tmp_path)
    with pytest.raises(UserError, match=r"best.safetensors: cannot be read .*; .*last.pt has the weights so far"):
        read_checkpoint(tmp_path / "best.safetensors")


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write there" in fails(train, [*TINY, "--res_dir", tmp_path / "file" / "x"], capsys)
    assert "cannot write there" in fails(train, [*TINY, "--res_dir", tmp_path / "file"], capsys)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    line = fails(train, [*TINY, "--epochs", "4", "--lr", "1e30", "--res_dir", tmp_path / "x"], capsys)
    assert "the loss is nan" in line and "at update 2 of epoch 1/4" in line
    assert not (tmp_path / "x" / "last.pt").exists()


@pytest.mark.parametrize("arguments, complaint", [
    (["--embed_dim", "32"], "does not fit this network"),
    (["--test_data_dir", "absent.npy"], "absent.npy"),
    (["--num_frames_input", "0"], "num_frames_input"),
    (["--strips", "0"], "--strips 0"),
])  # fmt: skip
def test_test_refuses_bad_input(trained, arguments, complaint, capsys):
    assert complaint in fails(test_program, ["--checkpoint", trained[0] / "best.safetensors", *arguments], capsys)


def test_test_needs_a_checkpoint_that_can_be_read(trained, tmp_path, capsys):
    assert "--checkpoint" in fails(test_program, [], capsys)
    (tmp_path / "half.pt").write_bytes((trained[0] / "last.pt").read_bytes()[:3000])
    assert "half.pt" in fails(test_program, ["--checkpoint", tmp_path / "half.pt"], capsys)
    model = build_model(**configuration.resolve(None, {"model": "VMRNN-B", "embed_dim": 16}).network_options)
    save_weights(tmp_path / "odd.safetensors", model, {"surprise": 1})
    assert "unknown key 'surprise'" in fails(test_program, ["--checkpoint", tmp_path / "odd.safetensors"], capsys)


def test_exit_code_and_one_line_of_a_real_process(run_forked, tmp_path):
    done = run_forked("train.py", *TINY, "--res_dir", tmp_path / "x", "--scan", "mamba")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and os.linesep in done.stderr


@pytest.mark.parametrize("numbers", [["-3.4e38"], ["-1e-3", "-.5"], ["-9999", "1E+20"], ["-5", "-2.5"]])
def test_negative_numbers_are_values_and_not_options(numbers):
    parser = command_line.Parser("")
    command_line.add_options(parser)
    assert vars(parser.parse_args(["--missing_value", *numbers])) == {"missing_value": [float(n) for n in numbers]}


@pytest.mark.parametrize("space", ["\u00a0", "\u202f", "\u3000", " "])
def test_any_space_may_be_in_a_path(tmp_path, space):
    config = configuration.resolve(None, {"train_data_dir": f"my{space}data"})
    configuration.save_toml(config, tmp_path / "c.toml")
    assert configuration.resolve(tmp_path / "c.toml", {}) == config
    with pytest.raises(UserError, match="not text"):
        configuration.resolve(None, {"train_data_dir": "my\x07data"})


def test_a_configuration_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfepochs = 3\n")
    assert configuration.resolve(tmp_path / "c.toml", {}).epochs == 3
    (tmp_path / "c.toml").write_text("epochs = 3\n", encoding="utf-16")
    with pytest.raises(UserError, match="not a TOML file"):
        configuration.resolve(tmp_path / "c.toml", {})


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--batch_size", ["--train_batch_size", "--valid_batch_size", "--test_batch_size"]),
        ("--epoch", ["--epochs", "--epoch_valid"]),
        ("--learning_rate", ["--lr"]),
        ("--patchsize", ["--patch_size"]),
        ("--xyzzy", []),
    ],
)
def test_an_unknown_flag_is_answered_with_those_that_were_meant(flag, names):
    with pytest.raises(UserError) as refused:
        train.parse_arguments([flag, "3"])
    message = str(refused.value)
    assert message.startswith(f"unrecognized arguments: {flag}; ") and all(name in message for name in names)
    assert ("did you mean" in message) == bool(names) and "\n" not in message


def test_hyphens_are_underscores(tmp_path):
    config = train.parse_arguments(["--patch-size", "4", "--train-batch-size=8", "--no-grad-checkpoint"])[0]
    assert (config.patch_size, config.train_batch_size, config.grad_checkpoint) == (4, 8, False)
    assert train.parse_arguments(["--no_compile", "--res-dir", "a-b"])[0].res_dir == "a-b"


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--patch_size", str(2**31)], ["--epochs", "1" + "0" * 400], ["--epochs", HUGE], ["--lr", "9" * 400],
        ["--seed", HUGE], ["--thresholds", "1", "9" * 400], ["--save_every", HUGE], ["--depths", HUGE],
    ],
)  # fmt: skip
def test_numbers_beyond_all_bounds_on_the_command_line(arguments):
    with pytest.raises(UserError) as refused:
        train.parse_arguments(arguments)
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        f"epochs = {HUGE}", "epochs = 1" + "0" * 400, "lr = 1" + "0" * 400, f"lr = {HUGE}.0", f"epochs = 0x{HUGE}",
        f"thresholds = [1{'0' * 400}]", f"depths = [0x{HUGE}]", "lr = " + "[" * 5000 + "]" * 5000,
        "a = " + "{b = " * 3000 + "1" + "}" * 3000, "a." * 3000 + "b = 1", "[" + "a." * 2000 + "b]", "lr = 1979-05-27",
        f"x{HUGE} = 1", 'res_dir = "\\u0000"',
    ],
)  # fmt: skip
def test_odd_toml_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError) as refused:
        configuration.resolve(tmp_path / "c.toml", {})
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, value", [("RANK", None), ("WORLD_SIZE", "two"), ("MASTER_ADDR", None), ("MASTER_PORT", "-1")]
)
def test_a_part_of_torchruns_environment(name, value, monkeypatch, tmp_path, capsys):
    whole = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
    for key, text in (whole | {name: value}).items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    line = fails(train, [*TINY, "--res_dir", tmp_path / "x"], capsys)
    assert f"but {name} is missing or no number: start with torchrun" in line


@pytest.mark.parametrize("program", ["train.py", "test.py", "predict.py"])
def test_help_and_wrong_options_are_answered_before_torch_is_imported(program):
    """The modules that the program has imported when it ends, by way of an exit function."""
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        f"sys.argv = [{program!r}, *sys.argv[1:]]; runpy.run_path({program!r}, run_name='__main__')"
    )
    for arguments, status in ((["--help"], 0), (["--horizons", "3"], 2)):
        command = [sys.executable, "-W", "error", "-c", code, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and done.stderr.endswith("False\n"), done.stderr


def test_a_run_where_warnings_are_errors_and_the_number_of_threads_is_none(run, tmp_path):
    # torch 2.6 leaves a folder to the end of the program: its own warning.
    warnings = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    done = run(*warnings, "train.py", *TINY, "--epochs", 1, "--res_dir", tmp_path / "x", OMP_NUM_THREADS="abc")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "x" / "best.safetensors").exists()


def test_a_folder_or_a_name_without_its_ending_is_a_checkpoint(trained, tmp_path):
    folder, _ = trained
    best = folder / "best.safetensors"
    assert find_checkpoint(folder) == find_checkpoint(folder / "best") == find_checkpoint(best) == best
    assert test_program.parse_arguments(["--checkpoint", str(folder)])[0].checkpoint == str(best)
    assert train.parse_arguments(["--resume", str(folder)])[2].path == folder / "last.pt"
    with pytest.raises(UserError, match="a folder without best.safetensors and last.pt"):
        read_checkpoint(tmp_path)
