"""Curves of a run's TensorBoard logs, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The scalars of every panel, by the beginnings of their tags; a scalar belongs to the first panel that fits.
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
    "Gradient scale of fp16": ("gradient_scale/",),
}
MOST_POINTS = 200  # of a curve; of longer ones, means over as many parts are drawn
KEPT = 5000  # values of a scalar that are read, a random sample of longer logs
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.formatter.useoffset": False}

Scalars = dict[str, tuple[np.ndarray, np.ndarray]]  # name: finished steps (n,) and values (n,)


def read_log(folder: Path) -> tuple[Scalars, list[str]]:
    """The finite scalars of a folder of TensorBoard logs, by tag, and the training commands in order.

    Like TensorBoard, it omits what an interrupted process wrote after the snapshot from which it was resumed.
    """
    if not folder.is_dir():
        return {}, []
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every resumed run
    log = EventAccumulator(str(folder), size_guidance={"scalars": KEPT, "images": 1, "tensors": 0})
    log.Reload()
    scalars = {}
    for tag in log.Tags()["scalars"]:
        events = log.Scalars(tag)
        steps, values = np.array([e.step for e in events]), np.array([e.value for e in events], np.float64)
        finite = np.isfinite(values)
        if finite.any():
            scalars[tag] = steps[finite], values[finite]
    tag = "command/text_summary"
    lines = log.Tensors(tag) if tag in log.Tags()["tensors"] else []
    return scalars, [line.tensor_proto.string_val[0].decode() for line in lines]


def group(scalars: Scalars) -> dict[str, Scalars]:
    """The curves of every panel that has any, by the last part of their tags, in the order of PANELS."""
    panels, left = {}, dict(scalars)
    for title, starts in PANELS.items():
        if tags := [tag for tag in left if tag.startswith(starts)]:
            panels[title] = {tag.rpartition("/")[2]: left.pop(tag) for tag in tags}
    return panels


def draw(curves: Scalars, end: int, *, logarithmic: bool = False) -> bytes:
    """An SVG file of the curves of one panel over the steps 0 to `end`.

    Losses of the two images of a pair, `NAME_a` and `NAME_b`, share a colour, and the second is dashed.
    """
    stems = {name: name.removesuffix("_a").removesuffix("_b") for name in curves}
    colours = {stem: f"C{i}" for i, stem in enumerate(dict.fromkeys(stems.values()))}
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for name, (steps, values) in curves.items():
            parts = min(len(steps), MOST_POINTS)
            x, y = ([part.mean() for part in np.array_split(side, parts)] for side in (steps, values))
            line, marker = "--" if name.endswith("_b") else "-", "o" if parts == 1 else None
            axes.plot(x, y, line, color=colours[stems[name]], label=name, linewidth=1.2, marker=marker)
        # The first steps of a run may be so high that they would flatten the rest of a linear curve.
        y = np.concatenate([values for _, values in curves.values()])
        if logarithmic or ((y > 0).all() and y.max() > 30 * np.median(y)):
            axes.set_yscale("log", nonpositive="mask")
        axes.set_xlim(0, 1.02 * end)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y", alpha=0.4)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, fontsize="small", frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def draw_panels(scalars: Scalars) -> dict[str, bytes]:
    """An SVG file for every panel that has curves, by its title."""
    end = max((steps[-1] for steps, _ in scalars.values()), default=1)
    return {title: draw(curves, end, logarithmic=title == "Learning rates") for title, curves in group(scalars).items()}
