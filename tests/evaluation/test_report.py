"""The report of a run, and `eval_iter`, whose values it shows: real runs on the tiny data."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, TINY_DGNET, TINY_TEACHER, Outcome, OutputFolder, contents, load_script, merged, tiny_config
from PIL import Image

from data.folders import read_split
from data.images import decode_images, normalise, to_uint8
from files import write_tensors
from mannequins.against_truth import describe_shares
from mannequins.dataset import load_factors
from mannequins.truth import draw_swaps, measure_swaps
from reIDmodel import build_teacher
from runs.folder import RunFolder
from runs.swapper import load_swapper
from visual_tools import run_page
from visual_tools.curves import draw, group, read_log
from visual_tools.run_page import jpeg

pytestmark = pytest.mark.usefixtures("one_thread")
# Text that the page must show and not run.
NAME = "<img src=x onerror=document.title='hacked'>"
FOLDER = "\"><script>document.title='hacked'</script>"
CONFIG = merged(TINY_DGNET, dict(teacher_style=3, teacher="tutor")) | dict(
    max_iter=4, eval_iter=2, log_iter=1, snapshot_save_iter=2, image_save_iter=100, image_display_iter=100
)


def call(name: str, *arguments: object) -> None:
    """Run a script of the project in this process, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert not load_script(name).main()


@dataclass(frozen=True)
class Place(OutputFolder):
    """The output folder of a run called NAME and its teacher, on data in a folder called FOLDER."""

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder, NAME)

    def train(self, name: str, *options: object, **changes: Any) -> None:
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(CONFIG | dict(data_root=str(self.data)) | changes))
        call("train", "--config", file, "--name", name, *self.where, *options)

    def files(self, name: str, iteration: int) -> dict[str, Any]:
        """Checksums of a snapshot's files: weights, optimisers, random state."""
        files = contents(self.folder / "outputs" / name / "checkpoints" / f"{iteration:08d}")
        return {file: digest for file, digest in files.items() if file.endswith(".pt")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, one_thread: None) -> Place:
    """A run that was evaluated during training and tested, without other results."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / FOLDER
    data.parent.mkdir(parents=True)
    data.symlink_to(tiny_data)
    torch.manual_seed(0)
    model = folder / "models" / "tutor"
    model.mkdir(parents=True)
    write_tensors(model / "net_last.pth", build_teacher(8, backbone="resnet10w8").state_dict())
    (model / "opts.yaml").write_text(yaml.safe_dump(TINY_TEACHER | dict(data_root=str(data), stride=2)))
    place = Place(folder, data)
    place.train(NAME)
    call("test", "--name", NAME, "--batchsize", 32, "--rank-figure", 2, *place.where)
    call("test", "--teacher", "tutor", *place.where)
    return place


@pytest.fixture(scope="module")
def page(place: Place) -> Path:
    call("mannequins/against_truth", "--name", NAME, "--count", 6, *place.where)
    call("visual_tools/report", "--name", NAME, "--count", 3, *place.where)
    return place.run.path / "report.html"


# ----------------------------------------------------------------------------------------------- eval_iter
def test_evaluating_changes_nothing_else(place: Place) -> None:
    """Neither the weights nor the random state, also of a run that is stopped and resumed."""
    place.train("plain", eval_iter=0)
    place.train("parts", max_iter=2)
    place.train("parts", "--resume")
    assert place.files(NAME, 4) == place.files("plain", 4) == place.files("parts", 4)
    looked, plain, parts = (read_log(place.folder / "logs" / name)[0] for name in (NAME, "plain", "parts"))
    evaluated = {tag for tag in looked if tag.startswith("eval/")}
    assert looked.keys() - plain.keys() == evaluated and len(evaluated) == 8
    for tag in looked.keys() - {"images_per_second"}:
        assert looked[tag][0].tolist() == parts[tag][0].tolist() == ([2, 4] if tag in evaluated else [1, 2, 3, 4])
        assert looked[tag][1].tolist() == parts[tag][1].tolist()
    for tag in plain.keys() - {"images_per_second"}:
        assert plain[tag][1].tolist() == looked[tag][1].tolist()


def test_evaluated_are_the_weights_that_are_saved(place: Place) -> None:
    scalars = {tag: values[-1] for tag, (_, values) in read_log(place.run.logs)[0].items()}
    report = json.loads((place.run.path / "reid.json").read_text())
    for convention, values in report["tables"]["single query"]["both (beta 0.5)"].items():
        assert scalars[f"eval/reid_mAP_{convention}"] == pytest.approx(values["mAP"], abs=1e-6)
        assert scalars[f"eval/reid_rank1_{convention}"] == pytest.approx(values["rank1"], abs=1e-6)
    model = load_swapper(place.run, CPU)
    query = read_split(place.data, "query")
    rows = measure_swaps(draw_swaps(model.swap, load_factors(place.data), query, size=model.size, count=64))
    assert scalars["eval/swap_l1_changed"] == pytest.approx(rows["generated"]["changed"], rel=1e-5)
    assert scalars["eval/swap_l1_changed_of_copy"] == pytest.approx(rows["copy"]["changed"], rel=1e-5)
    assert scalars["eval/swap_ssim"] == pytest.approx(rows["generated"]["ssim"], rel=1e-5)


def test_a_test_set_that_cannot_be_evaluated(place: Place, script: Any, tmp_path: Path) -> None:
    shutil.copytree(place.data / "bounding_box_train", tmp_path / "bounding_box_train")
    options = ("--name", "blind", "--output_path", tmp_path, "--set", f"data_root={tmp_path}")
    refused: Outcome = script("train", "--config", place.folder / "config.yaml", *options)
    assert str(tmp_path) in refused.error and not (tmp_path / "outputs").exists()


# -------------------------------------------------------------------------------------------------- curves
def test_every_scalar_is_in_one_panel() -> None:
    names = ["loss/recon_x_a", "loss/recon_x_b", "loss/dis_total", "loss/new", "schedule/lr2", "images_per_second"]
    panels = group({name: (np.arange(3), np.ones(3)) for name in names})
    assert list(panels) == [
        *("Totals", "Reconstruction of images", "Other losses", "Learning rates", "Images per second")
    ]
    assert sum(map(list, panels.values()), []) == ["dis_total", "recon_x_a", "recon_x_b", "new", "lr2", names[-1]]


def test_curves_are_small_and_self_contained() -> None:
    steps = np.arange(1, 1001)
    curves = {"lr<2>": (steps, 1e-3 / steps), "x_a": (steps, 0.0 * steps), "x_b": (steps[:1], np.ones(1))}
    svg = draw(curves, 1000, logarithmic=True)
    assert svg == draw(curves, 1000, logarithmic=True)  # no date, no random names
    root = ElementTree.fromstring(svg)
    assert "lr<2>" in "".join(root.itertext()) and len(svg) < 60_000  # a thousand steps are drawn as two hundred
    assert not any(tag in svg for tag in (b"<image", b"<script", b"@import"))


# ------------------------------------------------------------------------------------- the page, as a text
class Reader(HTMLParser):
    """Texts and attributes of a page as a parser reads them; tables by their label."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes)["aria-label"] or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1][0] in ("style", "script"):
            return
        self.text += data
        if self.tags[-1][0] in ("td", "th") and self.tables and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_says_what_the_files_say(place: Place, page: Path) -> None:
    html = page.read_text()
    read = Reader(html)
    (table,) = (rows for label, rows in read.tables.items() if "single query" in label)
    reid = {net: json.loads((folder / "reid.json").read_text()) for net, folder in (
        ("teacher tutor", place.folder / "models" / "tutor"), (f"{NAME}, 4 steps", place.run.path)
    )}  # fmt: skip
    assert len(table) == 1 + 8
    tutor = reid["teacher tutor"]["tables"]["single query"]["feature"]
    both = reid[f"{NAME}, 4 steps"]["tables"]["single query"]["both (beta 0.5)"]
    for convention in ("official", "standard"):
        (row,) = (row for row in table if row[:3] == [f"{NAME}, 4 steps", "both (beta 0.5)", convention])
        assert row[3] == f"{100 * both[convention]['rank1']:.2f}" and row[6] == f"{100 * both[convention]['mAP']:.2f}"
        assert row[8] == f"{100 * (both[convention]['mAP'] - tutor[convention]['mAP']):+.2f}"
    swaps = json.loads((place.run.path / "swaps.json").read_text())
    (table,) = (rows for label, rows in read.tables.items() if label.startswith("Swaps against"))
    assert table[1][:2] == ["generated swap", f"{swaps['generated']:.1f}"]
    assert describe_shares(swaps["shares"]) in read.text
    (table,) = (rows for label, rows in read.tables.items() if "differ from the default" in label)
    assert ["max_iter", "4", "100000"] in table and ["data_root", str(place.data), "required"] in table
    assert not any(row[0] == "gan_w" for row in table)
    alternatives = {attributes.get("alt") for _, attributes in read.tags}
    assert {f"{title} over the training steps" for title in group(read_log(place.run.logs)[0])} <= alternatives
    # The command that trained, from the log.
    assert f"train.py --config {place.folder}" in read.text and "report.py --name" in read.text


def test_the_page_has_everything_within_and_runs_no_name(place: Place, page: Path) -> None:
    html = page.read_text()
    read = Reader(html)
    addresses = [v for _, a in read.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "action")]
    assert len(addresses) > 40 and all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(http" not in html and "@import" not in html
    assert not any(tag in ("iframe", "object", "embed", "base") or "onerror" in a for tag, a in read.tags)
    assert NAME in read.text and str(place.data) in read.text
    assert not any(tag == "script" for tag, _ in read.tags)


def test_images_of_the_page_are_the_models(place: Place, page: Path) -> None:
    """The matrix's rows are appearance, its columns structure."""
    read = Reader(page.read_text())
    tags = iter(read.tags)
    cells = {(a["data-clothes"], a["data-pose"]): next(tags)[1]["src"] for tag, a in tags if "data-clothes" in a}
    assert sorted(cells) == [(i, j) for i in "012" for j in "012"]
    assert cells["0", "1"] != cells["1", "0"]
    model = load_swapper(place.run, CPU)
    x = normalise(decode_images(read_split(place.data, "query").paths, *model.size))
    originals = [jpeg(image) for image in to_uint8(x)]
    tags = iter(read.tags)
    border = {a["data-pose-source"]: next(tags)[1]["src"] for tag, a in tags if "data-pose-source" in a}
    i, j = (originals.index(border[k]) for k in "01")
    expected = to_uint8(model.swap(x[i : i + 1], x[j : j + 1]))[0].astype(int)
    with Image.open(io.BytesIO(base64.b64decode(cells["0", "1"].partition(",")[2]))) as image:
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 12  # JPEG


def test_ranked_lists_are_those_of_the_evaluation(place: Place, page: Path) -> None:
    lists = json.loads((place.run.path / "rank_lists.json").read_text())["lists"]
    shown, read = [query for query in lists if query["kind"] in ("best", "worst")], Reader(page.read_text())
    assert len(shown) == 4 and all(query["caption"] in read.text for query in shown)
    marks = [a["class"] for tag, a in read.tags if tag == "figure" and a.get("class") in ("right", "wrong", "junk")]
    assert sorted(marks) == sorted(hit["mark"] for query in shown for hit in query["hits"])


# ------------------------------------------------------------------------------------------ what is missing
def bare_run(folder: Path, name: str, values: dict[str, Any]) -> RunFolder:
    """A run that is only a config."""
    run = RunFolder(folder, name)
    run.path.mkdir(parents=True)
    run.config_file.write_text(yaml.safe_dump(dict(data_root="nowhere") | values))
    return run


def test_sections_without_data_name_the_command(script: Any, tmp_path: Path) -> None:
    run = bare_run(tmp_path, "bare", TINY_DGNET | dict(data_root="nowhere"))
    made: Outcome = script("visual_tools/report", "--name", "bare", "--output_path", tmp_path)
    assert made.code == 0, made.err
    text = Reader((run.path / "report.html").read_text()).text
    for command in (
        f"python test.py --name bare --output_path {tmp_path}",
        f"python test.py --name bare --rank-figure 4 --output_path {tmp_path}",
        f"python -m mannequins.against_truth --name bare --output_path {tmp_path}",
        f"python train.py --config {run.config_file}",
    ):
        assert command in text


def test_a_teachers_report(place: Place, script: Any, tmp_path: Path) -> None:
    shutil.copytree(place.folder / "models", tmp_path / "models")
    run = bare_run(tmp_path, "tutor", TINY_TEACHER | dict(data_root=str(place.data)))
    where = ("--output_path", tmp_path, "--device", "cpu")
    assert script("test", "--teacher", "tutor", "--rank-figure", 4, *where).code == 0
    made: Outcome = script("visual_tools/report", "--name", "tutor", *where)
    assert made.code == 0, made.err
    read = Reader((run.path / "report.html").read_text())
    assert sum(tag == "img" for tag, _ in read.tags) > 8 * 5 and len(read.tables) >= 2
    assert not any(attributes.get("id") == "swaps" for _, attributes in read.tags)
    (tmp_path / "models" / "tutor" / "rank_lists.json").write_text('{"lists": 3}')
    made = script("visual_tools/report", "--name", "tutor", *where)
    assert made.code == 0 and "rank_lists.json" in Reader((run.path / "report.html").read_text()).text
    assert "--which_epoch" in script("visual_tools/report", "--name", "tutor", "--which_epoch", 7, *where).error


@pytest.mark.parametrize(
    "option, value",
    [("--which_epoch", 7), ("--count", 13), ("--input", "nowhere"), ("--out", "page.txt"), ("--out", "mine.html")],
)
def test_bad_options(
    place: Place, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("mine")
    assert str(value) in script("visual_tools/report", "--name", NAME, *place.where, option, value).error
    assert (tmp_path / "mine.html").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["{", '{"tables": {"single query": {}}, "iteration": 1}'])
def test_a_damaged_result_is_named_on_the_page(script: Any, tmp_path: Path, content: str) -> None:
    run = bare_run(tmp_path, "odd", TINY_DGNET | dict(data_root="nowhere"))
    (run.path / "reid.json").write_text(content)
    made: Outcome = script("visual_tools/report", "--name", "odd", "--output_path", tmp_path)
    assert made.code == 0, made.err
    assert str(run.path / "reid.json") in Reader((run.path / "report.html").read_text()).text


def test_what_was_read_and_what_the_run_was_too_short_for(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "short")
    run.path.mkdir(parents=True)
    reading = {
        "read": {"train_all": {"images": 7, "identities": 2, "cameras": 0}},
        "left_out": {"not an image": {"count": 4, "first": ["film.mp4"]}},
        "assumed": [],
    }
    (run.path / "reading.json").write_text(json.dumps(reading))
    said = run_page.reading_of(run, tiny_config(max_iter=2, id_freeze_iter=5))
    assert "7 images of 2 identities" in said["read for training"]
    assert "4" in said["left out or assumed in training"] and "film.mp4" in said["left out or assumed in training"]
    assert "id_freeze_iter 5" in said["too short for"]
    (run.path / "reid.json").write_text("{")
    assert run_page.reading_of(run, tiny_config(max_iter=9, id_freeze_iter=5, warm_scale=0)).keys() == said.keys() - {
        "too short for"
    }
