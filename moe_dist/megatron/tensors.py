"""Maps each parameter of Megatron's GPTModel to the logical tensors, or parts of them, that it contains.

Megatron has one matrix for queries, keys and values, and one for gate and up. It numbers the layers of each pipeline stage
from 0, and splits matrices over tensor-parallel ranks. Initial weights and checkpoints use logical names
(`moe_dist.placement.parameter_names`), which do not depend on Megatron's joins, numbers and splits.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.model.layers import ModelArgs
from moe_dist.placement.parameter_names import logical_name
from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class Place:
    """The sizes of the model, which determine its pieces, and this rank's position in the EP and TP groups."""

    args: ModelArgs
    placement: ExpertPlacement
    ep_rank: int
    tp_rank: int
    tp_size: int


@dataclass(frozen=True)
class Piece:
    """A part of a local tensor that corresponds to one logical tensor.

    Attributes:
        view: A view of the part, which shares the local tensor's memory. It has the same elements in the same order as a
            tensor of shape `shape`, but may have more dimensions.
        shape: Shape of this rank's part of the logical tensor.
        dim: Dimension in which the logical tensor is split over tensor-parallel ranks; None if the rank has all of it.
        expert: True for a tensor of one expert, which is on all ranks with the same experts.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]
    dim: int | None = None
    expert: bool = False

    def whole_shape(self, tp_size: int) -> tuple[int, ...]:
        """Returns the shape of the whole logical tensor."""
        return tuple(size * tp_size if at == self.dim else size for at, size in enumerate(self.shape))

    @torch.no_grad()
    def set(self, local: Tensor) -> None:
        """Copies this rank's part of the logical tensor into the local tensor."""
        self.view.copy_(local.reshape(self.view.shape))

    def get(self) -> Tensor:
        """Returns a copy of this rank's part of the logical tensor."""
        return self.view.detach().clone().reshape(self.shape)


# Dimension in which tensor-parallel ranks split each parameter of latent attention; None: every rank has all of it.
LATENT_DIMS: Mapping[str, int | None] = {
    **{"q.weight": 0, "q_up.weight": 0, "kv_up.weight": 0, "o.weight": 1},
    **{"q_down.weight": None, "q_norm.weight": None, "kv_down.weight": None, "kv_norm.weight": None},
}
# Maps each Megatron parameter that is one logical tensor, by its name in a layer, to (logical name, split dimension).
_SINGLE: Mapping[str, tuple[str, int | None]] = {
    "self_attention.linear_proj.weight": ("attention.o.weight", 1),
    "self_attention.linear_proj.bias": ("attention.o.bias", None),
    **{f"self_attention.own.{name}": (f"attention.{name}", dim) for name, dim in LATENT_DIMS.items()},
    "self_attention.core_attention.sinks": ("attention.sinks", 0),
    "input_layernorm.weight": ("attention.norm.weight", None),
    "mlp.linear_fc2.weight": ("ffn.down.weight", 1),
    "mlp.moe.shared.linear_fc2.weight": ("moe.shared.down.weight", 1),
    "mlp.moe.shared.gate_weight": ("moe.shared.scale.weight", None),
}
_GATE_AND_UP = {"mlp.linear_fc1.weight": "ffn", "mlp.moe.shared.linear_fc1.weight": "moe.shared"}
_OUTSIDE: Mapping[str, tuple[str, int | None]] = {
    "embedding.word_embeddings.weight": ("embedding.weight", 0),
    "decoder.final_layernorm.weight": ("norm.weight", None),
    "output_layer.weight": ("output.weight", 0),
}
_QK_NORMS = {f"self_attention.{each}_layernorm.weight": f"attention.{each}_norm.weight" for each in "qk"}
_NORM_OF_FFN = "pre_mlp_layernorm.weight"
_ROUTER, _EXPERTS = "mlp.moe.router.", "mlp.moe.experts."


def pieces(name: str, tensor: Tensor, place: Place, *, first_layer: int) -> Iterator[Piece]:
    """Yields the pieces of a GPTModel's parameter `name`. `tensor` has the parameter's values or one of its moments.
    `first_layer` is the index of the first layer in this part of the model."""
    if name in _OUTSIDE:
        logical, dim = _OUTSIDE[name]
        if place.args.tie_embeddings and logical == "output.weight":
            logical = "embedding.weight"  # the last of several pipeline stages has a copy
        yield Piece(logical, tensor, tuple(tensor.shape), dim)
        return
    number, _, inside = name.removeprefix("decoder.layers.").partition(".")
    layer = first_layer + int(number)
    for piece in _in_layer(inside, tensor, place, experts=layer in place.args.moe_layers):
        yield Piece(f"layers.{layer}.{piece.name}", piece.view, piece.shape, piece.dim, piece.expert)


def _in_layer(name: str, tensor: Tensor, place: Place, *, experts: bool) -> Iterator[Piece]:
    if name in _SINGLE:
        logical, dim = _SINGLE[name]
        yield Piece(logical, tensor, tuple(tensor.shape), dim)
    elif name == _NORM_OF_FFN:
        yield Piece("moe.norm.weight" if experts else "ffn.norm.weight", tensor, tuple(tensor.shape))
    elif name in _GATE_AND_UP:
        for part, view in zip(("gate", "up"), tensor.chunk(2), strict=True):
            yield Piece(f"{_GATE_AND_UP[name]}.{part}.weight", view, tuple(view.shape), 0)
    elif name.startswith("self_attention.linear_qkv."):
        yield from _attention(name.rpartition(".")[2], tensor, place)
    elif name in _QK_NORMS:
        yield Piece(_QK_NORMS[name], tensor, tuple(tensor.shape), 0 if place.args.qk_norm == "full" else None)
    elif name.startswith(_ROUTER):
        yield Piece(f"moe.router.{logical_name(name.removeprefix(_ROUTER))}", tensor, tuple(tensor.shape))
    elif name.startswith(_EXPERTS):
        group_name, _, leaf = logical_name(name.removeprefix(_EXPERTS)).rpartition(".")
        group = next(group for group in place.placement.groups if group.name == group_name)
        for slot, expert in enumerate(place.placement.local_experts(place.ep_rank, group)):
            stem = f"moe.experts.{group_name}.{expert - group.first_expert}.{leaf}"
            yield Piece(stem, tensor[slot], tuple(tensor.shape[1:]), expert=True)
    else:
        raise AssertionError(f"{name}: no logical tensor is known for this parameter of Megatron")


def _attention(leaf: str, joined: Tensor, place: Place) -> Iterator[Piece]:
    """Splits Megatron's joined matrix or bias. For each key-value head, it has the rows of the queries, then key, then
    value."""
    args, width = place.args, joined.shape[1:]
    queries = args.num_heads // args.num_kv_heads  # of each key-value head
    parts = joined.view(-1, queries + 2, args.head_dim, *width).split([queries, 1, 1], dim=1)
    for name, view in zip("qkv", parts, strict=True):
        yield Piece(f"attention.{name}.{leaf}", view, (view.shape[:3].numel(), *width), 0)
