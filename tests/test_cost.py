"""The counted cost of the published networks, against their figures and a count by hand."""

import pytest

from benchmarks import cost
from vmrnn import config as configuration
from vmrnn.network.advection import MOVES, REACH

TAXIBJ_B = dict(
    model="VMRNN-B", patch_size=4, embed_dim=128, depths=[12], input_channels=2, input_size=[32, 32],
    num_frames_input=4, num_frames_output=4,
)  # fmt: skip


def ss2d(positions, C, N=16):
    """(multiply-adds, scan operations) of one layer by hand. As in the paper: Di = 2C, R = C / 16, 4 directions."""
    Di, R = 2 * C, C // 16
    products = C * 2 * Di + 9 * Di + Di * 4 * (R + 2 * N) + 4 * R * Di + Di * C
    return positions * products, positions * Di * 4 * (9 * N + 1)


def cell(positions, C, depth):
    products, scan = ss2d(positions, C)
    return depth * products + positions * 2 * C * C, depth * scan  # the first block mixes x and h


def total(*layers):
    return tuple(map(sum, zip(*layers)))


def test_network_b_of_taxibj():
    """Published: 0.89 G multiply-adds per sequence of 7 steps, without the scan."""
    found = cost.cost(configuration.resolve(None, TAXIBJ_B))
    embed = (64 * 16 * 2 * 128, 0)
    head = (64 * 9 * 128 * 128 + 256 * 9 * 128 * 2, 0)  # transposed convolutions: every input pixel meets the kernel
    multiply_adds, scan = total(embed, cell(64, 128, 12), head)
    assert found["frame"] == {"multiply_adds": multiply_adds, "scan_operations": scan}
    assert found["sequence"] == {"multiply_adds": 7 * multiply_adds, "scan_operations": 7 * scan}
    assert found["steps"] == 7 and round(7 * multiply_adds / 1e9, 2) == 0.89
    assert found["parameters"] == 2_218_114


def test_a_base_costs_its_channels_in_the_patch_embedding():
    plain, moved = (
        cost.cost(configuration.resolve(None, TAXIBJ_B | dict(dataset="array", base=base)))["sequence"]
        for base in ("none", "motion")
    )
    assert moved["multiply_adds"] - plain["multiply_adds"] == 7 * 64 * 16 * 2 * 128


def test_a_head_that_moves_the_last_frame():
    plain, advection = (
        cost.cost(configuration.resolve(None, TAXIBJ_B | dict(dataset="array", head=head)))["frame"]["multiply_adds"]
        for head in ("plain", "advection")
    )
    length = 2 * REACH + 1  # of a filter
    side = 4 + length - 1  # of what the filters of a patch of 4 pixels reach
    drawn = 256 * 9 * 128 * (MOVES + 1)  # weights of the copies and of the drawn frame
    filters = 64 * 128 * MOVES * 2 * length
    moved = 64 * MOVES * 2 * (4 * side * side + 4 * side * 4)  # two channels, along columns and then along rows
    assert advection - plain == drawn + filters + moved


def test_network_d_of_moving_mnist():
    """Published: 13.4 M parameters that are trained, 46.6 G multiply-adds and 24.6 G of the scan in 19 steps."""
    found = cost.cost(configuration.resolve(None, {}))
    frame = total(
        (1024 * 4 * 128, 0),
        cell(1024, 128, 2), (256 * 512 * 256, 0), cell(256, 256, 6), (64 * 1024 * 512, 0),
        cell(64, 512, 2), (64 * 512 * 1024, 0), cell(256, 256, 6), (256 * 256 * 512, 0),
        (1024 * 9 * 128, 0),
    )  # fmt: skip
    assert tuple(found["frame"].values()) == frame
    assert tuple(found["sequence"].values()) == tuple(19 * part for part in frame)
    assert (round(19 * frame[0] / 1e9, 1), round(19 * frame[1] / 1e9, 1)) == (46.6, 24.6)
    assert round(found["parameters"] / 1e6, 1) == 13.4


@pytest.mark.parametrize("model", ["VMRNN-B", "VMRNN-D"])
def test_the_program_prints_what_it_counts_and_measures(model, capsys):
    small = (
        "--embed_dim 16 --depths 1 --depths_down 1 --depths_up 1 --d_state 4 --input_size 16 --device cpu --scan torch"
    )
    cost.main(["--model", model, *small.split()])
    printed = capsys.readouterr().out
    for words in ("without the scan", "sum of both", "19-step sequence", "frames/s", "peak memory"):
        assert words in printed
