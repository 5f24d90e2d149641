"""Backends: objects that supply the primitives of a dense block. The engine does not know which
one runs; the choice is made here.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import FrameType

import torch

from .. import _extension
from .native import Native
from .reference import Reference

__all__ = [
    "MemdenseWarning",
    "Native",
    "Reference",
    "backend_for",
    "triton_reason",
    "use_backend",
]

_CHOICES = ("reference", "native", "triton")
_chosen: ContextVar[str | None] = ContextVar("memdense_backend", default=None)


class MemdenseWarning(UserWarning):
    """A part of a model runs on a slower path than it could, and why."""


def warn_plain(what: str, reason: str, known: set[str]) -> None:
    """Say that modules run as they are, for a reason that is not among the ``known`` ones yet."""
    message = f"memdense runs {what} as plain modules: {reason}"
    if torch.compiler.is_compiling():  # once a graph; a guard on what is known would make another
        _say(message)
    elif reason not in known:
        known.add(reason)
        _say(message)


def _say(message: str) -> None:
    """A warning that shows the user's line, not one of torch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back and _package(frame) in ("memdense", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MemdenseWarning, stacklevel=level)


# Dynamo calls it, and does not break the graph: torch.compiler.assume_constant_result without
# importing it
_say._dynamo_marked_constant = True


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run what is called inside on one backend, in this thread only, and whenever it comes the
    backward of what ran forward so. Backward passes that are called inside run on it too, but for
    a GPU's, which have threads of their own.

    Args:
        name: "native" (the C++ extension), "triton" (Triton's kernels, and the extension's for
            CUDA where it was built) or "reference" (PyTorch operations). What a backend has no
            kernel for, float64 on a GPU for example, runs as PyTorch operations.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here.
    """
    _check(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """What :func:`use_backend` chose."""
    return _chosen.get()


@contextmanager
def unless_chosen(name: str | None) -> Iterator[None]:
    """``name`` inside, where :func:`use_backend` chose nothing: autograd has threads of its own for
    a GPU's backward passes.
    """
    token = _chosen.set(_chosen.get() or name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _check(name: str) -> None:
    if name not in _CHOICES:
        raise ValueError(f"expected one of the backends {', '.join(_CHOICES)}, got {name!r}")
    if name == "native" and not _extension.available():
        raise RuntimeError(f"the native backend is not available: {_extension.reason()}")
    if name == "triton" and not _interpreted():
        if not torch.cuda.is_available():
            raise RuntimeError("the triton backend is not available: there is no CUDA device")
        if reason := triton_reason(torch.device("cuda", torch.cuda.current_device())):
            raise RuntimeError(f"the triton backend is not available: {reason}")


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    if not find_spec("triton"):
        return False
    from .triton.launch import INTERPRETED

    return INTERPRETED


@cache
def triton_reason(device: torch.device) -> str:
    """Why Triton's kernels do not run on ``device``, in a sentence; empty where they do."""
    if device.type != "cuda":
        return f"its kernels are for CUDA devices, not for {device.type!r}"
    if torch.version.hip:
        return "its kernels were not tried on ROCm"
    if not find_spec("triton"):
        return "triton is not installed"
    reason = _extension.too_old(device)
    return reason and f"its kernels {reason}"


def backend_for(device: torch.device) -> Reference:
    """The backend that runs on ``device``: a fresh one, since its scratch belongs to one call.

    What :func:`use_backend` chose, else the environment's MEMDENSE_BACKEND, else the fastest.
    """
    asked = _chosen.get()
    if asked is None and (asked := os.environ.get("MEMDENSE_BACKEND")):
        _check(asked)
    name = asked or ("triton" if device.type == "cuda" else "native")
    if name == "native" and device.type == "cpu":
        if _extension.available():
            return Native()
        if _extension.built():
            _say_once(f"memdense runs PyTorch's operations on cpu: {_extension.reason()}")
    if name == "triton" and (not triton_reason(device) or (asked and _interpreted())):
        from .triton import Triton

        there = device.type == "cuda" and _extension.cuda_available()
        if there and (reason := _extension.cuda_unfit(device)):
            _say_once(f"memdense runs Triton's 3x3 on {device}, not CUDA C++'s: {reason}")
        return Triton()
    if name == "triton" and device.type == "cuda":
        _say_once(f"memdense runs PyTorch's operations on {device}: {triton_reason(device)}")
    return Reference()


_say_once = cache(_say)
