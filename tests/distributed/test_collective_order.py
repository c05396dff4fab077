"""FSDP2 gathers and reduces once per layer and pass, in the same order on all ranks, and never between dispatch and
combine. The router still computes in fp32 under FSDP2's mixed precision."""

import contextlib
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import BACKWARD, REPLICAS
from moe_dist.moe.routing.types import Routing, RoutingRequest
from moe_dist.parallel.mesh import make_mesh
from moe_dist.train.objective.loss import AuxSettings
from tests.support.cover import full
from tests.support.layouts import LAYERS, Layout, TrainingRank, batch_of, build, placement_for, placement_of
from tests.support.replicas import of_both_groups, replicate
from tests.support.worlds import RankContext


def recorded_pass(rank: RankContext, layout: Layout) -> list[str]:
    """Returns the events of one forward and backward: exchanges, FSDP2's collectives with the parameters they move, and
    the computation of attention."""
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=layout.ranks_per_node)
    events: list[str] = []
    comm_stats = CommStats(events=events)
    parallel = build(layout, mesh, comm_stats)
    if layout.replicas:
        start = placement_for(layout)
        replicate(parallel, layout, start, comm_stats, [of_both_groups(start)] * LAYERS)
    gather, reduce = param_group.foreach_all_gather, param_group.foreach_reduce

    def note(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(params: Any, *args: Any, **kwargs: Any) -> Any:
            names = sorted({_unit(param._param_fqn) for param in params})
            events.append(f"{kind} {'+'.join(names)}")
            return original(params, *args, **kwargs)

        return noted

    def attended(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        events.append("attention")
        out.register_hook(lambda _: events.append("attention backward"))

    for layer in parallel.model.layers:
        layer.attention.o.register_forward_hook(attended)  # pyright: ignore
    batch = batch_of(0, 0, rank.rank, 1 + layout.halves)
    group = torch.where(batch.padding_BS, -1, batch.modality_BS)
    with (
        mock.patch.object(param_group, "foreach_all_gather", note("gather", gather)),
        mock.patch.object(param_group, "foreach_reduce", note("reduce", reduce)),
    ):
        logits, reports = parallel(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group)
        (logits.square().sum() + sum(report.aux.prob_LC.square().sum() for report in reports)).backward()
    return events


def _unit(name: str) -> str:
    match = re.match(r"layers\.(\d+)\.(attention|moe\.experts|moe)", name)
    return f"{match[2]}{match[1]}" if match else "root"


@pytest.mark.parametrize("layout", [
    full(Layout(2, 2, "pinned", "fsdp2")),
    Layout(2, 2, "pinned", "fsdp2", pair_budget=3),
    full(Layout(2, 2, "interleaved", "fsdp2", "block")),
    full(Layout(4, 2, "uneven", "fsdp2")),
    full(Layout(2, 2, "pinned", "fsdp2", overlap=True)),
    Layout(2, 2, "interleaved", "fsdp2", "block", overlap=True, chunks=3),
    full(Layout(4, 2, "uneven", "fsdp2", chunks=2)),
    full(Layout(4, 2, "pinned", "fsdp2", "block", ranks_per_node=2)),
    Layout(2, 2, "interleaved", "fsdp2", overlap=True, chunks=2, replicas=True),
    full(Layout(4, 2, "uneven", "fsdp2", "block", chunks=2, replicas=True)),
], ids=str)  # fmt: skip
@pytest.mark.slow
def test_no_gather_or_reduce_between_the_exchanges(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    all_events = run_in_world(layout.world_size, recorded_pass, layout)
    first, last = (" 0", f" {layout.chunks - 1}") if layout.chunks > 1 else ("", "")
    hop = "inter-node " if layout.ranks_per_node else ""  # a pass begins and ends with the hop between nodes
    opening = (f"{hop}dispatch rows{first}", f"{hop}combine rows backward{last}")
    closing = (f"wait {hop}combine rows{last}", f"wait {hop}dispatch rows backward{first}")
    if layout.replicas:  # a forward starts with the weights of replicas, and a backward ends with their gradients
        opening, closing = (REPLICAS, opening[1]), (closing[0], f"wait {REPLICAS}{BACKWARD}")
    for events in all_events:
        inside = None
        assert set(opening + closing) <= set(events)
        for event in events:
            if event in opening:
                inside = event
            elif event in closing:
                inside = None
            elif inside and event.startswith(("gather", "reduce")):
                pytest.fail(f"{event!r} falls after {inside!r} and before its partner: {events}")
        reduces = [event for event in events if event.startswith("reduce")]
        assert len(reduces) == len(set(reduces)), "a unit was reduced more than once in a pass"
        gathers = [event for event in events if event.startswith("gather moe.experts")]
        # FSDP2 gathers each layer's experts once in forward and once in backward, for any number of chunks.
        assert all(gathers.count(event) <= 2 for event in gathers)
        assert gathers
    # A rank without experts, and the ranks of its edp group, reduce no expert gradients. All other events must be equal.
    others = [[event for event in events if not re.search(r"^reduce .*experts\d", event)] for events in all_events]
    assert all(events == others[0] for events in others)


def recorded_step(rank: RankContext, layout: Layout) -> list[str]:
    """Returns the torch.distributed calls of two training steps, with the sizes of their groups, and the named
    exchanges."""
    training = TrainingRank(layout)
    calls, start = training.comm_stats.events, training.placement
    if layout.replicas:
        replicate(training.parallel, layout, start, training.comm_stats, [of_both_groups(start)] * LAYERS)

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(f"{name} over {dist.get_world_size(kwargs.get('group'))}")
            return original(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            stack.enter_context(mock.patch.object(dist, name, noted(name, getattr(dist, name))))
        for number in range(2):
            batches = [batch_of(number, micro, rank.rank, 1) for micro in range(2)]
            training.step(batches, lr=1e-2, aux=AuxSettings("null_averaged", 0.02, 1e-3))
    return calls


@pytest.mark.parametrize("layout", [
    full(Layout(4, 1, "uneven")),
    full(Layout(2, 2, "pinned", recompute="block")),
    Layout(4, 1, "uneven", recompute="block", ranks_per_node=2),
    Layout(4, 1, "uneven", recompute="block", overlap=True, chunks=2, replicas=True),
    full(Layout(2, 2, "pinned", "fsdp2", chunks=3, replicas=True)),
], ids=str)  # fmt: skip
def test_every_rank_issues_the_same_collectives_in_the_same_order(
    run_in_world: Callable[..., list[Any]], layout: Layout
) -> None:
    """One of the four ranks has no token, one has no image token and one has no text token. The placement `uneven`
    leaves one rank without experts of a group."""
    first, *others = run_in_world(layout.world_size, recorded_step, layout)
    assert first.count(f"all_to_all_single over {layout.ranks_per_node or layout.ep}") > 0
    assert first.count(f"all_reduce over {layout.world_size}") > 0
    assert all(calls == first for calls in others)


def dtypes(rank: RankContext, layout: Layout) -> dict[str, str]:
    """Returns the dtypes along the router's path in a bf16 run."""
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
    parallel = build(layout, mesh, CommStats())
    layer = parallel.model.moe_modules()[0]
    seen: dict[str, str] = {}

    def see_router(_module: Any, inputs: tuple[Any, ...], routing: Routing) -> None:
        seen["hidden"] = str(inputs[0].dtype)
        seen["weights"] = str(routing.assignments.weight_N.dtype)
        seen["probabilities"] = str(routing.aux.prob_LC[0].dtype)
        seen["router parameter"] = str(next(layer.router.parameters()).dtype)

    def see_experts(_module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        seen["rows"] = str(inputs[0].rows_RD.dtype)
        seen["weights at the experts"] = str(inputs[0].weight_Q.dtype)
        seen["output"] = str(output.dtype)

    layer.router.register_forward_hook(see_router)
    layer.experts.register_forward_hook(see_experts)
    batch = batch_of(0, 0, 2 + rank.rank, 1)
    group = torch.where(batch.padding_BS, -1, batch.modality_BS)
    request = RoutingRequest(probe_tokens_A=torch.tensor([0, 1]))
    logits, reports = parallel(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group, request)
    seen["routing of the asked tokens"] = str(reports[0].prob_AC.dtype)
    logits.float().square().sum().backward()
    parallel.reduce_gradients()
    seen["gradients"] = ",".join(
        sorted({str(i.parameter.grad.dtype) for i in parallel.parameters if i.parameter.grad is not None})
    )
    seen["masters"] = ",".join(sorted({str(i.parameter.dtype) for i in parallel.parameters}))
    assert placement_of(layout.placement, layout.ep).num_ranks == layout.ep
    return seen


@pytest.mark.parametrize("data", ["ddp", full("fsdp2")])
def test_the_routers_path_stays_fp32_in_a_bf16_run(run_in_world: Callable[..., list[Any]], data: str) -> None:
    for seen in run_in_world(2, dtypes, Layout(2, 1, "pinned", data, precision="bfloat16")):
        assert seen == {
            "hidden": "torch.bfloat16",
            "weights": "torch.float32",
            "probabilities": "torch.float32",
            "routing of the asked tokens": "torch.float32",
            "router parameter": "torch.float32",
            "rows": "torch.bfloat16",
            "weights at the experts": "torch.float32",
            "output": "torch.bfloat16",
            "gradients": "torch.float32",
            "masters": "torch.float32",
        }
