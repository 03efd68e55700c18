"""Files as people have them: every format, transparency, names without suffix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from data.formats import is_image
from data.images import BACKGROUND, load_image

SIZE = (20, 40)


def picture() -> np.ndarray:
    """(40, 20, 3) uint8: smooth, so that lossy formats keep it."""
    rows, columns = np.mgrid[0:40, 0:20]
    return np.stack([5 * rows, 10 * columns, 100 + 0 * rows], axis=2).astype(np.uint8)


# ------------------------------------------------------------------------------------------- transparency
def shown(kind: str, hidden: int, path: Path) -> np.ndarray:
    """A picture whose left half is transparent over the colour `hidden`, saved as `kind` and read."""
    pixels, alpha = picture(), np.full((40, 20), 255, np.uint8)
    pixels[:, :10], alpha[:, :10] = hidden, 0
    image = Image.fromarray(np.dstack([pixels, alpha]), "RGBA")
    options = {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "P":
        image = Image.fromarray(np.where(alpha == 0, 0, 1).astype(np.uint8), "P")
        image.putpalette([hidden] * 3 + [40, 90, 200])
        options = {"transparency": 0}
    elif kind == "RGB, one colour":
        image = Image.fromarray(np.where(alpha[..., None] == 0, np.uint8([hidden, 1, 2]), pixels), "RGB")
        options = {"transparency": (hidden, 1, 2)}
    suffix = {"TIFF": ".tif", "WEBP": ".webp"}.get(kind, ".png")
    if kind == "WEBP":
        options = {"lossless": True, "exact": True}
    image.save(path / f"{hidden}{suffix}", **options)
    return np.asarray(load_image(path / f"{hidden}{suffix}"))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB, one colour", "TIFF", "WEBP"])
def test_hidden_colours_stay_hidden(tmp_path: Path, kind: str) -> None:
    black, white = shown(kind, 0, tmp_path), shown(kind, 255, tmp_path)
    assert np.array_equal(black, white)
    assert (black[:, :10] == BACKGROUND).all() and (black[:, 10:] != BACKGROUND).any()


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", SIZE, (0, 0, 0, 102)).save(tmp_path / "a.png")
    assert (np.asarray(load_image(tmp_path / "a.png")) == 255 - 102).all()


# ------------------------------------------------------------------------------------------------ formats
@pytest.mark.parametrize(
    "suffix", "jpg JPEG jfif jpe png bmp gif webp tif TIFF ppm pgm tga jp2 avif".split() + [""], ids=str
)
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / (f"a.{suffix}" if suffix else "IMG_0001")
    image = Image.fromarray(picture()).convert("L" if suffix == "pgm" else "RGB")
    image.save(path, format={"": "JPEG", "jfif": "JPEG", "jpe": "JPEG"}.get(suffix))
    assert is_image(path)
    expected = np.asarray(image.convert("RGB")).astype(int)
    got = np.asarray(load_image(path)).astype(int)
    assert got.shape == expected.shape and np.abs(got - expected).mean() < (12 if suffix == "gif" else 6)


def test_what_is_no_image(tmp_path: Path) -> None:
    for name in ("notes.txt", "README", "film.mp4", "data.csv"):
        (tmp_path / name).write_text("words")
        assert not is_image(tmp_path / name)
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    assert is_image(tmp_path / "gone.jpg"), "a dangling link is an image that cannot be read"
