"""From the scores of a search to the probability of "same person": `python -m reid_eval.calibrate --name latest`.

What a score means depends on the search. A hit of 0.9 means less in a larger gallery, where more people look alike, and
less again where it is the best hit than below one of 0.95, because most people in a gallery have several images there.
So the probability is a logistic function of two numbers, the score of the query's best hit and how far this hit lies
below it, and its odds are divided by the number of gallery images:

    log odds = best * (score of the best hit) + below * (score - score of the best hit) + bias - log(images)

It is fitted on the first hits of queries that are searched for twice, with their person in the gallery and without, and
tested on other people. Down a list it falls, as the scores do.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if not __package__:  # run as a file, from any directory
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.folders import ImageList, check_test_set, other_data_set, read_split
from data.listing import say_reading, unsaid
from data.overlap import find_overlap
from files import write_json
from reid_eval.features import Features, extract_data_set
from reid_eval.index import fingerprint
from reid_eval.open_set import Comparison, calibration_error, compare, find_known
from reid_eval.ranking import JUNK
from runs.folder import find_data, resolve_data_root
from runs.load import TestNet, open_net
from utils import UserError, add_batch_argument, add_net_arguments, between, check_net_arguments, pick_device, run_cli

log = logging.getLogger(__name__)
FILE, FORMAT = "calibration.json", 1
TOP = 10  # hits of a query, as many as search.py shows by default
LEAST_PEOPLE = 20
FEW_ALARMS = 20  # people who raise one; with fewer, chance moves a rate by more than a fifth
NEARLY_FREE = 1e6  # sklearn's C: the coefficients are not shrunk, and stay finite where nobody is confused

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Stored(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, frozen=True)


class Logistic(_Stored):
    """The probability of hits (see the module's docstring). With both factors above 0 it falls down every list."""

    best: Annotated[float, Field(gt=0)]
    below: Annotated[float, Field(gt=0)]
    bias: float

    def __call__(self, scores: np.ndarray, images: float) -> np.ndarray:
        """Probabilities (..., k) for the scores (..., k) of lists, best first, from a gallery of so many images."""
        first = np.asarray(scores, np.float64)[..., :1]
        odds = self.best * first + self.below * (scores - first) + self.bias - np.log(images)
        return 1 / (1 + np.exp(-np.clip(odds, -700, 700)))


class Alarms(_Stored):
    """A threshold that other people chose for a demanded false alarm rate, and the rate that it reaches."""

    threshold: float
    reached: Share
    count: Annotated[int, Field(ge=0)]
    of: Count


class Measured(_Stored):
    """What people show whom nothing was fitted on: calibration errors of all hits and of the first ones, false alarms.

    pairs, searches  false alarms of pairs of two people, and of searches for people who are not in the gallery
    probability      what the threshold of searches is as a probability
    """

    people: Count
    queries: Count
    images: Annotated[float, Field(gt=0)]
    error: Share
    error_first: Share
    demanded: Share
    pairs: Alarms
    searches: Alarms
    probability: Share


class Calibration(_Stored):
    """The content of calibration.json. `net` is the fingerprint of the net whose scores these are."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    net: str
    net_name: str
    data: str
    seed: int
    cameras: bool
    people: Count
    queries: Count
    images: Annotated[float, Field(gt=0)]
    probability: Logistic
    measured: Measured


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
        probability=float(probability(np.array([searches.threshold]), test.images)[0]),
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
    query = query.select(find_known(query, gallery, remove_same_camera=remove_same_camera))
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
    fitted = LogisticRegression(C=NEARLY_FREE, max_iter=10_000).fit(numbers, right[shown], weights[shown])
    (best, below), bias = fitted.coef_[0], fitted.intercept_[0] + np.log(comparison.images)
    if min(best, below) <= 0:
        raise UserError("a higher score is no better sign of the same person with this net; train it further")
    return Logistic(best=best, below=below, bias=bias)


def _alarms(fitted: np.ndarray, tested: np.ndarray, rate: float) -> Alarms:
    """The lowest threshold with at most this rate among the scores `fitted`, and what it lets through of `tested`."""
    scores = np.sort(fitted)[::-1]
    # What scores more than this is an alarm: at most so many.
    threshold = scores[int(rate * len(scores))]
    count = int(np.count_nonzero(tested > threshold))
    return Alarms(threshold=threshold, reached=count / len(tested), count=count, of=len(tested))


# ------------------------------------------------------------------------------------------------ the file
def read_calibration(folder: Path) -> Calibration | None:
    """The calibration that is kept in the folder of a run or a teacher, if there is one.

    Raises UserError for a damaged file and one of another version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Calibration.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg'].lower()}"
        raise UserError(f"{path}: not a calibration of this version ({why}); delete it and calibrate again") from None


def calibration_of(tested: TestNet, net: str, args: argparse.Namespace, *, needed: bool) -> Calibration | None:
    """The calibration of exactly this net, whose fingerprint is `net`.

    Raises UserError that names the command to run if there is none and it is `needed`.
    """
    found = read_calibration(tested.folder)
    if found and found.net == net:
        return found
    given = {"--name": args.name, "--teacher": args.teacher, "--which_epoch": args.which_epoch}
    options = [part for option, value in given.items() if value for part in (option, value)]
    options += ["--output_path", args.output_path] if args.output_path else []
    command = shlex.join(["python", "-m", "reid_eval.calibrate", *options])
    why = "is of another net" if found else "is not there"
    message = f"{tested.folder / FILE}: {why}, so no probability is known; {command} makes it"
    if needed:
        raise UserError(f"--min-probability: {message}")
    if found:
        log.warning("%s", message)
    return None


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
    if args.false_alarms * calibration.people < FEW_ALARMS:
        needed = 2 * FEW_ALARMS / args.false_alarms
        log.warning(
            "the false alarm rate of searches may be off by chance; it takes %.0f people to set it well", needed
        )
    print(f"{tested.title}, calibrated on {root}\n{describe(calibration)}")
    write_json(tested.folder / FILE, calibration.model_dump())
    print(f"written to {tested.folder / FILE}")


if __name__ == "__main__":
    run_cli(main)
