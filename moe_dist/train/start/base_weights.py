"""Loads the base: the frozen model to which LoRA adapters are added. A new run loads the base from `run.init_from` (with
`run.init_rules: [adapt]`). A resumed run loads the base from the folder that its checkpoint names, and refuses the base if
its content hash differs from the hash in the checkpoint.

An adapter adds the product of two matrices A and B to a weight, and B is initially 0. Before the first step the model
therefore computes the same function as the base. The logits of the two are bit-equal only in batches without padding. A
base with one expert per layer leaves padding out of its matrix products, but a model with adapters does not. The rounding
of a matrix product depends on its number of rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moe_dist.checkpoint.base import GUIDE, KEY, Base, base_sources, find_base
from moe_dist.checkpoint.contents import Contents
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, TensorSpec, capture
from moe_dist.config.model_schema import ModelSection
from moe_dist.config.partial import read_stored
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.source import weights_digest
from moe_dist.parallel.initialise import set_whole
from moe_dist.placement.parameter_names import ADAPTERS, Role, role_of_name

# Keys of `model` that must have equal values in the model and the base, so that both compute the same function. Keys that
# change shapes are missing here, because `base_sources` compares shapes.
_FUNCTION = (
    "resolved_head_dim",
    "num_heads",
    "attention",
    "rope_base",
    "rope_scaling",
    "rope_dim",
    "rope_pairs",
    "sliding_window",
    "sliding_layers",
    "norm_eps",
    "qk_norm",
    "attention_bias",
    "tie_embeddings",
    "mixture_of_depths",
)


def begin_on_base(config: Config, checkpoints: CheckpointManager, model: nn.Module, layout: RankLayout) -> tuple[Base, str]:
    """Loads the base from `run.init_from` into a model with new adapters; returns the base and a report. Collective.

    Raises:
        ConfigError: there is no checkpoint, or the checkpoint does not fit the model. The error lists every reason.
        DataError: the checkpoint is damaged.
    """
    assert config.run.init_from is not None
    found: list[Base] = []

    def check(contents: Contents) -> None:
        if problems := base_problems(config.model, contents):
            raise ConfigError([f"run.init_rules: adapt: {contents.folder}: {problem}" for problem in problems], see=GUIDE)
        found.append(Base.of(contents, checkpoints.folder))

    def sources(contents: Contents, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        return base_sources(contents, {name: spec for name, spec in specs.items() if _of_base(name, config.model)})

    state = capture(model, None, layout)
    taken = checkpoints.load_fitting(Path(config.run.init_from), state, sources=sources, check=check)
    lines = [taken.report(), f"content hash of the base: {found[0].content}"]
    lines.append(
        "function of the model before its first step: the base's, to the last bit in batches without padding; a base of "
        "one expert a layer leaves padding out of its products, whose rounding depends on their number of rows"
    )
    return found[0], "\n".join(lines)


def load_base(
    config: Config,
    values: Mapping[str, object],
    adapters: Path,
    checkpoints: CheckpointManager,
    model: nn.Module,
    layout: RankLayout,
) -> Base:
    """Loads the base that a checkpoint of adapters names, into the model's frozen parameters. Collective over all ranks.
    Raises DataError if the base is missing or damaged, or if its content hash differs from the noted hash.

    Args:
        config: The configuration of the adapters' run. The base of a model of transformers is its `model.folder`.
        values: `CheckpointState.values` of the checkpoint of adapters.
        adapters: Folder of the checkpoint of adapters; error messages name it.
    """
    noted = Base.noted(values, adapters)  # pyright: ignore[reportArgumentType]
    if config.model.adapts_folder:
        slots = layout.placement.slots[layout.ep_rank]
        checkpoints.status.phase("read model.folder", lambda: _read_folder(config, noted, adapters, model, slots))
        return noted
    state = capture(model, None, layout, part="frozen")
    base = checkpoints.status.phase("find the base", lambda: find_base(noted, adapters))
    checkpoints.load_fitting(
        base.folder, state, sources=base_sources, check=lambda contents: noted.check(contents, adapters)
    )
    return Base.of(base, checkpoints.folder)  # the next checkpoint names the folder where the base is now


def folder_base(config: Config) -> Base:
    """Returns the base of a new run of adapters on `model.folder`."""
    folder = str(config.model.folder)
    return Base(folder, weights_digest(Path(folder)))


def _read_folder(config: Config, noted: Base, adapters: Path, model: Any, slots: Sequence[int]) -> None:
    from moe_dist.hf.host.weights import read_folder  # imported only here, because it takes seconds

    base = folder_base(config)
    if base.content != noted.content:
        raise DataError(
            f"model.folder={base.path!r}: its weights have the digest {base.content}, but the adapters of {adapters} were "
            f"trained on {noted.content}; restore the weights of that folder",
            see="docs/hf-engine.md",
        )
    read_folder(model, Path(base.path), slots, set_whole)


def base_problems(model: ModelSection, contents: Contents) -> list[str]:
    """Compares a checkpoint's configuration with `model`. Returns the reasons why the checkpoint cannot be the base. The
    checkpoint's tensors are not checked here but by `base_sources`."""
    values = contents.state.values
    if KEY in values:
        return ["it holds adapters and not the model under them; export it (tools.export_hf) and import that as the base"]
    config = values.get("config")
    try:
        there = read_stored(ModelSection, config.get("model") if isinstance(config, dict) else None)
    except ConfigError as error:
        return [f"its state.json has no model that this version can read: {'; '.join(error.problems)}"]
    problems = [
        f"model.{name.removeprefix('resolved_')}={getattr(model, name)!r}, the base's is {getattr(there, name)!r}"
        for name in _FUNCTION
        if getattr(model, name) != getattr(there, name)
    ]
    experts = model.moe.experts
    if experts.adapts_ffns and experts.base != there.moe.experts:
        ours, theirs = (
            ", ".join(f"{k}: {v}" for k, v in each.model_dump().items()) for each in (experts.base, there.moe.experts)
        )
        problems.append(
            f"model.moe.experts.kind={experts.kind} adapts the experts {{{ours}}}, the base's are {{{theirs}}}; take "
            "ffn_lora over ffn, and over clamped_ffn take clamped_ffn_lora, with its alpha and limit as swiglu_alpha and "
            "swiglu_limit"
        )
    if not model.moe.experts.over_frozen_ffn:
        own = {"capacity", "balance", *(["experts"] if model.moe.experts.adapts_ffns else [])}
        here, base = (each.moe.model_dump(mode="json", exclude=own) for each in (model, there))
        return [*problems, *(f"model.moe.{key}={value!r}, the base's is {base[key]!r}" for key, value in here.items()
                           if value != base[key])]  # fmt: skip
    return [*problems, *_not_dense(there)]


def _not_dense(base: ModelSection) -> list[str]:
    """Returns the reasons why a base's MoE layers do not compute the same dense FFN for all tokens."""
    moe, problems = base.moe, []
    groups = ", ".join(
        f"{name} ({group.num_experts} true, {group.num_null} null, {group.num_identity + group.num_constant} free)"
        for name, group in moe.groups.items()
    )
    counts = [(g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in moe.groups.values()]
    if counts != [(1, 0, 0, 0)]:
        problems.append(
            f"its groups are {groups}; LoRA experts stand on one dense FFN, which is one group of one true expert"
        )
    if not moe.router.softmax_top_k or moe.router.sum_of_weights not in (None, 1.0):
        problems.append("its router gives the expert's output another weight than 1 (router.kind, router.scale)")
    if moe.shared_ffn_dim:
        problems.append(f"it also has a shared expert (shared_ffn_dim={moe.shared_ffn_dim})")
    return problems


def _of_base(name: str, model: ModelSection) -> bool:
    """Returns True if a parameter is loaded from the base. Adapters and the routers of LoRA experts are not."""
    role = role_of_name(name)
    return role not in ADAPTERS and not (model.moe.experts.over_frozen_ffn and role is Role.ROUTER)
