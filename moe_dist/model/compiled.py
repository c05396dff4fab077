"""Compiles the dense parts of a transformer by torch.compile. These are norms, projections with rotation, dense and shared
FFNs, and output layer with cross entropy. Attention itself is always compiled on CUDA.

Routers, exchanges and experts are not compiled, because they call collectives and kernels of this project. A compiled part
has no graph break (torch would raise an error), and all layers share the compiled code of a part. Only passes with gradient
are compiled, because shapes do not change in training, but do change in evaluation and generation.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moe_dist.model.attention import COMPILED_SHAPES
from moe_dist.model.transformer import Layer, Transformer

BACKEND = "inductor"


def dense_parts(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    """Yields the module and the name of the method of each part."""
    for layer in model.layers:
        assert isinstance(layer, Layer)
        yield layer.attention, "_project"
        if not layer.has_experts:
            yield layer.ffn, "forward"
            continue
        yield layer.moe.norm, "forward"  # pyright: ignore[reportReturnType]
        shared = getattr(layer.moe, "shared", None)
        if shared is not None:
            yield shared, "forward"
    yield model, "_whole_losses"


def compile_dense(model: Transformer) -> None:
    """Replaces each dense part of the model by its compiled form, in place. Must be called before FSDP2 or DDP wraps the
    model. torch compiles a part when it is first called."""
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    for module, name in dense_parts(model):
        setattr(module, name, _compiled_with_gradient(getattr(module, name)))


def _compiled_with_gradient(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, backend=BACKEND, dynamic=False, fullgraph=True)

    def run(*args: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args)

    return run
