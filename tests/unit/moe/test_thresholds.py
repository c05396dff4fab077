"""Thresholds follow the k-th largest score, and their correction keeps the load where tokens of a set are alike."""

import torch

from moe_dist.moe.routers.expert_choice import STATISTICS, ExpertChoiceRouter
from moe_dist.moe.thresholds import ThresholdKeeper, updated
from moe_dist.placement.placement import ExpertGroup

GROUPS = (ExpertGroup("text", 2, 0, 1, 4, 0, ("text",)), ExpertGroup("image", 1, 0, 1, 4, 2, ("image",)))


def slow(cuts: list[float], above: list[float], taken: list[float], decay: float) -> float:
    """The equations of the module, one number at a time."""
    threshold = mean = spread = shares = correction = 0.0
    for step, (q, a, t) in enumerate(zip(cuts, above, taken, strict=True)):
        w = max(1 / (step + 1), 1 - decay)
        if step == 0:
            threshold = mean = q
            continue
        spread += w * (abs(q - threshold) - spread)
        shares += w * (abs(a - t) - shares)
        mean += w * (q - mean)
        correction += w * (a - t) * (spread / shares if shares else 0.0)
        threshold = mean + correction
    return threshold


def test_the_update_is_the_one_that_is_written_down() -> None:
    generator = torch.Generator().manual_seed(0)
    cuts, above, taken = torch.rand(3, 40, 2, generator=generator, dtype=torch.double)
    above[5] = taken[5]
    threshold, statistics = torch.zeros(2).double(), torch.zeros(STATISTICS, 2).double()
    for step in range(40):
        threshold, statistics = updated(threshold, statistics, cuts[step], above[step], taken[step], decay=0.8)
    for expert in range(2):
        series = [each[:, expert].tolist() for each in (cuts, above, taken)]
        assert abs(threshold[expert].item() - slow(*series, 0.8)) < 1e-12


def trained(*, corrected: bool) -> tuple[float, float]:
    """Share of tokens above the threshold, and share taken, over later sets of tokens that are alike and skewed."""
    generator = torch.Generator().manual_seed(3)
    threshold, statistics, shares = torch.zeros(1).double(), torch.zeros(STATISTICS, 1).double(), []
    size, capacity = 64, 0.25
    for step in range(6000):
        mean = torch.rand(1, generator=generator).pow(3) * 6 - 2  # of the set's tokens: mostly low, now and then high
        score = (mean + torch.randn(size, generator=generator)).sigmoid().double()
        cut = score.sort(descending=True).values[16 - 1 : 16]
        above = (score > threshold).double().mean()[None]
        if step >= 2000:
            shares.append(above.item())
        given = above if corrected else torch.full((1,), capacity).double()
        threshold, statistics = updated(threshold, statistics, cut, given, torch.full((1,), capacity).double(), decay=0.99)
    return sum(shares) / len(shares), capacity


def test_the_load_of_training_is_kept_where_a_mean_alone_loses_it() -> None:
    mean_alone, wanted = trained(corrected=False)
    assert abs(mean_alone / wanted - 1) > 0.1
    corrected, wanted = trained(corrected=True)
    assert abs(corrected / wanted - 1) < 0.02


def test_all_layers_and_groups_are_followed_and_a_group_without_tokens_waits() -> None:
    routers = [ExpertChoiceRouter(3, GROUPS, causal="threshold", threshold_decay=0.8) for _ in range(2)]
    keeper = ThresholdKeeper(routers)
    generator = torch.Generator().manual_seed(0)
    series: dict[tuple[int, int], list[list[float]]] = {}
    for step in range(6):
        tokens_LG = torch.tensor([[10, 7], [10, 7]]) * torch.tensor([1, int(step != 2)])
        tokens_LE = tokens_LG[:, [0, 0, 1]].double()
        shares = torch.rand(3, 2, 3, generator=generator).double()
        keeper(*(share * tokens_LE for share in shares), tokens_LG.double())
        for layer in range(2):
            for expert in range(3):
                if tokens_LE[layer, expert]:
                    series.setdefault((layer, expert), []).append(shares[:, layer, expert].tolist())
    for (layer, expert), rows in series.items():
        gate = routers[layer].gates()[int(expert == 2)]
        got = gate.threshold[expert % 2].item()
        assert abs(got - slow(*map(list, zip(*rows, strict=True)), 0.8)) < 1e-6
        assert gate.statistics[3, expert % 2] == len(rows)
