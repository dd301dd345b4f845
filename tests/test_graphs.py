"""The bookkeeping of recorded calls, with a stand-in for CUDA's graph. On a GPU test_training.py and test_predict.py
compare recorded runs with plain ones."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from functions import RolloutLoss, Step
from vmrnn import graphs
from vmrnn.rollout import Rollout
from VMRNN_B import VMRNN


class StandIn:
    """A graph that replays by calling the recorded function again, into the tensors that recording returned."""

    def replay(self):
        for old, new in zip(tree_leaves(self.call.outputs), tree_leaves(self.call.function(*self.call.inputs))):
            old.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """The graphs that are recorded."""
    found = []

    @contextmanager
    def nothing(*args, **kwargs):
        yield

    class Stream:
        def __init__(self, *args):
            self.wait_stream = lambda other: None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found.append(StandIn()) or found[-1])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    record = graphs.RecordedCall.record

    def remember(self, *inputs):
        record(self, *inputs)
        found[-1].call = self

    monkeypatch.setattr(graphs.RecordedCall, "record", remember)
    return found


def test_a_stream_is_recorded_once_per_shape(recordings):
    model = VMRNN(8, 2, 1, 16, [1]).eval()
    graphed = graphs.GraphedForward(model)
    with torch.no_grad():
        for sizes, recorded in (((8, 8), 1), ((8, 16), 2)):
            frames, states, own = torch.rand(4, 1, 1, *sizes), None, None
            for i, frame in enumerate(frames):
                expected, states = model(frame, states)
                got, own = graphed(frame, own)
                torch.testing.assert_close(got, expected)
                assert len(recordings) == (recorded - 1 if i == 0 else recorded)


def test_a_recorded_step_adds_the_same_gradients_and_draws_the_same(recordings):
    results = []
    for wrap in (lambda step: step, graphs.GraphedStep):
        torch.manual_seed(0)
        network = Rollout(VMRNN(8, 2, 1, 16, [2], drop_path_rate=0.5)).train()
        step = wrap(Step(network, RolloutLoss(), torch.device("cpu"), parts=2))
        losses = []
        for size in (3, 3, 2):
            step.clear_gradients()
            for part in torch.rand(2, size, 4, 1, 8, 8):
                losses.append(step(part[:, :2], part[:, 2:]))
        results.append([torch.stack(losses), *(p.grad.clone() for p in step.parameters)])
    for plain, recorded in zip(*results, strict=True):
        torch.testing.assert_close(recorded, plain)
    assert len(recordings) == 2
