"""Defines the base class of all sections of a schema, and types of single values."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


def at_most(most: int) -> AfterValidator:
    """Returns a check of the upper bound `most`. `moe-dist explain` does not show it, because useful values are far
    lower."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"more than {most:,} is not possible; lower it")
        return value

    return AfterValidator(check)


# Upper bounds turn absurd numbers into errors. Up to the bound 2**53, float64 represents all integers. The limits of
# experts, ranks and layers are smaller, because each of them takes memory; see also `model_schema.MAX_EXPERTS`.
Count = Annotated[int, Field(ge=0), at_most(1 << 53)]
PositiveInt = Annotated[int, Field(gt=0), at_most(1 << 53)]
Width = Annotated[int, Field(gt=0), at_most((1 << 31) - 1)]
Experts = Ranks = Annotated[int, Field(ge=1, le=1 << 20)]
NullExperts = Annotated[int, Field(ge=0, le=1 << 20)]
MAX_LAYERS = 1 << 12
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
# A name becomes a folder, a job name and part of shell lines, so it must have no path separator, quote or leading dash.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
GROUP_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"  # without dots, because an expert group's name is part of dotted keys
UNIX_GROUP_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
PATH_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"  # a label of a Ray node: `ray.io/accelerator-type`
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
GroupName = Annotated[str, Field(pattern=GROUP_PATTERN)]
# One fraction for all groups, or a mapping from group names to fractions.
ShareByGroup = Annotated[
    Annotated[Share, Tag("number")] | Annotated[dict[GroupName, Share], Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict) else "number"),
]
PathText = Annotated[str, Field(pattern=PATH_PATTERN)]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]
# No modality may have one of these names, because the metrics loss/<name> use these names for other losses.
RESERVED_MODALITIES: tuple[str, ...] = ("total", "balance", "z", "auxiliary")

WATCHDOG_SHARE = 0.8  # (watchdog's time limit) / (timeout of process groups); ranks write reports between the two

WholeConfig = Any  # stands for `schema.Config`, whose import here would be circular

VIOLATIONS_LATER = "relations_later"  # key of pydantic's validation context; true if the caller calls `violations` itself


class Violation(NamedTuple):
    """A rule that a configuration violates."""

    keys: tuple[str, ...]  # dotted keys that the rule compares; relative to the section if they come from `violations`
    problem: str  # error text, which has key, value, rule and fix


# A requirement of one setting on another key of the configuration: (key, allowed values, reason). The key is dotted; it
# names a key of the configuration, or a capability (class variable) of a section. An error proposes the first allowed
# value.
Need = tuple[str, tuple[Any, ...], str]


class Section(BaseModel):
    """The base class of all sections. The `description` of a field explains the field. A text that is too long for one line
    is a docstring below the field instead."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Uses the class docstring as description of the field `kind` or `policy`. Joins the lines of each description."""
        for name, field in cls.model_fields.items():
            named = (cls.__doc__ or "") if name in ("kind", "policy") else None
            text = field.description or named
            field.description = text if text is None else " ".join(text.split())

    def violations(self) -> Iterable[Violation]:
        """Returns a violation for each broken rule between keys of this section."""
        return ()

    def violations_in(self, config: WholeConfig) -> Iterable[Violation]:
        """Returns a violation for each broken rule between this section and other sections. The keys of a violation are
        full paths, such as `parallel.ep`."""
        return ()

    @model_validator(mode="after")
    def _no_violations(self, info: ValidationInfo) -> "Section":
        if not (info.context or {}).get(VIOLATIONS_LATER) and (broken := [*self.violations()]):
            raise ValueError("; ".join(violation.problem for violation in broken))
        return self


class KindSection(Section):
    """The base class of sections whose key `kind` selects one of several classes of objects, such as routers.

    A section names the object's class as text, so that importing the section does not import torch. `build` imports the
    class and calls it with a context and with the section's fields as keywords. The context is a frozen dataclass that has
    everything that objects of any kind may need. A new kind therefore needs no entry in a table or argument list.
    """

    kind: Any

    builds: ClassVar[str]  # class or function that makes the object, as "package.module:Class"
    served: ClassVar[str] = ""  # equals the kind if exports to Hugging Face support this kind

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        super().__pydantic_init_subclass__()
        has_kind = "kind" in cls.__annotations__ and not cls.model_fields["kind"].is_required()
        if has_kind and "builds" not in vars(cls):
            raise TypeError(f'{cls.__name__}: name the class that it configures, as builds = "package.module:Class"')

    def keywords(self) -> dict[str, Any]:
        """Returns the keyword arguments for the class that this section names."""
        return self.model_dump(exclude={"kind"})

    def build(self, *context: Any) -> Any:
        """Makes the object that this section configures. `context` has everything else that the object needs."""
        return named(self.builds)(*context, **self.keywords())


def named(text: str) -> Any:
    """Imports the object that `text` names as `package.module:name`. The text must come from code, never from data."""
    module, _, name = text.partition(":")
    return getattr(import_module(module), name)


def sections_in(value: Any, path: str = "") -> Iterator[tuple[str, Section]]:
    """Yields the dotted key and the value of every section of a configuration. Outer sections come before inner
    sections."""
    if isinstance(value, Section):
        yield path, value
        value = dict(value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for name, item in items:
        yield from sections_in(item, f"{path}.{name}" if path else str(name))


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """Returns the end of an error text, which proposes the name most similar to `name`; empty if no name is similar."""
    close = difflib.get_close_matches(str(name), [str(known) for known in names], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unordered(schedule: Iterable[tuple[int, float]], key: str = "schedule") -> Iterator[Violation]:
    """Yields a violation if the schedule's first steps do not begin at 0 or do not increase."""
    starts = [start for start, _ in schedule]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        problem = (
            f"{key} must start at step 0 and rise, got first steps {starts}; begin with step 0, and let each later pair "
        )
        yield Violation((key,), problem + "have a later step")


def unmet(config: WholeConfig, key: str, chosen: str, needs: Iterable[Need], *, instead: str) -> Iterator[Violation]:
    """Yields a violation for each of `needs` that the configuration does not meet. `chosen` is the setting with these
    needs, such as `optimizer.kind=muon`, and `key` is its key. `instead` proposes a fix that avoids the setting."""
    for other, allowed, reason in needs:
        *above, name = other.split(".")
        section = config
        for part in above:
            section = getattr(section, part, None)
        value = getattr(section, name, allowed[0])  # a section of another kind may lack the key
        if value in allowed:
            continue
        fix = f"set {other}={_text(allowed[0])}"
        if section is not None and name not in type(section).model_fields:  # `name` is a capability, not a key
            other, value, fix = f"{'.'.join(above)}.kind", section.kind, "take another kind"
        shown = other if isinstance(value, Section) else f"{other}={_text(value)}"
        yield Violation((key, other), f"{shown}: {chosen}: {reason}; {fix}, or {instead}")


def _text(value: Any) -> str:
    """Returns a value in the form in which a user writes it on the command line."""
    value = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, str) else json.dumps(value, default=lambda section: section.model_dump(mode="json"))


def unknown_name(what: str, name: str, names: Iterable[str]) -> str:
    """Returns an empty text if `name` is one of `names`, else an error text that lists `names`."""
    known = list(names)
    return "" if name in known else f"no such {what}; there are {', '.join(known)}{did_you_mean(name, known)}"
