"""The id net, which is also the appearance encoder, and the teacher (docs/method.md, "Networks").

Legend of the shape comments, ResNet-50 on 256 x 128 with the last stride removed:
    x  normalised image (N, 3, 256, 128);  m  feature map (N, 2048, 16, 8);  f  appearance code (N, 8192)
    p  logits, one (N, K) per head: (primary, fine-grained) for style AB

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from backbones import build_trunk, trunk_channels, trunk_map

Logits = tuple[Tensor, ...]  # one (N, K) per head
PARTS = 4  # horizontal strips of the body that the appearance code keeps apart


class GeM(nn.Module):
    """Generalised mean over the cells of an adaptive pooling, (mean of x^3)^(1/3) (Radenović et al., TPAMI 2018)."""

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.mean = nn.AdaptiveAvgPool2d(output_size)

    def forward(self, m: Tensor) -> Tensor:
        m = m.to(torch.promote_types(m.dtype, torch.float32))  # cubes overflow in half precision
        return self.mean(m.clamp(min=1e-6).pow(3)).pow(1 / 3)


NECKS = ("linear", "bnneck")
POOLS = {"max": nn.AdaptiveMaxPool2d, "avg": nn.AdaptiveAvgPool2d, "gem": GeM}


# ------------------------------------------------------------------------------------------------ heads
class Head(nn.Module):
    """A neck and a classifier; no non-linearity.

    neck  linear: Linear to `bottleneck`, BatchNorm1d, Dropout, Linear (the published head)
          bnneck: BatchNorm1d without bias, Dropout, Linear without bias (Luo et al., "Bag of Tricks", CVPRW 2019)
    """

    def __init__(
        self, c_in: int, num_classes: int, *, dropout: float, bottleneck: int = 512, neck: str = "linear"
    ) -> None:
        super().__init__()
        linear = neck == "linear"
        width = bottleneck if linear else c_in
        layers = [nn.Linear(c_in, width)] * linear + [nn.BatchNorm1d(width), nn.Dropout(dropout)]
        self.add_block = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(width, num_classes, bias=linear))
        if linear:
            nn.init.kaiming_normal_(self.add_block[0].weight, a=0, mode="fan_out")
            nn.init.zeros_(self.add_block[0].bias)
            nn.init.zeros_(self.classifier[0].bias)
        else:
            self.add_block[0].bias.requires_grad_(False)
        nn.init.normal_(self.classifier[0].weight, std=0.001)

    def embed(self, v: Tensor) -> Tensor:
        """Pooled vector (N, c_in) to the neck's output after BatchNorm (N, 512), what is compared at test time."""
        return self.add_block[:-1](v)

    def forward(self, v: Tensor) -> Tensor:
        return self.classifier(self.add_block(v))


# ---------------------------------------------------------------------------------------------- id nets
class IdNet(nn.Module, ABC):
    """What the three styles share. Called on images it returns `(f, logits)`; `embed` is for test time."""

    head_names: tuple[str, ...] = ("feature",)  # in the order of `embed`

    def __init__(self, backbone: str, last_stride: int) -> None:
        super().__init__()
        self.model = build_trunk(backbone, last_stride=last_stride)
        self.channels = trunk_channels(self.model)
        self.code_dim = PARTS * self.channels

    def heads(self) -> list[Head]:
        return [module for module in self.children() if isinstance(module, Head)]

    @property
    def num_classes(self) -> int:
        return self.heads()[0].classifier[0].out_features

    def forward(self, x: Tensor, erased: Tensor | None = None) -> tuple[Tensor, Logits]:
        """Appearance code (N, 4C) and logits of normalised images (N, 3, H, W); `erased` as in `feature_map`."""
        return self.code_and_logits(self.feature_map(x, erased))

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is compared at test time: the neck (N, 512) of every head, before mirrors and normalising."""
        return self.embed_map(self.feature_map(x))

    def pooled(self, m: Tensor) -> Tensor:
        """Feature map (N, 2048, h, w) to the vector (N, 2048) that the heads get (styles AB and normal)."""
        return self.pool(m).flatten(1)

    def feature_map(self, x: Tensor, erased: Tensor | None = None) -> Tensor:
        """Normalised images (N, 3, H, W) to the trunk's last map (N, 2048, h, w).

        erased  (N, 1, H', W') bool, the pixels to set to 0, the ImageNet mean, of what `seen_size` says
        """
        x = enlarge(x)
        return trunk_map(self.model, x if erased is None else x.masked_fill(erased, 0))

    @abstractmethod
    def code_and_logits(self, m: Tensor) -> tuple[Tensor, Logits]:
        """Feature map (N, 2048, h, w) to the appearance code (N, 8192) and one (N, K) per head."""

    @abstractmethod
    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        """Feature map (N, 2048, h, w) to what `embed` returns."""


class IdNetAB(IdNet):
    """Style AB: a primary and a fine-grained head on one pooled vector; by default `f` carries no gradient.

    `detach_f=False` lets image reconstruction and the code loss train the trunk, as in the paper's Eq. 2 and 4.
    """

    head_names = ("primary", "fine-grained")

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str,
        stride: int,
        pool: str,
        detach_f: bool = True,
        neck: str = "linear",
    ) -> None:
        super().__init__(backbone, stride)
        self.detach_f = detach_f
        self.part_pool = POOLS[pool]((PARTS, 1))
        self.pool = POOLS[pool]((1, 1))
        self.classifier1 = Head(self.channels, num_classes, dropout=0.5, neck=neck)
        self.classifier2 = Head(self.channels, num_classes, dropout=0.75, neck=neck)

    def code_and_logits(self, m: Tensor) -> tuple[Tensor, Logits]:
        f = self.part_pool(m).flatten(1)  # (N, 8192), index = 4 * channel + part
        v = self.pooled(m)  # (N, 2048)
        return f.detach() if self.detach_f else f, (self.classifier1(v), self.classifier2(v))

    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        v = self.pooled(m)
        return self.classifier1.embed(v), self.classifier2.embed(v)


class IdNetNormal(IdNet):
    """Style normal: one head, live code, the published stride of 2; also every teacher's net."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str,
        pool: str,
        stride: int = 2,
        norm_id: bool = False,
        dropout: float = 0.5,
        neck: str = "linear",
    ) -> None:
        super().__init__(backbone, stride)
        self.norm_id = norm_id
        self.part_pool = POOLS[pool]((PARTS, 1))
        self.pool = POOLS[pool]((1, 1))
        self.classifier = Head(self.channels, num_classes, dropout=dropout, neck=neck)

    def code_and_logits(self, m: Tensor) -> tuple[Tensor, Logits]:
        f = self.part_pool(m).flatten(1)  # (N, 8192)
        if self.norm_id:
            f = f / (f.norm(dim=1, keepdim=True) + 1e-8)
        return f, (self.classifier(self.pooled(m)),)

    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        return (self.classifier.embed(self.pooled(m)),)


class IdNetPCB(IdNet):
    """Style PCB: one head per horizontal part, live code."""

    head_names = tuple(f"part {k + 1}" for k in range(PARTS))

    def __init__(self, num_classes: int, *, backbone: str) -> None:
        super().__init__(backbone, last_stride=1)
        self.avgpool = nn.AdaptiveAvgPool2d((PARTS, 1))
        self.dropout = nn.Dropout(0.5)
        for part in range(PARTS):
            self.add_module(f"classifier{part}", Head(self.channels, num_classes, dropout=0.5, bottleneck=256))

    def code_and_logits(self, m: Tensor) -> tuple[Tensor, Logits]:
        parts = self.avgpool(m)  # (N, 2048, 4, 1)
        dropped = self.dropout(parts)
        return parts.flatten(1), tuple(head(dropped[:, :, k, 0]) for k, head in enumerate(self.heads()))

    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        parts = self.avgpool(m)
        return tuple(head.embed(parts[:, :, k, 0]) for k, head in enumerate(self.heads()))


def build_id_net(
    style: str,
    num_classes: int,
    *,
    backbone: str = "resnet50",
    stride: int = 1,
    pool: str = "max",
    norm_id: bool = False,
    detach_f: bool = True,
    neck: str = "linear",
) -> IdNet:
    """The id net of `ID_style` AB, normal or PCB."""
    if style == "AB":
        return IdNetAB(num_classes, backbone=backbone, stride=stride, pool=pool, detach_f=detach_f, neck=neck)
    if style == "normal":
        return IdNetNormal(num_classes, backbone=backbone, pool=pool, norm_id=norm_id, neck=neck)
    return IdNetPCB(num_classes, backbone=backbone)


def build_teacher(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    stride: int = 2,
    dropout: float = 0.5,
    pool: str = "avg",
    neck: str = "linear",
) -> IdNetNormal:
    """A teacher: the one-head net."""
    return IdNetNormal(num_classes, backbone=backbone, pool=pool, stride=stride, dropout=dropout, neck=neck)


# --------------------------------------------------------------------------------------------- passes
def enlarge(x: Tensor) -> Tensor:
    """Images at most 128 high become twice as large (nearest neighbour)."""
    return F.interpolate(x, scale_factor=2) if x.shape[2] <= 128 else x


def seen_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which an id net sees images of this size, after `enlarge`."""
    return (2 * height, 2 * width) if height <= 128 else (height, width)
