"""Features, feature files and the report."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from reid_eval.features import Features, embed_images, extract_features, load_features, save_features
from reid_eval.report import ROW_LABELS, evaluate_features, format_table, per_query, summary
from reIDmodel import build_id_net
from utils import UserError

PARTS = ("features", "pids", "camids")


def make_side(n, *, heads=2, dim=512, seed=0, noise=1.0, cameras=3):
    """Features of n images of identities 1, 2, ... (five of each at most), any camera."""
    rng = np.random.default_rng(seed)
    pids = np.arange(n) % max(1, n // 5) + 1
    f = np.stack([np.random.default_rng(pid).standard_normal((heads, dim)) for pid in pids])
    f += noise * rng.standard_normal(f.shape)
    f /= np.linalg.norm(f, axis=-1, keepdims=True)
    return Features(f.astype(np.float32), pids, rng.integers(1, cameras + 1, n))


@pytest.fixture
def sides():
    return {"query": make_side(30, seed=1), "gallery": make_side(50, seed=2), "multi": make_side(60, seed=3)}


def multi_of(sides):
    """Multi-query images that hold the identity and camera of every query."""
    return Features(*(np.concatenate([getattr(sides[s], part) for s in ("query", "multi")]) for part in PARTS))


def report(query, gallery, **options):
    results = evaluate_features(query, gallery, **options)
    return summary(results, query, gallery, remove_same_camera=options.get("remove_same_camera", True))


class ToyNet(torch.nn.Module):
    """Two heads; BatchNorm and dropout tell eval mode from train mode, positions tell an image from its mirror."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bn, self.dropout = torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)
        self.first, self.second = torch.nn.LazyLinear(5), torch.nn.LazyLinear(5)

    def embed(self, x):
        v = self.dropout(self.bn(x)).flatten(1)
        return self.first(v), self.second(v)


# ---- features ----


def test_embed_images_adds_an_image_and_its_mirror():
    net = ToyNet().double()
    x = torch.randn(4, 3, 16, 8, dtype=torch.float64)
    net.train()
    net.bn.eval()
    found = embed_images(net, x)
    assert net.training and net.dropout.training and not net.bn.training  # as it was
    assert found.shape == (4, 2, 5) and found.dtype == torch.float64 and not found.requires_grad

    net.eval()
    for h in range(2):
        with torch.no_grad():
            image, mirror = net.embed(x)[h], net.embed(x.flip(3))[h]
        total = image / image.norm(dim=1, keepdim=True) + mirror / mirror.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[:, h], total / total.norm(dim=1, keepdim=True))
    torch.testing.assert_close(embed_images(net, x.flip(3)), found)


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(70)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (64, 32, 3), dtype=np.uint8)).save(path)
    return paths


extract = partial(extract_features, height=64, width=32, device="cpu", progress=False)


def test_extract_features_keeps_the_order_of_the_paths(paths):
    net = ToyNet()
    found = extract(net, paths[:5], batch_size=2)
    assert found.shape == (5, 2, 5) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
    backwards = extract(net, paths[4::-1], batch_size=5)
    np.testing.assert_allclose(found, backwards[::-1], atol=1e-6)


class SmallMemory(ToyNet):
    """Cannot take more than `most` images, mirrors included, as a GPU that is full."""

    def __init__(self, most):
        super().__init__()
        self.most, self.tried = most, []

    def embed(self, x):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().embed(x)


def test_the_batch_is_halved_until_it_fits(paths):
    net = SmallMemory(20)
    np.testing.assert_allclose(extract(net, paths, batch_size=None), extract(ToyNet(), paths, batch_size=7), atol=1e-6)
    # 32 images and 16 are too many with their mirrors; later batches start with 8.
    assert net.tried == [64, 32, *8 * [16], 12]
    for most, batch_size in ((20, 16), (1, None)):
        with pytest.raises(UserError, match="--device"):
            extract(SmallMemory(most), paths, batch_size=batch_size)


def test_precision_of_features(paths):
    net = build_id_net("AB", 4, backbone="resnet10w8").eval()
    full, low = (extract(net, paths[:5], batch_size=3, precision=precision) for precision in ("fp32", "bf16"))
    assert low.dtype == np.float32 and (low != full).any()
    np.testing.assert_allclose(np.linalg.norm(low, axis=-1), 1, atol=1e-6)  # normalised in float32
    assert ((low * full).sum(-1) > 0.999).all()
    with pytest.raises(UserError, match="fp16"):
        extract(net, paths[:5], batch_size=3, precision="fp16")


# ---- feature files ----


def test_feature_files_round_trip(tmp_path, sides):
    file = tmp_path / "f.npz"
    assert save_features(file, **sides) == [file]
    found = load_features(file, multi=True)
    for field, side in sides.items():
        loaded = getattr(found, field)
        for part in ("features", "pids", "camids"):
            np.testing.assert_array_equal(getattr(loaded, part), getattr(side, part))
    assert load_features(file).multi is None
    assert list(tmp_path.iterdir()) == [file]


def test_a_mat_has_the_releases_names_and_shapes(tmp_path, sides):
    written = save_features(tmp_path / "pytorch_result.mat", **sides)
    assert written == [tmp_path / "pytorch_result.mat", tmp_path / "multi_query.mat"]
    file = scipy.io.loadmat(tmp_path / "pytorch_result.mat")
    assert file["gallery_f"].shape == (50, 1024) and file["query_f"].shape == (30, 1024)
    assert all(file[f"{s}_{k}"].shape[0] == 1 for s in ("gallery", "query") for k in ("label", "cam"))
    assert {"mquery_f", "mquery_label", "mquery_cam"} <= set(scipy.io.loadmat(tmp_path / "multi_query.mat"))


def test_a_mat_is_read_once_it_is_converted(tmp_path, sides, monkeypatch):
    """By the command that the message names: heads that are no multiple of 512, names of different lengths."""
    side = make_side(10, heads=4, dim=256)
    side = replace(side, keys=np.array([f"{'x' * i}.jpg" for i in range(10)]))
    save_features(tmp_path / "pcb.mat", side, side)
    with pytest.raises(UserError, match="pcb.mat: convert") as refused:
        load_features(tmp_path / "pcb.mat")
    monkeypatch.chdir(tmp_path)
    exec(str(refused.value).split('"')[1])
    found = load_features(tmp_path / "pcb.npz").query
    np.testing.assert_array_equal(found.features, side.features)
    assert found.keys.tolist() == side.keys.tolist()


def save_raw(path, sides, **changes):
    arrays = {}
    for prefix in ("query", "gallery"):
        side = sides[prefix]
        flat = side.features.reshape(len(side), -1)
        arrays |= {f"{prefix}_f": flat, f"{prefix}_label": side.pids, f"{prefix}_cam": side.camids}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"query_f": np.ones((30, 512), np.float32)}, "query_f"),
        ({"gallery_f": np.full((50, 1024), np.nan, np.float32)}, "gallery_f"),
        ({"gallery_label": np.array(["a12"] * 50)}, "gallery_label"),
        ({"query_label": np.full(30, 1.5)}, "query_label"),
        ({"gallery_f": np.empty((0, 1024), np.float32)}, "gallery_f"),
        ({"query_cam": np.ones(29)}, "query_cam"),
        ({"query_cam": None}, "query_cam"),
        ({"heads": np.array(["two"])}, "heads"),
        ({"heads": np.array(3)}, "3 heads"),
        ({"gallery_key": np.array(["a.jpg", "b.jpg"])}, "gallery_key"),
        ({"gallery_key": np.arange(50)}, "gallery_key"),
    ],
    ids="dimensions nan names fractions empty length missing heads-word heads-number keys-length keys-numbers".split(),
)
def test_bad_feature_files(tmp_path, sides, changes, name):
    path = save_raw(tmp_path / "f.npz", sides, **changes)
    with pytest.raises(UserError, match=name) as error:
        load_features(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_as_the_releases_scripts_write_it(tmp_path, sides):
    """Features side by side, labels as rows, no further names; converted from its .mat files."""

    def theirs(prefix, side):
        flat = side.features.reshape(len(side), 1024)
        return {f"{prefix}_f": flat, f"{prefix}_label": side.pids.tolist(), f"{prefix}_cam": side.camids.tolist()}

    arrays = {}
    for prefix, side in zip(("query", "gallery", "mquery"), sides.values(), strict=True):
        scipy.io.savemat(tmp_path / "theirs.mat", theirs(prefix, side))
        arrays |= scipy.io.loadmat(tmp_path / "theirs.mat")
    np.savez(tmp_path / "f.npz", **arrays)
    for side, name in zip(load_features(tmp_path / "f.npz", multi=True), sides, strict=True):
        for part in PARTS:
            np.testing.assert_array_equal(getattr(side, part), getattr(sides[name], part))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(UserError, match="f.npz"):
        load_features(path)
    for content in (b"", b"not a feature file\n" * 50, b"PK\x03\x04 cut off", b"MATLAB 5.0 MAT-file" + bytes(200)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="f.npz"):
            load_features(path)


# ---- report ----


def test_results_report_and_table(sides):
    query, gallery = sides["query"], sides["gallery"]
    results = evaluate_features(query, gallery, multi=multi_of(sides), rerank="paper")
    tasks = [f"{task}{ranked}" for ranked in ("", ", re-ranked (paper)") for task in ("single query", "multi-query")]
    settings, conventions = ["primary", "both (beta 0.5)", "fine"], ["official", "standard"]
    assert [row[:3] for row in results] == [(t, s, c) for t in tasks for s in settings for c in conventions]
    for official, standard in zip(results[::2], results[1::2], strict=True):
        assert official.numbers["mAP"] <= standard.numbers["mAP"]
    arrays = per_query(results)
    assert arrays["results"].tolist() == [list(row[:3]) for row in results]
    assert arrays["ap"].shape == arrays["first"].shape == (24, 30)

    result = summary(results, query, gallery)
    assert json.loads(json.dumps(result)) == result
    assert {"queries", "without_match", "gallery", "remove_same_camera", "query_known_by_name"} < set(result)
    assert list(result["conventions"]) == conventions
    for row, ap in zip(results, arrays["ap"], strict=True):
        numbers = result["tables"][row.task][row.setting][row.convention]
        assert list(numbers) == ["rank1", "rank5", "rank10", "mAP", "mINP"] and numbers == row.numbers
        if result["without_match"] == 0:
            assert numbers["mAP"] == pytest.approx(ap.mean())
    line = next(line for line in format_table(result).splitlines() if ROW_LABELS["primary"] in line)
    assert line.split()[-2] == f"{100 * results[0].numbers['mAP']:.2f}"


@pytest.mark.parametrize(("heads", "label"), [(1, "feature"), (4, "all parts")])
def test_nets_without_two_heads_have_one_row(heads, label):
    result = report(make_side(20, heads=heads, dim=16), make_side(30, heads=heads, dim=16, seed=4))
    assert list(result["tables"]["single query"]) == [label]


def test_without_cameras_names_tell_the_query_from_its_matches(tmp_path):
    """Two images of each identity, all of them queries and gallery, by way of a file."""
    side = make_side(20, noise=4.0)
    side = replace(side, pids=np.repeat(np.arange(1, 11), 2), camids=np.zeros(20, int))
    with pytest.raises(UserError, match="--no-cameras"):
        report(side, side)
    named = replace(side, keys=np.array([f"{'x' * (i % 7)}{i % 2}.jpg" for i in range(20)]))
    save_features(tmp_path / "f.npz", named, named)
    loaded = load_features(tmp_path / "f.npz")
    first = {}
    for known, (query, gallery) in ((True, (loaded.query, loaded.gallery)), (False, (side, side))):
        result = report(query, gallery, remove_same_camera=False)
        assert result["query_known_by_name"] == known
        first[known] = result["tables"]["single query"]["fine"]["standard"]["rank1"]
    assert first[True] < first[False] == 1  # without names each finds itself


def test_command_line(tmp_path, sides, script):
    query, gallery, multi = sides["query"], sides["gallery"], multi_of(sides)
    file, out, lost = tmp_path / "f.npz", tmp_path / "out.json", tmp_path / "lost.npz"
    save_features(file, query, gallery, multi)
    done = script("reid_eval/report", file, "--multi", "--rerank", "--json", out)
    expected = report(query, gallery, multi=multi, rerank="field")
    assert done.out == format_table(expected) + "\n"
    assert json.loads(out.read_text()) == {"file": str(file)} | expected
    save_features(lost, Features(query.features, query.pids + 1000, query.camids), gallery)
    assert str(lost) in script("reid_eval/report", lost).error
    before = file.read_bytes()
    assert "--json" in script("reid_eval/report", file, "--json", file).error and file.read_bytes() == before
