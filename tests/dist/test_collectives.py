"""Every helper of utils.distributed on two processes, and its identity on one."""

import pytest
import torch
import torch.distributed as dist
from forked import Pool
from torch import Tensor, nn

from utils import distributed
from utils.checkpoints.file import CheckpointError
from utils.randomness import keyed_seed


def whoami() -> tuple[int, int, bool, bool]:
    return (
        distributed.rank(),
        distributed.world_size(),
        distributed.is_main(),
        distributed.is_distributed(),
    )


def test_ranks_know_themselves(ranks: Pool) -> None:
    assert ranks.run(whoami) == [(0, 2, True, True), (1, 2, False, True)]
    assert whoami() == (0, 1, True, False)


def share(value: object) -> list[object]:
    mine = {"value": value, "rank": distributed.rank()}
    return [distributed.broadcast_object(mine, src) for src in range(distributed.world_size())]


def test_objects_are_broadcast(ranks: Pool) -> None:
    expected = [{"value": "é", "rank": 0}, {"value": "é", "rank": 1}]
    assert ranks.run(share, "é") == [expected, expected]
    assert share("é") == expected[:1]


def sums() -> tuple[Tensor, Tensor, list[bool]]:
    rank = distributed.rank()
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    returned = distributed.all_reduce_sum(own)
    assert returned is own
    flags = [distributed.any_rank(rank == who) for who in (0, 1, 2)]
    return own, distributed.broadcast(torch.full((2,), float(rank))), flags


def test_sums_flags_and_tensors(ranks: Pool) -> None:
    for total, broadcast, flags in ranks.run(sums):
        assert total.tolist() == [3.0, 30.0]
        assert broadcast.tolist() == [0.0, 0.0]
        assert flags == [True, True, False]
    assert [sums()[0].tolist(), sums()[2]] == [[1.0, 10.0], [True, False, False]]


def spread_module() -> dict[str, Tensor]:
    torch.manual_seed(distributed.rank())
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    module[1].running_mean.normal_()
    module[1].num_batches_tracked.fill_(distributed.rank())
    distributed.broadcast_module(module)
    return module.state_dict()


def test_modules_start_equal(ranks: Pool) -> None:
    first, second = ranks.run(spread_module)
    expected = spread_module()
    for name, value in expected.items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)


def rows(dtype: torch.dtype) -> Tensor:
    rank = distributed.rank()
    tensor = (torch.arange(6, dtype=dtype).view(3, 2).T + 100 * rank).requires_grad_(
        dtype.is_floating_point
    )
    gathered = distributed.gather_rows(tensor)
    assert not gathered.requires_grad
    return gathered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_gather_rows_in_rank_order(ranks: Pool, dtype: torch.dtype) -> None:
    alone = rows(dtype)
    for gathered in ranks.run(rows, dtype):
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.cat([alone, alone + 100]))


def uneven(sizes: tuple[int, int]) -> Tensor:
    rank = distributed.rank()
    return distributed.gather_uneven(torch.full((sizes[rank], 2), rank + 1))


@pytest.mark.parametrize("sizes", [(3, 1), (0, 2), (2, 2), (2, 0), (0, 0)])
def test_gather_uneven(ranks: Pool, sizes: tuple[int, int]) -> None:
    expected = torch.cat([torch.full((sizes[0], 2), 1), torch.full((sizes[1], 2), 2)])
    for gathered in ranks.run(uneven, sizes):
        assert torch.equal(gathered, expected)
    assert uneven(sizes).shape == (sizes[0], 2)


def main_only(fail: str) -> tuple[object, list[int]]:
    called = []

    def action() -> str:
        called.append(distributed.rank())
        if fail:
            raise CheckpointError(fail)
        return "done"

    try:
        result: object = distributed.on_main(action)
    except CheckpointError as error:
        result = (str(error), getattr(error, "reporter", None))
    distributed.any_rank(False)  # in step also after an error
    return result, called


def test_on_main_runs_once_and_its_errors_reach_all(ranks: Pool) -> None:
    assert ranks.run(main_only, "") == [("done", [0]), ("done", [])]
    assert ranks.run(main_only, "bad") == [(("bad", 0), [0]), (("bad", 0), [])]
    assert main_only("") == ("done", [0])
    assert main_only("bad") == (("bad", None), [0])


def everywhere(failing: tuple[int, ...]) -> object:
    def action() -> str:
        if distributed.rank() in failing:
            raise CheckpointError(f"of rank {distributed.rank()}")
        return f"mine {distributed.rank()}"

    try:
        result: object = distributed.on_all(action)
    except CheckpointError as error:
        result = (str(error), getattr(error, "reporter", None))
    distributed.any_rank(False)
    return result


def test_on_all_fails_everywhere_or_nowhere(ranks: Pool) -> None:
    assert ranks.run(everywhere, ()) == ["mine 0", "mine 1"]
    assert ranks.run(everywhere, (1,)) == [("of rank 1", 1)] * 2
    assert ranks.run(everywhere, (0, 1)) == [("of rank 0", 0)] * 2
    assert everywhere(()) == "mine 0"


def seeds() -> list[int]:
    return [keyed_seed("a", 1), keyed_seed("a", 1, 2), keyed_seed("a1")]


def test_keys_are_the_same_on_every_rank_and_for_ever(ranks: Pool) -> None:
    first, second = ranks.run(seeds)
    assert first == second == seeds()
    assert len(set(first)) == 3
    assert all(0 <= seed < 2**63 for seed in first)
    assert keyed_seed("step", 0, 0, 0) == 2631477829001902122


def hang() -> None:
    if distributed.rank() == 0:
        dist.barrier()


def test_a_hanging_rank_fails_the_test_and_the_pool_starts_anew(ranks: Pool) -> None:
    with pytest.raises(AssertionError, match="rank 0 hangs in hang"):
        ranks.run(hang, limit=1.0)
    assert ranks.run(whoami)[1] == (1, 2, False, True)


def exchanged(channels_last: bool, seed: int) -> list[bool]:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(6 * distributed.world_size(), 3, 4, 5, generator=generator)
    order = torch.randperm(len(whole), generator=generator)
    mine = whole[6 * distributed.rank() :][:6]
    if channels_last:
        mine = mine.contiguous(memory_format=torch.channels_last)
    found = distributed.exchange_rows(mine, order)
    kept = found.is_contiguous(memory_format=torch.channels_last) == channels_last
    return [torch.equal(found, whole[order][6 * distributed.rank() :][:6]), kept]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_exchanged_in_a_common_order(ranks: Pool, channels_last: bool, seed: int) -> None:
    assert ranks.run(exchanged, channels_last, seed) == [[True, True], [True, True]]
    assert exchanged(channels_last, seed) == [True, True]
