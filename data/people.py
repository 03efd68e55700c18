"""Whose classes a net's outputs are: two data sets may have as many identities, or give one number to two people."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.folders import ImageList
from data.generated import SETTINGS
from files import read_json
from utils import UserError

log = logging.getLogger(__name__)
KEPT = 16


class People(NamedTuple):
    """The people behind the classes of a data set.

    mark       a hash of their names in the order of the classes, then hashes of `KEPT` pictures, joined by dashes
    data_root  where they were read, for messages
    """

    mark: str
    data_root: str

    def are(self, them: People) -> bool:
        """Whether these are the same people: the same names, and a quarter of the pictures or more."""
        (names, *pictures), (their_names, *their_pictures) = self.mark.split("-"), them.mark.split("-")
        return names == their_names and 4 * len({*pictures} & {*their_pictures}) >= min(len(pictures), KEPT)


def identify_people(images: ImageList, digests: Sequence[str], root: Path) -> People:
    """The people of training images, of whose files `files.digest_files` made the digests.

    Of all pictures with their identities those with the smallest hashes are kept: a random sample that is the
    same for the same pictures. A new path, or a few pictures more or less, leaves them the same people.
    """
    names = hashlib.sha256(b"\n".join(map(os.fsencode, images.classes))).hexdigest()[:16]
    labelled = (os.fsencode(token) + digest.encode() for token, digest in zip(images.tokens, digests, strict=True))
    pictures = sorted(hashlib.sha256(picture).hexdigest()[:12] for picture in labelled)
    return People("-".join([names, *pictures[:KEPT]]), str(root))


def people_of_generated(folder: Path, *, soft: bool) -> list[People | None]:
    """The people whose identities the images of a generated data set have, and with `soft` those of its soft labels."""
    settings = read_json(folder / SETTINGS, "generate the data set again") if (folder / SETTINGS).is_file() else {}
    keys = ["identities", "classes"] if soft else ["identities"]
    return [People(str(settings[key]), settings.get("data_root", "?")) if settings.get(key) else None for key in keys]


def require_same_people(theirs: People | None, ours: People, *, what: str, allow: str) -> None:
    """Raise UserError that names both data sets unless `what` has our people.

    theirs  None: the release and earlier versions do not record them, which a note says
    allow   the option that accepts different people
    """
    if theirs is None:
        log.info("%s does not say whose identities its classes are; only their number was compared", what)
    elif not theirs.are(ours):
        raise UserError(
            f"{what}: its classes are the identities of {theirs.data_root}, which are not those of {ours.data_root}; "
            f"use what was made from this data, or accept it with {allow}"
        )
