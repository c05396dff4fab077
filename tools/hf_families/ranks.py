"""Runs one family on this rank and its peers, and compares it with the same family on one rank."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh

from moe_dist.errors import ConfigError
from tools.hf_families.tiny import Family, tiny_config

NEEDS = {
    "fp32": "fp32",
    "picture": "a picture without labels on ranks without pictures",
    "whole": "loading whole, then sharding",
    "plan": "an `ep_plan` of its experts alone",
    "eval": "evaluation mode, as its router draws noise in training",
}
LEARNING_RATE = 1e-2
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4}  # of differences from one rank


@dataclass(frozen=True)
class Difference:
    """The largest differences between the ranks and one rank.

    Attributes:
        loss: Of this rank's loss.
        gradient: Of a gradient, as a share of the largest value of that gradient.
        worst: The parameter with this gradient.
        step: Of a weight after a step of AdamW, as a share of the learning rate.
        saved: Of a weight in the folder that the ranks saved, loaded on one rank.
    """

    loss: float
    gradient: float
    worst: str
    step: float
    saved: float


def compare(
    family: Family, needs: frozenset[str], rank: int, world: int, folder: Path, implementation: str = "moe_dist"
) -> Difference:
    """Returns the differences between `world` ranks and one rank. Ranks call it together.

    Args:
        needs: Keys of NEEDS.
        folder: A folder that all ranks share.
        implementation: The expert parallelism; "" for FSDP2 alone.
    """
    import moe_dist.hf.ep  # noqa: F401

    dtype = torch.float32 if "fp32" in needs else torch.float64
    ours = _made(family, folder / f"model{rank}")
    options = {"dtype": dtype, "experts_implementation": "eager"}
    one = family.model_class().from_pretrained(ours, **options)
    one.train("eval" not in needs)
    batches = [_batch(one, seed, "front" if seed == 0 else "", dtype) for seed in range(world)]
    losses = [_loss(one, batch) for batch in batches]
    torch.stack(losses).mean().backward()
    mine = batches[rank] if rank == 0 or "picture" not in needs else _batch(one, rank, "behind", dtype)

    many = _sharded(family, ours, needs, world, implementation, one, options)
    many.train("eval" not in needs)
    loss = _loss(many, mine)
    loss.backward()
    gradients = {name: _whole(p.grad, p) for name, p in many.named_parameters()}
    gradient, worst = _worst(gradients, {name: _whole(p.grad, p) for name, p in one.named_parameters()})
    for model in (one, many):
        torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3).step()
    weights = {name: _whole(p, p) for name, p in many.named_parameters()}
    step = max(float((weights[name] - p).abs().max()) for name, p in one.named_parameters()) / LEARNING_RATE
    many.save_pretrained(folder / "saved")
    dist.barrier()
    again = dict(family.model_class().from_pretrained(folder / "saved", **options).named_parameters())
    saved = max(float((weights[name] - p).abs().max()) for name, p in again.items())
    return Difference(float((loss - losses[rank]).detach().abs()), gradient, worst, step, saved)


def _made(family: Family, folder: Path) -> Path:
    """Saves the family's tiny model with drawn weights, and returns the folder."""
    torch.manual_seed(0)
    model = family.model_class()(tiny_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def _sharded(
    family: Family, folder: Path, needs: frozenset[str], world: int, implementation: str, one: Any, options: dict[str, Any]
) -> Any:
    parallel = DistributedConfig(
        fsdp_size=world,
        ep_size=world if implementation else 1,
        ep_implementation=implementation or "auto",
        ep_plan=experts_plan(one, family.experts) if "plan" in needs else None,
    )
    if "whole" not in needs:
        return family.model_class().from_pretrained(folder, distributed_config=parallel, **options)
    _, meshes = initialize_distributed_mesh(parallel)
    return family.model_class().maybe_distribute_model(
        family.model_class().from_pretrained(folder, **options), parallel, meshes
    )


def experts_plan(model: Any, experts: str) -> dict[str, str]:
    """Returns the plan that shards a model's experts and nothing else."""
    plan = {}
    for name, module in model.named_modules():
        if type(module).__name__ == experts:
            path = re.sub(r"\.\d+(?=\.)", ".*", name)
            plan |= {f"{path}.{each}": "grouped_gemm" for each, _ in module.named_parameters(recurse=False)}
            plan |= {path: "ep_dispatch_experts"}
    return plan


def _loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the loss in the dtype of the logits; transformers' own loss is fp32."""
    logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels % logits.shape[-1] * (labels >= 0) - 100 * (labels < 0))


def _whole(tensor: Tensor | None, like: Tensor) -> Tensor:
    tensor = torch.zeros_like(like) if tensor is None else tensor
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Returns the largest difference as a share of a gradient's largest value, and its name. Gradients that are 0 but for
    rounding count as 1e-6 of the model's largest."""
    if found.keys() != wanted.keys():
        raise ConfigError(f"parameters differ: {sorted(found.keys() ^ wanted.keys())[:3]}")
    least = 1e-6 * max(float(each.abs().max()) for each in wanted.values())
    shares = (
        (float((found[name] - each).abs().max()) / max(float(each.abs().max()), least), name) for name, each in wanted.items()
    )
    return max(shares)


def _batch(model: Any, seed: int, picture: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns tokens of one sequence, and of a multimodal model with a picture in "front" of or "behind" some text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 190, (1, 20 + 3 * seed), generator=generator)
    names, batch = signature(type(model).forward).parameters, {}
    if "pixel_values" in names:
        image = _image_token(model.config)
        if picture:
            batch = _picture(model, names, generator, dtype)
            with torch.no_grad():
                found = model.get_image_features(**batch)
            pooled = found.pooler_output if hasattr(found, "pooler_output") else found
            number = sum(each.numel() for each in pooled) // model.get_input_embeddings().embedding_dim
            at = 4 if picture == "front" else ids.shape[1]
            ids = torch.cat([ids[:, :at], torch.full((1, number), image), ids[:, at:]], 1)
        kind = (ids == image).long()
        batch |= {name: kind for name in ("mm_token_type_ids", "moe_mm_token_type_ids") if name in names}
    return batch | {"input_ids": ids, "labels": ids.masked_fill(ids >= 190, -100)}


def _image_token(config: Any) -> int:
    return next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))


def _picture(model: Any, names: Any, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    vision = model.config.vision_config
    patch = getattr(vision, "patch_size", 16)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if "image_grid_thw" in names:
        frames = 1
        for name in ("temporal_patch_size", "patch_temporal"):
            frames = getattr(vision, name, frames)
        if vision.model_type.startswith("ernie"):
            frames = 1
        return {"pixel_values": drawn(16, 3 * frames * patch**2), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if "image_position_ids" in names or vision.model_type.startswith("gemma4"):
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        return {"pixel_values": drawn(1, 16, 3 * patch**2), "image_position_ids": places}
    side = getattr(vision, "image_size", 4 * patch)
    batch: dict[str, Any] = {"pixel_values": drawn(1, 3, side, side)}
    return batch | ({"image_sizes": torch.tensor([[side, side]])} if "image_sizes" in names else {})


def pairs_of(names: Iterator[str]) -> list[str]:
    return list(names)
