"""Whether training and test images of one data set share people or pictures, which makes results too good. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path

from data.folders import ImageList, read_split
from data.listing import note, unsaid
from data.spelling import spelling
from files import digest_files
from utils import UserError

# MSMT17 numbers the people of its training and its test half from 0 each.
_NUMBERED_BY_HALF = re.compile(r"(^|_)\d{4}_\d{3}_\d{2}_\d{4}(morning|noon|afternoon)_")


def note_overlap(train: ImageList, tests: Mapping[str, ImageList]) -> None:
    """Note what `find_overlap` finds."""
    for line in find_overlap(train, tests):
        note(line)


def find_overlap(train: ImageList, tests: Mapping[str, ImageList], *, by_name: bool = True) -> list[str]:
    """People and pictures of `train` that are in `tests` (query, gallery) too, in words: counts and paths of both.

    People are the same by name: junk is nobody, and identity 0 in a gallery is nobody either. `by_name` is false for
    two data sets, of which both may call somebody 0002.
    """
    lines = []
    by_half = any(_NUMBERED_BY_HALF.search(path.name) for path in train.paths[:1])
    first = {} if by_half or not by_name else _first_of_person(train, 0)
    shared: dict[Hashable, tuple[Path, Path]] = {}
    for split, images in tests.items():
        there = _first_of_person(images, 1 if split == "gallery" else 0)
        shared = {name: (first[name], path) for name, path in there.items() if name in first} | shared
    where = " or ".join(tests)
    if shared:
        lines.append(f"{len(shared)} identities of train_all are in {where} too: {_both(next(iter(shared.values())))}")
    paths = list(dict.fromkeys(path for images in tests.values() for path in images.paths))
    if same := _same_content(train.paths, paths):
        lines.append(f"{len(same)} images of train_all are in {where} too: {_both(same[0])}")
    return lines


def note_overlap_in(data_root: str | Path, tests: Mapping[str, ImageList]) -> None:
    """`note_overlap` with the training images of a data set, if it has any that can be listed."""
    with unsaid():
        try:
            train = read_split(data_root, "train_all", need_names=False)
        except UserError:
            return
    note_overlap(train, tests)


def _both(pair: tuple[Path, Path]) -> str:
    return f"{pair[0]} and {pair[1]} first"


def _first_of_person(images: ImageList, least: int) -> dict[Hashable, Path]:
    """By the spelling of each identity of `least` or more, its first image."""
    first: dict[Hashable, Path] = {}
    names = {token: spelling(token) for token in set(images.tokens)}
    for token, pid, path in zip(images.tokens, images.pids.tolist(), images.paths, strict=True):
        if pid >= least:
            first.setdefault(names[token], path)
    return first


def _same_content(ours: list[Path], theirs: list[Path]) -> list[tuple[Path, Path]]:
    """Each of our files that one of theirs equals, with the first such. Only files of a size on both sides are read."""
    sizes = {path: path.stat().st_size for path in {*ours, *theirs} if os.access(path, os.R_OK)}
    both = {sizes.get(path) for path in ours} & {sizes.get(path) for path in theirs} - {None}
    ours, theirs = ([path for path in side if sizes.get(path) in both] for side in (ours, theirs))
    twin = dict(zip(reversed(digest_files(theirs)), reversed(theirs), strict=True))
    return [(path, twin[digest]) for path, digest in zip(ours, digest_files(ours), strict=True) if digest in twin]
