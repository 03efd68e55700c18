"""Generated swaps against the renderer's own drawing of them (embedded data only).

Over a whole image, copying the structure image looks good because most pixels do not change. The main error is
therefore taken on the pixels in which the true swap differs from the structure image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from data.folders import ImageList
from data.images import iter_images, normalise, to_uint8
from gen_eval.similarity import ssim
from mannequins.dataset import Factors
from reid_eval.features import Features, embed_images
from reid_eval.ranking import main_setting
from reid_eval.report import evaluate_features
from utils import UserError

CHANGED = 8  # grey levels in any channel from which a pixel counts as changed
MOST_PSNR = 100.0  # dB, for equal images, whose ratio would be infinite
COMPARED = ("generated", "copy", "recoloured", "reconstruction", "other")


@dataclass(frozen=True)
class Swaps:
    """n swaps of images i (appearance) and j (structure), indices into an image list.

    `images` has (n, H, W, 3) uint8 under these names, of photographs without those that only the renderer knows:
    appearance, structure  the two source images
    generated              by the model
    true                   by the renderer
    copy                   the structure image itself
    recoloured             the structure image with the true swap's colours on its own brightness (`recolour_pixels`)
    reconstruction         the structure image by the model, from its own two codes
    other                  the renderer's swap with the appearance of a third person
    """

    appearance: np.ndarray  # (n,)
    structure: np.ndarray  # (n,)
    images: dict[str, np.ndarray]


def choose_pairs(people: Sequence[object], count: int, seed: int) -> np.ndarray:
    """(count, 3) indices of images of three different people, drawn from `seed`: appearance, structure, other.

    Raises UserError for fewer than three people.
    """
    if len(set(people)) < 3:
        raise UserError(f"{len(set(people))} people to swap between; a swap against the truth needs three at least")
    rng, third = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    chosen = []
    while len(chosen) < count:
        i, j = rng.integers(0, len(people), 2)
        if people[i] != people[j]:
            k = third.integers(0, len(people))
            while people[k] in (people[i], people[j]):
                k = third.integers(0, len(people))
            chosen.append((i, j, k))
    return np.array(chosen)


def draw_swaps(
    swap: Callable[[Tensor, Tensor], Tensor],
    factors: Factors,
    images: ImageList,
    *,
    size: tuple[int, int],
    count: int = 256,
    seed: int = 0,
    batch_size: int = 32,
) -> Swaps:
    """`count` swaps of random pairs of images, by the model and by the renderer.

    swap     maps two (N, 3, H, W) normalised batches, appearance and structure, to generated images
    factors  of the embedded data set
    images   to draw from; those that are not in `factors` are left out
    size     (height, width) of the model's images, to which the true swaps are resized
    Raises UserError for fewer than three people and for an undecodable image.
    """
    names = [path.name for path in images.paths]
    known = np.flatnonzero([name in factors.images for name in names])
    chosen = known[choose_pairs([factors.images[names[i]].person for i in known], count, seed)]
    sources = [iter_images([images.paths[i] for i in role], *size, batch_size) for role in chosen.T[:2]]
    with torch.no_grad():
        batches = [
            [to_uint8(x) for x in (x_app, x_str, swap(x_app, x_str), swap(x_str, x_str))]
            for x_app, x_str in zip(*sources, strict=True)
        ]
    parts = map(np.concatenate, zip(*batches, strict=True))
    drawn = dict(zip(("appearance", "copy", "generated", "reconstruction"), parts, strict=True))
    for name, role in (("true", 0), ("other", 2)):
        swaps = [factors.true_swap(names[row[role]], names[row[1]]) for row in chosen]
        drawn[name] = np.stack([shrink(image, size) for image in swaps])
    drawn["recoloured"] = recolour_pixels(drawn["copy"], drawn["true"])
    return Swaps(chosen[:, 0], chosen[:, 1], drawn)


def recolour_pixels(structure: np.ndarray, true: np.ndarray) -> np.ndarray:
    """What colours alone can do: each pixel's mean over the channels from `structure`, the rest from `true`.

    Both are (n, H, W, 3) uint8. `trainer.recolour` does so with normalised images, whose mean is what the encoder sees.
    """
    signed = structure.mean(axis=3, keepdims=True) + true - true.mean(axis=3, keepdims=True)
    return signed.clip(0, 255).round().astype(np.uint8)


def image_errors(images: np.ndarray, truth: np.ndarray, changed: np.ndarray) -> dict[str, np.ndarray]:
    """Errors (n,) of n images against their truths, both (n, H, W, 3) uint8, by name; `changed` is (n, H, W) bool.

    "changed"     mean absolute difference in grey levels (0..255) on the changed pixels; 0 where there is none
    "l1"          the same on all pixels
    "brightness"  like "changed", of the channels' mean, which the structure encoder sees of a grey image
    "colour"      like "changed", of what is left without that mean
    "psnr"        dB, at most MOST_PSNR
    "ssim"        with a Gaussian window of 11 pixels, mean over the channels
    """
    signed = images.astype(np.float64) - truth
    l1, gray = np.abs(signed).mean(axis=3), signed.mean(axis=3)

    def on_changed(error: np.ndarray) -> np.ndarray:
        return (error * changed).sum(axis=(1, 2)) / np.maximum(changed.sum(axis=(1, 2)), 1)

    mse = np.maximum((signed**2).mean(axis=(1, 2, 3)), 255**2 / 10 ** (MOST_PSNR / 10))
    a, b = (torch.from_numpy(side).permute(0, 3, 1, 2) for side in (images, truth))
    return {
        "changed": on_changed(l1),
        "brightness": on_changed(np.abs(gray)),
        "colour": on_changed(np.abs(signed - gray[..., None]).mean(axis=3)),
        "l1": l1.mean(axis=(1, 2)),
        "psnr": 10 * np.log10(255**2 / mse),
        "ssim": torch.cat([ssim(*chunk) for chunk in zip(a.split(32), b.split(32), strict=True)]).numpy(),
    }


def changed_pixels(swaps: Swaps) -> np.ndarray:
    """(n, H, W) bool: where the true swap differs from the structure image. Raises UserError where no swap does."""
    changed = np.abs(swaps.images["true"].astype(int) - swaps.images["copy"]).max(axis=3) >= CHANGED
    if not changed.any():
        raise UserError("none of the true swaps changes a pixel; draw more swaps")
    return changed


def measure_swaps(swaps: Swaps) -> dict[str, dict[str, float]]:
    """`{row: {key: mean}}` for COMPARED and the keys of `image_errors`, over the swaps that change anything.

    All rows are measured on the same changed pixels against the true swap, the reconstruction against the structure
    image. Raises UserError where no swap changes a pixel.
    """
    changed = changed_pixels(swaps)
    counted, rows = changed.any(axis=(1, 2)), {}
    for name in COMPARED:
        truth = swaps.images["copy" if name == "reconstruction" else "true"]
        errors = image_errors(swaps.images[name], truth, changed)
        rows[name] = {key: float(values[counted].mean()) for key, values in errors.items()}
        rows[name]["pairs"] = int(counted.sum())
    return rows


def take_apart(images: np.ndarray, changed: np.ndarray) -> dict[str, np.ndarray]:
    """Images (n, H, W, 3) as a sum of three parts on the changed pixels (n, H, W).

    "shade"    (n, H, W, 1) the channels' mean, blurred within the changed pixels (sigma: a sixteenth of the height)
    "pattern"  (n, H, W, 1) the rest of that mean, which is what the structure encoder sees of a grey image
    "colour"   (n, H, W, 3) the image less that mean
    """
    gray, sigma = images.mean(axis=3), (0, images.shape[1] / 16, images.shape[1] / 16)
    # Unchanged pixels are equal in structure image and truth. If they were mixed in, they would count as both.
    total, weight = (gaussian_filter(values, sigma) for values in (gray * changed, changed.astype(np.float64)))
    shade = np.where(changed, total / np.maximum(weight, 1e-9), gray)
    return {"shade": shade[..., None], "pattern": (gray - shade)[..., None], "colour": images - gray[..., None]}


def clothes_shares(swaps: Swaps) -> dict[str, dict[str, float]]:
    """Whose clothes the generated swaps wear: `{part: {"structure": a, "truth": b}}` for the parts of `take_apart`.

    Least squares over the changed pixels of all swaps: a generated swap is about a times the structure image plus b
    times the true swap, each less its mean. A copy has (1, 0), the true swap (0, 1), and an image unlike both (0, 0).
    Raises UserError where no swap changes a pixel.
    """
    changed = changed_pixels(swaps)
    sides = (take_apart(swaps.images[name], changed) for name in ("generated", "copy", "true"))
    generated, structure, truth = ({name: part[changed] for name, part in side.items()} for side in sides)
    shares = {}
    for name, shown in generated.items():
        both = np.stack([structure[name], truth[name]], axis=-1)  # (pixels, 1 or 3, 2)
        both, shown = (both - both.mean(axis=0)).reshape(-1, 2), (shown - shown.mean(axis=0)).reshape(-1)
        solution, *_ = np.linalg.lstsq(both, shown, rcond=None)
        shares[name] = dict(zip(("structure", "truth"), solution.tolist(), strict=True))
    return shares


# ------------------------------------------------------------------------------------- does the teacher agree
def _rows_and_sources(swaps: Swaps) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Row, its images, and the index of the images whose identity they should have."""
    for row in ("appearance", "true", *COMPARED):
        if row in swaps.images:  # photographs have no true swaps
            yield row, swaps.images[row], swaps.structure if row == "reconstruction" else swaps.appearance


def recognise(
    net: nn.Module, size: tuple[int, int], swaps: Swaps, images: ImageList, gallery: Features, *, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Re-identification by `net` with the images of swaps as queries: `{row: {convention: {"rank1", "mAP", ...}}}`.

    A query has the identity and camera of its appearance image; a reconstruction has those of the structure image. The
    row "appearance" has the real images.

    size    height and width of the images that `net` reads
    images  the list that `swaps` were drawn from
    """
    result = {}
    for row, pictures, source in _rows_and_sources(swaps):
        pixels = torch.from_numpy(np.stack([shrink(image, size) for image in pictures])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts = [embed_images(net, normalise(x).to(device)).float().cpu() for x in pixels.split(64)]
        features = torch.cat(parts).numpy()
        queries = Features(features, images.pids[source], images.camids[source])
        setting, _ = main_setting(features.shape[1])
        results = evaluate_features(queries, gallery)
        result[row] = {part.convention: part.numbers for part in results if part.setting == setting}
    return result


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a (H, W, 3) uint8 image to (height, width) as the data pipeline does."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
