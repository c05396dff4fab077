"""Chooses the form of an export: a plain family of transformers, Qwen3-MoE++, or the form that brings its own code.

Plain families have no null experts. An export can leave out null experts only if each of their router rows is bit-equal to
a row of a true (not null) expert, as `moe_dist.moe.routers.copy_init` made them. The model then computes the same as a
model with fewer choices per token (top_k) and no null experts. If training has changed these rows, the number of true
experts differs between tokens, which no plain family can express.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.checkpoint.whole_tensors import Read
from moe_dist.config.model_schema import GroupSection, ModelSection, MoESection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.errors import ConfigError
from moe_dist.hf.families import FAMILIES, KNOWN, PLUS_PLUS
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.names import router_name
from moe_dist.hf.sections import misfits, read_section
from moe_dist.hf.served_fields import SERVED, read_served, served_problems, unserved
from moe_dist.moe.routers.copy_init import folded_choices, uneven_twins

FORMS = {**KNOWN, SERVED.name: SERVED}
GUIDE = "docs/huggingface.md"


@dataclass(frozen=True)
class Form:
    """The form of an export.

    Attributes:
        section: Section `model` of the exported model, which computes the same function as the trained model.
        reasons: Why no plain family can express the model. Empty if a family can, or if the user chose the form.
    """

    family: ModelFamily
    section: ModelSection
    reasons: Sequence[str] = ()


def read_config(config: Mapping[str, Any]) -> tuple[ModelFamily, dict[str, Any], Sequence[str]]:
    """Reads a config.json of any form. See `sections.read_section`."""
    return read_served(config) if config.get("model_type") == SERVED.name else read_section(config)


def choose_form(model: ModelSection, read: Read, name: str | None, *, must: bool) -> Form:
    """Chooses the form `name` if it can express the model, else a plain family, else the form with its own code.

    Args:
        name: `model_type` of a form.
        must: If True, only the form `name` is tried.

    Raises:
        ConfigError: no form can express the model. The message gives the reasons.
    """
    if name is not None and name not in FORMS:
        raise ConfigError(f"--family={name}: known are {', '.join(FORMS)}")
    if problems := unserved(model):
        raise ConfigError(problems, see=GUIDE)
    fits: list[Callable[[], Form]] = [] if name == SERVED.name else [lambda: _plain(model, read, name, must=must)]
    if name == PLUS_PLUS.name:
        fits = [lambda: _plus_plus(model), *([] if must else fits)]
    reasons: Sequence[str] = ()
    for fit in fits:
        try:
            return fit()
        except ConfigError as error:
            reasons = error.problems
    problems = served_problems(model)
    if must and fits:
        leave = f"--family={name}: leave it out, and the export takes the form {SERVED.name}"
        raise ConfigError([*reasons, *(problems or [leave])], see=GUIDE)
    if problems:
        raise ConfigError(problems, see=GUIDE)
    return Form(SERVED, model, reasons)


def _plus_plus(model: ModelSection) -> Form:
    """Returns the form Qwen3-MoE++. Its routing weights are a softmax over all columns, or over all chosen columns. Both
    include the columns of null experts."""
    _, group = _only_group(model)
    problems, router = _depth_problems(model), model.moe.router
    if group.num_null and router.single_null_row:
        problems.append(f"model.moe.router.null_logit=single: {PLUS_PLUS.name} has a router row for each null expert")
    if problems:
        raise ConfigError(problems)
    same = {} if group.num_null else {"true_chosen": "all_chosen", "true_all": "none"}
    section = _with_router(model, model.moe, same)
    if what := misfits(section, PLUS_PLUS):
        raise ConfigError(f"{PLUS_PLUS.name}: cannot have {', '.join(what)}", see=GUIDE)
    return Form(PLUS_PLUS, section)


def _plain(model: ModelSection, read: Read, name: str | None, *, must: bool) -> Form:
    section = _plain_section(model, read)
    order = [FAMILIES[name]] if name and must else sorted(FAMILIES.values(), key=lambda each: each.name != name)
    reasons = {family.name: misfits(section, family) for family in order}
    for family in order:
        if not reasons[family.name]:
            return Form(family, section)
    raise ConfigError([f"{family}: cannot have {', '.join(what)}" for family, what in reasons.items()], see=GUIDE)


def _plain_section(model: ModelSection, read: Read) -> ModelSection:
    """Returns the section of a model without null experts that computes the same function. Raises ConfigError, with the
    reasons, if there is no such model, or if no family has a feature of the model."""
    name, group = _only_group(model)
    if problems := _depth_problems(model):
        raise ConfigError(problems, see=GUIDE)
    top_k = _folded(model, read) if group.num_null else group.top_k
    same = {"true_all": "none", "all_chosen": "true_chosen"}  # names with equal weights if there are no null experts
    if group.num_experts == 1:
        same = {"true_all": "true_chosen", "all_chosen": "true_chosen", "none": "true_chosen"}
    plain = {name: group.model_copy(update={"num_null": 0, "top_k": top_k})}
    return _with_router(model, model.moe.model_copy(update={"groups": plain}), same)


def _with_router(model: ModelSection, moe: MoESection, same: Mapping[str, str]) -> ModelSection:
    """Returns the model with the section `moe`. If the router is a softmax router, `same` maps the value of its
    `router.normalise` to the new value. A sigmoid router is not changed."""
    router = moe.router
    if isinstance(router, TopKRouterSection):
        router = router.model_copy(update={"normalise": same.get(router.normalise, router.normalise), "null_logit": "each"})
    return model.model_copy(update={"moe": moe.model_copy(update={"router": router})})


def _only_group(model: ModelSection) -> tuple[str, GroupSection]:
    groups = model.moe.groups
    if len(groups) > 1:
        raise ConfigError(f"model.moe.groups: {', '.join(groups)}: families have one group of experts, not several")
    return next(iter(groups.items()))


def _depth_problems(model: ModelSection) -> list[str]:
    depths = bool(model.mixture_of_depths)
    return ["model.mixture_of_depths: no known family leaves tokens out of its layers"] if depths else []


def _folded(model: ModelSection, read: Read) -> int:
    """Returns the top_k with which the router, after the rows of null experts are removed, chooses the same true experts
    with the same weights. Raises ConfigError with the responsible layer or option if there is no such top_k."""
    name, group = _only_group(model)
    key = f"model.moe.groups.{name}.num_null={group.num_null}"
    out = "no plain family has null experts, and they can be left out only if their router rows are copies of true rows"
    router = model.moe.router
    if group.num_zero_computation:
        raise ConfigError(f"{key}: {out}; num_identity={group.num_identity}, num_constant={group.num_constant}")
    if not isinstance(router, TopKRouterSection) or router.selection_bias:
        raise ConfigError(f"{key}: {out}; copies change the choices of a router with {router.said}")
    if router.normalise not in ("true_chosen", "true_all"):
        raise ConfigError(f"{key}: {out}, and the weights do not depend on them; router.normalise={router.normalise}")
    if problem := uneven_twins(group.num_experts, group.num_null):
        raise ConfigError(f"{key}: {out}: {problem}")
    for layer in model.moe_layers:
        true, null = (read(router_name(model, layer, kind)) for kind in ("true", "null"))
        if not torch.equal(null, true.repeat(group.num_null // group.num_experts, 1)):
            raise ConfigError(f"{key}: {out}; in layer {layer} they are not, since training has changed them")
    return folded_choices(group.num_experts, group.num_null, group.top_k)
