"""Trunks of the id nets: ResNets of torchvision, small ones for CPUs, and any network of timm.

A trunk turns normalised images (N, 3, H, W) into a feature map (N, C, h, w).
"""

from __future__ import annotations

import re

import torch
import torch.nn as nn
import torchvision.models
from torch import Tensor
from torchvision.models import get_model, list_models
from torchvision.models.resnet import BasicBlock, ResNet

from utils import IMAGENET_MEAN, IMAGENET_STD, UserError, one_line

# Below 8 input channels, channels-last, oneDNN's weight gradient of a strided 1x1 convolution writes past its memory on
# CPUs with AVX2 but not AVX-512 (PyTorch 2.15): runs crash, or continue with wrong numbers.
NARROWEST = 8
TIMM = "timm/"  # before the names of timm's networks


class NarrowResNet(ResNet):
    """ResNet with one basic block per stage and `width` channels in the first: for CPUs."""

    def __init__(self, width: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=1)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            setattr(self, f"layer{stage + 1}", self._make_layer(BasicBlock, width * 2**stage, 1, stride))
        self.fc = nn.Linear(8 * width, 1)  # unused, as in every trunk here
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class TimmTrunk(nn.Module):
    """A network of timm, convolutional or transformer; tokens are laid back to a map.

    Pictures are brought to the mean and standard deviation that the network's weights expect.
    """

    def __init__(self, name: str, last_stride: int) -> None:
        super().__init__()
        self.net = create_timm(name)
        # `num_features` may count the channels of a later convolution, which the map has not passed through.
        features = self.net.feature_info
        self.channels = features[-1]["num_chs"] if isinstance(features, list) else features.channels()[-1]
        if last_stride == 1:
            self.remove_last_stride(name)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        theirs = self.net.pretrained_cfg
        their_mean, their_std = (torch.tensor(theirs[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", std / their_std, persistent=False)
        self.register_buffer("shift", (mean - their_mean) / their_std, persistent=False)

    def remove_last_stride(self, name: str) -> None:
        """Set the last stride to 1, which only ResNets with plain shortcuts allow without other changes."""
        block = self.net.layer4[0] if hasattr(self.net, "layer4") else None
        shortcut = getattr(block, "downsample", None)
        strided = getattr(block, "conv2" if hasattr(block, "conv3") else "conv1", None)
        convolutions = [strided, shortcut[0] if isinstance(shortcut, nn.Sequential) else None]
        if not all(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in convolutions):
            raise UserError(
                f"backbone {TIMM}{name}: its last stride cannot be removed; set ID_stride (teacher: stride) 2"
            )
        for layer in convolutions:
            layer.stride = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        how = dict(indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return self.net.forward_intermediates(x * self.scale + self.shift, **how)[-1]


def create_timm(name: str, **options: object) -> nn.Module:
    """timm's network without its classifier, for images of any size. Raises UserError for an unknown name."""
    try:
        import timm
    except ImportError:
        raise UserError(f"backbone {TIMM}{name}: timm is not installed: pip install timm") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:6]}*")[:4])
        raise UserError(
            f"backbone {TIMM}{name}: timm has no network of that name" + (f"; there are {near}" * bool(near))
        )
    try:
        net = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:  # convolutional networks take images of any size as they are
        net = timm.create_model(name, num_classes=0, **options)
    except RuntimeError as error:
        raise UserError(f"backbone {TIMM}{name}: {one_line(error)}; choose another") from None
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "feature_info"):
        raise UserError(f"backbone {TIMM}{name}: timm cannot give its feature map; choose another")
    for module in net.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # draws of stochastic depth would not be functions of seed and iteration
    return net


def build_trunk(name: str, *, last_stride: int) -> ResNet | TimmTrunk:
    """A trunk without weights: a ResNet-like name of torchvision, `resnet10` / `resnet10w32` (width 32), `timm/NAME`.

    `last_stride` becomes the stride of a ResNet's layer4. Raises UserError for an unknown name.
    """
    if name.startswith(TIMM):
        return TimmTrunk(name.removeprefix(TIMM), last_stride)
    match = re.fullmatch(r"resnet10(?:w([1-9]\d{0,3}))?", name, re.ASCII)
    if match and int(match[1] or 64) >= NARROWEST:
        trunk: nn.Module = NarrowResNet(int(match[1] or 64))
    elif name in list_models(torchvision.models) and isinstance(trunk := get_model(name, weights=None), ResNet):
        pass
    else:
        raise UserError(
            f"backbone {name}: not a ResNet of torchvision; use resnet50, resnet18, another resnet*, "
            f"resnext* or wide_resnet* name, for a CPU resnet10w32 (at least w{NARROWEST}), or timm/NAME"
        )
    block = trunk.layer4[0]
    strided = block.conv1 if isinstance(block, BasicBlock) else block.conv2
    strided.stride = block.downsample[0].stride = (last_stride, last_stride)
    return trunk


def trunk_channels(trunk: ResNet | TimmTrunk) -> int:
    """C of the trunk's feature map."""
    return trunk.channels if isinstance(trunk, TimmTrunk) else trunk.fc.in_features


def trunk_map(trunk: ResNet | TimmTrunk, x: Tensor) -> Tensor:
    """Normalised images (N, 3, H, W) to the trunk's last feature map (N, C, h, w)."""
    if isinstance(trunk, TimmTrunk):
        return trunk(x)
    x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
    return trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))
