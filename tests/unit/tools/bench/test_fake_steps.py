"""Training steps of the GPU presets on fake CUDA tensors: they run on the device alone, and wait for it only where stated.

Two layers of each preset, since all layers are alike; two micro-batches. Each case takes 10 s of CPU time.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.comm.collectives import CommStats
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.plan.preflight import layout_without_data
from tests.support.cover import full
from tools.bench.count import count, leasts, table
from tools.bench.fake_cuda import Work
from tools.bench.fake_step import MICRO_BATCHES, Counted, Uniform, scaled

READS_OF_A_STEP = 2  # at its end: the counts of this rank, and all sums over the ranks
SPLIT_SIZES = {"forward split sizes": 4}  # of two layers in two micro-batches
TOKENS = {"step tokens of each rank and group": 1}  # for expert choice, and for the draws of dropout
PRESETS: dict[str, dict[str, Any]] = {
    # the named reads with their numbers in a step; the most kernels of an MoE layer, forward and backward; and on 8 ranks
    # its most bytes over the fewest possible (on more, FSDP2 shards the experts, and gate and up are two products)
    "adamoe_moma_small_1gpu": {"reads": SPLIT_SIZES, "kernels": (44, 58)},
    "olmoe_1b7b_8gpu": {"reads": SPLIT_SIZES, "kernels": (34, 32), "traffic": 1.5},
    "adamoe_mixtral8x7b_64gpu": {"reads": SPLIT_SIZES, "kernels": (38, 42)},
    "moma_1b4_4t4i_32gpu": {"reads": TOKENS, "kernels": (54, 42)},
    "mole_llama3_8b_8gpu": {"reads": {"forward LoRA pairs of each expert": 4, **TOKENS}, "kernels": (132, 172)},
}
SHORT = ("adamoe_moma_small_1gpu", 8)
FULL = [full(preset, ranks) for preset in PRESETS for ranks in (8, 64, 1024) if (preset, ranks) != SHORT]


@pytest.mark.parametrize(("preset", "ranks"), [pytest.param(*SHORT, marks=pytest.mark.slow), *FULL])
def test_a_step_on_the_device(preset: str, ranks: int) -> None:
    expected = PRESETS[preset]
    overrides = ["model.num_layers=2", *(["parallel.ep=8"] if preset == "adamoe_moma_small_1gpu" else [])]
    counted = count(f"configs/{preset}.yaml", ranks, overrides, rank=ranks - 1)
    assert not counted.mixed
    assert not counted.copies
    assert set(counted.sorted_sums) <= {"model"}, "an index in a layer has a backward that sorts"
    assert {name: counted.syncs[name] for name in expected["reads"]} == expected["reads"]
    others = {name: number for name, number in counted.syncs.items() if name not in expected["reads"]}
    assert list(others.values()) == [1] * READS_OF_A_STEP
    assert all(name.startswith("step step.py:") for name in others)
    assert counted.tracked <= 1  # entries of collectives, each with a CUDA event
    exchanges = preset != "mole_llama3_8b_8gpu"  # every rank holds all LoRA experts
    assert (counted.exchange_seconds > 0) == exchanges  # without it, the slowest rank looks as busy as the others
    for phase, most in zip(("forward", "backward"), expected["kernels"], strict=True):
        assert counted.kernels[f"moe {phase}"] <= 4 * most, counted.kernels
    assert counted.kernels["step step"] <= 120
    fewest, flops = leasts(counted, f"configs/{preset}.yaml", overrides)
    if "traffic" in expected and ranks == 8:
        moved, least = (
            sum(each(phase) for phase in ("forward", "backward"))
            for each in (lambda phase: counted.num_bytes[f"moe {phase}"] / 2, lambda phase: fewest["moe", phase])
        )
        assert moved <= expected["traffic"] * least
    if preset != "mole_llama3_8b_8gpu":  # `least_bytes` has no LoRA
        moved = {key: counted.num_bytes[" ".join(key)] / (1 if key[0] == "step" else 2) for key in fewest if fewest[key]}
        if preset == "adamoe_moma_small_1gpu":  # under DDP a quarter of the optimizer's bytes is not counted (docs/gpu.md)
            del moved["step", "step"]
        assert all(moved[key] >= fewest[key] for key in moved), "fewer bytes than are possible"
        done = Counter[tuple[str, str]]()
        for *key, number in counted.more_work:
            work = Work(*key)
            done[work.part, work.phase] += number * work.flops
        # the uniform router rounds pairs down; backward computes attention's scores again, and with Mixtral's
        # `recompute: experts` the experts' products of forward
        again = 1.34 if preset == "adamoe_mixtral8x7b_64gpu" else 1.15
        assert all(0.99 * each <= done[key] <= again * each for key, each in flops.items() if key[0] != "ffn")
    assert str(ranks) in table(counted).title  # pyright: ignore[reportOperatorIssue]


def exchanges_between_gathers(order: str) -> list[int]:
    """Numbers of all-to-alls in a row with no gather or reduction of parameters between them."""
    names = [name for name in order.split() if name.startswith(("alltoall", "_allgather", "allgather", "_reduce_scatter"))]
    runs = "".join("x" if name.startswith("alltoall") else " " for name in names).split()
    return [len(run) for run in runs]


@pytest.mark.parametrize("halves", [full(False), pytest.param(True, marks=pytest.mark.slow)])
def test_no_gather_comes_between_the_exchanges_of_a_layer(halves: bool) -> None:
    """FSDP2 with experts on several edp ranks. A layer has 5 exchanges in forward and 3 in backward; no other sum of these
    is a part of a layer. In halves no gather or reduction comes between any exchanges of a step."""
    overrides = ["model.num_layers=2", "train.micro_batch=2", f"parallel.two_batch_overlap={halves}"]
    counted = count("configs/adamoe_mixtral8x7b_64gpu.yaml", 64, overrides)
    runs = exchanges_between_gathers(counted.order)
    layers = 2 * 2 * MICRO_BATCHES * (1 + halves)  # of two steps
    assert sum(runs) == layers * (5 + 3)
    if halves:
        assert len(runs) == 2
    else:
        assert len(runs) > 2
        assert not {1, 2, 4, 7} & set(runs), runs


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no library from earlier
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match=r"fake_cuda\.cpp by .*'no-such-compiler'.*install g\+\+ or set CXX"):
        count("configs/olmoe_1b7b_8gpu.yaml", 8)


@pytest.mark.slow
def test_a_wrong_number_of_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"yaml: --ranks 12: must be a multiple of parallel\.ep=8; .*take 16"):
        count("configs/olmoe_1b7b_8gpu.yaml", 12)


def test_each_group_and_expert_gets_its_share_of_the_tokens() -> None:
    config = scaled([], "configs/moma_1b4_4t4i_32gpu.yaml", 32)
    uniform, tokens = Uniform(config, layout_without_data(config), rank=0), 4 * 4096
    reads = torch.empty(32 * MICRO_BATCHES * 2)  # by rank, micro-batch and group
    assert uniform(CommStats(), "tokens of each rank and group", reads) == [tokens // 2] * len(reads)
    assert uniform.entry(0) == [tokens // 8] * 2  # one expert on each rank takes a quarter of its group's tokens

    config = scaled([], "configs/olmoe_1b7b_8gpu.yaml", 8)
    rows, *pairs = Uniform(config, layout_without_data(config), rank=0).entry(7)
    assert pairs == [2 * 4096 * 8 // 64] * 8
    assert rows == int(2 * 4096 * (1 - math.comb(56, 8) / math.comb(64, 8)))

    config = scaled([], "configs/mole_llama3_8b_8gpu.yaml", 8)
    layout = layout_without_data(config)
    (group,) = layout.groups
    pairs = Uniform(config, layout, rank=0)(CommStats(), "LoRA pairs of each expert", torch.empty(group.num_experts))
    assert pairs == [4096 // 3] * 3


def test_the_table_divides_by_the_layers_that_have_the_part() -> None:
    kernels = {"attention forward": 80, "moe forward": 400, "ffn forward": 20, "step step": 7}
    counted = Counted(
        config="every second layer has experts",
        rank=0,
        ranks=1,
        layers={"attention": 4, "moe": 2, "ffn": 2},
        kernels=kernels,
        num_bytes=dict.fromkeys(kernels, 0),
        collectives={"moe forward alltoall_base_": 12},
        syncs={},
        copies={},
        mixed={},
        sorted_sums={},
        order="",
        tracked=0,
        exchange_seconds=0.0,
    )
    _, _, numbers, *_, collectives = (list(column.cells) for column in table(counted).columns)
    assert numbers == ["10", "100", "5", "7"]
    assert collectives == ["", "3 alltoall_base", "", ""]


@pytest.mark.full
def test_exchanges_of_fixed_sizes_need_no_read() -> None:
    """Forward and backward of all micro-batches read nothing, so that no shape depends on the routing."""
    options = ["model.num_layers=2", "parallel.dispatch.kind=static"]
    counted = count("configs/olmoe_1b7b_8gpu.yaml", 8, options, rank=7)
    assert list(counted.syncs.values()) == [1] * READS_OF_A_STEP
    assert all(name.startswith("step step.py:") for name in counted.syncs)
    assert not counted.copies
    assert not counted.mixed
    assert set(counted.sorted_sums) <= {"model"}
    assert counted.kernels["moe forward"] <= 4 * 140
    assert counted.kernels["moe backward"] <= 4 * 36


@pytest.mark.full
def test_both_hops_of_a_layer_need_one_read() -> None:
    options = ["model.num_layers=2", "parallel.dispatch={kind: hierarchical, ranks_per_node: 4}"]
    counted = count("configs/olmoe_1b7b_8gpu.yaml", 8, options)
    assert counted.syncs["forward split sizes of both hops"] == 4
    assert not counted.mixed
    assert not counted.copies
    assert set(counted.sorted_sums) <= {"model"}


@pytest.mark.full
def test_auxiliary_routers_copy_nothing_to_the_device() -> None:
    """They are trained alone, in a second stage, which no preset has. An index by a list is such a copy."""
    options = ["model.num_layers=2", "train.only=auxiliary_routers", "run.init_from=runs/first"]
    options.append("model.moe.router={kind: expert_choice, causal: auxiliary}")
    counted = count("configs/moma_1b4_4t4i_32gpu.yaml", 8, options)
    assert counted.copies == {}
    assert counted.mixed == {}
    assert sum(counted.syncs.values()) == READS_OF_A_STEP + 1, counted.syncs  # one for the tokens of each rank and group


@pytest.mark.full
def test_triton_kernels_move_fewer_bytes() -> None:
    options = ["model.num_layers=2", "parallel.kernels.kind="]
    torchs, tritons = (
        count("configs/olmoe_1b7b_8gpu.yaml", 8, [options[0], options[1] + kind]) for kind in ("torch", "triton")
    )
    for phase in ("moe forward", "moe backward"):
        assert tritons.num_bytes[phase] < torchs.num_bytes[phase] / 2
        assert tritons.kernels[phase] < torchs.kernels[phase]


@pytest.mark.full
def test_parameters_gathered_once_per_step() -> None:
    """The experts' ranks are on different nodes, so each gather and each sum of gradients crosses the network."""
    options = ["model.num_layers=2", "parallel.recompute=none"]
    found = {}
    for gather in ("micro_batch", "step"):
        counted = count("configs/adamoe_mixtral8x7b_64gpu.yaml", 64, [*options, f"parallel.fsdp_gather={gather}"])
        found[gather] = Counter[str]()
        for name, number in counted.collectives.items():
            found[gather][name.split()[2]] += number
        again = {sent[2] for sent in counted.more_sent} & {"_allgather_base_", "_reduce_scatter_base_"}
        assert bool(again) == (gather == "micro_batch"), "what FSDP2 copies around them would be copied again, too"
    layers, meshes = 2, 2  # an MoE layer is sharded over edp (experts) and over all ranks, attention over all ranks
    units = 1 + layers * (1 + meshes)
    assert found["step"]["_allgather_base_"] == found["step"]["_reduce_scatter_base_"] == units
    assert found["micro_batch"]["_reduce_scatter_base_"] == 2 * units
    assert found["micro_batch"]["_allgather_base_"] == 2 * (2 * units - 1)  # the root keeps its parameters until backward


@pytest.mark.full
@pytest.mark.parametrize("preset", ["olmoe_1b7b_8gpu", "adamoe_mixtral8x7b_64gpu", "moma_1b4_4t4i_32gpu"])
def test_all_ranks_issue_the_same_collectives(preset: str) -> None:
    orders = {count(f"configs/{preset}.yaml", 8, ["model.num_layers=2"], rank=rank).order for rank in (0, 7)}
    assert len(orders) == 1
