"""Compares the rows and bytes that placements and dispatch methods need for the same expert choices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class Cost:
    """The traffic of a dispatch method in a step, over all ranks and layers: rows of dispatch in forward, and payload bytes
    of forward and backward. Rows and bytes are None if the method cannot send the step's choices."""

    method: str
    row_per: str  # what one row is sent for: text of the column "one row per"
    rows: float | None
    bytes: float | None
    seconds: str = "counted"  # text: measured seconds in dispatch and combine; "counted" for a method that did not run


@dataclass(frozen=True)
class CostTable:
    """The mean costs of the last `steps` steps. The first line has the costs of the run itself.

    Attributes:
        untimed: The reason why the run has no timings; empty if it has timings.
        placed: A sentence that compares the rows of the run's placement with those of each other placement.
    """

    costs: Sequence[Cost]
    steps: int
    tokens: float
    untimed: str
    placed: str = ""


def cost_table(
    ledgers: Sequence[Mapping[str, int]],
    placement: ExpertPlacement,
    policy: str,
    by_placement: Mapping[str, int],
    *,
    tokens: float,
    seconds: str,
    untimed: str,
) -> CostTable:
    """Compares methods on the expert choices of some steps.

    A method's bytes are its rows times the bytes per row of this run (forward, backward and recomputation). Numbers of rows
    are from the ledger (`moe_dist.moe.dispatch.ledger`), except for other placements. Megatron-Core's all-to-all dispatcher
    needs equally many experts on each rank, and sends one row for each (token, expert) pair whose expert is on another
    rank. For docs/benchmarks.md the rows in Megatron-Core's collectives were counted. Their number equals the number in the
    ledger.

    Args:
        ledgers: The ledger of each step, summed over ranks.
        by_placement: Number of rows of the same steps under the run's and other placements, by policy
            (`moe_dist.train.rank_balance.placement_rows`), with one row per token and rank. If the run sends a row more
            than once (dispatch `hierarchical`), other placements are not compared.
        tokens, seconds: Mean number of tokens per step, and `Cost.seconds` of this run.
        untimed: The reason why this run's timings mean nothing; empty if they are meaningful.
    """
    steps = len(ledgers)
    ledger = {key: sum(each[key] for each in ledgers) / steps for key in ledgers[0]}
    num_rows = ledger["rows_remote"] + ledger["rows_padding"]
    row_bytes = ledger["payload_bytes"] / num_rows if num_rows else 0.0
    choices = "/".join(dict.fromkeys(str(min(group.top_k, group.num_experts)) for group in placement.groups))
    even = len({len(slots) for slots in placement.slots}) == 1
    comparable = by_placement[policy] == sum(each["rows_remote"] for each in ledgers)
    elsewhere = {name: count for name, count in by_placement.items() if comparable and name != policy}
    per_rank, per_expert = "token and rank", "token and expert"
    rows: list[tuple[str, str, float | None]] = [
        *((f"this run, if experts were {name}", per_rank, count / steps) for name, count in elsewhere.items()),
        ("Megatron-Core's dispatcher, same choices", per_expert, ledger["rows_per_pair"] if even else None),
        ("fixed top-k, as many true experts", per_expert, ledger["rows_same_active"]),
        (f"top-{choices}, no null experts", per_expert, ledger["rows_topk"]),
    ]
    own_per = per_rank if comparable else "hop"  # dispatch `hierarchical` sends a row over two hops
    own = Cost(f"this run: experts {policy}", own_per, num_rows, ledger["payload_bytes"], seconds)
    others = [Cost(name, per, count, None if count is None else count * row_bytes) for name, per, count in rows]
    placed = _placed(policy, by_placement[policy], elsewhere)
    return CostTable([own, *others], steps, tokens, untimed, placed)


def _placed(policy: str, rows: float, rows_of: Mapping[str, float]) -> str:
    """Returns a sentence that compares the `rows` of the run with those of other placements; empty if there are none."""
    parts = []
    for name, other in rows_of.items():
        share = f"{abs(1 - rows / other):.1%} " if other else ""
        change = f"{share}{'fewer' if rows < other else 'more'} rows than" if rows != other else "as many rows as"
        parts.append(f"{change} {name} would")
    return f"This run's experts are {policy}, which sends {' and '.join(parts)}. " if parts else ""


HEADERS = ("method", "one row per", "rows", "MB", "x this run", "seconds")


def render_costs(found: CostTable) -> Table:
    """Returns the table for console and summary."""
    table = Table(title="What a step sends", caption=_caption(found), title_justify="left", caption_justify="left")
    for number, name in enumerate(HEADERS):
        table.add_column(name, justify="left" if number < 2 else "right")
    for cells in _cells(found):
        table.add_row(*map(escape, cells))
    return table


def costs_markdown(found: CostTable) -> str:
    """Returns the table for TensorBoard."""
    lines = [HEADERS, ("---", "---", *["---:"] * 4), *_cells(found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{_caption(found)}"


def _caption(found: CostTable) -> str:
    caption = (
        f"{found.placed}Mean of the last {found.steps} steps of {found.tokens:,.0f} tokens each, over all layers. Rows: "
        "sent to other ranks in forward; MB: of forward and backward. A null expert computes nothing and gets no row. "
        "Pinned: a rank has experts of one modality's group; interleaved: each rank has experts of every group. Other "
        "methods did not run: their rows are counted from this run's choices; the last two assume that choices spread "
        "evenly."
    )
    return f"{caption} {found.untimed.capitalize()}." if found.untimed else caption


def _cells(found: CostTable) -> Iterator[tuple[str, ...]]:
    own = found.costs[0]
    for cost in found.costs:
        sent = ("-", "-", "not possible") if cost.rows is None or cost.bytes is None else _sent(cost.rows, cost.bytes, own)
        yield cost.method, cost.row_per, *sent, cost.seconds


def _sent(rows: float, num_bytes: float, own: Cost) -> tuple[str, str, str]:
    ratio = f"{rows / own.rows:.2f}" if own.rows else "-"
    return f"{rows:,.0f}", f"{num_bytes / 1e6:.2f}", ratio
