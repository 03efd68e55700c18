"""Small things shared by every script: errors for the user, devices, seeds. Imports nothing heavy."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import random
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """Bad input. The message is one line that names the file or key and the remedy."""

    status = 2  # exit status of the program


class _Lines(logging.Formatter):
    """One line per record; only warnings say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


def set_up_logging(level: int = logging.INFO) -> None:
    """Send notes and warnings to stderr. Of several processes only the first prints what is below an error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's `main`. A UserError becomes one line on stderr and its exit status, mostly 2.

    So do errors of the operating system about a file or folder, and a lack of memory.
    """
    # File names are bytes: they are printed unchanged, and escaped in errors.
    sys.stdout.reconfigure(errors="surrogateescape")
    sys.stderr.reconfigure(errors="backslashreplace")
    set_up_logging()
    # Images this large are refused with a message of this project.
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has closed it (`... | head`), so no message can be printed.
        os._exit(141)
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(message.status)


def in_words(error: Exception) -> UserError | None:
    """The message for an error that the user can fix; None for a defect, which needs its traceback."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        return UserError(f"{error.filename or 'writing'}: {error.strerror}; fix this, or give another path")
    # PyTorch raises torch.OutOfMemoryError on a GPU and a plain RuntimeError on a CPU.
    no_room = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    if no_room or isinstance(error, MemoryError):
        return UserError(f"not enough memory ({one_line(error)}); use smaller batches, images or networks")
    return None


def one_line(error: BaseException) -> str:
    """An error's message as one printable line of at most 120 characters, or the error's type if it is empty."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # PyTorch's messages switch to bold
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:120] or type(error).__name__


@contextlib.contextmanager
def evaluating(*nets: torch.nn.Module) -> Iterator[None]:
    """Put the nets into eval mode inside the context, and every module back into its mode afterwards."""
    before = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def halve_until_it_fits(attempt: Callable[[int], T], size: int, least: int = 1) -> tuple[T, int]:
    """`attempt(size)` and that size, halved for as long as the GPU's memory is too small.

    Raises UserError if `least` images at a time are too many.
    """
    import torch

    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size <= least:
                raise UserError(
                    f"{size} images at a time: the GPU's memory is too small; use a smaller batch, --precision bf16 or "
                    "--device cpu"
                ) from None
        size //= 2
        torch.cuda.empty_cache()


def own_command() -> str:
    """The command line of this process, with the script's path relative to the project."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return "python " + shlex.join([str(name), *sys.argv[1:]])


def between(least: float, most: float | None = None, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from `least` to `most`, both included; None is no upper bound."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= (value if most is None else most):
            bounds = f"at least {least}" if most is None else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds}")
        return value

    return number


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every script: the folder of runs, the device and the threads."""
    parser.add_argument("--output_path", help="folder of outputs/, models/ and logs/ (default: the project's)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, or the CPU)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")


def add_run_arguments(parser: argparse.ArgumentParser, name: str = "latest") -> None:
    """Options of scripts that use a run's generator, which `runs.swapper.open_swapper` loads."""
    parser.add_argument("--name", default=name, help=f"run under outputs/ (default: {name})")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    add_machine_arguments(parser)


def add_net_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of scripts that use the id net of a run or a teacher, which `runs.load.open_net` loads."""
    parser.add_argument("--name", help="run under outputs/ (default: latest)")
    parser.add_argument("--teacher", metavar="NAME", help="a teacher under models/ instead of a run")
    parser.add_argument("--which_epoch", help="iteration of the snapshot (default: the newest)")
    add_machine_arguments(parser)


def add_batch_argument(parser: argparse.ArgumentParser, name: str, on_cpu: int = 32) -> None:
    """The option `name`: images at a time, a number or `auto`, which is None and stands for `on_cpu` on a CPU."""

    def number(text: str) -> int | None:
        return None if text == "auto" else min(between(1)(text), 2**31)  # more images than there are means all of them

    parser.add_argument(
        name,
        type=number,
        metavar="N",
        help=f"images at a time (default: auto, which is {on_cpu} on a CPU and what fits on a GPU)",
    )


def add_rerank_argument(parser: argparse.ArgumentParser) -> None:
    """`--rerank`, which is the field's variant, or `--rerank paper`."""
    about = "also k-reciprocal re-ranking (k1 20, k2 6, lambda 0.3): as toolkits do it, or by the paper's formulas"
    parser.add_argument("--rerank", nargs="?", const="field", choices=("field", "paper"), help=about)


def check_net_arguments(args: argparse.Namespace) -> None:
    """Raise UserError if both a run and a teacher are given, or a snapshot of a teacher, which has only one file."""
    if args.name and args.teacher:
        raise UserError("--name and --teacher: give one of the two")
    if args.teacher and args.which_epoch:
        raise UserError("--which_epoch: is for runs; a teacher has only the weights of its last epoch")


def pick_device(name: str | None = None) -> torch.device:
    """The device that `--device` names, or the first CUDA device, or the CPU."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: this PyTorch sees no CUDA GPU; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: only {torch.cuda.device_count()} CUDA GPUs here, numbered from 0")
    return device


def set_threads(threads: int | None) -> None:
    """Use `threads` CPU threads for tensors; None leaves PyTorch's choice. Also sets up the allocator."""
    import torch

    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads}: must be at least 1")
        if threads > 1024:
            raise UserError(f"--threads {threads}: must be at most 1024")
        torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, which every CPU step would otherwise have to request again."""
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # Windows
        return
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Make PyTorch use algorithms that repeat bit for bit on a GPU, and refuse operations without one."""
    import torch

    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product on the GPU
