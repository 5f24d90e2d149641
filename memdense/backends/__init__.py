"""Backends: objects that supply the primitives of a dense block. The engine does not know which one
runs.
"""

from .reference import Reference

__all__ = ["Reference"]
