"""A node collects facts about itself, and encodes them as one line."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_dist.runtime.node.facts import (
    NodeFacts,
    Questions,
    apex_kind,
    from_line,
    look,
    node_name,
    to_line,
    unreachable,
    unresolved,
    write_problem,
)

ROOT = Path(__file__).parents[4]


def test_facts_of_this_node(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    facts = look(Questions(str(tmp_path), str(tmp_path / "none"), token_file=(str(tmp_path / "token"), "abc")), env={})
    assert facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts.versions["torch"]
    assert (facts.folder_problem, facts.sees_token, facts.sees_data) == ("", True, False)
    assert facts.free_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["token"], "nothing is left"
    assert from_line(f"3: {to_line(facts)}\n") == facts


def test_a_different_folder_of_that_name_is_detected_by_the_token(tmp_path: Path) -> None:
    for content in (None, "another"):
        if content is not None:
            (tmp_path / "token").write_text(content)
        assert look(Questions(str(tmp_path), "/", token_file=(str(tmp_path / "token"), "abc"))).sees_token is False


def test_a_missing_folder_is_checked_by_its_parent(tmp_path: Path) -> None:
    assert write_problem(tmp_path / "runs" / "of" / "mine") == ""
    assert write_problem(Path("/proc/none")).startswith("/proc: ")


def test_names_and_ports() -> None:
    assert list(unresolved(["localhost", "nowhere.invalid"])) == ["nowhere.invalid"]
    assert unreachable("127.0.0.1", 1) == "Connection refused"


def test_the_node_goes_by_the_schedulers_name() -> None:
    assert node_name({"SLURMD_NODENAME": "node3", "MOE_DIST_NODE_NAME": "x"}) == "node3"
    assert node_name({"MOE_DIST_NODE_NAME": "10.0.0.1"}) == "10.0.0.1"
    assert node_name({}) == os.uname().nodename


@pytest.mark.parametrize(("made", "kind"), [((), "none"), (("apex",), "other"), (("apex", "apex/optimizers"), "nvidia")])
def test_which_apex(made: tuple[str, ...], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    if kind == "nvidia":
        (tmp_path / "apex/optimizers/fused_adam.py").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    assert apex_kind() == kind


def test_as_a_command_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('launchers.doctor.on_node', run_name='__main__')"
    )
    question = json.dumps(asdict(Questions(str(tmp_path), str(tmp_path))))
    done = subprocess.run([sys.executable, "-c", code, question], cwd=ROOT, capture_output=True, text=True, check=False)
    assert isinstance(from_line(done.stdout), NodeFacts), done.stderr
