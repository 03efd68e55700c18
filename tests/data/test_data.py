"""Reading, preparing and batching data sets, on images of coloured noise."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MARKET_NAMES, logged, noise
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data import folders
from data.archives import flat_archive
from data.augment import augment
from data.cache import cached_images
from data.folders import ImageList, parse_name, read_split, require_identities
from data.images import check_images, decoded, iter_images, load_image, normalise, resize, resize_in_float
from data.listing import say_reading
from data.loader import Batch, PairLoader
from data.prepare import Task, fill_folder
from utils import IMAGENET_MEAN, IMAGENET_STD, UserError

HEIGHT, WIDTH = 32, 16


@pytest.fixture
def images(archive: Path) -> ImageList:
    return read_split(archive, "train_all")


def loader(images: ImageList, cache: bool | str = False, limit_mb: int = 4096, **options: object) -> PairLoader:
    options = {"batch_size": 4, "height": HEIGHT, "width": WIDTH, "seed": 3, "pad": 4, **options}
    pixels = cached_images(images.paths, cache, options["height"], options["width"], limit_mb=limit_mb)
    return PairLoader(images, pixels=pixels, **options)


def take(stream: object, n: int) -> list[Batch]:
    """The first n batches; then the stream is closed, as a finished training run does."""
    taken = list(itertools.islice(stream, n))
    stream.close()
    return taken


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.q is None and other.q is None
        for name in ("x", "xp", "y", "index"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# ---- names and lists


def test_parse_name() -> None:
    expected = {"0002_c1s1_000451_03.jpg": (2, 1), "-1_c3s2_000031_02.jpg": (-1, 3), "0005_c15_f004.jpg": (5, 15)}
    assert {name: parse_name(name) for name in expected} == expected
    for name in ("person.jpg", "0002.jpg", "c1_0002.jpg", "0002_s1.jpg", "_c1.jpg"):
        with pytest.raises(UserError, match=name):
            parse_name(name)


def test_first_image_of_each_identity_is_val(archive: Path) -> None:
    val, train = read_split(archive, "val"), read_split(archive, "train")
    assert [p.name for p in val.paths] == [
        "0002_c1s1_000451_01.jpg",
        "0007_c15s2_0001015_01.jpg",
        "0011_c6s1_000001_01.jpg",
        "1500_c2s3_000020_01.jpg",
    ]
    both = sorted(p.name for p in [*val.paths, *train.paths])
    assert (
        both == sorted(MARKET_NAMES["bounding_box_train"]) == [p.name for p in read_split(archive, "train_all").paths]
    )
    # Junk never trains; identity 0 is a person where it has training images.
    for name in ("-1_c1s1_000001_01.jpg", "0000_c1s1_000001_01.jpg"):
        noise(archive / "bounding_box_train" / name)
    assert set(read_split(archive, "train_all").pids.tolist()) == {0, 2, 7, 11, 1500}
    gallery = read_split(archive, "gallery")
    assert gallery.pids.tolist() == [-1, 0, 3, 3, 4] and gallery.camids.tolist() == [3, 6, 1, 2, 5]


@pytest.mark.parametrize("split", folders.SPLITS)
def test_prepared_and_archive_give_the_same_lists(archive: Path, split: str) -> None:
    before = read_split(archive, split)
    fill_folder(Task("Market-1501", archive, flat_archive(archive)))
    for root in (archive, archive / "pytorch"):
        after = read_split(root, split)
        assert after.paths[0].parent.parent == archive / "pytorch" / split
        assert [p.name for p in after.paths] == [p.name for p in before.paths]
        for numbers in ("pids", "camids"):
            assert np.array_equal(getattr(after, numbers), getattr(before, numbers))
        assert np.array_equal(after.labels(), before.labels())


def test_labels_are_those_of_image_folder(tmp_path: Path) -> None:
    for token, n in (("2", 2), ("20", 1), ("10", 3), ("0", 1), ("0003", 2)):
        for i in range(n):
            noise(tmp_path / "train_all" / token / f"{token}_c1s1_{i}.JPG")
    (tmp_path / "train_all" / ".hidden").mkdir()
    ours, theirs = read_split(tmp_path, "train_all"), ImageFolder(str(tmp_path / "train_all"), allow_empty=True)
    assert [str(p) for p in ours.paths] == [path for path, _ in theirs.samples]
    hidden = theirs.class_to_idx[".hidden"]
    assert ours.classes == [c for c in theirs.classes if c != ".hidden"]
    assert ours.labels().tolist() == [label - (label > hidden) for label in theirs.targets]
    assert ours.num_classes == 5
    assert ours.pids.tolist() == [0, 3, 3, 10, 10, 10, 2, 2, 20]
    assert ours.select([True] + [False] * 7 + [True]).labels().tolist() == [0, 1]


def test_training_needs_no_parsable_names(tmp_path: Path) -> None:
    for person in ("anna", "bob"):
        for i in (1, 2):
            noise(tmp_path / "train_all" / person / f"photo {i}.png")
    noise(tmp_path / "train_all" / "bob" / "0009_c4s1.jpg")
    listed = read_split(tmp_path, "train_all", need_names=False)
    assert listed.labels().tolist() == [0, 0, 1, 1, 1] and listed.pids.tolist() == [1, 1, 2, 2, 2]
    assert listed.camids.tolist() == [0, 0, 4, 0, 0] and listed.num_classes == 2
    with pytest.raises(UserError, match="photo 1.png"):
        read_split(tmp_path, "train_all")


def test_read_split_errors(archive: Path, tmp_path: Path) -> None:
    def refused(root: Path, split: str, *named: object) -> None:
        with pytest.raises(UserError) as error:
            read_split(root, split)
        assert all(str(name) in str(error.value) for name in named)

    with pytest.raises(UserError, match="bounding_box_train.*0002"):
        require_identities(read_split(archive, "train_all").select(np.arange(10) < 4))
    refused(tmp_path / "nowhere", "query", tmp_path / "nowhere", "data_root")
    refused(archive, "test", "train_all", "multi-query")
    shutil.rmtree(archive / "gt_bbox")
    refused(archive, "multi-query", archive, "gt_bbox")
    for path in (archive / "bounding_box_test").glob("*.jpg"):
        path.unlink()
    refused(archive, "gallery", archive / "bounding_box_test")
    folder = tmp_path / "other" / "train_all"
    (folder / "0001").mkdir(parents=True)
    refused(folder.parent, "train_all", folder)
    noise(folder / "0001_c1.jpg")
    refused(folder.parent, "train_all", folder, "0001_c1.jpg")


# ---- damaged images


@pytest.fixture
def damaged(tmp_path: Path) -> list[Path]:
    """Ten files, of which the first four are good."""
    good = [noise(tmp_path / "good.jpg"), noise(tmp_path / "tiny.png", (1, 1)), noise(tmp_path / "bitmap.bmp")]
    mislabelled = Path(shutil.copy(good[1], tmp_path / "really_a_png.jpg"))
    cut = [noise(tmp_path / f"cut.{suffix}", (64, 128)) for suffix in ("jpg", "png", "bmp")]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image\n")
    return [*good, mislabelled, *cut, *(tmp_path / f"{name}.jpg" for name in ("empty", "text", "missing"))]


def test_check_images_agrees_with_loading(damaged: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    say_reading({})  # what other tests have left out
    assert check_images(damaged, skip_bad=True) == [True] * 4 + [False] * 6
    left_out = say_reading({})["left_out"]
    assert sum(row["count"] for row in left_out.values()) == 6 and "cut.jpg" in logged(caplog)
    with pytest.raises(UserError, match="skip_bad_images"):
        check_images(damaged, skip_bad=False)
    with pytest.raises(UserError, match="6 of 6"):
        check_images(damaged[4:], skip_bad=True)
    assert check_images(damaged[:4], skip_bad=False) == [True] * 4
    assert not logged(caplog)
    for path in damaged[:4]:
        assert decoded(path, (HEIGHT, WIDTH)).shape == (3, HEIGHT, WIDTH)
    for path in damaged[4:]:
        with pytest.raises(UserError, match=path.name) as error:
            load_image(path)
        assert "\n" not in str(error.value)


def test_check_sees_through_thumbnails_and_trailing_bytes(tmp_path: Path) -> None:
    whole = noise(tmp_path / "whole.jpg", (64, 128)).read_bytes()
    thumbnail = noise(tmp_path / "thumbnail.jpg", (8, 16)).read_bytes()
    # A comment segment that holds a complete JPEG, as EXIF thumbnails do.
    comment = b"\xff\xfe" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = whole[:2] + comment + whole[2:]
    cut, trailing = tmp_path / "a.jpg", tmp_path / "b.jpg"
    cut.write_bytes(with_thumbnail[:-100])
    trailing.write_bytes(with_thumbnail + bytes(10_000))
    assert check_images([cut, trailing], skip_bad=True) == [False, True]


def test_load_image_modes(tmp_path: Path) -> None:
    for mode, suffix in (("L", "jpg"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("1", "png"), ("LA", "png")):
        image = load_image(noise(tmp_path / f"{mode}.{suffix}", mode=mode))
        assert image.mode == "RGB" and image.size == (20, 44)
    Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert (np.asarray(load_image(tmp_path / "deep.png")) == np.full((4, 4, 3), 0x80)).all()

    # Turned upright, as the camera says.
    image = Image.open(noise(tmp_path / "a.png", (20, 44)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(image))


# ---- batches


@pytest.mark.parametrize("pad", [0, 5, 40])
def test_augment_is_torchvisions_flip_resize_pad_crop(images: ImageList, pad: int) -> None:
    """Also where more is padded than the image has."""
    flips, corners = [False, True, True, False], [(0, 0), (2 * pad, pad // 2), (pad, pad), (pad // 3, 2 * pad)]
    pixels = torch.stack([decoded(path, (HEIGHT, WIDTH)) for path in images.paths[:4]])
    top, left = torch.tensor(corners).T
    ours = normalise(augment(pixels, torch.arange(4), torch.tensor(flips), top, left, pad))
    for i, path in enumerate(images.paths[:4]):
        steps = [
            transforms.functional.hflip if flips[i] else lambda image: image,
            transforms.Resize((HEIGHT, WIDTH), transforms.InterpolationMode.BICUBIC),
            transforms.Pad(pad, padding_mode="edge"),
            lambda image, at=corners[i]: transforms.functional.crop(image, *at, HEIGHT, WIDTH),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
        assert torch.equal(ours[i], transforms.Compose(steps)(load_image(path)))


def test_an_epoch_covers_each_image_once(images: ImageList) -> None:
    stream = loader(images, batch_size=5, cache=True)
    assert stream.batches_per_epoch == 2
    epochs = [take(stream.batches(start), 2) for start in (0, 2, 4)]
    orders = [torch.cat([batch.index for batch in epoch]).tolist() for epoch in epochs]
    for order in orders:
        assert sorted(order) == list(range(10))
    assert orders[0] != orders[1] != orders[2]
    first, second = take(loader(images, cache=True).batches(), 2)
    assert len(set(torch.cat([first.index, second.index]).tolist())) == 8  # two are dropped
    assert not np.array_equal(loader(images, seed=0).order(0), loader(images, seed=1).order(0))
    with pytest.raises(UserError, match="10 .*batch_size 11"):
        loader(images, batch_size=11)


def test_positive_has_the_same_identity_and_differs(images: ImageList) -> None:
    stream = loader(images, cache=True)
    labels, index = images.labels(), np.arange(len(images))
    seen: dict[int, set[int]] = {i: set() for i in range(len(images))}
    for seed in range(300):
        chosen = stream._draw_positives(np.random.default_rng(seed), index)
        assert (labels[chosen] == labels).all()
        for i, other in enumerate(chosen.tolist()):
            seen[i].add(other)
    for i in seen:
        others = set(np.flatnonzero(labels == labels[i]).tolist()) - {i}
        assert seen[i] == (others or {i})


def test_positive_pixels_are_those_of_the_drawn_image(images: ImageList) -> None:
    stream = loader(images, cache=True, pad=0)
    plain = normalise(stream.pixels)
    labels = images.labels()
    for t in range(6):
        batch = stream.batch(t)
        assert batch.x.shape == batch.xp.shape == (4, 3, HEIGHT, WIDTH)
        assert batch.y.tolist() == labels[batch.index.numpy()].tolist()
        for x, xp, i in zip(batch.x, batch.xp, batch.index.tolist(), strict=True):
            assert torch.equal(x, plain[i]) or torch.equal(x.flip(2), plain[i])
            match = [j for j, p in enumerate(plain) if torch.equal(xp, p) or torch.equal(xp.flip(2), p)]
            assert len(match) == 1 and labels[match[0]] == labels[i]
            assert (match[0] == i) == ((labels == labels[i]).sum() == 1)


def test_draws_depend_on_seed_and_iteration_alone(images: ImageList) -> None:
    """A stream entered later, from files, a cache or workers, has the batches of an uninterrupted one."""
    whole = take(loader(images, cache=True).batches(), 9)
    state = torch.random.get_rng_state()
    too_small = {"cache": "auto", "limit_mb": 0, "num_workers": 2}
    for options in ({}, {"num_workers": 2}, {"num_workers": 1}, {"cache": "resized", "num_workers": 2}, too_small):
        assert_same(whole[5:], take(loader(images, **options).batches(5), 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert_same([whole[7]], [loader(images).batch(7)])


def test_the_draws_of_a_seed(images: ImageList) -> None:
    """Runs can only be repeated and resumed as long as these numbers stay."""
    chosen, flip, top, left = loader(images, seed=7)._draw(11)
    assert chosen.tolist() == [1, 7, 4, 3, 3, 7, 5, 0]
    assert (flip[:4].tolist(), left[:4].tolist()) == ([False, True, True, True], [3, 1, 3, 4])
    assert top.tolist() == [6, 0, 6, 3, 1, 2, 8, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_undecodable_image_is_named_in_one_line(images: ImageList, num_workers: int) -> None:
    images.paths[0].write_bytes(images.paths[0].read_bytes()[:300])
    with pytest.raises(UserError, match=images.paths[0].name) as error:
        take(loader(images, num_workers=num_workers).batches(), 3)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=images.paths[0].name):
        loader(images, cache=True)


@pytest.mark.parametrize("batch_size", [3, 5, 100])
def test_iter_images(images: ImageList, batch_size: int) -> None:
    steps = [transforms.Resize((HEIGHT, WIDTH), 3), transforms.ToTensor()]
    steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    expected = torch.stack([transforms.Compose(steps)(load_image(path)) for path in images.paths])
    batches = list(iter_images(images.paths, HEIGHT, WIDTH, batch_size))
    assert torch.equal(torch.cat(batches), expected)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert list(iter_images([], HEIGHT, WIDTH, batch_size)) == []


# ---- the cache


def photo(path: Path, size: tuple[int, int]) -> Path:
    """Save smooth shapes of four scales with a little noise; `size` is (width, height)."""
    rng = np.random.default_rng(list(path.name.encode()))
    shapes = [
        Image.fromarray(rng.integers(0, 256, (size[1] // s + 1, size[0] // s + 1, 3), dtype=np.uint8)).resize(size, 3)
        for s in (4, 8, 16, 32)
    ]
    image = np.mean([np.asarray(shape, np.float32) for shape in shapes], axis=0)
    image += rng.normal(0, 4, image.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> ImageList:
    """Four identities of two photo-like images, of Market-1501's size."""
    names = [f"000{person}_c{camera}s1_000001_01.png" for person in range(1, 5) for camera in (1, 2)]
    for name in names:
        photo(tmp_path / "photos" / "train_all" / name[:4] / name, (64, 128))
    return read_split(tmp_path / "photos", "train_all")


@pytest.mark.parametrize("resizing", [resize, resize_in_float])
@pytest.mark.parametrize("size", [(256, 128), (64, 32), (100, 90)])
def test_resizing_in_batches_is_pillows_to_one_grey_level(
    photos: ImageList, resizing: Callable[..., torch.Tensor], size: tuple[int, int]
) -> None:
    pillows = torch.stack([decoded(path, size) for path in photos.paths]).int()
    source = torch.stack([decoded(path) for path in photos.paths])
    ours = resizing(source, *size)
    assert ours.dtype == torch.uint8
    assert (ours.int() - pillows).abs().max() <= 1
    # Where one side grows and the other shrinks, Pillow may take its passes in the other order.
    assert (ours.int() != pillows).float().mean() < (0.3 if size == (100, 90) else 0.001)
    assert resize(source, 128, 64) is source


def test_a_cache_at_the_files_size_gives_the_batches_of_files(photos: ImageList) -> None:
    size = {"height": 256, "width": 128, "pad": 10}
    reference = take(loader(photos, **size).batches(2), 3)
    cached = loader(photos, cache="source", **size)
    assert cached.pixels.shape == (8, 3, 128, 64) and cached.resized_by == "PyTorch, cpu"
    step = 1 / 255 / min(IMAGENET_STD)
    for ours, files in zip(take(cached.batches(2), 3), reference, strict=True):
        assert torch.equal(ours.index, files.index) and torch.equal(ours.y, files.y)
        assert max((ours.x - files.x).abs().max(), (ours.xp - files.xp).abs().max()) < 1.001 * step
        assert (ours.x != files.x).float().mean() < 1e-3


def test_what_is_cached(photos: ImageList, caplog: pytest.LogCaptureFixture) -> None:
    def shape(cache: object, height: int, width: int, limit_mb: int = 4096) -> tuple[int, ...] | None:
        made = loader(photos, cache=cache, height=height, width=width, limit_mb=limit_mb)
        kept = None if made.pixels is None else tuple(made.pixels.shape[2:])
        assert made.resized_by == ("Pillow" if kept in (None, (height, width)) else "PyTorch, cpu")
        return kept

    for cache, large, small in (
        ("auto", (128, 64), (64, 32)),  # the smaller of the two
        ("source", (128, 64), (128, 64)),
        ("resized", (256, 128), (64, 32)),
        (True, (256, 128), (64, 32)),
        (False, None, None),
    ):
        assert (shape(cache, 256, 128), shape(cache, 64, 32)) == (large, small)
    assert logged(caplog) == ""
    # 8 images of 3 x 1024 x 512 are 12.6 MB, as files 0.2 MB.
    assert shape("resized", 1024, 512, 12) is None
    note = logged(caplog)
    assert note.count("\n") == 1 and "13 MB" in note and "cache_limit_mb 12" in note
    assert shape("auto", 1024, 512, 12) == (128, 64)
    assert logged(caplog) == ""


def test_images_of_unequal_sizes_are_cached_resized(photos: ImageList, caplog: pytest.LogCaptureFixture) -> None:
    photo(photos.paths[5], (60, 128))
    for cache in ("auto", "source"):
        made = loader(photos, cache=cache, height=256, width=128)
        assert torch.equal(made.pixels, torch.stack([decoded(path, (256, 128)) for path in photos.paths]))
        note = logged(caplog)
        assert note.count("\n") == 1 and photos.paths[5].name in note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{"cache": "source"}, {"cache": "resized"}, {"num_workers": 1}])
def test_batches_on_a_gpu_are_those_of_the_cpu(photos: ImageList, options: dict[str, object]) -> None:
    size = {"height": 256, "width": 128, "pad": 10}
    there = take(loader(photos, device="cuda", **size, **options).batches(), 3)
    for ours, files in zip(there, take(loader(photos, **size).batches(), 3), strict=True):
        assert ours.x.is_cuda and ours.xp.is_cuda and torch.equal(ours.index, files.index)
        assert (ours.x.cpu() - files.x).abs().max() < 1.01 / 255 / min(IMAGENET_STD)
