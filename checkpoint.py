"""Checkpoints: written atomically, read strictly, in the release's format (spec sections 8 and 11).

A run's folder holds, per snapshot, `{gen,id,dis}_%08d.pt`, each `{'a': state_dict}`, and `state_%08d.pt` with the
optimisers, gradient scalers, random state and iteration. A snapshot with all of them is complete. The release's own
folders have one `optimizer.pt` in place of the state files. Only tensors and plain containers are unpickled.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from utils import UserError


class Trainer(Protocol):
    def networks(self) -> dict[str, nn.Module]: ...
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...
    def scalers(self) -> dict[str, torch.amp.GradScaler]: ...


class WrongNetwork(UserError):
    """Weights that are sound but belong to another network than the one that is to load them."""


# ------------------------------------------------------------------------------------------------ files
def write_atomically(path: Path, content: Any) -> None:
    """Save tensors to `path` so that a reader sees the old file, the new file or none, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
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
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a cut or foreign file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: damaged or not a checkpoint ({reason})") from None


# --------------------------------------------------------------------------------------------- networks
def load_network(net: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a published or own state_dict strictly: nothing missing, nothing of another shape.

    Let through, with one note: the trunk's unused `fc` (absent, present or of another size), and unused attention
    blocks inside residual blocks (`nonloc` in the name). Raises WrongNetwork, a UserError, in words otherwise.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: not a state_dict of tensors")
    own = net.state_dict()
    extra = [name for name in state if name not in own]
    tolerated = [name for name in extra if name.startswith("model.fc.") or "nonloc" in name]
    unexpected = [name for name in extra if name not in tolerated]
    missing = [name for name in own if name not in state and not name.startswith("model.fc.")]
    if missing or unexpected:
        listing = [f"missing {short(missing)}"] * bool(missing) + [f"unexpected {short(unexpected)}"] * bool(unexpected)
        raise WrongNetwork(f"{source}: belongs to another network ({'; '.join(listing)}); check the config beside it")
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape and not n.startswith("model.fc.")]
    if shapes:
        raise WrongNetwork(describe_mismatch(source, shapes[0], state, own))
    if tolerated:
        print(f"note: {source}: unused tensors left out: {short(tolerated)}", file=sys.stderr)
    usable = {n: state[n] if n in state and state[n].shape == own[n].shape else own[n] for n in own}
    net.load_state_dict(usable)


def describe_mismatch(source: Path, name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
    if re.fullmatch(r"classifier\d?\.classifier\.0\.(weight|bias)", name):
        return (
            f"{source}: made for {theirs[0]} identities, but ID_class is {ours[0]}; "
            "use the training folder it was made for, or train anew"
        )
    return f"{source}: {name} has shape {theirs}, the config asks for {ours}; check the config beside it"


def short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unwrap(content: Any, source: Path) -> Mapping[str, Tensor]:
    """The state_dict in `{'a': state_dict}`."""
    if not isinstance(content, Mapping) or not isinstance(content.get("a"), Mapping):
        raise UserError(f"{source}: not a checkpoint of this format (no state_dict as entry 'a')")
    return content["a"]


# -------------------------------------------------------------------------------------------- snapshots
def snapshots(folder: Path, networks: list[str]) -> list[int]:
    """Iterations of the complete snapshots in a checkpoint folder, ascending; the release's count as complete."""
    release = (folder / "optimizer.pt").is_file()
    iterations = sorted(
        int(match[1])
        for path in folder.glob(f"{networks[0]}_*.pt")
        if (match := re.search(r"_(\d{8})\.pt$", path.name))
    )

    def complete(iteration: int) -> bool:
        files = [folder / f"{name}_{iteration:08d}.pt" for name in networks]
        return all(f.is_file() for f in files) and (release or (folder / f"state_{iteration:08d}.pt").is_file())

    return [iteration for iteration in iterations if complete(iteration)]


def save_snapshot(folder: Path, trainer: Trainer, iteration: int) -> None:
    """Write the snapshot of `iteration` finished steps."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: optimizer.state_dict() for name, optimizer in trainer.optimizers().items()}
    state["scalers"] = {name: scaler.state_dict() for name, scaler in trainer.scalers().items()}
    state["rng"] = torch.get_rng_state()
    state["cuda_rng"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state["iteration"] = iteration
    # The state comes first: networks without one are then the release's, never an interrupted writing of ours.
    write_atomically(folder / f"state_{iteration:08d}.pt", state)
    for name, net in trainer.networks().items():
        write_atomically(folder / f"{name}_{iteration:08d}.pt", {"a": net.state_dict()})


def load_snapshot(folder: Path, trainer: Trainer, iteration: int | None = None) -> int:
    """Restore the newest complete snapshot, or that of `iteration`; returns the number of finished steps.

    Weight ramps, learning rates and data orders are functions of the iteration, so they need no state. Raises
    UserError that offers the previous snapshot when a file is damaged.
    """
    complete = snapshots(folder, list(trainer.networks()))
    if not complete:
        raise UserError(f"{folder}: no complete snapshot to resume from")
    iteration = complete[-1] if iteration is None else iteration
    if iteration not in complete:
        raise UserError(
            f"{folder}: no complete snapshot of iteration {iteration}; there are {', '.join(map(str, complete))}"
        )
    try:
        for name, net in trainer.networks().items():
            path = folder / f"{name}_{iteration:08d}.pt"
            load_network(net, unwrap(read_tensors(path), path), path)
        own = folder / f"state_{iteration:08d}.pt"
        path = own if own.is_file() else folder / "optimizer.pt"
        load_state(read_tensors(path), trainer, path)
    except UserError as error:
        older = [i for i in complete if i < iteration]
        offer = f"; the snapshot before it: --resume {older[-1]}" if older and "damaged" in str(error) else ""
        raise UserError(f"{error}{offer}") from None
    return iteration


def load_state(state: Any, trainer: Trainer, source: Path) -> None:
    """Restore optimisers, and what the release does not keep where it is there: scalers and random state."""
    for name, optimizer in trainer.optimizers().items():
        if not isinstance(state, Mapping) or name not in state:
            raise UserError(f"{source}: no optimiser state '{name}' in it")
        # The file's rates are those of its last step; the schedule starts from the config's.
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(state[name])
        except (ValueError, KeyError) as error:
            raise UserError(f"{source}: optimiser '{name}' does not fit the network ({error})") from None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate
    for name, scaler in trainer.scalers().items():
        if state.get("scalers", {}).get(name):
            scaler.load_state_dict(state["scalers"][name])
    if "rng" in state:
        torch.set_rng_state(state["rng"])
    if state.get("cuda_rng") and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])


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
