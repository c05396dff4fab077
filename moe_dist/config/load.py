"""Reads a Config from a YAML file and dotted overrides, writes a Config as YAML, and lists how two Configs differ."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from moe_dist.config.base.section import Violation, sections_in
from moe_dist.config.bundled import find_config, hint_for_missing
from moe_dist.config.engines.base import EngineSection
from moe_dist.config.keys import bare, find, tag_key, type_text, unknown_key
from moe_dist.config.partial import PartialConfig, draft
from moe_dist.config.schema import MAY_CHANGE_ON_RESUME, Config
from moe_dist.config.stored_format import translate
from moe_dist.config.yaml_text import dump_yaml, load_yaml, read_mapping
from moe_dist.errors import ConfigError

GUIDE = "docs/configuration.md"


class Change(NamedTuple):
    """A key whose value differs between two configurations. A configuration that lacks the key has the value None."""

    key: str
    old: Any
    new: Any


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration.

    Args:
        path: Path of a YAML file, or a name that `find_config` finds.
        overrides: Texts `key=value` with a dotted key; the value is read as YAML. The last override of a key is used.

    Raises:
        ConfigError: the error lists every fault of the file and of the overrides.
    """
    return read_draft(path, overrides).checked(model_violations, _error)


def load_stored_config(path: Path) -> Config:
    """Reads the configuration that is stored in a run folder, in the present format or an earlier one.

    Raises:
        ConfigError: the error lists every fault of the file.
    """
    values, problems = _read_file(path, links=False)  # never a link, because a run replaces this file by a rename
    read = PartialConfig[Config](None, tuple(problems)) if values is None else draft(Config, translate(values))
    return read.checked(model_violations, _error)


def _error(problems: list[str]) -> ConfigError:
    return ConfigError(problems, see=GUIDE)


def read_draft(path: str | Path, overrides: Sequence[str] = ()) -> PartialConfig[Config]:
    """Works like `load_config`, but returns the faults instead of raising them, so that callers can add further faults."""
    values, problems = _read_file(find_config(path))
    if values is None:
        return PartialConfig(None, tuple(problems))
    problems, incomplete = problems + apply_overrides(values, overrides), False
    try:
        values = completed(values)
    except ConfigError as error:
        problems, incomplete = [*problems, *error.problems], True
    read = draft(Config, values)
    # Keys may be missing only because the engine could not complete the section.
    shown = [each for each in read.problems if not (incomplete and each.startswith("model."))]
    return PartialConfig(read.value, (*problems, *_missing_as_one(shown, _engine(values).example)), read.wrong)


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` with a complete section `model`: the engine's section completes the section `model` of the file."""
    model, engine = values.get("model"), _engine(values)
    if not isinstance(model, dict):
        return values
    hosted = [f"model.{key}" for key in ("folder", "family") if model.get(key) is not None]
    if hosted and "hidden_dim" not in model and not engine.hosts:
        way = "set engine={kind: transformers}, which trains it, or write the keys of `model` for this project's own model"
        raise ConfigError([f"{' and '.join(hosted)}: names a model of transformers, and `engine` another engine; {way}"])
    return {**values, "model": engine.complete_model(model)}


def _engine(values: dict[str, Any]) -> type[EngineSection]:
    engine = values.get("engine")
    kind = engine.get("kind") if isinstance(engine, dict) else None
    section = find(Config, "engine")[0].sections.get(kind) if isinstance(kind, str) else None
    return section if section is not None and issubclass(section, EngineSection) else EngineSection


def _missing_as_one(problems: Sequence[str], example: str) -> list[str]:
    """Returns the error texts. If several sections are missing, replaces their texts by one text, which names `example`."""
    missing = [problem for problem in problems if re.match(r"\w+: missing; give section", problem)]
    if len(missing) < 2:
        return list(problems)
    names = ", ".join(problem.partition(":")[0] for problem in missing)
    fix = f"start from a complete configuration: {example}"
    return [*(problem for problem in problems if problem not in missing), f"{names}: these sections are missing; {fix}"]


def model_violations(config: Config) -> list[Violation]:
    """Returns a violation for each broken rule between keys of one section. The keys of a violation are dotted paths from
    the root of the configuration."""
    return [
        Violation(tuple(f"{prefix}.{key}" for key in violation.keys), f"{prefix}: {violation.problem}")
        for prefix, section in sections_in(config)
        for violation in section.violations()
    ]


def rule_violations(config: Config) -> list[Violation]:
    """Returns a violation for each broken rule between keys of different sections."""
    return [violation for _, section in sections_in(config) for violation in section.violations_in(config)]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets each `key=value` pair of `overrides` in `values`. Returns one error text for each pair that cannot be set.

    If a pair selects another kind of a section (`placement.policy=pinned`), keys that only the old kind has are dropped.
    """
    overrides, problems = _without_lone_equals(overrides)
    pairs: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f"{override!r}: an override is key=value with a dotted key, as in train.steps=200")
            continue
        if not find(Config, key):
            problems.append(f"{key}: {unknown_key(Config, key)}")
            continue
        value, wrong = _override_value(key, text)
        if wrong:
            problems += [f"{key}: {problem}" for problem in wrong]
        else:
            pairs.append((key, value))
    # Pairs that select a kind are set first, because they drop keys of the old kind, which another pair may set again.
    for key, value in sorted(pairs, key=lambda pair: not _chooses_variant(pair[0])):
        if problem := _set(values, key, value):
            problems.append(problem)
    return problems


def resolved_yaml(config: Config) -> str:
    """Returns the configuration with all defaults as YAML. Reading this YAML gives an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def difference(old: Config, new: Config) -> list[Change]:
    """Returns a `Change` for each dotted key whose values differ between two configurations, in the order of the schema.
    Lists are compared whole."""
    before, after = (leaves(config.model_dump(mode="json")) for config in (old, new))
    found = [
        Change(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if (key in before) != (key in after) or before.get(key) != after.get(key)  # null differs from a missing key
    ]
    # If a key is null in one configuration and a section in the other, only the section's keys are listed.
    return [change for change in found if change.old is not None or change.new is not None] or found


def changes_on_resume(old: Config, new: Config) -> list[Change]:
    """Returns the differences that prevent a resume: changes of keys that must not change."""
    return [change for change in difference(old, new) if not may_change_on_resume(change.key)]


def may_change_on_resume(key: str) -> bool:
    """Returns whether a key or section may change when a run is resumed."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in MAY_CHANGE_ON_RESUME)


def _read_file(path: Path, *, links: bool = True) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        return read_mapping(path, "sections (run, model, data, ...)", links=links)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return None, [f"configuration {str(path)!r} cannot be read: {reason}; {hint_for_missing(path)}"]


def _override_value(key: str, text: str) -> tuple[Any, list[str]]:
    """Returns the value and the faults of an override's text. If the key has the type str (`run.name=2024`), unquoted text
    is the value itself. Any other text is read as YAML."""
    meant = find(Config, key)
    if not all(bare(each.annotation) is str for each in meant) or text.lstrip().startswith(("'", '"')):
        return load_yaml(text)
    optional = all(type_text(each.annotation).endswith("null") for each in meant)
    return (None if optional and text.strip() in ("null", "~", "") else text), []


def _without_lone_equals(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Finds overrides with spaces around = (`key = value`), which a shell splits into three. Returns the other overrides,
    and an error text for each override that was split."""
    rest, problems = list(overrides), []
    while "=" in rest[1:-1]:
        at = rest.index("=", 1)
        key, _, value = rest[at - 1 : at + 2]
        problems.append(f"{key} = {value}: an override has no spaces around =; write {key}={value}")
        del rest[at - 1 : at + 2]
    return rest, problems


def _chooses_variant(key: str) -> bool:
    section = find(Config, key.rpartition(".")[0]) if "." in key else []
    variants = section[0].sections if section else {}
    return "" not in variants and any(tag_key(v) == key.rpartition(".")[2] for v in variants.values())


def _set(values: dict[str, Any], key: str, value: Any) -> str | None:
    *above, last = key.split(".")
    holder: Any = values
    for depth, part in enumerate(above):
        if isinstance(holder, dict):
            holder[part] = _default_list(".".join(above[: depth + 1])) if holder.get(part) is None else holder[part]
        step: Any = int(part) if isinstance(holder, list) and part.isdecimal() else part
        try:
            holder = holder[step]
        except (IndexError, TypeError):
            return f"{key}: {'.'.join(above[: depth + 1])} is not there: {'.'.join(above[:depth])} is {holder!r}"
    if isinstance(holder, list) and last.isdecimal() and int(last) < len(holder):
        holder[int(last)] = value
    elif isinstance(holder, dict):
        if _chooses_variant(key) and holder.get(last) != value:
            sections = find(Config, ".".join(above))[0].sections
            _keep_keys_of(holder, sections.get(value) if isinstance(value, str) else None)
        holder[last] = value
    else:
        return f"{key}: {'.'.join(above)} is {holder!r}, which has no {last!r}"
    return None


def _default_list(key: str) -> Any:
    """Returns the initial value of a key that the file lacks, for an override that sets a part of this value. A list starts
    with its default. A section starts as {}, so that its other keys get their defaults."""
    field = next((found.field for found in find(Config, key) if found.field is not None), None)
    default = None if field is None else field.get_default(call_default_factory=True, validated_data={})
    return to_jsonable_python(default) if isinstance(default, tuple) else {}


def _keep_keys_of(holder: dict[str, Any], variant: Any) -> None:
    for name in [name for name in holder if variant is not None and name not in variant.model_fields]:
        del holder[name]


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Maps dotted keys to the values in nested mappings. An empty mapping counts as a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= leaves(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found
