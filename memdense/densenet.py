"""DenseNet with torchvision's modules, names and numbers.

`Densely Connected Convolutional Networks <https://arxiv.org/abs/1608.06993>`_ (Huang et al., 2017),
with the memory of `Memory-Efficient Implementation of DenseNets
<https://arxiv.org/abs/1707.06990>`_ (Pleiss et al., 2017) in fewer passes over it: see
:mod:`memdense.engine`.
"""

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .features import Features, pools_unseen
from .modules import DenseBlock, Transition
from .structure import article

_HUB = "https://download.pytorch.org/models/"
_URLS = {
    "densenet121": _HUB + "densenet121-a639ec97.pth",
    "densenet161": _HUB + "densenet161-8d451a50.pth",
    "densenet169": _HUB + "densenet169-b2777c0a.pth",
    "densenet201": _HUB + "densenet201-c1103571.pth",
}
# output_stride -> each block's dilation; where it grows, no transition pools in front
_DILATIONS = {32: (1, 1, 1, 1), 16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class DenseNet(nn.Module):
    """DenseNet-BC, exchangeable with ``torchvision.models.DenseNet``.

    Args:
        growth_rate: channels each layer adds (k in the paper).
        block_config: layers of each dense block.
        num_init_features: channels of the first convolution.
        bn_size: bottlenecks have ``bn_size * growth_rate`` channels; ``None`` for no bottlenecks
            (the paper's DenseNet and DenseNet-C).
        drop_rate: dropout after each layer, in training.
        num_classes: outputs of the classifier.
        memory_efficient: torchvision's name for ``efficient``; wins over it where given.
        efficient: run on shared buffers and recompute in backward. ``False`` runs the plain
            modules: the reference.
        in_channels: channels of the images.
        compression: a transition keeps this fraction of the channels; 1.0 for no compression.
        small_inputs: a 3x3 first convolution and no pooling before the first block, for images of
            about 32x32.
        output_stride: 32, 16 or 8: the last transitions keep the resolution and the blocks behind
            them dilate instead, for segmentation. Needs four blocks.
        keep_bottlenecks: keep the bottlenecks for backward instead of recomputing them: a little
            faster, one and a half to three times the memory.
        recompute_stem: recompute the first convolution in backward; ``False`` keeps its output.
        double_backward: keep each stage's input too, so that gradients can be differentiated again.

    Shape: images ``(N, in_channels, H, W)``, floating point, to logits ``(N, num_classes)``.

    Raises:
        ValueError: for sizes that make no network.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool | None = None,
        *,
        efficient: bool = True,
        in_channels: int = 3,
        compression: float = 0.5,
        small_inputs: bool = False,
        output_stride: int = 32,
        keep_bottlenecks: bool = False,
        recompute_stem: bool = True,
        double_backward: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(block_config, Iterable) or not list(block_config):
            raise ValueError(
                f"block_config must name at least one dense block, but got {block_config!r}"
            )
        _check_positive(
            growth_rate=growth_rate,
            num_init_features=num_init_features,
            bn_size=1 if bn_size is None else bn_size,
            num_classes=num_classes,
            in_channels=in_channels,
            **{f"block_config[{i}]": layers for i, layers in enumerate(block_config)},
        )
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {drop_rate}")
        if not 0 < compression <= 1:
            raise ValueError(f"compression must be in (0, 1], but got {compression}")
        if output_stride not in list(_DILATIONS):
            raise ValueError(
                f"output_stride must be one of {sorted(_DILATIONS)}, but got {output_stride}"
            )
        if output_stride != 32 and (len(block_config) != 4 or small_inputs):
            raise ValueError(
                f"output_stride={output_stride} needs four blocks and small_inputs=False, "
                f"but got block_config={tuple(block_config)}, small_inputs={small_inputs}"
            )

        stem: OrderedDict[str, nn.Module] = OrderedDict()
        if small_inputs:
            stem["conv0"] = nn.Conv2d(
                in_channels, num_init_features, kernel_size=3, padding=1, bias=False
            )
        else:
            stem["conv0"] = nn.Conv2d(
                in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False
            )
            stem["norm0"] = nn.BatchNorm2d(num_init_features)
            stem["relu0"] = nn.ReLU(inplace=True)
            stem["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.features = Features(
            stem,
            efficient=efficient if memory_efficient is None else memory_efficient,
            keep_bottlenecks=keep_bottlenecks,
            recompute_stem=recompute_stem,
            double_backward=double_backward,
        )

        last = len(block_config) - 1
        dilations = _DILATIONS[output_stride] if output_stride != 32 else (1,) * len(block_config)
        channels = num_init_features
        for i, layers in enumerate(block_config):
            block = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, dilations[i])
            self.features.add_module(f"denseblock{i + 1}", block)
            channels += layers * growth_rate
            if i != last:
                pool = dilations[i + 1] == dilations[i]
                kept = int(channels * compression)
                if kept < 1:
                    raise ValueError(
                        f"compression={compression} leaves none of transition{i + 1}'s "
                        f"{channels} channels"
                    )
                self.features.add_module(f"transition{i + 1}", Transition(channels, kept, pool))
                channels = kept
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.let_blocks_run_alone()
        self.classifier = nn.Linear(channels, num_classes)

        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        if pools_unseen(self.features):
            return self.classifier(self.features.pooled(x))
        features = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(features, (1, 1)), 1))

    def extract_features(self, x: Tensor) -> list[Tensor]:
        """The output of each dense block, for segmentation and detection necks.

        Shape: ``(N, in_channels, H, W)`` to one ``(N, C_b, H_b, W_b)`` per block: for DenseNet-121
            256, 512, 1024 and 1024 channels at a 4th, 8th, 16th and 32nd of the resolution (see
            ``output_stride``). They are the concatenations as the blocks leave them, before the
            next norm, and share their memory with what is kept for backward: changing them in
            place makes backward raise. So they are channels last, whatever the images are;
            ``contiguous()`` them for a ``view``, or for dropout that draws as behind plain modules.

        Raises:
            TypeError: where ``features`` was replaced by another kind of module.
        """
        if not isinstance(self.features, Features):
            kind = type(self.features).__name__
            raise TypeError(f"extract_features needs features to be a Features, but it is a {kind}")
        return self.features.block_outputs(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            new = _modern_key(key)
            if new != key:
                state_dict[new] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size <= 0:
            raise ValueError(f"{name} must be a positive integer, but got {size!r}")


def _modern_key(key: str) -> str:
    """torchvision's present name for a key of its old files (``norm.1``) or of gpleiss's
    (``norm_final``).
    """
    key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)
    return re.sub(r"(^|\.)features\.norm_final\.", r"\1features.norm5.", key)


Weights = str | os.PathLike[str] | Mapping[str, Any] | Enum


def _state_dict(arch: str, weights: Weights, num_classes: int, progress: bool) -> Mapping[str, Any]:
    if isinstance(weights, Mapping):
        return weights
    name = weights.name if isinstance(weights, Enum) else os.fsdecode(weights)
    if isinstance(weights, Enum) and not type(weights).__name__.lower().startswith(arch):
        raise ValueError(f"{arch} takes weights of its own, got {type(weights).__name__}.{name}")
    # torchvision's get_model() also takes the enum's name in front
    short = re.sub(rf"^{arch}_weights\.", "", name, flags=re.IGNORECASE)
    if arch in _URLS and short in ("DEFAULT", "IMAGENET1K_V1"):
        if num_classes != 1000:
            raise ValueError(
                f"num_classes must be 1000 for weights {name!r} of {arch}, but got {num_classes}"
            )
        url = _URLS[arch]
        return torch.hub.load_state_dict_from_url(url, progress=progress, check_hash=True)
    if not isinstance(weights, Enum) and os.path.isfile(name):
        loaded = torch.load(name, map_location="cpu", weights_only=True)
        if not isinstance(loaded, Mapping):
            raise ValueError(f"{name} holds {article(type(loaded).__name__)}, not a state dict")
        return loaded.get("state_dict", loaded)
    known = "'IMAGENET1K_V1', 'DEFAULT', " if arch in _URLS else ""
    raise ValueError(
        f"weights for {arch} must be {known}an existing file or a state dict, but got {name!r}"
    )


# growth rate, layers of each block, channels of the first convolution
CONFIGURATIONS = {
    "densenet121": (32, (6, 12, 24, 16), 64),
    "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64),
    "densenet201": (32, (6, 12, 48, 32), 64),
    "densenet264": (32, (6, 12, 64, 48), 64),
}


def _densenet(arch: str, weights: Weights | None, progress: bool, **kwargs: Any) -> DenseNet:
    state = None
    if "pretrained" in kwargs:  # what torchvision called it, and still takes
        warnings.warn(f"pretrained is deprecated, give {arch} weights=", stacklevel=3)
        weights = "IMAGENET1K_V1" if kwargs.pop("pretrained") else weights
    if weights is not None:
        state = _state_dict(arch, weights, kwargs.get("num_classes", 1000), progress)
    model = DenseNet(*CONFIGURATIONS[arch], **kwargs)
    if state is not None:
        model.load_state_dict(state)
    return model


def densenet121(
    *, weights: Weights | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-121 (k = 32, blocks of 6, 12, 24, 16). 7,978,856 parameters.

    Args:
        weights: torchvision's name (``"IMAGENET1K_V1"``, ``"DEFAULT"``) or enum, the path of a
            state dict, or one.
        progress: show a bar while downloading.
        **kwargs: further arguments of :class:`DenseNet`.

    Raises:
        ValueError, TypeError: for weights that are none of these.
        RuntimeError: for a state dict of another network.
    """
    return _densenet("densenet121", weights, progress, **kwargs)


def densenet161(
    *, weights: Weights | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-161 (k = 48, blocks of 6, 12, 36, 24). 28,681,000 parameters. See
    :func:`densenet121`.
    """
    return _densenet("densenet161", weights, progress, **kwargs)


def densenet169(
    *, weights: Weights | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-169 (k = 32, blocks of 6, 12, 32, 32). 14,149,480 parameters. See
    :func:`densenet121`.
    """
    return _densenet("densenet169", weights, progress, **kwargs)


def densenet201(
    *, weights: Weights | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-201 (k = 32, blocks of 6, 12, 48, 32). 20,013,928 parameters. See
    :func:`densenet121`.
    """
    return _densenet("densenet201", weights, progress, **kwargs)


def densenet264(
    *, weights: Weights | None = None, progress: bool = True, **kwargs: Any
) -> DenseNet:
    """DenseNet-264 (k = 32, blocks of 6, 12, 64, 48), the paper's deepest. No weights are published
    for it.

    See :func:`densenet121`."""
    return _densenet("densenet264", weights, progress, **kwargs)
