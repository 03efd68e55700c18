"""A run in the release's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from files import write_atomically
from parallel.collectives import Trainer
from runs.snapshot import load_snapshot
from utils import UserError


def export_release(folder: Path, out: Path, trainer: Trainer, iteration: int | None = None) -> int:
    """Write a run's snapshot as the release's files: `{gen,id,dis}_%08d.pt` and `optimizer.pt`.

    Raises UserError rather than overwrite a file.
    """
    iteration = load_snapshot(folder, trainer, iteration)
    out.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        f"{name}_{iteration:08d}.pt": {"a": net.state_dict()} for name, net in trainer.networks().items()
    }
    contents["optimizer.pt"] = {name: optimizer.state_dict() for name, optimizer in trainer.optimizers().items()}
    for name in contents:
        if (out / name).exists():
            raise UserError(f"{out / name} exists; export to an empty folder")
    for name, content in contents.items():
        write_atomically(out / name, content)
    return iteration
