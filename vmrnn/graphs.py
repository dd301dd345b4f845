"""CUDA graphs: the few hundred small kernels of a call are recorded once and replayed together.

Launching such kernels one by one takes longer than running them.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map

WARM_UP = 3  # calls before the recording, which must not contain compilation or autotuning


class RecordedCall:
    """function(*inputs) as a CUDA graph, for inputs and outputs that are tensors or nested tuples of tensors.

    The graph is recorded at the first call and again whenever a shape changes. Weights, gradients and activations then
    stay at their addresses, so nothing else can use that memory. Use it inside one autocast context only: the recorded
    kernels read the copies of the weights that this context made.
    """

    def __init__(self, function):
        self.function, self.graph, self.shapes = function, None, None

    def is_recorded(self, *inputs):
        """Whether a call with these inputs replays the graph as it is."""
        return self.graph is not None and self.shapes == [t.shape for t in tree_leaves(inputs)]

    def __call__(self, *inputs):
        if not self.is_recorded(*inputs):
            self.record(*inputs)
        for own, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            own.copy_(given)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def record(self, *inputs):
        self.graph = self.outputs = None  # frees the memory of the graph before
        self.inputs, self.shapes = tree_map(torch.clone, inputs), [t.shape for t in tree_leaves(inputs)]
        device = tree_leaves(inputs)[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, such as the loader's thread that pins memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = self.function(*self.inputs)
        self.graph = graph


class GraphedForward:
    """model(frame, states) -> (frame, states) as one CUDA graph, for a stream of frames.

    The first frame of a stream, which has no states, runs without the graph.
    """

    def __init__(self, model):
        self.model, self.recorded = model, RecordedCall(model)

    def __call__(self, frame, states=None):
        return self.model(frame) if states is None else self.recorded(frame, states)


class GraphedStep:
    """A training step (functions.Step) as one CUDA graph: step(inputs, targets) -> loss, gradients are added up.

    Everything else that Step has is reached through this object.
    """

    def __init__(self, step):
        self.step, self.recorded = step, RecordedCall(step)

    def __getattr__(self, name):
        return getattr(self.step, name)

    def __call__(self, inputs, targets):
        if not self.recorded.is_recorded(inputs, targets):
            self.record(inputs, targets)
        return self.recorded(inputs, targets)

    def record(self, inputs, targets):
        """Record the step for these shapes.

        Recording runs the step, so the gradients and the state of the generator are put back afterwards.
        """
        parameters, device = self.step.parameters, self.step.device
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        random_state = torch.cuda.get_rng_state(device)
        self.recorded.record(inputs, targets)
        torch.cuda.set_rng_state(random_state, device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)

    def clear_gradients(self):
        self.step.network.zero_grad(set_to_none=False)  # the graph adds to these very tensors
