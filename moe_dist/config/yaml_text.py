"""Reads and writes YAML for configurations. Loading runs no code, and duplicate keys are errors.

Plain scalars follow YAML 1.2. PyYAML follows YAML 1.1, where `no`, `on` and `1:30` are not strings and `1e-4` is not a
number. Here only `true` and `false` are booleans, JSON's numbers and `.inf` are numbers, and all else is text. Dates, sets
and binary values are errors.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

_RESOLVERS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    """A loader with the rules of `_RESOLVERS`, which collects duplicate keys of a mapping in `repeated`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen and key.value != "<<":
                self.repeated.append(f"{key.value!r} is in line {seen[key.value]} and again in line {line}; keep one")
            seen[key.value] = line
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"  # names of keys stay text, even if they look like numbers
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes a text which `_RESOLVERS` would read back as a number, boolean or null."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # writes repeated values in full, because anchors are hard to read


def _with_resolvers(*classes: Any) -> None:
    for cls in classes:
        cls.yaml_implicit_resolvers = {}
        for tag, pattern, first in _RESOLVERS:
            cls.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), ["" if c == "\0" else c for c in first])


_with_resolvers(_Loader, _Dumper)
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("map", "seq", "str", "int", "float", "bool", "null")
}


def load_yaml(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, and its faults: duplicate keys, or the first syntax error; with a syntax error the value is
    None."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        json.dumps(value)  # finds values that contain themselves, which YAML allows
    except yaml.YAMLError as error:
        return None, [" ".join(str(error).replace("<unicode string>", "the text").split())]
    except (ValueError, RecursionError):
        return None, ["an anchor (&) contains its own alias (*), or values are nested too deeply"]
    return value, loader.repeated


def read_mapping(path: Path, content: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Like `load_yaml`, for a file that must hold a mapping of `content`. An empty file is an empty mapping.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    values, problems = load_yaml(path.read_text(encoding="utf-8"))
    problems = [f"{path}: {problem}" for problem in problems]
    if values is None and not problems:
        return {}, []
    if not isinstance(values, dict):
        return None, problems or [f"{path}: must be a mapping of {content}, got {type(values).__name__}"]
    return values, problems


def dump_yaml(value: Any) -> str:
    """Text from which `load_yaml` reads an equal value; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
