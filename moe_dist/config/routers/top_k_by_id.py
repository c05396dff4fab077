from collections.abc import Iterator
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from moe_dist.config.base.section import PathText, Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, DrawnRouterSection

KEY = f"{ROUTER}.table"


class TopKByIdRouterSection(DrawnRouterSection):
    """Top-k with a given mean k for each layer and token id: a baseline for routers that read the context."""

    builds = "moe_dist.moe.routers.top_k_by_id:TopKByIdRouter"
    needs = (
        ("model.mixture_of_depths", (None,), "layers that skip tokens do not pass on the tokens' ids"),
        ("engine.passes_token_ids", (True,), "layers need the tokens' ids"),
    )

    kind: Literal["top_k_by_id"] = "top_k_by_id"
    table: PathText
    """A NumPy file of floats [MoE layers, model.vocab_size]: the mean number of true experts of each token id in each
    layer; at most the smallest top_k of the groups."""

    def file_violations(self, config: WholeConfig) -> Iterator[Violation]:
        if problem := self._fault_of_table(config):
            yield Violation((KEY,), f"{KEY}={self.table}: {problem}")

    def _fault_of_table(self, config: WholeConfig) -> str:
        model = config.model
        try:
            table_LV = np.load(self.table, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            return f"is no NumPy file ({error}); write one with numpy.save"
        if not isinstance(table_LV, np.ndarray):
            return "holds several arrays; write one with numpy.save"
        shape = (len(model.moe_layers), model.vocab_size)
        if table_LV.shape != shape or table_LV.dtype.kind != "f":
            return f"has {table_LV.dtype} {list(table_LV.shape)}; give floats {list(shape)}: MoE layers, token ids"
        top_k = min(group.top_k for group in model.moe.groups.values())
        if not ((table_LV >= 0.0) & (table_LV <= top_k)).all():  # nan compares false
            return f"has numbers outside 0 to {top_k}, the smallest top_k of model.moe.groups; change them, or raise top_k"
        return ""
