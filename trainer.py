"""The training steps of DG-Net and of the teacher. `DGNetTrainer.step` reads as docs/method.md, "The training step".

Legend: `x_a`, `x_b` the images of the pair, `xp_a`, `xp_b` others of the same identities; `x_ba` = decode(structure
of b, appearance of a). All images are (N, 3, H, W), normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import losses as L
from config import DGNetConfig, TeacherConfig
from data.batch import ALL, Batch, Part
from data.erasing import erasing_mask
from fast import accelerate, recompute
from frozen import frozen, weights_frozen
from metric import batch_hard_triplet, circle_loss
from networks import Discriminator, Generator, structure_input, to_gray
from optim import adam, id_adam, id_sgd, lr_factor, set_rates, teacher_lr_factor, update_average
from precision import autocast, pick_precision
from reIDmodel import Logits, build_id_net, build_teacher, seen_size
from utils import IMAGENET_MEAN, IMAGENET_STD

# Streams of random draws; each is a pure function of (seed, stream, iteration), so resuming needs no state.
ERASING, ENCODER = 3, 4


@dataclass
class Plan:
    """What is decided for one iteration before it begins.

    weights       of the loss terms
    live_encoder  the structure of the fakes is encoded by the live encoder, from detached fakes; otherwise by the
                  frozen one, from live fakes
    update_id     the id net is updated
    rng           for the noise on edges
    erasing       for random erasing
    """

    weights: dict[str, float]
    live_encoder: bool
    update_id: bool
    rng: np.random.Generator
    erasing: np.random.Generator


@dataclass
class Encoded:
    """Structure codes, appearance codes and logits of the pair."""

    s_a: Tensor
    s_b: Tensor
    f_a: Tensor
    f_b: Tensor
    fp_a: Tensor
    fp_b: Tensor
    p_a: Logits
    p_b: Logits
    pp_a: Logits
    pp_b: Logits


@dataclass
class Decoded:
    """The swaps, the self-reconstructions, the same-identity reconstructions."""

    x_ba: Tensor
    x_ab: Tensor
    x_a_recon: Tensor
    x_b_recon: Tensor
    x_a_recon_p: Tensor
    x_b_recon_p: Tensor


def recolour(structure: Tensor, x: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """Colours of `x` on the brightness of `structure`, both normalised (N, 3, H, W), within the range of pixels.

    Brightness is the mean over the channels, which the structure encoder sees of a gray image.
    """
    x = L.full(x)
    return (to_gray(structure) + x - to_gray(x)).clamp(least, greatest)


# ----------------------------------------------------------------------------------------------- DG-Net
class DGNetTrainer:
    """Encoder, decoder, discriminator, id net and teachers with their optimisers.

    teachers           frozen nets for the soft labels
    vgg                maps images to relu5_3 features; only for `vgg_w` > 0
    part               the slice of every batch that this process has
    average_gradients  replaces the gradients of optimisers by their mean over all processes
    """

    def __init__(
        self,
        cfg: DGNetConfig,
        num_classes: int,
        device: torch.device,
        *,
        teachers: Sequence[nn.Module] = (),
        vgg: nn.Module | None = None,
        part: Part = ALL,
        average_gradients: Callable[..., None] = lambda *optimizers: None,
    ) -> None:
        self.cfg, self.num_classes, self.device = cfg, num_classes, device
        self.part, self.average_gradients = part, average_gradients
        self.precision = pick_precision(device, cfg.precision)
        id_options = dict(stride=cfg.ID_stride, pool=cfg.pool, norm_id=cfg.norm_id, detach_f=cfg.detach_f)
        id_options |= dict(neck=cfg.neck)
        id_net = build_id_net(cfg.ID_style, num_classes, backbone=cfg.backbone, **id_options)
        gen = Generator(code_dim=id_net.code_dim, **cfg.gen.model_dump())
        dis = Discriminator(**cfg.dis.model_dump(exclude={"LAMBDA"}))
        resnet_layout = cfg.channels_last or device.type == "cpu"  # a fifth faster on a CPU
        self.id_net = accelerate(id_net, device, channels_last=resnet_layout).train()
        self.gen = accelerate(gen, device, channels_last=cfg.channels_last).train()
        self.dis = accelerate(dis, device, channels_last=cfg.channels_last).train()
        self.teachers = [accelerate(net, device, channels_last=resnet_layout).eval() for net in teachers]
        self.vgg = vgg.to(device).eval() if vgg is not None else None
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.pixel_range = torch.stack([-mean / std, (1 - mean) / std]).float().to(device)

        betas, decay = (cfg.beta1, cfg.beta2), cfg.weight_decay
        self.opt_gen = adam(self.gen.parameters(), cfg.lr_g, betas=betas, decay=decay)
        self.opt_dis = adam(self.dis.parameters(), cfg.lr_d, betas=betas, decay=decay)
        id_decay = decay if cfg.id_weight_decay is None else cfg.id_weight_decay
        self.opt_id = id_sgd(self.id_net, trunk_lr=cfg.lr2, head_lr=cfg.head_lr_factor * cfg.lr2, decay=id_decay)
        # Encoder, decoder and id net share one backward, so they share a loss scale.
        scaler = partial(torch.amp.GradScaler, device.type, enabled=self.precision == "fp16")
        self.scaler_gen, self.scaler_dis = scaler(), scaler()
        if cfg.recompute:
            self.gen.encode = recompute(self.gen.encode, self.gen)
            self.gen.decode = recompute(self.gen.decode, self.gen, cfg.batch_size // part.count)
            self.id_net.forward = recompute(self.id_net.forward, self.id_net)

    def networks(self) -> dict[str, nn.Module]:
        return {"gen": self.gen, "id": self.id_net, "dis": self.dis}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"gen": self.opt_gen, "id": self.opt_id, "dis": self.opt_dis}

    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        return {"gen": self.scaler_gen, "dis": self.scaler_dis}

    # ------------------------------------------------------------------------------------ one step
    def step(self, a: Batch, b: Batch, t: int) -> L.Terms:
        """Iteration `t` (0-based) on the pair of batches. Returns every unweighted loss term, still on the device."""
        plan = self.plan(t)
        self.set_learning_rates(t)
        encoded = self.encode(a, b, plan)
        decoded = self.decode(encoded)
        self.classify(a, b, encoded, plan)
        dis_terms = self.update_discriminator(a, b, decoded)
        gen_terms = self.update_generator_and_id(a, b, encoded, decoded, plan)
        return dis_terms | gen_terms

    def plan(self, t: int) -> Plan:
        """Weights, draws and what is updated at iteration `t`."""
        cfg = self.cfg
        rng, erasing = (np.random.default_rng((cfg.seed, stream, t)) for stream in (ENCODER, ERASING))
        live_encoder = rng.random() <= cfg.use_encoder_again
        return Plan(L.loss_weights(cfg, t), live_encoder, t >= cfg.id_freeze_iter, rng, erasing)

    def set_learning_rates(self, t: int) -> None:
        for name, factor in self.lr_factors(t).items():
            set_rates(self.optimizers()[name], factor)

    def lr_factors(self, t: int) -> dict[str, float]:
        """What every optimiser's rates are multiplied by at iteration `t`."""
        cfg = self.cfg
        factor = partial(lr_factor, cfg.lr_policy, t, step_size=cfg.step_size, max_iter=cfg.max_iter)
        return {"gen": factor(gamma=cfg.gamma), "dis": factor(gamma=cfg.gamma), "id": factor(gamma=cfg.gamma2)}

    def encode(self, a: Batch, b: Batch, plan: Plan) -> Encoded:
        """Structure codes of x_a and x_b; appearance codes and logits of x_a, x_b, xp_a and xp_b."""
        # Where erasing replaces the logits, only the code of these passes is used; a detached one needs no graph.
        code_alone = self.cfg.erasing_p > 0 and self.cfg.ID_style == "AB" and self.cfg.detach_f
        with autocast(self.device, self.precision):
            s_a, s_b = self.gen.encode(self.structure_input(plan, a.x, b.x)).chunk(2)
            with nullcontext() if plan.update_id and not code_alone else torch.no_grad():
                (f_a, p_a), (f_b, p_b), (fp_a, pp_a), (fp_b, pp_b) = self.id_passes(a.x, b.x, a.xp, b.xp)
        return Encoded(s_a, s_b, f_a, f_b, fp_a, fp_b, p_a, p_b, pp_a, pp_b)

    def decode(self, e: Encoded) -> Decoded:
        """The swaps and the reconstructions. The decoder has no batch statistics, so its six passes are one."""
        s = torch.cat([e.s_b, e.s_a, e.s_a, e.s_b, e.s_a, e.s_b])
        f = torch.cat([e.f_a, e.f_b, e.f_a, e.f_b, e.fp_a, e.fp_b])
        with autocast(self.device, self.precision):
            return Decoded(*self.gen.decode(s, f).chunk(6))

    def classify(self, a: Batch, b: Batch, e: Encoded, plan: Plan) -> None:
        """With random erasing, the logits of erased images replace those of the whole ones; the codes stay."""
        if self.cfg.erasing_p == 0 or not plan.update_id:
            return
        size = seen_size(*a.x.shape[2:])
        how = dict(p=self.cfg.erasing_p, rng=plan.erasing, device=self.device, part=self.part)
        masks = [erasing_mask(len(a.x), *size, **how) for _ in range(4)]
        with autocast(self.device, self.precision):
            passes = self.id_passes(a.x, b.x, a.xp, b.xp, erased=masks)
        e.p_a, e.p_b, e.pp_a, e.pp_b = (logits for _, logits in passes)

    def update_discriminator(self, a: Batch, b: Batch, d: Decoded) -> L.Terms:
        """D learns to tell x_a from x_ba and x_b from x_ab: its loss with the gradient penalty, and Adam's step."""
        cfg = self.cfg
        with autocast(self.device, self.precision):
            real, fake = torch.cat([a.x, b.x]), torch.cat([d.x_ba, d.x_ab])
            how = dict(gan_type=cfg.dis.gan_type, penalty=cfg.dis.LAMBDA, processes=self.part.count)
            terms = L.discriminator_terms(self.dis, real, fake, **how)
            total = cfg.gan_w * (terms["dis_a"] + terms["dis_b"])
        self.opt_dis.zero_grad()
        self.scaler_dis.scale(total).backward()
        self.average_gradients(self.opt_dis)
        self.scaler_dis.step(self.opt_dis)
        self.scaler_dis.update()
        return {name: term.detach() for name, term in ({"dis_total": total} | terms).items()}

    def update_generator_and_id(self, a: Batch, b: Batch, e: Encoded, d: Decoded, plan: Plan) -> L.Terms:
        """With the updated D: one backward of the weighted sum, Adam's step for the generator, SGD's for the id net."""
        with autocast(self.device, self.precision):
            terms = self.generator_and_id_terms(a, b, e, d, plan)
            total = L.weighted_sum(terms, plan.weights)
        self.opt_gen.zero_grad()
        self.opt_id.zero_grad()
        self.scaler_gen.scale(total).backward()
        updated = [self.opt_gen, self.opt_id] if plan.update_id else [self.opt_gen]
        self.average_gradients(*updated)
        for optimizer in updated:
            self.scaler_gen.step(optimizer)
        self.scaler_gen.update()
        return {name: term.detach() for name, term in ({"gen_total": total} | terms).items()}

    # ----------------------------------------------------------------------------- the terms of a step
    def generator_and_id_terms(self, a: Batch, b: Batch, e: Encoded, d: Decoded, plan: Plan) -> L.Terms:
        """Every term of the total. One that costs a pass of its own is left out while its weight is 0."""
        cfg, w, terms = self.cfg, plan.weights, {}
        if w["adv"] > 0:
            with weights_frozen(self.dis):  # D's own weights get no gradient here
                fakes, how = torch.cat([d.x_ba, d.x_ab]), dict(processes=self.part.count)
                terms |= L.adversarial_terms(self.dis, fakes, gan_type=cfg.dis.gan_type, **how)
        terms |= {"recon_x_a": L.l1(d.x_a_recon, a.x), "recon_x_b": L.l1(d.x_b_recon, b.x)}
        terms |= {"recon_xp_a": L.l1(d.x_a_recon_p, a.x), "recon_xp_b": L.l1(d.x_b_recon_p, b.x)}
        terms |= self.terms_of_the_fakes_codes(a, b, e, d, plan)
        if w["vgg"] > 0:
            terms["vgg_a"] = L.perceptual_loss(self.vgg, d.x_ab, a.x)
            terms["vgg_b"] = L.perceptual_loss(self.vgg, d.x_ba, b.x)
        if plan.update_id:
            style, fine_w = dict(id_style=cfg.ID_style, smoothing=cfg.label_smoothing), w["teacher"] * cfg.B_w
            terms["id"] = L.identity_loss(e.p_a, a.y, fine_w=fine_w, **style)
            terms["id"] = terms["id"] + L.identity_loss(e.p_b, b.y, fine_w=fine_w, **style)
            terms["pid"] = L.primary_loss(e.pp_a, a.y, **style) + L.primary_loss(e.pp_b, b.y, **style)
            if w["teacher"] > 0:
                terms["teacher"] = self.teacher_term(a, b, d, plan)
        return terms

    def terms_of_the_fakes_codes(self, a: Batch, b: Batch, e: Encoded, d: Decoded, plan: Plan) -> L.Terms:
        """Structure and appearance codes of the fakes, their identities, and the cycles through their codes."""
        cfg, w, terms = self.cfg, plan.weights, {}
        # The live encoder sees detached fakes, or a frozen encoder sees live fakes.
        if w["recon_s"] > 0 or w["cyc"] > 0:
            with nullcontext() if plan.live_encoder else weights_frozen(self.gen):
                fakes = [x.detach() if plan.live_encoder else x for x in (d.x_ab, d.x_ba)]
                s_a, s_b = self.gen.encode(self.structure_input(plan, *fakes)).chunk(2)
            if w["recon_s"] > 0:
                terms |= {"recon_s_a": L.l1(s_a, e.s_a), "recon_s_b": L.l1(s_b, e.s_b)}
        # A frozen id net sees live fakes.
        if w["recon_id"] > 0 or w["recon_f"] > 0 or w["cyc"] > 0:
            (f_a, p_a), (f_b, p_b) = self.frozen_id_passes(d.x_ba, d.x_ab)
            if w["recon_f"] > 0:
                terms |= {"recon_f_a": L.l1(f_a, e.f_a), "recon_f_b": L.l1(f_b, e.f_b)}
            if w["recon_id"] > 0:
                style = dict(id_style=cfg.ID_style)
                terms["recon_id"] = L.primary_loss(p_a, a.y, **style) + L.primary_loss(p_b, b.y, **style)
            if w["cyc"] > 0:
                x_aba, x_bab = self.gen.decode(torch.cat([s_a, s_b]), torch.cat([f_a, f_b])).chunk(2)
                terms |= {"cyc_a": L.l1(x_aba, a.x), "cyc_b": L.l1(x_bab, b.x)}
        return terms

    def teacher_term(self, a: Batch, b: Batch, d: Decoded, plan: Plan) -> Tensor:
        """The id net learns the teachers' labels of the fakes, and the identities whose structure they have."""
        x_ba, x_ab = self.fed_back(a, b, d, plan.rng)
        q_a, q_b = self.soft_labels(x_ba, a.y, b.y), self.soft_labels(x_ab, b.y, a.y)
        (_, p_ba), (_, p_ab) = self.id_passes(x_ba, x_ab)
        how = dict(id_style=self.cfg.ID_style, t_w=self.cfg.T_w, b_w=self.cfg.B_w)
        return L.teacher_loss(p_ba, q_a, b.y, **how) + L.teacher_loss(p_ab, q_b, a.y, **how)

    def fed_back(self, a: Batch, b: Batch, d: Decoded, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The images of the teacher term, x_ba and x_ab: besides the real ones, all that the id net learns from."""
        x_ba, x_ab = d.x_ba.detach(), d.x_ab.detach()
        if self.cfg.fed_back == "generated":
            return x_ba, x_ab
        return recolour(b.x, x_ba, *self.pixel_range), recolour(a.x, x_ab, *self.pixel_range)

    @torch.no_grad()
    def soft_labels(self, fake: Tensor, y_app: Tensor, y_str: Tensor) -> Tensor:
        """The teachers' label (N, K) of a fake."""
        cfg, prediction = self.cfg, None
        if cfg.teacher_style not in (2, 3):
            with ExitStack() as stack:
                for teacher in self.teachers:
                    stack.enter_context(frozen(teacher, batch_statistics=cfg.train_bn))
                prediction = L.mean_prediction(self.teachers, fake.detach())
        how = dict(style=cfg.teacher_style, num_classes=self.num_classes, dtype=L.full(fake).dtype)
        return L.soft_labels(prediction, y_app, y_str, **how)

    # ---------------------------------------------------------------------------------- passes
    def structure_input(self, plan: Plan, *batches: Tensor) -> Tensor:
        """What the structure encoder sees of the batches, one after the other: (k N, 1, H, W)."""
        return structure_input(torch.cat(batches), self.cfg.single, plan.rng, len(batches[0]), self.part)

    def id_passes(self, *batches: Tensor, erased: Sequence[Tensor] = ()) -> list[tuple[Tensor, Logits]]:
        """Code and logits of every batch, from a pass with its own BatchNorm statistics.

        With `joint_bn` all batches share one pass and its statistics.
        """
        if self.cfg.joint_bn:
            return self.one_id_pass(*batches, erased=erased)
        return [self.id_net(*inputs) for inputs in (zip(batches, erased, strict=True) if erased else zip(batches))]

    def one_id_pass(self, *batches: Tensor, erased: Sequence[Tensor] = ()) -> list[tuple[Tensor, Logits]]:
        """Code and logits of every batch, from a single pass of all."""
        f, p = self.id_net(torch.cat(batches), torch.cat(list(erased)) if erased else None)
        logits = zip(*(head.chunk(len(batches)) for head in p), strict=True)
        return list(zip(f.chunk(len(batches)), logits, strict=True))

    def frozen_id_passes(self, *batches: Tensor) -> list[tuple[Tensor, Logits]]:
        """As `id_passes`, by the id net as it stands: the gradient reaches the images only."""
        with frozen(self.id_net, batch_statistics=self.cfg.train_bn):
            # By running statistics the images do not see each other, so one pass serves all.
            return self.id_passes(*batches) if self.cfg.train_bn else self.one_id_pass(*batches)


# ---------------------------------------------------------------------------------------------- teacher
class TeacherTrainer:
    """A one-head ResNet trained on identities: the teacher's recipe, and the baseline. Options as of DGNetTrainer."""

    def __init__(
        self,
        cfg: TeacherConfig,
        num_classes: int,
        device: torch.device,
        *,
        steps_per_epoch: int,
        part: Part = ALL,
        average_gradients: Callable[..., None] = lambda *optimizers: None,
    ) -> None:
        self.cfg, self.device, self.steps_per_epoch = cfg, device, steps_per_epoch
        self.part, self.average_gradients = part, average_gradients
        self.precision = pick_precision(device, cfg.precision)
        self.max_iter = cfg.epochs * steps_per_epoch
        options = dict(stride=cfg.stride, dropout=cfg.dropout, pool=cfg.pool, neck=cfg.neck)
        net = build_teacher(num_classes, backbone=cfg.backbone, **options)
        self.net = accelerate(net, device, channels_last=cfg.channels_last or device.type == "cpu").train()
        make = {"sgd": id_sgd, "adam": id_adam}[cfg.optimizer]
        self.optimizer = make(net, trunk_lr=cfg.trunk_lr_factor * cfg.lr, head_lr=cfg.lr, decay=cfg.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.average = deepcopy(self.net).requires_grad_(False) if cfg.ema_decay > 0 else None

    @property
    def trained(self) -> nn.Module:
        """What becomes the teacher: the average of the weights if one is kept."""
        return self.net if self.average is None else self.average

    def networks(self) -> dict[str, nn.Module]:
        return {"net": self.net} | ({} if self.average is None else {"average": self.average})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"net": self.optimizer}

    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        return {"net": self.scaler}

    def lr_factor(self, t: int) -> float:
        """What the learning rates are multiplied by at iteration `t`."""
        warm_iter = self.cfg.warm_epochs * self.steps_per_epoch
        return teacher_lr_factor(self.cfg.lr_policy, t, warm_iter=warm_iter, max_iter=self.max_iter)

    def step(self, batch: Batch, t: int) -> L.Terms:
        """Iteration `t` (0-based): cross-entropy and metric losses of the batch, SGD's step.

        Returns every unweighted loss and the accuracy.

        The target is the soft label where the batch has one: generated images among the real ones.
        """
        cfg, mask = self.cfg, None
        set_rates(self.optimizer, self.lr_factor(t))
        if cfg.erasing_p > 0:
            rng, size = np.random.default_rng((cfg.seed, ERASING, t)), seen_size(*batch.x.shape[2:])
            mask = erasing_mask(len(batch.x), *size, cfg.erasing_p, rng, device=self.device, part=self.part)
        with autocast(self.device, self.precision):
            m = self.net.feature_map(batch.x, mask)
            _, p = self.net.code_and_logits(m)
            terms = {"id": L.cross_entropy(p, batch.y if batch.q is None else batch.q, cfg.label_smoothing)}
            if cfg.triplet_w > 0:
                terms["triplet"] = batch_hard_triplet(self.net.pooled(m), batch.y)
            if cfg.circle_w > 0:
                terms["circle"] = circle_loss(self.net.pooled(m), batch.y)
            total = L.weighted_sum(terms, {"id": 1.0, "triplet": cfg.triplet_w, "circle": cfg.circle_w})
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.average_gradients(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            update_average(self.average, self.net, cfg.ema_decay, t)
        accuracy = (p[0].argmax(dim=1) == batch.y).float().mean()
        return {name: term.detach() for name, term in terms.items()} | {"accuracy": accuracy}
