"""A configuration's name refers to a file in the current folder or, if there is none, to a bundled file."""

from pathlib import Path

import pytest

from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError

NAME = "adamoe_moma_tiny_cpu"
BUNDLED = source_root() / "configs" / f"{NAME}.yaml"


@pytest.mark.parametrize("given", [NAME, f"{NAME}.yaml", f"configs/{NAME}", f"configs/{NAME}.yaml"])
def test_the_current_folder_goes_before_what_is_bundled(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(given) == BUNDLED
    own = tmp_path / Path(given).with_suffix(".yaml")
    own.parent.mkdir(exist_ok=True)
    own.write_text("run: {name: mine}\n")
    assert find_config(given).absolute() == own
    assert find_config(BUNDLED) == BUNDLED


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("adamoe_moma_tiny_cup", "did you mean adamoe_moma_tiny_cpu or adamoe_moma_megatron_cpu?"),
        ("olmoe", "did you mean olmoe_1b7b_8gpu or roma_olmoe_1b7b_8gpu_transformers?"),
        ("configs/nope.yaml", "configs/ has adamoe_"),
    ],
)
def test_only_a_near_name_is_suggested(given: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source_root())
    with pytest.raises(ConfigError) as raised:
        load_config(given)
    assert hint in str(raised.value)
