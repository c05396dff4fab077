"""Planned nodes are assigned to nodes of a Ray cluster."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from launchers.command import JobPlan, NodePlan
from launchers.ray.nodes import DOMAIN, RayNode, assign, nodes_sharing_ep_groups

TEXT, IMAGE = {"modality": "text"}, {"modality": "image"}


def node(name: str, labels: Mapping[str, str] | None = None, *, cpus: int = 1, free: int | None = None) -> RayNode:
    resources = {"CPU": float(cpus)}
    return RayNode(name, name, f"host-{name}", 1, labels or {}, resources, {"CPU": float(cpus if free is None else free)})


def plan(*wants: Mapping[str, str], ranks: int = 1) -> JobPlan:
    nodes = [
        NodePlan(index, tuple(range(index * ranks, (index + 1) * ranks)), labels=labels, groups=tuple(labels.values()))
        for index, labels in enumerate(wants)
    ]
    return JobPlan(tuple(nodes))


def names(job: JobPlan, *nodes: RayNode, bundle: Mapping[str, float] | None = None) -> list[str]:
    found = assign(job, nodes, bundle or {"CPU": 1.0})
    assert not found.problems
    return [each.node_id for each in found.nodes]


def test_matching_leaves_a_node_to_the_only_rank_that_needs_it() -> None:
    assert names(plan({}, TEXT), node("a", TEXT), node("b")) == ["b", "a"]


def test_all_ranks_of_a_node_need_room_on_one() -> None:
    assert names(plan({}, {}, ranks=2), node("a", cpus=1), node("b", cpus=2), node("c", cpus=3)) == ["b", "c"]


def test_the_feature_of_slurm_is_a_label_where_no_labels_are_given() -> None:
    job = JobPlan((NodePlan(0, (0,), feature="vision"),))
    assert names(job, node("a"), node("b", {"feature": "vision"})) == ["b"]


def test_nodes_that_others_use_are_waited_for_and_free_ones_taken() -> None:
    assert names(plan(TEXT), node("a", TEXT, free=0), node("b", TEXT)) == ["b"]
    found = assign(plan(TEXT, IMAGE), [node("a", TEXT, free=0), node("b", IMAGE)], {"CPU": 1.0})
    assert (found.nodes, found.problems) == ((), ())
    assert [each.index for each in found.waits_for] == [0]


def test_a_label_that_no_node_has_is_named() -> None:
    (fault,) = assign(plan(TEXT, {"modality": "video"}), [node("a", TEXT), node("b", IMAGE)], {"CPU": 1.0}).problems
    assert fault.startswith("rank 1 (experts of video): the cluster has no node with the label modality=video; ")


def test_nodes_that_share_ep_groups_are_grouped() -> None:
    four = plan({}, {}, {}, {}, ranks=2)
    assert nodes_sharing_ep_groups(four, 2) == [(0,), (1,), (2,), (3,)]
    assert nodes_sharing_ep_groups(four, 4) == [(0, 1), (2, 3)]
    interleaved = JobPlan((NodePlan(0, (0, 2)), NodePlan(1, (1, 3)), NodePlan(2, (4, 5))))
    assert nodes_sharing_ep_groups(interleaved, 2) == [(0, 1), (2,)]


def test_an_ep_group_on_several_nodes_stays_in_the_smallest_sufficient_domain() -> None:
    racks = [node(name, {DOMAIN: rack}) for name, rack in zip("abcde", "xyxyy", strict=True)]
    found = assign(plan({}, {}), [*racks, node("f")], {"CPU": 1.0}, [(0, 1)])
    assert [each.node_id for each in found.nodes] == ["a", "c"]
    found = assign(plan({}, {}, {}), [*racks, node("f")], {"CPU": 1.0}, [(0,), (1, 2)])
    assert [each.node_id for each in found.nodes] == ["f", "a", "c"]


def test_domains_that_are_too_small_or_missing_are_named() -> None:
    racks = [node(name, {DOMAIN: rack}) for name, rack in zip("abc", "xyy", strict=True)]
    (fault,) = assign(plan({}, {}, {}), racks, {"CPU": 1.0}, [(0, 1, 2)]).problems
    assert fault.startswith("ranks 0-2: the nodes of an EP group must share one domain")
    assert "the cluster has x: 1 nodes, y: 2 nodes" in fault
    (fault,) = assign(plan({}, {}), [node("a"), node("b")], {"CPU": 1.0}, [(0, 1)]).problems
    assert "no labelled node" in fault


@pytest.mark.parametrize(
    ("job", "nodes", "block", "most", "ranks"),
    [
        (plan({}, {}, ranks=3), [node("a", cpus=2), node("b", cpus=4)], 1, None, {"b": (0, 1, 2, 3), "a": (4, 5)}),
        (plan({}, ranks=6), [node("a", cpus=4), node("b", cpus=4)], 1, 6, {"a": (0, 1, 2, 3), "b": (4, 5)}),
        (
            plan(TEXT, IMAGE, ranks=2),
            [node("a", IMAGE), node("b", TEXT, cpus=2), node("c", IMAGE)],
            1,
            None,
            {"b": (0, 1), "a": (2,), "c": (3,)},
        ),
    ],
    ids=["4 + 2 for 3 + 3", "4 + 2 for 6", "labels"],
)
def test_uneven_nodes_that_hold_the_ranks_are_used(
    job: JobPlan, nodes: list[RayNode], block: int, most: int | None, ranks: dict[str, tuple[int, ...]]
) -> None:
    found = assign(replace(job, block=block), nodes, {"CPU": 1.0}, most=most)
    assert dict(zip((each.node_id for each in found.nodes), (each.ranks for each in found.job.nodes), strict=True)) == ranks
    assert [each.index for each in found.job.nodes] == list(range(len(ranks)))


@pytest.mark.parametrize(
    ("job", "nodes", "options"),
    [
        (plan({}, {}, ranks=3), [node("a", cpus=2), node("b", cpus=4)], {"most": 3}),
        (plan({}, ranks=6), [node("a", cpus=5), node("b", cpus=2)], {"block": 3}),
        (plan({}, {}, ranks=3), [node("a", cpus=2), node("b", cpus=4)], {"together": [(0,), (1,)]}),
        (JobPlan((NodePlan(0, (0, 1), own=True),)), [node("a"), node("b")], {}),
    ],
    ids=["limit", "ranks that share a node", "domains", "reserved nodes"],
)
def test_ranks_stay_where_the_site_or_the_run_wants_them(
    job: JobPlan, nodes: list[RayNode], options: dict[str, Any]
) -> None:
    job = replace(job, block=options.pop("block", 1))
    assert assign(job, nodes, {"CPU": 1.0}, **options).problems
