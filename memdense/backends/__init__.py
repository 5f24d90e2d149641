"""Backends: objects that supply the primitives of a dense block. The engine does not know which
one runs; the choice is made here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .. import _extension
from .native import Native
from .reference import Reference

__all__ = ["Native", "Reference", "backend_for", "use_backend"]

_CHOICES = ("reference", "native")
_chosen: ContextVar[str | None] = ContextVar("memdense_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run what is called inside, backward passes too, on one backend, in this thread only.

    Args:
        name: "native" (the C++ extension, where it has a kernel for what comes) or "reference"
            (PyTorch operations).

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the extension is not there.
    """
    _check(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _check(name: str) -> None:
    if name not in _CHOICES:
        raise ValueError(f"expected one of the backends {', '.join(_CHOICES)}, got {name!r}")
    if name == "native" and not _extension.available():
        raise RuntimeError(f"the native backend is not available: {_extension.reason()}")


def backend_for(device: torch.device) -> Reference:
    """The backend that runs on ``device``: a fresh one, since its scratch belongs to one call.

    What :func:`use_backend` chose, else the environment's MEMDENSE_BACKEND, else the fastest.
    """
    name = _chosen.get()
    if name is None and (name := os.environ.get("MEMDENSE_BACKEND") or None):
        _check(name)
    if name is None:
        name = "native" if _extension.available() else "reference"
    return Native() if name == "native" and device.type == "cpu" else Reference()
