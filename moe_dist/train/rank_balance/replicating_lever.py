"""Decides which experts get replicas. A decision depends only on routing counts. It is therefore equal on all ranks, and in
all runs with the same seed.

A window of steps is cut in two halves, as in `moving_lever.py`. The loads of the first half determine each layer's new
replicas: repeatedly, the busiest rank gives a part of one expert's tokens to the least busy rank with a free replica slot.
The loads of the second half decide between the new replicas, the layer's present replicas, and no replicas. Making replicas
costs nothing, but each step exchanges their weights and gradients. Replicas must save more time than these exchanges take.

Shape letters: S steps, L MoE layers, E true experts, R ranks of an EP group.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from moe_dist.errors import ConfigError, DataError
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica, hosts_of, shares
from moe_dist.train.rank_balance.moving_lever import LoadLever

LEAST_GAIN = 0.02  # a gain below this fraction of the load of a layer's busiest rank counts as noise
# Number of FLOPs per parameter of an expert in forward and backward of one token.
FLOPS_OF_ROW = 6
Replicas = tuple[Replica, ...]  # the replicas of one layer, sorted


class ReplicatingLever(LoadLever[PlacementWithReplicas]):
    """A `moe_dist.train.rank_balance.levers.Lever` that makes replicas. Checkpoints save the lever's state.

    Args:
        replicate: Makes the replicas that a placement contains. Needs no collective.
        edp: Number of EP groups. They share the tokens of a step.
        bytes_per_value: Number of bytes that a rank sends in a step for each parameter of a replica.
        every, slots, flops_per_byte: See `config.rank_balance_schema.ReplicatingSection`.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        replicate: Callable[[PlacementWithReplicas], None],
        *,
        layers: int,
        edp: int,
        bytes_per_value: float,
        every: int,
        slots: int,
        flops_per_byte: float,
    ) -> None:
        super().__init__(PlacementWithReplicas(placement.groups, placement.slots, ((),) * layers), every, layers)
        self._replicate, self._edp, self._slots = replicate, edp, slots
        self._home_E = np.array(placement.rank_of_expert)
        self._rows_of_replica = bytes_per_value * flops_per_byte / FLOPS_OF_ROW  # rows that a rank could compute meanwhile

    def _decide(self, load_SLE: np.ndarray) -> LeverDecision | None:
        load_SLE = load_SLE / self._edp
        first, second = np.split(load_SLE, [len(load_SLE) // 2])
        old, new, wished = self.placement.replicas, list[Replicas](), list[Replicas]()
        for layer, now in enumerate(old):
            chain = self._found(first[:, layer].mean(0))
            pace = {each: self._pace(first[:, layer], each) for each in chain}
            wished.append(_fewest(pace))
            paying = _fewest({each: pace[each] + self._cost(each) for each in chain})
            worth = {each: self._pace(second[:, layer], each) + self._cost(each) for each in (now, (), paying)}
            best = min(worth, key=lambda each: worth[each])
            enough = worth[now] - worth[best] > LEAST_GAIN * self._pace(second[:, layer], ())
            new.append(best if enough else now)
        taken = tuple(new) != old
        if not taken and self._sum(first, wished) > (1 - LEAST_GAIN) * self._sum(first, old):
            return None
        shown = new if taken else wished
        none, before, after = (self._sum(second, each) for each in ([()] * len(old), old, shown))
        none, mean = max(none, 1e-9), max(self._mean(second), 1e-9)
        saved, cost = (self._every * each / none for each in (none - after, sum(map(self._cost, shown))))
        why = (
            f"{sum(map(len, shown))} replicas in {sum(map(bool, shown))} layers save {saved:.3g} of {self._every} steps "
            f"and cost {cost:.3g}, a sum of {saved - cost:+.3g}"
        )
        placement = PlacementWithReplicas(self.placement.groups, self.placement.slots, tuple(new)) if taken else None
        return LeverDecision("replicating", taken, before / mean, after / mean, cost, why, placement)

    def _found(self, load_E: np.ndarray) -> list[Replicas]:
        """Returns sets of replicas for one layer's loads. The first set is empty; each next set has one more replica."""
        ranks, chain = self.placement.num_ranks, list[Replicas]([()])
        load_R, free_R = np.bincount(self._home_E, load_E, minlength=ranks), np.full(ranks, self._slots)
        while True:
            busiest, hosts_of_expert = int(load_R.argmax()), hosts_of(chain[-1], self._home_E.tolist())
            best, best_R, least = None, load_R, float((load_R**2).sum()) * (1 - 1e-9)
            for expert in np.flatnonzero(load_E).tolist():
                hosts = hosts_of_expert.get(expert, [int(self._home_E[expert])])
                if busiest not in hosts:
                    continue
                others = [rank for rank in np.flatnonzero(free_R).tolist() if rank not in hosts]
                if not others:
                    continue
                host = min(others, key=lambda rank: load_R[rank])
                more = [*sorted([*hosts[:-1], host]), hosts[-1]]
                new_R = load_R + load_E[expert] * (shares(more, ranks) - shares(hosts, ranks))
                if float((new_R**2).sum()) < least:
                    best, best_R, least = Replica(expert, host), new_R, float((new_R**2).sum())
            if best is None:
                return chain
            load_R = best_R
            free_R[best.rank] -= 1
            chain.append(tuple(sorted((*chain[-1], best))))

    def _pace(self, load_SE: np.ndarray, replicas: Replicas) -> float:
        """Returns the mean over steps of the load that a layer's busiest rank has with `replicas`."""
        load_SR = load_SE @ np.eye(self.placement.num_ranks)[self._home_E]
        for expert, hosts in hosts_of(replicas, self._home_E.tolist()).items():
            load_SR[:, hosts[-1]] -= load_SE[:, expert]
            load_SR += load_SE[:, expert, None] * shares(hosts, self.placement.num_ranks)
        return float(load_SR.max(1).mean())

    def _sum(self, load_SLE: np.ndarray, replicas_L: Sequence[Replicas]) -> float:
        return sum(self._pace(load_SLE[:, layer], each) for layer, each in enumerate(replicas_L))

    def _mean(self, load_SLE: np.ndarray) -> float:
        return float(load_SLE.sum() / len(load_SLE) / self.placement.num_ranks)

    def _cost(self, replicas: Replicas) -> float:
        """Returns the cost of replicas per step. Its unit is (token, expert) pairs x FFN width: the work that the busiest
        sender or receiver could do while replicas are exchanged."""
        width_2R = np.zeros((2, self.placement.num_ranks))
        for expert, rank in replicas:
            width_2R[0, self._home_E[expert]] += self._width_E[expert]
            width_2R[1, rank] += self._width_E[expert]
        return float(width_2R.max() * self._rows_of_replica)

    def _place(self, placement: PlacementWithReplicas) -> None:
        self._replicate(placement)
        self.placement = placement

    def state(self) -> JsonValue:
        """Returns the replicas, the experts of each rank, and the routing counts since the last decision."""
        return {**self.placement.line, "pairs": self._stored_pairs()}

    def restore(self, state: JsonValue) -> None:
        """Makes the saved replicas again. Makes none if an expert's rank differs from its rank in the saved state. Raises
        DataError if `state` is invalid."""
        try:
            assert isinstance(state, dict)
            pairs_SLE = self._read_pairs(state["pairs"])
            replicas = [tuple(Replica(*map(int, each)) for each in layer) for layer in state["replicas"]]  # pyright: ignore
            slots = tuple(tuple(map(int, each)) for each in state["slots"])  # pyright: ignore
            placement = PlacementWithReplicas(self.placement.groups, slots, tuple(replicas))
            assert len(replicas) == len(self.placement.replicas), "its layers are others"
        except (ArithmeticError, AssertionError, ConfigError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"state of the lever of replicas: {state!r:.80} is none ({error!s:.80})") from error
        if slots == self.placement.slots and any(replicas):
            self._place(placement)
        self._pairs_SLE = pairs_SLE


def _fewest(worth: Mapping[Replicas, float]) -> Replicas:
    """Returns the smallest set of replicas in `worth` (sorted by size) whose load is close to the smallest load of all."""
    limit = min(worth.values()) + LEAST_GAIN * worth[()]
    return next(each for each, value in worth.items() if value <= limit)
