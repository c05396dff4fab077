"""Defines the base class of the engines' sections. Other code reads the sections' properties and never compares `kind`."""

from typing import TYPE_CHECKING, Any, ClassVar

from moe_dist.config.base.section import KindSection

if TYPE_CHECKING:
    from moe_dist.config.parallel.section import ParallelSection


class EngineSection(KindSection):
    """The engine that computes the training steps. It distributes the model, and runs forward, backward and optimizer.

    `builds` names a context manager. It gets an `EngineContext` with the whole configuration, and yields a `Training`.
    """

    memory: ClassVar[str]  # function with the interface of `moe_dist.plan.memory.rank_memory`, as "module:function"
    layouts: ClassVar[str] = ""  # for `moe-dist plan`: function like `tools.plan_megatron.plan_layouts`; empty if `planned`

    model: ClassVar[str] = "moe_dist.train.build.training:build_transformer"  # function that makes the model
    generator: ClassVar[str] = "moe_dist.inference.generate:Generator"  # class that continues prompts with the model
    hosts: ClassVar[bool] = False  # whether model.folder or model.family names a transformers model
    needs_modules: ClassVar[tuple[str, ...]] = ()  # Python modules that the engine needs
    source: ClassVar[str] = ""  # how to install these modules
    example: ClassVar[str] = "`moe-dist show moma_tiny_cpu > new.yaml`"  # a complete configuration, for messages
    dense_text: ClassVar[str] = "dense ones on every rank"  # says which ranks have the dense weights
    own_kernels: ClassVar[bool] = True  # whether dense parts run this project's kernels (parallel.kernels)
    passes_logits: ClassVar[bool] = True  # whether a layer gets the previous MoE layer's router logits
    passes_token_ids: ClassVar[bool] = True  # whether a layer gets its tokens' ids
    planned: ClassVar[bool] = False  # whether `moe-dist plan` simulates steps; if not, it lists `layouts`

    def keywords(self) -> dict[str, Any]:
        return {}

    @classmethod
    def complete_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of the section `model`, completed from the folder or family that they name."""
        return model

    def data_ranks(self, parallel: "ParallelSection") -> int:
        """Number of ranks (or of sets of ranks) that read different sequences."""
        return parallel.ep * parallel.edp

    def data_ranks_text(self) -> str:
        """Formula for `data_ranks` in terms of keys, for messages."""
        return "parallel.ep x parallel.edp"

    def groups_of_stage(self, parallel: "ParallelSection") -> int:
        """Number of EP groups in a pipeline stage."""
        return parallel.edp

    def degrees_text(self) -> str:
        """Text with all degrees of parallelism except ep and edp, for a title; empty if there are no others."""
        return ""
