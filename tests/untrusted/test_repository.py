"""What may lie in the repository: text, and the project's drawings. No photograph, no weights, no features."""

from __future__ import annotations

import subprocess

import pytest

from utils import ROOT

DRAWINGS = {"docs/swap_grid.png"}  # painted by the demo, of people whom the renderer has drawn


def test_every_file_in_git_is_text_or_a_drawing_of_the_project():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name.decode() for name in listed.split(b"\0") if name]
    assert len(names) > 100
    binary = {name for name in names if (ROOT / name).is_file() and not is_text((ROOT / name).read_bytes())}
    assert binary <= DRAWINGS


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
