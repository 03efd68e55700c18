"""Every faster layer against its textbook layer, in value and in gradient; and one call puts them all in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CPU
from torch import Tensor, nn

from fast import accelerate
from networks import AdaIN, AdaINBlock, ConvBlock, Discriminator, Generator, LayerNorm
from reIDmodel import build_id_net

DOUBLE = torch.float64


def values_and_gradients(net: nn.Module, call: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """What `call` gives on the inputs, and the gradients of a fixed projection of it by inputs and weights."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = call(net, *inputs)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    generator = torch.Generator().manual_seed(3)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    wrt = [*inputs, *(p for p in net.parameters())]
    gradients = torch.autograd.grad(total, wrt, allow_unused=True)
    return [y.detach() for y in outputs] + [g for g in gradients if g is not None]


def assert_equal(net: nn.Module, call: Callable[..., Any], *inputs: Tensor) -> None:
    torch.manual_seed(0)
    net = net.to(DOUBLE)
    faster = accelerate(copy.deepcopy(net), CPU)
    assert list(net.state_dict()) == list(faster.state_dict())
    textbook = values_and_gradients(net, call, list(inputs))
    scale = max(expected.abs().max().item() for expected in textbook)  # what a norm cancels has gradients of rounding
    for value, expected in zip(values_and_gradients(faster, call, list(inputs)), textbook, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10 * scale)


def image(n: int, c: int, h: int, w: int, seed: int = 1) -> Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("norm", ["in", "ln", "none"])
@pytest.mark.parametrize("pad_type", ["reflect", "replicate", "zero"])
@pytest.mark.parametrize("size", [(8, 6), (4, 4), (9, 5)])
def test_enlarging_and_convolving(norm: str, pad_type: str, size: tuple[int, int]) -> None:
    layers = nn.Sequential(nn.Upsample(scale_factor=2), ConvBlock(4, 2, 5, norm=norm, pad_type=pad_type))
    assert_equal(layers, lambda net, x: net(x), image(3, 4, *size))


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(4), LayerNorm(4)], ids=["instance", "layer"])
def test_norms(layer: nn.Module) -> None:
    assert_equal(layer, lambda net, x: net(x), image(3, 4, 6, 5))
    assert_equal(layer, lambda net, x: net(x.contiguous(memory_format=torch.channels_last)), image(3, 4, 6, 5))


def test_adain() -> None:
    scale, shift = image(1, 1, 3, 4)[0, 0], image(1, 1, 3, 4, seed=2)[0, 0]
    assert_equal(AdaIN(4), lambda net, x, s, b: net(x, s, b), image(3, 4, 6, 5), scale, shift)
    for kind in ("basic", "series", "parallel"):
        block = AdaINBlock(4, kind=kind, activ="lrelu", pad_type="reflect")
        assert_equal(block, lambda net, x, s, b: net(x, s, b), image(3, 4, 6, 5), scale, shift)


@pytest.mark.parametrize("dec,non_local", [("basic", 0), ("series", 1), ("parallel", 0)])
@pytest.mark.parametrize("n_downsample", [1, 2])
def test_the_generator(dec: str, non_local: int, n_downsample: int) -> None:
    gen = Generator(code_dim=32, dim=4, mlp_dim=8, id_dim=8, n_downsample=n_downsample, dec=dec, non_local=non_local)
    code = image(1, 1, 2, 32)[0, 0]
    assert_equal(gen, lambda net, g, f: net.decode(net.encode(g), f), image(2, 1, 48, 40), code)


@pytest.mark.parametrize("norm", ["none", "in", "ln"])
def test_the_discriminator(norm: str) -> None:
    dis = Discriminator(dim=4, n_layer=1, n_res=1, num_scales=2, norm=norm)
    assert_equal(dis, lambda net, x: net(x), image(2, 3, 32, 16))


@pytest.mark.parametrize("style", ["AB", "normal", "PCB"])
def test_the_id_net(style: str) -> None:
    net = build_id_net(style, 3, backbone="resnet10w8").eval()
    assert_equal(net, lambda net, x: [*net(x)[1], *net.embed(x)], image(2, 3, 64, 32))


def test_autocast_pads_in_the_precision_of_the_input() -> None:
    """The product is that of the textbook layer under autocast, bit for bit."""
    block = ConvBlock(4, 4, 3).float()
    faster = accelerate(copy.deepcopy(block), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(faster(image(2, 4, 8, 6).float()), block(image(2, 4, 8, 6).float()))
