"""Where a feature of the id net comes from: one map per head and image.

The test-time vector e of a head is an affine function of the pooled feature map A (C, h, w). Of its energy
E = |e|^2 / 2, every position and channel contributes gradient times activation; summed over the channels this is

    M[y, x] = max(0, sum over c of dE/dA[c, y, x] * A[c, y, x]),

which is HiResCAM (Draelos and Carin, arXiv:2011.08891) with the energy in the place of a class score: the
identities looked at are not those of the training. Under average pooling it is Grad-CAM (Selvaraju et al.,
arXiv:1610.02391) up to a factor. Under max pooling, the published net's, Grad-CAM would also credit positions
that the pooling dropped; here each channel counts where its maximum is. Before the max(0, .), the map sums to
the inner product of dE/dv and the pooled vector v.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reIDmodel import IdNet

# Dark blue over green to yellow, of even steps in lightness; anchors at equal distances.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)


def activation_maps(net: IdNet, x: Tensor) -> Tensor:
    """The maps M (N, heads, h, w) of normalised images (N, 3, H, W), unscaled; `net` is in eval mode."""
    with torch.no_grad():
        m = net.feature_map(x)
    m.requires_grad_()
    with torch.enable_grad():
        embeddings = net.embed_map(m)
        gradients = [torch.autograd.grad(e.square().sum() / 2, m, retain_graph=True)[0] for e in embeddings]
    return torch.stack([(gradient * m.detach()).sum(1).clamp(min=0) for gradient in gradients], dim=1)


def overlay(image: np.ndarray, activation: Tensor) -> np.ndarray:
    """An image (H, W, 3) uint8 in gray under its map (h, w) in colours, scaled to the map's greatest value."""
    fine = F.interpolate(activation[None, None].float(), image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    fine = (fine / fine.max().clamp(min=1e-12)).cpu().numpy()
    anchors = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(fine, anchors, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    gray = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
    return (0.5 * gray + 0.5 * colours).round().astype(np.uint8)
