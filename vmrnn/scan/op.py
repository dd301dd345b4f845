"""What the kernels' torch.library ops share. A back end with a kernel has two ops:

scan_op(x, dbl, dt_weight, dt_bias, A_log, D, save) -> (y, checkpoints)
backward_op(dy, x, dbl, dt_weight, dt_bias, A_log, D, checkpoints) -> the six gradients
"""

import torch


def connect(scan_op, backward_op):
    """Register `backward_op` as the gradient of `scan_op`, and what torch.compile needs of it."""

    @backward_op.register_fake
    def _(dy, *inputs_and_checkpoints):
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs_and_checkpoints[:-1])

    def setup_context(ctx, inputs, output):
        *tensors, save = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or autograd makes zeros as large as the checkpoints

    def backward(ctx, dy, _):
        return *backward_op(dy, *ctx.saved_tensors), None

    scan_op.register_autograd(backward, setup_context=setup_context)


def call(scan_op, *tensors):
    """y of `scan_op`. Checkpoints are kept only if a backward can follow."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return scan_op(*tensors, save)[0]
