"""The embedded data set: drawn pedestrians in the folders and file names of Market-1501.

    python -m mannequins.dataset --out datasets/mannequins --preset demo
    load_factors("datasets/mannequins").true_swap(appearance_of=name_i, structure_of=name_j)

`factors.json` keeps what every image was drawn from (an `Appearance`, a `Body`, a `Shot`), so that any image, and the
right answer to any swap, can be drawn again. Identities come in groups that wear the same colours and differ in pattern
or sleeves, hair, bag and build. No test identity wears the colour pair of a training identity.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tqdm import tqdm

from data.folders import UNFINISHED_MARK
from mannequins.render import BAGS, CAMERAS, HAIR_STYLES, OCCLUDERS, RGB, UPPER_KINDS, Appearance, Body, Shot, render
from utils import UserError, between, run_cli

TRAIN, TEST, QUERY, GT = "bounding_box_train", "bounding_box_test", "query", "gt_bbox"
DRAWING = 1  # Raise it when the drawing changes, so that old folders are not taken for current ones.
JPEG_QUALITY = 95
CHUNK = 64  # images that a process draws at a time

# Red, orange, yellow, green, teal, sky; blue, violet, pink, brown, white, black.
GARMENTS: tuple[RGB, ...] = (
    (206, 46, 48), (240, 132, 34), (246, 208, 56), (66, 160, 72), (28, 148, 150), (104, 182, 232),
    (40, 78, 176), (126, 62, 166), (236, 110, 166), (122, 78, 46), (238, 236, 228), (50, 50, 58),
)  # fmt: skip
# Red, orange, gold, lime, green; teal, sky, blue, violet, magenta. Their means over the channels lie within 20 levels:
# in the gray that the structure encoder sees, all look alike.
VIVID: tuple[RGB, ...] = (
    (232, 58, 58), (240, 112, 20), (214, 160, 10), (130, 190, 40), (56, 184, 100),
    (20, 164, 164), (50, 140, 200), (56, 96, 220), (126, 66, 192), (200, 44, 140),
)  # fmt: skip
PALER = 0.3  # share of white in the pattern of a vivid garment
SHOES: tuple[RGB, ...] = ((235, 235, 232), (40, 40, 44), (122, 74, 44), (190, 48, 46), (52, 84, 160))
SKINS: tuple[RGB, ...] = ((246, 212, 186), (228, 182, 148), (192, 136, 98), (138, 92, 66))
# Hair and bags belong to the structure, which a swap sees in grey: their tones are calm.
HAIR_TONES: tuple[RGB, ...] = ((34, 30, 30), (84, 56, 38), (148, 100, 58), (214, 180, 112), (172, 172, 174))
BAG_TONES: tuple[RGB, ...] = ((62, 62, 68), (140, 104, 70), (176, 170, 158))


# ---------------------------------------------------------------- settings
class Settings(BaseModel):
    """All that determines a data set. Recorded in factors.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[int, Field(ge=0, lt=2**32, description="random seed")] = 0
    train_ids: Annotated[int, Field(ge=1, le=4000, description="identities to train on")] = 288
    test_ids: Annotated[int, Field(ge=1, le=4000, description="identities to test on")] = 96
    cameras: Annotated[int, Field(ge=2, le=CAMERAS, description="cameras")] = 6
    min_cameras: Annotated[int, Field(ge=2, le=CAMERAS, description="cameras that see an identity, at least")] = 3
    train_cameras: Annotated[
        int, Field(ge=1, le=CAMERAS, description="cameras that see a training identity, at most, despite min_cameras")
    ] = CAMERAS
    images_per_camera: Annotated[int, Field(ge=1, le=40, description="pictures per identity and camera")] = 2
    distractors: Annotated[int, Field(ge=0, le=5000, description="gallery pictures of strangers, identity 0000")] = 60
    junk: Annotated[int, Field(ge=0, le=5000, description="ignored gallery pictures, badly cut, identity -1")] = 40
    group_size: Annotated[int, Field(ge=1, le=12, description="training identities that share colours")] = 6
    test_group_size: Annotated[int, Field(ge=1, le=12, description="test identities that share colours")] = 6
    vivid: Annotated[int, Field(ge=0, le=1, description="1: vivid garments of equal brightness, faint patterns")] = 0
    tint: Annotated[float, Field(ge=0, le=1, description="colour cast of the cameras, log gain of a channel")] = 0.05
    light: Annotated[float, Field(ge=0, le=1, description="difference in brightness of the cameras, log gain")] = 0.08
    noise: Annotated[float, Field(ge=0, le=64, description="pixel noise, standard deviation in grey levels")] = 3.0
    occluders: Annotated[float, Field(ge=0, le=1, description="share of pictures with something in front")] = 0.08


PRESETS: dict[str, dict[str, float]] = {
    "tiny": dict(train_ids=8, test_ids=6, images_per_camera=2, distractors=4, junk=4),
    # Many people with four pictures each: what a generator learns in minutes depends on how many outfits it sees.
    "demo": dict(train_ids=600, test_ids=72, min_cameras=2, train_cameras=2, group_size=3, vivid=1),
    # For the weights that `--name pretrained` uses.
    "many": dict(train_ids=1500, test_ids=100, min_cameras=2, train_cameras=2, group_size=3, vivid=1),
    "large": dict(train_ids=400, test_ids=200, cameras=8, images_per_camera=4, distractors=400, junk=200),
}


def make_settings(seed: int = 0, preset: str = "demo", **changes: float) -> Settings:
    """The preset with `changes`.

    Raises UserError that names an unknown preset or setting, or a value out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r}: unknown; use one of {', '.join(PRESETS)}")
    try:
        settings = Settings(**(PRESETS[preset] | {"seed": seed} | changes))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}={first['input']!r}: {first['msg'].lower()}") from None
    if settings.min_cameras > settings.cameras:
        raise UserError(f"min_cameras={settings.min_cameras}: there are only {settings.cameras} cameras")
    return settings


# ---------------------------------------------------------------- who is seen where
@dataclass(frozen=True)
class Person:
    appearance: Appearance
    body: Body
    split: str  # train, test, stranger
    group: int  # identities of one group wear the same colours; -1 for strangers


@dataclass(frozen=True)
class Sight:
    """One image: who, in which shot, and the folders that hold it."""

    person: str  # key of Factors.people
    shot: Shot
    folders: tuple[str, ...]


def _number(value: float) -> float:
    return round(float(value), 4)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _grey(colour: RGB) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _outfit(rng: np.random.Generator, pair: tuple[RGB, RGB], settings: Settings) -> Appearance:
    upper, lower = pair
    if settings.vivid:
        seconds = [tuple(round(level + PALER * (255 - level)) for level in upper)]
    else:  # A pattern has to be seen in grey too.
        seconds = [c for c in GARMENTS if c != lower and abs(_grey(c) - _grey(upper)) > 50]
    return Appearance(
        upper=upper,
        upper_second=_pick(rng, seconds),
        upper_kind=_pick(rng, UPPER_KINDS),
        sleeves=_pick(rng, ("long", "short")),
        lower=lower,
        lower_kind=_pick(rng, ("trousers", "trousers", "shorts", "skirt")),
        shoes=_pick(rng, SHOES),
        skin=_pick(rng, SKINS),
    )


def _body(rng: np.random.Generator, hair: str, bag: str) -> Body:
    return Body(
        height=_number(rng.uniform(0.90, 1.08)),
        build=_number(rng.uniform(0.85, 1.18)),
        hair=hair,
        hair_tone=_pick(rng, HAIR_TONES),
        bag=bag,
        bag_tone=_pick(rng, BAG_TONES),
    )


def _groups(
    rng: np.random.Generator, settings: Settings, split: str, count: int, group_size: int, pairs: list[tuple[RGB, RGB]]
) -> list[Person]:
    """`count` people in groups that share an outfit, whose members differ in pattern or sleeves, hair and bag."""
    people = []
    looks = [(hair, bag) for hair in HAIR_STYLES for bag in BAGS]
    for group in range(math.ceil(count / group_size)):
        outfit = _outfit(rng, pairs[group % len(pairs)], settings)
        kinds = [UPPER_KINDS[k] for k in rng.permutation(len(UPPER_KINDS))[:2]]
        order = rng.permutation(len(looks))
        for look in order[: min(group_size, count - len(people))]:
            worn = replace(outfit, upper_kind=_pick(rng, kinds), sleeves=_pick(rng, ("long", "short")))
            people.append(Person(worn, _body(rng, *looks[look]), split, group))
    return people


def _shot(rng: np.random.Generator, settings: Settings, camera: int, tint: np.ndarray, light: float) -> Shot:
    jitter = np.exp(rng.normal(0, 0.15 * settings.tint, 3))
    hidden = rng.random() < settings.occluders
    edge = 0.06 if rng.random() < 0.5 else 0.94
    return Shot(
        camera=camera,
        yaw=_number(_pick(rng, (0, 90, 180, 270)) + rng.uniform(-28, 28)),
        phase=_number(rng.uniform(0, 2 * math.pi)),
        x=_number(0.5 + rng.normal(0, 0.03)),
        foot=_number(rng.uniform(0.945, 0.975)),
        scale=_number(rng.uniform(0.80, 0.86)),
        pan=_number(rng.uniform(-0.12, 0.12)),
        light=_number(light * math.exp(rng.normal(0, 0.25 * settings.light))),
        light_side=(-0.8, 0.8)[camera % 2],
        tint=tuple(_number(gain) for gain in tint * jitter),
        noise=settings.noise,
        noise_seed=int(rng.integers(2**31)),
        occluder=_pick(rng, OCCLUDERS) if hidden else "none",
        occluder_x=_number(edge + rng.uniform(-0.05, 0.05)),
    )


def _plan(settings: Settings) -> Factors:
    """Everything that `settings` asks for, before anything is drawn."""
    people_rng, camera_rng, rng = (np.random.default_rng((settings.seed, stream)) for stream in range(3))
    # Cameras: casts spread over the hue circle, brightness over its range.
    n = settings.cameras
    hues = 2 * math.pi * (camera_rng.permutation(n) + camera_rng.random()) / n
    channels = 2 * math.pi / 3 * np.arange(3)
    tints = np.exp(settings.tint * np.cos(hues[:, None] - channels))
    lights = 1.06 * np.exp(settings.light * camera_rng.permutation(np.linspace(-1, 1, n)))

    # People: train and test identities are numbered in one shuffled range, as in Market-1501.
    train_groups = math.ceil(settings.train_ids / settings.group_size)
    test_groups = math.ceil(settings.test_ids / settings.test_group_size)
    garments = VIVID if settings.vivid else GARMENTS
    pairs = [(upper, lower) for upper in garments for lower in garments if upper != lower]
    pairs = [pairs[k] for k in people_rng.permutation(len(pairs))]
    share = max(1, min(len(pairs) - 1, round(len(pairs) * train_groups / (train_groups + test_groups))))
    identities = _groups(people_rng, settings, "train", settings.train_ids, settings.group_size, pairs[:share])
    identities += _groups(people_rng, settings, "test", settings.test_ids, settings.test_group_size, pairs[share:])
    numbers = 1 + people_rng.permutation(len(identities))
    people = {f"{k:04d}": person for k, person in sorted(zip(numbers.tolist(), identities, strict=True))}

    frames = np.zeros(n + 1, int)  # the last frame number used, per camera
    images: dict[str, Sight] = {}

    def add(label: str, person: str, camera: int, box: int, folders: tuple[str, ...], **changes) -> None:
        shot = _shot(rng, settings, camera, tints[camera - 1], lights[camera - 1])
        frames[camera] += int(rng.integers(5, 26))
        frame = int(frames[camera])
        name = f"{label}_c{camera}s{1 + frame // 20000}_{frame:06d}_{box:02d}.jpg"
        images[name] = Sight(person, replace(shot, **changes), folders)

    for key, person in people.items():
        train = person.split == "train"
        seen_by = int(rng.integers(settings.min_cameras, n + 1))
        seen_by = min(seen_by, settings.train_cameras) if train else seen_by
        for camera in sorted((1 + rng.permutation(n)[:seen_by]).tolist()):
            frames[camera] += int(rng.integers(40, 200))
            for box in range(1, settings.images_per_camera + 1):
                add(key, key, camera, box, (TRAIN,) if train else (TEST, GT))
            if not train:  # box 00 is the hand-drawn one, as in Market-1501
                add(key, key, camera, 0, (QUERY, GT))
    for k in range(settings.distractors + settings.junk):
        key = f"stranger-{k:04d}"
        outfit = _outfit(people_rng, _pick(people_rng, pairs), settings)
        body = _body(people_rng, _pick(people_rng, HAIR_STYLES), _pick(people_rng, BAGS))
        people[key] = Person(outfit, body, "stranger", -1)
        camera = 1 + int(rng.integers(n))
        if k < settings.distractors:
            add("0000", key, camera, 1, (TEST,))
        else:  # a box that missed: half a person, or far too close
            x, scale = _pick(rng, ((0.02, 0.8), (0.98, 0.8), (0.4, 1.5), (0.6, 1.6)))
            add("-1", key, camera, 1, (TEST,), x=x, scale=scale, foot=_number(0.95 + 0.5 * (scale - 0.8)))
    return Factors(settings, people, images)


# ---------------------------------------------------------------- factors.json
@dataclass(frozen=True)
class Factors:
    """What every image of a data set was drawn from. Images go by their file name."""

    settings: Settings
    people: dict[str, Person]  # by four digits for identities, "stranger-0001" for others
    images: dict[str, Sight]

    def factors_of(self, name: str) -> tuple[Appearance, Body, Shot]:
        """What an image was drawn from, by its file name or path. Raises UserError for an unknown one."""
        sight = self.images.get(Path(name).name)
        if sight is None:
            raise UserError(f"{name}: no such image in factors.json")
        person = self.people[sight.person]
        return person.appearance, person.body, sight.shot

    def true_swap(self, appearance_of: str, structure_of: str, size: tuple[int, int] = (128, 64)) -> np.ndarray:
        """The right answer to a swap: these clothes on that body in that shot, (H, W, 3) uint8.

        The swap of an image with itself is the image as drawn, before JPEG.
        """
        return render(self.factors_of(appearance_of)[0], *self.factors_of(structure_of)[1:], size)

    def dump(self) -> str:
        """The text of factors.json."""
        return json.dumps({"drawing": DRAWING} | TypeAdapter(Factors).dump_python(self, mode="json"))


def is_embedded(path: Path | str) -> bool:
    """Whether a folder holds a data set of this renderer."""
    return (Path(path) / "factors.json").is_file()


def load_factors(folder: Path | str) -> Factors:
    """Read a data set's factors.json. Raises UserError for a file that the renderer cannot draw from."""
    path = Path(folder) / "factors.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; only data drawn by python -m mannequins.dataset has true swaps")
    try:
        table = json.loads(path.read_bytes())
        if table["drawing"] != DRAWING:
            raise UserError(f"{path}: written by another version of the renderer; make the data set again")
        factors = TypeAdapter(Factors).validate_python(table)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make the data set again") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:120]
        raise UserError(f"{path}: {where}: {first['msg'].lower()}; make the data set again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not the factors of a mannequin data set; make it again") from None
    for name, sight in factors.images.items():
        if sight.person not in factors.people:
            raise UserError(
                f"{path}: {name[:80]} shows {sight.person[:80]!r}, who is not listed; make the data set again"
            )
    return factors


# ---------------------------------------------------------------- writing
def _write_images(out: Path, entries: list[tuple[Person, str, Sight]]) -> None:
    for person, name, sight in entries:
        buffer = io.BytesIO()
        picture = Image.fromarray(render(person.appearance, person.body, sight.shot))
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        for folder in sight.folders:
            (out / folder / name).write_bytes(buffer.getvalue())


def make_dataset(out: Path, seed: int = 0, preset: str = "demo", workers: int = 1, **changes: float) -> None:
    """Write the data set that `make_settings(seed, preset, **changes)` describes into `out`.

    A complete data set is left alone, an interrupted one is finished. While images are written, the factors are in the
    file that marks an unfinished data set; at the end it is renamed to factors.json.

    workers  processes that draw
    Raises UserError for bad settings, a folder that holds anything else, and one that cannot be written.
    """
    out = Path(out)
    settings = make_settings(seed, preset, **changes)
    done, part = out / "factors.json", out / UNFINISHED_MARK
    if done.is_file():
        present = load_factors(out)
        for key, new in settings:
            if (old := getattr(present.settings, key)) != new:
                raise UserError(f"{out}: holds a data set with {key}={old}, not {new}; choose another folder")
        print(f"{out}: complete already, {len(present.images)} images")
        return
    factors = _plan(settings)
    text = factors.dump()
    entries = [(factors.people[sight.person], name, sight) for name, sight in factors.images.items()]
    chunks = [entries[k : k + CHUNK] for k in range(0, len(entries), CHUNK)]
    try:
        names = sorted(os.listdir(out)) if out.exists() else []
        interrupted = part.is_file() and part.read_text(encoding="utf-8", errors="replace") == text
        if names and names != [part.name] and not interrupted:
            raise UserError(f"{out}: is not empty ({names[0]}) and no start of this data set; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        for folder in (TRAIN, TEST, QUERY, GT):
            (out / folder).mkdir(exist_ok=True)
        with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
            drawn = (pool.map if pool else map)(_write_images, repeat(out), chunks)
            deque(tqdm(drawn, "drawing", total=len(chunks), unit=f" x {CHUNK} images", disable=None), maxlen=0)
        part.replace(done)
    except OSError as error:
        remedy = "make room, set the permissions or give another folder; the same command then continues"
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); {remedy}") from None
    print(f"{out}: {len(factors.images)} images")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw the embedded pedestrian data set in Market-1501's layout, with the factors of every image."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; never overwritten")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="sizes and difficulty (%(default)s)")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=0, help="random seed (%(default)s)")
    parser.add_argument("--workers", type=between(1), default=1, help="processes that draw (%(default)s)")
    make_dataset(**vars(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    run_cli(main)
