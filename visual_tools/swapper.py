"""The generator of a finished run, ready to swap clothes: one loader for every figure and measure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import DGNetConfig
from networks import Generator
from reIDmodel import IdNet, enlarge
from runs import RunFolder, load_generator, load_id_net, pick_epoch, run_config
from structure_input import to_edge, to_gray
from utils import UserError


@dataclass(frozen=True)
class Swapper:
    """Both networks of a run in eval mode; images are normalised batches (N, 3, H, W) of `size`."""

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
        x = x.to(self.device)
        return self.gen.encode(to_gray(x) if self.cfg.single == "gray" else to_edge(x, np.random.default_rng(0)))

    @torch.no_grad()
    def appearance(self, x: Tensor) -> Tensor:
        """Appearance codes of images."""
        return self.id_net(enlarge(x.to(self.device)))[0]

    @torch.no_grad()
    def decode(self, s: Tensor, f: Tensor) -> Tensor:
        """Images from structure and appearance codes."""
        return self.gen.decode(s, f)

    def swap(self, x_app: Tensor, x_str: Tensor) -> Tensor:
        """The clothes of `x_app` on the people of `x_str`."""
        return self.decode(self.structure(x_str), self.appearance(x_app))


def load_swapper(run: RunFolder, device: torch.device, which: str | None = None) -> Swapper:
    """Id net and generator of a run's newest snapshot, or of that of iteration `which`."""
    cfg = run_config(run)
    if not isinstance(cfg, DGNetConfig):
        raise UserError(f"{run.name} is a teacher's run and generates nothing; give the --name of a DG-Net run")
    iteration = pick_epoch(run, cfg.task, which)
    id_net = load_id_net(run, cfg, iteration, device)
    gen = load_generator(run, cfg, iteration, id_net.code_dim, device)
    return Swapper(cfg, iteration, id_net, gen, device)
