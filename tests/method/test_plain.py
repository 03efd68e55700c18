"""The plain step of the benchmarks against the real one: two texts of the method that must compute the same."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ALL_LOSSES, CPU, TINY_DGNET, random_batches, tiny_config, tiny_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import precision
from benchmarks import train_step
from benchmarks.plain import PlainTrainer
from fast import FASTER, UpConvBlock, accelerate
from reIDmodel import build_teacher
from runs.session import to_device
from trainer import DGNetTrainer
from utils import set_deterministic

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "all losses, erasing, live encoder": dict(erasing_p=0.5, use_encoder_again=1.0),
    "frozen encoder": dict(erasing_p=0.5, use_encoder_again=-1.0),
    "no erasing": dict(erasing_p=0.0),
    "before the ramps": dict(
        recon_f_w=0, recon_s_w=0, recon_x_cyc_w=0, teacher_w=0, warm_iter=100, warm_teacher_iter=100
    ),
    "frozen passes by running statistics": dict(train_bn=False),
    "nsgan, norms": dict(dis=dict(gan_type="nsgan", norm="ln"), gen=dict(mlp_norm="ln")),
    "live code": dict(detach_f=False, use_encoder_again=-1.0),
    "one head": dict(ID_style="normal", norm_id=True),
    "edges of zeros": dict(gen=dict(pad_type="zero", n_downsample=2), dis=dict(pad_type="zero")),
    "repeated edges": dict(gen=dict(pad_type="replicate"), dis=dict(pad_type="replicate")),
    "parts": dict(ID_style="PCB"),
    "several labels": dict(teacher_style=4, gen=dict(dec="series", non_local=1)),
}


def both(**changes: Any) -> tuple[PlainTrainer, Any]:
    """A plain and a real trainer with the same weights, in float64 and without dropout (their draws differ)."""
    cfg = tiny_config(**(ALL_LOSSES | dict(batch_size=3) | changes))
    torch.manual_seed(0)
    teacher = build_teacher(4, backbone="resnet10w8").double()
    real = tiny_trainer(cfg, dtype=torch.float64, teachers=[teacher])
    plain = PlainTrainer(cfg, 4, CPU, teachers=[teacher])
    for name, net in plain.networks().items():
        net.double().load_state_dict(real.networks()[name].state_dict())
    for net in [*plain.networks().values(), *real.networks().values(), teacher]:
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return plain, real


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_the_plain_step_is_the_real_step(changes: dict[str, Any]) -> None:
    plain, real = both(**changes)
    batches = random_batches(real.cfg, dtype=torch.float64)
    for t in range(2):
        expected, terms = plain.step(*batches, 10 + t), real.step(*batches, 10 + t)
        assert expected.keys() == terms.keys()
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    for name, net in plain.networks().items():
        for key, value in net.state_dict().items():
            found = real.networks()[name].state_dict()[key]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


def test_the_plain_step_has_none_of_the_faster_layers() -> None:
    plain, real = both(gen=dict(mlp_norm="ln"))
    for trainer, used in ((plain, set()), (real, {*FASTER.values(), UpConvBlock})):
        kinds = {type(module) for net in trainer.networks().values() for module in net.modules()}
        assert kinds & {*FASTER.values(), UpConvBlock} == used


# ---------------------------------------------------------------------- the step's options for speed and memory
def one_step(cfg_changes: dict[str, Any]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Terms, gradients and statistics of one step with every loss, without dropout."""
    _, real = both(**(dict(batch_size=4) | cfg_changes))
    batches = random_batches(real.cfg, dtype=torch.float64)
    terms = real.step(*batches, 10)
    grads = {
        f"{name}.{key}": p.grad.clone()
        for name, net in real.networks().items()
        for key, p in net.named_parameters()
        if p.grad is not None
    }
    statistics = {name: value.clone() for name, value in real.id_net.named_buffers()}
    return terms, grads | statistics


def assert_same(got: tuple[dict, dict], expected: tuple[dict, dict], rtol: float = 1e-7) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                ours[name], value, rtol=rtol, atol=rtol * scale + 1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("live", [1.0, -1.0], ids=["live encoder", "frozen encoder"])
@pytest.mark.parametrize("train_bn", [True, False])
def test_recomputed_activations_change_no_number(live: float, train_bn: bool) -> None:
    changes = dict(use_encoder_again=live, train_bn=train_bn, erasing_p=0.5)
    assert_same(one_step(changes | dict(recompute=True)), one_step(changes))


class Operations(TorchDispatchMode):
    """Notes the names of all operations, those of the backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# What a step could meet of the operations that PyTorch's documentation of use_deterministic_algorithms says to fail on
# CUDA. Of edges by repetition it has another version there, which the CPU does not use.
NO_FIXED_ORDER = {
    f"{name}_backward"
    for name in (
        "reflection_pad2d",
        "adaptive_max_pool2d",
        "_adaptive_avg_pool2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "nll_loss2d",
        "grid_sampler_2d",
    )
}


@pytest.mark.parametrize(
    "changes,without",
    [
        (dict(detach_f=False), {"reflection_pad2d_backward", "adaptive_max_pool2d_backward"}),
        (
            dict(ID_style="PCB", dis=dict(gan_type="nsgan")),
            {"reflection_pad2d_backward", "_adaptive_avg_pool2d_backward"},
        ),
        (dict(ID_style="normal"), {"reflection_pad2d_backward", "adaptive_max_pool2d_backward"}),
    ],
    ids=["AB", "PCB", "normal"],
)
def test_deterministic_algorithms_give_the_same_numbers(changes: dict[str, Any], without: set[str]) -> None:
    """By operations that have a fixed order on a GPU. Up to rounding: it is another order than the usual one."""
    found = []
    for on in (False, True):
        set_deterministic(on)
        try:
            with Operations() as operations:
                found.append(one_step(changes | dict(erasing_p=0.5)))
        finally:
            set_deterministic(False)
        assert operations.names & NO_FIXED_ORDER == (set() if on else without)
    assert_same(*found)


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d((4, 1)), nn.AdaptiveAvgPool2d((4, 1))], ids=repr)
def test_stripes_of_any_height(pool: nn.Module) -> None:
    faster = accelerate(copy.deepcopy(pool), CPU)
    for height in range(1, 14):
        m = torch.randn(2, 3, height, 2, dtype=torch.float64)
        set_deterministic(True)
        try:
            torch.testing.assert_close(faster(m), pool(m), rtol=1e-12, atol=0)
        finally:
            set_deterministic(False)


def test_joint_statistics_are_one_pass_for_all() -> None:
    """Where every image is the same, its statistics are those of any number of copies; elsewhere they differ."""
    counts = [one_step(dict(joint_bn=joint))[1]["model.bn1.num_batches_tracked"] for joint in (False, True)]
    assert counts[0] == 10 and counts[1] == 3  # four passes, four erased, two fakes
    apart, joint = one_step(dict(erasing_p=0)), one_step(dict(erasing_p=0, joint_bn=True))
    assert apart[0].keys() == joint[0].keys()
    assert apart[0]["id"] != joint[0]["id"]

    def same_images(**changes: Any) -> torch.Tensor:
        _, real = both(batch_size=4, erasing_p=0, **changes)
        a, b = random_batches(real.cfg, dtype=torch.float64)
        b = b._replace(x=a.x, xp=a.x)
        return real.step(a._replace(xp=a.x), b, 0)["id"]

    torch.testing.assert_close(same_images(joint_bn=True), same_images(), rtol=1e-9, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(precision: str) -> None:
    """No host synchronisation in a whole step: nothing is read back, nothing copied from pageable memory and waited."""
    cfg = tiny_config(**ALL_LOSSES, precision=precision, erasing_p=0.5)
    device = torch.device("cuda")
    trainer = DGNetTrainer(cfg, 4, device, teachers=[build_teacher(4, backbone="resnet10w8")])
    batches = [to_device(batch, device, cfg) for batch in random_batches(cfg)]
    trainer.step(*batches, 9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [trainer.step(*batches, t) for t in range(10, 13)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(term.isfinite() for terms in steps for term in terms.values())


# ------------------------------------------------------------------------------------------- the benchmark itself
@pytest.mark.slow
def test_the_benchmark_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY_DGNET | ALL_LOSSES))
    for has in (False, True):
        for module in (train_step, precision):
            monkeypatch.setattr(module, "has_bf16", lambda device, has=has: has)
        assert list(train_step.variants(CPU)) == ["plain", "fp32", *["bf16"] * has, "recompute"]
        assert train_step.variants(CPU)["recompute"][1]["precision"] == ("bf16" if has else "fp32")
    options = ["--config", str(config), "--rounds", "1", "--device", "cpu", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_step", *options])
    train_step.main()
    variants = json.loads((tmp_path / "train_step-cpu-batch2.json").read_text())["variants"]
    assert list(variants) == ["plain", "fp32", "bf16", "recompute"]
    assert variants["plain"]["plain / this"] == 1
