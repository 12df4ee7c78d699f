"""The linear probe from the command line: a grid, few labels, features that are kept."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from PIL import Image
from torch import Tensor


class Prober:
    """Probes the weights of one short pretraining on digits."""

    def __init__(self, output: Path) -> None:
        self.output = output
        argv = runs.arguments("byol", output, "weights")
        assert forked.run("main_pretrain", argv, output / "log") == [0]
        self.weights = output / "byol" / "weights" / f"ckpt_{runs.STEPS:08d}.pt"

    def start(
        self, tag: str, *flags: str, world: int = 1, prepare: Any = None, **keys: Any
    ) -> list[forked.Job]:
        keys = {"LINEAR__EPOCHS": 2, "LINEAR__BATCH_SIZE": 256 // world, "KNN__K": [5], **keys}
        given = ("--pretrained", str(self.weights), *flags)
        argv = runs.arguments("byol", self.output, tag, *given, world=world, **keys)
        return forked.start("main_linear", argv, self.output / "log", ranks=world, prepare=prepare)

    def run(self, tag: str, *flags: str, world: int = 1, **keys: Any) -> str:
        jobs = self.start(tag, *flags, world=world, **keys)
        assert [job.wait() for job in jobs] == [0] * world, jobs[0].text()
        return jobs[0].text()

    def folder(self, tag: str, suffix: str = "-cached") -> Path:
        return self.output / "byol" / tag / "linear" / f"{self.weights.stem}{suffix}"

    def result(self, tag: str, suffix: str = "-cached") -> dict[str, Any]:
        return json.loads((self.folder(tag, suffix) / "result.json").read_text())

    def heads(self, tag: str, suffix: str = "-cached") -> dict[str, Tensor]:
        return runs.final_state(self.folder(tag, suffix))["framework"]


GRID = ("--lr", "0.1", "3", "--weight-decay", "0", "0.01", "--cached-features")


@pytest.fixture(scope="module")
def prober(tmp_path_factory: pytest.TempPathFactory) -> Prober:
    made = Prober(tmp_path_factory.mktemp("probe"))
    made.run("grid", *GRID, "--labels", "5", "100")
    return made


@pytest.mark.parametrize("suffix", ["-cached", "-cached-5pct"])
def test_each_head_of_each_subset_is_the_head_of_a_run_alone(prober: Prober, suffix: str) -> None:
    labels = "5" if suffix.endswith("5pct") else "100"
    together = prober.heads("grid", suffix)
    prober.run(
        "alone", "--lr", "3", "--weight-decay", "0.01", "--cached-features", "--labels", labels
    )
    alone = prober.heads("alone", suffix)
    for name in ("weights", "biases"):
        assert torch.equal(together[f"{name}.3"], alone[f"{name}.0"])
    assert (together["weights.3"] - together["weights.1"]).abs().max() > 1e-4
    result, single = prober.result("grid", suffix), prober.result("alone", suffix)
    assert result["final_by_point"]["lr3_wd0.01"] == single["final_by_lr"]["3"]
    assert result["knn5_top1"] == single["knn5_top1"]
    assert result["images"] == {"5": 72, "100": 1438}[labels]


def test_heads_of_a_grid_are_those_of_a_run_alone_with_an_optimiser_of_timm(
    prober: Prober,
) -> None:
    keys = {"LINEAR__OPTIM__NAME": "timm/muon"}
    prober.run("both", "--lr", "0.003", "0.03", "--cached-features", **keys)
    prober.run("one", "--lr", "0.03", "--cached-features", **keys)
    assert torch.equal(prober.heads("both")["weights.1"], prober.heads("one")["weights.0"])
    top1, _ = prober.result("one")["final_by_lr"]["0.03"]
    assert top1 > 40  # percent, of ten classes


DIVERGING = ("--lr", "0.1", "1e18", "--weight-decay", "0", "0.01", "--cached-features")


@pytest.mark.parametrize("world", [1, 2])
def test_a_diverging_head_is_closed_and_leaves_the_others_alone(prober: Prober, world: int) -> None:
    # lr x weight decay far above 2: these weights grow past float32 within a few steps
    tag, beside = f"diverging{world}", f"healthy{world}"
    text = prober.run(tag, *DIVERGING, world=world, LINEAR__EPOCHS=4)
    assert len(re.findall(r"lr1e\+18_wd0\.01 diverged at step \d+ and was closed", text)) == 1
    flags = ("--lr", "0.1", "--weight-decay", "0", "0.01", "--cached-features")
    prober.run(beside, *flags, world=world, LINEAR__EPOCHS=4)
    mixed, healthy = prober.heads(tag), prober.heads(beside)
    for name in ("weights", "biases"):
        assert torch.equal(mixed[f"{name}.0"], healthy[f"{name}.0"])
        assert torch.equal(mixed[f"{name}.2"], healthy[f"{name}.1"])
        assert not mixed[f"{name}.3"].any()  # the closed head is zero
    result, alone = prober.result(tag), prober.result(beside)
    assert set(result["diverged"]) == {"lr1e+18_wd0.01"}
    assert "lr1e+18_wd0.01" not in result["final_by_point"]
    assert result["final_by_point"].items() >= alone["final_by_point"].items()
    log = (prober.folder(tag) / "metrics.jsonl").read_text()
    assert "NaN" not in log
    assert "null" not in log


def test_a_grid_with_a_closed_head_resumes_bit_identically(prober: Prober) -> None:
    keys = {"LINEAR__EPOCHS": 4, "LINEAR__BATCH_SIZE": 256}
    prober.run("whole", *DIVERGING, **keys)
    step = max(prober.result("whole")["diverged"].values()) + 4
    (job,) = prober.start("cut", *DIVERGING, prepare=partial(runs.kill_at, step=step), **keys)
    assert job.wait() == -signal.SIGKILL
    prober.run("cut", *DIVERGING, **keys)
    assert runs.digest(prober.folder("cut")) == runs.digest(prober.folder("whole"))
    assert prober.result("cut") == prober.result("whole")


def test_a_grid_whose_heads_all_diverge_stops(prober: Prober) -> None:
    (job,) = prober.start(
        "all",
        "--lr",
        "1e17",
        "1e18",
        "--weight-decay",
        "0.1",
        "--cached-features",
        LINEAR__EPOCHS=4,
    )
    assert job.wait() == 3, job.text()
    assert "the gradient norm is nan" in job.text()


def test_a_subset_beside_others_is_the_subset_by_itself(prober: Prober) -> None:
    prober.run("subset", *GRID, "--labels", "5")
    assert runs.digest(prober.folder("subset", "-cached-5pct")) == runs.digest(
        prober.folder("grid", "-cached-5pct")
    )
    assert prober.result("subset", "-cached-5pct") == prober.result("grid", "-cached-5pct")
    knn = [prober.result("grid", suffix)["knn5_top1"] for suffix in ("-cached", "-cached-5pct")]
    assert knn[0] > knn[1]  # whose neighbours are few


def test_features_are_kept_and_verified(prober: Prober) -> None:
    shutil.copytree(prober.folder("grid").parent, prober.folder("again").parent)
    for path in prober.folder("again").glob("ckpt_*"):
        path.unlink()
    before = runs.digest(prober.folder("grid"))
    assert "computed" not in prober.run("again", *GRID)
    assert runs.digest(prober.folder("again")) == before
    (file,) = prober.folder("again").glob("features_val_*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    text = prober.run("again", *GRID)
    assert re.search(r"features of val are computed for .*damaged", text)
    assert not re.search(r"features of train are computed", text)
    assert prober.result("again") == prober.result("grid")
    assert "computed" not in prober.run("again", *GRID, "--eval")
    assert re.search(
        r"train are computed .*none yet", prober.run("again", *GRID, "--precision", "bf16")
    )


def test_other_images_of_the_same_names_are_other_images(prober: Prober, tmp_path: Path) -> None:
    """Neither a finished probe nor kept features may stand for those of another folder."""
    one = runs.image_folder(tmp_path / "one")
    other = shutil.copytree(one, tmp_path / "other")
    for path in (other / "val").rglob("*.png"):
        Image.new("RGB", (24, 24)).save(path)
    keys = {"DATA__DATASET": "imagefolder", "LINEAR__BATCH_SIZE": 16, "AUG__RECIPE": "cifar10"}
    prober.run("images", "--cached-features", DATA__PATH=str(one), **keys)
    place = prober.folder("images")
    assert len(list(place.glob("features_val_*.npy"))) == 1
    (job,) = prober.start("images", "--cached-features", DATA__PATH=str(other), **keys)
    assert job.wait() == 2
    assert "the test images are other ones now" in job.text()
    # an evaluation may look at other test images
    prober.run("images", "--cached-features", "--eval", DATA__PATH=str(other), **keys)
    for path in place.glob("ckpt_*"):
        path.unlink()
    prober.run("images", "--cached-features", DATA__PATH=str(other), **keys)
    assert len(list(place.glob("features_val_*.npy"))) == 2
    assert len(list(place.glob("features_train_*.npy"))) == 1


def test_two_processes_probe_the_same_features_alike(prober: Prober) -> None:
    shutil.copytree(
        prober.folder("grid"), prober.folder("pair"), ignore=shutil.ignore_patterns("ckpt_*")
    )
    prober.run("pair", *GRID, world=2)
    one, two = prober.result("grid"), prober.result("pair")
    assert one["knn5_top1"] == two["knn5_top1"]
    for name, value in prober.heads("grid").items():
        torch.testing.assert_close(prober.heads("pair")[name], value, rtol=1e-4, atol=1e-5)


def test_killed_between_subsets_and_started_again(prober: Prober) -> None:
    flags = (*GRID, "--labels", "5", "100")
    (job,) = prober.start("killed", *flags, prepare=partial(runs.kill_at, step=7))
    assert job.wait() == -signal.SIGKILL
    assert runs.status(prober.folder("killed", "-cached-5pct"))["state"] == "done"
    prober.run("killed", *flags)
    for suffix in ("-cached", "-cached-5pct"):
        assert runs.digest(prober.folder("killed", suffix)) == runs.digest(
            prober.folder("grid", suffix)
        )
        assert prober.result("killed", suffix) == prober.result("grid", suffix)


def test_few_labels_without_kept_features_are_refused(prober: Prober) -> None:
    (job,) = prober.start("refused", "--labels", "5")
    assert job.wait() == 2
    assert "--labels" in job.text()
    assert "main_semisup.py" in job.text()


def test_the_subset_is_that_of_fine_tuning(prober: Prober) -> None:
    flags = ("--pretrained", "none", "--run-name", "x", "--train-percent", "5", "--epochs", "1")
    argv = runs.arguments("byol", prober.output, "semisup", *flags)
    assert forked.run("main_semisup", argv, prober.output / "log") == [0]
    state = runs.final_state(prober.output / "byol" / "semisup" / "semisup" / "x")
    subset = runs.final_state(prober.folder("grid", "-cached-5pct"))
    assert state["dataset"].split()[-1] == subset["dataset"].split()[-1]


def test_two_networks_of_a_file_are_two_probes(prober: Prober, tmp_path: Path) -> None:
    flags = ("--lr", "0.1", "--cached-features")
    text = prober.run("which", *flags)
    assert "took online, the file also holds: target (--which target)" in text
    text = prober.run("which", *flags, "--which", "target")
    assert "took target, the file also holds: online (--which online)" in text
    online, target = ("-cached", "-target-cached")
    assert prober.result("which", target)["weights"] == f"{prober.weights.stem}-target"
    assert not torch.equal(
        prober.heads("which", online)["weights.0"], prober.heads("which", target)["weights.0"]
    )
    # A probe of one network does not go on as a probe of the other, wherever its checkpoint comes
    # from.
    last = sorted(prober.folder("which", online).glob("ckpt_*.pt"))[-1]
    (job,) = prober.start("other", *flags, "--which", "target", "--resume", str(last))
    assert job.wait() == 2
    assert ", target" in job.text()
