"""Single layers, each way that was tried: what the entries of LOG.md on layers were decided by.

    python -m benchmarks.layers
    python -m benchmarks.layers --device cuda       the layers around the scan, as torch and as Triton kernels

Every way must agree with the first of its group, gradients too. Interleaved medians, forward and with
backward, in ms on a CPU; on a GPU in microseconds of the kernels alone, maps in bf16 under autocast, mostly
from its 60 MB cache. A human table, then one JSON line.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F

from benchmarks.timing import seconds
from vmrnn.errors import UserError
from vmrnn.network import fused as layers, fused_triton as triton_layers
from vmrnn.runtime import describe_device, run_program
from vmrnn.scan import triton_scan

ROUNDS = 15


def leaf(*shape, single=False):
    """A parameter or a map (B, H, W, C), which on a GPU is in bf16 unless it is `single`."""
    is_map = len(shape) == 4 and shape[1] == shape[2]
    half = is_map and not single and torch.get_default_device().type == "cuda"
    return torch.randn(shape, dtype=torch.bfloat16 if half else torch.float32).requires_grad_()


def depthwise(batch, side, channels):
    """Depthwise 3x3 convolution and SiLU of a (B, H, W, C) map."""
    x, weight, bias = leaf(batch, side, side, channels), leaf(channels, 1, 3, 3), leaf(channels)

    def convolve(nchw):
        return F.silu(F.conv2d(nchw, weight, bias, padding=1, groups=channels)).permute(0, 2, 3, 1)

    def shifted():
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        y = bias
        for i in range(3):
            for j in range(3):
                y = y + padded[:, i : i + side, j : j + side] * weight[:, 0, i, j]
        return F.silu(y)

    ways = {
        "permuted view": lambda: convolve(x.permute(0, 3, 1, 2)),
        "recomputing": lambda: layers.conv_silu(x, weight, bias),
        "NCHW copy": lambda: convolve(x.permute(0, 3, 1, 2).contiguous()),
        "shifted products": shifted,
    }
    if x.is_cuda:
        ways["Triton"] = lambda: triton_layers.conv_silu(x, weight, bias)
    return ways, (x, weight, bias)


def gate(batch, side, channels):
    """(LN(y) * SiLU(z)) W."""
    y, z = leaf(batch, side, side, channels), leaf(batch, side, side, channels)
    weight, bias, out = leaf(channels), leaf(channels), leaf(channels // 2, channels)
    ways = {
        "plain": lambda: F.linear(F.layer_norm(y, (channels,), weight, bias) * F.silu(z), out),
        "recomputing": lambda: layers.norm_gate_linear(y, z, weight, bias, 1e-5, out),
    }
    if y.is_cuda:
        ways["Triton"] = lambda: triton_layers.norm_gate_linear(y, z, weight, bias, 1e-5, out)
    return ways, (y, z, weight, bias, out)


def norm(batch, side, channels):
    """LN of a block's input, in the products' type."""
    C = channels // 2
    x, weight, bias = leaf(batch, side, side, C, single=True), leaf(C), leaf(C)
    ways = {"plain": lambda: layers.norm(x, weight, bias, 1e-5)}
    if x.is_cuda:
        ways["Triton"] = lambda: triton_layers.norm(x, weight, bias, 1e-5)
    return ways, (x, weight, bias)


def cell_gate(batch, side, channels):
    """The cell's gate, in fp32: c + h, so that both are used."""
    o, c = (leaf(batch, side, side, channels // 2, single=True) for _ in range(2))

    def plain():
        f = torch.sigmoid(o)
        after = f * (c + torch.tanh(o))
        return after + f * torch.tanh(after)

    ways = {"plain": plain, "recomputing": lambda: torch.add(*layers.cell_gate(o, c))}
    if o.is_cuda:
        ways["Triton"] = lambda: torch.add(*triton_layers.cell_gate(o, c))
    return ways, (o, c)


def in_proj(batch, side, channels):
    """The projection to (x, z), the convolution of x, and the product with z, so that both halves are used."""
    u, weight = leaf(batch, side, side, channels // 2), leaf(2 * channels, channels // 2)
    filters, bias = leaf(channels, 1, 3, 3), leaf(channels)
    return {
        "one product": lambda: torch.mul(*halves(F.linear(u, weight).chunk(2, -1), filters, bias)),
        "two products": lambda: torch.mul(*halves([F.linear(u, w) for w in weight.chunk(2)], filters, bias)),
    }, (u, weight, filters, bias)


def halves(parts, filters, bias):
    x, z = parts
    return F.conv2d(x.permute(0, 3, 1, 2), filters, bias, padding=1, groups=len(bias)).permute(0, 2, 3, 1), z


def head(batch, side, channels):
    """One doubling of the head: 3x3 transposed convolution, stride 2."""
    x, weight, bias = leaf(batch, side, side, channels), leaf(channels, channels, 3, 3), leaf(channels)

    def transposed(nchw):
        return F.conv_transpose2d(nchw, weight, bias, stride=2, padding=1, output_padding=1)

    def phases():
        nchw, w = x.permute(0, 3, 1, 2), weight.transpose(0, 1)
        down, right, both = F.pad(nchw, (0, 0, 0, 1)), F.pad(nchw, (0, 1)), F.pad(nchw, (0, 1, 0, 1))
        ee = F.conv2d(nchw, w[:, :, 1:2, 1:2], bias)
        eo = F.conv2d(right, w[:, :, 1:2, [2, 0]], bias)
        oe = F.conv2d(down, w[:, :, [2, 0], 1:2], bias)
        oo = F.conv2d(both, w[:, :, [2, 0]][:, :, :, [2, 0]], bias)
        y = torch.stack([ee, eo, oe, oo]).unflatten(0, (2, 2))  # (p, q, B, O, H, W)
        return y.permute(2, 4, 0, 5, 1, 3).reshape(batch, 2 * side, 2 * side, channels).permute(0, 3, 1, 2)

    return {
        "permuted view": lambda: transposed(x.permute(0, 3, 1, 2)),
        "NCHW copy": lambda: transposed(x.permute(0, 3, 1, 2).contiguous()),
        "four phases": phases,
    }, (x, weight, bias)


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
                times[name][0].append(1e3 * seconds(way, device))
            times[name][1].append(1e3 * seconds(lambda way=way: backward(way(), leaves, gradient), device))
    return {name: tuple(map(statistics.median, pair)) for name, pair in times.items()}


def backward(result, leaves, gradient):
    torch.autograd.grad(result, leaves, gradient.to(result.dtype))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        ok, reason = triton_scan.can_run("cuda", torch.float32, 16)
        if not ok:
            raise UserError(f"--device cuda: {reason}")
        maps = [(16, 32, 256), (16, 16, 512), (16, 8, 1024)]
        groups = {depthwise: maps, gate: maps, norm: maps, cell_gate: maps}
    else:
        maps = [(1, 32, 256), (4, 32, 256), (1, 16, 512)]
        groups = {
            depthwise: maps,
            gate: maps,
            cell_gate: maps,
            in_proj: maps,
            head: [(8, 8, 128), (8, 16, 128), (72, 16, 128)],
        }
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # or the ways would not agree
    print(describe_device(torch.device(args.device)))
    unit, scale = ("us", 1e3) if args.device == "cuda" else ("ms", 1)
    print(f"{'layer':11}{'batch':>6}{'side':>5}{'channels':>9}  {'way':18}{'forward':>9}{'both':>9}   {unit}")
    results = []
    for layer, shapes in groups.items():
        for shape in shapes:
            with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
                measured = measure(*layer(*shape))
            for way, (forward, both) in measured.items():
                cells = f"{scale * forward:9.2f}{scale * both:9.2f}"
                print(f"{layer.__name__:11}{shape[0]:6}{shape[1]:5}{shape[2]:9}  {way:18}{cells}")
                results.append({"layer": layer.__name__, "shape": shape, "way": way, "forward": forward, "both": both})
    print(json.dumps({"benchmark": "layers", "results": results}))


if __name__ == "__main__":
    run_program(main)
