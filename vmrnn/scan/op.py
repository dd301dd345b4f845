"""What the kernels' torch.library ops share.

scan_op(x, dbl, dt_weight, dt_bias, A_log, D, save) -> (y, checkpoints) and
backward_op(dy, x, dbl, dt_weight, dt_bias, A_log, D, checkpoints) -> the six gradients;
the cpu back end's have A in place of A_log.
"""

import torch


def connect(scan_op, backward_op):
    """Make `scan_op` differentiable by `backward_op`, and both known to torch.compile."""

    @backward_op.register_fake
    def _(dy, *inputs_and_checkpoints):
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs_and_checkpoints[:-1])

    def setup_context(ctx, inputs, output):
        *tensors, save = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros the size of the checkpoints

    def backward(ctx, dy, _):
        return *backward_op(dy, *ctx.saved_tensors), None

    scan_op.register_autograd(backward, setup_context=setup_context)


def call(scan_op, *tensors):
    """y of `scan_op`, which keeps checkpoints only if a backward may follow."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return scan_op(*tensors, save)[0]
