"""Snapshots of a run: what it needs to continue bit for bit, written whole and read strictly.

A snapshot is a folder `checkpoints/00010000/` with a file `{'a': state_dict}` per network (`gen.pt`, `id.pt`,
`dis.pt`; a teacher's `net.pt`), `state.pt` (optimisers, gradient scalers, random state) and `manifest.json` (the
config, and what else decided the numbers). It is written as `00010000.part` and renamed, so a folder of that name is
whole. PyTorch's files hold checksums of their parts. The flat files of the release are read too; runs/release.py
writes them. It also packs snapshots without state, whose networks are `.safetensors` files of a state_dict.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from config import exact_settings
from data.people import People
from files import Damaged, read_json, read_tensors, write_json, write_tensors
from parallel.collectives import Trainer
from runs.weights import load_network, plain_names, unwrap
from utils import UserError, one_line

log = logging.getLogger(__name__)
OPTIMIZERS = "optimizer.pt"  # of the release's flat files


def snapshot_folder(folder: Path, iteration: int) -> Path:
    return folder / f"{iteration:08d}"


def own_snapshots(folder: Path) -> list[int]:
    """Iterations of the snapshots in a checkpoint folder, ascending."""
    names = (path.name for path in folder.glob("[0-9]*") if path.is_dir())
    return sorted(int(name) for name in names if len(name) == 8 and name.isdecimal())


def flat_file(folder: Path, name: str, iteration: int) -> Path:
    """Where the release, and earlier versions of this project, keep a network."""
    return folder / f"{name}_{iteration:08d}.pt"


def flat_iterations(folder: Path) -> list[int]:
    """Iterations of which a folder has an id net (a teacher's run: its net) in a flat file, ascending."""
    names = (re.fullmatch(r"(?:id|net)_(\d{8})\.pt", path.name) for path in folder.glob("*.pt"))
    return sorted(int(match[1]) for match in names if match)


def snapshots(folder: Path) -> list[int]:
    """Iterations of a run's snapshots and of the release's flat files beside them, ascending."""
    return sorted({*own_snapshots(folder), *flat_iterations(folder)})


# ---------------------------------------------------------------------------------------------- writing
def save_snapshot(
    folder: Path, trainer: Trainer, iteration: int, circumstances: Mapping[str, Any] | None = None
) -> None:
    """Write the snapshot of `iteration` finished steps; the manifest keeps `circumstances`, plain values by name.

    Raises UserError, leaving nothing of it behind, if it cannot be written.
    """
    state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in trainer.optimizers().items()}
    state["scalers"] = {name: scaler.state_dict() for name, scaler in trainer.scalers().items()}
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None
    contents = {"state": state} | {name: {"a": net.state_dict()} for name, net in trainer.networks().items()}
    final = snapshot_folder(folder, iteration)
    part = final.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in contents.items():
            write_tensors(part / f"{name}.pt", content)
        about = {"config": trainer.cfg.model_dump(mode="json"), "circumstances": dict(circumstances or {})}
        write_json(part / "manifest.json", {"iteration": iteration} | about)
        sync_folder(part)
        if final.exists():  # damaged, or `--resume auto` would have continued from it
            shutil.rmtree(final)
        part.rename(final)
        sync_folder(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output_path") from None


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder survive a power cut. Windows cannot open folders, and does nothing."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove the rest of snapshots that a killed process was writing or removing."""
    for path in folder.glob("[0-9]*.part"):
        shutil.rmtree(path, ignore_errors=True)


def prune_snapshots(folder: Path, newest: int, *, keep_last: int, keep_every: int) -> None:
    """Remove snapshots but the `keep_last` (0: all) up to `newest`, and those of every `keep_every` steps.

    A snapshot that cannot be removed is a warning. The release's files always stay.
    """
    older = [i for i in own_snapshots(folder) if i <= newest]
    for iteration in older[:-keep_last] if keep_last else []:
        if not (keep_every and iteration % keep_every == 0):
            path = snapshot_folder(folder, iteration)
            try:
                path.rename(path.with_suffix(".part"))
                shutil.rmtree(path.with_suffix(".part"))
            except OSError as error:
                log.warning("%s: the old snapshot cannot be removed (%s)", path, error.strerror)


# ---------------------------------------------------------------------------------------------- reading
def read_manifest(folder: Path, iteration: int) -> dict[str, Any] | None:
    """The manifest of a snapshot, None for the release's files. Raises Damaged if it is not as it was written."""
    path = snapshot_folder(folder, iteration) / "manifest.json"
    if not path.parent.is_dir():
        return None
    try:
        content = read_json(path, "the snapshot is damaged")
        whole = content["iteration"] == iteration
        whole = whole and all(isinstance(content[key], dict) for key in ("circumstances", "config"))
    except UserError as error:
        raise Damaged(str(error)) from None
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{path}: damaged (not the manifest of this snapshot)")
    return content


def people_of_snapshot(manifest: Mapping[str, Any] | None) -> People | None:
    """Whose classes the nets of a snapshot know; None for those of the release and of earlier versions."""
    mark = manifest["circumstances"].get("classes") if manifest else None
    return People(mark, str(manifest["config"].get("data_root", "?"))) if isinstance(mark, str) else None


def read_network(folder: Path, name: str, iteration: int) -> tuple[Mapping[str, Tensor], Path]:
    """The state_dict of network `name` in a snapshot, and its file."""
    path = snapshot_folder(folder, iteration) / f"{name}.pt"
    if not path.parent.is_dir():
        path = flat_file(folder, name, iteration)
    elif not path.exists() and (packed := path.with_suffix(".safetensors")).exists():
        return plain_names(read_tensors(packed), packed), packed
    return unwrap(read_tensors(path), path), path


def changed_settings(
    manifest: Mapping[str, Any], cfg: BaseModel, circumstances: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings that affect results and differ from the snapshot: name to (then, now)."""
    then = exact_settings(manifest["config"]) | manifest["circumstances"]
    now = exact_settings(cfg.model_dump(mode="json")) | dict(circumstances)
    # A key that only one of the two knows belongs to another version; whose the classes are is compared elsewhere.
    keys = [name for name in now if name in then and name != "classes"]
    return {name: (then[name], now[name]) for name in keys if then[name] != now[name]}


def load_snapshot(folder: Path, trainer: Trainer, iteration: int | None = None, *, fall_back: bool = False) -> int:
    """Restore the newest snapshot, or that of `iteration`; returns the number of finished steps.

    With `fall_back` a damaged newest one is passed over with a warning. Weight ramps, learning rates and data orders
    are functions of the iteration, so they need no state. Raises Damaged, which offers the snapshot before, if a file
    is damaged.
    """
    present = snapshots(folder)
    if not present:
        raise UserError(f"{folder}: no snapshot to resume from")
    if iteration is None:
        candidates = present[::-1] if fall_back else present[-1:]
    elif iteration not in present:
        raise UserError(f"{folder}: no snapshot of iteration {iteration}; there are {', '.join(map(str, present))}")
    else:
        candidates = [iteration]
    problems = []
    for candidate in candidates:
        try:
            restore(folder, trainer, candidate)
        except Damaged as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s: continuing from the snapshot before, %d", "; ".join(problems), candidate)
        return candidate
    older = [i for i in present if i < candidates[-1]]
    offer = f"; --resume auto continues from the snapshot before it, {older[-1]}" if older else ""
    raise Damaged("; ".join(problems) + offer)


def restore(folder: Path, trainer: Trainer, iteration: int) -> None:
    """Load one snapshot. Every file is read, and so compared with its checksums, before the first one is used."""
    file = snapshot_folder(folder, iteration) / "state.pt"
    if read_manifest(folder, iteration) is None:
        file = folder / OPTIMIZERS
        if not file.is_file():
            raise UserError(f"{file}: no such file; a run of an earlier version can be evaluated, but not resumed")
    elif not file.exists() and any(file.parent.glob("*.safetensors")):
        raise UserError(f"{file.parent}: holds weights but no training state; it can be used, but not resumed")
    made_with = (read_manifest(folder, iteration) or {}).get("config", {})
    if "average" in trainer.networks() and not made_with.get("ema_decay"):
        raise UserError(f"{file.parent}: made without ema_decay, which cannot begin in the middle; set ema_decay=0")
    state = read_tensors(file)
    networks = {name: read_network(folder, name, iteration) for name in trainer.networks()}
    for name, net in trainer.networks().items():
        load_network(net, *networks[name])
    load_state(state, trainer, file)


def load_state(state: Any, trainer: Trainer, source: Path) -> None:
    """Restore optimisers, and what the release does not keep if it is there: scalers and random state."""
    for name, optimizer in trainer.optimizers().items():
        if not isinstance(state, Mapping) or name not in state:
            raise UserError(f"{source}: no optimiser state '{name}' in it; replace the file")
        # Rates, decay and momenta are the config's, which may have changed; the file's are those of its last step.
        ours = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        try:
            theirs = state[name]["param_groups"]
            groups = [their | our for their, our in zip(theirs, ours, strict=True)]
            optimizer.load_state_dict({"state": state[name]["state"], "param_groups": groups})
            require_shapes(optimizer)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{source}: optimiser '{name}' does not fit the network ({one_line(error)}); replace the file"
            ) from None
    try:
        for name, scaler in trainer.scalers().items():
            if state.get("scalers", {}).get(name):
                scaler.load_state_dict(state["scalers"][name])
        if "rng" in state:
            torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") is not None and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], trainer.device)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        why = one_line(error)
        raise UserError(f"{source}: not the scalers and random state of a run ({why}); replace the file") from None


def require_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the loaded state of a parameter does not have its shape."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
