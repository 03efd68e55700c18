"""The swap error against the truth, pair choice, and the grid painter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.mannequins import load_factors, make_dataset
from data.pairs import normalise
from gen_eval.swaps import choose_pairs, measure_swaps, shrink, swap_error
from visual_tools.grid import GAP, PAIR_ROWS, paint_grid, paint_pairs, to_uint8


@pytest.fixture(scope="module")
def mannequins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("swaps") / "mannequins"
    make_dataset(out, preset="tiny")
    return out


def test_swap_error_counts_changed_pixels_only() -> None:
    structure = np.full((4, 4, 3), 100, np.uint8)
    true = structure.copy()
    true[0, 0] = 160  # the only pixel that the swap changes
    generated = np.full((4, 4, 3), 0, np.uint8)
    generated[0, 0] = 150
    assert swap_error(generated.astype(float), true, structure) == (10.0, 60.0)
    assert swap_error(structure.astype(float), structure, structure) == (0.0, 0.0)


def test_truth_and_copy_are_the_two_ends(mannequins: Path) -> None:
    factors = load_factors(mannequins)
    folder = mannequins / "query"
    names = sorted(path.name for path in folder.iterdir())
    pairs = iter(choose_pairs(names, [factors.images[n].person for n in names], 6, seed=3))

    def drawn(x_app: torch.Tensor, x_str: torch.Tensor) -> torch.Tensor:
        true = [shrink(factors.true_swap(*next(pairs)), (64, 32)) for _ in x_app]
        return normalise(torch.from_numpy(np.stack(true)).permute(0, 3, 1, 2))

    perfect = measure_swaps(drawn, factors, folder, size=(64, 32), count=6, seed=3, batch_size=4)
    copied = measure_swaps(lambda _, x_str: x_str, factors, folder, size=(64, 32), count=6, seed=3, batch_size=4)
    assert perfect.generated < 0.5 and perfect.reduction > 0.98
    assert copied.generated == pytest.approx(copied.copy) and copied.reduction == pytest.approx(0)
    assert perfect.copy == copied.copy > 20


def test_pairs_join_different_people_and_depend_on_the_seed_alone() -> None:
    names, people = [f"{i}.jpg" for i in range(12)], [i // 3 for i in range(12)]
    pairs = choose_pairs(names, people, 50, seed=1)
    assert pairs == choose_pairs(names, people, 50, seed=1) != choose_pairs(names, people, 50, seed=2)
    assert all(people[names.index(i)] != people[names.index(j)] for i, j in pairs)


def test_images_come_back_from_normalised_space() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 4), dtype=torch.uint8)
    assert np.array_equal(to_uint8(normalise(pixels)), pixels.permute(0, 2, 3, 1).numpy())


def test_grid_places_every_image() -> None:
    red, blue = np.zeros((8, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    figure = paint_grid([[red, None], [blue, red]], cell_height=16)
    assert tuple(figure[GAP + 8, GAP + 4]) == (255, 0, 0)
    assert tuple(figure[GAP + 8, GAP + 8 + GAP + 4]) == (255, 255, 255)
    assert tuple(figure[GAP + 16 + GAP + 8, GAP + 4]) == (0, 0, 255)
    labelled = paint_grid([[red], [blue]], row_labels=["a", "b"], column_labels=["c"], cell_height=64)
    assert labelled.shape[1] > 32 + 2 * GAP and labelled.shape[0] > 2 * (64 + GAP)


def test_pair_figure_has_a_row_per_role_and_a_column_per_pair() -> None:
    images = {name: torch.zeros(3, 3, 64, 32) for name in PAIR_ROWS}
    assert paint_pairs(images).shape[0] == GAP + len(PAIR_ROWS) * (128 + GAP)
