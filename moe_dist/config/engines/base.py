"""The base class of the sections of engines. Other code reads the properties of an engine's section and never compares
`kind`."""

from typing import TYPE_CHECKING, Any, ClassVar

from moe_dist.config.base.section import KindSection

if TYPE_CHECKING:
    from moe_dist.config.parallel.section import ParallelSection


class EngineSection(KindSection):
    """The engine that computes the training steps: the model over its ranks, forward, backward, and the optimizer.

    `builds` names a context manager that yields a `Training`, and takes an `EngineContext`, which has the whole
    configuration.
    """

    memory: ClassVar[str]  # function like `moe_dist.plan.memory.rank_memory`, as "package.module:function"
    layouts: ClassVar[str] = ""  # function like `tools.plan_megatron.plan_layouts`, for `moe-dist plan`; empty if `planned`

    model: ClassVar[str] = "moe_dist.train.build.training:build_transformer"  # function that makes the model
    hosts: ClassVar[bool] = False  # whether the model is of transformers, named by model.folder or model.family
    needs_modules: ClassVar[tuple[str, ...]] = ()  # Python modules that must be installed
    source: ClassVar[str] = ""  # how to install these modules
    dense_text: ClassVar[str] = "dense ones on every rank"  # which ranks hold the weights that are not experts
    own_kernels: ClassVar[bool] = True  # whether dense parts run this project's kernels (parallel.kernels)
    passes_logits: ClassVar[bool] = True  # whether a layer gets the router logits of the previous MoE layer
    passes_token_ids: ClassVar[bool] = True  # whether a layer gets the ids of its tokens
    planned: ClassVar[bool] = False  # whether `moe-dist plan` simulates its steps; if not, it lists `layouts`

    def keywords(self) -> dict[str, Any]:
        return {}

    @classmethod
    def complete_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        """Returns the values of the section `model`, completed from what they name."""
        return model

    def data_ranks(self, parallel: "ParallelSection") -> int:
        """Number of ranks, or sets of ranks, that read different sequences."""
        return parallel.ep * parallel.edp

    def data_ranks_text(self) -> str:
        """The formula of `data_ranks` in keys of the configuration, for messages."""
        return "parallel.ep x parallel.edp"

    def groups_of_stage(self, parallel: "ParallelSection") -> int:
        """Number of EP groups in a pipeline stage."""
        return parallel.edp

    def degrees_text(self) -> str:
        """Degrees of parallelism besides ep and edp, for a title; empty if there are no other degrees."""
        return ""
