"""Checks configuration, data set and placement against each other before a run, and reports every fault at once. Imports no
torch.

A run that passes has matching keys, shapes, experts, ranks and data. Costs a second or two: a pass over the lists of
lengths in the .idx files, and over up to 256 MiB of ids of each split.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.balance_rules import balance_violations
from moe_dist.config.index_header import largest_id
from moe_dist.config.init_rules import init_violations
from moe_dist.config.load import GUIDE, model_violations, read_draft
from moe_dist.config.lora_rules import lora_violations
from moe_dist.config.manifest import Manifest, SplitSection, load_manifest
from moe_dist.config.partial import PartialConfig
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation, sections_in
from moe_dist.config.split_files import check_split, count_by_modality
from moe_dist.config.tuning_rules import check_tuning_data, tuning_violations
from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.host import host_violations
from moe_dist.plan.planner import PlanComparison, compare
from moe_dist.plan.policies import expert_groups, make_placement, replicated_placement

_LOOKED_AT = 256 << 20  # bytes of ids checked in each split
_MIX_SCALE = 1_000_000  # a mix from weights counts tokens in a million


@dataclass(frozen=True)
class Preflight:
    """A run that passed the checks.

    Attributes:
        config: As loaded.
        manifest: Manifest of its data set.
        groups: Its expert groups as plain values.
        placement: Which expert lives on which rank.
        token_mix: Training tokens of each modality, in the proportions of the run.
        comparison: Costs of pinned and interleaved placement for that mix.
    """

    config: Config
    manifest: Manifest
    groups: tuple[ExpertGroup, ...]
    placement: ExpertPlacement
    token_mix: Mapping[str, int]
    comparison: PlanComparison


def check(config: Config, *, manifest: Manifest | None = None, world_size: int | None = None) -> Preflight:
    """Checks a configuration against its data set and its ranks.

    Args:
        manifest: Manifest of the data set; by default read from `data.path`.
        world_size: Number of started ranks, compared with parallel.ep x parallel.edp.

    Raises:
        ConfigError: lists every fault, those of the data included, if any is the configuration's.
        DataError: lists every fault, if all are the data's.
    """
    return _check(PartialConfig(config, ()), manifest, world_size)


def check_file(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Preflight:
    """Like `check`, but reads the file too: misspelt keys and wrong types are reported together with everything else.

    Raises:
        ConfigError, DataError: as `check`.
    """
    return _check(read_draft(path, overrides), None, world_size)


@dataclass(frozen=True)
class PlannedLayout:
    """Placement of experts for a configuration whose data need not exist.

    Attributes:
        groups, placement: As `Preflight`.
        token_mix: Training tokens of each modality; empty (all equal) if the data do not exist.
    """

    groups: tuple[ExpertGroup, ...]
    placement: ExpertPlacement
    token_mix: Mapping[str, int]


def layout_without_data(config: Config) -> PlannedLayout:
    """Checks everything that needs no data (for a dry run), and also the manifest if it exists.

    Raises:
        ConfigError, DataError: as `check`.
    """
    groups = expert_groups(config.model.moe)
    violations = _own_violations(config, groups)
    data_problems: list[str] = []
    manifest = _manifest_or_problem(config, [], data_problems)
    counted = False
    if manifest is not None:
        violations += manifest_violations(config, groups, manifest)
        counted = all(source.train.tokens_by_modality for source in manifest.sources.values())
    mix = token_mix(config, manifest) if manifest is not None and counted else {}
    placement = _placement_or_problem(config, groups, mix, violations)
    _raise_if_any([violation.problem for violation in violations], data_problems)
    if placement is None:
        raise AssertionError("a fault was found but not reported")
    return PlannedLayout(groups, placement, mix)


def _check(read: PartialConfig[Config], manifest: Manifest | None, world_size: int | None) -> Preflight:
    config = read.value
    if config is None:
        raise ConfigError(read.problems, see=GUIDE)
    groups = expert_groups(config.model.moe)
    violations = [*_own_violations(config, groups), *host_violations(config)]
    data_problems: list[str] = []
    if manifest is None:
        manifest = _manifest_or_problem(config, violations, data_problems)
    if manifest is not None:
        violations += manifest_violations(config, groups, manifest)
        data_problems += data_set_problems(config.data.path, manifest)
    violations += check_tuning_data(config, manifest, data_problems)
    if world_size not in (None, config.parallel.ep * config.parallel.edp):
        violations.append(_world_relation(config, world_size))
    sound = manifest is not None and not data_problems
    mix = token_mix(config, manifest) if sound and manifest else {}
    placement = _placement_or_problem(config, groups, mix, violations)

    problems = [*read.problems, *read.broken(violations)]
    _raise_if_any(
        problems,
        [] if _distrusted(read, "data.path") else data_problems,
        pages="docs/data.md" if config.router_tuning is None else "docs/data.md, docs/router-tuning.md",
    )
    if placement is None or manifest is None:
        raise AssertionError("a fault was found but not reported")
    comparison = compare(groups, placement.num_ranks, mix)
    return Preflight(config, manifest, groups, placement, mix, comparison)


def _own_violations(config: Config, groups: Sequence[ExpertGroup]) -> list[Violation]:
    """Rules that the configuration breaks without regard to data."""
    rules = [
        *model_violations(config),
        *group_violations(groups),
        *balance_violations(config),
        *lora_violations(config),
        *tuning_violations(config),
        *init_violations(config),
    ]
    return [*rules, *(violation for _, section in sections_in(config) for violation in section.violations_in(config))]


def group_violations(groups: Sequence[ExpertGroup]) -> list[Violation]:
    """Checks that no modality belongs to two groups."""
    owners: dict[str, list[str]] = {}
    for group in groups:
        for modality in group.modalities:
            owners.setdefault(modality, []).append(group.name)
    return [
        Violation(
            ("model.moe.groups",),
            f"model.moe.groups: modality {modality!r} is routed to {' and '.join(names)}; leave it to one of them",
        )
        for modality, names in owners.items()
        if len(names) > 1
    ]


def manifest_violations(config: Config, groups: Sequence[ExpertGroup], manifest: Manifest) -> list[Violation]:
    """Checks vocabulary, modalities, sources and ranks against the data set."""
    return [
        *_vocabulary_violations(config, manifest),
        *_modality_violations(groups, manifest),
        *_source_violations(config, manifest),
    ]


def data_set_problems(folder: str | Path, manifest: Manifest) -> list[str]:
    """Faults of a data set's files: missing, truncated, other counts than the manifest's, ids outside the vocabulary."""
    problems: list[str] = []
    for key, split in manifest.splits():
        try:
            check_split(folder, split)
        except DataError as error:
            problems += [f"data set {key}: {problem}" for problem in error.problems]
        else:
            problems += _id_problems(Path(folder), key, split, manifest)
    named = {"tokenizer": manifest.tokenizer, "image.codebook": manifest.image and manifest.image.codebook}
    problems += [
        f"data set {key}: {Path(folder) / name} is missing; prepare the data again, or take it out of the manifest"
        for key, name in named.items()
        if name and not (Path(folder) / name).is_file()
    ]
    return problems


def token_mix(config: Config, manifest: Manifest) -> dict[str, int]:
    """Training tokens of each modality in the proportions of `data.weights`; without weights, all tokens."""
    totals = dict.fromkeys(manifest.modalities, 0.0)
    weights = {name: weight for name, weight in config.data.weights.items() if name in manifest.sources}
    for name in weights or manifest.sources:
        split = manifest.sources[name].train
        counts = split.tokens_by_modality or _counted(config.data.path, split, manifest)
        weight = weights[name] * _MIX_SCALE / split.tokens if weights else 1.0
        for modality, count in counts.items():
            totals[modality] += count * weight
    return {modality: round(total) for modality, total in totals.items()}


def _vocabulary_violations(config: Config, manifest: Manifest) -> list[Violation]:
    size = config.model.vocab_size
    if size >= manifest.vocab_size:
        return []
    outside = [
        f"{name} [{first}, {end})" for name, ranges in manifest.modalities.items() for first, end in ranges if end > size
    ]
    problem = (
        f"model.vocab_size={size}: smaller than the data's {manifest.vocab_size} ids; outside lie those of "
        f"{', '.join(outside)}; set model.vocab_size={manifest.vocab_size} or more"
    )
    return [Violation(("model.vocab_size", "data.path"), problem)]


def _modality_violations(groups: Sequence[ExpertGroup], manifest: Manifest) -> list[Violation]:
    keys = ("model.moe.groups", "data.path")
    routed = {modality: group.name for group in groups for modality in group.modalities}
    broken = [
        Violation(keys, f"model.moe.groups: no group routes the data's modality {name!r}; add it to a group's modalities")
        for name in manifest.modalities
        if name not in routed
    ]
    for modality, group in routed.items():
        if modality not in manifest.modalities:
            problem = (
                f"model.moe.groups.{group}: the data has no modality {modality!r}; "
                f"it has {', '.join(manifest.modalities)}{_near(modality, manifest.modalities)}"
            )
            broken.append(Violation((f"model.moe.groups.{group}", "data.path"), problem))
    return broken


def _source_violations(config: Config, manifest: Manifest) -> list[Violation]:
    sources, weights = manifest.sources, config.data.weights
    broken = [
        Violation(
            ("data.weights", "data.path"),
            f"data.weights.{name}: the data has no such source; it has {', '.join(sources)}{_near(name, sources)}",
        )
        for name in weights
        if name not in sources
    ]
    used = [source for name, source in sources.items() if not weights or name in weights]
    documents, ranks = sum(source.train.documents for source in used), config.parallel.ep * config.parallel.edp
    if used and documents < ranks:
        problem = (
            f"parallel.ep x parallel.edp = {ranks} ranks, but the data has {documents} training documents, fewer than one "
            "a rank; take fewer ranks, or cut the data into more documents"
        )
        broken.append(Violation(("parallel.ep", "parallel.edp", "data.path", "data.weights"), problem))
    return broken


def _world_relation(config: Config, world_size: int | None) -> Violation:
    ep, edp = config.parallel.ep, config.parallel.edp
    problem = (
        f"{world_size} ranks were started, but parallel.ep={ep} x parallel.edp={edp} = {ep * edp}; start that many, or set "
        f"parallel.edp to ranks / {ep}"
    )
    return Violation(("parallel.ep", "parallel.edp"), problem)


def _id_problems(folder: Path, key: str, split: SplitSection, manifest: Manifest) -> list[str]:
    prefix = folder / split.path
    try:
        largest = largest_id(prefix, max_bytes=_LOOKED_AT)
    except DataError as error:
        return [f"data set {key}: {problem}" for problem in error.problems]
    if largest < manifest.vocab_size:
        return []
    return [
        f"data set {key}: {prefix}.bin holds the id {largest}, but the manifest's vocab_size={manifest.vocab_size}; "
        "prepare the data again, or correct vocab_size and modalities in the manifest"
    ]


def _counted(folder: str, split: SplitSection, manifest: Manifest) -> dict[str, int]:
    if len(manifest.modalities) == 1:
        return dict.fromkeys(manifest.modalities, split.tokens)
    return count_by_modality(Path(folder) / split.path, manifest.modalities)


def _manifest_or_problem(config: Config, violations: list[Violation], data_problems: list[str]) -> Manifest | None:
    try:
        return load_manifest(config.data.path)
    except ConfigError as error:
        violations += [Violation(("data.path",), problem) for problem in error.problems]
    except DataError as error:
        data_problems += error.problems
    return None


def _placement_or_problem(
    config: Config, groups: Sequence[ExpertGroup], mix: Mapping[str, int], violations: list[Violation]
) -> ExpertPlacement | None:
    if config.model.moe.experts.replicated:
        return replicated_placement(groups)
    try:
        return make_placement(config.placement, groups, num_ranks=config.parallel.ep, token_mix=mix)
    except ConfigError as error:
        keys = ("placement", "parallel.ep", "model.moe.groups")
        violations += [Violation(keys, problem) for problem in error.problems]
    return None


def _distrusted(read: PartialConfig[Config], key: str) -> bool:
    return not read.broken([Violation((key,), key)])


def _raise_if_any(problems: Sequence[str], data_problems: Sequence[str], *, pages: str = "docs/data.md") -> None:
    error: MoeDistError | None = None
    if problems:
        error = ConfigError([*problems, *data_problems], see=GUIDE)
    elif data_problems:
        error = DataError(data_problems, see=pages)
    if error is not None:
        raise error


def _near(name: str, names: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
