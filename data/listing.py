"""Listing image files, and saying what was read and what was left out. No torch here.

What the listing functions meet and do not read, and what readers assume, is kept until `say_reading` says it in a line.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.formats import NEEDS_PLUGIN, is_image
from utils import UserError

if TYPE_CHECKING:
    from data.folders import ImageList

log = logging.getLogger(__name__)
CLUTTER = {"thumbs.db", "desktop.ini", "__macosx", "icon\r"}  # besides hidden files; in lower case
TEXTS = {".txt", ".csv", ".json", ".yaml", ".yml", ".xml", ".md", ".mat", ".html", ".pdf", ".npz"}
DEEPER = "in a folder inside the folder of images"

_left_out: dict[Path, str] = {}  # file to reason
_notes: dict[str, None] = {}  # what was assumed or renumbered, in order


def leave_out(path: Path, reason: str) -> None:
    """Remember that a file is not read."""
    _left_out[path] = reason


def note(what: str) -> None:
    """Remember what was assumed or renumbered, with its counts."""
    _notes[what] = None


# --------------------------------------------------------------------------------------------- listing
def list_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name, dangling links among them; others are left out."""
    images = []
    for path in _visible(folder):
        try:
            kind = path.stat().st_mode
        except OSError:  # a link that leads nowhere, or round in a circle
            kind = stat.S_IFREG
        if stat.S_ISDIR(kind):
            continue
        if stat.S_ISREG(kind) and is_image(path):
            images.append(path)
        elif path.suffix.lower() in NEEDS_PLUGIN:
            leave_out(path, f"{path.suffix.lower()}, which needs `pip install pillow-heif`")
        elif path.suffix.lower() not in TEXTS:
            leave_out(path, "no images")
    return images


def list_folders(folder: Path) -> list[str]:
    """The names of the folders directly in `folder`, sorted."""
    return [path.name for path in _visible(folder) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted by name, without hidden ones and known clutter."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); set its permissions, or move it away") from None
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in CLUTTER]


def leave_out_deeper(folder: Path) -> None:
    """Leave out the images in folders inside `folder`, which is to hold images alone; links are not followed."""
    for name in list_folders(folder) if not folder.is_symlink() else ():
        for path in walk_images(folder / name) if not (folder / name).is_symlink() else ():
            leave_out(path, DEEPER)


def walk_images(source: Path) -> list[Path]:
    """The image files in a folder and its sub-folders, sorted folder by folder; links to folders are not followed."""
    paths = []
    for folder, inner, _ in os.walk(source, onerror=lambda error: log.warning("%s; left out", error)):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name.lower() not in CLUTTER)
        paths += list_images(Path(folder))
    return paths


def find_images(source: str | Path, option: str) -> list[Path]:
    """The image files of a folder and its sub-folders; or the one file that `source` is.

    Raises UserError that names `option`, where `source` came from, if it is missing or holds no image.
    """
    source = Path(source).expanduser()
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{option} {source}: no such file or folder")
    if not (paths := walk_images(source)):
        raise UserError(f"{option} {source}: no images in it or below{_in_words()}")
    return paths


# ---------------------------------------------------------------------------------------------- saying it
def say_reading(sides: dict[str, ImageList]) -> dict[str, Any]:
    """Log what was read, by split, and in a second line what was left out or assumed, if anything.

    Returns both, ready for JSON: `{"read": {split: {"images", "identities", "cameras"}}, "left_out": {reason: count},
    "assumed": [...]}`. The next call begins anew.
    """
    read = {
        name: {
            "images": len(images),
            "identities": len({token for token, pid in zip(images.tokens, images.pids, strict=True) if pid >= 0}),
            "cameras": len(set(images.camids.tolist()) - {0}),
        }
        for name, images in sides.items()
    }
    lines = [
        f"{name} {n['images']} images of {n['identities']} identities, {n['cameras'] or 'no'} cameras"
        for name, n in read.items()
    ]
    log.info("read: %s", "; ".join(lines))
    if words := _in_words():
        log.warning("%s", words.removeprefix("; "))
    counts = {reason: len(paths) for reason, paths in _by_reason().items()}
    reading = {"read": read, "left_out": counts, "assumed": list(_notes)}
    _left_out.clear()
    _notes.clear()
    return reading


def _by_reason() -> dict[str, list[Path]]:
    reasons = defaultdict(list)
    for path, reason in _left_out.items():
        reasons[reason].append(path)
    return reasons


def _in_words() -> str:
    """What was left out, with counts and the first names, and what was assumed."""
    parts = [
        f"{len(paths)} {reason} ({', '.join(path.name for path in paths[:3])}{', ...' if len(paths) > 3 else ''})"
        for reason, paths in _by_reason().items()
    ]
    words = f"; left out {len(_left_out)} files: {'; '.join(parts)}" if parts else ""
    return words + "".join(f"; {what}" for what in _notes)
