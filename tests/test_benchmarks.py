"""The benchmarks: their references agree with what they measure, and they run at small sizes."""

import json
import platform
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.machine import median_ratio
from benchmarks.ranking import KINDS, make_problem, measure_speed, plain_reference, rank_sides
from reid_eval.features import Features
from reid_eval.ranking import SETTINGS
from utils import ROOT


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_reference_gives_our_numbers(kind, shuffled):
    query, gallery = make_problem(25, 300, 16, signal=KINDS[kind])
    if shuffled:
        order = np.random.default_rng(0).permutation(len(gallery))
        gallery = Features(gallery.features[order], gallery.pids[order], gallery.camids[order])
    results = rank_sides(query, gallery)
    for name, weights in SETTINGS.items():
        expected = plain_reference(query, gallery, weights)
        for convention, ranking in results[name].items():
            np.testing.assert_allclose(ranking.ap, expected[convention], atol=1e-12)
            np.testing.assert_allclose(ranking.inp, expected["inp"], atol=1e-12)
            assert ranking.first.tolist() == expected["first"].tolist()


def test_the_two_kinds_of_features_are_good_and_at_chance_level():
    found = measure_speed(30, 800, 64, repeats=1, sample=3)
    assert min(found["good"]["mAP"].values()) > 0.5
    assert max(found["chance"]["mAP"].values()) < 0.15
    for kind in KINDS:
        assert {len(seconds) for seconds in found[kind]["seconds"].values()} == {1}


def test_ratios_are_taken_round_by_round():
    assert median_ratio([2.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == 3.0


def run(*arguments, folder):
    command = [sys.executable, "-m", "benchmarks.ranking", "--results", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path):
    sizes = ["--queries", "10", "--gallery", "200", "--dim", "16", "--repeats", "1", "--sample", "2"]
    done = run(*sizes, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(found) == ["ranking-memory", "ranking-rerank", "ranking-speed"]
    for result in found.values():
        assert result["sizes"] == {"queries": 10, "gallery": 200, "dim": 16}
        assert {"date", "cpu", "cores", "load", "numpy", "python"} <= set(result["machine"])
        assert platform.node() not in json.dumps(result["machine"]).split('"')
    assert found["ranking-memory"]["features"] == 210 * 16 * 4
    assert 0 < found["ranking-memory"]["beyond_features"] < 2e9
    assert found["ranking-rerank"]["images"] == 210
    assert found["ranking-speed"]["good"]["ranking / bare product"] > 0


def test_bad_sizes_are_one_line(tmp_path):
    for option, value in (("--dim", "3"), ("--repeats", "0"), ("--gallery", "5")):
        done = run(option, value, folder=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {option} {value}: must be") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
