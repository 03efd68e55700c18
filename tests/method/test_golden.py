"""The training step against numbers that the authors' release computed, in float64 (issue of fidelity, not of luck).

Runs every step case of tests/golden and of the folder that the environment variable GOLDEN_DIR names; with GOLDEN_PLAIN
set, the plain step of the benchmarks too.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import (
    GOLDEN,
    SmallConvolutions,
    golden_batches,
    golden_images,
    golden_trainer,
    read_cases,
    set_golden_weights,
)

from benchmarks.plain import PlainTrainer
from reid_eval.features import embed_images
from reIDmodel import build_id_net
from trainer import DGNetTrainer

# The release's names of the loss terms, and ours.
TERMS = {
    "loss_dis_total": "dis_total",
    "loss_gen_total": "gen_total",
    "loss_id": "id",
    "loss_pid": "pid",
    "loss_teacher": "teacher",
    "loss_gen_recon_id": "recon_id",
} | {
    theirs + image: ours + image
    for image in ("_a", "_b")
    for theirs, ours in {
        "loss_dis": "dis",
        "loss_gen_adv": "adv",
        "loss_gen_recon_x": "recon_x",
        "loss_gen_recon_xp": "recon_xp",
        "loss_gen_recon_f": "recon_f",
        "loss_gen_recon_s": "recon_s",
        "loss_gen_cycrecon_x": "cyc",
        "loss_gen_vgg": "vgg",
    }.items()
}
# A gradient this small beside the network's largest is rounding: an instance norm cancels the parameter.
NOISE = 1e-9


@pytest.fixture(autouse=True)
def release_memory() -> Iterator[None]:
    """A case holds gigabytes in float64; its trainer and the recorders below form a cycle that outlives the test."""
    yield
    gc.collect()


def relative(value: float, golden: float) -> float:
    return abs(value - golden) / max(abs(golden), 1e-12)


def grad_norms(net: torch.nn.Module) -> dict[str, float]:
    return {name: p.grad.norm().item() for name, p in net.named_parameters() if p.grad is not None}


def check_losses(terms: dict[str, torch.Tensor], golden: dict[str, float], tolerance: float) -> None:
    for name, expected in golden.items():
        value = float(terms.get(TERMS[name], 0.0))
        assert relative(value, expected) < tolerance, f"{name}: {value!r}, golden {expected!r}"


def check_forward(recorded: dict[str, Any], golden: dict[str, Any]) -> None:
    for name, expected in golden.items():
        key, head = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name).groups()
        value = recorded[key]
        if isinstance(value, tuple):
            value = value[int(head or 0)]
        flat = value.detach().flatten()
        samples = flat[torch.arange(len(expected["samples"])) * max(1, len(flat) // 16)]
        scale = max(abs(s) for s in expected["samples"])
        np.testing.assert_allclose(samples, expected["samples"], rtol=1e-8, atol=1e-8 * scale, err_msg=name)
        assert abs(flat.mean().item() - expected["mean"]) < 1e-8 * scale, name
        assert relative(flat.std().item(), expected["std"]) < 1e-8, name


def check_gradients(trainer: Any, golden: dict[str, dict[str, float]]) -> None:
    for prefix, net in trainer.networks().items():
        norms, expected = grad_norms(net), golden[prefix]
        floor = NOISE * max(expected.values())
        compared = 0
        for name, norm in expected.items():
            if norm > floor:
                assert relative(norms[name], norm) < 1e-6, f"{prefix}.{name}: {norms[name]!r}, golden {norm!r}"
                compared += 1
            else:
                assert norms.get(name, 0.0) <= 10 * floor, f"{prefix}.{name}: {norms[name]!r}, golden is rounding"
        assert compared > len(expected) // 2


SLOW = {"frozen_encoder", "wgan", "parallel", "nonlocal"}  # for `make test-all`; cases of GOLDEN_DIR always run
CASES = [
    pytest.param(p, c, id=p.stem, marks=pytest.mark.slow if p.parent == GOLDEN and p.stem in SLOW else ())
    for p, c in read_cases("steps")
]


@pytest.mark.parametrize("path,case", CASES)
def test_step_case(path: Any, case: dict[str, Any]) -> None:
    check_case(golden_trainer(case), case)


# One case by default, since they take long: test_plain.py compares the two steps in every other respect.
@pytest.mark.slow
@pytest.mark.parametrize("path,case", [c for c in CASES if c.id == "full" or os.environ.get("GOLDEN_PLAIN")])
def test_the_plain_step_of_the_benchmarks(path: Any, case: dict[str, Any]) -> None:
    check_case(golden_trainer(case, PlainTrainer), case)


def check_case(trainer: DGNetTrainer, case: dict[str, Any]) -> None:
    recorded: dict[str, Any] = {}
    encode, decode = trainer.encode, trainer.decode

    def recording_encode(*args: Any) -> Any:
        result = encode(*args)
        recorded.update(vars(result))
        return result

    def recording_decode(*args: Any) -> Any:
        result = decode(*args)
        recorded.update(vars(result))
        return result

    trainer.encode, trainer.decode = recording_encode, recording_decode
    for t, golden in enumerate(case["steps"]):
        with SmallConvolutions():
            terms = trainer.step(*golden_batches(case, t), t)
        if t == 0:
            check_losses(terms, golden["loss"], 1e-8)
            check_forward(recorded, golden["forward"])
            check_gradients(trainer, golden["grad_norm"])
        else:
            check_losses(terms, golden["loss"], 1e-4)
            for prefix, total in golden["grad_norm_total"].items():
                norms = grad_norms(trainer.networks()[prefix]).values()
                assert relative(sum(n**2 for n in norms) ** 0.5, total) < 1e-4, f"total gradient of {prefix}"

    for prefix, expected in case["final_param_norm"].items():
        squares = sum(p.detach().square().sum().item() for p in trainer.networks()[prefix].parameters())
        assert relative(squares**0.5, expected) < 1e-6, f"final parameters of {prefix}"
    state = trainer.id_net.state_dict()
    for name, expected in case["final_bn"].items():
        flat = state[name].double().flatten()
        samples = flat[torch.arange(len(expected["samples"])) * max(1, len(flat) // 16)]
        scale = max(abs(s) for s in expected["samples"])
        np.testing.assert_allclose(samples, expected["samples"], rtol=1e-6, atol=1e-6 * scale, err_msg=name)
        assert abs(flat.mean().item() - expected["mean"]) < 1e-6 * scale, name


def test_golden_cases_are_there() -> None:
    assert {p.stem for p, _ in read_cases("steps")} >= {
        "full", "frozen_encoder", "early", "wgan", "parallel", "nonlocal", "pcb",
    }  # fmt: skip


@pytest.mark.parametrize("path,case", [pytest.param(p, c, id=p.stem) for p, c in read_cases("feature_first8")])
def test_features(path: Any, case: dict[str, Any]) -> None:
    net = build_id_net("AB", case["num_classes"])
    set_golden_weights(net, "id")
    net.eval()
    spec = case["images"]
    with torch.no_grad():
        features = embed_images(net, golden_images(spec["seed"], spec["n"], spec["h"], spec["w"])).numpy()
    np.testing.assert_allclose(features[:, 0, :8], case["feature_first8"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(features[:, 1, :8], case["feature_512_520"], rtol=1e-8, atol=1e-10)
    scores = np.einsum("qhd,ghd,h->qg", features, features, [1.0, 0.5])
    np.testing.assert_allclose(scores, case["scores_beta_0p5"], rtol=1e-8)
