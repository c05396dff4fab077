"""The doctor's visit to a node: `python -m launchers.doctor.on_node QUESTIONS`, one on each, meets the others and tells."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launchers.doctor import meeting
from moe_dist.doctor.node_facts import NodeFacts, Questions, look, questions_from, to_line


def visit(questions: Questions, *, first: bool, env: Mapping[str, str] = os.environ) -> NodeFacts:
    """What this node says, after it has met the others.

    Args:
        first: Whether it is the node at which the others meet: that of rank 0.
    """
    facts = look(questions, env=env)
    if questions.meeting is not None and questions.num_nodes > 1:
        path = Path(questions.meeting)
        seen = meeting.listen(path, questions.num_nodes, env) if first else meeting.come(path)
        facts = replace(facts, unresolved={**facts.unresolved, **seen.unresolved}, unreachable=seen.unreachable)
    return replace(facts, clock=time.time())  # as late as can be: whoever hears it notes when


if __name__ == "__main__":
    print(to_line(visit(questions_from(sys.argv[1]), first=os.environ.get("RANK", "0") == "0")), flush=True)
