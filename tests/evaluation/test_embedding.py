"""The map of the embedding: the same seed draws the same map, and the page holds every image once."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY_DGNET, TINY_TEACHER, Outcome, OutputFolder
from PIL import Image

from files import write_tensors
from reid_eval.features import Features, load_features, save_features
from reid_eval.ranking import main_setting, rank
from reIDmodel import build_id_net, build_teacher
from visual_tools.embedding import SIZE, choose_images, embed, first_answers

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]
EVIL = '"><script>alert(1)</script>.jpg'


def cloud(rng: np.random.Generator, pids: list[int], camids: list[int], kind: str, heads: int = 2) -> Features:
    """Features around a centre for every identity, with names that may not be trusted."""
    centres = np.random.default_rng(7).standard_normal((9, heads, 8))
    noise = (0.6 + 0.2 * heads) * rng.standard_normal((len(pids), heads, 8))
    features = (centres[np.array(pids)] + noise).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    names = np.array([f"{kind}{i}{EVIL}" for i in range(len(pids))])
    return Features(features, np.array(pids), np.array(camids), names)


@pytest.fixture(params=[1, 2, 4], ids="{} heads".format)
def sides(request: pytest.FixtureRequest) -> tuple[Features, Features]:
    """Queries of identities 1 to 6, of which 6 has no match; a gallery with distractors (0) and junk (-1)."""
    rng = np.random.default_rng(request.param)
    query = cloud(rng, [*range(1, 7)] * 3, [1] * 9 + [2] * 9, "q", request.param)
    gallery = cloud(rng, [*range(-1, 6)] * 6, [1, 2, 3] * 14, "g", request.param)
    return query, gallery


@pytest.mark.parametrize("cameras", [True, False])
def test_first_answers_are_those_of_the_evaluation(sides: tuple[Features, Features], cameras: bool) -> None:
    query, gallery = sides
    # A copy of the first query, whose identity is 1 too: it is of the same camera, and has the same name.
    gallery.features[2], gallery.keys[2], gallery.camids[2] = query.features[0], query.keys[0], query.camids[0]
    answers = first_answers(query, gallery, cameras=cameras)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    names = dict(q_keys=query.keys, g_keys=gallery.keys)
    by_setting = rank(query.features, gallery.features, *labels, remove_same_camera=cameras, **names)
    first = by_setting[main_setting(query.features.shape[1])[0]]["standard"].first
    expected = np.where(first == 1, "right", np.where(first > 1, "wrong", "no match"))
    assert answers.mark.tolist() == expected.tolist()
    assert set(answers.mark.tolist()) == {"right", "wrong", "no match"}
    assert ((gallery.pids[answers.index] == query.pids) == (answers.mark == "right")).all()
    assert answers.index[0] != 2 and not (cameras and (gallery.pids[answers.index] == -1).any())


def test_what_is_shown_of_a_large_data_set(sides: tuple[Features, Features]) -> None:
    query, gallery = sides
    answers = first_answers(query, gallery, cameras=True)

    def chosen(count: int, seed: int = 0, cameras: bool = True) -> tuple[list[int], list[int], list[str]]:
        queries, shown, left_out = choose_images(query, gallery, answers, count=count, seed=seed, cameras=cameras)
        return queries.tolist(), shown.tolist(), left_out

    everything = chosen(10_000)
    assert [len(part) for part in everything] == [18, 36, 1] and everything[2][0].startswith("6 ")
    assert (gallery.pids[everything[1]] >= 0).all()
    assert [len(part) for part in chosen(10_000, cameras=False)] == [18, 42, 0]
    few = chosen(20)
    assert (len(few[0]), len(few[1])) == (10, 10) and few == chosen(20) != chosen(20, seed=1)
    assert set(answers.index[few[0]].tolist()) <= set(few[1])
    assert [text.split()[0] for text in few[2]] == ["6", "8", "26"]


def test_the_same_seed_draws_the_same_map(sides: tuple[Features, Features]) -> None:
    features = sides[1].features
    places, about = embed(features, perplexity=None, seed=3, threads=1)
    again, _ = embed(features, perplexity=None, seed=3, threads=1)
    assert np.array_equal(places, again) and places.shape == (42, 2)
    assert places.min() == 0 and places.max() == pytest.approx(SIZE) and "perplexity 13.6667, seed 3" in about
    # Identities lie together.
    distances = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(len(places)) * 10 * SIZE
    assert (sides[1].pids[distances.argmin(1)] == sides[1].pids).mean() > 0.5  # by chance 0.12


# --------------------------------------------------------------------------------------------- the page
class Reader(HTMLParser):
    """The points of a page by number with their attributes and titles, the thumbnails, and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.points: dict[int, dict[str, str]] = {}
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.text, self.html = "", path.read_text()
        self.into, self.number = "", -1
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.into, found = tag, dict(attributes)
        if tag == "path":
            self.number = int(found["id"][1:])
            self.points[self.number] = found
        elif tag == "a":
            self.links.append(found["href"])
        elif found.get("id") == "thumbnails":
            self.into = "thumbnails"

    def handle_endtag(self, tag: str) -> None:
        self.into = ""

    def handle_data(self, data: str) -> None:
        if self.into == "title" and self.number >= 0:
            self.points[self.number]["title"] = data
        elif self.into == "thumbnails" and data.strip():
            self.thumbnails = json.loads(data)
        elif self.into in ("p", "h1"):
            self.text += data


@pytest.fixture
def tested(tmp_path: Path, tiny_data: Path, script: Script) -> OutputFolder:
    """An untrained run `tiny` and a teacher `tutor`, evaluated by test.py on a copy of the data."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    run, model = tmp_path / "outputs" / "tiny", tmp_path / "models" / "tutor"
    (run / "checkpoints").mkdir(parents=True)
    model.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(TINY_DGNET | {"data_root": str(data)}))
    net = build_id_net("AB", 8, backbone="resnet10w8")
    write_tensors(run / "checkpoints" / "id_00000001.pt", {"a": net.state_dict()})
    write_tensors(model / "net_last.pth", build_teacher(8, backbone="resnet10w8").state_dict())
    (model / "opts.yaml").write_text(yaml.safe_dump(TINY_TEACHER | {"data_root": str(data), "stride": 2}))
    place = OutputFolder(tmp_path, data)
    assert script("test", "--name", "tiny", *place.where).code == 0
    assert script("test", "--teacher", "tutor", *place.where, "--no-cameras").code == 0
    return place


def draw(script: Script, *options: object) -> Outcome:
    return script("visual_tools/show_embedding", "--threads", 1, *options)


def test_the_page_shows_every_image_once(tested: OutputFolder, script: Script) -> None:
    run = tested.folder / "outputs" / "tiny"
    done = draw(script, "--output_path", tested.folder, "--name", "tiny")
    assert done.code == 0, done.err
    page, (query, gallery, _) = Reader(run / "embedding.html"), load_features(run / "reid.npz")
    kept = gallery.select(gallery.pids != -1)
    assert sorted(page.points) == list(range(len(query) + len(kept))) and len(page.thumbnails) == len(page.points)
    names = [os.path.basename(path) for side in (query, kept) for path in side.paths]
    assert all(page.html.count(name) == 1 for name in names) and len(set(names)) == len(names)
    for number, (name, pid, camid) in enumerate(
        zip(names, [*query.pids, *kept.pids], [*query.camids, *kept.camids], strict=True)
    ):
        point = page.points[number]
        assert point["class"].split()[0] == ("query" if number < len(query) else "gallery")
        assert point["title"].endswith(f" {name}: identity {pid}, camera {camid}")
        with Image.open(io.BytesIO(base64.b64decode(page.thumbnails[number].partition(",")[2]))) as picture:
            assert picture.size == (32, 64) and picture.format == "JPEG"
    with np.load(run / "reid.npz") as file:
        main = file["results"].tolist().index(["single query", "both (beta 0.5)", "standard"])
        first = file["first"][main]
    wrong = {number for number, point in page.points.items() if "wrong" in point["class"]}
    assert wrong == set(np.flatnonzero(first > 1).tolist()) and len(wrong) > 3
    assert sorted(page.links) == sorted(f"#p{number}" for number in wrong)
    for number in wrong:
        answer = int(page.points[number]["data-answer"])
        assert answer >= len(query) and kept.pids[answer - len(query)] != query.pids[number]
    style = [re.fullmatch(r"--i:(.+);--c:(.+)", point["style"]).groups() for point in page.points.values()]
    assert len({colour for colour, _ in style}) == len(np.unique(kept.pids)) and len({c for _, c in style}) > 2
    junk = int((gallery.pids == -1).sum())
    assert f"left out: {junk} junk" in page.text and f"left out: {junk} junk" in done.out

    # Again: refused, then the same places; without some of the images, as many thumbnails less.
    assert "embedding.html" in draw(script, "--output_path", tested.folder, "--name", "tiny").error
    shutil.rmtree(tested.data / "query")
    done = draw(script, "--output_path", tested.folder, "--name", "tiny", "--force")
    assert done.code == 0 and f"{len(query)} of {len(names)} thumbnails" in done.out
    again = Reader(run / "embedding.html")
    assert {n: p["d"] for n, p in again.points.items()} == {n: p["d"] for n, p in page.points.items()}
    assert again.thumbnails == [None] * len(query) + page.thumbnails[len(query) :]


def test_a_teacher_that_was_tested_without_cameras(tested: OutputFolder, script: Script) -> None:
    model, out = tested.folder / "models" / "tutor", tested.folder / "new" / "map.html"
    options = ("--output_path", tested.folder, "--teacher", "tutor", "--out", out, "--count", 60, "--perplexity", 5)
    assert draw(script, *options, "--seed", 2).code == 0
    page, (query, gallery, _) = Reader(out), load_features(model / "reid.npz")
    assert len(page.points) == 60 and len(query) > 30
    assert f"left out: {len(gallery) - 30} of {len(gallery)} gallery images" in page.text
    assert "identity and name" in page.text and "perplexity 5, seed 2" in page.text
    assert not (model / "embedding.html").exists()


def test_a_feature_file_of_unknown_origin(sides: tuple[Features, Features], script: Script, tmp_path: Path) -> None:
    """Names are text, files that cannot be read are left out, and nothing waits for a pipe."""
    query, gallery = sides
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    odd = [str(tmp_path / "pipe.jpg"), str(tmp_path / "text.jpg"), "/dev/zero", "a\0b", "x" * 5000, "", str(tmp_path)]
    paths = np.array([odd[i % len(odd)] + (EVIL if i > len(odd) else "") for i in range(len(query))])
    save_features(tmp_path / "f.npz", replace(query, paths=paths), gallery)
    done = draw(script, "--features", tmp_path / "f.npz")
    assert done.code == 0 and "54 of 54 thumbnails" in done.out, done.err
    page = Reader(tmp_path / "embedding.html")
    assert page.tags["script"] == 2 and page.html.count("<script") == 2 and page.thumbnails == [None] * 54
    assert page.points[18]["title"].startswith(f"gallery g1{EVIL}: identity 0")


@pytest.mark.parametrize(
    "options, named",
    [
        (("--name", "absent"), "test.py --name absent"),
        (("--teacher", "absent"), "models/absent"),
        (("--features", "absent.npz"), "absent.npz"),
        (("--features", "f.npz", "--perplexity", 54), "--perplexity 54"),
        (("--features", "f.npz", "--out", "map.txt"), ".html"),
        (("--features", "f.npz", "--count", 3), "--count"),
        (("--features", "equal.npz"), "same feature"),
        (("--features", "paths.npz"), "paths.npz"),
        (("--features", "report.npz"), "report.json"),
    ],
)
def test_bad_input(
    sides: tuple[Features, Features],
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    query, gallery = sides
    for name in ("f", "report"):
        save_features(f"{name}.npz", query, gallery)
    save_features("equal.npz", *(replace(side, features=np.ones_like(side.features)) for side in sides))
    save_features("paths.npz", replace(query, paths=np.arange(len(query))), gallery)
    Path("report.json").write_text("{")
    error = draw(script, *options, "--output_path", tmp_path).error
    assert named in error and not list(tmp_path.rglob("*.html"))
