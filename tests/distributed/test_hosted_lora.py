"""LoRA on transformers' models (model.lora) has the loss and gradients of PEFT on one and two ranks, and reads and writes
PEFT's files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.errors import DataError
from moe_dist.formats.manifest import load_manifest
from moe_dist.inference.loaded_run import FolderModel, find_trained
from moe_dist.placement.parameter_names import ADAPTERS, Role
from tests.distributed.test_hosted import FSDP2, LAYOUTS, ONE, in_float64, made_folder, resumed
from tests.support.cover import full
from tests.support.engine_run import built_run, step_results
from tests.support.hosted import UNEVEN, hosted_config
from tests.support.invoked import invoke
from tests.support.worlds import RankContext
from tools import export_hf

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {
    "qwen3_moe": ["q_proj", "self_attn.o_proj"],
    "deepseek_v3": ["o_proj", "shared_experts.up_proj", "shared_experts.down_proj"],
    "gpt_oss": ["v_proj"],  # its expert stacks are transposed
}
CHANGES: dict[str, Any] = {
    "train.only": "adapters",
    "optimizer.clip_norm": None,
    "optimizer.lr": 0.01,
    "loss": {"balance": {"schedule": [[0, 0.0]]}, "z": 0.0},
}
ALL = {"train.only": None}  # all weights are trained


def adapted(folder: Path, family: str) -> dict[str, Any]:
    """Makes a base, and adapters by PEFT whose matrices B are not 0. Returns the configuration section `model`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made_folder(family, folder / "base")
    # PEFT mistakes the shared experts' projections for routed experts, unless they are in `target_parameters`.
    attention = [each for each in TARGETS[family] if "shared" not in each]
    others = [f"{each}.weight" for each in TARGETS[family] if "shared" in each]
    section = LoraConfig(
        r=2, lora_alpha=6, target_modules=attention, target_parameters=[*STACKS, *others], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), section)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.normal_(0.0, 0.05)
    model.save_pretrained(folder / "adapters")
    lora = {"rank": 2, "alpha": 6.0, "targets": TARGETS[family], "parameters": STACKS, "folder": str(folder / "adapters")}
    return {"folder": str(folder / "base"), "lora": lora}


def stepped(
    rank: RankContext, data: str, root: str, model: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Takes three steps in float64. Returns losses and gradient norms, the first gradients and batches, this rank's
    experts, and the roles of the weights that changed."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with (
        in_float64(),
        built_run(hosted_config(data, root, model, {**CHANGES, **changes}), world_size=rank.world_size) as run,
    ):
        run.saver().restore()
        parameters = run.training.parallel.parameters
        before = [each.parameter.detach().clone() for each in parameters]

        def keep(*_: Any) -> None:
            grads = {each.name.removeprefix("family."): each.parameter.grad for each in parameters}
            whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in grads.items()}
            found.setdefault("gradients", {name: each.clone() for name, each in whole.items() if each is not None})

        run.training.optimizer.register_step_pre_hook(keep)
        results = step_results(run, 0, 3)
        now = zip(parameters, before, strict=True)
        return {
            **found,
            "steps": [[each.nll_M.sum() / each.labels_M.sum(), each.grad_norm] for each in results],
            "batches": run.loader.batches(0),
            "local": list(run.placement.slots[run.mesh.ep_rank]),
            "changed": {each.role for each, old in now if bool((each.parameter != old).any())},
        }


def peft_model(base: Path, adapters: Path, **options: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters, **options)


def peft_step(folder: Path, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and gradients of a loop with PEFT, one document at a time. Gradients have the names and the per-expert
    shapes of hosted models."""
    model = peft_model(folder / "base", folder / "adapters", is_trainable=True).double()
    model.base_model.model.set_experts_implementation("eager")
    losses, labels = [], 0
    for batch in batches:
        for b in range(len(batch.tokens_BS)):
            for document in batch.documents_BS[b].unique():
                (at,) = torch.where(batch.documents_BS[b] == document)
                logits_SV, labels_S = model(input_ids=batch.tokens_BS[b, at][None]).logits[0], batch.labels_BS[b, at]
                losses.append(F.cross_entropy(logits_SV, labels_S, ignore_index=IGNORED, reduction="sum"))
                labels += int((labels_S != IGNORED).sum())
    loss: Any = sum(losses) / labels
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, each in model.named_parameters():
        if each.grad is not None:
            path, _, matrix = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
            if "experts" in path.removesuffix(".base_layer").rpartition(".")[2]:
                stack = "gate_up_proj" if path.endswith(".base_layer") else "down_proj"
                parts = each.grad.view(8, 2, -1) if matrix == "lora_A" else each.grad.view(-1, 2, 8).permute(2, 0, 1)
                gradients[f"{path.removesuffix('.base_layer')}.{stack}_{matrix}"] = parts
            else:
                gradients[f"{path}.{matrix}"] = each.grad
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3_moe", "uneven"),
        ("deepseek_v3", "fsdp2"),
        full("qwen3_moe", "ep2, fsdp2, recompute=experts"),
        full("deepseek_v3", "uneven, recompute=block"),
        full("gpt_oss", "uneven"),
    ],
)
def test_loss_and_gradients_are_those_of_peft_on_any_ranks(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str, layout: str
) -> None:
    """Reads adapters that PEFT wrote. Training leaves the base bit-equal."""
    model, world = adapted(tmp_path, family), LAYOUTS[layout].get("parallel.edp", 1) * LAYOUTS[layout]["parallel.ep"]
    (one,) = run_in_world(1, stepped, str(tiny_data), str(tmp_path / "1"), model, ONE)
    loss, gradients = peft_step(tmp_path, one["batches"])
    assert float(one["steps"][0][0]) == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(one["gradients"], gradients, rtol=1e-7, atol=1e-12)
    assert one["changed"] == ADAPTERS
    for other in run_in_world(world, stepped, str(tiny_data), str(tmp_path / "n"), model, LAYOUTS[layout]):
        np.testing.assert_allclose(other["steps"], one["steps"], rtol=1e-9)
        expected = {name: each[other["local"]] if each.ndim == 3 else each for name, each in one["gradients"].items()}
        torch.testing.assert_close(other["gradients"], expected, rtol=1e-8, atol=1e-12)
        assert other["changed"] == {Role.ADAPTER, Role.EXPERT_ADAPTER}


def test_new_adapters_do_not_depend_on_the_ranks(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """New adapters do not change the model's outputs at first (B is 0), and training is equal on one and two ranks."""
    made_folder("qwen3_moe", tmp_path / "base")
    lora = {"rank": 3, "alpha": 6.0, "targets": TARGETS["qwen3_moe"], "parameters": STACKS}
    model = {"folder": str(tmp_path / "base"), "lora": lora}
    (one,) = run_in_world(1, stepped, str(tiny_data), str(tmp_path / "1"), model, ONE)
    (base,) = run_in_world(1, stepped, str(tiny_data), str(tmp_path / "0"), {"folder": model["folder"]}, {**ONE, **ALL})
    assert float(one["steps"][0][0]) == pytest.approx(float(base["steps"][0][0]), rel=1e-12)
    for other in run_in_world(2, stepped, str(tiny_data), str(tmp_path / "n"), model, UNEVEN):
        np.testing.assert_allclose(other["steps"], one["steps"], rtol=1e-9)
    config = hosted_config(tiny_data, tmp_path, model, CHANGES)
    run: Any = FolderModel(tmp_path / "base", 0, config, load_manifest(config.data.path)).load(torch.device("cpu"))
    drawn = {name: each for name, each in run.named_parameters() if "lora" in name}
    assert all(bool(each.any()) == name.endswith("A") for name, each in drawn.items())


@pytest.mark.parametrize("family", ["deepseek_v3", full("qwen3_moe"), full("gpt_oss")])
def test_a_run_goes_on_and_peft_loads_its_adapters(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str
) -> None:
    """A run of two ranks with 5 and 3 experts is saved after step 2. Resumed, it is bit-equal. With its exported adapters
    or merged model, transformers computes the checkpoint's logits. A base with other weights is refused."""
    from transformers import AutoModelForCausalLM

    model = adapted(tmp_path, family)
    reports = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**CHANGES, **UNEVEN}, 2)[0]
    again = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**CHANGES, **UNEVEN}, None)[0]
    other = run_in_world(2, resumed, str(tiny_data), str(tmp_path), model, {**CHANGES, **FSDP2}, None)[0]
    for key in ("loss", "norm"):
        assert [each[key] for each in again] == [each[key] for each in reports[2:]], key
        assert [float(each[key]) for each in other] == pytest.approx([float(each[key]) for each in again], rel=1e-5), key
    for out, options in {"peft": ["--adapters"], "merged": []}.items():
        result = invoke(export_hf.main, tmp_path / "tiny", "--out", tmp_path / out, *options)
        assert result.exit_code == 0, result.output
    run: Any = find_trained(tmp_path / "tiny").load(torch.device("cpu"))
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        ours, _ = run(ids, torch.arange(26)[None], torch.zeros_like(ids), torch.zeros_like(ids))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
        torch.testing.assert_close(peft_model(tmp_path / "base", tmp_path / "peft")(input_ids=ids).logits, ours)
    torch.testing.assert_close(merged, ours)
    assert (base - ours).abs().max() > 1e-2
    made_folder(family, tmp_path / "base", seed=1)
    with pytest.raises(DataError, match=r"base': its weights have the digest .* were trained on"):
        find_trained(tmp_path / "tiny").load(torch.device("cpu"))
