"""Converts the state of Megatron-Core's model and optimizer to tensors with moe_dist's logical names, and back.

Because of the logical names, a checkpoint can be loaded with other degrees of TP, PP, EP and CP, with another placement,
and by moe_dist's own engine. The saved weights are the fp32 weights that the optimizer updates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, LocalShard
from moe_dist.megatron.gpt import Gpt
from moe_dist.megatron.tensors import Piece
from moe_dist.megatron.versions import plain_optimizers
from moe_dist.optim.optimizer import MOMENTS, add_moments, local, set_step_count, step_count
from moe_dist.placement.parameter_names import logical_name

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Slice:
    """The part of a parameter that this rank's optimizer updates: all its elements, a range of elements, or none."""

    optimizer: Any  # one of Megatron's optimizers, without its wrapper
    main: Tensor | None  # the tensor that `optimizer` updates; None if only other ranks update the parameter
    begin: int = 0  # index of the first element of `main` in the flat parameter
    sharded: bool = False  # whether the data-parallel ranks update different elements


class GptState:
    """Reads and sets the weights and moments of one rank."""

    def __init__(self, gpt: Gpt, optimizer: Any) -> None:
        self._gpt, self._optimizers = gpt, plain_optimizers(optimizer)

    @property
    def counted(self) -> Optimizer:
        """The optimizer of the dense parameters. Its step count is the run's, because every rank has dense parameters."""
        return self._optimizers[0].optimizer

    def held(self) -> dict[str, LocalShard]:
        """Returns this rank's tensors by logical name. Creates moments that do not exist yet. Values loaded into the
        returned tensors take effect only when `loaded` is called. Collective with a distributed optimizer, which gathers
        its tensors one by one into host memory. This memory is freed together with the returned dict."""
        for each in self._optimizers:
            for group in getattr(each.optimizer, "param_groups", ()):
                for parameter in group["params"]:
                    add_moments(each.optimizer, group, parameter)
        found = {
            key: self._shard(piece)
            for chunk, name, kind, parameter in self._parameters()
            for key, piece in self._pieces(chunk, name, kind, self._whole(kind, parameter))
        }
        return found | dict(self._buffers())

    def trained(self, *, gradients: bool) -> dict[str, LocalShard]:
        """Returns this rank's weights, or gradients, by logical name. Needs an optimizer that is not distributed."""
        found = {}
        for chunk, name, parameter in self._gpt.parameters():
            main: Any = parameter  # Megatron adds the gradient in fp32
            whole = main.main_grad if gradients else self._whole("", parameter)
            found |= {key: self._shard(piece) for key, piece in self._pieces(chunk, name, "", whole)}
        return found

    @torch.no_grad()
    def loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Call this after a checkpoint is loaded into the tensors of `held`. Copies their values to model and optimizer,
        and the step count of `counted` to all optimizers."""
        for chunk, name, kind, parameter in self._parameters():
            place = self._slice(parameter)
            whole = torch.empty(parameter.shape, device=_HOST) if place.sharded else _updated(place, kind)
            for key, piece in self._pieces(chunk, name, kind, whole):
                tensor = tensors[key]
                piece.set(local(tensor))
            if not kind and place.main is not parameter:
                parameter.copy_(whole)
            if place.sharded and place.main is not None:
                part = _updated(place, kind)
                part.copy_(whole.flatten()[place.begin : place.begin + part.numel()].view_as(part))
        count = step_count(self.counted)
        for each in self._optimizers[1:]:
            set_step_count(each.optimizer, count)

    def _parameters(self) -> Iterator[tuple[int, str, str, nn.Parameter]]:
        """Yields for each weight and moment: number of the model chunk, Megatron's parameter name, name of the moment (""
        for the weight), and parameter."""
        for chunk, name, parameter in self._gpt.parameters():
            for kind in ("", *MOMENTS):
                yield chunk, name, kind, parameter

    def _buffers(self) -> Iterator[tuple[str, LocalShard]]:
        """Yields the selection biases. All ranks of a stage have them, and loading a checkpoint writes into them."""
        same = self._gpt.groups.tp_dp_cp
        for layer, router in self._gpt.routers.items():
            for name, tensor in router.state_dict(keep_vars=True).items():
                if not isinstance(tensor, nn.Parameter):
                    yield f"layers.{layer}.moe.router.{logical_name(name)}", LocalShard(tensor, same.size(), same.rank())

    def _pieces(self, chunk: int, name: str, kind: str, whole: Tensor) -> Iterator[tuple[str, Piece]]:
        """Yields the key and the piece of each logical tensor that a weight or moment contains."""
        prefix = f"{OPTIMIZER_PREFIX}{kind}." if kind else ""
        for piece in self._gpt.pieces(chunk, name, whole):
            yield prefix + piece.name, piece

    def _whole(self, kind: str, parameter: nn.Parameter) -> Tensor:
        """Returns a whole local weight (kind "") or moment: the optimizer's tensor, or a tensor gathered from shards."""
        place = self._slice(parameter)
        if not place.sharded:
            return _updated(place, kind)
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if place.main is not None:
            shard = _updated(place, kind)
            flat[place.begin : place.begin + shard.numel()] = shard.flatten()
        expert = not getattr(parameter, "allreduce", True)
        # Sums the bits as integers. All ranks but one add 0, so no bit changes; as floats, -0.0 + 0.0 would give 0.0.
        dist.all_reduce(flat.view(torch.int32), group=self._gpt.groups.expt_dp if expert else self._gpt.groups.dp_cp)
        return flat.view(parameter.shape).to(_HOST)

    def _slice(self, parameter: nn.Parameter) -> _Slice:
        expert = not getattr(parameter, "allreduce", True)
        optimizer = self._optimizers[-1 if expert else 0]
        if not self._gpt.distributed:
            return _Slice(optimizer, getattr(parameter, "main_param", parameter))
        place = optimizer.model_param_group_index_map.get(parameter)
        if place is None:
            return _Slice(optimizer, None, sharded=True)
        group, order = place
        begin = optimizer._get_model_param_range_map(parameter)["param"].start
        return _Slice(optimizer, optimizer.optimizer.param_groups[group]["params"][order], begin, sharded=True)

    def _shard(self, piece: Piece) -> LocalShard:
        groups = self._gpt.groups
        same = groups.expt_dp if piece.expert else groups.tp_dp_cp if piece.dim is None else groups.dp_cp
        copies, position = same.size(), same.rank()
        if piece.name == "embedding.weight" and self._gpt.args.tie_embeddings and groups.pp.size() > 1:
            copies, position = 2 * copies, position + copies * self._gpt.last_stage  # the first stage and the last have it
        local = piece.view if piece.view.shape == piece.shape else piece.get()
        if piece.dim is None or self._gpt.place.tp_size == 1:
            return LocalShard(local, copies, position)
        whole = torch.empty(piece.whole_shape(self._gpt.place.tp_size), device="meta")
        cut = DTensor.from_local(
            local, self._gpt.tp_mesh, [Shard(piece.dim)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return LocalShard(cut, copies, position)


def _updated(place: _Slice, kind: str) -> Tensor:
    """Returns the tensor that the optimizer itself has: the weight (kind "") or a moment."""
    assert place.main is not None
    return place.main.detach() if not kind else place.optimizer.optimizer.state[place.main][kind]
