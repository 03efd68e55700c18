"""Every loss term of DG-Net, its weight over time, and the total as one weighted sum (docs/method.md, "Losses").

A loss function returns `{name: term}`. The terms are unweighted and bear the names under which they are logged; `_a`
and `_b` name the image of the pair whose reconstruction, code or identity is meant. `loss_weights` gives the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from networks import Discriminator
from reIDmodel import Logits

if TYPE_CHECKING:
    from config import DGNetConfig

Terms = dict[str, Tensor]
# Terms whose weight rises during training, and the config key of the weight that they begin with.
RAMPED = {"recon_f": "recon_f_w", "recon_s": "recon_s_w", "cyc": "recon_x_cyc_w", "teacher": "teacher_w"}


# ---------------------------------------------------------------------------------------------- weights
def ramp(start: float, maximum: float, warm_start: int, warm_scale: float, t: int) -> float:
    """`start` up to and including iteration `warm_start`, then rising by `warm_scale` a step up to `maximum`."""
    return start if t <= warm_start else min(start + warm_scale * (t - warm_start), maximum)


def loss_weights(cfg: DGNetConfig, t: int) -> dict[str, float]:
    """The weight of every term of the generator and id loss at iteration `t` (0-based), a pure function of it.

    A key stands for the terms of both images: `recon_x` weighs `recon_x_a` and `recon_x_b`.
    """
    return {
        "adv": cfg.gan_w,  # trains the generator
        "recon_x": cfg.recon_x_w,  # encoder and decoder (and the id net with `detach_f: false`)
        "recon_xp": cfg.recon_xp_w,  # the same
        "recon_s": ramp(cfg.recon_s_w, cfg.max_w, cfg.warm_iter, cfg.warm_scale, t),  # encoder, or decoder
        "recon_f": ramp(
            cfg.recon_f_w, cfg.max_w, cfg.warm_iter, cfg.warm_scale, t
        ),  # nothing, unless `detach_f: false`
        "recon_id": cfg.recon_id_w,  # encoder and decoder
        "cyc": ramp(cfg.recon_x_cyc_w, cfg.max_cyc_w, cfg.warm_iter, cfg.warm_scale, t),  # encoder and decoder
        "vgg": cfg.vgg_w,  # encoder and decoder
        "id": cfg.id_w,  # id net
        "pid": cfg.pid_w,  # id net
        "teacher": ramp(cfg.teacher_w, cfg.max_teacher_w, cfg.warm_teacher_iter, cfg.warm_scale, t),  # id net
    }


def weighted_sum(terms: Terms, weights: dict[str, float]) -> Tensor:
    """The total of the terms, each times its weight."""
    weighted = [weights[name.removesuffix("_a").removesuffix("_b")] * term for name, term in terms.items()]
    return torch.stack(weighted).sum()


# -------------------------------------------------------------------------------------- elementary terms
def full(x: Tensor) -> Tensor:
    """At least float32: sums of half-precision outputs are taken in full precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l1(p: Tensor, q: Tensor) -> Tensor:
    """mean |p - q|, without gradient for the target q."""
    return (full(p) - full(q.detach())).abs().mean()


def cross_entropy(logits: Logits, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the given heads of the cross-entropy with classes (N,) or distributions (N, K).

    smoothing  share of the target that is spread over all classes (Szegedy et al., CVPR 2016)
    """
    return sum(F.cross_entropy(full(p), y, label_smoothing=smoothing) for p in logits) / len(logits)


def kl_divergence(logits: Logits, q: Tensor) -> Tensor:
    """KL(q || softmax p), summed over classes, mean over images, mean over the given heads."""
    return sum(F.kl_div(F.log_softmax(full(p), dim=1), q, reduction="batchmean") for p in logits) / len(logits)


def split_heads(p: Logits, id_style: str) -> tuple[Logits, Logits]:
    """Primary and fine-grained heads. Style AB has one of each; the others have primary heads only."""
    return (p[:1], p[1:]) if id_style == "AB" else (p, ())


# ---------------------------------------------------------------------------------------- adversarial
def discriminator_terms(
    dis: Discriminator, real: Tensor, fake: Tensor, *, gan_type: str, penalty: float, processes: int = 1
) -> Terms:
    """D's loss `dis_a`, `dis_b` on the two pairs (x_a, x_ba) and (x_b, x_ab), with their gradient penalties.

    `real` and `fake` hold both images of the pair, (2N, 3, H, W): D has no batch statistics, so one pass serves both.
    The penalty is the squared norm of d(sum of D(real))/d(real) at full resolution, mean over the batch.
    `processes` share the batch: the sums of wgan are over all of it.
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
                loss = f.mean() - r.mean() + 0.001 * processes * (f.square().sum() + r.square().sum())
            terms[name] = terms[name] + loss + penalty * g.flatten(1).square().sum(dim=1).mean()
    return terms


def adversarial_terms(dis: Discriminator, fake: Tensor, *, gan_type: str, processes: int = 1) -> Terms:
    """G's loss `adv_a`, `adv_b` for x_ba and x_ab, which `fake` (2N, 3, H, W) holds; it reaches the fakes only."""
    terms = {"adv_a": 0.0, "adv_b": 0.0}
    for scores in dis(fake):  # per scale
        for name, d in zip(terms, full(scores).chunk(2), strict=True):
            if gan_type == "lsgan":
                loss = 2 * (d - 1).square().mean()
            elif gan_type == "nsgan":
                loss = F.binary_cross_entropy_with_logits(d, torch.ones_like(d))
            else:  # wgan
                loss = -d.mean() + 0.001 * processes * d.square().sum()
            terms[name] = terms[name] + loss
    return terms


# ------------------------------------------------------------------------------------------ identities
def identity_loss(p: Logits, y: Tensor, *, id_style: str, fine_w: float, smoothing: float = 0.0) -> Tensor:
    """CE(p_prim, y) + fine_w CE(p_fine, y).

    At weight 0 the second part still yields gradients (zeros), so that weight decay applies to its head.
    """
    prim, fine = split_heads(p, id_style)
    loss = cross_entropy(prim, y, smoothing)
    return loss + fine_w * cross_entropy(fine, y, smoothing) if fine else loss


def primary_loss(p: Logits, y: Tensor, *, id_style: str, smoothing: float = 0.0) -> Tensor:
    """CE(p_prim, y)."""
    return cross_entropy(split_heads(p, id_style)[0], y, smoothing)


def teacher_loss(p: Logits, q: Tensor, y_str: Tensor, *, id_style: str, t_w: float, b_w: float) -> Tensor:
    """T_w KL(q || p_prim) + B_w CE(p_fine, structure identity) for one fake."""
    prim, fine = split_heads(p, id_style)
    loss = t_w * kl_divergence(prim, q)
    return loss + b_w * cross_entropy(fine, y_str) if fine else loss


# --------------------------------------------------------------------------------------------- teacher
def mean_prediction(teachers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The teachers' mean distribution (N, K) of images (N, 3, H, W) and their mirrors, in the mode they are in."""
    views = [torch.softmax(full(teacher(v)[1][0]), dim=1) for teacher in teachers for v in (x, x.flip(3))]
    return torch.stack(views).mean(dim=0)


def soft_labels(
    prediction: Tensor | None, y_app: Tensor, y_str: Tensor, *, style: int, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """The label q (N, K) of a fake with appearance identity `y_app` and structure identity `y_str`.

    style  0 `prediction`, the teachers' averaged distribution; 1 one-hot of its maximum; 2 one-hot of y_app;
           3 uniform; 4 `prediction` of the two identities alone. Styles 2 and 3 need no prediction
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


def perceptual_loss(vgg: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Mean square difference of instance-normalised VGG-16 relu5_3 features."""
    return (F.instance_norm(full(vgg(x))) - F.instance_norm(full(vgg(target)))).square().mean()
