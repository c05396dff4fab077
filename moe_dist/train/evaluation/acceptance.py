"""Compares the held-out losses of a finished run with those of unigram and bigram models of the training tokens. Also
compares the run's routing with expected values. All functions are pure."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_dist.monitor.routing_hints import DROPPED
from moe_dist.monitor.sinks.console import Check
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.placement.placement import ExpertGroup

TEXT_MARGIN = 1.0  # nats per token by which the text loss must be below the unigram model's loss
NO_FILLER_RATIO = 0.8  # upper limit of (picture loss without background cells) / (the unigram model's loss)
ABLATION_MARGIN = 0.2  # nats per token by which the loss must rise without the experts' output
NULL_TOLERANCE = 0.05  # largest difference between the fraction of choices that go to null experts and its expected value


def run_checks(
    names: Sequence[str],
    evaluation: EvaluationResult,
    baselines: Mapping[str, float],
    *,
    choices_LC: np.ndarray,
    tokens_LG: np.ndarray,
    dropped_L: np.ndarray,
    groups: Sequence[ExpertGroup],
    skipped_steps: int,
    window: int,
    even_active: Mapping[str, float] | None = None,
) -> list[Check]:
    """Returns the results of the checks `names`, except loss checks without baseline, and routing checks if `window` is 0.

    Args:
        names: Names of the checks in the order of display (`evaluation.checks`).
        baselines: Held-out losses of unigram and bigram models in nats per token, from the manifest.
        choices_LC, tokens_LG, dropped_L: Routing counts and numbers of dropped pairs, summed over the last `window` steps.
        window: Number of steps over which routing counts are summed; 0 if no step was taken.
        even_active: Maps a group to the expected number of true experts per token. Only groups are listed in which a
            controller or a null-expert weight makes this number differ from top_k x true experts / all experts.
    """
    checks: dict[str, Callable[[], list[Check]]] = {
        "count_models": lambda: loss_checks(evaluation.loss, baselines),
        "experts_matter": lambda: ablation_checks(evaluation),
        "no_dead_expert": lambda: [dead_expert_check(choices_LC, groups, window)] if window else [],
        "few_drops": lambda: [drop_check(choices_LC, dropped_L, groups, window)] if window else [],
        "null_fraction": lambda: null_checks(choices_LC, tokens_LG, groups, even_active or {}) if window else [],
        "no_step_skipped": lambda: [Check("no step skipped", f"{skipped_steps} skipped", "0", skipped_steps == 0)],
    }
    return [check for name in names for check in checks[name]()]


def ablation_checks(evaluation: EvaluationResult) -> list[Check]:
    """Checks that the loss of each modality rises by at least `ABLATION_MARGIN` without the experts' output."""
    rises = {
        name: evaluation.ablated_loss[name] - loss
        for name, loss in evaluation.loss.items()
        if name in evaluation.ablated_loss and not name.endswith("_no_filler")
    }
    rule = f">= {ABLATION_MARGIN}"
    return [
        Check(f"experts matter to {name}", f"+{rise:.3f} nats without them", rule, rise >= ABLATION_MARGIN)
        for name, rise in rises.items()
    ]


def loss_checks(loss: Mapping[str, float], baselines: Mapping[str, float]) -> list[Check]:
    """Compares held-out losses with baselines. The picture loss must be below the loss of the left bigram model. Without
    background cells, it must be at most `NO_FILLER_RATIO` times the unigram model's loss. The text loss must be at least
    `TEXT_MARGIN` below the unigram model's loss."""
    checks = []

    def check(what: str, value: float, rule: str, passed: bool) -> None:
        checks.append(Check(f"held-out {what} loss", f"{value:.3f} nats", rule, passed))

    for name, value in loss.items():
        unigram, bigram = baselines.get(f"{name}/unigram"), baselines.get(f"{name}/left_bigram")
        if name.endswith("_no_filler"):
            if unigram is not None:
                bound = NO_FILLER_RATIO * unigram
                rule = f"<= {bound:.3f} ({NO_FILLER_RATIO} x unigram)"
                check(f"{name.removesuffix('_no_filler')} without filler", value, rule, value <= bound)
        elif f"{name}_no_filler" in loss and bigram is not None:
            check(name, value, f"< {bigram:.3f} (left bigram)", value < bigram)
        elif unigram is not None:
            bound = unigram - TEXT_MARGIN
            check(name, value, f"<= {bound:.3f} (unigram - {TEXT_MARGIN})", value <= bound)
    return checks


def dead_expert_check(choices_LC: np.ndarray, groups: Sequence[ExpertGroup], window: int) -> Check:
    """Checks that each true expert of each layer was chosen at least once in the last `window` steps."""
    num_experts = sum(group.num_experts for group in groups)
    dead = int((choices_LC[:, :num_experts] == 0).sum())
    total = choices_LC.shape[0] * num_experts
    return Check("no dead expert", f"{dead} of {total} unused", f"0 in the last {window} steps", dead == 0)


def drop_check(choices_LC: np.ndarray, dropped_L: np.ndarray, groups: Sequence[ExpertGroup], window: int) -> Check:
    """Checks that in each layer the capacity dropped less than the fraction `DROPPED` of the (token, expert) pairs."""
    pairs_L = choices_LC[:, : sum(group.num_experts for group in groups)].sum(1)
    worst = float((dropped_L / np.maximum(pairs_L, 1)).max())
    rule = f"< {DROPPED:.0%} in the last {window} steps"
    return Check("few dropped pairs", f"{worst:.1%} in a layer", rule, worst < DROPPED)


def null_checks(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], even_active: Mapping[str, float]
) -> list[Check]:
    """Checks in each group that the fraction of choices that go to null experts is close to (null experts / all experts).

    If `even_active` lists a group, another fraction is expected: the group's tokens choose this number of true experts, and
    their remaining choices are spread evenly over all experts that are not true experts.
    """
    num_experts, checks = sum(group.num_experts for group in groups), []
    for index, group in enumerate(groups):
        choices = group.top_k * tokens_LG[:, index].sum()
        if group.num_null and choices:
            nulls = sum(other.num_null for other in groups[:index])  # null experts' columns come after all true experts'
            share = choices_LC[:, num_experts + nulls : num_experts + nulls + group.num_null].sum() / choices
            load = even_active.get(group.name, group.expected_experts_per_token)
            others = group.num_columns - group.num_experts
            expected = (1.0 - load / group.top_k) * group.num_null / others
            passed, rule = abs(share - expected) <= NULL_TOLERANCE, f"{expected:.3f} +- {NULL_TOLERANCE}"
            checks.append(Check(f"null fraction of {group.name}", f"{share:.3f}", rule, passed))
    return checks
