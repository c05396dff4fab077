"""Makes a pydantic union of all section classes in a package. A new file in the package adds a kind: there is no list of
kinds to edit."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated, Any, Union

from pydantic import Field

from moe_dist.config.base.section import Section


def kinds_in(package: ModuleType, base: type[Section]) -> Any:
    """Returns the type of a field that takes any section in the files of `package`. The key `kind` selects the
    section. All sections derive from `base`, which is in the file `base.py`."""
    names = sorted(each.name for each in iter_modules(package.__path__) if each.name != "base")
    modules = [import_module(f"{package.__name__}.{name}") for name in names]
    sections = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, base) and each.__module__ == module.__name__
    ]
    return Annotated[Union[tuple(sections)], Field(discriminator="kind")]  # noqa: UP007
