"""Results of `studies.ablation` as a table, as claims that hold or do not, and as a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from files import write_whole
from studies.ablation.cells import BETAS, BOTH, CELLS, FINE, ONE_HEAD, PRIMARY

Result = dict[str, Any]  # of one run, as `runs.score` returns it
Value = tuple[float, float | None]  # mean and standard deviation over the seeds; None for a single seed

# Further rows of a cell: its net compared by single heads.
OTHER_SCORES = {"both": {PRIMARY: "both, compared by primary alone", FINE: "both, compared by fine-grained alone"}}
# By column: where `reid` (convention, key) or `generation` (key) of a result holds it, and the factor.
REID = {"mAP": ("official", "mAP"), "Rank-1": ("official", "rank1"), "mAP, standard": ("standard", "mAP")}
GENERATION = {
    "L1 changed": ("changed", 1),
    "below copy, %": ("reduction", 100),
    "SSIM": ("ssim", 1),
    "recognised, %": ("rank1", 100),
    "FID": ("fid", 1),
}
# Columns of differences, by the cell and the score that they are taken from.
AGAINST = {"mAP - both": ("both", BOTH), "mAP - teacher": ("teacher", ONE_HEAD)}
STEP = "ms a step"
DECIMALS = {"SSIM": 3, "FID": 3}
NOTE = (
    "Mean and standard deviation (n - 1) over the seeds. mAP and Rank-1 by the `official` convention unless said. mAP "
    "- both, mAP - teacher: the mean of the differences from that cell of the same seed, also where a cell has fewer "
    "seeds. ms a step: of training, processor time on a CPU. L1 changed, "
    "below copy, SSIM: generated swaps against the renderer's; recognised: Rank-1 of generated swaps as queries for "
    "the owner of the clothes, by the run's teacher; FID: in the features of the first seed's teacher."
)


def read(result: Result, setting: str, column: str = "mAP") -> float | None:
    """The number of a column, in percent where it is a share; None if it was not measured."""
    if column in REID:
        convention, key = REID[column]
        return 100 * result["reid"][setting][convention][key]
    if column == STEP:
        time = result["time"]
        return 1000 * time["seconds"] / time["steps"] if time["steps"] else None
    key, factor = GENERATION[column]
    number = result.get("generation", {}).get(key)
    return None if number is None else factor * number


def mean_and_deviation(values: Sequence[float]) -> Value:
    """The mean, and the sample standard deviation (n - 1) if there are two values or more."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """`{"cell", "setting", "label", "seeds", "values": {column: Value or None}}` for every cell that has results.

    The columns are mAP, `AGAINST`, the rest of `REID`, `STEP` and `GENERATION`.
    """
    table, by_cell = [], {}
    for result in results:
        by_cell.setdefault(result["cell"], []).append(result)
    against = {
        column: {result["seed"]: read(result, setting) for result in by_cell.get(cell, ())}
        for column, (cell, setting) in AGAINST.items()
    }
    for name in (name for name in CELLS if name in by_cell):
        labels = {CELLS[name].scored: CELLS[name].about} | OTHER_SCORES.get(name, {})
        for setting, label in labels.items():
            values = {"mAP": None}
            for column, base in against.items():
                gains = [read(r, setting) - base[r["seed"]] for r in by_cell[name] if r["seed"] in base]
                itself = (name, setting) == AGAINST[column]
                values[column] = mean_and_deviation(gains) if gains and not itself else None
            for column in (*REID, STEP, *GENERATION):
                numbers = [read(result, setting, column) for result in by_cell[name]]
                values[column] = None if None in numbers else mean_and_deviation(numbers)
            seeds = sorted(result["seed"] for result in by_cell[name])
            table.append({"cell": name, "setting": setting, "label": label, "seeds": seeds, "values": values})
    return table


def write_value(value: Value | None, column: str = "mAP") -> str:
    if value is None:
        return "-"
    (mean, deviation), decimals = value, DECIMALS.get(column, 1)
    sign = "+" if column in AGAINST else ""
    return f"{mean:{sign}.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def format_table(table: list[dict[str, Any]]) -> str:
    """The rows in Markdown, aligned for a terminal."""
    lines = [["", "seeds", *table[0]["values"]]]
    for row in table:
        cells = [write_value(value, column) for column, value in row["values"].items()]
        lines.append([row["label"], str(len(row["seeds"])), *cells])
    return align(lines)


def sweep(results: Iterable[Result]) -> dict[float, dict[float, Value]]:
    """mAP (`official`, percent) by alpha (`B_w`) and beta, from the cells that differ from `both` in alpha alone."""
    numbers: dict[float, dict[float, list[float]]] = {}
    for result in results:
        if result["cell"] == "both" or set(CELLS[result["cell"]].changes) == {"B_w"}:
            for beta in BETAS:
                mAPs = numbers.setdefault(result["B_w"], {}).setdefault(beta, [])
                mAPs.append(read(result, f"beta {beta:g}"))
    return {
        alpha: {beta: mean_and_deviation(values) for beta, values in by_beta.items()}
        for alpha, by_beta in sorted(numbers.items())
    }


def format_sweep(surface: dict[float, dict[float, Value]]) -> str:
    """The sweep in Markdown: a row for each alpha, a column for each beta."""
    lines = [["mAP by alpha (down) and beta", *(f"{beta:g}" for beta in BETAS)]]
    lines += [[f"{alpha:g}", *(write_value(value) for value in values.values())] for alpha, values in surface.items()]
    return align(lines)


def align(lines: list[list[str]]) -> str:
    """Rows of cells as an aligned Markdown table; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(texts)


def claims(table: list[dict[str, Any]]) -> list[tuple[str, bool | None]]:
    """Each claim with its numbers, and whether it holds; None if a cell lacks seeds that `both` (or `teacher`) has.

    The opponent is the better one that has run of the two teachers with the time of teacher and DG-Net together.
    """
    # Means over different seeds do not compare.
    by_cell = {row["cell"]: row["seeds"] for row in table}
    seeds = by_cell.get("both", by_cell.get("teacher"))
    scored = {(row["cell"], row["setting"]): row["values"] for row in table if row["seeds"] == seeds}

    def mean(name: str, column: str = "mAP") -> float:
        """NaN if it was not measured."""
        value = scored.get((name, CELLS[name].scored), {}).get(column)
        return math.nan if value is None else value[0]

    both, primary, oracle, below = mean("both"), mean("primary_only"), mean("oracle"), mean("both", "below copy, %")
    silent, strong = mean("no_feedback"), mean("strong", "mAP - teacher")
    teachers = [mAP for mAP in (mean("teacher_long"), mean("teacher_erasing")) if not math.isnan(mAP)]
    teacher = max(teachers, default=math.nan)
    gain, ceiling = both - teacher, oracle - teacher
    judged = [
        ("mAP, both > primary only", both > primary, both, primary),
        ("mAP, both > generated images not fed back", both > silent, both, silent),
        ("mAP, primary only > teacher at equal time", primary > teacher, primary, teacher),
        ("mAP, both at least 5 above the teacher at equal time", gain >= 5, both, teacher),
        ("gain in mAP, both at least two thirds of the oracle", gain >= 2 / 3 * ceiling > 0, gain, ceiling),
        ("changed pixels, both at least 50 % below copying", below >= 50, below),
        ("mAP, strong teacher at least 5 above the teacher", strong >= 5, strong),
    ]
    return [
        (f"{text}: not measured", None)
        if math.isnan(sum(values))
        else (f"{text}: {', '.join(f'{value:.1f}' for value in values)}", holds)
        for text, holds, *values in judged
    ]


def format_claims(judged: list[tuple[str, bool | None]]) -> str:
    words = {True: "holds", False: "does not hold", None: "open"}
    return "\n".join(f"- {text}: {words[holds]}" for text, holds in judged)


def draw_figure(path: Path, results: list[Result], title: str) -> None:
    """mAP of every row with its seeds, and the sweeps of alpha and beta, as a PNG."""
    table, surface = rows(results), sweep(results)
    figure = Figure(figsize=(12, max(4.5, 0.34 * len(table) + 1.5)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["cells", "alpha"], ["cells", "beta"]], width_ratios=(1.7, 1))
    for place, row in enumerate(table):
        mean, deviation = row["values"]["mAP"]
        axes["cells"].barh(place, mean, xerr=deviation or 0, color="#9db7d5", capsize=3)
        by_seed = [read(r, row["setting"]) for r in results if r["cell"] == row["cell"]]
        axes["cells"].plot(by_seed, [place] * len(by_seed), "o", color="#1f4e79", markersize=4)
    axes["cells"].set_yticks(range(len(table)), [row["label"] for row in table])
    axes["cells"].invert_yaxis()
    axes["cells"].set_xlabel("mAP, official, %; bar: mean, line: standard deviation, dots: seeds")
    axes["alpha"].set(xlabel="alpha (B_w), at beta 0.5", ylabel="mAP, %")
    axes["beta"].set(xlabel="beta at test time", ylabel="mAP, %")
    if surface:
        means, deviations = zip(*(at[0.5] for at in surface.values()), strict=True)
        axes["alpha"].errorbar(list(surface), means, yerr=[d or 0 for d in deviations], marker="o", capsize=3)
        for alpha, at in surface.items():
            axes["beta"].plot(list(at), [mean for mean, _ in at.values()], "o-", label=f"alpha {alpha:g}")
        axes["beta"].legend(fontsize="small")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
