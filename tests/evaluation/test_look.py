"""Rank figure and page, activation maps and search, from the outside: real runs on the tiny data."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
import yaml
from conftest import HEIGHT, TINY_DGNET, TINY_TEACHER, WIDTH, Outcome, OutputFolder, exchange, noise
from PIL import Image

import files
import reid_eval.index as index_module
from data.folders import read_split
from data.images import decode_images, normalise
from data.listing import find_images
from files import write_tensors
from reid_eval.features import load_features
from reid_eval.index import SearchIndex, fingerprint, open_index
from reid_eval.ranking import Ranking
from reIDmodel import IdNet, build_id_net, build_teacher
from utils import UserError
from visual_tools.hirescam import activation_maps
from visual_tools.ranked_lists import COLOURS, Hit, Result, choose_queries, write_page

pytestmark = pytest.mark.usefixtures("one_thread")
Script = Callable[..., Outcome]


@dataclass(frozen=True)
class Runs(OutputFolder):
    """An untrained run `tiny` and a teacher `tutor`, whose BatchNorm has seen the data."""

    @property
    def run(self) -> Path:
        return self.folder / "outputs" / "tiny"


def settle(net: IdNet, x: torch.Tensor) -> IdNet:
    """Let BatchNorm's running statistics be those of `x`, so that features differ as those of a trained net do."""
    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    return net.eval()


@pytest.fixture(scope="module")
def settled(tiny_data: Path) -> Callable[[IdNet], IdNet]:
    x = normalise(decode_images(read_split(tiny_data, "query").paths, HEIGHT, WIDTH))
    return lambda net: settle(net, x)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, settled: Callable[[IdNet], IdNet], one_thread: None
) -> Runs:
    folder = tmp_path_factory.mktemp("look")
    torch.manual_seed(0)
    run, model = folder / "outputs" / "tiny", folder / "models" / "tutor"
    (run / "checkpoints").mkdir(parents=True)
    model.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(TINY_DGNET | {"data_root": str(tiny_data)}))
    for iteration in (1, 2):
        net = settled(build_id_net("AB", 8, backbone="resnet10w8"))
        write_tensors(run / "checkpoints" / f"id_{iteration:08d}.pt", {"a": net.state_dict()})
        (run / "checkpoints" / f"gen_{iteration:08d}.pt").touch()  # there, as in any run, but not read
    write_tensors(model / "net_last.pth", settled(build_teacher(8, backbone="resnet10w8")).state_dict())
    (model / "opts.yaml").write_text(yaml.safe_dump(TINY_TEACHER | {"data_root": str(tiny_data), "stride": 2}))
    return Runs(folder, tiny_data)


@pytest.fixture
def gallery(tiny_data: Path, tmp_path: Path) -> Path:
    """Twelve gallery images, four of them in sub-folders, under names of all sorts; and things that are no images."""
    folder = tmp_path / "people"
    names = [f"{i}.jpg" for i in range(8)] + ["a b/x #1.jpg", "a b/c/50%?.JPG", "a b/ü&<i>.jpg"]
    paths = [folder / name for name in [*names, "z.jpg"]]
    for path, source in zip(paths, read_split(tiny_data, "gallery").paths[::6], strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    shutil.copyfile(paths[0], folder / ".hidden" / "y.jpg")
    return folder


@pytest.fixture
def query(tiny_data: Path) -> Path:
    return read_split(tiny_data, "query").paths[0]


def clean(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.out + outcome.err
    assert "Warning" not in outcome.err and "Traceback" not in outcome.err, outcome.err
    return outcome.out


class PageReader(HTMLParser):
    """What a browser would make of a page: images and captions per section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.sections, self.seen, self.into = path, [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.seen.append((tag, found))
        if tag == "section":
            self.sections.append({"images": [], "marks": [], "text": []})
        elif tag == "figure":
            self.sections[-1]["marks"].append(found.get("class"))
        elif tag == "img":
            self.sections[-1]["images"].append(found["src"])
        self.into = tag

    def handle_data(self, data: str) -> None:
        if self.into in ("p", "figcaption") and self.sections and data.strip():
            self.sections[-1]["text"].append(data.strip())

    def files(self, section: int) -> list[Path]:
        """The files that a section's images point to, followed as a browser does."""
        return [
            Path(os.path.normpath(self.path.parent / os.fsdecode(unquote_to_bytes(src))))
            for src in self.sections[section]["images"]
        ]


# ------------------------------------------------------------------------------------- ranked lists
def test_worst_best_and_random_queries() -> None:
    ap, first = np.array([0.5, 0, 0.1, 1, 0.7, 0.2, 0.9]), np.array([2, 0, 9, 1, 1, 8, 1])
    ranking = Ranking(np.ones(1), 0.5, 0.5, ap, ap, first, 7, 1)
    assert choose_queries(ranking, 1)[:2] == [("worst", 2), ("best", 3)]
    kind, query = choose_queries(ranking, 1)[2]
    assert kind == "random" and query in (0, 4, 5, 6)
    two = choose_queries(ranking, 2)
    assert two == [("worst", 2), ("worst", 5), ("best", 3), ("best", 6), ("random", 0), ("random", 4)]
    # Fewer queries than asked for: none twice, and never the one without a match.
    assert choose_queries(ranking, 4) == [("worst", i) for i in (2, 5, 0, 4)] + [("best", i) for i in (3, 6)]


# ------------------------------------------------------------------------------------------- the page
def test_a_page_links_any_file_and_trusts_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "images here"
    folder.mkdir()
    names = ["a b.png", "c#1.png", "50%.png", "q?x=1.png", "http:x.png", '"><script>alert(1)</script>.png', "ü.png"]
    paths = [folder / name.replace("/", "_") for name in names] + [folder / os.fsdecode(b"\xff.png")]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 8), (i, i, i)).save(path, format="PNG")
    hits = [Hit(str(path), f"{i} </script>", "right") for i, path in enumerate(paths)]
    results = [Result(str(path), str(path), hits) for path in paths]
    out = write_page(tmp_path / "pages" / "one.html", results, title="A & <b>", notes=["<i>note</i>"])
    page = PageReader(out)
    for i, path in enumerate(paths):
        assert page.files(i) == [path, *paths]
    assert not any(tag in ("script", "b", "i", "link", "iframe") for tag, _ in page.seen)
    text = out.read_text()
    assert "http://" not in text and "https://" not in text and 'src="/' not in text
    assert [path.name for path in out.parent.iterdir()] == ["one.html"]


# ----------------------------------------------------------------------------------- test.py --rank-figure
def test_rank_figure_of_an_evaluation(runs: Runs, script: Script) -> None:
    clean(script("test", "--name", "tiny", *runs.where, "--rank-figure", 2))
    queries, page = read_split(runs.data, "query"), PageReader(runs.run / "rank_page.html")
    assert len(page.sections) == len(queries)
    report = json.loads((runs.run / "reid.json").read_text())
    row = report["tables"]["single query"]["both (beta 0.5)"]
    with np.load(runs.run / "reid.npz") as kept:
        main = kept["results"].tolist().index(["single query", "both (beta 0.5)", "standard"])
        ap, first = kept["ap"][main], kept["first"][main]
        assert kept["query_path"].tolist() == [str(path) for path in queries.paths]
    assert len(load_features(runs.run / "reid.npz").gallery.paths) == report["gallery"]
    assert ap.mean() == pytest.approx(row["standard"]["mAP"])
    for i, query in enumerate(np.argsort(ap, kind="stable")):  # the worst first
        path, files, marks = queries.paths[query], page.files(i), page.sections[i]["marks"]
        assert files[0] == path and all(file.is_file() for file in files)
        caption = page.sections[i]["text"][0]
        assert f"AP standard {100 * ap[query]:.2f} %" in caption and caption.endswith(f"first match: {first[query]}")
        # Names tell what each mark has to be.
        pid, camid = path.name.split("s")[0].split("_c")
        for file, mark in zip(files[1:], marks[1:], strict=True):
            p, c = file.name.split("s")[0].split("_c")
            junk = p == "-1" or (p, c) == (pid, camid)
            assert mark == ("junk" if junk else "right" if p == pid else "wrong")
        assert sum(mark != "junk" for mark in marks[1:]) == 10 or len(files) == 21
    shown = json.loads((runs.run / "rank_lists.json").read_text())["lists"]
    assert [query["kind"] for query in shown] == ["worst"] * 2 + ["best"] * 2 + ["random"] * 2
    with Image.open(runs.run / "rank_figure.png") as picture:
        pixels = np.asarray(picture)
    for mark in ("right", "wrong", "junk"):  # a frame is 4 wide around 64 x 128
        expected = sum(hit["mark"] == mark for query in shown for hit in query["hits"])
        assert (pixels == np.array(COLOURS[mark])).all(-1).sum() // (2 * 4 * (72 + 128)) == expected


def test_rank_figure_of_another_data_set(runs: Runs, script: Script, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    for split, kept in (("query", 4), ("bounding_box_test", 40)):
        (other / split).mkdir(parents=True)
        for path in sorted((runs.data / split).iterdir())[:kept]:
            shutil.copyfile(path, other / split / path.name)
    clean(script("test", "--teacher", "tutor", *runs.where, "--rank-figure", 1, "--test_dir", other, runs.data))
    folder = runs.folder / "models" / "tutor"
    assert (folder / "rank_figure-elsewhere.png").is_file()
    assert len(PageReader(folder / "rank_page-elsewhere.html").sections) == 4
    assert len(PageReader(folder / "rank_page.html").sections) == len(read_split(runs.data, "query"))


# ------------------------------------------------------------------------------------ activation maps
def affine(head: torch.nn.Module, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vector e of a head and its matrix W: e = W v + b, with BatchNorm folded in."""
    linear, norm = head.add_block[:2]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = scale[:, None] * linear.weight
    return v @ weight.T + scale * (linear.bias - norm.running_mean) + norm.bias, weight


@pytest.mark.parametrize(("style", "pool"), [("AB", "max"), ("AB", "avg"), ("normal", "max"), ("PCB", "avg")])
def test_activation_maps_are_the_documented_formula(style: str, pool: str, settled: Callable) -> None:
    torch.manual_seed(3)
    net = settled(build_id_net(style, 5, backbone="resnet10w8", pool=pool)).double()
    x = torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    maps = activation_maps(net, x)
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        hook = net.model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
        embeddings = net.embed(x)
        hook.remove()
        m = seen[0]
        height, width = m.shape[2:]
        assert maps.shape == (2, len(net.heads()), height, width) and maps.max() > 0
        for k, head in enumerate(net.heads()):
            part = m
            if style == "PCB":
                quarter = slice(height // 4 * k, height // 4 * (k + 1))
                outside = maps[:, k].clone()
                outside[:, quarter] = 0
                assert not outside.any()
                part = m[:, :, quarter]
            v = part.amax((2, 3)) if pool == "max" else part.mean((2, 3))
            e, weight = affine(head, v)
            torch.testing.assert_close(e, embeddings[k])
            gradient = (e @ weight)[:, :, None, None]
            # Where each channel's value was taken from; under the mean, everywhere alike.
            share = (part == v[:, :, None, None]).double() if pool == "max" else torch.ones_like(part)
            share = share / share.sum((2, 3), keepdim=True) if pool == "avg" else first_only(share)
            expected = (gradient * share * part).sum(1).clamp(min=0)
            got = maps[:, k, quarter] if style == "PCB" else maps[:, k]
            torch.testing.assert_close(got, expected)


def first_only(share: torch.Tensor) -> torch.Tensor:
    """Where a maximum is taken at several places (a channel that is all 0), value times share is 0 in each."""
    flat = share.flatten(2)
    return torch.zeros_like(flat).scatter(2, flat.argmax(2, keepdim=True), 1).view_as(share)


def test_show_activation(runs: Runs, script: Script, tmp_path: Path) -> None:
    show = "visual_tools/show_activation"
    out, image = tmp_path / "new" / "maps.png", find_images(runs.data / "query", "--input")[0]
    arguments = ("--name", "tiny", *runs.where, "--input", image, runs.data / "query", "--count", 3, "--out", out)
    clean(script(show, *arguments))
    with Image.open(out) as figure:
        pixels = np.asarray(figure).astype(int)
    cells = pixels[-3 * 196 :, 4:].reshape(3, 196, 3, 100, 3)[:, :192, :, :96]  # image, primary, fine-grained
    np.testing.assert_array_equal(cells[0], cells[1])  # the same image twice
    colourful = np.ptp(cells, axis=-1).mean((0, 1, 3))
    assert colourful[1] > 10 and colourful[2] > 10
    assert np.abs(cells[:, :, 1] - cells[:, :, 2]).max() > 3  # the heads look at different places
    before = out.read_bytes()
    assert str(out) in script(show, *arguments).error and out.read_bytes() == before
    clean(script(show, *arguments, "--which_epoch", 1, "--force"))
    assert out.read_bytes() != before
    clean(script(show, "--teacher", "tutor", *runs.where, "--input", image))
    assert (runs.folder / "models" / "tutor" / "activation.png").is_file()
    clean(script(show, "--name", "tiny", *runs.where, "--input", image))
    assert (runs.run / "images" / "activation_00000002.png").is_file()


@pytest.mark.parametrize("options", [("--input", "nowhere"), ("--input", "notes.txt", "--teacher", "tutor")])
def test_bad_input_of_show_activation(runs: Runs, script: Script, options: tuple[str, ...]) -> None:
    error = script("visual_tools/show_activation", "--name", "tiny", *runs.where, *options).error
    assert options[-2] in error


# --------------------------------------------------------------------------------------------- search
@pytest.fixture
def search(runs: Runs, script: Script, gallery: Path, query: Path, tmp_path: Path) -> Script:
    """search.py with a run, the gallery, a query and an index of the test's own; options may come after."""
    defaults = ("--name", "tiny", "--gallery", gallery, "--query", query, "--index", tmp_path / "index")
    return lambda *options: script("search", *defaults, *runs.where, *options)


def answers(printed: str) -> list[list[tuple[float, str]]]:
    """Scores and paths per query, as search.py printed them."""
    blocks = re.split(r"\n\n", printed.partition("page written")[0])[1:]
    rows = [[re.fullmatch(r" *(\d+)  +(-?[\d.]+)  (.+)", line) for line in block.splitlines()[1:]] for block in blocks]
    for block in rows:
        assert [int(row[1]) for row in block] == list(range(1, len(block) + 1))
    return [[(float(row[2]), row[3]) for row in block] for block in rows]


def index_of(folder: Path) -> SearchIndex:
    """The index that search.py keeps in `folder` / index, whatever it was made of."""
    with np.load(folder / "index" / "index.npz") as file:
        about = json.loads(file["about"].tobytes())
    return open_index(folder / "index", Path(about["gallery"]), about["model"], "")


def test_search_scores_are_those_of_the_evaluation(runs: Runs, script: Script, search: Script, tmp_path: Path) -> None:
    clean(script("test", "--name", "tiny", *runs.where, "--save-features", tmp_path / "f.npz"))
    file = load_features(tmp_path / "f.npz")
    primary, fine = (file.query.features[:, h] @ file.gallery.features[:, h].T for h in (0, 1))
    scores = primary + 0.5 * fine
    where = ("--gallery", runs.data / "bounding_box_test", "--query", runs.data / "query", "--top", 5)
    found = answers(clean(search(*where)))
    assert len(found) == len(file.query)
    for row, hits in zip(scores, found, strict=True):
        assert len(hits) == 5
        np.testing.assert_allclose([score for score, _ in hits], np.sort(row)[::-1][:5], atol=1e-4)
        index = [list(file.gallery.keys).index(Path(path).name) for _, path in hits]
        np.testing.assert_allclose([score for score, _ in hits], row[index], atol=1e-4)


def test_search_of_a_folder_that_changes(
    search: Script, gallery: Path, query: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", 0)  # or the images would be too young for a stamp
    everything = answers(clean(search("--top", 50)))[0]
    listed = {path for path in gallery.rglob("*") if path.suffix.lower() == ".jpg" and ".hidden" not in path.parts}
    assert {Path(path) for _, path in everything} == listed and len(listed) == 12
    assert [score for score, _ in everything] == sorted((score for score, _ in everything), reverse=True)
    page = PageReader(tmp_path / "index" / "results.html")
    assert page.files(0) == [query, *(Path(path) for _, path in everything)]

    index = tmp_path / "index" / "index.npz"
    before = index.read_bytes(), index.stat().st_mtime_ns
    again = clean(search("--top", 50))
    assert answers(again)[0] == everything
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before

    (gallery / "0.jpg").unlink()
    shutil.copyfile(gallery / "1.jpg", gallery / "new.jpg")
    shutil.copyfile(gallery / "3.jpg", gallery / "2.jpg")  # another image under the same name
    changed = clean(search("--top", 50))
    assert all(f"1 {change}" in changed for change in ("added", "changed", "removed"))
    incremental = answers(changed)[0]
    # Of two copies the first one listed is the answer.
    assert {Path(path) for _, path in incremental} == listed - {gallery / "0.jpg", gallery / "3.jpg"}
    assert (
        dict(map(reversed, incremental))[str(gallery / "2.jpg")]
        == dict(map(reversed, everything))[str(gallery / "3.jpg")]
    )
    fresh = answers(clean(search("--top", 50, "--index", tmp_path / "other")))[0]
    assert sorted(incremental) == sorted(fresh)


def test_copies_are_one_answer_and_those_of_the_query_are_none(search: Script, gallery: Path, tmp_path: Path) -> None:
    expected = answers(clean(search("--query", gallery / "3.jpg", "--top", 11)))[0]
    assert len(expected) == 11 and str(gallery / "3.jpg") not in [path for _, path in expected]
    (gallery / "more" / "deeper").mkdir(parents=True)
    for original in ("3", "4"):
        os.link(gallery / f"{original}.jpg", gallery / "more" / f"{original}-link.jpg")
        shutil.copyfile(gallery / f"{original}.jpg", gallery / "more" / "deeper" / f"{original}-copy.jpeg")
        (gallery / "more" / f"{original}-symlink.JPG").symlink_to(gallery / f"{original}.jpg")
    shutil.copyfile(gallery / "3.jpg", query := tmp_path / "elsewhere.jpg")
    for asked in (gallery / "3.jpg", gallery / "more" / "3-symlink.JPG", gallery / "more" / "3-link.jpg", query):
        for top in (1, 2, 11, 50):
            assert answers(clean(search("--query", asked, "--top", top)))[0] == expected[:top]
    everything = answers(clean(search("--query", gallery, "--top", 1)))
    assert len(everything) == 12  # a query, too, is asked once
    assert len(index_of(tmp_path)) == 18 and len(index_of(tmp_path).vectors) == 12


def test_default_places_of_a_teachers_index(runs: Runs, script: Script, gallery: Path, query: Path) -> None:
    printed = clean(script("search", "--teacher", "tutor", "--gallery", gallery, "--query", query, *runs.where))
    (folder,) = (runs.folder / "models" / "tutor" / "search").iterdir()
    assert folder.name.startswith("people-") and str(folder) in printed
    assert sorted(path.name for path in folder.iterdir()) == ["index.npz", "results.html"]
    assert all(abs(score) <= 1 for score, _ in answers(printed)[0])


def test_an_index_of_something_else_is_refused(
    runs: Runs, script: Script, search: Script, gallery: Path, query: Path, tmp_path: Path
) -> None:
    clean(search())
    index = tmp_path / "index" / "index.npz"
    before = index.read_bytes()
    teacher = ("--teacher", "tutor", "--gallery", gallery, "--query", query, "--index", tmp_path / "index", *runs.where)
    for refused in (search("--which_epoch", 1), script("search", *teacher), search("--gallery", runs.data / "query")):
        assert str(index) in refused.error and "--rebuild" in refused.error
    assert index.read_bytes() == before
    clean(search("--which_epoch", 1, "--rebuild"))
    assert str(index) in search().error

    index.write_bytes(before[: len(before) // 2])
    assert str(index) in search("--rebuild").error
    index.unlink()
    (tmp_path / "index" / "results.html").write_text("mine")
    assert "--index" in search().error
    assert (tmp_path / "index" / "results.html").read_text() == "mine"
    (tmp_path / "index" / "results.html").rename(tmp_path / "index" / ".index.npz.00aa11bb.part")
    clean(search())  # the temporary file of a killed process is no hindrance


def test_unreadable_images_of_a_gallery(search: Script, gallery: Path, tmp_path: Path) -> None:
    (gallery / "empty.png").touch()
    assert "--skip-bad-images" in search().error and not (tmp_path / "index").exists()
    (gallery / "empty.png").unlink()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 32, 3), np.uint8)).save(gallery / "x.png")
    whole = (gallery / "x.png").read_bytes()
    # Damage in the compressed pixels, which only decoding finds; header and end stay.
    (gallery / "x.png").write_bytes(whole[:60] + bytes(30) + whole[90:])
    assert "x.png" in search().error
    for _ in range(2):
        assert len(answers(clean(search("--skip-bad-images", "--top", 50)))[0]) == 12
    (gallery / "x.png").write_bytes(whole)
    clean(search())
    assert len(index_of(tmp_path)) == 13


@pytest.mark.parametrize("option", ["--gallery nowhere", "--query notes.txt", "--index notes.txt", "--page notes.txt"])
def test_bad_input_of_search(search: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    assert option.split()[1] in search(*option.split()).error
    assert (tmp_path / "notes.txt").read_text() == "no image" and not (tmp_path / "index").exists()


def test_a_fingerprint_is_of_all_that_features_depend_on() -> None:
    found = []
    for changes in ({}, {}, dict(pool="avg"), dict(stride=2)):
        torch.manual_seed(0)
        net = build_id_net("AB", 3, backbone="resnet10w8", **changes)
        found.append(fingerprint(net, (64, 32)))
    found.append(fingerprint(net, (64, 64)))
    assert found[0] == found[1] and len(set(found)) == 4


def test_a_named_page_is_kept_unless_forced(search: Script, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    clean(search("--page", page, "--top", 1))
    before = page.read_bytes()
    assert f"--page {page}" in search("--page", page).error and page.read_bytes() == before
    clean(search("--page", page, "--force"))
    assert len(PageReader(page).files(0)) == 11 and not (tmp_path / "index" / "results.html").exists()


def toy_embed(paths: list[Path]) -> np.ndarray:
    """Features (n, 2, 8) from what the files hold."""
    rngs = [np.random.default_rng(list(Path(path).read_bytes()[:2000])) for path in paths]
    features = np.array([rng.standard_normal((2, 8)) for rng in rngs], np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def test_an_interrupted_update_continues_where_it_was(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_BLOCK", 2)
    monkeypatch.setattr(index_module, "_SAVE_SECONDS", 0)
    calls: list[int] = []

    def embed(paths: list[Path]) -> np.ndarray:
        calls.append(len(paths))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return toy_embed(paths)

    def opened() -> SearchIndex:
        return open_index(tmp_path / "index", gallery, "model", "a model")

    with pytest.raises(KeyboardInterrupt):
        opened().update(embed)
    assert len(opened()) == 6
    index = opened()
    assert index.update(embed)["added"] == 6 and sum(calls[4:]) == 6
    assert len(opened()) == 12
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.npz"]
    # Every file has its own vector.
    vectors = index_module.to_vectors(toy_embed([gallery / name for name in index.files]))
    for name, hits in zip(index.files, opened().search(vectors, 3), strict=True):
        assert hits[0] == (name, pytest.approx(1.5))


def test_features_that_are_not_numbers(gallery: Path, tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", gallery, "model", "a model")
    with pytest.raises(UserError, match="a model"):
        index.update(lambda paths: toy_embed(paths) * np.nan)
    assert not (tmp_path / "index").exists()


def test_names_that_are_no_text(gallery: Path, tmp_path: Path) -> None:
    (gallery / "0.jpg").rename(gallery / os.fsdecode(b"b\xff\xe9.jpg"))
    for changes in (12, 0):
        index = open_index(tmp_path / "index", gallery, "model", "a model")
        assert sum(index.update(toy_embed).values()) == changes


# ------------------------------------------------------------------------------ content that changes
def overwrite(a: Path, b: Path) -> None:
    a.write_bytes(b.read_bytes())


def rotate(a: Path, b: Path) -> None:
    """Frames renumbered: every name stays, every frame is under another."""
    frames = sorted(a.parent.iterdir())
    for frame in frames:
        frame.rename(frame.with_name(f".{frame.name}"))
    for frame, later in zip(frames, frames[1:] + frames[:1], strict=True):
        later.with_name(f".{later.name}").rename(frame)


@pytest.fixture(params=[0, files.SETTLED_NS], ids=["settled", "fresh"])
def frames(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five images of one size in bytes and one time, long enough ago to have stamps or not."""
    monkeypatch.setattr(files, "SETTLED_NS", request.param)
    paths = [noise(tmp_path / "frames" / f"{i}.bmp") for i in range(5)]
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))
    time.sleep(0.05)
    return paths


@pytest.mark.parametrize("change", [overwrite, exchange, rotate])
def test_an_image_that_changes_under_its_name_is_embedded_anew(
    frames: list[Path], tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    def update(embed: Callable[[list[Path]], np.ndarray] = toy_embed) -> tuple[SearchIndex, dict[str, int]]:
        index = open_index(tmp_path / "index", frames[0].parent, "model", "a model")
        return index, {name: n for name, n in index.update(embed).items() if n}

    def calls(_: list[Path]) -> np.ndarray:
        raise AssertionError("nothing new is here")

    assert update()[1] == {"added": 5} and update(calls)[1] == {}
    before = {path: (path.read_bytes(), path.stat().st_size, path.stat().st_mtime_ns) for path in frames}
    change(frames[1], frames[3])
    os.utime(frames[1], ns=(10**18, 10**18))
    after = {path: (path.read_bytes(), path.stat().st_size, path.stat().st_mtime_ns) for path in frames}
    changed = [path for path in frames if before[path][0] != after[path][0]]
    assert frames[1] in changed and [v[1:] for v in before.values()] == [v[1:] for v in after.values()]

    index, changes = update()
    assert changes == {"changed": len(changed)}
    vectors = index_module.to_vectors(toy_embed(frames))
    for path, ((name, score),) in zip(frames, index.search(vectors, 1), strict=True):
        assert (index.gallery / name).read_bytes() == path.read_bytes() and score == pytest.approx(1.5)
    # What does not change an image's content costs nothing: other times and rights, links to it, another name.
    os.utime(frames[0])
    frames[2].chmod(0o600)
    os.link(frames[4], frames[4].with_name("link.bmp"))
    assert update(calls)[1] == {"added": 1}
    frames[4].rename(frames[4].with_name("renamed.bmp"))
    assert update(calls)[1] == {"added": 1, "removed": 1}


def test_a_stamp_spares_reading(frames: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    digest = index_module.digest_files
    monkeypatch.setattr(index_module, "digest_files", lambda paths: (read.extend(paths), digest(paths))[1])
    for _ in range(2):
        open_index(tmp_path / "index", frames[0].parent, "model", "a model").update(toy_embed)
    assert read == (frames if files.SETTLED_NS == 0 else frames * 2)
