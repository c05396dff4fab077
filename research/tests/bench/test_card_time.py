"""The predicted time of counted steps on a GPU equals sums that the tests write out."""

from typing import Any

import pytest

from moe_dist.errors import ConfigError, ResourceError
from research.bench.card_time import FP32_SHARE, assumptions, card_rates, card_time, operation_seconds, table
from research.bench.counted_step import refuse_what_cannot_fit
from research.fake_gpu.fake_cuda import Work
from research.fake_gpu.fake_step import Counted

TWO = ("model.num_layers=2", "train.micro_batch=2", "parallel.two_batch_overlap=false")
OLMOE = "configs/olmoe_1b7b_8gpu.yaml"
RATES = card_rates("H100")
MICRO_BATCHES = 1024 // (2 * 8)
MS = 1e-3
COPY, GEMM, GROUPED = RATES.copy_rate, float(RATES.gemm.at(4096)), float(RATES.grouped.at(1024))
LINK = RATES.inside[-1]


def copy(part: str, phase: str, seconds: float) -> list[Any]:
    return [part, phase, "copy", 0, 0, round(seconds * COPY)]


def counted(**changes: Any) -> Counted:
    """Returns the counts of two layers. Attention takes 2 ms forward and 5 ms backward. MoE takes 4 ms and 8 ms, of which
    3 ms and 6 ms are matrix products."""
    work = [
        [*copy("attention", "forward", 2 * MS), 2],
        [*copy("attention", "backward", 5 * MS), 2],
        [*copy("moe", "forward", 1 * MS), 2],
        ["moe", "forward", "grouped", 1024, round(3 * MS * GROUPED), 0, 2],
        [*copy("moe", "backward", 2 * MS), 2],
        ["moe", "backward", "grouped", 1024, round(6 * MS * GROUPED), 0, 2],
        ["model", "forward", "gemm", 4096, round(10 * MS * GEMM), 0, 1],
        *([part, phase, "copy", 0, 0, 0, 1] for part, phase in (("model", "backward"), ("loss", "forward"))),
    ]
    rows = round(7 * MS * LINK.bytes_per_second)
    sent = [["moe", phase, "alltoall_base_", 0, rows, False, 4] for phase in ("forward", "backward")]
    sent.append(["moe", "forward", "alltoall_base_", 0, 0, True, 2])  # two layers
    empty: dict[str, Any] = {key: {} for key in ("kernels", "num_bytes", "collectives", "copies", "mixed", "sorted_sums")}
    two = [[*key, 2 * number] for *key, number in work]
    given = {
        "layers": {"attention": 2, "moe": 2},
        "syncs": {"forward split sizes": 4, "step step.py:1": 1},
        "work": [*two, [*copy("step", "step", 20 * MS), 1]],
        "sent": [[*key, 2 * number] for *key, number in sent],
        "more_work": work,
        "more_sent": sent,
        **changes,
    }
    return Counted(config="", rank=0, ranks=8, order="", tracked=0, exchange_seconds=0.0, **empty, **given)


def test_parts_exchanges_and_syncs_follow_each_other() -> None:
    time = card_time(counted(), OLMOE, [*TWO], RATES)
    layer = (2 + 4 + 5 + 8) * MS + RATES.sync + 4 * (7 * MS + LINK.latency) + LINK.latency  # last: counts
    few = 3 * RATES.launch  # three launches in which the device does no work
    assert time.micro_batch == pytest.approx(2 * layer + 10 * MS, abs=few)
    assert time.once == pytest.approx(20 * MS)
    assert time.uncovered == 0
    assert time.seconds == pytest.approx(MICRO_BATCHES * time.micro_batch + 20 * MS)
    tokens = MICRO_BATCHES * 2 * 4096
    dim, ffn, vocabulary, length = 2048, 1024, 50304, 4096
    projections, scores = 4 * dim * dim, 2 * dim * length / 2  # the causal mask leaves half of the positions
    layer_flops = 2 * (projections + scores + 8 * 3 * dim * ffn + 64 * dim)
    assert time.model_flops == pytest.approx(3 * tokens * (2 * layer_flops + 2 * dim * vocabulary))
    assert time.mfu() == pytest.approx(time.model_flops / time.seconds / 989e12)
    assert time.mfu(all_scores=True) == pytest.approx((time.model_flops + 6 * tokens * 2 * scores) / time.seconds / 989e12)
    assert "328 GB/s in a node, 45 to other nodes" in assumptions(RATES)
    assert "MFU" in str(table(time).caption)


def test_launches_count_where_they_take_longer() -> None:
    few = counted()
    many = counted(more_work=[*few.more_work, ["attention", "forward", "copy", 0, 0, 0, 2000]])
    difference = card_time(many, OLMOE, [*TWO], RATES).micro_batch - card_time(few, OLMOE, [*TWO], RATES).micro_batch
    assert difference == pytest.approx(2002 * RATES.launch - 4 * MS)


def test_overlap_hides_an_exchange_under_the_pairs_of_the_own_tokens() -> None:
    options = [*TWO, "parallel.dispatch.overlap=true"]
    hidden = [card_time(counted(), OLMOE, each, RATES).micro_batch for each in (TWO, options)]
    own = (3 + 6) / 8 * MS  # matrix products of the rank's own tokens, in each layer
    assert hidden[0] - hidden[1] == pytest.approx(2 * own)


def test_halves_hide_exchanges_that_are_shorter_than_what_the_other_half_computes() -> None:
    hop = 0.1 * MS
    sent = [["moe", phase, "alltoall_base_", 0, round(hop * LINK.bytes_per_second), False, 4]
            for phase in ("forward", "backward")]  # fmt: skip
    options = [*TWO[:2], "parallel.two_batch_overlap=true"]
    apart, halves = (card_time(counted(more_sent=sent), OLMOE, each, RATES).micro_batch for each in (TWO, options))
    assert apart - halves == pytest.approx(8 * (hop + LINK.latency))  # four exchanges in each of the two layers


def test_gathers_and_sums_take_what_computation_does_not_cover() -> None:
    """An edp group of experts spans eight nodes, and dense parameters are sharded over all 64 ranks."""
    free = card_time(counted(), OLMOE, [*TWO], RATES).micro_batch - 2 * (4 * (7 * MS + LINK.latency) + LINK.latency)
    second = round(RATES.between.bytes_per_second)  # pyright: ignore[reportOptionalMemberAccess]
    sent = [*counted().sent, ["moe", "forward", "_allgather_base_", 8, second, False, 1]]
    sent.append(["attention", "backward", "_reduce_scatter_base_", 64, 8 * second, False, 3])
    options = [*TWO, "parallel.edp=8"]
    given = counted(sent=sent)
    time = card_time(Counted(**{**vars(given), "ranks": 64}), OLMOE, options, RATES)
    latency = RATES.between.latency  # pyright: ignore[reportOptionalMemberAccess]
    assert time.gathers == pytest.approx(1 + latency)
    # the slowest link is inside the node: a node's eight adapters together are faster
    assert time.sums == pytest.approx(3 * (8 * second / LINK.bytes_per_second + latency))
    assert time.uncovered == pytest.approx(time.gathers + time.sums - free)


def test_an_operation_takes_its_products_or_its_bytes() -> None:
    flops, num_bytes = round(GEMM), round(COPY)
    assert operation_seconds(Work("", "", "gemm", 4096, flops, num_bytes // 2), RATES) == pytest.approx(1)
    assert operation_seconds(Work("", "", "gemm", 4096, flops // 2, num_bytes), RATES) == pytest.approx(1)
    assert operation_seconds(Work("", "", "gemm fp32", 4096, flops, 0), RATES) == pytest.approx(1 / FP32_SHARE)
    assert operation_seconds(Work("", "", "attention", 0, round(RATES.attention), 0), RATES) == pytest.approx(1)


def test_a_card_without_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"T4: no published rates of this card; take one of .*H100"):
        card_rates("T4")


def test_a_step_that_does_not_fit_names_the_layer_and_the_bound() -> None:
    memory = {"model backward": (0, 95 * 10**9, 0), "moe forward": (0, 92 * 10**9, 3), "moe backward": (0, 90 * 10**9, 2)}
    with pytest.raises(ResourceError, match=r"in layer 3 \(moe, forward\) .* take 92\.0 GB, and H100 has 80; take more"):
        refuse_what_cannot_fit(counted(memory=memory), RATES)
    small = {place: (0, 79 * 10**9, 0) for place in memory}
    refuse_what_cannot_fit(counted(memory=small), RATES)
    with pytest.raises(ResourceError, match=r"in loss, forward the tensors"):
        refuse_what_cannot_fit(counted(memory={**small, "loss forward": (0, 81 * 10**9, 0)}), RATES)
