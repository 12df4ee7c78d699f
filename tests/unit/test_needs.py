"""What a run needs, by hand; and what a step shares, counted on pretended processes."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models import FRAMEWORKS, assemble_framework
from models.parts.momentum import MomentumFramework
from pretraining import needs
from pretraining.dry_run import count_traffic, queues_of, shared_numbers
from pretraining.needs import Queue, Shared
from utils.schedules import Progress

WORLD, IMAGES, SIZE = 4, 4, 32


def test_bytes_by_hand() -> None:
    # 1,000 float32: 4,000 bytes; in a ring of four each sends six quarters of them
    assert needs.averaged(1000, 4) == 6000
    assert needs.gathered(1000, 4) == 12_000  # to three others
    assert needs.shuffled(1000, 4) == 3000  # a quarter stays
    assert needs.averaged(1000, 1) == needs.gathered(1000, 1) == needs.shuffled(1000, 1) == 0


def test_resnet50_of_moco_v2_on_eight_processes_by_hand() -> None:
    # 27.97 million weights (ResNet-50 and its head), 32 images of 224 px, keys of 128 numbers that
    # go home from the shuffle and then into the queue
    shared = Shared(gradients=27_966_656, keys=2 * 32 * 128, images=32 * 3 * 224 * 224)
    sent = shared.sent(8)
    assert sent["gradients"] == pytest.approx(195.77e6, rel=1e-4)  # 2 x 7/8 x 111.87 MB
    assert sent["keys"] == 7 * 8192 * 4
    assert sent["images"] == pytest.approx(16.86e6, rel=1e-3)  # 7/8 x 19.27 MB
    # 212.8 MB in a tenth of 0.25 s are 8.5 GB/s
    assert needs.gigabits(sum(sent.values()), 0.25) == pytest.approx(68.1, rel=1e-3)


def test_rate_cores_and_queue_by_hand() -> None:
    assert needs.scaled_rate(0.03, 2048, 256) == pytest.approx(0.24)
    assert needs.scaled_rate(0.001, 2048, 0) == 0.001
    assert needs.cores(1800, 225) == 8
    queue = Queue(65536, 128, 32)
    assert queue.mebibytes() == 32
    assert queue.describe(8) == "256 steps"
    assert Queue(65536, 128, 24).describe(8) == "no multiple of 192"
    assert Queue(4096, 128, 32).describe(512) == "no multiple of 16384"


def test_the_table_has_a_line_for_each_number_of_processes() -> None:
    lines = needs.describe(32, 0.03, 256, 0.25, Shared(gradients=1_000_000), [Queue(1024, 64, 32)])
    found = [line.split() for line in lines[2:6]]
    assert [row[:4] for row in found] == [
        ["1", "32", "0.00375", "0.0"],
        ["8", "256", "0.03", "7.0"],
        ["64", "2048", "0.24", "7.9"],
        ["512", "16384", "1.92", "8.0"],
    ]
    assert lines[3].endswith("4 steps")
    assert lines[5].endswith("no multiple of 16384")
    assert "1024 x 64 keys, 0.2 MiB" in lines[-1]


# ---- what a step shares --------------------------------------------------------------------------


class Pretended:
    """`torch.distributed` of four processes that counts and exchanges nothing."""

    def __init__(self) -> None:
        self.gathered = self.shuffled = self.averaged = 0

    def all_gather_into_tensor(self, out: Tensor, tensor: Tensor) -> None:
        self.gathered += tensor.numel()
        out.copy_(tensor.repeat(WORLD, *[1] * (tensor.ndim - 1)))

    def all_to_all_single(self, out: Tensor, sent: Tensor, *_: object) -> None:
        self.shuffled += out.numel()
        out.zero_()

    def all_reduce(self, tensor: Tensor, *_: object, **__: object) -> None:
        self.averaged += tensor.numel()
        tensor.mul_(WORLD)

    def patches(self) -> dict[str, object]:
        """Return what stands for the functions of `torch.distributed`."""
        return {
            "is_initialized": lambda: True,
            "get_world_size": lambda: WORLD,
            "get_rank": lambda: 0,
            "broadcast": lambda *_, **__: None,
            "all_gather_into_tensor": self.all_gather_into_tensor,
            "all_to_all_single": self.all_to_all_single,
            "all_reduce": self.all_reduce,
        }


HARD = {"warmup_epochs": 0, "num_hard": 16, "num_synthetic": [4, 4, 4, 2, 2, 2]}


def build(name: str, options: dict[str, object]) -> MomentumFramework:
    torch.manual_seed(0)
    if name in ("moco_v2", "synco", "moby", "synco_v2"):
        options = {"queue_size": 64} | options
    if name.startswith("synco"):
        options = HARD | options
    return assemble_framework(name, options, {"name": "resnet8"}, img_size=SIZE)


def step(framework: MomentumFramework, local: int = 0) -> None:
    """Take a step on two views and `local` small ones."""
    progress = Progress(0, 10, 100)
    sizes = [SIZE] * 2 + [SIZE // 2] * local
    views = [torch.randn(IMAGES, 3, size, size) for size in sizes]
    framework(views, progress)["loss"].backward()
    framework.after_step(progress)


CASES = [(name, {}, 0) for name in FRAMEWORKS]
CASES += [("moco_v2", {"symmetric": True}, 0), ("moco_v2", {"batch_norm": "sync"}, 0)]
CASES += [(name, {}, 2) for name, made in FRAMEWORKS.items() if made.can_take_local_views]
CASES += [("moco_v2", {"batch_norm": "sync"}, 2)]


@pytest.mark.parametrize(("name", "options", "local"), CASES)
def test_one_process_counts_what_several_share(
    name: str, options: dict[str, object], local: int
) -> None:
    alone = build(name, options)
    with count_traffic(alone) as counted:
        step(alone, local)
    pretended = Pretended()
    with mock.patch.multiple(dist, **pretended.patches()):
        step(build(name, options), local)
    shared = shared_numbers(alone, counted)
    assert (shared.keys, shared.images) == (pretended.gathered, pretended.shuffled)
    # a CPU averages statistics in both directions: (C + 1) and C values, and their gradients
    assert bool(shared.norms_forward) == bool(pretended.averaged)
    assert {queue.rows for queue in queues_of(alone)} <= {IMAGES * (1 + ("symmetric" in options))}


def test_norms_are_counted_by_passes() -> None:
    framework = build("byol", {})
    with count_traffic(framework) as counted:
        step(framework)
    norms = [m for m in framework.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    online = {id(m) for part in (framework.online, framework.predictor) for m in part.modules()}
    # two views through both networks; only the online one has gradients
    assert counted["norms_forward"] == sum(2 * (2 * m.num_features + 1) for m in norms)
    trained = sum(2 * 2 * m.num_features for m in norms if id(m) in online)
    assert counted["norms_backward"] == trained


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_of_scaling_says_what_the_formulas_give() -> None:
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text()
    table = page.split("| P = 8 | P = 64 | P = 512 |\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    assert len(rows) == 4
    for row in rows:
        shared = Shared(*[int(cell.replace(",", "")) for cell in row[1:6]])
        sent = [sum(shared.sent(world).values()) / 1e6 for world in needs.WORLDS]
        assert row[6:] == [f"{value:.0f}" for value in sent], row[0]
