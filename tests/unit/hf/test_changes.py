"""Changes by an import keep the model's outputs: with null experts they are bit-equal, with copied FFNs equal up to
rounding."""

from pathlib import Path

import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.hf.exporting import export_model
from moe_dist.hf.importing import import_model
from moe_dist.hf.plan import ImportOptions
from tests.support.cover import full
from tests.support.imported import load_imported, logits_of, manager
from tests.support.messages import refused
from tests.support.tiny_hf import save, tiny_model
from tests.unit.hf.test_round_trip import assert_same, tensors_of

TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "null", "choices"),
    [
        ("mixtral", 8, (3, 4)),
        full("olmoe", 16, (7, 8, 9)),
        full("qwen3_moe", 24, (9, 12)),
        ("qwen2_moe dense", 8, (5, 6)),
    ],
)
def test_null_experts_change_no_bit(tmp_path: Path, kind: str, null: int, choices: tuple[int, ...]) -> None:
    theirs = save(tiny_model(kind), tmp_path / "theirs")
    import_model(theirs, tmp_path / "plain")
    plain, pairs = logits_of(load_imported(tmp_path / "plain")[0], TOKENS)
    for top_k in choices:
        import_model(theirs, tmp_path / f"null{top_k}", ImportOptions(null_experts=null, top_k=top_k))
        found, pairs_with_null = logits_of(load_imported(tmp_path / f"null{top_k}")[0], TOKENS)
        assert pairs_with_null == pairs
        assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImportOptions(null_experts=8, top_k=2), ""),
        (ImportOptions(null_experts=8, top_k=5), ""),
        (ImportOptions(null_experts=8), "--top-k=None"),
        (ImportOptions(null_experts=12, top_k=3), "num_null=12"),
        (ImportOptions(top_k=3), "--null-experts"),
        (ImportOptions(experts=4, experts_top_k=2), ""),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_would(tmp_path: Path, options: ImportOptions, message: str) -> None:
    theirs = save(tiny_model("mixtral"), tmp_path / "theirs")
    with refused(ConfigError, message):
        import_model(theirs, tmp_path / "ours", options)
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "glm4_moe plain"])
def test_copies_of_rows_beside_a_selection_bias_are_refused(tmp_path: Path, kind: str) -> None:
    theirs = save(tiny_model(kind), tmp_path / "theirs")
    with refused(ConfigError, "--null-experts=8", kind.split()[0]):
        import_model(theirs, tmp_path / "ours", ImportOptions(null_experts=8, top_k=5))


def test_null_experts_that_are_still_copies_are_left_out_on_the_way_back(tmp_path: Path) -> None:
    theirs = save(tiny_model("olmoe", dtype=torch.bfloat16), tmp_path / "theirs")
    import_model(theirs, tmp_path / "ours", ImportOptions(null_experts=16, top_k=8))
    assert export_model(tmp_path / "ours", tmp_path / "back").folded == 16
    assert_same(tensors_of(tmp_path / "back"), tensors_of(theirs))
    model, state = load_imported(tmp_path / "ours")
    rows = model.get_parameter("layers.1.moe.router.group:all.null")
    with torch.no_grad():
        rows[3, 5] += 1e-3  # as a training step would change it
    manager(tmp_path / "trained").save(7, state)
    with refused(ConfigError, "num_null=16"):
        export_model(tmp_path / "trained", tmp_path / "not", family="olmoe")


def test_weights_that_were_trained_are_what_is_written(tmp_path: Path) -> None:
    """A run that trained an imported model saves fp32 weights, and its only link to the import is `run.init_from`."""
    theirs = save(tiny_model("qwen2_moe", dtype=torch.bfloat16), tmp_path / "theirs")
    import_model(theirs, tmp_path / "ours")
    model, state = load_imported(tmp_path / "ours")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    manager(tmp_path / "trained").save(3, state)
    out = export_model(tmp_path / "trained", tmp_path / "back")
    assert out.like == tmp_path / "ours/huggingface"
    assert_same(tensors_of(tmp_path / "back"), {n: t.float() * 1.001 for n, t in tensors_of(theirs).items()})


def test_copies_of_a_dense_ffn_are_the_same_function(tmp_path: Path) -> None:
    import transformers

    model = tiny_model("llama")
    theirs = save(model, tmp_path / "theirs")
    import_model(theirs, tmp_path / "ours", ImportOptions(experts=4, experts_top_k=2, seed=5))
    ours, pairs = logits_of(load_imported(tmp_path / "ours")[0], TOKENS)
    with torch.no_grad():
        dense = model(TOKENS).logits
    assert pairs == 2 * 2 * TOKENS.numel()
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    assert export_model(tmp_path / "ours", tmp_path / "back").family == "mixtral"  # Mixtral can express the result
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)
    routers = [t for n, t in tensors_of(tmp_path / "back").items() if n.endswith("block_sparse_moe.gate.weight")]
    assert len({float(rows.sum()) for rows in routers}) == 2  # each layer's router was drawn separately
    assert all(0.01 < float(rows.std()) < 0.04 for rows in routers)
