"""Reads and writes YAML for configurations. Loading runs no code, and duplicate keys are errors.

Plain scalars follow YAML 1.2. PyYAML follows YAML 1.1, where `no`, `on` and `1:30` are not strings and `1e-4` is not a
number. This module reads only `true` and `false` as booleans, and only JSON's numbers and `.inf` as numbers. It reads all
other scalars as text. Dates, sets and binary values are errors.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from moe_dist.config.regular_file import read_regular

MAX_YAML_BYTES = 1 << 18  # largest size of a file, in bytes
# Largest number of values in one document; an alias counts as all values that it stands for. PyYAML takes up to 30 us per
# value, so a text is read or rejected within a second. The largest configurations have some hundred values and a list of
# ranks.
MAX_VALUES = 20_000
MAX_REPEATED = 50  # largest number of duplicate keys that an error names
MAX_DEPTH = 32  # deepest allowed nesting, because PyYAML takes longer for deeper values
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
_BRACKETS = {"while parsing a flow sequence": ("list", "[", "]"), "while parsing a flow mapping": ("mapping", "{", "}")}
_QUOTE = "while scanning a quoted scalar, found unexpected end of stream"
# Patterns for PyYAML's error messages, which name the construct that PyYAML was parsing and the text that it found. The
# first pattern that matches a message gives the rule that is broken.
_RULES = {
    r"'\\t' that cannot start any token": "no tab may stand before a key or value; indent with spaces",
    r"that cannot start any token": "no plain text may begin with this character; put the text in quotes",
    _QUOTE: "the quote that begins here is not closed; close it",
    r"mapping values are not allowed here": "no key may stand here; indent it as the keys above it, or put a text that "
    "contains `: ` in quotes",
    r"could not find expected ':'": "a key needs `: ` and a value; write `key: value`",
    r"block \w+, (did not find|expected <block end>)": "this does not continue the lines above; begin keys and entries in "
    "the column of those above them, and put a text in quotes as a whole",
    r"undefined alias": "a value that begins with * repeats a value marked with &; put any other text in quotes",
    r"found unknown escape": "between double quotes \\ begins an escape such as \\n; write \\\\, or use single quotes",
    r"determine a constructor for the tag": "no value may name its type (!...); write plain values",
    r"flow node, expected the node content, but found '<stream end>'": "a bracket is not closed before the end; close it",
    r"flow node, expected the node content": "a value is missing here; write it, or remove the comma",
    r"expected a single document": "a file has one document; remove the line `---`",
}


class _Loader(yaml.SafeLoader):
    """Reads scalars by the rules in `_RESOLVERS`, and collects in `repeated` an error text for each duplicate key."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Rejects a text with too many values while the text is being read."""
        self._values += 1
        self._depth += 1
        _require(self._values <= MAX_VALUES, f"more than {MAX_VALUES:,} values")
        _require(self._depth <= MAX_DEPTH, f"values are nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Rejects a document with too many values before the values are created, because nine lines of aliases can stand
        for a billion values."""
        node = super().get_single_node()
        count = 0 if node is None else _values_in(node, {})
        problem = f"more than {MAX_VALUES:,} values with all aliases (*), or an anchor (&) contains its own alias"
        _require(count <= MAX_VALUES, problem)
        return node

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
                key.tag = "tag:yaml.org,2002:str"  # keys are read as text, even if they look like numbers
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Writes a text in quotes if `_RESOLVERS` would read it back as a number, boolean or null."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # repeated values are written in full, because anchors are hard to read


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


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise yaml.constructor.ConstructorError(None, None, problem, None)


def _values_in(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Counts the values in a node. An alias counts as all values that it stands for. If the node contains itself, the count
    is above MAX_VALUES."""
    if node not in counts:
        counts[node] = MAX_VALUES + 1  # the result if the node contains itself
        inner = chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[node] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_values_in(each, counts) for each in inner)
    return counts[node]


def load_yaml(text: str) -> tuple[Any, list[str]]:
    """Returns the value of a YAML text, and an error text for each duplicate key. If the text has a syntax error, returns
    None and an error text for the first syntax error."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        return None, [_syntax_error(error, text)]
    except (ValueError, RecursionError):
        return None, ["a number has too many digits, or values are nested too deeply"]
    return value, loader.repeated[:MAX_REPEATED]


def _syntax_error(error: yaml.YAMLError, text: str) -> str:
    """Returns an error text with line and column of a syntax error, the text of this line, the violated rule and a fix."""
    mark, rule = _rule_of(error) if isinstance(error, yaml.MarkedYAMLError) else (None, str(error))
    if mark is None:
        return " ".join(rule.replace("<unicode string>", "the text").split())
    lines = text.splitlines()
    line = lines[mark.line].strip() if mark.line < len(lines) else "end of the file"
    return f"line {mark.line + 1}, column {mark.column + 1} ({line!r}): {rule}"


def read_yaml(path: Path, *, links: bool = True) -> tuple[Any, list[str]]:
    """Reads a YAML file and returns what `load_yaml` returns for its text. Follows a symbolic link only if `links` is True.
    Raises OSError or ValueError if the file cannot be read, is larger than MAX_YAML_BYTES, or is not UTF-8."""
    return load_yaml(read_regular(path, most_bytes=MAX_YAML_BYTES, links=links).decode())


def read_mapping(path: Path, content: str, *, links: bool = True) -> tuple[dict[str, Any] | None, list[str]]:
    """Reads a YAML file that must contain a mapping, as `read_yaml` does. In error texts, `content` describes the mapping's
    entries. Returns {} for an empty file."""
    values, problems = read_yaml(path, links=links)
    problems = [f"{path}: {problem}" for problem in problems]
    if values is None and not problems:
        return {}, []
    if not isinstance(values, dict):
        return None, problems or [f"{path}: must be a mapping of {content}, got {type(values).__name__}"]
    return values, problems


def dump_yaml(value: Any) -> str:
    """Returns YAML text from which `load_yaml` reads an equal value. Mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def _rule_of(error: yaml.MarkedYAMLError) -> tuple[yaml.Mark | None, str]:
    """Returns the place of a syntax error, and the broken rule with its fix. For an unclosed bracket or quote, this is the
    place of the opening character. If no rule matches the error, returns PyYAML's text instead of a rule."""
    context, problem = error.context or "", error.problem or ""
    words = f"{context}, {problem}" if context else problem
    if context in _BRACKETS and error.context_mark is not None:
        kind, opening, closing = _BRACKETS[context]
        if "<stream end>" in problem:
            return error.context_mark, f"the {kind} that begins here with {opening} is not closed; add {closing}"
        if error.problem_mark is not None and (line := error.problem_mark.line) > error.context_mark.line:
            return error.context_mark, (
                f"the {kind} that begins here with {opening} is not closed before line {line + 1}; add {closing} at the "
                f"end of line {line}, or a comma if line {line + 1} belongs to the {kind}"
            )
        begin = f"the {kind} that begins with {opening} in line {error.context_mark.line + 1}"
        return error.problem_mark, f"in {begin}, a comma or {closing} must follow each value; add it"
    rule = next((rule for pattern, rule in _RULES.items() if re.search(pattern, words)), words)
    return (error.context_mark if words == _QUOTE else error.problem_mark), rule
