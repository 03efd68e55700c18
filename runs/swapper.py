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
from networks import Generator, structure_input
from reIDmodel import IdNet
from runs.folder import RunFolder, generator_config, open_run
from runs.load import load_generator, load_id_net, pick_epoch
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

    Raises UserError if a file does not fit the config, or if the id net knows other identities than the config says.
    """
    cfg = generator_config(run)
    iteration = pick_epoch(run, which)
    id_net = load_id_net(run, cfg, iteration, device)
    if cfg.ID_class not in ("auto", id_net.num_classes):
        raise UserError(
            f"{run.checkpoints}: the id net after {iteration} steps knows {id_net.num_classes} identities, but "
            f"ID_class in {run.config_file} is {cfg.ID_class}; put this run's own id net back"
        )
    return Swapper(run, cfg, iteration, id_net, load_generator(run, cfg, iteration, id_net.code_dim, device), device)
