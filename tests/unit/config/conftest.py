"""A small valid configuration as YAML text."""

from pathlib import Path

import pytest

YAML = """
run: {name: small}
model:
  hidden_dim: 32
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  vocab_size: 64
  max_seq_len: 64
  moe:
    groups:
      text: {num_experts: 3, num_null: 1, top_k: 2, ffn_dim: 16}
      image: {num_experts: 2, num_null: 2, top_k: 2, ffn_dim: 24}
data: {path: data/x, seq_len: 64}
train: {steps: 4, global_batch: 8, micro_batch: 2}
optimizer: {lr: 3e-3, schedule: {kind: wsd, warmup_steps: 2, decay_steps: 1}}
parallel: {ep: 2}
placement: {policy: pinned, groups: {text: {ranks: [0]}}}
evaluation: {every: 2}
monitor: {sinks: [{kind: console, every: 3}, {kind: jsonl}]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the small configuration."""
    path = tmp_path / "small.yaml"
    path.write_text(YAML)
    return path
