"""The generator and the discriminator of DG-Net, as docs/method.md describes them ("Networks").

Legend of the shape comments, at 256 x 128 with `dim` 16:
    x    image in normalised space (N, 3, 256, 128);  g  its gray version (N, 1, 256, 128)
    s    structure code (N, 128, 64, 32);             f  appearance code (N, 8192)
    C    channels of the structure code, 128

Attribute names (`enc_content`, `dec`, `mlp_w1`, `cnns`, ...) are those of the published checkpoints, so a
state_dict of these classes *is* the interchange format and no renaming table is needed.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.batch import ALL, Part
from utils import IMAGENET_MEAN, IMAGENET_STD, UserError

ACTIVATIONS = {
    "lrelu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "zero": "zeros"}
CANNY_THRESHOLDS = (10, 200)
EDGE_NOISE = 0.1


# ------------------------------------------------------------------------ what the structure encoder sees
def to_gray(x: Tensor) -> Tensor:
    """Normalised image (N, 3, H, W) to the mean of its channels (N, 1, H, W)."""
    return x.mean(dim=1, keepdim=True)


def to_edge(x: Tensor, rng: np.random.Generator, images: int | None = None, part: Part = ALL) -> Tensor:
    """Normalised image (N, 3, H, W) to its Canny edges (N, 1, H, W) in -0.5..0.5 plus N(0, 0.1) noise, no gradient.

    images, part  where x holds a process's slices of batches: images of a slice, and which slice; the noise is drawn
                  for the whole batches
    """
    import cv2

    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    rgb = ((x.detach() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    edges = np.stack([cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS) for image in rgb])
    n, *size = edges.shape
    noise = part.rows(rng.standard_normal((n * part.count, 1, *size)), images or n)
    return torch.from_numpy(edges[:, None] / 255 - 0.5 + EDGE_NOISE * noise).to(x)


def structure_input(
    x: Tensor, single: str, rng: np.random.Generator | None = None, images: int | None = None, part: Part = ALL
) -> Tensor:
    """What the structure encoder sees of an image, (N, 1, H, W): `to_gray`, or `to_edge` for `single: edge`."""
    return to_gray(x) if single == "gray" else to_edge(x, rng, images, part)


# ------------------------------------------------------------------------------------------------ norms
class LayerNorm(nn.Module):
    """`(x - mean) / (std + eps)` per sample over C, H, W, then gamma and beta per channel.

    The standard deviation is the unbiased one, and eps stands outside the root.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=tuple(range(1, x.dim())), keepdim=True)  # (N, 1, 1, 1)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return (x - mean) / (std + self.eps) * self.gamma.view(shape) + self.beta.view(shape)


class AdaIN(nn.Module):
    """Instance normalisation (biased variance, eps 1e-5), then a given scale and shift per sample and channel.

    The two buffers are never read: published checkpoints carry them, and ours stay interchangeable.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.instance_norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


def make_norm(kind: str, channels: int) -> nn.Module:
    """A normalisation without batch statistics: none, in (instance) or ln (layer)."""
    return {"none": nn.Identity, "in": nn.InstanceNorm2d, "ln": LayerNorm}[kind](channels)


# ----------------------------------------------------------------------------------------------- blocks
class ConvBlock(nn.Module):
    """Pad, convolve with bias, normalise, activate. The padding keeps the size at stride 1."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        stride: int = 1,
        pad: int | None = None,
        dilation: int = 1,
        norm: str = "none",
        activ: str = "lrelu",
        pad_type: str = "reflect",
    ) -> None:
        super().__init__()
        # Norm before convolution: the order of the published optimiser states.
        self.norm = make_norm(norm, c_out)
        self.activation = ACTIVATIONS[activ]()
        pad = dilation * (kernel // 2) if pad is None else pad
        # Padding by nothing would copy the image.
        padding_mode = PADDING_MODES[pad_type] if pad else "zeros"
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, pad, dilation, padding_mode=padding_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class AdaINBlock(nn.Module):
    """A 3x3 block conditioned on the appearance: `kind` basic, series or parallel."""

    def __init__(self, channels: int, *, kind: str, activ: str, pad_type: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = AdaIN(channels)
        self.instance_norm = nn.InstanceNorm2d(channels)  # kinds series and parallel
        self.activation = ACTIVATIONS[activ]()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=PADDING_MODES[pad_type])

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = self.conv(x)
        if self.kind == "basic":
            y = self.norm(y, scale, shift)
        elif self.kind == "series":
            y = self.instance_norm(self.norm(y, scale, shift) + y)
        else:
            y = self.instance_norm(y + self.norm(x, scale, shift))
        return self.activation(y)


class ResBlock(nn.Module):
    """Two 3x3 blocks, the second without activation, plus the input."""

    def __init__(self, channels: int, *, norm: str, activ: str, pad_type: str) -> None:
        super().__init__()
        self.model = nn.Sequential(
            ConvBlock(channels, channels, 3, norm=norm, activ=activ, pad_type=pad_type),
            ConvBlock(channels, channels, 3, norm=norm, activ="none", pad_type=pad_type),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.model(x)


class AdaINResBlock(nn.Module):
    """Two AdaIN blocks, the second without activation, plus the input."""

    def __init__(self, channels: int, *, kind: str, activ: str, pad_type: str) -> None:
        super().__init__()
        first = AdaINBlock(channels, kind=kind, activ=activ, pad_type=pad_type)
        second = AdaINBlock(channels, kind=kind, activ="none", pad_type=pad_type)
        self.model = nn.ModuleList([first, second])

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        scales, shifts = scale.chunk(2, dim=1), shift.chunk(2, dim=1)  # each (N, C)
        y = self.model[0](x, scales[0], shifts[0])
        return x + self.model[1](y, scales[1], shifts[1])


class ResBlocks(nn.Module):
    """`n` residual blocks in a row."""

    def __init__(self, n: int, channels: int, *, norm: str, activ: str, pad_type: str) -> None:
        super().__init__()
        block = dict(norm=norm, activ=activ, pad_type=pad_type)
        self.model = nn.Sequential(*(ResBlock(channels, **block) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class AdaINResBlocks(nn.Module):
    """`n` conditioned residual blocks in a row; block k takes the k-th scale and shift."""

    def __init__(self, n: int, channels: int, *, kind: str, activ: str, pad_type: str) -> None:
        super().__init__()
        block = dict(kind=kind, activ=activ, pad_type=pad_type)
        self.model = nn.ModuleList(AdaINResBlock(channels, **block) for _ in range(n))

    def forward(self, x: Tensor, adain: list[tuple[Tensor, Tensor]]) -> Tensor:
        for block, (scale, shift) in zip(self.model, adain, strict=True):
            x = block(x, scale, shift)
        return x


class SelfAttention(nn.Module):
    """Softmax over the key positions of unscaled dot products, times a learnt scalar that starts at 0, plus input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_conv(x).flatten(2).transpose(1, 2)  # (N, HW, C/8)
        key = self.key_conv(x).flatten(2)  # (N, C/8, HW)
        value = self.value_conv(x).flatten(2)  # (N, C, HW)
        attention = torch.softmax(query @ key, dim=-1)  # (N, HW, HW), rows sum to 1
        return self.gamma * (value @ attention.transpose(1, 2)).view_as(x) + x


class ASPP(nn.Module):
    """Four branches that see 1x1 and 3x3 with dilation 3, 6, 9, fused to twice the channels."""

    def __init__(self, channels: int, *, norm: str, activ: str, pad_type: str) -> None:
        super().__init__()
        half = channels // 2
        block = dict(norm=norm, pad_type=pad_type)

        def branch(dilation: int) -> nn.Sequential:
            return nn.Sequential(
                ConvBlock(channels, half, 1, activ=activ, **block),
                ConvBlock(half, half, 3, dilation=dilation, activ="none", **block),
            )

        self.conv1 = ConvBlock(channels, half, 1, activ="none", **block)
        self.conv6 = branch(3)
        self.conv12 = branch(6)
        self.conv18 = branch(9)
        self.fuse = ConvBlock(4 * half, 2 * channels, 1, activ="none", **block)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.conv1(x), self.conv6(x), self.conv12(x), self.conv18(x)], dim=1))


# -------------------------------------------------------------------------------------------- generator
class StructureEncoder(nn.Module):
    """Gray image to structure code."""

    def __init__(self, *, dim: int, n_downsample: int, n_res: int, activ: str, pad_type: str, tanh: bool) -> None:
        super().__init__()
        block = dict(norm="in", activ=activ, pad_type=pad_type)
        layers: list[nn.Module] = [
            ConvBlock(1, dim, 3, stride=2, **block),  # (N, 16, 128, 64)
            ConvBlock(dim, 2 * dim, 3, **block),  # (N, 32, 128, 64)
        ]
        c = 2 * dim
        for _ in range(n_downsample - 1):
            layers += [ConvBlock(c, c, 3, **block), ConvBlock(c, 2 * c, 3, stride=2, **block)]  # (N, 64, 64, 32)
            c *= 2
        layers += [ResBlocks(n_res, c, **block), ASPP(c, **block)]  # (N, 128, 64, 32)
        layers += [nn.Tanh()] * tanh
        self.model = nn.Sequential(*layers)
        self.output_dim = 2 * c

    def forward(self, g: Tensor) -> Tensor:
        return self.model(g)


class Decoder(nn.Module):
    """Structure code and AdaIN parameters to an image in normalised space."""

    def __init__(
        self,
        *,
        dim: int,
        n_upsample: int,
        n_res: int,
        kind: str,
        dropout: float,
        non_local: bool,
        activ: str,
        pad_type: str,
    ) -> None:
        super().__init__()
        block = dict(activ=activ, pad_type=pad_type)
        layers: list[nn.Module] = [nn.Dropout(dropout), AdaINResBlocks(n_res, dim, kind=kind, **block)]
        layers += [SelfAttention(dim) for _ in range(non_local)]
        c = dim
        for _ in range(n_upsample):
            layers += [nn.Upsample(scale_factor=2), ConvBlock(c, c // 2, 5, norm="ln", **block)]
            c //= 2
        layers += [ConvBlock(c, c, 3, **block), ConvBlock(c, c, 3, **block)]  # (N, 32, 256, 128)
        layers += [ConvBlock(c, 3, 1, activ="none", pad_type=pad_type)]  # (N, 3, 256, 128)
        self.model = nn.Sequential(*layers)

    def forward(self, s: Tensor, adain: list[tuple[Tensor, Tensor]]) -> Tensor:
        dropout, res_blocks, to_image = self.model[0], self.model[1], self.model[2:]
        return to_image(res_blocks(dropout(s), adain))


class LinearBlock(nn.Module):
    """Linear, norm, activation."""

    def __init__(self, c_in: int, c_out: int, *, norm: str, activ: str) -> None:
        super().__init__()
        self.norm = make_norm(norm, c_out)
        self.activation = ACTIVATIONS[activ]()
        self.fc = nn.Linear(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.fc(x)))


class MLP(nn.Module):
    """Three linear layers, the last plain: one chunk of the appearance code to a block's AdaIN parameters."""

    def __init__(self, c_in: int, c_out: int, dim: int, *, norm: str, activ: str) -> None:
        super().__init__()
        self.model = nn.Sequential(
            LinearBlock(c_in, dim, norm=norm, activ=activ),
            LinearBlock(dim, dim, norm=norm, activ=activ),
            LinearBlock(dim, c_out, norm="none", activ="none"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Generator(nn.Module):
    """Structure encoder, AdaIN MLPs and decoder: `decode(encode(gray(x_a)), f_b)` puts b's clothes on a.

    `code_dim` is the length of the appearance code; it must be `n_res * id_dim`.
    """

    def __init__(
        self,
        *,
        code_dim: int,
        dim: int = 16,
        mlp_dim: int = 512,
        mlp_norm: str = "none",
        id_dim: int = 2048,
        n_downsample: int = 2,
        n_res: int = 4,
        dec: str = "basic",
        dropout: float = 0.0,
        non_local: int = 0,
        tanh: bool = False,
        activ: str = "lrelu",
        pad_type: str = "reflect",
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        if code_dim != n_res * id_dim:
            raise UserError(
                f"gen.id_dim {id_dim} and gen.n_res {n_res}: the appearance code of this backbone has "
                f"{code_dim} numbers, which must equal n_res * id_dim; set gen.id_dim to "
                f"{code_dim / n_res:g}" + ("" if code_dim % n_res == 0 else f" with an n_res that divides {code_dim}")
            )
        self.n_res = n_res
        common = dict(n_res=n_res, activ=activ, pad_type=pad_type)
        self.enc_content = StructureEncoder(dim=dim, n_downsample=n_downsample, tanh=tanh, **common)
        c = self.enc_content.output_dim
        self.dec = Decoder(dim=c, n_upsample=n_downsample, kind=dec, dropout=dropout, non_local=non_local > 0, **common)
        for role in "wb":  # scales (w), then shifts (b)
            for k in range(1, n_res + 1):
                self.add_module(f"mlp_{role}{k}", MLP(id_dim, 2 * c, mlp_dim, norm=mlp_norm, activ=activ))
        init_weights(self, init)

    def encode(self, g: Tensor) -> Tensor:
        """Gray image (N, 1, H, W) to structure code (N, C, H / 2**n_downsample, W / 2**n_downsample)."""
        return self.enc_content(g)

    def adain_parameters(self, f: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Appearance code to `(scale, shift)`, each (N, 2C), per residual block; chunk k of the code serves block k."""
        chunks = f.chunk(self.n_res, dim=1)  # n_res times (N, id_dim)
        mlp = self.get_submodule
        return [(mlp(f"mlp_w{k}")(chunk), mlp(f"mlp_b{k}")(chunk)) for k, chunk in enumerate(chunks, 1)]

    def decode(self, s: Tensor, f: Tensor) -> Tensor:
        """Structure code and appearance code to an image (N, 3, H, W) in normalised space."""
        return self.dec(s, self.adain_parameters(f))


# ---------------------------------------------------------------------------------------- discriminator
class Discriminator(nn.Module):
    """Multi-scale discriminator, or the single strided net of `gan_type: wgan`.

    `forward` returns one score map per scale, full resolution first.
    """

    def __init__(
        self,
        *,
        dim: int = 32,
        n_layer: int = 2,
        n_res: int = 4,
        num_scales: int = 3,
        gan_type: str = "lsgan",
        norm: str = "none",
        non_local: int = 0,
        activ: str = "lrelu",
        pad_type: str = "reflect",
    ) -> None:
        super().__init__()
        block = dict(norm=norm, activ=activ, pad_type=pad_type)
        if gan_type == "wgan":
            self.cnn = wgan_net(dim, **block)
        else:
            net = dict(dim=dim, n_layer=n_layer, n_res=n_res, non_local=non_local, **block)
            self.cnns = nn.ModuleList(scale_net(**net) for _ in range(num_scales))
        init_weights(self, "gaussian")

    def forward(self, x: Tensor) -> list[Tensor]:
        if hasattr(self, "cnn"):
            return [self.cnn(x)]
        scores = []
        for cnn in self.cnns:
            scores.append(cnn(x))  # (N, 1, H/4, W/4)
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return scores


def scale_net(*, dim: int, n_layer: int, n_res: int, non_local: int, **block: str) -> nn.Sequential:
    """The discriminator of one scale: strided blocks, residual blocks, optional attention, 1x1 to a score."""
    layers: list[nn.Module] = [ConvBlock(3, dim, 1, **block), ConvBlock(dim, dim, 3, **block)]
    layers.append(ConvBlock(dim, dim, 3, stride=2, **block))
    c = dim
    for _ in range(n_layer - 1):
        wider = min(2 * c, 512)
        layers += [ConvBlock(c, c, 3, **block), ConvBlock(c, wider, 3, stride=2, **block)]
        c = wider
    if non_local > 1:
        layers.append(SelfAttention(c))
    layers += [ResBlock(c, **block) for _ in range(n_res)]
    if non_local > 0:
        layers.append(SelfAttention(c))
    layers.append(nn.Conv2d(c, 1, 1))
    return nn.Sequential(*layers)


def wgan_net(dim: int, **block: str) -> nn.Sequential:
    """Six 4x4 stride-2 blocks and a (4, 2) convolution: 256 x 128 to one number."""
    widths = [3] + [min(dim * 2**i, 512) for i in range(6)]
    strided = (ConvBlock(c_in, c_out, 4, stride=2, pad=1, **block) for c_in, c_out in pairwise(widths))
    return nn.Sequential(*strided, nn.Conv2d(widths[-1], 1, (4, 2)))


# ----------------------------------------------------------------------------------------- initialising
def init_weights(net: nn.Module, kind: str) -> None:
    """Initialise every convolution and linear weight by `kind`, with zero biases."""
    initialise = {
        "kaiming": lambda w: nn.init.kaiming_normal_(w, a=0, mode="fan_in"),  # gain sqrt 2
        "gaussian": lambda w: nn.init.normal_(w, 0.0, 0.02),
        "xavier": lambda w: nn.init.xavier_normal_(w, gain=2**0.5),
        "orthogonal": lambda w: nn.init.orthogonal_(w, gain=2**0.5),
    }[kind]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            initialise(module.weight)
            nn.init.zeros_(module.bias)
