"""Reads and writes the fields of config.json that say which layers have experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import ModelSection
from moe_dist.hf.fields import Fields


@dataclass(frozen=True)
class AllLayers:
    """Every layer has experts. This is also the base class of the other rules in this file."""

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
