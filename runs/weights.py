"""Weights: found in a file or in torchvision's cache, and loaded strictly."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torchvision.models
from torch import Tensor
from torchvision.models import VGG16_Weights, get_model_weights, list_models, vgg16
from torchvision.models.resnet import ResNet

from backbones import TIMM, TimmTrunk, create_timm
from config import DGNetConfig
from files import read_tensors
from reIDmodel import IdNet
from utils import UserError, one_line

log = logging.getLogger(__name__)
PREFIXES = ("module", "_orig_mod")


class WrongNetwork(UserError):
    """Weights that are sound but belong to another network than the one that is to load them."""


def digest_weights(*nets: nn.Module) -> str:
    """SHA-256 of every tensor of the nets with its name."""
    digest = hashlib.sha256()
    for net in nets:
        for name, tensor in sorted(net.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_network(net: nn.Module, state: Mapping[str, Tensor], source: Path, config: str = "the config") -> None:
    """Load a state_dict strictly, a published one or ours: nothing may be missing or of another shape.

    Let through, with one note: the trunk's unused `fc` (absent, present or of another size), and unused attention
    blocks inside residual blocks (`nonloc` in the name). Raises WrongNetwork, a UserError, in words otherwise.
    """
    if not isinstance(state, Mapping) or not all(isinstance(n, str) and isinstance(state[n], Tensor) for n in state):
        raise UserError(f"{source}: not a state_dict of tensors; replace the file")
    wanted = net.state_dict()
    extra = [name for name in state if name not in wanted]
    tolerated = [name for name in extra if name.startswith("model.fc.") or "nonloc" in name]
    unexpected = [name for name in extra if name not in tolerated]
    missing = [name for name in wanted if name not in state and not name.startswith("model.fc.")]
    if missing or unexpected:
        listing = [f"missing {short(missing)}"] * bool(missing) + [f"unexpected {short(unexpected)}"] * bool(unexpected)
        raise WrongNetwork(f"{source}: belongs to another network ({'; '.join(listing)}); check {config} beside it")
    shapes = [n for n in wanted if n in state and wanted[n].shape != state[n].shape and not n.startswith("model.fc.")]
    if shapes:
        raise WrongNetwork(describe_mismatch(source, shapes[0], state, wanted, config))
    if tolerated:
        log.info("%s: unused tensors left out: %s", source, short(tolerated))
    usable = {n: state[n] if n in state and state[n].shape == wanted[n].shape else wanted[n] for n in wanted}
    net.load_state_dict(usable)


def describe_mismatch(
    source: Path, name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], config: str
) -> str:
    theirs, ours = tuple(state[name].shape), tuple(own[name].shape)
    if re.fullmatch(r"classifier\d?\.classifier\.0\.(weight|bias)", name):
        return (
            f"{source}: made for {theirs[0]} identities, but ID_class is {ours[0]}; "
            "use the training folder it was made for, or train anew"
        )
    return f"{source}: {name} has shape {theirs}, {config} asks for {ours}; check {config} beside it"


def short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unwrap(content: Any, source: Path) -> Mapping[str, Tensor]:
    """The state_dict in `{'a': state_dict}`."""
    if not isinstance(content, Mapping) or not isinstance(content.get("a"), Mapping):
        raise UserError(f"{source}: not a checkpoint of this format (no state_dict as entry 'a'); replace the file")
    return plain_names(content["a"], source)


def plain_names(content: Any, source: Path) -> Mapping[str, Tensor]:
    """The state_dict that a file holds, bare or as entry `state_dict`, without the prefixes of other tools.

    DataParallel puts `module` into the names, torch.compile `_orig_mod`. A note says which were taken off.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{source}: not a state_dict of tensors; replace the file")
    removed = [prefix for prefix in PREFIXES if any(prefix in name.split(".") for name in content)]
    if not removed:
        return content
    plain = {".".join(part for part in name.split(".") if part not in PREFIXES): v for name, v in content.items()}
    if len(plain) < len(content):
        raise UserError(f"{source}: holds the same tensors with and without the prefix {removed[0]}; replace the file")
    log.info("%s: taken off the names: %s", source, ", ".join(f"{prefix}." for prefix in removed))
    return plain


def start_from_teacher(id_net: IdNet, teacher: IdNet, cfg: DGNetConfig) -> None:
    """`id_init: teacher`: copy the teacher's trunk, and its head into every head of the same size.

    Raises UserError for another backbone or neck.
    """
    try:
        id_net.model.load_state_dict(teacher.model.state_dict())
    except RuntimeError:
        raise UserError(
            f"id_init: teacher: the teacher {cfg.teachers[0]} has another backbone than {cfg.backbone}"
        ) from None
    head = teacher.heads()[0].state_dict()
    if {len(own.state_dict()) for own in id_net.heads()} != {len(head)}:
        raise UserError(f"id_init: teacher: the teacher {cfg.teachers[0]} has another neck than {cfg.neck}")
    if type(getattr(id_net, "pool", teacher.pool)) is not type(teacher.pool):
        log.warning("id_init: teacher: the teacher's head was trained with another pooling than pool: %s", cfg.pool)
    for own in id_net.heads():
        if {name: v.shape for name, v in own.state_dict().items()} == {name: v.shape for name, v in head.items()}:
            own.load_state_dict(head)


def load_vgg(cfg: DGNetConfig) -> nn.Module:
    """VGG-16 up to relu5_3 with ImageNet weights from `vgg_weights` or torchvision's cache, frozen."""
    path = find_weights(VGG16_Weights.IMAGENET1K_V1.url, cfg.vgg_weights, "vgg_weights: FILE, or vgg_w: 0")
    net = vgg16(weights=None)
    load_network(net, plain_names(read_tensors(path), path), path)
    return net.features[:30].requires_grad_(False)


def load_imagenet(trunk: ResNet | TimmTrunk, name: str, file: str | None) -> None:
    """Load ImageNet weights into a trunk called `name`, from `file` or the cache of torchvision or timm.

    Raises UserError that says which file to put where.
    """
    net: nn.Module = trunk.net if isinstance(trunk, TimmTrunk) else trunk
    instead = "--backbone-weights FILE, or pretrained: false"
    if isinstance(trunk, TimmTrunk) and file is None:
        net.load_state_dict(timm_weights(name.removeprefix(TIMM), instead))
        return
    if file is None and name not in list_models(torchvision.models):
        raise UserError(
            f"backbone {name} has no ImageNet weights; set pretrained: false or give --backbone-weights FILE"
        )
    # The first set of weights (IMAGENET1K_V1) is what the published numbers started from.
    url = "" if file else next(iter(get_model_weights(name))).url
    path = find_weights(url, file, instead)
    try:
        state = plain_names(read_tensors(path), path)
        if isinstance(trunk, TimmTrunk):  # without the classifier that a file may hold
            heads = net.pretrained_cfg["classifier"]
            heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
            state = {key: value for key, value in state.items() if not key.startswith(heads)}
        net.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not ImageNet weights of {name} ({first_line(error)}); replace the file") from None


def timm_weights(name: str, instead: str) -> Mapping[str, Tensor]:
    """The weights that timm has for a network, from its cache or downloaded. Raises UserError that says what to do."""
    try:
        return create_timm(name, pretrained=True).state_dict()
    except UserError:
        raise
    except Exception as error:  # huggingface_hub raises many kinds where it reaches nothing
        raise UserError(
            f"backbone {TIMM}{name}: its weights cannot be downloaded ({one_line(error)}); put them into timm's cache "
            f"($HF_HOME), or use {instead}"
        ) from None


def find_weights(url: str, file: str | None, instead: str) -> Path:
    """The given file of weights, or torchvision's cached one, downloaded if that is possible and checked by its hash.

    Raises UserError that says what to put where, or to use `instead`.
    """
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file of weights; give {instead}")
        return Path(file)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The end of the name is the beginning of the file's SHA-256.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError):
            raise UserError(
                f"{path.name} cannot be downloaded here; put it into {path.parent}, or use {instead}"
            ) from None
    return path


def first_line(error: Exception) -> str:
    """The first informative line of an exception's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    heading = len(lines) > 1 and lines[0].startswith("Error(s) in loading")
    return lines[1 if heading else 0][:200]
