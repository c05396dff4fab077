"""Makes a pydantic union of all kinds of a section. These are the classes in the files of a package of moe_dist, and the
kinds that other installed packages offer.

A new file in the package adds a kind; no list of kinds must be edited. Another package offers a kind through an entry point
in the group `moe_dist.<folder>`, such as `moe_dist.routers`. The entry point's name is the kind, and its value names the
section's class. If a configuration names a kind without a file, entry points are searched, and only this kind is imported.
If all kinds are listed, all entry points are imported. A configuration never names a module to import.
"""

import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated, Any, NamedTuple, Union

from pydantic import Discriminator, Tag
from pydantic_core import CoreSchema, core_schema
from pydantic_core.core_schema import SerializationInfo, ValidationInfo

from moe_dist.config.base.section import KindSection

OTHERS = "kind of another package"  # tag of the union member for the kinds of other packages
PACKAGE = "package"  # additional key that stores the package's name in a section of such a kind


class OtherKinds(NamedTuple):
    """The member of a union that accepts the kinds of other packages.

    Attributes:
        group: Group of the entry points.
        base: Class from which all sections of these kinds derive.
    """

    group: str
    base: type[KindSection]

    def entry_points(self) -> EntryPoints:
        return _entry_points(tuple(sys.path)).select(group=self.group)

    def section(self, kind: str) -> type[KindSection]:
        """Imports the section class of an offered kind. Raises ValueError if the offering package is broken."""
        found = self.entry_points().select(name=kind)
        if len({point.value for point in found}) > 1:
            packages = " and ".join(sorted(map(_package, found)))
            raise ValueError(f"the packages {packages} both offer the kind {kind!r}; uninstall one of them")
        point = next(iter(found))
        offer = f"the package {_package(point)} offers the kind {kind!r} by {point.value}"
        try:
            section = point.load()
        except Exception as error:  # importing another package may raise any error
            raise ValueError(
                f"{offer}, which cannot be imported ({type(error).__name__}: {error}); repair or uninstall it"
            ) from error
        if not (isinstance(section, type) and issubclass(section, self.base) and kind_of(section) == kind):
            raise ValueError(f"{offer}, which is no {self.base.__name__} of that kind; repair or uninstall it")
        return section

    def sections(self) -> dict[str, type[KindSection]]:
        """Imports the section classes of all offered kinds, except the kinds of broken packages."""
        found = {}
        for kind in sorted(self.entry_points().names):
            try:
                found[kind] = self.section(kind)
            except ValueError:
                continue  # the error is reported if a configuration chooses this kind
        return found

    def __get_pydantic_core_schema__(self, *_: Any) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self._written, info_arg=True)
        return core_schema.with_info_plain_validator_function(self._read, serialization=written)

    def _read(self, value: Any, info: ValidationInfo) -> KindSection:
        if isinstance(value, self.base):
            return value
        fields = {name: each for name, each in value.items() if name != PACKAGE}
        section = self.section(value["kind"])
        return section.model_validate_json(json.dumps(fields), context=info.context)  # JSON lists become tuples

    def _written(self, section: KindSection, info: SerializationInfo) -> dict[str, Any]:
        (point, *_) = self.entry_points().select(name=kind_of(type(section)))
        return {**section.model_dump(mode=info.mode), PACKAGE: _package(point)}


def kinds_in(package: ModuleType, base: type[KindSection], *, default: str | None = None) -> Any:
    """Returns the type of a field whose value is a section of any kind. The key `kind` selects the section's class, which
    derives from `base`, a class in the file `base.py` of `package`. A section without the key `kind` has the kind
    `default`."""
    names = sorted(each.name for each in iter_modules(package.__path__) if each.name != "base")
    modules = [import_module(f"{package.__name__}.{name}") for name in names]
    found = {
        kind_of(each): each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, base) and each.__module__ == module.__name__
    }
    sections = dict(sorted(found.items()))
    others, kind_in = OtherKinds(f"moe_dist.{package.__name__.rpartition('.')[2]}", base), kind_or(default)

    def tag(value: Any) -> str | None:
        kind = kind_in(value)
        known = kind is None or kind in sections or kind not in others.entry_points().names
        return kind if known else OTHERS

    members = [Annotated[each, Tag(kind)] for kind, each in sections.items()]
    return Annotated[Union[(*members, Annotated[Any, others, Tag(OTHERS)])], Discriminator(tag)]


def kind_or(default: str | None) -> Callable[[Any], str | None]:
    """Returns a function that reads the kind from a section or from a section's plain values. For plain values without a
    kind, the function returns `default`."""

    def kind_in(value: Any) -> str | None:
        kind = value.get("kind", default) if isinstance(value, Mapping) else getattr(value, "kind", None)
        return kind if kind is None or isinstance(kind, str) else repr(kind)

    return kind_in


def kind_of(section: type[KindSection]) -> str:
    return section.model_fields["kind"].default


@cache
def _entry_points(path: tuple[str, ...]) -> Any:  # returns SelectableGroups in Python 3.11, but EntryPoints in 3.12
    """Returns the entry points of all packages on `sys.path`. Reads one file of each installed package."""
    return entry_points()


def _package(point: EntryPoint) -> str:
    return "of an unknown name" if point.dist is None else point.dist.name
