"""Caches the keys and values of earlier tokens, so that generating a token does not compute them again.

An entry is the key, the value and the position of one token. Padding and tokens that skip the layer (mixture of depths) add
no entry. So the sequences of a batch may have different numbers of entries. Keys are stored after rotation. Latent
attention stores the rotated part of the keys as key, and the latent as value. Both together are smaller than whole keys and
values. No function of the cache syncs with the host.

Shape letters: B sequences, N new tokens per sequence, H key-value heads, d head width, C entries.
"""

import torch
from torch import Tensor

Entry = tuple[tuple[int, int], tuple[int, int]]  # number of heads and head width, of a key and of a value

_NEVER = torch.iinfo(torch.int64).max  # position of an entry without a token: later than any query, so never visible


class LayerCache:
    """The entries of one layer: at most `max_tokens` for each of `batch` sequences.

    With a sliding window (`window`), a token attends only to entries inside the window. Older entries stay in memory.
    """

    def __init__(
        self,
        entry: Entry,
        *,
        batch: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> None:
        # Unmarked tokens are written to an extra last entry, which is never visible. Buffers start at 0, because a NaN in
        # an unused entry would make attention NaN although the mask excludes this entry.
        self.keys, self.values = (
            torch.zeros(batch, heads, max_tokens + 1, width, dtype=dtype, device=device) for heads, width in entry
        )
        self.positions = torch.full((batch, max_tokens + 1), _NEVER, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_tokens, self.window = max_tokens, window
        self._seen = 0  # number of tokens passed to `append`: an upper bound of the number of entries, without a sync

    def append(self, key_BHNd: Tensor, value_BHNd: Tensor, positions_BN: Tensor, taken_BN: Tensor) -> None:
        """Adds the entries of the tokens marked by `taken_BN`. Raises ValueError if all calls together pass more than
        `max_tokens` tokens per sequence."""
        self._seen += taken_BN.shape[1]
        if self._seen > self.max_tokens:
            raise ValueError(f"{self._seen} tokens were offered to a cache made for {self.max_tokens}")
        place_BN = self.lengths[:, None] + taken_BN.cumsum(1) - 1
        place_BN = torch.where(taken_BN, place_BN, self.max_tokens)  # shapes are fixed, so nothing syncs with the host
        at = place_BN[:, None, :, None]
        self.keys.scatter_(2, at.expand_as(key_BHNd), key_BHNd)
        self.values.scatter_(2, at.expand_as(value_BHNd), value_BHNd)
        self.positions.scatter_(1, place_BN, torch.where(taken_BN, positions_BN, _NEVER))
        self.lengths += taken_BN.sum(1)  # without a sync

    def entries(self, positions_BN: Tensor, taken_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the keys and values [B, H, C, d], and a bool mask [B, 1, N, C] that is true where an entry's position is
        at most the query's and within the window. An unmarked query sees all entries, so that its unused output stays
        finite."""
        queries_BN = torch.where(taken_BN, positions_BN, _NEVER)
        entries_BC = self.positions[:, : self._seen]
        visible = entries_BC[:, None, :] <= queries_BN[..., None]
        if self.window is not None:
            oldest_BN = torch.where(taken_BN, positions_BN - self.window, -1)
            visible &= entries_BC[:, None, :] > oldest_BN[..., None]
        return self.keys[:, :, : self._seen], self.values[:, :, : self._seen], visible[:, None]


KeyValueCache = tuple[LayerCache, ...]  # one cache per layer of a transformer
