"""Split photographs into people to train on, people to choose settings on, and people to test on.

    python -m studies.ablation.split --images Market/bounding_box_train --out ../Market-split

--images holds images with identity and camera in their names, as Market-1501's. --out gets two data sets, val and test,
of different people and with the same training images of yet others (hard links). In each of them one image per person
and camera is a query, provided that another camera leaves an image of that person in the gallery.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

from data.archives import SourceImage
from data.folders import read_archive
from data.listing import say_reading
from data.prepare import Task, fill_folder
from utils import UserError, between, run_cli


def split_people(folder: Path, *, val: int, test: int) -> dict[str, Task]:
    """The data sets val and test of `folder`'s images, as preparations that lack the folder to fill.

    Which people are whose, and which images are queries, is drawn with fixed seeds. Raises UserError for a missing
    folder, and for fewer people than `val`, `test` and 2 to train on.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; give the folder of the images")
    images = read_archive(folder, "train_all")
    say_reading({"train_all": images})
    photographs: dict[str, dict[int, list[SourceImage]]] = defaultdict(lambda: defaultdict(list))
    for path, pid, camera, token in zip(images.paths, images.pids.tolist(), images.camids, images.tokens, strict=True):
        photographs[token][int(camera)].append(SourceImage(path, pid, token, path.name))
    people = sorted(photographs)
    if len(people) < val + test + 2:
        raise UserError(f"--images {folder}: {len(people)} people are too few; lower --val {val} or --test {test}")
    random.Random(0).shuffle(people)
    rng, parts = random.Random(1), {"test": people[:test], "val": people[test : test + val]}
    train = [image for token in people[test + val :] for of in photographs[token].values() for image in of]
    tasks = {}
    for part, tokens in parts.items():
        splits: dict[str, list[SourceImage]] = {"train_all": train, "query": [], "gallery": []}
        for token in sorted(tokens):
            cameras = photographs[token]
            for camera, of in sorted(cameras.items()):
                chosen = rng.choice(of)
                wanted = any(len(cameras[other]) > 1 for other in cameras if other != camera)
                for image in of:
                    splits["query" if wanted and image is chosen else "gallery"].append(image)
        tasks[part] = Task("", Path(part), splits, {image.token: image.pid for of in splits.values() for image in of})
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="studies.ablation.split", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for val/ and test/")
    parser.add_argument("--val", type=between(1), default=100, metavar="N", help="people to choose settings on (100)")
    parser.add_argument("--test", type=between(1), default=200, metavar="N", help="people to test on (200)")
    args = parser.parse_args()
    for part, task in split_people(args.images, val=args.val, test=args.test).items():
        counts = fill_folder(task._replace(root=args.out / part))
        print(f"{args.out / part}: " + ", ".join(f"{n.images} images in {split}" for split, n in counts.items()))


if __name__ == "__main__":
    run_cli(main)
