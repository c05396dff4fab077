"""Whether the nodes of a cluster meet the requirements of a plan."""

from launchers.doctor.fit import Offer, Want, check_fit
from moe_dist.plan.matching import match
from moe_dist.runtime.node.check_result import CheckResult, Level

TEXT, VISION = frozenset(["text"]), frozenset(["vision"])


def offer(name: str, traits: frozenset[str] = frozenset(), *, up: bool = True, **amounts: float) -> Offer:
    return Offer(name, "idle" if up else "down", up, traits, amounts or {"CPU": 8})


def fit(wants: list[Want], offers: list[Offer]) -> CheckResult:
    return check_fit(wants, offers, trait_word="feature", where="partition 'gpu'")


def test_enough_nodes() -> None:
    found = fit([Want("0", TEXT), Want("1", VISION)], [offer("a", VISION), offer("b", TEXT | VISION)])
    assert (found.level, str(found)) == (Level.OK, "nodes: the plan fits on 2 of the 2 nodes of partition 'gpu'")


def test_a_node_that_is_down_and_not_needed_is_no_problem() -> None:
    found = fit([Want("0", TEXT)], [offer("a", TEXT, up=False), offer("b", TEXT)])
    assert found.level is Level.OK
    assert "a (down) cannot be used, and is not needed" in found.text


def test_no_such_feature() -> None:
    found = fit([Want("0", TEXT), Want("2", frozenset(["hearing"]))], [offer("a", TEXT), offer("b", VISION)])
    assert found.verdict == 69
    assert (
        "rank 2 needs a node with the feature 'hearing', but no node of partition 'gpu' has it (existing: text, vision)"
        in str(found)
    )


def test_no_node_with_both() -> None:
    assert "but no node of partition 'gpu' has all of them" in str(
        fit([Want("0", TEXT | VISION)], [offer("a", TEXT), offer("b", VISION)])
    )


def test_larger_than_any_node_of_its_kind() -> None:
    offers = [offer("a", TEXT, GPU=4), offer("b", VISION, GPU=8)]
    found = fit([Want("0-7", TEXT, {"GPU": 8})], offers)
    assert "ranks 0-7 need 8 GPU on one node, but no node of partition 'gpu' with the feature text has more than 4" in str(
        found
    )


def test_too_few_that_are_up() -> None:
    wants = [Want("0", TEXT), Want("1", TEXT), Want("2", VISION)]
    found = fit(wants, [offer("a", TEXT), offer("b", TEXT, up=False), offer("c", VISION)])
    assert (
        "the plan needs 2 nodes with the feature text (of 3 in all), but partition 'gpu' has 1 that can be used (b down)"
        in str(found)
    )


def test_an_empty_partition() -> None:
    assert "partition 'gpu' has no nodes" in str(fit([Want("0")], []))


def test_demanding_nodes_get_their_match_in_any_order() -> None:
    wants = [Want("0"), Want("1", TEXT), Want("2", TEXT | VISION)]
    offers = [offer("a", TEXT | VISION), offer("b", TEXT), offer("c")]
    fitting = [[number for number, offer in enumerate(offers) if want.fits(offer)] for want in wants]
    assert match(fitting) == [2, 1, 0]
