"""Ranking and re-ranking: hand-worked cases, golden numbers, slow references (spec section 9)."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_eval import ranking
from reid_eval.ranking import match_ranks, rank
from reid_eval.reranking import multi_query, rerank
from utils import UserError

GOLDEN = Path(__file__).parent.parent / "golden"


def rank_scores(scores, q_pids, g_pids, q_camids, g_camids, **options):
    return rank(np.asarray(scores), None, q_pids, g_pids, q_camids, g_camids, **options)["scores"]


# ---- hand-worked cases ----


def test_junk_same_camera_and_distractors_by_hand():
    """Kept, by score: distractor, match, wrong, match. Ranks of the matches: 2 and 4."""
    g_pids = np.array([7, 7, -1, 0, 7, 3, 7])
    g_camids = np.array([1, 2, 2, 2, 300, 2, 1])
    scores = [[0.99, 0.8, 0.95, 0.9, 0.6, 0.7, 0.98]]
    results = rank_scores(scores, [7], g_pids, np.array([1]), g_camids)
    official, standard = results["official"], results["standard"]
    assert official.first.tolist() == [2] and official.inp[0] == pytest.approx(2 / 4)
    assert standard.cmc[:4].tolist() == [0, 1, 1, 1]
    assert standard.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    # Precision before the hits: 0/1 and 1/3.
    assert official.mAP == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


def test_a_query_without_a_match_counts_in_the_official_denominator_only():
    results = rank_scores([[0.9, 0.1], [0.9, 0.1]], [1, 5], np.array([1, 2]), np.array([1, 1]), np.array([2, 2]))
    official, standard = results["official"], results["standard"]
    assert (official.mAP, official.cmc[0]) == (0.5, 0.5)
    assert (standard.mAP, standard.cmc[0]) == (1.0, 1.0)
    assert official.mINP == standard.mINP == 1.0
    assert (official.queries, official.without_match) == (2, 1)
    assert official.first.tolist() == [1, 0] and official.ap.tolist() == [1, 0]


def test_camera_numbers_of_two_digits_are_not_one_digit():
    """Cameras 1 and 11, 12 are different; a query of camera 11 drops only camera 11."""
    found = rank_scores([[3.0, 2.0, 1.0]], [4], np.full(3, 4), np.array([11]), np.array([1, 11, 12]))
    assert found["standard"].first.tolist() == [1] and found["standard"].inp.tolist() == [1.0]


def test_equal_scores_keep_the_gallerys_order():
    row = np.array([0.5, 0.7, 0.5, 0.5, 0.7], np.float32)
    assert match_ranks(row, np.array([2, 3])).tolist() == [4, 5]
    assert match_ranks(row, np.array([0, 4])).tolist() == [2, 3]


@pytest.mark.parametrize("scattered", [False, True])
def test_equal_scores_keep_the_gallerys_order_in_long_rows(scattered):
    """Longer than what is sorted around the matches; every rank against a stable argsort of the whole row."""
    rng = np.random.default_rng(0)
    row = rng.integers(0, 40, 5000).astype(np.float32)
    for _ in range(20):
        near = rng.integers(0, 4900)
        matches = np.sort(
            rng.choice(5000, 12, replace=False) if scattered else near + rng.choice(100, 12, replace=False)
        )
        expected = np.flatnonzero(np.isin(np.argsort(-row, kind="stable"), matches)) + 1
        assert match_ranks(row, matches).tolist() == expected.tolist()


def test_without_cameras_only_the_image_itself_is_dropped():
    labels = [1], np.array([1, 2, 1, -1]), None, None
    scores = [[0.9, 0.8, 0.6, 0.7]]
    keys = {"q_keys": np.array(["a"]), "g_keys": np.array(["a", "b", "c", "d"])}
    assert rank_scores(scores, *labels, remove_same_camera=False)["standard"].first.tolist() == [1]
    found = rank_scores(scores, *labels, remove_same_camera=False, **keys)["standard"]
    assert found.first.tolist() == [3] and found.mAP == pytest.approx(1 / 3)  # junk is a wrong answer here


def test_the_image_itself_is_known_by_name_and_identity():
    """Folders of several identities may hold the same file names: only the query's own entry is dropped."""
    names = np.array(["1.jpg", "1.jpg", "2.jpg"])
    scores = [[1.0, 0.9, 0.8]]
    labels = [7], np.array([7, 8, 7]), None, None
    found = rank_scores(scores, *labels, remove_same_camera=False, q_keys=names[:1], g_keys=names)["standard"]
    assert found.first.tolist() == [2] and found.inp.tolist() == [0.5]
    # With cameras the labels decide, whatever the names are.
    with_cameras = rank_scores(scores, *labels[:2], np.array([1]), np.array([2, 2, 2]), q_keys=names[:1], g_keys=names)[
        "standard"
    ]
    assert with_cameras.first.tolist() == [1] and with_cameras.mAP == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("remove_same_camera", [True, False])
def test_a_junk_query_has_no_match(remove_same_camera):
    g_pids, cameras = np.array([-1, -1, 3]), np.array([1, 2, 2])
    options = {
        "remove_same_camera": remove_same_camera,
        "q_keys": np.array(["a", "b"]),
        "g_keys": np.array(["a", "c", "d"]),
    }
    found = rank_scores([[3.0, 2, 1]] * 2, np.array([-1, 3]), g_pids, np.array([1, 1]), cameras, **options)["standard"]
    assert found.without_match == 1
    assert found.first.tolist() == [0, 1 if remove_same_camera else 3]


@pytest.mark.parametrize("junk", [np.arange(30), np.arange(0, 90, 3), np.arange(90)[60:]])
def test_junk_takes_no_part_wherever_it_lies(junk, monkeypatch):
    monkeypatch.setattr(ranking, "_TILE", 16)
    query, gallery, q_pids, g_pids, q_camids, g_camids = golden_data(4, 20, 90, 6, 3)
    g_pids = np.where(g_pids == -1, 0, g_pids)
    g_pids[junk] = -1
    keep = g_pids != -1
    found = rank(query, gallery, q_pids, g_pids, q_camids, g_camids)["feature"]["official"]
    scores = query @ gallery[keep].T
    expected = rank_scores(scores, q_pids, g_pids[keep], q_camids, g_camids[keep])["official"]
    np.testing.assert_allclose(found.ap, expected.ap, atol=1e-12)
    assert found.first.tolist() == expected.first.tolist()


def test_a_perfect_ranking_gives_one_under_both_conventions():
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, 9), 5)
    centers = np.eye(9, 16, dtype=np.float32)
    features = centers[pids] + 0.01 * rng.standard_normal((40, 16)).astype(np.float32)
    for by_convention in rank(
        centers[1:], features, np.arange(1, 9), pids, np.zeros(8, int), np.ones(40, int)
    ).values():
        for result in by_convention.values():
            assert (result.mAP, result.mINP, result.cmc[0]) == (1, 1, 1)


def test_settings_weight_the_heads_in_one_pass(monkeypatch):
    monkeypatch.setattr(ranking, "_CHUNK_BYTES", 2000)  # a few queries a chunk
    data = golden_data(3, 30, 90, 12, 4)
    query, gallery, labels = data[0].reshape(30, 2, 32), data[1].reshape(90, 2, 32), data[2:]
    results = rank(query, gallery, *labels)
    assert list(results) == ["primary", "both (beta 0.5)", "fine"]
    for name, (a, b) in ranking.SETTINGS.items():
        scores = a * query[:, 0] @ gallery[:, 0].T + np.float32(b) * (query[:, 1] @ gallery[:, 1].T)
        expected = rank_scores(scores, *labels)
        for convention in ranking.CONVENTIONS:
            np.testing.assert_allclose(results[name][convention].ap, expected[convention].ap, atol=1e-12)


# ---- golden numbers ----


def golden_data(seed, nq, ng, ids, cams, dim=64, noise=1.5):
    """Query and gallery features, then q_pids, g_pids, q_camids, g_camids, as the golden file's rule draws them."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((ids + 1, dim)).astype(np.float32)
    cam_offset = 0.7 * rng.standard_normal((cams + 1, dim)).astype(np.float32)
    g_pids, g_camids = rng.integers(-1, ids + 1, ng), rng.integers(1, cams + 1, ng)
    q_pids, q_camids = rng.integers(1, ids + 3, nq), rng.integers(1, cams + 1, nq)

    def features(pids, camids):
        unknown = rng.standard_normal((len(pids), dim))
        known = (pids > 0) & (pids <= ids)
        base = np.where(known[:, None], centers[np.where(known, pids, 0)], unknown)
        f = (base + cam_offset[camids] + noise * rng.standard_normal((len(pids), dim))).astype(np.float32)
        for half in (f[:, : dim // 2], f[:, dim // 2 :]):
            half /= np.linalg.norm(half, axis=1, keepdims=True)
        return f

    query = features(q_pids, q_camids)
    gallery = features(g_pids, g_camids)
    return query, gallery, q_pids, g_pids, q_camids, g_camids


def golden_cases():
    folders = {"tree": GOLDEN}
    if os.environ.get("GOLDEN_DIR"):
        folders["GOLDEN_DIR"] = Path(os.environ["GOLDEN_DIR"])
    for name, folder in folders.items():
        path = folder / "ranking.json"
        for seed, case in json.loads(path.read_text()).items() if path.is_file() else ():
            yield pytest.param(int(seed), case, id=f"{name}-{seed}")


@pytest.mark.parametrize(("seed", "case"), list(golden_cases()))
def test_golden_ranking(seed, case):
    results = rank(*golden_data(seed, **case["args"]))["feature"]
    official, standard = results["official"], results["standard"]
    for result, expected in ((official, case["official"]), (standard, case["fastreid"])):
        for k in (1, 5, 10):
            assert result.cmc[k - 1] == pytest.approx(expected[f"rank{k}"], abs=1e-6)
        assert result.mAP == pytest.approx(expected["mAP"], abs=1e-6)
    assert standard.mINP == pytest.approx(case["fastreid"]["mINP"], abs=1e-6)
    assert official.queries == case["official"]["n"]
    assert official.queries - official.without_match == case["official"]["valid"]


# ---- properties ----


def slow_reference(scores, q_pids, g_pids, q_camids, g_camids):
    """One argsort and set operations per query: (ap official, ap standard, inp, first), 0 without a match."""
    rows = []
    for i in range(len(q_pids)):
        same, here = set(np.flatnonzero(g_pids == q_pids[i])), set(np.flatnonzero(g_camids == q_camids[i]))
        junk = set(np.flatnonzero(g_pids == -1))
        order = [g for g in np.argsort(-scores[i], kind="stable") if g not in (same & here) | junk]
        positions = [r for r, g in enumerate(order) if g in same - here - junk]
        trapezoidal = precision = 0.0
        for n, r in enumerate(positions):
            before = n / r if r else 1.0
            trapezoidal += (before + (n + 1) / (r + 1)) / 2 / len(positions)
            precision += (n + 1) / (r + 1) / len(positions)
        inp, first = (len(positions) / (positions[-1] + 1), positions[0] + 1) if positions else (0.0, 0)
        rows.append((trapezoidal, precision, inp, first))
    return np.array(rows).T


@st.composite
def problems(draw):
    """Scores with many ties (a few values) or without, labels with junk, distractors and missing identities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nq, ng = draw(st.integers(1, 6)), draw(st.integers(1, 60))
    ids, values = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, None]))
    distinct = rng.permutation(nq * ng).reshape(nq, ng).astype(np.float32)
    scores = distinct if values is None else rng.integers(0, values, (nq, ng)).astype(np.float32)
    labels = (
        rng.integers(-1, ids + 2, nq),
        rng.integers(-1, ids + 1, ng),
        rng.integers(0, 3, nq),
        rng.integers(0, 3, ng),
    )
    return scores, labels, values is None


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([(200, 1024, 1 << 18), (200, 0, 1 << 18), (0, 0, 1 << 18), (200, 1024, 100)]))
def test_agrees_with_the_slow_reference(problem, ways):
    """`ways` to count: beside the matches in the gallery, each match on its own, the whole row sorted, in pieces."""
    scores, labels, _ = problem
    official, standard, inp, first = slow_reference(scores, *labels)
    valid = first > 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("_COUNT_AT_MOST", "_SORT_AT_MOST", "_COMPARE_BYTES"), ways, strict=True):
            patch.setattr(ranking, name, value)
        if not valid.any():
            with pytest.raises(UserError, match="no query has a match"):
                rank_scores(scores, *labels)
            return
        results = rank_scores(scores, *labels)
    np.testing.assert_allclose(results["official"].ap, official, atol=1e-12)
    np.testing.assert_allclose(results["standard"].ap, standard, atol=1e-12)
    np.testing.assert_allclose(results["standard"].inp, inp, atol=1e-12)
    assert results["standard"].first.tolist() == first.tolist()
    assert results["official"].mAP == pytest.approx(official.mean())
    assert results["standard"].mAP == pytest.approx(standard[valid].mean())
    assert results["standard"].mINP == results["official"].mINP == pytest.approx(inp[valid].mean())
    assert results["official"].cmc[4] == pytest.approx(((first > 0) & (first <= 5)).mean())
    assert results["standard"].cmc[4] == pytest.approx((first[valid] <= 5).mean())


@settings(max_examples=50, deadline=None)
@given(problems().filter(lambda p: p[2]), st.integers(0, 2**32 - 1))
def test_permuting_the_gallery_changes_nothing(problem, seed):
    scores, (q_pids, g_pids, q_camids, g_camids), _ = problem
    order = np.random.default_rng(seed).permutation(len(g_pids))
    try:
        expected = rank_scores(scores, q_pids, g_pids, q_camids, g_camids)
    except UserError:
        return
    found = rank_scores(scores[:, order], q_pids, g_pids[order], q_camids, g_camids[order])
    for convention, result in found.items():
        assert result.ap.tolist() == expected[convention].ap.tolist()
        assert result.cmc.tolist() == expected[convention].cmc.tolist()


def test_memory_grows_with_a_chunk_and_not_with_the_scores(monkeypatch):
    """500,000 gallery images scaled down: 300 x 60,000 scores of two heads fill 144 MB, two chunks of 4 MB suffice."""
    monkeypatch.setattr(ranking, "_CHUNK_BYTES", 4 << 20)
    rng = np.random.default_rng(0)
    query, gallery = (rng.standard_normal((n, 2, 4), dtype=np.float32) for n in (300, 60_000))
    q_pids, g_pids = rng.integers(1, 5000, 300), np.sort(rng.integers(-1, 5000, 60_000))
    q_camids, g_camids = np.zeros(300, int), np.ones(60_000, int)
    tracemalloc.start()
    try:
        rank(query, gallery, q_pids, g_pids, q_camids, g_camids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


# ---- bad input ----


def test_bad_input_is_one_clear_line():
    q, g = np.ones((2, 2, 4), np.float32), np.ones((3, 2, 4), np.float32)
    labels = np.array([1, 2]), np.array([1, 2, 3]), np.array([1, 1]), np.array([2, 2, 2])
    with pytest.raises(UserError, match="extract both with the same model"):
        rank(q, np.ones((3, 2, 5), np.float32), *labels)
    with pytest.raises(UserError, match="NaN or infinity in row 1"):
        rank(q, np.where(np.arange(3)[:, None, None] == 1, np.nan, g), *labels)
    with pytest.raises(UserError, match="the gallery is empty"):
        rank(q, g[:0], labels[0], labels[1][:0], labels[2], labels[3][:0])
    with pytest.raises(UserError, match="no query has a match"):
        rank(q, g, labels[0] + 10, *labels[1:])
    with pytest.raises(UserError, match="--no-cameras"):
        rank(q, g, labels[0], labels[1], None, None)
    with pytest.raises(UserError, match="another number of gallery"):
        rank(q, g, labels[0], labels[1][:2], *labels[2:])
    with pytest.raises(UserError, match="scores have shape"):
        rank(np.ones((2, 4)), None, *labels)
    with pytest.raises(UserError, match="has 1 weights"):
        rank(q, g, *labels, settings={"x": (1,)})
    with pytest.raises(UserError, match="only weights of 0"):
        rank(q, g, *labels, settings={"x": (0, 0)})


def test_scores_may_be_whole_numbers():
    found = rank_scores([[3, 2, 1]], [4], np.array([4, 5, 4]), np.array([1]), np.array([1, 2, 2]))
    assert found["standard"].first.tolist() == [2]


# ---- re-ranking and multi-query ----


def slow_rerank(x, nq, k1, k2, lambda_value):
    """The formulas of Zhong et al. (2017), with sets and loops."""
    n = len(x)
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    d /= d.max(1, keepdims=True)
    order = [[p] + [g for g in np.argsort(d[p]) if g != p] for p in range(n)]

    def near(p, k):
        return set(order[p][: k + 1])

    def reciprocal(p, k):
        return {g for g in near(p, k) if p in near(g, k)}

    def extended(p):
        base = reciprocal(p, k1)
        result = set(base)
        for q in base:
            more = reciprocal(q, round(k1 / 2))
            if len(base & more) >= 2 / 3 * len(more):
                result |= more
        return result

    v = np.zeros((n, n))
    for p in range(n):
        for g in extended(p):
            v[p, g] = np.exp(-d[p, g])
    v = np.stack([v[order[p][:k2]].mean(0) for p in range(n)])
    result = np.empty((nq, n - nq))
    for p in range(nq):
        for g in range(nq, n):
            jaccard = 1 - np.minimum(v[p], v[g]).sum() / np.maximum(v[p], v[g]).sum()
            result[p, g - nq] = (1 - lambda_value) * jaccard + lambda_value * d[p, g]
    return result


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (5, 1, 0.0), (7, 3, 1.0), (90, 70, 0.3)])
def test_reranking_is_the_papers(k1, k2, lambda_value, monkeypatch):
    monkeypatch.setattr("reid_eval.reranking._CHUNK_BYTES", 20_000)
    query, gallery, q_pids, *_ = golden_data(5, 15, 45, 8, 3, dim=16, noise=0.7)
    found = rerank(query[:, None], gallery[:, None], k1=k1, k2=k2, lambda_value=lambda_value)
    joint = np.concatenate([query, gallery]).astype(np.float64)
    np.testing.assert_allclose(found, slow_rerank(joint, 15, k1, k2, lambda_value), atol=2e-6)


def test_reranking_weights_the_heads():
    query, gallery, *_ = golden_data(6, 10, 50, 8, 3, dim=16)
    q, g = query.reshape(10, 2, 8), gallery.reshape(50, 2, 8)
    np.testing.assert_array_equal(rerank(q, g, weights=(1, 0)), rerank(q[:, :1], g[:, :1]))
    scaled = [f * np.array([1, 0.5**0.5], np.float32)[:, None] for f in (q, g)]
    np.testing.assert_allclose(rerank(q, g, weights=(1, 0.5)), rerank(*scaled), atol=1e-6)
    with pytest.raises(UserError, match="none negative"):
        rerank(q, g, weights=(1, -1))
    with pytest.raises(UserError, match="k must be >= 1"):
        rerank(q, g, k1=0)


def test_multi_query_is_the_plain_mean_over_identity_and_camera():
    features = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    pids, camids = np.array([5, 5, 5, 12]), np.array([1, 11, 1, 1])
    found = multi_query(features, pids, camids, np.array([12, 5]), np.array([1, 1]))
    np.testing.assert_allclose(found, [features[3], (features[0] + features[2]) / 2])
    assert found.dtype == np.float32
    with pytest.raises(UserError, match="identity 12 in camera 11"):
        multi_query(features, pids, camids, np.array([12]), np.array([11]))
