"""CUDA graphs: a few hundred small kernels recorded once and replayed together."""

import torch
from torch.utils._pytree import tree_leaves, tree_map


def capture(function, device):
    """(CUDA graph of the kernels that function() launches, what it returned). It is called four times."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is built or chosen at a first call must not be recorded
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on, such as the loader's that pins memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, function()


class GraphedForward:
    """model(frame, states) -> (frame, states) as one CUDA graph, for a stream: a frame's few hundred kernels take
    longer to launch than to run.

    The first frame, without states, is not recorded; frames of another shape are recorded anew. Under autocast only
    within one context of it: the recorded kernels read its copies of the weights.
    """

    def __init__(self, model):
        self.model, self.graph, self.inputs = model, None, (None, None)

    def __call__(self, frame, states=None):
        if states is None:
            return self.model(frame)
        if self.graph is None or self.inputs[0].shape != frame.shape:
            self.capture(frame, states)
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves((frame, states)), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tree_map(torch.clone, self.outputs)

    def capture(self, frame, states):
        self.graph = self.outputs = None  # their memory serves the next
        self.inputs = tree_map(torch.clone, (frame, states))
        self.graph, self.outputs = capture(lambda: self.model(*self.inputs), frame.device)
