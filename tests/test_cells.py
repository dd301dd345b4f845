"""The cells of --cell in both networks: what every cell must do, and each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_identical, outputs_and_gradients
from timm.models.swin_transformer import SwinTransformerBlock

from benchmarks import cells
from functions import RolloutLoss
from vmrnn import config as configuration
from vmrnn.checkpoint import load_network, save_weights
from vmrnn.errors import UserError
from vmrnn.network import CELLS, build_model
from vmrnn.network.conv import KERNEL, ConvLSTMCell
from vmrnn.network.swin import WINDOW, SwinBlock, SwinLSTMCell, number_of_heads
from vmrnn.rollout import rollout

SIZES = dict(patch_size=2, in_chans=1, embed_dim=16, depths=[2], depths_down=[1], depths_up=[2], d_state=4)
NEW_CELLS = [cell for cell in CELLS if cell != "vss"]  # the other tests have vss


def network(model, cell, **options):
    return build_model(model, cell=cell, **(SIZES | options))


def test_the_option():
    assert configuration.resolve(None, {}).cell == "vss"
    assert all(configuration.resolve(None, {"cell": cell}).network_options["cell"] == cell for cell in CELLS)
    with pytest.raises(UserError, match="choose one of vss, swin, conv"):
        configuration.resolve(None, {"cell": "lstm"})


@pytest.mark.parametrize("task", cells.SIZES)
def test_the_benchmark_compares_networks_of_equal_size(task):
    counts = {
        cell: sum(p.numel() for p in build_model(**cells.config_of(task, cell).network_options).parameters())
        for cell in CELLS
    }
    assert max(counts.values()) <= 1.05 * counts["vss"] and min(counts.values()) >= 0.95 * counts["vss"], counts


@pytest.mark.parametrize("cell", NEW_CELLS)
@pytest.mark.parametrize("model", ["VMRNN-B", "VMRNN-D"])
def test_a_rollout_of_any_size_trains_every_parameter(model, cell):
    net = network(model, cell)
    inputs, targets = torch.rand(2, 3, 1, 20, 9), torch.rand(2, 2, 1, 20, 9)
    outputs = rollout(net, inputs, 2)
    assert outputs.shape == (2, 4, 1, 20, 9) and 0 <= outputs.min() and outputs.max() <= 1
    RolloutLoss()(outputs, inputs, targets).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("cell", NEW_CELLS)
def test_the_same_seed_gives_the_same_network_and_gradients(cell):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        net = network("VMRNN-B", cell, attn_drop_rate=0.1, drop_path_rate=0.2).train()
        frames = torch.rand(2, 3, 1, 8, 8)
        runs.append(
            outputs_and_gradients(lambda *_, net=net, frames=frames: rollout(net, frames, 2), [*net.parameters()])
        )
    assert_identical(*runs)


@pytest.mark.parametrize("cell", NEW_CELLS)
@pytest.mark.parametrize("model", ["VMRNN-B", "VMRNN-D"])
def test_the_past_matters(model, cell):
    net = network(model, cell).eval()
    frame = torch.rand(2, 1, 1, 8, 8)
    after = [net(frame[0], net(past)[1])[0] for past in (frame[0], frame[1])]
    assert (after[0] - after[1]).abs().max() > 1e-5
    torch.testing.assert_close(rollout(net, frame.transpose(0, 1), 1)[0, -1], net(frame[1], net(frame[0])[1])[0][0])


@pytest.mark.parametrize("cell", NEW_CELLS)
def test_states_and_frames_stay_fp32_under_autocast(cell):
    net = network("VMRNN-D", cell).eval()
    frame = torch.rand(1, 1, 8, 8)
    exact = net(frame)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, states = net(frame)
    assert {t.dtype for t in torch.utils._pytree.tree_leaves(states)} == {torch.float32} == {out.dtype}
    assert 0 < (out - exact).abs().max() < 0.02


@pytest.mark.parametrize("cell", NEW_CELLS)
def test_compiled_steps_are_one_graph(cell):
    net = network("VMRNN-D", cell).eval()
    frames = torch.rand(1, 3, 1, 8, 8)
    expected = rollout(net, frames, 2)
    net.advance = torch.compile(net.advance, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(rollout(net, frames, 2), expected)


@pytest.mark.parametrize("cell", NEW_CELLS)
def test_saved_weights_know_their_cell(cell, tmp_path):
    options = {"model": "VMRNN-B", "cell": cell, "embed_dim": 16, "depths": [1], "input_size": [16]}
    config = configuration.resolve(None, options)
    net = build_model(**config.network_options).eval()
    save_weights(tmp_path / "best.safetensors", net, config.to_dict())
    loaded = load_network(tmp_path / "best.safetensors").model.eval()
    frame = torch.rand(1, 1, 16, 16)
    assert torch.equal(loaded(frame)[0], net(frame)[0])
    with pytest.raises(UserError):
        load_network(tmp_path / "best.safetensors", cell="vss")


def test_the_gate_of_swin_blocks_is_the_papers():
    cell = SwinLSTMCell(16, drop_path=[0.0, 0.0]).eval()
    x, h, c = torch.randn(3, 1, 4, 8, 16)
    o = cell.blocks[1](cell.blocks[0](x, h))
    f = torch.sigmoid(o)
    new_c = f * c + f * torch.tanh(o)
    out, (new_h, got_c) = cell(x, (h, c))
    torch.testing.assert_close(got_c, new_c)
    torch.testing.assert_close(new_h, f * torch.tanh(new_c))
    assert out is new_h


@pytest.mark.parametrize("shifted", [False, True])
def test_a_swin_block_is_timms_where_windows_fit(shifted):
    block = SwinBlock(32, mixes_hidden=False, shifted=shifted).eval()
    theirs = SwinTransformerBlock(
        32, (12, 8), num_heads=number_of_heads(32), window_size=WINDOW, shift_size=WINDOW // 2 if shifted else 0
    ).eval()
    theirs.load_state_dict(block.state_dict())
    x = torch.randn(2, 12, 8, 32)
    torch.testing.assert_close(block(x), theirs(x))


def test_a_small_map_has_a_window_of_its_own_size():
    """Against attention over the whole map, with the position biases of the offsets that it has."""
    block = SwinBlock(16, mixes_hidden=False, shifted=True).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x, (H, W) = torch.randn(1, 3, 2, 16), (3, 2)
    positions = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    offset = positions[:, None] - positions[None] + WINDOW - 1
    bias = block.attn.relative_position_bias_table[offset[..., 0] * (2 * WINDOW - 1) + offset[..., 1]]
    q, k, v = block.attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.permute(2, 0, 1))
    expected = block.attn.proj(expected.transpose(1, 2).flatten(2)).unflatten(1, (H, W))
    torch.testing.assert_close(block._attn(x), expected)


def test_shifted_windows_connect_neighbours_and_nothing_else():
    """A change at one position reaches its window only, and no position on the other side of the map."""
    for shifted, rows in ((False, range(0, 4)), (True, range(2, 6))):
        block = SwinBlock(16, mixes_hidden=False, shifted=shifted).eval()
        x = torch.randn(1, 10, 4, 16)
        changed = x.clone()
        changed[0, 3] += 1
        reached = (block._attn(changed) - block._attn(x)).abs().amax((0, 2, 3)) > 0
        assert reached.nonzero().flatten().tolist() == list(rows)


def test_every_second_block_of_a_swin_cell_is_shifted():
    cell = SwinLSTMCell(16, drop_path=[0.0] * 3)
    assert [tuple(block.shift_size) for block in cell.blocks] == [(0, 0), (2, 2), (0, 0)]


def test_dropout_of_the_new_cells():
    x = torch.randn(2, 4, 4, 16)
    cell = ConvLSTMCell(16, drop_path=[0.0, 0.0], dropout=0.5)
    assert 0.4 < (cell.train()(x)[0] == 0).float().mean() < 0.6 and (cell.eval()(x)[0] != 0).all()
    block = SwinBlock(16, mixes_hidden=False, shifted=False, drop_path=1.0)
    assert torch.equal(block.train()(x), x) and not torch.equal(block.eval()(x), x)  # all of a block is skipped


@pytest.mark.parametrize("dim, heads", [(16, 1), (48, 3), (40, 2), (20, 1), (8, 1), (128, 8)])
def test_heads(dim, heads):
    assert number_of_heads(dim) == heads


def test_a_conv_layer_is_the_papers_formula():
    cell = ConvLSTMCell(4, drop_path=[0.0, 0.0]).eval()
    x, h, c = torch.randn(3, 2, 6, 5, 4)
    out, states = cell(x, ((h, c), (h, c)))
    for layer, (new_h, new_c) in zip(cell.layers, states, strict=True):
        nchw = torch.cat((x, h), -1).movedim(-1, 1)
        gates = F.conv2d(nchw, layer.conv.weight, layer.conv.bias, padding=KERNEL // 2).movedim(1, -1)
        i, f, g, o = gates.split(4, -1)
        expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
        torch.testing.assert_close(new_c, expected)
        torch.testing.assert_close(new_h, o.sigmoid() * expected.tanh())
        x = new_h
    assert out is states[-1][0]
