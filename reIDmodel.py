"""The id net, which is also the appearance encoder, and the teacher (spec section 2).

Legend of the shape comments, ResNet-50 on 256 x 128 with the last stride removed:
    x  normalised image (N, 3, 256, 128);  m  feature map (N, 2048, 16, 8);  f  appearance code (N, 8192)
    p  logits, one (N, K) per head: (primary, fine-grained) for style AB

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.models
from torch import Tensor
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.resnet import BasicBlock, ResNet

from checkpoint import read_tensors
from networks import weights_frozen
from utils import UserError

PARTS = 4  # horizontal strips of the body that the appearance code keeps apart


# ------------------------------------------------------------------------------------------------ trunk
class Shortcut(nn.Conv2d):
    """A 1x1 convolution with a stride, as a plain one of the pixels that it sees.

    With fewer than 8 input channels, channels-last, the weight gradient of oneDNN's strided one writes past its memory
    on CPUs that have AVX2 but not AVX-512 (PyTorch 2.15): runs crash, or go on with other numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight)


class NarrowResNet(ResNet):
    """ResNet with one basic block per stage and `width` channels in the first: for CPUs."""

    def __init__(self, width: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=1)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            layer = self._make_layer(BasicBlock, width * 2**stage, 1, stride)
            if stage > 0 and (c_in := width * 2 ** (stage - 1)) < 8:
                layer[0].downsample[0] = Shortcut(c_in, width * 2**stage, 1, stride=stride, bias=False)
            setattr(self, f"layer{stage + 1}", layer)
        self.fc = nn.Linear(8 * width, 1)  # unused, as in every trunk here
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_trunk(name: str, *, last_stride: int) -> ResNet:
    """A ResNet without weights: any ResNet-like name of torchvision, or `resnet10` / `resnet10w32` (width 32).

    `last_stride` becomes the stride of layer4's first block. Raises UserError for an unknown name.
    """
    if match := re.fullmatch(r"resnet10(?:w([1-9]\d{0,3}))?", name, re.ASCII):
        trunk: nn.Module = NarrowResNet(int(match[1] or 64))
    elif name in list_models(torchvision.models) and isinstance(trunk := get_model(name, weights=None), ResNet):
        pass
    else:
        raise UserError(
            f"backbone {name}: not a ResNet of torchvision; use resnet50, resnet18, another resnet*, "
            "resnext* or wide_resnet* name, or resnet10w32 for a CPU"
        )
    set_last_stride(trunk, last_stride)
    return trunk


def set_last_stride(trunk: ResNet, stride: int) -> None:
    """Set the stride of layer4's first block: its strided convolution and its shortcut."""
    block = trunk.layer4[0]
    strided = block.conv1 if isinstance(block, BasicBlock) else block.conv2
    strided.stride = (stride, stride)
    block.downsample[0].stride = (stride, stride)


def load_imagenet(trunk: ResNet, name: str, file: str | None) -> None:
    """Load ImageNet weights from `file`, or from torchvision's cache (downloading them where that is possible).

    Raises UserError that says which file to put where.
    """
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise UserError(f"--backbone-weights {file}: no such file")
    else:
        if name not in list_models(torchvision.models):
            raise UserError(
                f"backbone {name} has no ImageNet weights; set pretrained: false or give --backbone-weights FILE"
            )
        # The first set of weights (IMAGENET1K_V1) is what the published numbers started from.
        url = next(iter(get_model_weights(name))).url
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The end of the name is the beginning of the file's SHA-256.
                prefix = path.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
            except (OSError, RuntimeError):
                raise UserError(
                    f"ImageNet weights of {name} cannot be downloaded here; put {path.name} into {path.parent}, "
                    "or give --backbone-weights FILE, or set pretrained: false"
                ) from None
    try:
        trunk.load_state_dict(read_tensors(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not ImageNet weights of {name} ({first_line(error)}); replace the file") from None


def first_line(error: Exception) -> str:
    """The first informative line of an exception's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    heading = len(lines) > 1 and lines[0].startswith("Error(s) in loading")
    return lines[1 if heading else 0][:200]


def feature_map(trunk: ResNet, x: Tensor) -> Tensor:
    """Image (N, 3, H, W) to the last feature map (N, 2048, h, w)."""
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
    return trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))


# ------------------------------------------------------------------------------------------------ heads
class Head(nn.Module):
    """Bottleneck and classifier: Linear, BatchNorm1d, Dropout, Linear; no non-linearity."""

    def __init__(self, c_in: int, num_classes: int, *, dropout: float, bottleneck: int = 512) -> None:
        super().__init__()
        self.add_block = nn.Sequential(nn.Linear(c_in, bottleneck), nn.BatchNorm1d(bottleneck), nn.Dropout(dropout))
        self.classifier = nn.Sequential(nn.Linear(bottleneck, num_classes))
        nn.init.kaiming_normal_(self.add_block[0].weight, a=0, mode="fan_out")
        nn.init.zeros_(self.add_block[0].bias)
        nn.init.normal_(self.classifier[0].weight, std=0.001)
        nn.init.zeros_(self.classifier[0].bias)

    def embed(self, v: Tensor) -> Tensor:
        """Pooled vector (N, c_in) to the bottleneck after BatchNorm (N, 512), what is compared at test time."""
        return self.add_block[:2](v)

    def forward(self, v: Tensor) -> Tensor:
        return self.classifier(self.add_block(v))


class StripePool(nn.Module):
    """Maximum or mean of `stripes` horizontal stripes of a map: (N, C, h, w) to (N, C, stripes, 1).

    Stripe k has the rows from floor(k h / stripes) to ceil((k + 1) h / stripes), as PyTorch's adaptive pooling.
    """

    def __init__(self, kind: str, stripes: int) -> None:
        super().__init__()
        self.kind, self.stripes = kind, stripes

    def extra_repr(self) -> str:
        return f"{self.kind}, stripes={self.stripes}"

    def forward(self, m: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            pool = {"max": F.adaptive_max_pool2d, "avg": F.adaptive_avg_pool2d}[self.kind]
            return pool(m, (self.stripes, 1))
        # Of pieces, since the backward of the above adds in no fixed order on a GPU.
        h, n = m.shape[2], self.stripes
        pieces = [m[:, :, k * h // n : -(-(k + 1) * h // n)].flatten(2) for k in range(n)]
        pooled = [piece.max(2).values if self.kind == "max" else piece.mean(2) for piece in pieces]
        return torch.stack(pooled, 2).unsqueeze(3)


# ---------------------------------------------------------------------------------------------- id nets
class IdNet(nn.Module, ABC):
    """What the three styles share. `forward` returns `(f, logits)`, `embed` the test-time bottlenecks per head."""

    def __init__(self, backbone: str, last_stride: int) -> None:
        super().__init__()
        self.model = build_trunk(backbone, last_stride=last_stride)
        self.channels = self.model.fc.in_features
        self.code_dim = PARTS * self.channels

    def heads(self) -> list[Head]:
        return [module for module in self.children() if isinstance(module, Head)]

    @property
    def num_classes(self) -> int:
        return self.heads()[0].classifier[0].out_features

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.embed_map(feature_map(self.model, x))

    @abstractmethod
    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        """Feature map (N, 2048, h, w) to what `embed` returns."""


class IdNetAB(IdNet):
    """Style AB: a primary and a fine-grained head on one pooled vector; by default `f` carries no gradient.

    `detach_f=False` lets image reconstruction and the code loss train the trunk, as in the paper's Eq. 2 and 4.
    """

    def __init__(self, num_classes: int, *, backbone: str, stride: int, pool: str, detach_f: bool = True) -> None:
        super().__init__(backbone, stride)
        self.detach_f = detach_f
        self.part_pool = StripePool(pool, PARTS)
        self.pool = StripePool(pool, 1)
        self.classifier1 = Head(self.channels, num_classes, dropout=0.5)
        self.classifier2 = Head(self.channels, num_classes, dropout=0.75)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        m = feature_map(self.model, x)
        f = self.part_pool(m).flatten(1)  # (N, 8192), index = 4 * channel + part
        v = self.pool(m).flatten(1)  # (N, 2048)
        return f.detach() if self.detach_f else f, (self.classifier1(v), self.classifier2(v))

    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        v = self.pool(m).flatten(1)
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
    ) -> None:
        super().__init__(backbone, stride)
        self.norm_id = norm_id
        self.part_pool = StripePool(pool, PARTS)
        self.pool = StripePool(pool, 1)
        self.classifier = Head(self.channels, num_classes, dropout=dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        m = feature_map(self.model, x)
        f = self.part_pool(m).flatten(1)  # (N, 8192)
        if self.norm_id:
            f = f / (f.norm(dim=1, keepdim=True) + 1e-8)
        return f, (self.classifier(self.pool(m).flatten(1)),)

    def embed_map(self, m: Tensor) -> tuple[Tensor, ...]:
        return (self.classifier.embed(self.pool(m).flatten(1)),)


class IdNetPCB(IdNet):
    """Style PCB: one head per horizontal part, live code."""

    def __init__(self, num_classes: int, *, backbone: str) -> None:
        super().__init__(backbone, last_stride=1)
        self.avgpool = StripePool("avg", PARTS)
        self.dropout = nn.Dropout(0.5)
        for part in range(PARTS):
            self.add_module(f"classifier{part}", Head(self.channels, num_classes, dropout=0.5, bottleneck=256))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        parts = self.avgpool(feature_map(self.model, x))  # (N, 2048, 4, 1)
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
) -> IdNet:
    """The id net of `ID_style` AB, normal or PCB."""
    if style == "AB":
        return IdNetAB(num_classes, backbone=backbone, stride=stride, pool=pool, detach_f=detach_f)
    if style == "normal":
        return IdNetNormal(num_classes, backbone=backbone, pool=pool, norm_id=norm_id)
    return IdNetPCB(num_classes, backbone=backbone)


def build_teacher(
    num_classes: int, *, backbone: str = "resnet50", stride: int = 2, dropout: float = 0.5
) -> IdNetNormal:
    """A teacher: the one-head net with average pooling."""
    return IdNetNormal(num_classes, backbone=backbone, pool="avg", stride=stride, dropout=dropout)


def head_names(net: IdNet) -> list[str]:
    """A name for each head, in the order of `embed`."""
    if isinstance(net, IdNetAB):
        return ["primary", "fine-grained"]
    return [f"part {k + 1}" for k in range(len(net.heads()))] if isinstance(net, IdNetPCB) else ["feature"]


# --------------------------------------------------------------------------------------------- passes
def enlarge(x: Tensor) -> Tensor:
    """Images at most 128 high are enlarged twice (nearest) before the id net and the teacher (section 2)."""
    return F.interpolate(x, scale_factor=2) if x.shape[2] <= 128 else x


@contextmanager
def frozen(net: nn.Module, *, batch_statistics: bool) -> Iterator[None]:
    """Passes inside treat `net` as a frozen copy (section 6, point 6) without copying it.

    No graph for the weights, dropout off; BatchNorm uses the batch's statistics or the running ones as they
    stand, and changes neither. Afterwards everything is as before.
    """
    modules = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Dropout)]
    before = [(m, m.training, getattr(m, "track_running_stats", None)) for m in modules]
    for m in modules:
        if isinstance(m, nn.Dropout):
            m.training = False
        elif batch_statistics:
            m.training, m.track_running_stats = True, False
        else:
            m.training = False
    try:
        with weights_frozen(net):
            yield
    finally:
        for m, training, track in before:
            m.training = training
            if track is not None:
                m.track_running_stats = track
                if not batch_statistics:
                    # The graph keeps the buffers that it has read; later training passes update others.
                    m.running_mean, m.running_var = m.running_mean.clone(), m.running_var.clone()


@contextmanager
def same_statistics(net: nn.Module) -> Iterator[None]:
    """Training passes inside leave the running statistics of BatchNorm as they were."""
    modules = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in modules]
    for m in modules:
        m.running_mean, m.running_var = m.running_mean.clone(), m.running_var.clone()
        m.num_batches_tracked = m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, (mean, var, batches) in zip(modules, before, strict=True):
            m.running_mean, m.running_var, m.num_batches_tracked = mean, var, batches
