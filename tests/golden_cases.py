"""Weights, images and step cases made by the rules of the golden numbers (see docs/fidelity.md)."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from config import DGNetConfig, parse_config, set_values
from data.batch import Batch
from reIDmodel import build_teacher
from trainer import DGNetTrainer

GOLDEN = Path(__file__).parent / "golden"


def golden_files() -> list[Path]:
    """Every JSON file of tests/golden and of the folder that GOLDEN_DIR names."""
    folders = [GOLDEN] + ([Path(os.environ["GOLDEN_DIR"])] if os.environ.get("GOLDEN_DIR") else [])
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def read_cases(key: str) -> list[tuple[Path, dict[str, Any]]]:
    """The files that hold `key`, with their contents."""
    contents = [(path, json.loads(path.read_text())) for path in golden_files()]
    return [(path, case) for path, case in contents if isinstance(case, dict) and key in case]


def golden_tensor(prefix: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.default_rng(zlib.crc32(f"{prefix}.{name}".encode()))
    z = rng.standard_normal(shape).astype(np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        z = 1 + np.float32(0.1) * np.abs(z)
    elif len(shape) >= 2:
        z = z * np.float32((1 / np.prod(shape[1:])) ** 0.5)
    elif len(shape) == 1 and shape[0] > 1 and last in ("weight", "gamma"):
        z = 1 + np.float32(0.1) * z
    else:
        z = np.float32(0.1) * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def set_golden_weights(net: nn.Module, prefix: str) -> None:
    """Fill the net by the rule, in float64, and switch its dropouts off."""
    net.double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.copy_(golden_tensor(prefix, name, tuple(tensor.shape)).double())
            else:
                tensor.zero_()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def golden_images(seed: int, n: int, h: int, w: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((n, 3, h // 16, w // 16)).astype(np.float32)
    fine = rng.standard_normal((n, 3, h, w)).astype(np.float32)
    return torch.from_numpy(coarse.repeat(16, axis=2).repeat(16, axis=3) + np.float32(0.1) * fine).double()


class SmallConvolutions(TorchFunctionMode):
    """Convolve a few images at a time.

    In float64 a CPU unfolds the whole batch into one matrix before it multiplies: 10 GB for the decoder's last
    layers. Images do not meet in a convolution, so the numbers are the same.
    """

    UNFOLDED = 2**25  # numbers in the matrix, 256 MB

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            x, weight = args[:2]
            per_image = weight[0].numel() * x.shape[2] * x.shape[3]
            parts = x.split(max(1, self.UNFOLDED // per_image))
            if len(parts) > 1:
                return torch.cat([func(part, *args[1:], **kwargs) for part in parts])
        return func(*args, **kwargs)


def golden_config(case: dict[str, Any]) -> DGNetConfig:
    values: dict[str, Any] = {"data_root": "", "pretrained": False, "erasing_p": 0.0, "ID_class": 10}
    values["crop_image_height"], values["crop_image_width"] = case["size"]
    values["batch_size"] = case["batch"]
    return parse_config(set_values(values, [f"{key}={json.dumps(v)}" for key, v in case["config"].items()]), "golden")


def golden_trainer(case: dict[str, Any], kind: type[DGNetTrainer] = DGNetTrainer) -> DGNetTrainer:
    cfg = golden_config(case)
    teacher = build_teacher(10, stride=2)
    set_golden_weights(teacher, "teacher")
    trainer = kind(cfg, 10, torch.device("cpu"), teachers=[teacher])
    for prefix, net in trainer.networks().items():
        set_golden_weights(net, prefix)
    return trainer


def golden_batches(case: dict[str, Any], t: int) -> tuple[Batch, Batch]:
    x_a, x_b, xp_a, xp_b = (golden_images(100 + 10 * t + i, case["batch"], *case["size"]) for i in range(4))
    y_a, y_b = (torch.tensor(case[f"labels_{image}"]) for image in "ab")
    index = torch.arange(case["batch"])
    return Batch(x_a, xp_a, y_a, index), Batch(x_b, xp_b, y_b, index)
