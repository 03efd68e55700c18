"""The HTML page of ranked lists, for evaluation and search: one file that opens without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from files import make_folder, write_whole


@dataclass(frozen=True)
class Hit:
    """An image of a list: its file, the line under it, and its mark: "right", "wrong", "junk" or none."""

    path: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Result:
    """A query with its list. `values` are what the page sorts by, the same names in every result; None comes last."""

    path: str
    caption: str
    hits: Sequence[Hit]
    values: dict[str, float | None] = field(default_factory=dict)


def write_page(out: Path, results: Sequence[Result], *, title: str, notes: Sequence[str] = ()) -> Path:
    """Write the page of all results; the images stay where they are and are linked relative to the page.

    Raises UserError where it cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader

    folder = os.path.abspath(out.parent)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, keep_trailing_newline=True
    ).get_template("page.html")
    stream = template.stream(
        title=_text(title),
        notes=[_text(note) for note in notes],
        sort_keys=list(results[0].values) if results else [],
        results=(
            {
                "caption": _text(result.caption),
                "sort_values": json.dumps(list(result.values.values())),
                "query": {"src": link(result.path, folder), "name": _text(os.path.basename(result.path))},
                "hits": [
                    {
                        "src": link(hit.path, folder),
                        "name": _text(os.path.basename(hit.path)),
                        "caption": _text(hit.caption),
                        "mark": hit.mark,
                    }
                    for hit in result.hits
                ],
            }
            for result in results
        ),
    )
    stream.enable_buffering(1000)
    make_folder(out.parent)
    return write_whole(out, lambda file: stream.dump(file, encoding="utf-8"))


def link(path: str, folder: str) -> str:
    """The URL of a file as seen from `folder`: relative, or absolute from another drive. Any bytes are allowed."""
    path = os.path.abspath(path)
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:
        return Path(path).as_uri()
    return quote(os.fsencode(relative.replace(os.sep, "/")))


def _text(text: str) -> str:
    """Names of files may hold bytes that are no text; these become question marks."""
    return text.encode("utf-8", "replace").decode()
