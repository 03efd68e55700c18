"""The plain step of the benchmarks against the real one: two texts of section 6 that must compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ALL_LOSSES, CPU, random_batches, tiny_config, tiny_trainer

from benchmarks.plain import PLAIN, PlainTrainer, make_plain
from reIDmodel import build_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "all losses, erasing, live encoder": dict(erasing_p=0.5, use_encoder_again=1.0),
    "frozen encoder": dict(erasing_p=0.5, use_encoder_again=-1.0),
    "no erasing": dict(erasing_p=0.0),
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
    teacher = build_teacher(4, backbone="resnet10w4").double()
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


def test_every_fast_layer_has_a_plain_one() -> None:
    plain, real = both(gen=dict(mlp_norm="ln"))
    for net in real.networks().values():
        make_plain(net)
    for net in [*plain.networks().values(), *real.networks().values()]:
        kinds = {type(module) for module in net.modules()}
        assert not kinds & PLAIN.keys()
        assert not any(
            getattr(module, "inplace", False) for module in net.modules() if "Leaky" in type(module).__name__
        )
