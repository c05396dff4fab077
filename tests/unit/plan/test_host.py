"""Tests the checks of a configuration's needs (such as Apex or a Unix group) on this machine. The checks need no torch."""

import grp
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.plan.host import group_violations, host_violations
from moe_dist.plan.preflight import check_file
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config


def with_apex(tmp_path: Path, **changes: object) -> Config:
    return tiny_config(
        tmp_path,
        tmp_path,
        {"optimizer.backend": "apex", "parallel.device": "cuda", **{k.replace("__", "."): v for k, v in changes.items()}},
    )


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a package called apex, by default the unrelated package of this name on PyPI, whose import fails."""
    package = tmp_path / "site" / "apex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return package


def test_apex_is_found_without_importing_it(tmp_path: Path, installed: Path) -> None:
    (relation,) = host_violations(with_apex(tmp_path))
    assert "NVIDIA Apex is not installed" in relation.problem
    assert "optimizer.backend=torch" in relation.problem
    (installed / "optimizers").mkdir()
    (installed / "optimizers" / "fused_adam.py").touch()
    assert host_violations(with_apex(tmp_path)) == []
    assert "apex" not in sys.modules


def test_what_apex_cannot_do_is_said_all_at_once(tmp_path: Path) -> None:
    problems = [
        relation.problem
        for relation in host_violations(with_apex(tmp_path, parallel__data="fsdp2", parallel__device="cpu"))
    ]
    assert len(problems) == 3
    assert "parallel.data=ddp" in problems[0]
    assert "parallel.device=cpu" in problems[1]


def test_where_torch_is_missing_too_nothing_is_concluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert host_violations(with_apex(tmp_path)) == []


def test_preflight_tells(tmp_path: Path, tiny_data: Path) -> None:
    path = write_config(tiny_config(tiny_data, tmp_path), tmp_path / "x.yaml")
    with refused(ConfigError, "run.group"):
        check_file(path, ["optimizer.backend=apex", "parallel.device=cuda", "run.group=no_such_group"])


def test_a_group_one_is_not_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {os.getegid(), *os.getgroups()}
    other = next(group for group in grp.getgrall() if group.gr_gid not in own)
    config = tiny_config(tmp_path, tmp_path, {"run.group": other.gr_name})
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    (relation,) = group_violations(config)
    assert "you are not in that group" in relation.problem
    monkeypatch.setattr(os, "getgroups", lambda: [other.gr_gid])
    assert group_violations(config) == []


def test_triton_kernels_need_triton_and_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    real = importlib.util.find_spec
    for device in ("cpu", "cuda"):
        config = tiny_config(tmp_path, tmp_path, {"parallel.kernels.kind": "triton", "parallel.device": device})
        kinds = [relation.problem for relation in host_violations(config)]
        assert kinds == ([] if device == "cuda" else [kinds[0]])
        assert not kinds or "parallel.device=cpu; set parallel.kernels.kind=auto" in kinds[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else real(name))
    (missing,) = host_violations(config)
    assert missing.keys == ("parallel.kernels.kind",)
    assert "the package triton is not installed here" in missing.problem
    # torch and Triton may be installed only on the nodes
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert host_violations(config) == []
