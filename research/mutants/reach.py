"""Finds the tests that execute the place of each fault. All tests run once in a copy of the tree, in which a probe stands
before each place.

A probe writes (fault, test) to a file. Tests start ranks and launchers as separate processes, which must know the name of
the running test. So this name is in a file, and an environment variable tells all child processes the folder of the file.
Ranks that stay alive between tests inherit the variable from the pytest process that started them.
"""

import ast
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from research.mutants.seeds import Fault

FOLDER = "MUTANTS_REACH"  # environment variable with the folder of one pytest process
REACH_BASE = "MUTANTS_REACH_BASE"  # environment variable with the folder that contains the folders of all pytest processes
ORDER = "MUTANTS_ORDER"  # environment variable with a file that names the tests to run, in order
NO_TEST = "between tests"
# This text is written into the copy. It must run in processes without torch, and must cost little in loops.
PROBE = f'''import os
_seen = set()
def reached(fault):
    folder = os.environ.get("{FOLDER}")
    if folder is None:
        return
    try:
        with open(folder + "/test") as file:
            test = file.read()
        if (fault, test) not in _seen:
            _seen.add((fault, test))
            with open(folder + "/reached", "a") as file:
                file.write(fault + "\\t" + test + "\\n")
    except OSError:
        pass
'''


def add_probes(root: Path, faults: Iterable[Fault]) -> None:
    """Writes the probes into the copy of the product in the folder `root`."""
    (root / "moe_dist" / "_probe.py").write_text(PROBE)
    by_path: dict[str, list[Fault]] = {}
    for fault in faults:
        by_path.setdefault(fault.path, []).append(fault)
    for path, here in by_path.items():
        if not path.endswith(".py"):
            continue
        source = (root / path).read_text()
        lines = source.splitlines()
        calls = {(_statement(source, fault.line(source)), fault.id) for fault in here}
        for line, name in sorted(calls, reverse=True):
            indent = lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]
            lines.insert(line - 1, f'{indent}__import__("moe_dist._probe")._probe.reached("{name}")')
        (root / path).write_text("\n".join(lines) + "\n")
        compile((root / path).read_text(), path, "exec")


def _statement(source: str, line: int) -> int:
    """Returns the first line of the innermost statement that contains `line` and before which a call may stand."""
    found = 1
    for node in ast.walk(ast.parse(source)):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for each in body if isinstance(body, list) else ():
                start = min([each.lineno, *(item.lineno for item in getattr(each, "decorator_list", ()))])
                if start <= line <= (each.end_lineno or each.lineno):
                    found = max(found, start)
    return found


def read_reached(folder: Path) -> dict[str, set[str]]:
    """Returns the tests that reach each fault, as recorded in the folders of all pytest processes below `folder`."""
    tests: dict[str, set[str]] = {}
    for path in folder.glob("*/reached"):
        for line in path.read_text().splitlines():
            fault, _, test = line.partition("\t")
            if test != NO_TEST:
                tests.setdefault(fault, set()).add(test)
    return tests


def read_durations(out: Path, tests: str) -> dict[str, float]:
    """Returns the seconds of each passed test of a set, from pytest's reports in `out`."""
    seconds: dict[str, float] = {}
    for path in out.glob(f"durations_{tests}_*.xml"):
        for case in ElementTree.parse(path).iter("testcase"):
            if len(case.findall("./failure") + case.findall("./error") + case.findall("./skipped")):
                continue
            file = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    return seconds


# --- the plugin, which pytest loads with the option -p research.mutants.reach


def pytest_configure(config: pytest.Config) -> None:
    """Makes a folder for this pytest process (a worker of xdist, or the only process)."""
    if base := os.environ.get(REACH_BASE):
        folder = Path(base) / str(os.getpid())
        folder.mkdir(parents=True)
        (folder / "test").write_text(NO_TEST)
        os.environ[FOLDER] = str(folder)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests that are listed in the file ORDER, in the order of the list."""
    if path := os.environ.get(ORDER):
        place = {name: number for number, name in enumerate(Path(path).read_text().splitlines())}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    folder = os.environ.get(FOLDER)
    if folder is not None:
        (Path(folder) / "next").write_text(item.nodeid)
        os.replace(Path(folder) / "next", Path(folder) / "test")
    return (yield)
