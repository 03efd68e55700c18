"""Files of unknown origin: their content is never run, leads nowhere else, and cannot fill the memory.

Every test attacks a command as a user would run it. Attacks on weights of FID and LPIPS are in test_score.py, on the
links of a page in test_look.py, on the list of a generated data set in test_generate.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    TINY_DGNET,
    Outcome,
    OutputFolder,
    noise,
    tiny_config,
    tiny_teacher_config,
    tiny_trainer,
)
from PIL import Image, PngImagePlugin

from backbones import build_trunk
from data.folders import read_split
from data.generated import MANIFEST, Row, add_generated, write_rows
from data.images import check_images
from data.listing import list_images
from reIDmodel import build_teacher
from runs.folder import RunFolder, start_folder
from runs.load import save_teacher
from runs.release import export
from runs.snapshot import save_snapshot
from runs.weights import load_imagenet
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Place(OutputFolder):
    """A run `tiny`, the same run in the release's files as `release`, a teacher `tutor`, and a trap.

    trap  a folder that exists as soon as an attack was run
    """

    script: Callable[..., Outcome]

    @property
    def trap(self) -> Path:
        return self.folder / "trap"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "outputs" / "tiny" / "checkpoints"

    @property
    def tutor(self) -> Path:
        return self.folder / "models" / "tutor"

    def run(self, command: str, *options: object) -> Outcome:
        outcome = self.script(command, *options, *self.where)
        assert not self.trap.exists(), "the attack was run"
        return outcome

    def assert_refuses(self, named: object, command: str, *options: object) -> None:
        """The command ends with one line that names `named`: a file, an option or a key."""
        error = self.run(command, *options).error
        assert str(named) in error and len(error) < 2000, error[:2000]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("place")
    cfg = tiny_config(data_root=str(tiny_data), teacher="tutor")
    trainer = tiny_trainer(cfg, classes=8)
    for name in ("tiny", "release"):
        run = RunFolder(folder, name)
        start_folder(run, cfg, resume=False)
        save_snapshot(run.checkpoints, trainer, 1)
    export(run.checkpoints, run.checkpoints)
    shutil.rmtree(run.checkpoints / "00000001")
    net = build_teacher(8, backbone="resnet10w8")
    save_teacher(RunFolder(folder, "tutor"), tiny_teacher_config(data_root=str(tiny_data)), net, 8)
    return folder


@pytest.fixture
def place(template: Path, tiny_data: Path, tmp_path: Path, script: Callable[..., Outcome]) -> Place:
    shutil.copytree(template, tmp_path / "place")
    return Place(tmp_path / "place", tiny_data, script)


class Malicious:
    """Unpickled, it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trap")))
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{tmp_path / 'other'}]")
    assert (tmp_path / "trap").is_dir() and (tmp_path / "other").is_dir()


# --------------------------------------------------------------------------------------------- pickles
NEW_RUN = ("train", "--name", "new", "--config", "CONFIG")
RESUME = ("train", "--name", "tiny", "--resume")
READERS = {
    "outputs/tiny/checkpoints/00000001/gen.pt": ("generate", "--name", "tiny", "--count", 1, "--out", "OUT"),
    "outputs/tiny/checkpoints/00000001/state.pt": RESUME,
    "outputs/release/checkpoints/optimizer.pt": ("train", "--name", "release", "--resume"),
    "models/tutor/net_last.pth": ("test", "--teacher", "tutor"),
    "trunk.pth": (*NEW_RUN, "--backbone-weights", "FILE", "--set", "pretrained=true"),
    "vgg.pth": (*NEW_RUN, "--set", "vgg_w=1", "vgg_weights=FILE"),
}


def command(place: Place, file: Path, arguments: tuple[object, ...]) -> list[object]:
    config = place.folder / "config.yaml"
    config.write_text(yaml.safe_dump(TINY_DGNET | dict(data_root=str(place.data), teacher="tutor")))
    names = {"CONFIG": config, "OUT": place.folder / "out"}
    return [names.get(text, str(text).replace("FILE", str(file))) for text in arguments]


@pytest.mark.parametrize("name", READERS)
def test_code_in_weights_and_states_is_not_run(place: Place, name: str) -> None:
    """In PyTorch's zip format, and as a plain pickle."""
    file = place.folder / name
    content = torch.load(file, weights_only=True) if file.exists() else {"a": {}}
    torch.save({"evil": Malicious(place.trap)} | content, file)
    for evil in (file.read_bytes(), pickle.dumps(Malicious(place.trap), protocol=2)):
        file.write_bytes(evil)
        place.assert_refuses(file, *command(place, file, READERS[name]))


def test_code_in_a_feature_file_is_not_run(place: Place) -> None:
    file = place.folder / "features.npz"
    evil = np.array([Malicious(place.trap)], dtype=object)
    np.savez(file, query_f=evil, gallery_f=evil)
    error = place.script("reid_eval/report", file).error
    assert str(file) in error and not place.trap.exists()


def search(place: Place, gallery: Path, query: Path | None = None) -> tuple[object, ...]:
    query = query or read_split(place.data, "query").paths[0]
    return "search", "--teacher", "tutor", "--gallery", gallery, "--query", query, "--index", place.folder / "index"


@pytest.fixture
def gallery(place: Place) -> Path:
    folder = place.folder / "gallery"
    folder.mkdir()
    for i, path in enumerate(read_split(place.data, "gallery").paths[:4]):
        shutil.copyfile(path, folder / f"{i}.jpg")
    return folder


def index_of(place: Place, gallery: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """An index file that the search has made, its description and its vectors."""
    assert place.run(*search(place, gallery)).code == 0
    file = place.folder / "index" / "index.npz"
    with np.load(file) as index:
        return file, index["about"], index["vectors"]


def test_code_in_a_search_index_is_not_run(place: Place, gallery: Path) -> None:
    file, about, vectors = index_of(place, gallery)
    np.savez(file, about=np.array([Malicious(place.trap)], dtype=object), vectors=vectors)
    place.assert_refuses(file, *search(place, gallery))
    np.savez(file, about=about, vectors=np.array([Malicious(place.trap)], dtype=object))
    place.assert_refuses(file, *search(place, gallery))


# ------------------------------------------------------------------------------------------------ YAML
def test_tags_in_yaml_are_not_run(place: Place) -> None:
    evil = f"!!python/object/apply:os.mkdir [{place.trap}]"
    config, opts = place.folder / "outputs" / "tiny" / "config.yaml", place.tutor / "opts.yaml"
    for file in (config, opts):
        file.write_text(file.read_text() + f"more: {evil}\n")
    place.assert_refuses(config, "train", "--config", config)
    place.assert_refuses(config, "test", "--name", "tiny")
    place.assert_refuses(opts, "test", "--teacher", "tutor")
    place.assert_refuses("--set batch_size=", "train", "--set", f"batch_size={evil}")


STEPS = [*zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)]
LISTS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in STEPS)
MERGES = "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}]}}\n" for a, b in STEPS)


@pytest.mark.parametrize("bomb", [LISTS, MERGES], ids=["lists", "merges"])
def test_a_few_lines_of_yaml_do_not_fill_the_memory(place: Place, bomb: str) -> None:
    config, opts = place.folder / "bomb.yaml", place.tutor / "opts.yaml"
    for file in (config, opts):
        file.write_text(bomb + "backbone: *q\n")
    place.assert_refuses(f"{config}: line 2", "train", "--config", config)
    place.assert_refuses(f"{opts}: line 2", "test", "--teacher", "tutor")


@pytest.mark.parametrize(
    "value", ["[" * 20_000, "1" + "0" * 5000, "0x" + "f" * 5000, "2001-99-99", "{[a]: b}"], ids=len
)
def test_yaml_that_its_library_stumbles_over(place: Place, value: str) -> None:
    good, odd = place.folder / "outputs" / "tiny" / "config.yaml", place.folder / "odd.yaml"
    odd.write_text(f"data_root: x\nmax_iter: {value}\n")
    place.assert_refuses(odd, "train", "--config", odd)
    place.assert_refuses("max_iter", "train", "--config", good, "--set", f"max_iter={value}")


# ----------------------------------------------------------------------------------------------- paths
def test_a_search_index_stays_in_its_gallery(place: Place, gallery: Path) -> None:
    file, description, vectors = index_of(place, gallery)
    about = json.loads(description.tobytes())
    for name in ("../outside.jpg", "/etc/hostname"):
        about["files"][0][0] = name
        np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), vectors=vectors)
        place.assert_refuses(f"{name!r}", *search(place, gallery))


def test_lists_of_a_data_set_stay_in_its_folder(place: Place) -> None:
    root, outside = place.folder / "root", noise(place.folder / "0000_000_01_0303morning_0008_0.jpg")
    for folder in ("a", "train/a", "test/a"):
        (root / folder).mkdir(parents=True)
    for path in (f"../{outside.name}", outside, f"a/../../{outside.name}"):
        (root / "dataset.csv").write_text(f"path,identity,split\n{path},1,train\n")
        assert "dataset.csv: row 2" in place.script("prepare", "--dataset", "csv", "--data_root", root).error
        for name in ("train", "val", "query", "gallery"):
            (root / f"list_{name}.txt").write_text(f"{path} 0\n")
        assert "list_train.txt: line 1" in place.script("prepare", "--dataset", "msmt17", "--data_root", root).error
    assert not (root / "pytorch").exists()


@pytest.mark.parametrize("options", [("test", "--name"), ("test", "--teacher"), ("train", "--resume", "--name")])
def test_a_name_of_a_run_is_no_path(place: Place, options: tuple[str, ...]) -> None:
    for name in ("../tiny", "/tmp", ".."):
        place.assert_refuses(name, *options, name)


def test_links_in_a_circle_are_unreadable_images(place: Place, gallery: Path) -> None:
    (gallery / "round.jpg").symlink_to(gallery / "round.jpg")
    (gallery / "here").symlink_to(gallery, target_is_directory=True)
    assert [path.name for path in list_images(gallery)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "round.jpg"]
    data = place.folder / "people" / "train_all"
    for person in ("0001", "0002"):
        noise(data / person / f"{person}_c1_a.png")
        (data / person / "loop.png").symlink_to("loop.png")
        (data / person / "up").symlink_to("..")
    (data / "0003").symlink_to("0003")
    (data / "0004").symlink_to("..")
    images = read_split(data.parent, "train_all", need_names=False).paths
    assert [path.name for path in images] == ["0001_c1_a.png", "loop.png", "0002_c1_a.png", "loop.png"]
    with pytest.raises(UserError, match="2 of 4 .*loop.png"):
        check_images(images, skip_bad=False)
    circle = place.folder / "circle"
    circle.symlink_to(circle)
    place.assert_refuses(f"--gallery {circle}", *search(place, circle))


# ---------------------------------------------------------------------------------------------- pages
def test_names_of_files_and_runs_are_text_in_pages(place: Place, gallery: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    shutil.move(place.folder / "outputs" / "tiny", place.folder / "outputs" / evil)
    data = place.folder / f"data {evil}"
    for split in ("query", "bounding_box_test"):
        (data / split).mkdir(parents=True)
        for path in sorted((place.data / split).iterdir())[:12]:
            shutil.copyfile(path, data / split / f"{path.stem}{evil}.jpg")
    shutil.copyfile(gallery / "0.jpg", gallery / f"{evil}.jpg")
    (query,) = [path for path in gallery.iterdir() if evil in path.name]
    options = search(place, gallery, query)
    assert place.run(*options[:1], "--name", evil, *options[3:]).code == 0
    assert place.run("test", "--name", evil, "--test_dir", data, "--rank-figure", 1).code == 0
    pages = [*(place.folder / "index").glob("*.html"), *(place.folder / "outputs" / evil).glob("rank_page*.html")]
    assert len(pages) == 2
    for page in pages:
        text = page.read_text()
        assert "onerror" in text and evil not in text and "&lt;img src=x" in text


# ---------------------------------------------------------------------------------------------- bombs
def declare(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that claims to be of any size."""
    with Image.new("RGB", (4, 8)) as image:
        image.save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [(12_000, 9_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_images_of_absurd_sizes(place: Place, gallery: Path, size: tuple[int, int]) -> None:
    query = declare(place.folder / "query.png", *size)
    place.assert_refuses(query, *search(place, gallery, query))
    declare(gallery / "huge.png", *size)
    place.assert_refuses("huge.png", *search(place, gallery))
    data = place.folder / "data"
    shutil.copytree(place.data, data)
    declare(data / "bounding_box_train" / "0001_c1_huge.png", *size)
    config = place.folder / "config.yaml"
    config.write_text(yaml.safe_dump(TINY_DGNET | dict(data_root=str(data))))
    place.assert_refuses("0001_c1_huge.png", "train", "--config", config)
    huge = declare(data / "query" / "0001_c1_huge.png", *size)
    place.assert_refuses(huge, "test", "--name", "tiny", "--test_dir", data)


def test_text_in_an_image_that_unpacks_to_gigabytes(place: Place, gallery: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 80_000_000, zip=True)
    query = place.folder / "query.png"
    Image.new("RGB", (4, 8)).save(query, pnginfo=text)
    place.assert_refuses(query, *search(place, gallery, query))


def packed(file: Path) -> None:
    """The same zip, compressed, its biggest part followed by 300 MB of zeros."""
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    biggest = max(parts, key=lambda name: len(parts[name]))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, content in parts.items():
            with new.open(name, "w", force_zip64=True) as part:
                part.write(content)
                for _ in range(300 if name == biggest else 0):
                    part.write(bytes(1_000_000))


def viewed(file: Path) -> None:
    """The same weights, but with a classifier for a billion people who all share one row."""
    state = torch.load(file, weights_only=True)
    name = "classifier.classifier.0.weight"
    torch.save(state | {name: state[name][:1].expand(2**30, -1)}, file)


def declared(file: Path) -> None:
    """PyTorch's old format, which writes the number of elements beside them, with a wrong number."""
    state = torch.load(file, weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    count = state["model.conv1.weight"].numel()
    old = struct.pack("<q", count)
    assert old in data
    file.write_bytes(data.replace(old, struct.pack("<q", 2**40)))


def odd(value: torch.Tensor) -> Callable[[Path], None]:
    """An attack that puts `value` in the place of a layer's weights."""

    def attack(file: Path) -> None:
        torch.save(torch.load(file, weights_only=True) | {"model.bn1.weight": value}, file)

    return attack


ODD = [torch.ones(3, device="meta"), torch.ones(3, 4, dtype=torch.cfloat), torch.eye(4).to_sparse()]


@pytest.mark.parametrize("attack", [packed, viewed, declared, *map(odd, ODD)])
def test_weights_that_claim_to_be_huge_or_are_no_plain_numbers(place: Place, attack: Callable[[Path], None]) -> None:
    file = place.tutor / "net_last.pth"
    attack(file)
    place.assert_refuses(file, "test", "--teacher", "tutor")


MOMENTS = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}


@pytest.mark.parametrize("change", [[], {"gen": 3}, {"rng": "x"}, {"gen": {"state": MOMENTS}}], ids=range(4))
def test_states_that_are_none(place: Place, change: Any) -> None:
    file = place.checkpoints / "00000001" / "state.pt"
    state = torch.load(file, weights_only=True)
    if isinstance(change, dict):
        ((name, value),) = change.items()
        change = state | {name: state[name] | value if isinstance(value, dict) else value}
    torch.save(change, file)
    place.assert_refuses(file, *RESUME)


@pytest.mark.parametrize("kind", ["packed.npz", "declared.npz"])
def test_features_that_claim_to_be_huge(place: Place, kind: str) -> None:
    file = place.folder / kind
    zeros = {f"{side}_{name}": np.zeros((4000, 4000), np.float32) for side in ("query", "gallery") for name in "f"}
    if kind == "packed.npz":
        np.savez_compressed(file, **zeros)
    else:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }\n"
        with zipfile.ZipFile(file, "w") as out:
            for name in zeros:
                out.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    assert str(file) in place.script("reid_eval/report", file).error


# ------------------------------------------------------------------------------------- other bad files
def test_numbers_of_a_manifest_are_plain_and_not_repeated_at_length(place: Place) -> None:
    images = read_split(place.data, "train_all")
    noise(place.folder / "a.jpg")
    row = Row("a.jpg", "a.jpg", "b.jpg", images.classes[0], "0002", 1, 1, f"{images.classes[0]}:0.5")
    write_rows(place.folder / MANIFEST, [row])
    assert len(add_generated(images, place.folder, "soft")[0]) == len(images) + 1
    odd = [row._replace(structure_camera=camera) for camera in ("9" * 19, "9" * 5000, "1_0", "-1")]
    odd += [row._replace(**{field: "9" * 5000}) for field in ("file", "appearance_id", "soft_label")]
    odd.append(row._replace(soft_label="9" * 5000 + ":0.5"))
    for changed in odd:
        write_rows(place.folder / MANIFEST, [changed])
        with pytest.raises(UserError, match=MANIFEST) as error:
            add_generated(images, place.folder, "soft")
        assert len(str(error.value)) < 500


def test_a_backbone_of_any_width(place: Place) -> None:
    opts = place.tutor / "opts.yaml"
    opts.write_text(yaml.safe_dump(yaml.safe_load(opts.read_text()) | {"backbone": "resnet10w999999999"}))
    place.assert_refuses("backbone resnet10w999999999", "test", "--teacher", "tutor")


@pytest.mark.parametrize("right", [True, False])
def test_downloaded_weights_are_those_of_their_name(tmp_path: Path, monkeypatch, right: bool) -> None:
    """The name ends in the beginning of the checksum; a file that differs is not kept."""
    trunk = build_trunk("resnet10w8", last_stride=1)
    torch.save(trunk.state_dict(), tmp_path / "weights")
    prefix = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8] if right else "00000000"
    source = (tmp_path / "weights").rename(tmp_path / f"net-{prefix}.pth")
    url = type("Weights", (), {"url": source.as_uri()})
    monkeypatch.setattr("runs.weights.list_models", lambda _: ["resnet10w8"])
    monkeypatch.setattr("runs.weights.get_model_weights", lambda _: [url])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with nullcontext() if right else pytest.raises(UserError):
        load_imagenet(trunk, "resnet10w8", None)
    assert [path.name for path in (tmp_path / "hub" / "checkpoints").iterdir()] == [source.name] * right
