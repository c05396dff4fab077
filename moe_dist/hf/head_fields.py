"""Reads and writes the fields of config.json that describe the kind and widths of attention heads."""

from dataclasses import dataclass
from typing import Any, ClassVar

from moe_dist.config.attention.kinds import LatentAttentionSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.hf.fields import Fields


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
        """Returns values of the section `model`, and how many values of a head rotate if partial_rotary_factor is 1."""
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
