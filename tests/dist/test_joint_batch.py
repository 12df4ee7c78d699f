"""Training on two processes equals training on one with the joint batch; so does accumulation."""

from typing import Any

import pytest
import torch
import training
from forked import Pool
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.parts.losses import unit
from utils import distributed
from engine import loop as engine

NO_SYNTHETICS = {"warmup_epochs": 1000}
NO_NORM_HEADS = {"proj_num_layers": 1, "pred_num_layers": 1}
ROW_WISE: dict[str, dict[str, Any]] = {
    "moco_v2": {},  # shuffles, which changes nothing here
    "byol": NO_NORM_HEADS,
    "moby": NO_NORM_HEADS,
    "synco": NO_SYNTHETICS,
    "synco_v2": {**NO_SYNTHETICS, **NO_NORM_HEADS},
}


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_training(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Compare the ranks' training with that of one process: losses by their mean, embeddings row by row."""
    for part in parts:
        assert_same_state(part["state"], expected["state"])
    for step, whole in enumerate(expected["outputs"]):
        outs = [part["outputs"][step] for part in parts]
        for out in outs:
            torch.testing.assert_close(out["grad_norm"], whole["grad_norm"], rtol=1e-9, atol=1e-11)
        rows = torch.cat([out["embedding"] for out in outs])
        accumulated = len(rows) < len(
            whole["embedding"]
        )  # then outputs but the loss are of the last micro-batch
        if not accumulated:
            torch.testing.assert_close(rows, whole["embedding"], rtol=1e-9, atol=1e-11)
        for name in {"loss", "acc1", "acc5"} & whole.keys():
            if name == "loss" or not accumulated:
                mean = torch.stack([out[name] for out in outs]).mean()
                torch.testing.assert_close(mean, whole[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("byol", {}),
        ("moby", {}),
        ("synco_v2", NO_SYNTHETICS),
        ("moco_v2", {"batch_norm": "sync"}),
        ("moco_v2", {"batch_norm": "sync", "symmetric": True}),
        ("synco", {"batch_norm": "sync", **NO_SYNTHETICS}),
        ("mocov3", {}),  # each rank's positives stand at its own offset among the keys of all
    ],
)
def test_two_processes_equal_one_with_the_joint_batch(
    ranks: Pool, method: str, options: dict
) -> None:
    parts = ranks.run(training.train, method, options, True)
    expected = training.train(method, options, True)
    if options.get(
        "symmetric"
    ):  # each rank holds the keys of both views: the rows are the same, the order is not
        for part in (*parts, expected):
            keys = part["state"]["queue.keys"]
            part["state"]["queue.keys"] = keys[keys[:, 0].argsort()]
    assert_same_training(parts, expected)


@pytest.mark.parametrize("method", ROW_WISE)
def test_without_batch_norm_processes_and_micro_batches_are_one_batch(
    ranks: Pool, method: str
) -> None:
    options = ROW_WISE[method]
    expected = training.train(method, options, False)
    assert_same_training([training.train(method, options, False, accumulation=2)], expected)
    assert_same_training(ranks.run(training.train, method, options, False), expected)
    assert_same_training(ranks.run(training.train, method, options, False, 2), expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [("moby", {}), ("mocov3", {}), ("moco_v2", {"batch_norm": "sync"})],
)
def test_two_processes_equal_one_with_local_views_too(
    ranks: Pool, method: str, options: dict
) -> None:
    local = (method, options, True, 1, 3, 2)
    assert_same_training(ranks.run(training.train, *local), training.train(*local))


def count_updates(accumulation: int) -> dict[str, Any]:
    """Count what a step of MoBY does once, whatever the number of micro-batches."""
    state, plan = training.prepare("moby", NO_NORM_HEADS, False, accumulation)
    counts = {"target": 0, "flush": 0}
    framework = state.module
    update, flush = framework.update_target, framework.queue1.flush

    def counted_update(momentum: float) -> None:
        counts["target"] += 1
        update(momentum)

    def counted_flush() -> None:
        counts["flush"] += 1
        counts["held"] = len(framework.queue1._pending)
        flush()

    framework.update_target, framework.queue1.flush = counted_update, counted_flush
    training.train_step(state, plan)
    counts["position"] = framework.queue1.position
    counts["left"] = len(framework.queue1._pending)
    return counts


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_queue_and_target_advance_once_a_step(ranks: Pool, accumulation: int) -> None:
    expected = {
        "target": 1,
        "flush": 1,
        "held": accumulation,
        "position": training.BATCH,
        "left": 0,
    }
    assert count_updates(accumulation) == expected
    if accumulation < 4:
        assert ranks.run(count_updates, accumulation) == [expected] * 2


# ---- shuffling batch norm ------------------------------------------------------------------------


def shuffled_keys(symmetric: bool) -> dict[str, Any]:
    """Return the keys of one forward whose generator differs between ranks, and the queue after 5 steps."""
    state, plan = training.prepare("moco_v2", {"symmetric": symmetric}, True)
    (batch,) = training.micro_batches(0, 1)
    torch.manual_seed(distributed.rank())
    keys = state.module(batch.views, plan.progress(0))["embedding"]
    state.module.queue._pending.clear()
    for _ in range(5):
        training.train_step(state, plan)
    queue = state.module.queue
    return {"keys": keys, "queue": queue.keys, "position": queue.position}


def test_shuffled_keys_are_those_of_chunks_of_the_permuted_batch(ranks: Pool) -> None:
    first, second = ranks.run(shuffled_keys, False)
    target = training.build("moco_v2", {}, True).target
    images = training.joint_views(0)[1]
    torch.manual_seed(0)  # rank 0's
    order = torch.randperm(training.BATCH)
    expected = torch.empty(training.BATCH, 8, dtype=torch.float64)
    for chunk in order.chunk(2):
        expected[chunk] = unit(target(images[chunk])).detach()
    torch.testing.assert_close(
        torch.cat([first["keys"], second["keys"]]), expected, rtol=1e-10, atol=1e-12
    )
    unshuffled = torch.cat([unit(target(part)).detach() for part in images.chunk(2)])
    assert (unshuffled - expected).abs().max() > 1e-3  # the permutation matters


@pytest.mark.parametrize("symmetric", [False, True])
def test_queues_are_identical_on_all_ranks(ranks: Pool, symmetric: bool) -> None:
    first, second = ranks.run(shuffled_keys, symmetric)
    assert torch.equal(first["queue"], second["queue"])
    keys = training.BATCH * (2 if symmetric else 1)
    assert first["position"] == second["position"] == 5 * keys % 64


# ---- what travels --------------------------------------------------------------------------------


def traffic(
    method: str, options: dict, batch_norm: bool, accumulation: int = 1, ddp: dict | None = None
) -> dict:
    """Count the collectives of forward and backward of the third step."""
    state, plan = training.prepare(method, options, batch_norm, accumulation)
    if ddp:
        state.model = nn.parallel.DistributedDataParallel(state.module, **ddp)
    for _ in range(2):  # the control's DDP agrees on its buckets first
        training.train_step(state, plan)
    batches = training.micro_batches(2, accumulation)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.forward_and_backward(
            state, batches, lambda b, p: state.model(b.views, p), plan.progress(state.step)
        )
    names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
    return {name: names.count(name) for name in set(names)}


def test_a_forward_broadcasts_no_queue_and_no_statistics(ranks: Pool) -> None:
    for counts in ranks.run(traffic, "moby", NO_NORM_HEADS, False):
        assert counts == {"gloo:all_reduce": 2}  # the gradients, and which of them are used
    for counts in ranks.run(traffic, "moco_v2", {}, False):
        assert counts == {
            "gloo:all_reduce": 2,
            "gloo:broadcast": 1,
            "gloo:all_to_all": 1,
            "gloo:all_gather": 1,
        }
    for counts in ranks.run(traffic, "moby", NO_NORM_HEADS, False, 1, {"static_graph": False}):
        assert counts["gloo:broadcast"] > 0  # the control: that is what DDP does by itself


def test_gradients_travel_once_a_step(ranks: Pool) -> None:
    for counts in ranks.run(traffic, "byol", NO_NORM_HEADS, False, 4):
        assert counts == {"gloo:all_reduce": 2}  # as with one micro-batch
