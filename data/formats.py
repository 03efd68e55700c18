"""Which files are images: by their suffix, or by their content where a name has none."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

from PIL import Image

# Pillow opens more: formats that start other programs, and formats that no camera or editor of photographs writes.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)
NEEDS_PLUGIN = (".heic", ".heif", ".hif")  # decoded if pillow-heif is installed


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow decodes."""
    Image.init()
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of files in these formats, in lower case."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known) | {".jfif"}


def is_image(path: Path) -> bool:
    """Whether a file is to be read as an image. Dangling links and damaged files count by their suffix."""
    if path.suffix:
        return path.suffix.lower() in suffixes()
    try:
        with Image.open(path, formats=formats()):
            return True
    except Exception:  # Pillow raises many kinds for a foreign file
        return False
