"""The steps on a GPU that only pretends to be there: PyTorch's fake tensors have a device and a shape, and no numbers.

Operations on tensors of two devices fail as they do on a GPU, and so does everything that waits for a number. What a
fake GPU cannot do is left out: the backward passes, the optimisers, autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ALL_LOSSES, TINY_TEACHER, random_batches, tiny_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config import parse_config
from reid_eval.features import embed_images
from reIDmodel import build_teacher
from runs.guards import FiniteWatch
from runs.session import to_device
from runs.validate import sample_pairs
from trainer import DGNetTrainer, TeacherTrainer
from utils import set_deterministic

GPU = torch.device("cuda")

STEPS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "live encoder": dict(use_encoder_again=1.0),
    "frozen encoder": dict(use_encoder_again=-1.0),
    "recompute": dict(recompute=True),
    "joint_bn": dict(joint_bn=True),
    "channels_last": dict(channels_last=True),
    "deterministic": dict(deterministic=True),
    "running statistics": dict(train_bn=False),
    "recoloured": dict(fed_back="recoloured"),
    "live code": dict(detach_f=False),
    "parts": dict(ID_style="PCB"),
    "one head": dict(ID_style="normal", norm_id=True),
    "dropout, attention": dict(gen=dict(dropout=0.3, non_local=1), dis=dict(gan_type="nsgan")),
    **{f"teacher style {style}": dict(teacher_style=style) for style in range(1, 5)},
}


def moved(net: nn.Module, *device: torch.device, **layout: torch.memory_format) -> nn.Module:
    """nn.Module.to, which cannot replace fake weights, by new ones."""
    for module in net.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is not None:
                    new = value.detach().to(*device, **(layout if value.dim() == 4 or not layout else {}))
                    kind[name] = nn.Parameter(new) if kind is module._parameters else new
    return net


def without_backward(outputs: Tensor, inputs: Tensor, **_: Any) -> tuple[Tensor]:
    return (outputs * 0 + inputs * 0,)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch.autograd, "grad", without_backward)
    monkeypatch.setattr(Tensor, "backward", lambda total: total + 0)
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda *_: None)
    with FakeTensorMode():
        yield
    set_deterministic(False)


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS.keys())
def test_a_step_stays_on_the_gpu_and_waits_for_no_number(pretended: None, changes: dict[str, Any]) -> None:
    cfg = tiny_config(**ALL_LOSSES | dict(erasing_p=0.5) | changes)
    set_deterministic(cfg.deterministic)
    trainer = DGNetTrainer(cfg, 4, GPU, teachers=[build_teacher(4, backbone="resnet10w8")])
    a, b = (to_device(batch, GPU, cfg) for batch in random_batches(cfg))
    watch = FiniteWatch(GPU)
    for t in (9, 10):
        terms = trainer.step(a, b, t)
        watch.note(t, terms)
    assert len(terms) > 15 and all(value.is_cuda and value.shape == () for value in terms.values())
    assert all(image.is_cuda for image in sample_pairs(trainer, a.x, b.x).values())
    assert embed_images(trainer.id_net, a.x).is_cuda
    with pytest.raises(DataDependentOutputException):  # as in the middle of a step
        float(terms["gen_total"])


def test_a_step_of_a_teacher(pretended: None) -> None:
    cfg = parse_config(TINY_TEACHER | dict(data_root="none", erasing_p=0.5), "here")
    trainer = TeacherTrainer(cfg, 4, GPU, steps_per_epoch=4)
    terms = trainer.step(to_device(random_batches(tiny_config())[0], GPU, cfg), 0)
    assert all(value.is_cuda for value in terms.values())


def test_a_tensor_left_behind_is_noticed(pretended: None) -> None:
    cfg = tiny_config(**ALL_LOSSES)
    trainer = DGNetTrainer(cfg, 4, GPU, teachers=[build_teacher(4, backbone="resnet10w8")])
    a, b = (to_device(batch, GPU, cfg) for batch in random_batches(cfg))
    with pytest.raises(RuntimeError, match="at least two devices, cpu and cuda:0"):
        trainer.step(a._replace(x=a.x.cpu()), b, 10)
