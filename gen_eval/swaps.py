"""Generated swaps against the renderer's own drawing of them (embedded data only).

Over a whole image, copying the structure image looks good because most pixels do not change; the error is therefore
taken on the pixels in which the true swap differs from the structure image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.mannequins import Factors
from data.pairs import decode_images, normalise
from visual_tools.grid import to_uint8

CHANGED = 8  # grey levels in any channel from which a pixel counts as changed


@dataclass(frozen=True)
class SwapError:
    """Mean absolute error in grey levels (0..255) on the changed pixels, over `pairs` swaps."""

    pairs: int
    generated: float
    copy: float

    @property
    def reduction(self) -> float:
        """How far the generated swap's error lies below that of copying the structure image; 1 is perfect."""
        return 1 - self.generated / self.copy

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"reduction": self.reduction}


def choose_pairs(names: Sequence[str], people: Sequence[int], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` (appearance, structure) pairs of images of different identities, drawn from `seed`."""
    rng = np.random.default_rng(seed)
    pairs = []
    while len(pairs) < count:
        i, j = rng.integers(0, len(names), 2)
        if people[i] != people[j]:
            pairs.append((names[i], names[j]))
    return pairs


def swap_error(generated: np.ndarray, true: np.ndarray, structure: np.ndarray) -> tuple[float, float]:
    """Error of the generated swap and of copying the structure image on the changed pixels; (H, W, 3) uint8 each."""
    true, structure = true.astype(float), structure.astype(float)
    changed = np.abs(true - structure).max(axis=2) >= CHANGED
    if not changed.any():
        return 0.0, 0.0
    return np.abs(generated - true)[changed].mean(), np.abs(structure - true)[changed].mean()


def measure_swaps(
    swap: Callable[[Tensor, Tensor], Tensor],
    factors: Factors,
    folder: Path,
    *,
    size: tuple[int, int],
    count: int = 256,
    seed: int = 0,
    batch_size: int = 32,
) -> SwapError:
    """The mean errors of `swap(appearance images, structure images)` over pairs of test images.

    Args:
        swap: maps two (N, 3, H, W) normalised batches to generated images.
        factors: of the embedded data set that holds the images.
        folder: of images to draw from, the data set's `query/` for instance.
        size: (height, width) of the model's images, to which the true swaps are brought.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name in factors.images)
    pairs = choose_pairs(names, [factors.images[name].person for name in names], count, seed)
    errors = []
    for start in range(0, count, batch_size):
        chunk = pairs[start : start + batch_size]
        x_app, x_str = (normalise(decode_images([folder / pair[role] for pair in chunk], *size)) for role in (0, 1))
        with torch.no_grad():
            generated = to_uint8(swap(x_app, x_str)).astype(float)
        structures = to_uint8(x_str)
        for image, structure, (i, j) in zip(generated, structures, chunk, strict=True):
            errors.append(swap_error(image, shrink(factors.true_swap(i, j), size), structure))
    generated_error, copy_error = np.mean([e for e in errors if e[1] > 0], axis=0)
    return SwapError(len(errors), float(generated_error), float(copy_error))


def shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring a (H, W, 3) uint8 image to (height, width) as the data pipeline does."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
