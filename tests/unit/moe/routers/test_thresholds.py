"""Thresholds follow the k-th largest score. With calibrated thresholds each expert takes the same share of tokens as in
training."""

from typing import Any

import pytest
import torch

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.selection import choice_of_training
from moe_dist.moe.thresholds import ThresholdUpdater, updated
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.build.training import build_model
from moe_dist.train.evaluation.evaluator import calibrate
from moe_dist.train.evaluation.heldout import heldout_losses
from tests.support.counts import counts_with
from tests.support.layouts import Layout, batch_of, config_of, placement_of

GROUPS = (ExpertGroup("text", 2, 0, 1, 4, 0, ("text",)), ExpertGroup("image", 1, 0, 1, 4, 2, ("image",)))


def slow(cuts: list[float], decay: float) -> float:
    """Computes the running mean one number at a time."""
    mean = 0.0
    for step, cut in enumerate(cuts):
        weight = max(1 / (step + 1), 1 - decay)
        mean = (1 - weight) * mean + weight * cut
    return mean


def test_the_threshold_is_the_running_mean_and_its_correction_stays() -> None:
    cuts = torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    threshold = mean = steps = torch.zeros(2).double()
    for step in range(40):
        threshold, mean, steps = updated(threshold, mean, steps, cuts[step], decay=0.8)
        if step == 20:
            threshold = threshold + torch.tensor([0.1, -0.2])
    for expert, correction in enumerate((0.1, -0.2)):
        assert threshold[expert].item() == pytest.approx(slow(cuts[:, expert].tolist(), 0.8) + correction, abs=1e-8)
    first, _, _ = updated(*torch.zeros(3, 2), torch.tensor([0.3, 0.7]), decay=0.8)
    torch.testing.assert_close(first, torch.tensor([0.3, 0.7]))


def test_all_layers_and_groups_are_followed_and_a_group_without_tokens_waits() -> None:
    routers = [ExpertChoiceRouter(RouterContext(3, GROUPS), causal="threshold", threshold_decay=0.8) for _ in range(2)]
    updater = ThresholdUpdater([router.gates() for router in routers], 0.8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    series: dict[tuple[int, int], list[float]] = {}
    for step in range(6):
        tokens_LG = torch.tensor([[10, 7], [10, 7]]) * torch.tensor([1, int(step != 2)])
        tokens_LE = tokens_LG[:, [0, 0, 1]].double()
        kth_score_LE = torch.rand(2, 3, generator=generator).double()
        updater.after_step(counts_with(kth_score_LE=kth_score_LE * tokens_LE, tokens_LG=tokens_LG.double()))
        for layer in range(2):
            for expert in range(3):
                if tokens_LE[layer, expert]:
                    series.setdefault((layer, expert), []).append(kth_score_LE[layer, expert].item())
    for (layer, expert), cuts in series.items():
        gate = routers[layer].gates()[int(expert == 2)]
        assert abs(gate.threshold[expert % 2].item() - slow(cuts, 0.8)) < 1e-6
        assert gate.statistics[1, expert % 2] == len(cuts)


def model_of(layout: Layout = Layout(choice="rank")) -> Any:
    placement = placement_of("interleaved", 1, layout.groups)
    model = build_model(config_of(layout), placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=0, std=0.3)
    return model


def loads(model: Any, batches: list[Any]) -> Any:
    """Returns how many tokens each expert of each layer takes, [L, E]."""
    options: dict[str, Any] = {"modalities": ("text", "image"), "group_of_modality": torch.tensor([0, 1]), "world": None}
    return heldout_losses(model, batches, **options).counts.choices_LC


def test_calibrated_thresholds_give_each_expert_the_load_of_training() -> None:
    """Scopes have one modality, both modalities, or only padding. The first layer gets the same inputs as in training, so
    its counts are equal. The causal choice changes the inputs of later layers, so their counts are only close."""
    model = model_of()
    batches = [batch_of(0, 0, first, 1) for first in range(8)] + [batch_of(1, 1, first, 1) for first in range(8)]
    with choice_of_training([layer.router for layer in model.moe_modules()], 0):
        wanted_LE = loads(model, batches)
    running = loads(model, batches)
    assert abs(running[0] / wanted_LE[0] - 1).max() > 0.5, "thresholds of 0 let everything through"
    calibrate(model, batches, group_of_modality=torch.tensor([0, 1]), world=None, steps=0)
    got_LE = loads(model, batches)
    assert got_LE[0].tolist() == wanted_LE[0].tolist()
    assert abs(got_LE.sum(1) / wanted_LE.sum(1) - 1).max() < 0.1
    before = [gate.threshold.clone() for layer in model.moe_modules() for gate in layer.router.gates()]
    calibrate(model, [], group_of_modality=torch.tensor([0, 1]), world=None, steps=0)
    text = [batch_of(0, 0, 1, 1)]  # without image tokens, image experts keep their thresholds
    calibrate(model, text, group_of_modality=torch.tensor([0, 1]), world=None, steps=0)
    after = [gate.threshold for layer in model.moe_modules() for gate in layer.router.gates()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False, True]


def test_a_calibration_is_for_the_capacities_of_the_last_step() -> None:
    model = model_of()
    routers = [layer.router for layer in model.moe_modules()]
    for router in routers:
        router.capacity_schedule = ((0, 1.0), (3, 0.5))
    batches = [batch_of(0, 0, first, 1) for first in range(8)]
    taken = []
    for steps in (3, 4):
        with choice_of_training(routers, steps):
            wanted_E = loads(model, batches)[0]
        calibrate(model, batches, group_of_modality=torch.tensor([0, 1]), world=None, steps=steps)
        assert loads(model, batches)[0].tolist() == wanted_E.tolist()
        taken.append(wanted_E.sum())
    assert taken[1] < 0.7 * taken[0]


@pytest.mark.parametrize("choice", ["rank", None])
def test_calibrated_depths_compute_the_share_of_training(choice: str | None) -> None:
    """Layer 0 computes a share of 0.3 of the tokens, and its experts choose among these. With token choice, only
    mixture of depths has a threshold."""
    model = model_of(Layout(choice=choice, mixture_of_depths="rank"))
    batches = [batch_of(0, 0, first, 1) for first in range(8)]
    taken: list[int] = []
    choices: list[torch.Tensor] = []
    (mixture_of_depths,) = model.depth_routers()
    experts = model.moe_modules()[0].router
    hooks = [
        mixture_of_depths.register_forward_hook(lambda module, inputs, found: taken.append(int(found.counts.taken_P))),
        experts.register_forward_hook(lambda module, inputs, found: choices.append(found.counts.choices_LC[0])),
    ]
    loads(model, batches)
    everything = sum(taken)
    taken.clear()
    choices.clear()
    model.eval()
    calibrate(model, batches, group_of_modality=torch.tensor([0, 1]), world=None, steps=0)
    assert not mixture_of_depths.training, "it is as it was"
    wanted, wanted_E = sum(taken), torch.stack(choices).sum(0)
    assert wanted == pytest.approx(0.3 * everything, abs=len(batches))
    taken.clear()
    got_E = loads(model, batches)[0]
    for hook in hooks:
        hook.remove()
    assert sum(taken) == wanted
    # Over all batches the layer computes as many tokens as in training. In a single batch its tokens may differ from
    # training's, so the loads of its experts are only close.
    assert abs(got_E.sum() / wanted_E.sum() - 1) < 0.1
