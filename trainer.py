"""Training steps of DG-Net and of the teacher. `DGNetTrainer.step` reads top to bottom as section 6 of the spec.

Legend: `x_a`, `x_b` the images of the pair, `xp_a`, `xp_b` others of the same identities; `x_ba` = decode(structure
of b, appearance of a). All images are (N, 3, H, W), normalised.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import losses as L
from config import DGNetConfig, TeacherConfig
from data.pairs import Batch
from distributed import average_gradients, is_main, own_rows, world_size
from networks import Discriminator, Generator, weights_frozen
from reIDmodel import IdNet, build_id_net, build_teacher, enlarge, frozen, same_statistics
from structure_input import structure_input, to_gray
from utils import IMAGENET_MEAN, IMAGENET_STD, UserError

Rng = np.random.Generator
AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# Streams of random draws; each is a pure function of (seed, stream, iteration), so resuming needs no state.
ERASING, ENCODER = 3, 4


@dataclass
class Encoded:
    """Section 6, point 2: structure codes, appearance codes and logits of the pair."""

    s_a: Tensor
    s_b: Tensor
    f_a: Tensor
    f_b: Tensor
    fp_a: Tensor
    fp_b: Tensor
    p_a: L.Logits
    p_b: L.Logits
    pp_a: L.Logits
    pp_b: L.Logits


@dataclass
class Generated:
    """Section 6, point 3: the swaps, the self-reconstructions, the same-identity reconstructions."""

    x_ba: Tensor
    x_ab: Tensor
    x_a_recon: Tensor
    x_b_recon: Tensor
    x_a_recon_p: Tensor
    x_b_recon_p: Tensor


Drawn = tuple[Batch, Batch, Encoded, Generated]  # a pair of batches and what points 2 to 4 make of it


# ---------------------------------------------------------------------------------------- shared pieces
def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as equal parts in its order."""
    n = len(batch.y) // parts
    return [Batch(*(None if v is None else v[i * n : (i + 1) * n] for v in batch)) for i in range(parts)]


def means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of a step from those of its parts."""
    if len(found) == 1:
        return {name: term.detach() for name, term in found[0].items()}
    return {name: torch.stack([terms[name].detach() for terms in found]).mean(dim=0) for name in found[0]}


def passes(net: Callable[[Tensor], Any], images: tuple[Tensor, ...], *, joint: bool) -> list[tuple[Tensor, L.Logits]]:
    """Code and logits of each batch of images, separately or in one pass."""
    if not joint:
        return [net(x) for x in images]
    f, p = net(torch.cat(images))
    logits = zip(*(head.chunk(len(images)) for head in p), strict=True)
    return list(zip(f.chunk(len(images)), logits, strict=True))


def lr_factor(policy: str, t: int, *, step_size: int, gamma: float, max_iter: int) -> float:
    """What the learning rate is multiplied by at iteration `t` (0-based), a pure function of it (section 8)."""
    if policy == "multistep":
        return gamma ** sum(milestone * step_size <= t + 1 for milestone in (1, 1.5, 1.75))
    if policy == "step":
        return gamma ** ((t + 1) // step_size)
    if policy == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(t / max_iter, 1)))
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate becomes its initial rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class NesterovSGD(torch.optim.SGD):
    """The SGD of id net and teacher (section 8), in one fused kernel, whose momentum begins as zeros.

    PyTorch's would begin as whatever lies in memory, which the kernel overwrites in the first step. Where that step is
    skipped, as fp16's first loss scale makes likely, the memory's content stayed as momentum. Zeros give the usual
    first step, bit for bit.
    """

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)

    def step(self, closure: None = None) -> None:
        if not self.state:
            for weight in (weight for group in self.param_groups for weight in group["params"]):
                if weight.grad is not None:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        super().step(closure)


def remember_initial_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def random_erase(x: Tensor, p: float, rng: np.random.Generator) -> Tensor:
    """Random erasing (section 6, point 4): with probability `p` per image a rectangle becomes 0, the ImageNet mean.

    Area fraction uniform in 0.02-0.4, aspect h/w uniform in 0.3-1/0.3, drawn again up to 100 times until it fits.
    """
    # Drawn for the whole batch, of which x is this process's slice.
    n, (height, width) = len(x) * world_size(), x.shape[2:]
    boxes = np.zeros((n, 4), dtype=np.int64)  # top, bottom, left, right; empty: nothing erased
    for i in range(n):
        if rng.random() > p:
            continue
        for _ in range(100):
            area = rng.uniform(0.02, 0.4) * height * width
            aspect = rng.uniform(0.3, 1 / 0.3)
            h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if h < height and w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                boxes[i] = top, top + h, left, left + w
                break
    boxes = own_rows(boxes, len(x))
    top, bottom, left, right = torch.from_numpy(boxes).to(x.device, non_blocking=True).T[..., None, None]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)[None, :]
    erased = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (N, H, W)
    return x.masked_fill(erased[:, None], 0)


def recolour(structure: Tensor, x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Colours of `x` on the brightness of `structure`, both normalised (N, 3, H, W), within the range of pixels.

    Brightness is the mean over the channels, which the structure encoder sees of a gray image.
    """
    x = L.full(x)
    return (to_gray(structure) + x - to_gray(x)).clamp(least, greatest)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The arithmetic of the passes, by what `pick_precision` returns."""
    dtype = AUTOCAST[precision]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def place(net: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The net on the device, channels-last where asked; on a CPU a ResNet is always, which is a fifth faster."""
    if channels_last or (isinstance(net, IdNet) and device.type == "cpu"):
        return net.to(device, memory_format=torch.channels_last)
    return net.to(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself.

    Without, PyTorch imitates it: on a CPU with AVX2 alone a step of the demo takes 7.5 times as long as in fp32.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        tests = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
        return any(test() for test in tests)
    found = torch.cpu.get_capabilities()
    on_arm = found.get("bf16", False) and torch.backends.mkldnn.is_available()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or on_arm)


def pick_precision(device: torch.device, precision: str) -> str:
    """fp32, fp16 or bf16: `precision` itself, and for `auto` bf16 where the device has it, otherwise fp32.

    Raises UserError for fp16 on a CPU, and says so where bf16 is only imitated.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 (apex: true) needs a CUDA GPU; on a CPU use precision: bf16 or fp32")
    if precision == "bf16" and not has_bf16(device) and is_main():
        say_once("note: precision bf16: this device can only imitate it, slowly; fp32 is faster here")
    return precision


@cache
def say_once(note: str) -> None:
    print(note, file=sys.stderr)


# ----------------------------------------------------------------------------------------------- DG-Net
class DGNetTrainer:
    """Encoder, decoder, discriminator, id net and teachers with their optimisers.

    `teachers` are frozen nets for the soft labels; `vgg` maps images to relu5_3 features (only for `vgg_w` > 0).
    """

    def __init__(
        self,
        cfg: DGNetConfig,
        num_classes: int,
        device: torch.device,
        *,
        teachers: list[nn.Module] = (),
        vgg: nn.Module | None = None,
    ) -> None:
        self.cfg, self.num_classes, self.device = cfg, num_classes, device
        self.precision = pick_precision(device, cfg.precision)
        self.id_net = build_id_net(
            cfg.ID_style,
            num_classes,
            backbone=cfg.backbone,
            stride=cfg.ID_stride,
            pool=cfg.pool,
            norm_id=cfg.norm_id,
            detach_f=cfg.detach_f,
        )
        self.gen = Generator(code_dim=self.id_net.code_dim, **cfg.gen.model_dump())
        self.dis = Discriminator(**cfg.dis.model_dump(exclude={"LAMBDA"}))
        self.teachers = [place(teacher, device, cfg.channels_last).eval() for teacher in teachers]
        mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        black_and_white = np.stack([-mean / std, (1 - mean) / std], dtype=np.float32)
        self.pixel_range = torch.from_numpy(black_and_white).view(2, 3, 1, 1).to(device)
        self.vgg = vgg.to(device).eval() if vgg is not None else None
        for net in self.networks().values():
            place(net, device, cfg.channels_last).train()

        adam = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
        self.opt_gen = torch.optim.Adam(self.gen.parameters(), lr=cfg.lr_g, **adam)
        self.opt_dis = torch.optim.Adam(self.dis.parameters(), lr=cfg.lr_d, **adam)
        groups = [{"params": list(self.id_net.model.parameters()), "lr": cfg.lr2}]
        head_lr = cfg.head_lr_factor * cfg.lr2
        groups += [{"params": list(head.parameters()), "lr": head_lr} for head in self.id_net.heads()]
        decay = cfg.weight_decay if cfg.id_weight_decay is None else cfg.id_weight_decay
        self.opt_id = NesterovSGD(groups, decay)
        for optimizer in self.optimizers().values():
            remember_initial_rates(optimizer)
        fp16 = self.precision == "fp16"
        # Encoder, decoder and id net share one backward, so they share a loss scale.
        self.scaler_gen = torch.amp.GradScaler(device.type, enabled=fp16)
        self.scaler_dis = torch.amp.GradScaler(device.type, enabled=fp16)

    def networks(self) -> dict[str, nn.Module]:
        return {"gen": self.gen, "id": self.id_net, "dis": self.dis}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"gen": self.opt_gen, "id": self.opt_id, "dis": self.opt_dis}

    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        return {"gen": self.scaler_gen, "dis": self.scaler_dis}

    def structure_input(self, x: Tensor, rng: np.random.Generator | None = None, images: int | None = None) -> Tensor:
        """What the structure encoder sees of an image: (N, 1, H, W). `rng` and `images` are for edges."""
        return structure_input(x, self.cfg.single, rng, images)

    # ------------------------------------------------------------------------------------ one step
    def step(self, a: Batch, b: Batch, t: int) -> dict[str, Tensor]:
        """Iteration `t` (0-based) on the pair of batches. Returns every unweighted loss term, still on the device."""
        cfg = self.cfg
        weights = L.loss_weights(cfg, t)
        update_id = t >= cfg.id_freeze_iter
        rng = np.random.default_rng((cfg.seed, ENCODER, t))
        live_encoder = rng.random() <= cfg.use_encoder_again

        self.set_learning_rates(t)
        draw = partial(self.draw, erasing=np.random.default_rng((cfg.seed, ERASING, t)), update_id=update_id)
        if cfg.accumulate == 1:
            drawn = [draw(a, b, rng=rng)]
            fakes = [(a, b, generated) for a, b, _, generated in drawn]
        else:
            # One part's graph at a time: D sees the fakes of a first pass, which leaves nothing behind, G a second's,
            # with the same noise.
            pairs = list(zip(split(a, cfg.accumulate), split(b, cfg.accumulate), strict=True))
            noise = partial(self.part_noise, t)
            fakes = (self.rehearse(*pair, noise(i)) for i, pair in enumerate(pairs))
            drawn = (draw(*pair, rng=noise(i)) for i, pair in enumerate(pairs))
        dis_terms = self.update_discriminator(fakes)
        gen_terms = self.update_generator_and_id(drawn, weights, live_encoder, update_id, rng)
        return dis_terms | gen_terms

    def part_noise(self, t: int, part: int) -> Rng:
        """The noise on the edges of a part of iteration `t`'s batch, the same at every call."""
        return np.random.default_rng((self.cfg.seed, ENCODER, t, 1 + part))

    def draw(self, a: Batch, b: Batch, *, rng: Rng, erasing: Rng, update_id: bool) -> Drawn:
        """Points 2 to 4 for a pair of batches."""
        with autocast(self.device, self.precision):
            encoded = self.encode(a, b, rng, update_id)
            generated = self.compose(encoded)
        if self.cfg.erasing_p > 0 and update_id:
            # A context of its own: older PyTorch keeps what was cast under no_grad, without a graph, until one ends.
            with autocast(self.device, self.precision):
                self.classify_erased(a, b, encoded, erasing)
        return a, b, encoded, generated

    @torch.no_grad()
    def rehearse(self, a: Batch, b: Batch, rng: Rng) -> tuple[Batch, Batch, Generated]:
        """Points 2 and 3 without a graph and without a trace in the running statistics."""
        with autocast(self.device, self.precision), same_statistics(self.id_net):
            return a, b, self.compose(self.encode(a, b, rng))

    def set_learning_rates(self, t: int) -> None:
        for name, factor in self.lr_factors(t).items():
            set_learning_rate(self.optimizers()[name], factor)

    def lr_factors(self, t: int) -> dict[str, float]:
        """What the rates of each optimiser are multiplied by at iteration `t`."""
        cfg = self.cfg
        gammas = {"gen": cfg.gamma, "dis": cfg.gamma, "id": cfg.gamma2}
        schedule = dict(step_size=cfg.step_size, max_iter=cfg.max_iter)
        return {name: lr_factor(cfg.lr_policy, t, gamma=gamma, **schedule) for name, gamma in gammas.items()}

    def encode(self, a: Batch, b: Batch, rng: np.random.Generator, update_id: bool = True) -> Encoded:
        """Point 2."""
        s_a, s_b = self.encode_structure(self.structure_input(torch.cat([a.x, b.x]), rng, len(a.x))).chunk(2)
        # Where erasing replaces the logits, of these passes only the code is used; a detached one needs no graph.
        code_alone = self.cfg.erasing_p > 0 and self.cfg.ID_style == "AB" and self.cfg.detach_f
        with nullcontext() if update_id and not code_alone else torch.no_grad():
            seen = self.classify(*map(enlarge, (a.x, b.x, a.xp, b.xp)))
        (f_a, p_a), (f_b, p_b), (fp_a, pp_a), (fp_b, pp_b) = seen
        return Encoded(s_a, s_b, f_a, f_b, fp_a, fp_b, p_a, p_b, pp_a, pp_b)

    def compose(self, e: Encoded) -> Generated:
        """Point 3. The decoder has no batch statistics, so its six passes are one."""
        s = torch.cat([e.s_b, e.s_a, e.s_a, e.s_b, e.s_a, e.s_b])
        f = torch.cat([e.f_a, e.f_b, e.f_a, e.f_b, e.fp_a, e.fp_b])
        return Generated(*self.decode(s, f, batches=6).chunk(6))

    def classify_erased(self, a: Batch, b: Batch, e: Encoded, rng: Rng) -> None:
        """Point 4. Logits of the erased images replace those of the whole ones; erasing touches nothing else."""
        erased = [random_erase(enlarge(x), self.cfg.erasing_p, rng) for x in (a.x, b.x, a.xp, b.xp)]
        e.p_a, e.p_b, e.pp_a, e.pp_b = (logits for _, logits in self.classify(*erased))

    def update_discriminator(self, fakes: Iterable[tuple[Batch, Batch, Generated]]) -> dict[str, Tensor]:
        """Point 5, and Adam's step."""
        cfg, found = self.cfg, []
        self.opt_dis.zero_grad()
        for a, b, g in fakes:
            with autocast(self.device, self.precision):
                real, fake, dis = torch.cat([a.x, b.x]), torch.cat([g.x_ba, g.x_ab]), cfg.dis
                loss, terms = L.discriminator_loss(self.dis, real, fake, gan_type=dis.gan_type, penalty=dis.LAMBDA)
            total = cfg.gan_w * loss
            self.scaler_dis.scale(total / cfg.accumulate).backward()
            found.append({"dis_total": total} | terms)
        average_gradients(self.opt_dis)
        self.scaler_dis.step(self.opt_dis)
        self.scaler_dis.update()
        return means(found)

    def update_generator_and_id(
        self,
        drawn: Iterable[Drawn],
        weights: L.LossWeights,
        live_encoder: bool,
        update_id: bool,
        rng: Rng,
    ) -> dict[str, Tensor]:
        """Point 6, with the updated D: one backward of section 7's total, Adam's step, SGD's step."""
        found = []
        self.opt_gen.zero_grad()
        self.opt_id.zero_grad()
        for a, b, encoded, generated in drawn:
            with autocast(self.device, self.precision):
                total, terms = self.generator_and_id_loss(
                    a, b, encoded, generated, weights, live_encoder, update_id, rng
                )
            self.scaler_gen.scale(total / self.cfg.accumulate).backward()
            found.append({"gen_total": total} | terms)
        updated = [self.opt_gen, self.opt_id] if update_id else [self.opt_gen]
        average_gradients(*updated)
        for optimizer in updated:
            self.scaler_gen.step(optimizer)
        self.scaler_gen.update()
        return means(found)

    def generator_and_id_loss(
        self,
        a: Batch,
        b: Batch,
        e: Encoded,
        g: Generated,
        w: L.LossWeights,
        live_encoder: bool,
        update_id: bool,
        rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Every term of section 7 with its weight. What costs a pass of its own is left out while its weight is 0."""
        cfg = self.cfg
        weighted: list[Tensor] = []
        terms: dict[str, Tensor] = {}

        def add(name: str, weight: float, value: Tensor) -> None:
            weighted.append(weight * value)
            terms[name] = value

        # Adversarial: D's own weights get no gradient here.
        if cfg.gan_w > 0:
            with weights_frozen(self.dis):
                scores = self.dis(torch.cat([g.x_ba, g.x_ab]))
            add("adv_a", cfg.gan_w, L.adversarial_loss([d.chunk(2)[0] for d in scores], cfg.dis.gan_type))
            add("adv_b", cfg.gan_w, L.adversarial_loss([d.chunk(2)[1] for d in scores], cfg.dis.gan_type))

        # Reconstruction of the images.
        add("recon_x_a", cfg.recon_x_w, L.l1(g.x_a_recon, a.x))
        add("recon_x_b", cfg.recon_x_w, L.l1(g.x_b_recon, b.x))
        add("recon_xp_a", cfg.recon_xp_w, L.l1(g.x_a_recon_p, a.x))
        add("recon_xp_b", cfg.recon_xp_w, L.l1(g.x_b_recon_p, b.x))

        # Structure of the fakes: live encoder on detached fakes, or frozen encoder on live fakes.
        if w.recon_s_w > 0 or w.recon_x_cyc_w > 0:
            fakes = torch.cat([g.x_ab, g.x_ba])
            with nullcontext() if live_encoder else weights_frozen(self.gen):
                fakes = self.structure_input(fakes.detach() if live_encoder else fakes, rng, len(a.x))
                s_a, s_b = self.encode_structure(fakes, live=live_encoder).chunk(2)
            if w.recon_s_w > 0:
                add("recon_s_a", w.recon_s_w, L.l1(s_a, e.s_a))
                add("recon_s_b", w.recon_s_w, L.l1(s_b, e.s_b))

        # Appearance of the fakes: a frozen id net, live fakes.
        if cfg.recon_id_w > 0 or w.recon_f_w > 0 or w.recon_x_cyc_w > 0:
            (f_a, p_a), (f_b, p_b) = self.classify_frozen(enlarge(g.x_ba), enlarge(g.x_ab))
            if w.recon_f_w > 0:
                add("recon_f_a", w.recon_f_w, L.l1(f_a, e.f_a))
                add("recon_f_b", w.recon_f_w, L.l1(f_b, e.f_b))
            if cfg.recon_id_w > 0:
                prim_a, prim_b = (L.split_heads(p, cfg.ID_style)[0] for p in (p_a, p_b))
                add("recon_id", cfg.recon_id_w, L.cross_entropy(prim_a, a.y) + L.cross_entropy(prim_b, b.y))
            if w.recon_x_cyc_w > 0:
                x_aba, x_bab = self.decode(torch.cat([s_a, s_b]), torch.cat([f_a, f_b]), batches=2).chunk(2)
                add("cyc_a", w.recon_x_cyc_w, L.l1(x_aba, a.x))
                add("cyc_b", w.recon_x_cyc_w, L.l1(x_bab, b.x))

        if cfg.vgg_w > 0:
            add("vgg_a", cfg.vgg_w, L.perceptual_loss(self.vgg, g.x_ab, a.x))
            add("vgg_b", cfg.vgg_w, L.perceptual_loss(self.vgg, g.x_ba, b.x))

        # Identities of the real images, and the teacher's labels of the fakes: they train the id net.
        if update_id:
            style = cfg.ID_style
            fine_w = w.teacher_w * cfg.B_w
            loss_a = L.identity_loss(e.p_a, a.y, id_style=style, fine_w=fine_w)
            loss_b = L.identity_loss(e.p_b, b.y, id_style=style, fine_w=fine_w)
            add("id", cfg.id_w, loss_a + loss_b)
            prim_a, prim_b = (L.split_heads(p, style)[0] for p in (e.pp_a, e.pp_b))
            add("pid", cfg.pid_w, L.cross_entropy(prim_a, a.y) + L.cross_entropy(prim_b, b.y))
            if w.teacher_w > 0:
                x_ba, x_ab = self.fed_back(a, b, g, rng)
                q_a, q_b = self.soft_labels(x_ba, a.y, b.y), self.soft_labels(x_ab, b.y, a.y)
                (_, p_ba), (_, p_ab) = self.classify(enlarge(x_ba), enlarge(x_ab))
                how = dict(id_style=style, t_w=cfg.T_w, b_w=cfg.B_w)
                loss_a, loss_b = L.teacher_loss(p_ba, q_a, b.y, **how), L.teacher_loss(p_ab, q_b, a.y, **how)
                add("teacher", w.teacher_w, loss_a + loss_b)

        return torch.stack(weighted).sum(), terms

    def fed_back(self, a: Batch, b: Batch, g: Generated, rng: Rng) -> tuple[Tensor, Tensor]:
        """The images of the teacher loss, x_ba and x_ab: besides the real ones, all that the id net learns from."""
        x_ba, x_ab = g.x_ba.detach(), g.x_ab.detach()
        if self.cfg.fed_back == "generated":
            return x_ba, x_ab
        return recolour(b.x, x_ba, *self.pixel_range), recolour(a.x, x_ab, *self.pixel_range)

    # ---------------------------------------------------------------------------------- passes
    def classify(self, *images: Tensor) -> list[tuple[Tensor, L.Logits]]:
        """Code and logits of each batch of images: a pass with BatchNorm statistics of its own for each (section 6).

        With `joint_bn` they are one pass with common statistics.
        """
        return passes(partial(self.recomputed, self.id_net, same_statistics), images, joint=self.cfg.joint_bn)

    def classify_frozen(self, *images: Tensor) -> list[tuple[Tensor, L.Logits]]:
        """As `classify`, by the id net as it stands: the gradient reaches the images only."""
        how = partial(frozen, batch_statistics=self.cfg.train_bn)
        with how(self.id_net):
            if not self.cfg.train_bn:
                # By running statistics the images do not see each other: one pass. Its statistics are those of now,
                # which the backward could not make again.
                return passes(self.id_net, images, joint=True)
            return passes(partial(self.recomputed, self.id_net, how), images, joint=self.cfg.joint_bn)

    def encode_structure(self, g: Tensor, *, live: bool = True) -> Tensor:
        return self.recomputed(self.gen.enc_content, nullcontext if live else weights_frozen, g)

    def decode(self, s: Tensor, f: Tensor, *, batches: int) -> Tensor:
        if not self.cfg.recompute:
            return self.gen.decode(s, f)
        # A batch at a time, or the recomputed pass would fill the memory that it is to save.
        parts = zip(s.chunk(batches), f.chunk(batches), strict=True)
        return torch.cat([checkpoint(self.gen.decode, *part, use_reentrant=False) for part in parts])

    def recomputed(self, net: nn.Module, again: Callable[[nn.Module], AbstractContextManager], x: Tensor) -> Any:
        """`net(x)`; with `recompute` its activations are thrown away and made again in the backward, under `again`."""
        if not self.cfg.recompute or not torch.is_grad_enabled():
            return net(x)
        return checkpoint(net, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again(net)))

    @torch.no_grad()
    def soft_labels(self, fake: Tensor, y_app: Tensor, y_str: Tensor) -> Tensor:
        """The teachers' label (N, K) of a fake (section 7); style 0 averages the image and its mirror."""
        cfg, prediction = self.cfg, None
        if cfg.teacher_style not in (2, 3):
            with ExitStack() as stack:
                for teacher in self.teachers:
                    stack.enter_context(frozen(teacher, batch_statistics=cfg.train_bn))
                prediction = L.mean_prediction(self.teachers, enlarge(fake.detach()))
        return L.soft_labels(
            prediction, y_app, y_str, style=cfg.teacher_style, num_classes=self.num_classes, dtype=L.full(fake).dtype
        )

    # ------------------------------------------------------------------------------------- looking
    @torch.no_grad()
    def sample(self, x_a: Tensor, x_b: Tensor) -> dict[str, Tensor]:
        """Figures in eval mode: reconstructions, both swaps and cycles of the pairs, each (N, 3, H, W) float."""
        modes = {net: net.training for net in self.networks().values()}
        for net in modes:
            net.eval()
        rng = np.random.default_rng(0)
        try:
            with autocast(self.device, self.precision):
                s_a, s_b = self.gen.encode(self.structure_input(torch.cat([x_a, x_b]), rng)).chunk(2)
                f_a, f_b = self.id_net(enlarge(torch.cat([x_a, x_b])))[0].chunk(2)
                decoded = self.gen.decode(torch.cat([s_a, s_b, s_b, s_a]), torch.cat([f_a, f_b, f_a, f_b]))
                x_a_recon, x_b_recon, x_ba, x_ab = decoded.chunk(4)
                s = self.gen.encode(self.structure_input(torch.cat([x_ab, x_ba]), rng))
                f = self.id_net(enlarge(torch.cat([x_ba, x_ab])))[0]
                x_aba, x_bab = self.gen.decode(s, f).chunk(2)
        finally:
            for net, mode in modes.items():
                net.train(mode)
        images = dict(
            x_a=x_a, x_a_recon=x_a_recon, x_ba=x_ba, x_aba=x_aba, x_b=x_b, x_b_recon=x_b_recon, x_ab=x_ab, x_bab=x_bab
        )
        return {name: image.float() for name, image in images.items()}


# ---------------------------------------------------------------------------------------------- teacher
class TeacherTrainer:
    """A one-head ResNet trained on identities: the teacher's recipe, and the baseline."""

    def __init__(self, cfg: TeacherConfig, num_classes: int, device: torch.device, *, steps_per_epoch: int) -> None:
        self.cfg, self.device, self.steps_per_epoch = cfg, device, steps_per_epoch
        self.precision = pick_precision(device, cfg.precision)
        self.max_iter = cfg.epochs * steps_per_epoch
        self.net: IdNet = build_teacher(num_classes, backbone=cfg.backbone, stride=cfg.stride, dropout=cfg.dropout)
        place(self.net, device, cfg.channels_last).train()
        groups = [
            {"params": list(self.net.model.parameters()), "lr": cfg.trunk_lr_factor * cfg.lr},
            {"params": list(self.net.classifier.parameters()), "lr": cfg.lr},
        ]
        self.optimizer = remember_initial_rates(NesterovSGD(groups, cfg.weight_decay))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def networks(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"net": self.optimizer}

    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        return {"net": self.scaler}

    def lr_factor(self, t: int) -> float:
        """Linear warm-up, then a tenth after two thirds of the run, or a cosine to 0."""
        cfg = self.cfg
        warm = cfg.warm_epochs * self.steps_per_epoch
        factor = min(1.0, (t + 1) / warm) if warm else 1.0
        if cfg.lr_policy == "cosine":
            return factor * 0.5 * (1 + math.cos(math.pi * t / self.max_iter))
        return factor * (0.1 if t >= self.max_iter * 2 // 3 else 1.0)

    def step(self, batch: Batch, t: int) -> dict[str, Tensor]:
        """Iteration `t` (0-based): cross-entropy of the batch, SGD's step. Returns the loss and the accuracy.

        The target is the soft label where the batch has one: generated images among the real ones.
        """
        set_learning_rate(self.optimizer, self.lr_factor(t))
        x = enlarge(batch.x)
        if self.cfg.erasing_p > 0:
            x = random_erase(x, self.cfg.erasing_p, np.random.default_rng((self.cfg.seed, ERASING, t)))
        with autocast(self.device, self.precision):
            _, p = self.net(x)
            loss = L.cross_entropy(p, batch.y if batch.q is None else batch.q)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        average_gradients(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"id": loss.detach(), "accuracy": (p[0].argmax(dim=1) == batch.y).float().mean()}
