"""Lists a schema's keys as dotted paths, describes the permitted values in words, and proposes keys for unknown keys."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from moe_dist.config.base.kinds import OtherKinds
from moe_dist.config.base.section import GROUP_PATTERN, LABEL_PATTERN, NAME_PATTERN, PATH_PATTERN, UNIX_GROUP_PATTERN
from moe_dist.config.stored_format import REMOVED

NAME = "<name>"  # in a dotted path, stands for any key of a mapping
ITEM = "<index>"  # in a dotted path, stands for any item of a list
_PATTERNS = {
    NAME_PATTERN: "text of 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
    GROUP_PATTERN: "text of 1 to 32 letters, digits, '_' or '-', the first a letter",
    UNIX_GROUP_PATTERN: "the name of a Unix group",
    PATH_PATTERN: "a path without control characters",
    LABEL_PATTERN: "text of 1 to 63 letters, digits, '.', '_', '/' or '-', the first and last a letter or digit",
}


@dataclass(frozen=True)
class Key:
    """One key of a schema; a section is a key, too."""

    path: str  # dotted path; has NAME in place of keys of mappings, and ITEM in place of list indices
    annotation: Any  # type of the value
    field: FieldInfo | None  # None for an element of a mapping or list
    variant: str = ""  # kind of the section that has the key, such as 'kind: wsd'; empty if the section has no kinds

    @property
    def sections(self) -> dict[str, type[BaseModel]]:
        """The section classes that the key's value may have, as `variants_of` returns them."""
        return variants_of(self.annotation)


def bare(annotation: Any) -> Any:
    """Returns the type `annotation` without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [a for a in get_args(annotation) if a is not NoneType]
        if len(members) == 1:
            return bare(members[0])
    return annotation


def tag_key(section: type[BaseModel]) -> str | None:
    """Returns the name of the key that selects a section's kind, such as `kind` or `policy`. The type of this key is a
    Literal of one text. Returns None if the section has no such key."""
    for name, field in section.model_fields.items():
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1:
            return name
    return None


def variants_of(annotation: Any) -> dict[str, type[BaseModel]]:
    """Maps each kind (value of `tag_key`) to the section class of that kind. Returns {'': class} for a type that is one
    section class, and {} for a type that is no section. Imports the kinds that other packages offer."""
    kind = bare(annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {"": kind}
    if get_origin(kind) not in (Union, UnionType):
        return {}
    members = [bare(member) for member in get_args(kind)]
    members = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    tags = [tag_key(member) for member in members]
    found = {m.model_fields[t].default: m for m, t in zip(members, tags, strict=True) if t}
    others = other_kinds(kind)
    return found if others is None else {**others.sections(), **found}


def other_kinds(annotation: Any) -> OtherKinds | None:
    """Returns the union member that accepts the kinds of other packages."""
    marks = [mark for member in get_args(bare(annotation)) for mark in getattr(member, "__metadata__", ())]
    return next((mark for mark in marks if isinstance(mark, OtherKinds)), None)


def members_of(annotation: Any) -> dict[str, Any]:
    """Maps the tags in a tagged union of values, such as `ShareByGroup`, to the types. Returns {} for other types."""
    if variants_of(annotation):
        return {}
    members = get_args(kind) if get_origin(kind := bare(annotation)) in (Union, UnionType) else ()
    marks = [(mark, member) for member in members for mark in getattr(member, "__metadata__", ())]
    return {mark.tag: member for mark, member in marks if isinstance(mark, Tag)}


def children(annotation: Any) -> dict[str, list[Key]]:
    """Maps names to the keys directly below a value of this type. A name maps to several keys if several kinds of the
    section have a key of this name."""
    kind, below = bare(annotation), {}
    for tag, section in variants_of(kind).items():
        for name, field in section.model_fields.items():
            variant = f"{tag_key(section)}: {tag}" if tag else ""
            below.setdefault(name, []).append(Key(name, field.annotation, field, variant))
    for member in members_of(kind).values():
        below |= children(member)
    if get_origin(kind) is dict:
        below[NAME] = [Key(NAME, get_args(kind)[1], None)]
    elif get_origin(kind) is tuple:
        items = get_args(kind)
        names = [ITEM] if items[-1] is Ellipsis else [str(index) for index in range(len(items))]
        below.update({name: [Key(name, item, None)] for name, item in zip(names, items, strict=False)})
    return below


def walk(root: type[BaseModel]) -> Iterator[Key]:
    """Yields every key and section of a schema, depth first."""

    def below(annotation: Any, prefix: str, variant: str) -> Iterator[Key]:
        for name, keys in children(annotation).items():
            for key in keys:
                here = Key(f"{prefix}{name}", key.annotation, key.field, key.variant or variant)
                yield here
                yield from below(key.annotation, f"{here.path}.", here.variant)

    yield from below(root, "", "")


def find(root: type[BaseModel], path: str) -> list[Key]:
    """Returns the keys that a dotted path may mean. There is none if the path is unknown; there may be several if a section
    has several kinds."""
    found = [Key("", root, None)]
    for part in path.split("."):
        found = [
            Key(f"{key.path}.{name}" if key.path else name, child.annotation, child.field, child.variant or key.variant)
            for key in found
            for name, options in children(key.annotation).items()
            if name in (part, NAME) or (name == ITEM and part.isdecimal())
            for child in options
        ]
    return found


@cache
def _all_paths(root: type[BaseModel]) -> list[str]:
    return sorted({key.path for key in walk(root)})


def nearest(root: type[BaseModel], path: str) -> str | None:
    """Returns the schema's key that is most similar to the unknown key `path`, or None. Prefers a similar key of the same
    section; else a key of the same name in another section; else any similar key."""
    section, _, name = path.rpartition(".")
    holders = find(root, section) if section else [Key("", root, None)]
    siblings = {sibling for holder in holders for sibling in children(holder.annotation)} - {NAME, ITEM}
    known = _all_paths(root)
    if close := difflib.get_close_matches(name, sorted(siblings), 1):
        return f"{section}.{close[0]}" if section else close[0]
    if same := [key for key in known if key.rpartition(".")[2] == name]:
        return difflib.get_close_matches(path, same, 1, cutoff=0.0)[0]
    others = [key for key in known if not path.startswith(f"{key}.")]
    return next(iter(difflib.get_close_matches(path, others, 1)), None)


def unknown_key(root: type[BaseModel], path: str) -> str:
    """Returns an error text for a key that does not exist, or that exists only in another kind of its section."""
    if elsewhere := [key.variant for key in find(root, path)]:
        return f"belongs to {' or '.join(elsewhere)}, but the section is of another kind"
    if path in REMOVED:
        return "was removed; remove the key"
    if near := nearest(root, path):
        return f"unknown key; did you mean {near}?"
    holder = path.rpartition(".")[0]
    found = find(root, holder) if holder else []
    if found and not children(found[0].annotation):
        return f"unknown key; {holder} is a value, not a section: remove .{path.rpartition('.')[2]}"
    shown, annotation = (holder, found[0].annotation) if found else ("the whole", root)
    return f"unknown key; {shown} has the keys {', '.join(children(annotation))}"


def type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describes a type in words, for example 'whole number, 1 or more', \"one of 'ddp', 'fsdp2'\" or 'list of ...'."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for extra in args[1:] for m in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return type_text(args[0], (*metadata, *inner))
    if origin in (Union, UnionType) and NoneType in args:
        return " or ".join([*(type_text(a, metadata) for a in args if a is not NoneType), "null"])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"list of {type_text(args[0])}"
        return f"list [{', '.join(type_text(a) for a in args)}]"
    if origin is dict:
        return f"mapping from names to {type_text(args[1])}"
    if variants := variants_of(annotation):
        tag = tag_key(next(iter(variants.values())))
        return "section" if "" in variants else f"section with {tag}: {f' or {tag}: '.join(variants)}"
    if pattern := next((m.pattern for m in metadata if getattr(m, "pattern", None)), None):
        return pattern_text(pattern)
    if members := members_of(annotation):
        return "; or ".join(map(type_text, members.values()))
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return words.get(annotation, str(annotation)) + _bounds(metadata, whole=annotation is int)


def pattern_text(pattern: str) -> str:
    """Describes in words which texts a pattern allows."""
    return _PATTERNS.get(pattern, f"text that matches {pattern}")


def _bounds(metadata: tuple[Any, ...], *, whole: bool) -> str:
    bounds = {
        name: getattr(m, name) for m in metadata for name in ("gt", "ge", "lt", "le") if getattr(m, name, None) is not None
    }
    if whole and "gt" in bounds:
        bounds["ge"] = bounds.pop("gt") + 1
    if {"ge", "le"} <= bounds.keys():
        form = ",d" if whole else "g"
        return f" from {bounds['ge']:{form}} to {bounds['le']:{form}}"
    words = {"gt": "above {:g}", "ge": "{:g} or more", "lt": "below {:g}", "le": "{:g} or less"}
    return "".join(f", {words[name].format(bound)}" for name, bound in bounds.items())
