"""TensorBoard, which may fail without the run failing with it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils import UserError


class Board:
    """Scalars and images for TensorBoard. The first that cannot be written is a warning; the next are tried anew.

    path   the run's folder of logs
    start  finished steps: what an interrupted process wrote beyond is hidden

    Raises UserError where the folder cannot be written to begin with.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._warned = path, False
        # The writer's thread would print a page of traceback; the error itself comes back at the next call.
        self._hook = threading.excepthook
        try:
            self._writer: SummaryWriter | None = SummaryWriter(str(path), purge_step=start + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output_path") from None

    def __enter__(self) -> Board:
        threading.excepthook = self._quiet
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._warn(error)
        threading.excepthook = self._hook

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers by tag; `step` is the number of finished steps."""
        self._write(step, lambda writer: [writer.add_scalar(tag, value, step) for tag, value in values.items()])

    def image(self, tag: str, pixels: Any, step: int) -> None:
        """Write a uint8 image (H, W, 3)."""
        self._write(step, lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a line."""
        self._write(step, lambda writer: writer.add_text(tag, text, step))

    def _write(self, step: int, write: Any) -> None:
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self._path), purge_step=step)
            write(self._writer)
        except OSError as error:
            self._writer = None
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        reason = error.strerror or str(error)
        print(f"\nwarning: {self._path}: cannot be written ({reason}); training goes on without it", file=sys.stderr)

    def _quiet(self, args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            self._hook(args)
