"""What may lie in the repository: text, the project's drawings, and weights trained on drawings. No photograph."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from PIL import Image

from mannequins.dataset import make_dataset
from utils import ROOT

DRAWINGS = {"docs/swap_grid.png"}  # painted by a run that was trained on people whom the renderer has drawn
PEOPLE = "examples/many/"  # drawn by the renderer, see below
WEIGHTS = ("outputs/pretrained/checkpoints/", "models/pretrained-teacher/")  # see outputs/pretrained/README.md


def test_every_file_in_git_is_text_or_a_drawing_of_the_project():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name.decode() for name in listed.split(b"\0") if name]
    assert len(names) > 100
    binary = {name for name in names if (ROOT / name).is_file() and not is_text((ROOT / name).read_bytes())}
    weights = {name for name in binary if name.startswith(WEIGHTS)}
    people = {name for name in binary if name.startswith(PEOPLE)}
    assert binary - weights - people <= DRAWINGS
    assert sum((ROOT / name).stat().st_size for name in weights) < 12e6
    drawn = {name.removeprefix(PEOPLE) for name in people}
    assert drawn == {str(path.relative_to(ROOT / PEOPLE)) for path in (ROOT / PEOPLE).rglob("*.jpg")}


def test_the_people_of_the_examples_are_drawings(tmp_path):
    settings = dict(train_ids=3, test_ids=12, distractors=0, junk=0, images_per_camera=1, min_cameras=3)
    make_dataset(tmp_path / "people", seed=7, preset="many", test_group_size=1, **settings)
    shipped = sorted((ROOT / PEOPLE).rglob("*.jpg"))
    assert len(shipped) == 110
    for path in shipped:
        drawn = tmp_path / "people" / path.relative_to(ROOT / PEOPLE)
        pixels = [np.asarray(Image.open(file), dtype=int) for file in (path, drawn)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 1, path  # JPEG libraries differ by a level here and there


def is_text(content: bytes) -> bool:
    """Images, weights and archives hold bytes that are not UTF-8 or are 0; text may carry an image as base64."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    return "\0" not in text and not any(f";base64,{start}" in text for start in ("/9j/", "iVBOR"))  # JPEG, PNG


@pytest.mark.parametrize(
    "content",
    [b"\xff\xd8\xff\xe0 JPEG", b"\x89PNG\r\n", b"PK\3\4\0", b'<img src="data:image/png;base64,' + b'iVBORw0">'],
)
def test_images_and_archives_are_no_text(content):
    assert not is_text(content)
