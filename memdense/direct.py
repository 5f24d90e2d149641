"""Whether an operation may run without PyTorch's dispatcher, whose way through custom operations
takes longer than the kernels of a small stage do.
"""

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}


def watched(*tensors: Tensor | None) -> bool:
    """Whether tracing, a transform, a mode or a subclass is there, which want to see one operation
    of PyTorch's; or a tensor whose values its memory does not show.
    """
    if (
        is_compiling()
        or _get_tracing_state() is not None
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
    ):
        return True
    return any([t is not None and (type(t) not in _PLAIN or t.is_neg()) for t in tensors])


def foreign(t: Tensor | None) -> bool:
    """Whether a class of its own carries out the operations on ``t``, and may know only PyTorch's.
    Not those that tracing wraps tensors in.
    """
    cls = type(t)
    if t is None or cls in _PLAIN or cls.__module__.startswith("torch._subclasses."):
        return False
    return cls.__torch_dispatch__ is not Tensor.__torch_dispatch__


def transformed() -> bool:
    """Whether a transform of torch.func's, or forward-mode AD, wants operations of PyTorch's own,
    which have rules for it.
    """
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def written_down() -> bool:
    """Whether a trace or an export is made, which may be read where memdense is not."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return True
    return torch.compiler._is_exporting_flag  # Dynamo of torch 2.11 takes is_exporting() for true


def batched(*gradients: Tensor | None) -> bool:
    """Whether each stands for many: torch.func's vmap, or autograd's ``is_grads_batched``."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return transformed() or any(g is not None and legacy(g) for g in gradients)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast may be on for x; by a device's name that takes ten times as long to ask."""
    # what it asks of leaves some other devices out
    return is_compiling() or not (x.is_cpu or x.is_cuda) or _is_any_autocast_enabled()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast has convolutions compute in on a device; None where it is off."""
    kind = device.type
    # Dynamo of torch 2.11 does not know how to ask
    available = kind in ("cpu", "cuda") or torch._C._is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def digits_lost(x: Tensor) -> str:
    """That a norm would keep digits of x that autocast takes from a convolution; empty if not."""
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype in (dtype, torch.float64):
        return ""
    return f"autocast convolves in {dtype}, but what comes in is {x.dtype}"


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """A convolution's tensors as autocast would have it take them."""
    x = tensors[0]
    dtype = autocast_dtype(x.device) if _autocasts(x) else None
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def learns(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
