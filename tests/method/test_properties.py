"""Properties of the training step that hold on any weights: erasing, swapping, and who gets which gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ALL_LOSSES, CPU, HEIGHT, WIDTH, random_batches, tiny_config, tiny_teacher_config, tiny_trainer
from torch import Tensor

import losses as L
import precision as precision_module
from data.batch import Batch
from data.erasing import erasing_mask
from data.images import normalise
from frozen import frozen
from networks import Discriminator, Generator, SelfAttention
from precision import autocast, has_bf16
from reIDmodel import build_id_net, build_teacher, enlarge, seen_size
from runs.guards import FiniteWatch
from runs.validate import sample_pairs
from trainer import DGNetTrainer, Plan, TeacherTrainer, recolour
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
DOUBLE = torch.float64
# The weights of every ramped term at once, as `loss_weights` would give them.
RAMPED = dict(recon_f=0.5, recon_s=0.5, cyc=0.5, teacher=0.5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plan(trainer: DGNetTrainer, **changes: Any) -> Plan:
    """Iteration 0 with every ramped term on, the live encoder and no draw before."""
    made = dict(weights=L.loss_weights(trainer.cfg, 0) | RAMPED, live_encoder=True, update_id=True)
    return Plan(**made | changes, rng=rng(), erasing=rng())


def random_erase(x: Tensor, p: float, draws: np.random.Generator) -> Tensor:
    """The images as an id net would see them, which does not enlarge these."""
    return x.masked_fill(erasing_mask(len(x), *x.shape[2:], p, draws), 0)


def finite(terms: dict[str, Tensor]) -> dict[str, float]:
    """The terms as numbers, all of which must be finite."""
    values = {name: float(term) for name, term in terms.items()}
    assert np.isfinite(list(values.values())).all(), values
    return values


def grads(value: Tensor, wrt: Any) -> list[Tensor | None]:
    """d value / d each of `wrt`, None where it does not depend on it; the graph is kept."""
    wrt = list(wrt)
    if not value.requires_grad:
        return [None] * len(wrt)
    return list(torch.autograd.grad(value, wrt, retain_graph=True, allow_unused=True))


def reached(value: Tensor, wrt: Any) -> bool:
    """Whether `value` has a gradient that is not zero with respect to any of `wrt`."""
    return any(g is not None and g.abs().max() > 0 for g in grads(value, wrt))


def connected(value: Tensor, wrt: Any) -> bool:
    """Whether the graph of `value` holds any of `wrt` at all."""
    return any(g is not None for g in grads(value, wrt))


def copied_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_state(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


class Fixture:
    """A tiny trainer in float64 with the parts of one step laid open."""

    def __init__(self, **changes: Any) -> None:
        cfg = tiny_config(batch_size=4, erasing_p=0, **changes)
        teacher = build_teacher(4, backbone="resnet10w8")
        self.trainer = tiny_trainer(cfg, dtype=DOUBLE, teachers=[teacher])
        self.a, self.b = random_batches(cfg, dtype=DOUBLE)
        self.encoded = self.trainer.encode(self.a, self.b, plan(self.trainer))
        self.decoded = self.trainer.decode(self.encoded)

    def terms(self, *, live_encoder: bool = True) -> dict[str, Tensor]:
        how = plan(self.trainer, live_encoder=live_encoder)
        return self.trainer.generator_and_id_terms(self.a, self.b, self.encoded, self.decoded, how)

    def cut_at_fakes(self) -> tuple[Tensor, Tensor]:
        """Make the fakes leaves, so that what reaches them is told apart from what reaches the networks."""
        g = self.decoded
        g.x_ba, g.x_ab = (x.detach().requires_grad_() for x in (g.x_ba, g.x_ab))
        return g.x_ba, g.x_ab


# -------------------------------------------------------------------------------------- random erasing
def boxes(x: Tensor) -> Iterator[tuple[int, int, int] | None]:
    """Per image (height, width, number) of the zeroed pixels' bounding box; None where nothing is zero."""
    for image in x:
        zero = (image == 0).all(dim=0)
        assert torch.equal(zero, (image == 0).any(dim=0)), "all channels of a pixel or none"
        if not zero.any():
            yield None
            continue
        rows, columns = zero.any(dim=1).nonzero(), zero.any(dim=0).nonzero()
        yield int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1, int(zero.sum())


def test_erasing_nothing() -> None:
    x = torch.rand(8, 3, 128, 64) + 1
    assert torch.equal(random_erase(x, 0.0, rng()), x)


def test_erasing_every_image() -> None:
    height, width = 128, 64
    x = torch.rand(200, 3, height, width) + 1
    original = x.clone()
    erased = random_erase(x, 1.0, rng())
    assert torch.equal(x, original), "the input is left alone"
    assert torch.equal(erased[erased != 0], x[erased != 0]), "outside the rectangle nothing changes"
    found = list(boxes(erased))
    assert None not in found
    areas, aspects = [], []
    for h, w, number in found:
        assert number == h * w, "the erased pixels are one rectangle"
        # Sides are rounded to whole pixels.
        assert (h - 0.5) * (w - 0.5) <= 0.4 * height * width and (h + 0.5) * (w + 0.5) >= 0.02 * height * width
        assert (h + 0.5) / (w - 0.5) >= 0.3 and (h - 0.5) / (w + 0.5) <= 1 / 0.3
        assert h < height and w < width
        areas.append(h * w / (height * width))
        aspects.append(h / w)
    assert min(areas) < 0.05 and max(areas) > 0.33, "areas fill their range"
    assert min(aspects) < 0.5 and max(aspects) > 2.5, "aspects fill their range"
    assert len(set(found)) > 150, "every image has a draw of its own"


def test_erasing_half_of_the_images() -> None:
    found = list(boxes(random_erase(torch.ones(1000, 1, 64, 32), 0.5, rng())))
    assert 440 < sum(box is not None for box in found) < 560


def test_erasing_is_a_function_of_its_draws() -> None:
    x = torch.rand(16, 3, 64, 32) + 1
    assert torch.equal(random_erase(x, 0.5, rng(3)), random_erase(x, 0.5, rng(3)))
    assert not torch.equal(random_erase(x, 0.5, rng(3)), random_erase(x, 0.5, rng(4)))


def test_erasing_changes_the_identity_logits_only() -> None:
    """The images are erased for four further passes, whose logits are used and nothing else."""
    cfg = tiny_config(erasing_p=1.0)
    trainer, (a, b) = tiny_trainer(cfg), random_batches(cfg)
    encoded = trainer.encode(a, b, plan(trainer))
    before = dict(vars(encoded))
    seen = []
    forward = trainer.id_net.forward
    trainer.id_net.forward = lambda x, erased: seen.append((x, erased)) or forward(x, erased)
    trainer.classify(a, b, encoded, plan(trainer))
    for name in ("s_a", "s_b", "f_a", "f_b", "fp_a", "fp_b"):
        assert getattr(encoded, name) is before[name]
    for name in ("p_a", "p_b", "pp_a", "pp_b"):
        assert not torch.equal(getattr(encoded, name)[0], before[name][0])
    for (x, erased), original in zip(seen, (a.x, b.x, a.xp, b.xp), strict=True):
        assert torch.equal(x, original)
        assert erased.shape == (len(x), 1, 2 * HEIGHT, 2 * WIDTH) and erased.any() and not erased.all()


def test_the_id_net_erases_the_enlarged_images() -> None:
    net = build_id_net("AB", 3, backbone="resnet10w8").eval()
    x, seen = torch.randn(2, 3, HEIGHT, WIDTH), []
    net.model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mask = erasing_mask(2, *seen_size(HEIGHT, WIDTH), 1.0, rng())
    with torch.no_grad():
        net(x, mask)
    hidden = mask.expand_as(seen[0])
    assert (seen[0][hidden] == 0).all() and torch.equal(seen[0][~hidden], enlarge(x)[~hidden])


# ------------------------------------------------------------------------------------------- swapping
def test_samples_are_the_swaps_of_the_pairs() -> None:
    cfg = tiny_config()
    trainer = tiny_trainer(cfg)
    x_a, x_b = torch.randn(2, 3, 3, HEIGHT, WIDTH).unbind()
    states = {name: copied_state(net) for name, net in trainer.networks().items()}
    images = sample_pairs(trainer, x_a, x_b)
    assert set(images) == {"x_a", "x_a_recon", "x_ba", "x_aba", "x_b", "x_b_recon", "x_ab", "x_bab"}
    for image in images.values():
        assert image.shape == (3, 3, HEIGHT, WIDTH) and image.dtype == torch.float32 and image.isfinite().all()
        assert not image.requires_grad
    for name, net in trainer.networks().items():
        assert net.training and all(module.training for module in net.modules())
        assert_same_state(net, states[name])

    gen, id_net = trainer.gen.eval(), trainer.id_net.eval()
    with torch.no_grad():

        def decode(structure_of: Tensor, appearance_of: Tensor) -> Tensor:
            return gen.decode(gen.encode(structure_of.mean(dim=1, keepdim=True)), id_net(appearance_of)[0])

        for name, expected in dict(
            x_a_recon=decode(x_a, x_a),
            x_b_recon=decode(x_b, x_b),
            x_ba=decode(x_b, x_a),
            x_ab=decode(x_a, x_b),
            x_aba=decode(images["x_ab"], images["x_ba"]),
            x_bab=decode(images["x_ba"], images["x_ab"]),
        ).items():
            torch.testing.assert_close(images[name], expected, rtol=1e-4, atol=1e-4, msg=name)


def test_samples_of_exchanged_pairs_are_exchanged() -> None:
    trainer = tiny_trainer(tiny_config())
    x_a, x_b = torch.randn(2, 2, 3, HEIGHT, WIDTH).unbind()
    one, other = sample_pairs(trainer, x_a, x_b), sample_pairs(trainer, x_b, x_a)
    for name, mirrored in (("x_ba", "x_ab"), ("x_a_recon", "x_b_recon"), ("x_aba", "x_bab")):
        torch.testing.assert_close(one[name], other[mirrored], rtol=1e-4, atol=1e-5)
    same = sample_pairs(trainer, x_a, x_a)
    torch.testing.assert_close(same["x_ba"], same["x_a_recon"], rtol=1e-4, atol=1e-5)


def test_decode_is_six_separate_decodings() -> None:
    s = Fixture()
    e, g, decode = s.encoded, s.decoded, s.trainer.gen.decode
    for image, expected in (
        (g.x_ba, decode(e.s_b, e.f_a)),
        (g.x_ab, decode(e.s_a, e.f_b)),
        (g.x_a_recon, decode(e.s_a, e.f_a)),
        (g.x_b_recon, decode(e.s_b, e.f_b)),
        (g.x_a_recon_p, decode(e.s_a, e.fp_a)),
        (g.x_b_recon_p, decode(e.s_b, e.fp_b)),
    ):
        torch.testing.assert_close(image, expected, rtol=1e-10, atol=1e-10)


def test_the_code_is_channel_major() -> None:
    """Index 4 * channel + part, part 0 being the top quarter of the image."""
    net = build_id_net("AB", 3, backbone="resnet10w8").eval()
    net.part_pool.register_forward_hook(lambda module, inputs, output: seen.append(output))
    seen: list[Tensor] = []
    with torch.no_grad():
        f, _ = net(torch.randn(2, 3, 128, 64))
    (m,) = seen
    assert m.shape == (2, 64, 4, 1) and f.shape == (2, 256)
    for channel in (0, 5, 63):
        for part in range(4):
            assert torch.equal(f[:, 4 * channel + part], m[:, channel, part, 0])


def test_small_images_are_enlarged_for_the_id_net_only() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert enlarge(x)[0, 0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert enlarge(torch.zeros(1, 3, 128, 64)).shape[2:] == (256, 128)
    assert enlarge(torch.zeros(1, 3, 130, 64)).shape[2:] == seen_size(130, 64) == (130, 64)
    assert seen_size(128, 64) == (256, 128)


# ------------------------------------------------------------------- subtlety 1: the detached code
@pytest.mark.parametrize("detach_f", [True, False])
def test_reconstruction_trains_the_id_net_only_when_asked(detach_f: bool) -> None:
    s = Fixture(detach_f=detach_f)
    terms = s.terms()
    trunk = [s.trainer.id_net.model.conv1.weight, s.trainer.id_net.model.layer4[0].conv2.weight]
    heads = [p for head in s.trainer.id_net.heads() for p in head.parameters()]
    for name in ("recon_x_a", "recon_x_b", "recon_xp_a", "recon_xp_b", "adv_a", "adv_b", "cyc_a", "recon_id"):
        assert reached(terms[name], trunk) is not detach_f, name
        assert not connected(terms[name], heads), name
        assert reached(terms[name], s.trainer.gen.dec.parameters()), name
    # The code loss trains the generator through the fakes, and nothing at all where the code is detached.
    assert terms["recon_f_a"].requires_grad is not detach_f
    assert reached(terms["recon_f_a"], s.trainer.gen.parameters()) is not detach_f
    for name in ("id", "pid", "teacher"):
        assert reached(terms[name], trunk) and reached(terms[name], heads), name
        assert not connected(terms[name], s.trainer.gen.parameters()), name


def test_targets_carry_no_gradient() -> None:
    p, q = (torch.rand(3, 4, requires_grad=True) for _ in range(2))
    L.l1(p, q).backward()
    assert q.grad is None and p.grad is not None


@pytest.mark.parametrize(
    "changes, factor, decay", [({}, 10, 0.0005), (dict(head_lr_factor=2.5, id_weight_decay=0.04), 2.5, 0.04)]
)
def test_the_fine_head_decays_at_teacher_weight_zero(changes: dict, factor: float, decay: float) -> None:
    """The fine-grained loss stays in the graph at weight 0: zero gradients, not none, so weight decay goes on."""
    cfg = tiny_config(teacher_w=0, max_iter=5, **changes)
    trainer = tiny_trainer(cfg)
    before = copied_state(trainer.id_net)
    trainer.step(*random_batches(cfg), 0)
    for name, p in trainer.id_net.classifier2.named_parameters():
        assert p.grad is not None and p.grad.abs().max() == 0
        if p.abs().max() > 0:
            # The first step of Nesterov momentum 0.9 goes 1.9 times the gradient, here the decay alone.
            expected = before[f"classifier2.{name}"] * (1 - factor * cfg.lr2 * 1.9 * decay)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
            assert not torch.equal(p, before[f"classifier2.{name}"])


# ------------------------------------------------------------------------ subtlety 2: frozen passes
@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize("style", ["AB", "normal", "PCB"])
def test_frozen_passes_leave_the_net_alone(style: str, batch_statistics: bool) -> None:
    torch.manual_seed(0)
    net = build_id_net(style, 4, backbone="resnet10w8").double().train()
    net(torch.randn(4, 3, 128, 64, dtype=DOUBLE))  # running statistics that are not those of a fresh net
    before = copied_state(net)
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    x = torch.randn(4, 3, 128, 64, dtype=DOUBLE, requires_grad=True)
    with frozen(net, batch_statistics=batch_statistics):
        _, p = net(x)
        _, again = net(x)
    sum(logits.square().sum() for logits in p).backward()
    assert x.grad.abs().max() > 0, "the gradient reaches the image"
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert_same_state(net, before)
    assert modes == [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    assert all(torch.equal(*pair) for pair in zip(p, again, strict=True)), "dropout is off"

    # What the pass computes is what a copy would: batch statistics without dropout, or the eval mode.
    twin = copy.deepcopy(net).train(batch_statistics)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for logits, expected in zip(p, twin(x)[1], strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)

    # Afterwards the net trains as ever.
    _, p = net(x.detach())
    sum(logits.sum() for logits in p).backward()
    assert all(q.grad is not None for name, q in net.named_parameters() if not name.startswith("model.fc."))
    assert net.model.bn1.num_batches_tracked == before["model.bn1.num_batches_tracked"] + 1
    assert not torch.equal(net.model.bn1.running_mean, before["model.bn1.running_mean"])


def test_a_frozen_pass_keeps_the_running_statistics_of_its_moment() -> None:
    """Later training passes of the same step move the running statistics; the frozen pass's gradient stays."""

    def image_gradient(train_after: bool) -> Tensor:
        torch.manual_seed(0)
        net = build_id_net("AB", 4, backbone="resnet10w8").double().train()
        x = torch.randn(4, 3, 128, 64, dtype=DOUBLE)
        net(x)
        x = (x + 1).requires_grad_()
        with frozen(net, batch_statistics=False):
            _, p = net(x)
        if train_after:
            net(3 * x.detach() + 5)
        p[0].square().sum().backward()
        return x.grad

    torch.testing.assert_close(image_gradient(True), image_gradient(False), rtol=0, atol=0)


@pytest.mark.parametrize("train_bn", [True, False])
def test_appearance_of_the_fakes_reaches_the_images_only(train_bn: bool) -> None:
    s = Fixture(train_bn=train_bn)
    before = copied_state(s.trainer.id_net)
    fakes = s.cut_at_fakes()
    calls = []
    forward = s.trainer.id_net.forward
    s.trainer.id_net.forward = lambda *x: calls.append(copied_state(s.trainer.id_net)) or forward(*x)
    terms = s.terms()
    assert reached(terms["recon_id"], fakes)
    assert not connected(terms["recon_id"], s.trainer.id_net.parameters())
    # Two frozen passes (by running statistics: one), which change nothing, then the teacher's two, which do.
    frozen_passes = 2 if train_bn else 1
    assert len(calls) == frozen_passes + 2
    for state in calls[: frozen_passes + 1]:
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert not torch.equal(calls[-1]["model.bn1.running_mean"], before["model.bn1.running_mean"])


def test_the_teacher_is_never_changed() -> None:
    s = Fixture()
    (teacher,) = s.trainer.teachers
    before = copied_state(teacher)
    terms = s.terms()
    terms["teacher"].backward()
    assert_same_state(teacher, before)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize(
    "changes,passes",
    [
        (dict(erasing_p=0), 4),
        (dict(erasing_p=0.5), 8),
        (dict(erasing_p=0.5, **ALL_LOSSES), 10),
        (dict(erasing_p=0, **ALL_LOSSES), 6),
    ],
)
def test_training_passes_of_the_id_net_in_a_step(changes: dict[str, Any], passes: int) -> None:
    """BatchNorm statistics follow x_a, x_b, xp_a, xp_b, [the four erased], [x_ba, x_ab], and nothing else."""
    cfg = tiny_config(**changes)
    trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
    trainer.step(*random_batches(cfg), 3)
    assert trainer.id_net.model.bn1.num_batches_tracked == passes
    assert trainer.id_net.classifier2.add_block[1].num_batches_tracked == passes


def test_no_network_is_copied_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(**ALL_LOSSES)
    trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
    monkeypatch.setattr(copy, "deepcopy", lambda *args: pytest.fail("a copy in the step"))
    monkeypatch.setattr(nn.Module, "state_dict", lambda *args, **kwargs: pytest.fail("a copy in the step"))
    terms = trainer.step(*random_batches(cfg), 3)
    assert terms["gen_total"].isfinite() and terms["teacher"].isfinite()


# --------------------------------------------------------- subtlety 3: live encoder or live fakes
def test_live_encoder_on_detached_fakes() -> None:
    s = Fixture()
    fakes = s.cut_at_fakes()
    terms = s.terms(live_encoder=True)
    for name in ("recon_s_a", "recon_s_b"):
        assert reached(terms[name], s.trainer.gen.enc_content.parameters())
        assert not connected(terms[name], fakes)


def test_frozen_encoder_on_live_fakes() -> None:
    s = Fixture()
    x_ba, x_ab = s.cut_at_fakes()
    terms = s.terms(live_encoder=False)
    # Structure a is that of x_ab.
    assert reached(terms["recon_s_a"], [x_ab]) and not reached(terms["recon_s_a"], [x_ba])
    assert reached(terms["recon_s_b"], [x_ba]) and not reached(terms["recon_s_b"], [x_ab])
    for name in ("recon_s_a", "recon_s_b"):
        assert not connected(terms[name], s.trainer.gen.parameters())
    assert all(p.requires_grad for p in s.trainer.gen.parameters())


def test_through_live_fakes_the_structure_loss_trains_the_decoder() -> None:
    s = Fixture()
    for live_encoder in (True, False):
        terms = s.terms(live_encoder=live_encoder)
        assert connected(terms["recon_s_a"], s.trainer.gen.dec.parameters()) is not live_encoder


@pytest.mark.parametrize("probability,expected", [(1.0, {True}), (-1.0, {False}), (0.5, {True, False})])
def test_the_draw_of_the_encoder(probability: float, expected: set[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(use_encoder_again=probability)
    trainer = tiny_trainer(cfg)
    drawn: list[bool] = []

    def record(a: Any, b: Any, e: Any, d: Any, how: Plan) -> dict[str, Tensor]:
        drawn.append(how.live_encoder)
        return {}

    for name in ("encode", "decode", "classify", "update_discriminator"):
        monkeypatch.setattr(trainer, name, lambda *args: {})
    monkeypatch.setattr(trainer, "update_generator_and_id", record)
    batches = random_batches(cfg)
    for t in [*range(40), *range(40)]:
        trainer.step(*batches, t)
    assert set(drawn) == expected
    assert drawn[:40] == drawn[40:], "a function of the iteration"
    if probability == 0.5:
        assert 10 <= sum(drawn[:40]) <= 30


# ------------------------------------------------------------------- subtlety 4: D before G, apart
@pytest.mark.parametrize("gan_type", ["lsgan", "nsgan"])
def test_the_generator_update_leaves_the_discriminator_alone(gan_type: str) -> None:
    s = Fixture(dis=dict(gan_type=gan_type))
    trainer = s.trainer
    trainer.update_discriminator(s.a, s.b, s.decoded)
    weights = copied_state(trainer.dis)
    gradients = [p.grad.clone() for p in trainer.dis.parameters()]
    assert max(g.abs().max() for g in gradients) > 0
    terms = trainer.update_generator_and_id(s.a, s.b, s.encoded, s.decoded, plan(trainer))
    assert_same_state(trainer.dis, weights)
    assert all(torch.equal(p.grad, g) for p, g in zip(trainer.dis.parameters(), gradients, strict=True))
    # The generator is judged by the updated discriminator.
    fakes = torch.cat([s.decoded.x_ba, s.decoded.x_ab]).detach()
    for name, expected in L.adversarial_terms(trainer.dis, fakes, gan_type=gan_type).items():
        torch.testing.assert_close(terms[name], expected.detach(), rtol=1e-10, atol=1e-12)


def test_the_discriminator_update_leaves_the_generator_alone() -> None:
    s = Fixture()
    states = {name: copied_state(net) for name, net in s.trainer.networks().items()}
    dis_before = states.pop("dis")
    s.trainer.update_discriminator(s.a, s.b, s.decoded)
    for name, state in states.items():
        assert_same_state(s.trainer.networks()[name], state)
        assert all(p.grad is None for p in s.trainer.networks()[name].parameters())
    changed = [not torch.equal(value, dis_before[name]) for name, value in s.trainer.dis.state_dict().items()]
    assert all(changed)


def test_gradients_are_separate_in_bf16_too() -> None:
    """Autocast keeps casts of weights for a while: none may carry a gradient into a frozen pass, or lack one."""
    cfg = tiny_config(precision="bf16", erasing_p=0, **ALL_LOSSES)
    trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
    a, b = random_batches(cfg)
    how = plan(trainer, live_encoder=False)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = trainer.encode(a, b, how)
        terms = trainer.generator_and_id_terms(a, b, encoded, trainer.decode(encoded), how)
        total = L.weighted_sum(terms, how.weights)
    assert not connected(total, trainer.dis.parameters())
    assert not connected(terms["recon_id"], trainer.id_net.parameters())
    for net in (trainer.gen, trainer.id_net):
        for name, gradient in zip(dict(net.named_parameters()), grads(total, net.parameters()), strict=True):
            assert (gradient is None) == name.startswith("model.fc."), name


# ------------------------------------------------------------------------------------- the loss terms
def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    s = Fixture(gan_w=0.75, id_w=0.5, pid_w=0.25, recon_x_w=3, recon_xp_w=2, recon_id_w=0.125)
    terms = s.terms()
    total = L.weighted_sum(terms, L.loss_weights(s.trainer.cfg, 0) | RAMPED)
    weights = dict(adv=0.75, recon_x=3, recon_xp=2, recon_s=0.5, recon_f=0.5, cyc=0.5)
    expected = sum(weight * (terms[f"{name}_a"] + terms[f"{name}_b"]) for name, weight in weights.items())
    expected = expected + 0.125 * terms["recon_id"] + 0.5 * terms["id"] + 0.25 * terms["pid"] + 0.5 * terms["teacher"]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    assert len(terms) == 16


def test_elementary_losses() -> None:
    p, q = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.0, 4.0], [3.0, 4.0]])
    assert L.l1(p, q) == 1.0
    uniform, y = torch.zeros(2, 4), torch.tensor([0, 3])
    assert L.cross_entropy((uniform,), y).item() == pytest.approx(math.log(4))
    # KL of a label that is half and half, to a uniform prediction over four: log 4 - log 2.
    label = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(2, 4)
    assert L.kl_divergence((uniform,), label).item() == pytest.approx(math.log(2))
    loss = L.teacher_loss((uniform, uniform), label, y, id_style="AB", t_w=3.0, b_w=0.5)
    assert loss.item() == pytest.approx(3 * math.log(2) + 0.5 * math.log(4))
    assert L.teacher_loss((uniform,), label, y, id_style="normal", t_w=3.0, b_w=0.5).item() == pytest.approx(
        3 * math.log(2)
    )
    # PCB: the mean over the parts.
    sure = 100.0 * torch.eye(4)[y]
    four = L.identity_loss((uniform, sure, sure, sure), y, id_style="PCB", fine_w=0.0)
    assert four.item() == pytest.approx(math.log(4) / 4)


@pytest.mark.parametrize(
    "gan_type,expected",
    # Scores 0.5 on the fake at both scales: the generator's loss of one scale, twice.
    [
        ("lsgan", 2 * 2 * 0.25),
        ("nsgan", 2 * math.log(1 + math.exp(-0.5))),
        ("wgan", 2 * (-0.5 + 0.001 * 3 * 0.25)),
    ],
)
def test_adversarial_loss(gan_type: str, expected: float) -> None:
    scores = [torch.full((2, 1, 3, 1), 0.5)] * 2
    terms = L.adversarial_terms(lambda fake: scores, torch.zeros(2, 3, 4, 2), gan_type=gan_type)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        dict.fromkeys(("adv_a", "adv_b"), expected)
    )


class LinearScore(nn.Module):
    """D(x) = w . x per image: its gradient with respect to the image is w."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [(x * self.w).sum(dim=(1, 2, 3)).view(-1, 1, 1, 1)]


def test_discriminator_loss_and_its_gradient_penalty() -> None:
    torch.manual_seed(0)
    w = torch.randn(3, 4, 2, dtype=DOUBLE)
    dis = LinearScore(w)
    real, fake = torch.randn(2, 4, 3, 4, 2, dtype=DOUBLE).unbind()
    r, f = ((x * w).sum(dim=(1, 2, 3)) for x in (real, fake))
    norm2 = w.square().sum()

    def loss(gan_type: str, penalty: float) -> list[float]:
        terms = L.discriminator_terms(dis, real, fake, gan_type=gan_type, penalty=penalty)
        return [terms["dis_a"].item(), terms["dis_b"].item()]

    for half, pair in enumerate((slice(0, 2), slice(2, 4))):
        lsgan = f[pair].square().mean() + (r[pair] - 1).square().mean()
        assert loss("lsgan", 0.0)[half] == pytest.approx(lsgan.item())
        assert loss("lsgan", 0.5)[half] == pytest.approx((lsgan + 0.5 * norm2).item())
        nsgan = -torch.sigmoid(-f[pair]).log().mean() - torch.sigmoid(r[pair]).log().mean()
        slope = torch.sigmoid(r[pair]) * torch.sigmoid(-r[pair])  # of the sigmoid, at each real image
        assert loss("nsgan", 0.5)[half] == pytest.approx((nsgan + 0.5 * (slope.square() * norm2).mean()).item())
        squares = 0.001 * (f[pair].square().sum() + r[pair].square().sum())
        assert loss("wgan", 0.0)[half] == pytest.approx((f[pair].mean() - r[pair].mean() + squares).item())


def test_the_gradient_penalty_is_in_full_precision() -> None:
    """Its second derivatives, which attention's products have too, are not those of half precision."""
    torch.manual_seed(0)
    dis = Discriminator(dim=16, n_layer=1, n_res=1, num_scales=1, non_local=1)
    for module in dis.modules():
        if isinstance(module, SelfAttention):
            nn.init.ones_(module.gamma)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    real, fake = torch.randn(2, 2, 3, 32, 16)

    def penalty(precision: str) -> float:
        with autocast(CPU, precision):
            with_it, without = (
                sum(L.discriminator_terms(dis, real, fake, gan_type="lsgan", penalty=p).values()).item()
                for p in (1.0, 0.0)
            )
        return with_it - without

    assert penalty("fp32") > 0
    assert penalty("bf16") == pytest.approx(penalty("fp32"), rel=1e-5)


# ---------------------------------------------------------------------------------- teacher's labels
class Oracle(nn.Module):
    """A teacher that says `plain` to images whose top left pixel is above 0 and `mirrored` to the others."""

    def __init__(self, plain: list[float], mirrored: list[float]) -> None:
        super().__init__()
        self.answers = torch.tensor([mirrored, plain], dtype=DOUBLE).log()

    def forward(self, x: Tensor) -> tuple[None, tuple[Tensor]]:
        return None, (self.answers[(x[:, 0, 0, 0] > 0).long()],)


def label(style: int, *teachers: nn.Module, y_app: int = 1, y_str: int = 3) -> list[float]:
    cfg = tiny_config(teacher_style=style)
    trainer = tiny_trainer(cfg, teachers=list(teachers))
    fake = torch.full((2, 3, HEIGHT, WIDTH), -1.0, dtype=DOUBLE, requires_grad=True)
    with torch.no_grad():
        fake[..., : WIDTH // 2] = 1.0  # left and right differ, so the mirror shows
    q = trainer.soft_labels(fake, torch.tensor([y_app, y_app]), torch.tensor([y_str, y_str]))
    assert q.shape == (2, 4) and not q.requires_grad
    assert torch.equal(q[0], q[1])
    assert q[0].sum().item() == pytest.approx(1)
    return q[0].tolist()


ORACLE = Oracle([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.1, 0.6])


def test_soft_labels() -> None:
    assert label(0, ORACLE) == pytest.approx([0.25, 0.25, 0.15, 0.35])
    assert label(1, ORACLE) == [0, 0, 0, 1]
    assert label(2, ORACLE) == [0, 1, 0, 0]
    assert label(3, ORACLE) == [0.25] * 4
    assert label(4, ORACLE) == pytest.approx([0, 0.25 / 0.6, 0, 0.35 / 0.6])
    assert label(4, ORACLE, y_app=2, y_str=2) == pytest.approx([0, 0, 1, 0])


def test_of_two_identities_that_the_teacher_rules_out_each_has_half() -> None:
    prediction = torch.tensor([[1.0, 0.0, 0.0]])
    q = L.soft_labels(prediction, torch.tensor([1]), torch.tensor([2]), style=4, num_classes=3, dtype=torch.float32)
    assert q.tolist() == [[0, 0.5, 0.5]]


def test_styles_that_need_no_teacher() -> None:
    assert label(2) == [0, 1, 0, 0]
    assert label(3) == [0.25] * 4


def test_several_teachers_are_averaged() -> None:
    other = Oracle([0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1])
    assert label(0, ORACLE, other) == pytest.approx([0.475, 0.175, 0.125, 0.225])
    assert label(1, ORACLE, other) == [1, 0, 0, 0]
    assert label(4, ORACLE, other) == pytest.approx([0, 0.175 / 0.4, 0, 0.225 / 0.4])


def test_recoloured_swaps_have_their_colours_and_the_brightness_of_the_structure_image() -> None:
    trainer = tiny_trainer(tiny_config(fed_back="recoloured"))
    a, b = random_batches(trainer.cfg)
    a, b = a._replace(x=a.x / 4), b._replace(x=b.x / 4)  # nothing near black or white
    g = trainer.decode(trainer.encode(a, b, plan(trainer)))
    g.x_ba, g.x_ab = g.x_ba / 4, g.x_ab / 4
    for image, swap, structure in zip(trainer.fed_back(a, b, g, rng()), (g.x_ba, g.x_ab), (b.x, a.x), strict=True):
        assert not image.requires_grad
        torch.testing.assert_close(image.mean(1), structure.mean(1))
        torch.testing.assert_close(image - image.mean(1, keepdim=True), swap - swap.mean(1, keepdim=True))
    for image, swap in zip(tiny_trainer(tiny_config()).fed_back(a, b, g, rng()), (g.x_ba, g.x_ab), strict=True):
        assert torch.equal(image, swap)
    black, white = normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    far = recolour(b.x, 100 * g.x_ba, *trainer.pixel_range)
    assert torch.isclose(far, black).any() and torch.isclose(far, white).any()
    assert (far >= black - 1e-5).all() and (far <= white + 1e-5).all()
    half = recolour(b.x, g.x_ba.bfloat16(), *trainer.pixel_range)
    assert half.dtype == torch.float32


def test_recolouring_reaches_the_id_net_alone() -> None:
    """The generator and D make the same step."""

    def stepped(fed_back: str) -> DGNetTrainer:
        torch.manual_seed(0)
        cfg = tiny_config(**ALL_LOSSES | dict(fed_back=fed_back))
        trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
        trainer.step(*random_batches(cfg), 3)
        return trainer

    own, other = stepped("generated"), stepped("recoloured")
    for name in ("gen", "dis"):
        assert_same_state(own.networks()[name], copied_state(other.networks()[name]))
    assert any(not torch.equal(p, q) for p, q in zip(own.id_net.parameters(), other.id_net.parameters(), strict=True))


# --------------------------------------------------------------------------------------- whole steps
def vgg_stand_in() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU()).requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(ID_style="normal", norm_id=True),
        dict(ID_style="normal", pool="avg", detach_f=False),
        dict(ID_style="PCB"),
        dict(gen=dict(dec="series")),
        dict(gen=dict(dec="parallel", non_local=1), dis=dict(non_local=2, n_layer=2)),
        dict(dis=dict(gan_type="nsgan")),
        dict(vgg_w=0.5),
        dict(single="edge", use_encoder_again=-1.0),
        dict(precision="bf16", channels_last=True),
        dict(precision="bf16", ID_style="PCB", single="edge"),
        dict(teacher="one,two", train_bn=False),
        dict(gen=dict(dropout=0.5, tanh=True, init="orthogonal", mlp_norm="ln", activ="prelu", pad_type="zero")),
        dict(dis=dict(num_scales=3, n_layer=2, norm="in", activ="relu", pad_type="replicate")),  # the least size
        dict(gan_w=0.0, lr_policy="cosine", max_iter=10),
    ],
    ids=str,
)
def test_a_step_with_every_option(changes: dict[str, Any]) -> None:
    cfg = tiny_config(**ALL_LOSSES | dict(batch_size=3) | changes)
    teachers = [build_teacher(4, backbone="resnet10w8") for _ in cfg.teachers]
    trainer = tiny_trainer(cfg, teachers=teachers, vgg=vgg_stand_in() if cfg.vgg_w else None)
    for t in (3, 4):
        values = finite(trainer.step(*random_batches(cfg), t))
    expected = {"dis_total", "gen_total", "dis_a", "dis_b", "id", "pid", "teacher", "recon_id"}
    names = ["recon_x", "recon_xp", "recon_f", "recon_s", "cyc"] + ["adv"] * (cfg.gan_w > 0) + ["vgg"] * (cfg.vgg_w > 0)
    assert set(values) == expected | {name + image for name in names for image in ("_a", "_b")}
    # Every weight has a gradient, but the trunk's fc, which nothing reads, and a discriminator of weight 0.
    for name, net in trainer.networks().items():
        for key, p in net.named_parameters():
            if not key.startswith("model.fc."):
                assert p.grad is not None and p.grad.isfinite().all(), f"{name}.{key}"
                if p.dim() > 1 and (cfg.gan_w > 0 or name != "dis"):
                    assert p.grad.abs().max() > 0, f"{name}.{key}"
    for image in sample_pairs(trainer, *random_batches(cfg)[0][:2]).values():
        assert image.isfinite().all() and image.dtype == torch.float32


def test_wgan_at_its_size() -> None:
    cfg = tiny_config(crop_image_height=256, crop_image_width=128, dis=dict(gan_type="wgan"), gen=dict(n_downsample=2))
    trainer = tiny_trainer(cfg)
    assert trainer.dis(torch.zeros(2, 3, 256, 128))[0].shape == (2, 1, 1, 1)
    values = finite(trainer.step(*random_batches(cfg), 0))
    assert values["adv_a"] != 0


def test_discriminator_pyramid() -> None:
    dis = Discriminator(dim=4, n_layer=2, n_res=1, num_scales=3)
    scores = dis(torch.zeros(2, 3, 64, 32))
    assert [tuple(score.shape) for score in scores] == [(2, 1, 16, 8), (2, 1, 8, 4), (2, 1, 4, 2)]


def test_structure_code_of_the_default() -> None:
    with torch.device("meta"):
        gen = Generator(code_dim=8192)
    assert gen.encode(torch.empty(2, 1, 256, 128, device="meta")).shape == (2, 128, 64, 32)


def test_steps_repeat() -> None:
    """The same seed, the same batches: the same numbers, draws of erasing and encoder included."""
    cfg = tiny_config(**ALL_LOSSES)

    def run() -> dict[str, float]:
        trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8").eval()])
        for p in trainer.teachers[0].parameters():
            torch.nn.init.constant_(p, 0.01)
        torch.manual_seed(9)
        for t in range(3, 5):
            terms = trainer.step(*random_batches(cfg), t)
        return finite(terms)

    assert run() == run()


def test_the_id_net_rests_while_frozen() -> None:
    cfg = tiny_config(id_freeze_iter=1, detach_f=False, **ALL_LOSSES)
    trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
    before = {name: p.detach().clone() for name, p in trainer.id_net.named_parameters()}
    terms = trainer.step(*random_batches(cfg), 0)
    assert all(torch.equal(p, before[name]) for name, p in trainer.id_net.named_parameters())
    assert "id" not in terms and terms["recon_x_a"] > 0
    trainer.step(*random_batches(cfg), 1)
    assert not torch.equal(trainer.id_net.model.conv1.weight, before["model.conv1.weight"])


def test_a_loss_that_is_not_finite_names_every_term() -> None:
    cfg = tiny_config(**ALL_LOSSES)
    trainer = tiny_trainer(cfg, teachers=[build_teacher(4, backbone="resnet10w8")])
    a, b = random_batches(cfg)
    a.x[0, 0, 0, 0] = math.nan
    terms = trainer.step(a, b, 3)
    watch = FiniteWatch(torch.device("cpu"))
    watch.note(3, terms)
    t, listing = watch.first()
    assert t == 3 and all(f"{name} " in listing for name in terms)
    assert "recon_x_a nan" in listing and "\n" not in listing


def test_optimisers_follow_the_recipe() -> None:
    cfg = tiny_config(lr_policy="multistep", step_size=2, gamma=0.5, gamma2=0.25)
    trainer = tiny_trainer(cfg)
    for optimizer, rate in ((trainer.opt_gen, cfg.lr_g), (trainer.opt_dis, cfg.lr_d)):
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam)
        assert (group["lr"], group["betas"], group["weight_decay"]) == (rate, (0, 0.999), 5e-4)
    groups = trainer.opt_id.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.002, 0.02, 0.02])
    assert all((g["momentum"], g["nesterov"], g["weight_decay"]) == (0.9, True, 5e-4) for g in groups)
    trainer.set_learning_rates(1)
    assert trainer.opt_gen.param_groups[0]["lr"] == trainer.opt_dis.param_groups[0]["lr"] == pytest.approx(5e-5)
    assert [group["lr"] for group in groups] == pytest.approx([5e-4, 0.005, 0.005])


def test_a_skipped_first_step_leaves_no_momentum(request: pytest.FixtureRequest) -> None:
    """fp16 begins with skipped steps. Deterministic PyTorch fills memory that nobody has written with NaN."""
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    cfg, teacher_cfg = tiny_config(), tiny_teacher_config(batch_size=2)
    trainer = tiny_trainer(cfg)
    trainer.scaler_gen = torch.amp.GradScaler("cpu", init_scale=torch.inf)
    teacher = TeacherTrainer(teacher_cfg, 4, CPU, steps_per_epoch=1)
    teacher.scaler = torch.amp.GradScaler("cpu", init_scale=torch.inf)
    for one, optimizer, scaler, batches in (
        (trainer, trainer.opt_id, trainer.scaler_gen, random_batches(cfg)),
        (teacher, teacher.optimizer, teacher.scaler, random_batches(cfg)[:1]),
    ):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        one.step(*batches, 0)
        momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert all(map(torch.equal, before, weights)), "the first step is to be skipped"
        assert len(momentum) > 20 and not any(m.any() for m in momentum)  # NaN counts as any
        scaler.update(1024.0)
        one.step(*batches, 1)
        assert not all(map(torch.equal, before, weights))
        assert all(p.isfinite().all() for p in (*weights, *momentum))


def test_momentum_that_begins_as_zeros_is_the_usual_first_step() -> None:
    cfg = tiny_teacher_config(batch_size=2)
    batch, _ = random_batches(tiny_config())
    found = []
    for plain in (False, True):
        torch.manual_seed(0)
        trainer = TeacherTrainer(cfg, 4, CPU, steps_per_epoch=1)
        if plain:
            recipe = dict(momentum=0.9, nesterov=True, weight_decay=cfg.weight_decay, fused=True)
            trainer.optimizer = torch.optim.SGD(trainer.optimizer.param_groups, **recipe)
        for t in range(3):
            trainer.step(batch, t)
        found.append(copied_state(trainer.net))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


# --------------------------------------------------------------------------------------- the teacher
def test_teacher_step_lowers_its_loss() -> None:
    cfg = tiny_teacher_config(batch_size=4, epochs=20, erasing_p=0.1, warm_epochs=0, lr=0.01, dropout=0)
    torch.manual_seed(0)
    trainer = TeacherTrainer(cfg, 4, CPU, steps_per_epoch=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, HEIGHT, WIDTH, generator=generator)
    batch = Batch(x, x[:0], torch.arange(4), torch.arange(4))
    terms = [finite(trainer.step(batch, t)) for t in range(12)]
    assert terms[0]["id"] == pytest.approx(math.log(4), abs=0.3)
    assert terms[-1]["id"] < 0.5 * terms[0]["id"]
    assert all(0 <= values["accuracy"] <= 1 for values in terms)


def test_teacher_rate_of_the_trunk() -> None:
    trainer = TeacherTrainer(tiny_teacher_config(lr=0.5, trunk_lr_factor=0.1), 4, CPU, steps_per_epoch=1)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.05, 0.5])
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(list(trainer.net.parameters()))


def test_fp16_is_refused_on_a_cpu() -> None:
    for cfg in (tiny_config(apex=True), tiny_config(precision="fp16")):
        with pytest.raises(UserError, match="fp16 .*needs a CUDA GPU"):
            DGNetTrainer(cfg, 4, CPU)
    with pytest.raises(UserError, match="fp16 .*needs a CUDA GPU"):
        TeacherTrainer(tiny_teacher_config(precision="fp16"), 4, CPU, steps_per_epoch=1)


def test_bf16_only_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nets = [lambda p: DGNetTrainer(tiny_config(precision=p), 4, CPU)]
    nets.append(lambda p: TeacherTrainer(tiny_teacher_config(precision=p), 4, CPU, steps_per_epoch=1))
    for has, taken in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision_module, "has_bf16", lambda device, has=has: has)
        precision_module.warn_once.cache_clear()
        assert {build("auto").precision for build in nets} == {taken}
        assert not caplog.records  # never picks what it would warn of
        assert {build("bf16").precision for build in nets} == {"bf16"}
        assert len(caplog.records) == (0 if has else 1)


@pytest.mark.parametrize(
    "units,onednn,has",
    [
        ("avx512_bf16", True, True),
        ("amx_bf16", True, True),
        ("bf16", True, True),
        ("bf16", False, False),
        ("", True, False),
    ],
    ids=["Zen 4", "Sapphire Rapids", "ARM", "ARM without oneDNN", "AVX2"],
)
def test_what_a_processor_says_of_bf16(monkeypatch: pytest.MonkeyPatch, units: str, onednn: bool, has: bool) -> None:
    known = dict.fromkeys(("avx2", "avx512_f", units), True) | {"amx_tile": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert has_bf16(CPU) == has


@pytest.mark.parametrize("units", ["avx512_bf16", "amx_tile", None])
def test_older_pytorch_has_a_question_for_each_unit(monkeypatch: pytest.MonkeyPatch, units: str | None) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == units, raising=False)
    assert has_bf16(CPU) == (units is not None)
