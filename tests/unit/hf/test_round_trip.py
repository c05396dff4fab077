"""Hugging Face -> checkpoint -> Hugging Face keeps every bit, dtype and config.json."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX
from moe_dist.checkpoint.verify import verify
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.exporting import StoredTensor, export_model
from moe_dist.hf.importing import import_model
from moe_dist.hf.names import TensorPlace
from moe_dist.hf.plan import ImportOptions
from moe_dist.plan.flops import parameters
from moe_dist.train.build.training import state_specs
from tests.support.cover import full, rest_full
from tests.support.imported import load_imported
from tests.support.messages import refused
from tests.support.served import continued, logits
from tests.support.tiny_hf import save, tiny_model

KINDS = (
    "mixtral", "olmoe", "olmoe biased", "qwen3_moe", "qwen3_moe tied", "qwen2_moe", "qwen2_moe dense", "llama",
    "llama biased", "mixtral sliding", "olmoe dynamic", "qwen3_moe sliding", "qwen2_moe sliding", "llama scaled",
    "ernie4_5_moe", "ernie4_5_moe tied", "glm4_moe", "glm4_moe plain", "deepseek_v3", "deepseek_v3 plain",
    "longcat_flash", "longcat_flash scaled", "gpt_oss", "gpt_oss plain",
)  # fmt: skip

PARTED = ("longcat_flash", "gpt_oss", "gpt_oss plain")  # their tensors may have parts of several of our tensors


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("kind", [kind if " " not in kind or kind in PARTED else full(kind) for kind in KINDS])
@pytest.mark.slow
def test_bits_and_fields_come_back(tmp_path: Path, kind: str) -> None:
    theirs = save(tiny_model(kind, dtype=torch.bfloat16), tmp_path / "theirs")
    done = import_model(theirs, tmp_path / "ours", shard_bytes=5000)
    read = open_checkpoint(find_checkpoint(tmp_path / "ours")).index.tensors if kind in PARTED else tensors_of(theirs)
    assert (done.converted, list(done.unread), done.kept) == ({"BF16": len(read)}, [], 0)
    assert done.shards > 3  # tensors are divided over shards
    out = export_model(tmp_path / "ours", tmp_path / "back", shard_bytes=9000)
    assert out.shards > 1
    assert_same(tensors_of(tmp_path / "back"), tensors_of(theirs))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())


@pytest.mark.parametrize(
    "kind",
    [
        "mixtral", full("qwen2_moe"), "qwen2_moe dense", full("llama biased"), full("glm4_moe"), "deepseek_v3",
        "longcat_flash", "gpt_oss",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_written_is_a_whole_checkpoint_of_the_configuration_beside_it(tmp_path: Path, kind: str) -> None:
    import_model(save(tiny_model(kind), tmp_path / "theirs"), tmp_path / "ours", shard_bytes=5000)
    folder, config = find_checkpoint(tmp_path / "ours"), load_config(tmp_path / "ours/config.yaml")
    specs = {name: spec for name, spec in state_specs(config).items() if not name.startswith(OPTIMIZER_PREFIX)}
    assert verify(folder, specs)[1] == []
    counted = parameters(config.model)
    biases = {name for name in specs if ".router." in name and name.endswith(".bias")}  # biases are buffers
    assert sum(math.prod(spec.shape) for name, spec in specs.items() if name not in biases) == counted.total
    assert open_checkpoint(folder).index.tensors.keys() == specs.keys()
    assert config.run.init_from == str(tmp_path / "ours")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "longcat_flash", "gpt_oss"])
def test_fused_layouts_are_read(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind)
    plain, fused = save(model, tmp_path / "plain"), save(model, tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_of(fused))
    import_model(fused, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(plain))


@pytest.mark.parametrize("fused", [False, True])
def test_projections_of_identity_experts_are_left_out(tmp_path: Path, fused: bool) -> None:
    """transformers wrote gate and up of LongCat-Flash's four identity experts before version 5.25."""
    model = tiny_model("longcat_flash")
    plain, old = save(model, tmp_path / "plain"), save(model, tmp_path / "old", save_original_format=not fused)
    tensors = tensors_of(old)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        if fused:
            stack = tensors[f"{stem}.gate_up_proj"]
            tensors[f"{stem}.gate_up_proj"] = torch.cat([stack, torch.ones_like(stack[:4])])
        else:
            ones = torch.ones_like(tensors[f"{stem}.0.gate_proj.weight"])
            tensors |= {f"{stem}.{e}.{part}_proj.weight": ones.clone() for e in range(8, 12) for part in ("gate", "up")}
    save_file(tensors, old / "model.safetensors")
    assert len(import_model(old, tmp_path / "ours").left_out) == (0 if fused else 2 * 4 * 2)
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(plain))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [("glm4_moe", "model.layers.3."), ("deepseek_v3", "model.layers.3."), ("ernie4_5_moe", "model.mtp_block.0.")],
)
def test_multi_token_prediction_is_left_out_and_named(tmp_path: Path, kind: str, extra: str) -> None:
    theirs = save(tiny_model(kind), tmp_path / "theirs")
    tensors = tensors_of(theirs)
    more = {f"{extra}{name}.weight": torch.ones(2) for name in ("eh_proj", "enorm")}
    save_file(tensors | more, theirs / "model.safetensors")
    assert import_model(theirs, tmp_path / "ours").left_out == sorted(more)
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors)


def test_a_layer_too_many_is_not_multi_token_prediction(tmp_path: Path) -> None:
    theirs = save(tiny_model("glm4_moe"), tmp_path / "theirs")
    values = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2}))
    with pytest.raises(DataError, match=r"model\.layers\.2\.input_layernorm\.weight: is left over"):
        import_model(theirs, tmp_path / "ours")


def test_dtypes_of_single_tensors_come_back_and_can_be_asked_for(tmp_path: Path) -> None:
    theirs = save(tiny_model("mixtral", dtype=torch.bfloat16), tmp_path / "theirs")
    tensors = tensors_of(theirs)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[gate] = tensors[gate].float() + 1e-6
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    save_file(tensors, theirs / "model.safetensors")
    import_model(theirs, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors)
    export_model(tmp_path / "ours", tmp_path / "wide", dtype="F32")
    assert_same(tensors_of(tmp_path / "wide"), {name: tensor.float() for name, tensor in tensors.items()})
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", rest_full(KINDS, 2))
@torch.no_grad()
def test_transformers_computes_and_generates_ours_without_the_original(tmp_path: Path, kind: str) -> None:
    import transformers

    model = tiny_model(kind)
    import_model(save(model, tmp_path / "theirs"), tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours/huggingface")  # config.json then comes only from our configuration
    out = export_model(tmp_path / "ours", tmp_path / "back")
    assert out.like is None
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids, (ours, _) = torch.arange(24).view(2, 12), load_imported(tmp_path / "ours")
    for expected in (model(ids).logits, logits(ours, ids)):
        assert float((again(ids).logits - expected).abs().max()) <= 1e-5
    again.generation_config.eos_token_id = None  # so that no sequence ends early
    for cache in (True, False):
        made = again.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache)
        assert torch.equal(made, continued(ours, ids, 6, cached=cache)), cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": {"selection_bias": True}}, "selection_bias=true"),
        ({"router": {"scale": 2.0}}, "scale=2.0"),
        ({"groups": {"all": {"num_identity": 1}}}, "num_identity=1"),
        ({"groups": {"more": {"num_experts": 1, "top_k": 1, "ffn_dim": 4}}}, ""),
        ({"router": {"selection_bias": True}, "groups": {"all": {"num_null": 8}}}, "copies change the choices"),
    ],
)
def test_what_families_do_not_have_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import_model(save(tiny_model("mixtral"), tmp_path / "theirs"), tmp_path / "ours")
    change_config(tmp_path / "ours", change)
    with refused(ConfigError, message):
        export_model(tmp_path / "ours", tmp_path / "back", family="mixtral")


def change_config(folder: Path, change: dict[str, Any]) -> None:
    """Changes `model.moe` in an import's state.json, and updates the file's digest."""
    from moe_dist.checkpoint.contents import checksums_of

    step = folder / "step_0"
    state = json.loads((step / "state.json").read_text())
    for key, values in change.items():
        for name, value in values.items():
            moe = state["values"]["config"]["model"]["moe"][key]
            moe[name] = {**moe[name], **value} if isinstance(value, dict) and name in moe else value
    files = {"index.json": (step / "index.json").read_bytes(), "state.json": json.dumps(state).encode()}
    (step / "state.json").write_bytes(files["state.json"])
    (step / "SHA256SUMS").write_bytes(checksums_of(files, state["save_id"]))


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    import_model(save(tiny_model("mixtral"), tmp_path / "theirs"), tmp_path / "ours")
    shard = tmp_path / "ours/step_0/shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with refused(DataError):
        export_model(tmp_path / "ours", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_weights_too_large_for_the_dtype_are_not_written_as_infinite(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3, 2] = 1e5  # float16's largest value is 65,504
    import_model(save(model, tmp_path / "theirs"), tmp_path / "ours")
    with pytest.raises(DataError, match=r"lm_head.weight: 1 of .* take --dtype float32 or bfloat16"):
        export_model(tmp_path / "ours", tmp_path / "back", dtype="F16")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_named_and_not_written(number: float) -> None:
    parts = [("good", slice(None), TensorPlace("w", (4,))), ("bad", slice(None), TensorPlace("w", (4,), 2))]
    stored = StoredTensor("w", (4,), torch.float32, parts)
    values = {"good": torch.ones(2), "bad": torch.tensor([1.0, number])}
    with pytest.raises(DataError, match=r"w: 1 of 4 numbers .*: bad of the checkpoint has such numbers"):
        stored.make(values.__getitem__)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    theirs = save(tiny_model("llama"), tmp_path / "theirs")
    import_model(theirs, tmp_path / "ours")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "ours").rglob("*"))
    with refused(ConfigError):
        import_model(theirs, tmp_path / "ours", ImportOptions(seed=1))
    with refused(ConfigError):
        export_model(tmp_path / "ours", theirs)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "ours").rglob("*")) == before
