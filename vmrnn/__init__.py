"""VMRNN: a recurrent network of Vision-Mamba blocks that forecasts frames.

    vmrnn.Forecaster     forecasts a stream of frames with a trained network
    vmrnn.load_network   the network of a file of weights

Both are imported when they are first used, so `import vmrnn` is fast.
"""

from importlib import import_module

PUBLIC = {"Forecaster": "vmrnn.forecaster", "load_network": "vmrnn.checkpoint"}
__all__ = ["Forecaster", "load_network"]


def __getattr__(name):
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
