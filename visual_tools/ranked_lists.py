"""Ranked lists of an evaluation or a search: an HTML page of all queries, and a picture of the worst and the best."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import load_image
from files import make_folder, write_json, write_whole
from reid_eval.features import Features
from reid_eval.ranking import Ranking, first_entries, main_setting
from runs.grid import INK, WHITE
from visual_tools.figure import write_grid

# Distinct for colour-blind readers; the word under each image says the same.
COLOURS = {"right": (0, 158, 115), "wrong": (213, 94, 0), "junk": (150, 150, 150), "": WHITE}
CELL_HEIGHT, CAPTION, FRAME = 128, 16, 4
LEGEND = (
    "right: the query's identity under another camera; wrong: another identity; junk: not counted "
    "(the query's identity under the query's own camera, or an image without a person)"
)
LEGEND_NO_CAMERAS = "right: the query's identity; wrong: another identity; junk: the query image itself, not counted"


@dataclass(frozen=True)
class Hit:
    """An image of a list: its file, the line under it, and its mark: "right", "wrong", "junk" or ""."""

    path: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Result:
    """A query with its list, and its AP (standard); None without a match or without identities."""

    path: str
    caption: str
    hits: Sequence[Hit]
    ap: float | None = None


# --------------------------------------------------------------------------------------------- the page
def write_html(path: Path, template: str, **context: Any) -> Path:
    """Fill a template of this folder, which escapes everything it is given, and write it, whole or not at all.

    Bytes that are not text, which names of files may contain, become question marks. Raises UserError if the file
    cannot be written.
    """
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template(template).render(context).encode("utf-8", "replace")
    make_folder(path.parent)
    return write_whole(path, lambda file: file.write(page))


def write_page(out: Path, results: Sequence[Result], *, title: str, notes: Sequence[str] = ()) -> Path:
    """Write the page of all results; the images stay where they are and are linked relative to the page."""
    folder = os.path.abspath(out.parent)

    def linked(path: str, caption: str) -> dict[str, str]:
        src = quote(os.fsencode(os.path.relpath(path, folder)))
        return {"src": src, "name": os.path.basename(path), "caption": caption}

    sections = [
        {
            "query": linked(result.path, result.caption),
            "hits": [linked(hit.path, hit.caption) | {"mark": hit.mark} for hit in result.hits],
        }
        for result in results
    ]
    return write_html(out, "page.html", title=title, notes=notes, results=sections)


# --------------------------------------------------------------------------------------- an evaluation
def write_ranked_lists(
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
    `rank_page{suffix}.html`   all queries, the worst first
    `rank_lists{suffix}.json`  the queries of the picture, which the report shows: `{"setting", "legend", "lists":
                               [{"kind", "path", "caption", "hits": [{"path", "caption", "mark"}], "ap"}]}`

    query, gallery  both sides with their `paths`
    rankings        of these queries by convention, with the scores of `ranking.main_setting`
    suffix          names the data set if it is not the run's

    Raises UserError for images that are gone and a folder that cannot be written.
    """
    setting, _ = main_setting(query.features.shape[1])
    standard, official = rankings["standard"], rankings["official"]
    results = []
    for i, entries in enumerate(first_entries(query, gallery, remove_same_camera=remove_same_camera)):
        first = int(standard.first[i])
        ap, text = None, "no match in the gallery"
        if first:
            ap = float(standard.ap[i])
            text = f"AP standard {100 * ap:.2f} %, AP official {100 * official.ap[i]:.2f} %, first match: {first}"
        caption = f"{query.paths[i]}: identity {query.pids[i]}, camera {query.camids[i]}; {text}"
        hits = [
            Hit(
                os.path.abspath(gallery.paths[e.index]),
                f"{f'{e.rank} ' if e.rank else ''}{e.mark}, {e.score:.3f}",
                e.mark,
            )
            for e in entries
        ]
        results.append(Result(os.path.abspath(query.paths[i]), caption, hits, ap))
    legend = LEGEND if remove_same_camera else LEGEND_NO_CAMERAS
    notes = [
        f"{standard.queries} queries ({standard.without_match} without a match), {len(gallery)} gallery images; "
        f"{setting}; mAP {100 * official.mAP:.2f} official, {100 * standard.mAP:.2f} standard; Rank-1 "
        f"{100 * official.cmc[0]:.2f} official, {100 * standard.cmc[0]:.2f} standard",
        legend,
    ]
    shown = [(kind, results[i]) for kind, i in choose_queries(standard, count)]
    picture = draw_lists(folder / f"rank_figure{suffix}.png", shown)
    worst_first = sorted(results, key=lambda result: 2 if result.ap is None else result.ap)
    page = write_page(folder / f"rank_page{suffix}.html", worst_first, title=title, notes=notes)
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
    rest = by_ap[count : max(count, len(by_ap) - count)]
    drawn = rest[np.random.default_rng(0).permutation(len(rest))[:count]]
    drawn = drawn[np.argsort(ranking.ap[drawn], kind="stable")]
    kinds = {"worst": by_ap[:count], "best": by_ap[count:][::-1][:count], "random": drawn}
    return [(kind, int(i)) for kind, queries in kinds.items() for i in queries]


def draw_lists(path: Path, lists: Sequence[tuple[str, Result]]) -> Path:
    """Write the picture of (kind, query with its list): a row per query, the query image first."""
    # All cells have the first query's proportions, within limits.
    first = load_image(lists[0][1].path)
    width = int(np.clip(CELL_HEIGHT * first.width / first.height, CELL_HEIGHT / 2, 2 * CELL_HEIGHT))
    rows = [
        [_cell(query.path, width, "query", ""), *(_cell(h.path, width, h.caption, h.mark) for h in query.hits)]
        for _, query in lists
    ]
    labels = [f"{kind}: AP {100 * query.ap:.1f} % (standard)" for kind, query in lists]
    return write_grid(path, rows, row_labels=labels, cell_height=rows[0][0].shape[0])


def _cell(path: str, width: int, caption: str, mark: str) -> np.ndarray:
    cell = Image.new("RGB", (width + 2 * FRAME, CELL_HEIGHT + 2 * FRAME + CAPTION), WHITE)
    draw = ImageDraw.Draw(cell)
    draw.rectangle((0, 0, cell.width - 1, CELL_HEIGHT + 2 * FRAME - 1), COLOURS[mark])
    cell.paste(ImageOps.pad(load_image(path), (width, CELL_HEIGHT), Image.Resampling.BICUBIC, WHITE), (FRAME, FRAME))
    place = (cell.width / 2, cell.height - CAPTION / 2)
    draw.text(place, caption, INK, ImageFont.load_default(size=10), anchor="mm")
    return np.asarray(cell)
