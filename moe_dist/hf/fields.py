"""Reads the fields of a config.json, and records which fields were read, so that an import can report all others."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_dist.config.json_text import read_json
from moe_dist.errors import ConfigError, DataError

Choices = Mapping[str, Mapping[str, bool]]  # maps each value of a key (the default first) to names and values of fields

MAX_JSON_BYTES = 1 << 26  # the index of 250,000 tensors has 25 MB
_MISSING: Any = object()

# Fields that do not change the logits: names, token ids, and options of training or of transformers.
INERT = frozenset(
    (
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "cache_implementation",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder",
        "label2id", "model_type", "output_attentions", "output_hidden_states",
        "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "rope_interleaved",
        "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers_version", "use_cache",
        "is_llama_config", "transformers.js_config",
    )
)  # fmt: skip


def setting(name: str, value: object) -> str:
    """Returns a setting in the syntax of a configuration file."""
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def read_object(path: Path, what: str, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `most_bytes`. `what` describes the file in error messages. Raises
    DataError if the file is missing, too large, or contains no JSON object."""
    try:
        values = read_json(path, most_bytes=most_bytes)
    except OSError as error:
        raise DataError(f"{what} {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{what} {path}: is no JSON: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise DataError(f"{what} {path}: must be a JSON object, not {type(values).__name__}")
    return values


class Fields:
    """The fields of a config.json. Its error messages contain the field's name, its value and the allowed values."""

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self._values, self.family = values, family
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING) -> Any:
        """Returns a field's value, or `default` if the field is absent, or `null` if the field is null. Raises ConfigError
        if the field is absent and `default` is not given, or is null and `null` is not given."""
        self._read.add(name)
        value = self._values.get(name, default)
        value = null if value is None and name in self._values else value
        if value is _MISSING:
            problem = "null" if name in self._values else "missing"
            raise ConfigError(f"config.json: {name} is {problem}; a {self.family} model must say it")
        return value

    def whole(self, name: str, default: Any = _MISSING, *, null: Any = _MISSING, most: int | None = None) -> Any:
        """Returns the value of a field that must be an integer from 1 to `most` (2^53 - 1 if `most` is None). For `default`
        and `null` see `get`."""
        limit = (1 << 53) - 1 if most is None else most
        rule = f"a whole number above 0 and {'below 2^53' if most is None else f'at most {most:,}'}"
        return self._fitting(name, default, null, rule, lambda v: type(v) is int and 0 < v <= limit)

    def count(self, name: str, default: Any = _MISSING, *, least: int = 0) -> int:
        """Returns the value of a field that must be an integer of at least `least`; the default if it is absent."""
        rule = "a whole number" if least == 0 else f"a whole number of at least {least}"
        return self._fitting(name, default, _MISSING, rule, lambda v: type(v) is int and v >= least)

    def one_of(self, names: Sequence[str]) -> int:
        """Returns a positive integer from a field that has several possible names. If several exist, they must be equal."""
        found = {name: self.whole(name) for name in names if name in self._values}
        if len(set(found.values())) > 1:
            raise ConfigError(f"config.json: {' and '.join(f'{n}={v}' for n, v in found.items())} contradict each other")
        return next(iter(found.values())) if found else self.whole(names[0])

    def positive(self, name: str, default: Any = _MISSING) -> float:
        """Returns the value of a field that must be a number above 0; the default if it is absent."""
        rule, most = "a number above 0", sys.float_info.max
        return float(self._fitting(name, default, _MISSING, rule, lambda v: type(v) in (int, float) and 0 < v <= most))

    def many(self, name: str, default: Any = None, *, null: Any = _MISSING) -> Any:
        """Returns the value of a field that must be a list. For `default` and `null` see `get`."""
        return self._fitting(name, default, null, "a list", lambda value: isinstance(value, list))

    def mapping(self, name: str) -> dict[str, Any]:
        """Returns the value of a field that must be an object. Returns an empty object if the field is absent or null."""
        return self._fitting(name, None, None, "an object", lambda value: isinstance(value, dict)) or {}

    def flag(self, name: str, default: bool) -> bool:
        return self._fitting(name, default, _MISSING, "true or false", lambda value: isinstance(value, bool))

    def choice(self, choices: Choices) -> str:
        """Returns the key of `choices` whose fields have the same values in config.json."""
        first = next(iter(choices.values()))
        values = {name: self.flag(name, default) for name, default in first.items()}
        return next(choice for choice, fields in choices.items() if fields == values)

    def _fitting(self, name: str, default: Any, null: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
        """Returns the value of a field, which must satisfy `fits`. See `get` for `default` and `null`. `rule` describes
        `fits` in words."""
        value = self.get(name, default, null=null)
        if self._values.get(name) is not None and not fits(value):
            raise ConfigError(f"config.json: {name}={value!r:.80} must be {rule}")
        return value

    def must_be(self, name: str, allowed: Collection[Any], why: str) -> None:
        """Raises ConfigError if a field exists with a value that is not in `allowed`. The error text contains `why`."""
        self._read.add(name)
        if name in self._values and self._values[name] not in allowed:
            raise ConfigError(f"config.json: {name}={self._values[name]!r:.80} is not supported: {why}")

    def unread(self) -> Sequence[str]:
        """Returns the names of the fields that have a value, were not read, and may change the logits."""
        return sorted(name for name, value in self._values.items() if value is not None and name not in self._read | INERT)


@dataclass(frozen=True)
class Value:
    """A field of config.json whose value equals the value of a key in a section."""

    name: str
    kind: Literal["whole", "count", "positive", "flag"] = "whole"  # name of the method of `Fields` that reads the field
    default: Any = _MISSING


@dataclass(frozen=True)
class Part:
    """Maps each key of a section to the form of its value in config.json: a `Value`, `Choices`, or a constant."""

    keys: Mapping[str, Any] = field(hash=False)

    def read(self, read: Fields) -> dict[str, Any]:
        return {
            key: getattr(read, each.kind)(each.name, each.default)
            if isinstance(each, Value)
            else (read.choice(each) if isinstance(each, Mapping) else each)
            for key, each in self.keys.items()
        }

    def write(self, section: Any) -> dict[str, Any]:
        """Returns the fields of config.json. A value that is not among the `Choices` of its key gives no fields."""
        fields: dict[str, Any] = {}
        for key, each in self.keys.items():
            if isinstance(each, Value):
                fields[each.name] = getattr(section, key)
            elif isinstance(each, Mapping):
                fields |= each.get(getattr(section, key), {})
        return fields
