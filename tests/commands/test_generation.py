"""The swap error against the truth, pair choice, and the grid painter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.folders import ImageList, read_split
from data.images import normalise
from mannequins.dataset import load_factors
from mannequins.truth import (
    MOST_PSNR,
    Swaps,
    choose_pairs,
    clothes_shares,
    draw_swaps,
    image_errors,
    measure_swaps,
    recognise,
    recolour_pixels,
    shrink,
    take_apart,
)
from reid_eval.features import Features, embed_images
from runs.grid import GAP, paint_grid
from utils import UserError


def test_error_on_changed_pixels_and_on_all() -> None:
    true = np.full((1, 16, 16, 3), 100, np.uint8)
    image = true.copy()
    image[0, 0, 0] = 110  # changed, off by 10
    image[0, 1, 1] = 126  # unchanged, off by 26
    changed = np.zeros((1, 16, 16), bool)
    changed[0, 0, :2] = True
    errors = image_errors(image, true, changed)
    assert errors["changed"] == pytest.approx([5.0])
    assert errors["l1"] == pytest.approx([36 / 256])
    assert errors["psnr"] == pytest.approx([10 * np.log10(255**2 / ((100 + 676) / 256))])
    same = image_errors(true, true, ~changed)
    assert same["psnr"] == [MOST_PSNR] and same["ssim"] == pytest.approx([1]) and same["l1"] == same["changed"] == [0]


def test_the_error_of_brightness_and_of_colour() -> None:
    true = np.full((3, 16, 16, 3), 100, np.uint8)
    images = true.copy()
    images[0] = 120  # brighter, without another colour
    images[1] = (130, 100, 70)  # another colour, as bright
    images[2] = (160, 100, 100)  # both
    changed = np.zeros((3, 16, 16), bool)
    changed[:, 4:8] = True
    errors = image_errors(images, true, changed)
    assert errors["brightness"] == pytest.approx([20, 0, 20])
    assert errors["colour"] == pytest.approx([0, 20, (40 + 20 + 20) / 3])
    assert errors["changed"] == pytest.approx([20, 20, 20])
    nothing = image_errors(images, true, np.zeros_like(changed))
    assert nothing["brightness"].tolist() == nothing["colour"].tolist() == [0, 0, 0]


def test_recoloured_is_bright_as_the_structure_image() -> None:
    structure, true = np.full((1, 2, 2, 3), 60, np.uint8), np.full((1, 2, 2, 3), (120, 90, 60), np.uint8)
    assert (recolour_pixels(structure, true) == (90, 60, 30)).all() and (recolour_pixels(true, structure) == 90).all()
    assert (recolour_pixels(true, true) == true).all()
    dark = recolour_pixels(np.zeros_like(true), true)
    assert (dark == (30, 0, 0)).all()  # what would be below black is black


def test_truth_and_copy_are_the_two_ends(tiny_data: Path) -> None:
    factors, images = load_factors(tiny_data), read_split(tiny_data, "query")
    calls = iter(range(100))
    names = [path.name for path in images.paths]
    known = [i for i, name in enumerate(names) if name in factors.images]
    chosen = choose_pairs([factors.images[names[i]].person for i in known], 6, seed=3)

    def drawn(x_app: torch.Tensor, x_str: torch.Tensor) -> torch.Tensor:
        call = next(calls)  # of every batch first the swaps, then the reconstructions
        rows = chosen[call // 2 * 4 : call // 2 * 4 + 4]
        true = [factors.true_swap(names[known[row[call % 2]]], names[known[row[1]]]) for row in rows]
        pixels = np.stack([shrink(image, (64, 32)) for image in true])
        return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    settings = dict(size=(64, 32), count=6, seed=3, batch_size=4)
    swaps = draw_swaps(drawn, factors, images, **settings)
    perfect = measure_swaps(swaps)
    copied = measure_swaps(draw_swaps(lambda _, x_str: x_str, factors, images, **settings))
    assert 0 < perfect["recoloured"]["changed"] < perfect["copy"]["changed"]
    assert perfect["recoloured"] == copied["recoloured"]
    assert perfect["recoloured"]["colour"] < 3  # clipped here and there
    assert perfect["generated"]["changed"] == 0 and perfect["generated"]["psnr"] == MOST_PSNR
    assert perfect["generated"]["ssim"] == pytest.approx(1) and perfect["reconstruction"]["ssim"] > 0.95  # JPEG
    assert perfect["copy"] == copied["copy"] == copied["generated"] and copied["copy"]["changed"] > 20
    assert copied["reconstruction"]["psnr"] == MOST_PSNR
    assert perfect["other"]["changed"] > 20 and perfect["other"] == copied["other"]
    assert len(swaps.appearance) == 6 and (swaps.images["copy"] != swaps.images["true"]).any()


def test_whose_clothes_the_swaps_wear() -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(64)[:, None, None]

    def dressed(i: int, stripes: int, colour: np.ndarray) -> np.ndarray:
        shade = 100 + 30 * (i % 2) + (rows > 32) * 20 * (i % 3)
        pattern = 20 * np.where(rows // stripes % 2, 1, -1)
        image = np.full((64, 32, 3), 40 * (i % 5) + 30)  # the wall, which a swap does not change
        image[8:56, 6:26] = (shade + pattern + colour)[8:56]
        return image.astype(np.uint8)

    colours = rng.permuted(np.tile([-24, 0, 24], (8, 1)), axis=1)
    true = np.stack([dressed(i, 3, colours[i]) for i in range(8)])
    copy = np.stack([dressed(i // 2, 2, colours[(i + 3) % 8][::-1]) for i in range(8)])
    walls = np.stack([dressed(i, 3, colours[i]) for i in range(8)])
    walls[:, 8:56, 6:26] = 0
    for images in (true, copy):
        images[walls > 0] = walls[walls > 0]

    def shares(generated: np.ndarray) -> dict[str, list[float]]:
        swaps = Swaps(np.arange(8), np.arange(8), {"true": true, "copy": copy, "generated": generated})
        return {part: [share["structure"], share["truth"]] for part, share in clothes_shares(swaps).items()}

    assert list(shares(true)) == ["shade", "pattern", "colour"]
    overalls = np.where(walls > 0, true, 90)
    for generated, expected in ((true, [0, 1]), (copy, [1, 0]), (overalls, [0, 0])):
        assert np.allclose(list(shares(generated).values()), expected, atol=1e-6)
    mixed = shares(np.round(0.7 * copy + 0.2 * true).astype(np.uint8))
    assert np.allclose(list(mixed.values()), [0.7, 0.2], atol=0.02)
    # The structure image with the truth's colours keeps its own brightness.
    recoloured = shares(recolour_pixels(copy, true))
    assert np.allclose(recoloured["colour"], [0, 1], atol=0.02)
    assert np.allclose([recoloured["shade"], recoloured["pattern"]], [1, 0], atol=0.02)
    with pytest.raises(UserError, match="true swaps"):
        clothes_shares(Swaps(np.arange(8), np.arange(8), {"true": true, "copy": true, "generated": true}))


def test_the_parts_of_an_image_are_its_sum() -> None:
    rng = np.random.default_rng(0)
    images, changed = rng.integers(0, 256, (2, 32, 16, 3)), rng.random((2, 32, 16)) < 0.5
    parts = take_apart(images, changed)
    assert {name: part.shape[3] for name, part in parts.items()} == {"shade": 1, "pattern": 1, "colour": 3}
    assert np.allclose(sum(parts.values()), images)
    masked = np.where(changed[..., None], images, 0)
    for name, part in take_apart(masked, changed).items():  # what is not changed has no say
        assert np.allclose(part[changed], parts[name][changed])


def test_pairs_join_three_people_and_depend_on_the_seed_alone() -> None:
    people = [i // 3 for i in range(12)]
    pairs = choose_pairs(people, 50, seed=1)
    assert (pairs == choose_pairs(people, 50, seed=1)).all() and (pairs != choose_pairs(people, 50, seed=2)).any()
    assert all(len({people[i] for i in row}) == 3 for row in pairs)
    with pytest.raises(UserError, match="2 people"):
        choose_pairs([0, 0, 1, 1], 3, seed=1)


def painted(hair: np.ndarray, clothes: np.ndarray) -> np.ndarray:
    """Images (n, 32, 16, 3) whose upper and lower halves have the channels `hair` and `clothes`."""
    images, n = np.zeros((len(hair), 32, 16, 3), np.uint8), np.arange(len(hair))
    images[n, :16, :, hair] = images[n, 16:, :, clothes] = 255
    return images


def test_recognition_asks_for_the_appearance() -> None:
    class Colour(torch.nn.Module):
        """Knows people by their mean colour."""

        def embed(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x.mean((2, 3)),)

    images = ImageList([Path(f"{i}.png") for i in range(3)], np.array([1, 2, 3]), np.array([1, 1, 1]))
    i, j = np.array([0, 1, 2]), np.array([1, 2, 0])
    rows = dict(appearance=i, true=i, generated=np.array([0, 1, 0]), copy=j, recoloured=i, reconstruction=j, other=j)
    swaps = Swaps(i, j, {name: painted(colours, colours) for name, colours in rows.items()})
    net = Colour()
    known = embed_images(net, normalise(torch.from_numpy(painted(i, i)).permute(0, 3, 1, 2))).numpy()
    gallery = Features(known, np.array([1, 2, 3]), np.array([2, 2, 2]))
    recognised = recognise(net, (64, 32), swaps, images, gallery, device=torch.device("cpu"))
    expected = dict(appearance=1, true=1, generated=2 / 3, copy=0, recoloured=1, reconstruction=1, other=0)
    assert {row: table["official"]["rank1"] for row, table in recognised.items()} == pytest.approx(expected)


def test_grid_places_every_image() -> None:
    red, blue = np.zeros((8, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    figure = paint_grid([[red, None], [blue, red]], cell_height=16)
    assert tuple(figure[GAP + 8, GAP + 4]) == (255, 0, 0)
    assert tuple(figure[GAP + 8, GAP + 8 + GAP + 4]) == (255, 255, 255)
    assert tuple(figure[GAP + 16 + GAP + 8, GAP + 4]) == (0, 0, 255)
    labelled = paint_grid([[red], [blue]], row_labels=["a", "b"], column_labels=["c"], cell_height=64)
    assert labelled.shape[1] > 32 + 2 * GAP and labelled.shape[0] > 2 * (64 + GAP)
