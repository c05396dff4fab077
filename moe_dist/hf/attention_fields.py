"""Reads and writes the fields of config.json about rotary positions and sliding windows, as transformers' configuration
classes (version 5) understand them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.rope.base import RopeScalingSection
from moe_dist.config.rope.kinds import DynamicRopeSection, LinearRopeSection, Llama3RopeSection, YarnRopeSection
from moe_dist.errors import ConfigError
from moe_dist.hf.fields import Fields

# Maps `rope_type` to the section. transformers' type `default` corresponds to a model without `rope_scaling`.
ROPE_SCALINGS: Mapping[str, type[RopeScalingSection]] = {
    section.model_fields["kind"].default: section
    for section in (LinearRopeSection, DynamicRopeSection, YarnRopeSection, Llama3RopeSection)
}
_LENGTH = "original_max_position_embeddings"

# The rule by which a family's config.json says which layers have a sliding window. none: no layer has one. always: all
# layers have one if `sliding_window` has a value. flag: all layers have one if `use_sliding_window` is true. layers: the
# layers in `layer_types` have one. alternate: like `layers`, but without a flag; if `layer_types` is absent, every second
# layer has one, beginning with the first.
Windows = Literal["none", "always", "flag", "layers", "alternate"]
DEFAULT_WINDOW, DEFAULT_WINDOW_LAYERS = 4096, 28  # defaults of Qwen2-MoE and Qwen3-MoE
DEFAULT_ALTERNATE = 128  # default window of gpt-oss
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_rope(
    read: Fields,
    default_base: float,
    default_share: float | None,
    head_dim: int,
    max_seq_len: int,
    default: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the values of `model.rope_base`, `model.rope_dim` and `model.rope_scaling`. `default_share` replaces an
    absent partial_rotary_factor, and is None for a family that rotates whole heads. `default` replaces absent
    rope_parameters.

    If both fields exist, transformers reads `rope_scaling` (version 4) instead of `rope_parameters` (version 5). A key
    inside one of these two fields overrides the outer field of the same name, except for the original length.
    """
    scaling, parameters = read.mapping("rope_scaling"), read.mapping("rope_parameters")
    if default is not None and read.get("rope_parameters", None, null=None) is None:
        parameters = dict(default)
    name = "rope_scaling" if scaling else "rope_parameters"
    values = dict(scaling or parameters)
    base = {f"{name}.rope_theta": values.pop("rope_theta", read.get("rope_theta", default_base, null=None))}
    old_kind = values.pop("type", "default")
    kind = values.pop("rope_type", old_kind)
    whole = 1.0 if default_share is None else default_share
    share = values.pop("partial_rotary_factor", read.get("partial_rotary_factor", whole, null=1.0))
    section: dict[str, Any] = {
        "rope_base": Fields(base, read.family).positive(f"{name}.rope_theta"),
        "rope_dim": _rope_dim(name, share, head_dim, partial=default_share is not None),
    }
    if kind == "default" and not values:
        return section
    if kind == "default":
        raise ConfigError(f"config.json: {name}={values!r}: the rope_type default has no such keys; remove them")
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ConfigError(f"config.json: {name}: rope_type={kind!r} is not supported; known are default, {known}")
    scaled = ROPE_SCALINGS[kind]
    if scaled.length_is_longest:
        if _LENGTH in values:
            raise ConfigError(f"config.json: {name}.{_LENGTH}: {kind} takes max_position_embeddings instead; remove it")
        values[_LENGTH] = max_seq_len
    elif _LENGTH in scaled.model_fields:
        values[_LENGTH] = read.get(_LENGTH, values.get(_LENGTH, max_seq_len))  # the outer length overrides the inner one
    given = {key: value for key, value in values.items() if value is not None or key not in scaled.null_is_default}
    return section | {"rope_scaling": {"kind": kind, **given}}


def _rope_dim(name: str, share: Any, head_dim: int, *, partial: bool) -> int | None:
    """Returns the number of values of a head that are rotated; None if all are rotated."""
    if share == 1:
        return None
    rope_dim = int(head_dim * share) if type(share) in (int, float) and 0 < share < 1 else 0
    if not partial or rope_dim < 2 or rope_dim % 2:
        rule = "it must rotate an even number of a head's values" if partial else "rotary positions turn whole heads"
        raise ConfigError(f"config.json: {name}: partial_rotary_factor={share!r} is not supported: {rule}")
    return rope_dim


def max_positions(section: ModelSection) -> int:
    """Returns `max_position_embeddings`."""
    scaling = section.rope_scaling
    return section.max_seq_len if scaling is None or not scaling.length_is_longest else getattr(scaling, _LENGTH)


def write_rope(section: ModelSection, *, partial: bool) -> dict[str, Any]:
    """Returns the fields for rotary positions, for transformers 4 and 5. `partial` is True if the family can rotate a part
    of a head."""
    base = {"rope_theta": section.rope_base, **({"partial_rotary_factor": _share(section)} if partial else {})}
    if section.rope_scaling is None:
        return {**base, "rope_parameters": {"rope_type": "default", **base}}
    scaling = section.rope_scaling
    left_out = {"kind"} | ({_LENGTH} if scaling.length_is_longest else set())
    values = {"rope_type": scaling.kind, **scaling.model_dump(exclude=left_out, exclude_none=True)}
    return {**base, "rope_scaling": values, "rope_parameters": {**values, **base}}


def _share(section: ModelSection) -> float:
    share = (section.rope_dim or section.resolved_head_dim) / section.resolved_head_dim
    rounded_down = int(section.resolved_head_dim * share) < (section.rope_dim or 0)
    return math.nextafter(share, 1.0) if rounded_down else share


def read_windows(read: Fields, windows: Windows, num_layers: int) -> dict[str, Any]:
    """Returns the values of `model.sliding_window` and `model.sliding_layers`."""
    window, types = None, [_FULL] * num_layers
    if windows == "none":
        read.must_be("sliding_window", (None,), "no layer of this family has a sliding window")
    elif windows == "always":
        window = read.whole("sliding_window", None, null=None)
    elif windows == "alternate":
        window = read.whole("sliding_window", DEFAULT_ALTERNATE)
    elif read.flag("use_sliding_window", False):
        default = {"null": None} if windows == "flag" else {}  # Qwen2-MoE cannot be built with null
        window = read.whole("sliding_window", DEFAULT_WINDOW, **default)
    else:
        read.get("sliding_window", None, null=None)  # only marks the field as read: without the flag it has no effect
    if window is not None:
        types = [_SLIDING] * num_layers
        if windows == "layers":
            last = read.count("max_window_layers", DEFAULT_WINDOW_LAYERS)
            types = [_SLIDING if layer % 2 == 0 and layer < last else _FULL for layer in range(num_layers)]
        elif windows == "alternate":
            types = [(_SLIDING, _FULL)[layer % 2] for layer in range(num_layers)]
    elif windows == "layers":
        read.get("max_window_layers", None)
    said = read.many("layer_types", null=None) or None
    if said is not None and said != types:
        known = len(said) == num_layers and all(each in (_FULL, _SLIDING) for each in said)
        if windows == "alternate" and not known:
            raise ConfigError(
                f"config.json: layer_types={said!r:.80} must name {_FULL} or {_SLIDING} for each of num_hidden_layers="
                f"{num_layers} layers"
            )
        if windows not in ("layers", "alternate") or window is None or not known:
            raise ConfigError(
                f"config.json: layer_types={said!r:.80}: by num_hidden_layers and sliding_window the layers must be "
                f"{types!r:.80}; correct one of these fields"
            )
        types = said
    return {"sliding_window": window, **sliding_layers(types)} if _SLIDING in types else {}


def sliding_layers(types: Sequence[str]) -> dict[str, tuple[int, ...] | None]:
    """Converts the value of `layer_types` to the value of `model.sliding_layers`."""
    sliding = tuple(layer for layer, kind in enumerate(types) if kind == _SLIDING)
    return {"sliding_layers": sliding if 0 < len(sliding) < len(types) else None}


def layer_types(section: ModelSection) -> list[str]:
    return [_FULL if window is None else _SLIDING for window in section.windows]


def write_windows(section: ModelSection, windows: Windows) -> dict[str, Any]:
    """Returns the fields of config.json that describe sliding windows."""
    if windows == "none":
        return {}
    fields: dict[str, Any] = {"sliding_window": section.sliding_window}
    if windows in ("flag", "layers"):
        fields["use_sliding_window"] = section.sliding_window is not None
    if windows in ("layers", "alternate"):
        fields["sliding_window"] = section.sliding_window or (DEFAULT_WINDOW if windows == "layers" else DEFAULT_ALTERNATE)
        fields["layer_types"] = layer_types(section)
    return fields
