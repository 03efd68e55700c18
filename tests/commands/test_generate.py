"""generate.py: pairs, manifest, whole data sets whatever interrupts them, and training on them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    CPU,
    TINY_TEACHER,
    Outcome,
    contents,
    exchange,
    replace_keeping_time,
    tiny_config,
    tiny_teacher_config,
    tiny_trainer,
)
from PIL import Image

from data.folders import UNFINISHED_MARK, read_people, read_split
from data.generated import (
    MANIFEST,
    SETTINGS,
    Row,
    add_generated,
    count_pairs,
    draw_swap_pairs,
    format_soft_label,
    parse_soft_label,
    plan_rows,
    read_rows,
    recover_rows,
    soften,
    write_rows,
)
from data.images import decode_images, normalise, to_uint8
from data.loader import Batch, PairLoader
from reIDmodel import build_teacher
from runs import swap_set
from runs.folder import RunFolder, start_folder
from runs.load import load_teacher, save_teacher
from runs.snapshot import save_snapshot
from runs.swapper import load_swapper
from trainer import TeacherTrainer
from utils import ROOT, UserError

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]
Generate = Callable[..., Outcome]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A DG-Net run and its teacher, with random weights, on the tiny data."""
    folder = tmp_path_factory.mktemp("generate")
    cfg = tiny_config(data_root=str(tiny_data), teacher="tutor")
    run = RunFolder(folder, "tiny")
    start_folder(run, cfg, resume=False)
    save_snapshot(run.checkpoints, tiny_trainer(cfg, classes=8), 4)
    torch.manual_seed(1)
    net = build_teacher(8, backbone="resnet10w8")
    torch.nn.init.normal_(net.classifier.classifier[0].weight)  # labels that are far from uniform
    save_teacher(RunFolder(folder, "tutor"), tiny_teacher_config(data_root=str(tiny_data)), net, 8)
    return folder


@pytest.fixture
def generate(runs: Path, script: Script) -> Generate:
    def call(out: Path, *options: object) -> Outcome:
        return script("generate", "--name", "tiny", "--output_path", runs, "--out", out, *options)

    return call


@pytest.fixture(scope="module")
def reference(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images, generated in one go by two processes; every other test uses one process."""
    out = tmp_path_factory.mktemp("reference") / "out"
    command = start(runs, "--out", out, "--count", 50, "--processes", 2, "--batch_size", 8)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout) == [50, 50] and len(done.stdout.splitlines()) == 2, "process 0 alone reports"
    return out


def start(runs: Path, *options: object) -> list[str]:
    fixed = ["--name", "tiny", "--output_path", runs, "--threads", 1, "--device", "cpu"]
    return [sys.executable, str(ROOT / "generate.py"), *map(str, fixed), *map(str, options)]


def numbers(text: str) -> list[int]:
    """The whole numbers in the first line of a report, without those of its paths: images, and those made now."""
    return [int(word) for word in text.splitlines()[0].split() if word.isdigit()]


def assert_agrees(out: Path, *, unlisted: bool = False) -> list[Row]:
    """Check that the manifest lists whole images only, and every image unless `unlisted` (after a kill)."""
    text = (out / MANIFEST).read_bytes()
    (out / MANIFEST).write_bytes(text[: text.rfind(b"\n") + 1])  # a kill may cut the last line
    rows = read_rows(out)
    (out / MANIFEST).write_bytes(text)
    for row in rows:
        Image.open(out / row.file).load()
    files = {str(path.relative_to(out)) for path in out.rglob("*.[jp][pn]g") if not path.name.startswith(".")}
    assert {row.file for row in rows} <= files if unlisted else {row.file for row in rows} == files
    return rows


def test_the_batch_that_fits_is_found(tmp_path: Path) -> None:
    tried = []

    class Nets:
        device, size = torch.device("cuda"), (8, 4)

        def __call__(self, x_app: torch.Tensor, x_str: torch.Tensor) -> None:
            tried.append(len(x_app))
            if len(x_app) > most:
                raise torch.OutOfMemoryError("too large")

    most = 40
    assert swap_set.choose_batch_size(Nets(), tmp_path) == 32 and tried == [256, 128, 64, 32]
    # A generation that continues makes passes of the size that it began with.
    (tmp_path / SETTINGS).write_text(json.dumps({"images_per_pass": 64, "count": 9}))
    assert swap_set.choose_batch_size(Nets(), tmp_path) == 64 and len(tried) == 4
    most = 0
    with pytest.raises(UserError, match="--precision bf16"):
        swap_set.choose_batch_size(Nets(), tmp_path / "new")


def test_a_pair_depends_on_seed_and_index_alone() -> None:
    few = np.array([0, 0, 1])
    assert count_pairs(few) == 4
    assert sorted(map(tuple, draw_swap_pairs(few, 4, seed=0).tolist())) == [(0, 2), (1, 2), (2, 0), (2, 1)]
    with pytest.raises(ValueError):
        draw_swap_pairs(few, 5, seed=0)
    labels = np.arange(400) % 40
    pairs = draw_swap_pairs(labels, 100_000, seed=3)  # more than one draw holds
    assert np.array_equal(draw_swap_pairs(labels, 7, seed=3), pairs[:7])
    assert not np.array_equal(draw_swap_pairs(labels, 7, seed=4), pairs[:7])
    assert (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    # 100,000 of 156,000 pairs: each image is either role's source about 250 times.
    counts = np.stack([np.bincount(pairs[:, role], minlength=400) for role in (0, 1)])
    assert counts.min() > 200 and counts.max() < 300


def test_soft_labels_come_back() -> None:
    text = format_soft_label(np.array([0.1, 0.6, 0.05, 0.25]), ["0002", "0007", "a b:c", "-1"], top=3)
    assert text == "0007:0.6000 -1:0.2500 0002:0.1000"
    text = format_soft_label(np.array([0.5, 0.5]), ["a b:c,\n", "x"], top=1)
    assert " " not in text and parse_soft_label(text) == {"a b:c,\n": 0.5}


@pytest.mark.parametrize("text", ["", "x:y", "a:0.7 b:0.7", "a:-0.1", "a:nan", ":"])
def test_what_is_no_soft_label(text: str) -> None:
    with pytest.raises(ValueError):
        parse_soft_label(text)


def test_what_a_soft_label_leaves_is_spread_over_the_others() -> None:
    floor, peaks = soften({1: 0.5, 2: 0.3}, 4)
    assert floor == pytest.approx(0.1) and peaks == pytest.approx({1: 0.4, 2: 0.2})
    assert soften({0: 0.75, 1: 0.5}, 3) == (0.0, pytest.approx({0: 0.6, 1: 0.4}))
    assert soften({0: 0.25, 1: 0.5}, 2) == (0.0, pytest.approx({0: 1 / 3, 1: 2 / 3}))


# ------------------------------------------------------------------------------------------ the manifest
ROW = Row("train_all/1/a.jpg", "x/1.jpg", "x/2.jpg", "1", "2", 3, 4, "1:0.5")


@pytest.mark.parametrize(
    "row, words",
    [
        *((ROW._replace(file=file), "line 3") for file in ("../a.jpg", "/etc/x", "a/../../b.jpg", "", ".", "a\0b")),
        (ROW, ROW.file),
        (ROW[:7], "line 3"),
        (ROW._replace(structure_camera="c"), "line 3"),
    ],
)
def test_hostile_and_damaged_manifests(tmp_path: Path, row: Any, words: str) -> None:
    write_rows(tmp_path, [ROW, row])
    with pytest.raises(UserError) as error:
        read_rows(tmp_path)
    assert str(tmp_path / MANIFEST) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="generate.py"):
        read_rows(tmp_path)
    (tmp_path / MANIFEST).write_text("file,what\n")
    with pytest.raises(UserError, match=MANIFEST):
        read_rows(tmp_path)
    write_rows(tmp_path, [ROW, ROW._replace(file='train_all/1/a, "b".jpg')])
    assert read_rows(tmp_path)[1].file == 'train_all/1/a, "b".jpg'


def test_names_follow_market(tiny_data: Path, tmp_path: Path) -> None:
    images = read_people(tiny_data, "train_all")
    pairs = draw_swap_pairs(images.labels(), 30, seed=0)
    rows = plan_rows(images, tiny_data, pairs, labelled=True, suffix=".png")
    for i, (row, (a, s)) in enumerate(zip(rows, pairs, strict=True)):
        token = images.tokens[a]
        assert row.file.startswith(f"train_all/{token}/{token}_")
        assert row.file.endswith(f"_c{images.camids[s]}s1_{i:06d}_00.png")
    nobody = plan_rows(images, tiny_data, pairs, labelled=False, suffix=".jpg")
    assert {row.file.split("_c")[0] for row in nobody} == {"train_all/0000/0000"}
    assert [row.appearance_id for row in nobody] == [row.appearance_id for row in rows]
    # Folders with names that are no numbers, pictures with names that say nothing.
    for name in ("anna", "bo:b"):
        (tmp_path / name).mkdir()
        shutil.copy(images.paths[0], tmp_path / name / "picture.jpg")
    rows = plan_rows(read_people(tmp_path), tmp_path, np.array([[0, 1], [1, 0]]), labelled=True, suffix=".jpg")
    names = "anna/0001_c0s1_000000_00.jpg", "bo:b/0002_c0s1_000001_00.jpg"
    assert [row.file for row in rows] == [f"train_all/{name}" for name in names]


# ---------------------------------------------------------------------------------------------- data sets
def test_the_images_are_the_swaps_that_the_manifest_names(
    runs: Path, generate: Generate, tiny_data: Path, tmp_path: Path
) -> None:
    outcome = generate(tmp_path / "out", "--count", 20, "--format", "png", "--seed", 5, "--top", 3)
    assert outcome.code == 0, outcome.err
    rows = assert_agrees(tmp_path / "out")
    model = load_swapper(RunFolder(runs, "tiny"), CPU)
    x_app, x_str = (normalise(decode_images([tiny_data / row[role] for row in rows], *model.size)) for role in (1, 2))
    written = np.stack([np.asarray(Image.open(tmp_path / "out" / row.file)) for row in rows])
    # Another number of images per pass: the last bit of a float may differ.
    assert np.abs(to_uint8(model.swap(x_app, x_str)).astype(int) - written).max() <= 1
    teacher = load_teacher("tutor", runs, 8)
    with torch.no_grad():
        x = normalise(torch.from_numpy(written).permute(0, 3, 1, 2))
        p = sum(torch.softmax(teacher(v)[1][0], dim=1) for v in (x, x.flip(3))) / 2
    classes = read_split(tiny_data, "train_all").classes
    for row, expected in zip(rows, p, strict=True):
        label = parse_soft_label(row.soft_label)
        assert len(label) == 3 and list(label.values()) == sorted(label.values(), reverse=True)
        for token, probability in label.items():
            assert probability == pytest.approx(expected[classes.index(token)].item(), abs=2e-4)
        assert max(label, key=label.get) == classes[expected.argmax()]


def test_the_result_is_a_data_set(reference: Path, tiny_data: Path) -> None:
    images, rows = read_split(reference, "train_all"), assert_agrees(reference)
    assert len(images) == 50
    by_file = {reference / row.file: row for row in rows}
    for path, token, camera in zip(images.paths, images.tokens, images.camids, strict=True):
        row = by_file[path]
        assert (token, camera) == (row.appearance_id, row.structure_camera)
        assert row.appearance_id in row.appearance and row.structure_id in row.structure
        assert (tiny_data / row.appearance).is_file() and (tiny_data / row.structure).is_file()
    assert not [path for path in reference.rglob(".*")]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_and_processes_do_not_show(
    generate: Generate, reference: Path, tmp_path: Path, batch_size: int
) -> None:
    assert generate(tmp_path / "out", "--count", 50, "--batch_size", batch_size).code == 0
    assert contents(tmp_path / "out") == contents(reference)


@pytest.mark.slow
def test_torchrun_makes_the_same_files(runs: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = start(runs, "--out", out, "--count", 50, "--batch_size", 8)
    done = subprocess.run(torchrun + command[1:], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert numbers(done.stdout)[:2] == [50, 50], "process 0 alone reports"
    assert contents(out) == contents(reference)


def interrupt(out: Path, number: int, rows: int, command: list[str]) -> tuple[int, str]:
    """Start a command and send a signal when the manifest has more than `rows` rows; (exit status, printed)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end, manifest = time.monotonic() + 200, out / MANIFEST
    while process.poll() is None and time.monotonic() < end:
        if manifest.exists() and manifest.read_bytes().count(b"\n") > 1 + rows:
            break
        time.sleep(0.002)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


def test_killed_it_continues_to_the_same_result(
    runs: Path, generate: Generate, reference: Path, tmp_path: Path
) -> None:
    for attempt in range(5):  # on a busy machine it may be done before it is killed
        out = tmp_path / str(attempt)
        command = start(runs, "--out", out, "--count", 50, "--batch_size", 8)
        if interrupt(out, signal.SIGKILL, 7, command)[0] == -signal.SIGKILL:
            break
    rows = assert_agrees(out, unlisted=True)
    assert 0 < len(rows) < 50
    with pytest.raises(UserError, match=str(out)):
        read_split(out, "train_all")
    outcome = generate(out, "--count", 50)
    assert outcome.code == 0, outcome.err
    assert numbers(outcome.out) == [50, 50 - len(rows)]
    assert contents(out) == contents(reference)


@pytest.mark.slow
def test_signals_stop_it_and_it_continues(runs: Path, generate: Generate, reference: Path, tmp_path: Path) -> None:
    """What a batch system and what Ctrl-C send: the images so far are listed, nothing else stays."""
    out, count = tmp_path / "out", 300  # more than are made while this test looks
    for number, processes in ((signal.SIGTERM, 2), (signal.SIGINT, 1)):
        before = len(read_rows(out)) if out.exists() else 0
        command = start(runs, "--out", out, "--count", count, "--batch_size", 8, "--processes", processes)
        status, printed = interrupt(out, number, before + 8, command)  # a batch, and part of one
        assert status == 128 + number, printed
        assert "Traceback" not in printed and "error" not in printed, printed
        rows = assert_agrees(out)
        assert before < len(rows) < count and not list(out.rglob("*.part"))
    outcome = generate(out, "--count", count)
    assert outcome.code == 0 and numbers(outcome.out) == [count, count - len(rows)], outcome.err
    assert len(assert_agrees(out)) == count
    wanted = {file: digest for file, digest in contents(reference).items() if file.endswith(".jpg")}
    assert wanted.items() <= contents(out).items() and read_rows(out)[:50] == read_rows(reference)


def test_a_longer_one_begins_with_the_same_images(generate: Generate, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert generate(out, "--count", 20).code == 0
    first = contents(out)
    assert generate(out, "--count", 50).code == 0
    assert contents(out) == contents(reference)
    assert {file: first[file] for file in first if file.endswith(".jpg")}.items() <= contents(reference).items()
    outcome = generate(out, "--count", 50)
    assert outcome.code == 0 and numbers(outcome.out) == [50, 0] and contents(out) == contents(reference)
    assert "--count 20" in generate(out, "--count", 20).error
    # What was lost since is made again.
    rows = read_rows(out)
    (out / rows[3].file).unlink()
    (out / rows[30].file).write_bytes(b"")
    with open(out / MANIFEST, "ab") as file:
        file.write(b"train_all/0004/cut off")
    assert numbers(generate(out, "--count", 50).out) == [50, 2]
    assert contents(out) == contents(reference)


@pytest.mark.parametrize("limit", [1000, 3000])  # less than an image, less than the manifest in the end
def test_disk_full(generate: Generate, tmp_path: Path, reference: Path, limit: int) -> None:
    """A limit on the size of files cuts a write short as a full disk does."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert generate(out, "--count", 8).code == 0
    largest = max(path.stat().st_size for path in out.rglob("*.jpg"))
    assert 1000 < largest < 3000 and (out / MANIFEST).stat().st_size < 3000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        outcome = generate(out, "--count", 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rows = assert_agrees(out)
    assert 8 <= len(rows) < 50 and str(out) in outcome.error and f"{len(rows)} of 50" in outcome.error
    assert not list(out.rglob("*.part"))
    assert generate(out, "--count", 50).code == 0
    assert contents(out) == contents(reference)


def test_nothing_foreign_is_touched(generate: Generate, reference: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    assert "diary.txt" in generate(tmp_path, "--count", 4).error
    assert contents(tmp_path).keys() == {"diary.txt"}
    before = contents(reference)
    for options in (("--seed", 1), ("--labels", "none"), ("--quality", 50), ("--no-soft-labels",)):
        assert str(reference) in generate(reference, "--count", 50, *options).error
    assert contents(reference) == before
    settings = tmp_path / "cut" / SETTINGS
    settings.parent.mkdir()
    settings.write_text("{")
    assert str(settings) in generate(settings.parent, "--count", 4).error
    lock = os.open(tmp_path / "cut", os.O_RDONLY)  # another process works there
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert f"--out {tmp_path / 'cut'}" in generate(tmp_path / "cut", "--count", 4).error
    finally:
        os.close(lock)


def copy_over(a: Path, b: Path) -> None:
    shutil.copy2(b, a)


@pytest.mark.parametrize("change", [exchange, replace_keeping_time, copy_over])
def test_inputs_that_changed_under_their_names_are_noticed(
    generate: Generate, tiny_data: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    people, out = tmp_path / "people", tmp_path / "out"
    shutil.copytree(tiny_data / "bounding_box_train", people)
    options = ("--no-soft-labels", "--count")
    assert generate(out, "--input", people, *options, 4).code == 0
    change(*sorted(people.iterdir())[:2])
    before = contents(out)
    for count in (4, 6):
        error = generate(out, "--input", people, *options, count).error
        assert str(out) in error and str(people) in error
    assert contents(out) == before
    # The same pictures elsewhere, with other inodes and times, are the same.
    moved = shutil.copytree(tiny_data / "bounding_box_train", tmp_path / "moved", copy_function=shutil.copyfile)
    assert numbers(generate(out, "--input", moved, *options, 6).out) == [6, 2]


def test_a_generation_of_an_earlier_version_is_continued(generate: Generate, reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    settings = json.loads((out / SETTINGS).read_text())
    assert settings.pop("contents")
    (out / SETTINGS).write_text(json.dumps(settings))
    for count in (50, 52):  # each time it says that the images' contents were not recorded
        outcome = generate(out, "--count", count)
        assert outcome.code == 0 and str(out) in outcome.err
        assert json.loads((out / SETTINGS).read_text())["contents"] is None
    assert len(assert_agrees(out)) == 52


def test_a_manifest_of_something_else_is_not_continued(reference: Path, tmp_path: Path) -> None:
    shutil.copy(reference / MANIFEST, tmp_path)
    rows = read_rows(reference)
    plain = [row._replace(soft_label="") for row in rows]
    with pytest.raises(UserError, match=MANIFEST):
        recover_rows(tmp_path, [row._replace(appearance="x") for row in plain])
    shutil.copytree(reference / "train_all", tmp_path / "train_all")
    assert recover_rows(tmp_path, plain) == rows


def test_without_labels_and_teacher(generate: Generate, tmp_path: Path, tiny_data: Path) -> None:
    out = tmp_path / "out"
    options = ("--labels", "none", "--no-soft-labels", "--input", tiny_data / "bounding_box_train")
    assert generate(out, "--count", 9, *options).code == 0
    rows = assert_agrees(out)
    assert {row.soft_label for row in rows} == {""} and len({row.appearance_id for row in rows}) > 1
    assert all((tiny_data / "bounding_box_train" / row.structure).is_file() for row in rows)
    images = read_split(out, "train_all")
    assert set(images.pids) == {0} and len(images) == 9
    # To score them every image counts as another person.
    for source in (out, out / "train_all"):
        assert read_people(source, generated=True).pids.tolist() == list(range(1, 10))
    shutil.copytree(tiny_data / "query", out / "query")  # with queries it is a data set as any other
    assert read_people(out, generated=True).paths == read_people(out).paths


def test_it_is_unfinished_from_the_first_change_on(
    generate: Generate, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    shutil.copytree(reference, out)
    count = len(read_rows(out))
    with monkeypatch.context() as patch:
        patch.setattr(swap_set, "recover_rows", killed)
        assert generate(out, "--count", count + 1).code == 130
    assert (out / UNFINISHED_MARK).exists()
    assert generate(out, "--count", count + 1).code == 0 and not (out / UNFINISHED_MARK).exists()
    assert len(read_people(out, generated=True)) == count + 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--quality", 101), "--quality"),
        (("--which_epoch", 3), "--which_epoch 3"),
        (("--name", "nobody"), "nobody"),
        (("--teacher", "nobody"), "nobody.*--no-soft-labels"),
        (("--teacher", ","), "--teacher ','"),
        (("--data_root", "nowhere"), "nowhere.*--data_root DIR"),
        (("--precision", "fp16"), "fp16"),
        (("--gpu_ids", "0,x"), "--gpu_ids 0,x"),
        (("--input", "nowhere"), "nowhere"),
        (("--count", 0), "--count"),
        (("--count", 10**9), "--count 1000000000"),
    ],
)
def test_bad_options(generate: Generate, tmp_path: Path, options: tuple, words: str) -> None:
    assert re.search(words, generate(tmp_path / "out", "--count", 4, *options).error)
    assert not (tmp_path / "out").exists()


def test_bad_input_folders(generate: Generate, tiny_data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    options = (out, "--count", 1, "--no-soft-labels", "--input", source)
    assert str(source) in generate(*options).error
    first, other, *_, last = sorted((tiny_data / "bounding_box_train").iterdir())
    shutil.copy(first, source)
    assert "1 images of 1 identity" in generate(*options).error
    shutil.copy(last, source)
    (source / other.name).write_text("not a picture")
    assert other.name in generate(*options).error and not out.exists()
    (source / other.name).unlink()
    assert generate(*options).code == 0
    (tmp_path / "file").write_text("")
    assert "file/out" in generate(tmp_path / "file" / "out", "--count", 4).error


# ------------------------------------------------------------------------------------- training on them
def test_labels_of_real_and_generated_images(reference: Path, tiny_data: Path) -> None:
    real = read_split(tiny_data, "train_all", need_names=False)
    n, rows = len(real), read_rows(reference)
    both, none = add_generated(real, reference, "one_hot")
    assert none is None and both.classes == real.classes and len(both) == n + 50
    assert [both.classes[k] for k in both.labels()[n:]] == [row.appearance_id for row in rows]
    assert np.array_equal(both.labels()[:n], real.labels())
    everything = np.arange(n + 50)
    _, uniform = add_generated(real, reference, "lsro")
    q = uniform.rows(everything)
    assert np.array_equal(q[:n], np.eye(8)[real.labels()]) and (q[n:] == 1 / 8).all()
    _, soft = add_generated(real, reference, "soft")
    q = soft.rows(everything)
    assert np.array_equal(q[:n], np.eye(8)[real.labels()])
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-6)
    for row, label in zip(rows, q[n:], strict=True):
        listed = parse_soft_label(row.soft_label)
        for token, probability in listed.items():
            assert label[both.classes.index(token)] == pytest.approx(probability, abs=3e-4)
        rest = [label[k] for k, token in enumerate(both.classes) if token not in listed]
        assert rest == pytest.approx([(1 - sum(listed.values())) / 3] * 3, abs=1e-6)


def test_the_loader_hands_out_the_labels_of_its_images(reference: Path, tiny_data: Path) -> None:
    real = read_split(tiny_data, "train_all", need_names=False)
    both, soft = add_generated(real, reference, "soft")
    size = dict(batch_size=16, height=64, width=32, seed=0, with_positive=False)
    loader = PairLoader(both, soft_labels=soft, **size)
    seen = set()
    for t in range(loader.batches_per_epoch):
        batch = loader.batch(t)
        seen |= set(batch.index.tolist())
        assert np.array_equal(batch.q.numpy(), soft.rows(batch.index.numpy()))
        assert np.array_equal(batch.y.numpy(), both.labels()[batch.index.numpy()])
    assert len([i for i in seen if i >= len(real)]) > 30
    assert PairLoader(both, **size).batch(0).q is None


def test_a_step_on_one_hot_rows_is_a_step_on_classes() -> None:
    x, y = torch.randn(6, 3, 64, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    results = {}
    for name, q in dict(classes=None, rows=torch.eye(3)[y], uniform=torch.full((6, 3), 1 / 3)).items():
        torch.manual_seed(0)
        trainer = TeacherTrainer(tiny_teacher_config(dropout=0, batch_size=6), 3, CPU, steps_per_epoch=1)
        terms = trainer.step(Batch(x, x[:0], y, y, q), 1)
        results[name] = terms, trainer.net.classifier.classifier[0].weight.detach()
    torch.testing.assert_close(results["classes"], results["rows"])
    assert results["uniform"][0]["id"] >= np.log(3) - 1e-6
    assert (results["uniform"][1] - results["classes"][1]).abs().max() > 1e-3


@pytest.fixture
def train(script: Script, runs: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Train a teacher on the tiny data and what `extra` says."""

    def call(*options: str, **extra: Any) -> Outcome:
        file = tmp_path / "extra.yaml"
        file.write_text(yaml.safe_dump(TINY_TEACHER | dict(data_root=str(tiny_data), epochs=1) | extra))
        return script("train", "--config", file, "--output_path", tmp_path / "trained", *options)

    return call


@pytest.mark.parametrize("policy", ["one_hot", "lsro", "soft"])
def test_a_teacher_trains_on_real_and_generated_images(
    train: Callable[..., Outcome], reference: Path, tiny_data: Path, policy: str
) -> None:
    steps = (len(read_split(tiny_data, "train_all", need_names=False)) + 50) // 16
    outcome = train(extra_data=str(reference), extra_labels=policy)
    assert outcome.code == 0 and f"{steps}/{steps}" in outcome.err, outcome.err


def test_extra_data_that_does_not_fit(
    train: Callable[..., Outcome], reference: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out, rows = tmp_path / "out", read_rows(reference)

    def error(**changes: Any) -> str:
        """The message for a manifest whose last row has `changes`."""
        write_rows(out, [*rows[:-1], rows[-1]._replace(**changes)])
        return train(extra_data=str(out), extra_labels="soft").error

    assert "extra_data" in train(extra_labels="lsro").error
    assert MANIFEST in train(extra_data=str(tiny_data)).error
    shutil.copytree(reference, out)
    (out / UNFINISHED_MARK).touch()
    assert str(out) in error()
    (out / UNFINISHED_MARK).unlink()
    assert "9999" in error(appearance_id="9999") and "9999" in error(soft_label="9999:0.5")
    assert rows[-1].file in error(soft_label="") and rows[-1].file in error(soft_label="0004:x")
    assert MANIFEST in error(file="../outside.jpg")
    (out / rows[0].file).unlink()
    assert "1 of 50" in error()
    write_rows(out, [])
    assert str(out) in train(extra_data=str(out)).error
