"""The base class of every section of a schema, and types of single values."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
# These types have an upper bound, because memory grows with each expert, rank and layer. An absurd number must be an error.
Experts = Ranks = Layers = Annotated[int, Field(ge=1, le=1 << 20)]
NullExperts = Annotated[int, Field(ge=0, le=1 << 20)]
# No separators, quotes or leading dash: the name becomes a folder, a job name and part of shell lines.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
GROUP_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"  # no dot, because a group's name is one part of dotted names
UNIX_GROUP_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
PATH_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"  # a label of a Ray node: `ray.io/accelerator-type`
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
GroupName = Annotated[str, Field(pattern=GROUP_PATTERN)]
PathText = Annotated[str, Field(pattern=PATH_PATTERN)]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]

WATCHDOG_SHARE = 0.8  # the watchdog's time limit as a share of the process groups' timeout; in the rest ranks write reports

WholeConfig = Any  # means `schema.Config`, which cannot be imported here (circular import)

VIOLATIONS_LATER = "relations_later"  # key of the validation context, true if the caller collects violated rules itself


class Violation(NamedTuple):
    """A violated rule."""

    keys: tuple[str, ...]  # dotted keys that the rule compares, relative to the section that states the rule
    problem: str  # error text with key, value, rule and fix


class Section(BaseModel):
    """The base class of all sections. A field's meaning is its `description`, or a docstring below it if too long."""

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
        """Makes the class docstring the description of `kind` or `policy`; joins each description to one line."""
        for name, field in cls.model_fields.items():
            named = (cls.__doc__ or "") if name in ("kind", "policy") else None
            text = field.description or named
            field.description = text if text is None else " ".join(text.split())

    def violations(self) -> Iterable[Violation]:
        """Violated rules between this section's keys."""
        return ()

    def violations_in(self, config: WholeConfig) -> Iterable[Violation]:
        """Violated rules between this section and other sections. Keys are full dotted paths, as `parallel.ep`."""
        return ()

    @model_validator(mode="after")
    def _no_violations(self, info: ValidationInfo) -> "Section":
        if not (info.context or {}).get(VIOLATIONS_LATER) and (broken := [*self.violations()]):
            raise ValueError("; ".join(violation.problem for violation in broken))
        return self


def sections_in(value: Any, path: str = "") -> Iterator[tuple[str, Section]]:
    """Every section of a configuration with its dotted key; a section comes before those inside it."""
    if isinstance(value, Section):
        yield path, value
        value = dict(value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for name, item in items:
        yield from sections_in(item, f"{path}.{name}" if path else str(name))


def default_kind(kind: str) -> BeforeValidator:
    """Lets a section without the key `kind` mean this kind, as in `router: {normalise: none}`."""
    return BeforeValidator(
        lambda value: {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value
    )


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """The end of an error text: the known name that is most similar to `name`; empty if none is similar."""
    close = difflib.get_close_matches(str(name), [str(known) for known in names], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_name(what: str, name: str, names: Iterable[str]) -> str:
    """An error text with the known names if `name` is unknown; else empty."""
    known = list(names)
    return "" if name in known else f"no such {what}; there are {', '.join(known)}{did_you_mean(name, known)}"
