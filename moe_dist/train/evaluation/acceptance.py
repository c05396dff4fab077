"""Checks a finished run against count models of its training tokens, and against expected routing. Pure functions."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_dist.monitor.sinks.console import Check
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.placement.placement import ExpertGroup

TEXT_MARGIN = 1.0  # nats below the unigram model
NO_FILLER_RATIO = 0.8  # of the unigram model's loss, on cells that are not background
ABLATION_MARGIN = 0.2  # nats by which the loss must rise when experts are set to zero
NULL_TOLERANCE = 0.05


def run_checks(
    names: Sequence[str],
    evaluation: EvaluationResult,
    baselines: Mapping[str, float],
    *,
    choices_LC: np.ndarray,
    tokens_LG: np.ndarray,
    groups: Sequence[ExpertGroup],
    skipped_steps: int,
    window: int,
    even_active: Mapping[str, float] | None = None,
) -> list[Check]:
    """The checks of `evaluation.checks`, as far as the data's baselines and the steps of this attempt allow.

    Args:
        names: Of `evaluation.checks`, in the order of display.
        baselines: Held-out nats per token of count models, from the data set's manifest.
        choices_LC, tokens_LG: Routing counts summed over the last `window` steps; 0 steps if the attempt took none.
        skipped_steps: Over the whole run.
        even_active: Expected true experts per token by group, where a controller or a null weight makes them differ from k
            n / columns.
    """
    checks: dict[str, Callable[[], list[Check]]] = {
        "count_models": lambda: loss_checks(evaluation.loss, baselines),
        "experts_matter": lambda: ablation_checks(evaluation),
        "no_dead_expert": lambda: [dead_expert_check(choices_LC, groups, window)] if window else [],
        "null_fraction": lambda: null_checks(choices_LC, tokens_LG, groups, even_active or {}) if window else [],
        "no_step_skipped": lambda: [Check("no step skipped", f"{skipped_steps} skipped", "0", skipped_steps == 0)],
    }
    return [check for name in names for check in checks[name]()]


def ablation_checks(evaluation: EvaluationResult) -> list[Check]:
    """Setting the experts' output to zero must raise each modality's loss by `ABLATION_MARGIN`."""
    return [
        Check(
            f"experts matter to {name}",
            f"+{evaluation.ablated_loss[name] - loss:.3f} nats without them",
            f">= {ABLATION_MARGIN}",
            evaluation.ablated_loss[name] - loss >= ABLATION_MARGIN,
        )
        for name, loss in evaluation.loss.items()
        if name in evaluation.ablated_loss and not name.endswith("_no_filler")
    ]


def loss_checks(loss: Mapping[str, float], baselines: Mapping[str, float]) -> list[Check]:
    """Pictures must beat the left bigram, and without background cells the unigram by a fifth; text must beat the
    unigram."""
    checks = []
    for name, value in loss.items():
        unigram, bigram = baselines.get(f"{name}/unigram"), baselines.get(f"{name}/left_bigram")
        if name.endswith("_no_filler"):
            if unigram is not None:
                bound = NO_FILLER_RATIO * unigram
                rule = f"<= {bound:.3f} ({NO_FILLER_RATIO} x unigram)"
                checks.append(
                    _loss_check(f"held-out {name.replace('_no_filler', '')} without filler", value, rule, value <= bound)
                )
        elif f"{name}_no_filler" in loss and bigram is not None:
            checks.append(_loss_check(f"held-out {name}", value, f"< {bigram:.3f} (left bigram)", value < bigram))
        elif unigram is not None:
            bound = unigram - TEXT_MARGIN
            rule = f"<= {bound:.3f} (unigram - {TEXT_MARGIN})"
            checks.append(_loss_check(f"held-out {name}", value, rule, value <= bound))
    return checks


def dead_expert_check(choices_LC: np.ndarray, groups: Sequence[ExpertGroup], window: int) -> Check:
    """Every expert of every layer must be used within the window."""
    num_experts = sum(group.num_experts for group in groups)
    dead = int((choices_LC[:, :num_experts] == 0).sum())
    total = choices_LC.shape[0] * num_experts
    return Check("no dead expert", f"{dead} of {total} unused", f"0 in the last {window} steps", dead == 0)


def null_checks(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], even_active: Mapping[str, float]
) -> list[Check]:
    """Each group's share of null choices must match the even share, m over the group's columns. With a controlled number of
    true experts, the remaining choices are divided among null and other zero-computation columns in proportion."""
    num_experts, checks = sum(group.num_experts for group in groups), []
    for index, group in enumerate(groups):
        choices = group.top_k * tokens_LG[:, index].sum()
        if group.num_null and choices:
            nulls = sum(other.num_null for other in groups[:index])
            share = choices_LC[:, num_experts + nulls : num_experts + nulls + group.num_null].sum() / choices
            load = even_active.get(group.name, group.expected_experts_per_token)
            others = group.num_columns - group.num_experts
            expected = (1.0 - load / group.top_k) * group.num_null / others
            checks.append(
                Check(
                    f"null fraction of {group.name}",
                    f"{share:.3f}",
                    f"{expected:.3f} +- {NULL_TOLERANCE}",
                    abs(share - expected) <= NULL_TOLERANCE,
                )
            )
    return checks


def _loss_check(name: str, value: float, rule: str, passed: bool) -> Check:
    return Check(f"{name} loss", f"{value:.3f} nats", rule, passed)
