"""Reads files with settings of experts. All problems of a file are reported together."""

import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.megatron.settings import read_settings, settings_from_environment
from tests.support.messages import refused

GOOD = """
groups:
  text: {num_experts: 5, num_null: 3, top_k: 3, ffn_dim: 6}
  image: {num_experts: 3, top_k: 2, ffn_dim: 10, modalities: [image, video]}
placement: {policy: explicit, slots: [[text/0, text/1, text/2, text/3, text/4], [image/0, image/1, image/2], []]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "experts.yaml"
    path.write_text(text)
    return path


def test_says_every_fault_at_once(tmp_path: Path) -> None:
    text = """
groups:
  text: {num_experts: 2, top_k: 3, ffn_dim: 6}
  image: {num_experts: none, top_k: 2, ffn_dim: 10, modalities: [text], num_identity: 2}
router: {selection_bias: true}
placment: {policy: interleaved}
"""
    with pytest.raises(ConfigError) as caught:
        read_settings(written(tmp_path, text))
    said = str(caught.value)
    assert "groups.image.num_identity=2: zero-computation experts are not covered" in said
    assert "router.selection_bias=true: not covered" in said
    for part in ("groups.text: top_k=3", "groups.image.num_experts", "modality 'text'", "placment", "docs/megatron.md"):
        assert part in said


@pytest.mark.parametrize(("text", "said"), [("[1]", ""), ("groups: {a: [", "experts.yaml"), ("", "")])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, said: str) -> None:
    with refused(ConfigError, said):
        read_settings(written(tmp_path, text))


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert settings_from_environment({"MOE_DIST_EXPERTS": str(path)}) == read_settings(path)
    with refused(ConfigError):
        settings_from_environment({})
    with refused(ConfigError):
        settings_from_environment({"MOE_DIST_EXPERTS": str(tmp_path / "none.yaml")})


def test_settings_need_neither_torch_nor_megatron() -> None:
    code = "import sys, moe_dist.megatron.settings; assert not {'megatron.core', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
