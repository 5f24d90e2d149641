"""Tiny DenseNets of other projects, and in other projects' manners."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models import DenseNet as Torchvision


class PrevLayer(nn.Module):
    """A layer as gpleiss/efficient_densenet_pytorch has it: takes its predecessors one by one."""

    def __init__(self, channels: int, growth: int, drop_rate: float, efficient: bool) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, 4 * growth, kernel_size=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(4 * growth))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))
        self.drop_rate = drop_rate
        self.efficient = efficient

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, *prev_features: Tensor) -> Tensor:
        if self.efficient and any(f.requires_grad for f in prev_features):
            y = checkpoint(self.bottleneck, *prev_features, use_reentrant=True)
        else:
            y = self.bottleneck(*prev_features)
        new = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class PrevBlock(nn.Module):
    layer = PrevLayer

    def __init__(
        self, layers: int, channels: int, growth: int, drop_rate: float = 0, efficient: bool = False
    ) -> None:
        super().__init__()
        for i in range(layers):
            layer = self.layer(channels + i * growth, growth, drop_rate, efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(*features))
        return torch.cat(features, 1)


def transition(channels: int, out: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        norm=nn.BatchNorm2d(channels),
        relu=nn.ReLU(inplace=True),
        conv=nn.Conv2d(channels, out, kernel_size=1, bias=False),
        pool=nn.AvgPool2d(kernel_size=2, stride=2),
    )


class PrevTransition(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(transition(channels, out))


class GpleissStyle(nn.Module):
    block = PrevBlock
    transition = PrevTransition

    def __init__(self, drop_rate: float = 0, efficient: bool = False) -> None:
        super().__init__()
        growth, blocks, channels = 4, (2, 3), 8
        self.features = nn.Sequential(
            OrderedDict(conv0=nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False))
        )
        for i, layers in enumerate(blocks):
            self.features.add_module(
                f"denseblock{i + 1}", self.block(layers, channels, growth, drop_rate, efficient)
            )
            channels += layers * growth
            if i + 1 < len(blocks):
                self.features.add_module(
                    f"transition{i + 1}", self.transition(channels, channels // 2)
                )
                channels //= 2
        self.features.add_module("norm_final", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class CatLayer(nn.Sequential):
    """A layer that returns its input too, so that a block is but a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


def sequential() -> nn.Sequential:
    """Nothing but Sequentials, down to the head: a stack with more behind its last norm."""
    growth, channels, children = 4, 8, OrderedDict()
    children["stem"] = nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False)
    for i in range(2):
        layers = []
        for _ in range(2):
            parts = OrderedDict(
                norm1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(),
                conv1=nn.Conv2d(channels, growth, kernel_size=3, padding=1, bias=False),
            )
            layers.append(CatLayer(parts))
            channels += growth
        children[f"block{i}"] = nn.Sequential(*layers)
        if i == 0:
            children["reduce"] = nn.Sequential(transition(channels, channels))
    children["norm"] = nn.BatchNorm2d(channels)
    children["relu"] = nn.ReLU(inplace=True)
    children["mean"] = nn.AdaptiveAvgPool2d(1)
    children["flat"] = nn.Flatten()
    children["classes"] = nn.Linear(channels, 5)
    return nn.Sequential(children)


def torchvision(**kwargs: object) -> nn.Module:
    return Torchvision(4, (2, 3), 8, num_classes=5, **kwargs)


def timm(**kwargs: object) -> nn.Module:
    densenet = pytest.importorskip("timm.models.densenet")
    return densenet.DenseNet(4, (2, 3), num_classes=5, **kwargs)


def monai(dimensions: int = 2, **kwargs: object) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    size = dict(init_features=8, growth_rate=4, block_config=(2, 3))
    return nets.DenseNet121(dimensions, 3, 5, **size, **kwargs)


def torchxrayvision(**kwargs: object) -> nn.Module:
    models = pytest.importorskip("torchxrayvision").models
    return models.DenseNet(4, (2, 3), 8, num_classes=5, in_channels=3, weights=None, **kwargs)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": torchvision,
    "torchvision, dropout": lambda: torchvision(drop_rate=0.3),
    "timm": timm,
    "timm, deep stem and dropout": lambda: timm(stem_type="deep", proj_drop_rate=0.3),
    "monai": monai,
    "monai, dropout": lambda: monai(dropout_prob=0.3),
    "torchxrayvision": torchxrayvision,
    "torchxrayvision, dropout": lambda: torchxrayvision(drop_rate=0.3),
    "gpleiss": GpleissStyle,
    "gpleiss, dropout": lambda: GpleissStyle(drop_rate=0.3),
    "sequential": sequential,
}
