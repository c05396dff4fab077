import copy
from typing import Any

from tools.compare_runs import first_difference


def line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "kind": "step",
        "time": step * 1.5,
        "scalars": {"loss/total": 3.0 / step, "perf/step_seconds": 0.1},
        "losses": {"text": 3.0 / step},
        "arrays": {"choices_LC": [[1, 2], [3, 4]]},
        **changes,
    }


RUN = [line(step) for step in range(1, 6)]


def test_times_are_no_difference() -> None:
    other = [{**each, "time": 7.0, "scalars": {**each["scalars"], "perf/step_seconds": 9.0}} for each in RUN]
    assert first_difference(RUN, other) == (None, 5)


def test_the_first_step_and_its_keys_are_found() -> None:
    other = copy.deepcopy(RUN)
    other[3]["losses"]["text"] += 1e-9
    other[3]["arrays"]["choices_LC"][1][0] = 5
    other[4]["losses"]["text"] = 0.0
    difference, same = first_difference(RUN, other)
    assert (difference.step, difference.same, same) == (4, 3, 3)
    assert [key for key, _, _ in difference.keys] == ["losses.text", "arrays.choices_LC.1"]
    assert difference.keys[1][1:] == ([3, 4], [5, 4])
    close, _ = first_difference(RUN, other, rtol=1e-6, only=["losses"])
    assert close.step == 5


def test_a_tolerance_holds_for_each_number_of_a_list() -> None:
    other = copy.deepcopy(RUN)
    other[3]["arrays"]["choices_LC"] = [[1, 2 + 1e-9], [3, 4]]
    assert first_difference(RUN, other)[0] is not None
    assert first_difference(RUN, other, rtol=1e-6) == (None, len(RUN))
    other[3]["arrays"]["choices_LC"][0] = [1]
    assert first_difference(RUN, other, rtol=1e-6)[0] is not None, "a list of another length"
    other[3]["arrays"]["choices_LC"][0] = [1, 10**400]
    assert first_difference(RUN, other, rtol=1e-6)[0] is not None, "an integer that is no float"


def test_a_missing_line_is_a_difference_and_a_shorter_run_is_none() -> None:
    difference, _ = first_difference(RUN, [RUN[0], *RUN[2:]])
    assert difference.keys[0] == ("step", 2, 3)
    assert first_difference(RUN, RUN[:2]) == (None, 2)


def test_a_key_that_one_lacks_is_one() -> None:
    difference, _ = first_difference(RUN, [line(1, surplus=None), *RUN[1:]])
    assert difference.keys == (("surplus", None, None),)
