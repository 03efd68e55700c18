"""One way to write a file whole, and one to read a file that may come from anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils import UserError, one_line


class Damaged(UserError):
    """A file of a snapshot is cut short, altered, or no checkpoint at all; an older snapshot may be whole."""


class _Hashed:
    """A stream that hashes and counts what is written through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def write_atomically(path: Path, content: Any) -> dict[str, Any]:
    """Save tensors to `path` so that a reader sees the old file, the new file or none, never a part.

    Returns the file's `bytes` and `sha256`. Raises UserError where it cannot be written.
    """
    temporary = part_of(path)
    try:
        with open(temporary, "wb") as stream:
            hashed = _Hashed(stream)
            torch.save(content, hashed)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        return {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save answers a full disk with an error of its own, in whose context the system's stands.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({cause.strerror}); free space or choose another --output_path"
        ) from None


def read_tensors(path: Path, *, mmap: bool = False) -> Any:
    """Load a checkpoint file onto the CPU. Raises UserError for a missing or damaged one.

    With `mmap`, tensors are read from the file only when they are used; it must be in PyTorch's zip format.
    """
    try:
        with warnings.catch_warnings():
            # For a foreign pickle torch warns at length before it refuses it; our one line says enough.
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(path):
                # PyTorch neither compresses its files nor looks at their checksums.
                check_zip(path, growth=1, checksums=not mmap)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        require_plain(content)
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a cut or foreign file
        raise Damaged(f"{path}: damaged or not a checkpoint ({one_line(error)}); replace the file") from None


def require_plain(content: Any) -> None:
    """Raise ValueError for a tensor, however deep in dicts and lists, that is not simply numbers in memory.

    A view may repeat one number a billion times, and a file of some bytes then asks for gigabytes.
    """
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for value in content:
            require_plain(value)
    elif isinstance(content, Tensor):
        plain = content.layout == torch.strided and not (content.is_meta or content.is_quantized or content.is_nested)
        if not plain or content.is_complex() or content.nbytes > content.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(content.shape)} is not backed by as many numbers")


def check_zip(path: Path, *, growth: int, checksums: bool = False) -> None:
    """Raise ValueError for a zip file whose parts unpack to more than `growth` times its size; nothing is unpacked.

    checksums  also read everything and compare it with the checksums in the file
    """
    import zipfile

    with zipfile.ZipFile(path) as file:
        size, unpacked = path.stat().st_size, sum(part.file_size for part in file.infolist())
        if unpacked > growth * size:
            raise ValueError(f"{size} bytes that claim to hold {unpacked}")
        if checksums and (bad := file.testzip()):
            raise ValueError(f"the checksum of {bad} is wrong")


def part_of(path: Path) -> Path:
    """The temporary name under which a file is written before it takes its own."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def own_part(path: Path) -> Iterator[BinaryIO]:
    """The empty temporary file of `path`, for this writer alone; others wait until it is done with it."""
    import fcntl

    part = part_of(path)
    while True:
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "wb") as file:
            with contextlib.suppress(OSError):  # file systems without locks: several writers may then mix
                fcntl.flock(file, fcntl.LOCK_EX)
            # While this one waited, the file may have been renamed: then it is no temporary file any more.
            try:
                renamed = not os.path.samestat(os.fstat(file.fileno()), part.stat())
            except FileNotFoundError:
                renamed = True
            if not renamed:
                file.truncate()
                yield file
                return


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a temporary file, sync it, then rename it to `path`: there is the whole file or none.

    Of several processes that write `path` at once the last one's file stays. Raises UserError where it cannot be
    written.
    """
    try:
        with own_part(path) as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(part_of(path), path)
            except OSError:
                part_of(path).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents where it is missing. Raises UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a text file and its folder, whole or not at all. Raises UserError where it cannot be written."""
    make_folder(path.parent)
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file. Raises UserError with the remedy for a damaged or unreadable one."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {remedy}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all. Raises UserError where it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")
