"""Draws one pedestrian in one scene: `render(appearance, body, shot)`. See dataset.py for the data set.

Appearance, body and shot mean what they mean in DG-Net's swaps: the appearance is what a swap transfers, body and shot
are the structure it keeps. The person is a walking skeleton in three dimensions whose parts are painted from the far
side to the near side. Scene and person are drawn at four times the size and reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from pydantic import Field

Level = Annotated[int, Field(ge=0, le=255)]
RGB = tuple[Level, Level, Level]
Point = tuple[float, float]
Paint = RGB | Image.Image  # a colour, or a cloth to cut from

OVERSAMPLE = 4

UpperKind = Literal["plain", "stripes", "checks", "two-tone"]
HairStyle = Literal["short", "bob", "long", "ponytail", "bun", "bald"]
Bag = Literal["none", "backpack", "shoulder", "handbag"]
UPPER_KINDS, HAIR_STYLES, BAGS = get_args(UpperKind), get_args(HairStyle), get_args(Bag)
OCCLUDERS = ("pole", "plant", "cart")
CAMERAS = 8  # One for each of _SCENES.
# The ranges are wider than anything that is drawn: they keep a damaged factors.json from asking for an endless drawing.
Ratio = Annotated[float, Field(ge=0.5, le=2)]
Angle = Annotated[float, Field(ge=-1000, le=1000)]
Number = Annotated[float, Field(ge=-256, le=256)]


@dataclass(frozen=True)
class Appearance:
    """What a swap transfers."""

    upper: RGB
    upper_second: RGB  # the pattern's second colour; not seen when plain
    upper_kind: UpperKind
    sleeves: Literal["long", "short"]
    lower: RGB
    lower_kind: Literal["trousers", "shorts", "skirt"]
    shoes: RGB
    skin: RGB


@dataclass(frozen=True)
class Body:
    """Structure that belongs to the identity."""

    height: Ratio  # relative to the mean, 0.9 to 1.08
    build: Ratio  # relative width, 0.85 to 1.18
    hair: HairStyle
    hair_tone: RGB
    bag: Bag
    bag_tone: RGB


@dataclass(frozen=True)
class Shot:
    """Structure that belongs to the single image. Lengths are fractions of the picture."""

    camera: Annotated[int, Field(ge=1, le=CAMERAS)]  # chooses the scene
    yaw: Angle  # degrees: 0 walks towards the camera, 90 to the right, 180 away, 270 to the left
    phase: Angle  # of the walking cycle, radians
    x: Number  # centre of the person, of the width
    foot: Number  # where the feet stand, of the height
    scale: Annotated[float, Field(ge=0.1, le=5)]  # height of a person of mean height, of the picture's height
    pan: Annotated[float, Field(ge=-0.1201, le=0.1201)]  # shift of the background, of the width
    light: Number  # gain of the picture
    light_side: Number  # -1 lit from the left, 1 from the right
    tint: tuple[Number, Number, Number]  # gain per channel
    noise: Number  # standard deviation in grey levels
    noise_seed: Annotated[int, Field(ge=0)]
    occluder: Literal["none", "pole", "plant", "cart"]
    occluder_x: Number  # its centre, of the width


def render(appearance: Appearance, body: Body, shot: Shot, size: tuple[int, int] = (128, 64)) -> np.ndarray:
    """Draw one picture of `size` (height, width): (H, W, 3) uint8. Equal arguments give equal pictures."""
    height, width = size
    scene, margin = _scene(shot.camera, height, width)
    left = margin + round(shot.pan * width)
    picture = scene[:, left : left + width]

    shadow = Image.new("L", (width, height), 0)
    r = 0.17 * body.build * shot.scale * height
    x, y = shot.x * width - 0.25 * r * shot.light_side, (shot.foot - 0.006) * height
    ImageDraw.Draw(shadow).ellipse((x - r, y - 0.18 * r, x + r, y + 0.18 * r), fill=255)
    shadow = np.asarray(shadow.filter(ImageFilter.GaussianBlur(height / 64)), np.float32)
    picture = picture * (1 - 0.45 / 255 * shadow[..., None])

    colour, cover = _paint(appearance, body, shot, size)
    picture = picture * (1 - cover) + colour
    picture *= np.asarray(shot.tint, np.float32) * np.float32(shot.light)
    if shot.noise > 0:
        rng = np.random.default_rng(shot.noise_seed)
        picture += rng.standard_normal(picture.shape, np.float32) * np.float32(shot.noise)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _paint(appearance: Appearance, body: Body, shot: Shot, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Person and occluder without scene: colour times coverage, (H, W, 3) in 0..255, and coverage, (H, W, 1)."""
    painter = _Painter(size, shot.light_side)
    _Figure(painter, appearance, body, shot).paint()
    _paint_occluder(painter, shot.occluder, shot.occluder_x)
    return painter.finish()


# ---------------------------------------------------------------- painter
class _Painter:
    """Three layers of one size: flat colour, shading that multiplies it, and coverage.

    Coordinates are pixels of the enlarged picture, except that radii are multiplied by `unit`.
    """

    # Nested copies of a part, (width, tone) from its rim to its ridge, make it look round.
    ROUND = ((1.0, 0.66), (0.88, 0.78), (0.70, 0.89), (0.46, 0.96), (0.24, 1.0))

    def __init__(self, size: tuple[int, int], light_side: float) -> None:
        self.height, self.width = (side * OVERSAMPLE for side in size)
        self.colour = Image.new("RGB", (self.width, self.height))
        self.shade = Image.new("L", self.colour.size, 255)
        self.mask = Image.new("L", self.colour.size, 0)
        self.light_side = light_side
        self.unit = 1.0

    def tube(self, points: Sequence[Point], radii: Sequence[float], paint: Paint, tone: float = 1.0) -> None:
        """A limb through `points`, `radii` thick there."""

        def trace(draw: ImageDraw.ImageDraw, width: float, shift: float, fill: RGB | int) -> None:
            placed = zip(points, radii, strict=True)
            spots = [(x + shift * r * self.unit, y, r * self.unit * width) for (x, y), r in placed]
            for x, y, r in spots:
                draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            for (x0, y0, r0), (x1, y1, r1) in pairwise(spots):
                length = math.hypot(x1 - x0, y1 - y0) or 1.0
                nx, ny = (y0 - y1) / length, (x1 - x0) / length
                near = [(x0 + nx * r0, y0 + ny * r0), (x1 + nx * r1, y1 + ny * r1)]
                far = [(x1 - nx * r1, y1 - ny * r1), (x0 - nx * r0, y0 - ny * r0)]
                draw.polygon(near + far, fill=fill)

        self._lay(trace, paint, tone)

    def column(self, x: float, y: float, rows: Sequence[Point], paint: Paint, girth: float = 1.0) -> None:
        """A standing part at (x, y) from `rows` of (height below y, half width of `girth`), in units."""

        def trace(draw: ImageDraw.ImageDraw, width: float, shift: float, fill: RGB | int) -> None:
            u, v = self.unit, self.unit * girth
            left = [(x + r * v * (shift - width), y + dy * u) for dy, r in rows]
            right = [(x + r * v * (shift + width), y + dy * u) for dy, r in rows]
            draw.polygon(left + right[::-1], fill=fill)

        self._lay(trace, paint, 1.0)

    def oval(self, x: float, y: float, rx: float, ry: float, paint: RGB, tone: float = 1.0) -> None:
        """An ellipse with half axes in units."""

        def trace(draw: ImageDraw.ImageDraw, width: float, shift: float, fill: RGB | int) -> None:
            cx, w, h = x + shift * rx * self.unit, rx * width * self.unit, ry * width * self.unit
            draw.ellipse((cx - w, y - h, cx + w, y + h), fill=fill)

        self._lay(trace, paint, tone)

    def fold(self, start: Point, end: Point, width: float, tone: float) -> None:
        """A crease: a darker line on what is already there."""
        pixels = max(1, round(width * self.unit))
        ImageDraw.Draw(self.shade).line((start, end), fill=round(255 * tone), width=pixels)

    def _lay(self, trace: Callable[..., None], paint: Paint, tone: float) -> None:
        if isinstance(paint, Image.Image):
            cut = Image.new("L", self.mask.size, 0)
            trace(ImageDraw.Draw(cut), 1.0, 0.0, 255)
            self.colour.paste(paint, (0, 0), cut)
        else:
            trace(ImageDraw.Draw(self.colour), 1.0, 0.0, paint)
        trace(ImageDraw.Draw(self.mask), 1.0, 0.0, 255)
        draw = ImageDraw.Draw(self.shade)
        for width, level in self.ROUND:
            trace(draw, width, self.light_side * (1 - width) * 0.45, round(255 * level * tone))

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Colour times coverage, (H, W, 3) float32 in 0..255, and coverage, (H, W, 1) in 0..1."""
        shaded = ImageChops.multiply(self.colour, self.shade.convert("RGB"))
        covered = ImageChops.multiply(shaded, self.mask.convert("RGB")).reduce(OVERSAMPLE)
        cover = np.asarray(self.mask.reduce(OVERSAMPLE), np.float32)[..., None] / 255
        return np.asarray(covered, np.float32), cover


# ---------------------------------------------------------------- person
class _Figure:
    """A walking person. Its units: the height is 1, x to the person's left, y up, z forward."""

    def __init__(self, painter: _Painter, appearance: Appearance, body: Body, shot: Shot) -> None:
        self.painter, self.look, self.body = painter, appearance, body
        self.unit = painter.unit = shot.scale * body.height * painter.height  # pixels per body height
        self.origin = shot.x * painter.width, shot.foot * painter.height
        self.side, self.front = math.sin(math.radians(shot.yaw)), math.cos(math.radians(shot.yaw))
        self.towards = self.front > 0
        build = body.build
        self.wide, self.deep = 0.112 * build, 0.084 * build**0.8  # half width and half depth of the chest

        self.legs: list[list[np.ndarray]] = []  # right, left: hip, knee, ankle, toe
        self.arms: list[list[np.ndarray]] = []  # right, left: shoulder, elbow, hand
        for sign in (-1, 1):
            thigh = 0.38 * math.sin(shot.phase) * sign
            shin = thigh - 0.07 - 0.70 * max(0.0, math.cos(shot.phase) * sign)  # the leg that swings bends
            hip = np.array((sign * 0.054 * build, 0.0, 0.0))
            knee = hip + (-sign * 0.006, -0.235 * math.cos(thigh), 0.235 * math.sin(thigh))
            ankle = knee + (0, -0.235 * math.cos(shin), 0.235 * math.sin(shin))
            toe = ankle + (sign * 0.012, -0.022 + 0.04 * math.sin(shin + 0.1), 0.085)
            self.legs.append([hip, knee, ankle, toe])
            upper = -0.42 * math.sin(shot.phase) * sign
            fore = upper + 0.22 + 0.2 * max(0.0, math.sin(upper))
            shoulder = np.array((sign * 0.103 * build**0.9, 0.788, 0.0))
            elbow = shoulder + (sign * 0.034, -0.165 * math.cos(upper), 0.165 * math.sin(upper))
            hand = elbow + (sign * 0.002, -0.155 * math.cos(fore), 0.155 * math.sin(fore))
            self.arms.append([shoulder, elbow, hand])
        # The lower ankle stands on the ground, which lifts and drops everything above.
        self.hip = 0.045 - min(leg[2][1] for leg in self.legs)
        self.lift = self.hip - 0.515
        for limbs, up in ((self.legs, self.hip), (self.arms, self.lift)):
            for joint in (joint for limb in limbs for joint in limb):
                joint[1] += up

    def at(self, x: float, y: float, z: float) -> Point:
        """Pixels of a point; what is nearer to the camera is a little lower in the picture."""
        across = x * self.front + z * self.side
        return self.origin[0] + across * self.unit, self.origin[1] - (y - 0.10 * self.depth(x, z)) * self.unit

    def upper_at(self, x: float, y: float, z: float) -> Point:
        return self.at(x, y + self.lift, z)

    def depth(self, x: float, z: float) -> float:
        """How far a point is towards the camera."""
        return z * self.front - x * self.side

    def girth(self, wide: float, deep: float) -> float:
        """Half width, as seen, of an upright ellipse with these half axes."""
        return math.hypot(wide * self.front, deep * self.side)

    def paint(self) -> None:
        """From the far side to the near side."""
        cloth = self.cloth()
        arms: dict[bool, list] = {False: [], True: []}  # far, near
        for arm in sorted(self.arms, key=lambda arm: self.depth(arm[1][0], arm[2][2])):
            arms[bool(self.depth(arm[1][0], (arm[1][2] + arm[2][2]) / 2) > -0.03)].append(arm)
        bag_near = self.side * (1 if self.body.bag == "handbag" else -1) > -0.3
        if self.towards:
            self.backpack()
            self.tail()
        for arm in arms[False]:
            self.arm(arm, cloth, 0.80)
        if not bag_near:
            self.carried_bag()
        self.clothed_legs()
        self.torso(cloth)
        self.straps()
        if not self.towards:
            self.backpack()
        self.head()
        if not self.towards:
            self.tail()
        if bag_near:
            self.carried_bag()
        for arm in arms[True]:
            self.arm(arm, cloth, 1.0)

    def cloth(self) -> Paint:
        """The upper garment's colour, or a sheet of its pattern to cut parts from."""
        look, size = self.look, self.painter.mask.size
        if look.upper_kind == "plain":
            return look.upper
        sheet = Image.new("RGB", size, look.upper)
        draw, cell = ImageDraw.Draw(sheet), 0.062 * self.unit
        x0, y0 = self.upper_at(0, 0.80, 0)
        if look.upper_kind == "two-tone":
            draw.rectangle((0, y0 + 0.15 * self.unit, *size), fill=look.upper_second)
            return sheet
        for row in range(-2, 9):
            y = y0 + (row - 0.5) * cell
            if look.upper_kind == "stripes":
                if row % 2:
                    draw.rectangle((0, y, size[0], y + cell), fill=look.upper_second)
                continue
            for column in range(-8 + row % 2, 9, 2):
                x = x0 + (column - 0.5) * cell
                draw.rectangle((x, y, x + cell, y + cell), fill=look.upper_second)
        return sheet

    def clothed_legs(self) -> None:
        painter, look, build, unit = self.painter, self.look, self.body.build, self.unit
        far_first = sorted(self.legs, key=lambda leg: self.depth(leg[0][0], leg[2][2]))
        for leg, tone in zip(far_first, (0.80, 1.0), strict=True):
            hip, knee, ankle, toe = (self.at(*joint) for joint in leg)
            heel = self.at(leg[2][0], leg[2][1] - 0.024, leg[2][2] - 0.02)
            painter.tube([heel, toe], (0.028, 0.021), look.shoes, tone)
            if look.lower_kind == "trousers":
                radii = (0.061 * build, 0.047 * build**0.5, 0.036)
                painter.tube([hip, knee, ankle], radii, look.lower, tone)
                x, y = knee
                crease = (x - 0.03 * unit, y), (x + 0.02 * unit, y + 0.012 * unit)
                painter.fold(*crease, 0.010, 0.78 * tone)
                continue
            painter.tube([hip, knee, ankle], (0.050 * build, 0.036, 0.025), look.skin, tone)
            if look.lower_kind == "shorts":
                end = self.at(*(0.15 * leg[0] + 0.85 * leg[1]))
                painter.tube([hip, end], (0.062 * build, 0.054 * build**0.5), look.lower, tone)
        if look.lower_kind == "skirt":
            (x0, y0), (x1, y1) = (self.at(*leg[1]) for leg in self.legs)
            x, y = self.at(0, self.hip + 0.05, 0)
            waist = self.girth(0.110 * build, 0.088 * build)
            hem = max(abs(x1 - x0) / 2 / unit + 0.055, waist * 1.08)
            lean, long = (x0 + x1) / 2 - x, (max(y0, y1) - y) / unit - 0.01
            painter.column(x + lean / 2, y, [(0, waist), (0.3 * long, waist * 1.04), (long, hem)], look.lower)
            for t in (-0.5, -0.05, 0.4):
                start = x + lean / 2 + t * waist * unit, y + 0.09 * unit
                painter.fold(start, (start[0] + t * 0.03 * unit, y + long * unit), 0.010, 0.82)

    def arm(self, joints: list[np.ndarray], cloth: Paint, tone: float) -> None:
        painter, skin = self.painter, self.look.skin
        shoulder, elbow, hand = (self.at(*joint) for joint in joints)
        painter.oval(hand[0], hand[1] + 0.012 * self.unit, 0.022, 0.028, skin, tone)
        if self.look.sleeves == "long":
            painter.tube([shoulder, elbow, hand], (0.038, 0.034, 0.028), cloth, tone)
        else:
            painter.tube([shoulder, elbow, hand], (0.028, 0.026, 0.021), skin, tone)
            end = self.at(*(0.28 * joints[0] + 0.72 * joints[1]))
            painter.tube([shoulder, end], (0.038, 0.039), cloth, tone)

    def torso(self, cloth: Paint) -> None:
        painter, unit = self.painter, self.unit
        x, y = self.upper_at(0, 0.855, 0.01)
        rows = []  # from the neck to the hem; widths are shares of the chest's
        heights = (0.0, 0.012, 0.028, 0.05, 0.09, 0.16, 0.26, 0.34, 0.395)
        shares = (0.34, 0.56, 0.82, 1.00, 1.07, 1.02, 0.92, 0.98, 1.00)
        for below, share in zip(heights, shares, strict=True):
            rows.append((below, self.girth(self.wide * share, self.deep * min(1.0, share))))
        painter.column(x, y, rows, cloth)
        r, waist, hem = rows[6][1] * unit, y + 0.26 * unit, y + 0.391 * unit
        painter.fold((x - 0.75 * r, waist - 0.03 * unit), (x - 0.15 * r, waist + 0.015 * unit), 0.011, 0.80)
        painter.fold((x + 0.75 * r, waist + 0.005 * unit), (x + 0.15 * r, waist + 0.05 * unit), 0.011, 0.80)
        painter.fold((x - rows[-1][1] * unit, hem), (x + rows[-1][1] * unit, hem), 0.010, 0.70)

    def head(self) -> None:
        painter, tone, skin, style = self.painter, self.body.hair_tone, self.look.skin, self.body.hair
        neck = [self.upper_at(0, y, 0.008) for y in (0.825, 0.88)]
        painter.tube(neck, (0.035, 0.032), skin, 0.86)
        x, y = self.upper_at(0, 0.927, 0.015)
        rx, ry = self.girth(0.059, 0.066), 0.076
        back = x - 0.1 * rx * self.side * self.unit
        painter.oval(x, y, rx, ry, skin)
        if style in ("bob", "long"):
            shares = ((-1.06, 0.3), (-0.95, 0.75), (-0.75, 1.02), (-0.3, 1.2), (0.3, 1.28), (0.85, 1.2))
            rows = [(dy * ry, r * rx) for dy, r in (*shares, (0.96, 0.95))]
            painter.column(back, y, rows, tone)
        elif style != "bald":
            painter.oval(back, y - 0.26 * ry * self.unit, 1.06 * rx, 0.84 * ry, tone)
        if style != "bald" and self.front > -0.5:  # the face covers the hair
            narrow = 0.80 - 0.22 * abs(self.side) - 0.3 * max(0.0, -self.front)
            forward = 0.42 * rx * self.side * self.unit
            painter.oval(x + forward, y + 0.16 * ry * self.unit, narrow * rx, 0.80 * ry, skin)

    def tail(self) -> None:
        """The hair behind the head."""
        painter, style, tone = self.painter, self.body.hair, self.body.hair_tone
        if style == "ponytail":
            chain = [self.upper_at(0, y, z) for y, z in ((0.95, -0.07), (0.90, -0.105), (0.80, -0.095))]
            painter.tube(chain, (0.024, 0.028, 0.012), tone)
        elif style == "bun":
            painter.oval(*self.upper_at(0, 0.978, -0.055), 0.037, 0.034, tone)
        elif style == "long":
            rows = ((-0.03, 1.0), (0.06, 1.08), (0.13, 1.0), (0.145, 0.75))
            painter.column(*self.upper_at(0, 0.90, -0.03), rows, tone, self.girth(0.076, 0.05))

    def backpack(self) -> None:
        if self.body.bag != "backpack":
            return
        x, y = self.upper_at(0, 0.685, -self.deep - 0.03)
        r = self.girth(0.086, 0.05)
        rows = ((-0.115, 0.6), (-0.10, 0.9), (-0.06, 1.0), (0.105, 0.95), (0.125, 0.65))
        self.painter.column(x, y, rows, self.body.bag_tone, r)
        if not self.towards:
            dx, dy = 0.7 * r * self.unit, 0.02 * self.unit
            self.painter.fold((x - dx, y + dy), (x + dx, y + dy), 0.012, 0.6)

    def straps(self) -> None:
        bag, tone = self.body.bag, self.body.bag_tone
        if bag == "backpack" and self.front > 0.35:
            for sign in (-1, 1):
                strap = [self.upper_at(sign * 0.064, y, self.deep * 0.6) for y in (0.82, 0.76, 0.65)]
                self.painter.tube(strap, (0.011, 0.013, 0.013), tone, 0.9)
        if bag == "shoulder":
            z = self.deep * (0.8 if self.towards else -0.8)
            ends = [self.upper_at(-0.068, 0.838, z * 0.4), self.upper_at(0.11 * self.body.build, 0.53, z)]
            self.painter.tube(ends, (0.011, 0.011), tone, 0.9)

    def carried_bag(self) -> None:
        painter, tone = self.painter, self.body.bag_tone
        if self.body.bag == "shoulder":
            x, y = self.upper_at(0.125 * self.body.build, 0.48, 0.0)
            r = self.girth(0.045, 0.082)
            rows = ((-0.055, 0.85), (-0.04, 1.0), (0.055, 1.0), (0.07, 0.8))
            painter.column(x, y, rows, tone, r)
            painter.fold((x - 0.9 * r * self.unit, y), (x + 0.9 * r * self.unit, y), 0.010, 0.6)
        elif self.body.bag == "handbag":
            x, y = self.at(*self.arms[0][2])
            painter.tube([(x, y), (x, y + 0.06 * self.unit)], (0.010, 0.010), tone, 0.8)
            rows = ((0.045, 0.7), (0.06, 0.9), (0.15, 1.0), (0.16, 0.85))
            painter.column(x, y, rows, tone, self.girth(0.03, 0.072))


def _paint_occluder(painter: _Painter, kind: str, where: float) -> None:
    painter.unit = painter.height
    x, h = where * painter.width, painter.height
    if kind == "pole":
        painter.tube([(x, -0.1 * h), (x, 1.1 * h)], (0.026, 0.026), (132, 136, 140))
    elif kind == "plant":
        for angle in map(math.radians, (-70, -40, 65, 35, -15, 10)):
            a, b = math.sin(angle), math.cos(angle)
            leaf = [(x + r * h * a, (0.82 - 1.15 * r * b) * h) for r in (0.0, 0.08, 0.14)]
            painter.tube(leaf, (0.014, 0.034, 0.008), (104, 138, 96))
        painter.column(x, 0.80 * h, ((0.0, 0.088), (0.03, 0.088), (0.031, 0.08), (0.2, 0.064)), (158, 120, 98))
    elif kind == "cart":
        for dx in (-0.09, 0.09):
            painter.oval(x + dx * h, 0.972 * h, 0.022, 0.022, (60, 60, 64))
        painter.column(x, 0.75 * h, ((0.0, 0.145), (0.015, 0.145), (0.016, 0.135), (0.2, 0.12)), (96, 104, 116))


# ---------------------------------------------------------------- scenes
class _Scene(NamedTuple):
    wall: RGB
    ground: RGB
    horizon: float  # where the wall meets the ground, of the height
    texture: str  # panels, bricks, sky, plain
    thing: str  # of those that `_thing` lists
    thing_x: float  # of the width
    thing_colour: RGB


_SCENES = (
    _Scene((206, 200, 188), (150, 150, 152), 0.60, "panels", "door", 0.86, (112, 128, 134)),
    _Scene((192, 206, 214), (150, 162, 132), 0.50, "sky", "tree", 0.10, (116, 138, 104)),
    _Scene((190, 166, 150), (168, 164, 158), 0.64, "bricks", "window", 0.20, (150, 168, 176)),
    _Scene((196, 206, 196), (182, 172, 154), 0.55, "plain", "bench", 0.80, (128, 106, 86)),
    _Scene((172, 178, 188), (130, 132, 138), 0.62, "panels", "post", 0.12, (92, 98, 110)),
    _Scene((218, 212, 200), (184, 178, 170), 0.68, "plain", "window", 0.84, (160, 176, 186)),
    _Scene((190, 186, 196), (156, 150, 146), 0.57, "bricks", "door", 0.12, (120, 104, 92)),
    _Scene((206, 214, 220), (176, 178, 168), 0.46, "sky", "post", 0.88, (104, 104, 108)),
)


def _tone(colour: RGB, gain: float) -> RGB:
    return tuple(min(255, round(c * gain)) for c in colour)


@lru_cache(maxsize=32)
def _scene(camera: int, height: int, width: int) -> tuple[np.ndarray, int]:
    """The camera's view without people, (height, width + 2 margin, 3) float32 in 0..255, and its margin."""
    scene, margin = _SCENES[camera - 1], round(width * 0.125)
    w, h, full = width * OVERSAMPLE, height * OVERSAMPLE, (width + 2 * margin) * OVERSAMPLE
    floor, thin = scene.horizon * h, max(1, h // 170)
    image = Image.new("RGB", (full, h))
    draw = ImageDraw.Draw(image)
    for y in range(math.ceil(floor)):
        draw.line((0, y, full, y), fill=_tone(scene.wall, 1.06 - 0.10 * y / floor))
    if scene.texture == "panels":
        for x in np.arange(0.1, 1.3, 0.3) * w:
            draw.line((x, 0, x, floor), fill=_tone(scene.wall, 0.92), width=thin)
    elif scene.texture == "bricks":
        course = 0.055 * h
        for row, y in enumerate(np.arange(floor, 0, -course)):
            draw.line((0, y, full, y), fill=_tone(scene.wall, 0.94), width=thin)
            for x in np.arange(0.1 + 0.11 * (row % 2), 1.4, 0.22) * w:
                draw.line((x, y, x, y - course), fill=_tone(scene.wall, 0.94), width=thin)
    elif scene.texture == "sky":  # with a far hedge
        for x in np.arange(-0.1, 1.5, 0.16) * w:
            box = (x - 0.14 * w, floor - 0.08 * w, x + 0.14 * w, floor + 0.08 * w)
            draw.ellipse(box, fill=_tone(scene.ground, 0.82))
    for y in range(math.ceil(floor), h):
        draw.line((0, y, full, y), fill=_tone(scene.ground, 0.90 + 0.14 * (y - floor) / (h - floor)))
    for t in (0.20, 0.54):  # joints of the paving, closer together far away
        y = floor + (h - floor) * t
        draw.line((0, y, full, y), fill=_tone(scene.ground, 0.90), width=thin)
    if scene.texture != "sky":
        draw.rectangle((0, floor - 0.012 * h, full, floor), fill=_tone(scene.wall, 0.82))
    x = margin * OVERSAMPLE + scene.thing_x * w
    for x0, y0, x1, y1, gain, *colour in _thing(scene.thing, scene.horizon):
        paint = _tone(colour[0] if colour else scene.thing_colour, gain)
        draw.rectangle((x + x0 * w, y0 * h, x + x1 * w, y1 * h), fill=paint)
    if scene.thing == "tree":
        for x0, y0, r, gain in ((-0.14, 0.20, 0.22, 0.92), (0.12, 0.16, 0.24, 0.96), (0.0, 0.08, 0.26, 1.06)):
            cx, cy, r = x + x0 * w, y0 * h, r * w
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=_tone(scene.thing_colour, gain))
    return np.asarray(image.reduce(OVERSAMPLE), np.float32), margin


def _thing(name: str, floor: float) -> list[tuple]:
    """The rectangles of what stands in a scene: x in widths from its centre, y in heights from the top, gain, colour.

    The colour is the thing's if none is given; `floor` is the height of the horizon.
    """
    frame = (224, 222, 216)
    return {
        "door": [
            (-0.20, 0.120, 0.20, floor, 1.25),
            (-0.17, 0.135, 0.17, floor, 1.0),
            (-0.11, 0.170, 0.11, 0.34, 0.9),
            (-0.11, 0.370, 0.11, floor - 0.03, 0.9),
        ],
        "window": [
            (-0.23, 0.070, 0.23, 0.380, 1.0, frame),
            (-0.20, 0.085, -0.015, 0.365, 1.0),
            (0.015, 0.085, 0.20, 0.365, 1.0),
            (-0.25, 0.380, 0.25, 0.395, 0.9, frame),
        ],
        "tree": [
            (-0.05, 0.2, 0.01, floor + 0.06, 1.0, (122, 106, 92)),
            (0.01, 0.2, 0.05, floor + 0.06, 1.0, (106, 92, 80)),
        ],
        "bench": [
            (-0.24, floor, -0.20, floor + 0.1, 0.7),
            (0.20, floor, 0.24, floor + 0.1, 0.7),
            (-0.30, floor - 0.07, 0.30, floor - 0.025, 0.95),
            (-0.30, floor + 0.01, 0.30, floor + 0.045, 1.1),
        ],
        "post": [
            (-0.045, 0.0, 0.045, floor + 0.08, 1.0),
            (-0.045, 0.0, -0.010, floor + 0.08, 1.2),
            (-0.080, floor + 0.06, 0.080, floor + 0.09, 0.85),
        ],
    }[name]
