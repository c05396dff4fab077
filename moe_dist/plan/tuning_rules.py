"""Checks that the folder of samples for router tuning fits a configuration. Imports no torch."""

import hashlib
from pathlib import Path

from moe_dist.config.base.section import Violation
from moe_dist.config.load import leaves
from moe_dist.config.regular_file import open_regular
from moe_dist.config.schema import Config
from moe_dist.config.tuning_schema import KEY, RouterTuningSection
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.tuning_manifest import TuningManifest, file_problems, load_tuning_manifest

# Keys of `model` that may differ from the run that answered the samples' questions, because they change neither its output
# nor its routing.
_NO_PART = ("init_std", "max_seq_len", "moe.capacity", "moe.balance", "folder")


def check_tuning_data(config: Config, data: Manifest | None, data_problems: list[str]) -> list[Violation]:
    """Returns the rules that the folder of samples and the configuration together violate. Faults in the folder's files are
    added to `data_problems`. `data` is the manifest of `data.path`, or None if it could not be read."""
    section = config.router_tuning
    if section is None:
        return []
    try:
        manifest = load_tuning_manifest(section.data)
    except ConfigError as error:
        return [Violation((f"{KEY}.data",), problem) for problem in error.problems]
    except DataError as error:
        data_problems += error.problems
        return []
    data_problems += file_problems(section.data, manifest)
    problems = [
        *model_problems(config, manifest),
        *_member_problems(section, manifest),
        *_choice_problems(section, manifest),
    ]
    if data is not None:
        problems += _tokenizer_problems(config, data, manifest)
    lost = sorted(set(section.chosen_layers(config.model.moe_layers)) - set(manifest.layers))
    if lost and section.weight:
        problems.append(
            f"has no routing of the layers {lost}, only of {list(manifest.layers)}; prepare it with --layers for them, "
            f"or choose among these in {KEY}.layers"
        )
    if section.embedder is not None and not manifest.embedder.startswith(section.embedder.lower()):
        problems.append(
            f"its embedder is {manifest.embedder[:16]}... ({manifest.embedder_name}), but {KEY}.embedder="
            f"{section.embedder}; prepare it with that embedder, or set {KEY}.embedder to null"
        )
    if manifest.longest > config.data.seq_len:
        problems.append(
            f"its longest sample has {manifest.longest} tokens, more than data.seq_len={config.data.seq_len}; raise "
            "data.seq_len, or remove the task with long questions from --tasks"
        )
    keys = (f"{KEY}.data", KEY, "model", "data")
    return [Violation(keys, f"{KEY}.data={section.data!r}: {problem}") for problem in problems]


def model_problems(config: Config, manifest: TuningManifest) -> list[str]:
    """Returns an error text for each key of `model` that differs from the run that answered the questions."""
    here, there = leaves(config.model.model_dump(mode="json")), leaves(manifest.model)
    return [
        f"made from a run with model.{key}={value!r}, here it is {here.get(key)!r}; take that run's section model"
        for key, value in there.items()
        if here.get(key) != value and not any(f"{key}.".startswith(f"{part}.") for part in _NO_PART)
    ]


def tokenizer_digest(config: Config, data: Manifest) -> str:
    """Returns the SHA-256 of the tokenizer of a data set or of `model.folder`; '' if there is none. Raises OSError if
    the file cannot be read."""
    path = None if config.model.folder is None else Path(config.model.folder) / "tokenizer.json"
    if data.tokenizer is not None:
        path = Path(config.data.path) / data.tokenizer
    if path is None:
        return ""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tokenizer_problems(config: Config, data: Manifest, manifest: TuningManifest) -> list[str]:
    try:
        found = tokenizer_digest(config, data)
    except OSError:  # a different check reports that the tokenizer is missing
        return []
    if found in ("", manifest.tokenizer):  # '' means that the data set has no tokenizer to compare
        return []
    return [
        f"its samples were written with another tokenizer than that of data.path={config.data.path!r}; set data.path to "
        "the data of the run that it was made from, or prepare it again"
    ]


def _member_problems(section: RouterTuningSection, manifest: TuningManifest) -> list[str]:
    """Checks that there are enough samples, so that each sample can have k others as neighbours."""
    if section.regulariser == "l2" or section.weight == 0.0:
        return []
    members = manifest.right if section.filter_by_success else manifest.samples
    if not members:
        return [
            "the run answers none of its questions correctly, so that no sample has a successful neighbour; train the run "
            f"further, take easier --tasks, or set {KEY}.filter_by_success=false"
        ]
    wanted = section.neighbours.k if section.neighbours.kind == "nearest" else 1
    if members > wanted:
        return []
    of = "successful samples" if section.filter_by_success else "samples"
    fewer = f"lower {KEY}.neighbours.k, or " if wanted > 1 and members > 1 else ""
    return [f"it has {members} {of}, but {KEY}.neighbours needs more than {wanted}; {fewer}prepare more questions"]


def _choice_problems(section: RouterTuningSection, manifest: TuningManifest) -> list[str]:
    """Checks that the samples have the choices over which the objective computes its cross entropy."""
    if section.over_vocabulary:
        return []
    objective = f"{KEY}.objective={section.objective}"
    if manifest.choices is None:
        return [
            f"has no choices.npy, the first tokens of the questions' choices, which {objective} needs: an older version "
            f"prepared it; prepare it again, or set {KEY}.objective=tokens"
        ]
    if manifest.told:
        return []
    return [
        f"{objective} has nothing to train: in each of the {manifest.samples} questions a wrong choice begins with the "
        f"token of the right one; take other --tasks, or set {KEY}.objective=tokens"
    ]
