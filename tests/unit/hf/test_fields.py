"""An import understands each field of a config.json as transformers' configuration class does, or refuses the file and
names the field.

The test changes every field of every family's class, and every other name that transformers reads from a configuration.
If the import accepts the changed config.json, our logits equal transformers' with the same weights.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from torch import Tensor, nn

from moe_dist.errors import ConfigError
from moe_dist.hf import sections
from moe_dist.hf.attention_fields import DEFAULT_WINDOW, DEFAULT_WINDOW_LAYERS, write_rope
from moe_dist.hf.families import FAMILIES
from moe_dist.hf.fields import INERT
from moe_dist.hf.importing import run_config
from moe_dist.hf.plan import ImportOptions, ImportPlan, changed_section
from moe_dist.hf.sections import read_section
from tests.support.cover import rest_full
from tests.support.hf_families import built, under_our_names
from tests.support.tiny_hf import LENGTH, VOCAB, draw, tiny_config

ABSENT = object()
BOUND = 1e-5

# The test sets each field to these values. It also sets each field to null, and removes each field.
CHANGES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (80,),
    "hidden_size": (48,),
    "intermediate_size": (36,),
    "moe_intermediate_size": (36,),
    "shared_expert_intermediate_size": (36, 0),
    "num_hidden_layers": (1, 3),
    "num_attention_heads": (2, 8, 3),
    "num_key_value_heads": (1, 4, 3),
    "head_dim": (16, 5),
    "hidden_act": ("swish", "gelu", "relu"),
    "max_position_embeddings": (32,),
    "rms_norm_eps": (0.5, 0, 10**400),
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "clip_qkv": (0.5,),
    "use_bias": (True, False),
    "moe_k": (1, 99),
    "moe_num_experts": (4, 0),
    "moe_num_shared_experts": (0, 1, 3),
    "moe_layer_start_index": (0, 1, 2, 5, -1),
    "moe_layer_end_index": (-1, 0, 1, 5, -2),
    "moe_layer_interval": (1, 2, 3, 0),
    "moe_norm_min": (0.9, 1e-12),
    "n_routed_experts": (4, 16),
    "n_shared_experts": (0, 2),
    "routed_scaling_factor": (2.5, 0.0),
    "n_group": (1, 2, 3),
    "topk_group": (1, 4, 5),
    "first_k_dense_replace": (0, 2, 5),
    "use_qk_norm": (True, False),
    "q_lora_rank": (16, None),
    "kv_lora_rank": (8, 0),
    "qk_nope_head_dim": (4, 5),
    "qk_rope_head_dim": (8, 3),
    "v_head_dim": (4, 16),
    "rope_interleave": (True, False),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers"), (0, 2)),
    "num_layers": (1, 3),
    "ffn_hidden_size": (36,),
    "expert_ffn_hidden_size": (36, 0),
    "moe_topk": (2, 99),  # transformers cannot run with 1
    "zero_expert_num": (0, 2, -1),
    "swiglu_alpha": (0.5, 0.0),
    "swiglu_limit": (0.5, 0.0),
    "qk_head_dim": (12, 16),
    "num_experts_per_tok": (1, 99),
    "num_local_experts": (4,),
    "num_experts": (4, 0),
    "norm_topk_prob": (True, False),
    "decoder_sparse_step": (2, 0),
    "mlp_only_layers": ([0], [0, 1], [1]),
    "sliding_window": (1, 4, 0, 64),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 5),
    "layer_types": (
        ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"], ["full_attention"],
        ["chunked_attention"] * 2, [{}, {}],
    ),
    "pretraining_tp": (2,),
    "dtype": ("bfloat16",),
    "architectures": (["LlamaModel"],),
    "problem_type": ("regression",),
    "id2label": ({"0": "a", "1": "b", "2": "c"},),
    "label2id": ({"a": 0},),
    "transformers_version": ("4.40.0",),
    "chunk_size_feed_forward": (4,),
    "rope_parameters": ({},),  # further values are in ROPES
    **dict.fromkeys(("attention_dropout", "router_jitter_noise", "router_aux_loss_coef", "initializer_range"), (0.5,)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (3,)),
    **dict.fromkeys(("use_cache", "output_hidden_states", "return_dict", "is_encoder_decoder", "output_router_logits"),
                    (True, False)),
}  # fmt: skip

# Field names that transformers reads although no configuration class has them.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **{name: CHANGES[name] for name in ("sliding_window", "use_sliding_window", "layer_types", "head_dim")},
    "num_kv_shared_layers": (1,),
    "is_causal": (True, False, None),
    "attention_chunk_size": (4, None),
    "per_layer_config": ({"1": {"num_key_value_heads": 1}}, {}, None),
    "text_config": ({"hidden_size": 8}, None),
    "kv_sharing_modes": (["reuse", "reuse"], None),
    "rope_theta": (100.0, None),
    "partial_rotary_factor": (0.5, 1.0, None),
    "original_max_position_embeddings": (8,),
    "qk_head_dim": CHANGES["qk_head_dim"],
    "router_bias": (True, False),
}

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_parameters": {}},
    {"rope_parameters": {"rope_theta": 100.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0},
    {"rope_parameters": {"rope_theta": 50.0}, "rope_theta": 100.0},
    {"rope_parameters": {"rope_theta": None}, "rope_theta": 100.0},
    {"rope_parameters": _LINEAR},
    {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_parameters": {"type": "default", **_LINEAR}},
    {"rope_parameters": {"rope_theta": 50.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_parameters": _LINEAR | {"rope_theta": 50.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_parameters": _LINEAR, "rope_scaling": {}},
    {"rope_parameters": ABSENT, "rope_scaling": None},
    {"rope_parameters": ABSENT, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 100.0},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
    {"rope_parameters": {"rope_type": "dynamic"}},
    {"rope_parameters": _YARN},
    {"rope_parameters": _YARN | {"rope_theta": 100.0, "truncate": False}},
    {"rope_parameters": _YARN | {"truncate": None}},
    {"rope_parameters": _YARN | {"beta_fast": 2.0, "beta_slow": 0.25, "attention_factor": 1.5}},
    {"rope_parameters": _YARN | {"beta_fast": None, "attention_factor": None, "mscale": None}},
    {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    {"rope_parameters": _YARN | {"mscale": 0.7}},
    {"rope_parameters": _YARN | {"factor": 0.5}},
    {"rope_parameters": _YARN | {"factor": None}},
    {"rope_parameters": _YARN, "original_max_position_embeddings": 16},
    {"rope_parameters": _YARN | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": _LLAMA3},
    {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 8}},
    {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 8, "high_freq_factor": 1.0}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    {"rope_parameters": {"full_attention": _LINEAR}},
    {"rope_parameters": _LINEAR | {"unknown": 3}},
)  # fmt: skip

# Changes of several fields at once, by family.
TOGETHER: dict[str, tuple[dict[str, Any], ...]] = {
    "mixtral": ({"sliding_window": 4, "use_sliding_window": False},
                {"sliding_window": 4, "layer_types": ["full_attention"] * 2},
                {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, {"num_experts": 8}, {"num_experts": 4}),
    "olmoe": ({"sliding_window": 4}, {"sliding_window": 4, "use_sliding_window": True}, {"num_local_experts": 4}),
    "qwen3_moe": tuple({"use_sliding_window": True, "sliding_window": window} for window in (4, None, ABSENT, 0)),
    "qwen2_moe": (
        *({"use_sliding_window": True, "layer_types": ABSENT, "sliding_window": window} for window in (4, None, ABSENT)),
        *({"use_sliding_window": True, "sliding_window": 4, "layer_types": types} for types in CHANGES["layer_types"]),
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ABSENT, "max_window_layers": 0},
        {"num_local_experts": 4}, {"num_local_experts": 8, "num_experts": ABSENT},
    ),
    "llama": ({"sliding_window": 4}, {"sliding_window": 4, "use_sliding_window": True}),
    "ernie4_5_moe": (
        {"num_experts": 8}, {"num_experts": 4}, {"num_experts_per_tok": 2}, {"moe_k": ABSENT, "num_experts_per_tok": 2},
        {"moe_num_experts": ABSENT, "num_experts": 4}, {"moe_layer_start_index": 0, "moe_layer_interval": 2},
    ),
    "glm4_moe": (
        {"num_local_experts": 8}, {"num_local_experts": 4}, {"n_routed_experts": ABSENT, "num_local_experts": 12},
        *({"rope_parameters": ABSENT, "partial_rotary_factor": share}
          for share in (ABSENT, None, 0.25, 0.4, 1.0, 1.5, 0.1)),
        {"rope_parameters": {"partial_rotary_factor": None}}, {"num_nextn_predict_layers": 0},
        {"n_group": ABSENT, "topk_group": ABSENT}, {"n_group": 2, "topk_group": 1, "n_routed_experts": 12},
    ),
    "deepseek_v3": (
        {"num_local_experts": 8}, {"num_local_experts": 4}, {"n_routed_experts": ABSENT, "num_local_experts": 16},
        {"num_key_value_heads": 2, "num_attention_heads": 2}, {"qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
        {"qk_nope_head_dim": 4, "qk_head_dim": ABSENT}, {"qk_rope_head_dim": 8, "head_dim": ABSENT, "qk_head_dim": ABSENT},
        {"num_nextn_predict_layers": 0}, {"n_routed_experts": 16, "n_group": ABSENT, "topk_group": ABSENT},
        {"first_k_dense_replace": ABSENT, "num_hidden_layers": 4}, {"routed_scaling_factor": ABSENT},
    ),
    "longcat_flash": (
        {"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"num_local_experts": 8}, {"num_local_experts": 4},
        {"num_experts_per_tok": 4}, {"moe_topk": ABSENT, "num_experts_per_tok": 4}, {"intermediate_size": 20},
        {"intermediate_size": 36}, {"moe_intermediate_size": 24}, {"moe_intermediate_size": 36},
        {"qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16}, {"qk_nope_head_dim": 4, "qk_head_dim": ABSENT},
        {"qk_rope_head_dim": 64, "head_dim": ABSENT, "qk_head_dim": ABSENT},
        {"num_key_value_heads": ABSENT, "num_attention_heads": 2}, {"n_routed_experts": 1, "zero_expert_num": 9},
    ),
    "gpt_oss": (
        {"num_experts": 8}, {"num_experts": 4}, {"layer_types": ABSENT, "num_hidden_layers": 3},
        {"layer_types": ABSENT, "sliding_window": ABSENT}, {"layer_types": ["full_attention"] * 2, "sliding_window": 1},
        {"rope_parameters": ABSENT, "max_position_embeddings": 131072},
    ),
}  # fmt: skip

# Errors of our rules call these fields of transformers by our names.
OURS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "qk_nope_head_dim": "head_dim",
    "qk_rope_head_dim": "rope_",
    "num_experts_per_tok": "top_k",
    "moe_topk": "top_k",
    "num_layers": "layers",
    "zero_expert_num": "top_k",
    "moe_k": "top_k",
    "n_routed_experts": "num_experts",
    "num_hidden_layers": "layers",
    "rope_parameters": "rope_",
    "use_sliding_window": "sliding_window",
}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def base_of(kind: str) -> dict[str, Any]:
    """Returns a config.json with every field of the class."""
    values = json.loads(tiny_config(kind).to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name != "transformers_version"}


def changed(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    together = json.loads(json.dumps({**values, **{k: v for k, v in change.items() if v is not ABSENT}}))
    return {name: value for name, value in together.items() if change.get(name) is not ABSENT}


def class_of(kind: str) -> Any:
    return type(tiny_config(kind))


def theirs_of(values: dict[str, Any]) -> nn.Module:
    """Returns transformers' model of a config.json, with drawn weights."""
    import transformers

    config = class_of(values["model_type"]).from_dict(json.loads(json.dumps(values)))
    experts = {} if config.model_type == "llama" else {"experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32, **experts
    )
    config.return_dict = True  # some of transformers' code needs results of this form
    draw(model, 1)
    return model.eval()


@torch.no_grad()
def assert_theirs(values: dict[str, Any], change: dict[str, Any], *, buildable: bool = True) -> bool:
    """Returns True if the import accepts the config.json and our logits equal transformers'. Returns False if the import
    refuses it with an error that names the change.

    Args:
        buildable: False if transformers may refuse to build the model.
    """
    try:
        family, plain, _ = read_section(values)
        section = changed_section(plain, family, ImportOptions())
        run_config(ImportPlan(section, [], {}, {}), Path("model"), ImportOptions(), ".cache/data/none")
    except ConfigError as error:
        told = str(error)
        if not any(name in told or OURS.get(name, name) in told for name in change):
            pytest.fail(f"{change} is not named: {told}")
        return False
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    try:
        model = theirs_of(values)
        theirs = model(ids, use_cache=False).logits
    except (StrictDataclassFieldValidationError, StrictDataclassClassValidationError):
        # transformers' class refuses null for these fields. None of them affects the model's function.
        assert not buildable or all(value is None and name in INERT for name, value in change.items())
        return True
    except (TypeError, ValueError) as error:
        if buildable:
            raise AssertionError(change) from error
        return True
    ours = logits(section, under_our_names(dict(model.state_dict()), values), ids)
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max(), change
    return True


def logits(section: Any, weights: Any, ids: Tensor) -> Tensor:
    model = built(section, {name: torch.from_numpy(array) for name, array in weights.items()})
    zeros = torch.zeros_like(ids)
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids), zeros, zeros)[0]


@pytest.mark.parametrize("kind", rest_full(FAMILIES))
@pytest.mark.slow
def test_every_field_is_used_without_effect_or_refused(kind: str) -> None:
    values = base_of(kind)
    assert assert_theirs(values, {})
    assert read_section(values)[2] == []  # every field is accepted or refused
    fields = {field.name for field in dataclasses.fields(class_of(kind))}
    assert not fields - CHANGES.keys(), "fields that are new in transformers need values here"
    changes = [
        {name: value} for name in fields | FOREIGN.keys() for value in (*CHANGES.get(name, ()), *FOREIGN.get(name, ()))
    ]
    changes += [{name: value} for name in fields for value in (None, ABSENT)]
    accepted = [assert_theirs(changed(values, change), change) for change in (*changes, *TOGETHER[kind])]
    assert 70 < sum(accepted) < len(accepted) - 30


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("qwen3_next", "train it by engine.kind=transformers"),
        ("deepseek_v2", "train it by engine.kind=transformers"),
        ("aria_text", "train it by engine.kind=transformers"),  # its module has another name
        ("bert", "has no experts"),
        ("kimi_k2", "transformers has no such family"),
    ],
)
def test_the_message_for_an_unknown_family_names_the_engine_that_trains_it(name: str, way: str) -> None:
    with pytest.raises(ConfigError, match=f"model_type='{name}': .*{way}.*; known are mixtral"):
        read_section({"model_type": name})


def test_without_transformers_the_message_names_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"experts are those of transformers, engine.kind=transformers .* trains it"):
        read_section({"model_type": "qwen3_next"})


# PUBLISHED has fields of DeepSeek-V3's config.json that no class of transformers has. OTHERS has other values for them.
PUBLISHED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True,
             "aux_loss_alpha": 0.001}  # fmt: skip
OTHERS = {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 2}


def test_what_transformers_does_not_read_of_deepseek_is_judged() -> None:
    values = base_of("deepseek_v3")
    assert read_section({**values, **PUBLISHED})[1:] == (read_section(values)[1], [])
    for name, other in OTHERS.items():
        with pytest.raises(ConfigError, match=f"{name}={other!r} is not supported: "):
            read_section({**values, **PUBLISHED, name: other})


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_fields_have_the_defaults_of_the_class(kind: str) -> None:
    """Tests fields that have no visible effect on a few tokens of a tiny model."""
    family, defaults = FAMILIES[kind], {field.name: field.default for field in dataclasses.fields(class_of(kind))}
    assert defaults["num_key_value_heads"] == family.heads.kv_heads
    assert class_of(kind).default_theta == family.rope_base
    assert defaults["tie_word_embeddings"] == family.tied
    assert class_of(kind)().rope_parameters.get("partial_rotary_factor") == family.heads.rope_share
    assert defaults.get("max_window_layers", DEFAULT_WINDOW_LAYERS) == DEFAULT_WINDOW_LAYERS
    if family.windows in ("flag", "layers"):
        values = changed(
            base_of(kind), dict.fromkeys(("sliding_window", "layer_types"), ABSENT) | {"use_sliding_window": True}
        )
        theirs = class_of(kind).from_dict(dict(values)).sliding_window
        assert read_section(values)[1]["sliding_window"] == theirs == DEFAULT_WINDOW


@pytest.mark.parametrize("kind", rest_full(FAMILIES))
def test_rotary_positions_are_theirs_or_refused(kind: str) -> None:
    values = base_of(kind) | ({"head_dim": 8} if kind == "mixtral" else {})  # transformers scales only with head_dim
    accepted = [assert_theirs(changed(values, change), change) for change in ROPES]
    assert sum(accepted) == 22 + (FAMILIES[kind].heads.rope_share is not None)


def test_a_part_of_a_head_is_written_as_a_share_that_reads_back() -> None:
    """transformers rounds head_dim x partial_rotary_factor down, and in float64 98 x (2 / 98) is less than 2."""
    family, plain, _ = read_section(base_of("glm4_moe"))
    section = changed_section(plain, family, ImportOptions())
    for head_dim in range(98, 130, 2):
        for rope_dim in range(2, head_dim, 2):
            written = write_rope(section.model_copy(update={"head_dim": head_dim, "rope_dim": rope_dim}), partial=True)
            assert int(head_dim * written["rope_parameters"]["partial_rotary_factor"]) == rope_dim
            assert written["partial_rotary_factor"] == pytest.approx(rope_dim / head_dim)


@pytest.mark.parametrize("kind", rest_full(FAMILIES, 4))
def test_every_name_that_transformers_reads_is_judged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers every name that the model code reads from a configuration while the model is built, runs and generates,
    with and without a cache."""
    import transformers

    values, plain = base_of(kind), transformers.PreTrainedConfig.__getattribute__
    asked: set[str] = set()

    def noted(config: Any, name: str) -> Any:
        asked.add(name)
        return plain(config, name)

    monkeypatch.setattr(transformers.PreTrainedConfig, "__getattribute__", noted)
    model, ids = theirs_of(values), torch.arange(LENGTH)[None]
    for cache in (True, False):
        model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=cache)  # pyright: ignore[reportCallIssue]
    monkeypatch.undo()
    # Attributes of transformers' class and options of `generate` are not fields.
    known = {*dir(class_of(kind)), *transformers.GenerationConfig().to_dict(), *values}
    others = {name for name in asked - known if not name.startswith("_")}
    assert len(others) > 5
    for name in others:
        assert_theirs(changed(values, {name: 3}), {name: 3}, buildable=False)
