"""Tests which layouts are listed, and how bytes, rates and memory affect their estimates."""

import numpy as np
import pytest

from moe_dist.config.load import load_config, rule_violations
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan import memory
from moe_dist.plan.answers import answers
from moe_dist.plan.estimate import LIBRARIES, SLACK, Estimate, LayoutEstimator
from moe_dist.plan.layouts import Placements, gpu_counts, layouts
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.rates import LinkSection, Rates, weakest
from moe_dist.plan.rows import Expected, Wire, crossing_groups, group_starts
from tests.support.messages import refused
from tests.unit.plan.test_step_model import RATES

FAST = {"launch": 0.0, "sync": 0.0, "between": LinkSection(ranks=8, latency=0.0, bytes_per_second=1e9)}


def estimated(config: Config, *, rates: Rates = RATES, most_bytes: float = 80e9) -> Estimate:
    placement = ExpertPlacement.interleaved(expert_groups(config.model.moe), config.parallel.ep)
    return LayoutEstimator(rates, Expected({}), {}, most_bytes).estimate(config, placement)


def test_gpu_counts() -> None:
    assert gpu_counts(8, 8) == [8]
    assert gpu_counts(8, 10240)[-3:] == [4096, 8192, 10240]
    with refused(ConfigError, "--gpus"):
        gpu_counts(64, 8)


def test_listed_layouts_are_distinct_and_keep_the_rules() -> None:
    config = load_config("moma_1b4_4t4i_32gpu")
    listed = list(layouts(config, 32, RATES, Placements(config, {})))
    names = [(repr(each.parallel), each.placement.policy, each.train.micro_batch) for each, _ in listed]
    assert len(set(names)) == len(listed) > 1000
    for each, placement in listed[::97]:
        assert not rule_violations(each)
        assert placement.num_ranks == each.parallel.ep
        assert each.parallel.ep * each.parallel.edp == 32
    kinds = {each.parallel.dispatch.kind for each, _ in listed}
    assert kinds == {"all_to_all", "hierarchical", "known_counts"}


def test_a_configuration_in_halves_gets_layouts_without_them() -> None:
    config = load_config("olmoe_1b7b_8gpu")
    assert config.parallel.two_batch_overlap
    for each, _ in [*layouts(config, 8, RATES, Placements(config, {}))][::53]:
        assert not rule_violations(each)


def test_bytes_are_those_of_the_dispatch_contract() -> None:
    config = load_config("olmoe_1b7b_8gpu")
    found = estimated(config)
    tokens = config.train.global_batch * config.data.seq_len
    rows = 8 * (1 - np.prod([(56 - i) / (64 - i) for i in range(8)])) * 7 / 8  # distinct remote ranks per token
    assert found.bytes_inside + found.bytes_between == pytest.approx(4 * tokens * 16 * rows * 2048 * 2)
    assert found.bytes_between > 0  # nodes have four ranks
    block = estimated(load_config("olmoe_1b7b_8gpu", ["parallel.recompute=block"]))
    assert block.bytes_inside == pytest.approx(found.bytes_inside * 5 / 4)
    assert found.seconds == pytest.approx(found.busy + found.imbalance + found.exchange + found.tail)
    assert found.imbalance == pytest.approx(0)
    assert (found.mark, found.rows_mark) == ("extrapolated", "extrapolated")


@pytest.mark.parametrize(("ep", "edp"), [(3, 4), (6, 2), (5, 4), (2, 4)])
def test_groups_that_straddle_nodes_send_between_them(ep: int, edp: int) -> None:
    """Nodes have four ranks. The slow count asks for each pair of ranks of an EP group whether they share a node."""
    config = load_config("olmoe_1b7b_8gpu")
    parallel = config.parallel.model_copy(update={"ep": ep, "edp": edp})
    config = config.model_copy(update={"parallel": parallel, "train": config.train.model_copy(update={"micro_batch": 1})})
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement.interleaved(groups, ep)
    reached_R = [groups[0].reached(len(placement.slots[rank])) for rank in range(ep)]
    far = sum(
        reached_R[there]
        for group in range(edp)
        for here in range(ep)
        for there in range(ep)
        if (group * ep + here) // 4 != (group * ep + there) // 4
    )
    micro_batches = config.train.global_batch // (ep * edp)
    found = estimated(config)
    assert found.bytes_between == pytest.approx(4 * micro_batches * config.data.seq_len * 16 * far * 2048 * 2)
    assert sum(group_starts(ep, edp, 4).values()) == edp
    crossing = [g for g in range(edp) if len({(g * ep + rank) // 4 for rank in range(ep)}) > 1]
    assert crossing_groups(ep, edp, 4) == crossing
    said = " ".join(answers(found, [found], RATES))
    some = f"EP groups {', '.join(map(str, crossing))} cross nodes: {len(crossing)} of {edp}"
    assert (said == "") if not crossing else ("all EP groups cross" if len(crossing) == edp else some) in said


@pytest.mark.parametrize(("edp", "crosses"), [(1, False), (2, True)])
def test_a_group_that_straddles_nodes_waits_for_the_links_between_them(edp: int, crosses: bool) -> None:
    """Of two EP groups of three ranks on nodes of four, the second one crosses nodes."""
    config = load_config("olmoe_1b7b_8gpu")
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep": 3, "edp": edp})})
    near = RATES.model_copy(update=FAST)
    far = near.model_copy(update={"between": LinkSection(ranks=8, latency=0.0, bytes_per_second=1e-3)})
    assert (estimated(config, rates=far).exchange > estimated(config, rates=near).exchange) == crosses


def test_memory_is_that_of_the_dry_run_with_its_spread() -> None:
    config = load_config("olmoe_1b7b_8gpu")
    placement = ExpertPlacement.interleaved(expert_groups(config.model.moe), 8)
    tokens = config.train.micro_batch * config.data.seq_len
    load = Expected({}).load(placement, Wire(RATES.ranks_per_node), tokens=tokens, layers=16)
    rows, pairs = load.rows[0, 0, 0] / tokens, load.pairs[0, 0, 0] / tokens
    states = memory.rank_memory(config, placement, rank=0, rows=rows, pairs=pairs).total
    buffers = (2 * rows - rows / 8 + 1) * tokens * 2048 * 2
    found = estimated(config)
    assert found.memory[0] == pytest.approx((1 + SLACK) * (states + buffers) + LIBRARIES)
    assert found.memory[0] < found.memory[1] < found.memory[2]
    assert found.out_of_memory < 1e-6
    tight = estimated(config, most_bytes=found.memory[0])
    assert tight.out_of_memory == pytest.approx(1.0)  # half of all micro-batches need more, and a step has many
    assert 0.0 < estimated(config, most_bytes=found.memory[2] + (found.memory[2] - found.memory[1])).out_of_memory < 1.0


def test_hierarchical_exchanges_use_the_links_between_the_nodes_of_the_ranks() -> None:
    nodes = ["parallel.dispatch={kind: hierarchical, ranks_per_node: 2}"]
    small, large = (
        estimated(load_config("olmoe_1b7b_8gpu", nodes), rates=RATES.model_copy(update={"ranks_per_node": size}))
        for size in (2, 8)
    )
    assert large.bytes_between == 0 < small.bytes_between
    assert small.bytes_between + small.bytes_inside == pytest.approx(large.bytes_inside)
    assert small.exchange > large.exchange > 0


def test_more_rank_pairs_and_slower_links_take_longer() -> None:
    config = load_config("adamoe_mixtral8x7b_64gpu")
    rates = RATES.model_copy(update=FAST)
    slower = rates.model_copy(update={"between": LinkSection(ranks=8, latency=0.0, bytes_per_second=1e8)})
    near, far = estimated(config, rates=rates), estimated(config, rates=slower)
    assert far.seconds > near.seconds
    assert far.busy == near.busy
    step = config.model_copy(update={"parallel": config.parallel.model_copy(update={"fsdp_gather": "micro_batch"})})
    assert estimated(step, rates=slower).tail > far.tail  # parameters are gathered in each micro-batch
    with refused(ConfigError, "between=null"):
        estimated(config, rates=RATES.model_copy(update={"between": None}))
    assert weakest("measured", "fitted") == "fitted"
