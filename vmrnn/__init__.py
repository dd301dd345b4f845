"""VMRNN, a recurrent network of Vision-Mamba blocks. `vmrnn.Forecaster` forecasts a stream with a trained network."""

__all__ = ["Forecaster"]


def __getattr__(name):
    if name == "Forecaster":
        from vmrnn.forecaster import Forecaster

        return Forecaster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
