"""The code of docs/deployment.md runs, and what leaves the project forecasts as the network does."""

import re

import numpy as np
import pytest
import torch
from helpers import ROOT

from vmrnn import config as configuration
from vmrnn.checkpoint import save_weights
from vmrnn.network import build_model
from vmrnn.rollout import rollout
from vmrnn.values import ValueRange

OPTIONS = dict(
    model="VMRNN-D", patch_size=2, embed_dim=16, depths_down=[1], depths_up=[1], d_state=4, input_size=[16],
    dataset="array", data_range=[0.0, 5.0],
)  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """run(section) executes the blocks of the page up to a section's end and returns their variables."""
    folder = tmp_path_factory.mktemp("page")
    config = configuration.resolve(None, OPTIONS)
    torch.manual_seed(0)
    model = build_model(**config.network_options).eval()
    with torch.no_grad():  # fresh weights forecast much the same frame from any past
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_weights(folder / "best.safetensors", model, config.to_dict(), ValueRange(0.0, 5.0))
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    variables, done = {"torch": torch}, []

    def run(name, monkeypatch):
        monkeypatch.chdir(folder)
        for section in sections:
            title = section.split("\n", 1)[0]
            if title not in done and (title == name or title == "torch.export"):
                for code in re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE):
                    exec(compile(code, f"docs/deployment.md, {title}", "exec"), variables)
                done.append(title)
        return variables

    run.model = model
    return run


def expected(page, found):
    with torch.no_grad():
        return rollout(page.model, found["known"].transpose(0, 1), 4)[0, 4:]


def test_the_exported_program_forecasts_as_the_network(page, monkeypatch):
    found = page("torch.export", monkeypatch)
    got = torch.cat(found["forecast"])
    assert got.shape == (4, 1, 16, 16) and (got[0] - got[3]).abs().max() > 1e-4
    torch.testing.assert_close(got, expected(page, found), atol=1e-5, rtol=0)


def test_onnx_forecasts_as_the_network(page, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    found = page("ONNX", monkeypatch)
    got = np.concatenate(found["onnx_forecast"])
    np.testing.assert_allclose(got, expected(page, found).numpy(), atol=1e-5)


def test_the_forecaster_is_a_pysteps_nowcast(page, monkeypatch):
    pytest.importorskip("pysteps")
    found = page("pysteps", monkeypatch)
    assert found["rain"].shape == (4, 16, 16)
    np.testing.assert_allclose(found["rain"], 5 * expected(page, found)[:, 0].numpy(), atol=1e-4)
