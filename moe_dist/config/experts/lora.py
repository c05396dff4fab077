"""Defines the sections of LoRA adapters, which are experts or on attention, and the rules of train.only=adapters."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Decay, PathText, PositiveInt, Section, Violation, WholeConfig, unmet
from moe_dist.config.dispatchers.kinds import AllToAllDispatchSection
from moe_dist.config.experts.base import ExpertsSection

EXPERTS = "model.moe.experts.kind"
ALL_HERE = "every rank holds all LoRA experts and sends no rows (docs/lora-experts.md)"
NEEDS = (
    (
        "model.moe.router.normalise",
        ("none",),
        "model.moe.experts.weight sets the weights, from the softmax of all columns",
    ),
    ("model.moe.router.scale", (1.0,), "experts are scaled by model.moe.experts.alpha"),
    ("model.moe.shared_ffn_dim", (0,), "the frozen FFN is the only shared expert"),
    ("model.moe.capacity", (None,), ALL_HERE),
    ("placement.policy", ("interleaved",), ALL_HERE),
    ("parallel.dispatch", (AllToAllDispatchSection(),), ALL_HERE),
    ("parallel.expert_pair_budget", (None,), ALL_HERE),
    ("parallel.max_receive_rows", (None,), ALL_HERE),
    ("parallel.expert_gemm", ("auto", "loop"), ALL_HERE),
)

SHARDED = (
    ("run.init_from", (None,), "the base is model.folder (export a run to make its folder)"),
    ("model.moe.balance", ((),), "the routers have no selection bias"),
)


class AdapterSection(Section):
    """LoRA adapters on some of the projections."""

    rank: PositiveInt = Field(description="Rank of each adapter (r).")
    alpha: PositiveFloat = Field(description="The output of an adapter is scaled by alpha / rank.")
    dropout: Decay = Field(default=0.0, description="Share of an adapter's inputs that is dropped in training.")
    targets: Any

    def violations(self) -> Iterator[Violation]:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            fix = "name each target once" if self.targets else "name at least one target, or remove the section"
            yield Violation(("targets",), f"targets={list(self.targets)}: {fix}")


class AttentionLoRASection(AdapterSection):
    """LoRA adapters on the attention of every layer."""

    targets: tuple[Literal["q", "k", "v", "o", "q_down", "q_up", "kv_down", "kv_up"], ...] = ("q", "k", "v", "o")
    """Attention projections that have an adapter. q, k, v and o are the projections of queries, keys, values and output.
    Latent attention has the projections q_down and q_up (or q), kv_down, kv_up and o."""


class HostedLoRASection(AdapterSection):
    """LoRA adapters on weights of a transformers model, which are named as in PEFT."""

    targets: tuple[str, ...] = ()
    """Linear layers that have an adapter, as PEFT's target_modules: names, or ends of names such as q_proj or
    shared_expert.up_proj."""
    parameters: tuple[str, ...] = ()
    """Stacks of experts that have an adapter for each expert, as PEFT's target_parameters: names, or ends of names such as
    experts.gate_up_proj."""
    folder: PathText | None = None
    """Folder of adapters in PEFT's form, with which a new run begins. null: B is 0 at first."""

    def violations(self) -> Iterator[Violation]:
        named = (*self.targets, *self.parameters)
        if not named or len(set(named)) < len(named):
            fix = "name each once" if named else "name at least one weight, or remove the section"
            problem = f"targets={list(self.targets)}, parameters={list(self.parameters)}: {fix}"
            yield Violation(("targets", "parameters"), problem)
        if self.dropout:
            problem = f"dropout={self.dropout:g}: PEFT has no dropout on stacks of experts; set it to 0"
            yield Violation(("dropout",), problem)


class LoRAExpertsSection(AdapterSection, ExpertsSection):
    """The true experts of a layer are LoRA adapters over one frozen FFN, which computes every token (LLaVA-MoLE)."""

    builds = "moe_dist.moe.experts.lora:LoRAExperts"
    served = "lora"
    replicated = True
    over_frozen_ffn = True

    kind: Literal["lora"] = "lora"
    targets: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")
    """Projections of the FFN that have an adapter. All adapters of an expert compute the same tokens."""
    weight: Literal["probability", "straight_through", "published"] = "probability"
    """Weight of a chosen expert. probability: the expert's probability p in the softmax over all columns. straight_through:
    1, with the gradient of log p. published: 1 without a gradient, as in the sparse branch of LLaVA-MoLE's public code;
    cross entropy then does not train the router."""

    @property
    def input_dropout(self) -> float:
        return self.dropout

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if config.model.moe.router.softmax_top_k:  # `adapter_violations` reports routers without `softmax_top_k`
            yield from unmet(config, EXPERTS, f"{EXPERTS}={self.kind}", NEEDS, instead="take another kind of experts")
            yield from _groups(config)


class ShardedLoRAExpertsSection(LoRAExpertsSection):
    """LoRA adapters over the frozen FFNs of a dense transformers model. Each rank has the adapters of its own experts."""

    builds = "moe_dist.hf.host.dense:AdapterStack"
    served = ""
    replicated = False

    kind: Literal["sharded_lora"] = "sharded_lora"  # pyright: ignore[reportIncompatibleVariableOverride]

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from unmet(config, EXPERTS, f"{EXPERTS}={self.kind}", SHARDED, instead="take another kind of experts")
        if not config.engine.hosts or config.model.folder is None:
            problem = f"{EXPERTS}={self.kind}: the frozen FFNs are those of a dense model of transformers; set engine.kind="
            yield Violation((EXPERTS, "engine.kind"), f"{problem}transformers and model.folder, or {EXPERTS}=lora")
        for name, group in config.model.moe.groups.items():
            if group.top_k > 1 or group.num_null or self.dropout:
                problem = (
                    f"model.moe.groups.{name}: top_k={group.top_k}, num_null={group.num_null}, dropout={self.dropout:g}: "
                    f"one rank computes the FFN of a token with its adapter; with {self.kind} set 1, 0 and 0"
                )
                yield Violation((f"model.moe.groups.{name}", EXPERTS), problem)


def _groups(config: WholeConfig) -> Iterator[Violation]:
    moe = config.model.moe
    widths = {name: group.ffn_dim for name, group in moe.groups.items()}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{name}: {width}" for name, width in widths.items())
        problem = (
            f"model.moe.groups: ffn_dim is {said}; all groups adapt the same FFN: give each group the width of the base"
        )
        yield Violation(("model.moe.groups", EXPERTS), problem)
    for name, group in moe.groups.items():
        if group.num_identity or group.num_constant:
            problem = (
                f"model.moe.groups.{name}: num_identity={group.num_identity}, num_constant={group.num_constant}: with LoRA "
                "experts a null expert already leaves the frozen FFN alone; set both to 0"
            )
            yield Violation((f"model.moe.groups.{name}", EXPERTS), problem)


def adapter_violations(config: WholeConfig) -> Iterator[Violation]:
    """Yields a violation for each broken rule about LoRA experts, `model.attention_lora` or `train.only=adapters`."""
    only, rules, there = config.train.only, config.run.init_rules, config.model.has_adapters
    if there and only != "adapters":
        problem = (
            f"train.only={only or 'null'}: the weights under adapters (model.moe.experts.kind=lora or ffn_lora, "
            "model.attention_lora, model.lora) are frozen, and only the adapters are saved; set train.only=adapters"
        )
        yield Violation(("train.only", EXPERTS, "model.attention_lora"), problem)
    if only == "adapters" and not there:
        problem = (
            "train.only=adapters: the model has no adapters; set model.moe.experts to {kind: lora, ...} or "
            "model.attention_lora (of a model of transformers, model.lora), or set train.only=null"
        )
        yield Violation(("train.only", EXPERTS, "model.attention_lora"), problem)
    if config.engine.hosts:
        return  # the base is model.folder, see the engine's section
    if only == "adapters" and config.run.init_from is None:
        problem = (
            "train.only=adapters: the base is frozen, and run.init_from=null leaves it untrained; set run.init_from to a "
            "checkpoint of the base (a run, or a folder that tools.import_hf made)"
        )
        yield Violation(("train.only", "run.init_from"), problem)
    if only == "adapters" and rules != ("adapt",):
        problem = f"run.init_rules={list(rules)}: a base under adapters is loaded unchanged; set run.init_rules=[adapt]"
        yield Violation(("run.init_rules", "train.only"), problem)
    if only != "adapters" and "adapt" in rules:
        problem = "run.init_rules: adapt puts adapters on a frozen base; set train.only=adapters, or remove the rule"
        yield Violation(("run.init_rules", "train.only"), problem)
    if there and config.model.mixture_of_depths is not None:
        problem = (
            "model.mixture_of_depths: neither a frozen base nor adapters have mixture-of-depths routers; set it to null"
        )
        yield Violation(("model.mixture_of_depths", "train.only"), problem)
    router, experts = config.model.moe.router, config.model.moe.experts
    if there and not (router.softmax_top_k if experts.over_frozen_ffn else router.adapted):
        kinds = "top_k" if experts.over_frozen_ffn else "top_k or group_limited"
        problem = f"{router.name}: adapters need a base with another router; set model.moe.router.kind={kinds}"
        yield Violation(("model.moe.router.kind", "train.only"), problem)
