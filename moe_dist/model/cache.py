"""Caches the keys and values of earlier tokens, so that a new token costs one row instead of the whole sequence.

Each sequence appends its entries separately. Padding adds no entry, and neither does a token that skips the layer (mixture
of depths). Keys are stored after rotation. Each entry stores its position, so its place in the buffer does not matter.
Nothing here syncs with the host.

Shape letters: B sequences, N new tokens of each sequence, H key-value heads, d head width, C entries.
"""

import torch
from torch import Tensor

from moe_dist.model.layers import ModelArgs

_NEVER = torch.iinfo(torch.int64).max  # position of an empty entry, which is later than any query and so never visible


class LayerCache:
    """The entries of one layer: at most `capacity` for each of `batch` sequences."""

    def __init__(self, args: ModelArgs, *, batch: int, capacity: int, device: torch.device) -> None:
        # The extra last place takes the writes of unmarked tokens and is never visible. Buffers are zeros, because
        # attention turns a masked NaN into NaN.
        shape, dtype = (batch, args.num_kv_heads, capacity + 1, args.head_dim), args.compute_dtype
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.full((batch, capacity + 1), _NEVER, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self._seen = 0  # tokens offered so far, an upper bound of the entries that needs no sync

    def append(self, key_BHNd: Tensor, value_BHNd: Tensor, positions_BN: Tensor, taken_BN: Tensor) -> None:
        """Adds the entries of the marked tokens.

        Raises:
            ValueError: more tokens than the capacity were offered.
        """
        self._seen += taken_BN.shape[1]
        if self._seen > self.capacity:
            raise ValueError(f"{self._seen} tokens were offered to a cache made for {self.capacity}")
        place_BN = self.lengths[:, None] + taken_BN.cumsum(1) - 1
        place_BN = torch.where(taken_BN, place_BN, self.capacity)  # fixed shapes need no host sync
        at = place_BN[:, None, :, None].expand_as(key_BHNd)
        self.keys.scatter_(2, at, key_BHNd)
        self.values.scatter_(2, at, value_BHNd)
        self.positions.scatter_(1, place_BN, torch.where(taken_BN, positions_BN, _NEVER))
        self.lengths += taken_BN.sum(1)  # added on the device, without a sync

    def entries(self, positions_BN: Tensor, taken_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the keys and values [B, H, C, d], and a bool mask [B, 1, N, C] of the entries that each query sees:
        entries at its position or earlier. An unmarked query sees all entries, so that its unused row stays finite."""
        queries_BN = torch.where(taken_BN, positions_BN, _NEVER)
        visible = self.positions[:, None, None, : self._seen] <= queries_BN[:, None, :, None]
        return self.keys[:, :, : self._seen], self.values[:, :, : self._seen], visible


KeyValueCache = tuple[LayerCache, ...]  # one for each layer of a transformer
