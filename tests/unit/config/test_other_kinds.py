"""Installed packages can offer further kinds. Errors name a package that is missing or broken."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from launchers.explain import explain
from moe_dist.config.base.kinds import PACKAGE as KEY
from moe_dist.config.load import difference, load_config, load_stored_config, resolved_yaml
from moe_dist.config.partial import read_stored
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from tests.support.other_package import PACKAGE, SECTION, write_package

CHOSEN = "model.moe.router.kind=acme_cosine"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = write_package(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("acme_routers", "others")]:
        del sys.modules[name]


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return "\n".join(raised.value.problems)


def test_it_is_read_stored_and_read_again(installed: Path, path: Path) -> None:
    config = load_config(path, [CHOSEN, "model.moe.router.temperature=0.5", "model.moe.router.bounds=[1.0, 2.0]"])
    router = config.model.moe.router
    assert type(router).__module__ == "acme_routers.section"
    assert router.keywords() == {"temperature": 0.5, "bounds": (1.0, 2.0)}
    assert "acme_routers.router" not in sys.modules, "only `build` imports the class, and torch"
    path.write_text(resolved_yaml(config))
    assert load_stored_config(path) == config
    stored = config.model_dump(mode="json")
    assert stored["model"]["moe"]["router"][KEY] == PACKAGE
    assert read_stored(Config, json.loads(json.dumps(stored))) == config
    assert difference(config, load_config(path, ["model.moe.router.temperature=0.25"]))[0].key.endswith("temperature")


def test_its_keys_are_checked_and_explained_like_others(installed: Path, path: Path) -> None:
    told = said(path, CHOSEN, "model.moe.router.temperature=-1", "model.moe.router.bound=[]")
    assert "model.moe.router.temperature=-1: must be number, above 0 (Divisor of the cosines.)" in told
    assert "model.moe.router.bound: unknown key; did you mean model.moe.router.bounds?" in told
    console = Console(width=160)
    with console.capture() as shown:
        console.print(explain("model.moe.router"))
    assert "kind: acme_cosine" in shown.get()
    assert "Acme's top-k by the cosine between token and router row." in shown.get()
    assert "'acme_cosine'" in said(path, "model.moe.router.kind=cosine"), "among the kinds that there are"


def test_without_its_package_nothing_is_imported_and_the_package_is_named(
    installed: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = resolved_yaml(load_config(path, [CHOSEN]))
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(installed)])
    problem = "model.moe.router.kind='acme_cosine'; must be one of 'expert_choice', "
    assert said(path, CHOSEN).startswith(problem)
    assert said(path, CHOSEN).endswith("; no installed package offers this kind (entry points moe_dist.routers)")
    path.write_text(stored)
    with pytest.raises(ConfigError) as raised:
        load_stored_config(path)
    (told,) = raised.value.problems
    assert told.startswith(problem)
    assert told.endswith(
        "; this kind was of the package 'acme-routers', which is not installed here or offers it no more: install it"
    )


@pytest.mark.parametrize("kind", ["os:system", "acme_routers.section:CosineSection", "../acme", "acme_cosine.x", ""])
def test_a_kind_in_data_is_a_name_and_no_module(installed: Path, path: Path, kind: str) -> None:
    before = set(sys.modules)
    assert f"model.moe.router.kind={kind!r}; must be one of" in said(path, f"model.moe.router={{kind: {json.dumps(kind)}}}")
    assert "acme_routers.router" not in set(sys.modules) - before


def test_a_broken_package_is_named(installed: Path, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = write_package(tmp_path / "broken", name="others", section="import nothing_of_that_name", kind="broken")
    wrong = write_package(tmp_path / "wrong", name="wrong", section=SECTION.replace("acme_cosine", "another"), kind="wrong")
    twice = write_package(tmp_path / "twice", name="twice")
    for folder in (broken, wrong, twice):
        monkeypatch.syspath_prepend(folder)
    told = said(path, "model.moe.router.kind=broken")
    assert "model.moe.router: the package others offers the kind 'broken' by others.section:CosineSection" in told
    assert "No module named 'nothing_of_that_name'" in told
    assert "which is no RouterSection of that kind" in said(path, "model.moe.router.kind=wrong")
    assert "the packages acme-routers and twice both offer the kind 'acme_cosine'" in said(path, CHOSEN)
    explain("model.moe.router")  # does not show the kinds of these packages


def test_a_built_in_kind_cannot_be_replaced(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = SECTION.replace("acme_cosine", "top_k")
    monkeypatch.syspath_prepend(write_package(tmp_path / "site", name="others", section=section, kind="top_k"))
    assert type(load_config(path).model.moe.router).__module__ == "moe_dist.config.routers.top_k"


def test_nothing_is_searched_or_imported_unless_it_is_asked_for(installed: Path, path: Path) -> None:
    """A configuration with only built-in kinds does not search the installed packages. A configuration with a package's
    kind is read without importing torch."""
    code = f"""
import sys
from moe_dist.config.load import load_config
from moe_dist.config.base import kinds
load_config({str(path)!r})
assert not kinds._entry_points.cache_info().currsize, "searched"
load_config({str(path)!r}, [{CHOSEN!r}])
assert "acme_routers.section" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{installed}:{Path.cwd()}"}, check=True, timeout=600)
