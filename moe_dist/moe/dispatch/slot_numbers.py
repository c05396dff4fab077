"""Numbers of experts as DeepEP and HybridEP want them: as many on every rank, one after another."""

from dataclasses import dataclass

from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class SlotNumbers:
    """The numbers of a placement: rank r holds [r E', (r + 1) E'), and slot s of rank r is r E' + s.

    Attributes:
        slots_per_rank: E', the same on every rank; one at least, so that there is something to divide.
        number_of_expert: For each logical expert its number. Numbers that no slot has are phantoms, never routed to.
    """

    slots_per_rank: int
    number_of_expert: tuple[int, ...]

    @classmethod
    def of(cls, placement: ExpertPlacement, *, multiple: int = 1) -> "SlotNumbers":
        """The numbering of a placement, E' the largest number of slots of a rank rounded up to a multiple."""
        slots_per_rank = max(1, *(len(slots) for slots in placement.slots))
        slots_per_rank = -(-slots_per_rank // multiple) * multiple
        places = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
        return cls(slots_per_rank, tuple(rank * slots_per_rank + slot for rank, slot in places))
