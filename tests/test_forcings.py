"""Forcings are channels that are given, in the horizon too, and never forecast."""

import pytest
import torch

from functions import RolloutLoss, evaluate
from vmrnn.errors import UserError
from vmrnn.network import build_model
from vmrnn.rollout import rollout


@pytest.fixture(params=["VMRNN-B", "VMRNN-D"])
def model(request):
    torch.manual_seed(0)
    return build_model(
        request.param, patch_size=2, in_chans=5, out_chans=2, embed_dim=16, depths=[1], depths_down=[1], depths_up=[1],
        drop_path_rate=0.0, scan="torch",
    ).eval()  # fmt: skip


def frames(count, seed):
    return torch.rand(2, count, 5, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_rollout_uses_the_known_forcings_and_nothing_else_of_the_future(model):
    inputs, following = frames(3, 0), frames(4, 1)
    outputs = rollout(model, inputs, 4, following=following)
    assert outputs.shape == (2, 6, 2, 8, 8)

    # By hand, frame by frame
    found, states = [], None
    for frame in inputs.unbind(1):
        output, states = model(frame, states)
        found.append(output)
    for t in range(3):
        output, states = model(torch.cat((found[-1], following[:, t, 2:]), dim=1), states)
        found.append(output)
    torch.testing.assert_close(outputs, torch.stack(found, 1), rtol=1e-4, atol=1e-5)

    other_truth = following.clone()
    other_truth[:, :, :2] = torch.nan
    assert torch.equal(rollout(model, inputs, 4, following=other_truth), outputs)
    other_forcing = following.clone()
    other_forcing[:, 2, 4] += 1  # given with the third forecast, so only the fourth can change
    changed = rollout(model, inputs, 4, following=other_forcing)
    assert torch.equal(changed[:, :5], outputs[:, :5]) and not torch.equal(changed[:, 5], outputs[:, 5])


def test_forcings_that_are_not_given_are_asked_for(model):
    assert rollout(model, frames(3, 0), 1).shape == (2, 3, 2, 8, 8)
    with pytest.raises(UserError, match="has 3 forcings: give those of the 3 frames after"):
        rollout(model, frames(3, 0), 4)


def test_loss_and_metrics_are_of_what_is_forecast(model):
    inputs, targets = frames(3, 0), frames(2, 1)
    other = targets.clone()
    other[:, 1, 2:] = 0.3  # the forcings of the last frame are never fed
    seen = []
    results = [
        evaluate(model, [(inputs, t)], torch.device("cpu"), ("mse",), RolloutLoss(), on_batch=lambda *batch: seen.append(batch))
        for t in (targets, other)
    ]  # fmt: skip
    assert results[0] == results[1]
    assert all(tensor.shape[2] == 2 for tensor in seen[0][1:])
    outputs = rollout(model, inputs, 2, following=targets)
    expected = (outputs[:, 2:] - targets[:, :, :2]).square().sum(dim=(2, 3, 4)).mean().item()
    assert results[0]["model"]["mean"]["mse"] == pytest.approx(expected, rel=1e-5)
