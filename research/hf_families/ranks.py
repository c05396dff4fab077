"""Runs one family on this rank and its peers, and compares it with the same family on one rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from moe_dist.errors import ConfigError
from research.hf_families.tiny import Family, tiny_config

LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Difference:
    """The largest differences between the ranks and one rank.

    Attributes:
        loss: Difference of this rank's loss.
        gradient: Largest difference in a gradient, as a fraction of the largest value of the same gradient.
        worst: Name of the parameter with this gradient.
        step: Largest difference in a weight after a step of AdamW, as a fraction of the learning rate.
        saved: Largest difference between a weight of the ranks and the same weight after saving and loading on one rank.
    """

    loss: float
    gradient: float
    worst: str
    step: float
    saved: float


@dataclass(frozen=True)
class OneRank:
    """A family on one rank, which reads the batches of all ranks.

    Attributes:
        folder: Folder of the model, which was saved before the step.
        options: Arguments of from_pretrained.
        batches, losses: The batch and the loss of each rank.
        behind: The batches, with a picture added behind the text of each batch that has no picture.
        gradients, stepped: For each parameter, the gradient of the mean loss, and the weight after a step.
        ep_plan: Overrides that turn off the rules of the family's plan, except those that shard experts.
    """

    folder: Path
    options: dict[str, Any]
    batches: list[dict[str, Any]]
    behind: list[dict[str, Any]]
    losses: list[Tensor]
    gradients: dict[str, Tensor]
    stepped: dict[str, Tensor]
    ep_plan: dict[str, str]


def on_one_rank(family: Family, needs: frozenset[str], world: int, folder: Path) -> OneRank:
    """Makes a family's tiny model with drawn weights, saves it to `folder`, loads it and trains it for a step."""
    torch.manual_seed(0)
    model = family.model_class()(tiny_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    dtype = torch.float32 if "fp32" in needs else torch.float64
    options = {"dtype": dtype, "experts_implementation": "eager"}
    model = family.model_class().from_pretrained(folder, **options).train("eval" not in needs)
    named = dict(model.named_parameters())
    if other := [name for name, each in named.items() if each.dtype != dtype]:
        raise ConfigError(f"FSDP2 takes one dtype, but the family keeps parameters in fp32: {other[0]}")
    batches = [_batch(model, rank, "" if rank else "front", dtype) for rank in range(world)]
    behind = [batches[0], *(_batch(model, rank, "behind", dtype) for rank in range(1, world))]
    losses = [_loss(model, batch) for batch in batches]
    torch.stack(losses).mean().backward()
    gradients = {name: _whole(each.grad, each) for name, each in named.items()}
    _step(model)
    stepped = {name: each.detach() for name, each in named.items()}
    losses = [each.detach() for each in losses]
    experts = tuple(name for name, style in model.ep_plan.items() if style == "ep_dispatch_experts")
    plan = {name: "replicate" for name in model.ep_plan if not name.startswith(experts)}
    return OneRank(folder, options, batches, behind, losses, gradients, stepped, plan)


def compare(
    family: Family, one: OneRank, needs: frozenset[str], rank: int, implementation: str, saved_to: Path
) -> Difference:
    """Returns the differences between the ranks and one rank. All ranks call it together.

    Args:
        needs: Keys of NEEDS.
        implementation: Name of the implementation of expert parallelism; "" for FSDP2 alone.
        saved_to: The folder that the ranks save to.
    """
    model = _sharded(family, one, needs, implementation).train("eval" not in needs)
    loss = _loss(model, (one.behind if "picture" in needs else one.batches)[rank])
    loss.backward()
    gradients = {name: _whole(each.grad, each) for name, each in model.named_parameters()}
    gradient, worst = _worst(gradients, one.gradients)
    _step(model)
    weights = {name: _whole(each, each) for name, each in model.named_parameters()}
    step = max(_far(weights[name], each) for name, each in one.stepped.items()) / LEARNING_RATE
    model.save_pretrained(saved_to)
    dist.barrier()
    saved = 0.0
    if rank == 0:
        again = family.model_class().from_pretrained(saved_to, **one.options)
        saved = max(_far(weights[name], each) for name, each in again.named_parameters())
    return Difference(_far(loss, one.losses[rank]), gradient, worst, step, saved)


def _sharded(family: Family, one: OneRank, needs: frozenset[str], implementation: str) -> Any:
    world = len(one.batches)
    parallel = DistributedConfig(
        fsdp_size=world,
        ep_size=world if implementation else 1,
        ep_implementation=implementation or "auto",
        ep_plan=one.ep_plan if "plan" in needs else None,
    )
    make = family.model_class()
    if "whole" not in needs:
        return make.from_pretrained(one.folder, distributed_config=parallel, **one.options)
    model = make.from_pretrained(one.folder, **one.options)
    # FSDP2 refuses tied weights, so weights are tied after they are sharded, as transformers does.
    for name in model.all_tied_weights_keys:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(model.get_parameter(name).detach().clone()))
    model = make.maybe_distribute_model(model, parallel, initialize_distributed_mesh(parallel)[1])
    model.tie_weights(recompute_mapping=False)
    return model


def _step(model: Any) -> None:
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3).step()  # large eps: rounding changes no step


def _far(found: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference; infinity for NaN."""
    far = float((found - wanted).detach().abs().max())
    return math.inf if math.isnan(far) else far


def _loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the loss in the dtype of the logits. The loss of transformers is in fp32."""
    logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits
    labels = batch["labels"][0, 1 : logits.shape[1]]
    labels = labels.where(labels < 0, labels % logits.shape[-1])
    return F.cross_entropy(logits[0, : len(labels)], labels)


def _whole(tensor: Tensor | None, like: Tensor) -> Tensor:
    tensor = torch.zeros_like(like) if tensor is None else tensor
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest difference in a gradient, as a fraction of its largest value, and the parameter's name. The
    divisor is at least 1e-6 of the model's largest gradient value, because some gradients are 0 up to rounding."""
    if found.keys() != wanted.keys():
        raise ConfigError(f"parameters differ: {sorted(found.keys() ^ wanted.keys())[:3]}")
    least = 1e-6 * max(float(each.abs().max()) for each in wanted.values())
    largest = {name: max(float(each.abs().max()), least) for name, each in wanted.items()}
    return max((_far(found[name], each) / largest[name], name) for name, each in wanted.items())


def _batch(model: Any, seed: int, picture: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns a batch of one sequence. A multimodal model's batch can have a picture near the "front" or "behind"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 190, (1, 20 + 3 * seed), generator=generator)
    batch: dict[str, Any] = {}
    names = signature(type(model).forward).parameters
    if "talker_input_ids" in names:  # a model that reads another model's hidden states
        width, places = model.get_input_embeddings().embedding_dim, torch.arange(ids.shape[1])
        batch["inputs_embeds"] = torch.randn(*ids.shape, width, generator=generator, dtype=torch.float64).to(dtype)
        batch["position_ids"] = places.expand(3, 1, -1)
    elif image := getattr(model.config, "image_token_id", None):
        if picture:
            batch = _picture(model, generator, dtype)
            at = 4 if picture == "front" else ids.shape[1]
            marks = torch.full((1, _places(model, batch)), image)
            ids = torch.cat([ids[:, :at], marks, ids[:, at:]], 1)
        kind = (ids == image).long()
        batch |= {name: kind for name in ("mm_token_type_ids", "moe_mm_token_type_ids") if name in names}
    return batch | {"input_ids": ids, "labels": ids.masked_fill(ids >= 190, -100)}


def _places(model: Any, picture: dict[str, Any]) -> int:
    """Returns the number of tokens that stand for a picture."""
    with torch.no_grad():
        found = _owner(model).get_image_features(**picture)
    pooled = found if isinstance(found, Tensor | tuple) else found.pooler_output
    return sum(each.numel() for each in pooled) // model.get_input_embeddings().embedding_dim


def _owner(model: Any) -> Any:
    return next(each for each in model.modules() if hasattr(each, "get_image_features"))


def _picture(model: Any, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """Returns a picture of 4 x 4 patches in the form that the model's encoder takes."""
    towers = ("visual", "vision_tower", "vision_model")
    tower = next(each for name, each in model.named_modules() if name.rpartition(".")[2] in towers)
    vision, names = tower.config, signature(_owner(model).get_image_features).parameters
    inner = list(tower.modules())
    first = next(each for kinds in ((nn.Conv2d, nn.Conv3d), nn.Linear) for each in inner if isinstance(each, kinds))
    patch, width = getattr(vision, "patch_size", 16), first.weight[0].numel()
    side = getattr(getattr(vision, "sam_config", vision), "image_size", 4 * patch)
    shapes = {
        "inkling_vision": (4, 2, patch, patch, 3),
        "inkling2_vision": (4, 2 * patch, 2 * patch, 3),
        "image_grid_thw": (16, width),
        "image_position_ids": (1, 16, width),
    }
    kind = next((each for each in shapes if each == vision.model_type or each in names), "")
    shape = shapes.get(kind, (1, 3, side, side))
    grid = 2 if vision.model_type == "inkling2_vision" else 4
    also = {
        "image_grid_thw": torch.tensor([[1, grid, grid]]),
        "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4))[None],
        "image_sizes": torch.tensor([[side, side]]),
    }
    pixels = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return {"pixel_values": pixels} | {name: each for name, each in also.items() if name in names}
