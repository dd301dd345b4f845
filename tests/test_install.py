"""`pip install .` in real processes: what is installed, and that it works far from the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

import vmrnn
from vmrnn import config as configuration
from vmrnn.checkpoint import save_weights
from vmrnn.network import build_model

OPTIONS = dict(
    model="VMRNN-B", patch_size=4, embed_dim=16, depths=[1], d_state=4, input_size=[16], dataset="array",
    data_range=[-10.0, 30.0],
)  # fmt: skip

CODE = """
import numpy as np
import vmrnn
frames = np.load("x.npy")
forecaster = vmrnn.Forecaster("w.safetensors", device="cpu")
for frame in frames:
    forecaster.observe(frame)
np.save("y.npy", forecaster.forecast(3))
trained = vmrnn.load_network("w.safetensors")
assert type(trained.model).__module__ == "VMRNN_B", type(trained.model).__module__
print(vmrnn.__file__)
import vmrnn.report
vmrnn.report.TEMPLATE.read_text(encoding="utf-8")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("pip") is None,
    reason="pip is not installed: an environment that uv made has none",
)
def test_an_installed_package_works_beside_the_users_own_modules(tmp_path):
    """Installed from a copy of the checkout, used in a folder whose modules have the names of our programs."""
    source, target, folder = (tmp_path / name for name in ("source", "target", "folder"))
    ignored = shutil.ignore_patterns(".*", "__pycache__", "exps", "results", "cache")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    installed = {path.name for path in target.iterdir() if path.suffix != ".dist-info"} - {"__pycache__"}
    assert installed == {"vmrnn", "VMRNN_B.py", "VMRNN_D.py"}
    assert (target / "vmrnn" / "scan" / "cpu.cpp").is_file()

    folder.mkdir()
    for name in ("dataset", "functions", "train", "test", "predict", "forecaster"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the module of the user was imported')\n")
    config = configuration.resolve(None, OPTIONS)
    save_weights(folder / "w.safetensors", build_model(**config.network_options), config.to_dict())
    frames = np.random.default_rng(0).uniform(-10, 30, (4, 16, 16)).astype(np.float32)
    np.save(folder / "x.npy", frames)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target / "vmrnn" / "__init__.py")

    forecaster = vmrnn.Forecaster(folder / "w.safetensors", device="cpu")
    for frame in frames:
        forecaster.observe(frame)
    np.testing.assert_allclose(np.load(folder / "y.npy"), forecaster.forecast(3), atol=1e-4)
