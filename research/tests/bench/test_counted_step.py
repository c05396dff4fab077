"""Compares the counts of a step on a fake GPU with the least possible counts, and tests the table of both."""

from collections import Counter

import pytest

from research.bench.counted_step import leasts, table
from research.fake_gpu.count import count
from research.fake_gpu.fake_cuda import Work
from research.fake_gpu.fake_step import Counted
from tests.support.cover import exhaustive

# Largest allowed ratio of an MoE layer's bytes to the least possible bytes, on 8 ranks, for some presets. On more ranks
# FSDP2 shards the experts, and gate and up become two products.
TRAFFIC = {"olmoe_1b7b_8gpu": 1.5}
PRESETS = ("adamoe_moma_small_1gpu", "olmoe_1b7b_8gpu", "adamoe_mixtral8x7b_64gpu", "moma_1b4_4t4i_32gpu")
CASES = [(preset, ranks) for preset in PRESETS for ranks in (8, 64, 1024)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("preset", "ranks"), [("olmoe_1b7b_8gpu", 8), *(exhaustive(*case) for case in CASES if case != ("olmoe_1b7b_8gpu", 8))]
)
def test_a_step_moves_no_fewer_bytes_than_possible(preset: str, ranks: int) -> None:
    overrides = ["model.num_layers=2", *(["parallel.ep=8"] if preset == "adamoe_moma_small_1gpu" else [])]
    counted = count(f"configs/{preset}.yaml", ranks, overrides, rank=ranks - 1)
    fewest, flops = leasts(counted, f"configs/{preset}.yaml", overrides)
    if ranks == 8 and preset in TRAFFIC:
        moved, least = (
            sum(each(phase) for phase in ("forward", "backward"))
            for each in (lambda phase: counted.num_bytes[f"moe {phase}"] / 2, lambda phase: fewest["moe", phase])
        )
        assert moved <= TRAFFIC[preset] * least
    moved = {key: counted.num_bytes[" ".join(key)] / (1 if key[0] == "step" else 2) for key in fewest if fewest[key]}
    if ranks == 1024:  # 1,024 ranks do not divide all tensors, so the last rank has smaller shards
        del moved["step", "step"]
    assert all(moved[key] >= fewest[key] for key in moved), "fewer bytes than are possible"
    done = Counter[tuple[str, str]]()
    for *key, number in counted.more_work:
        work = Work(*key)
        done[work.part, work.phase] += number * work.flops
    # The count may be lower, because the uniform router rounds pairs down. It may be higher, because backward recomputes
    # the scores of attention and, with `recompute: experts` (Mixtral), the experts' products of forward.
    again = 1.34 if preset == "adamoe_mixtral8x7b_64gpu" else 1.15
    assert all(0.99 * each <= done[key] <= again * each for key, each in flops.items() if key[0] != "ffn")
    assert str(ranks) in table(counted).title  # pyright: ignore[reportOperatorIssue]


def test_the_table_divides_by_the_layers_that_have_the_part() -> None:
    more = [[*key, "copy", 0, 0, 0, number] for key, number in (
        (("attention", "forward"), 40), (("moe", "forward"), 200), (("ffn", "forward"), 10))]  # fmt: skip
    all_work = [["attention", "forward", "copy", 0, 0, 0, 84], ["step", "step", "copy", 0, 0, 0, 7],
                *([*each[:-1], 2 * each[-1]] for each in more[1:])]  # fmt: skip
    counted = Counted(
        config="every second layer has experts",
        rank=0,
        ranks=1,
        layers={"attention": 4, "moe": 2, "ffn": 2},
        kernels={},
        num_bytes={},
        collectives={"moe forward alltoall_base_": 12},
        syncs={},
        copies={},
        mixed={},
        sorted_sums={},
        order="",
        tracked=0,
        exchange_seconds=0.0,
        work=all_work,
        more_work=more,
    )
    _, _, numbers, once, *_, collectives = (list(column.cells) for column in table(counted).columns)
    assert numbers == ["10", "5", "100", "0"]
    assert once == ["1", "0", "0", "7"]
    assert collectives == ["", "", "3 alltoall_base", ""]
