"""Values of records equal the results of slow loops, and results that were computed by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moe_dist.monitor.metrics import Record, evaluation_scalars, group_choices, group_metrics
from moe_dist.monitor.pictures import Subject, heat_maps, zero_computation_fraction
from moe_dist.monitor.sinks.tensorboard import Window
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.tags import (
    DEPTH_MEANING,
    GROUP_FAMILIES,
    MAX_SCALARS,
    MEANING,
    reproducible_part,
    split_tag,
    tag_plan,
)
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.messages import refused
from tests.unit.monitor.conftest import (
    DEPTHS,
    MODALITIES,
    MakeRecord,
    MakeStatistics,
    Statistics,
    draw_groups,
    draw_statistics,
    record_of,
)


def columns_of(groups: tuple[ExpertGroup, ...], g: int) -> tuple[list[int], list[int]]:
    """Counts one by one to find the columns of a group's true and null experts."""
    true = [c for c in range(groups[g].first_expert, groups[g].first_expert + groups[g].num_experts)]
    at = sum(group.num_experts for group in groups) + sum(group.num_null for group in groups[:g])
    return true, list(range(at, at + groups[g].num_null))


def slow_group_numbers(stats: Statistics, groups: tuple[ExpertGroup, ...], g: int) -> dict[str, float]:
    """Computes the four numbers of a group by loops over layers and experts."""
    group = groups[g]
    true, null = columns_of(groups, g)
    taken = nulls = tokens = 0
    imbalances, capacities = [], []
    for layer in range(len(stats.result.counts.choices_LC)):
        loads = [int(stats.result.counts.choices_LC[layer, c]) for c in true]
        taken += sum(loads)
        nulls += sum(int(stats.result.counts.choices_LC[layer, c]) for c in null)
        tokens += int(stats.result.counts.tokens_LG[layer, g])
        imbalances.append(max(loads) / (sum(loads) / len(loads)))
        even = int(stats.result.counts.tokens_LG[layer, g]) * group.top_k / (group.num_experts + group.num_null)
        capacities.append(max(loads) / even)
    return {
        "experts_per_token": taken / tokens,
        "null_fraction": nulls / (taken + nulls),
        "load_imbalance": sum(imbalances) / len(imbalances),
        "capacity_used": max(capacities),
    }


@pytest.mark.parametrize("step", [1, 2, 3])
def test_group_numbers_equal_loops(
    make_statistics: MakeStatistics, make_record: MakeRecord, groups: tuple[ExpertGroup, ...], step: int
) -> None:
    stats, record = make_statistics(step), make_record(step)
    for g, group in enumerate(groups):
        for name, value in slow_group_numbers(stats, groups, g).items():
            assert record.scalars[f"moe/{name}/{group.name}"] == pytest.approx(value, rel=1e-12)


def test_a_case_by_hand() -> None:
    """One layer has the group text with n=2, m=1, k=2 and 10 tokens, and the group image with n=2, m=0, k=1 and no token.

    columns     text0 text1 | image0 image1 | text null
    choices       12     0  |    0      0   |     8
    """
    groups = (ExpertGroup("text", 2, 1, 2, 8, 0, ("text",)), ExpertGroup("image", 2, 0, 1, 8, 2, ("image",)))
    placement = ExpertPlacement(groups, ((0, 1), (2, 3)))
    stats = draw_statistics(
        placement, 1, step=7, nll_M=np.array([30.0, 0.0]), labels_M=np.array([10, 0]), balance=0.5, z=0.25, lr=0.1,
        grad_norm=2.0, skipped_steps=1, tokens=70, step_tokens=10, choices_LC=np.array([[12, 0, 0, 0, 8]]),
        tokens_LG=np.array([[10, 0]]), entropy_LG=np.array([[6.0, 0.0]]), dropped_LE=np.array([[3, 0, 0, 0]]),
        ledger={"payload_bytes": 4800, "rows_remote": 12, "rows_per_pair": 18, "rows_topk": 20, "rows_same_active": 13},
        comm_seconds=0.125, seconds=0.5, epochs={"text": 0.5}, flops_per_token=1e3,
        readings={"device/utilisation": 50.0, "device/power": None, "cpu_percent": 7.0}, peak_flops=1e6,
        peak_source="NVIDIA X1", memory_W3=np.array([[10.0, 12.0, 5.0], [30.0, 35.0, 0.0], [20.0, 40.0, 1.0]]),
        busiest_G=np.array([2.5, 0.0]),
    )  # fmt: skip
    record = record_of(stats, placement, ("text", "image"))
    assert record.scalars == {
        "loss/total": 3.75, "loss/text": 3.0, "loss/image": None, "loss/balance": 0.5, "loss/z": 0.25,
        "optim/lr": 0.1, "optim/grad_norm": 2.0, "optim/skipped_steps": 1.0, "optim/tokens": 70.0,
        "moe/experts_per_token/text": 0.9, "moe/experts_per_token/image": None,
        "moe/null_fraction/text": 0.4, "moe/null_fraction/image": None,
        "moe/load_imbalance/text": 2.0, "moe/load_imbalance/image": None,
        "moe/capacity_used/text": pytest.approx(12 / (20 / 3)), "moe/capacity_used/image": None,
        "moe/dropped_share": pytest.approx(3 / 12),
        "moe/rank_imbalance": 2.0, "moe/dead_experts": 3.0, "moe/router_entropy": 0.6,
        "comm/bytes_sent": 4800.0, "comm/bytes_saved_vs_topk": 8 * 400.0, "comm/bytes_saved_vs_same_active": 400.0,
        "comm/dedup_factor": 1.5, "comm/seconds": 0.125,
        "perf/tokens_per_second": 20.0, "perf/step_seconds": 0.5, "perf/mfu": pytest.approx(0.02),
        "device/utilisation": 50.0, "device/memory": 40.0, "device/power": None,
        "data/epochs/text": 0.5, "data/epochs/image": 0.0,
    }  # fmt: skip
    assert record.host == {
        "cpu_percent": 7.0,
        "largest_allocated_mib": 30.0, "largest_allocated_mib_rank": 1,
        "largest_reserved_mib": 40.0, "largest_reserved_mib_rank": 2,
        "largest_allocator_retries": 5.0, "largest_allocator_retries_rank": 0,
        "largest_unused_mib": 20.0, "largest_unused_mib_rank": 2,
        "mfu_peak": "1e-06 TFLOP/s of all ranks (NVIDIA X1)", "needed_capacity_factor/text": 2.5,
    }  # fmt: skip
    assert record.labels == {"text": 10, "image": 0}


def test_columns_of_every_kind_by_hand() -> None:
    """The group text has 2 true, 1 null and 2 identity experts; the group image has 1 true and 1 constant expert.

    columns    true of both  | nulls of text | identity of text | constant of image
    choices       3  1   4   |       2       |      5  1        |         6
    """
    text = ExpertGroup("text", 2, 1, 2, 8, 0, ("text",), num_identity=2)
    image = ExpertGroup("image", 1, 0, 1, 8, 2, ("image",), num_constant=1)
    choices_LC, tokens_LG = np.array([[3, 1, 4, 2, 5, 1, 6]]), np.array([[6, 10]])
    of_text, of_image = group_choices(choices_LC, (text, image))
    assert [part.tolist() for part in of_text] == [[[3, 1]], [[2]], [[5, 1]], [[]]]
    assert [part.tolist() for part in of_image] == [[[4]], [[]], [[]], [[6]]]
    metrics = group_metrics(choices_LC, tokens_LG, (text, image), dropped_LG=np.array([[1, 0]]))
    np.testing.assert_allclose(metrics["experts_per_token"], [[3 / 6, 4 / 10]])
    np.testing.assert_allclose(metrics["null_fraction"], [[2 / 12, 0.0]])
    np.testing.assert_allclose(metrics["capacity_used"], [[3 / (12 / 5), 4 / (10 / 2)]])
    np.testing.assert_allclose(zero_computation_fraction(choices_LC, (text, image)), [[6 / 12, 6 / 10]])


def test_a_step_without_tokens_has_no_numbers_and_no_errors(
    make_record: MakeRecord, recwarn: pytest.WarningsRecorder
) -> None:
    record = make_record(
        choices_LC=np.zeros((3, 12), np.int64),
        tokens_LG=np.zeros((3, 2), np.int64),
        entropy_LG=np.zeros((3, 2)),
        labels_M=np.zeros(2, np.int64),
        nll_M=np.zeros(2),
    )
    assert record.scalars["loss/total"] is None
    assert record.scalars["moe/load_imbalance/text"] is None
    assert record.scalars["moe/rank_imbalance"] is None
    assert record.scalars["moe/dead_experts"] == 24
    assert not recwarn.list


def test_a_modality_named_like_a_loss_term_is_refused(make_statistics: MakeStatistics, placement: ExpertPlacement) -> None:
    with refused(ValueError):
        record_of(make_statistics(), placement, ("text", "z"))


@pytest.mark.parametrize("deep", [False, True], ids=["plain", "mixture of depths"])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 8, 30])
def test_at_most_forty_scalars_whatever_the_model(
    wide_record: Callable[..., tuple[Record, Subject]], num_groups: int, deep: bool
) -> None:
    modalities = [group.name for group in draw_groups(num_groups, 128, 32, 8)]
    counts_LG = np.ones((2, num_groups), int)
    depths = replace(DEPTHS, groups=tuple(modalities), tokens_LG=4 * counts_LG, taken_LG=counts_LG) if deep else None
    record, _ = wide_record(num_groups, num_layers=4, num_experts=128, mixture_of_depths=depths)
    losses = {name: 2.0 for name in [*modalities, "image_no_filler"]}
    result = EvaluationResult(1, losses, dict.fromkeys(losses, 10), {}, 0.9, 0.8, mixture_of_depths=depths)
    scalars = {**record.scalars, **evaluation_scalars(result, modalities, num_groups)}
    assert len(scalars) <= MAX_SCALARS
    families = {split_tag(tag)[0] for tag in scalars}
    known = MEANING | DEPTH_MEANING if deep else MEANING
    assert families == {family.split("/{")[0] for family in known}, "every family is shown, split or not"
    assert len(record.losses) == num_groups, "the record has what the scalars leave out"


def test_evaluation_scalars() -> None:
    result = EvaluationResult(
        4, {"text": 3.0, "image": 2.0, "image_no_filler": 2.5}, {"text": 1, "image": 3}, {"text": 9.0}
    )
    assert evaluation_scalars(result, ("text", "image"), 2) == {
        "eval/text": 3.0,
        "eval/image": 2.0,
        "eval/image_no_filler": 2.5,
    }
    many = [f"m{i}" for i in range(8)]
    losses = {name: float(i) for i, name in enumerate(many)}
    tokens = {name: i for i, name in enumerate(many)}
    result = EvaluationResult(4, losses, tokens, {}, 0.5, 0.75)
    assert evaluation_scalars(result, many, 1) == {
        "eval/mean": sum(i * i for i in range(8)) / sum(range(8)),
        "moe/balance_efficiency_by_count": 0.75,
        "perf/balance_efficiency": 0.5,
    }


def test_tokens_that_no_expert_takes_are_in_the_record_and_in_a_map(
    make_statistics: MakeStatistics, make_record: MakeRecord, subject: Subject
) -> None:
    """Only records of expert choice have these fields."""
    assert not {"idle_LG", "above_LE"} & make_record(1).arrays.keys()
    unrouted_LG = make_statistics(1).result.counts.tokens_LG // 2
    record = make_record(1, unrouted_LG=unrouted_LG, above_LE=np.ones((3, 8), np.int64), auxiliary=0.25, z=0.0)
    np.testing.assert_array_equal(record.arrays["idle_LG"], unrouted_LG)
    assert record.scalars["loss/auxiliary"] == 0.25
    assert len(record.scalars) == len(make_record(1).scalars), "in place of the z-loss, which it never stands beside"
    window = Window()
    window.add(record)
    sums, steps = window.take()
    assert "moe/idle_fraction" in dict(heat_maps(sums, subject, steps))


HELD_OUT = replace(DEPTHS, taken_LG=np.array([[8, 0], [100, 60]]), agreed_L=None, weight_L=None)
RESULT = EvaluationResult(3, {"text": 3.0}, {"text": 4}, mixture_of_depths=HELD_OUT)


def test_scalars_by_hand(make_record: MakeRecord) -> None:
    scalars = make_record(1, mixture_of_depths=DEPTHS).scalars
    assert {tag: value for tag, value in scalars.items() if tag.startswith("mixture_of_depths/")} == pytest.approx(
        {
            "mixture_of_depths/computed/text": 46 / 200,
            "mixture_of_depths/computed/image": 34 / 120,
            "mixture_of_depths/agreement": 272 / 320,
            "mixture_of_depths/gate_weight": 52 / 80,
        }
    )
    assert evaluation_scalars(RESULT, MODALITIES, 2) == {
        "eval/text": 3.0,
        "mixture_of_depths/load_over_target": pytest.approx((8 / 160 + 1.0) / 2 / 0.25),
    }


def test_what_is_split_shrinks_with_groups_and_modalities() -> None:
    assert all(vars(tag_plan(2, 2)).values())
    assert tag_plan(1, 4).by_group == GROUP_FAMILIES
    assert not tag_plan(1, 4).epochs_per_modality
    assert tag_plan(3, 3).by_group == ()
    assert tag_plan(3, 3).loss_per_modality
    assert not any(vars(tag_plan(8, 8)).values())


def test_reproducible_part_leaves_times_and_readings_out() -> None:
    line = {
        "step": 3,
        "time": 1.0,
        "host": {"cpu_percent": 3.0},
        "balance_note": "timed over 4 batches",
        "scalars": {"loss/total": 2.0, "perf/mfu": 0.1, "device/power": 90.0, "comm/seconds": 0.1, "comm/bytes_sent": 8.0},
    }
    assert reproducible_part(line) == {"step": 3, "scalars": {"loss/total": 2.0, "comm/bytes_sent": 8.0}}
