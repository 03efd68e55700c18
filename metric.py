"""Metric losses of a teacher, on batches of identities with several images each (`images_per_identity`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import full


def batch_hard_triplet(v: Tensor, y: Tensor, margin: float = 0.3) -> Tensor:
    """Mean over images of max(0, margin + distance to the farthest of its identity - to the nearest other person).

    v  (N, C) vectors, compared by Euclidean distance; y (N,) identities, every one with two images or more
    Hermans et al., arXiv:1703.07737, with the margin of Luo et al., CVPRW 2019.
    """
    with torch.autocast(v.device.type, enabled=False):
        distance = torch.cdist(full(v), full(v), compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    same = y[:, None] == y
    farthest = distance.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    return F.relu(margin + farthest - nearest).mean()


def circle_loss(v: Tensor, y: Tensor, margin: float = 0.25, scale: float = 64.0) -> Tensor:
    """Circle loss over all pairs of a batch (Sun et al., CVPR 2020), mean over images.

    v  (N, C) vectors, compared by cosine; y (N,) identities, every one with two images or more
    """
    with torch.autocast(v.device.type, enabled=False):  # the scale multiplies the rounding of a cosine
        v = F.normalize(full(v))
        cosine, same = v @ v.T, y[:, None] == y
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    pull = -scale * F.relu(1 + margin - cosine).detach() * (cosine - (1 - margin))
    push = scale * F.relu(cosine + margin).detach() * (cosine - margin)
    pull = pull.masked_fill(~same | itself, -torch.inf).logsumexp(dim=1)
    push = push.masked_fill(same, -torch.inf).logsumexp(dim=1)
    return F.softplus(pull + push).mean()
