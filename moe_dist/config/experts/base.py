from typing import ClassVar

from moe_dist.config.base.section import KindSection


class ExpertsSection(KindSection):
    """The kind of module, such as an FFN, that every true expert has. Null, identity and constant experts are not true
    experts.

    `builds` names the activation for plain FFNs, the adapter for FFNs with adapters (then `base` names the activation), and
    the experts' class for LoRA experts over one frozen FFN.
    """

    replicated: ClassVar[bool] = False  # true if every rank has all experts, and no row is sent
    adapts_ffns: ClassVar[bool] = False  # true if experts are frozen FFNs from run.init_from, with adapters
    over_frozen_ffn: ClassVar[bool] = False  # true if experts are adapters over a layer's only FFN, from run.init_from
    static: ClassVar[bool] = False  # true if the experts can compute rows whose number the host does not know
    replicas: ClassVar[bool] = False  # true if a rank can also compute replicas of experts (rank_balance.replicating)

    @property
    def base(self) -> "ExpertsSection":
        """The section that describes the experts without their adapters."""
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
        """Returns the number of an expert's parameters outside of matrices."""
        return 0

    @property
    def input_dropout(self) -> float:
        """Probability with which training drops an input value of an expert."""
        return 0.0
