"""Faster equivalents of the textbook layers in networks.py and reIDmodel.py, put in by `accelerate`.

They compute the same values and gradients up to rounding (tests/method/test_fast.py), keep every parameter's name, and
change nothing about the method. `recompute` trades time for memory in the same spirit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from networks import AdaIN, AdaINBlock, ConvBlock, LayerNorm, LinearBlock


def accelerate(net: nn.Module, device: torch.device, *, channels_last: bool = False) -> nn.Module:
    """Put the faster layers into `net`, in place, and move it to `device`, channels-last where asked."""
    for module in net.modules():
        if isinstance(module, ConvBlock | AdaINBlock | LinearBlock) and hasattr(module.activation, "inplace"):
            # The activation follows an operation that does not need its output for the backward.
            module.activation.inplace = True
        if isinstance(module, nn.Sequential):
            merge_enlargements(module)
    for module in net.modules():
        # The faster classes differ in `forward` alone.
        module.__class__ = FASTER.get(type(module), type(module))
    return net.to(device, memory_format=torch.channels_last) if channels_last else net.to(device)


# ------------------------------------------------------------------------------------------------- norms
def instance_norm(x: Tensor) -> Tensor:
    if x.is_cpu and x.is_contiguous():
        # One group per channel is the same thing, and three times faster on a CPU.
        return F.group_norm(x, x.shape[1])
    return F.instance_norm(x)


class GroupedInstanceNorm(nn.InstanceNorm2d):
    """Instance normalisation without affine parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x)


class GroupedAdaIN(AdaIN):
    """AdaIN on the faster instance normalisation."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return instance_norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class OnePassLayerNorm(LayerNorm):
    """LayerNorm as one scale and one shift per sample and channel: a single pass over x, which alone is kept."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x, dim=tuple(range(1, x.dim())), keepdim=True)  # (N, 1, 1, 1)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.gamma.view(shape) / (std + self.eps)
        return torch.addcmul(self.beta.view(shape) - mean * scale, x, scale)


# ----------------------------------------------------------------------------------- padding and pooling
def reflect(x: Tensor, pad: int) -> Tensor:
    """F.pad(x, 4 * (pad,), "reflect") made of slices, whose backward adds in a fixed order on a GPU too."""
    for dim in (2, 3):
        before, after = x.narrow(dim, 1, pad), x.narrow(dim, x.shape[dim] - 1 - pad, pad)
        x = torch.cat([before.flip(dim), x, after.flip(dim)], dim)
    return x


class PaddingConv2d(nn.Conv2d):
    """nn.Conv2d whose padding keeps the input's precision, and has a fixed order under `deterministic`.

    Autocast on a CPU would otherwise pad in float32 and cast back for the product: copies that change no value.
    """

    def forward(self, x: Tensor) -> Tensor:
        fixed_order = self.padding_mode == "reflect" and torch.are_deterministic_algorithms_enabled()
        autocast = x.is_cpu and self.padding_mode != "zeros" and torch.is_autocast_enabled("cpu")
        if not (fixed_order or autocast):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            if fixed_order:
                x = reflect(x, self.padding[0])
            else:
                x = F.pad(x, 4 * self.padding[:1], self.padding_mode)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation)


def pool_by_slices(m: Tensor, stripes: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Adaptive pooling of (N, C, h, w) to (N, C, stripes, 1), made of slices; `reduce` acts on the last dimension.

    PyTorch's adaptive pooling adds its gradients in no fixed order on a GPU. Stripe k has the rows from
    floor(k h / stripes) to ceil((k + 1) h / stripes), as there.
    """
    h = m.shape[2]
    stripe = [m[:, :, k * h // stripes : -(-(k + 1) * h // stripes)].flatten(2) for k in range(stripes)]
    return torch.stack([reduce(rows) for rows in stripe], 2).unsqueeze(3)


class FixedOrderMaxPool(nn.AdaptiveMaxPool2d):
    """Maximum of horizontal stripes; under `deterministic` with gradients in a fixed order."""

    def forward(self, m: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(m)
        return pool_by_slices(m, self.output_size[0], lambda rows: rows.max(2).values)


class FixedOrderAvgPool(nn.AdaptiveAvgPool2d):
    """Mean of horizontal stripes; under `deterministic` with gradients in a fixed order."""

    def forward(self, m: Tensor) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(m)
        return pool_by_slices(m, self.output_size[0], lambda rows: rows.mean(2))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.InstanceNorm2d: GroupedInstanceNorm,
    AdaIN: GroupedAdaIN,
    LayerNorm: OnePassLayerNorm,
    nn.Conv2d: PaddingConv2d,
    nn.AdaptiveMaxPool2d: FixedOrderMaxPool,
    nn.AdaptiveAvgPool2d: FixedOrderAvgPool,
}


# ---------------------------------------------------------------------------- enlarging and convolving
def merge_enlargements(layers: nn.Sequential) -> None:
    """Replace each enlargement and the 5x5 ConvBlock after it by an UpConvBlock, in place."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Upsample):
            layers[i] = nn.Identity()  # keeps the published numbering
            layers[i + 1].__class__ = UpConvBlock


class UpConvBlock(ConvBlock):
    """A ConvBlock (5x5) on the nearest-neighbour enlargement, twice as large, without making the enlargement.

    Each output pixel sees 5 x 5 pixels of the enlargement but only 3 x 3 of the input, so four 3x3 convolutions, one
    per place in a 2x2 square, give the same numbers with 9 products in place of 25 (and none of the memory).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.enlarge_and_convolve(x)))

    def enlarge_and_convolve(self, x: Tensor) -> Tensor:
        """(N, c_in, h, w) to (N, c_out, 2h, 2w)."""
        weight, mode = self.conv.weight, self.conv.padding_mode
        pad = "constant" if mode == "zeros" else "replicate"
        y = self.convolve(F.pad(x, (1, 1, 1, 1), pad), places(places(weight, 2), 4))
        if mode != "reflect":
            return y
        # Reflection at the enlargement's edge is no padding of x: the outermost lines have taps of their own.
        sides = self.convolve(F.pad(outer(x, 3), (0, 0, 1, 1), pad), fold(places(weight, 2), 4))
        ends = self.convolve(F.pad(outer(x, 2), (1, 1, 0, 0), pad), places(fold(weight, 2), 4))
        corners = self.convolve(outer(outer(x, 3), 2), fold(fold(weight, 2), 4))
        (left, right), (top, bottom) = halves(sides[:, :, 1:-1]), halves(ends[..., 1:-1])
        (top_left, top_right), (bottom_left, bottom_right) = map(halves, halves(corners))
        rows = (top_left, top, top_right), (left, y[..., 1:-1, 1:-1], right), (bottom_left, bottom, bottom_right)
        return torch.cat([torch.cat(row, dim=3) for row in rows], dim=2)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """One convolution for all places, weight (c_out, c_in, places, taps, places, taps), put where they belong."""
        c_out, c_in, py, ky, px, kx = weight.shape
        weight = weight.permute(0, 2, 4, 1, 3, 5).reshape(c_out * py * px, c_in, ky, kx)
        y = F.conv2d(x, weight, self.conv.bias.repeat_interleave(py * px))
        n, _, h, w = y.shape
        return y.view(n, c_out, py, px, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c_out, h * py, w * px)


def places(weight: Tensor, dim: int) -> Tensor:
    """Five taps on an enlargement as three on what was enlarged, for an even and for an odd place.

    weight (..., 5, ...) to (..., 2, 3, ...) at `dim`
    """
    a, b, c, d, e = weight.unbind(dim)
    even, odd = torch.stack([a + b, c + d, e], dim), torch.stack([a, b + c, d + e], dim)
    return torch.stack([even, odd], dim)


def fold(weight: Tensor, dim: int) -> Tensor:
    """Five taps at a reflecting edge of an enlargement as two on the outermost lines of what was enlarged.

    weight (..., 5, ...) to (..., 1, 2, ...) at `dim`
    """
    a, b, c, d, e = weight.unbind(dim)
    return torch.stack([b + c + d, a + e], dim).unsqueeze(dim)


def outer(x: Tensor, dim: int) -> Tensor:
    """The two lines at either edge, the outermost first: (2N, ...), of the first edge, then of the last."""
    return torch.cat([x.narrow(dim, 0, 2), x.narrow(dim, -2, 2).flip(dim)])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of a batch, (2N, ...) to twice (N, ...), in a form that exports with a dynamic batch."""
    return x.unflatten(0, (2, -1)).unbind(0)


# ---------------------------------------------------------------------------------- memory for time
def recompute(function: Callable[..., Any], net: nn.Module, images: int = 0) -> Callable[..., Any]:
    """`function`, a pass through `net`, whose activations are thrown away and computed again in the backward.

    images  at a time: a larger batch is split, or the second pass would fill the memory that it is to save; 0: the
            whole batch, where BatchNorm sees all of it
    """

    def run(*inputs: Any) -> Any:
        again = partial(checkpoint, function, use_reentrant=False, context_fn=lambda: (nullcontext(), as_now(net)))
        if not torch.is_grad_enabled():
            return function(*inputs)
        if not images:
            return again(*inputs)
        return torch.cat([again(*part) for part in zip(*(x.split(images) for x in inputs), strict=True)])

    return run


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def as_now(net: nn.Module) -> AbstractContextManager:
    """A context that puts `net` into the state it has now, for a pass that leaves no trace in its statistics."""
    now = state_of(net)

    @contextmanager
    def restored() -> Iterator[None]:
        later = state_of(net)
        put(now)
        for module in net.modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                for name in BUFFERS:  # which the pass updates
                    setattr(module, name, getattr(module, name).clone())
        try:
            yield
        finally:
            put(later)

    return restored()


def state_of(net: nn.Module) -> list[tuple[Any, str, Any]]:
    """(object, attribute, value) of all that decides a pass through the net besides the values of its weights."""
    state: list[tuple[Any, str, Any]] = [(weight, "requires_grad", weight.requires_grad) for weight in net.parameters()]
    for module in net.modules():
        batch_norm = ("track_running_stats", *BUFFERS) if isinstance(module, _BatchNorm) else ()
        state += [(module, name, getattr(module, name)) for name in ("training", *batch_norm)]
    return state


def put(state: list[tuple[Any, str, Any]]) -> None:
    for thing, name, value in state:
        setattr(thing, name, value)
