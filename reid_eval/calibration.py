"""The probability that a hit of a search shows the query's person, and calibration.json, which keeps it with a net.

What a score means depends on the search. A hit of 0.9 means less in a larger gallery, where more people look alike, and
less where it is the best hit than below one of 0.95, since most people in a gallery have several images there. So the
probability is a logistic function of two numbers, the score of the query's best hit and how far a hit lies below it.
Its odds are divided by the number of gallery images:

    log odds = best * (score of the best hit) + below * (score - score of the best hit) + bias - log(images)

It falls down every list, as the scores do.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runs.load import TestNet
from utils import UserError

log = logging.getLogger(__name__)
FILE, FORMAT = "calibration.json", 1
REACH = 4  # how many times larger a gallery may be than the one of the fit; beyond it, probabilities are too high

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
    probability      the threshold of searches as a probability
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
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].lower()]))
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
