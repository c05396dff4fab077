"""Each cell of the table "events by launcher" in docs/reliability.md is a link to a test that exists."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "reliability.md"
LAUNCHERS = ["local", "Slurm", "Ray", "torchrun", "srun, mpirun", "Kubernetes"]


def test_each_cell_names_its_test() -> None:
    text = PAGE.read_text()
    tests = {
        key: (PAGE.parent / file, name) for key, file, name in re.findall(r'^\[([\w-]+)\]: (\S+) "(\w+)"$', text, re.M)
    }
    table = text.partition("## Events by launcher\n")[2].partition("\n|")[2].partition("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert head == ["event", *LAUNCHERS]
    assert len(rows) >= 15
    used = set()
    for event, *cells in rows:
        assert len(cells) == len(head) - 1, event
        for cell in cells:
            keys = re.findall(r"\]\[([\w-]+)\]", cell)
            assert keys or cell == "-", f"{event}: {cell}: no test"
            used |= set(keys)
    assert used == tests.keys()
    for file, name in tests.values():
        assert re.search(rf"^def {name}\(", file.read_text(), re.M), f"{file}: {name} is not there"
