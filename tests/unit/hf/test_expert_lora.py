"""LoRA on the experts of an imported MoE. With the saved adapters, PEFT's model has our logits and gradients. The merged
model has the same logits. The frozen base gets no gradients, and backward computes no matrix products for them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.adapters import export_adapters, peft_tensors
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from moe_dist.hf.peft_files import WEIGHTS_FILE
from moe_dist.hf.plan import ImportOptions
from moe_dist.parallel.initialise import logical_expert_names
from moe_dist.placement.parameter_names import EXPERTS, named_parameters
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.loop.peft_folder import write_adapters
from tests.support.adapted import MOLE, Adapted
from tests.support.agreement import arrays, assert_agree
from tests.support.chat_folders import chat_folder
from tests.support.cover import full
from tests.support.imported import load_imported, logits_of
from tests.support.invoked import invoke
from tests.support.messages import refused
from tests.support.served import run_readme
from tests.support.tiny_hf import LENGTH, VOCAB, save, tiny_model
from tools.export_hf import main as export_hf

LORA, SMALLER = {"rank": 3, "alpha": 5.0}, {"rank": 2, "alpha": 3.0, "targets": ["q", "o"]}
CLAMPED = {**LORA, "kind": "clamped_ffn_lora"}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH)))
CASES: dict[str, dict[str, Any]] = {
    "each": {"ffn": LORA, "attention": SMALLER},
    "shared": {"ffn": {**LORA, "shared": True}},
    "down": {"ffn": {**LORA, "targets": ["down"]}},
    "shared expert": {"ffn": {**LORA, "shared_expert": True}, "attention": SMALLER},
    "clamped": {"ffn": {**CLAMPED, "swiglu_limit": 1.5}, "attention": SMALLER},
    "clamped, shared": {"ffn": {**CLAMPED, "shared": True, "targets": ["gate_up"]}},
    "latent": {"ffn": LORA, "attention": {**SMALLER, "targets": ["q_down", "q_up", "kv_down", "kv_up", "o"]}},
    "latent keys": {"ffn": {**LORA, "targets": ["gate_up"]}, "attention": {**SMALLER, "targets": ["q", "kv_down"]}},
}


def imported(folder: Path, kind: str = "mixtral", seed: int = 1) -> Path:
    import_model(save(tiny_model(kind, seed=seed), folder / "theirs"), folder / "ours", shard_bytes=50_000)
    return folder / "ours"


def loss_of(adapted: Adapted) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros_like(TOKENS)
    logits, _ = adapted.model(TOKENS, torch.arange(LENGTH).expand(len(TOKENS), -1), zeros, zeros)
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def by_name(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Returns gradients by logical name."""
    found: dict[str, torch.Tensor] = {}
    for each in named_parameters(adapted.model):
        if each.parameter.grad is None:
            continue
        if each.role in EXPERTS:
            names = logical_expert_names(each.name, adapted.layout.placement, 0)
            found |= dict(zip(names, each.parameter.grad, strict=True))
        else:
            found[each.name] = each.parameter.grad
    return found


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("mixtral", "each"),
        full("mixtral", "shared"),
        full("qwen2_moe", "shared expert"),
        full("gpt_oss", "clamped"),
        full("glm4_moe", "each"),
        ("deepseek_v3", "latent"),
        full("ernie4_5_moe", "each"),
        full("gpt_oss plain", "clamped, shared"),
        full("glm4_moe plain", "shared"),
        full("deepseek_v3 plain", "latent keys"),
        *(full("qwen2_moe", case) for case in ("each", "shared", "down")),
    ],
)
def test_experts_have_the_numbers_of_peft(tmp_path: Path, kind: str, case: str) -> None:
    """Logits and gradients must agree with PEFT's to 1e-5 of the largest entry, for both layouts of the experts'
    matrices."""
    import transformers
    from peft import PeftModel

    base = imported(tmp_path, kind)
    expected, _ = logits_of(load_imported(base)[0], TOKENS)
    adapted = Adapted(base, tmp_path / "run", **CASES[case])
    assert torch.equal(logits_of(adapted.model, TOKENS)[0], expected), "new adapters change nothing"
    adapted.draw()
    adapted.save()
    export_adapters(tmp_path / "run", tmp_path / "adapter", base_name="theirs")
    theirs: Any = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "adapter"), is_trainable=True)
    logits = theirs(TOKENS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    mine, loss = loss_of(adapted)
    loss.backward()
    assert_agree({"logits": mine.detach().numpy()}, {"logits": logits.detach().numpy()})
    assert (mine - expected).abs().max() > 1e-2
    gradients = by_name(adapted)
    wanted = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    model = adapted.config.model
    got = dict(peft_tensors(model, gradients.__getitem__))
    if CASES[case]["ffn"].get("shared"):  # PEFT has one copy per expert; sums the copies' gradients
        wanted = {name: summed(name, gradient, model.moe.groups["all"].num_experts) for name, gradient in wanted.items()}
    assert all(gradient.any() for gradient in wanted.values())
    assert_agree(arrays(got), arrays(wanted))
    assert {each.name for each in named_parameters(adapted.model) if each.parameter.requires_grad} == {
        each.name for each in named_parameters(adapted.model) if each.parameter.grad is not None
    }
    export_model(tmp_path / "run", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        assert_agree({"logits": merged(TOKENS).logits.numpy()}, {"logits": mine.detach().numpy()})


def summed(name: str, gradient: torch.Tensor, experts: int) -> torch.Tensor:
    """Replaces each expert's gradient in PEFT's form by the sum over the experts."""
    rows, columns = gradient.shape
    each = gradient.view((experts, -1, columns) if "lora_A" in name else (rows, -1, experts))
    return each.sum(0 if "lora_A" in name else 2, keepdim=True).expand_as(each).reshape(gradient.shape)


@pytest.mark.parametrize(("kind", "experts"), [("mixtral", 1), ("llama", 4)])
def test_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, experts: int
) -> None:
    """The README's lines find the base model. If the import made the experts, the README also gives the command that writes
    the base. The generated text equals the merged model's."""
    from peft import PeftModel

    chat_folder(save(tiny_model(kind, vocab_size=512, intermediate_size=24), tmp_path / "theirs"), "chatml")
    import_model(tmp_path / "theirs", tmp_path / "ours", ImportOptions(experts=experts, experts_top_k=min(experts, 2)))
    adapted = Adapted(tmp_path / "ours", tmp_path / "run", **CASES["each"])
    adapted.draw()
    adapted.save()
    export_adapters(tmp_path / "run", tmp_path / "adapter")
    told = (tmp_path / "adapter/README.md").read_text()
    if experts > 1:
        (command,) = re.findall(r"^\$ moe-dist export-hf (.*) --out BASE$", told, re.MULTILINE)
        done = invoke(export_hf, command, "--out", tmp_path / "adapter/BASE")
        assert done.exit_code == 0, done.output
    capsys.readouterr()
    run_readme(tmp_path / "adapter", monkeypatch, lines=4)  # three lines, and one that loads the adapters
    with_adapters = capsys.readouterr().out
    export_model(tmp_path / "run", tmp_path / "merged")
    run_readme(tmp_path / "merged", monkeypatch, lines=3)
    assert capsys.readouterr().out == with_adapters
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda model, folder: model)
    run_readme(tmp_path / "adapter", monkeypatch, lines=4)
    assert capsys.readouterr().out != with_adapters


def test_a_finished_run_writes_them(tmp_path: Path) -> None:
    """Adapters are written once, beside the checkpoints. The log gives the reason if PEFT cannot express them."""
    adapted = Adapted(imported(tmp_path), tmp_path / "run/checkpoints", **CASES["each"])
    adapted.save()
    folder, out = RunFolder(tmp_path / "run"), tmp_path / "run/adapters/step_3"
    for _ in range(2):
        assert write_adapters(adapted.config, folder, 3) == f"adapters in PEFT's form: {out}"
    assert len(load_file(out / WEIGHTS_FILE)) == 2 * (4 + 4)  # in both layers: A and B of two stacks and two projections
    (tmp_path / "dense").mkdir()
    experts = Adapted(imported(tmp_path / "dense", "llama"), tmp_path / "mole/checkpoints", group=MOLE, experts=LORA)
    experts.save()
    told = write_adapters(experts.config, RunFolder(tmp_path / "mole"), 3)
    assert told.startswith("no adapters in PEFT's form: model.moe.experts.kind=lora: PEFT has no router")
    assert not (tmp_path / "mole/adapters").exists()
    whole = adapted.config.model_copy(update={"train": adapted.config.train.model_copy(update={"only": None})})
    assert write_adapters(whole, folder, 4) == ""


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = imported(tmp_path)
    with refused(ConfigError, "model.moe.experts.dropout=0.1"):
        Adapted(base, tmp_path / "other", ffn={**LORA, "dropout": 0.1})
    with refused(ConfigError, "model.moe.experts.shared_expert=true"):
        Adapted(base, tmp_path / "other", ffn={**LORA, "shared_expert": True})
    (tmp_path / "gpt").mkdir()
    for fields in (LORA, CLAMPED):  # a clamp at 1.5
        with refused(
            ConfigError, f"kind={fields.get('kind', 'ffn_lora')} adapts the experts", "limit: 1.5", "swiglu_limit"
        ):
            Adapted(imported(tmp_path / "gpt" / str(len(fields)), "gpt_oss"), tmp_path / "other", ffn=fields)
    with refused(ConfigError, "holds no adapters"):
        export_adapters(base, tmp_path / "adapter")
    Adapted(base, tmp_path / "run", ffn=LORA).save()
    base.rename(tmp_path / "away")
    (tmp_path / "second").mkdir()
    imported(tmp_path / "second", seed=3).rename(base)
    for export in (export_adapters, export_model):
        with refused(DataError, "its content hash is"):
            export(tmp_path / "run", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapters_that_peft_would_put_elsewhere_are_refused(tmp_path: Path) -> None:
    base = imported(tmp_path, "ernie4_5_moe")
    Adapted(base, tmp_path / "run", ffn={**LORA, "shared_expert": True}).save()
    with refused(ConfigError, "PEFT takes mlp.shared_experts.gate_proj of ernie4_5_moe for a routed expert"):
        export_adapters(tmp_path / "run", tmp_path / "adapter")
