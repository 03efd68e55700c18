"""Trained runs and teachers from a mirror: files that a manifest lists, checked by their SHA-256 and kept in a cache.

A manifest is JSON of at most `MANIFEST_BYTES`, a run or a teacher by name:

    {"NAME": {"files": {"config.yaml": {"sha256": "...", "size": 812, "urls": ["NAME/config.yaml", "https://..."]}}}}

A URL may be relative to the manifest. The cache holds every file under its SHA-256, the beginning of an interrupted
download as `SHA256.part`, and the manifests that were downloaded. Nothing of a manifest is trusted: names stay in the
run's folder, and no file grows beyond its size.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urljoin, urlsplit
from urllib.request import Request, urlopen

import torch
from pydantic import BaseModel, Field, TypeAdapter
from tqdm import tqdm

from files import hold_folder, make_folder, part_of, sha256, write_whole
from runs.folder import RunFolder
from runs.weights import short
from utils import UserError, one_line

log = logging.getLogger(__name__)
MANIFEST_BYTES = 1 << 20
TIMEOUT = 30  # seconds without an answer or a byte
ATTEMPTS = 5  # per mirror, as long as each brings bytes
BLOCK = 1 << 20


class Listed(BaseModel):
    """A file of a manifest: its SHA-256, its size in bytes, and where it is, the first place first."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    urls: Annotated[list[str], Field(min_length=1)]


class Entry(BaseModel):
    """A run or a teacher of a manifest: its files by their path in its folder."""

    files: Annotated[dict[str, Listed], Field(min_length=1)]


MANIFEST = TypeAdapter(dict[str, Entry])


def cache_folder() -> Path:
    """Where downloads are kept: `runs` in PyTorch's cache, which TORCH_HOME and XDG_CACHE_HOME move."""
    return Path(torch.hub.get_dir()) / "runs"


# ---------------------------------------------------------------------------------------------- the manifest
def read_entry(place: str, name: str, cache: Path) -> Entry:
    """The checked entry of `name` in the manifest at `place`, a file or a URL; its URLs are absolute.

    Without a network the manifest that was downloaded last from this URL is used, with a warning. Raises UserError for
    a manifest that cannot be read, lacks the name, or names files outside the run's folder.
    """
    remote = place.startswith(("http://", "https://"))
    base = place if remote else Path(place).absolute().as_uri()
    content = _download_manifest(place, cache) if remote else _read_local(Path(place))
    try:
        entries = MANIFEST.validate_json(content)
        for file in (file for entry in entries.values() for file in entry.files.values()):
            file.urls = [urljoin(base, url) for url in file.urls]
            if not {urlsplit(url).scheme for url in file.urls} <= {"http", "https", urlsplit(base).scheme}:
                raise ValueError(f"a URL is neither relative nor http: {file.urls}")
    except ValueError as error:
        raise UserError(f"{place}: not a manifest ({one_line(error)}); give another --manifest") from None
    if name not in entries:
        raise UserError(f"{place}: has no {name!r}; it lists {short(list(map(repr, entries))) or 'nothing'}")
    for path in entries[name].files:
        if not _stays_inside(path):
            raise UserError(f"{place}: {path!r} is not the name of a file inside a run's folder; get another manifest")
    return entries[name]


def _read_local(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"--manifest {path}: no such file; give a file or an http URL")
    with open(path, "rb") as file:
        return file.read(MANIFEST_BYTES)  # a longer one is cut, and so no JSON


def _download_manifest(url: str, cache: Path) -> bytes:
    kept = cache / f"manifest-{hashlib.sha256(url.encode()).hexdigest()}.json"
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read(MANIFEST_BYTES)
        MANIFEST.validate_json(content)  # a page of a proxy, or a part, does not replace the manifest that is kept
    except (OSError, HTTPException, ValueError) as error:
        if not kept.is_file():
            raise UserError(f"--manifest {url}: cannot be read ({one_line(error)})") from None
        log.warning("%s: cannot be read (%s); its last copy is used", url, one_line(error))
        return kept.read_bytes()
    write_whole(kept, lambda file: file.write(content))
    return content


def _stays_inside(path: str) -> bool:
    """Whether a path of a manifest is relative, without `..`, and the same on every system."""
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and not set(path) & set('\\:*?"<>|')
    return plain and bool(parts) and path == "/".join(parts) and ".." not in parts


# ------------------------------------------------------------------------------------------------- downloads
def fetch_file(file: Listed, cache: Path, label: str) -> Path:
    """The file in the cache, downloaded unless it is there; the mirrors are tried in their order.

    Raises UserError if no mirror has a file of this SHA-256, with the reason for each.
    """
    whole, problems = cache / file.sha256, []
    if whole.is_file() and sha256(whole) == file.sha256:
        return whole
    part = whole.with_suffix(".part")
    for url in file.urls:
        for _ in range(ATTEMPTS):
            before = _size(part)
            try:
                _download(url, part, file.size, label)
            except (OSError, HTTPException, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                problem = one_line(error)
                if _size(part) > before:
                    continue  # it broke off on the way: go on from there
                break
            if sha256(part) == file.sha256:
                part.replace(whole)
                return whole
            part.unlink()
            problem = "the SHA-256 is wrong"
            if not before:
                break  # else the fault may lie in the part that was there before: once more, from the start
        problems.append(f"{url}: {problem}")
    raise UserError(f"{label}: cannot be downloaded ({'; '.join(problems)}); try again later, or another manifest")


def _download(url: str, part: Path, size: int, label: str) -> None:
    """Append to `part` what it lacks of the `size` bytes at `url`. Raises OSError, HTTPException or ValueError."""
    if _size(part) > size:  # begun for a manifest with another size
        part.unlink()
    start = _size(part)
    if start == size > 0:
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as answer, open(part, "ab") as out:
        if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file
            out.truncate(0)
        with tqdm(total=size, initial=start, desc=label, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            while start < size and (block := answer.read(min(BLOCK, size - start))):
                out.write(block)
                start += len(block)
                bar.update(len(block))
    if start < size:
        raise ConnectionError(f"ended after {start} of {size} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ------------------------------------------------------------------------------------------------ a whole run
def get(run: RunFolder, manifest: str) -> Path:
    """Fetch the run or teacher of that name into its folder, whole or not at all; returns the folder.

    Raises UserError, and changes nothing but the cache, if the folder exists or a file cannot be had.
    """
    cache = make_folder(cache_folder())
    entry = read_entry(manifest, run.name, cache)
    if "config.yaml" in entry.files:
        folder = run.path
    elif "net_last.pth" in entry.files:
        folder = run.model
    else:
        raise UserError(f"{manifest}: {run.name!r} has neither config.yaml (a run) nor net_last.pth (a teacher)")
    if folder.exists():
        raise UserError(f"{folder} exists and is not overwritten; move it away, or give another --output_path")
    log.info("%s: %d files, %.1f MB", run.name, len(entry.files), sum(file.size for file in entry.files.values()) / 1e6)
    with hold_folder(cache, wait=True):
        place_files({path: fetch_file(file, cache, path) for path, file in entry.files.items()}, folder)
    return folder


def place_files(sources: Mapping[str, Path], folder: Path) -> None:
    """Copy files to their paths in a new folder, which is there once all are."""
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        for path, source in sources.items():
            make_folder((part / path).parent)
            shutil.copyfile(source, part / path)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
