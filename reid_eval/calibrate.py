"""Fit the scores of a search to the probability of "same person": `python -m reid_eval.calibrate --name latest`.

Half of the people are for the fit. Every query is searched for twice, with its person in the gallery and without, and
logistic regression learns from the first hits whether a hit is right (`calibration.Logistic`). The other half shows how
far the probabilities and a demanded false alarm rate are met.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.folders import ImageList, check_test_set, other_data_set, read_split
from data.listing import say_reading, unsaid
from data.overlap import find_overlap
from files import write_json
from reid_eval.calibration import FILE, Alarms, Calibration, Logistic, Measured
from reid_eval.features import Features, extract_data_set
from reid_eval.index import fingerprint
from reid_eval.open_set import Comparison, calibration_error, compare, find_known
from reid_eval.ranking import JUNK
from runs.folder import find_data, resolve_data_root
from runs.load import TestNet, open_net
from utils import UserError, add_batch_argument, add_net_arguments, between, check_net_arguments, pick_device, run_cli

log = logging.getLogger(__name__)
TOP = 10  # hits of a query, as many as search.py shows by default
LEAST_PEOPLE = 20
FEW_ALARMS = 100  # people who raise one; look-alikes raise them together, so chance moves a rate even more
NEARLY_FREE = 1e6  # sklearn's C: the coefficients are not shrunk, and stay finite where nobody is confused


# ------------------------------------------------------------------------------------------------ fitting
def calibrate(
    query: Features,
    gallery: Features,
    *,
    seed: int = 0,
    rate: float = 0.01,
    remove_same_camera: bool = True,
    **about: str,
) -> Calibration:
    """Fit on half of the people, drawn by `seed`, and measure on the others.

    rate   the demanded false alarm rate
    about  the fields `net`, `net_name` and `data`

    Raises UserError for fewer than 20 people with a match, and if the scores say nothing about who is shown.
    """
    parts = halves(query, gallery, seed, remove_same_camera)
    fit, test = (compare(q, g, top=TOP, remove_same_camera=remove_same_camera) for q, g in parts)
    people = [len(np.unique(q.pids)) for q, _ in parts]
    probability = fit_logistic(fit)
    hits, right = _twice(test)
    p = probability(hits, test.images)
    shown = hits > -np.inf
    pairs = _alarms(fit.impostor, test.impostor, rate)
    searches = _alarms(fit.absent[:, 0], test.absent[:, 0], rate)
    measured = Measured(
        people=people[1],
        queries=len(test.known),
        images=test.images,
        error=calibration_error(p[shown], right[shown]),
        error_first=calibration_error(p[:, 0], right[:, 0]),
        demanded=rate,
        pairs=pairs,
        searches=searches,
        probability=float(probability(np.array([searches.threshold]), fit.images)[0]),
    )
    return Calibration(
        seed=seed,
        cameras=remove_same_camera,
        people=people[0],
        queries=len(fit.known),
        images=fit.images,
        probability=probability,
        measured=measured,
        **about,
    )


def halves(
    query: Features, gallery: Features, seed: int, remove_same_camera: bool = True
) -> list[tuple[Features, Features]]:
    """Query and gallery of either half of the people. Queries without a match are left out.

    People without queries are shared out too, and distractors image by image.
    """
    known = find_known(query, gallery, remove_same_camera=remove_same_camera)
    if not known.all():
        log.warning("left out %d of %d queries, which have no match in the gallery", np.sum(~known), len(known))
    query = query.select(known)
    require_people(query.pids)
    rng = np.random.default_rng(seed)
    asked = np.unique(query.pids)
    others = np.setdiff1d(gallery.pids[gallery.pids > 0], asked)
    first = np.concatenate([ids[rng.permutation(len(ids))[: len(ids) // 2]] for ids in (asked, others)])
    nameless = (gallery.pids <= 0) & ~np.isin(gallery.pids, asked)
    in_first = np.where(nameless, rng.random(len(gallery)) < 0.5, np.isin(gallery.pids, first))
    asks_first = np.isin(query.pids, first)
    return [(query.select(asks_first == side), gallery.select(in_first == side)) for side in (True, False)]


def require_people(pids: np.ndarray) -> None:
    """Raise UserError unless at least 20 people have these identities."""
    if (people := len(set(pids.tolist()) - {JUNK})) < LEAST_PEOPLE:
        raise UserError(
            f"calibration needs {LEAST_PEOPLE} people with a query and a match in the gallery, these are {people}; "
            "give a larger data set with --data"
        )


def _twice(comparison: Comparison) -> tuple[np.ndarray, np.ndarray]:
    """The hits of all queries, with their person in the gallery and then without, and whether they are right."""
    wrong = np.zeros_like(comparison.right)
    return np.concatenate([comparison.hits, comparison.absent]), np.concatenate([comparison.right, wrong])


def fit_logistic(comparison: Comparison) -> Logistic:
    """Logistic regression on the hits of all queries. Raises UserError if higher scores are not more often right."""
    from sklearn.linear_model import LogisticRegression

    hits, right = _twice(comparison)
    first = np.broadcast_to(hits[:, :1], hits.shape)
    shown = hits > -np.inf
    numbers = np.stack([first[shown], (hits - first)[shown]], axis=1).astype(np.float64)
    # The first hit decides whether anybody is found, so it counts as much as the rest of its list.
    weights = np.broadcast_to(np.where(np.arange(TOP) == 0, TOP - 1, 1), hits.shape)
    if right.any():
        fitted = LogisticRegression(C=NEARLY_FREE, max_iter=10_000).fit(numbers, right[shown], weights[shown])
        (best, below), bias = fitted.coef_[0], fitted.intercept_[0] + np.log(comparison.images)
        if min(best, below) > 0:
            return Logistic(best=best, below=below, bias=bias)
    raise UserError("a higher score is no better sign of the same person with this net; train it further")


def _alarms(fitted: np.ndarray, tested: np.ndarray, rate: float) -> Alarms:
    """The lowest threshold with at most this rate among the scores `fitted`, and what it lets through of `tested`."""
    scores = np.sort(fitted)[::-1]
    # What scores more than this is an alarm: at most so many.
    threshold = scores[int(rate * len(scores))]
    count = int(np.count_nonzero(tested > threshold))
    return Alarms(threshold=threshold, reached=count / len(tested), count=count, of=len(tested))


# ------------------------------------------------------------------------------------------------ the command
def require_strangers(tested: TestNet, root: Path, tests: dict[str, ImageList]) -> None:
    """Raise UserError if the net was trained on people or pictures of `tests`; warn where this cannot be seen."""
    home = resolve_data_root(tested.data_root)
    with unsaid():
        try:
            train = read_split(home, "train_all", need_names=False)
        except UserError as error:
            log.warning("whether the net was trained on these people was not checked: %s", error)
            return
    by_name = other_data_set(root, home) == ""
    for line in find_overlap(train, tests, by_name=by_name):
        raise UserError(f"{root}: {line}; give data of people the net was not trained on with --data")


def describe(calibration: Calibration) -> str:
    """The numbers of a calibration as lines for a terminal."""
    m, rate = calibration.measured, f"{100 * calibration.measured.demanded:g} %"

    def line(label: str, alarms: Alarms, more: str = "") -> str:
        reached = f"{100 * alarms.reached:.2f} % ({alarms.count} of {alarms.of})"
        return f"  {label:42}{reached}, above a score of {alarms.threshold:.4f}{more}"

    return "\n".join(
        [
            f"fitted on {calibration.people} people ({calibration.queries} queries, {calibration.images:.0f} images of "
            f"others), measured on {m.people} others ({m.queries} queries, {m.images:.0f} images)",
            f"expected calibration error: {m.error:.3f}; of first hits alone: {m.error_first:.3f}",
            f"false alarm rate of {rate} demanded, reached",
            line("by pairs of two people", m.pairs),
            line("by searches for people who are not there", m.searches, f" (--min-probability {m.probability:.3f})"),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="reid_eval.calibrate", description='Fit search scores to the probability of "same person" and measure it.'
    )
    add_net_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help="query and gallery to use (default: the config's data_root)")
    parser.add_argument("--no-cameras", action="store_true", help="leave out nothing by camera")
    parser.add_argument("--seed", type=between(0), default=0, help="of the choice of people to fit on (default: 0)")
    parser.add_argument(
        "--false-alarms",
        type=between(1e-6, 0.5, float),
        default=0.01,
        metavar="RATE",
        help="demanded rate (default: 0.01)",
    )
    add_batch_argument(parser, "--batchsize")
    args = parser.parse_args(argv)
    check_net_arguments(args)

    device, cameras = pick_device(args.device), not args.no_cameras
    tested = open_net(args, device)
    root = find_data(args.data, "--data", tested.data_root, tested.data_source)
    with unsaid():
        check_test_set(root, cameras=cameras)
    sides = {split: read_split(root, split) for split in ("query", "gallery")}
    say_reading(sides)
    require_people(np.intersect1d(sides["query"].pids, sides["gallery"].pids))
    require_strangers(tested, root, sides)
    sets = extract_data_set(tested.net, root, size=tested.size, batch_size=args.batchsize, device=device)
    about = dict(net=fingerprint(tested.net, tested.size), net_name=tested.title, data=str(root))
    how = dict(seed=args.seed, rate=args.false_alarms, remove_same_camera=cameras)
    calibration = calibrate(sets.query, sets.gallery, **how, **about)
    if (deciding := args.false_alarms * calibration.people) < FEW_ALARMS:
        log.warning(
            "about %.0f of %d people decide the false alarm rate of searches; chance may move it by half or more",
            deciding,
            calibration.people,
        )
    print(f"{tested.title}, calibrated on {root}\n{describe(calibration)}")
    write_json(tested.folder / FILE, calibration.model_dump())
    print(f"written to {tested.folder / FILE}")


if __name__ == "__main__":
    run_cli(main)
