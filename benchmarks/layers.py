"""The layers around the scan and the cell's gate: plain torch, recomputing, and as Triton kernels.

    python -m benchmarks.layers
    python -m benchmarks.layers --device cuda       maps in bf16 under autocast

Every way must agree with the first of its group, in its output and in every gradient. The ways are measured in turn,
the forward pass alone and with the backward pass: medians in milliseconds on a CPU, in microseconds of the kernels
alone on a GPU. Prints a table, and adds a line to exps/benchmarks/layers.jsonl. LOG.md has other ways that were tried
and lost.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

from benchmarks.record import record
from benchmarks.timing import kernel_seconds
from vmrnn.errors import UserError
from vmrnn.network import fused, fused_triton, linear
from vmrnn.runtime import describe_device, run_program
from vmrnn.scan import triton_scan

ROUNDS = 5


def leaf(*shape, single=False):
    """A parameter or a map (B, H, W, C). On a GPU a map is in bf16 unless it is `single`."""
    is_map = len(shape) == 4 and shape[1] == shape[2]
    half = is_map and not single and torch.get_default_device().type == "cuda"
    return torch.randn(shape, dtype=torch.bfloat16 if half else torch.float32).requires_grad_()


def depthwise(batch, side, channels):
    """Depthwise 3x3 convolution and SiLU."""
    x, weight, bias = leaf(batch, side, side, channels), leaf(channels, 1, 3, 3), leaf(channels)

    def plain():
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=channels)
        return F.silu(y).permute(0, 2, 3, 1)

    ways = {"plain": plain, "recomputing": lambda: fused.conv_silu(x, weight, bias)}
    if x.is_cuda:
        ways["Triton"] = lambda: fused_triton.conv_silu(x, weight, bias)
    return ways, (x, weight, bias)


def gate(batch, side, channels):
    """(LN(y) * SiLU(z)) W."""
    y, z = leaf(batch, side, side, channels), leaf(batch, side, side, channels)
    weight, bias, out = leaf(channels), leaf(channels), leaf(channels // 2, channels)
    ways = {
        "plain": lambda: F.linear(F.layer_norm(y, (channels,), weight, bias) * F.silu(z), out),
        "recomputing": lambda: fused.norm_gate_linear(y, z, weight, bias, 1e-5, out),
    }
    if y.is_cuda:
        ways["Triton"] = lambda: fused_triton.norm_gate_linear(y, z, weight, bias, 1e-5, out)
    return ways, (y, z, weight, bias, out)


def norm(batch, side, channels):
    """LN of a block's input, in the products' type."""
    C = channels // 2
    x, weight, bias = leaf(batch, side, side, C, single=True), leaf(C), leaf(C)
    ways = {"plain": lambda: fused.norm(x, weight, bias, 1e-5)}
    if x.is_cuda:
        ways["Triton"] = lambda: fused_triton.norm(x, weight, bias, 1e-5)
    return ways, (x, weight, bias)


def cell_gate(batch, side, channels):
    """The cell's gate, in fp32: c + h, so that both are used."""
    o, c = (leaf(batch, side, side, channels // 2, single=True) for _ in range(2))

    def plain():
        f = torch.sigmoid(o)
        after = f * (c + torch.tanh(o))
        return after + f * torch.tanh(after)

    ways = {"plain": plain, "recomputing": lambda: torch.add(*fused.cell_gate(o, c))}
    if o.is_cuda:
        ways["Triton"] = lambda: torch.add(*fused_triton.cell_gate(o, c))
    return ways, (o, c)


def product(batch, side, channels):
    """A linear layer from Di to C channels: by F.linear, and by oneDNN whether or not this machine would choose it."""
    x, weight = leaf(batch, side, side, channels), leaf(channels // 2, channels)
    ways = {"plain": lambda: F.linear(x, weight)}
    if not x.is_cuda and linear.onednn_multiplies():
        ways["oneDNN"] = lambda: linear.LinearFunction.apply(x, weight, None)
    return ways, (x, weight)


def measure(ways, leaves):
    """{way: (forward, forward + backward)} in ms; AssertionError if two ways differ."""
    first = next(iter(ways.values()))()
    gradient = torch.randn_like(first)
    expected = [first.detach(), *torch.autograd.grad(first, leaves, gradient)]
    tolerance = 0.02 if first.is_cuda else 1e-4  # of the largest: bf16 has 8 bits
    times, device = {name: ([], []) for name in ways}, first.device
    for name, way in ways.items():
        result = way()
        got = [result.detach(), *torch.autograd.grad(result, leaves, gradient.to(result.dtype))]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=tolerance * b.abs().max().item(), msg=name)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            with torch.no_grad():
                times[name][0].append(1e3 * kernel_seconds(way, device, at_least=0.05))
            both = lambda way=way: backward(way(), leaves, gradient)  # noqa: E731
            times[name][1].append(1e3 * kernel_seconds(both, device, at_least=0.05))
    return {name: tuple(map(statistics.median, pair)) for name, pair in times.items()}


def backward(result, leaves, gradient):
    torch.autograd.grad(result, leaves, gradient.to(result.dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    maps = [(1, 32, 256), (4, 32, 256), (1, 16, 512)]
    if args.device == "cuda":
        ok, reason = triton_scan.can_run("cuda", torch.float32, 16)
        if not ok:
            raise UserError(f"--device cuda: {reason}")
        maps = [(16, 32, 256), (16, 16, 512), (16, 8, 1024)]
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # or the ways would not agree
    print(describe_device(torch.device(args.device)))
    unit, scale = ("us", 1e3) if args.device == "cuda" else ("ms", 1)
    print(f"{'layer':11}{'batch':>6}{'side':>5}{'channels':>9}  {'way':18}{'forward':>9}{'both':>9}   {unit}")
    results = []
    for layer in (depthwise, gate, norm, cell_gate, product):
        for shape in maps:
            with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
                measured = measure(*layer(*shape))
            for way, (forward, both) in measured.items():
                cells = f"{scale * forward:9.2f}{scale * both:9.2f}"
                print(f"{layer.__name__:11}{shape[0]:6}{shape[1]:5}{shape[2]:9}  {way:18}{cells}")
                results.append({"layer": layer.__name__, "shape": shape, "way": way, "forward": forward, "both": both})
    record("layers", {"results": results})


if __name__ == "__main__":
    run_program(main)
