"""The base class of every section of a schema, and types of single values."""

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
    """Returns a check of an upper bound. `moe-dist explain` does not show this bound, because no useful value is above."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"more than {most:,} is not possible; lower it")
        return value

    return AfterValidator(check)


# Upper bounds make absurd numbers an error. float64 represents all integers up to 2**53, and memory grows with the numbers
# of experts, ranks and layers; see also `model_schema.MAX_EXPERTS`.
Count = Annotated[int, Field(ge=0), at_most(1 << 53)]
PositiveInt = Annotated[int, Field(gt=0), at_most(1 << 53)]
Width = Annotated[int, Field(gt=0), at_most((1 << 31) - 1)]
Experts = Ranks = Annotated[int, Field(ge=1, le=1 << 20)]
NullExperts = Annotated[int, Field(ge=0, le=1 << 20)]
MAX_LAYERS = 1 << 12
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
# Allows no path separator, quote or leading dash, because a name becomes a folder, a job name and part of shell lines.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
GROUP_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"  # no dot, because an expert group's name is one part of dotted keys
UNIX_GROUP_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
PATH_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"  # a label of a Ray node: `ray.io/accelerator-type`
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
GroupName = Annotated[str, Field(pattern=GROUP_PATTERN)]
# One share for all groups, or a share for each named group.
ShareByGroup = Annotated[
    Annotated[Share, Tag("number")] | Annotated[dict[GroupName, Share], Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict) else "number"),
]
PathText = Annotated[str, Field(pattern=PATH_PATTERN)]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]
# Names that no modality may have, because the tags loss/<name> of other losses use these names.
RESERVED_MODALITIES: tuple[str, ...] = ("total", "balance", "z", "auxiliary")

WATCHDOG_SHARE = 0.8  # watchdog's time limit divided by the process groups' timeout; between the two, ranks write reports

WholeConfig = Any  # means `schema.Config`, which cannot be imported here (circular import)

VIOLATIONS_LATER = "relations_later"  # key of pydantic's validation context: true if the caller itself calls `violations`


class Violation(NamedTuple):
    """A violated rule."""

    keys: tuple[str, ...]  # dotted keys that the rule compares; `violations` gives the keys relative to its section
    problem: str  # error text with key, value, rule and fix


# A value that a setting needs elsewhere in the configuration: a dotted key, or the dotted name of a capability of a
# section's kind; the allowed values, of which an error proposes the first; and the reason.
Need = tuple[str, tuple[Any, ...], str]


class Section(BaseModel):
    """The base class of all sections. A field is explained by its `description`, or by a docstring below the field if the
    text is too long for one line."""

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
        """Gives the field `kind` or `policy` the class docstring as description; puts each description on one line."""
        for name, field in cls.model_fields.items():
            named = (cls.__doc__ or "") if name in ("kind", "policy") else None
            text = field.description or named
            field.description = text if text is None else " ".join(text.split())

    def violations(self) -> Iterable[Violation]:
        """Returns the violated rules between keys of this section."""
        return ()

    def violations_in(self, config: WholeConfig) -> Iterable[Violation]:
        """Returns the violated rules between this section and other sections. The rules' keys are full paths, such as
        `parallel.ep`."""
        return ()

    @model_validator(mode="after")
    def _no_violations(self, info: ValidationInfo) -> "Section":
        if not (info.context or {}).get(VIOLATIONS_LATER) and (broken := [*self.violations()]):
            raise ValueError("; ".join(violation.problem for violation in broken))
        return self


class KindSection(Section):
    """The base class of sections that select one of several kinds of an object.

    A kind's section names the object's class as text, so that sections import without torch. `build` imports the class and
    calls it with a context and the section's fields as keywords; the context is a frozen dataclass beside the class, which
    has everything that objects of any kind may need. So neither a table of classes nor a list of arguments needs a new
    line for a new kind.
    """

    kind: Any

    builds: ClassVar[str]  # class, or function, that makes the object: "package.module:Class"
    served: ClassVar[str] = ""  # the kind, if exports to Hugging Face support it; else any other text

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        super().__pydantic_init_subclass__()
        has_kind = "kind" in cls.__annotations__ and not cls.model_fields["kind"].is_required()
        if has_kind and "builds" not in vars(cls):
            raise TypeError(f'{cls.__name__}: name the class that it configures, as builds = "package.module:Class"')

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the class that this section names."""
        return self.model_dump(exclude={"kind"})

    def build(self, *context: Any) -> Any:
        """Makes the object from this section and `context`, the only other value that objects of this kind need."""
        return named(self.builds)(*context, **self.keywords())


def named(text: str) -> Any:
    """Imports the object at `package.module:name`. The text is always from code, never from data."""
    module, _, name = text.partition(":")
    return getattr(import_module(module), name)


def sections_in(value: Any, path: str = "") -> Iterator[tuple[str, Section]]:
    """Yields every section of a configuration with its dotted key; a section comes before the sections inside it."""
    if isinstance(value, Section):
        yield path, value
        value = dict(value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple) else ()
    for name, item in items:
        yield from sections_in(item, f"{path}.{name}" if path else str(name))


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """Returns the end of an error text, with the name in `names` most similar to `name`; empty if none is similar."""
    close = difflib.get_close_matches(str(name), [str(known) for known in names], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unordered(schedule: Iterable[tuple[int, float]], key: str = "schedule") -> Iterator[Violation]:
    """Yields a violation unless the first steps of a schedule begin at 0 and rise."""
    starts = [start for start, _ in schedule]
    if starts[:1] != [0] or starts != sorted(set(starts)):
        problem = (
            f"{key} must start at step 0 and rise, got first steps {starts}; begin with step 0, and let each later pair "
        )
        yield Violation((key,), problem + "have a later step")


def unmet(config: WholeConfig, key: str, chosen: str, needs: Iterable[Need], *, instead: str) -> Iterator[Violation]:
    """Yields a violation for each of `needs` that the configuration does not meet. `chosen` (`key` with its value, as on
    the command line) has these needs; `instead` is the fix that avoids `chosen`."""
    for other, allowed, reason in needs:
        *above, name = other.split(".")
        section = config
        for part in above:
            section = getattr(section, part, None)
        value = getattr(section, name, allowed[0])  # another kind of a section may lack the key
        if value in allowed:
            continue
        fix = f"set {other}={_text(allowed[0])}"
        if section is not None and name not in type(section).model_fields:  # a capability of the section's kind
            other, value, fix = f"{'.'.join(above)}.kind", section.kind, "take another kind"
        shown = other if isinstance(value, Section) else f"{other}={_text(value)}"
        yield Violation((key, other), f"{shown}: {chosen}: {reason}; {fix}, or {instead}")


def _text(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    value = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, str) else json.dumps(value, default=lambda section: section.model_dump(mode="json"))


def unknown_name(what: str, name: str, names: Iterable[str]) -> str:
    """Returns an error text that lists `names` if `name` is not among them; else empty text."""
    known = list(names)
    return "" if name in known else f"no such {what}; there are {', '.join(known)}{did_you_mean(name, known)}"
