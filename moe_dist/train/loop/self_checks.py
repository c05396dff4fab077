"""Checks in some steps what must hold in each step of a right run: labels, gradients, moments, trained parameters.

Each problem is a pair (kind, text), which becomes a hint. Only rank 0 checks, by its own batches and parameters.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.optim.optimizer import local, local_gradients

Problem = tuple[str, str]
ENOUGH = 100  # labels by which a rule judges
READ, MANY = 0.05, 10  # fraction and number of held-out documents that training may read by chance
OWN = 0.99  # fraction of labels equal to their own input token; real texts repeat a token less often


def batch_problems(batches: Sequence[Batch]) -> Iterator[Problem]:
    """Yields the problems in the labels of a step's batches. The batches are on the host, so this needs no sync."""
    masks = [batch.labels_BS != IGNORED for batch in batches]
    labels = sum(int(mask.sum()) for mask in masks)
    own = sum(int((mask & (b.labels_BS == b.tokens_BS)).sum()) for b, mask in zip(batches, masks, strict=True))
    if labels >= ENOUGH and own >= OWN * labels:
        text = f"{own / labels:.0%} of the labels are the token at their own position, so that the model copies its input"
        yield "labels", f"{text}; shift the labels by one token"
    padded = sum(int((mask & b.padding_BS).sum()) for b, mask in zip(batches, masks, strict=True))
    if padded:
        text = f"{padded} of {labels} labels of rank 0 stand at padding, so that the loss is not that of the data"
        yield "padding", f"{text}; give positions of padding the label {IGNORED}"


def kept_gradients(parameters: Iterable[Tensor]) -> Iterator[Problem]:
    """Yields a problem if a gradient is not zero when a step begins. Reads this rank's gradients; costs a host sync."""
    found = [each.any() for each in local_gradients(parameters)]
    if found and bool(torch.stack(found).any()):
        text = "gradients of former steps were not cleared when this step began, so that each step adds to them"
        yield "gradients", f"{text}; look at the code that calls zero_grad or sets .grad"


def empty_moments(states: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[Problem]:
    """Yields a problem if the optimizer has moments, and this rank's are all 0, when a resumed run begins. `states` are the
    items of the optimizer's `state`."""
    moments = [local(t) for _, each in states for t in each.values() if isinstance(t, Tensor) and t.ndim]
    if moments and not any(bool(each.any()) for each in moments):
        text = "the optimizer's moments are all 0 at the first step after a resume, as if its state had been lost"
        yield "moments", f"{text}; look at what the checkpoint holds, and at the code that loads it"


def frozen_weights(modules: Iterable[nn.Module]) -> Iterator[Problem]:
    """Yields a problem if matrices of a model that shall be trained as a whole take no gradient."""
    named = [pair for module in modules for pair in module.named_parameters()]
    names = [name for name, each in named if each.ndim > 1 and not each.requires_grad and "bias" not in name]
    if names:
        more = f", and {len(names) - 1} more" if names[1:] else ""
        text = f"{names[0]}{more}: frozen (requires_grad=False), though neither train.only nor train.frozen asks for it"
        yield "frozen", f"{text}; look at the code that froze it"


def random_states() -> list[Tensor]:
    """Returns the states of torch's generators of the host and of this rank's device. Needs no sync."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def dropout(before: Sequence[Tensor], family: Any) -> Iterator[Problem]:
    """Yields a problem if a step drew random numbers from torch's generators. This project's models draw none: dropout of
    LoRA has generators of its own. A model of transformers may draw if a field of its configuration asks for it.

    Args:
        before: The `random_states` before the step.
        family: The model of transformers; None for other models.
    """
    drew = any(not torch.equal(old, new) for old, new in zip(before, random_states(), strict=True))
    if drew and not (family is not None and _draws(family.config.to_dict())):
        text = "the step drew random numbers, which nothing in the configuration asks for"
        yield "dropout", f"{text}; is a dropout or a noise of an experiment left in the model?"


def _draws(fields: Mapping[str, Any]) -> bool:
    return any(
        _draws(v) if isinstance(v, Mapping) else re.search("drop|jitter|noise", str(k)) and v for k, v in fields.items()
    )


def contaminated(read: int, held: int) -> Iterator[Problem]:
    """Yields a problem if training has read several of the held-out documents, by their numbers on this rank."""
    if read >= max(MANY, READ * held):
        text = f"training has read {read} of the {held} held-out documents that rank 0 evaluates"
        fix = "because the splits overlap, so that held-out losses tell nothing; split the data again"
        yield "contaminated", f"{text}, {fix}"
