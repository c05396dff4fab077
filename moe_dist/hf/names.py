"""Maps each logical tensor of moe_dist to its place in a Hugging Face family's tensors, for both layouts of the family.

By default transformers writes one tensor for each matrix of each expert. With `save_original_format=False` it writes joint
tensors for the n experts of a layer (hidden width D, FFN width F): gate_up_proj [n, 2 F, D], whose first F rows are the
gate, and down_proj [n, D, F]. In both layouts a logical tensor is contiguous, so its place is a tensor's name and the index
of the first element. gpt-oss has gate_up_proj [n, D, 2 F], where columns of gate and up alternate, and down_proj [n, F, D].
Places in these tensors also need strides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe_dist.config.model_schema import GroupSection, ModelSection
from moe_dist.hf.family import Layout, ModelFamily

Item = TypeVar("Item")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # names in all families


def shards(items: Iterable[tuple[Item, int]], most: int) -> Iterator[list[Item]]:
    """Divides pairs (item, number of bytes), in order, into shards of at most `most` bytes. A larger item becomes a
    separate shard."""
    shard: list[Item] = []
    size = 0
    for item, nbytes in items:
        if shard and size + nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += nbytes
    yield shard


@dataclass(frozen=True)
class TensorPlace:
    """The place of a logical tensor: the elements of a family's tensor that contain its values."""

    name: str
    shape: tuple[int, ...]  # shape of the family's whole tensor
    begin: int = 0  # index of the logical tensor's first element in the family's tensor, in row-major order
    strides: tuple[int, ...] = ()  # distances of the elements along each dim; empty if they are contiguous


@dataclass(frozen=True)
class Slot:
    """A logical tensor of moe_dist, and its possible places in a family's tensors."""

    name: str
    shape: tuple[int, ...]
    places: tuple[TensorPlace, ...]  # an export uses the first place; empty if the family has no such tensor
    next_rows: tuple[TensorPlace, ...] = ()  # places of the second and later rows if each row is a separate tensor

    def pieces(self) -> list[tuple[TensorPlace, slice]]:
        """Returns the places to which an export writes, and for each place the rows of the logical tensor to write."""
        if not self.next_rows:
            return [(place, slice(None)) for place in self.places[:1]]
        return [(place, slice(row, row + 1)) for row, place in enumerate((self.places[0], *self.next_rows))]


def slots(section: ModelSection, family: ModelFamily) -> list[Slot]:
    """Lists every parameter of a model with its places in the family's tensors. In plain families the router rows of null
    experts have no place, so they are left out."""
    dim = section.hidden_dim
    found = [_whole("embedding.weight", EMBEDDING, section.vocab_size, dim)]
    for layer in range(section.num_layers):
        ours, (theirs, part) = f"layers.{layer}", family.place(layer)
        found.append(_whole(f"{ours}.attention.norm.weight", f"{theirs}.input_layernorm{part}.weight", dim))
        found += _attention(section, f"{ours}.attention", f"{theirs}.self_attn{part}")
        ffn_norm = f"{theirs}.post_attention_layernorm{part}.weight"
        if layer in section.moe_layers:
            found.append(_whole(f"{ours}.moe.norm.weight", ffn_norm, dim))
            found += _LAYOUTS[family.layout](section, family, ours, theirs)
            found += _shared_expert(section, family, f"{ours}.moe.shared", theirs)
            if layer in section.depth_layers:
                found += _depth_router(section, f"{ours}.depths", f"{theirs}.depth_router")
        else:
            found.append(_whole(f"{ours}.ffn.norm.weight", ffn_norm, dim))
            found += _swiglu(f"{ours}.ffn", f"{theirs}.{family.dense_module}", dim, section.dense_ffn_dim or 0)
    found.append(_whole("norm.weight", "model.norm.weight", dim))
    if not section.tie_embeddings:
        found.append(_whole("output.weight", HEAD, section.vocab_size, dim))
    return found


def idle_names(section: ModelSection, family: ModelFamily) -> Iterator[str]:
    """Yields the names of tensors that no computation uses: gate and up of LongCat-Flash's identity experts, which
    transformers wrote and required before version 5.25."""
    for layer in section.moe_layers if family.layout == "identity" else ():
        (group,) = section.moe.groups.values()
        for expert in range(group.num_experts, group.num_experts + group.num_identity):
            for part in ("gate", "up"):
                yield f"{family.place(layer)[0]}.{family.expert.format(expert=expert, part=part, old='')}"


def router_name(section: ModelSection, layer: int, kind: str) -> str:
    """Returns the logical name of a layer's router rows for the experts of a `kind`: `true` (not null) or `null`."""
    (name,) = section.moe.groups
    return f"layers.{layer}.moe.router.{name}.{kind}"


def _whole(ours: str, theirs: str, *shape: int) -> Slot:
    return Slot(ours, shape, (TensorPlace(theirs, shape),))


def _attention(section: ModelSection, ours: str, theirs: str) -> Iterator[Slot]:
    for part, (columns, rows) in section.attention_widths.items():
        projection = f"{theirs}.{projection_name(part)}"
        yield _whole(f"{ours}.{part}.weight", f"{projection}.weight", rows, columns)
        if section.attention_bias != "none" and part in section.attention_bias:
            yield _whole(f"{ours}.{part}.bias", f"{projection}.bias", rows)
        if section.qk_norm != "none" and part in "qk":
            size = section.resolved_head_dim if section.qk_norm == "head" else rows
            yield _whole(f"{ours}.{part}_norm.weight", f"{theirs}.{part}_norm.weight", size)
        if part.endswith("_up"):  # a projection of latent attention
            latent = part.removesuffix("_up")
            yield _whole(f"{ours}.{latent}_norm.weight", f"{theirs}.{latent}_a_layernorm.weight", columns)
    if section.attention.kind == "sinks":
        yield _whole(f"{ours}.sinks", f"{theirs}.sinks", section.num_heads)


def projection_name(part: str) -> str:
    """Returns the name that an attention projection has in the families."""
    return _LATENT.get(part, f"{part}_proj")


_LATENT = {"q_down": "q_a_proj", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa", "kv_up": "kv_b_proj"}


def _swiglu(ours: str, theirs: str, dim: int, ffn_dim: int) -> Iterator[Slot]:
    for part, shape in _matrices(dim, ffn_dim).items():
        yield _whole(f"{ours}.{part}.weight", f"{theirs}.{part}_proj.weight", *shape)


def _mixture(section: ModelSection, family: ModelFamily, ours: str, theirs: str) -> Iterator[Slot]:
    """Yields the router and the experts of a model's only group. Zero-computation experts come last in both."""
    ((name, group),) = section.moe.groups.items()
    router, dim = f"{ours}.moe.router.{name}", section.hidden_dim
    gates = [f"{theirs}.{gate}" for gate in family.gates] if family.experts else []
    nulls = group.num_null if family.layout == "zero_computation" else 0
    yield from _router_rows(section, group, router, gates, nulls)
    if section.moe.router.has_selection_bias:
        columns = group.num_experts + group.num_identity
        shape = (*[1] * (family.selection_bias_dims - 1), columns)
        yield Slot(f"{router}.bias", (columns,), tuple(TensorPlace(f"{theirs}.{b}", shape) for b in family.selection_bias))
    yield from _experts(section, group, family, f"{ours}.moe.experts.{name}", theirs)
    first, count = group.num_experts + group.num_null + group.num_identity, group.num_constant
    for ours_part, theirs_part, box in (("vector", "constant", (dim,)), ("gate", "wg.weight", (2, dim))) if count else ():
        places = [TensorPlace(f"{theirs}.mlp.experts.{first + each}.{theirs_part}", box) for each in range(count)]
        yield Slot(f"{ours}.moe.free.{name}.{ours_part}", (count, *box), (places[0],), tuple(places[1:]))


def _shared_expert(section: ModelSection, family: ModelFamily, ours: str, theirs: str) -> Iterator[Slot]:
    if family.shared and section.moe.shared_ffn_dim:
        yield from _swiglu(ours, f"{theirs}.{family.shared.module}", section.hidden_dim, section.moe.shared_ffn_dim)
    if family.shared and section.moe.shared_gate:
        yield _whole(f"{ours}.scale.weight", f"{theirs}.{family.shared.module}_gate.weight", 1, section.hidden_dim)


def _experts(section: ModelSection, group: GroupSection, family: ModelFamily, ours: str, theirs: str) -> Iterator[Slot]:
    for expert in range(group.num_experts):
        for part, shape in _matrices(section.hidden_dim, group.ffn_dim).items():
            stacked = [group.num_experts]
            if family.layout == "identity" and part != "down":  # stacks of transformers before 5.25, see `idle_names`
                stacked.append(group.num_experts + group.num_identity)
            places = tuple(_expert_places(family, theirs, expert, part, stacked, shape))
            yield Slot(f"{ours}.{expert}.{part}", shape, places)


def _router_rows(
    section: ModelSection, group: GroupSection, ours: str, theirs: Sequence[str], nulls: int
) -> Iterator[Slot]:
    """Yields the router rows of the true, null (`nulls` rows), identity and constant experts, in the order that they have
    in a tensor. `theirs` are the possible names of this tensor in the family."""
    kinds = {"true": group.num_experts, "null": nulls, "identity": group.num_identity, "constant": group.num_constant}
    dim, begin, whole = section.hidden_dim, 0, (sum(kinds.values()), section.hidden_dim)
    for kind, count in kinds.items():
        if count:
            yield Slot(f"{ours}.{kind}", (count, dim), tuple(TensorPlace(name, whole, begin * dim) for name in theirs))
            begin += count


def _interleaved(section: ModelSection, family: ModelFamily, ours: str, theirs: str) -> Iterator[Slot]:
    """Yields the tensors of gpt-oss: biases and transposed expert matrices, in which gate and up alternate."""
    ((name, group),) = section.moe.groups.items()
    dim, num, ffn = section.hidden_dim, group.num_experts, group.ffn_dim
    (gate,), router = family.gates, f"{ours}.moe.router.{name}"
    yield _whole(f"{router}.true", f"{theirs}.{gate}", num, dim)
    yield _whole(f"{router}.offset", f"{theirs}.{gate.removesuffix('weight')}bias", num)
    stem, both = f"{theirs}.mlp.experts", (num, dim, 2 * ffn)
    for expert in range(num):
        prefix = f"{ours}.moe.experts.{name}.{expert}"
        for part, at in (("gate", 0), ("up", 1)):
            place = TensorPlace(f"{stem}.gate_up_proj", both, expert * 2 * dim * ffn + at, (2, 2 * ffn))
            yield Slot(f"{prefix}.{part}", (ffn, dim), (place,))
            place = TensorPlace(f"{stem}.gate_up_proj_bias", (num, 2 * ffn), expert * 2 * ffn + at, (2,))
            yield Slot(f"{prefix}.{part}_bias", (ffn,), (place,))
        place = TensorPlace(f"{stem}.down_proj", (num, ffn, dim), expert * ffn * dim, (1, dim))
        yield Slot(f"{prefix}.down", (dim, ffn), (place,))
        yield Slot(f"{prefix}.down_bias", (dim,), (TensorPlace(f"{stem}.down_proj_bias", (num, dim), expert * dim),))


def _served(section: ModelSection, family: ModelFamily, ours: str, theirs: str) -> Iterator[Slot]:
    """Yields the tensors that `modeling_moe_dist.py` expects, for every group."""
    dim, router = section.hidden_dim, section.moe.router
    for index, (name, group) in enumerate(section.moe.groups.items()):
        to = f"{theirs}.mlp.groups.{index}"
        nulls = min(group.num_null, 1) if router.single_null_row else group.num_null
        yield from _router_rows(section, group, f"{ours}.moe.router.{name}", [f"{to}.router.weight"], nulls)
        if router.has_selection_bias:
            columns = group.num_experts + group.num_null + group.num_zero_computation
            yield _whole(f"{ours}.moe.router.{name}.bias", f"{to}.router.e_score_correction_bias", columns)
        if router.has_logit_bias:
            yield _whole(f"{ours}.moe.router.{name}.offset", f"{to}.router.bias", group.num_experts)
        for tensor, shape in router.further_tensors(group, dim).items():
            yield _whole(f"{ours}.moe.router.{name}.{tensor}", f"{to}.router.{tensor.replace('.', '_')}", *shape)
        yield from _experts(section, group, family, f"{ours}.moe.experts.{name}", to)
        for expert in range(group.num_experts) if section.moe.experts.num_biases(dim, group.ffn_dim) else ():
            for part, (rows, _) in _matrices(dim, group.ffn_dim).items():
                place = f"{to}.experts.{expert}.{part}_proj.bias"
                yield _whole(f"{ours}.moe.experts.{name}.{expert}.{part}_bias", place, rows)
        if group.num_constant:
            yield _whole(f"{ours}.moe.free.{name}.vector", f"{to}.constant_vectors", group.num_constant, dim)
            yield _whole(f"{ours}.moe.free.{name}.gate", f"{to}.constant_gates", group.num_constant, 2, dim)


def _depth_router(section: ModelSection, ours: str, theirs: str) -> Iterator[Slot]:
    dim, inner = section.hidden_dim, max(1, section.hidden_dim // 2)
    assert section.mixture_of_depths is not None
    yield _whole(f"{ours}.router", f"{theirs}.weight", 1, dim)
    if section.mixture_of_depths.causal == "auxiliary":
        yield _whole(f"{ours}.auxiliary.inner", f"{theirs}.inner", inner, dim)
        yield _whole(f"{ours}.auxiliary.outer", f"{theirs}.outer", 1, inner)
    else:
        yield from (_whole(f"{ours}.{name}", f"{theirs}.{name}", 1) for name in ("threshold", "mean", "steps"))


_LAYOUTS: Mapping[Layout, Callable[[ModelSection, ModelFamily, str, str], Iterator[Slot]]] = {
    **dict.fromkeys(("plain", "identity", "zero_computation"), _mixture),
    "interleaved": _interleaved,
    "moe_dist": _served,
}


def _expert_places(
    family: ModelFamily, theirs: str, expert: int, part: str, stacked: Sequence[int], shape: tuple[int, int]
) -> Iterator[TensorPlace]:
    old = {"gate": "w1", "up": "w3", "down": "w2"}[part]
    yield TensorPlace(f"{theirs}.{family.expert.format(expert=expert, part=part, old=old)}", shape)
    if not family.experts:  # empty for the form `moe_dist`, and for dense FFNs, which an import copies
        return
    rows, columns = shape
    for num in stacked:
        if part == "down":
            yield TensorPlace(f"{theirs}.mlp.experts.down_proj", (num, rows, columns), expert * rows * columns)
        else:
            begin = (2 * expert + (part == "up")) * rows * columns
            yield TensorPlace(f"{theirs}.mlp.experts.gate_up_proj", (num, 2 * rows, columns), begin)


def _matrices(dim: int, ffn_dim: int) -> dict[str, tuple[int, int]]:
    return {"gate": (ffn_dim, dim), "up": (ffn_dim, dim), "down": (dim, ffn_dim)}
