"""FID, KID, SSIM and LPIPS of folders of images; docs/evaluation.md says exactly what is measured.

A `Network` maps images (N, 3, H, W) uint8 to features (N, D), a `PairMeasure` two such batches to (N,) values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights
from tqdm import tqdm

from data.folders import ImageList
from data.images import iter_images, normalise, to_uint8
from files import read_tensors
from gen_eval.similarity import ssim
from reIDmodel import IdNet
from runs.weights import find_weights
from utils import UserError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
Network = Callable[[Tensor], Tensor]
PairMeasure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Protocol:
    """What a score depends on besides the images and the networks."""

    size: tuple[int, int] = (128, 64)  # height and width that every image is resized to
    count: int | None = None  # images to draw from each folder; None: all
    pairs: int = 2000  # random pairs of images of one identity
    seed: int = 0
    batch_size: int = 32


# -------------------------------------------------------------------------------------------- networks
def load_inception(device: torch.device) -> Network:
    """The Inception of published FIDs (TensorFlow's of 2015, with its resizing): images to (N, 2048)."""
    path = _weights(URL_INCEPTION_V3)
    try:
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{path}: not the weights of that Inception; replace the file") from None
    net.to(device)
    return lambda images: net(images)[0]


def trunk_features(net: IdNet) -> Network:
    """The pooled trunk of a teacher, in the place of Inception: images to (N, net.channels)."""
    return lambda images: net.pool(net.feature_map(normalise(images))).flatten(1)


def load_lpips(device: torch.device) -> PairMeasure:
    """LPIPS 0.1 on AlexNet: pairs of images (N, 3, H, W) uint8, H and W at least 32, to distances (N,)."""
    path = _weights(AlexNet_Weights.IMAGENET1K_V1.url)  # where the library reads it
    try:
        net = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).net.to(device)
    except (RuntimeError, TypeError, AttributeError):
        raise UserError(f"{path}: not the weights of AlexNet; replace the file") from None
    return lambda a, b: net(a / 255, b / 255, normalize=True).flatten()


def _weights(url: str) -> Path:
    """The file of `url` in PyTorch's cache, which holds nothing but tensors."""
    path = find_weights(url, None, "the scores that need no weights")
    read_tensors(path)  # the libraries would unpickle anything
    return path


# -------------------------------------------------------------------------------------------- measures
def image_features(images: ImageList, network: Network, protocol: Protocol, device: torch.device) -> Tensor:
    """Features (n, D) float64 of all images, on the CPU. Raises UserError for a file that cannot be decoded."""
    with torch.inference_mode():
        batches = tqdm(_byte_batches(images.paths, protocol), "feature batches", leave=False, disable=None)
        return torch.cat([network(x.to(device)).double().cpu() for x in batches])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID between two sets of features (n, D) and (m, D), float64, n and m at least 2."""
    real, fake = map(fid_features_to_statistics, (real, fake))
    return fid_statistics_to_metric(real, fake, verbose=False)[KEY_METRIC_FID]


def kernel_distance(real: Tensor, fake: Tensor, seed: int) -> float:
    """KID: the unbiased MMD^2 of the kernel (x.y / D + 1)^3, mean over random subsets of equal size."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    options = dict(kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False)
    return kid_features_to_metric(real, fake, **options)[KEY_METRIC_KID_MEAN]


def draw_pairs(pids: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, 2) indices of two different images of one identity, drawn uniformly: first the identity, then the images.

    Raises UserError if no identity has two images.
    """
    order = np.argsort(pids, kind="stable")
    people, first, size = np.unique(pids[order], return_index=True, return_counts=True)
    several = np.flatnonzero(size > 1)
    if not len(several):
        raise UserError(
            f"none of the {len(people)} identities has two images; name the files like 0002_c1s1_000451_03.jpg or "
            "give a sub-folder per person"
        )
    rng = np.random.default_rng(seed)
    person = several[rng.integers(0, len(several), count)]
    a = rng.integers(0, size[person])
    b = rng.integers(0, size[person] - 1)
    b += b >= a
    return order[np.stack([first[person] + a, first[person] + b], axis=1)]


def pair_scores(
    images: ImageList, pairs: np.ndarray, measures: dict[str, PairMeasure], protocol: Protocol, device: torch.device
) -> dict[str, float]:
    """The mean of every measure over pairs (n, 2) of image indices."""
    values: dict[str, list[Tensor]] = {name: [] for name in measures}
    sides = [_byte_batches([images.paths[i] for i in side], protocol) for side in pairs.T]
    with torch.inference_mode():
        for a, b in tqdm(zip(*sides, strict=True), "batches of pairs", leave=False, disable=None):
            for name, measure in measures.items():
                values[name].append(measure(a.to(device), b.to(device)).double().cpu())
    return {name: float(torch.cat(parts).mean()) for name, parts in values.items()}


def _byte_batches(paths: list[Path], protocol: Protocol) -> Iterator[Tensor]:
    for x in iter_images(paths, *protocol.size, protocol.batch_size):
        yield torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------- all scores
def score(
    sides: dict[str, ImageList],
    protocol: Protocol,
    device: torch.device,
    *,
    real_vs_real: bool = False,
    network: Network | None = None,
    lpips: PairMeasure | None = None,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Compute every score whose weights and images are there.

    sides           the images, "real" and possibly "fake", of which `protocol.count` are drawn from each side
    real_vs_real    also FID and KID between two random halves of the real images, which are the floor
    network, lpips  replace Inception and LPIPS

    Returns `{"real" or "fake": {"images", "fid", "kid", "ssim", "lpips"}}` without the scores that were not computed,
    and a line for each of those that says why. FID and KID of "real" are those between its halves. Raises UserError for
    fewer images than `protocol.count` or two (four for halves), an undecodable image, and if there is no score at all.
    """
    sides = {name: draw_images(images, name, protocol) for name, images in sides.items()}
    if real_vs_real and len(sides["real"]) < 4:
        raise UserError(f"--real: {len(sides['real'])} images cannot be halved; give four or more")
    scores: dict[str, dict[str, float]] = {name: {"images": len(images)} for name, images in sides.items()}
    missing = []

    if real_vs_real or "fake" in sides:
        try:
            network = network or load_inception(device)
        except UserError as error:
            missing.append(f"FID, KID: {error}")
        else:
            features = {name: image_features(images, network, protocol, device) for name, images in sides.items()}
            compared = {"fake": (features["real"], features["fake"])} if "fake" in sides else {}
            if real_vs_real:
                order = np.random.default_rng(protocol.seed).permutation(len(features["real"]))
                first, second = order[: len(order) // 2], order[len(order) // 2 :]
                compared["real"] = features["real"][first], features["real"][second]
            for name, (a, b) in compared.items():
                scores[name] |= {"fid": frechet_distance(a, b), "kid": kernel_distance(a, b, protocol.seed)}

    measures: dict[str, PairMeasure] = {"ssim": ssim}
    try:
        measures["lpips"] = lpips or load_lpips(device)
    except UserError as error:
        missing.append(f"LPIPS: {error}")
    for name, images in sides.items():
        try:
            pairs = draw_pairs(images.pids, protocol.pairs, protocol.seed)
        except UserError as error:
            missing.append(f"SSIM, LPIPS of {name}: {error}")
        else:
            scores[name] |= pair_scores(images, pairs, measures, protocol, device)
    if all(len(row) == 1 for row in scores.values()):
        raise UserError("no score can be computed. " + ". ".join(missing))
    return scores, missing


def draw_images(images: ImageList, name: str, protocol: Protocol) -> ImageList:
    """The images of one side to score. Raises UserError if there are fewer than `protocol.count` or two."""
    if len(images) < max(2, protocol.count or 0):
        asked = f"{protocol.count} asked for; lower --count or add images" if protocol.count else "two are needed"
        raise UserError(f"--{name} {images.paths[0].parent}: {len(images)} images, {asked}")
    if protocol.count is None:
        return images
    chosen = np.random.default_rng(protocol.seed).choice(len(images), protocol.count, replace=False)
    return images.select(np.isin(np.arange(len(images)), chosen))
