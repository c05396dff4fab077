"""Reads a family's configuration, and derives the section `model` from it.

The sizes of the section are read from the family's model on the meta device, through transformers' own interface for
experts and routers. So this file contains no names of families.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from moe_dist.config.base.section import Section, did_you_mean
from moe_dist.config.model_schema import GroupSection, ModelSection, MoESection
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.formats.hub_folder import offline
from moe_dist.hf.code_checks import code_keys, entries, refuse_code
from moe_dist.hf.host.banks import GUIDE, Bank, banks_of, dense_ffns
from moe_dist.hf.served_fields import DENSE
from moe_dist.hf.source import CONFIG_FILE, read_configuration
from moe_dist.moe.routers.copy_init import uneven_twins

LEAST = "5.24"  # oldest version of transformers that this engine supports
GIVEN = ("folder", "family", "fields")
CHOSEN = ("modalities", "router", "balance", "num_null", "lora")  # keys that the family does not determine
MOST_PARTS = 4096  # largest number of layers, of experts and so on; transformers takes milliseconds per part
# Names of fields whose values may be large, because transformers does not loop over them. A loop to MOST_NUMBER takes 1 s.
_LARGE = re.compile(r"theta|position|len|window|size|seed|base|context|token|pixel|id$")
MOST_NUMBER = 1 << 18
# Names of fields that give a number of parts.
_NUM_PARTS = re.compile(r"(layers?|blocks?|depths?|stages?|experts|heads|codebooks|quantizers|labels)(_per_\w+)?$")
_NOTES = ("transformers_version", "torch_dtype", "dtype")


def complete(model: dict[str, Any]) -> dict[str, Any]:
    """Completes a section `model` that names only a folder, or a family and its fields.

    Raises:
        ConfigError: the folder or family cannot be used. The message gives the reason.
    """
    folder, family, fields = (model.get(key) for key in GIVEN)
    if not all(isinstance(each, str | None) for each in (folder, family)) or not isinstance(fields, dict | None):
        return model  # the schema's check reports the wrong type
    if folder is not None and (family is None or (Path(folder) / "config.json").is_file()):
        stored = read_fields(Path(folder))
        if stored["model_type"] == DENSE:
            model, stored = _of_export(model, stored)
        of_folder = stored.pop("model_type")
        wrong = list(_other_than(fields or {}, stored, "fields"))
        wrong += [] if family in (None, of_folder) else ["family"]
        if wrong:
            raise ConfigError(
                f"model.{wrong[0]}: is not that of {folder}/config.json; remove it, or model.folder", see=GUIDE
            )
        family, fields = of_folder, stored
    elif family is None:
        raise ConfigError(
            "model: engine.kind=transformers needs model.folder, a Hugging Face folder, or model.family and "
            "model.fields, such as family=qwen3_moe; set one of them",
            see=GUIDE,
        )
    elif folder is None:
        _check_names(family, fields or {})
    found, plain_router = _sizes(family, json.dumps(fields or {}, sort_keys=True))
    given, chosen = {key: value for key, value in model.items() if key not in GIVEN}, CHOSEN
    if not found["moe"]["groups"]:
        found, chosen = {**found, "moe": _new_experts(given.get("moe"), found, family)}, (*CHOSEN, "experts")
    joined = _joined(given, found, ModelSection, "model", chosen)
    for name, group in joined["moe"]["groups"].items():
        _check_nulls(name, group, family, plain_router=plain_router, copied=folder is not None)
    return {**joined, "folder": folder, "family": family, "fields": fields or {}}


def _of_export(model: dict[str, Any], stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the section `model` and the dense family's fields for a folder that `write_dense` made. Groups that the
    section does not name have the sizes of the folder."""
    groups, family = stored.get("expert_groups"), stored.get("family")
    if not isinstance(groups, dict) or not isinstance(family, dict) or not isinstance(family.get("model_type"), str):
        raise ConfigError(f"model.folder: its {CONFIG_FILE} lacks family or expert_groups; export the run again", see=GUIDE)
    moe: dict[str, Any] = found if isinstance(found := model.get("moe"), dict) else {}
    sizes = {name: {key: each.get(key) for key in ("num_experts", "top_k", "modalities")} for name, each in groups.items()}
    given = moe.get("groups") or {name: {} for name in sizes}
    joined = {name: {**sizes.get(name, {}), **each} for name, each in given.items()} if isinstance(given, dict) else given
    return {**model, "moe": {**moe, "groups": joined}}, {key: value for key, value in family.items() if key not in _NOTES}


def _new_experts(moe: Any, found: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Returns the sizes of the experts that a dense family gets. Raises ConfigError if no groups or unknown layers are
    given. The schema's check reports other wrong values."""
    given, layers = moe if isinstance(moe, dict) else {}, found["moe"]["layers"]
    groups, wanted = given.get("groups"), given.get("layers") or layers
    if not groups or not isinstance(groups, dict):
        raise ConfigError(
            f"model.moe.groups: {family} has no experts; name the groups of experts that each FFN becomes, such as "
            "{text: {num_experts: 4}, image: {num_experts: 4}}, or take a mixture-of-experts family",
            see=GUIDE,
        )
    if isinstance(wanted, list) and (unknown := [each for each in wanted if each not in layers]):
        raise ConfigError(f"model.moe.layers: {family} has no layer {unknown[0]}; it has {len(layers)} layers", see=GUIDE)
    sizes = {
        name: {"top_k": 1, **group, "ffn_dim": found["dense_ffn_dim"]} if isinstance(group, dict) else group
        for name, group in groups.items()
    }
    if len(sizes) > 1 and (
        nulls := [name for name, each in groups.items() if isinstance(each, dict) and each.get("num_null")]
    ):
        raise ConfigError(
            f"model.moe.groups.{nulls[0]}.num_null: null experts of a dense family need a single group; remove num_null, "
            "or the other groups",
            see=GUIDE,
        )
    choices = {each["top_k"] for each in sizes.values() if isinstance(each, dict)}
    if len(choices) > 1:
        raise ConfigError(
            f"model.moe.groups: top_k is {' and '.join(map(str, choices))}; with engine.kind=transformers the groups of a "
            "layer choose equal numbers of experts: give each group the same top_k",
            see=GUIDE,
        )
    return {"layers": wanted, "groups": sizes}


def _other_than(given: Mapping[str, Any], stored: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields the dotted name of each given field whose stored value differs, also of fields inside other fields."""
    for key, value in given.items():
        found = stored.get(key)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            yield from _other_than(value, found, f"{path}.{key}")
        elif value != found:
            yield f"{path}.{key}"


def _check_nulls(name: str, group: Mapping[str, Any], family: str, *, plain_router: bool, copied: bool) -> None:
    """Raises ConfigError if the family's routers cannot have as many null rows as the group's section requires."""
    key, count = f"model.moe.groups.{name}.num_null", group.get("num_null")
    if not isinstance(count, int) or count <= 0:
        return  # the schema's check reports a wrong value
    if not plain_router:
        raise ConfigError(
            f"{key}={count}: null rows need a router that is one matrix [experts, hidden], which {family}'s is not; remove "
            "num_null, and let model.moe.router.kind=top_p take fewer choices",
            see=GUIDE,
        )
    if copied and (problem := uneven_twins(group["num_experts"], count)):
        raise ConfigError(f"{key}: {problem}", see=GUIDE)


def _check_names(family: str, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that the family's configuration lacks, because transformers would ignore it."""
    config = family_config(family, {})
    known = {*vars(config), *type(config).attribute_map, "head_dim"}  # some models read head_dim without declaring it
    known = {name for name in known if not _is_private(name)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"model.fields.{name}: {family} has no such field{did_you_mean(name, known)}", see=GUIDE)


def _joined(
    given: Mapping[str, Any], found: Mapping[str, Any], schema: type[Section], path: str, chosen: tuple[str, ...] = CHOSEN
) -> dict[str, Any]:
    """Joins the `found` values of a family with the `given` values of the section. The user can choose only keys in
    `chosen`. Raises ConfigError if another given value differs from the found value or, where the family has none, the
    default."""
    joined = {**given, **found}
    for key, value in given.items():
        inner = {"moe": MoESection}.get(key, GroupSection if schema is Section else None)
        if key == "groups" and isinstance(value, dict):
            if more := value.keys() - found[key].keys():
                raise ConfigError(
                    f"{path}.groups.{min(more)}: the family has only {' and '.join(found[key])}; remove the others",
                    see=GUIDE,
                )
            joined[key] = _joined(value, found[key], Section, f"{path}.{key}", chosen)  # a section for each name
        elif inner is not None and isinstance(value, dict) and isinstance(found.get(key), dict):
            joined[key] = _joined(value, found[key], inner, f"{path}.{key}", chosen)
        elif key in chosen or (key == "top_k" and given.get("num_null")):
            joined[key] = value
        elif key in found and value != found[key]:
            raise ConfigError(
                f"{path}.{key}={value!r}: engine.kind=transformers takes {found[key]!r} from the family's configuration; "
                "remove the key, or change the family's own field in model.fields",
                see=GUIDE,
            )
        elif key not in found and key in schema.model_fields:
            default = schema.model_fields[key].get_default(call_default_factory=True)
            if value != to_jsonable_python(default):
                raise ConfigError(
                    f"{path}.{key}={value!r}: has no effect with engine.kind=transformers, whose family decides it; remove "
                    "the key, or change the family's own field in model.fields",
                    see=GUIDE,
                )
    return joined


def read_fields(folder: Path) -> dict[str, Any]:
    """Returns the fields of a folder's config.json, without private fields such as `_name_or_path`, versions and dtypes.
    Raises ConfigError if it cannot be read, or if a configuration file of the folder could make a library run code."""
    if not folder.is_dir():
        raise ConfigError(f"model.folder={str(folder)!r}: no such folder; name a Hugging Face folder", see=GUIDE)
    try:
        refuse_code(folder)
        fields = read_configuration(folder, CONFIG_FILE)
    except MoeDistError as error:
        raise ConfigError([f"model.folder: {problem}" for problem in error.problems], see=GUIDE) from error
    if not isinstance(fields.get("model_type"), str):
        raise ConfigError(f"model.folder={str(folder)!r}: its {CONFIG_FILE} has no model_type; name the folder of a model")
    public = json.loads(json.dumps(fields), object_hook=lambda each: {k: v for k, v in each.items() if not _is_private(k)})
    return {key: value for key, value in public.items() if key not in _NOTES}


def _is_private(field: str) -> bool:
    return field.startswith("_") or field == "name_or_path"


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for fields, at any depth, that make transformers run code, print control characters or take
    hours."""
    problems = [f"{problem}; remove it" for problem in code_keys(fields)]
    for _, name, value in entries(fields):
        if _is_private(name):
            problems.append(f"{name}: is a note that transformers makes itself; remove it")
        elif _NUM_PARTS.search(name) and isinstance(value, int | float) and value > MOST_PARTS:
            problems.append(f"{name}={value!r:.80}: more than {MOST_PARTS:,} are not possible; lower it")
        elif isinstance(value, int) and value > MOST_NUMBER and not _LARGE.search(name):
            problems.append(f"{name}={value!r:.80}: more than {MOST_NUMBER:,} is not possible; lower it")
        elif not f"{name}{value if isinstance(value, str) else ''}".isprintable():
            problems.append(f"{name}={value!r:.80}: has control characters; remove them")
    if problems:
        raise ConfigError([f"model.fields.{problem}" for problem in problems], see=GUIDE)


def _check_version() -> None:
    from transformers import __version__
    from transformers.utils.versions import require_version

    try:
        require_version(f"transformers>={LEAST}")
    except ImportError as error:
        raise ConfigError(
            f"engine.kind=transformers: transformers {__version__} is too old; install {LEAST} or newer", see=GUIDE
        ) from error


def family_config(family: str, fields: Mapping[str, Any]) -> Any:
    """Returns transformers' configuration object. Raises ConfigError if transformers rejects the family or fields, or if
    the fields could do harm."""
    from transformers import CONFIG_MAPPING

    _check_version()
    _check_fields(fields)
    if family not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.family={family!r}: the installed transformers has no such model_type; install a newer one"
        )
    if "quantization_config" in fields:
        raise ConfigError(
            f"model.fields.quantization_config: quantised weights of {family} cannot be trained; take a folder with "
            "bf16 or fp32 weights",
            see=GUIDE,
        )
    try:
        with offline():  # some default values are names of models on the hub
            return CONFIG_MAPPING[family](**fields)
    except Exception as error:  # the class of errors depends on the family
        raise ConfigError(f"model.fields: {family}: transformers refuses them: {error}; correct them", see=GUIDE) from error


def empty_model(family: str, fields: Mapping[str, Any]) -> Any:
    """Returns the family's causal language model with all experts, on torch's default device, uninitialised on meta."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = family_config(family, fields)
    auto: Any = (
        AutoModelForImageTextToText if reads_pictures(config) or _has_no_text_model(config) else AutoModelForCausalLM
    )
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    try:
        with offline():
            return auto.from_config(config, attn_implementation="sdpa", **options)
    except Exception as error:  # the class of errors depends on the family
        if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
            raise ConfigError(
                f"model.family={family!r}: transformers cannot make it: {error}; correct model.fields", see=GUIDE
            ) from error
        with offline():
            return auto.from_config(config, attn_implementation="eager", **options)


def reads_pictures(config: Any) -> bool:
    """Returns whether `picture_inputs` can make the inputs of the family's picture encoder. The encoder must take any
    number of patches (`pixel_values`, `image_grid_thw`) and merge squares of patches, or take pictures of one size
    (`tokens_of_a_picture`). False for a family that also has a text-only model, which is then trained."""
    if tokens_of_a_picture(config):
        return True
    vision = getattr(config, "vision_config", None)
    ids = all(isinstance(getattr(config, f"{kind}_token_id", None), int) for kind in ("image", "video"))
    merges = hasattr(vision, "spatial_merge_size") and hasattr(vision, "patch_size")
    return ids and merges and _has_no_text_model(config)


def tokens_of_a_picture(config: Any) -> int:
    """Returns the number of placeholders of every picture in LLaVA's form, whose encoder takes pictures of one size; 0 in
    other forms."""
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    plain = isinstance(side, int) and not hasattr(config, "image_grid_pinpoints")
    return int(getattr(config, "image_seq_length", None) or 0) if plain else 0


def _has_no_text_model(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@cache
def _sizes(family: str, fields_json: str) -> tuple[dict[str, Any], bool]:
    """Returns the section `model`, and whether the routers are plain matrices [experts, hidden size]."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # otherwise each rank would repeat the warnings about the configuration
    try:
        with torch.device("meta"):
            model = empty_model(family, json.loads(fields_json))
    finally:
        log.setLevel(level)
    config, ffns = model.config.get_text_config(), dense_ffns(model)
    banks = [] if ffns else banks_of(model)
    if len({(bank.group, bank.ids) for bank in banks}) != len({bank.group for bank in banks}):
        raise ConfigError(f"model.family={family!r}: its layers have different numbers of experts", see=GUIDE)
    hidden_dim, heads = config.hidden_size, config.num_attention_heads
    plain_router = bool(ffns)
    if not ffns:
        router, num_experts = model.get_submodule(banks[0].router), len(banks[0].ids)
        plain_router = {name: tuple(each.shape) for name, each in router.state_dict().items()} == {
            "weight": (num_experts, hidden_dim)
        }

    one_bank = len({bank.group for bank in banks}) == 1
    both = ["text", "image"] if reads_pictures(model.config) else ["text"]

    def group(bank: Bank) -> dict[str, Any]:
        experts, router = model.get_submodule(bank.experts), model.get_submodule(bank.router)
        matrices = sum(each[0].numel() for each in experts.parameters() if each.ndim == 3)
        return {
            "num_experts": len(bank.ids),
            "top_k": getattr(router, "top_k", None) or config.num_experts_per_tok,
            "ffn_dim": matrices // (hidden_dim * (3 if getattr(experts, "has_gate", True) else 2)),
            "modalities": both if one_bank else ["image" if bank.ids.start else "text"],
        }

    section = {
        "hidden_dim": hidden_dim,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or max(2, hidden_dim // heads // 2 * 2),
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
        "dense_ffn_dim": getattr(config, "intermediate_size", None) or hidden_dim,
        "tie_embeddings": bool(config.tie_word_embeddings),
        "moe": {
            "layers": list(ffns or dict.fromkeys(bank.layer for bank in banks)),
            "groups": {bank.group: group(bank) for bank in banks},
        },
    }
    return section, plain_router
