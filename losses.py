"""Every loss term of DG-Net and its weight over time (spec sections 5 and 7).

Loss functions return `(total, {name: term})`; the terms are unweighted and bear the names under which they are
logged. `_a` and `_b` name the image of the pair whose reconstruction, code or identity is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from distributed import world_size
from networks import Discriminator

if TYPE_CHECKING:
    from config import DGNetConfig

Logits = tuple[Tensor, ...]  # one (N, K) per head


# ---------------------------------------------------------------------------------------------- weights
@dataclass(frozen=True)
class LossWeights:
    """The weights of section 7 that change during training."""

    recon_f_w: float
    recon_s_w: float
    recon_x_cyc_w: float
    teacher_w: float


def ramp(start: float, maximum: float, warm_start: int, warm_scale: float, t: int) -> float:
    """`start` up to and including iteration `warm_start`, then rising by `warm_scale` a step up to `maximum`."""
    return start if t <= warm_start else min(start + warm_scale * (t - warm_start), maximum)


def loss_weights(cfg: DGNetConfig, t: int) -> LossWeights:
    """The weights at iteration `t` (0-based), a pure function of it."""

    def recon(start: float, maximum: float) -> float:
        return ramp(start, maximum, cfg.warm_iter, cfg.warm_scale, t)

    return LossWeights(
        recon_f_w=recon(cfg.recon_f_w, cfg.max_w),
        recon_s_w=recon(cfg.recon_s_w, cfg.max_w),
        recon_x_cyc_w=recon(cfg.recon_x_cyc_w, cfg.max_cyc_w),
        teacher_w=ramp(cfg.teacher_w, cfg.max_teacher_w, cfg.warm_teacher_iter, cfg.warm_scale, t),
    )


# -------------------------------------------------------------------------------------- elementary terms
def full(x: Tensor) -> Tensor:
    """At least float32: sums of half-precision outputs are taken in full precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l1(p: Tensor, q: Tensor) -> Tensor:
    """mean |p - q|, without gradient for the target q."""
    return (full(p) - full(q.detach())).abs().mean()


def total(x: Tensor) -> Tensor:
    """The sum over the whole batch, of which each process has an equal slice; means need nothing of the kind."""
    return x.sum() * world_size()


def cross_entropy(logits: Logits, y: Tensor) -> Tensor:
    """Mean over the given heads of the cross-entropy with classes (N,) or distributions (N, K)."""
    return sum(F.cross_entropy(full(p), y) for p in logits) / len(logits)


def kl_divergence(logits: Logits, q: Tensor) -> Tensor:
    """KL(q || softmax p), summed over classes, mean over images, mean over the given heads."""
    return sum(F.kl_div(F.log_softmax(full(p), dim=1), q, reduction="batchmean") for p in logits) / len(logits)


def split_heads(p: Logits, style: str) -> tuple[Logits, Logits]:
    """Primary and fine-grained heads. Style AB has one of each; the others have primary heads only."""
    return (p[:1], p[1:]) if style == "AB" else (p, ())


# ---------------------------------------------------------------------------------------- adversarial
def discriminator_loss(
    dis: Discriminator, real: Tensor, fake: Tensor, *, gan_type: str, penalty: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """D's loss on the two pairs (x_a, x_ba) and (x_b, x_ab), each with its gradient penalty (section 5).

    `real` and `fake` hold both images of the pair, (2N, 3, H, W): D has no batch statistics, so one pass serves both.
    The penalty is the squared norm of d(sum of D(real))/d(real) at full resolution, mean over the batch.
    """
    real = real.detach().requires_grad_()
    with torch.autocast(real.device.type, enabled=False):  # the penalty's second derivatives need full precision
        d_reals = dis(real)
    terms = {"dis_a": 0.0, "dis_b": 0.0}
    for d_real, d_fake in zip(d_reals, map(full, dis(fake.detach())), strict=True):  # per scale
        judged = torch.sigmoid(d_real) if gan_type == "nsgan" else d_real
        with torch.autocast(real.device.type, enabled=False):
            (grad,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
        for name, r, f, g in zip(terms, d_real.chunk(2), d_fake.chunk(2), grad.chunk(2), strict=True):
            if gan_type == "lsgan":
                loss = f.square().mean() + (r - 1).square().mean()
            elif gan_type == "nsgan":
                loss = F.binary_cross_entropy_with_logits(f, torch.zeros_like(f))
                loss = loss + F.binary_cross_entropy_with_logits(r, torch.ones_like(r))
            else:  # wgan
                loss = f.mean() - r.mean() + 0.001 * (total(f.square()) + total(r.square()))
            terms[name] = terms[name] + loss + penalty * g.flatten(1).square().sum(dim=1).mean()
    return terms["dis_a"] + terms["dis_b"], terms


def adversarial_loss(scores: Sequence[Tensor], gan_type: str) -> Tensor:
    """G's loss for one fake from D's score maps of it (section 5)."""
    loss = 0.0
    for d in map(full, scores):
        if gan_type == "lsgan":
            loss = loss + 2 * (d - 1).square().mean()
        elif gan_type == "nsgan":
            loss = loss + F.binary_cross_entropy_with_logits(d, torch.ones_like(d))
        else:  # wgan
            loss = loss - d.mean() + 0.001 * total(d.square())
    return loss


# --------------------------------------------------------------------------------------------- teacher
def mean_prediction(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The teachers' mean distribution (N, K) of images (N, 3, H, W) and their mirrors, in the mode they are in."""
    views = [torch.softmax(full(teacher(v)[1][0]), dim=1) for teacher in teachers for v in (x, x.flip(3))]
    return torch.stack(views).mean(dim=0)


def soft_labels(
    prediction: Tensor | None, y_app: Tensor, y_str: Tensor, *, style: int, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """The label q (N, K) of a fake with appearance identity `y_app` and structure identity `y_str` (section 7).

    `prediction` is the teachers' averaged distribution; styles 2 (one-hot) and 3 (uniform) need none.
    """
    if style == 0:
        return prediction
    if style == 1:
        return F.one_hot(prediction.argmax(dim=1), num_classes).to(dtype)
    if style == 2:
        return F.one_hot(y_app, num_classes).to(dtype)
    if style == 3:
        return torch.full((len(y_app), num_classes), 1 / num_classes, dtype=dtype, device=y_app.device)
    allowed = F.one_hot(y_app, num_classes) | F.one_hot(y_str, num_classes)
    masked = prediction * allowed
    share = masked.sum(dim=1, keepdim=True)
    # Where the teachers' softmax has underflowed for both, neither is more likely.
    return torch.where(share > 0, masked / share, allowed / allowed.sum(dim=1, keepdim=True))


def teacher_loss(p: Logits, q: Tensor, y_str: Tensor, *, id_style: str, t_w: float, b_w: float) -> Tensor:
    """T_w KL(q || p_prim) + B_w CE(p_fine, structure identity) for one fake."""
    prim, fine = split_heads(p, id_style)
    loss = t_w * kl_divergence(prim, q)
    return loss + b_w * cross_entropy(fine, y_str) if fine else loss


def identity_loss(p: Logits, y: Tensor, *, id_style: str, fine_w: float) -> Tensor:
    """CE(p_prim, y) + fine_w CE(p_fine, y); at weight 0 the second part gives zero gradients, not none."""
    prim, fine = split_heads(p, id_style)
    loss = cross_entropy(prim, y)
    return loss + fine_w * cross_entropy(fine, y) if fine else loss


def perceptual_loss(vgg: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Mean square difference of instance-normalised VGG-16 relu5_3 features."""
    return (F.instance_norm(full(vgg(x))) - F.instance_norm(full(vgg(target)))).square().mean()
