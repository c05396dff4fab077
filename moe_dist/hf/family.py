"""Classes that describe a Hugging Face model family, its fields and its tensors, as data (used by `families.py`)."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moe_dist.config.attention.kinds import LatentAttentionSection
from moe_dist.config.model_schema import GroupSection, ModelSection, MoESection
from moe_dist.errors import ConfigError
from moe_dist.hf.attention_fields import Windows
from moe_dist.hf.fields import Choices, Fields, Part

SILENT: Choices = {"none": {}}  # the family has neither this field nor this feature
# The layout of the tensors of MoE layers, explained in `moe_dist.hf.names`.
Layout = Literal["plain", "identity", "interleaved", "zero_computation", "moe_dist"]


@dataclass(frozen=True)
class GroupedHeads:
    """Describes heads of grouped-query attention, or of another `kind` with the same widths."""

    kind: str = "grouped_query"  # `model.attention.kind`
    width: int | None = None  # default of head_dim; None means hidden_size / num_attention_heads
    field: bool = True  # True if config.json has the field head_dim
    null: bool = False  # True if head_dim may be null, which means hidden_size / num_attention_heads
    kv_heads: int | None = None  # default of num_key_value_heads; None means num_attention_heads, also for a null field
    rope_share: float | None = None  # default of partial_rotary_factor; None if the family lacks this field

    def read(self, read: Fields, num_heads: int) -> tuple[dict[str, Any], int]:
        """Returns values of the section `model`, and a head's number of rotated values if partial_rotary_factor is 1."""
        width = read.whole("head_dim", self.width, **({"null": None} if self.null else {}))
        if not self.field and width is not None and width * num_heads != read.whole("hidden_size"):
            raise ConfigError(
                f"config.json: head_dim={width}: a {read.family} model has heads of hidden_size / num_attention_heads"
            )
        if self.kv_heads is None:
            kv_heads = read.whole("num_key_value_heads", num_heads, null=num_heads)
        else:
            kv_heads = read.whole("num_key_value_heads", self.kv_heads)
        section = {"num_kv_heads": kv_heads, "head_dim": width, "attention": {"kind": self.kind}}
        return section, width or read.whole("hidden_size") // num_heads

    def write(self, section: ModelSection) -> dict[str, Any]:
        width = {"head_dim": section.resolved_head_dim} if self.field else {}
        return {"num_key_value_heads": section.num_kv_heads, **width}


@dataclass(frozen=True)
class LatentHeads:
    """Describes heads of multi-head latent attention, which have a part without rotation and a rotated part."""

    kind: ClassVar[str] = "latent"
    kv_heads: int | None = 128
    rope_share: float | None = None
    head_dim: int | None = None  # default of head_dim; None means qk_rope_head_dim
    plain_queries: bool = True  # True if q_lora_rank may be null, which means that queries have no latent
    scaled: bool = False

    def read(self, read: Fields, num_heads: int) -> tuple[dict[str, Any], int]:
        plain, rotated = read.whole("qk_nope_head_dim"), read.whole("qk_rope_head_dim")
        kv_heads = read.whole("num_key_value_heads", self.kv_heads or num_heads, null=num_heads)
        if kv_heads != num_heads:
            raise ConfigError(
                f"config.json: num_key_value_heads={kv_heads}: latent attention makes keys and values for all "
                f"num_attention_heads={num_heads} heads; set both to the same number"
            )
        if (width := read.whole("head_dim", self.head_dim or rotated)) != rotated:
            raise ConfigError(f"config.json: head_dim={width} is not supported: it must be qk_rope_head_dim={rotated}")
        read.must_be("qk_head_dim", (plain + rotated,), "it must be qk_nope_head_dim + qk_rope_head_dim")
        attention = {
            "kind": "latent",
            "q_rank": read.whole("q_lora_rank", **({"null": None} if self.plain_queries else {})),
            "kv_rank": read.whole("kv_lora_rank"),
            "value_dim": read.whole("v_head_dim"),
            "scaled": self.scaled,
        }
        section = {"num_kv_heads": num_heads, "head_dim": plain + rotated, "rope_dim": rotated, "attention": attention}
        return section, rotated

    def write(self, section: ModelSection) -> dict[str, Any]:
        attention, rotated = section.attention, section.rope_dim or 0
        assert isinstance(attention, LatentAttentionSection)
        width = {} if self.head_dim is None else {"head_dim": rotated}
        return {
            **width,
            "num_key_value_heads": section.num_heads,
            "qk_nope_head_dim": section.resolved_head_dim - rotated,
            "qk_rope_head_dim": rotated,
            "q_lora_rank": attention.q_rank,
            "kv_lora_rank": attention.kv_rank,
            "v_head_dim": attention.value_dim,
        }


@dataclass(frozen=True)
class AllLayers:
    """The rule of families in which every layer has experts. The classes of the other rules inherit from it."""

    names: Sequence[str] = ()  # names of the fields; empty if all layers of the family have experts

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        """Returns the indices of the layers with experts."""
        return list(range(num_layers))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class DenseFirst(AllLayers):
    """The first layers are dense, and all later layers have experts."""

    names: Sequence[str] = ("first_k_dense_replace",)
    first: int = 1  # default of the field with the number of dense layers

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        return list(range(read.count(self.names[0], self.first), num_layers))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {self.names[0]: section.moe_layers[0]}


@dataclass(frozen=True)
class Listed(AllLayers):
    """Every n-th layer has experts, except the layers in the list `mlp_only_layers` (Qwen)."""

    names: Sequence[str] = ("mlp_only_layers", "decoder_sparse_step")

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        step, only = read.whole("decoder_sparse_step", 1), read.many("mlp_only_layers", [], null=[])
        return [layer for layer in range(num_layers) if layer not in only and (layer + 1) % step == 0]

    def write(self, section: ModelSection) -> dict[str, Any]:
        dense = [layer for layer in range(section.num_layers) if layer not in section.moe_layers]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


@dataclass(frozen=True)
class Between(AllLayers):
    """Every n-th layer of the model has experts if it lies between two given layers (Ernie 4.5)."""

    names: Sequence[str] = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        first, step = read.count("moe_layer_start_index", 1), read.whole("moe_layer_interval", 1)
        last = read.count("moe_layer_end_index", -1, least=-1)
        last = num_layers - 1 if last == -1 else last
        return [layer for layer in range(num_layers) if first <= layer <= last and (layer + 1) % step == 0]

    def write(self, section: ModelSection) -> dict[str, Any]:
        layers = section.moe_layers
        values = (layers[0], layers[-1], section.moe.every if len(layers) > 1 else 1)
        return dict(zip(self.names, values, strict=True))


@dataclass(frozen=True)
class Alternate(AllLayers):
    """Each layer of LongCat-Flash is two layers of moe_dist, and the first of the two has experts.

    Each field of the family has two possible names. If config.json has both, transformers may use either value, so the two
    values must be equal.
    """

    names: Sequence[str] = ("num_layers",)

    def sparse(self, read: Fields, num_layers: int) -> list[int]:
        read.must_be("num_hidden_layers", (num_layers,), "it must be 2 num_layers")
        for alias, name in {
            "num_local_experts": "n_routed_experts",
            "num_experts_per_tok": "moe_topk",
            "intermediate_size": "ffn_hidden_size",
            "moe_intermediate_size": "expert_ffn_hidden_size",
        }.items():
            read.must_be(alias, (read.whole(name),), f"it must be {name}")
        return list(range(0, num_layers, 2))

    def write(self, section: ModelSection) -> dict[str, Any]:
        return {"num_layers": section.num_layers // 2}


@dataclass(frozen=True)
class SharedExpert:
    """Describes the shared expert of each MoE layer."""

    field: str  # name of the field with the shared expert's width
    module: str  # name of the shared expert's module
    gated: bool = False  # a sigmoid gate multiplies the shared expert's output
    counted: bool = False  # if True, the field is a multiple of a routed expert's width
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
