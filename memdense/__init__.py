"""memdense: the same DenseNet, a fraction of the memory."""

from .backends import use_backend
from .convert import convert
from .densenet import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet264
from .explain import Explanation, explain
from .modules import DenseBlock, DenseLayer, DilatedConv2d, Transition
from .plan import Plan, plan
from .stage import Features, MemdenseWarning

__version__ = "0.1.0"

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "DilatedConv2d",
    "Explanation",
    "Features",
    "MemdenseWarning",
    "Plan",
    "Transition",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "explain",
    "plan",
    "use_backend",
]
