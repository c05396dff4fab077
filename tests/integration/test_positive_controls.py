"""Positive controls: tasks made so that a method must win if it is built rightly. Each test also breaks the method on
purpose and sees that it no longer wins.

The tasks are tables of facts: a token is a fixed random vector (the key), and its answer is a random class. One layer with
residual and a linear output learns them, so what counts is how much the layer can store and who gets which key.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.model.layers import RMSNorm, SwiGLU
from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.lora import LoRAExperts, LoRALayer
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.moe.routers.scheduled_top_k import ScheduledTopKRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing import LayerReport
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.roles import group_module
from tests.support.counts import counts_with

pytestmark = pytest.mark.full  # each a minute of one core
D, CLASSES, BATCH = 32, 64, 256
After = Callable[[LayerReport], None]


class Net(nn.Module):
    """x + layer(x), then a linear output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = layer, nn.Linear(D, CLASSES, bias=False)

    def forward(self, x_TD: Tensor, group_T: Tensor) -> tuple[Tensor, LayerReport]:
        y_TD, report = self.layer(x_TD, group_T)
        return self.output(x_TD + y_TD), report


def net(groups: Sequence[ExpertGroup], router: nn.Module) -> Net:
    num_experts = sum(group.num_experts for group in groups)
    placement = ExpertPlacement(tuple(groups), (tuple(range(num_experts)),))
    layer = MoELayer(
        norm=nn.Identity(),
        router=router,
        experts=Experts(D, groups, [group.num_experts for group in groups]),
        dispatcher=AllToAllDispatcher(placement, AllToAll(None, CommStats())),
    )
    return drawn(Net(layer))


def drawn(model: Net) -> Net:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05 if "router" in name else 0.2, generator=generator)
    return model


def facts(count: int, seed: int = 1, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Keys [count, D] and their classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator), torch.randint(0, classes, (count,), generator=generator)


def fit(
    model: Net,
    x_ND: Tensor,
    label_N: Tensor,
    group_N: Tensor,
    *,
    steps: int,
    lr: float = 5e-3,
    balance: float = 0.0,
    after: After = lambda report: None,
) -> float:
    """Trains and returns the mean cross entropy of all facts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    generator = torch.Generator().manual_seed(2)
    model.train()
    for _ in range(steps):
        pick = torch.randint(0, len(x_ND), (BATCH,), generator=generator)
        logits, report = model(x_ND[pick], group_N[pick])
        loss = F.cross_entropy(logits, label_N[pick])
        if balance:
            sums, groups = report.sums, model.layer.router.groups
            tables = ColumnTables.on(groups, torch.device("cpu"))
            loss = (
                loss + balance * balance_terms(sums.prob_C[None], sums.choices_C[None], sums.tokens_G[None], tables).sum()
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        after(report)
    return evaluated(model, x_ND, label_N, group_N)


@torch.no_grad()
def evaluated(model: Net, x_ND: Tensor, label_N: Tensor, group_N: Tensor) -> float:
    model.eval()
    return float(F.cross_entropy(model(x_ND, group_N)[0], label_N))


def whole(num_experts: int, top_k: int = 1, width: int = 16, num_null: int = 0) -> tuple[ExpertGroup, ...]:
    return (ExpertGroup("all", num_experts, num_null, top_k, width, 0, ("text", "image")),)


def test_experts_beat_a_dense_layer_of_equal_flops_where_memory_counts() -> None:
    x_ND, label_N = facts(1500)
    group_N = torch.zeros(1500, dtype=torch.int64)

    def loss(num_experts: int, *, broken: bool = False) -> float:
        groups = whole(num_experts)
        model = net(groups, TopKRouter(D, groups, normalise="none", scale=float(num_experts)))
        if broken:  # all tokens go to one expert
            model.layer.router.requires_grad_(False)
            next(model.layer.router.parameters()).zero_()
        return fit(model, x_ND, label_N, group_N, steps=1200, balance=0.0 if broken else 0.02)

    dense, experts, broken = loss(1), loss(8), loss(8, broken=True)
    print(f"dense {dense:.3f}, 8 experts {experts:.3f}, 8 experts of which one is used {broken:.3f}")
    assert experts < 0.5 * dense
    assert broken > 0.9 * dense


def test_grouped_experts_beat_mixed_ones_where_modalities_differ() -> None:
    """The same keys have other answers in each modality, which only the group tells."""
    x_ND, text_N = facts(500)
    _, image_N = facts(500, seed=5)
    x, labels = torch.cat([x_ND, x_ND]), torch.cat([text_N, image_N])
    modality = torch.arange(2).repeat_interleave(500)
    groups = (ExpertGroup("text", 4, 0, 1, 16, 0, ("text",)), ExpertGroup("image", 4, 0, 1, 16, 4, ("image",)))

    def loss(groups: Sequence[ExpertGroup], group_N: Tensor) -> float:
        model = net(groups, TopKRouter(D, groups, normalise="none", scale=4.0))
        return fit(model, x, labels, group_N, steps=1000, balance=0.02)

    grouped, mixed = loss(groups, modality), loss(whole(8), torch.zeros_like(modality))
    broken = loss(groups, torch.zeros_like(modality))  # all tokens are routed as text
    print(f"grouped {grouped:.3f}, mixed {mixed:.3f}, grouped without the modality {broken:.3f}")
    assert grouped < 0.5 * mixed
    assert broken > 0.9 * mixed


def test_tuned_routers_recover_a_planted_disturbance() -> None:
    x_ND, label_N = facts(800)
    group_N = torch.zeros(800, dtype=torch.int64)

    def tuned(*, broken: bool = False) -> tuple[float, float, float]:
        """Loss before the disturbance, after it, and after tuning the router alone."""
        groups = whole(8, top_k=2)
        model = net(groups, TopKRouter(D, groups, normalise="none", scale=4.0))
        before = fit(model, x_ND, label_N, group_N, steps=800, balance=0.02)
        rows = model.layer.router.get_parameter(f"{group_module('all')}.true")
        with torch.no_grad():
            rows += 0.7 * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
        after = evaluated(model, x_ND, label_N, group_N)
        model.requires_grad_(False)
        model.layer.router.requires_grad_(True)
        if broken:  # the weights carry no gradient to the router, so that the balance loss alone trains it
            router = model.layer.router
            weights = router._weights
            router._weights = lambda *arguments: weights(*arguments).detach()  # pyright: ignore
        return before, after, fit(model, x_ND, label_N, group_N, steps=300, lr=2e-2, balance=0.02 if broken else 0.0)

    before, after, found = tuned()
    assert after > before + 0.5
    recovered = (after - found) / (after - before)
    b, a, f = tuned(broken=True)
    lost = (a - f) / (a - b)
    print(f"before {before:.3f}, disturbed {after:.3f}, tuned {found:.3f}: {recovered:.2f} of the gap; broken {lost:.2f}")
    assert recovered > 0.7
    assert lost < 0.3


def test_lora_experts_beat_one_lora_where_domains_contradict() -> None:
    """Each domain renames the same items by a permutation of its own; the token shows item and domain."""
    domains, items = 6, 64
    generator = torch.Generator().manual_seed(1)
    item_ID = torch.randn(items, D, generator=generator)
    domain_ED = torch.randn(domains, D, generator=generator)
    x = (item_ID[None] + domain_ED[:, None]).flatten(0, 1)
    labels = torch.cat([torch.randperm(items, generator=generator) for _ in range(domains)])
    group_N = torch.zeros(len(x), dtype=torch.int64)

    def loss(experts: int, steps: int, *, broken: bool = False) -> float:
        groups = (ExpertGroup("all", experts, 0, 1, 4 * D, 0, ("text",)),)
        layer = LoRALayer(
            norm=RMSNorm(D, 1e-5),
            router=TopKRouter(D, groups, normalise="none"),
            ffn=SwiGLU(D, 4 * D),
            adapters=LoRAExperts(D, 4 * D, groups, rank=1, alpha=2.0),
        )
        model = drawn(Net(layer))
        nn.init.ones_(layer.norm.weight)
        model.requires_grad_(False)
        layer.adapters.requires_grad_(True)
        layer.router.requires_grad_(not broken)
        if broken:
            next(layer.router.parameters()).zero_()
        return fit(model, x, labels, group_N, steps=steps, lr=1e-2, balance=0.0 if broken or experts == 1 else 0.02)

    one, longer, several, broken = loss(1, 600), loss(1, 1200), loss(6, 600), loss(6, 600, broken=True)
    print(f"one LoRA {one:.3f}, twice as long {longer:.3f}, 6 experts {several:.3f}, of which one is used {broken:.3f}")
    assert several < min(one, longer) - 0.1
    assert broken > several + 0.1


def test_nulls_beat_random_drop_where_tokens_differ_in_need() -> None:
    """Half of the tokens are facts. The others are one key with one answer, which the residual alone can give."""
    x_ND, label_N = facts(600)
    x = torch.cat([x_ND, x_ND[:1].expand(600, -1)])
    labels = torch.cat([label_N, label_N[:1].expand(600)])
    group_N, budget = torch.zeros(1200, dtype=torch.int64), 0.5

    def loss(router: Any, groups: Sequence[ExpertGroup], *, broken: bool = False) -> tuple[float, float, float]:
        model = net(groups, router)
        rules = [ActiveExperts({"all": budget}, rate=1.0, decay_steps=100)]
        gate: Any = router.gate(groups[0])
        control = BiasController([[gate]], tuple(groups), rules) if router.selection_bias else None

        def after(report: LayerReport) -> None:
            if control is not None:
                sums = report.sums
                control.after_step(
                    counts_with(choices_LC=sums.choices_C[None].double(), tokens_LG=sums.tokens_G[None].double())
                )

        if broken:  # the router sees another token than the experts
            logits = router._logits
            router._logits = lambda h_TD: logits(h_TD[torch.randperm(len(h_TD))])
        found = fit(model, x, labels, group_N, steps=1200, balance=0.01, after=after)
        with torch.no_grad():
            choices = router(x, group_N).assignments
        taken_T = (choices.expert_N.view(len(x), -1) >= 0).double().sum(1)
        return found, float(taken_T[:600].mean()), float(taken_T[600:].mean())

    nulls = whole(8, num_null=8)
    adaptive = loss(TopKRouter(D, nulls, normalise="none", scale=8.0, selection_bias=True), nulls)
    drop = loss(ScheduledTopKRouter(D, whole(8), active_experts={"all": [budget]}, normalise="none", scale=8.0), whole(8))
    broken = loss(TopKRouter(D, nulls, normalise="none", scale=8.0, selection_bias=True), nulls, broken=True)
    print(f"loss, experts of facts, of the others: nulls {adaptive}, random drop {drop}, broken {broken}")
    assert adaptive[1] > adaptive[2] + 0.3
    assert adaptive[0] < 0.8 * drop[0]
    assert broken[0] > 0.8 * drop[0]
