"""Finds the experts of a transformers model, through that library's own interface for experts and routers. So this file
contains no names of families."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch import nn

from moe_dist.errors import ConfigError
from moe_dist.moe.routers.recorded import recorded_routers

GUIDE = "docs/hf-engine.md"
GROUP = "experts"  # name of the only expert group, and of the attribute that has a family's experts
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of an FFN that can become experts
LAYER = re.compile(r"\blayers\.(\d+)\.")


class Bank(NamedTuple):
    """The experts of one layer, or of one modality in one layer, and the router that chooses among them."""

    layer: int
    experts: str  # path of the module of experts
    router: str  # path of the router
    group: str = GROUP
    block: str = ""  # path of the module that calls the layer's banks, if there are several
    ids: range = range(0)  # logical ids of the experts

    def local(self, slots: Sequence[int]) -> list[int]:
        """Returns the indices in the bank of a rank's experts, whose logical ids are `slots`."""
        return [expert - self.ids.start for expert in slots if expert in self.ids]


def banks_of(model: nn.Module) -> list[Bank]:
    """Returns the MoE layers in order. Raises ConfigError if the model does not use transformers' interface for experts, or
    a router is not found."""
    if (made := getattr(model, "moe_dist_banks", None)) is not None:  # by `dense.add_experts`
        return made
    name = type(model).__name__
    experts = [path for path, module in model.named_modules() if hasattr(module, "_is_expert_parallel")]
    classes, routers = recorded_routers(model), defaultdict[str, list[str]](list)
    for path, module in model.named_modules():
        if isinstance(module, classes):
            routers[path.rpartition(".")[0]].append(path)
    if not experts:
        raise ConfigError(
            f"model.family: {name} does not use transformers' interface for experts (ALL_EXPERTS_FUNCTIONS), which shards "
            "them; take a mixture-of-experts family that does",
            see=GUIDE,
        )
    found: list[Bank] = []
    for path in experts:
        holder, layer = path.rpartition(".")[0], LAYER.search(path)
        own = [router for above in accumulate(holder.split("."), "{}.{}".format) for router in routers.get(above, ())]
        if layer is None or len(own) != 1 or path.rpartition(".")[2] != GROUP:
            raise ConfigError(
                f"model.family: {name}: {path} must be named {GROUP} and have one router beside it, whose logits the model "
                f"can record (_can_record_outputs), but there are {own}; this family cannot be trained by this engine yet",
                see=GUIDE,
            )
        found.append(Bank(int(layer[1]), path, own[0]))
    banks: list[Bank] = []
    users = Counter(bank.router for bank in found)
    for bank in found:
        first = banks[-1].ids.stop if banks and banks[-1].block == bank.router else 0
        ids = range(first, first + next(model.get_submodule(bank.experts).parameters()).shape[0])
        if users[bank.router] == 1:
            banks.append(bank._replace(ids=ids))
        else:  # the model records the block of several banks, each with its own router
            holder = bank.experts.rpartition(".")[0]
            banks.append(Bank(bank.layer, bank.experts, f"{holder}.gate", holder.rpartition(".")[2], bank.router, ids))
    return banks


def dense_ffns(model: Any) -> dict[int, str]:
    """Returns the path of each layer's FFN in the language model of a dense family. Empty if it has experts, or if a layer
    has no FFN of this form, or several."""
    if any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        return {}
    decoder = model.get_decoder()
    (root,) = [path for path, module in model.named_modules() if module is decoder] or [""]
    found: dict[int, str] = {}
    for path, module in decoder.named_modules():
        layer = LAYER.search(f"{path}.")
        if all(isinstance(getattr(module, each, None), nn.Linear) for each in PROJECTIONS) and hasattr(module, "act_fn"):
            if (
                layer is None
                or int(layer[1]) in found
                or any(getattr(module, each).bias is not None for each in PROJECTIONS)
            ):
                return {}
            found[int(layer[1])] = f"{root}.{path}".lstrip(".")
    return found
