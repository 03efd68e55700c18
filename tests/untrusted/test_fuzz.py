"""Random configs, names and images, and damaged files: each ends in a correct run or in one clear line.

`FUZZ=20 python -m pytest tests/untrusted/test_fuzz.py` tries twenty times as many; `FUZZ_SEED=N` tries different ones.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, TINY_DGNET, TINY_TEACHER, merged, noise, random_batches, tiny_config, tiny_trainer
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from config import load_config, parse_config
from data import archives
from data.folders import ImageList, parse_name
from data.generated import MANIFEST, Row, add_generated, read_rows, write_rows
from data.images import check_images, load_image
from reid_eval.features import Features, load_features, save_features
from reIDmodel import build_teacher
from runs.folder import RunFolder
from runs.guards import not_finite
from runs.load import load_teacher, save_teacher
from runs.snapshot import load_snapshot, save_snapshot
from trainer import TeacherTrainer
from utils import ROOT, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
FUZZ, SEED = int(os.environ.get("FUZZ", 1)), int(os.environ.get("FUZZ_SEED", 0))


def fuzz(examples: int) -> Callable:
    return settings(
        max_examples=examples * FUZZ,
        deadline=None,
        database=None,
        derandomize=not SEED,
        phases=[Phase.generate],  # a step takes its time: no search for a smaller example
        suppress_health_check=list(HealthCheck),
    )


# --------------------------------------------------------------------------------------------- configs
def some(choices: str) -> st.SearchStrategy[dict[str, Any]]:
    """A dictionary with some of the keys of a flow of YAML; a list holds the values of its key."""
    lists = yaml.safe_load(f"{{{choices}}}")
    return st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in lists.items()})


ACTIVATIONS, PADS = "[lrelu, relu, prelu, selu, tanh, none]", "[reflect, replicate, zero]"
GEN = some(f"""
    activ: {ACTIVATIONS}, dec: [basic, series, parallel], dim: [1, 2, 5], dropout: [0, 0.4],
    init: [kaiming, gaussian, xavier, orthogonal], mlp_dim: [1, 7], mlp_norm: [none, ln], n_downsample: [1, 2],
    n_res: [1, 2, 4], non_local: [0, 1], pad_type: {PADS}, tanh: [true, false]
""")
DIS = some(f"""
    LAMBDA: [0, 0.3, 1, 7.5], activ: {ACTIVATIONS}, dim: [1, 4, 9], gan_type: [lsgan, nsgan], n_layer: [1, 2],
    n_res: [0, 2], non_local: [0, 1, 2], norm: [none, in, ln], num_scales: [1, 2, 3], pad_type: {PADS}
""")
WEIGHTS = "B_w T_w gan_w id_w pid_w recon_x_w recon_xp_w recon_id_w recon_f_w recon_s_w recon_x_cyc_w teacher_w"
DGNET = some(f"""
    {"".join(f"{name}: [0, 0.3, 1, 7.5], " for name in WEIGHTS.split())}
    ID_stride: [1, 2], ID_style: [AB, normal, PCB], batch_size: [2, 3], beta1: [0, 0.5], channels_last: [true, false],
    crop_image_height: [32, 40, 64, 70], crop_image_width: [16, 32, 36], detach_f: [true, false],
    erasing_p: [0, 0.5, 1], head_lr_factor: [0.1, 10], id_freeze_iter: [0, 5], id_weight_decay: [null, 0, 0.04],
    lr2: [1.0e-9, 0.002], lr_policy: [constant, step, multistep, cosine], max_iter: [1, 10], norm_id: [true, false],
    pool: [max, avg], precision: [fp32, bf16], seed: [0, {2**31 - 1}], single: [gray, edge], step_size: [1, 100],
    teacher: [one, "one,two"], teacher_style: [0, 1, 2, 3, 4], train_bn: [true, false],
    use_encoder_again: [-1.0, 0.5, 2.0], warm_iter: [0, 3], warm_scale: [0, 0.5], warm_teacher_iter: [0, 3],
    weight_decay: [0, 0.1]
""")
TEACHER = some("""
    batch_size: [2, 5], channels_last: [true, false], dropout: [0, 0.9], epochs: [1, 7], erasing_p: [0, 1],
    lr: [1.0e-6, 0.05], lr_policy: [step, cosine], precision: [fp32, bf16], stride: [1, 2], trunk_lr_factor: [0, 1],
    warm_epochs: [0, 9]
""")


def parsed(values: dict[str, Any], least: int = 1) -> Any:
    """The config; values that do not go together are refused in one line, and then others are drawn."""
    try:
        cfg = parse_config(values, "drawn")
    except UserError as error:
        assert str(error).startswith("drawn: ") and "\n" not in str(error)
        assume(False)
    assume(cfg.batch_size >= least)
    return cfg


@fuzz(10)
@given(changes=DGNET, gen=GEN, dis=DIS, t=st.sampled_from([0, 1, 5, 99]))
def test_any_config_of_dgnet_takes_a_step_and_is_saved(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], gen: dict, dis: dict, t: int
) -> None:
    changes |= dict(gen=gen, dis=dis)
    gen["id_dim"] = 256 // gen.get("n_res", 4)  # the trunk's code, cut into a chunk for each residual block
    cfg = parsed(merged(TINY_DGNET, changes), least=2)
    teachers = [build_teacher(4, backbone="resnet10w8") for _ in cfg.teachers]
    trainer = tiny_trainer(cfg, teachers=teachers)
    values = trainer.step(*random_batches(cfg), t)
    assert all(np.isfinite(float(value)) for value in values.values()), values
    assert not_finite(trainer) == []
    folder = tmp_path_factory.mktemp("snapshot")
    save_snapshot(folder, trainer, t + 1)
    before = {name: net.state_dict() for name, net in trainer.networks().items()}
    again = tiny_trainer(cfg, teachers=teachers)
    assert load_snapshot(folder, again) == t + 1
    for name, net in again.networks().items():
        assert all(torch.equal(value, before[name][key]) for key, value in net.state_dict().items())
    shutil.rmtree(folder)


@fuzz(10)
@given(changes=TEACHER, t=st.sampled_from([0, 1, 50]))
def test_any_config_of_a_teacher_takes_a_step(changes: dict[str, Any], t: int) -> None:
    cfg = parsed(TINY_TEACHER | changes)
    trainer = TeacherTrainer(cfg, 4, CPU, steps_per_epoch=3)
    values = trainer.step(random_batches(cfg)[0], t)
    assert all(np.isfinite(float(value)) for value in values.values()), values
    assert not_finite(trainer) == []


# ----------------------------------------------------------------------------------------------- names
@fuzz(300)
@given(pid=st.integers(-1, 10**18 - 1), camid=st.integers(0, 10**18 - 1), rest=st.text())
def test_names_of_the_form_are_read(pid: int, camid: int, rest: str) -> None:
    assume(not rest[:1].isascii() or not rest[:1].isdigit())
    assert parse_name(f"{pid:04d}_c{camid}{rest}") == (pid, camid)


# --------------------------------------------------------------------------------------------- damages
def damage(content: bytes, rng: random.Random) -> bytes:
    """The content with one to eight flips, cuts, insertions or holes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        kind = rng.choice(["flip", "byte", "cut", "insert", "zeros", "remove"])
        if kind == "cut" and rng.random() < 0.5:
            del data[place:]
        elif kind == "insert":
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        elif kind == "zeros":
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        elif kind == "remove":
            del data[place : place + rng.randint(1, 8)]
        elif place < len(data):
            data[place] = data[place] ^ 1 << rng.randrange(8) if kind == "flip" else rng.randrange(256)
    return bytes(data)


def damaged(file: Path, times: int, read: Callable[[], Any], same: Callable[[Any], bool] | None = None) -> int:
    """Read a file under many damages; returns how many were refused. The rest must be the `same` as before."""
    rng, content, refused = random.Random(f"{SEED} {file.name}"), file.read_bytes(), 0
    for _ in range(times * FUZZ):
        changed = damage(content, rng)
        if changed == content:
            continue
        file.write_bytes(changed)
        try:
            result = read()
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and file.name in str(error), error
        except BaseException as error:
            raise AssertionError(f"{error!r} from {file.name} as {changed!r}") from error
        else:
            assert same is None or same(result), f"another result from {changed!r}"
    file.write_bytes(content)
    read()
    return refused


def weights(*nets: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for net in nets for value in net.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def naming(file: str, read: Callable[[], Any]) -> Callable[[], Any]:
    """`read`, for a list whose damage may show in the files that it names wrongly: its errors name `file` too."""

    def named() -> Any:
        try:
            return read()
        except UserError as error:
            raise UserError(f"{error} {file}") from None

    return named


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config())
    save_snapshot(tmp_path, trainer, 1)
    before = weights(*trainer.networks().values())
    for file in sorted((tmp_path / "00000001").iterdir()):
        read = naming(file.name, lambda: load_snapshot(tmp_path, trainer))
        refused = damaged(file, 150, read, lambda _: equal(weights(*trainer.networks().values()), before))
        # Between the tensors of a file there are zeros that nobody reads, and between the words of a manifest blanks.
        assert refused > 0.7 * 150 * FUZZ or file.suffix == ".json"


def test_a_damaged_teacher_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    run, net = RunFolder(tmp_path, "tutor"), build_teacher(4, backbone="resnet10w8")
    save_teacher(run, parse_config(TINY_TEACHER, "tiny"), net, 4)
    before = weights(net)
    refused = damaged(
        run.model / "net_last.pth", 100, lambda: load_teacher("tutor", tmp_path), lambda n: equal(weights(n), before)
    )
    assert refused > 80 * FUZZ
    damaged(run.model / "opts.yaml", 50, lambda: load_teacher("tutor", tmp_path))
    # PyTorch's old format, as of the release's time, holds no checksums: values may differ, nothing else may happen.
    torch.save(net.state_dict(), run.model / "net_last.pth", _use_new_zipfile_serialization=False)
    damaged(run.model / "net_last.pth", 50, lambda: load_teacher("tutor", tmp_path))


def side(n: int) -> Features:
    rng = np.random.default_rng(n)
    names = np.array([f"{i}.jpg" for i in range(n)])
    return Features(rng.standard_normal((n, 2, 4)).astype(np.float32), np.arange(n) % 3, np.arange(n) % 2, names)


def test_damaged_features_are_refused_or_read_as_they_were(tmp_path: Path) -> None:
    file, sides = tmp_path / "f.npz", (side(4), side(6))
    save_features(file, *sides)

    def same(read: Any) -> bool:
        pairs = zip((read.query, read.gallery), sides, strict=True)
        return all(np.array_equal(getattr(a, k), getattr(b, k)) for a, b in pairs for k in ("features", "pids", "keys"))

    assert damaged(file, 500, lambda: load_features(file), same) > 250 * FUZZ


def test_a_damaged_manifest_of_generated_images(tmp_path: Path) -> None:
    names = [f"train_all/{i}/{i}_c1s1_0.png" for i in (1, 2)]
    paths = [noise(tmp_path / name) for name in names]
    both = zip(names, "12", strict=True)
    write_rows(
        tmp_path / MANIFEST, [Row(name, "a.jpg", "b.jpg", i, "2", 1, 2, "1:0.7500 2:0.1000") for name, i in both]
    )
    real = ImageList(paths, [1, 2], [0, 0])
    inside = tmp_path.resolve()

    def read() -> None:
        assert all((tmp_path / row.file).resolve().is_relative_to(inside) for row in read_rows(tmp_path / MANIFEST))
        images, labels = add_generated(real, tmp_path, "soft")
        q = labels.rows(np.arange(len(images)))
        assert np.abs(q.sum(axis=1) - 1).max() < 1e-3 and q.min() >= 0

    assert damaged(tmp_path / MANIFEST, 400, naming(MANIFEST, read)) > 200 * FUZZ


@pytest.mark.parametrize("name", ["latest", "teacher"])
def test_a_damaged_config(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.yaml"
    shutil.copy(ROOT / "configs" / file.name, file)
    for strict in (True, False):
        assert damaged(file, 100, partial(load_config, file, strict=strict)) > 20 * FUZZ


def test_damaged_lists_of_images(tmp_path: Path) -> None:
    splits = ["train", "train", "train", "query", "gallery", "gallery"]
    table = tmp_path / "dataset.csv"
    lines = [f"{noise(tmp_path / f'{i}.png').name},{i // 2},{i % 2},{split}\n" for i, split in enumerate(splits)]
    table.write_text("path,identity,camera,split\n" + "".join(lines))
    assert damaged(table, 250, lambda: archives.table(tmp_path, table)) > 20 * FUZZ
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    for file in ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt"):
        (tmp_path / file).write_text("0000/0000_000_01_0303morning_0008_0.jpg 0\n")
    damaged(tmp_path / "list_train.txt", 250, lambda: archives.msmt17(tmp_path))


def test_damaged_images(tmp_path: Path) -> None:
    """JPEG has no checksums: a wrong picture may come out, of the right shape; nothing else may happen."""
    warnings.simplefilter("ignore")  # Pillow's, of the damage; pytest puts the filters back
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(noise(tmp_path / "noise.png", (12, 20)))
    kinds = {"a.jpg": image, "b.jpg": image.convert("CMYK"), "c.png": image, "d.png": image.quantize(), "e.bmp": image}
    kinds |= {"f.ppm": image, "g.png": Image.fromarray(np.arange(240, dtype=np.uint16).reshape(20, 12) * 256)}
    for name, picture in kinds.items():
        path = tmp_path / name
        picture.save(path, **({"exif": exif} if name[-1] == "g" else {}))

        def read(path: Path = path) -> None:
            good = check_images([path], skip_bad=True, minimum=0)
            loaded = load_image(path)
            assert loaded.mode == "RGB" and min(loaded.size) > 0 and good in ([True], [False])

        damaged(path, 200, read)
    for name, form in (("h.jpg", "TIFF"), ("i.jpg", "GIF"), ("j.jpg", "WEBP")):  # by their content, whatever the name
        image.save(tmp_path / name, form)
        damaged(tmp_path / name, 60, partial(load_image, tmp_path / name))
