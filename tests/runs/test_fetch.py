"""`python -m runs.release pack` and `get`: a run goes to a mirror and comes back, or is refused, from a server here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import Outcome, OutputFolder, contents, tiny_config, tiny_teacher_config, tiny_trainer

from files import read_tensors
from reid_eval.features import load_features
from reIDmodel import build_teacher
from runs import fetch
from runs.folder import RunFolder, start_folder
from runs.load import save_teacher
from runs.release import packed
from runs.snapshot import read_manifest, save_snapshot
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
GEN, ID = "checkpoints/00000001/gen.safetensors", "checkpoints/00000001/id.safetensors"


class Server:
    """A folder over HTTP on this machine: what it was asked for, and what goes wrong on the way.

    cut    a file of this many bytes or more breaks off after half of what was asked for
    flip   the files whose last byte is another one
    ranges whether parts can be asked for
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cut, self.flip, self.ranges = folder, 0, "", True
        self.asked: list[tuple[str, int]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def sent(self) -> dict[str, list[int]]:
        """The files that were asked for since the last call, each with the first bytes of the requests."""
        asked = {name: [start for other, start in self.asked if other == name] for name, _ in self.asked}
        self.asked.clear()
        return asked


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: Any) -> None:
        self.serving = server
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        place, path = self.serving, self.serving.folder / unquote(self.path).lstrip("/")
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if place.ranges else 0
        place.asked.append((path.name, start))
        if not path.is_file():
            self.send_error(404)
            return
        content = bytearray(path.read_bytes())
        if path.name == place.flip:
            content[-1] ^= 1
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        broken = place.cut and len(content) >= place.cut
        self.wfile.write(content[start : start + (len(content) - start) // 2] if broken else content[start:])


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers: list[Server] = []
    yield lambda folder: servers.append(Server(folder)) or servers[-1]
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> OutputFolder:
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny_config(data_root=str(tiny_data), teacher="tutor")
    start_folder(run := RunFolder(folder, "tiny run"), cfg, resume=False)
    save_snapshot(run.checkpoints, tiny_trainer(cfg, classes=8), 1)
    net = build_teacher(8, backbone="resnet10w8")
    save_teacher(RunFolder(folder, "tutor"), tiny_teacher_config(data_root=str(tiny_data)), net, 8)
    return OutputFolder(folder, tiny_data)


class Places:
    """Trained here, packed in `mirror`, fetched into `new`."""

    def __init__(self, trained: OutputFolder, folder: Path, script: Callable[..., Outcome]) -> None:
        self.trained, self.mirror, self.new, self.script = trained, folder / "mirror", folder / "new", script
        self.run = self.new / "outputs" / "tiny run"

    def pack(self, *options: object) -> Outcome:
        options = options or ("--name", "tiny run")
        where = ("--out", self.mirror, "--output_path", self.trained.folder)
        return self.script("runs/release", "pack", *options, *where)

    def get(self, manifest: object, name: str = "tiny run") -> Outcome:
        return self.script("runs/release", "get", name, "--manifest", manifest, "--output_path", self.new)

    def edit(self, change: Callable[[dict[str, Any]], object], name: str = "tiny run") -> None:
        """Change the files that the manifest lists."""
        content = json.loads((self.mirror / "manifest.json").read_text())
        change(content[name]["files"])
        (self.mirror / "manifest.json").write_text(json.dumps(content))

    def assert_whole(self) -> None:
        assert contents(self.run) == contents(self.mirror / "tiny run")
        assert [path.name for path in (self.new / "outputs").iterdir()] == ["tiny run"]
        assert not list(fetch.cache_folder().glob("*.part"))

    def assert_refuses(self, manifest: object, *named: str, name: str = "tiny run") -> None:
        error = self.get(manifest, name).error
        assert all(word in error for word in named), error
        assert len(error) < 2000 and not list(self.new.glob("*/*"))


@pytest.fixture
def places(
    trained: OutputFolder, tmp_path: Path, script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> Places:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return Places(trained, tmp_path, script)


# ------------------------------------------------------------------------------------- what comes back
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_a_fetched_run_computes_what_it_computed(places: Places, serve: Callable[[Path], Server], half: bool) -> None:
    assert places.pack("--name", "tiny run", *["--half"] * half).code == 0
    assert places.pack("--teacher", "tutor", *["--half"] * half).code == 0
    server = serve(places.mirror)
    assert places.get(f"{server.url}/manifest.json").code == 0
    assert places.get(f"{server.url}/manifest.json", "tutor").code == 0
    places.assert_whole()
    assert sorted(contents(places.run)) == [GEN, ID, "checkpoints/00000001/manifest.json", "config.yaml"]
    for name, kept in (("gen", GEN), ("id", ID)):
        state, back = read_tensors(source(places) / f"{name}.pt")["a"], read_tensors(places.run / kept)
        assert state.keys() == back.keys() and all(back[key].dtype == value.dtype for key, value in state.items())
        for key, value in state.items():
            expected = value.half().to(value.dtype) if half and value.is_floating_point() else value
            assert torch.equal(back[key], expected)
    for net, folder in (("--name=tiny run", places.run), ("--teacher=tutor", places.new / "models" / "tutor")):
        for root in (places.trained.folder, places.new):
            options = ("--output_path", root, "--threads", 1, "--device", "cpu")
            assert places.script("test", net, *options).code == 0
        theirs = load_features(places.trained.folder / folder.relative_to(places.new) / "reid.npz").query.features
        ours = load_features(folder / "reid.npz").query.features
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3 if half else 0)
    options = ("--output_path", places.new, "--name", "tiny run", "--device", "cpu", "--threads", 1)
    assert places.script("generate", *options, "--count", 2, "--out", places.new / "generated").code == 0
    images = places.trained.data / "query"
    assert places.script("search", *options, "--gallery", images, "--query", next(images.glob("*.jpg"))).code == 0
    assert places.script("visual_tools/show_swap", *options[:-4], "--count", 1).code == 0
    assert "00000001: holds weights but no training state" in places.script("train", "--resume", *options).error
    assert "00000001: holds weights but no training state" in places.script("train", "--resume=auto", *options).error


def source(places: Places) -> Path:
    return places.trained.folder / "outputs" / "tiny run" / "checkpoints" / "00000001"


def test_nothing_is_overwritten(places: Places) -> None:
    assert places.pack().code == 0
    before = contents(places.mirror)
    assert str(places.mirror / "tiny run") in places.pack("--name", "tiny run", "--half").error
    assert contents(places.mirror) == before
    places.run.mkdir(parents=True)
    assert str(places.run) in places.get(places.mirror / "manifest.json").error
    assert not contents(places.new)


def test_the_old_call_writes_the_releases_files_and_these_can_be_packed(places: Places) -> None:
    flat = places.new / "outputs" / "flat"
    where = ("--out", flat / "checkpoints", "--output_path", places.trained.folder)
    assert places.script("runs/release", "--name", "tiny run", *where).code == 0
    assert len(list((flat / "checkpoints").iterdir())) == 4
    shutil.copy(source(places).parents[1] / "config.yaml", flat)
    done = places.script("runs/release", "pack", "--name", "flat", "--out", places.mirror, "--output_path", places.new)
    assert done.code == 0
    places.new = places.new / "again"
    assert places.get(places.mirror / "manifest.json", "flat").code == 0
    fetched = places.new / "outputs" / "flat"
    assert read_manifest(fetched / "checkpoints", 1)["circumstances"] == {}
    state, back = read_tensors(source(places) / "id.pt")["a"], read_tensors(fetched / ID)
    assert state.keys() == back.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_half_precision_that_loses_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="b does not fit.*--half"):
        packed({"a": torch.ones(2), "b": torch.tensor([1.0, 1e6])}, Path("x.pt"), half=True)


# ---------------------------------------------------------------------------------------- on the way
def test_a_second_get_needs_no_network(places: Places, serve: Callable[[Path], Server]) -> None:
    places.pack()
    server = serve(places.mirror)
    assert places.get(f"{server.url}/manifest.json").code == 0
    server.http.shutdown()
    server.http.server_close()
    shutil.rmtree(places.run)
    assert places.get(f"{server.url}/manifest.json").code == 0
    places.assert_whole()
    # A file of the cache that has changed is not used.
    (kept,) = [path for path in fetch.cache_folder().iterdir() if path.read_bytes() == (places.run / GEN).read_bytes()]
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    shutil.rmtree(places.run)
    places.assert_refuses(f"{server.url}/manifest.json", GEN)


def test_a_broken_download_goes_on_where_it_was(places: Places, serve: Callable[[Path], Server]) -> None:
    places.pack()
    server, size = serve(places.mirror), (places.mirror / "tiny run" / GEN).stat().st_size
    assert size > 20_000
    server.cut = 10_000
    places.assert_refuses(f"{server.url}/manifest.json", GEN)  # it broke off again and again
    starts = server.sent()["gen.safetensors"]
    assert len(starts) == fetch.ATTEMPTS and starts[:3] == [0, size // 2, size // 2 + (size - size // 2) // 2]
    (part,) = fetch.cache_folder().glob("*.part")
    have, server.cut = part.stat().st_size, 0
    assert have > starts[-1]
    assert places.get(f"{server.url}/manifest.json").code == 0
    places.assert_whole()
    assert server.sent()["gen.safetensors"] == [have]


def test_a_server_without_ranges_sends_all_again(places: Places, serve: Callable[[Path], Server]) -> None:
    places.pack()
    server = serve(places.mirror)
    server.ranges, digest = False, json.loads((places.mirror / "manifest.json").read_text())["tiny run"]["files"][GEN]
    fetch.cache_folder().mkdir(parents=True)
    (fetch.cache_folder() / f"{digest['sha256']}.part").write_bytes(b"begun")
    assert places.get(f"{server.url}/manifest.json").code == 0
    places.assert_whole()


def test_a_flipped_byte_is_refused_and_the_next_mirror_tried(places: Places, serve: Callable[[Path], Server]) -> None:
    bad, good = serve(places.mirror), serve(places.mirror)
    places.pack("--name", "tiny run", "--mirror", f"{bad.url}/absent", "--mirror", f"{good.url}/")
    bad.flip = "gen.safetensors"
    good.flip = "gen.safetensors"
    places.assert_refuses(f"{bad.url}/manifest.json", GEN, "SHA-256", "404", good.url)
    assert not list(fetch.cache_folder().glob("*.part"))
    good.flip = ""
    good.sent()
    assert places.get(f"{bad.url}/manifest.json").code == 0
    places.assert_whole()
    assert good.sent() == {"gen.safetensors": [0]}


def test_bytes_of_another_file_in_the_part_are_thrown_away(places: Places, serve: Callable[[Path], Server]) -> None:
    places.pack()
    server, listed = serve(places.mirror), json.loads((places.mirror / "manifest.json").read_text())
    fetch.cache_folder().mkdir(parents=True)
    for name, size in ((GEN, 100), (ID, 10**6)):
        (fetch.cache_folder() / f"{listed['tiny run']['files'][name]['sha256']}.part").write_bytes(bytes(size))
    assert places.get(f"{server.url}/manifest.json").code == 0
    places.assert_whole()
    sent = server.sent()
    assert sent["gen.safetensors"] == [100, 0] and sent["id.safetensors"] == [0]


# ------------------------------------------------------------------------------------ untrusted manifests
@pytest.mark.parametrize(
    "path", ["../outside", "/outside", "a/../../outside", "a//b", "./a", "", ".", "a\\..\\b", "C:outside", "a\nb", "a/"]
)
def test_files_of_a_manifest_stay_in_the_runs_folder(places: Places, path: str) -> None:
    places.pack()
    places.edit(lambda files: files.update({path: files["config.yaml"]}))
    places.assert_refuses(places.mirror / "manifest.json", repr(path))
    assert not list(places.mirror.parent.rglob("outside"))


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files[GEN].update(urls=["file:///etc/hostname"]),
        lambda files: files[GEN].update(urls=["ftp://127.0.0.1/x"]),
        lambda files: files[GEN].update(urls=["http://[x"]),
        lambda files: files[GEN].update(urls=[]),
        lambda files: files[GEN].update(sha256="../x"),
        lambda files: files[GEN].update(size=-1),
        lambda files: files[GEN].update(size=10),
        lambda files: files.pop("config.yaml"),
        lambda files: files.clear(),
    ],
)
def test_manifests_that_are_none(places: Places, serve: Callable[[Path], Server], change: Callable) -> None:
    places.pack()
    places.edit(change)
    places.assert_refuses(f"{serve(places.mirror).url}/manifest.json")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"tiny run": 3}', b"[" * 100_000, b" " * 2**20 + b"{}", b"{}"])
def test_other_files_are_no_manifests(places: Places, serve: Callable[[Path], Server], content: bytes) -> None:
    places.mirror.mkdir()
    file = places.mirror / "manifest.json"
    file.write_bytes(content)
    places.assert_refuses(file, str(file))
    places.assert_refuses(f"{serve(places.mirror).url}/manifest.json", "127.0.0.1")
    places.assert_refuses(places.mirror / "absent.json", "absent.json")


@pytest.mark.parametrize("content", [b"", b"x" * 9, (2**62).to_bytes(8, "little"), b'\x20\0\0\0\0\0\0\0{"a": 3}'])
def test_weights_that_are_none(places: Places, content: bytes) -> None:
    places.pack()
    assert places.get(places.mirror / "manifest.json").code == 0
    (places.run / ID).write_bytes(content)
    assert ID in places.script("test", "--name", "tiny run", "--output_path", places.new, "--device", "cpu").error
