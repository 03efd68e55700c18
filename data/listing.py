"""Listing image files, and saying what was read and what was left out. No torch here.

What the listing functions meet and do not read, and what readers assume, is kept until `say_reading` says it in a line.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def unsaid() -> Iterator[None]:
    """Forget what is left out and noted inside the context, where images are listed that the command does not use."""
    left_out, notes = dict(_left_out), dict(_notes)
    try:
        yield
    finally:
        for kept, before in ((_left_out, left_out), (_notes, notes)):
            kept.clear()
            kept.update(before)


# --------------------------------------------------------------------------------------------- listing
def list_images(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name, dangling links included. Leaves out all other files."""
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
            leave_out(path, "not an image")
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
        raise UserError(f"{option} {source}: no images in it or below")
    return paths


# ---------------------------------------------------------------------------------------------- saying it
def say_reading(sides: Mapping[str, ImageList | list[Path]]) -> dict[str, Any]:
    """Log what was read, by split or folder, and in a second line what was left out or assumed, if anything.

    Returns both, ready for JSON: `{"read": {name: {"images", "identities", "cameras"}}, "left_out": {reason: {"count",
    "first"}}, "assumed": [...]}`; identities without junk and distractors. The next call begins with nothing.
    """
    read: dict[str, dict[str, int]] = {}
    for name, images in sides.items():
        read[name] = {"images": len(images)}
        if not isinstance(images, list):
            read[name]["identities"] = len(set(images.pids.tolist()) - {-1, 0})
            read[name]["cameras"] = len(set(images.camids.tolist()) - {0})
    reading = {"read": read, "left_out": _by_reason(), "assumed": list(_notes)}
    _left_out.clear()
    _notes.clear()
    first, second = in_words(reading)
    if first:
        log.info("read: %s", first)
    if second:
        log.warning("%s", second)
    return reading


def _by_reason() -> dict[str, dict[str, Any]]:
    reasons = defaultdict(list)
    for path, reason in _left_out.items():
        reasons[reason].append(path.name)
    return {reason: {"count": len(names), "first": names[:3]} for reason, names in reasons.items()}


def in_words(reading: dict[str, Any]) -> tuple[str, str]:
    """What was read, and what was left out or assumed, as `say_reading` logs it; empty texts if nothing was."""
    sides = []
    for name, n in reading["read"].items():
        people = ""
        if "identities" in n:
            people = f" of {_counted(n['identities'], 'identity', 'identities')}, {_counted(n['cameras'], 'camera')}"
        sides.append(f"{name} {_counted(n['images'], 'image')}{people}")
    parts = [
        f"{n['count']} {reason} ({', '.join(n['first'])}{', ...' if n['count'] > len(n['first']) else ''})"
        for reason, n in reading["left_out"].items()
    ]
    count = sum(n["count"] for n in reading["left_out"].values())
    left_out = [f"left out {_counted(count, 'file')}: {', '.join(parts)}"] if parts else []
    return "; ".join(sides), "; ".join(left_out + reading["assumed"])


def _counted(n: int, one: str, many: str | None = None) -> str:
    return f"{n or 'no'} {one if n == 1 else many or one + 's'}"
