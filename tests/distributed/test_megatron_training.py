"""Without null experts our layer equals Megatron's own MoE layer. It works with Megatron's optimizer and checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.placement.placement import ExpertPlacement
from tests.support.cover import exhaustive
from tests.support.megatron_model import (
    BALANCE,
    MOE_LAYERS,
    ONE_GROUP,
    Layout,
    TokenBatch,
    batch_of,
    causal_mask,
    gpt_model,
    gradients_of,
    largest_difference,
    megatron_tensors,
    our_loss,
    our_model,
    place_of,
    set_weights,
    transformer_config,
)
from tests.support.megatron_run import SEQUENCES, backward, build, checkpoint_writers, megatron, own_sequences, wrapped
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron

LR, CLIP, STEPS = 1e-2, 0.3, 3
ADAM_EPS = 1e-3  # so large that a rounding error does not become a whole step of Adam


# --- Megatron's own MoE layer


def stock_names(tensors: dict[str, torch.Tensor], placement: ExpertPlacement, ep_rank: int) -> dict[str, torch.Tensor]:
    """Renames a rank's parameters of our layer to Megatron's names. Megatron's layer has one module per expert, and one
    matrix for gate and up."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".mlp.moe.experts." not in name:
            name = name.replace("mlp.moe.router.group:all.true", "mlp.router.weight")
            renamed[name.replace("mlp.moe.shared.", "mlp.shared_experts.")] = tensor
    for layer in MOE_LAYERS:
        prefix = f"decoder.layers.{layer}.mlp"
        gate, up, down = (tensors[f"{prefix}.moe.experts.group:all.{name}"] for name in ("gate", "up", "down"))
        for slot in range(len(placement.slots[ep_rank])):
            expert = f"{prefix}.experts.local_experts.{slot}"
            renamed[f"{expert}.linear_fc1.weight"] = torch.cat([gate[slot], up[slot]])
            renamed[f"{expert}.linear_fc2.weight"] = down[slot]
    return renamed


def forward_and_gradients(model: Any, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    backward(model.train(), batch, modalities=False)
    # The last forward has no autograd graph, because Megatron's dispatcher keeps its tensors. The graph would keep the
    # model and its process groups alive, so that each call would leave more groups in the standing world.
    with torch.no_grad():
        logits = model.eval()(batch.tokens_BS, batch.positions, causal_mask())
    return logits, gradients_of(model)


def beside_stock(rank: RankContext, layout: Layout) -> tuple[float, tuple[float, str], float]:
    with megatron(layout) as state:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        model, _, mine, _ = build(layout, state)
        placement, ep_rank = layout.settings.place(layout.ep), state.get_expert_model_parallel_rank()
        # Megatron divides this loss by top_k and by the number of data-parallel ranks. The coefficient undoes both.
        coefficient = BALANCE * 2 * state.get_data_parallel_world_size()
        config = transformer_config(Layout(ep=layout.ep, values=layout.values, options={"moe_aux_loss_coeff": coefficient}))
        stock = gpt_model(config, get_gpt_decoder_block_spec(config, False, normalization="RMSNorm"))
        set_weights(stock, stock_names(dict(model.module.named_parameters()), placement, ep_rank))
        logits, gradients = forward_and_gradients(model, mine)
        stock_logits, stock_gradients = forward_and_gradients(wrapped(stock, config), mine)
        expected = stock_names(gradients, placement, ep_rank)
        assert stock_gradients.keys() == expected.keys()
        scale = max(float(gradient.abs().max()) for gradient in stock_gradients.values())
        return float((logits - stock_logits).abs().max()), largest_difference(stock_gradients, expected), scale


@pytest.mark.parametrize("ep", [exhaustive(2), 4])
def test_megatrons_own_layer_gives_the_same_without_null_experts(run_in_world: Callable[..., list[Any]], ep: int) -> None:
    for logits, (gradients, where), scale in run_in_world(4, beside_stock, Layout(ep=ep, values=ONE_GROUP)):
        assert logits <= 1e-5
        assert gradients <= 1e-5, where
        assert scale > 1e-2


# --- optimizer and checkpoints


def optimizer_of(model: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    adam: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": ADAM_EPS}
    config = OptimizerConfig(optimizer="adam", clip_grad=CLIP, params_dtype=torch.float32, **adam)
    return get_megatron_optimizer(config, [model])


def take_step(model: Any, optimizer: Any, layout: Layout, step: int, state: Any) -> float:
    """Takes one step with Megatron's optimizer, and returns the gradient norm before clipping."""
    optimizer.zero_grad()
    backward(model, batch_of(SEQUENCES, layout.settings, seed=step).part(own_sequences(state)))
    successful, norm, _ = optimizer.step()
    assert successful
    return float(norm)


def our_steps(layout: Layout, steps: int) -> tuple[Any, list[float]]:
    """Trains the oracle, our model on one rank with torch's AdamW. Returns the model and the gradient norms."""
    model = our_model(layout.settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=ADAM_EPS, weight_decay=0.0)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, *_ = our_loss(model, batch_of(SEQUENCES, layout.settings, seed=step), layout.settings, aux=True)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return model, norms


def parameter_difference(model: Any, ours: Any, layout: Layout, state: Any) -> tuple[float, str]:
    parameters = {name: parameter.detach() for name, parameter in model.module.named_parameters()}
    return largest_difference(parameters, megatron_tensors(model.module, ours, place_of(layout, state)))


def saved_state(model: Any, optimizer: Any, *, is_loading: bool = False) -> dict[str, Any]:
    state = {"model": model.module.sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading)
    return state


def train_save_and_go_on(rank: RankContext, first: Layout, then: list[Layout]) -> dict[str, Any]:
    """Takes three steps on the layout `first` and saves a checkpoint. Takes a fourth step from this checkpoint on `first`
    and on each layout of `then`."""
    folder = Path(rank.folder) / "checkpoint"
    folder.mkdir(exist_ok=True)
    after_three, _ = our_steps(first, STEPS)
    after_four, all_norms = our_steps(first, STEPS + 1)
    outcome: dict[str, Any] = {"expected_norms": all_norms, "differences": []}
    with megatron(first) as state:
        from megatron.core import dist_checkpointing

        model, _, _, _ = build(first, state)
        optimizer = optimizer_of(model)
        outcome["norms"] = [take_step(model, optimizer, first, step, state) for step in range(STEPS)]
        outcome["differences"].append(parameter_difference(model, after_three, first, state))
        with checkpoint_writers():
            dist_checkpointing.save(saved_state(model, optimizer), str(folder))
    for layout in then:
        with megatron(layout) as state:
            model, _, _, _ = build(layout, state)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))  # a value that was not loaded stays NaN
            optimizer = optimizer_of(model)
            loaded = dist_checkpointing.load(saved_state(model, optimizer, is_loading=True), str(folder))
            model.module.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
            outcome["norms"].append(take_step(model, optimizer, layout, STEPS, state))
            outcome["differences"].append(parameter_difference(model, after_four, layout, state))
    return outcome


UNEVEN, EVEN, FOLDED = Layout(ep=4, uneven=True), Layout(ep=2), Layout(ep=4, tp=2)


@pytest.mark.parametrize(
    ("first", "then"), [exhaustive(UNEVEN, [UNEVEN, EVEN]), (FOLDED, [UNEVEN])], ids=["uneven", "folded"]
)
def test_trains_and_goes_on_from_a_checkpoint_at_any_ep(
    run_in_world: Callable[..., list[Any]], first: Layout, then: list[Layout]
) -> None:
    for outcome in run_in_world(4, train_save_and_go_on, first, then):
        expected = outcome["expected_norms"][:STEPS] + outcome["expected_norms"][STEPS:] * len(then)
        assert outcome["norms"] == pytest.approx(expected, rel=1e-5)
        assert expected[0] > CLIP  # gradients are clipped
        for difference, where in outcome["differences"]:
            assert difference <= 1e-5, where
