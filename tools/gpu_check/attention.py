"""Compares the times of attention restricted to documents and of torch's causal attention, and counts compilations."""

import warnings

import torch
import torch._dynamo.utils
import torch.nn.functional as F

from moe_dist.model.attention import attend, make_mask
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.rates import drawn, seconds_of


def attention_rate(job: CheckJob) -> list[Reading]:
    """Measures (rate of attention restricted to packed documents) / (rate of torch's causal attention), forward and
    backward, both rates by the scores of a whole sequence; counts compiled graphs, and warnings of uncompiled attention,
    for several lengths."""
    device, heads, width = torch.device(job.device), 2 if job.rehearse else 16, 16 if job.rehearse else 128
    lengths = (8, 16) if job.rehearse else (4096, 2048, 1024, 512)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seconds = [_attention_seconds(job, device, heads, length, width) for length in lengths]
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    uncompiled = sum("without torch.compile" in str(each.message) for each in caught)
    return [
        *(
            job.timed(f"{each} positions: rate / causal", b / a, least=0.6 if each >= 2048 else 0.0)
            for each, (a, b) in zip(lengths, seconds, strict=True)
        ),
        Reading("graphs compiled for a length", made / len(lengths), most=2.0),
        Reading("warnings of uncompiled attention", uncompiled, most=0.0),
    ]


def _attention_seconds(job: CheckJob, device: torch.device, heads: int, length: int, width: int) -> tuple[float, float]:
    """Returns the seconds of attention inside one document, and of causal attention without documents."""
    q, k, v = (drawn(job, 2, heads, length, width).requires_grad_() for _ in range(3))
    direction = drawn(job, 2, heads, length, width)
    mask = make_mask(torch.zeros(2, length, dtype=torch.int32, device=device))
    runs = (lambda: attend(q, k, v, mask), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    inside, causal = (seconds_of(job, lambda run=run: torch.autograd.grad(run(), (q, k, v), direction)) for run in runs)
    return inside, causal
