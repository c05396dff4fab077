from typing import Literal

from moe_dist.config.attention.base import WholeModel
from moe_dist.config.attention.grouped_query import GroupedQuerySection


class SinkAttentionSection(GroupedQuerySection):
    """Grouped-query attention with a sink in each head: a learned score that joins the tokens' scores in the softmax, but
    has no value (gpt-oss)."""

    builds = "moe_dist.model.sink_attention:SinkAttention"
    served = "sinks"

    kind: Literal["sinks"] = "sinks"  # pyright: ignore[reportIncompatibleVariableOverride]

    def num_vectors(self, model: WholeModel) -> int:
        return super().num_vectors(model) + model.num_heads
