"""The doctor's task on each node: `python -m launchers.doctor.on_node QUESTIONS` prints the node's facts as one line."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launchers.doctor import meeting
from moe_dist.doctor.node_facts import NodeFacts, Questions, look, questions_from, to_line


def visit(questions: Questions, *, first: bool, env: Mapping[str, str] = os.environ) -> NodeFacts:
    """The facts of this node, with the result of the connection test.

    Args:
        first: Whether this is rank 0's node, to which the others connect.
    """
    facts = look(questions, env=env)
    if questions.meeting is not None and questions.num_nodes > 1:
        path = Path(questions.meeting)
        seen = meeting.listen(path, questions.num_nodes, env) if first else meeting.connect(path)
        facts = replace(facts, unresolved={**facts.unresolved, **seen.unresolved}, unreachable=seen.unreachable)
    return replace(facts, clock=time.time())  # read last: the receiver compares it with the arrival time


if __name__ == "__main__":
    print(to_line(visit(questions_from(sys.argv[1]), first=os.environ.get("RANK", "0") == "0")), flush=True)
