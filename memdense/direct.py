"""Whether an operation may run without PyTorch's dispatcher, whose way through custom operations
takes longer than the kernels of a small stage do.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}


def watched(*tensors: Tensor | None) -> bool:
    """Whether tracing, a transform, a mode or a subclass is there, which want to see one operation
    of PyTorch's; or a tensor whose values its memory does not show.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    ):
        return True
    return any([t is not None and (type(t) not in _PLAIN or t.is_neg()) for t in tensors])


def learns(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
