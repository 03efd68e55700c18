"""Looking at a run while it trains (`eval_iter`): re-identification, and on embedded data the swaps' errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data.folders import have_cameras, read_split
from data.listing import unsaid
from mannequins.dataset import is_embedded, load_factors
from networks import structure_input
from parallel import collectives
from precision import autocast
from reid_eval.features import extract_data_set
from reid_eval.ranking import main_setting
from reid_eval.report import evaluate_features
from runs.folder import resolve_data_root
from runs.swapper import Swapper
from trainer import DGNetTrainer
from utils import evaluating

if TYPE_CHECKING:
    from runs.session import Session

BATCH_SIZE, SWAPS = 32, 64


@unsaid()  # test.py says it; a progress bar has no place for it
def evaluate(s: Session, done: int) -> dict[str, float]:
    """Scalars by tag, of the nets after `done` steps, each in 0..1 but for the swaps' errors (`mannequins.truth`).

    `eval/reid_mAP_official`, `eval/reid_rank1_official` and the same for `standard`: the query images, by the score
    that the net is used with. `eval/swap_l1_changed`, `eval/swap_l1_changed_of_copy`, `eval/swap_psnr`,
    `eval/swap_ssim`: of embedded data, the same swaps of query images every time.

    Nets and random state are left as they were. Of several processes all have to call this, because they share the
    work; process 0's values are those of the weights that it would save.
    """
    cfg, trainer = s.cfg, s.trainer
    root, size = resolve_data_root(cfg.data_root), (cfg.crop_image_height, cfg.crop_image_width)
    with as_saved(trainer.id_net, trainer.gen):
        sides = extract_data_set(
            trainer.id_net, root, size=size, batch_size=BATCH_SIZE, device=s.device, progress=False
        )
        setting, _ = main_setting(sides.query.features.shape[1])
        found = {}
        cameras = have_cameras(sides.query, sides.gallery)
        for row in evaluate_features(sides.query, sides.gallery, remove_same_camera=cameras):
            if row.setting == setting:
                found |= {f"eval/reid_{key}_{row.convention}": row.numbers[key] for key in ("mAP", "rank1")}
        if not (collectives.is_main() and is_embedded(root)):
            return found
        from mannequins.truth import draw_swaps, measure_swaps  # seconds, which the other processes can do without

        model = Swapper(s.run, cfg, done, trainer.id_net, trainer.gen, s.device)
        swaps = draw_swaps(
            model.swap, load_factors(root), read_split(root, "query"), size=size, count=SWAPS, batch_size=BATCH_SIZE
        )
    rows = measure_swaps(swaps)
    found |= {f"eval/swap_{key}": rows["generated"][key] for key in ("psnr", "ssim")}
    return found | {
        "eval/swap_l1_changed": rows["generated"]["changed"],
        "eval/swap_l1_changed_of_copy": rows["copy"]["changed"],
    }


@contextmanager
def as_saved(*nets: nn.Module) -> Iterator[None]:
    """The nets in eval mode, with process 0's running statistics; afterwards as they were before."""
    buffers = [buffer for net in nets for buffer in net.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with evaluating(*nets):
        collectives.share_tensors(buffers)
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@torch.no_grad()
def sample_pairs(trainer: DGNetTrainer, x_a: Tensor, x_b: Tensor) -> dict[str, Tensor]:
    """What a run makes of pairs of normalised images: reconstructions, both swaps and cycles, (N, 3, H, W) float32.

    The nets run in eval mode and are left as they were.
    """
    gen, id_net, rng = trainer.gen, trainer.id_net, np.random.default_rng(0)

    def encode(structure: Tensor, appearance: Tensor) -> tuple[Tensor, ...]:
        s = gen.encode(structure_input(structure, trainer.cfg.single, rng))
        return *s.chunk(2), *id_net(appearance)[0].chunk(2)

    with evaluating(gen, id_net), autocast(trainer.device, trainer.precision):
        s_a, s_b, f_a, f_b = encode(torch.cat([x_a, x_b]), torch.cat([x_a, x_b]))
        decoded = gen.decode(torch.cat([s_a, s_b, s_b, s_a]), torch.cat([f_a, f_b, f_a, f_b]))
        x_a_recon, x_b_recon, x_ba, x_ab = decoded.chunk(4)
        s_a, s_b, f_a, f_b = encode(torch.cat([x_ab, x_ba]), torch.cat([x_ba, x_ab]))
        x_aba, x_bab = gen.decode(torch.cat([s_a, s_b]), torch.cat([f_a, f_b])).chunk(2)
    images = dict(
        x_a=x_a, x_a_recon=x_a_recon, x_ba=x_ba, x_aba=x_aba, x_b=x_b, x_b_recon=x_b_recon, x_ab=x_ab, x_bab=x_bab
    )
    return {name: image.float() for name, image in images.items()}
