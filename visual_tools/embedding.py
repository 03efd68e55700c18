"""A map of features in two dimensions, by PCA and t-SNE, as a page that holds a thumbnail of every image.

Distances are those that rank the gallery: heads are scaled so that their dot products are the scores of
`ranking.main_setting`.
"""

from __future__ import annotations

import argparse
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from data.images import load_image
from files import read_json
from reid_eval.features import Features, load_features
from reid_eval.index import to_vectors
from reid_eval.open_set import one_or_two_people
from reid_eval.ranking import JUNK, main_setting
from runs.folder import open_run, resolve_data_root
from runs.load import find_teacher
from utils import UserError, own_command
from visual_tools.figure import check_free
from visual_tools.ranked_lists import write_html
from visual_tools.run_page import data_uri

DIMENSIONS = 50  # after PCA
PERPLEXITY = 30
ANGLE = 0.8  # of the Barnes-Hut approximation: 1.6 times as fast as scikit-learn's 0.5, and neighbours are kept as well
THUMBNAIL = (64, 64)  # width and height in pixels at most; a JPEG of about 1 KB
SIZE = 1000  # of the map, in its own units
SCORE_BYTES = 64 << 20  # of scores at a time


@dataclass(frozen=True)
class Answers:
    """The first answer to each of n queries among the images that count.

    index  (n,) in the gallery; -1 if no image counts
    mark   (n,) "right", "wrong", "no match" if the gallery has no right answer, or "" where `index` is -1
    """

    index: np.ndarray
    mark: np.ndarray


@dataclass
class Point:
    """An image on the map as the template shows it: its mark is a query's, `answer` the number of its first answer."""

    number: int
    kind: str
    name: str
    pid: int
    camid: int
    x: float
    y: float
    pid_colour: str
    camid_colour: str
    mark: str = ""
    answer: int | None = None


# ---------------------------------------------------------------------------------------------- the features
def feature_file(args: argparse.Namespace) -> Path:
    """The feature file that the options name. Raises UserError that names the command which writes it."""
    if args.features:
        return Path(args.features)
    run = open_run(args.output_path, args.teacher or args.name)
    folder = find_teacher(run.name, run.output_path).folder if args.teacher else run.path
    if not (folder / "reid.npz").is_file():
        option = "--teacher" if args.teacher else "--name"
        raise UserError(f"{folder / 'reid.npz'}: no such file; python test.py {option} {run.name} writes it")
    return folder / "reid.npz"


def read_sides(file: Path) -> tuple[Features, Features]:
    """Queries and gallery of a feature file. Raises UserError for a damaged one."""
    query, gallery, _ = load_features(file)
    for side in (query, gallery):
        if side.paths is not None and (side.paths.dtype.kind != "U" or side.paths.shape != (len(side),)):
            raise UserError(f"{file}: its paths are not a name for every image; extract the features again")
    return query, gallery


def with_cameras(file: Path, query: Features, gallery: Features) -> bool:
    """Whether images of a query's own camera are left out: as in the evaluation, or if there are several cameras."""
    if file.with_suffix(".json").is_file():
        report = read_json(file.with_suffix(".json"), "evaluate again")
        if isinstance(report, dict) and isinstance(report.get("remove_same_camera"), bool):
            return report["remove_same_camera"]
    return len(np.unique(np.concatenate([query.camids, gallery.camids]))) > 1


def first_answers(query: Features, gallery: Features, *, cameras: bool) -> Answers:
    """The first answers, by the rules of `ranking.rank`; `cameras` is its `remove_same_camera`."""
    _, weights = main_setting(query.features.shape[1])
    index, mark = np.full(len(query), -1), np.full(len(query), "", "<U8")
    step = max(1, SCORE_BYTES // (4 * len(gallery)))
    for rows in (slice(start, start + step) for start in range(0, len(query), step)):
        products = query.features[rows].transpose(1, 0, 2) @ gallery.features.transpose(1, 2, 0)
        scores = sum(np.float32(w) * product for w, product in zip(weights, products, strict=True))
        matched, others = one_or_two_people(query.select(np.arange(len(query))[rows]), gallery, cameras)
        scores[~(matched | others)] = -np.inf
        best, counts = scores.argmax(1), (matched | others).any(1)
        right = np.take_along_axis(matched, best[:, None], 1)[:, 0]
        index[rows] = np.where(counts, best, -1)
        mark[rows] = np.where(counts, np.where(right, "right", np.where(matched.any(1), "wrong", "no match")), "")
    return Answers(index, mark)


def choose_images(
    query: Features, gallery: Features, answers: Answers, *, count: int, seed: int, cameras: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """At most `count` images as ascending indices of queries and of the gallery, and what is left out in words.

    At most half are queries, unless the gallery is small. Their first answers come before gallery images that are drawn
    from `seed`. Junk is left out where the evaluation leaves it out; distractors stay.
    """
    rng, left_out = np.random.default_rng(seed), []
    sides = [np.flatnonzero(~((side.pids == JUNK) & cameras)) for side in (query, gallery)]
    if junk := len(query) + len(gallery) - sum(map(len, sides)):
        left_out.append(f"{junk} junk images (identity {JUNK}), which the evaluation does not count")
    queries = np.sort(rng.permutation(sides[0])[: max(count // 2, count - len(sides[1]))])
    answered = np.setdiff1d(answers.index[queries], [-1])
    rest = rng.permutation(np.setdiff1d(sides[1], answered))
    shown = np.sort(np.concatenate([answered, rest])[: count - len(queries)])
    for name, part, whole in (("queries", queries, sides[0]), ("gallery images", shown, sides[1])):
        if len(part) < len(whole):
            left_out.append(f"{len(whole) - len(part)} of {len(whole)} {name} (--count)")
    return queries, shown, left_out


# --------------------------------------------------------------------------------------------------- the map
def embed(features: np.ndarray, *, perplexity: float | None, seed: int, threads: int | None) -> tuple[np.ndarray, str]:
    """Coordinates (n, 2) from 0 to SIZE for features (n, heads, dim), and a line about the method.

    Equal on every call with the same seed and number of threads. Raises UserError for too few or equal features.
    """
    vectors, perplexity = to_vectors(features), perplexity or min(PERPLEXITY, (len(features) - 1) / 3)
    if len(vectors) < 4 or perplexity >= len(vectors):
        raise UserError(f"{len(vectors)} images are too few for --perplexity {perplexity:g}; lower it or add images")
    if not np.ptp(vectors, axis=0).any():
        raise UserError("all images have the same feature; extract the features again with a sound model")
    with threadpool_limits(threads):
        pca = PCA(min(DIMENSIONS, *vectors.shape), random_state=seed)
        reduced = pca.fit_transform(vectors)
        tsne = TSNE(perplexity=perplexity, init="pca", angle=ANGLE, random_state=seed)
        places = tsne.fit_transform(reduced)
    places = places - places.min(0)
    kept = f"PCA to {reduced.shape[1]} dimensions, {100 * pca.explained_variance_ratio_.sum():.1f} % of the variance"
    about = f"{kept}; t-SNE: perplexity {perplexity:g}, seed {seed}, KL divergence {tsne.kl_divergence_:.3f}"
    return SIZE * places / places.max(), about


def thumbnail(path: str) -> str | None:
    """An image file as the address of a small JPEG; None if it cannot be read. A relative path as `data_root`."""
    try:
        file = resolve_data_root(path)
        if not file.is_file():  # nor a pipe, which would wait for a writer
            return None
        image = load_image(file)
    except (UserError, OSError, RuntimeError, ValueError):
        return None
    image.thumbnail(THUMBNAIL, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return data_uri(buffer.getvalue(), "jpeg")


def colours(values: np.ndarray) -> list[str]:
    """A CSS colour for each of n whole numbers, equal for equal ones, grey for 0 and less."""
    numbers = np.unique(values[values > 0]).tolist()
    # Steps of the golden angle keep the hues apart, however many there are.
    shades = {v: f"hsl({137.508 * i % 360:.0f} 65% {(45, 32, 60)[i % 3]}%)" for i, v in enumerate(numbers)}
    return [shades.get(value, "#aaa") for value in values.tolist()]


# -------------------------------------------------------------------------------------------------- the page
def names_of(side: Features, kind: str) -> list[str]:
    """A name for every image: its file's, or a number where the feature file has none."""
    if side.paths is not None:
        return [os.path.basename(path) for path in side.paths.tolist()]
    return side.keys.tolist() if side.keys is not None else [f"{kind} {i}" for i in range(len(side))]


def paths_of(side: Features) -> list[str]:
    """The image files, "" where the feature file does not name them."""
    return side.paths.tolist() if side.paths is not None else [""] * len(side)


def make_points(query: Features, gallery: Features, places: np.ndarray) -> list[Point]:
    """The points of both sides, queries first."""
    kinds = ["query"] * len(query) + ["gallery"] * len(gallery)
    names = names_of(query, "query") + names_of(gallery, "gallery image")
    pids, camids = (np.concatenate(pair) for pair in ((query.pids, gallery.pids), (query.camids, gallery.camids)))
    x, y = places.astype(float).round(1).T.tolist()
    columns = (kinds, names, pids.tolist(), camids.tolist(), x, y, colours(pids), colours(camids))
    return [Point(number, *values) for number, values in enumerate(zip(*columns, strict=True))]


def draw_map(args: argparse.Namespace) -> None:
    """Write the page that the options of show_embedding.py ask for. Raises UserError for bad options and features."""
    file = feature_file(args)
    out = check_free(Path(args.out or file.with_name("embedding.html")), suffix=".html", force=args.force)
    query, gallery = read_sides(file)
    cameras = with_cameras(file, query, gallery)
    answers = first_answers(query, gallery, cameras=cameras)
    which = dict(count=args.count, seed=args.seed, cameras=cameras)
    queries, shown, left_out = choose_images(query, gallery, answers, **which)
    query, gallery = query.select(queries), gallery.select(shown)
    features = np.concatenate([query.features, gallery.features])
    places, method = embed(features, perplexity=args.perplexity, seed=args.seed, threads=args.threads)

    points, number_of = make_points(query, gallery, places), {g: len(query) + i for i, g in enumerate(shown.tolist())}
    for point, q in zip(points, queries, strict=False):
        point.mark, point.answer = str(answers.mark[q]), number_of.get(int(answers.index[q]))
    paths = paths_of(query) + paths_of(gallery)
    with ThreadPoolExecutor(args.threads) as pool:
        thumbnails = list(pool.map(thumbnail, paths))
    if gone := [point.name for point, picture in zip(points, thumbnails, strict=True) if picture is None]:
        left_out.append(f"{len(gone)} of {len(paths)} thumbnails, whose files cannot be read ({gone[0]!r:.100} first)")

    marks = [point.mark for point in points]
    said = (
        f"{len(query)} queries ({marks.count('wrong')} with a wrong first answer, {marks.count('no match')} without a "
        f"match), {len(gallery)} gallery images; score: {main_setting(features.shape[1])[0]}"
    )
    own = "identity and camera" if cameras else "identity and name"
    notes = [said, f"first answers without images of the query's own {own}", method]
    notes += [f"left out: {what}" for what in left_out]
    # What is drawn later lies on top.
    layers = sorted(points, key=lambda point: (point.kind == "query", point.mark == "wrong"))
    context = dict(title=f"Embedding of {file}", notes=notes, points=layers, thumbnails=thumbnails, size=SIZE)
    write_html(out, "embedding.html", **context, made_by=own_command())
    print("\n".join([*notes, f"map written to {out} ({out.stat().st_size / 1e6:.1f} MB)"]))
