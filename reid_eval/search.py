"""What search.py does once its options are parsed: the people of query images in any folder of images."""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np

from data.images import check_images
from data.listing import find_images, say_reading
from files import digest_files
from reid_eval.calibration import REACH, calibration_of
from reid_eval.features import extract_features
from reid_eval.index import default_folder, fingerprint, open_index, to_vectors
from reid_eval.ranking import main_setting
from runs.load import open_net
from utils import pick_device
from visual_tools.ranked_lists import Hit, Result, write_page

log = logging.getLogger(__name__)


def search(args: argparse.Namespace) -> None:
    """Update the index, search it for every query, print the hits and write the page."""
    found = [path for query in args.query for path in find_images(query, "--query")]
    check_images(found, skip_bad=False, remedy="leave them out")
    say_reading({"query": found})
    asked: dict[str, Path] = {}  # one query of every content
    for path, content in zip(found, digest_files(found), strict=True):
        asked.setdefault(content, path)
    device = pick_device(args.device)
    tested = open_net(args, device)
    model = fingerprint(tested.net, tested.size)
    least = args.min_probability
    calibration = calibration_of(tested, model, args, needed=least is not None)
    height, width = tested.size
    how = dict(height=height, width=width, batch_size=args.batchsize, device=device, progress=False)
    embed = partial(extract_features, tested.net, **how)

    gallery = Path(args.gallery)
    folder = Path(args.index) if args.index else default_folder(tested.folder, gallery)
    index = open_index(folder, gallery, model, tested.title, rebuild=args.rebuild)
    changes = index.update(embed, skip_bad=args.skip_bad_images)
    counts = ", ".join(f"{count} {name}" for name, count in changes.items() if count) or "no changes"
    copies = len(index) - len(index.vectors)
    images = f"{len(index)} images{f', {copies} of them copies' if copies else ''}"
    print(f"{tested.title}: {images} ({counts}); index in {folder}")

    if calibration and len(index.vectors) > REACH * calibration.images:
        sizes = f"{len(index.vectors)} gallery images, calibrated with {calibration.images:.0f}"
        log.warning("%s: the probabilities are too high; calibrate on more people", sizes)

    features = embed(list(asked.values()))
    setting, _ = main_setting(features.shape[1])
    results = []
    # One more than asked for, since the query itself or a copy of it may be in the gallery; it is left out.
    answers = zip(asked.items(), index.search(to_vectors(features), args.top + 1), strict=True)
    for (content, query), nearest in answers:
        hits = [(gallery / name, score) for name, score in nearest if index.files[name].content != content][: args.top]
        marks, title = [""] * len(hits), str(query)
        if calibration:
            p = calibration.probability(np.array([score for _, score in hits]), len(index.vectors))
            marks = [f"p={each:.3f}" for each in p]
            if least is not None and not (sure := p >= least).any():
                title = f"{query}: nobody above {least:g}"
            hits = hits if least is None else hits[: np.count_nonzero(sure)]  # p falls down the list
        print(f"\n{title}")
        cells = []
        for rank, ((path, score), mark) in enumerate(zip(hits, marks, strict=False), 1):
            print(f"{rank:4}  {score:7.4f}  {f'{mark}  ' if mark else ''}{path}")
            cells.append(Hit(str(path), f"{rank}, {score:.3f}{f', {mark}' if mark else ''}"))
        results.append(Result(str(query), title, cells))
    page = Path(args.page) if args.page else folder / "results.html"
    notes = [f"{tested.title}; gallery: {images}; score: {setting}"]
    if calibration:
        notes += ["p: probability of the same person, if half of the people asked for are in the gallery"]
    print(f"page written to {write_page(page, results, title=f'Search in {gallery}', notes=notes)}")
