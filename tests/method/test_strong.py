"""The options of a strong teacher: metric losses, necks, pooling, batches of identities, colours, averaged weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, TINY_DGNET, TINY_TEACHER, Outcome, contents, merged, tiny_teacher_config
from PIL import Image
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners, reducers
from torchvision.transforms import functional as TF

import losses as L
from config import parse_config
from data.augment import change_colours, draw_colours
from data.batch import Batch, Part
from data.folders import read_split
from data.loader import PairLoader
from metric import batch_hard_triplet, circle_loss
from optim import teacher_lr_factor, update_average
from reIDmodel import POOLS, Head, build_id_net, build_teacher
from runs.folder import RunFolder
from runs.load import load_teacher
from trainer import TeacherTrainer
from utils import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = dict(
    pool="gem",
    neck="bnneck",
    label_smoothing=0.1,
    images_per_identity=4,
    triplet_w=1.0,
    circle_w=0.5,
    grayscale_p=0.2,
    jitter=0.2,
    ema_decay=0.9,
    optimizer="adam",
    lr=0.001,
    lr_policy="multistep",
)


def batch_of_identities(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(12, 16) vectors of 3 identities with 4 each, not in order."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    return torch.randn(12, 16, generator=generator, dtype=dtype) + y[:, None], y


# ---------------------------------------------------------------------------------------------- losses
def test_metric_losses_are_those_of_pytorch_metric_learning() -> None:
    v, y = batch_of_identities()
    distance = pml.TripletMarginLoss().distance.__class__(normalize_embeddings=False)
    theirs = pml.TripletMarginLoss(margin=0.3, distance=distance, reducer=reducers.MeanReducer())
    pairs = miners.BatchHardMiner(distance=distance)(v, y)
    circle = pml.CircleLoss(m=0.25, gamma=64, reducer=reducers.MeanReducer())
    for ours, expected in (
        (batch_hard_triplet, lambda v: theirs(v, y, pairs)),
        (circle_loss, lambda v: circle(v, y)),
    ):
        grads = []
        for loss in (lambda v, ours=ours: ours(v, y), expected):
            x = v.clone().requires_grad_()
            (value := loss(x)).backward()
            grads.append((value.item(), x.grad))
        assert grads[0][0] > 0 and grads[0][0] == pytest.approx(grads[1][0], rel=1e-9, abs=1e-9)
        torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-9, atol=1e-9)


def test_metric_losses_are_computed_in_full_precision() -> None:
    v, y = batch_of_identities(torch.float32)
    for loss in (batch_hard_triplet, circle_loss):
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(v, y)
        assert torch.equal(inside, loss(v, y))


def test_a_triplet_by_hand() -> None:
    v, y = torch.tensor([[0.0], [1.0], [1.2], [5.0]], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    # Farthest of the same: 1, 1, 3.8, 3.8; nearest other: 1.2, 0.2, 0.2, 4.
    expected = ((0.3 + 1 - 1.2) + (0.3 + 1 - 0.2) + (0.3 + 3.8 - 0.2) + (0.3 + 3.8 - 4)) / 4
    assert batch_hard_triplet(v, y).item() == pytest.approx(expected)


def test_smoothing_spreads_the_target() -> None:
    p, y = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(5)
    spread = 0.9 * torch.nn.functional.one_hot(y, 7).double() + 0.1 / 7
    assert L.cross_entropy((p,), y, 0.1).item() == pytest.approx(L.cross_entropy((p,), spread).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------ nets
def test_generalised_mean_by_hand() -> None:
    m = torch.tensor([1.0, 2.0, 3.0, -4.0]).view(1, 1, 2, 2)
    assert POOLS["gem"]((1, 1))(m).item() == pytest.approx((36 / 4) ** (1 / 3), rel=1e-5)
    assert POOLS["gem"]((2, 1))(m).flatten().tolist() == pytest.approx([4.5 ** (1 / 3), 13.5 ** (1 / 3)], rel=1e-5)
    half = POOLS["gem"]((1, 1))(torch.full((1, 1, 2, 2), 100.0, dtype=torch.float16))  # its cube is no half
    assert half.item() == pytest.approx(100, rel=1e-3)


def test_a_bnneck_is_a_batchnorm_without_bias_and_a_classifier_without_bias() -> None:
    head, v = Head(6, 4, dropout=0.5, neck="bnneck"), torch.randn(8, 6)
    names = {name for name, weight in head.named_parameters() if weight.requires_grad}
    assert names == {"add_block.0.weight", "classifier.0.weight"}
    head.train()(v).sum().backward()
    head.eval()
    torch.testing.assert_close(head(v), head.embed(v) @ head.classifier[0].weight.T)
    normalised = (v - head.add_block[0].running_mean) / (head.add_block[0].running_var + 1e-5).sqrt()
    torch.testing.assert_close(head.embed(v), normalised)


@pytest.mark.parametrize("style", ["AB", "normal"])
def test_an_id_net_with_neck_and_pool(style: str) -> None:
    net = build_id_net(style, 4, backbone="resnet10w8", pool="gem", neck="bnneck").eval()
    f, logits = net(torch.randn(2, 3, 64, 32))
    assert f.shape == (2, 256) and all(p.shape == (2, 4) for p in logits)
    assert all(e.shape == (2, 64) for e in net.embed(torch.randn(2, 3, 64, 32)))


# ------------------------------------------------------------------------------------------------ data
def loader(data: Path, **options: object) -> PairLoader:
    options = dict(batch_size=8, height=16, width=8, seed=3, with_positive=False) | options
    return PairLoader(read_split(data, "train_all"), **options)


def test_batches_of_identities(tiny_data: Path) -> None:
    whole = loader(tiny_data, images_per_identity=4)
    labels = whole.images.labels()
    seen = []
    for t in range(4):
        batch = whole.batch(t)
        assert torch.equal(batch.y, torch.from_numpy(labels[batch.index]))
        people, counts = np.unique(batch.y.numpy(), return_counts=True)
        assert counts.tolist() == [4, 4]
        assert len(set(batch.index.tolist())) == 8  # everybody has four images or more
        seen += people.tolist()
    assert sorted(seen) == list(range(8))  # all eight identities before any comes again
    again, other = (next(stream.batches(2)) for stream in (whole, loader(tiny_data, images_per_identity=4, seed=4)))
    assert torch.equal(again.index, whole.batch(2).index) and torch.equal(again.x, whole.batch(2).x)
    assert not torch.equal(other.index, whole.batch(2).index)
    halves = [loader(tiny_data, images_per_identity=4, part=Part(k, 2)).batch(1) for k in range(2)]
    assert torch.equal(torch.cat([half.index for half in halves]), whole.batch(1).index)
    few = loader(tiny_data, images_per_identity=4, batch_size=8)
    few._size[:] = 1  # somebody with a single image is repeated
    assert [len(set(few.batch(0).index[k : k + 4].tolist())) for k in (0, 4)] == [1, 1]
    with pytest.raises(UserError, match="8 identities"):
        loader(tiny_data, images_per_identity=2, batch_size=18)


def test_colours_change_as_torchvision_changes_them(tiny_data: Path) -> None:
    image = Image.open(read_split(tiny_data, "train_all").paths[0])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    rng = np.random.default_rng(0)
    draws = draw_colours(1000, rng, grayscale_p=0.3, jitter=0.2)
    assert np.allclose(draws.min(0), [0.8, 0.8, 0.8, -0.02, 0], atol=1e-2)
    assert np.allclose(draws.max(0), [1.2, 1.2, 1.2, 0.02, 1], atol=1e-2) and abs(draws[:, 4].mean() - 0.3) < 0.05
    assert torch.equal(change_colours(pixels, np.array([[1, 1, 1, 0, 0]])), pixels)
    expected = TF.adjust_hue(TF.adjust_saturation(TF.adjust_brightness(pixels, 1.2), 0.9), 0.02)
    assert torch.equal(change_colours(pixels, np.array([[1.2, 1, 0.9, 0.02, 0]])), expected)
    gray = change_colours(pixels, np.array([[1, 1, 1, 0, 1]]))[0]
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])


def test_colours_are_drawn_for_the_whole_batch(tiny_data: Path) -> None:
    options = dict(grayscale_p=0.5, jitter=0.3)
    whole, plain = loader(tiny_data, **options).batch(5), loader(tiny_data).batch(5)
    halves = [loader(tiny_data, part=Part(k, 2), **options).batch(5).x for k in range(2)]
    assert torch.equal(torch.cat(halves), whole.x)
    assert torch.equal(whole.index, plain.index) and not torch.equal(whole.x, plain.x)


# ------------------------------------------------------------------------------------------- the teacher
def test_the_average_of_weights_by_hand() -> None:
    net, average = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    expected = 1.0
    for t in range(30):
        with torch.no_grad():
            net.weight.fill_(t)
        net.num_batches_tracked.fill_(t)
        update_average(average, net, 0.5, t)
        kept = min(0.5, (1 + t) / (10 + t))
        expected = kept * expected + (1 - kept) * t
    assert average.weight.item() == pytest.approx(expected, rel=1e-5) and average.num_batches_tracked == 29


def test_rates_of_multistep() -> None:
    rates = [teacher_lr_factor("multistep", t, warm_iter=10, max_iter=120) for t in (0, 9, 39, 40, 69, 70, 119)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_every_loss_reaches_the_trunk_and_is_weighed() -> None:
    cfg = tiny_teacher_config(batch_size=8, dropout=0, **STRONG)
    x, y = torch.randn(8, 3, 64, 32), torch.arange(8) // 4
    trainer = TeacherTrainer(cfg, 4, CPU, steps_per_epoch=4)
    before = [weight.clone() for weight in trainer.net.parameters()]
    terms = trainer.step(Batch(x, x[:0], y, y), 0)
    assert set(terms) == {"id", "triplet", "circle", "accuracy"} and all(v.isfinite() for v in terms.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.net.parameters(), strict=True))
    assert trainer.trained is trainer.average and trainer.average is not trainer.net
    totals = []
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        cfg = tiny_teacher_config(batch_size=8, dropout=0, images_per_identity=4, triplet_w=weight)
        trainer = TeacherTrainer(cfg, 4, CPU, steps_per_epoch=4)
        trainer.step(Batch(x, x[:0], y, y), 0)
        totals.append(torch.cat([w.grad.flatten() for w in trainer.net.model.layer1.parameters()]))
    assert not torch.allclose(*totals)


@pytest.mark.parametrize(
    "key,settings",
    [
        ("triplet_w", dict(triplet_w=1.0)),
        ("circle_w", dict(circle_w=1.0, images_per_identity=1)),
        ("batch_size", dict(batch_size=10, images_per_identity=4)),
        ("batch_size", dict(batch_size=4, images_per_identity=4)),
        ("jitter", dict(jitter=2.0)),
    ],
)
def test_what_does_not_fit_together_is_refused(key: str, settings: dict[str, object]) -> None:
    with pytest.raises(UserError) as refusal:
        parse_config(TINY_TEACHER | settings, "here")
    assert key in str(refusal.value)


def test_pcb_has_no_bnneck() -> None:
    with pytest.raises(UserError, match="neck"):
        parse_config(TINY_DGNET | dict(ID_style="PCB", neck="bnneck"), "here")


# ------------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def train(tmp_path: Path, tiny_data: Path, script: Callable[..., Outcome]) -> Callable[..., Outcome]:
    def run(name: str, config: dict[str, object], *options: object) -> Outcome:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config | dict(data_root=str(tiny_data))))
        return script("train", "--config", path, "--name", name, "--output_path", tmp_path, "--threads", 1, *options)

    return run


def test_a_strong_teacher_resumes_is_tested_and_starts_an_id_net(
    train: Callable[..., Outcome], script: Callable[..., Outcome], tmp_path: Path
) -> None:
    config = merged(TINY_TEACHER, STRONG | dict(batch_size=8, epochs=2, warm_epochs=1, snapshot_epochs=1))
    for name in ("whole", "parts"):
        assert (outcome := train(name, config)).code == 0, outcome.err
    checkpoints = tmp_path / "outputs" / "parts" / "checkpoints"
    newest = sorted(checkpoints.iterdir())[-1]
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "models" / "parts")
    assert train("parts", config, "--resume").code == 0
    whole = tmp_path / "outputs" / "whole" / "checkpoints" / newest.name
    tensors = ("net.pt", "average.pt", "state.pt")
    assert {n: contents(newest)[n] for n in tensors} == {n: contents(whole)[n] for n in tensors}
    saved = torch.load(tmp_path / "models" / "parts" / "net_last.pth")
    assert torch.equal(saved["model.conv1.weight"], torch.load(newest / "average.pt")["a"]["model.conv1.weight"])

    where = "--output_path", tmp_path, "--threads", 1
    assert script("test", "--teacher", "whole", *where).code == 0
    pupil = dict(teacher="whole", id_init="teacher", pool="gem", neck="bnneck", label_smoothing=0.1, pretrained=False)
    schedule = dict(max_iter=2, warm_teacher_iter=0, snapshot_save_iter=2, lr2=1e-12, id_weight_decay=0)
    assert (outcome := train("pupil", merged(TINY_DGNET, pupil | schedule))).code == 0, outcome.err
    assert script("test", "--name", "pupil", *where).code == 0
    assert "neck" in train("other", merged(TINY_DGNET, pupil | schedule | dict(neck="linear"))).error
    teacher = load_teacher("whole", tmp_path)
    state = torch.load(tmp_path / "outputs" / "pupil" / "checkpoints" / "00000002" / "id.pt")["a"]
    torch.testing.assert_close(state["classifier1.classifier.0.weight"], teacher.classifier.classifier[0].weight)
    assert "unused" not in outcome.err and RunFolder(tmp_path, "pupil").config_file.is_file()


def test_a_teacher_of_unknown_pool_is_refused(tmp_path: Path, script: Callable[..., Outcome]) -> None:
    folder = tmp_path / "models" / "odd"
    folder.mkdir(parents=True)
    torch.save(build_teacher(3, backbone="resnet10w8").state_dict(), folder / "net_last.pth")
    (folder / "opts.yaml").write_text("pool: [a]\nbackbone: resnet10w8\n")
    assert "pool" in script("test", "--teacher", "odd", "--output_path", tmp_path).error
