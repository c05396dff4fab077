"""Serves exported folders by vLLM, in the environment of `make test-vllm`. It imports neither moe_dist nor tests.

    python -P tests/support/vllm_serving.py REQUEST RESULT

REQUEST is a JSON file: {"folders", "prompts": lists of token ids, "tokens": number to generate, "vocab_size"}. RESULT gets
an entry for each folder:

    tokens      for each prompt, the generated ids
    log_probs   for each prompt and generated token, the log-probabilities of all words
    rows        the number of rows in each call of an FFN expert
    experts     the number of FFN experts
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keeps the model in this process, where hooks can reach it
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB


def main(request: Path, result: Path) -> None:
    asked = json.loads(request.read_text())
    result.write_text(json.dumps([serve(folder, asked) for folder in asked["folders"]]))


def serve(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    rows: list[int] = []
    engine = LLM(
        model=folder,
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=8,
        max_logprobs=asked["vocab_size"],
    )

    def watch(model: Any) -> int:
        """Counts the rows of every FFN expert, and returns the number of experts. vLLM fuses gate and up, but not down."""
        experts = [each for name, each in model.named_modules() if name.endswith(".down_proj") and ".experts." in name]
        for each in experts:
            each.register_forward_hook(
                lambda _module, inputs, _output: rows.append(inputs[0].numel() // inputs[0].shape[-1])
            )
        return len(experts)

    (experts,) = engine.apply_model(watch)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], logprobs=asked["vocab_size"], ignore_eos=True, detokenize=False
    )
    answers = engine.generate([{"prompt_token_ids": each} for each in asked["prompts"]], sampling)
    found = [answer.outputs[0] for answer in answers]
    words = range(asked["vocab_size"])
    log_probs = [[[step[word].logprob for word in words] for step in each.logprobs] for each in found]
    return {"tokens": [list(each.token_ids) for each in found], "log_probs": log_probs, "rows": rows, "experts": experts}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
