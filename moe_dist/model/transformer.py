"""The decoder-only transformer for sequences of text and image tokens. Its code is written as for one device.

Shape letters: B sequences, S positions, T = B x S tokens, D hidden size, V vocabulary, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.model.attention import Attention, AttentionMask, CausalAttention, make_mask
from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.cache import KeyValueCache, LayerCache
from moe_dist.model.layers import Embedding, ModelArgs, Projection, RMSNorm, SwiGLU, rotary_table, token_losses
from moe_dist.model.mixture_of_depths import DepthRouter, slot_documents
from moe_dist.model.objective import Objective
from moe_dist.model.token_loss import tiled_token_losses
from moe_dist.model.two_batches import run_layers
from moe_dist.moe.experts.lora import LoRALayer
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport, RoutingRequest


class DenseFFN(SwiGLU):
    """Computes SwiGLU(norm(x)). The caller adds the residual."""

    def __init__(self, dim: int, ffn_dim: int, eps: float) -> None:
        super().__init__(dim, ffn_dim)
        self.norm = RMSNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Layer(nn.Module):
    """Attention, then an MoE layer or a dense FFN. With `mixture_of_depths`, the layer computes only selected tokens."""

    def __init__(
        self,
        args: ModelArgs,
        moe: MoELayer | LoRALayer | None,
        mixture_of_depths: DepthRouter | None = None,
        adapters: AttentionLoRA | None = None,
        window: int | None = None,
        make_attention: Callable[[ModelArgs], CausalAttention] = Attention,
    ) -> None:
        super().__init__()
        self.window = window  # width of the sliding window in tokens
        self.attention = make_attention(args)
        self.attention.adapters = adapters
        if moe is not None:
            self.moe = moe
        else:
            self.ffn = DenseFFN(args.hidden_dim, args.dense_ffn_dim or 0, args.norm_eps)
        self.has_experts = moe is not None
        self.depths = mixture_of_depths  # this attribute's name is part of tensor names in checkpoints


class Transformer(nn.Module):
    """Computes logits from tokens.

    Args:
        make_moe: Function that makes the MoE layer for each layer index in `args.moe_layers`.
        make_depths: Function that makes the depth router for each index in `args.depth_layers`, which must be MoE layers.
        make_adapters: Function that makes the LoRA adapters of the attention for each layer index.

    Attributes:
        token_losses: Function that computes cross entropies from all logits. `kernels.choice.use` may replace it.
    """

    token_losses = staticmethod(token_losses)

    def __init__(
        self,
        args: ModelArgs,
        make_moe: Callable[[int], MoELayer | LoRALayer],
        make_depths: Callable[[int], DepthRouter] | None = None,
        make_adapters: Callable[[int], AttentionLoRA] | None = None,
        make_attention: Callable[[ModelArgs], CausalAttention] = Attention,
    ) -> None:
        super().__init__()
        self.args = args
        self.embedding = Embedding(args.vocab_size, args.hidden_dim)
        self.layers = nn.ModuleList(
            Layer(
                args,
                make_moe(i) if i in args.moe_layers else None,
                make_depths(i) if make_depths is not None and i in args.depth_layers else None,
                make_adapters(i) if make_adapters is not None else None,
                args.windows[i] if args.windows else None,
                make_attention,
            )
            for i in range(args.num_layers)
        )
        self.norm = RMSNorm(args.hidden_dim, args.norm_eps)
        if not args.tie_embeddings:
            self.output = Projection(args.hidden_dim, args.vocab_size)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor,
        group_BS: Tensor,
        request: RoutingRequest = NO_REQUEST,
        labels_BS: Tensor | None = None,
        objective: Objective | None = None,
    ) -> tuple[Tensor, Sequence[LayerReport]]:
        """Returns logits [B, S, V] in the compute dtype, and the report of each MoE layer.

        Args:
            tokens_BS: int64 token ids.
            positions_BS: int64 position of each token inside its document.
            documents_BS: Document number of each token. A token attends to itself and to earlier tokens of its document.
            group_BS: int64 expert group of each token, -1 for padding.
            request: Passed to all MoE layers. Mixture-of-depths layers use only its field `experts_off`.
            labels_BS: int64. If given, forward returns cross entropies [B, S] in fp32 instead of logits. They are computed
                inside forward, because FSDP2 gathers the output weight only there.
            objective: Computes the losses of the labels, instead of cross entropies over the whole vocabulary.
        """
        rotary = self._rotary(positions_BS, group_BS)
        x_BSD = F.embedding(tokens_BS, self.embedding.weight).to(self.args.compute_dtype)
        if self.in_halves:
            parts = zip(*(each.chunk(2) for each in (x_BSD, *rotary, documents_BS, positions_BS, group_BS)), strict=True)
            halves = [(x, (cos, sin), self._masks(*where), group) for x, cos, sin, *where, group in parts]
            x_BSD, reports = run_layers(self.layers, halves, request)
        else:
            masks = self._masks(documents_BS, positions_BS)
            request = replace(request, id_T=tokens_BS.flatten())
            x_BSD, reports = self._run_layers(x_BSD, rotary, masks, positions_BS, documents_BS, group_BS, request)
        if request.on_reports is not None:
            request.on_reports(reports)
        return (self._logits(x_BSD) if labels_BS is None else self._losses(x_BSD, labels_BS, objective)), reports

    @property
    def in_halves(self) -> bool:
        """Whether `forward` alternates between two halves of the micro-batch."""
        return self.args.two_batch_overlap and torch.is_grad_enabled()

    def _masks(self, documents_BS: Tensor, positions_BS: Tensor) -> dict[Any, AttentionMask]:
        """Returns a mask for each window width, which all its layers share. A dense mask has B x S^2 bytes."""
        windows = dict.fromkeys(layer.window for layer in self.layers if layer.depths is None)
        return {window: make_mask(documents_BS, positions_BS, window) for window in windows}  # pyright: ignore

    def _run_layers(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        masks: dict[Any, AttentionMask],
        positions_BS: Tensor,
        documents_BS: Tensor,
        group_BS: Tensor,
        request: RoutingRequest,
    ) -> tuple[Tensor, list[LayerReport]]:
        reports, late_TD = [], None
        for layer in self.layers:
            if layer.depths is not None:
                # The MoE layer gets only the selected tokens. The request's token counts would be wrong for these tokens.
                only_off = RoutingRequest(experts_off=request.experts_off)
                x_BSD, report = self._shallow(layer, x_BSD, rotary, positions_BS, documents_BS, group_BS, only_off)  # pyright: ignore
            else:
                x_BSD = x_BSD + layer.attention(x_BSD, rotary, masks[layer.window], request.batch_info)  # pyright: ignore[reportCallIssue]
                y_BSD, report = self._feed_forward(layer, x_BSD, group_BS, request)  # pyright: ignore
                x_BSD, late_TD, report = _joined(x_BSD + y_BSD, late_TD, report)
            if report is not None:
                request, report = _carried(request, report)
                reports.append(report)
        return x_BSD, reports

    def forward_cached(self, tokens_BN: Tensor, positions_BN: Tensor, group_BN: Tensor, cache: KeyValueCache) -> Tensor:
        """Returns logits [B, N, V] of N new tokens per sequence, and adds these tokens to the cache. Each sequence is one
        document. Call this method in evaluation mode.

        Up to rounding, the logits equal the result of `forward` for the whole sequences. There is one exception: with
        `DynamicScaling` beyond its original length they differ, because cached keys keep their first rotation.

        Args:
            tokens_BN, group_BN: See `forward`. Padding (group -1) may be anywhere. It adds no entry to the cache, and its
                logits are meaningless.
            positions_BN: int64, position of each token in its sequence.
        """
        rotary = self._rotary(positions_BN, group_BN)
        real_BN = group_BN >= 0
        x_BND = F.embedding(tokens_BN, self.embedding.weight).to(self.args.compute_dtype)
        late_TD, request = None, NO_REQUEST
        for layer, entries in zip(self.layers, cache, strict=True):
            taken_BN, taken_group_BN, weight_BN = real_BN, group_BN, None
            if layer.depths is not None:
                taken_T, weight_T = layer.depths.takes(x_BND.flatten(0, 1))  # pyright: ignore
                taken_BN, weight_BN = taken_T.view_as(real_BN) & real_BN, weight_T.view_as(real_BN)
                taken_group_BN = torch.where(taken_BN, group_BN, -1)
                if not taken_BN.any():  # costs a host sync, but often saves the whole layer
                    continue
            a_BND = layer.attention.with_cache(x_BND, rotary, positions_BN, taken_BN, entries)  # pyright: ignore
            y_BND, report = self._feed_forward(layer, x_BND + a_BND, taken_group_BN, request)  # pyright: ignore
            if report is not None:
                request, report = _carried(request, report)
            if weight_BN is None:
                x_BND, late_TD, _ = _joined(x_BND + a_BND + y_BND, late_TD, report)
            else:
                weight_BN = torch.where(taken_BN, weight_BN, 0.0)
                x_BND = x_BND + (weight_BN[..., None] * (a_BND + y_BND)).to(x_BND.dtype)
        return self._logits(x_BND)

    def make_cache(self, batch: int, max_tokens: int) -> KeyValueCache:
        """Returns an empty cache for `batch` sequences of at most `max_tokens` tokens, padding included. The cache has
        layers x batch x max_tokens x itemsize bytes for each number in an entry. An entry has 2 x num_kv_heads x head_dim
        numbers in grouped-query attention, and kv_rank + rope_dim in latent attention."""
        device, dtype = self.embedding.weight.device, self.args.compute_dtype
        sizes: dict[str, Any] = {"batch": batch, "max_tokens": max_tokens, "dtype": dtype, "device": device}
        return tuple(LayerCache(layer.attention.entry, **sizes, window=layer.window) for layer in self.layers)  # pyright: ignore

    def _rotary(self, positions_BS: Tensor, group_BS: Tensor) -> tuple[Tensor, Tensor]:
        if self.args.rope_scaling is not None:  # padding must not count as the longest document
            positions_BS = torch.where(group_BS < 0, 0, positions_BS)
        rope_dim = self.args.rope_dim or self.args.head_dim
        return rotary_table(positions_BS, rope_dim, self.args.rope_base, self.args.rope_scaling)

    def _shallow(
        self,
        layer: Layer,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions_BS: Tensor,
        documents_BS: Tensor,
        group_BS: Tensor,
        request: RoutingRequest,
    ) -> tuple[Tensor, LayerReport | None]:
        """Runs a mixture-of-depths layer on its C selected tokens. They form one sequence, and keep their positions and
        documents. All other tokens stay unchanged."""
        assert layer.depths is not None
        x_TD, group_T = x_BSD.flatten(0, 1), group_BS.flatten()
        chosen = layer.depths(x_TD, group_T >= 0)
        x_1CD = torch.where(chosen.full_C[:, None], x_TD[chosen.index_C], 0.0)[None]
        group_1C = torch.where(chosen.full_C, group_T[chosen.index_C], -1)[None]
        # Each token keeps the angles of its position, so that distances between tokens do not change.
        rotary_1C = (part.flatten(0, 2)[chosen.index_C][None, None] for part in rotary)
        positions_1C = positions_BS.flatten()[chosen.index_C][None]
        mask = make_mask(slot_documents(documents_BS, chosen), positions_1C, layer.window)
        a_1CD = layer.attention(x_1CD, tuple(rotary_1C), mask)
        y_1CD, report = self._feed_forward(layer, x_1CD + a_1CD, group_1C, request)
        added_CD = (chosen.weight_C[:, None] * (a_1CD + y_1CD)[0]).to(x_TD.dtype)
        # No two full slots have the same token, and empty slots add 0 to token 0, so the order of additions changes no bit.
        x_TD = x_TD.index_add(0, chosen.index_C, added_CD)
        if report is not None:
            counts, groups_G = report.counts, torch.arange(report.counts.tokens_LG.shape[1], device=group_T.device)
            tokens_PG = (group_T[:, None] == groups_G).sum(0, keepdim=True)
            depth = chosen.counts._replace(tokens_PG=tokens_PG, taken_PG=counts.tokens_LG)
            report = report._replace(counts=counts._replace(depth=depth))
            if chosen.auxiliary is not None:
                report = report._replace(aux=report.aux._replace(depth_auxiliary_P=chosen.auxiliary[None]))
        return x_TD.view_as(x_BSD), report

    def depth_routers(self) -> list[DepthRouter]:
        """Returns the mixture-of-depths routers, in layer order."""
        return [module for module in self.modules() if isinstance(module, DepthRouter)]

    @staticmethod
    def _feed_forward(
        layer: Layer,
        x_BSD: Tensor,
        group_BS: Tensor,
        request: RoutingRequest = NO_REQUEST,
    ) -> tuple[Tensor, LayerReport | None]:
        """Returns the output and the report of the layer's MoE layer, or the output of its dense FFN and None."""
        if not layer.has_experts:
            return layer.ffn(x_BSD), None
        y_TD, report = layer.moe(x_BSD.flatten(0, 1), group_BS.flatten(), request)
        return y_TD.view_as(x_BSD), report

    @property
    def _output(self) -> Tensor:
        return self.embedding.weight if self.args.tie_embeddings else self.output.weight

    def _logits(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.norm(x_BSD)  # the logits [B, S, V] of the next line are the largest activation
        return F.linear(x_BSD, self._output.to(x_BSD.dtype))

    def _losses(self, x_BSD: Tensor, labels_BS: Tensor, objective: Objective | None) -> Tensor:
        if objective is not None:
            return objective.losses(self.norm(x_BSD), self._output, labels_BS)
        if self.args.loss_words is None:
            return self._whole_losses(x_BSD, labels_BS)
        return tiled_token_losses(self.norm(x_BSD), self._output, labels_BS, self.args.loss_words)

    def _whole_losses(self, x_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        return self.token_losses(self._logits(x_BSD), labels_BS)

    def reset_buffers(self) -> None:
        """Sets the routers' buffers again. They have no values after a move from the meta device."""
        for module in [*(moe.router for moe in self.moe_modules()), *self.depth_routers()]:
            module.reset_buffers()  # pyright: ignore[reportCallIssue]

    def ready(self) -> None:
        """Is called when all weights have been set."""

    def units(self) -> Iterator[nn.Module]:
        """Yields the modules that are FSDP2's units: the attention of each layer, and its MoE layer or FFN."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer.attention
            yield layer.moe if layer.has_experts else layer.ffn

    def moe_modules(self) -> list[MoELayer | LoRALayer]:
        """Returns the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer | LoRALayer)]


def _joined(
    x_BSD: Tensor, late_TD: Tensor | None, report: LayerReport | None
) -> tuple[Tensor, Tensor | None, LayerReport | None]:
    """Adds the previous layer's late output to x. Returns x, this layer's late output, and the report without it."""
    x_BSD = x_BSD if late_TD is None else x_BSD + late_TD.view_as(x_BSD)
    return (x_BSD, None, None) if report is None else (x_BSD, report.late_TD, report._replace(late_TD=None))


def _carried(request: RoutingRequest, report: LayerReport) -> tuple[RoutingRequest, LayerReport]:
    """Moves the logits in a layer's report, if any, into the request for the next layer. The next layer's router adds them
    to its logits."""
    if report.logits_TC is None:
        return request, report
    return replace(request, previous_TC=report.logits_TC), report._replace(logits_TC=None)
