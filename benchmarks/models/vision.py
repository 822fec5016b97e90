"""Image models: a transformer from ``transformers``, convolutional networks in the style of the published ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]

CLASSES = 10


class Classifier(nn.Module):
    """Cross-entropy of a network's logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.network(images), labels)


def _images(batch: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, side, side), torch.randint(CLASSES, (batch,))


def vit(small: bool, dropout: float) -> Built:
    import transformers

    from benchmarks.models.language import Loss

    width, layers, side, patch = (32, 2, 32, 8) if small else (192, 6, 224, 16)
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 3,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
        num_labels=CLASSES,
    )
    images, labels = _images(2 if small else 4, side)
    return Loss(transformers.ViTForImageClassification(config), "pixel_values", "labels"), (images, labels)


class Residual(nn.Module):
    """The basic block of a residual network: two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet18(small: bool, dropout: float) -> Built:
    widths, depth = ([8, 16], 1) if small else ([64, 128, 256, 512], 2)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])]
    layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inner = widths[0]
    for level, width in enumerate(widths):
        for block in range(depth):
            layers.append(Residual(inner, width, 2 if level and not block else 1))
            inner = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, CLASSES)]
    return Classifier(nn.Sequential(*layers)), _images(2 if small else 4, 32 if small else 112)


class ConvNextBlock(nn.Module):
    """A 7x7 depthwise convolution, then a channel MLP over layer norm, scaled, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.widen(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(small: bool, dropout: float) -> Built:
    widths, depths = ([8, 16], [1, 1]) if small else ([32, 64, 128, 256], [2, 2, 4, 2])
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6)]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if level:
            layers += [ChannelNorm(widths[level - 1], eps=1e-6), nn.Conv2d(widths[level - 1], width, 2, 2)]
        layers += [ConvNextBlock(width) for _ in range(depth)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], CLASSES)]
    return Classifier(nn.Sequential(*layers)), _images(2 if small else 4, 32 if small else 128)


class Inverted(nn.Module):
    """Widen, depthwise convolution, gate by squeeze and excitation, narrow; a shortcut where shapes agree."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inner
        self.widen = nn.Sequential(nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish()
        )
        self.squeeze = nn.Conv2d(wide, inner, 1)
        self.excite = nn.Conv2d(inner, wide, 1)
        self.narrow = nn.Sequential(nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.residual = stride == 1 and inner == outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.widen(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.narrow(y * gate)
        return x + y if self.residual else y


def mobilenet(small: bool, dropout: float) -> Built:
    plan = [(8, 1), (16, 2), (16, 1)] if small else [(16, 1), (24, 2), (24, 1), (48, 2), (48, 1), (96, 2), (96, 1)]
    inner = plan[0][0]
    layers: list[nn.Module] = [nn.Conv2d(3, inner, 3, 2, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish()]
    for outer, stride in plan:
        layers.append(Inverted(inner, outer, stride))
        inner = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, CLASSES)]
    return Classifier(nn.Sequential(*layers)), _images(2 if small else 8, 32 if small else 112)


class Double(nn.Sequential):
    """Two 3x3 convolutions with group norm."""

    def __init__(self, inner: int, outer: int) -> None:
        def half(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU()]

        super().__init__(*half(inner, outer), *half(outer, outer))


class UNet(nn.Module):
    """Down by pooling, up by bilinear interpolation, with the features of each level carried across."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList([Double(a, b) for a, b in zip([3, *widths], widths, strict=False)])
        self.up = nn.ModuleList([Double(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)])
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for block, across in zip(self.up, kept[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, across], 1))
        return F.binary_cross_entropy_with_logits(self.out(x), target)


def unet(small: bool, dropout: float) -> Built:
    side, batch = (16, 2) if small else (96, 2)
    images = torch.randn(batch, 3, side, side)
    return UNet(8 if small else 24, 3 if small else 4), (images, (torch.rand(batch, 1, side, side) > 0.5).float())


class MixerBlock(nn.Module):
    """One MLP over patches, one over channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """An image in patches, mixed by MLPs."""

    def __init__(self, side: int, patch: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((side // patch) ** 2, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.embed(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def mixer(small: bool, dropout: float) -> Built:
    side, patch, width, layers = (16, 4, 16, 2) if small else (224, 16, 256, 6)
    return Classifier(Mixer(side, patch, width, layers)), _images(2 if small else 4, side)
