"""Finds the weights that `model.lora` names in a whole model, and lists the tensors of its adapters."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_dist.config.base.section import unknown_name
from moe_dist.config.model_schema import ModelSection
from moe_dist.hf.host.dense import hosted_family
from moe_dist.hf.host.lora import candidates, has_end, places_in
from moe_dist.hf.peft_files import joint


def unknown_names(model: ModelSection) -> list[str]:
    """Returns an error text for each name in `targets` and `parameters` of `model.lora` that matches no weight."""
    lora, family = model.lora, _whole(model)
    assert lora is not None
    linear, stacks = candidates(family)
    problems: list[str] = []
    for key, names, there, parts in (("targets", lora.targets, linear, 1), ("parameters", lora.parameters, stacks, 2)):
        known = sorted({".".join(each.split(".")[-parts:]) for each in there})
        unknown = [name for name in names if not any(has_end(each, [name]) for each in there)]
        problems += [f"model.lora.{key}={each}: {unknown_name('weight', each, known)}" for each in unknown]
    return problems


def _whole(model: ModelSection) -> Any:
    with torch.device("meta"):
        return hosted_family(model)


def hosted_tensors(model: ModelSection, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields each matrix under PEFT's name. `read` returns a tensor of a checkpoint by its logical name."""
    assert model.lora is not None
    for place in places_in(_whole(model), model.lora):
        for matrix, name in zip("AB", place.names(), strict=True):
            path = f"family.{place.module}"
            if place.stack:
                experts = [read(f"{path}.{expert}.{name}") for expert in range(place.num_experts)]
                yield f"{place.peft}.lora_{matrix}.weight", joint(matrix, torch.stack(experts))
            else:
                yield f"{place.peft}.lora_{matrix}.weight", read(f"{path}.{name}")
