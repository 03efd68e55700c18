"""Checkpoints: written atomically, read strictly, in the release's format (spec sections 8 and 11).

A run's folder holds, per snapshot, `{gen,id,dis}_%08d.pt`, each `{'a': state_dict}`, `state_%08d.pt` with the
optimisers, gradient scalers, random state and iteration, and, written last, the manifest `snapshot_%08d.json`: sizes
and checksums of the others, the config, and what else decided the numbers. A snapshot with all of them is complete.
The release's own folders have one `optimizer.pt` in place of state files and manifests. Only tensors and plain
containers are unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from config import exact_settings
from files import Damaged, part_of, read_tensors, write_atomically, write_json
from parallel.collectives import Trainer
from runs.weights import load_network, unwrap
from utils import UserError, one_line

# ------------------------------------------------------------------------------------------------ files


# --------------------------------------------------------------------------------------------- networks


# -------------------------------------------------------------------------------------------- manifests
def manifest_path(folder: Path, iteration: int) -> Path:
    return folder / f"snapshot_{iteration:08d}.json"


def fingerprint(config: Mapping[str, Any], circumstances: Mapping[str, Any]) -> str:
    """SHA-256 of a config and of what else decided a snapshot's numbers."""
    return hashlib.sha256(json.dumps([config, circumstances], sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, iteration: int) -> dict[str, Any] | None:
    """The manifest of a snapshot; None where there is none. Raises Damaged for one that is not as it was written."""
    path = manifest_path(folder, iteration)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: damaged ({one_line(error)})") from None
    try:
        whole = content["fingerprint"] == fingerprint(content["config"], content["circumstances"])
        whole = whole and content["iteration"] == iteration and isinstance(content["config"], dict)
        whole = whole and all(isinstance(f["bytes"], int) and f["sha256"] for f in content["files"].values())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Damaged(f"{path}: damaged (it does not fit its own fingerprint)")
    return content


def check_file(path: Path, manifest: Mapping[str, Any] | None) -> None:
    """Compare a snapshot's file with its manifest. Raises Damaged."""
    if manifest is None:
        return
    expected = manifest["files"].get(path.name)
    try:
        size = path.stat().st_size
        if expected is None:
            raise Damaged(f"{path}: damaged (its manifest does not know it)")
        if size != expected["bytes"]:
            raise Damaged(f"{path}: damaged or another run's ({size} bytes instead of {expected['bytes']})")
        with open(path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                raise Damaged(f"{path}: damaged or another run's (its checksum is not that of its manifest)")
    except FileNotFoundError:
        raise Damaged(f"{path}: damaged (no such file)") from None
    except OSError as error:
        raise Damaged(f"{path}: damaged or out of reach ({error.strerror})") from None


def changed_settings(
    manifest: Mapping[str, Any], cfg: BaseModel, circumstances: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What decides the numbers and is another now than in a snapshot: name to (then, now)."""
    then = exact_settings(manifest["config"]) | manifest["circumstances"]
    now = exact_settings(cfg.model_dump(mode="json")) | dict(circumstances)
    # A key that only one of the two knows is another version's.
    return {name: (then[name], now[name]) for name in now if name in then and then[name] != now[name]}


# -------------------------------------------------------------------------------------------- snapshots
def _iterations(folder: Path, pattern: str) -> list[int]:
    """The iterations in the names of a folder's files that are called like `gen_%08d.pt`, ascending."""
    start, end = pattern.split("%08d")
    names = (path.name for path in folder.glob(f"{start}*{end}"))
    found = (re.fullmatch(re.escape(start) + r"(\d{8})" + re.escape(end), name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _files(folder: Path, networks: list[str], iteration: int) -> list[Path]:
    """The files of a snapshot but for its manifest, in the order in which they are written."""
    return [folder / f"{name}_{iteration:08d}.pt" for name in ["state", *networks]]


def snapshots(folder: Path, networks: list[str]) -> list[int]:
    """Iterations of the complete snapshots in a checkpoint folder, ascending; the release's count as complete."""
    release = (folder / "optimizer.pt").is_file()

    def complete(iteration: int) -> bool:
        state, *nets = _files(folder, networks, iteration)
        # Where the release's files lie, networks with a state but no manifest are an interrupted writing of ours.
        own = state.is_file() and manifest_path(folder, iteration).is_file()
        return all(path.is_file() for path in nets) and (own or (release and not state.is_file()))

    return [iteration for iteration in _iterations(folder, f"{networks[0]}_%08d.pt") if complete(iteration)]


def nothing_saved(folder: Path, networks: list[str]) -> bool:
    """Whether a checkpoint folder holds at most the beginnings of a first snapshot."""
    ours = set(_iterations(folder, "state_%08d.pt"))
    weights = {i for name in networks for i in _iterations(folder, f"{name}_%08d.pt")}
    return not _iterations(folder, "snapshot_%08d.json") and weights <= ours


def remove_parts(folder: Path, networks: list[str]) -> None:
    """Remove the rest of snapshots that a killed process was writing or removing."""
    for iteration in _iterations(folder, ".snapshot_%08d.json.part"):
        _remove(folder, networks, iteration)


def _remove(folder: Path, networks: list[str], iteration: int) -> None:
    """Remove a snapshot of ours, of which its manifest, or the manifest's temporary file, is the mark."""
    manifest = manifest_path(folder, iteration)
    mark = part_of(manifest)
    if manifest.exists():
        manifest.replace(mark)
    for path in _files(folder, networks, iteration):
        part_of(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    mark.unlink()


def save_snapshot(
    folder: Path, trainer: Trainer, iteration: int, circumstances: Mapping[str, Any] | None = None
) -> None:
    """Write the snapshot of `iteration` finished steps; the manifest keeps `circumstances`, plain values by name.

    Raises UserError, leaving nothing of it behind, where it cannot be written.
    """
    state: dict[str, Any] = {name: optimizer.state_dict() for name, optimizer in trainer.optimizers().items()}
    state["scalers"] = {name: scaler.state_dict() for name, scaler in trainer.scalers().items()}
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None
    state["iteration"] = iteration
    contents = [state, *({"a": net.state_dict()} for net in trainer.networks().values())]
    manifest, files = manifest_path(folder, iteration), _files(folder, list(trainer.networks()), iteration)
    config, circumstances = trainer.cfg.model_dump(mode="json"), dict(circumstances or {})
    written: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # From here to the end the snapshot is incomplete, also where an older one of this iteration is replaced, and
        # the manifest's temporary file marks what lies there as ours. The state comes first: networks without one are
        # then the release's.
        manifest.unlink(missing_ok=True)
        part_of(manifest).touch()
        for path, content in zip(files, contents, strict=True):
            written[path.name] = write_atomically(path, content)
        sync_folder(folder)
        listing = {"iteration": iteration, "files": written, "config": config, "circumstances": circumstances}
        write_json(manifest, listing | {"fingerprint": fingerprint(config, circumstances)})
        sync_folder(folder)
    except (OSError, UserError) as error:
        with contextlib.suppress(OSError):
            part_of(manifest).touch()
            _remove(folder, list(trainer.networks()), iteration)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output_path") from None


def sync_folder(folder: Path) -> None:
    """Make the names of the files in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune_snapshots(folder: Path, networks: list[str], newest: int, *, keep_last: int, keep_every: int) -> None:
    """Remove our own snapshots but the `keep_last` (0: all) up to `newest`, and those of every `keep_every` steps.

    What has no sound manifest is not known to be ours and stays. A file that cannot be removed is a warning.
    """
    ours = [i for i in _iterations(folder, "snapshot_%08d.json") if i <= newest]
    for iteration in ours[:-keep_last] if keep_last else []:
        if keep_every and iteration % keep_every == 0:
            continue
        try:
            read_manifest(folder, iteration)
            _remove(folder, networks, iteration)
        except Damaged:
            continue
        except OSError as error:
            print(f"warning: {folder}: old snapshots cannot be removed ({error.strerror})", file=sys.stderr)


def set_aside(folder: Path, networks: list[str], iteration: int) -> Path | None:
    """Move our own snapshots of after `iteration` into a new folder beside them, and return it; None: there are none.

    A run that goes on from an older snapshot makes them anew, and until then the newest is what is resumed. Raises
    UserError for later ones of the release, which stay.
    """
    ours = {*_iterations(folder, "state_%08d.pt"), *_iterations(folder, "snapshot_%08d.json")}
    foreign = [i for i in snapshots(folder, networks) if i > iteration and i not in ours]
    if foreign:
        raise UserError(
            f"{folder}: holds later snapshots than {iteration}, which --resume would take next ({foreign[-1]}); move "
            "them elsewhere"
        )
    later = sorted(i for i in ours if i > iteration)
    if not later:
        return None
    names = (f"after_{iteration:08d}" + f"_{n}" * (n > 1) for n in itertools.count(1))
    aside = next(folder / name for name in names if not (folder / name).exists())
    try:
        aside.mkdir()
        for i in later:
            state, *nets = _files(folder, networks, i)
            # The manifest first: what is left in between is no snapshot. The state, by which it is ours, comes last.
            for path in (manifest_path(folder, i), *nets, state):
                if path.exists():
                    path.rename(aside / path.name)
    except OSError as error:
        raise UserError(
            f"{folder}: later snapshots cannot be moved to {aside.name} ({error.strerror}); move them elsewhere"
        ) from None
    return aside


def load_snapshot(folder: Path, trainer: Trainer, iteration: int | None = None, *, fall_back: bool = False) -> int:
    """Restore the newest complete snapshot, or that of `iteration`; returns the number of finished steps.

    With `fall_back` a damaged newest one is passed over with a warning. Weight ramps, learning rates and data orders
    are functions of the iteration, so they need no state. Raises UserError that offers the previous snapshot when a
    file is damaged.
    """
    complete = snapshots(folder, list(trainer.networks()))
    if not complete:
        raise UserError(f"{folder}: no complete snapshot to resume from")
    if iteration is None:
        candidates = complete[::-1] if fall_back else complete[-1:]
    elif iteration in complete:
        candidates = [iteration]
    else:
        raise UserError(
            f"{folder}: no complete snapshot of iteration {iteration}; there are {', '.join(map(str, complete))}"
        )
    problems = []
    for candidate in candidates:
        try:
            restore(folder, trainer, candidate)
        except Damaged as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"warning: {'; '.join(problems)}: continuing from the snapshot before, {candidate}", file=sys.stderr)
        return candidate
    older = [i for i in complete if i < candidates[-1]]
    offer = f"; the snapshot before it: --resume {older[-1]}" if older else ""
    raise Damaged("; ".join(problems) + offer)


def restore(folder: Path, trainer: Trainer, iteration: int) -> None:
    """Load one snapshot. Every file is compared with the manifest before the first of them is loaded."""
    state, *nets = _files(folder, list(trainer.networks()), iteration)
    manifest = read_manifest(folder, iteration)
    for path in (state, *nets):
        check_file(path, manifest)
    for path, net in zip(nets, trainer.networks().values(), strict=True):
        load_network(net, unwrap(read_tensors(path), path), path)
    source = state if manifest else folder / "optimizer.pt"
    load_state(read_tensors(source), trainer, source)


def read_network(folder: Path, name: str, iteration: int) -> tuple[Mapping[str, Tensor], Path]:
    """The state_dict of network `name` in a snapshot, compared with its manifest, and its file."""
    path = folder / f"{name}_{iteration:08d}.pt"
    check_file(path, read_manifest(folder, iteration))
    return unwrap(read_tensors(path), path), path


def load_state(state: Any, trainer: Trainer, source: Path) -> None:
    """Restore optimisers, and what the release does not keep where it is there: scalers and random state."""
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
    """Raise ValueError where the loaded state of a parameter is not of its shape."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
