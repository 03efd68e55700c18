"""Arithmetic of the passes: fp32, or fp16 or bf16 by autocast."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from utils import UserError

AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """A context for passes in `precision`, one of the values that `pick_precision` returns."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def pick_precision(device: torch.device, precision: str) -> str:
    """fp32, fp16 or bf16: `precision` itself, and for `auto` bf16 where the device has it, otherwise fp32.

    Raises UserError for fp16 on a CPU, and warns where bf16 is only emulated.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 (apex: true) needs a CUDA GPU; on a CPU use precision: bf16 or fp32")
    if precision == "bf16" and not has_bf16(device):
        warn_once("precision bf16: this device only emulates it, slowly; fp32 is faster here")
    return precision


@cache
def warn_once(message: str) -> None:
    logging.warning(message)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself.

    Otherwise PyTorch emulates it: on a CPU with AVX2 alone a step of the demo takes 7.5 times as long as in fp32.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        tests = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
        return any(test() for test in tests)
    units = torch.cpu.get_capabilities()
    on_arm = units.get("bf16", False) and torch.backends.mkldnn.is_available()
    return bool(units.get("avx512_bf16") or units.get("amx_bf16") or on_arm)
