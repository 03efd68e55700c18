"""The HTML page of ranked lists, for evaluation and search: a file that opens without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, Template

from files import make_folder, write_whole


@dataclass(frozen=True)
class Hit:
    """An image of a list: its file, the line under it, and its mark: "right", "wrong", "junk" or ""."""

    path: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Result:
    """A query with its list. The page sorts by `values`, which have the same names in every result; None comes last."""

    path: str
    caption: str
    hits: Sequence[Hit]
    values: dict[str, float | None] = field(default_factory=dict)


def template(name: str) -> Template:
    """A template of this folder that escapes everything it is given."""
    folder = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def write_page(out: Path, results: Sequence[Result], *, title: str, notes: Sequence[str] = ()) -> Path:
    """Write the page of all results; the images stay where they are and are linked relative to the page.

    Raises UserError if it cannot be written.
    """
    folder = os.path.abspath(out.parent)

    def linked(path: str, caption: str) -> dict[str, str]:
        return {"src": link(path, folder), "name": _text(os.path.basename(path)), "caption": _text(caption)}

    stream = template("page.html").stream(
        title=_text(title),
        notes=[_text(note) for note in notes],
        sort_keys=list(results[0].values) if results else [],
        results=(
            {
                "query": linked(result.path, result.caption),
                "sort_values": json.dumps(list(result.values.values())),
                "hits": [linked(hit.path, hit.caption) | {"mark": hit.mark} for hit in result.hits],
            }
            for result in results
        ),
    )
    stream.enable_buffering(1000)
    make_folder(out.parent)
    return write_whole(out, lambda file: stream.dump(file, encoding="utf-8"))


def link(path: str, folder: str) -> str:
    """The URL of a file relative to `folder`. Its name may contain any bytes."""
    return quote(os.fsencode(os.path.relpath(path, folder).replace(os.sep, "/")))


def _text(text: str) -> str:
    """`text` with question marks instead of bytes that are not text, which names of files may contain."""
    return text.encode("utf-8", "replace").decode()
