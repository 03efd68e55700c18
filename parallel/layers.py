"""Layers that act on the whole batch when several processes share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from parallel.collectives import own_part, reaching_others, world_size
from utils import UserError


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


class _MeanOfAll(torch.autograd.Function):
    """The mean of a tensor over the processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _mean_of_all(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return _mean_of_all(grad)


def _mean_of_all(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with reaching_others():
        dist.all_reduce(total)
    return total / world_size()


class SyncBatchNormCPU(_BatchNorm):
    """BatchNorm with the statistics of the whole batch on a CPU, which torch.nn.SyncBatchNorm refuses."""

    @classmethod
    def like(cls, norm: _BatchNorm) -> SyncBatchNormCPU:
        """A layer with the very parameters and buffers of `norm`, so that its optimiser still finds them."""
        layer = cls(norm.num_features, norm.eps, norm.momentum)
        layer._parameters, layer._buffers, layer.training = norm._parameters, norm._buffers, norm.training
        return layer

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _MeanOfAll.apply(full.mean(dims))
        centred = full - mean.view(shape)
        var = _MeanOfAll.apply(centred.square().mean(dims))
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)
            self.running_var.lerp_((var.detach() * (count / (count - 1))).to(self.running_var), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape)).to(x.dtype)


def require_plain_norms(net: nn.Module) -> None:
    """Raise UserError for a BatchNorm that does more, such as timm's with an activation inside: it would be lost."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNormCPU)
    odd = {type(module).__name__ for module in net.modules() if isinstance(module, _BatchNorm)} - {
        kind.__name__ for kind in plain
    }
    if odd:
        raise UserError(f"sync_bn: true cannot replace the backbone's {', '.join(sorted(odd))}; set sync_bn: false")


def act_on_whole_batch(nets: list[nn.Module], images: int, *, sync_bn: bool) -> None:
    """Replace the layers that see or draw across a batch, in place; parameters and their names stay.

    Dropout always, BatchNorm with `sync_bn`. `images`: of a batch in this process. Nothing to do in one process.
    """
    if world_size() == 1:
        return
    for net in nets:
        on_gpu = next(net.parameters()).is_cuda
        if sync_bn:
            require_plain_norms(net)
        if sync_bn and on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(net)
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, name, Dropout(child.p, images).train(child.training))
                elif sync_bn and not on_gpu and isinstance(child, _BatchNorm):
                    setattr(module, name, SyncBatchNormCPU.like(child))
