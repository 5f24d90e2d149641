"""Loads the C++ extension, if it was built, and tells PyTorch what its operations return.

`torch.ops.memdense.channel_statistics(x) -> (mean, var)`: x [M, C], M >= 1, with unit column
stride and any row stride, float32, float64 or bfloat16, on the CPU; mean and biased variance of
each column, [C], float32 (float64 for float64). RuntimeError for any other x.
The same input gives the same bits, whatever the number of threads.

`conv3x3`, `conv3x3_input_gradient`, `conv3x3_weight_gradient`: a dilated 3x3 convolution into an
output of the caller's, and its gradients. Images [N, C, H, W] of any strides, weight [k, C, 3, 3];
on the CPU float32, float64 or bfloat16, on CUDA float32, float16 or bfloat16 (with ``tf32``,
float32 is multiplied in TF32); RuntimeError otherwise. convolution.py is made of them. On the CPU
they also stand behind `aten::convolution_overrideable` and its backward, which PyTorch
differentiates: 3x3, one group, not transposed.

`bn_relu_conv3x3` and `bn_relu_conv3x3_backward`: a dense layer's second half, on matrices of n
images of h by w pixels. y [M, C], out and dy [M, k], dz [M, C], with unit column stride and any row
stride, in one of these dtypes; weight [k, C, 3, 3] in it too, of any strides (on CUDA channels last
is read fastest); mean, var [C] float32 (float64 for float64), gamma, beta [C] in their dtype or
y's; keep [M, k] bool. With s = gamma / sqrt(var + eps), t = beta - mean * s:

    out = conv3x3(relu(s * y + t)) * keep * factor, stride 1, padded with `dilation` zeros
    dz = (conv3x3's input gradient of dy) * [s * y + t > 0]
    dbeta = sum dz, dgamma = sum dz * (y - mean) / sqrt(var + eps)    of dz as stored

moments [2, k] takes mean and biased variance of out as stored; dweight [k, C, 3, 3], contiguous.
All of these, dbeta and dgamma are in the dtype of mean. With ``accumulate``, on the CPU only,
s * dz is added to dz instead, and the sums are of dz before anything is rounded. On CUDA two
launches forward (one without statistics), three backward (two without dweight). The same bits on
the same device, or for the same number of threads.

`conv3x3_scratch(n, h, w, c, k, dilation, threads, bfloat16, backward) -> int`: bytes of the tensors
that `bn_relu_conv3x3`, or its backward, takes in float32, or in bfloat16, on the CPU beside its
results. `conv1x1_scratch(rows, channels, outputs, threads, bfloat16, backward) -> int`: the same of
`bn_relu_conv1x1` and `bn_relu_pool_conv1x1`, of which ``rows`` are counted behind the pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_HOW = (
    "to build it, with a C++ compiler there, run "
    "`python -m pip install --no-build-isolation --no-deps -e .` in the source directory "
    "(MEMDENSE_BUILD=require shows why it fails)"
)


# bfloat16 and TF32 on tensor cores: what CUDA and Triton kernels ask of a device
CAPABILITY = (8, 0)

# what csrc/ops.cpp defines
OPERATIONS = (
    "register_bytes",
    "channel_statistics",
    "pack",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_pool_conv1x1",
    "bn_relu_pool_conv1x1_backward",
    "settle",
    "bn_relu",
    "bn_relu_backward",
    "bn_relu_mean",
    "bn_relu_mean_backward",
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward",
    "bn_relu_maxpool_sums",
    "conv3x3",
    "conv3x3_input_gradient",
    "conv3x3_weight_gradient",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "conv1x1_scratch",
    "conv3x3_scratch",
)

# what csrc/cuda registers
CUDA_OPERATIONS = (
    "conv3x3",
    "conv3x3_input_gradient",
    "conv3x3_weight_gradient",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
)


def _library(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.abi3.so")


def _load_library(name: str, operations: Sequence[str], has: Callable[[str], bool]) -> str:
    """Load memdense/NAME.abi3.so; returns why that could not be done, or nothing."""
    path = _library(name)
    if not path.exists():
        return f"not built: {path.name} is missing; {_HOW}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"failed to load {path.name}: {error}; {_HOW}"
    missing = [operation for operation in operations if not has(operation)]
    if missing:
        return f"{path.name} was built from older sources and lacks {', '.join(missing)}; {_HOW}"
    return ""


def _load() -> str:
    return _load_library("_C", OPERATIONS, lambda name: hasattr(torch.ops.memdense, name))


def _load_cuda() -> str:
    if not torch.version.cuda:
        return f"torch {torch.__version__} was built without CUDA"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    reason = _load_library("_CUDA", CUDA_OPERATIONS, lambda name: has(f"memdense::{name}", "CUDA"))
    return reason and f"{reason}, with nvcc there too"


_reason = _load()
_cuda_reason = _reason or _load_cuda()


def built() -> bool:
    """Whether there is a library, of whatever use."""
    return _library("_C").exists()


def available() -> bool:
    """Whether `torch.ops.memdense` holds the compiled operations."""
    return not _reason


def reason() -> str:
    """Why the extension is not available, in a sentence; empty when it is."""
    return _reason


def instructions() -> str:
    """What the CPU's kernels are compiled for on this machine; empty without them.

    ATEN_CPU_CAPABILITY lowers it as it does PyTorch's: default, avx2, avx512 (no AMX).
    """
    names = {16: "baseline", 32: "AVX2", 64: "AVX-512", 1024: "AVX-512, AMX in bfloat16"}
    return names[torch.ops.memdense.register_bytes()] if available() else ""


def cuda_available() -> bool:
    """Whether the operations have CUDA kernels. They run on devices of :func:`cuda_runs_on`."""
    return not _cuda_reason


def cuda_reason() -> str:
    """Why there are no CUDA kernels, in a sentence; empty when there are."""
    return _cuda_reason


def cuda_library() -> Path:
    """The file that the CUDA kernels are in."""
    return _library("_CUDA")


def too_old(device: torch.device) -> str:
    """Why a CUDA device is no place for CUDA and Triton kernels, which "need ..."; or empty."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= CAPABILITY:
        return ""
    found, needed = (".".join(map(str, c)) for c in (capability, CAPABILITY))
    return f"need compute capability {needed}, this device has {found}"


@cache
def cuda_unfit(device: torch.device) -> str:
    """Why the CUDA kernels do not run on a CUDA device, in a sentence; empty where they do."""
    if not cuda_available():
        return cuda_reason()
    if reason := too_old(device):
        return f"they {reason}"
    with torch.cuda.device(device):
        error = unfit()
    return f"they cannot run on this device: {error}" if error else ""


def unfit() -> str:
    """What CUDA says against running the kernels on the current device; empty if nothing."""
    say = getattr(ctypes.CDLL(str(cuda_library())), "memdense_unfit", None)
    if say is None:  # built from older sources
        return ""
    say.restype = ctypes.c_char_p
    return (say() or b"").decode()


def cuda_runs_on(device: torch.device) -> bool:
    """Whether the CUDA kernels run on a CUDA device."""
    return not cuda_unfit(device)


def tf32() -> bool:
    """Whether PyTorch would multiply a float32 convolution in TF32 on CUDA."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _statistics_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[1],), dtype=dtype), x.new_empty((x.shape[1],), dtype=dtype)


def _written_fake(*arguments) -> None:
    """Everything is written into arguments."""


def _weight_gradient_fake(dy, x, stride, padding, dilation, tf32=False):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((dy.shape[1], x.shape[1], 3, 3), dtype=dtype)


if available():
    torch.library.register_fake("memdense::channel_statistics", _statistics_fake)
    torch.library.register_fake("memdense::conv3x3_weight_gradient", _weight_gradient_fake)
    for _name in (
        "conv3x3",
        "conv3x3_input_gradient",
        "bn_relu_conv3x3",
        "bn_relu_conv3x3_backward",
    ):
        torch.library.register_fake(f"memdense::{_name}", _written_fake)
