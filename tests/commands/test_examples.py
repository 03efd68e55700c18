"""What a newcomer starts after installation: the notebooks, and the commands on the weights that are shipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from utils import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
@pytest.mark.parametrize("folder", [ROOT, ROOT / "examples"], ids=["from the project", "from their folder"])
def test_notebooks_run(notebook: Path, folder: Path, tmp_path: Path) -> None:
    if folder != ROOT and notebook != NOTEBOOKS[-1]:
        pytest.skip("one of them shows it")
    environment = os.environ | dict(TMPDIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, notebook], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    written = {path.name for path in (tmp_path / "dgnet-examples").glob("*.png")}
    assert written == {"embed_and_search": {"search.png"}, "swap_clothes": {"swaps.png"}}.get(notebook.stem, set())


def test_the_shipped_run_swaps_and_finds(script: Callable[..., Outcome], tmp_path: Path) -> None:
    people = ROOT / "examples" / "many"
    outcome = script("visual_tools/show_rainbow", "--name", "pretrained", "--out", tmp_path / "rainbow.png")
    assert outcome.code == 0 and (tmp_path / "rainbow.png").is_file(), outcome.err
    query = sorted((people / "query").glob("*.jpg"))[0]
    found = script(
        *("search", "--name", "pretrained", "--gallery", people / "bounding_box_test", "--query", query),
        *("--index", tmp_path / "index", "--page", tmp_path / "page.html", "--top", 3),
    )
    assert found.code == 0 and (tmp_path / "page.html").is_file(), found.err
    assert found.out.splitlines()[-4].rsplit("/", 1)[1][:4] == query.name[:4]
