"""Defines a micro-batch of tokens and pictures, for models of transformers that have an encoder of pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from moe_dist.data.batch import Batch


@dataclass(frozen=True)
class PictureBatch(Batch):
    """A micro-batch whose sequences may have placeholder tokens of pictures.

    Attributes:
        more: Inputs of the family's forward, by its own names, as the family's processor makes them. `pixel_values` and
            `image_grid_thw` have all pictures of the batch, in order; both are absent if it has none.
            `moe_mm_token_type_ids` [B, S] is 0 for text. Without it, `modality_BS` decides whether text or vision experts
            compute a token. `position_ids` [3, B, S] are positions in time, height and width. Without them the family
            computes them, with a host sync for each picture. A function makes the inputs when they are asked for.
    """

    more: Mapping[str, torch.Tensor] | Callable[[], Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        more = {name: each.to(device, non_blocking=True) for name, each in self.family_inputs().items()}
        return replace(self, **vars(super().to(device)), more=more)

    def family_inputs(self) -> Mapping[str, torch.Tensor]:
        return self.more() if callable(self.more) else self.more
