"""The building blocks of a DenseNet as plain PyTorch modules.

Their ``forward`` is the reference: it reads like the paper and stores like it too. The efficient
path (:mod:`memdense.features`) only gathers the parameters that live here.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import warn_plain
from .convolution import dilated_conv3x3
from .direct import digits_lost
from .functional import norm_relu_conv1x1
from .spec import pair
from .structure import Unsupported, axes_of, check_global_hooks, read_conv, read_norm

# torch.fx's node of a traced network
torch.fx.wrap("dilated_conv3x3")


class DenseLayer(nn.Module):
    """One layer of a dense block: BN-ReLU-Conv1x1-BN-ReLU-Conv3x3, or BN-ReLU-Conv3x3 without
    bottleneck.

    Args:
        num_input_features: channels of all features produced before this layer.
        growth_rate: channels this layer adds (k in the paper).
        bn_size: the bottleneck has ``bn_size * growth_rate`` channels; ``None`` for no bottleneck.
        drop_rate: probability with which a new value is dropped in training.
        dilation: dilation of the 3x3 convolution.

    Shape: ``(N, num_input_features, H, W)``, or a list of tensors with as many channels in all,
    to ``(N, growth_rate, H, W)``.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        width = num_input_features if bn_size is None else bn_size * growth_rate
        conv3x3 = dict(kernel_size=3, padding=dilation, dilation=dilation, bias=False)
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = nn.Conv2d(width, growth_rate, **conv3x3)
        else:
            self.conv1 = nn.Conv2d(num_input_features, width, kernel_size=1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(width, growth_rate, **conv3x3)
        self.has_bottleneck = bn_size is not None
        self.drop_rate = float(drop_rate)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        x = features if isinstance(features, Tensor) else torch.cat(list(features), 1)
        new = self.conv1(self.relu1(self.norm1(x)))
        if self.has_bottleneck:
            new = self.conv2(self.relu2(self.norm2(new)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    """Layers that each read everything produced before them.

    Args:
        num_layers: how many.
        num_input_features: C, channels of what comes in.
        bn_size, growth_rate, drop_rate, dilation: of each :class:`DenseLayer`.

    Shape: ``(N, C, H, W)`` to ``(N, C + num_layers * growth_rate, H, W)``.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            width = num_input_features + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(
                width, growth_rate, bn_size, drop_rate, dilation
            )

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN-ReLU-Conv1x1 between two blocks, then 2x2 average pooling (none where ``pool=False``).

    Shape: ``(N, num_input_features, H, W)`` to ``(N, num_output_features, H // 2, W // 2)``.
    """

    def __init__(
        self, num_input_features: int, num_output_features: int, pool: bool = True
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            norm=nn.BatchNorm2d(num_input_features),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(num_input_features, num_output_features, kernel_size=1, bias=False),
        )
        if pool:
            layers["pool"] = nn.AvgPool2d(kernel_size=2, stride=2)
        super().__init__(layers)


# that compute what they look like
OWN_TYPES = frozenset({DenseBlock, DenseLayer, Transition})


class BNReLUConv1x1(nn.Module):
    """BN-ReLU-Conv1x1 as one operation: :func:`memdense.functional.bn_relu_conv1x1`.

    Its children are ``norm`` (``nn.BatchNorm2d``) and ``conv`` (``nn.Conv2d`` without bias), so
    that what was trained as separate modules loads. If they carry hooks or were replaced they run
    one by one, with one warning that says why.

    Args:
        in_channels, out_channels: C and B.
        eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        device, dtype: of the parameters, as in all modules.

    Shape: ``(N, C, H, W)`` to ``(N, B, H, W)``, channels last.

    Raises:
        TypeError, ValueError: in forward, as :func:`memdense.functional.bn_relu_conv1x1`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats, **where)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, **where)
        self._warned: set[str] = set()

    def forward(self, input: Tensor) -> Tensor:
        if reason := self._unusual(input):
            warn_plain("BNReLUConv1x1", reason, self._warned)
            return self.conv(F.relu(self.norm(input)))
        norm = self.norm
        running = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if norm.training and not norm.track_running_stats:
            running = None, None, None
        return norm_relu_conv1x1(
            input, *running, norm.weight, norm.bias, self.conv.weight,
            norm.training or running[0] is None, norm.momentum, norm.eps,
        )  # fmt: skip

    def _unusual(self, input: Tensor) -> str:
        """Why running the children one by one would do anything else."""
        if isinstance(input, torch.fx.Proxy):
            return "torch.fx writes down PyTorch's own operations"
        try:
            check_global_hooks()
            if read_norm(self.norm, "norm").group:
                return "norm synchronises with other processes"
            read_conv(self.conv, "conv", 1)
            if 3 in (axes_of(self.norm), axes_of(self.conv)):
                return "norm or conv is for volumes"
        except Unsupported as reason:
            return reason.args[0]
        return digits_lost(input) if isinstance(input, Tensor) else ""


class DilatedConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a 3x3 kernel and any dilation, which gives the same bits every time: on
    the extension where it is built, or where they were the faster ones by PyTorch's: in 16 bits on
    a GPU by cuDNN's deterministic algorithms, in bfloat16 on a CPU that has AMX.

    Takes and loads what ``nn.Conv2d(..., kernel_size=3)`` takes and loads.

    Args:
        padding: a number, one per axis, or ``"same"`` for an output of the input's size (stride 1).

    Shape: ``(N, C, H, W)`` or ``(C, H, W)``, contiguous or channels last, to the same format.

    Raises:
        ValueError: kernels other than 3x3, groups other than 1, a stride or dilation below 1, a
            negative padding, other than one or two of them, or a padding_mode other than zeros; in
            forward too, of groups and a padding_mode that were set since.
        TypeError: a stride, padding or dilation of what is no integers.
        RuntimeError, TypeError: in forward, as :func:`memdense.functional.dilated_conv3x3`.
    """

    computes_like = nn.Conv2d  # so that dense layers may have it

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size not in (3, (3, 3), [3, 3]):
            raise ValueError(f"DilatedConv2d: expected kernel_size 3, got {kernel_size!r}")
        self._check(groups, padding_mode)
        for name, value, least in (
            ("stride", stride, 1),
            ("padding", 0 if isinstance(padding, str) else padding, 0),
            ("dilation", dilation, 1),
        ):
            if len(pair(value)) != 2 or min(pair(value)) < least:
                raise ValueError(f"DilatedConv2d: expected {name} >= {least}, got {value}")
        super().__init__(
            in_channels, out_channels, 3, stride, padding, dilation, 1, bias, "zeros", device, dtype
        )

    @staticmethod
    def _check(groups: int, padding_mode: str) -> None:
        if groups != 1:
            raise ValueError(f"DilatedConv2d: expected groups 1, got {groups}")
        if padding_mode != "zeros":
            raise ValueError(f"DilatedConv2d: expected padding_mode 'zeros', got {padding_mode!r}")

    def forward(self, input: Tensor) -> Tensor:
        self._check(self.groups, self.padding_mode)  # some set them for all convolutions of a model
        return dilated_conv3x3(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
