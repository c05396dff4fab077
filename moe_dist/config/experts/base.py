from typing import ClassVar

from moe_dist.config.base.section import KindSection


class ExpertsSection(KindSection):
    """The module, such as an FFN, of every true expert: every expert that is not null, identity or constant.

    `builds` names the activation of FFNs, the adapter of FFNs with adapters (whose `base` names the activation), or the
    LoRA experts over one frozen FFN.
    """

    replicated: ClassVar[bool] = False  # true if every rank holds all experts, so that no row is sent
    adapts_ffns: ClassVar[bool] = False  # true if experts are the frozen experts of run.init_from, with adapters
    over_frozen_ffn: ClassVar[bool] = False  # true if experts are adapters over one FFN per layer, from run.init_from
    static: ClassVar[bool] = False  # true if they can compute rows whose number the host does not know
    replicas: ClassVar[bool] = False  # true if they can compute other ranks' experts too, as rank_balance.replicating needs

    @property
    def base(self) -> "ExpertsSection":
        """The section of the experts without adapters on them."""
        return self

    @property
    def adapter_is_shared(self) -> bool:
        """Whether all experts of a group share one adapter."""
        return False

    @property
    def shared_expert_rank(self) -> int:
        """Rank of the adapters on the shared expert; 0 if it has none."""
        return 0

    def adapter_parameters(self, hidden_dim: int, ffn_dim: int) -> int:
        """Returns the number of parameters of the adapters on one expert."""
        return 0

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        """Returns the number of an expert's parameters that are in no matrix."""
        return 0

    @property
    def input_dropout(self) -> float:
        """Dropout probability of an expert's inputs in training."""
        return 0.0
