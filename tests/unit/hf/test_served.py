"""Models that no transformers family can express are exported with our model code. In transformers they give the same
results."""

import ast
import json
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moe_dist.config.keys import variants_of
from moe_dist.config.model_schema import MoESection
from moe_dist.config.routers.per_token import ReLURouterSection
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.hf.exporting import export_model
from moe_dist.hf.forms import choose_form
from moe_dist.hf.importing import import_model
from moe_dist.hf.plan import ImportOptions
from moe_dist.hf.served_fields import CODE, CODE_FILES, OLD_AUTO_MAP, read_served, served_problems, token_ids
from tests.support.agreement import assert_agree
from tests.support.cover import full
from tests.support.imported import load_imported
from tests.support.messages import refused
from tests.support.pictured import VOCAB
from tests.support.served import (
    GROUP,
    ONE,
    continued,
    group_of,
    logits,
    our_gradients,
    run_readme,
    saved_model,
    their_gradients,
    theirs,
)
from tests.support.tiny import tiny_config, tiny_dataset
from tests.support.tiny_hf import save, tiny_model
from tests.unit.hf.test_round_trip import assert_same, tensors_of

BOUND = 1e-5


def one(**changes: Any) -> dict[str, Any]:
    return {"model.moe.groups": {"all": {**GROUP, **changes}}}


def router(kind: str = "top_k", **fields: Any) -> dict[str, Any]:
    return {"model.moe.router": {"kind": kind, **fields}, "loss.balance.schedule": [[0, 0.0]]}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model.rope_scaling": {"kind": kind, "factor": 4.0, **fields}}


FREE = {"num_identity": 2, "num_constant": 2, "top_k": 4}
LENGTHS = {"original_max_position_embeddings": 8}
SHALLOW = {"model.mixture_of_depths": None, "model.sliding_window": None}
DEPTHS = {"every": 2, "first": 0, "capacity": 0.5}
TRUE_ONLY = {name: {"num_experts": 3, "top_k": 2, "ffn_dim": 16} for name in ("text", "image")}
CASES: dict[str, dict[str, Any]] = {
    "groups": {},
    "normalise true_all": ONE | router(normalise="true_all"),
    "scale": ONE | router(scale=1.5),
    "single null row": ONE | router(null_logit="single"),
    "free all_chosen bias": one(**FREE) | router(normalise="all_chosen", selection_bias=True),
    "sigmoid groups": one(num_experts=8, top_k=4) | router("group_limited", n_group=4, topk_group=2, normalise="none"),
    "adapted": one(num_experts=8, num_null=8, top_k=8, ffn_dim=4) | router("group_limited", normalise="none", scale=2.0),
    "shared gate": {"model.moe.shared_ffn_dim": 20, "model.moe.shared_gate": True},
    "dense first": {"model.moe.first": 1, "model.num_layers": 3, "model.moe.every": 2, "model.dense_ffn_dim": 40},
    "linear": rope("linear"),
    "llama3": rope("llama3", **LENGTHS, low_freq_factor=1.0, high_freq_factor=4.0),
    "partial dynamic adjacent": {"model.rope_dim": 6, "model.rope_pairs": "adjacent", **rope("dynamic", **LENGTHS)},
    "attention": {"model.qk_norm": "head", "model.attention_bias": "qkvo", "model.head_dim": 12,
                  "model.tie_embeddings": True},
    "latent attention": {
        "model.attention": {"kind": "latent", "q_rank": 10, "kv_rank": 12, "value_dim": 6}, "model.rope_dim": 4,
        "model.head_dim": 10, "model.num_kv_heads": 4, **rope("yarn", **LENGTHS, mscale=0.7, mscale_all_dim=1.3),
        "model.mixture_of_depths": {**DEPTHS, "causal": "threshold"}, "model.sliding_window": 9,
    },
    "shortcut": one(**FREE) | router(normalise="none", scale=2.0, selection_bias=True) | {
        "model.moe.shortcut": True, "model.moe.every": 2, "model.moe.shared_ffn_dim": 20, "model.moe.shared_gate": True,
        "model.dense_ffn_dim": 40, "model.rope_dim": 4, "model.head_dim": 10, "model.num_kv_heads": 4,
        "model.attention": {"kind": "latent", "q_rank": 10, "kv_rank": 12, "value_dim": 6, "scaled": True},
    },
    "sinks": one(num_null=0) | router(logit_bias=True) | {
        "model.attention": {"kind": "sinks"}, "model.moe.experts": {"kind": "clamped_ffn", "limit": 0.2},
        "model.sliding_window": 4, "model.sliding_layers": [1], "model.attention_bias": "qkvo", "model.qk_norm": "head",
    },
    "olmoe attention": {"model.qk_norm": "full", "model.attention_bias": "qkv"},
    "depths": {"model.mixture_of_depths": {**DEPTHS, "causal": "auxiliary"}},
    "depths window": {"model.mixture_of_depths": {**DEPTHS, "causal": "threshold"}, "model.sliding_window": 4},
    "top_p free": one(**FREE) | router("top_p", p=0.5, normalise="true_chosen"),
    "relu": router("relu", scale=0.7),
    "threshold free": one(**FREE) | router("threshold", scale=2.0),
    "predicted_k": router("predicted_k", normalise="true_chosen", scale=1.5),
    "expert_threshold groups": router("expert_threshold") | {"model.moe.groups": TRUE_ONLY},
    "expert_choice auxiliary": router("expert_choice", causal="auxiliary") | {"model.moe.groups": TRUE_ONLY},
    "expert_choice softmax": router("expert_choice", causal="threshold", score="softmax") | {"model.moe.groups": TRUE_ONLY},
}  # fmt: skip

# These cases cover every value of each field, together with the imports of test_imports_compute_the_same_as_their_own_class
# and the choices of test_choices_that_count_for_nothing_do_no_work. All other cases combine the same values.
COVER = (
    "groups", "single null row", "free all_chosen bias", "dense first", "latent attention", "depths window", "relu",
    "expert_choice auxiliary",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset(folder)
    return folder


def prompts() -> torch.Tensor:
    """Returns sequences of text and pictures that are longer than the attention windows and RoPE's original lengths."""
    return torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("case", [case if case in COVER else full(case) for case in CASES], ids=list(CASES))
@pytest.mark.slow
def test_logits_gradients_and_tokens_are_ours_and_bits_come_back(tmp_path: Path, data: Path, case: str) -> None:
    ours = saved_model(tmp_path / "run", data, CASES[case])
    done = export_model(tmp_path / "run", tmp_path / "hf", shard_bytes=9000)
    assert_comes_back(tmp_path, ours)
    assert done.family == "moe_dist"
    assert done.reasons
    model, tokens = theirs(tmp_path / "hf"), prompts()
    expected = logits(ours, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=BOUND, atol=BOUND)
    wanted = our_gradients(ours, tokens)
    found = their_gradients(tmp_path / "hf", model, tokens)
    assert_agree({name: found[name] for name in wanted}, wanted)  # `found` also has buffers
    model.generation_config.eos_token_id = None  # so that no sequence ends early  # pyright: ignore
    for cache in (True, False):
        made = model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache)  # pyright: ignore
        assert torch.equal(made, continued(ours, tokens, 8, cached=cache)), cache


def assert_comes_back(folder: Path, ours: Any) -> None:
    """Asserts that the export in `hf`, imported and exported again, has the same bits and fields."""
    import_model(folder / "hf", folder / "ours", shard_bytes=5000)
    again, _ = load_imported(folder / "ours")
    for (name, wanted), (_, found) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(found, wanted), name
    export_model(folder / "ours", folder / "back")
    assert_same(tensors_of(folder / "back"), tensors_of(folder / "hf"))
    assert read_served(json.loads((folder / "hf/config.json").read_text()) | {"auto_map": OLD_AUTO_MAP})[1]["attention"]
    for file in ("config.json", *CODE_FILES):
        assert (folder / "back" / file).read_bytes() == (folder / "hf" / file).read_bytes(), file


@torch.no_grad()
def test_a_server_can_bring_its_own_attention(tmp_path: Path, data: Path) -> None:
    """vLLM's backend for transformers models builds only the decoder, gives it all tokens as one sequence, and uses an
    attention whose output has no batch dimension."""
    from transformers import AttentionInterface, AutoModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def flat(module: Any, query: Any, *others: Any, **options: Any) -> tuple[torch.Tensor, None]:
        scales.append(options["scaling"])
        output, _ = sdpa_attention_forward(module, query, *others, **options)
        return output.reshape(query.shape[2], -1), None

    scales: list[float] = []
    AttentionInterface.register("flat", flat)
    ours, tokens = saved_model(tmp_path / "run", data, CASES["latent attention"] | SHALLOW), prompts()[:1]
    export_model(tmp_path / "run", tmp_path / "hf")
    decoder = AutoModel.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float32, attn_implementation="flat"
    )
    states = decoder(input_ids=tokens, position_ids=torch.arange(14)[None], use_cache=False, return_dict=False)[0]
    found = states @ ours.embedding.weight.T if ours.args.tie_embeddings else ours.output(states)
    torch.testing.assert_close(found, logits(ours, tokens), rtol=BOUND, atol=BOUND)
    assert scales == [pytest.approx(10**-0.5 * (0.1 * 1.3 * math.log(4.0) + 1) ** 2)] * 2


@torch.no_grad()
def test_an_expert_wins_a_tie_with_its_null_copies(tmp_path: Path, data: Path) -> None:
    """Every choice is an exact tie between an expert and its null copies."""
    ours = saved_model(tmp_path / "run", data, one(num_null=8, top_k=4), copies=True)
    assert export_model(tmp_path / "run", tmp_path / "plain").folded == 8
    export_model(tmp_path / "run", tmp_path / "hf", family="moe_dist")
    tokens = prompts()
    for folder in ("plain", "hf"):
        torch.testing.assert_close(theirs(tmp_path / folder)(tokens).logits, logits(ours, tokens), rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize(
    "kind",
    ["ernie4_5_moe", "glm4_moe", "deepseek_v3", "longcat_flash", "gpt_oss"],
)
@torch.no_grad()
def test_imports_compute_the_same_as_their_own_class(tmp_path: Path, kind: str) -> None:
    """The kinds cover softmax scores, sigmoid scores with a selection bias, groups of experts, shared experts without a
    gate, partial rotary heads, and rotary positions in adjacent pairs."""
    model, tokens = tiny_model(kind).eval(), prompts()
    import_model(save(model, tmp_path / "theirs"), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "hf", family="moe_dist")
    torch.testing.assert_close(theirs(tmp_path / "hf")(tokens).logits, model(tokens).logits, rtol=BOUND, atol=BOUND)


@torch.no_grad()
def test_padding_changes_no_token(tmp_path: Path, data: Path) -> None:
    depths = {"model.mixture_of_depths": {**DEPTHS, "causal": "threshold"}}
    ours = saved_model(tmp_path / "run", data, {"model.sliding_window": 4} | depths | rope("dynamic", **LENGTHS))
    export_model(tmp_path / "run", tmp_path / "hf")
    model, tokens = theirs(tmp_path / "hf", attn_implementation="eager"), prompts()[:2]
    model.generation_config.eos_token_id = None  # pyright: ignore
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], dim=1)
    padded[1] = torch.cat([tokens[1], tokens[1, :5]])  # a longer sequence in the same batch
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    made = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)  # pyright: ignore
    for row, prompt in ((made[0, 5:], tokens[:1]), (made[1], padded[1:])):
        assert torch.equal(row[None], continued(ours, prompt, 6, cached=True))


@torch.no_grad()
def test_routers_stay_in_fp32_in_a_bfloat16_model(tmp_path: Path, data: Path) -> None:
    ours = saved_model(tmp_path / "run", data, CASES["depths window"] | router(selection_bias=True))
    export_model(tmp_path / "run", tmp_path / "hf")
    model, tokens = theirs(tmp_path / "hf", dtype=torch.bfloat16), prompts()
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {name for name in model.state_dict() if "router" in name}
    assert (model(tokens).logits.float() - logits(ours, tokens)).abs().mean() < 0.1


@pytest.mark.parametrize("case", ["single null row", "top_p free", "relu", "threshold free", "predicted_k"])
@torch.no_grad()
def test_choices_that_count_for_nothing_do_no_work(tmp_path: Path, data: Path, case: str) -> None:
    """An expert computes only the rows of its tokens. A null choice computes nothing."""
    ours = saved_model(tmp_path / "run", data, CASES[case])
    export_model(tmp_path / "run", tmp_path / "hf")
    model, tokens, rows = theirs(tmp_path / "hf"), prompts(), []
    for layer in model.model.layers:  # pyright: ignore
        for expert in (expert for group in layer.mlp.groups for expert in group.experts):
            expert.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    model(tokens)
    positions, zeros = torch.arange(14).expand(3, 14), torch.zeros_like(tokens)
    pairs = sum(report.sent.pairs for report in ours(tokens, positions, zeros, group_of(ours, tokens))[1])
    assert sum(rows) == pairs < 2 * tokens.numel() * GROUP["top_k"]
    assert min(rows) > 0


def test_an_import_of_the_form_takes_no_options_and_no_other_code(tmp_path: Path, data: Path) -> None:
    saved_model(tmp_path / "run", data, {})
    export_model(tmp_path / "run", tmp_path / "hf")
    with refused(ConfigError, "--null-experts=4"):
        import_model(tmp_path / "hf", tmp_path / "ours", ImportOptions(null_experts=4, top_k=4))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for name, value in (("auto_map", {"AutoConfig": "other.Config"}), ("expert_groups", [{}]), ("qk_norm", "both")):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | {name: value}))
        with refused(ConfigError, name):
            import_model(tmp_path / "hf", tmp_path / "ours")


def test_several_groups_need_the_ids_of_their_tokens(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    saved_model(tmp_path / "run", tmp_path / "data", {})
    (tmp_path / "data").rename(tmp_path / "moved")
    with refused(ConfigError, "model.moe.groups: text, image", "data.path"):
        export_model(tmp_path / "run", tmp_path / "hf")
    export_model(tmp_path / "run", tmp_path / "hf", data=tmp_path / "moved")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert [group["token_ids"] for group in config["expert_groups"]] == [[[0, 48]], [[48, 64]]]
    assert (config["eos_token_id"], config["pad_token_id"]) == (1, 0)
    tiny_dataset(tmp_path / "other", seed=1)
    with refused(DataError, "--data"):
        export_model(tmp_path / "run", tmp_path / "not", data=tmp_path / "other")


def test_a_data_set_of_other_modalities_is_refused(tmp_path: Path, data: Path) -> None:
    """If it were accepted, no expert would compute the tokens of one group."""
    manifest = load_manifest(data).model_copy(update={"modalities": {"text": ((0, 64),)}})
    with refused(ConfigError, "model.moe.groups: their modalities are image, text, those of the data set tiny are text"):
        token_ids(tiny_config(data, tmp_path).model, manifest)


def test_a_token_must_be_routed_alone(tmp_path: Path, data: Path) -> None:
    saved_model(tmp_path / "run", data, one(num_null=0) | router("expert_choice", causal=None))
    with refused(ConfigError, "causal=null"):
        export_model(tmp_path / "run", tmp_path / "hf")


def test_a_router_of_ones_own_is_refused(data: Path, tmp_path: Path) -> None:
    class Own(ReLURouterSection):
        builds = "own:Own"

        kind: Literal["own"] = "own"  # pyright: ignore[reportIncompatibleVariableOverride]

    model = tiny_config(data, tmp_path, router("relu")).model
    assert served_problems(model) == []
    own = model.model_copy(update={"moe": model.moe.model_copy(update={"router": Own()})})
    (problem,) = served_problems(own)
    assert problem.startswith("model.moe.router.kind=own: the exported code has no such router; train with another")


def test_the_exported_code_has_the_routers_that_are_exported() -> None:
    from moe_dist.hf.served import modeling_moe_dist  # imports transformers

    kinds = variants_of(MoESection.model_fields["router"].annotation)
    assert {section.served for section in kinds.values()} - {""} == modeling_moe_dist.ROUTERS.keys()


def test_a_plain_family_comes_first(tmp_path: Path, data: Path) -> None:
    saved_model(tmp_path / "run", data, one(num_null=0) | router(normalise="all_chosen"))
    done = export_model(tmp_path / "run", tmp_path / "plain")
    assert (done.family, done.reasons, done.folded) == ("mixtral", (), 0)
    assert export_model(tmp_path / "run", tmp_path / "own", family="moe_dist").family == "moe_dist"
    with refused(ConfigError, "num_null=3"):
        saved_model(tmp_path / "nulls", data, ONE)
        export_model(tmp_path / "nulls", tmp_path / "not", family="mixtral")


def test_the_tokenizer_of_the_data_comes_along(
    tmp_path: Path, own_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    saved_model(tmp_path / "run", own_data, {"model.vocab_size": VOCAB})
    export_model(tmp_path / "run", tmp_path / "hf")
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "hf"), "text 12, naïve ☂"
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(own_data / "tokenizer.json")).encode(text).ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    run_readme(tmp_path / "hf", monkeypatch, lines=3)
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize("file", CODE_FILES)
def test_the_code_needs_transformers_only(file: str) -> None:
    tree = ast.parse((CODE / file).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(name).partition(".")[0] for name in imported} <= {
        "math",
        "torch",
        "typing",
        "transformers",
        "configuration_moe_dist",
    }


def test_a_gating_residual_is_in_no_form(data: Path, tmp_path: Path) -> None:
    model = tiny_config(data, tmp_path, one() | router("gating_residual")).model
    for name in (None, "qwen3_moe", "qwen3_moe_plus_plus", "moe_dist"):
        with pytest.raises(ConfigError, match=r"router\.kind=gating_residual: the exported code has no such router"):
            choose_form(model, lambda _: pytest.fail("no tensor is needed"), name, must=False)
