"""Qwen3-MoE++, the published form of models with null, copy and constant experts, keeps every bit through import and
export."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.errors import ConfigError
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from tests.support.agreement import assert_agree
from tests.support.imported import load_imported, logits_of
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.plus_plus import their_model
from tests.support.served import GROUP, ONE, logits, our_gradients, run_readme, saved_model, their_gradients
from tests.support.tiny import tiny_dataset
from tests.support.tiny_hf import VOCAB, save, tiny_model
from tests.unit.hf.test_round_trip import assert_same, tensors_of
from tools.export_hf import main as export_hf
from tools.import_hf import main as import_hf

HEAD = {"model.qk_norm": "head"}


def published(folder: Path, kinds: dict[str, int], *, normalise: bool, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a Qwen3-MoE of transformers and adds zero-computation experts as ZEDA does. Returns the folder."""
    model = tiny_model("qwen3_moe", norm_topk_prob=normalise, num_experts_per_tok=4)
    save(model.to(dtype), folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")  # ZEDA uses the field's name in transformers 4
    generator, dim, first = torch.Generator().manual_seed(3), config["hidden_size"], config["num_experts"]
    for layer in range(config["num_hidden_layers"]):
        mlp, index = f"model.layers.{layer}.mlp", first
        rows = torch.randn(sum(kinds.values()), dim, generator=generator).to(dtype) * 0.2
        tensors[f"{mlp}.gate.weight"] = torch.cat([tensors[f"{mlp}.gate.weight"], rows])
        for kind, count in kinds.items():
            for expert in range(index, index + count) if kind == "constant" else ():
                tensors[f"{mlp}.experts.{expert}.constant"] = torch.randn(dim, generator=generator).to(dtype)
                tensors[f"{mlp}.experts.{expert}.wg.weight"] = torch.randn(2, dim, generator=generator).to(dtype)
            index += count
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    zce = {"use_zce_mask": False, "zce_types": list(kinds), "zce_nums": list(kinds.values())}
    types = {"architectures": ["Qwen3MoePlusPlusForCausalLM"], "model_type": "qwen3_moe_plus_plus"}
    (folder / "config.json").write_text(json.dumps(config | types | zce, indent=2))
    return folder


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kinds", [{"zero": 4}, {"zero": 2, "copy": 2, "constant": 3}], ids=str)
@torch.no_grad()
def test_the_function_and_the_bits_come_back(tmp_path: Path, kinds: dict[str, int], normalise: bool) -> None:
    folder = published(tmp_path / "theirs", kinds, normalise=normalise)
    done = import_model(folder, tmp_path / "ours", shard_bytes=5000)
    assert (done.family, list(done.unread)) == ("qwen3_moe_plus_plus", [])
    tokens = torch.arange(20).view(2, 10) % VOCAB
    ours, _ = logits_of(load_imported(tmp_path / "ours")[0], tokens)
    torch.testing.assert_close(ours, their_model(folder)(tokens).logits, rtol=1e-5, atol=1e-5)
    assert export_model(tmp_path / "ours", tmp_path / "back").family == "qwen3_moe_plus_plus"
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_zce_mask": True}, "use_zce_mask"),
        ({"zce_types": ["copy", "zero", "constant"]}, "zce_types"),
        ({"zce_types": ["zero"]}, "zce_nums"),
        ({"zce_nums": [2, 2, 0]}, "zce_nums"),
        ({"zce_nums": None}, "zce_nums"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = published(tmp_path / "theirs", {"zero": 2, "copy": 2, "constant": 3}, normalise=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with refused(ConfigError, message):
        import_model(folder, tmp_path / "ours")


def test_a_trained_model_leaves_in_it(tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data")
    free = {"model.moe.groups": {"all": {**GROUP, "num_identity": 1, "num_constant": 2, "top_k": 4}}} | HEAD
    for number, normalise in enumerate(("none", "all_chosen")):
        run, out = tmp_path / f"run{number}", tmp_path / f"out{number}"
        ours = saved_model(run, tmp_path / "data", free | {"model.moe.router": {"kind": "top_k", "normalise": normalise}})
        assert export_model(run, out, family="qwen3_moe_plus_plus").folded == 0
        tokens, model = torch.arange(1, 21).view(2, 10), their_model(out)  # no padding (id 0), because it gets no gradient
        torch.testing.assert_close(model(tokens).logits, logits(ours, tokens), rtol=1e-5, atol=1e-5)
        blocks = {
            f"model.layers.{layer}.mlp.{name}": tensor.requires_grad_()
            for layer, each in enumerate(model.model.layers)
            for name, tensor in each.mlp.tensors.items()
        }
        assert_agree(their_gradients(out, model, tokens, blocks), our_gradients(ours, tokens))
        import_model(out, tmp_path / f"again{number}")
        again, _ = load_imported(tmp_path / f"again{number}")
        for (name, wanted), (_, found) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(found, wanted), name


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's commands write an export with model code. The README's Python lines then generate the same tokens as
    the reference."""
    folder = published(tmp_path / "theirs", {"zero": 2, "copy": 2, "constant": 3}, normalise=True)
    import_model(folder, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    commands = {"import-hf": import_hf, "export-hf": export_hf}
    for command, arguments in re.findall(r"^\$ moe-dist (\S+) (.*)$", Path("README.md").read_text(), re.MULTILINE):
        done = invoke(commands.pop(command), *arguments.split())
        assert done.exit_code == 0, done.output
    assert not commands
    capsys.readouterr()
    run_readme(tmp_path / "out", monkeypatch, lines=4)  # three lines, and one with torch in place of a tokenizer
    expected = their_model(folder).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ONE | HEAD | {"model.moe.router": {"kind": "top_k", "null_logit": "single", "normalise": "none"}}, "null_logit"),
        (ONE | HEAD, "normalise=true_chosen"),
        (ONE | HEAD | {"model.moe.router": {"kind": "top_k", "selection_bias": True}}, "selection_bias"),
        (ONE | {"model.moe.router": {"kind": "top_k", "normalise": "none"}}, "qk_norm"),
        (HEAD, "model.moe.groups"),
        (ONE | HEAD | {"model.moe.router": {"kind": "group_limited"}, "loss.balance.schedule": [[0, 0]]}, "group_limited"),
    ],
    ids=["single", "normalise", "bias", "qk_norm", "groups", "sigmoid"],
)
def test_what_it_does_not_have_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tiny_dataset(tmp_path / "data")
    saved_model(tmp_path / "run", tmp_path / "data", change)
    with refused(ConfigError, message):
        export_model(tmp_path / "run", tmp_path / "out", family="qwen3_moe_plus_plus")
