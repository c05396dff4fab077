"""Classes that describe a Hugging Face model family, its fields and its tensors, as data (used by `families.py`)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moe_dist.config.model_schema import GroupSection, MoESection
from moe_dist.errors import ConfigError
from moe_dist.hf.attention_fields import Windows
from moe_dist.hf.fields import Choices, Fields, Part
from moe_dist.hf.head_fields import GroupedHeads, LatentHeads
from moe_dist.hf.layer_fields import AllLayers

SILENT: Choices = {"none": {}}  # the family has neither this field nor this feature
# The layout of the tensors of MoE layers, explained in `moe_dist.hf.names`.
Layout = Literal["plain", "identity", "interleaved", "zero_computation", "moe_dist"]


@dataclass(frozen=True)
class SharedExpert:
    """Describes the shared expert of each MoE layer."""

    field: str  # name of the field with the shared expert's width
    module: str  # name of the shared expert's module
    gated: bool = False  # a sigmoid gate multiplies the shared expert's output
    counted: bool = False  # if True, the field counts in units of a routed expert's width
    least: int = 1  # smallest value of the field

    def read(self, read: Fields, ffn_dim: int) -> dict[str, Any]:
        """Returns the shared expert's values for `model.moe`."""
        width = read.count(self.field, least=self.least) * (ffn_dim if self.counted else 1)
        return {"shared_ffn_dim": width, "shared_gate": self.gated and width > 0}

    def write(self, moe: MoESection, ffn_dim: int) -> dict[str, Any]:
        return {self.field: moe.shared_ffn_dim // (ffn_dim if self.counted else 1)}


class ZeroComputation:
    """Describes Qwen3-MoE++'s fields (ZEDA, arXiv 2605.18643) for the numbers of null, identity and constant experts."""

    kinds: ClassVar = {
        "num_null": "zero",
        "num_identity": "copy",
        "num_constant": "constant",
    }  # in the order of the columns of moe_dist's routers

    def read(self, read: Fields) -> dict[str, Any]:
        kinds, counts = read.many("zce_types"), read.many("zce_nums")
        ordered = [kind for kind in self.kinds.values() if kind in kinds]
        if kinds != ordered or len(kinds) != len(counts) or not all(type(count) is int and count > 0 for count in counts):
            raise ConfigError(
                f"config.json: zce_types={kinds!r:.80}, zce_nums={counts!r:.80}: supported is each type at most once, in "
                f"the order {', '.join(self.kinds.values())}, with a number above 0"
            )
        if read.flag("use_zce_mask", True):
            raise ConfigError(
                "config.json: use_zce_mask is true or absent: such a model never chooses its zero-computation experts; set "
                "it to false, or take these experts' rows away and set model_type to qwen3_moe"
            )
        return {name: counts[kinds.index(kind)] for name, kind in self.kinds.items() if kind in kinds}

    def write(self, section: GroupSection) -> dict[str, Any]:
        counts = {kind: count for name, kind in self.kinds.items() if (count := getattr(section, name))}
        return {"zce_types": list(counts), "zce_nums": list(counts.values()), "use_zce_mask": False}


@dataclass(frozen=True)
class ModelFamily:
    """Describes one family (`model_type`) of Hugging Face models."""

    name: str  # `model_type`
    architecture: str  # the class with which transformers loads the model
    router: Part  # fields of `model.moe.router`
    experts: tuple[str, ...]  # possible names of the field with the number of experts; empty for a dense family
    ffn: str  # name of the field with an expert's FFN width
    form: Part = field(default_factory=lambda: Part({"kind": "ffn"}))  # fields of `model.moe.experts`
    top_k: tuple[str, ...] = ("num_experts_per_tok",)  # possible names of the field with the number of choices per token
    qk_norm: Choices = field(default_factory=lambda: SILENT)  # fields by value of `model.qk_norm`
    biases: Choices = field(default_factory=lambda: SILENT)  # fields by value of `model.attention_bias`
    num_layers: str = "num_hidden_layers"  # name of the field with the number of layers
    layers_each: int = 1  # number of moe_dist's layers in one layer of the family
    layers: AllLayers = field(default_factory=AllLayers)
    shortcut: bool = False  # value of `model.moe.shortcut`
    dense_ffn: str = "intermediate_size"  # name of the field with a dense layer's FFN width
    dense_module: str = "mlp"  # name of a dense layer's FFN module
    shared: SharedExpert | None = None
    zero_computation: Part | ZeroComputation = field(default_factory=lambda: Part({}))
    layout: Layout = "plain"
    heads: GroupedHeads | LatentHeads = field(default_factory=GroupedHeads)
    rope_base: float = 10000.0  # base of the rotary frequencies if config.json has none
    rope_scaling: Mapping[str, Any] | None = None  # default of rope_parameters
    rope_pairs: Choices = field(default_factory=lambda: {"halves": {}})  # fields by value of `model.rope_pairs`
    windows: Windows = "none"  # how config.json expresses sliding windows
    tied: bool = False  # default of tie_word_embeddings
    must_be: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)  # allowed values and reason, by field
    training: tuple[str, ...] = ()  # fields that only training uses
    # Names of a layer's tensors; an export uses a tuple's first name. `part` is gate, up or down; `old` is w1, w3 or w2.
    gates: tuple[str, ...] = ("mlp.gate.weight",)
    expert: str = "mlp.experts.{expert}.{part}_proj.weight"
    selection_bias: tuple[str, ...] = ()
    selection_bias_dims: int = 1  # number of dims of the selection bias; all dims but the last have size 1
    # Takes the fields and the names of all tensors. Returns the name prefixes of the tensors for multi-token prediction,
    # which an import leaves out.
    multi_token: Callable[[Fields, Collection[str]], list[str]] = lambda read, names: []

    def place(self, layer: int) -> tuple[str, str]:
        """Returns the name prefix of a layer's tensors, and the suffix in the names of its norms and its attention."""
        theirs, part = divmod(layer, self.layers_each)
        return f"model.layers.{theirs}", "" if self.layers_each == 1 else f".{part}"
