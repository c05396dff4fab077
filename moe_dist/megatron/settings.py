"""Defines the settings that Megatron's configuration lacks: expert groups, null experts, router and placement.

The settings come from an `ExpertSettings`, or from the YAML file whose path is in the variable MOE_DIST_EXPERTS. Sizes,
precision, parallelism and loss coefficients stay in Megatron's configuration. This file imports neither torch nor megatron.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from moe_dist.config.base.section import Count, GroupName, Section, Violation
from moe_dist.config.model_schema import GroupSection, MoESection, modality_violations
from moe_dist.config.parallel.section import InterleavedSection, PlacementSection
from moe_dist.config.partial import draft
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import expert_groups, make_placement

GUIDE = "docs/megatron.md"
VARIABLE = "MOE_DIST_EXPERTS"


class ExpertSettings(Section):
    """The experts of every MoE layer of a Megatron model."""

    groups: dict[GroupName, GroupSection] = Field(min_length=1, description="Groups of experts by name.")
    router: TopKRouterSection = Field(default_factory=TopKRouterSection, description="How tokens choose experts.")
    placement: PlacementSection = Field(
        default_factory=InterleavedSection, description="Which rank of Megatron's EP group holds which expert."
    )
    balance: Literal["null_averaged", "vanilla"] = Field(
        default="null_averaged", description="Null experts share one averaged load (AdaMoE), or each has its own."
    )
    seed: Count = Field(default=0, description="Seed of the routers' and experts' initial weights.")
    expert_pair_budget: PositiveInt | None = Field(
        default=None,
        description="(token, expert) pairs a rank's experts compute at once; beyond it they run in recomputed chunks.",
    )
    expert_gemm: Literal["auto", "grouped", "loop"] = Field(
        default="auto",
        description="The experts' products: torch's grouped GEMM, a loop over experts, or whichever is faster.",
    )
    max_receive_rows: PositiveInt | None = Field(
        default=None, description="Bound of the rows a rank may receive in one layer, an error before the buffer is made."
    )

    def expert_groups(self) -> tuple[ExpertGroup, ...]:
        """Returns the groups as `ExpertGroup`s. Experts are numbered over all groups."""
        return expert_groups(MoESection.model_construct(groups=self.groups))  # `groups` is already validated

    def group_of_modality(self) -> tuple[int, ...]:
        """Returns the index of each modality's group, in the order in which the groups list the modalities."""
        return tuple(index for index, group in enumerate(self.expert_groups()) for _ in group.modalities)

    def place(self, num_ranks: int) -> ExpertPlacement:
        """Assigns the experts to the `num_ranks` ranks of an EP group. Raises ConfigError if the placement is invalid."""
        return make_placement(self.placement, self.expert_groups(), num_ranks=num_ranks, token_mix={})

    def violations(self) -> list[Violation]:
        broken = [*modality_violations(self.groups, "groups")]
        for name, group in self.groups.items():
            for violation in group.violations():
                keys = tuple(f"groups.{name}.{key}" for key in violation.keys)
                broken.append(Violation(keys, f"groups.{name}: {violation.problem}"))
            for field in ("num_identity", "num_constant"):
                key = f"groups.{name}.{field}"
                if count := getattr(group, field):
                    problem = "zero-computation experts are not covered inside Megatron; set 0"
                    broken.append(Violation((key,), f"{key}={count}: {problem}"))
        if self.router.selection_bias:
            problem = "not covered inside Megatron; set false, and balance by moe_aux_loss_coeff"
            broken.append(Violation(("router.selection_bias",), f"router.selection_bias=true: {problem}"))
        return broken


def read_settings(path: str | Path) -> ExpertSettings:
    """Reads the YAML file with the settings. If the file is invalid, raises a ConfigError that lists all problems."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"expert settings {str(path)!r} cannot be read: {reason}", see=GUIDE) from error
    values, problems = load_yaml(text)
    if not isinstance(values, dict):
        problems = problems or [f"must be a mapping with the key groups, got {type(values).__name__}"]
        raise ConfigError([f"{path}: {problem}" for problem in problems], see=GUIDE)
    read = draft(ExpertSettings, values)
    broken = [] if read.value is None else read.broken(read.value.violations())
    if read.value is None or problems or read.problems or broken:
        raise ConfigError([f"{path}: {problem}" for problem in (*problems, *read.problems, *broken)], see=GUIDE)
    return read.value


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> ExpertSettings:
    """Reads the file that MOE_DIST_EXPERTS names. Raises ConfigError if the variable is not set or the file is invalid."""
    path = environment.get(VARIABLE)
    if not path:
        raise ConfigError(
            f"{VARIABLE} is not set; set it on every rank to the path of the experts' YAML file, or build the spec with "
            "decoder_layer_spec(settings)",
            see=GUIDE,
        )
    return read_settings(path)
