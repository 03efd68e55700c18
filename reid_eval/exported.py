"""Exported id nets: what an ONNX file of `export.py` says about itself, and its features by onnxruntime."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import to_uint8
from files import digest_file
from utils import UserError, one_line

# Metadata of every exported file, each a JSON value.
KEYS = ("part", "height", "width", "input", "checksum", "run", "iteration", "data_root")


def require(*modules: str) -> None:
    """Raise UserError, which says how to install them, if optional modules are missing."""
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        install = "pip install -r requirements-export.txt"
        raise UserError(f"ONNX files need {error.name or name}, which is not installed: {install}") from None


def open_session(model: Path | bytes) -> Any:
    """An onnxruntime session of a file or its content on the CPU, with as many threads as PyTorch has."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class ExportedNet:
    """An exported id net; called on normalised images (N, 3, H, W), it returns features (N, heads, dim) as tensors.

    about   the file's metadata, see `KEYS`
    digest  a hash of the file
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"--model {path}: no such file; `python export.py --name RUN --out DIR` writes one")
        require("onnxruntime")
        self.digest = digest_file(path)
        try:
            self.session = open_session(path)
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.about: dict[str, Any] = {key: json.loads(metadata[key]) for key in KEYS if key in metadata}
        except Exception as error:  # onnxruntime raises many kinds for a damaged or foreign file
            raise UserError(f"--model {path}: not a readable file of export.py ({one_line(error)})") from None
        if missing := [key for key in KEYS if key not in self.about]:
            raise UserError(f"--model {path}: not written by export.py (no {', '.join(missing)} in its metadata)")
        if self.about["part"] != "id":
            raise UserError(f"--model {path}: holds the generator's {self.about['part']}; give the id net's file")
        size, shape = list(self.size), self.session.get_inputs()[0].shape
        if size not in (shape[1:3], shape[2:4]):
            raise UserError(f"--model {path}: made for images of {shape}, but says {size}; export the model again")

    @property
    def size(self) -> tuple[int, int]:
        return self.about["height"], self.about["width"]

    def __call__(self, x: Tensor) -> Tensor:
        images = to_uint8(x) if self.about["input"] == "uint8" else x.cpu().numpy()
        return torch.from_numpy(self.session.run(["features"], {"images": images})[0]).to(x)
