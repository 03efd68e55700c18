"""Ranked lists of an evaluation: a picture of the worst, the best and random queries, and a page of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import load_image
from files import make_folder, write_json, write_whole
from reid_eval.features import Features
from reid_eval.ranking import Entry, Ranking, first_entries, main_setting
from runs.grid import INK, WHITE, paint_grid
from utils import UserError
from visual_tools.page import Hit, Result, write_page

# Distinct for colour-blind readers; the word under each image says the same.
COLOURS = {"right": (0, 158, 115), "wrong": (213, 94, 0), "junk": (150, 150, 150), "": WHITE}
CELL_HEIGHT, CAPTION, FRAME = 128, 16, 4
AT_MOST = 100  # queries of each kind: the picture has to be opened
LEGEND = (
    "right: the query's identity under another camera; wrong: another identity; junk: not counted "
    "(the query's identity under the query's own camera, or an image without a person)"
)
LEGEND_NO_CAMERAS = "right: the query's identity; wrong: another identity; junk: the query image itself, not counted"


def check_count(count: int) -> None:
    """Raise UserError for a `--rank-figure` that is out of range."""
    if not 1 <= count <= AT_MOST:
        raise UserError(f"--rank-figure {count}: must be between 1 and {AT_MOST}; the page shows all queries")


def write_rank_figure(
    folder: Path,
    suffix: str,
    query: Features,
    gallery: Features,
    rankings: dict[str, Ranking],
    *,
    count: int,
    title: str,
    remove_same_camera: bool = True,
) -> list[Path]:
    """Write the ranked lists of an evaluation into `folder` and return the paths; existing files are replaced.

    `rank_figure{suffix}.png`  `count` worst, `count` best and `count` random queries by `standard` AP
    `rank_page{suffix}.html`   all queries, to sort and to scroll through
    `rank_lists{suffix}.json`  the queries of the picture, which the report shows: `{"setting", "legend", "lists":
                               [{"kind", "path", "caption", "hits": [{"path", "caption", "mark"}], "values"}]}`

    query, gallery  both sides with their `paths`
    rankings        of these queries by convention, with the scores of `ranking.main_setting`
    suffix          names the data set if it is not the run's

    Raises UserError for images that are gone and a folder that cannot be written.
    """
    setting, _ = main_setting(query.features.shape[1])
    lists = first_entries(query, gallery, remove_same_camera=remove_same_camera)
    standard, official = rankings["standard"], rankings["official"]
    legend = LEGEND if remove_same_camera else LEGEND_NO_CAMERAS
    results = []
    for i, entries in enumerate(lists):
        first = int(standard.first[i])
        values = {f"AP {name}": float(rankings[name].ap[i]) if first else None for name in ("standard", "official")}
        caption = f"{query.paths[i]}: identity {query.pids[i]}, camera {query.camids[i]}; " + (
            ", ".join(f"{name} {100 * ap:.2f} %" for name, ap in values.items()) + f", first match at rank {first}"
            if first
            else "no match in the gallery"
        )
        hits = [Hit(os.path.abspath(gallery.paths[e.index]), entry_caption(e), e.mark) for e in entries]
        results.append(Result(os.path.abspath(query.paths[i]), caption, hits, values | {"first match": first or None}))
    notes = [
        f"{standard.queries} queries ({standard.without_match} without a match), {len(gallery)} gallery images; "
        f"{setting}; mAP {100 * official.mAP:.2f} official, {100 * standard.mAP:.2f} standard; Rank-1 "
        f"{100 * official.cmc[0]:.2f} official, {100 * standard.cmc[0]:.2f} standard",
        legend,
    ]
    shown = [(kind, results[i]) for kind, i in choose_queries(standard, count)]
    figure = Image.fromarray(paint_lists(shown))
    make_folder(folder)
    picture = write_whole(folder / f"rank_figure{suffix}.png", lambda file: figure.save(file, format="PNG"))
    page = write_page(folder / f"rank_page{suffix}.html", results, title=title, notes=notes)
    file = folder / f"rank_lists{suffix}.json"
    queries = [{"kind": kind} | asdict(result) for kind, result in shown]
    write_json(file, {"setting": setting, "legend": legend, "lists": queries})
    return [picture, page, file]


def choose_queries(ranking: Ranking, count: int) -> list[tuple[str, int]]:
    """The `count` worst, `count` best and `count` random queries that have a match, as (kind, index of the query).

    No query is taken twice, so there may be fewer. The random queries are the same on every call.
    """
    valid = np.flatnonzero(ranking.first)
    by_ap = valid[np.argsort(ranking.ap[valid], kind="stable")]
    worst = by_ap[:count]
    best = by_ap[count:][::-1][:count]
    rest = by_ap[count : max(count, len(by_ap) - count)]
    drawn = rest[np.random.default_rng(0).permutation(len(rest))[:count]]
    drawn = drawn[np.argsort(ranking.ap[drawn], kind="stable")]
    kinds = {"worst": worst, "best": best, "random": drawn}
    return [(kind, int(i)) for kind, queries in kinds.items() for i in queries]


def paint_lists(lists: Sequence[tuple[str, Result]]) -> np.ndarray:
    """The picture (H, W, 3) uint8 of (kind, query with its list): a row per query, the query image first."""
    # All cells have the first query's proportions, within limits.
    first = load_image(lists[0][1].path)
    width = int(np.clip(CELL_HEIGHT * first.width / first.height, CELL_HEIGHT / 2, 2 * CELL_HEIGHT))
    rows = [
        [_cell(query.path, width, "query", ""), *(_cell(h.path, width, h.caption, h.mark) for h in query.hits)]
        for _, query in lists
    ]
    labels = [f"{kind}: AP {100 * query.values['AP standard']:.1f} % (standard)" for kind, query in lists]
    return paint_grid(rows, row_labels=labels, cell_height=rows[0][0].shape[0])


def _cell(path: str, width: int, caption: str, mark: str) -> np.ndarray:
    cell = Image.new("RGB", (width + 2 * FRAME, CELL_HEIGHT + 2 * FRAME + CAPTION), WHITE)
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, cell.width - 1, CELL_HEIGHT + 2 * FRAME - 1), COLOURS[mark])
    fitted = ImageOps.pad(load_image(path), (width, CELL_HEIGHT), Image.Resampling.BICUBIC, WHITE)
    cell.paste(fitted, (FRAME, FRAME))
    place = (cell.width / 2, cell.height - CAPTION / 2)
    draw.text(place, caption, INK, ImageFont.load_default(size=10), anchor="mm")
    return np.asarray(cell)


def entry_caption(entry: Entry) -> str:
    """The words under an image of a list: its rank, mark and score."""
    return f"{entry.mark}, {entry.score:.3f}" if entry.rank is None else f"{entry.rank} {entry.mark}, {entry.score:.3f}"
