"""Imports run one way (README, Where things are): a lower layer never imports a higher one."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT, SLOW

TOP = {"VMRNN_B", "VMRNN_D", "dataset", "functions", "train", "test", "predict", "benchmarks"}
NETWORK = {"vmrnn.network", "vmrnn.scan", "vmrnn.rollout", "vmrnn.graphs", "vmrnn.forecaster"}
# file or folder -> what of the project it may not import; the first match counts
FORBIDDEN = {
    "VMRNN_B.py": TOP,
    "VMRNN_D.py": TOP,
    "dataset.py": TOP | NETWORK,
    "functions.py": TOP,
    "train.py": {"test", "predict", "benchmarks"},
    "test.py": {"train", "predict", "benchmarks"},
    "predict.py": {"train", "test", "benchmarks"},
    "vmrnn/scan/": TOP | NETWORK - {"vmrnn.scan"} | {"vmrnn.data", "vmrnn.metrics", "vmrnn.selfcheck"},
    "vmrnn/network/": TOP | {"vmrnn.data", "vmrnn.metrics", "vmrnn.rollout", "vmrnn.graphs", "vmrnn.forecaster"},
    "vmrnn/data/": TOP | NETWORK,
    "vmrnn/metrics.py": TOP | NETWORK | {"vmrnn.data"},
    "vmrnn/": TOP,
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offences(path, forbidden):
    return [name for name in imported(path) if any(name == f or name.startswith(f + ".") for f in forbidden)]


@pytest.mark.parametrize("path", sorted([*(ROOT / "vmrnn").rglob("*.py"), *ROOT.glob("*.py")]), ids=lambda p: p.name)
def test_imports_run_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    forbidden = next(FORBIDDEN[start] for start in FORBIDDEN if name.startswith(start))
    assert not offences(path, forbidden)


def test_the_reference_imports_torch_alone():
    roots = {name.split(".")[0] for name in imported(ROOT / "vmrnn" / "scan" / "reference.py")}
    assert roots == {"torch"}


def test_importing_the_programs_does_nothing():
    code = (
        "import vmrnn, sys; early = 'vmrnn.forecaster' in sys.modules; import train, test, predict; vmrnn.Forecaster;"
    )
    code += "sys.exit(early or 'mamba_ssm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", SLOW)
def test_what_is_called_slow_exists(name):
    file, _, test = name.partition("::")
    assert f"def {test or 'test'}" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
