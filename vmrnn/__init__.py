"""VMRNN: what the two networks share. Imports nothing from the top level of the repository.

The one exception is Forecaster, the way in for programs that only use a trained network: it stands above the networks,
in forecaster.py, and is imported when it is asked for.
"""

__all__ = ["Forecaster"]


def __getattr__(name):
    if name == "Forecaster":
        from forecaster import Forecaster

        return Forecaster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
