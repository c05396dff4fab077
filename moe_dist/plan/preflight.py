"""Checks a run's configuration, data set and placement against each other before the run, and reports all faults together.

The checks take a second or two. They read the lengths of documents from the .idx files, and up to 256 MiB of token ids per
split. They import no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.base.section import Violation, unknown_name
from moe_dist.config.load import GUIDE, load_config, model_violations, read_draft, rule_violations
from moe_dist.config.partial import PartialConfig
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.index_header import largest_id
from moe_dist.formats.manifest import Manifest, SplitSection, load_manifest
from moe_dist.formats.split_files import check_split, tokens_by_modality
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.host import host_violations
from moe_dist.plan.planner import PlanComparison, compare
from moe_dist.plan.policies import expert_groups, make_placement, replicated_placement
from moe_dist.plan.tuning_rules import check_tuning_data

_LOOKED_AT = 256 << 20  # largest number of bytes of token ids that are read per split
_MIX_SCALE = 1_000_000  # total number of tokens in the token mix if a run has data.weights


@dataclass(frozen=True)
class PlannedLayout:
    """A configuration, its expert groups, and the placement of their experts."""

    groups: tuple[ExpertGroup, ...]
    placement: ExpertPlacement
    # Result of `token_mix`. Empty if there are no data; all modalities then count as having equally many tokens.
    token_mix: Mapping[str, int]
    config: Config


@dataclass(frozen=True)
class Preflight(PlannedLayout):
    """A run that has passed all checks."""

    manifest: Manifest
    comparison: PlanComparison  # costs of pinned and interleaved placement for this token mix


def check(config: Config, *, manifest: Manifest | None = None, world_size: int | None = None) -> Preflight:
    """Checks a configuration against its data set and its ranks.

    Args:
        manifest: Manifest of the data set. By default it is read from `data.path`.
        world_size: Number of ranks that were started, which must be parallel.ep x parallel.edp; None skips this check.

    Raises:
        ConfigError: the configuration has faults. The error lists all faults of the configuration and the data.
        DataError: only the data have faults. The error lists all of them.
    """
    return _check(PartialConfig(config, ()), manifest, world_size)


def check_file(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Preflight:
    """Does the same as `check` for a configuration file. Misspelt keys and wrong types in the file are reported together
    with all other faults. Raises ConfigError or DataError: see `check`."""
    return _check(read_draft(path, overrides), None, world_size)


def layout_without_data(config: Config) -> PlannedLayout:
    """Checks, for a dry run, everything that needs no data. If the data set has a manifest, it is checked too. Raises
    ConfigError or DataError: see `check`."""
    groups = expert_groups(config.model.moe)
    violations = [*model_violations(config), *rule_violations(config)]
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
    return PlannedLayout(groups, placement, mix, config)


def layout_of_file(path: str | Path, overrides: Sequence[str] = ()) -> PlannedLayout:
    """Does the same as `layout_without_data` for a configuration file."""
    return layout_without_data(load_config(path, overrides))


def _check(read: PartialConfig[Config], manifest: Manifest | None, world_size: int | None) -> Preflight:
    config = read.value
    if config is None:
        raise ConfigError(read.problems, see=GUIDE)
    groups = expert_groups(config.model.moe)
    violations = [*model_violations(config), *rule_violations(config), *host_violations(config)]
    violations += config.model.moe.router.file_violations(config)
    data_problems: list[str] = []
    if manifest is None:
        manifest = _manifest_or_problem(config, violations, data_problems)
    if manifest is not None:
        violations += manifest_violations(config, groups, manifest)
        data_problems += data_set_problems(config.data.path, manifest)
    violations += check_tuning_data(config, manifest, data_problems)
    if world_size not in (None, config.parallel.ep * config.parallel.edp):
        ep, edp = config.parallel.ep, config.parallel.edp
        fitting = f", or set parallel.edp={world_size // ep}" if world_size % ep == 0 else ""
        problem = (
            f"{world_size} ranks were started, but parallel.ep={ep} x parallel.edp={edp} = {ep * edp}; start that many, as "
            f"`moe-dist launch local` does{fitting}"
        )
        violations.append(Violation(("parallel.ep", "parallel.edp"), problem))
    sound = manifest is not None and not data_problems
    mix = token_mix(config, manifest) if sound and manifest else {}
    placement = _placement_or_problem(config, groups, mix, violations)

    if not read.broken([Violation(("data.path",), "")]):  # a broken data.path was replaced, so ignore the data's faults
        data_problems = []
    pages = "docs/data.md" if config.router_tuning is None else "docs/data.md, docs/router-tuning.md"
    _raise_if_any([*read.problems, *read.broken(violations)], data_problems, pages=pages)
    if placement is None or manifest is None:
        raise AssertionError("a fault was found but not reported")
    return Preflight(groups, placement, mix, config, manifest, compare(groups, placement.num_ranks, mix))


def manifest_violations(config: Config, groups: Sequence[ExpertGroup], manifest: Manifest) -> Iterator[Violation]:
    """Checks that vocabulary, modalities, sources and number of ranks fit the data set."""
    size, sources, weights = config.model.vocab_size, manifest.sources, config.data.weights
    if size < manifest.vocab_size:
        ranges = [(name, first, end) for name, each in manifest.modalities.items() for first, end in each if end > size]
        problem = (
            f"model.vocab_size={size}: smaller than the data's {manifest.vocab_size} ids; ids of "
            f"{', '.join(f'{name} [{first}, {end})' for name, first, end in ranges)} lie outside; set "
            f"model.vocab_size={manifest.vocab_size} or more"
        )
        yield Violation(("model.vocab_size", "data.path"), problem)
    if manifest.pictures is not None and not config.engine.hosts:
        problem = f"engine.kind={config.engine.kind}: the data have pictures for an encoder; set engine.kind=transformers"
        yield Violation(("engine.kind", "data.path"), f"{problem} (docs/how-to/pictures.md)")
    elif manifest.pictures is not None:
        yield from _placeholder_violations(config, groups, manifest, manifest.pictures.token_id)
    routed = {modality: group.name for group in groups for modality in group.modalities}
    for name in manifest.modalities:
        if name not in routed:
            problem = f"no group routes the data's modality {name!r}; add it to a group's modalities"
            yield Violation(("model.moe.groups", "data.path"), f"model.moe.groups: {problem}")
    for modality, group in routed.items():
        if problem := unknown_name("modality in the data", modality, manifest.modalities):
            key = f"model.moe.groups.{group}"
            yield Violation((key, "data.path"), f"{key}: {modality!r}: {problem}")
    for name in weights:
        if problem := unknown_name("source", name, sources):
            fix = "remove it, or set data.weights={} to draw from all sources by their sizes"
            yield Violation(("data.weights", "data.path"), f"data.weights.{name}: {problem}; {fix}")
    used = [source for name, source in sources.items() if not weights or name in weights]
    documents, ranks = sum(source.train.documents for source in used), config.parallel.ep * config.parallel.edp
    if used and documents < ranks:
        problem = (
            f"parallel.ep x parallel.edp = {ranks} ranks, but the data has only {documents} training documents, fewer than "
            "one per rank; take fewer ranks, or divide the data into more documents"
        )
        yield Violation(("parallel.ep", "parallel.edp", "data.path", "data.weights"), problem)


def _placeholder_violations(
    config: Config, groups: Sequence[ExpertGroup], manifest: Manifest, token_id: int
) -> Iterator[Violation]:
    """Checks that the model knows the data's placeholder of pictures, and that the experts of pictures compute it."""
    own, placeholder = (
        config.model.fields.get("image_token_id", token_id),
        f"the placeholder of pictures, token {token_id},",
    )
    if own != token_id:
        problem = f"{placeholder} is {own} in the model; prepare the data again with the model's folder as --tokenizer"
        yield Violation(("model.folder", "data.path"), f"data.path: {problem}")
    named = [name for name, each in manifest.modalities.items() if any(first <= token_id < end for first, end in each)]
    if "image" not in named and any(group.modalities == ("image",) for group in groups):
        problem = f"{placeholder} has the modality {', '.join(named)}, so that no vision expert would be trained"
        fix = "prepare the data again, or give the id to image in the manifest"
        yield Violation(("model.moe.groups", "data.path"), f"data.path: {problem}; {fix}")


def data_set_problems(folder: str | Path, manifest: Manifest) -> list[str]:
    """Finds files of a data set that are missing, truncated, or contradict the manifest's counts or vocabulary."""
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
    """Returns the number of training tokens of each modality. With `data.weights`, they are per million drawn tokens."""
    totals = dict.fromkeys(manifest.modalities, 0.0)
    weights = {name: weight for name, weight in config.data.weights.items() if name in manifest.sources}
    for name in weights or manifest.sources:
        split = manifest.sources[name].train
        counts = tokens_by_modality(config.data.path, split, manifest)
        weight = weights[name] * _MIX_SCALE / split.tokens if weights else 1.0
        for modality, count in counts.items():
            totals[modality] += count * weight
    return {modality: round(total) for modality, total in totals.items()}


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


def _raise_if_any(problems: Sequence[str], data_problems: Sequence[str], *, pages: str = "docs/data.md") -> None:
    if problems:
        raise ConfigError([*problems, *data_problems], see=GUIDE)
    if data_problems:
        raise DataError(data_problems, see=pages)
