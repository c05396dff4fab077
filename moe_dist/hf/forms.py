"""Chooses the form of an export: a plain family of transformers, Qwen3-MoE++, or the form that brings its own code.

Plain families have no null experts: the number of a token's true (not null) experts then differs between tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import GroupSection, ModelSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.errors import ConfigError
from moe_dist.hf.families import FAMILIES, KNOWN, PLUS_PLUS
from moe_dist.hf.family import ModelFamily
from moe_dist.hf.sections import misfits, read_section
from moe_dist.hf.served_fields import SERVED, read_served, served_problems, unserved

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


def choose_form(model: ModelSection, name: str | None, *, must: bool) -> Form:
    """Chooses the form `name` if possible, else a plain family, else the form with its own code.

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
    fits: list[Callable[[], Form]] = [] if name == SERVED.name else [lambda: _plain(model, name, must=must)]
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
    section = _with_router(model, same)
    if what := misfits(section, PLUS_PLUS):
        raise ConfigError(f"{PLUS_PLUS.name}: cannot have {', '.join(what)}", see=GUIDE)
    return Form(PLUS_PLUS, section)


def _plain(model: ModelSection, name: str | None, *, must: bool) -> Form:
    section = _plain_section(model)
    order = [FAMILIES[name]] if name and must else sorted(FAMILIES.values(), key=lambda each: each.name != name)
    reasons = {family.name: misfits(section, family) for family in order}
    for family in order:
        if not reasons[family.name]:
            return Form(family, section)
    raise ConfigError([f"{family}: cannot have {', '.join(what)}" for family, what in reasons.items()], see=GUIDE)


def _plain_section(model: ModelSection) -> ModelSection:
    """Returns the section of a plain family's model that computes the same function. Raises ConfigError, with the reasons,
    if no family has a feature of the model."""
    name, group = _only_group(model)
    problems = _depth_problems(model)
    if group.num_null:
        problems.append(f"model.moe.groups.{name}.num_null={group.num_null}: no plain family has null experts")
    if problems:
        raise ConfigError(problems, see=GUIDE)
    same = {"true_all": "none", "all_chosen": "true_chosen"}  # without null experts, each pair of names means equal weights
    if group.num_experts == 1:
        same = {"true_all": "true_chosen", "all_chosen": "true_chosen", "none": "true_chosen"}
    return _with_router(model, same)


def _with_router(model: ModelSection, same: Mapping[str, str]) -> ModelSection:
    """Returns the model with another softmax router: `same` maps the value of its `router.normalise` to the new value. A
    sigmoid router is not changed."""
    router = model.moe.router
    if isinstance(router, TopKRouterSection):
        router = router.model_copy(update={"normalise": same.get(router.normalise, router.normalise), "null_logit": "each"})
    return model.model_copy(update={"moe": model.moe.model_copy(update={"router": router})})


def _only_group(model: ModelSection) -> tuple[str, GroupSection]:
    groups = model.moe.groups
    if len(groups) > 1:
        raise ConfigError(f"model.moe.groups: {', '.join(groups)}: families have one group of experts, not several")
    return next(iter(groups.items()))


def _depth_problems(model: ModelSection) -> list[str]:
    depths = bool(model.mixture_of_depths)
    return ["model.mixture_of_depths: no known family leaves tokens out of its layers"] if depths else []
