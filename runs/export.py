"""Nets as one graph each, for programs without this code: the id net, and the generator as `encode` and `swap`.

    id       images -> features (N, heads, dim), as test.py computes them; vector (N, heads * dim) of length 1, whose
             dot products order a gallery as test.py does
    encode   images -> structure, appearance: the two codes
    swap     structure, appearance -> images: the clothes of one person on another

Images are (N, H, W, 3) uint8, or (N, 3, H, W) float32 normalised with the ImageNet mean and std; N may differ in every
call. A file is written only after it has computed what PyTorch computes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.folders import check_test_set, have_cameras, read_people, read_split
from data.images import decode_images, normalise, to_uint8
from data.listing import unsaid
from files import make_folder, write_whole
from networks import Generator, to_gray
from reid_eval.exported import ExportedNet, open_session, require
from reid_eval.features import embed_images, extract_data_set
from reid_eval.index import fingerprint, to_vectors
from reid_eval.ranking import main_setting
from reid_eval.report import evaluate_features
from runs.folder import find_data, generator_config, open_run
from runs.load import TestNet, open_net
from runs.swapper import Swapper, load_swapper
from utils import IMAGENET_MEAN, IMAGENET_STD, UserError, set_threads

BATCHES = (1, 3, 16)  # sizes that are tried before a file is written
MOST_OFF = 1e-5  # of a feature
MOST_LEVELS = 1  # of a generated pixel, in grey levels
CALIBRATION_IMAGES = 256
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------- graphs
class Reader(nn.Module):
    """Images as they come in to normalised images (N, 3, H, W), and back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "normalised":
            return images
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def back(self, x: Tensor) -> Tensor:
        if self.kind == "normalised":
            return x
        return ((x * self.std + self.mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class Embed(nn.Module):
    """Images to the features of `embed_images`, and to one vector of length 1."""

    def __init__(self, net: nn.Module, heads: int, kind: str) -> None:
        super().__init__()
        self.net, self.read = net, Reader(kind)
        self.register_buffer("scale", torch.tensor(main_setting(heads)[1]).sqrt().view(-1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.read(images)
        both = torch.stack(self.net.embed(torch.cat([x, x.flip(-1)])), dim=1)  # (2N, heads, 512)
        # chunk would fix the number of images.
        image, mirror = F.normalize(both, dim=-1).unflatten(0, (2, -1)).unbind(0)
        features = F.normalize(image + mirror, dim=-1)  # (N, heads, 512)
        return features, F.normalize((features * self.scale).flatten(1), dim=-1)  # (N, heads * 512)


class Encode(nn.Module):
    """Images to their structure and appearance codes."""

    def __init__(self, id_net: nn.Module, gen: Generator, kind: str) -> None:
        super().__init__()
        self.id_net, self.gen, self.read = id_net, gen, Reader(kind)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.read(images)
        return self.gen.encode(to_gray(x)), self.id_net(x)[0]


class Swap(nn.Module):
    """The structure codes of people and the appearance codes of others to images."""

    def __init__(self, gen: Generator, kind: str) -> None:
        super().__init__()
        self.gen, self.read = gen, Reader(kind)

    def forward(self, structure: Tensor, appearance: Tensor) -> Tensor:
        return self.read.back(self.gen.decode(structure, appearance))


# --------------------------------------------------------------------------------------------- formats
Graph = Callable[..., list[np.ndarray]]  # arrays in the order of the inputs to arrays in that of the outputs


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and warnings of the libraries that make graphs."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def trace(net: nn.Module, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The net in eval mode as a graph whose batch is dynamic."""
    # One batch dimension for all inputs; two images stand for any number of them.
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    with torch.no_grad(), quiet():
        return torch.export.export(net.eval(), tuple(inputs), dynamic_shapes=shapes)


def to_onnx(
    net: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], about: dict[str, Any]
) -> tuple[bytes, Graph]:
    """The content of an ONNX file, and the graph that onnxruntime runs from it."""
    names = dict(input_names=list(inputs), output_names=list(outputs))
    program = trace(net, list(inputs.values()))
    with quiet():
        proto = torch.onnx.export(program, **names, dynamo=True, verbose=False).model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    content = proto.SerializeToString()
    session = open_session(content)
    return content, lambda *arrays: session.run(None, dict(zip(inputs, arrays, strict=True)))


def to_pt2(
    net: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], about: dict[str, Any]
) -> tuple[bytes, Graph]:
    """The content of a `torch.export` file with `about` as its extra file about.json, and the graph loaded from it."""
    file = io.BytesIO()
    torch.export.save(trace(net, list(inputs.values())), file, extra_files={"about.json": json.dumps(about)})
    file.seek(0)
    graph = torch.export.load(file).module()

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            result = graph(*map(torch.from_numpy, arrays))
        return [result.numpy()] if isinstance(result, Tensor) else [part.numpy() for part in result]

    return file.getvalue(), run


FORMATS = {"onnx": to_onnx, "pt2": to_pt2}


# ------------------------------------------------------------------------------------------------ parts
@dataclass(frozen=True)
class Exporter:
    """What all exported files of a command share.

    images  (16, 3, H, W) uint8, of the run's people
    about   metadata
    """

    out: Path
    format: str
    kind: str
    images: Tensor
    about: dict[str, Any]

    def given(self) -> np.ndarray:
        """The images as a graph takes them."""
        return self.images.permute(0, 2, 3, 1).numpy() if self.kind == "uint8" else normalise(self.images).numpy()

    def make(self, part: str, net: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> tuple[bytes, Graph]:
        two = {name: x[:2] for name, x in inputs.items()}
        return FORMATS[self.format](net, two, outputs, self.about | {"part": part})

    def write(self, part: str, content: bytes) -> None:
        path = write_whole(self.out / f"{part}.{self.format}", lambda file: file.write(content))
        print(f"written to {path} ({len(content) / 1e6:.1f} MB)")


def export_id(tested: TestNet, to: Exporter) -> None:
    """Write the id net's graph. Raises UserError if it computes other features than `embed_images`."""
    expected = embed_images(tested.net, normalise(to.images)).numpy()
    given = to.given()
    net = Embed(tested.net, expected.shape[1], to.kind)
    content, graph = to.make("id", net, {"images": torch.from_numpy(given)}, ["features", "vector"])
    vectors = to_vectors(expected)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    off = 0.0
    for n in BATCHES:
        features, vector = graph(given[:n])
        off = max(off, np.abs(features - expected[:n]).max(), np.abs(vector - vectors[:n]).max())
    if not off <= MOST_OFF:
        raise UserError(f"id.{to.format}: its features are {off:.1e} off those of PyTorch, so it was not written")
    print(f"features of {'/'.join(map(str, BATCHES))} images: {off:.1e} off those of PyTorch at most")
    to.write("id", content)


def export_generator(model: Swapper, to: Exporter) -> None:
    """Write the generator's two graphs. Raises UserError if their swaps differ from those of `Swapper.swap`."""
    if model.cfg.single != "gray":
        raise UserError(f"single: {model.cfg.single}: OpenCV computes these edges, so the generator has no graph")
    gen = Generator(code_dim=model.id_net.code_dim, **model.cfg.gen.model_dump())  # of textbook layers
    gen.load_state_dict(model.gen.state_dict())
    given, x = to.given(), normalise(to.images)
    expected = to_uint8(model.swap(x, x.roll(1, 0))).astype(int)
    s, f = model.structure(x).contiguous(), model.appearance(x)
    encode, run_encode = to.make(
        "encode", Encode(model.id_net, gen, to.kind), {"images": torch.from_numpy(given)}, ["structure", "appearance"]
    )
    swap, run_swap = to.make("swap", Swap(gen, to.kind), {"structure": s, "appearance": f}, ["images"])
    worst = 0
    for n in BATCHES:
        _, appearance = run_encode(given[:n])
        structure, _ = run_encode(np.roll(given, 1, 0)[:n])
        images = run_swap(structure, appearance)[0]
        images = images if to.kind == "uint8" else to_uint8(torch.from_numpy(images))
        worst = max(worst, int(np.abs(images.astype(int) - expected[:n]).max()))
    if worst > MOST_LEVELS:
        raise UserError(f"swap.{to.format}: its pixels are {worst} levels off those of PyTorch, so it was not written")
    print(f"swaps of {'/'.join(map(str, BATCHES))} images: {worst} grey levels off those of PyTorch at most")
    to.write("encode", encode)
    to.write("swap", swap)


# ------------------------------------------------------------------------------------------------- int8
def quantise(tested: TestNet, to: Exporter, data_root: Path) -> None:
    """Write `id-int8.onnx` beside `id.onnx`: 8-bit weights and activations, with the mAP that this costs.

    The ranges of the activations come from training images.
    """
    from onnxruntime import quantization

    paths = read_split(data_root, "train_all", need_names=False).paths
    chosen = np.random.default_rng(0).permutation(len(paths))[:CALIBRATION_IMAGES]
    images = decode_images([paths[i] for i in chosen], *tested.size)
    given = images.permute(0, 2, 3, 1).numpy() if to.kind == "uint8" else normalise(images).numpy()
    batches = iter([{"images": batch} for batch in np.array_split(given, max(1, len(given) // 32))])

    class Calibration(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder) / "prepared.onnx", Path(folder) / "id-int8.onnx"
        with quiet():
            quantization.shape_inference.quant_pre_process(to.out / "id.onnx", prepared, skip_symbolic_shape=True)
            quantization.quantize_static(prepared, small, Calibration(), per_channel=True)
        content = small.read_bytes()
        mAP = {name: test_mAP(path, data_root) for name, path in (("fp32", to.out / "id.onnx"), ("int8", small))}
    to.write("id-int8", content)
    print(f"mAP (official) on {data_root}: {100 * mAP['fp32']:.2f}, in int8 {100 * mAP['int8']:.2f}")


def test_mAP(file: Path, data_root: Path) -> float:
    """mAP (official) of an exported id net, 0..1, by the score that it is used with."""
    net = ExportedNet(file)
    with unsaid():
        sides = extract_data_set(net, data_root, size=net.size, batch_size=None, device=CPU, progress=False)
        cameras = have_cameras(sides.query, sides.gallery)
        rows = evaluate_features(sides.query, sides.gallery, remove_same_camera=cameras)
    setting, _ = main_setting(sides.query.features.shape[1])
    return next(row.ranking.mAP for row in rows if (row.setting, row.convention) == (setting, "official"))


# --------------------------------------------------------------------------------------------- command
def export(args: argparse.Namespace) -> None:
    """Write what the options of export.py name."""
    set_threads(args.threads)
    if args.format == "onnx":
        require("onnx", "onnxruntime", "onnxscript")
    run = open_run(args.output_path, args.teacher or args.name or "latest")
    if args.part == "generator":
        generator_config(run)  # refuses a teacher's run
    tested = open_net(args, CPU)
    model = load_swapper(run, CPU, str(tested.iteration)) if args.part == "generator" else None
    data_root = find_data(args.data, "--data", tested.data_root, tested.data_source)
    if args.int8:
        check_test_set(data_root, cameras=None)
        read_split(data_root, "train_all", need_names=False)
    out = make_folder(Path(args.out))
    names = {"id": ["id"] + ["id-int8"] * args.int8, "generator": ["encode", "swap"]}[args.part]
    for path in (out / f"{name}.{args.format}" for name in names):
        if path.exists():
            raise UserError(f"{path} exists; give another --out")
    with unsaid():
        paths = read_people(data_root, option="--data").paths
    images = decode_images(list(itertools.islice(itertools.cycle(paths), max(BATCHES))), *tested.size)
    about = dict(
        height=tested.size[0],
        width=tested.size[1],
        input=args.input,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        heads=tested.net.head_names,
        weights=main_setting(len(tested.net.head_names))[1],
        run=tested.title,
        iteration=tested.iteration,
        data_root=tested.data_root,
        checksum=fingerprint(tested.net, tested.size),
    )
    to = Exporter(out, args.format, args.input, images, about)
    print(f"{tested.title}, images of {tested.size[0]} x {tested.size[1]}, tried on {data_root}")
    if model:
        export_generator(model, to)
    else:
        export_id(tested, to)
    if args.int8:
        quantise(tested, to, data_root)
