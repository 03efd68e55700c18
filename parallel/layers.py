"""Layers that act on the whole batch when several processes share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from parallel.collectives import own_part, rank, reaching_others, world_size


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn for the whole batch, so that it does not depend on the number of processes."""

    def __init__(self, p: float, images: int) -> None:
        super().__init__(p)
        self.images = images  # of a batch in this process

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        whole = x.new_ones(len(x) * world_size(), *x.shape[1:])
        if x.dim() == 4 and not x.is_contiguous():
            whole = whole.to(memory_format=torch.channels_last)  # masks are drawn in the order of memory
        return x * own_part().rows(F.dropout(whole, self.p), self.images)


class _NormaliseBatch(torch.autograd.Function):
    """BatchNorm's training pass over equal slices in all processes: one exchange forward, one backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dims, full = [0, *range(2, x.dim())], x.to(torch.promote_types(x.dtype, torch.float32))
        own_var, own_mean = torch.var_mean(full, dim=dims, unbiased=False)
        moments = own_mean.new_zeros(world_size(), 2, x.shape[1])
        moments[rank(), 0], moments[rank(), 1] = own_mean, own_var
        with reaching_others():
            dist.all_reduce(moments)
        mean = moments[:, 0].mean(dim=0)
        var = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(dim=0)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = inverse * weight
        y = torch.addcmul((bias - mean * scale).view(shape), full, scale.view(shape))
        return y.to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
        full = torch.promote_types(x.dtype, torch.float32)
        grad = grad.to(full)
        normalised = (x.to(full) - mean.view(shape)) * inverse.view(shape)
        own = torch.stack([grad.sum(dim=dims), (grad * normalised).sum(dim=dims)])
        totals = own.clone()
        with reaching_others():
            dist.all_reduce(totals)
        centre, slope = (totals / (x.numel() // x.shape[1] * world_size())).view(2, *shape)
        grad_x = (grad - centre - normalised * slope) * (inverse * weight).view(shape)
        return grad_x.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of the whole batch, on any device; torch's own is for CUDA alone."""

    @classmethod
    def like(cls, norm: _BatchNorm) -> SyncBatchNorm:
        """One with the parameters and buffers of `norm`, shared, so that optimisers keep hold of them."""
        own = cls(norm.num_features, norm.eps, norm.momentum)
        own._parameters, own._buffers, own.training = norm._parameters, norm._buffers, norm.training
        return own

    def _check_input_dim(self, input: Tensor) -> None:
        """Of any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var = _NormaliseBatch.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), self.momentum)
        return y


def act_on_whole_batch(nets: list[nn.Module], images: int, *, sync_bn: bool) -> None:
    """Exchange the layers that see or draw across a batch, in place; parameters and their names stay.

    Dropout always, BatchNorm with `sync_bn`. `images`: of a batch in this process. Nothing to do in one process.
    """
    if world_size() == 1:
        return
    for module in [module for net in nets for module in net.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, Dropout(child.p, images).train(child.training))
            elif sync_bn and isinstance(child, _BatchNorm):
                setattr(module, name, SyncBatchNorm.like(child))
