"""One way to write a file whole, one to read a file that may come from anywhere, one to see that a file changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from utils import UserError, one_line

log = logging.getLogger(__name__)


class Damaged(UserError):
    """A file is missing, cut short, altered, or not a checkpoint at all; an older snapshot may be whole."""


# ---------------------------------------------------------------------------------------------- writing
def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let `write` fill a temporary file, sync it, then rename it to `path`: a reader sees the whole file or none.

    If several processes write `path` at once, the file of the last one stays. Raises UserError if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # torch.save answers a full disk with an error of its own, in whose context the system's stands.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({cause.strerror or cause}); free space or choose another folder"
        ) from None
    return path


def is_part(path: Path) -> bool:
    """Whether a file is what an interrupted writer left behind."""
    return path.name.startswith(".") and path.name.endswith(".part")


def part_of(path: Path) -> Path:
    """A temporary name for `path`, for writers that are alone and look for what they left behind."""
    return path.with_name(f".{path.name}.part")


def write_tensors(path: Path, content: Any) -> None:
    """Save tensors in plain containers to `path`, whole or not at all; the file holds checksums of its parts."""
    import torch

    write_whole(path, lambda file: torch.save(content, file))


def write_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Save tensors by name to `path`, whole or not at all, in a format that holds no code and no checksums."""
    from safetensors.torch import save

    plain = {name: value.contiguous().clone() for name, value in tensors.items()}  # the format knows no views
    write_whole(path, lambda file: file.write(save(plain)))


def write_text(path: Path, text: str) -> None:
    """Write a text file and its folder. Raises UserError if it cannot be written."""
    make_folder(path.parent)
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write JSON and its folder. Raises UserError if it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents if it is missing. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None
    return folder


@contextlib.contextmanager
def hold_folder(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the folder, which is made if missing, to itself inside the context.

    `wait` waits until it has. Systems without such locks (Windows) always say yes, which is logged.
    """
    make_folder(folder)
    try:
        import fcntl
    except ImportError:
        log.warning("%s is not locked, which this system cannot do; start no second command on it", folder)
        yield True
        return
    handle, held = os.open(folder, os.O_RDONLY), True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------- what files hold
SETTLED_NS = 2 * 10**9  # longer than a tick of any file system's clock
Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp | None:
    """What a file cannot keep when its content changes: size, two times in nanoseconds, inode. None: read the file.

    `cp -p` and rsync set the time of the last writing, but nothing can set that of the last change (ctime). A file that
    changed a moment ago may change again within one tick of the clock, so it has no stamp yet; nor has a missing file.
    """
    try:
        now = path.stat()
    except OSError:
        return None
    settled = time.time_ns() - now.st_ctime_ns > SETTLED_NS
    return (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) if settled else None


def digest_file(path: Path) -> str:
    """A hash of a file's content, the first half of its SHA-256. Raises UserError if it cannot be read."""
    return sha256(path)[:32]


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); replace or remove the file") from None


def digest_files(paths: Sequence[Path]) -> list[str]:
    """`digest_file` of every file; 13,000 small files take a second."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_file, paths))


def digest_of(digests: Sequence[str]) -> str:
    """One hash of the digests of several files, in their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- reading
def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file. Raises UserError with the remedy if it is damaged or unreadable."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {remedy}") from None


def read_tensors(path: Path) -> Any:
    """Load a checkpoint file onto the CPU. Only tensors and plain containers are unpickled.

    A file that ends in `.safetensors` is a dict of tensors; those in half precision become fp32.

    Raises Damaged if it is missing, damaged, or holds anything else.
    """
    import torch

    try:
        with warnings.catch_warnings():
            # torch warns at length before it refuses a foreign pickle; one line of ours says enough.
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":
                content = _read_safetensors(path)
            else:
                if zipfile.is_zipfile(path):
                    # PyTorch neither compresses its files nor looks at their checksums.
                    check_zip(path, growth=1, checksums=True)
                content = torch.load(path, map_location="cpu", weights_only=True)
        require_plain(content)
        return content
    except FileNotFoundError:
        raise Damaged(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a cut or foreign file
        if "Unsupported global" in str(error):
            raise Damaged(
                f"{path}: holds Python objects, perhaps a whole model, and is not unpickled; save model.state_dict() "
                "and give that file"
            ) from None
        raise Damaged(f"{path}: damaged or not a checkpoint ({one_line(error)}); replace the file") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    half = (torch.float16, torch.bfloat16)
    return {name: v.float() if v.dtype in half else v for name, v in load_file(path).items()}


def require_plain(content: Any) -> None:
    """Raise ValueError for a tensor, however deep in dicts and lists, that is not simply numbers in memory.

    A view may repeat one number a billion times, so that a file of a few bytes asks for gigabytes.
    """
    import torch

    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for value in content:
            require_plain(value)
    elif isinstance(content, torch.Tensor):
        plain = content.layout == torch.strided and not (content.is_meta or content.is_quantized or content.is_nested)
        if not plain or content.is_complex() or content.nbytes > content.untyped_storage().nbytes():
            raise ValueError(f"a tensor of shape {tuple(content.shape)} is not backed by as many numbers")


def check_zip(path: Path, *, growth: int, checksums: bool = False) -> None:
    """Raise ValueError for a zip file whose parts unpack to more than `growth` times its size; nothing is unpacked.

    checksums  also read everything and compare it with the checksums in the file
    """
    with zipfile.ZipFile(path) as file:
        size, unpacked = path.stat().st_size, sum(part.file_size for part in file.infolist())
        if unpacked > growth * size:
            raise ValueError(f"{size} bytes that claim to hold {unpacked}")
        if checksums and (bad := file.testzip()):
            raise ValueError(f"the checksum of {bad} is wrong")
