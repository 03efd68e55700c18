"""The plain training step: docs/method.md written down line by line, with nothing made fast.

What `benchmarks/train_step.py` compares the real step with. Every image goes through every network by itself, the
frozen passes run on copies of the networks, every pass records a graph for all of its weights, and the layers are the
textbook's: fast.py takes no part. It computes the same numbers: the golden cases check it too.

Legend: `x_a`, `x_b` the images of the pair, `xp_a`, `xp_b` others of the same identities; `x_ba` = decode(structure
of b, appearance of a).
"""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import losses as L
from data.batch import Batch
from data.erasing import erasing_mask
from networks import to_gray
from reIDmodel import seen_size
from trainer import Decoded, DGNetTrainer, Encoded, Plan


class PlainTrainer(DGNetTrainer):
    """A DGNetTrainer that makes its steps the plain way. fp32 or fp64; `single: gray`; no several processes."""

    def __init__(self, *args, **kwargs) -> None:
        with patch("trainer.accelerate", lambda net, device, channels_last: net.to(device)):
            super().__init__(*args, **kwargs)

    def encode(self, a: Batch, b: Batch, plan: Plan) -> Encoded:
        s_a, s_b = self.gen.encode(to_gray(a.x)), self.gen.encode(to_gray(b.x))
        f_a, p_a = self.id_net(a.x)
        f_b, p_b = self.id_net(b.x)
        fp_a, pp_a = self.id_net(a.xp)
        fp_b, pp_b = self.id_net(b.xp)
        return Encoded(s_a, s_b, f_a, f_b, fp_a, fp_b, p_a, p_b, pp_a, pp_b)

    def decode(self, e: Encoded) -> Decoded:
        decode = self.gen.decode
        return Decoded(
            x_ba=decode(e.s_b, e.f_a),
            x_ab=decode(e.s_a, e.f_b),
            x_a_recon=decode(e.s_a, e.f_a),
            x_b_recon=decode(e.s_b, e.f_b),
            x_a_recon_p=decode(e.s_a, e.fp_a),
            x_b_recon_p=decode(e.s_b, e.fp_b),
        )

    def classify(self, a: Batch, b: Batch, e: Encoded, plan: Plan) -> None:
        p, size = self.cfg.erasing_p, seen_size(*a.x.shape[2:])
        if p > 0:
            masks = [erasing_mask(len(a.x), *size, p, plan.erasing, device=self.device) for _ in range(4)]
            logits = [self.id_net(x, mask)[1] for x, mask in zip((a.x, b.x, a.xp, b.xp), masks, strict=True)]
            e.p_a, e.p_b, e.pp_a, e.pp_b = logits

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """D's loss on one pair, with its gradient penalty."""
        gan_type, loss = self.cfg.dis.gan_type, 0.0
        real = real.detach().requires_grad_()
        for r, f in zip(self.dis(real), self.dis(fake.detach()), strict=True):  # per scale
            if gan_type == "lsgan":
                loss = loss + f.square().mean() + (r - 1).square().mean()
            elif gan_type == "nsgan":
                f, r = torch.sigmoid(f), torch.sigmoid(r)
                loss = loss + F.binary_cross_entropy(f, torch.zeros_like(f))
                loss = loss + F.binary_cross_entropy(r, torch.ones_like(r))
            else:  # wgan
                loss = loss + f.mean() - r.mean() + 0.001 * (f.square().sum() + r.square().sum())
            (grad,) = torch.autograd.grad(r.sum(), real, create_graph=True)
            loss = loss + self.cfg.dis.LAMBDA * grad.flatten(1).square().sum(dim=1).mean()
        return loss

    def update_discriminator(self, a: Batch, b: Batch, d: Decoded) -> L.Terms:
        terms = {"dis_a": self.discriminator_loss(a.x, d.x_ba), "dis_b": self.discriminator_loss(b.x, d.x_ab)}
        terms["dis_total"] = self.cfg.gan_w * (terms["dis_a"] + terms["dis_b"])
        self.opt_dis.zero_grad()
        terms["dis_total"].backward()
        self.opt_dis.step()
        return {name: term.detach() for name, term in terms.items()}

    def soft_label(self, fake: Tensor, y_app: Tensor, y_str: Tensor) -> Tensor:
        """The label of a fake, by a copy of every teacher."""
        fake, views = fake.detach(), []
        for teacher in (frozen_copy(teacher, self.cfg.train_bn) for teacher in self.teachers):
            views += [torch.softmax(teacher(x)[1][0], dim=1) for x in (fake, fake.flip(3))]
        label = torch.stack(views).mean(dim=0).detach()
        return L.soft_labels(
            label, y_app, y_str, style=self.cfg.teacher_style, num_classes=self.num_classes, dtype=fake.dtype
        )

    def update_generator_and_id(self, a: Batch, b: Batch, e: Encoded, d: Decoded, plan: Plan) -> L.Terms:
        cfg, w, terms = self.cfg, plan.weights, {}
        encoder = self.gen if plan.live_encoder else copy.deepcopy(self.gen)
        x_ab, x_ba = (x.detach() if plan.live_encoder else x for x in (d.x_ab, d.x_ba))
        s_a, s_b = encoder.encode(to_gray(x_ab)), encoder.encode(to_gray(x_ba))
        id_net = frozen_copy(self.id_net, cfg.train_bn)
        f_a, p_a = id_net(d.x_ba)
        f_b, p_b = id_net(d.x_ab)

        for name, x in (("adv_a", d.x_ba), ("adv_b", d.x_ab)):
            scores, loss = self.dis(x), 0.0
            for score in scores:
                if cfg.dis.gan_type == "lsgan":
                    loss = loss + 2 * (score - 1).square().mean()
                elif cfg.dis.gan_type == "nsgan":
                    loss = loss + F.binary_cross_entropy(torch.sigmoid(score), torch.ones_like(score))
                else:  # wgan
                    loss = loss - score.mean() + 0.001 * score.square().sum()
            terms[name] = loss
        total = cfg.gan_w * (terms["adv_a"] + terms["adv_b"])
        terms["recon_x_a"], terms["recon_x_b"] = L.l1(d.x_a_recon, a.x), L.l1(d.x_b_recon, b.x)
        total = total + cfg.recon_x_w * (terms["recon_x_a"] + terms["recon_x_b"])
        terms["recon_xp_a"], terms["recon_xp_b"] = L.l1(d.x_a_recon_p, a.x), L.l1(d.x_b_recon_p, b.x)
        total = total + cfg.recon_xp_w * (terms["recon_xp_a"] + terms["recon_xp_b"])
        if w["recon_f"] > 0:
            terms["recon_f_a"], terms["recon_f_b"] = L.l1(f_a, e.f_a), L.l1(f_b, e.f_b)
            total = total + w["recon_f"] * (terms["recon_f_a"] + terms["recon_f_b"])
        if w["recon_s"] > 0:
            terms["recon_s_a"], terms["recon_s_b"] = L.l1(s_a, e.s_a), L.l1(s_b, e.s_b)
            total = total + w["recon_s"] * (terms["recon_s_a"] + terms["recon_s_b"])
        if w["cyc"] > 0:
            terms["cyc_a"] = L.l1(self.gen.decode(s_a, f_a), a.x)
            terms["cyc_b"] = L.l1(self.gen.decode(s_b, f_b), b.x)
            total = total + w["cyc"] * (terms["cyc_a"] + terms["cyc_b"])
        style, fine_w = dict(id_style=cfg.ID_style), w["teacher"] * cfg.B_w
        terms["id"] = sum(L.identity_loss(p, y, fine_w=fine_w, **style) for p, y in ((e.p_a, a.y), (e.p_b, b.y)))
        total = total + cfg.id_w * terms["id"]
        terms["pid"] = L.primary_loss(e.pp_a, a.y, **style) + L.primary_loss(e.pp_b, b.y, **style)
        total = total + cfg.pid_w * terms["pid"]
        terms["recon_id"] = L.primary_loss(p_a, a.y, **style) + L.primary_loss(p_b, b.y, **style)
        total = total + cfg.recon_id_w * terms["recon_id"]
        if w["teacher"] > 0:
            q_a, q_b = self.soft_label(d.x_ba, a.y, b.y), self.soft_label(d.x_ab, b.y, a.y)
            how = dict(id_style=cfg.ID_style, t_w=cfg.T_w, b_w=cfg.B_w)
            p_ba, p_ab = self.id_net(d.x_ba.detach())[1], self.id_net(d.x_ab.detach())[1]
            terms["teacher"] = L.teacher_loss(p_ba, q_a, b.y, **how) + L.teacher_loss(p_ab, q_b, a.y, **how)
            total = total + w["teacher"] * terms["teacher"]

        self.opt_gen.zero_grad()
        self.opt_id.zero_grad()
        dis_grads = [p.grad for p in self.dis.parameters()]
        self.opt_dis.zero_grad()
        total.backward()
        self.opt_gen.step()
        self.opt_id.step()
        for p, grad in zip(self.dis.parameters(), dis_grads, strict=True):
            p.grad = grad  # the gradients of D's own update, for whoever looks at them afterwards
        return {name: term.detach() for name, term in (terms | {"gen_total": total}).items()}


def frozen_copy(net: nn.Module, batch_statistics: bool) -> nn.Module:
    """A copy whose weights and running statistics nobody reads again; its dropout is off."""
    net = copy.deepcopy(net).train(batch_statistics)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net
