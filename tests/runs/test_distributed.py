"""Several processes: the numbers of one process in two and four (gloo, float64), and how a run of several ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ALL_LOSSES, CPU, TINY_DGNET, load_script, merged, tiny_config, tiny_teacher_config
from conftest import tiny_trainer as build_tiny
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.batch import Batch
from data.cache import cached_images
from data.folders import read_split
from data.loader import PairLoader
from losses import adversarial_terms, discriminator_terms
from networks import Discriminator
from parallel import collectives, launch
from parallel.layers import act_on_whole_batch
from reid_eval.features import Features, extract_features
from reid_eval.report import evaluate_features, summary
from reIDmodel import build_id_net, build_teacher
from runs.snapshot import snapshots
from trainer import TeacherTrainer
from utils import ROOT, UserError
from visual_tools.curves import read_log

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 8  # identities of the tiny data set
HEIGHT, WIDTH = 40, 20  # the smallest images that the networks take
PATIENCE = 300  # seconds, for processes on a busy machine
# A synchronised and a frozen BatchNorm, either encoder, gray and edges, every kind of dropout, also drawn again.
CASES = {
    "synchronised": dict(sync_bn=True, use_encoder_again=1, erasing_p=0.5),
    "edges": dict(sync_bn=True, use_encoder_again=-1, single="edge", detach_f=False, gen=dict(dropout=0.3)),
    "recomputed": dict(sync_bn=True, use_encoder_again=-1, recompute=True, gen=dict(dropout=0.3)),
    "frozen BatchNorm": dict(train_bn=False, ID_style="PCB", erasing_p=0.5, dis=dict(gan_type="nsgan")),
    "channels last": dict(sync_bn=True, channels_last=True, joint_bn=True, gen=dict(dropout=0.3)),
}


# -------------------------------------------------------------- what is done in one process and in several
def to_double(batch: Batch) -> Batch:
    return batch._replace(x=batch.x.double(), xp=batch.xp.double())


def loader(data: Path, batch_size: int, seed: int, cache: str | bool = False, **options: Any) -> PairLoader:
    images = read_split(data, "train_all", need_names=False)
    pixels = cached_images(images.paths, cache, HEIGHT, WIDTH, limit_mb=100)
    common = dict(height=HEIGHT, width=WIDTH, pad=2, part=collectives.own_part())
    return PairLoader(images, batch_size=batch_size, seed=seed, pixels=pixels, **common, **options)


def together() -> dict[str, Any]:
    return dict(part=collectives.own_part(), average_gradients=collectives.average_gradients)


def gradients(nets: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {
        net: {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        for net, module in nets.items()
    }


def dgnet_trainer(changes: dict[str, Any], dtype: torch.dtype) -> Any:
    size = dict(crop_image_height=HEIGHT, crop_image_width=WIDTH)
    cfg = tiny_config(**merged(ALL_LOSSES | size | dict(batch_size=4), changes))
    torch.manual_seed(0)
    teacher = build_teacher(CLASSES, backbone="resnet10w8")
    trainer = build_tiny(cfg, classes=CLASSES, dtype=dtype, teachers=[teacher], **together())
    own = collectives.own_batch_size(cfg.batch_size, sync_bn=cfg.sync_bn or not cfg.train_bn)
    act_on_whole_batch([*trainer.networks().values(), teacher], own, sync_bn=cfg.sync_bn)
    if not cfg.train_bn:
        for module in trainer.id_net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    torch.manual_seed(7)  # of dropout
    return trainer


def dgnet_step(data: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradients and BatchNorm's statistics of a step, in which every loss takes part."""
    trainer = dgnet_trainer(changes, torch.float64)
    a, b = loader(data, 4, 0), loader(data, 4, 1)
    terms = trainer.step(to_double(a.batch(6)), to_double(b.batch(6)), 6)
    statistics = {n: v.clone() for n, v in trainer.id_net.named_buffers() if v.is_floating_point()}
    losses = [collectives.average_terms(terms)]
    return dict(losses=losses, gradients=gradients(trainer.networks()), statistics=statistics)


def teacher_steps(data: Path) -> dict[str, Any]:
    cfg = tiny_teacher_config(batch_size=8, erasing_p=0.5, sync_bn=True)
    torch.manual_seed(0)
    trainer = TeacherTrainer(cfg, CLASSES, CPU, steps_per_epoch=4, **together())
    trainer.net.double()
    own = collectives.own_batch_size(8, sync_bn=True)
    act_on_whole_batch([trainer.net], own, sync_bn=True)
    batches = loader(data, 8, 3, with_positive=False)
    losses = [collectives.average_terms(trainer.step(to_double(batches.batch(t)), t)) for t in range(3)]
    weights = {n: p.detach().clone() for n, p in trainer.net.named_parameters()}
    return dict(losses=losses, gradients=gradients(trainer.networks()), weights=weights)


def wgan_terms() -> dict[str, Any]:
    """The one loss with a sum over the batch."""
    torch.manual_seed(0)
    dis = Discriminator(dim=4, n_layer=1, n_res=1, gan_type="wgan").double()
    real, fake = torch.randn(2, 8, 3, 256, 128, dtype=torch.float64)
    real, fake = (collectives.own_part().rows(v, 4 // collectives.world_size()) for v in (real, fake))
    how = dict(gan_type="wgan", processes=collectives.world_size())
    terms = discriminator_terms(dis, real, fake, penalty=0.01, **how) | adversarial_terms(dis, fake, **how)
    sum(terms.values()).backward()
    collectives.average_gradients(torch.optim.SGD(dis.parameters(), lr=1))
    return dict(losses=[collectives.average_terms(terms)], gradients=gradients({"dis": dis}))


def batches_of(data: Path) -> dict[str, Batch]:
    plain, cached = loader(data, 4, 5), loader(data, 4, 5, cache=True)
    source = loader(data, 4, 5, cache="source")
    seen = {"files": plain.batch(9), "cache": cached.batch(9), "stream": next(plain.batches(9))}
    return seen | {"source": source.batch(9)}


def features_of(data: Path) -> np.ndarray:
    torch.manual_seed(0)
    net = build_id_net("AB", CLASSES, backbone="resnet10w8").eval()
    paths = read_split(data, "gallery").paths
    return extract_features(net, paths, height=64, width=32, batch_size=5, device=CPU)


def report_of() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sides = []
    for n in (12, 60, 20):
        values = rng.standard_normal((n, 2, 8)).astype(np.float32)
        pids = np.arange(n) % 6
        sides.append(Features(values, pids, rng.integers(1, 4, n) if n == 60 else pids % 3))
    results = evaluate_features(sides[0], sides[1], multi=sides[2], rerank="field")
    return summary(results, sides[0], sides[1])


def everything(data: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {name: dgnet_step(data, changes) for name, changes in CASES.items()}
    seen |= {"teacher": teacher_steps(data), "wgan": wgan_terms(), "batches": batches_of(data)}
    return seen | {"features": features_of(data), "report": report_of()}


def twenty_steps(data: Path) -> dict[str, Any]:
    """Float32 and BatchNorm per process, the default."""
    pairs = 2 * collectives.world_size()
    off = dict.fromkeys(("recon_f_w", "recon_s_w", "recon_x_cyc_w", "teacher_w"), 0)  # until the ramps begin
    trainer = dgnet_trainer(off | dict(batch_size=pairs, warm_iter=16, warm_teacher_iter=17), torch.float32)
    collectives.start_together(trainer, 0, CPU)
    a, b = loader(data, pairs, 0), loader(data, pairs, 1)
    for t in range(20):
        trainer.step(a.batch(t), b.batch(t), t)
    state = lambda: {n: v.clone() for net in trainer.networks().values() for n, v in net.state_dict().items()}  # noqa: E731
    before = state()
    collectives.share_buffers(trainer)
    return {"before": before, "after": state()}


def refusals() -> dict[str, str]:
    seen = {}
    n = collectives.world_size()
    for name, size, sync in (("unequal", n + 1, True), ("one each", n, False)):
        try:
            collectives.own_batch_size(size, sync_bn=sync)
        except UserError as error:
            seen[name] = str(error)
    return seen


# ------------------------------------------------------------------------------------- the processes
def work(rank: int, size: int, port: int, data: Path, out: Path) -> None:
    """A process, started as an MPI launcher would; what it has seen is written to `out`."""
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(1)
    with launch.process_group(Namespace(device="cpu", processes=None)):
        seen = everything(data)
        seen |= {"twenty steps": twenty_steps(data), "refusals": refusals()}
        torch.save(seen, out / f"{size}-{rank}.pt")


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes from one that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs.session", "test_distributed"])
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 preloads with the path of the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/runs"))
    from multiprocessing import forkserver

    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


@pytest.fixture(scope="module")
def alone(tiny_data: Path) -> dict[str, Any]:
    """What one process sees."""
    return everything(tiny_data)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: Any, server: Any, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes of a group see, by rank."""
    size, out = request.param, tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group = [server.Process(target=work, args=(r, size, port, tiny_data, out)) for r in range(size)]
    for process in group:
        process.start()
    for process in group:
        process.join(400)
        assert process.exitcode == 0
    return [torch.load(out / f"{size}-{r}.pt", weights_only=False) for r in range(size)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], scale: float | None = None) -> None:
    """Equal to 1e-6 of each value, or of the largest when `scale` is that."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        reference = scale if scale is not None else value.abs().max().item()
        assert (got[name] - value).abs().max().item() <= 1e-6 * reference + 1e-12, name


# --------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("case", [*CASES, "teacher", "wgan"])
def test_losses_and_gradients_are_those_of_one_process(ranks: Any, alone: Any, case: str) -> None:
    expected = alone[case]
    assert any(grads for grads in expected["gradients"].values())
    for seen in (rank[case] for rank in ranks):
        assert len(seen["losses"]) == len(expected["losses"])
        for terms, terms_alone in zip(seen["losses"], expected["losses"], strict=True):
            assert_close(terms, terms_alone)
        for net, grads in expected["gradients"].items():
            assert_close(seen["gradients"][net], grads, max(grad.abs().max().item() for grad in grads.values()))
        for name in ("statistics", "weights"):
            assert_close(seen.get(name, {}), expected.get(name, {}))


def test_slices_together_are_the_batch_of_one_process(ranks: Any, alone: Any) -> None:
    for kind, batch in alone["batches"].items():
        for field in ("x", "xp", "y", "index"):
            slices = [getattr(rank["batches"][kind], field) for rank in ranks]
            assert len({len(part) for part in slices}) == 1
            assert torch.equal(torch.cat(slices), getattr(batch, field)), (kind, field)


def test_features_and_report_are_those_of_one_process(ranks: Any, alone: Any) -> None:
    assert len(alone["features"]) % 5, "the last batch is not full"
    for rank in ranks:
        assert np.array_equal(rank["features"], alone["features"])
        assert json.dumps(rank["report"]) == json.dumps(alone["report"])


def test_weights_are_identical_after_twenty_steps(ranks: Any) -> None:
    """BatchNorm's statistics are each process's own, until those of process 0 are shared for a snapshot."""
    first, *others = [rank["twenty steps"] for rank in ranks]
    buffers = [name for name in first["before"] if "running" in name and name.startswith(("model.", "classifier"))]
    for seen in others:
        for name, value in first["before"].items():
            assert torch.equal(seen["before"][name], value) == (name not in buffers), name
            assert torch.equal(seen["after"][name], value), name
    assert buffers and all(torch.equal(first["after"][n], v) for n, v in first["before"].items())


def test_batches_that_cannot_be_shared_out_are_refused(ranks: Any) -> None:
    for rank in ranks:
        assert rank["refusals"].keys() == {"unequal", "one each"}
        assert all("batch_size" in message for message in rank["refusals"].values())


# --------------------------------------------------------------------------------------------- endings
PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
from argparse import Namespace
from utils import UserError, run_cli

def main():
    import torch
    from parallel import collectives, launch
    args = Namespace(device="cpu", processes=2)
    if (status := launch.launch_if_asked(args)) is not None:
        return status
    with launch.process_group(args):
        if {how!r} == "all refuse":
            raise UserError("image.jpg: cannot be decoded; replace the file")
        collectives.wait_for_all()
        if collectives.rank() == 1:
            if {how!r} == "one refuses":
                raise UserError("image.jpg: cannot be decoded; replace the file")
            os.kill(os.getpid(), 9)
        if {how!r} == "one dies beside a busy one":
            time.sleep(60)
        while True:
            collectives.average_terms(dict(id=torch.ones(())))

run_cli(main)
"""


@pytest.mark.parametrize(
    "how,status,words",
    [
        ("all refuse", 2, "image.jpg"),
        ("one refuses", 2, "image.jpg"),
        ("one dies", 1, "process 1 of 2.*SIGKILL"),
        ("one dies beside a busy one", 1, "process 1 of 2.*SIGKILL"),
    ],
)
def test_one_failing_process_ends_all_with_one_line(tmp_path: Path, how: str, status: int, words: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT), how=how))
    _, err = (run := shell(tmp_path / "program.py")).communicate(timeout=PATIENCE)
    assert run.returncode == status, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and re.search(words, lines[0]), err


def shell(*arguments: object) -> subprocess.Popen:
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class Pair:
    """A DG-Net run for two processes, long enough to be stopped."""

    common: tuple[object, ...]
    checkpoints: Path
    logs: Path

    def wait_for_snapshot(self, run: subprocess.Popen) -> int:
        """The iteration of the next snapshot that `run` writes."""
        before, end = self.snapshots(), time.monotonic() + PATIENCE
        while self.snapshots() == before and run.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert run.poll() is None, run.communicate()
        return self.snapshots()[-1]

    def snapshots(self) -> list[int]:
        return snapshots(self.checkpoints)


@pytest.fixture
def pair(tiny_data: Path, tmp_path: Path) -> Pair:
    schedule = dict(max_iter=400, snapshot_save_iter=2, image_save_iter=2, eval_iter=4, teacher_style=3)
    changes = schedule | dict(crop_image_height=HEIGHT, crop_image_width=WIDTH, batch_size=4, data_root=str(tiny_data))
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(merged(TINY_DGNET, ALL_LOSSES | changes)))
    common = ("--config", tmp_path / "pair.yaml", "--output_path", tmp_path, "--device", "cpu")
    return Pair(common, tmp_path / "outputs" / "pair" / "checkpoints", tmp_path / "logs" / "pair")


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks up processes in /proc")


@needs_proc
def test_a_killed_process_ends_all_a_signal_stops_all_and_one_continues(script: Any, pair: Pair) -> None:
    run = shell(ROOT / "train.py", *pair.common, "--processes", 2)
    pair.wait_for_snapshot(run)
    ranks = children(run.pid)
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1, err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "SIGKILL" in errors[0] and "Traceback" not in err, err
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert len(list(pair.logs.iterdir())) == 1, "only process 0 writes logs"

    run = shell(ROOT / "train.py", *pair.common, "--processes", 2, "--resume", "auto")
    pair.wait_for_snapshot(run)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + signal.SIGTERM, err
    assert err.count("train.py --resume") == 1 and "Traceback" not in err and "error" not in err, err
    last = pair.snapshots()[-1]
    assert f" {last} of 400" in err
    scalars = read_log(pair.logs)[0]
    for tag in ("eval/reid_mAP_official", "eval/swap_psnr"):
        assert scalars[tag][0].tolist() == list(range(4, last + 1, 4)), "evaluated by both, written once"

    outcome = script("train", *pair.common, "--resume", "--set", f"max_iter={last + 3}", "eval_iter=0")
    assert outcome.code == 0, outcome.err
    assert pair.snapshots()[-1] == last + 3


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


@needs_proc
def test_torchrun_starts_a_killed_run_anew(pair: Pair) -> None:
    options = ("--resume", "auto", "--set", "eval_iter=0")
    run = shell(*TORCHRUN, "--max-restarts", 2, ROOT / "train.py", *pair.common, *options)
    pair.wait_for_snapshot(run)
    killed = children(run.pid)
    os.kill(max(killed), signal.SIGKILL)
    pair.wait_for_snapshot(run)
    end = time.monotonic() + 60
    while set(children(run.pid)) & set(killed) and time.monotonic() < end:
        time.sleep(0.05)  # what was written until now may be by the process that is ending
    reached = pair.wait_for_snapshot(run)
    assert len(children(run.pid)) == 2
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=PATIENCE)
    assert pair.snapshots()[-1] >= reached and err.count("resumed pair") == 1, err


# --------------------------------------------------------------------------------------------- options
def test_gpu_ids_become_one_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--gpu_ids 1,3` starts, on a machine with four GPUs that this test pretends."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []
    monkeypatch.setattr(launch, "elastic_launch", lambda config, _: lambda *argv: started.append((config, argv)))
    argv = ["train.py", "--gpu_ids", "1,3"]
    monkeypatch.setattr(sys, "argv", argv)
    assert load_script("train").main() == 0
    assert [(config.nproc_per_node, config.max_restarts, list(given)) for config, given in started] == [(2, 0, argv)]

    def devices(**options: Any) -> list[str]:
        args = Namespace(**dict(device=None, gpu_ids=None, processes=None) | options)
        return [str(launch.device_of(args, local, 2)) for local in (0, 1)]

    assert devices(gpu_ids="1,3") == ["cuda:1", "cuda:3"] and devices() == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="cuda:7"):
        devices(gpu_ids="0,7")
    with pytest.raises(UserError, match="--gpu_ids"):
        devices(device="cuda:1")


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(processes: int | None, gpu_ids: str | None) -> int:
        return launch.count_processes(Namespace(device=None, processes=processes, gpu_ids=gpu_ids))

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert [count(*given) for given in ((None, None), (3, None), (None, "4,5"))] == [1, 3, 2]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        launch.started()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch.started() and count(None, "4,5") == 8
    with pytest.raises(UserError, match="--processes 2"):
        count(2, None)
