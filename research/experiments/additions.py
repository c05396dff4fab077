"""Reads additions to experiments. After the first run of an experiment, the file of the experiment may not change any more,
so later additions are in FILE in the folder of the records. FILE maps names of experiments to `Additions`."""

from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError
from research.experiments.rules import ArmName, Part

FILE = "additions.yaml"


class Additions(Part):
    not_testable: str = ""  # see `Study.not_testable`
    names: dict[ArmName, str] = Field(default_factory=dict)  # short names of arms


def read_additions(folder: Path, experiment: str) -> Additions:
    """Returns the additions to an experiment from FILE in `folder`. They are empty if FILE does not name the experiment.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / FILE
    values, problems = load_yaml(path.read_text()) if path.is_file() else ({}, [])
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    try:
        return TypeAdapter(dict[str, Additions]).validate_python(values).get(experiment, Additions())
    except ValidationError as error:
        places = [(".".join(map(str, each["loc"])) or "the file", each["msg"]) for each in error.errors()]
        keys = "; under the name of each experiment write not_testable: TEXT, names: {ARM: TEXT}, or both"
        raise ConfigError([f"{path}: {place}: {text}{keys}" for place, text in places]) from error
