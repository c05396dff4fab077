"""A model with new adapters is bit-equal to its imported base, and its merged weights can be exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from tests.support.adapted import MOLE, ONE, Adapted
from tests.support.agreement import assert_agree
from tests.support.imported import load_imported, logits_of
from tests.support.messages import refused
from tests.support.tiny_hf import HIDDEN_DIM, LENGTH, VOCAB, save, tiny_model

LORA = {"rank": 3, "alpha": 5.0}
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH)))


def imported(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    import_model(save(tiny_model(kind, dtype=dtype), folder / "theirs"), folder / "ours", shard_bytes=5000)
    return folder / "ours"


@pytest.mark.parametrize("kind", ["llama", "llama biased"])
@pytest.mark.parametrize("group", [ONE, MOLE])
def test_the_base_is_itself_to_the_last_bit(tmp_path: Path, kind: str, group: dict[str, Any]) -> None:
    base = imported(tmp_path, kind)
    expected, _ = logits_of(load_imported(base)[0], TOKENS)
    adapted = Adapted(base, tmp_path / "run", group=group, experts=LORA, attention=LORA)
    got, pairs = logits_of(adapted.model, TOKENS)
    assert torch.equal(got, expected)
    assert pairs > 0
    assert "the base's, to the last bit in batches without padding" in adapted.report
    adapted.draw()
    assert not torch.allclose(logits_of(adapted.model, TOKENS)[0], expected, atol=1e-3)


def test_an_moe_base_keeps_its_experts_and_routers(tmp_path: Path) -> None:
    base = imported(tmp_path, "mixtral")
    expected, _ = logits_of(load_imported(base)[0], TOKENS)
    adapted = Adapted(base, tmp_path / "run", attention=LORA)
    assert torch.equal(logits_of(adapted.model, TOKENS)[0], expected)
    with refused(ConfigError):
        Adapted(base, tmp_path / "other", group=MOLE, experts=LORA)


MERGEABLE: dict[str, dict[str, Any]] = {
    "one expert": {"group": ONE, "experts": LORA, "attention": LORA},
    "one expert, two targets": {"group": ONE, "experts": {**LORA, "targets": ["gate", "down"]}},
    "attention alone": {"attention": {**LORA, "targets": ["q", "v"]}},
    "all experts at once": {
        "group": {"num_experts": 3, "top_k": 3},
        "experts": {**LORA, "weight": "straight_through"},
        "attention": LORA,
    },
    "twice as many experts as rows of down": {
        "group": {"num_experts": 2 * HIDDEN_DIM, "top_k": 2 * HIDDEN_DIM},
        "experts": {**LORA, "targets": ["down"], "weight": "straight_through"},
    },
}


@pytest.mark.parametrize("case", MERGEABLE)
def test_what_merges_computes_the_same_in_transformers(tmp_path: Path, case: str) -> None:
    import transformers

    adapted = Adapted(imported(tmp_path), tmp_path / "run", **MERGEABLE[case])
    adapted.draw()
    expected, _ = logits_of(adapted.model, TOKENS)
    adapted.save()
    done = export_model(tmp_path / "run", tmp_path / "out")
    assert (done.family, done.merged) == ("llama", True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert_agree({"logits": theirs(TOKENS).logits.numpy()}, {"logits": expected.numpy()})


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
def test_an_moe_base_goes_out_with_its_attention_merged(tmp_path: Path, kind: str) -> None:
    import transformers

    adapted = Adapted(imported(tmp_path, kind), tmp_path / "run", attention=LORA)
    adapted.draw()
    with torch.no_grad():  # training also changes routers
        for layer in adapted.model.moe_modules():
            layer.router.get_submodule("group:all").get_parameter("true").mul_(1.3)
    expected, _ = logits_of(adapted.model, TOKENS)
    adapted.save()
    export_model(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        assert_agree({"logits": theirs(TOKENS).logits.numpy()}, {"logits": expected.numpy()})


@pytest.mark.parametrize(
    ("group", "weight", "reason"),
    [
        ({"num_experts": 3, "top_k": 1}, "probability", "top_k=1"),
        ({"num_experts": 1, "num_null": 1, "top_k": 1}, "published", "num_null=1"),
        ({"num_experts": 2, "top_k": 2}, "probability", "weight=probability"),
    ],
)
def test_what_is_no_matrix_is_refused(tmp_path: Path, group: dict[str, Any], weight: str, reason: str) -> None:
    Adapted(imported(tmp_path), tmp_path / "run", group=group, experts={**LORA, "weight": weight}).save()
    with refused(ConfigError, reason):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("older", [False, True])
def test_a_base_given_by_a_relative_path_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """Checkpoints of older versions (`older`) store only the relative path of the base. The base must still be found."""
    monkeypatch.chdir(tmp_path)
    imported(Path("models"))
    adapted = Adapted(Path("models/ours"), Path("run"), group=ONE, experts=LORA)
    assert Path(adapted.base.path).is_absolute()
    if older:
        adapted.base = replace(adapted.base, path="models/ours/step_0", beside="")
    adapted.save()
    monkeypatch.chdir("/")
    assert export_model(tmp_path / "run", tmp_path / "out").merged
    (tmp_path / "later").mkdir()
    for name in ("models", "run"):
        (tmp_path / name).rename(tmp_path / "later" / name)
    assert export_model(tmp_path / "later/run", tmp_path / "again").merged
