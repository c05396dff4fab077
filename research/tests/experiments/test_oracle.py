"""Routing that is fitted to labels moves only the intended logits."""

from pathlib import Path

import pytest
import torch

from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.inference.likelihood import Continuation, Likelihood
from moe_dist.inference.multiple_choice import likeliest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import Routing
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker
from research.experiments import oracle
from research.experiments.oracle import Oracle, check_routers
from research.experiments.tokens import recorded_routers

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[2] / "configs/reproduce/base.yaml"
VOCAB, LAYERS = 32, 3
MANIFEST = Manifest.model_construct(modalities={"text": ((0, VOCAB),)}, pad_id=0)
GROUPS = torch.tensor([0])
QUESTIONS = [
    [Continuation((1, 2 + n, 9), (20 + choice,) * (1 + (choice + n) % 2)) for choice in range(4)] for n in range(20)
]
ANSWERS = [n % 4 for n in range(20)]


def make_model(std: float = 0.4) -> Transformer:
    group = "{num_experts: 4, top_k: 2, ffn_dim: 16, modalities: [text, image]}"
    sizes = {
        "hidden_dim": 16,
        "num_layers": LAYERS,
        "num_heads": 2,
        "num_kv_heads": 1,
        "vocab_size": VOCAB,
        "max_seq_len": 16,
    }
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    config = load_config(BASE, [*overrides, f"model.moe.groups={{all: {group}}}"])
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement(groups, (tuple(groups[0].experts),))
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=3, std=std)
    return model.eval()


def answered(model: Transformer) -> list[int]:
    likelihood = Likelihood(model, MANIFEST, group_of_modality=[0], max_seq_len=16)
    return [likeliest(likelihood(choices), choices, "normalised") for choices in QUESTIONS]


def make_oracle(model: Transformer, *places: int) -> Oracle:
    return Oracle(model, SampleMaker(MANIFEST), group_of_modality=GROUPS, places=places)


def right(taken: list[int]) -> int:
    return sum(one == other for one, other in zip(taken, ANSWERS, strict=True))


def test_without_a_step_it_is_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "STEPS", 0)
    model = make_model()
    assert make_oracle(model, 1, 2)(QUESTIONS, ANSWERS) == answered(model)


def test_it_answers_more_and_leaves_the_model_as_it_was() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = answered(model)
    assert right(make_oracle(model, 0, 1, 2)(QUESTIONS, ANSWERS)) > right(alone) + 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert answered(model) == alone, "no hook is left"


def test_questions_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    together = make_oracle(model, 1)(QUESTIONS, ANSWERS)
    monkeypatch.setattr(oracle, "_BATCH", 1)
    assert make_oracle(model, 1)(QUESTIONS, ANSWERS) == together


def test_logits_move_by_the_offset_in_the_chosen_layer_at_the_scored_tokens() -> None:
    """An answer of two tokens follows a prompt of three, so positions 2 and 3 have the scored labels."""
    model = make_model()
    changed = make_oracle(model, 1)
    batch = changed._batch([Continuation((1, 2, 9), (20, 21))])
    offset_BLC = torch.tensor([[[1.0, -2.0, 0.5, 3.0]]])
    seen: list[list[Routing]] = []
    for scored_BS in (batch.labels_BS >= 0, torch.zeros_like(batch.labels_BS, dtype=torch.bool)):
        with changed._moved(scored_BS, offset_BLC), recorded_routers(model) as routings:
            forward(model, batch, GROUPS)
        seen.append([each.routing for each in routings])
    assert (batch.labels_BS >= 0).tolist() == [[False, False, True, True]]
    moved, alone = ([each.aux.prob_LC[0] for each in routings] for routings in seen)
    torch.testing.assert_close(moved[0], alone[0], rtol=0, atol=0)
    router = model.moe_modules()[1].router
    h_TD = torch.randn(4, 16)
    logits_TC = h_TD @ router.get_submodule("group:all").true.T  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]
    with torch.no_grad(), changed._moved(torch.tensor([[False, False, True, True]]), offset_BLC):
        found = router(h_TD, torch.zeros(4, dtype=torch.int64)).aux.prob_LC[0]
    logits_TC[2:] += offset_BLC[0]
    torch.testing.assert_close(found, logits_TC.softmax(-1).sum(0))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.moe.groups.all.num_null=2"], r"top_k over all \(8 true of 10 columns\)"),
        (["model.moe.router.kind=expert_choice", "model.moe.router.causal=threshold"], "expert_choice over all"),
    ],
    ids=str,
)
def test_routers_that_it_cannot_move_are_refused(overrides: list[str], named: str) -> None:
    check_routers(load_config(BASE).model.moe)
    with pytest.raises(ConfigError, match=f"asks: oracle: .* not {named}.*; leave it"):
        check_routers(load_config(BASE, [*overrides, "loss.balance.schedule=[[0, 0.0]]", "loss.z=0.0"]).model.moe)
