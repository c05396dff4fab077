"""vLLM serves exported folders on a CPU. Its tokens and log-probabilities equal ours, and it sends no null choice to
its experts.

vLLM is installed in a separate environment. Run with `make test-vllm`.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.hf.exporting import export_model
from moe_dist.model.transformer import Transformer
from tests.support.served import GROUP, ONE, continued, group_of, logits, saved_model
from tests.support.tiny import IMAGE_IDS, tiny_dataset

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
NEW = 8
HEADS = {"model.head_dim": 32}  # the smallest head width that vLLM's CPU attention supports
SIGMOID = {"model.moe.router": {"kind": "group_limited", "normalise": "none", "scale": 2.0}}
FREE = {"model.moe.groups": {"all": {**GROUP, "num_identity": 2, "num_constant": 2, "top_k": 4}}}
CASES: dict[str, dict[str, Any]] = {
    "nulls": ONE,
    "groups": {},
    "identity and constant experts": FREE,
    "sigmoids and a shared expert": ONE | SIGMOID | {"model.moe.shared_ffn_dim": 20, "loss.balance.schedule": [[0, 0.0]]},
}
DRAWN = torch.randint(0, IMAGE_IDS[1], (3, 14), generator=torch.Generator().manual_seed(5))
PROMPTS = [DRAWN[0, :5], DRAWN[1, :9], DRAWN[2]]  # one batch

pytestmark = pytest.mark.timeout(1800)

Served = tuple[Transformer, dict[str, Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Returns our model and vLLM's answers for each case; see tests/support/vllm_serving.py."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing; install it with: make test-vllm")
    root = tmp_path_factory.mktemp("vllm")
    tiny_dataset(root / "data")
    models: dict[str, Transformer] = {}
    for number, (case, changes) in enumerate(CASES.items()):
        models[case] = saved_model(root / f"run{number}", root / "data", HEADS | changes)
        assert export_model(root / f"run{number}", root / f"hf{number}").family == "moe_dist"
    folders = [str(root / f"hf{number}") for number in range(len(CASES))]
    asked = {"folders": folders, "prompts": [each.tolist() for each in PROMPTS], "tokens": NEW, "vocab_size": IMAGE_IDS[1]}
    (root / "request.json").write_text(json.dumps(asked))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
    # -P keeps the script's folder off the module path, because its transformers.py would hide the library
    command = [PYTHON, "-P", ROOT / "tests/support/vllm_serving.py", root / "request.json", root / "result.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((root / "result.json").read_text())
    return {case: (models[case], each) for case, each in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tokens_and_log_probabilities_are_ours(served: dict[str, Served], case: str) -> None:
    ours, found = served[case]
    apart, pairs, choices = 0.0, 0, 0
    for prompt, tokens, log_probs in zip(PROMPTS, found["tokens"], found["log_probs"], strict=True):
        whole = continued(ours, prompt[None], NEW, cached=True)
        assert tokens == whole[0, len(prompt) :].tolist()
        computed = whole[:, :-1]  # a server does not compute logits after the last token
        expected = logits(ours, computed)[0, -NEW:].log_softmax(-1)
        apart = max(apart, float((torch.tensor(log_probs) - expected).abs().max()))
        zeros, positions = torch.zeros_like(computed), torch.arange(computed.shape[1])[None]
        reports = ours(computed, positions, zeros, group_of(ours, computed))[1]
        pairs += sum(report.sent.pairs for report in reports)
        choices += len(reports) * computed.numel() * ours.moe_modules()[0].router.groups[0].top_k  # pyright: ignore
    print(f"{case}: log-probabilities within {apart:.1e}; {pairs} of {choices} choices ran in {found['experts']} experts")
    assert apart <= 1e-5
    assert sum(found["rows"]) == pairs, "no null choice reaches an expert"
    assert 0 < pairs < choices
    assert min(found["rows"]) > 0
