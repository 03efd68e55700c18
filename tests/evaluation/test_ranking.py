"""Ranking and re-ranking: hand-worked cases, golden numbers, slow references."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ranking import plain_reference
from reid_eval import ranking
from reid_eval.features import Features
from reid_eval.ranking import first_entries, rank
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


def test_without_cameras_only_the_query_image_is_left_out():
    labels = [1], np.array([1, 2, 1, -1]), None, None
    scores = [[0.9, 0.8, 0.6, 0.7]]
    assert rank_scores(scores, *labels, remove_same_camera=False)["standard"].first.tolist() == [1]
    # Folders of several identities may hold the same file names.
    keys = {"q_keys": np.array(["a"]), "g_keys": np.array(["a", "a", "c", "d"])}
    result = rank_scores(scores, *labels, remove_same_camera=False, **keys)["standard"]
    assert result.first.tolist() == [3] and result.mAP == pytest.approx(1 / 3)  # junk is a wrong answer here
    # With cameras the labels decide, whatever the names are.
    result = rank_scores(scores, *labels[:2], np.array([1]), np.full(4, 2), **keys)["standard"]
    assert result.first.tolist() == [1] and result.mAP == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("remove_same_camera", [True, False])
def test_a_junk_query_has_no_match(remove_same_camera):
    g_pids, cameras = np.array([-1, -1, 3]), np.array([1, 2, 2])
    options = {
        "remove_same_camera": remove_same_camera,
        "q_keys": np.array(["a", "b"]),
        "g_keys": np.array(["a", "c", "d"]),
    }
    result = rank_scores([[3.0, 2, 1]] * 2, np.array([-1, 3]), g_pids, np.array([1, 1]), cameras, **options)["standard"]
    assert result.without_match == 1
    assert result.first.tolist() == [0, 1 if remove_same_camera else 3]


@pytest.mark.parametrize("junk", [np.arange(30), np.arange(0, 90, 3), np.arange(90)[60:]])
def test_junk_takes_no_part_wherever_it_lies(junk, monkeypatch):
    monkeypatch.setattr(ranking, "_TILE", 16)
    query, gallery, q_pids, g_pids, q_camids, g_camids = golden_data(4, 20, 90, 6, 3)
    g_pids = np.where(g_pids == -1, 0, g_pids)
    g_pids[junk] = -1
    keep = g_pids != -1
    result = rank(query, gallery, q_pids, g_pids, q_camids, g_camids)["feature"]["official"]
    scores = query @ gallery[keep].T
    expected = rank_scores(scores, q_pids, g_pids[keep], q_camids, g_camids[keep])["official"]
    np.testing.assert_allclose(result.ap, expected.ap, atol=1e-12)
    assert result.first.tolist() == expected.first.tolist()


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


@st.composite
def problems(draw):
    """Scores with many ties (a few values) or without, labels with junk, distractors and missing identities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nq, ng = draw(st.integers(1, 6)), draw(st.integers(1, 60))
    ids, values = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, None]))
    distinct = rng.permutation(nq * ng).reshape(nq, ng).astype(np.float32)
    scores = distinct if values is None else rng.integers(0, values, (nq, ng)).astype(np.float32)
    pids, camids = (rng.integers(-1, ids + 2, nq), rng.integers(-1, ids + 1, ng)), rng.integers(0, 3, nq + ng)
    return scores, (*pids, camids[:nq], camids[nq:])


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([(200, 1024, 1 << 18), (200, 0, 1 << 18), (0, 0, 1 << 18), (200, 1024, 100)]))
def test_agrees_with_the_plain_reference_of_the_benchmark(problem, ways):
    """`ways` to count: beside the matches in the gallery, each match on its own, the whole row sorted, in pieces."""
    scores, labels = problem
    q_pids, g_pids, q_camids, g_camids = labels
    # Products with the rows of the identity matrix are the scores.
    query = Features(scores[:, None], q_pids, q_camids)
    gallery = Features(np.eye(len(g_pids), dtype=np.float32)[:, None], g_pids, g_camids)
    official, standard, inp, first = plain_reference(query, gallery, (1.0,)).values()
    valid = first > 0
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("_COUNT_AT_MOST", "_SORT_AT_MOST", "_COMPARE_BYTES"), ways, strict=True):
            patch.setattr(ranking, name, value)
        if not valid.any():
            with pytest.raises(UserError):
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


# ---- lists ----


def side(pids, camids, keys=None, features=None):
    features = np.ones((len(pids), 1, 1), np.float32) if features is None else features
    return Features(features, np.array(pids), np.array(camids), None if keys is None else np.array(keys))


def test_lists_are_those_of_a_full_stable_sort():
    rng = np.random.default_rng(0)
    # Small whole numbers, so that many scores are equal, and exactly so.
    query, gallery = (rng.integers(-2, 3, (n, 2, 4)).astype(np.float32) for n in (9, 50))
    full = np.einsum("qd,gd->qg", query[:, 0], gallery[:, 0]) + 0.5 * np.einsum("qd,gd->qg", query[:, 1], gallery[:, 1])
    lists = first_entries(side([1] * 9, [1] * 9, None, query), side([2] * 50, [1] * 50, None, gallery), top=7)
    order = np.argsort(-full, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal([[e.index for e in entries] for entries in lists], order)
    np.testing.assert_array_equal([[e.score for e in entries] for entries in lists], np.take_along_axis(full, order, 1))


def test_marks_worked_by_hand():
    scores = np.array([9, 8, 7, 6, 5, 4], np.float32).reshape(-1, 1, 1)
    gallery = side([5, -1, 7, 5, 0, 5], [1, 2, 2, 2, 1, 3], ["q", "b", "c", "d", "e", "f"], scores)
    query = side([5], [1], ["q"])
    entries = first_entries(query, gallery)[0]
    # Identity and camera of the query; identity -1; the fifth is a distractor.
    assert [e.mark for e in entries] == ["junk", "junk", "wrong", "right", "wrong", "right"]
    assert [e.rank for e in entries] == [None, None, 1, 2, 3, 4]
    assert [(e.index, e.score) for e in entries] == list(enumerate([9, 8, 7, 6, 5, 4]))
    assert [e.index for e in first_entries(query, gallery, top=2)[0]] == [0, 1, 2, 3]
    no_cameras = first_entries(query, gallery, remove_same_camera=False)[0]
    assert [e.mark for e in no_cameras] == ["junk", "wrong", "wrong", "right", "wrong", "right"]
    assert [e.rank for e in no_cameras] == [None, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("remove_same_camera", [True, False])
def test_lists_agree_with_the_ranking(remove_same_camera):
    rng = np.random.default_rng(1)
    sides = []
    for n in (40, 30):
        features = rng.standard_normal((n, 2, 8)).astype(np.float32)
        sides.append(side(rng.integers(-1, 5, n), rng.integers(1, 4, n), rng.integers(0, 20, n).astype(str), features))
    query, gallery = sides
    lists = first_entries(query, gallery, top=15, remove_same_camera=remove_same_camera)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    how = dict(remove_same_camera=remove_same_camera, q_keys=query.keys, g_keys=gallery.keys)
    ranking = rank(query.features, gallery.features, *labels, **how)["both (beta 0.5)"]["standard"]
    for entries, first, ap in zip(lists, ranking.first, ranking.ap, strict=True):
        ranks = [e.rank for e in entries if e.mark == "right"]
        assert [e.rank for e in entries if e.rank] == list(range(1, 1 + sum(e.rank is not None for e in entries)))
        assert (ranks[0] if ranks else 0) == (first if first <= (entries[-1].rank or 0) or ranks else 0)
        if len(entries) == len(gallery) and ranks:  # the whole list is there: so is its AP
            assert ap == pytest.approx(np.mean([(i + 1) / r for i, r in enumerate(ranks)]))


# ---- bad input ----


Q, G = np.ones((2, 2, 4), np.float32), np.ones((3, 2, 4), np.float32)
LABELS = np.array([1, 2]), np.array([1, 2, 3]), np.array([1, 1]), np.array([2, 2, 2])


@pytest.mark.parametrize(
    ("query", "gallery", "labels", "options"),
    [
        (Q, np.ones((3, 2, 5), np.float32), LABELS, {}),
        (Q, np.where(np.arange(3)[:, None, None] == 1, np.nan, G), LABELS, {}),
        (1e25 * Q, 1e25 * G, LABELS, {}),  # finite, but their products are not
        (Q, G[:0], (LABELS[0], LABELS[1][:0], LABELS[2], LABELS[3][:0]), {}),
        (Q, G, (LABELS[0] + 10, *LABELS[1:]), {}),
        (Q, G, (*LABELS[:2], None, None), {}),
        (Q, G, (LABELS[0], LABELS[1][:2], *LABELS[2:]), {}),
        (np.ones((2, 4)), None, LABELS, {}),
        (Q, G, LABELS, {"settings": {"x": (1,)}}),
        (Q, G, LABELS, {"settings": {"x": (0, 0)}}),
    ],
    ids="dimensions nan overflow empty no-match no-cameras labels scores weights zero-weights".split(),
)
def test_bad_input_is_refused(query, gallery, labels, options):
    with pytest.raises(UserError):
        rank(query, gallery, *labels, **options)


# ---- re-ranking and multi-query ----


def slow_rerank(x, nq, k1, k2, lambda_value, variant):
    """The formulas of Zhong et al. (2017), or what the field makes of them, with sets and loops."""
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
            part = 3 * len(base & more) - 2 * len(more)
            if part > 0 or (part == 0 and variant == "paper"):
                result |= more
        return result

    v = np.zeros((n, n))
    for p in range(n):
        for g in extended(p):
            v[p, g] = np.exp(-d[p, g])
        if variant == "field":
            v[p] /= v[p].sum()
    v = np.stack([v[order[p][:k2]].mean(0) for p in range(n)])
    result = np.empty((nq, n - nq))
    for p in range(nq):
        for g in range(nq, n):
            m = np.minimum(v[p], v[g]).sum()
            jaccard = 1 - m / (2 - m if variant == "field" else np.maximum(v[p], v[g]).sum())
            result[p, g - nq] = (1 - lambda_value) * jaccard + lambda_value * d[p, g]
    return result


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (5, 1, 0.0), (7, 3, 1.0), (90, 70, 0.3)])
@pytest.mark.parametrize("variant", ["field", "paper"])
def test_reranking_is_its_formulas(k1, k2, lambda_value, variant, monkeypatch):
    monkeypatch.setattr("reid_eval.reranking._CHUNK_BYTES", 20_000)
    query, gallery, q_pids, *_ = golden_data(5, 15, 45, 8, 3, dim=16, noise=0.7)
    how = dict(k1=k1, k2=k2, lambda_value=lambda_value, variant=variant)
    result = rerank(query[:, None], gallery[:, None], **how)
    joint = np.concatenate([query, gallery]).astype(np.float64)
    np.testing.assert_allclose(result, slow_rerank(joint, 15, **how), atol=2e-6)


def test_reranking_weights_the_heads():
    query, gallery, *_ = golden_data(6, 10, 50, 8, 3, dim=16)
    q, g = query.reshape(10, 2, 8), gallery.reshape(50, 2, 8)
    np.testing.assert_array_equal(rerank(q, g, weights=(1, 0)), rerank(q[:, :1], g[:, :1]))
    scaled = [f * np.array([1, 0.5**0.5], np.float32)[:, None] for f in (q, g)]
    np.testing.assert_allclose(rerank(q, g, weights=(1, 0.5)), rerank(*scaled), atol=1e-6)
    with pytest.raises(UserError):
        rerank(q, g, weights=(1, -1))
    with pytest.raises(UserError):
        rerank(q, g, k1=0)
    with pytest.raises(UserError):
        rerank(q, g, variant="ours")


def test_an_overlap_of_exactly_two_thirds_expands_in_the_papers_variant_alone():
    query, gallery, *_ = golden_data(5, 15, 45, 8, 3, dim=16, noise=0.7)
    field, paper = (rerank(query[:, None], gallery[:, None], variant=variant) for variant in ("field", "paper"))
    assert np.abs(field - paper).max() > 1e-3


def test_multi_query_is_the_plain_mean_over_identity_and_camera():
    features = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    pids, camids = np.array([5, 5, 5, 12]), np.array([1, 11, 1, 1])
    result = multi_query(features, pids, camids, np.array([12, 5]), np.array([1, 1]))
    np.testing.assert_allclose(result, [features[3], (features[0] + features[2]) / 2])
    assert result.dtype == np.float32
    with pytest.raises(UserError):
        multi_query(features, pids, camids, np.array([12]), np.array([11]))
