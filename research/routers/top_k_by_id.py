"""Top-k with a fixed mean number of active experts for each token id in each layer. Comparing a router with this baseline
shows whether the router uses the token's context, or only the token's id or modality.

The equations are those of `research.routers.scheduled_top_k`, with L(v) of the token id v in place of L. The table of L(v)
is a file, because it has a number for each MoE layer and token id. Shape letters: T tokens, V token ids.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.types import RoutingCache
from research.routers.scheduled_top_k import ScheduledTopKRouter


class TopKByIdRouter(ScheduledTopKRouter):
    """Routes T tokens, each inside its expert group, to L(id) experts on average in this layer.

    Args:
        table: Path of a NumPy file of floats [MoE layers, V]: L of each layer and token id. Not read on the meta device.
        options: See `TopKRouter`.

    Raises:
        ConfigError: the table cannot be read.
    """

    _table: str = ""

    def __init__(self, context: RouterContext, *, table: str, **options: Any) -> None:
        none_yet = {group.name: [0.0] * (context.place + 1) for group in context.groups}
        super().__init__(context, active_experts=none_yet, **options)
        self._table = table
        self.reset_buffers()  # repeated, because `_table` was still empty in the base class

    def reset_buffers(self) -> None:
        super().reset_buffers()
        load_V = torch.zeros(0, dtype=torch.float64)  # is on the meta device in a dry run, which may lack the file
        if self._table and load_V.device.type != "meta":
            try:
                load_V = torch.tensor(np.load(self._table, allow_pickle=False)[self.place], dtype=torch.float64)
            except (OSError, ValueError) as error:
                raise ConfigError(f"model.moe.router.table={self._table}: cannot be read ({error}); put it back") from error
        self.register_buffer("load_of_id_V", load_V, persistent=False)  # 8 bytes per token id

    def _loads(self, group_T: Tensor, cache: RoutingCache) -> tuple[Tensor, Tensor]:
        assert cache.id_T is not None, "the request has the tokens' ids"
        load_T = self.get_buffer("load_of_id_V")[cache.id_T].masked_fill(group_T < 0, 0.0)  # padding takes no expert
        whole_T = load_T.floor()
        return whole_T.to(torch.int64), load_T - whole_T
