"""Linear layers, faster than torch's on AMD processors with AVX-512.

torch multiplies fp32 matrices on a CPU by MKL, which uses AVX2 on processors that are not Intel's. The oneDNN library,
which torch also holds, uses AVX-512 there: the same fp32 arithmetic, in another order, up to twice as fast. On Intel's
processors MKL uses AVX-512 itself. With AVX2 oneDNN is not faster (benchmarks/LOG.md). So oneDNN multiplies only on
AMD processors with AVX-512, and MKL everywhere else.

torch offers oneDNN's product to its own compiler, as torch.ops.mkldnn._linear_pointwise. A torch without it, or with
another one under that name, multiplies everything itself. ATEN_CPU_CAPABILITY=avx2 in the environment, which takes
AVX-512 from torch's own loops, leaves all products to MKL, too.
"""

import functools
import platform

import torch
import torch.nn as nn
import torch.nn.functional as F

from vmrnn.runtime import cpu_fact

# Multiply-adds of the smallest product that goes to oneDNN. A call of it takes longer to start than one of MKL.
LEAST = 1 << 22


def linear(x, weight, bias=None):
    """torch.nn.functional.linear: x (..., K), weight (N, K), bias (N) or None -> (..., N)."""
    if not fits(x, weight) or (bias is not None and bias.dtype != x.dtype):  # F.linear refuses such a bias
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return LinearFunction.apply(x, weight, bias)
    return by_onednn(x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, computed by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def gradient_of_input(grad, weight):
    """grad weight: grad (..., N), weight (N, K) -> (..., K)."""
    if not torch.is_grad_enabled() and fits(grad, weight):
        return by_onednn(grad, weight.mT)
    return grad @ weight


def gradient_of_weight(grad, x):
    """grad^T x, summed over the leading axes: grad (..., N), x (..., K) -> (N, K)."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if not torch.is_grad_enabled() and fits(grad.mT, x):
        (M, N), K = grad.shape, x.shape[1]
        # oneDNN copies the transpose of its first input. The narrower one is taken if that saves more copying than the
        # transpose of the result costs.
        if M * (N - K) > N * K:
            return by_onednn(x.mT, grad.mT).mT.contiguous()
        return by_onednn(grad.mT, x.mT)
    return grad.mT @ x


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        # With create_graph, gradients are enabled here, and the products are torch's: they have gradients themselves.
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            gradient_of_input(grad, weight) if for_x else None,
            gradient_of_weight(grad, x) if for_weight else None,
            grad.flatten(0, -2).sum(0) if for_bias else None,
        )


def fits(a, b):
    """Whether oneDNN should multiply a (..., K) and b, which has K columns or rows: fp32 on a CPU, and large enough.

    False while torch traces or transforms the operations, since it would not know this one: under a compiler, an
    exporter, autocast, torch.func or forward-mode differentiation.
    """
    return (
        not torch.compiler.is_compiling()  # first: a compiler cannot follow the other lines
        and not torch.jit.is_tracing()
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and a.dim() > 1
        and a.numel() * b.numel() >= LEAST * max(a.shape[-1], 1)
        and type(a) is torch.Tensor  # not a tensor of shapes without values
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
        and onednn_is_faster()  # last: its first call multiplies, which a count of products must not see
    )


def transformed():
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def by_onednn(x, weight, bias=None):
    """x weight^T + bias without gradients: x (..., K), weight (N, K) or the transpose of a matrix (K, N)."""
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # oneDNN has no fast product for a weight with gaps between its rows
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def onednn_is_faster():
    """Whether products go through oneDNN on this machine."""
    return (
        processor_vendor() == "AuthenticAMD"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and onednn_multiplies()
    )


def onednn_multiplies():
    """Whether torch has oneDNN's product, and its values are right."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        with torch.no_grad():
            # Whole numbers: nothing is rounded. `transformed` asks torch by private names.
            return not transformed() and torch.equal(by_onednn(x, weight, bias), F.linear(x, weight, bias))
    except (AttributeError, RuntimeError, TypeError):  # no such operation, or other arguments
        return False


def processor_vendor():
    """Such as "AuthenticAMD" or "GenuineIntel"; something else where the system does not say, as on macOS."""
    # Windows: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
    return cpu_fact("vendor_id") or platform.processor().rpartition(", ")[2]
