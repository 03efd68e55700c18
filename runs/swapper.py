"""The generator of a finished run, ready to swap clothes: one loader for every figure and measure."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import DGNetConfig
from data.images import iter_images, to_uint8
from files import read_tensors
from networks import Generator, structure_input
from reIDmodel import IdNet
from runs.folder import RunFolder, generator_config, open_run
from runs.load import load_generator, load_id_net, pick_epoch
from runs.snapshot import snapshot_folder
from runs.weights import WrongNetwork
from utils import UserError, pick_device, set_threads


@dataclass(frozen=True)
class Swapper:
    """Both networks of a run in eval mode; images are normalised batches (N, 3, H, W) of `size`."""

    run: RunFolder
    cfg: DGNetConfig
    iteration: int
    id_net: IdNet
    gen: Generator
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        return self.cfg.crop_image_height, self.cfg.crop_image_width

    @torch.no_grad()
    def structure(self, x: Tensor) -> Tensor:
        """Structure codes of images."""
        return self.gen.encode(structure_input(x.to(self.device), self.cfg.single, np.random.default_rng(0)))

    @torch.no_grad()
    def appearance(self, x: Tensor) -> Tensor:
        """Appearance codes of images."""
        return self.id_net(x.to(self.device))[0]

    @torch.no_grad()
    def decode(self, s: Tensor, f: Tensor) -> Tensor:
        """Images from structure and appearance codes."""
        return self.gen.decode(s, f)

    def swap(self, x_app: Tensor, x_str: Tensor) -> Tensor:
        """The clothes of `x_app` on the people of `x_str`."""
        return self.decode(self.structure(x_str), self.appearance(x_app))

    def read(self, paths: Sequence[Path], batch_size: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """Image files at the model's size, (n, H, W, 3) uint8, with their structure and their appearance codes.

        Raises UserError naming an undecodable file.
        """
        parts = [
            (to_uint8(x), self.structure(x), self.appearance(x)) for x in iter_images(paths, *self.size, batch_size)
        ]
        originals, s, f = zip(*parts, strict=True)
        return np.concatenate(originals), torch.cat(s), torch.cat(f)

    def compose(self, f: Tensor, s: Tensor, pairs: Sequence[tuple[int, int]], batch_size: int) -> Iterator[np.ndarray]:
        """One image (H, W, 3) uint8 per pair (i, j), in their order: the appearance `f[i]` on the structure `s[j]`."""
        for start in range(0, len(pairs), batch_size):
            i, j = map(list, zip(*pairs[start : start + batch_size], strict=True))
            yield from to_uint8(self.decode(s[j], f[i]))


def open_swapper(args: argparse.Namespace) -> Swapper:
    """The model that the options of `utils.add_run_arguments` name."""
    device = pick_device(args.device)
    set_threads(args.threads)
    return load_swapper(open_run(args.output_path, args.name), device, args.which_epoch)


def load_swapper(run: RunFolder, device: torch.device, which: str | None = None) -> Swapper:
    """Id net and generator of a run's newest snapshot, or of that of iteration `which`.

    Raises UserError also when one of the two came from another run, as far as shapes tell, and says which.
    """
    cfg = generator_config(run)
    iteration = pick_epoch(run, which)
    id_net = gen = None
    wrong = []
    try:
        id_net = load_id_net(run, cfg, iteration, device)
    except WrongNetwork as error:
        wrong.append(("id", "gen", error))
    try:
        code_dim = id_net.code_dim if id_net is not None else cfg.gen.n_res * cfg.gen.id_dim
        gen = load_generator(run, cfg, iteration, code_dim, device)
    except WrongNetwork as error:
        wrong.append(("gen", "id", error))
    if len(wrong) == 1:
        part, other, error = wrong[0]
        reason = str(error).removesuffix("; check the config beside it")
        raise UserError(
            f"{reason}; {other}_{iteration:08d}.pt fits the config, so the two are from different runs: "
            f"put this run's own {part}_{iteration:08d}.pt back"
        )
    if wrong:
        raise wrong[0][2]
    check_identities(run, cfg, iteration, id_net)
    return Swapper(run, cfg, iteration, id_net, gen, device)


def check_identities(run: RunFolder, cfg: DGNetConfig, iteration: int, id_net: IdNet) -> None:
    """Raise UserError when the id net knows another number of identities than the run was trained on."""
    classes = id_net.num_classes
    source = run.config_file
    expected = cfg.ID_class
    if expected == "auto":
        source = snapshot_folder(run.checkpoints, iteration) / "state.pt"
        expected = trained_identities(source)
    if expected not in (None, classes):
        raise UserError(
            f"{source.parent}: id.pt knows {classes} identities, but by state.pt this run was trained on {expected}; "
            "put this run's id.pt back"
        )


def trained_identities(state_file: Path) -> int | None:
    """The number of identities that the optimisers' state of a snapshot is for; None where it does not tell."""
    try:
        state = read_tensors(state_file, mmap=True)["id"]
        # Parameters are numbered as the net has them; the last is the bias of the last head's classifier.
        return len(state["state"][state["param_groups"][-1]["params"][-1]]["momentum_buffer"])
    except (UserError, LookupError, TypeError):
        return None  # no state, or one from before the id net's first step: figures need none
