"""Whose classes a net's outputs are: two data sets may have as many identities, or give one number to two people."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

from data.folders import ImageList, read_split
from data.generated import SETTINGS
from files import read_json
from utils import UserError

log = logging.getLogger(__name__)


class People(NamedTuple):
    """The people behind the classes of a data set.

    digest     16 hexadecimal digits: equal ones, equal people in the same order
    data_root  where they were read, for messages
    """

    digest: str
    data_root: str


def identify_people(images: ImageList, root: Path) -> People:
    """The people of training images, in the order of their classes.

    An identity is its name and the content of its first picture in train_all, so neither the folder's path nor
    `train_split` matters.
    """
    try:
        pictures = read_split(root, "train_all", need_names=False)
    except UserError:
        pictures = images
    first: dict[str, Path] = {}
    for source in (pictures, images):
        for token, path in zip(source.tokens, source.paths, strict=True):
            first.setdefault(token, path)
    digest = hashlib.sha256()
    for token in images.classes:
        digest.update(os.fsencode(token) + b"\n" + hashlib.sha256(first[token].read_bytes()).digest())
    return People(digest.hexdigest()[:16], str(root))


def people_of_generated(folder: Path, *, soft: bool) -> list[People | None]:
    """The people whose identities the images of a generated data set have, and with `soft` those of its soft labels."""
    settings = read_json(folder / SETTINGS, "generate the data set again") if (folder / SETTINGS).is_file() else {}
    keys = ["identities", "classes"] if soft else ["identities"]
    return [People(str(settings[key]), settings.get("data_root", "?")) if settings.get(key) else None for key in keys]


def require_same_people(theirs: People | None, ours: People, *, what: str, allow: str) -> None:
    """Raise UserError that names both data sets unless `what` has our people.

    theirs  None: not recorded by an earlier version or the release, which a note says
    allow   the option that accepts other people
    """
    if theirs is None:
        log.info("%s does not say whose identities its classes are; only their number was compared", what)
    elif theirs.digest != ours.digest:
        raise UserError(
            f"{what}: its classes are the identities of {theirs.data_root}, which are not those of {ours.data_root}; "
            f"use what was made from this data, or accept it with {allow}"
        )
