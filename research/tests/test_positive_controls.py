"""Positive controls: tasks on which a correctly built method must win. Each test also breaks the method, and requires
that it then loses.

The tasks are tables of facts. A token is a fixed random vector (the key), and its answer is a random class. One layer
with a residual connection and a linear output learns the facts. The loss depends on how many facts the layer can store,
and on which expert gets which key.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.model.layers import RMSNorm, SwiGLU
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.rules import ActiveExperts
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.lora import LoRAExperts, LoRALayer
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import BalanceKind, ColumnTables, balance_terms
from moe_dist.moe.routers.adaptive import AdaptiveRouter, PredictedKRouter, ReLURouter, ThresholdRouter, TopPRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.expert_threshold import ExpertThresholdRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import LayerReport, Routing, RoutingCache
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from research.experiments.methods import LOGIT_RATE, RATE, WARMUP_SHARE
from research.routers.scheduled_top_k import ScheduledTopKRouter
from research.routers.top_k_by_id import TopKByIdRouter
from tests.support.counts import counts_with

pytestmark = pytest.mark.full  # each takes up to half a minute of one core
D, CLASSES, BATCH = 32, 64, 256
N, STEPS = 8, 500  # for the tests that compare with random drop
After = Callable[[LayerReport], None]


class Net(nn.Module):
    """A model that computes x + layer(x), then a linear output."""

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
        dispatcher=AllToAllDispatcher(DispatchContext(placement, AllToAll(None, CommStats()))),
    )
    return drawn(Net(layer))


def drawn(model: Net) -> Net:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05 if "router" in name else 0.2, generator=generator)
    return model


def facts(count: int, seed: int = 1, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Returns keys [count, D] and their classes."""
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
    kind: BalanceKind = "null_averaged",
    after: After = lambda report: None,
) -> float:
    """Trains the model, and returns the mean cross entropy of all facts."""
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
            groups = model.layer.router.groups
            tables = ColumnTables.on(groups, torch.device("cpu"))
            terms = balance_terms(report.aux.prob_LC, report.counts.choices_LC, report.counts.tokens_LG, tables, kind=kind)
            loss = loss + balance * terms.sum()
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
        model = net(groups, TopKRouter(RouterContext(D, groups), normalise="none", scale=float(num_experts)))
        if broken:  # all tokens go to one expert
            model.layer.router.requires_grad_(False)
            next(model.layer.router.parameters()).zero_()
        return fit(model, x_ND, label_N, group_N, steps=1200, balance=0.0 if broken else 0.02)

    dense, experts, broken = loss(1), loss(8), loss(8, broken=True)
    print(f"dense {dense:.3f}, 8 experts {experts:.3f}, 8 experts of which one is used {broken:.3f}")
    assert experts < 0.5 * dense
    assert broken > 0.9 * dense


def test_grouped_experts_beat_mixed_ones_where_modalities_differ() -> None:
    """The same keys have different answers in each modality. A vector in the key encodes the modality, so mixed experts can
    learn the modality. With groups the router knows the modality from the start."""
    x_ND, text_N = facts(500)
    _, image_N = facts(500, seed=5)
    modality_D = 0.5 * torch.randn(D, generator=torch.Generator().manual_seed(6))
    x, labels = torch.cat([x_ND + modality_D, x_ND - modality_D]), torch.cat([text_N, image_N])
    modality = torch.arange(2).repeat_interleave(500)
    groups = (ExpertGroup("text", 4, 0, 1, 16, 0, ("text",)), ExpertGroup("image", 4, 0, 1, 16, 4, ("image",)))

    def loss(groups: Sequence[ExpertGroup], group_N: Tensor, *, broken: bool = False) -> float:
        model = net(groups, TopKRouter(RouterContext(D, groups), normalise="none", scale=float(groups[0].num_experts)))
        if broken:  # each token has the group of another token, so that both groups must learn all facts
            generator = torch.Generator().manual_seed(9)
            model.layer.register_forward_pre_hook(
                lambda _, inputs: (inputs[0], inputs[1][torch.randperm(len(inputs[1]), generator=generator)])
            )
        return fit(model, x, labels, group_N, steps=500, balance=0.02)

    grouped, mixed = loss(groups, modality), loss(whole(8), torch.zeros_like(modality))
    broken = loss(groups, modality, broken=True)
    print(f"grouped {grouped:.3f}, mixed {mixed:.3f}, grouped by other tokens {broken:.3f}")
    assert grouped < 0.5 * mixed
    assert mixed < 0.2
    assert broken > 0.9 * mixed


def test_tuned_routers_recover_a_planted_disturbance() -> None:
    x_ND, label_N = facts(800)
    group_N = torch.zeros(800, dtype=torch.int64)

    def tuned(*, broken: bool = False) -> tuple[float, float, float]:
        """Returns the loss before the disturbance, after it, and after tuning only the router."""
        groups = whole(8, top_k=2)
        model = net(groups, TopKRouter(RouterContext(D, groups), normalise="none", scale=4.0))
        before = fit(model, x_ND, label_N, group_N, steps=800, balance=0.02)
        rows = model.layer.router.get_parameter(f"{group_module('all')}.true")
        with torch.no_grad():
            rows += 0.7 * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
        after = evaluated(model, x_ND, label_N, group_N)
        model.requires_grad_(False)
        model.layer.router.requires_grad_(True)
        if broken:  # the weights pass no gradient to the router, so only the balance loss trains it
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
    """All domains share the items, and each permutes their answers. A token is an item vector plus a domain vector."""
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
            router=TopKRouter(RouterContext(D, groups), normalise="none"),
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
    assert broken > min(one, longer) - 0.1


@dataclass(frozen=True, eq=False)
class Task:
    """A task with two kinds of tokens, of which one needs more experts than the other.

    Attributes:
        needy_N: bool, whether a token is of the kind that needs more experts.
        budget: Mean number of experts per token that every method gets.
        loads: Numbers of experts per token that `two_loads` gives to the needy tokens and to the rest.
        solved_D: Direction that the output layer maps to label 0 from the start; None if there is no such direction.
    """

    x_ND: Tensor
    label_N: Tensor
    needy_N: Tensor
    budget: float
    loads: tuple[int, int]
    width: int
    solved_D: Tensor | None = None


def half_are_facts(budget: float, loads: tuple[int, int], width: int) -> Task:
    """Half of the tokens are facts. The other half share one direction, which the output maps to their answer without
    experts."""
    x_ND, label_N = facts(600)
    generator = torch.Generator().manual_seed(4)
    u_D = F.normalize(torch.randn(D, generator=generator), dim=0) * D**0.5
    x = torch.cat([x_ND, u_D + 0.5 * torch.randn(600, D, generator=generator)])
    needy = torch.arange(1200) < 600
    return Task(x, torch.cat([label_N, torch.zeros_like(label_N)]), needy, budget, loads, width, u_D)


def half_are_pairs() -> Task:
    """Half of the tokens contain two items, and the label combines both answers. The others contain one item with twice the
    length, so that the router's softmax is more certain of them."""
    generator = torch.Generator().manual_seed(1)
    item_2ID = torch.randn(2, 100, D // 2, generator=generator)
    answer_2I = torch.randint(0, 8, (2, 100), generator=generator)
    a, b = torch.randint(0, 100, (2, 400), generator=generator)
    pairs = torch.cat([item_2ID[0, a], item_2ID[1, b]], dim=1)
    none = torch.zeros(100, D // 2)
    single = [torch.cat([2.0 * item_2ID[0], none], dim=1), torch.cat([none, 2.0 * item_2ID[1]], dim=1)]
    labels = [8 * answer_2I[0, a] + answer_2I[1, b], *[8 * answer_2I[0], answer_2I[1]] * 2]
    return Task(torch.cat([pairs, *single * 2]), torch.cat(labels), torch.arange(800) < 400, 1.5, (2, 1), 3)


class Method(NamedTuple):
    """A router, and the controller's rule for its mean number of experts, or None if a capacity sets that number."""

    groups: tuple[ExpertGroup, ...]
    router: Any
    rule: ActiveExperts | None = None
    balance: float = 0.01
    kind: BalanceKind = "vanilla"


def held(task: Task, rate: float, per: Literal["group", "expert"] = "group") -> ActiveExperts:
    return ActiveExperts({"all": task.budget}, rate=rate, decay_steps=STEPS, per=per)


def among_nulls(task: Task) -> Method:
    groups = whole(N, width=task.width, num_null=N)
    router = TopKRouter(RouterContext(D, groups), normalise="none", scale=2.0 * N, selection_bias=True)
    return Method(groups, router, held(task, RATE), kind="null_averaged")


def longcat(task: Task) -> Method:
    groups = (replace(whole(N, width=task.width)[0], num_identity=N),)
    router = TopKRouter(RouterContext(D, groups), normalise="none", scale=2.0 * N, selection_bias=True)
    return Method(groups, router, held(task, RATE, "expert"), kind="null_split")


def adaptive(kind: type[AdaptiveRouter], rate: float, *, scaled: bool = True) -> Callable[[Task], Method]:
    def method(task: Task) -> Method:
        groups = whole(N, top_k=N, width=task.width)
        return Method(groups, kind(RouterContext(D, groups), scale=N / task.budget if scaled else 1.0), held(task, rate))

    return method


def choosing(kind: type[ExpertChoiceRouter], **options: Any) -> Callable[[Task], Method]:
    def method(task: Task) -> Method:
        groups = whole(N, top_k=N, width=task.width)
        router = kind(RouterContext(D, groups), capacity=task.budget / N, causal="threshold", **options)
        return Method(groups, router, balance=0.0)

    return method


def random_drop(task: Task) -> Method:
    groups = whole(N, top_k=math.ceil(task.budget), width=task.width)
    loads = {"all": [task.budget]}
    router = ScheduledTopKRouter(RouterContext(D, groups), active_experts=loads, normalise="none", scale=N / task.budget)
    return Method(groups, router, kind="null_averaged")


class LoadOfKind(TopKByIdRouter):
    """Gives each kind of tokens a fixed number of experts, chosen among all experts. `group_T` contains each token's kind
    instead of its group."""

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        cache = cache or RoutingCache()
        cache.id_T = group_T
        return super().forward(h_TD, torch.zeros_like(group_T), cache)


def two_loads(task: Task) -> Method:
    groups = whole(N, top_k=max(task.loads), width=task.width)
    with NamedTemporaryFile(suffix=".npy") as table:
        np.save(table.name, np.array([task.loads], dtype=np.float64))
        router = LoadOfKind(RouterContext(D, groups), table=table.name, normalise="none", scale=N / task.budget)
    return Method(groups, router, kind="null_averaged")


class Found(NamedTuple):
    """The mean loss of all tokens, and the mean number of experts per token of each kind."""

    loss: float
    needy: float
    others: float


def trained(make: Callable[[Task], Method], task: Task, *, broken: bool = False) -> Found:
    method = make(task)
    groups, router = method.groups, method.router
    group_N = (~task.needy_N).long() if isinstance(router, LoadOfKind) else torch.zeros_like(task.label_N)
    model = net(groups, router)
    if any(group.num_identity for group in groups):
        model.layer.free = ZeroComputationExperts(D, groups)
    if task.solved_D is not None:
        with torch.no_grad():
            model.output.weight[0] = 12.0 * task.solved_D / D
    if broken:  # the router gets the hidden states of other tokens
        generator = torch.Generator().manual_seed(9)
        router.register_forward_pre_hook(
            lambda _, inputs: (inputs[0][torch.randperm(len(inputs[0]), generator=generator)], *inputs[1:])
        )
    gate: Any = router.gate(groups[0]) if method.rule else None
    control = BiasController([[gate]], groups, [method.rule]) if method.rule else None
    thresholds = ThresholdUpdater.of([model.layer])  # pyright: ignore[reportArgumentType]

    def after(report: LayerReport) -> None:
        counts = {"choices_LC": report.counts.choices_LC.double(), "tokens_LG": report.counts.tokens_LG.double()}
        if control is not None:
            control.after_step(counts_with(**counts))
        if thresholds is not None and report.counts.unrouted_LG is not None:
            thresholds.after_step(counts_with(**counts, kth_score_LE=report.counts.kth_score_LE))

    options = {"balance": method.balance, "kind": method.kind, "after": after}
    loss = fit(model, task.x_ND, task.label_N, group_N, steps=STEPS, **options)
    with torch.no_grad():
        token_N = router(task.x_ND, group_N).assignments.taken().token_N
    taken_T = torch.bincount(token_N, minlength=len(group_N)).double()
    return Found(loss, float(taken_T[task.needy_N].mean()), float(taken_T[~task.needy_N].mean()))


# FACTS has a budget of 0.5 experts per token, because half of the tokens need one expert. Predicted k and top-p give each
# token at least one expert. Their budget is 1.5, and half of the tokens need two experts. Top-p gives more experts to
# tokens with a less certain softmax, which are the needy tokens only in PAIRS.
FACTS, NARROW, PAIRS = half_are_facts(0.5, (1, 0), 16), half_are_facts(1.5, (2, 1), 3), half_are_pairs()
# The last number is the largest allowed ratio of the method's loss to the loss of random drop.
METHODS: dict[str, tuple[Callable[[Task], Method], Task, float]] = {
    "nulls": (among_nulls, FACTS, 0.6),
    "longcat": (longcat, FACTS, 0.6),
    "relu": (adaptive(ReLURouter, LOGIT_RATE), FACTS, 0.6),
    "threshold": (adaptive(ThresholdRouter, RATE, scaled=False), FACTS, 0.6),
    "expert_choice": (choosing(ExpertChoiceRouter), FACTS, 0.6),
    "expert_threshold": (choosing(ExpertThresholdRouter, warmup_steps=round(WARMUP_SHARE * STEPS)), FACTS, 0.6),
    "predicted_k": (adaptive(PredictedKRouter, LOGIT_RATE), NARROW, 0.85),
    "top_p": (adaptive(TopPRouter, RATE), PAIRS, 0.75),
}


@cache
def dropped(task: Task) -> Found:
    return trained(random_drop, task)


@pytest.mark.parametrize("name", METHODS)
def test_experts_for_tokens_in_need_beat_random_drop(name: str) -> None:
    make, task, share = METHODS[name]
    found, broken, drop = trained(make, task), trained(make, task, broken=True), dropped(task)
    print(f"{name}: {found}\nbroken {broken}\nrandom drop {drop}")
    assert abs((found.needy + found.others) / 2.0 - task.budget) < 0.2 * task.budget
    assert found.needy > found.others + 0.25
    assert found.loss < share * drop.loss
    assert abs(broken.needy - broken.others) < 0.15
    assert broken.loss > 0.75 * drop.loss


@pytest.mark.parametrize("task", [FACTS, NARROW, PAIRS], ids=["facts", "narrow", "pairs"])
def test_a_fixed_load_for_each_kind_beats_random_drop_too(task: Task) -> None:
    """A router that only knows the kind also wins. The test above therefore shows only that a method separates the kinds.
    It shows nothing about single tokens of a kind."""
    found, drop = trained(two_loads, task), dropped(task)
    print(f"two loads {found}, random drop {drop}")
    assert found.loss < 0.7 * drop.loss
