"""memdense: the same DenseNet, a fraction of the memory."""

from . import functional
from .backends import MemdenseWarning, use_backend
from .convert import convert
from .densenet import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet264
from .explain import Explanation, explain
from .features import Features
from .modules import BNReLUConv1x1, DenseBlock, DenseLayer, DilatedConv2d, Transition
from .plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "BNReLUConv1x1",
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
    "functional",
    "plan",
    "use_backend",
]
