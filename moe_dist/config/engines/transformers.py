"""Defines the section of the engine for models of transformers, and the rules for settings that it does not support."""

from collections.abc import Iterator
from typing import Any, Literal

from moe_dist.config.base.section import Violation, WholeConfig, named, unmet
from moe_dist.config.engines.base import EngineSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.errors import ConfigError

KIND = "engine.kind=transformers"

# Entries (key, allowed values, reason): with this engine, the key must have one of the values.
NEEDED = (
    ("run.init_rules", ((),), "weights of another run are loaded as they are"),
    ("train.only", (None, "routers", "experts", "adapters"), "the family has no other parts that can be trained alone"),
    ("loss.distillation", (None,), "a teacher is this project's own model"),
    ("rank_balance.replicating", (None,), "experts have no replicas"),
    ("parallel.compile", (False,), "the family's code is not compiled"),
    ("parallel.kernels.kind", ("auto", "torch"), "rows are gathered by torch"),
    ("parallel.loss_words", (None,), "the family's own output layer makes all logits"),
    ("parallel.dispatch.kind", ("all_to_all", "hierarchical"), "only these two have been tried with this engine"),
    ("parallel.expert_gemm", ("auto",), "transformers chooses the experts' matrix products"),
    ("parallel.expert_pair_budget", (None,), "the family's experts compute all pairs at once"),
    ("parallel.two_batch_overlap", (False,), "micro-batches are not cut"),
    ("model.moe.capacity", (None,), "no token is dropped"),
    ("model.moe.experts.kind", ("ffn", "sharded_lora"), "experts are the family's, or made of its FFNs"),
    ("model.mixture_of_depths", (None,), "every layer computes every token"),
    ("model.attention_lora", (None,), "the adapters of a family are those of model.lora"),
)
# Additional entries that apply to runs with adapters.
ADAPTED = (
    ("run.init_from", (None,), "the base is model.folder (export a run to make its folder)"),
    ("model.moe.balance", ((),), "the routers are frozen"),
)
# Additional entries that apply if the family's routers have null rows.
NULL_ROWS = (
    ("model.moe.router.softmax_top_k", (True,), "null experts are columns of the router's softmax"),
    ("model.moe.router.scale", (1.0,), "the weights are the family's"),
    ("model.moe.router.null_logit", ("each",), "each null expert has a row of the family's router"),
)
# Additional entries that apply if tokens take all choices of the family's router.
ALL_CHOICES = (
    ("model.moe.router", (TopKRouterSection(), TopKRouterSection(selection_bias=True)), "the family's own router chooses"),
)


class TransformersEngineSection(EngineSection):
    """Train a mixture-of-experts model of the library transformers, with that library's code and this project's dispatcher
    (docs/hf-engine.md). The section `model` names only a folder or family, from whose configuration the sizes follow."""

    builds = "moe_dist.train.build.hosted:transformers_engine"
    model = "moe_dist.train.build.hosted:build_hosted"
    memory = "moe_dist.plan.memory:rank_memory"
    generator = "moe_dist.inference.family_generator:FamilyGenerator"
    hosts = True
    needs_modules = ("transformers",)
    source = "pip install 'moe_dist[hf]'"
    example = "the first one of docs/hf-engine.md"
    own_kernels = False
    passes_logits = False
    passes_token_ids = False

    kind: Literal["transformers"] = "transformers"

    @classmethod
    def complete_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        try:
            return named("moe_dist.hf.host.family:complete")(model)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{KIND}: reading the section model needs the family's code, also on a login node, but there is no module "
                f"{error.name}; {cls.source}"
            ) from error

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        router = config.model.moe.router
        if not router.hosted:
            problem = (
                f"{router.name}: {KIND}: the family's own router chooses the experts; set model.moe.router.kind=top_k, or "
                "top_p to take fewer of its choices, or engine.kind=moe_dist"
            )
            yield Violation(("engine.kind", "model.moe.router.kind"), problem)
        nulls = any(group.num_null for group in config.model.moe.groups.values())
        further = NULL_ROWS if nulls else ALL_CHOICES if router.softmax_top_k else ()
        if config.model.lora is not None:
            yield from unmet(config, "model.lora", "model.lora", ADAPTED, instead="remove model.lora")
            if config.model.folder is None:
                problem = "model.lora: model.folder=null leaves the frozen base untrained; set it, or remove model.lora"
                yield Violation(("model.lora", "model.folder"), problem)
            problems = named("moe_dist.hf.host.lora_names:unknown_names")(config.model)
            yield from (Violation(("model.lora",), problem) for problem in problems)
        yield from unmet(config, "engine.kind", KIND, (*NEEDED, *further), instead="engine.kind=moe_dist")
