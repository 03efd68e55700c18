"""The figure scripts from the outside: what they paint, what they read, what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, HEIGHT, WIDTH, Outcome, random_batches, tiny_config, tiny_trainer
from PIL import Image

from data.folders import parse_name, read_people, read_split
from data.images import decode_images, normalise, to_uint8
from runs.folder import RunFolder, start_folder
from runs.grid import GAP
from runs.snapshot import save_snapshot
from runs.swapper import load_swapper
from utils import ROOT, UserError
from visual_tools.figure import choose, draw_partners, file_names

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]
SCRIPTS = ("show_rainbow", "show_swap", "show1by1", "show_smooth", "show_smooth_structure", "test_folder")
FOLDER_SCRIPTS = ("show1by1", "test_folder")
NAMES = ("a.png", "b.png", "c.png", "d.png")
CELL = (128, 64)  # height and width that the painter gives an image of 64 x 32


def snapshot(run: RunFolder, *, classes: int = 4, **changes: Any) -> RunFolder:
    """A run of one training step with random weights: figures need no more."""
    cfg = tiny_config(**changes)
    start_folder(run, cfg, resume=False)
    trainer = tiny_trainer(cfg, classes=classes)
    trainer.step(*random_batches(cfg, classes=classes), 0)
    save_snapshot(run.checkpoints, trainer, 1)
    return run


@dataclass(frozen=True)
class Place:
    """A run and a folder of four people's images in as many sizes."""

    run: RunFolder
    people: Path

    @property
    def where(self) -> tuple[object, ...]:
        """Options that name the run and the folder."""
        return ("--name", self.run.name, "--output_path", self.run.output_path, "--input", self.people)

    def pixels(self) -> torch.Tensor:
        return decode_images(sorted(self.people.iterdir()), HEIGHT, WIDTH)

    def swaps(self) -> np.ndarray:
        """(n, n, H, W, 3): the clothes of i on j, each swapped by itself."""
        model = load_swapper(self.run, CPU)
        x = normalise(self.pixels())
        rows = [[to_uint8(model.swap(x[i : i + 1], x[j : j + 1]))[0] for j in range(len(x))] for i in range(len(x))]
        return np.array(rows)


def copy_people(source: Path, target: Path, names: dict[str, str]) -> Path:
    """Images of a folder under other names and in other sizes."""
    target.mkdir(parents=True)
    for k, (old, new) in enumerate(names.items()):
        with Image.open(source / old) as image:
            image.resize((40 + 13 * k, 90 + 7 * k)).save(target / new)
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Place:
    folder = tmp_path_factory.mktemp("figures")
    images = read_split(tiny_data, "query")
    first = [images.paths[list(images.pids).index(pid)].name for pid in sorted(set(images.pids[images.pids > 0]))[:4]]
    people = copy_people(tiny_data / "query", folder / "people", dict(zip(first, NAMES, strict=True)))
    return Place(snapshot(RunFolder(folder, "one"), data_root=str(tiny_data)), people)


def done(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Warning" not in outcome.err, outcome.err
    return outcome.out


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.format == "PNG"
        return np.asarray(image).astype(int)


def cell(figure: np.ndarray, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """A cell of a painted figure, counted from the lower right corner, where no label moves it."""
    bottom, right = (rows - 1 - row) * (CELL[0] + GAP) + GAP, (columns - 1 - column) * (CELL[1] + GAP) + GAP
    height, width = figure.shape[:2]
    return figure[height - bottom - CELL[0] : height - bottom, width - right - CELL[1] : width - right]


def painted(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(CELL[::-1], Image.Resampling.BICUBIC)).astype(int)


def assert_same(figure: np.ndarray, image: np.ndarray) -> None:
    """Equal but for what batches of another size may change in the last bit."""
    assert np.abs(figure - painted(image)).max() <= 2


# --------------------------------------------------------------------------------------------- starting
def test_help_comes_from_anywhere_and_imports_nothing_heavy(tmp_path: Path) -> None:
    scripts = [
        str(ROOT / "visual_tools" / f"{name}.py") for name in (*SCRIPTS, "show_activation", "show_embedding", "report")
    ]
    scripts.append(str(ROOT / "search.py"))
    program = (
        "import runpy, sys\n"
        "sys.argv = ['script.py', '--help']\n"
        f"for script in {scripts}:\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print('heavy', sorted({'torch', 'numpy', 'PIL', 'pydantic', 'yaml', 'matplotlib'} & set(sys.modules)))\n"
    )
    environment = dict(PATH=os.environ["PATH"])
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.stdout.count("--force") == 2 * len(scripts) and out.stdout.endswith("heavy []\n"), out.stderr


# ---------------------------------------------------------------------------------------------- figures
def test_rainbow_rows_are_appearance_and_columns_structure(place: Place, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "new" / "rainbow.png"
    done(script("visual_tools/show_rainbow", *place.where, "--out", out, "--batchsize", 3))
    figure, swaps, originals = read(out), place.swaps(), place.pixels().permute(0, 2, 3, 1).numpy()
    assert np.abs(swaps[0, 1].astype(int) - swaps[1, 0]).max() > 20  # the roles can be told apart
    for i in range(4):
        assert_same(cell(figure, i + 1, 0, 5, 5), originals[i])
        assert_same(cell(figure, 0, i + 1, 5, 5), originals[i])
        for j in range(4):
            assert_same(cell(figure, i + 1, j + 1, 5, 5), swaps[i, j])
    assert (cell(figure, 0, 0, 5, 5) == 255).all()


def test_swap_shows_pairs_both_ways(place: Place, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "swap.png"
    done(script("visual_tools/show_swap", *place.where, "--out", out))
    figure, swaps, originals = read(out), place.swaps(), place.pixels().permute(0, 2, 3, 1).numpy()
    for column, (a, b) in enumerate([(0, 2), (1, 3)]):
        for row, image in enumerate([originals[a], originals[b], swaps[a, b], swaps[b, a]]):
            assert_same(cell(figure, row, column, 4, 2), image)


@pytest.mark.parametrize("code", ["appearance", "structure"])
def test_smooth_goes_from_the_first_to_the_last(place: Place, script: Script, tmp_path: Path, code: str) -> None:
    out, name = tmp_path / "smooth.png", "show_smooth" if code == "appearance" else "show_smooth_structure"
    done(script(f"visual_tools/{name}", *place.where, "--out", out, "--steps", 3, "--fps", 4, "--batchsize", 5))
    figure, swaps, originals = read(out), place.swaps(), place.pixels().permute(0, 2, 3, 1).numpy()
    model, x = load_swapper(place.run, CPU), normalise(place.pixels())
    f, s = model.appearance(x), model.structure(x)
    for k in range(4):
        ends = (swaps[0, k], swaps[3, k]) if code == "appearance" else (swaps[k, 0], swaps[k, 3])
        between = (s[k], (f[0] + f[3]) / 2) if code == "appearance" else ((s[0] + s[3]) / 2, f[k])
        middle = to_uint8(model.decode(*(value[None] for value in between)))[0]
        for column, image in enumerate([originals[k], ends[0], middle, ends[1]]):
            assert_same(cell(figure, k + 1, column, 5, 4), image)
    for column, k in ((1, 0), (3, 3)):
        assert_same(cell(figure, 0, column, 5, 4), originals[k])
    with Image.open(out.with_suffix(".gif")) as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (4, 250, 0)  # there and back
        for frame, t in ((0, 0), (2, 3)):
            film.seek(frame)
            shown = np.asarray(film.convert("RGB")).astype(int)
            for k in range(4):
                image = swaps[t, k] if code == "appearance" else swaps[k, t]
                assert np.abs(cell(shown, 1, k, 2, 4) - painted(image)).mean() < 12  # a GIF has 256 colours


def test_one_by_one_writes_every_pair(place: Place, script: Script, tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    done(script("visual_tools/show1by1", *place.where, "--out", out, "--batchsize", 3))
    assert sorted(path.name for path in out.iterdir()) == [f"{a}_on_{b}.png" for a in "abcd" for b in "abcd"]
    swaps = place.swaps()
    for i, a in enumerate("abcd"):
        for j, b in enumerate("abcd"):
            assert np.abs(read(out / f"{a}_on_{b}.png") - swaps[i, j]).max() <= 1


def test_a_whole_folder_in_the_clothes_of_others(place: Place, script: Script, tmp_path: Path) -> None:
    done(script("visual_tools/test_folder", *place.where, "--out", tmp_path / "all", "--batchsize", 3))
    pairs = [path.stem.split("_on_") for path in sorted((tmp_path / "all").iterdir())]
    assert sorted(b for _, b in pairs) == list("abcd") and all(a != b for a, b in pairs)
    swaps = place.swaps()
    for a, b in pairs:
        assert np.abs(read(tmp_path / "all" / f"{a}_on_{b}.png") - swaps["abcd".index(a), "abcd".index(b)]).max() <= 1
    # Of a data set, whose names say who is shown.
    where = ("--name", "one", "--output_path", place.run.output_path, "--count", 5, "--seed", 1)
    done(script("visual_tools/test_folder", *where, "--out", tmp_path / "some"))
    drawn = [path.stem.split("_on_") for path in (tmp_path / "some").iterdir()]
    assert len(drawn) == 5 and all(parse_name(a)[0] != parse_name(b)[0] for a, b in drawn)


@pytest.mark.parametrize("kind", ["data set", "folders", "moved", "loose", "odd names"])
def test_generated_folders_show_the_people_of_the_clothes(
    place: Place, script: Script, tmp_path: Path, tiny_data: Path, kind: str
) -> None:
    """However the input is named."""
    source = tmp_path / "in"
    for i, path in enumerate(read_people(tiny_data).paths[:12]):
        person = path.name[:4] if kind in ("folders", "moved") else ""
        names = {"folders": f"photo {i % 3}.jpg", "moved": f"{9000 + i}_c1_{i}.jpg", "loose": f"{i}.jpg"}
        (source / person).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / person / names.get(kind, f"man_on_bike {i}.jpg" if i else "0001_c1_0.jpg"))
    data = tiny_data if kind == "data set" else source
    where = ("--name", "one", "--output_path", place.run.output_path, "--input", data, "--out", tmp_path / "out")
    done(script("visual_tools/test_folder", *where))
    real, fake = read_people(data), read_people(tmp_path / "out", generated=True)
    clothes = real.pids[draw_partners(real.pids, 0)].tolist()
    assert sorted(Counter(fake.pids.tolist()).values()) == sorted(Counter(clothes).values())
    assert kind == "loose" or sorted(fake.pids.tolist()) == sorted(clothes)


def test_partners_are_other_people_all_equally_likely() -> None:
    pids = np.array([7, 3, 7, 7, 5, 3])
    drawn = np.array([draw_partners(pids, seed) for seed in range(3000)])
    assert (pids[drawn] != pids).all()
    for i, pid in enumerate(pids):
        share = np.bincount(drawn[:, i], minlength=6) / 3000
        expected = (pids != pid) / (pids != pid).sum()
        assert share == pytest.approx(expected, abs=0.05)
    alone = np.array([draw_partners(np.array([2, 2, 2]), seed) for seed in range(50)])
    assert (alone != np.arange(3)).all() and len(np.unique(alone[:, 0])) == 2


# ----------------------------------------------------------------------------------------------- inputs
def test_what_can_be_read_as_people(tiny_data: Path, tmp_path: Path) -> None:
    query = read_split(tiny_data, "query")
    people = query.pids > 0
    assert read_people(tiny_data).paths == [p for p, keep in zip(query.paths, people, strict=True) if keep]
    flat = read_people(tiny_data / "query")  # a split's folder: the names say who it is
    assert flat.paths == read_people(tiny_data).paths and (flat.pids == query.pids[people]).all()
    gallery = read_people(tiny_data, "gallery")
    assert 0 < len(gallery) < len(read_split(tiny_data, "gallery")) and gallery.pids.min() > 0

    names = [path.name for path in query.paths[:3]]
    plain = copy_people(
        tiny_data / "query", tmp_path / "plain", dict(zip(names, ("x.png", "y.jpg", "z.bmp"), strict=True))
    )
    assert read_people(plain).tokens == ["x", "y", "z"] and len(set(read_people(plain).pids)) == 3
    copy_people(tiny_data / "query", tmp_path / "sorted" / "ann", {names[0]: "1.png", names[1]: "2.png"})
    copy_people(tiny_data / "query", tmp_path / "sorted" / "bob", {names[2]: "1.png"})
    of_folders = read_people(tmp_path / "sorted")
    assert of_folders.tokens == ["ann", "ann", "bob"] and of_folders.pids.tolist() == [1, 1, 2]
    assert file_names(of_folders) == ["000000_1", "000001_2", "000002_1"]
    with pytest.raises(UserError, match="--split"):
        read_people(plain, "query")


def test_the_choice_takes_different_people_first(tiny_data: Path) -> None:
    images = read_people(tiny_data)
    people = len(set(images.pids))
    assert people < len(images)
    chosen = choose(images, people, 0)
    assert len(set(images.pids[chosen])) == people and (np.diff(chosen) > 0).all()
    more = choose(images, people + 2, 0)
    assert len(more) == people + 2 and set(chosen) < set(more)
    assert not np.array_equal(chosen, choose(images, people, 1))
    with pytest.raises(UserError, match="--count"):
        choose(images, len(images) + 1, 0)


# -------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("name", ["show_rainbow", "test_folder"])
def test_folders_that_nothing_can_be_made_of(place: Place, script: Script, tmp_path: Path, name: str) -> None:
    folder, out, run = tmp_path / "in", tmp_path / "out.png", f"visual_tools/{name}"
    where = ("--name", "one", "--output_path", place.run.output_path, "--input", folder, "--out", out)
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    assert str(folder) in script(run, *where).error
    shutil.copy(place.people / "a.png", folder)
    assert "a.png" in script(run, *where).error
    (folder / "b.jpg").write_text("no image")
    assert str(folder / "b.jpg") in script(run, *where).error
    error = script(run, *where, "--count", 4).error
    assert str(folder) in error and "--count" in error and not out.exists()


@pytest.mark.parametrize(
    "option, value",
    [
        ("--count", 101),
        ("--steps", 1),
        ("--fps", "nan"),
        ("--out", "x.jpg"),
        ("--which_epoch", 7),
        ("--split", "test"),
    ],
)
def test_options_out_of_range(place: Place, script: Script, option: str, value: object) -> None:
    error = script("visual_tools/show_smooth", *place.where, option, value).error
    assert str(value) in error and option in error


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_figure_is_not_overwritten_unasked(place: Place, script: Script, tmp_path: Path, suffix: str) -> None:
    out, taken = tmp_path / "out.png", tmp_path / f"out{suffix}"
    options = (*place.where, "--steps", 2, "--count", 2, "--out", out)
    taken.write_text("mine")
    error = script("visual_tools/show_smooth", *options).error
    assert str(taken) in error and "--force" in error
    assert [path.name for path in tmp_path.iterdir()] == [taken.name] and taken.read_text() == "mine"
    done(script("visual_tools/show_smooth", *options, "--force"))
    assert taken.read_bytes() != b"mine"


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_a_folder_with_files_is_left_alone_unless_forced(
    place: Place, script: Script, tmp_path: Path, name: str
) -> None:
    out, run = tmp_path / "out", f"visual_tools/{name}"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    error = script(run, *place.where, "--out", out).error
    assert str(out) in error and "--force" in error
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    done(script(run, *place.where, "--out", out, "--force"))
    assert (out / "mine.txt").read_text() == "mine" and len(list(out.iterdir())) > 4
    assert str(out / "mine.txt") in script(run, *place.where, "--out", out / "mine.txt").error
