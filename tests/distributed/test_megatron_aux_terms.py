"""With TP, CP and DP, Megatron's reduced gradients of the balance and z terms equal the gradients of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.moe.losses import ColumnTables, balance_terms, z_terms
from tests.support.cover import exhaustive
from tests.support.megatron_model import BALANCE, HIDDEN_DIM, Layout, Z, transformer_config
from tests.support.megatron_run import megatron, tracked
from tests.support.worlds import RankContext

pytestmark = pytest.mark.megatron


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def differences(rank: RankContext, layout: Layout) -> tuple[float, float, int, int]:
    """Returns the largest difference of the reduced router gradients, their largest value, and the sizes of TP and of
    TP x CP."""
    with megatron(layout) as state:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        from moe_dist.megatron.expert_layer import ExpertLayer

        config = transformer_config(layout)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = ExpertLayer(config, layout.settings, pg_collection=groups, layer_number=2)
        generator = torch.Generator().manual_seed(rank.rank)
        h_TD = torch.randn(24, HIDDEN_DIM, generator=generator)
        group_T = torch.randint(-1, 2, (24,), generator=generator)
        per_token, cp = config.calculate_per_token_loss, groups.cp.size()
        # Megatron's schedule sets this scale in a real run
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1.0 if per_token else float(cp)]))

        def terms(h_TD: torch.Tensor, group_T: torch.Tensor) -> Any:
            return layer.moe.router(h_TD, group_T)

        parameters = list(layer.moe.router.parameters())
        y = layer.watch.attach(1, h_TD.clone().requires_grad_(), terms(h_TD, group_T))
        ours = torch.autograd.grad(y.sum() * 0.0, parameters)
        whole = terms(gathered(h_TD), gathered(group_T))
        tables = ColumnTables.on(layer.placement.groups, torch.device("cpu"))
        loss = BALANCE * balance_terms(whole.aux.prob_LC, whole.counts.choices_LC, whole.counts.tokens_LG, tables).sum()
        loss = loss + Z * z_terms(whole.aux.log_z_squared_LG, whole.counts.tokens_LG).sum()
        expected = torch.autograd.grad(loss, parameters)

        # Megatron sums these gradients over TP and averages them over DP x CP. With a loss per token it sums them over
        # all ranks and divides by the number of tokens in the step.
        divisor = int(whole.counts.tokens_LG.sum()) if per_token else state.get_data_parallel_world_size() * cp
        worst = largest = 0.0
        for got, wanted in zip(ours, expected, strict=True):
            dist.all_reduce(got)
            worst = max(worst, float((got / divisor - wanted).abs().max()))
            largest = max(largest, float(wanted.abs().max()))
        tracked()  # resets the terms that Megatron recorded for this layer
        return worst, largest, groups.tp.size(), groups.tp_cp.size()


@pytest.mark.parametrize(
    ("tp", "cp", "per_token"), [(2, 2, True), (1, 2, False), exhaustive(1, 4, True), exhaustive(2, 1, False)]
)
@pytest.mark.slow
def test_the_shares_of_all_ranks_sum_to_the_term(
    run_in_world: Callable[..., list[Any]], tp: int, cp: int, per_token: bool
) -> None:
    layout = Layout(tp=tp, cp=cp, options={"calculate_per_token_loss": per_token})
    for worst, largest, tp_size, tp_cp_size in run_in_world(4, differences, layout):
        assert (tp_size, tp_cp_size) == (tp, tp * cp)
        assert worst <= 1e-6 < 1e-4 < largest
