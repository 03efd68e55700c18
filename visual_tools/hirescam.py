"""Where a feature of the id net comes from: one map per head and image.

The test-time vector e of a head is an affine function of the pooled feature map A (C, h, w). Every position and channel
contributes gradient times activation to its energy E = |e|^2 / 2; summed over the channels this is

    M[y, x] = max(0, sum over c of dE/dA[c, y, x] * A[c, y, x]),

which is HiResCAM (Draelos and Carin, arXiv:2011.08891) with the energy instead of a class score, because test
identities have no class. Under average pooling it equals Grad-CAM (Selvaraju et al., arXiv:1610.02391) up to a factor.
Under max pooling, which the published net uses, Grad-CAM would also credit positions that the pooling dropped; this map
credits each channel at its maximum. Before the max(0, .), the map sums to the inner product of dE/dv and the pooled
vector v.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.images import decode_images, normalise, to_uint8
from data.listing import find_images, say_reading
from reIDmodel import IdNet
from runs.load import open_net
from utils import pick_device
from visual_tools.figure import check_free, write_grid


def activation_maps(net: IdNet, x: Tensor) -> Tensor:
    """The maps M (N, heads, h, w) of normalised images (N, 3, H, W), not scaled; `net` is in eval mode."""
    with torch.no_grad():
        m = net.feature_map(x)
    m.requires_grad_()
    with torch.enable_grad():
        embeddings = net.embed_map(m)
        gradients = [torch.autograd.grad(e.square().sum() / 2, m, retain_graph=True)[0] for e in embeddings]
    return torch.stack([(gradient * m.detach()).sum(1).clamp(min=0) for gradient in gradients], dim=1)


def overlay(image: np.ndarray, activation: Tensor) -> np.ndarray:
    """The image (H, W, 3) uint8 in gray under its map (h, w) in colours, scaled to the map's maximum."""
    fine = F.interpolate(activation[None, None].float(), image.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    fine = (fine / fine.max().clamp(min=1e-12)).cpu().numpy()
    colours = colormaps["viridis"](fine, bytes=True)[..., :3]
    gray = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
    return (0.5 * gray + 0.5 * colours).round().astype(np.uint8)


def draw(args: argparse.Namespace) -> None:
    """Write the figure of show_activation.py: a row per image, a column per head."""
    paths = [path for source in args.input for path in find_images(source, "--input")]
    say_reading({"input": paths})
    if len(paths) > args.count:
        print(f"the first {args.count} of {len(paths)} images; --count shows more")
    device = pick_device(args.device)
    tested = open_net(args, device)
    default = "activation.png" if args.teacher else f"images/activation_{tested.iteration:08d}.png"
    out = check_free(Path(args.out or tested.folder / default), suffix=".png", force=args.force)
    x = normalise(decode_images(paths[: args.count], *tested.size))
    rows = []
    for image, single in zip(to_uint8(x), x.split(1), strict=True):
        maps = activation_maps(tested.net, single.to(device))[0]
        rows.append([image, *(overlay(image, activation) for activation in maps)])
    write_grid(out, rows, column_labels=["image", *tested.net.head_names], cell_height=192)
    print(f"activation maps written to {out}")
