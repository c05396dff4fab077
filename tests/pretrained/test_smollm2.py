"""The commands import and export a real model, SmolLM2-135M: logits and gradients equal Hugging Face's, and the export
restores every bit.

tests/support/smollm2.py documents the source of its weights. Run with `make test-smollm2`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.inference.loaded_run import find_trained
from tests.support.agreement import BOUND, Arrays, arrays, assert_agree
from tests.support.guides import guide_commands, run_commands, text_losses
from tests.support.hf_families import gradients, under_our_names
from tests.support.imported import load_imported, logits_of

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "hf" / "smollm2"
SENTENCE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity"
)
PARAMETERS = 134_515_008

pytestmark = pytest.mark.timeout(900)


def command(name: str, *arguments: object) -> str:
    words = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def theirs() -> Path:
    """The folder in which transformers' `save_pretrained` wrote the model and the tokenizer."""
    if not (MODEL / "messages.jsonl").is_file():
        pytest.fail(f"{MODEL} is missing; make it with: make smollm2")
    return MODEL


@pytest.fixture(scope="module")
def ours(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "ours"
    command("import_hf", theirs, "--out", out)
    return out


def passed(model: Any, logits_of: Callable[[Any, Tensor], Tensor], ids_BS: Tensor) -> tuple[Arrays, float]:
    """Returns logits [1, S, V] and the mean cross entropy of the next token, and leaves the loss's gradients in the
    model."""
    logits_BSV = logits_of(model, ids_BS)
    loss = F.cross_entropy(logits_BSV[0, :-1], ids_BS[0, 1:])
    loss.backward()
    return arrays({"logits": logits_BSV}), float(loss.detach())


def their_pass(folder: Path, ids_BS: Tensor, attention: str) -> tuple[Arrays, Arrays, float]:
    """Returns the fp32 logits, gradients (renamed to our parameter names) and loss of transformers' model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    assert sum(each.numel() for each in model.parameters()) == PARAMETERS
    logits, loss = passed(model, lambda model, ids: model(ids, use_cache=False).logits, ids_BS)
    named = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    found = under_our_names(named, model.config.to_dict())
    # In our format a dense model has a router: one row of zeros without a gradient. Transformers' model has no router.
    return logits, {name: each for name, each in found.items() if ".router." not in name}, loss


def our_pass(folder: Path, ids_BS: Tensor) -> tuple[Arrays, Arrays]:
    model, state = load_imported(folder)
    zeros_BS, positions = torch.zeros_like(ids_BS), torch.arange(ids_BS.shape[1])[None]
    logits, _ = passed(model, lambda model, ids: model(ids, positions, zeros_BS, zeros_BS)[0], ids_BS)
    found = arrays(gradients(model, state.layout.placement, 0))
    routers = {name for name in found if ".router." in name}
    assert not any(found[name].any() for name in routers)
    return logits, {name: each for name, each in found.items() if name not in routers}


def worst_of(got: Arrays, wanted: Arrays) -> float:
    """Divides each tensor's largest difference by the tensor's largest entry, and returns the maximum over all tensors."""
    assert got.keys() == wanted.keys()
    return max(float(np.abs(got[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted)


def whole_of(got: Arrays, wanted: Arrays) -> float:
    """Returns the norm of all differences relative to the norm of all tensors."""
    apart = sum(float(np.square(got[name] - wanted[name], dtype=np.float64).sum()) for name in wanted)
    return (apart / sum(float(np.square(each, dtype=np.float64).sum()) for each in wanted.values())) ** 0.5


def test_logits_and_gradients_are_theirs(theirs: Path, ours: Path) -> None:
    """Logits may differ by 1e-5 of the largest logit, and the gradient of all parameters by 1e-5 of its norm.

    With 30 layers in fp32, the gradient of a single parameter may differ by more than 1e-5 of its largest entry, even
    between transformers' two attention implementations. The difference between these two implementations is therefore
    the bound for each parameter's gradient.
    """
    import transformers

    ids_BS = transformers.AutoTokenizer.from_pretrained(theirs)(SENTENCE, return_tensors="pt").input_ids
    logits, gradient, loss = their_pass(theirs, ids_BS, "eager")
    _, otherwise, _ = their_pass(theirs, ids_BS, "sdpa")
    our_logits, ours_gradient = our_pass(ours, ids_BS)
    off, rounding = worst_of(ours_gradient, gradient), worst_of(otherwise, gradient)
    print(f"{ids_BS.shape[1]} tokens, loss {loss:.4f}, {len(gradient)} gradients")
    print(f"logits: off by {worst_of(our_logits, logits):.1e} of the largest")
    print(f"gradient: off by {whole_of(ours_gradient, gradient):.1e} of its norm, and by {off:.1e} of a tensor's largest")
    print(f"transformers, sdpa against eager: {whole_of(otherwise, gradient):.1e} and {rounding:.1e}")
    assert loss < 3.0, "it speaks English"
    assert_agree(our_logits, logits)
    assert whole_of(ours_gradient, gradient) <= BOUND
    assert off <= max(BOUND, 2 * rounding)


def test_every_tensor_comes_back_to_the_bit(theirs: Path, ours: Path) -> None:
    back = ours.parent / "back"
    command("export_hf", ours, "--out", back)
    written, wanted = (
        {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}
        for folder in (back, theirs)
    )
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert json.loads((back / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    print(f"{len(wanted)} tensors, {sum(each.numel() for each in wanted.values()):,} numbers")
    shutil.rmtree(back)


def test_the_guide_fine_tunes_experts_made_of_it(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapters, PEFT's model has the same logits as our run. They differ from the base model's logits."""
    import transformers
    from peft import PeftModel

    (tmp_path / ".cache/hf").mkdir(parents=True)
    (tmp_path / ".cache/hf/smollm2").symlink_to(theirs)
    commands = guide_commands("huggingface.md", "### Experts made of SmolLM2-135M")
    assert commands.pop(0) == "make smollm2"
    assert [line.split()[1] for line in commands] == ["import-hf", "prepare-data", "launch", "export-hf"]
    commands[2] += " train.steps=6 evaluation.every=6 evaluation.final_sequences=2"
    run_commands(commands, tmp_path)
    losses = text_losses(tmp_path / "runs/spelling")
    assert losses[-1] < 0.8 * losses[0], losses
    monkeypatch.chdir(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(theirs)(SENTENCE, return_tensors="pt").input_ids
    base = transformers.AutoModelForCausalLM.from_pretrained(".cache/hf/smollm2-mixtral")
    trained = find_trained(Path("runs/spelling")).load(torch.device("cpu"))
    with torch.no_grad():
        before = base(ids).logits
        theirs_after = PeftModel.from_pretrained(base, "runs/spelling/adapters/step_6")(ids).logits
        ours_after, _ = logits_of(trained, ids)
    apart = worst_of({"logits": theirs_after.numpy()}, {"logits": ours_after.numpy()})
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; logits within {apart:.1e} of the largest of PEFT's")
    assert apart <= BOUND
    assert worst_of({"logits": before.numpy()}, {"logits": ours_after.numpy()}) > 1e-2


def test_an_adapted_smollm2_leaves(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains for two steps as docs/adapt.md describes, but on our own guides instead of Python's documentation."""
    import transformers

    (tmp_path / ".cache/hf").mkdir(parents=True)
    (tmp_path / ".cache/hf/smollm2").symlink_to(theirs)
    pages = [json.dumps({"text": page.read_text()}) for page in sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "docs.jsonl").write_text("\n".join(pages) + "\n")
    *first, launch, _, export = guide_commands("adapt.md", "## SmolLM2-135M with half of its FFNs")
    assert launch.startswith("moe-dist launch local")
    short = "train.steps=2 evaluation.every=2 evaluation.final_sequences=3 checkpoint.every=2 parallel.precision=fp32"
    run_commands([*first, f"{launch} {short}", export], tmp_path)
    monkeypatch.chdir(tmp_path)
    exported, tokenizer = (
        kind.from_pretrained(".cache/hf/smollm2-half", trust_remote_code=True)
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    model = find_trained(Path("runs/smollm2-half")).load(torch.device("cpu"))
    with torch.no_grad():
        logits, pairs = logits_of(model, ids)
        apart = worst_of({"logits": exported.float()(ids).logits.numpy()}, {"logits": logits.numpy()})
    print(f"adapted: logits within {apart:.1e} of the largest; {pairs / ids.numel() / 30:.2f} experts a token")
    assert apart <= BOUND
