"""Rules of YAML in plain words, in place of the words of PyYAML's scanner and parser."""

import re

import yaml

_BRACKETS = {"while parsing a flow sequence": ("list", "[", "]"), "while parsing a flow mapping": ("mapping", "{", "}")}
_QUOTE = "while scanning a quoted scalar, found unexpected end of stream"
# PyYAML's words: what it was doing, and what it then met. The first pattern that is found gives the rule.
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


def rule_of(error: yaml.MarkedYAMLError) -> tuple[yaml.Mark | None, str]:
    """Returns the place of a syntax error, and the broken rule with its fix. The place of a bracket or quote that is not
    closed is where it begins. Without a rule for the error, the text is PyYAML's."""
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
