"""Reads values into a schema even if some values are faulty, so that one error can report all faults.

Each wrong value gives an error text, and is replaced by its default or by some valid value. All other values stay unchanged
and can be tested by later checks. A run never starts with replaced values: `PartialConfig.checked` raises first.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moe_dist.config.base.kinds import OTHERS, PACKAGE
from moe_dist.config.base.section import VIOLATIONS_LATER, Violation, did_you_mean
from moe_dist.config.keys import (
    ITEM,
    NAME,
    Key,
    bare,
    children,
    find,
    members_of,
    nearest,
    other_kinds,
    pattern_text,
    tag_key,
    type_text,
    unknown_key,
    variants_of,
)
from moe_dist.errors import ConfigError

MOST_FAULTS = 50  # limit of faults per round of `draft`, because each fault takes milliseconds (search for a similar key)
_ROUNDS = 20  # limit of rounds of `draft`; each may find missing keys one level deeper; schemas have < 20 levels
Where = tuple[str | int, ...]
S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class PartialConfig(Generic[S]):
    """The result of reading values that may be faulty."""

    value: S | None  # the section after wrong values were replaced; None if it is still invalid
    problems: tuple[str, ...]  # an error text for each fault of a single key; violated rules between keys are not included
    wrong: frozenset[str] = frozenset()  # dotted paths of the replaced values; `broken` omits violations about these paths

    def broken(self, violations: Iterable[Violation]) -> list[str]:
        """Returns the error texts of the `violations` that involve no replaced value."""
        return [r.problem for r in violations if not any(_overlap(key, wrong) for key in r.keys for wrong in self.wrong)]

    def checked(self, violations: Callable[[S], Iterable[Violation]], error: Callable[[list[str]], Exception]) -> S:
        """Returns the section, or raises an error if values were faulty or violate rules.

        Args:
            violations: Function that returns the violated rules of the section.
            error: Function that makes the exception to raise from all error texts.
        """
        problems = [*self.problems, *(self.broken(violations(self.value)) if self.value is not None else [])]
        if problems or self.value is None:
            raise error(problems)
        return self.value


def draft(schema: type[S], values: dict[str, Any]) -> PartialConfig[S]:
    """Reads plain values (as in JSON) into `schema`. Replaces wrong values until the schema accepts all values."""
    values, problems = json.loads(json.dumps(values)), dict[Where, str]()
    wrong: set[str] = set()
    for _ in range(_ROUNDS):
        try:
            value = schema.model_validate_json(json.dumps(values), context={VIOLATIONS_LATER: True})
            return PartialConfig(value, tuple(problems.values()), frozenset(wrong))
        except ValidationError as error:
            before = frozenset(wrong)  # an earlier round inserted these values, so their faults are not reported
            # Misspelt keys are handled first, because a key that is reported missing may only be misspelt.
            details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
            for detail in details[:MOST_FAULTS]:
                keys = _keys_along(schema, detail["loc"])
                where = tuple(part for part, _ in keys)
                if detail["type"] == "missing" and _get(values, where) is not None:  # `_repair` moved a misspelt key there
                    continue
                if not any(_overlap(dotted(where), known) for known in before):
                    problems.setdefault(where, fault_text(schema, where, keys[-1][1] if keys else None, detail))
                _repair(schema, values, keys, detail, wrong)
            if (more := len(details) - MOST_FAULTS) > 0:
                return PartialConfig(None, (*problems.values(), f"and {more:,} more faults"), frozenset(wrong))
    return PartialConfig(None, tuple(problems.values()), frozenset(wrong))


def read_stored(schema: type[S], values: Any) -> S:
    """Reads a section from the plain values (as in JSON) that a checkpoint stores. Raises ConfigError if this version
    cannot read them. The error lists the faults."""
    try:
        return schema.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = draft(schema, values).problems if isinstance(values, dict) else ()
        raise ConfigError(problems or f"{error!s:.200}") from error


def fault_text(schema: type[BaseModel], where: Where, key: Key | None, detail: ErrorDetails) -> str:
    """Returns an error text for one of pydantic's errors. The text has the key, the value, the violated rule and a fix."""
    path, value, kind = dotted(where) or "the whole", detail["input"], detail["type"]
    if kind == "extra_forbidden":
        return f"{path}: {unknown_key(schema, path)}"
    if kind == "value_error" or key is None:
        return f"{path}: {detail['msg'].removeprefix('Value error, ')}"
    if detail["loc"][-1] == "[key]":
        rule = pattern_text(str(detail.get("ctx", {}).get("pattern", "")))
        hint = "; put a space after the colon" if ":" in str(value) else ""
        return f"{path}: the name {value!r} must be {rule}{hint}"
    meaning = f" ({key.field.description})" if key.field and key.field.description else ""
    rule = type_text(key.annotation, tuple(key.field.metadata) if key.field else ())
    if kind == "missing":
        return f"{path}: missing; give {rule}{meaning}"
    if kind.startswith("union_tag"):
        tag = tag_key(next(iter(key.sections.values()))) or ""
        given = value.get(tag) if isinstance(value, dict) else None
        shown = f"{path}.{tag}: missing" if kind == "union_tag_not_found" else f"{path}.{tag}={given!r}"
        rule = f"must be one of {', '.join(map(repr, key.sections))}{did_you_mean(given, key.sections)}"
        return f"{shown}; {rule}{_not_installed(value, key)}"
    if value is None:
        return f"{path}: has no value; write {rule}{meaning}"
    hint = ""
    if kind == "string_type" and isinstance(value, (int, float)):
        hint = "; put it in quotes"
    elif get_origin(bare(key.annotation)) is Literal:
        hint = did_you_mean(value, get_args(bare(key.annotation)))
    elif key.sections and not isinstance(value, dict):
        hint = f" with the keys {', '.join(children(key.annotation))}"
    return f"{path}={_shown(value)}: must be {rule}{hint}{meaning}"


def _not_installed(value: Any, key: Key) -> str:
    """Returns the end of an error text about an unknown kind; empty if other packages cannot offer such kinds."""
    if (others := other_kinds(key.annotation)) is None or not isinstance(value, dict) or "kind" not in value:
        return ""
    if package := value.get(PACKAGE):
        return f"; this kind was of the package {package!r}, which is not installed here or offers it no more: install it"
    return f"; no installed package offers this kind (entry points {others.group})"


def dotted(where: Where) -> str:
    """Joins the parts of a path with dots, as in `data.weights.web`."""
    return ".".join(map(str, where))


def _overlap(one: str, other: str) -> bool:
    """Returns whether two dotted paths are equal, or one path is inside the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _shown(value: Any) -> str:
    short = Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _keys_along(schema: type[BaseModel], loc: tuple[str | int, ...]) -> list[tuple[str | int, Key]]:
    """Returns the parts of the location `loc` in a pydantic error, each with its `Key`. Omits the parts that are not keys,
    which are a section's kind, a union member's tag and the mark "[key]"."""
    keys: list[tuple[str | int, Key]] = []
    annotation: Any = schema
    for part in loc:
        variants: dict[str, Any] = {**variants_of(annotation), **members_of(annotation)}
        if part in variants:
            annotation = variants[str(part)]
            continue
        if part in ("[key]", OTHERS):
            continue
        below = children(annotation)
        found = next((below[name] for name in (str(part), NAME, ITEM) if name in below), [Key(str(part), Any, None)])
        annotation = found[0].annotation
        keys.append((part, found[0]))
    return keys


def _repair(
    schema: type[BaseModel], values: Any, keys: list[tuple[str | int, Key]], detail: ErrorDetails, wrong: set[str]
) -> None:
    """Repairs the fault `detail` in `values`, in place, so that it does not hide other faults in the next round."""
    where, kind = tuple(part for part, _ in keys), detail["type"]
    if kind == "extra_forbidden":  # the key is misspelt: moves its value to the key that was probably meant
        holder = _get(values, where[:-1])
        value = holder.pop(where[-1])
        section, _, name = (nearest(schema, dotted(where)) or "").rpartition(".")
        if name and section == dotted(where[:-1]) and name not in holder and not find(schema, dotted(where)):
            holder[name] = value
        return
    if detail["loc"][-1:] == ("[key]",):
        if isinstance(holder := _get(values, where[:-1]), dict):  # another fault may have replaced the mapping
            holder.pop(where[-1], None)
        wrong.add(dotted(where))
        return
    while keys and keys[-1][1].field is None:
        keys = keys[:-1]  # an item has no default, so the whole list or mapping is replaced
    where = tuple(part for part, _ in keys)
    holder = _get(values, where[:-1])
    if not keys or not isinstance(holder, (dict, list)):
        return
    wrong.add(dotted(where))
    field = keys[-1][1].field
    if isinstance(holder, dict) and field is not None and not field.is_required():
        holder.pop(where[-1], None)
    else:
        holder[where[-1]] = _any_value(keys[-1][1].annotation)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _get(values: Any, where: Where) -> Any:
    for part in where:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _any_value(annotation: Any) -> Any:
    """Returns some valid value of a type. For a section, the value is {} or has only the section's kind. The next round of
    `draft` then reports the section's missing keys and fills them in."""
    kind = bare(annotation)
    origin, args = get_origin(kind), get_args(kind)
    if variants := variants_of(kind):  # sets a valid kind; without it, pydantic rejects the section in each round
        tag, section = next(iter(variants.items()))
        return {tag_key(section): tag} if tag else {}
    if origin is dict:
        return {"x": _any_value(args[1])}
    if origin is tuple:
        return [] if args[-1] is Ellipsis else [_any_value(arg) for arg in args]
    if origin is Literal:
        return args[0]
    return {bool: False, int: 1, float: 1.0}.get(kind, "x")
