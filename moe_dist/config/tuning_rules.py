"""Rules of router tuning for a configuration and for its folder of samples. Imports no torch."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import JsonValue

from moe_dist.config.manifest import Manifest
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation
from moe_dist.config.tuning_manifest import TuningManifest, file_problems, load_tuning_manifest
from moe_dist.config.tuning_schema import RouterTuningSection
from moe_dist.errors import ConfigError, DataError

KEY = "router_tuning"
# Keys of `model` that change neither the scored model's output nor its routing.
_NO_PART = ("init_std", "max_seq_len", "moe.capacity", "moe.balance")


def chosen_layers(section: RouterTuningSection, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the transformer layers whose routers are trained, in order."""
    return tuple(sorted(section.layers)) or moe_layers[-section.last_layers :]


def tuning_violations(config: Config) -> Iterator[Violation]:
    """Violated rules of `router_tuning` that do not depend on the data."""
    section, only = config.router_tuning, config.train.only
    if section is None:
        if only == "routers":
            problem = (
                f"train.only=routers: needs the section {KEY}, which names its data; add it, or set train.only to null"
            )
            yield Violation(("train.only", KEY), problem)
        return
    if only != "routers":
        problem = f"train.only={only or 'null'}: {KEY} trains routers alone; set train.only=routers, or leave {KEY} out"
        yield Violation(("train.only", KEY), problem)
    yield from _start_violations(config)
    yield from _model_violations(config)
    yield from _layer_violations(config, section)


def _start_violations(config: Config) -> Iterator[Violation]:
    """The run must start with exactly the scored weights, at the first sample."""
    run = config.run
    if run.init_from is None:
        problem = f"run.init_from=null: {KEY} tunes a trained model; set it to the run that {KEY}.data is made from"
        yield Violation(("run.init_from", KEY), problem)
    if run.init_rules:
        problem = (
            f"run.init_rules={list(run.init_rules)}: makes another model than the one that {KEY}.data was read from; leave "
            "them out, or train that model first"
        )
        yield Violation(("run.init_rules", KEY), problem)
    if run.keep_position:
        problem = (
            f"run.keep_position=true: {KEY} reads samples of its own, where that checkpoint has no place; set it to false"
        )
        yield Violation(("run.keep_position", KEY), problem)


def _model_violations(config: Config) -> Iterator[Violation]:
    moe = config.model.moe
    if config.loss.z:
        problem = f"loss.z={config.loss.z:g}: {KEY} has no z-loss, which would pull all routing together; set it to 0"
        yield Violation(("loss.z", KEY), problem)
    if not moe.router.softmax_top_k:
        problem = (
            f"{moe.router.name}: {KEY} compares the softmax by which tokens choose experts, and "
            "there experts choose, or the number of choices is fixed or drawn; tune a run with kind=top_k"
        )
        yield Violation(("model.moe.router.kind", KEY), problem)
    if config.model.mixture_of_depths is not None:
        problem = (
            f"model.mixture_of_depths: a token that a layer passes by has no routing there to compare; {KEY} needs "
            "model.mixture_of_depths=null"
        )
        yield Violation(("model.mixture_of_depths", KEY), problem)
    if moe.balance:
        problem = (
            f"model.moe.balance: its controllers would move selection biases, which {KEY} leaves alone; set it to []: "
            "the biases of the checkpoint are kept"
        )
        yield Violation(("model.moe.balance", KEY), problem)


def _layer_violations(config: Config, section: RouterTuningSection) -> Iterator[Violation]:
    there = config.model.moe_layers
    if section.weight and section.regulariser == "manifold" and importlib.util.find_spec("sklearn") is None:
        problem = f"{KEY}.neighbours: needs the package scikit-learn; install moe_dist[router-tuning], or {KEY}.weight=0"
        yield Violation((f"{KEY}.neighbours",), problem)
    if not section.layers and section.last_layers > len(there):
        problem = (
            f"{KEY}.last_layers={section.last_layers}: the model has {len(there)} MoE layers; take no more, all "
            "of them at most"
        )
        yield Violation((f"{KEY}.last_layers", "model.num_layers"), problem)
    wrong = sorted(set(section.layers) - set(there))
    if wrong or len(set(section.layers)) < len(section.layers):
        what = f"layers {wrong} hold no experts" if wrong else "a layer stands there twice"
        problem = f"{KEY}.layers={list(section.layers)}: {what}; take some of {list(there)}, each once"
        yield Violation((f"{KEY}.layers", "model.num_layers", "model.moe"), problem)
    if section.weight == 0.0 and no_task_gradient(config):
        problem = (
            f"{KEY}.weight=0: with normalised weights ({config.model.moe.router.said}) and top_k=1 each weight is always "
            f"1, so that cross entropy gives no router a gradient and nothing would move; set {KEY}.weight above 0, or "
            "tune a run with top_k of 2 or more"
        )
        yield Violation((f"{KEY}.weight", "model.moe.router", "model.moe.groups"), problem)


def no_task_gradient(config: Config) -> bool:
    """Whether cross entropy gives no router a gradient: each token has one choice, and its weight is normalised to 1."""
    one = all(group.top_k == 1 for group in config.model.moe.groups.values())
    return one and config.model.moe.router.normalises_chosen


def check_tuning_data(config: Config, data: Manifest | None, data_problems: list[str]) -> list[Violation]:
    """Checks the folder of samples against the configuration; faults of its files are added to `data_problems`.

    Args:
        data: Manifest of `data.path`; None if it could not be read.
    """
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
    problems = [*model_problems(config, manifest), *_member_problems(section, manifest)]
    if data is not None:
        problems += _tokenizer_problems(config, data, manifest)
    lost = sorted(set(chosen_layers(section, config.model.moe_layers)) - set(manifest.layers))
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
            f"its longest sample has {manifest.longest} tokens, more than data.seq_len={config.data.seq_len}; raise it, or "
            "leave the task with long questions out of --tasks"
        )
    keys = (f"{KEY}.data", KEY, "model", "data")
    return [Violation(keys, f"{KEY}.data={section.data!r}: {problem}") for problem in problems]


def model_problems(config: Config, manifest: TuningManifest) -> list[str]:
    """Keys of `model` that differ from the scored run's."""
    here, there = _flat(config.model.model_dump(mode="json")), _flat(manifest.model)
    return [
        f"made from a run with model.{key}={value!r}, here it is {here.get(key)!r}; take that run's section model"
        for key, value in there.items()
        if here.get(key) != value and not any(f"{key}.".startswith(f"{part}.") for part in _NO_PART)
    ]


def tokenizer_digest(folder: str | Path, data: Manifest) -> str:
    """SHA-256 of a data set's tokenizer; '' without a tokenizer. Raises: OSError."""
    if data.tokenizer is None:
        return ""
    with (Path(folder) / data.tokenizer).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tokenizer_problems(config: Config, data: Manifest, manifest: TuningManifest) -> list[str]:
    try:
        found = tokenizer_digest(config.data.path, data)
    except OSError:  # another check reports a data set that lacks its tokenizer
        return []
    if found in ("", manifest.tokenizer):  # without a tokenizer only the owner knows the ids
        return []
    return [
        f"its samples were written with another tokenizer than that of data.path={config.data.path!r}; set data.path to "
        "the data of the run that it was made from, or prepare it again"
    ]


def _member_problems(section: RouterTuningSection, manifest: TuningManifest) -> list[str]:
    """Checks that there are enough members for k neighbours besides the sample itself."""
    if section.regulariser == "l2" or section.weight == 0.0:
        return []
    members = manifest.right if section.filter_by_success else manifest.samples
    if not members:
        return [
            "the run has none of its questions right, so that there is no successful sample to be a neighbour; train it "
            f"further, take easier --tasks, or set {KEY}.filter_by_success=false"
        ]
    wanted = section.neighbours.k if section.neighbours.kind == "nearest" else 1
    if members > wanted:
        return []
    of = "successful samples" if section.filter_by_success else "samples"
    fewer = f"lower {KEY}.neighbours.k, or " if wanted > 1 and members > 1 else ""
    return [
        f"it has {members} {of}, and {KEY}.neighbours wants {wanted} of them beside the sample itself; {fewer}prepare more "
        "questions"
    ]


def _flat(values: Mapping[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
