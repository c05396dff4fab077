"""Defines the section of the engine Megatron-Core, and the rules for settings that this engine does not support."""

import sys
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import PositiveInt, Ranks, Violation, WholeConfig, unmet
from moe_dist.config.engines.base import EngineSection
from moe_dist.config.parallel.section import ParallelSection

KIND = "engine.kind=megatron"

# Entries (key, allowed values, reason): with this engine, the key must have one of the values. A key may be a section.
NEEDED = (
    ("run.init_rules", ((),), "weights of another run are loaded as they are"),
    ("train.only", (None,), "all parameters are trained"),
    ("train.frozen", (None,), "all parameters are trained"),
    ("router_tuning", (None,), "router tuning needs this project's own engine"),
    ("optimizer.kind", ("adamw",), "the optimizer is Megatron's Adam with decoupled weight decay"),
    ("optimizer.backend", ("auto",), "Megatron chooses Transformer Engine's, Apex's or torch's"),
    ("loss.balance.scope", ("micro_batch",), "loads are those of a micro-batch"),
    ("loss.distillation", (None,), "there is no teacher on pipeline stages"),
    ("rank_balance.dealing", (False,), "sequences do not move between ranks"),
    ("rank_balance.moving", (None,), "experts do not move between ranks"),
    ("rank_balance.replicating", (None,), "experts have no replicas"),
    ("parallel.data", ("ddp",), "data parallelism is Megatron's; engine.distributed_optimizer shards the optimizer"),
    ("parallel.recompute", ("none", "experts"), "a layer recomputes its experts only"),
    ("parallel.compile", (False,), "Megatron compiles what it compiles"),
    ("parallel.kernels.kind", ("auto", "torch"), "rows are gathered by torch"),
    ("parallel.loss_words", (None,), "the cross entropy is Megatron's, parallel over the vocabulary"),
    (
        "parallel.dispatch.kind",
        ("all_to_all", "hierarchical", "static"),
        "only all_to_all, hierarchical and static have been tried with this engine",
    ),
    ("parallel.two_batch_overlap", (False,), "micro-batches are not cut"),
    ("parallel.deterministic", (False,), "Megatron's kernels have not been checked for it"),
    ("model.attention_lora", (None,), "there are no adapters"),
    ("model.mixture_of_depths", (None,), "every layer computes every token"),
    ("model.moe.experts.kind", ("ffn", "clamped_ffn"), "experts have no adapters"),
    ("model.moe.capacity", (None,), "no token is dropped"),
    ("model.moe.shortcut", (False,), "the experts' output is added in its own layer"),
    ("monitor.profile", (None,), "steps are not profiled"),
)


class MegatronEngineSection(EngineSection):
    """Megatron-Core, with tensor, pipeline and context parallelism around this project's MoE layer (docs/megatron.md). The
    world size is parallel.ep x parallel.edp, as with engine.kind=moe_dist. Experts are sharded over a pipeline stage's
    ranks."""

    builds = "moe_dist.train.build.megatron:megatron_engine"
    memory = "moe_dist.plan.pipeline_memory:stage_memory"
    layouts = "tools.plan_megatron:plan_layouts"

    kind: Literal["megatron"] = "megatron"
    tp: Ranks = Field(default=1, description="Ranks that share attention, dense and shared FFNs, and the vocabulary.")
    pp: Ranks = Field(default=1, description="Pipeline stages.")
    vpp: PositiveInt = 1
    """Number of model parts per pipeline stage. Above 1, the schedule interleaves the parts, which shortens idle time."""
    layers: tuple[PositiveInt, ...] | None = None
    """Number of layers of each part of the model, in the order of the layers: pp x vpp numbers. null: equally many."""
    cp: Ranks = Field(default=1, description="Ranks that share the positions of a sequence.")
    distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    cpu_trial: bool = False
    """For trials and tests, run on a CPU with gloo. Functions of torch.cuda are replaced in the ranks' processes."""

    # On Python 3.12, megatron-core imports triton even on a CPU, but does not list triton as a requirement.
    needs_modules = ("megatron", *(("triton",) if sys.version_info >= (3, 12) else ()))
    own_kernels = False
    passes_logits = False
    passes_token_ids = False
    dense_text = "divided by engine.tp and engine.pp"
    source = "pip install 'megatron-core>=0.16' triton"

    def data_ranks(self, parallel: ParallelSection) -> int:
        return max(1, parallel.ep * parallel.edp // (self.tp * self.pp * self.cp))

    def data_ranks_text(self) -> str:
        return "parallel.ep x parallel.edp / (engine.tp x engine.pp x engine.cp)"

    def groups_of_stage(self, parallel: ParallelSection) -> int:
        return parallel.edp // self.pp

    def share_of_fullest_stage(self, num_layers: int) -> float:
        """Returns the fraction of the layers that the stage with the most layers has."""
        parts = self.layers or (num_layers // (self.pp * self.vpp),) * (self.pp * self.vpp)
        return max(sum(parts[stage :: self.pp]) for stage in range(self.pp)) / num_layers

    def degrees_text(self) -> str:
        vpp = f" x vpp {self.vpp}" if self.vpp > 1 else ""
        return f"; tp {self.tp}, pp {self.pp}{vpp}, cp {self.cp}"

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from self._degrees(config)
        yield from self._sizes(config)
        yield from unmet(config, "engine.kind", KIND, NEEDED, instead="engine.kind=moe_dist")
        for name, group in config.model.moe.groups.items():
            for field in ("num_identity", "num_constant"):
                key = f"model.moe.groups.{name}.{field}"
                if count := getattr(group, field):
                    yield Violation((key, "engine.kind"), f"{key}={count}: {KIND} has no zero-computation experts; set 0")
        if config.model.moe.router.selection_scope == "ep_group" and self.tp * self.cp > 1:
            problem = (
                f"model.moe.router.scope=ep_group: {KIND}: with engine.tp={self.tp} and engine.cp={self.cp} an EP group "
                "does not have the tokens of whole micro-batches; set scope=rank (the ranks that share sequences) or world"
            )
            yield Violation(("model.moe.router.scope", "engine.tp", "engine.cp"), problem)
        device, needed = config.parallel.device, "cpu" if self.cpu_trial else "cuda"
        if device != needed:
            problem = (
                f"parallel.device={device}: Megatron has no CPU path; set parallel.device=cuda, or for a trial on a CPU "
                f"parallel.device=cpu and engine.cpu_trial=true (here {str(self.cpu_trial).lower()})"
            )
            yield Violation(("engine.cpu_trial", "parallel.device"), problem)

    def _degrees(self, config: WholeConfig) -> Iterator[Violation]:
        ep, edp = config.parallel.ep, config.parallel.edp
        together = self.tp * self.pp * self.cp
        if ep * edp % together:
            problem = (
                f"engine.tp={self.tp} x engine.pp={self.pp} x engine.cp={self.cp} = {together}: must divide the "
                f"{ep * edp} ranks (parallel.ep={ep} x parallel.edp={edp}); lower a degree, or set parallel.edp to a "
                f"multiple of {_least_factor(together, ep)}"
            )
            yield Violation(("engine.tp", "engine.pp", "engine.cp", "parallel.ep", "parallel.edp"), problem)
        if edp % self.pp:
            problem = (
                f"parallel.edp={edp}: must be a multiple of engine.pp={self.pp}, since an EP group is inside a pipeline "
                f"stage; set it to {edp + -edp % self.pp}, or lower engine.pp"
            )
            yield Violation(("parallel.edp", "engine.pp"), problem)
        layers, stages = config.model.num_layers, self.pp * self.vpp
        keys = ("model.num_layers", "engine.pp", "engine.vpp")
        if self.layers is None and layers % stages:
            problem = (
                f"model.num_layers={layers}: must be a multiple of engine.pp={self.pp} x engine.vpp={self.vpp} = {stages}, "
                f"since every part of the pipeline has equally many; give each part its number in engine.layers, take "
                f"{layers + -layers % stages} layers, or other degrees"
            )
            yield Violation(keys, problem)
        elif self.layers and (len(self.layers), sum(self.layers)) != (stages, layers):
            problem = (
                f"engine.layers={list(self.layers)}: must be {stages} numbers (engine.pp={self.pp} x engine.vpp="
                f"{self.vpp}) whose sum is model.num_layers={layers}; change them, or set engine.layers=null"
            )
            yield Violation(("engine.layers", *keys), problem)
        if self.vpp > 1 and self.pp == 1:
            problem = f"engine.vpp={self.vpp}: there is no pipeline with engine.pp=1; set vpp to 1, or raise pp"
            yield Violation(("engine.vpp", "engine.pp"), problem)
        times = config.train.global_batch // (config.train.micro_batch * self.data_ranks(config.parallel))
        if self.vpp > 1 and times % self.pp:
            problem = (
                f"engine.vpp={self.vpp}: the interleaved schedule needs a multiple of engine.pp={self.pp} micro-batches, "
                f"but train.global_batch={config.train.global_batch} gives {times}; change it, or set engine.vpp=1"
            )
            yield Violation(("engine.vpp", "engine.pp", "train.global_batch", "train.micro_batch"), problem)

    def _sizes(self, config: WholeConfig) -> Iterator[Violation]:
        model, tp = config.model, self.tp
        for key, size in (
            ("model.num_heads", model.num_heads),
            ("model.num_kv_heads", model.num_kv_heads),
            ("model.vocab_size", model.vocab_size),
            ("model.dense_ffn_dim", model.dense_ffn_dim or 0),
            ("model.moe.shared_ffn_dim", model.moe.shared_ffn_dim),
        ):
            if size % tp:
                problem = (
                    f"{key}={size}: must be a multiple of engine.tp={tp}; take {size + -size % tp}, or lower engine.tp"
                )
                yield Violation((key, "engine.tp"), problem)
        pieces = tp * (2 * self.cp if self.cp > 1 else 1)
        if config.data.seq_len % pieces:
            length = config.data.seq_len
            problem = (
                f"data.seq_len={length}: must be a multiple of {pieces} with engine.tp={tp} and engine.cp={self.cp} (each "
                f"context-parallel rank has two pieces of a sequence, each tensor-parallel rank a part); take "
                f"{length + -length % pieces}, or lower the degrees"
            )
            yield Violation(("data.seq_len", "engine.tp", "engine.cp"), problem)


def _least_factor(together: int, ep: int) -> int:
    """Returns the smallest `edp` for which `together` divides ep x edp."""
    return next(edp for edp in range(1, together + 1) if ep * edp % together == 0)
