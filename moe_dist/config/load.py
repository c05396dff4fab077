"""Makes a Config from a YAML file and dotted overrides; and YAML from a Config; and the difference of two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from moe_dist.config.bundled import find_config, hint_for_missing
from moe_dist.config.keys import bare, find, nearest, tag_key, type_text
from moe_dist.config.partial import PartialConfig, draft
from moe_dist.config.renamed import Rename, new_key, translate
from moe_dist.config.schema import MAY_CHANGE_ON_RESUME, Config
from moe_dist.config.section import Violation, sections_in
from moe_dist.config.yaml_text import dump_yaml, load_yaml
from moe_dist.errors import ConfigError

GUIDE = "docs/configuration.md"


class Change(NamedTuple):
    """A key with different values in two configurations; None also if one of them lacks the key."""

    key: str
    old: Any
    new: Any


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration.

    Args:
        path: YAML file, or its name as in `find_config`.
        overrides: `key=value` with a dotted key; the value is read as YAML. Later ones win.

    Raises:
        ConfigError: lists every fault of the file and the overrides.
    """
    return _without_faults(read_draft(path, overrides))


def load_stored_config(path: Path) -> Config:
    """Reads the configuration in a run folder, and translates names of an earlier version.

    Raises:
        ConfigError: lists every fault of the file.
    """
    values, problems = _read_file(path)
    return _without_faults(PartialConfig(None, tuple(problems)) if values is None else draft(Config, translate(values)))


def _without_faults(read: PartialConfig[Config]) -> Config:
    problems = [*read.problems, *(read.broken(model_violations(read.value)) if read.value else [])]
    if problems or read.value is None:
        raise ConfigError(problems, see=GUIDE)
    return read.value


def read_draft(path: str | Path, overrides: Sequence[str] = ()) -> PartialConfig[Config]:
    """Like `load_config`, but returns the faults with the readable values, for callers with further checks."""
    values, problems = _read_file(find_config(path))
    if values is None:
        return PartialConfig(None, tuple(problems))
    problems += apply_overrides(values, overrides)
    read = draft(Config, values)
    return PartialConfig(read.value, (*problems, *read.problems), read.wrong)


def model_violations(config: Config) -> list[Violation]:
    """Every violated rule inside a section, with full keys."""
    return [
        Violation(tuple(f"{prefix}.{key}" for key in violation.keys), f"{prefix}: {violation.problem}")
        for prefix, section in sections_in(config)
        for violation in section.violations()
    ]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets `key=value` pairs in `values`; returns the faults of those that cannot be set.

    Selecting another variant of a section (`placement.policy=pinned`) drops the keys that only the old variant had.
    """
    problems: list[str] = []
    pairs: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f"{override!r}: an override is key=value with a dotted key, as in train.steps=200")
            continue
        if today := new_key(key):
            problems.append(Rename(key, today).problem)
            continue
        if not find(Config, key):
            near = nearest(Config, key)
            problems.append(f"{key}: unknown key" + (f"; did you mean {near}?" if near else ""))
            continue
        value, wrong = _override_value(key, text)
        if wrong:
            problems += [f"{key}: {problem}" for problem in wrong]
        else:
            pairs.append((key, value))
    for key, value in sorted(pairs, key=lambda pair: not _chooses_variant(pair[0])):
        if problem := _set(values, key, value):
            problems.append(problem)
    return problems


def resolved_yaml(config: Config) -> str:
    """The whole configuration with all defaults, as YAML that loads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def difference(old: Config, new: Config) -> list[Change]:
    """Dotted keys whose values differ, in the order of the schema. Lists are compared as a whole."""
    before, after = (dict(_leaves(config.model_dump(mode="json"))) for config in (old, new))
    return [
        Change(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if (key in before) != (key in after) or before.get(key) != after.get(key)
    ]


def changes_on_resume(old: Config, new: Config) -> list[Change]:
    """The differences that forbid resuming a run."""

    def may_change(key: str) -> bool:
        return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE_ON_RESUME)

    return [change for change in difference(old, new) if not may_change(change.key)]


def _read_file(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return None, [f"configuration {str(path)!r} cannot be read: {reason}; {hint_for_missing(path)}"]
    values, problems = load_yaml(text)
    problems = [f"{path}: {problem}" for problem in problems]
    if values is None and not problems:
        values = {}
    if not isinstance(values, dict):
        return None, problems or [
            f"{path}: must be a mapping of sections (run, model, data, ...), got {type(values).__name__}"
        ]
    return values, problems


def _override_value(key: str, text: str) -> tuple[Any, list[str]]:
    """The value read as YAML; for a key of type text (`run.name=2024`) the literal text, unless it is quoted."""
    meant = find(Config, key)
    if not all(bare(each.annotation) is str for each in meant) or text.lstrip().startswith(("'", '"')):
        return load_yaml(text)
    optional = all(type_text(each.annotation).endswith("null") for each in meant)
    return (None if optional and text.strip() in ("null", "~", "") else text), []


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
            _keep_keys_of(holder, find(Config, ".".join(above))[0].sections.get(value))
        holder[last] = value
    else:
        return f"{key}: {'.'.join(above)} is {holder!r}, which has no {last!r}"
    return None


def _default_list(key: str) -> Any:
    """The value below which an override sets a key that the file leaves out: a list's default items. A section starts
    empty, since its other keys have defaults of their own."""
    field = next((found.field for found in find(Config, key) if found.field is not None), None)
    default = None if field is None else field.get_default(call_default_factory=True, validated_data={})
    return to_jsonable_python(default) if isinstance(default, tuple) else {}


def _keep_keys_of(holder: dict[str, Any], variant: Any) -> None:
    for name in [name for name in holder if variant is not None and name not in variant.model_fields]:
        del holder[name]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        leaves += _leaves(value, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", value)]
    return leaves
