"""The parts of a Hugging Face model family. A family has a file with one `ModelFamily`, and one line in `families`. The
parts of a `ModelFamily` convert fields of config.json to values of the section `model` and back, and tell whether
config.json can express the values of a section.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.clamped_ffn import ClampedFFNExpertsSection
from moe_dist.config.model_schema import GroupSection, ModelSection, MoESection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.hf.attention_fields import Windows
from moe_dist.hf.fields import Choices, Fields, setting
from moe_dist.hf.head_fields import GroupedHeads, HeadFields

NORM = {"none": {"norm_topk_prob": False}, "true_chosen": {"norm_topk_prob": True}}
SILENT: Choices = {"none": {}}  # the family has no such field and no such feature
# Layout of the tensors of MoE layers (`moe_dist.hf.names`).
Layout = Literal["plain", "identity", "interleaved", "zero_computation", "moe_dist"]


class RouterFields(Protocol):
    """The fields of the router."""

    def read(self, read: Fields) -> dict[str, Any]:
        """Returns the values of `model.moe.router`."""
        ...

    def write(self, router: RouterSection) -> dict[str, Any]: ...

    def held(self, router: RouterSection, num_experts: int) -> Mapping[str, bool]:
        """Maps each setting, such as 'kind=top_k', to whether config.json can express the setting. If the family lacks the
        router's kind, the mapping has only the kind."""
        ...


class LayerFields(Protocol):
    """The fields that tell which layers have experts."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the fields; empty if all layers have experts, and the family has no dense layers."""
        ...

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        """Returns the indices of the layers with experts."""
        ...

    def write(self, section: ModelSection) -> dict[str, Any]: ...

    def fit(self, section: ModelSection) -> bool: ...


class ExpertFields(Protocol):
    """The fields about the kind of experts."""

    def read(self, read: Fields) -> dict[str, Any]:
        """Returns the values of `model.moe.experts`."""
        ...

    def write(self, experts: ExpertsSection) -> dict[str, Any]: ...

    def fits(self, experts: ExpertsSection) -> bool: ...


class ZeroComputationFields(Protocol):
    """The fields with the numbers of null, identity and constant experts."""

    def read(self, read: Fields) -> dict[str, int]:
        """Returns values of a group of `model.moe.groups`."""
        ...

    def write(self, group: GroupSection) -> dict[str, Any]: ...

    def fits(self, group: GroupSection) -> bool:
        """Returns whether config.json can express a group's numbers of identity and constant experts."""
        ...


@dataclass(frozen=True)
class SoftmaxRouter:
    """The top k of one softmax, plus the selection bias if there is one (`router.kind=top_k`)."""

    normalise: Choices  # fields by value of `router.normalise`; the first is the default
    selection_bias: bool = False
    logit_bias: bool = False
    scale: float | None = None  # default of routed_scaling_factor; None if the family has no such field

    def read(self, read: Fields) -> dict[str, Any]:
        scale = {} if self.scale is None else {"scale": read.positive("routed_scaling_factor", self.scale)}
        biases = {"selection_bias": self.selection_bias, "logit_bias": self.logit_bias}
        return {"kind": "top_k", "normalise": read.choice(self.normalise), **biases, **scale}

    def write(self, router: RouterSection) -> dict[str, Any]:
        assert isinstance(router, TopKRouterSection)
        scale = {} if self.scale is None else {"routed_scaling_factor": router.scale}
        return {**self.normalise.get(router.normalise, {}), **scale}

    def held(self, router: RouterSection, num_experts: int) -> Mapping[str, bool]:
        if not isinstance(router, TopKRouterSection):
            return {setting("router.kind", router.kind): False}
        return {
            setting("router.normalise", router.normalise): router.normalise in self.normalise or num_experts == 1,
            setting("router.selection_bias", router.selection_bias): router.selection_bias == self.selection_bias,
            setting("router.logit_bias", router.logit_bias): router.logit_bias == self.logit_bias,
            setting("router.scale", router.scale): router.scale == 1.0 or self.scale is not None,
        }


@dataclass(frozen=True)
class SwiGLUs:
    """Experts are plain SwiGLUs."""

    def read(self, read: Fields) -> dict[str, Any]:
        return {"kind": "ffn"}

    def write(self, experts: ExpertsSection) -> dict[str, Any]:
        return {}

    def fits(self, experts: ExpertsSection) -> bool:
        return not isinstance(experts, ClampedFFNExpertsSection)


@dataclass(frozen=True)
class AllLayers:
    """Every layer has experts."""

    names: Sequence[str] = ()

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        return list(range(num_layers))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {}

    def fit(self, section: ModelSection) -> bool:
        return len(section.moe_layers) == section.num_layers


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of each MoE layer."""

    field: str  # name of the field with the shared expert's width
    module: str  # name of the shared expert's module
    gated: bool = False  # a sigmoid gate multiplies the shared expert's output
    counted: bool = False  # the field has the shared expert's width as a multiple of a routed expert's width
    least: int = 1  # smallest value of the field

    def read(self, read: Fields, ffn_dim: int) -> dict[str, Any]:
        """Returns the values of `model.moe`."""
        width = read.count(self.field, least=self.least) * (ffn_dim if self.counted else 1)
        return {"shared_ffn_dim": width, "shared_gate": self.gated and width > 0}

    def write(self, moe: MoESection, ffn_dim: int) -> dict[str, Any]:
        return {self.field: moe.shared_ffn_dim // (ffn_dim if self.counted else 1)}

    def fits(self, moe: MoESection, ffn_dim: int) -> bool:
        count, rest = divmod(moe.shared_ffn_dim, ffn_dim if self.counted else 1)
        return rest == 0 and count >= self.least and moe.shared_gate == (self.gated and count > 0)


@dataclass(frozen=True)
class ModelFamily:
    """One family (`model_type`) of Hugging Face models."""

    name: str  # `model_type`
    architecture: str  # the class with which transformers loads the model
    router: RouterFields
    experts: tuple[str, ...]  # possible names of the field with the number of experts; empty if dense
    ffn: str  # name of the field with the FFN width of an expert
    form: ExpertFields = SwiGLUs()
    top_k: tuple[str, ...] = ("num_experts_per_tok",)  # possible names of the field with the choices per token
    qk_norm: Choices = field(default_factory=lambda: SILENT)  # fields by value of `model.qk_norm`
    biases: Choices = field(default_factory=lambda: SILENT)  # fields by value of `model.attention_bias`
    num_layers: str = "num_hidden_layers"  # name of the field with the number of layers
    layers_each: int = 1  # number of moe_dist's layers in one layer of the family
    layers: LayerFields = AllLayers()
    shortcut: bool = False  # value of `model.moe.shortcut`
    dense_ffn: str = "intermediate_size"  # name of the field with the FFN width of a dense layer
    dense_module: str = "mlp"  # name of the FFN of a dense layer
    shared: SharedExpert | None = None
    zero_computation: ZeroComputationFields | None = None
    layout: Layout = "plain"
    heads: HeadFields = field(default_factory=GroupedHeads)
    rope_base: float = 10000.0  # base of the rotary frequencies if config.json has none
    rope_scaling: Mapping[str, Any] | None = None  # default of rope_parameters
    rope_pairs: Choices = field(default_factory=lambda: {"halves": {}})  # fields by value of `model.rope_pairs`
    windows: Windows = "none"  # how config.json expresses sliding windows
    tied: bool = False  # default of tie_word_embeddings
    must_be: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)  # field -> allowed values, reason
    training: tuple[str, ...] = ()  # fields that only training uses
    # Names of a layer's tensors; an export uses a tuple's first name. `part` is gate, up or down; `old` is w1, w3 or w2.
    gates: tuple[str, ...] = ("mlp.gate.weight",)
    expert: str = "mlp.experts.{expert}.{part}_proj.weight"
    selection_bias: tuple[str, ...] = ()
    selection_bias_dims: int = 1  # number of dims of the selection bias; all but the last have one entry
    # Returns, from the fields and all tensors' names, the prefixes of multi-token prediction's tensors, which are left out.
    multi_token: Callable[[Fields, Collection[str]], list[str]] = lambda read, names: []

    def place(self, layer: int) -> tuple[str, str]:
        """Returns the prefix of the names of a layer's tensors, and the suffix of its norms' and attention's names."""
        theirs, part = divmod(layer, self.layers_each)
        return f"model.layers.{theirs}", "" if self.layers_each == 1 else f".{part}"
