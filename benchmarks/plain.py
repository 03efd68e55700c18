"""The plain training step: section 6 of the specification written down line by line, with nothing made fast.

What `benchmarks/train_step.py` compares the real step with. Every image goes through every network by itself,
the frozen passes run on copies of the networks, every pass records a graph for all of its weights, and the
norms, activations and the enlargement are the ones a textbook would write. It computes the same numbers: the golden
cases check it too (tests/test_golden.py).

Legend: `x_a`, `x_b` the images of the pair, `xp_a`, `xp_b` others of the same identities; `x_ba` = decode(structure
of b, appearance of a).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import losses as L
from data.pairs import Batch
from networks import AdaIN, InstanceNorm, LayerNorm, UpConvBlock
from reIDmodel import enlarge
from structure_input import to_gray
from trainer import ENCODER, ERASING, DGNetTrainer, Encoded, Generated, random_erase


# --------------------------------------------------------------------------------------------- layers
class PlainInstanceNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x)


class PlainLayerNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        flat, shape = x.flatten(1), (-1,) + (1,) * (x.dim() - 1)
        x = (x - flat.mean(1).view(shape)) / (flat.std(1).view(shape) + self.eps)
        channels = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.gamma.view(channels) + self.beta.view(channels)


class PlainAdaIN(AdaIN):
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.instance_norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class PlainUpConvBlock(UpConvBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(F.interpolate(x, scale_factor=2))))


PLAIN = {
    InstanceNorm: PlainInstanceNorm,
    LayerNorm: PlainLayerNorm,
    AdaIN: PlainAdaIN,
    UpConvBlock: PlainUpConvBlock,
}


def make_plain(net: nn.Module) -> None:
    """Exchange the layers that were made fast for the textbook's, in place; parameters and their names stay."""
    for module in net.modules():
        if isinstance(module, nn.LeakyReLU | nn.ReLU | nn.SELU):
            module.inplace = False
        elif type(module) in PLAIN:
            # They differ in `forward` alone.
            module.__class__ = PLAIN[type(module)]


# ----------------------------------------------------------------------------------------------- step
class PlainTrainer(DGNetTrainer):
    """A DGNetTrainer that makes its steps the plain way. fp32 or fp64; `single: gray`; no several processes."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for net in [*self.networks().values(), *self.teachers]:
            make_plain(net.to(memory_format=torch.contiguous_format))

    def encode(self, a: Batch, b: Batch) -> Encoded:
        """Point 2."""
        s_a, s_b = self.gen.encode(to_gray(a.x)), self.gen.encode(to_gray(b.x))
        f_a, p_a = self.id_net(enlarge(a.x))
        f_b, p_b = self.id_net(enlarge(b.x))
        fp_a, pp_a = self.id_net(enlarge(a.xp))
        fp_b, pp_b = self.id_net(enlarge(b.xp))
        return Encoded(s_a, s_b, f_a, f_b, fp_a, fp_b, p_a, p_b, pp_a, pp_b)

    def compose(self, e: Encoded) -> Generated:
        """Point 3."""
        decode = self.gen.decode
        return Generated(
            x_ba=decode(e.s_b, e.f_a),
            x_ab=decode(e.s_a, e.f_b),
            x_a_recon=decode(e.s_a, e.f_a),
            x_b_recon=decode(e.s_b, e.f_b),
            x_a_recon_p=decode(e.s_a, e.fp_a),
            x_b_recon_p=decode(e.s_b, e.fp_b),
        )

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Section 5 for one pair."""
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

    def soft_label(self, fake: Tensor, y_app: Tensor, y_str: Tensor) -> Tensor:
        """Section 7, on a copy of each teacher."""
        fake, views = enlarge(fake.detach()), []
        for teacher in (frozen_copy(teacher, self.cfg.train_bn) for teacher in self.teachers):
            views += [torch.softmax(teacher(x)[1][0], dim=1) for x in (fake, fake.flip(3))]
        label = torch.stack(views).mean(dim=0).detach()
        return L.soft_labels(
            label, y_app, y_str, style=self.cfg.teacher_style, num_classes=self.num_classes, dtype=fake.dtype
        )

    def step(self, a: Batch, b: Batch, t: int) -> dict[str, Tensor]:
        """Iteration `t` on the pair of batches; the same terms as the real step's."""
        cfg, w, style = self.cfg, L.loss_weights(self.cfg, t), self.cfg.ID_style
        live_encoder = np.random.default_rng((cfg.seed, ENCODER, t)).random() <= cfg.use_encoder_again
        terms: dict[str, Tensor] = {}

        # Points 1 to 4: rates, codes, images, erasing.
        self.set_learning_rates(t)
        e = self.encode(a, b)
        g = self.compose(e)
        if cfg.erasing_p > 0:
            rng = np.random.default_rng((cfg.seed, ERASING, t))
            erased = [random_erase(enlarge(x), cfg.erasing_p, rng) for x in (a.x, b.x, a.xp, b.xp)]
            e.p_a, e.p_b, e.pp_a, e.pp_b = (self.id_net(x)[1] for x in erased)

        # Point 5: the discriminator.
        self.opt_dis.zero_grad()
        terms["dis_a"] = self.discriminator_loss(a.x, g.x_ba)
        terms["dis_b"] = self.discriminator_loss(b.x, g.x_ab)
        terms["dis_total"] = cfg.gan_w * (terms["dis_a"] + terms["dis_b"])
        terms["dis_total"].backward()
        self.opt_dis.step()

        # Point 6: the generator and the id net, with the updated discriminator.
        encoder = self.gen if live_encoder else copy.deepcopy(self.gen)
        x_ab, x_ba = (x.detach() if live_encoder else x for x in (g.x_ab, g.x_ba))
        s_a, s_b = encoder.encode(to_gray(x_ab)), encoder.encode(to_gray(x_ba))
        id_net = frozen_copy(self.id_net, cfg.train_bn)
        f_a, p_a = id_net(enlarge(g.x_ba))
        f_b, p_b = id_net(enlarge(g.x_ab))

        terms["adv_a"] = L.adversarial_loss(self.dis(g.x_ba), cfg.dis.gan_type)
        terms["adv_b"] = L.adversarial_loss(self.dis(g.x_ab), cfg.dis.gan_type)
        total = cfg.gan_w * (terms["adv_a"] + terms["adv_b"])
        terms["recon_x_a"], terms["recon_x_b"] = L.l1(g.x_a_recon, a.x), L.l1(g.x_b_recon, b.x)
        total = total + cfg.recon_x_w * (terms["recon_x_a"] + terms["recon_x_b"])
        terms["recon_xp_a"], terms["recon_xp_b"] = L.l1(g.x_a_recon_p, a.x), L.l1(g.x_b_recon_p, b.x)
        total = total + cfg.recon_xp_w * (terms["recon_xp_a"] + terms["recon_xp_b"])
        if w.recon_f_w > 0:
            terms["recon_f_a"], terms["recon_f_b"] = L.l1(f_a, e.f_a), L.l1(f_b, e.f_b)
            total = total + w.recon_f_w * (terms["recon_f_a"] + terms["recon_f_b"])
        if w.recon_s_w > 0:
            terms["recon_s_a"], terms["recon_s_b"] = L.l1(s_a, e.s_a), L.l1(s_b, e.s_b)
            total = total + w.recon_s_w * (terms["recon_s_a"] + terms["recon_s_b"])
        if w.recon_x_cyc_w > 0:
            terms["cyc_a"] = L.l1(self.gen.decode(s_a, f_a), a.x)
            terms["cyc_b"] = L.l1(self.gen.decode(s_b, f_b), b.x)
            total = total + w.recon_x_cyc_w * (terms["cyc_a"] + terms["cyc_b"])
        fine_w = w.teacher_w * cfg.B_w
        terms["id"] = sum(L.identity_loss(p, y, id_style=style, fine_w=fine_w) for p, y in ((e.p_a, a.y), (e.p_b, b.y)))
        total = total + cfg.id_w * terms["id"]
        terms["pid"] = sum(L.cross_entropy(L.split_heads(p, style)[0], y) for p, y in ((e.pp_a, a.y), (e.pp_b, b.y)))
        total = total + cfg.pid_w * terms["pid"]
        terms["recon_id"] = sum(L.cross_entropy(L.split_heads(p, style)[0], y) for p, y in ((p_a, a.y), (p_b, b.y)))
        total = total + cfg.recon_id_w * terms["recon_id"]
        if w.teacher_w > 0:
            q_a, q_b = self.soft_label(g.x_ba, a.y, b.y), self.soft_label(g.x_ab, b.y, a.y)
            how = dict(id_style=style, t_w=cfg.T_w, b_w=cfg.B_w)
            p_ba = self.id_net(enlarge(g.x_ba.detach()))[1]
            p_ab = self.id_net(enlarge(g.x_ab.detach()))[1]
            terms["teacher"] = L.teacher_loss(p_ba, q_a, b.y, **how) + L.teacher_loss(p_ab, q_b, a.y, **how)
            total = total + w.teacher_w * terms["teacher"]

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
