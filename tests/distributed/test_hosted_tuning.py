"""Router tuning of transformers' models has the loss and gradients of the papers' equations, on one and on two ranks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.hf.host.banks import banks_of
from moe_dist.hf.source import weights_digest
from moe_dist.train.router_tuning.samples import Samples
from tests.distributed.test_hosted import LAYOUTS, ONE, in_float64, made_folder
from tests.support.cover import full, rest_full
from tests.support.engine_run import built_run, step_results
from tests.support.hosted import hosted_config
from tests.support.manifold import manifold_term_reference
from tests.support.tiny import IMAGE_IDS
from tests.support.tuning_samples import made_samples
from tests.support.worlds import RankContext

WEIGHT, BANDWIDTH = 2.0, 0.8
CHANGES: dict[str, Any] = {
    "train.only": "routers",
    "optimizer.clip_norm": None,
    "loss": {"balance": {"schedule": [[0, 0.0]]}, "z": 0.0},
}


def tuned(rank: RankContext, data: str, root: str, folder: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Takes three steps. Returns their losses, manifold terms and gradient norms, the samples and gradients of the first
    step, and the names of the changed parameters."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    config = hosted_config(data, root, {"folder": folder}, {**CHANGES, **changes})
    with in_float64(), built_run(config, world_size=rank.world_size) as run:
        run.saver().restore()
        parallel = run.training.parallel
        before = [each.parameter.detach().clone() for each in parallel.parameters]

        def keep(*_: Any) -> None:
            grads = {each.name.removeprefix("family."): each.parameter.grad for each in parallel.parameters}
            found.setdefault("gradients", {name: each.clone() for name, each in grads.items() if each is not None})

        run.training.optimizer.register_step_pre_hook(keep)
        results = step_results(run, 0, 3)
        now = zip(parallel.parameters, before, strict=True)
        return {
            **found,
            "steps": [[each.nll_M.sum() / each.labels_M.sum(), each.auxiliary, each.grad_norm] for each in results],
            "numbers": [number for batch in run.loader.batches(0) for number in batch.numbers],
            "changed": {each.name.removeprefix("family.") for each, old in now if bool((each.parameter != old).any())},
        }


def reference(folder: Path, samples: Samples, numbers: list[int], objective: str) -> tuple[list[float], dict[str, Tensor]]:
    """Returns the loss and the manifold term of RoMA's equations, computed with transformers' model one sample at a time,
    and the gradients of the last layer's router."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    model.set_experts_implementation("eager")
    bank, logits_TE = banks_of(model)[-1], list[Tensor]()
    model.get_submodule(bank.router).register_forward_hook(lambda _module, _inputs, output: logits_TE.append(output[0]))
    nats, terms, labels = [], [], 0
    for number in numbers:
        sample = samples.sample(number)
        inputs, last = np.concatenate([sample.prompt, sample.answer[:-1]]), len(sample.prompt) - 1
        logits_SV = model(input_ids=torch.from_numpy(inputs)[None]).logits[0]
        z_E = logits_TE.pop().view(len(inputs), -1)[last]
        scores_E = z_E.sigmoid() if model.config.model_type == "deepseek_v3" else z_E.exp()
        terms.append(manifold_term_reference(samples, number, scores_E / scores_E.sum(), BANDWIDTH, [-1]))
        answer, choices = torch.from_numpy(sample.answer), [each for each in sample.choices.tolist() if each >= 0]
        if objective == "tokens":
            nats.append(F.cross_entropy(logits_SV[last:], answer, reduction="sum"))
            labels += len(answer)
        elif choices:
            nats.append(logits_SV[last, choices].exp().sum().log() - logits_SV[last, choices[0]])
            labels += 1
    loss, term = sum(nats) / labels, WEIGHT * sum(terms) / len(numbers)
    (loss + term).backward()
    router = dict(model.get_submodule(bank.router).named_parameters())
    return [loss.item(), term.item()], {f"{bank.router}.{name}": each.grad for name, each in router.items()}


def sampled_folder(data: Path, root: Path, family: str, **changes: Any) -> tuple[Path, Path]:
    """Makes a model folder of the family, and samples for it. Returns both paths."""
    folder, made = root / "folder", root / "samples"
    made_folder(family, folder, **changes)
    model = hosted_config(data, root, {"folder": str(folder)}, {}).model
    options = {"model": model.model_dump(mode="json"), "checkpoint": weights_digest(folder)}
    return folder, made_samples(made, ids=(4, IMAGE_IDS[1]), layers=model.moe_layers, columns=8, **options)


@pytest.mark.parametrize(
    ("family", "objective", "layout", "refresh_every"),
    [
        ("olmoe", "tokens", "fsdp2", None),
        ("qwen3_moe", "choices", "uneven, recompute=block", 1),
        ("deepseek_v3", "tokens", "uneven", None),
        full("deepseek_v3", "choices", "fsdp2", 1),
        full("gpt_oss", "tokens", "uneven", None),  # it has one document per sequence
    ],
)
@pytest.mark.slow
def test_loss_and_gradient_are_the_equations_on_any_ranks(
    run_in_world: Callable[..., list[Any]],
    tiny_data: Path,
    tmp_path: Path,
    family: str,
    objective: str,
    layout: str,
    refresh_every: int | None,
) -> None:
    folder, made = sampled_folder(tiny_data, tmp_path, family)
    section = {"data": str(made), "last_layers": 1, "objective": objective, "refresh_every": refresh_every}
    changes = {"router_tuning": {**section, "weight": WEIGHT, "bandwidth": BANDWIDTH}}
    given = (str(tiny_data), str(tmp_path / "1"), str(folder))
    (one,) = run_in_world(1, tuned, *given, {**ONE, **changes})
    expected, gradients = reference(folder, Samples(made), one["numbers"], objective)
    np.testing.assert_allclose(one["steps"][0][:2], expected, rtol=1e-6)
    torch.testing.assert_close(one["gradients"], gradients, rtol=1e-5, atol=1e-8)
    assert one["changed"] == gradients.keys(), "the last layer's router alone"
    for other in run_in_world(2, tuned, *given, {**LAYOUTS[layout], **changes}):
        np.testing.assert_allclose(other["steps"], one["steps"], rtol=1e-9)
        torch.testing.assert_close(other["gradients"], one["gradients"], rtol=0, atol=1e-9)
        assert other["changed"] == one["changed"]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", *rest_full(["qwen3_moe", "deepseek_v3", "lfm2_moe"], keep=0)])
def test_cross_entropy_trains_routers_of_one_choice_unless_the_family_normalises_it(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path, family: str
) -> None:
    folder, made = sampled_folder(tiny_data, tmp_path, family, num_experts_per_tok=1)
    given = (str(tiny_data), str(tmp_path / "1"), str(folder))
    changes = {"router_tuning": {"data": str(made), "last_layers": 1, "weight": 0.0}}
    if family == "olmoe":
        (one,) = run_in_world(1, tuned, *given, {**ONE, **changes})
        assert min(norm for _, _, norm in one["steps"]) > 0
    else:
        with pytest.raises(Exception, match=f"routers of {family} give a token's single expert a constant weight"):
            run_in_world(1, tuned, *given, {**ONE, **changes})
