"""Curves of a run's TensorBoard logs, drawn as SVG that takes its colours from the page it stands in."""

from __future__ import annotations

import io
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Panels and the scalars in them, by the beginnings of their tags; a scalar goes to the first that fits.
PANELS = {
    "Totals": ("loss/gen_total", "loss/dis_total"),
    "Adversarial": ("loss/adv", "loss/dis"),
    "Reconstruction of images": ("loss/recon_x", "loss/cyc", "loss/vgg"),
    "Reconstruction of codes": ("loss/recon_f", "loss/recon_s"),
    "Identity and teacher": ("loss/id", "loss/pid", "loss/recon_id", "loss/teacher"),
    "Accuracy in training": ("loss/accuracy",),
    "Other losses": ("loss/",),
    "Loss weights": ("schedule/recon", "schedule/teacher"),
    "Learning rates": ("schedule/",),
    "Images per second": ("images_per_second",),
    "Re-identification during training": ("eval/reid",),
    "Swaps against the truth during training": ("eval/swap",),
    "Skipped steps": ("skipped_steps/",),
}
LOGARITHMIC = ("Learning rates",)
COLOURS = 6  # that the page defines, --curve-0 and so on
MOST_POINTS = 200  # of a curve; more become means with the range around them
KEPT = 5000  # of a scalar, drawn at random when there are more
# matplotlib wants colours; these stand for the page's variables and are exchanged afterwards.
INK, LINE = "#010203", "#010204"


@dataclass(frozen=True)
class Curve:
    """A scalar over the finished steps, both (n,); `colour` counts within its panel, `dashed` is the pair's second."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture of some curves, and what its legend says: (label, number of the colour)."""

    title: str
    svg: str
    legend: list[tuple[str, int]]


Scalars = dict[str, tuple[np.ndarray, np.ndarray]]


def read_scalars(folder: Path) -> Scalars:
    """Finite scalars of a folder of TensorBoard logs by tag, as (steps, values); none where there is no log."""
    return read_log(folder)[0]


def read_log(folder: Path) -> tuple[Scalars, list[str]]:
    """The scalars of a folder of TensorBoard logs, as `read_scalars`, and the commands that trained, in their order.

    What an interrupted process wrote beyond the snapshot it was resumed from is left out, as TensorBoard does.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}, []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a resumed run is nothing to warn of
    log = EventAccumulator(str(folder), size_guidance={"scalars": KEPT, "images": 1, "tensors": 0})
    log.Reload()
    found = {}
    for tag in log.Tags()["scalars"]:
        events = log.Scalars(tag)
        steps, values = np.array([e.step for e in events]), np.array([e.value for e in events], np.float64)
        finite = np.isfinite(values)
        if finite.any():
            found[tag] = steps[finite], values[finite]
    tag = "command/text_summary"
    lines = log.Tensors(tag) if tag in log.Tags()["tensors"] else []
    return found, [line.tensor_proto.string_val[0].decode() for line in lines]


def group(scalars: Scalars) -> dict[str, list[Curve]]:
    """The curves of every panel that has any; every scalar of a known kind is in one.

    Of `NAME_a` and `NAME_b`, the two images of the pair, the second has the first one's colour and is dashed.
    """
    panels: dict[str, list[Curve]] = {}
    for tag, (steps, values) in scalars.items():
        title = next((title for title, starts in PANELS.items() if tag.startswith(starts)), None)
        if title is not None:
            panels.setdefault(title, []).append(Curve(tag.rpartition("/")[2], steps, values))
    ordered = {title: panels[title] for title in PANELS if title in panels}
    for title, curves in ordered.items():
        names = list(dict.fromkeys(_stem(curve.name) for curve in curves))
        ordered[title] = [
            Curve(c.name, c.steps, c.values, names.index(_stem(c.name)) % COLOURS, c.name.endswith("_b"))
            for c in curves
        ]
    return ordered


def draw_panels(scalars: Scalars) -> list[Panel]:
    """A panel for every group of scalars."""
    panels = []
    end = max((steps[-1] for steps, _ in scalars.values()), default=0)
    for title, curves in group(scalars).items():
        legend = dict.fromkeys((_label(curve.name, curves), curve.colour) for curve in curves)
        panels.append(Panel(title, draw(curves, end, logarithmic=title in LOGARITHMIC), list(legend)))
    return panels


def draw(curves: list[Curve], end: int, *, logarithmic: bool = False) -> str:
    """The SVG element of some curves over steps up to `end`, without title and legend, in the page's colours."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style = {
        "svg.fonttype": "none",  # letters stay letters, in the page's font
        "svg.hashsalt": "report",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": LINE,
        "grid.linewidth": 0.5,
        "axes.formatter.useoffset": False,
        "path.simplify": True,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        values = np.concatenate([curve.values for curve in curves])
        # The first steps of a run may be so high that nothing else is seen of it.
        steep = (values > 0).all() and values.max() > 30 * np.median(values)
        positive = values[values > 0]
        if logarithmic or steep:
            axes.set_yscale("log", nonpositive="mask")
        if logarithmic and len(positive):
            axes.set_ylim(max(positive.min(), 1e-4 * positive.max()) / 1.5, 1.5 * positive.max())
        for curve in curves:
            steps, mean, low, high = _thinned(curve)
            how = dict(color=_stand_in(curve.colour), linewidth=1.4)
            if len(steps) == 1:
                axes.plot(steps, mean, "o", markersize=3, **how)
            else:
                axes.plot(steps, mean, linestyle=(0, (4, 2)) if curve.dashed else "-", **how)
            if low is not None:
                axes.fill_between(steps, low, high, color=how["color"], alpha=0.15, linewidth=0)
        axes.set_xlim(-0.02 * end, 1.02 * end)
        axes.grid(True, axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(which="both", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _for_page(buffer.getvalue())


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Steps, means, and the lowest and highest values around each mean where there are more than MOST_POINTS."""
    if len(curve.steps) <= MOST_POINTS:
        return curve.steps, curve.values, None, None
    parts = [np.array_split(side, MOST_POINTS) for side in (curve.steps, curve.values)]
    steps, mean = (np.array([part.mean() for part in side]) for side in parts)
    low, high = (np.array([f(part) for part in parts[1]]) for f in (np.min, np.max))
    return steps, mean, low, high


def _stem(name: str) -> str:
    return re.sub(r"_[ab]$", "", name)


def _label(name: str, curves: list[Curve]) -> str:
    stem = _stem(name)
    paired = {f"{stem}_a", f"{stem}_b"} <= {curve.name for curve in curves}
    return f"{stem} (a, b dashed)" if paired else name


def _stand_in(colour: int) -> str:
    return f"#0102{0x10 + colour:02x}"


def _for_page(document: str) -> str:
    svg = document[document.index("<svg") :]
    # Its style would be everything's style on the page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Sizes come from the page; names of groups would be the same in every picture of it.
    head, bracket, rest = svg.partition(">")
    svg = re.sub(r' (width|height)="[^"]*"', "", head) + bracket + rest
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    for colour in range(COLOURS):
        svg = svg.replace(_stand_in(colour), f"var(--curve-{colour})")
    return re.sub(r"; font-family: [^;]*", "", svg)
