"""Starts a new run from the weights of another run's checkpoint (`run.init_from`). A tensor is
loaded if the checkpoint has one of equal name, shape and dtype, else initialised. `run.init_rules` may contain these rules:

upcycle       all experts of a group become copies of a dense FFN or of one expert (checkpoint/upcycle.py)
split         a dense FFN is cut into the experts of a group; their outputs sum to the FFN's output (checkpoint/split.py)
copy_nulls    router rows of null experts become copies of true experts' rows; the function stays the same (AdaMoE)

All checks run before the first step. The report lists the loaded tensors. If the model does not compute the same function
as the checkpoint's model, the report also lists the reasons.
"""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

from moe_dist.checkpoint.base import GUIDE, KEY, content_hash
from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.fits import ABSENT, Taken, fitting
from moe_dist.checkpoint.index import Source
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.split import fitting_or_split
from moe_dist.checkpoint.state import CheckpointState, TensorSpec
from moe_dist.checkpoint.upcycle import fitting_or_upcycled
from moe_dist.config.init_rules import source_problems
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.partial import read_stored
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.tuning_manifest import load_tuning_manifest
from moe_dist.hf.source import weights_digest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.top_k import GroupGate
from moe_dist.placement.parameter_names import EXPERT_NAME, Role, group_module, role_of_name

# Maps a rule to a text that says how rounding still changes the function that the checkpoint's model computes.
_SAME = {
    "upcycle": "",
    "split": "; the output of an FFN is the sum of its parts, added in order, so its last bits may differ",
    "copy_nulls": ", to the last bit",
}
_SOURCES: Mapping[str, Callable[[Contents, Mapping[str, TensorSpec]], Mapping[str, Source]]] = {
    "upcycle": fitting_or_upcycled,
    "split": fitting_or_split,
}
# Rules that set router tensors, or that deliberately keep their initial values.
_RULES_OF_ROUTERS = {"upcycle", "split"}
STAIR = 0.02  # for null experts of a split model: step from one bias to the next / score of a router row of zeros
_MOE_ROUTERS = {Role.ROUTER, Role.AUXILIARY_ROUTER}
# Keys of `model` that are not compared: they do not change the function, or tensor names or shapes show their changes.
_NO_PART = {"moe", "init_std", "max_seq_len", "dense_ffn_dim", "vocab_size"}


def begin_with_weights(config: Config, checkpoints: CheckpointManager, state: CheckpointState, model: Transformer) -> str:
    """Loads the weights of `run.init_from` into the model; returns a report to print. Collective over all ranks.

    Raises:
        ConfigError: there is no checkpoint, no tensor fits, or a rule cannot be applied; the message names a fix.
        DataError: the checkpoint is damaged.
    """
    assert config.run.init_from is not None
    path, rules = Path(config.run.init_from), config.run.init_rules
    upcycle, split, copy = "upcycle" in rules, "split" in rules, "copy_nulls" in rules
    sources = next((each for rule, each in _SOURCES.items() if rule in rules), fitting)
    source: ModelSection | None = None

    def check(contents: Contents) -> None:
        nonlocal source
        if KEY in contents.state.values:
            raise ConfigError(
                f"run.init_from={config.run.init_from!r}: {path} holds adapters and not the model under them; export it "
                "(tools.export_hf) and import that, or begin with the base",
                see=GUIDE,
            )
        if rules or config.train.only == "auxiliary_routers":
            source = _old_model(contents)
        if config.train.only == "auxiliary_routers" and (problem := _other_score(config, source)):
            raise ConfigError(f"run.init_from={config.run.init_from!r}: {problem}", see="docs/routing.md")
        # Upcycling needs no `source_problems`: a group's experts are then equal, so every choice gives equal outputs.
        problems = source_problems(config, source) if copy and not upcycle else []
        if problems:
            raise ConfigError(
                [f"run.init_rules: copy_nulls: {path}: {problem}" for problem in problems], see="docs/routing.md"
            )

    taken = checkpoints.load_fitting(path, state, sources=sources, check=check)
    lines = [taken.report()]
    if copy:
        rows = sum(gate.copy_true_rows() for gate in _gates(model, config))  # every rank has all router rows
        lines.append(f"copied {rows} null rows from true ones")
    if split:
        scores = [config.model.moe.router.equal_score(group) for group in config.model.moe.groups.values()]
        gates = _gates(model, config)  # ordered by layer, then by group
        rows = sum(gate.zero_rows(STAIR * score) for gate, score in zip(gates, cycle(scores)))
        lines.append(f"set {rows} router rows to 0, so that every token takes all parts of an FFN, each with the weight 1")
    if rules:
        misfits, changes = _misfits(config, source, taken), _changes(config, source, taken)
        if misfits or (changes and not upcycle):
            name = next(each for each in _SAME if each in rules)
            raise ConfigError(
                [f"run.init_rules: {name}: {path}: {each}" for each in (misfits if upcycle else [*misfits, *changes])],
                see="docs/routing.md",
            )
        same = "the same as the checkpoint's" + next(each for rule, each in _SAME.items() if rule in rules)
        lines.append(f"function of the model before its first step: {'; '.join(changes) if changes else same}")
    return "\n".join(lines)


def _old_model(contents: Contents) -> ModelSection | None:
    """Returns the section `model` of a checkpoint's configuration, or None if it has no configuration. Raises DataError if
    this version cannot read the section."""
    config = contents.state.values.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    try:
        return None if model is None else read_stored(ModelSection, model)
    except ConfigError as error:
        raise DataError(
            f"{contents.folder}: model of the configuration in its state.json cannot be read by this version of moe_dist; "
            f"use the version in provenance.json: {'; '.join(error.problems)}"
        ) from error


def check_scored(config: Config) -> None:
    """Raises ConfigError if the samples of router tuning were made with other weights than the run begins with, which are
    in `run.init_from` or `model.folder`."""
    if config.router_tuning is None:
        return
    manifest, first = load_tuning_manifest(config.router_tuning.data), config.run.init_from
    if first is not None:
        key, folder = "run.init_from", find_checkpoint(Path(first))
        found = content_hash(open_checkpoint(folder).index)
    else:
        key, folder = "model.folder", Path(str(config.model.folder))
        found = weights_digest(folder)
    if found != manifest.checkpoint:
        raise ConfigError(
            f"router_tuning.data={config.router_tuning.data!r}: made from the weights {manifest.checkpoint[:16]}... (step "
            f"{manifest.step} of {manifest.run}), but {folder} has {found[:16]}...; set {key} to those weights, or prepare "
            "the folder from these",
            see="docs/router-tuning.md",
        )


def _gates(model: Transformer, config: Config) -> list[GroupGate]:
    """Returns the gates (router weights) of all MoE layers and groups. Every rank has all gates unsharded."""
    names = [group_module(name) for name in config.model.moe.groups]
    gates = [moe.router.get_submodule(name) for moe in model.moe_modules() for name in names]
    return [gate for gate in gates if isinstance(gate, GroupGate)]


def _misfits(config: Config, source: ModelSection | None, taken: Taken) -> list[str]:
    """Returns the differences between checkpoint and model that no rule of `run.init_rules` allows: a tensor of another
    shape, a tensor that the model lacks, or another value of a key of `model`. Router tensors are not compared."""
    odd = [name for name in _kept(config, taken) if taken.kept[name] != ABSENT]
    problems = [
        f"{name} stays as initialised ({taken.kept[name]}); give the model what the checkpoint has" for name in odd[:1]
    ]
    problems += [
        f"{name} of the checkpoint has no place in the model; give the model what it is part of"
        for name in taken.left
        if role_of_name(name) not in _MOE_ROUTERS
    ][:1]
    other = _other_keys(config, source)
    if "upcycle" in config.run.init_rules:
        other.pop("mixture_of_depths", None)  # an upcycled model may add mixture of depths
    return problems + [f"{problem}; take that" for problem in other.values()]


def _changes(config: Config, source: ModelSection | None, taken: Taken) -> list[str]:
    """Returns the reasons, other than `_misfits`, why the model does not compute the same function as the checkpoint's
    model. Without such reasons both compute the same function (for an upcycled model, up to rounding)."""
    new = [name for name in _kept(config, taken) if taken.kept[name] == ABSENT]
    changes = [f"{name} stays as initialised ({ABSENT})" for name in new[:1]]
    changes += _other_experts(config, source)
    if "split" in config.run.init_rules:
        return changes + _scaled(source, taken)
    if "upcycle" not in config.run.init_rules:
        return changes
    mixture_of_depths = [problem for key, problem in _other_keys(config, source).items() if key == "mixture_of_depths"]
    return [*changes, *mixture_of_depths, *_upcycled_changes(config, source, taken)]


def _other_keys(config: Config, source: ModelSection | None) -> dict[str, str]:
    """Maps each key of `model` whose value differs in the checkpoint's configuration to a message with both values."""
    if source is None:
        return {}
    # `model.head_dim: null` means hidden_dim / num_heads.
    here, there = (
        each.model_dump(mode="json", exclude=_NO_PART) | {"head_dim": each.resolved_head_dim}
        for each in (config.model, source)
    )
    return {
        key: f"model.{key}={value!r}, the checkpoint's is {there[key]!r}"
        for key, value in here.items()
        if there[key] != value
    }


def _kept(config: Config, taken: Taken) -> list[str]:
    """Returns the tensors that keep their initial values, except router tensors that a rule deliberately does not set."""
    routers = [name for name in taken.kept if role_of_name(name) in _MOE_ROUTERS]
    if not _RULES_OF_ROUTERS & {*config.run.init_rules}:
        routers = [name for name in routers if name.endswith((".null", ".bias"))]
    return [name for name in taken.kept if name not in routers]


def _upcycled_changes(config: Config, source: ModelSection | None, taken: Taken) -> list[str]:
    """Returns the reasons for `_changes` that concern upcycled experts. The upcycled experts of a group are equal, so the
    weighted sum of their outputs equals the output of one expert if the weights sum to 1."""
    moe, router = config.model.moe, config.model.moe.router
    total, changes, scale = router.sum_of_weights, [], _old_scale(source, taken)
    if total is None:
        changes.append(f"with this model.moe.router ({router.said}) a token's weights need not sum to 1")
    if total is not None and total != scale:
        changes.append(f"model.moe.router.scale={total:g}, the experts were scaled by {scale}")
    for name, group in moe.groups.items():
        if group.num_identity + group.num_constant:
            changes.append(f"zero-computation experts of group {name} add something of their own")
        elif group.top_k <= group.num_null and "copy_nulls" not in config.run.init_rules:
            changes.append(
                f"a token of group {name} may choose null experts alone (top_k={group.top_k}, num_null={group.num_null})"
            )
    return changes


def _other_experts(config: Config, source: ModelSection | None) -> list[str]:
    """Returns reasons for `_changes` if model and checkpoint add the experts' output after different layers, or limit
    clamped experts differently."""
    reasons: list[str] = []
    old, new = source is not None and source.moe.shortcut, config.model.moe.shortcut
    if old != new:
        reasons.append(f"model.moe.shortcut={str(new).lower()}, the checkpoint's is {str(old).lower()}")
    here, there = config.model.moe.experts, None if source is None else source.moe.experts
    if here.kind == "clamped_ffn" and here != there:
        shown = None if there is None else there.model_dump(mode="json")
        reasons.append(f"model.moe.experts={here.model_dump(mode='json')}, the checkpoint's is {shown}")
    return reasons


def _other_score(config: Config, source: ModelSection | None) -> str:
    """Returns a text that says how the router's score differs from the checkpoint's score; empty if they are equal. The
    auxiliary routers of the checkpoint have learned to predict the choices made with the checkpoint's score."""
    old, new = (
        "sigmoid" if model is None else getattr(model.moe.router, "score", "sigmoid") for model in (source, config.model)
    )
    return (
        "" if old == new else f"model.moe.router.score={new}, the checkpoint's is {old}; set model.moe.router.score={old}"
    )


def _old_scale(source: ModelSection | None, taken: Taken) -> float:
    """Returns the scale of the checkpoint's router if experts of the checkpoint are copied or split, otherwise 1.0."""
    used = any(EXPERT_NAME.fullmatch(there) for there in taken.made_of.values())
    return getattr(source.moe.router, "scale", 1.0) if used and source is not None else 1.0


def _scaled(source: ModelSection | None, taken: Taken) -> list[str]:
    """Returns a reason for `_changes` if the split expert had a weight other than 1 in the checkpoint's model."""
    scale = _old_scale(source, taken)
    return [] if scale == 1.0 else [f"the checkpoint's model.moe.router.scale={scale}, but the parts start with weight 1"]
