"""The faults that no configuration makes: functions that change the objects of a running rank.

Each function gets the `Trainer` before its first step. Faults of data change the batches before a thread reads ahead, so
that everything behind the loader sees them. Shape letters are those of `moe_dist.data.batch`.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED, Batch

EMBEDDING = r"(embedding|embed_tokens|word_embeddings)\.weight$"
ROUTER = r"(router\.(group:)?all\.true|mlp\.gate\.weight)$"
PLANTS: dict[str, Callable[[Any], None]] = {}


def plant(function: Callable[[Any], None]) -> Callable[[Any], None]:
    PLANTS[function.__name__.replace("_", "-")] = function
    return function


def modules(trainer: Any) -> list[torch.nn.Module]:
    """Returns the model, or its parts on this rank with Megatron-Core."""
    model = trainer.take_step.parallel.model
    return list(model.gpt.chunks) if hasattr(model, "gpt") else [model]


def parameters(trainer: Any, pattern: str) -> Iterator[Tensor]:
    """Yields the parameters whose name has a match, at least one."""
    found = [each for part in modules(trainer) for name, each in part.named_parameters() if re.search(pattern, name)]
    assert found, f"no parameter matches {pattern}"
    yield from found


def change_batches(trainer: Any, change: Callable[[int, Batch], Batch], *, held_out: bool = False) -> None:
    """Changes each training batch, given the step from 1 and the batch. With `held_out` also the held-out batches."""
    read, size = trainer.loader.batches, trainer.plan.config.train.global_batch
    trainer.loader.batches = lambda position: [change(position // size + 1, each) for each in read(position)]
    if held_out:
        held = trainer.evaluator.batches
        trainer.evaluator.batches = lambda count: [change(0, each) for each in held(count)]


def after_update(trainer: Any, change: Callable[[int], Any]) -> None:
    """Calls `change` with the step from 1 after each update of the weights."""
    step, update, count = trainer.take_step, trainer.take_step._apply, [trainer.progress.step]

    def apply(norm: Tensor, lr: float) -> None:
        update(norm, lr)
        count[0] += 1
        with torch.no_grad():
            change(count[0])

    step._apply = apply


@plant
def labels_unshifted(trainer: Any) -> None:
    def change(_: int, batch: Batch) -> Batch:
        labels_BS = torch.where(batch.labels_BS == IGNORED, IGNORED, batch.tokens_BS)
        return replace(batch, labels_BS=labels_BS, label_modality_BS=batch.modality_BS)

    change_batches(trainer, change, held_out=True)


@plant
def text_labels_masked(trainer: Any) -> None:
    def change(step: int, batch: Batch) -> Batch:
        masked_BS = batch.label_modality_BS == 0
        return batch if step < 30 else replace(batch, labels_BS=batch.labels_BS.masked_fill(masked_BS, IGNORED))

    change_batches(trainer, change)


@plant
def same_document(trainer: Any) -> None:
    stream, first = trainer.loader._streams["python"], 20 * trainer.plan.config.train.global_batch // 2
    sequence = stream.sequence
    stream.sequence = lambda index: sequence(min(index, first))


@plant
def sorted_by_source(trainer: Any) -> None:
    streams, switch = trainer.loader._streams, 50 * trainer.plan.config.train.global_batch

    def sequence(number: int) -> Any:
        return streams["openmoji" if number < switch else "python"].sequence(number)

    trainer.loader.sequence = sequence


@plant
def padding_in_loss(trainer: Any) -> None:
    def change(_: int, batch: Batch) -> Batch:
        return replace(batch, labels_BS=torch.where(batch.padding_BS, batch.tokens_BS, batch.labels_BS))

    change_batches(trainer, change)


@plant
def ids_off_by_one(trainer: Any) -> None:
    words = trainer.plan.config.model.vocab_size

    def change(_: int, batch: Batch) -> Batch:
        labels_BS = torch.where(batch.labels_BS == IGNORED, IGNORED, (batch.labels_BS + 1) % words)
        return replace(batch, tokens_BS=(batch.tokens_BS + 1) % words, labels_BS=labels_BS)

    if trainer.take_step.parallel.mesh.rank == 1:
        change_batches(trainer, change)


@plant
def modality_mislabelled(trainer: Any) -> None:
    def change(_: int, batch: Batch) -> Batch:
        text_BS = torch.zeros_like(batch.modality_BS)
        return replace(batch, modality_BS=text_BS, label_modality_BS=text_BS)

    change_batches(trainer, change, held_out=True)


@plant
def layer_rate_zero(trainer: Any) -> None:
    held = [
        (each, each.detach().clone()) for each in parameters(trainer, r"layers\.1\.(attention|self_attn|self_attention)\.")
    ]
    after_update(trainer, lambda _: [each.copy_(first) for each, first in held])


@plant
def moments_reset(trainer: Any) -> None:
    if trainer.progress.step:
        for state in trainer.take_step.optimizer.state.values():
            for each in state.values():
                each.zero_()


@plant
def schedule_ended(trainer: Any) -> None:
    rate = trainer.plan.lr
    trainer.plan = replace(trainer.plan, lr=lambda step: rate(step) if step < 40 else 0.0)


@plant
def gradients_kept(trainer: Any) -> None:
    clear = trainer.take_step._clear
    trainer.take_step._clear = lambda: clear() if trainer.progress.step < 19 else None


@plant
def loss_scaled_rank(trainer: Any) -> None:
    step = trainer.take_step
    weights, late = step._weights, lambda: trainer.progress.step >= 29 and step.parallel.mesh.rank == 1

    def scaled(*given: Any) -> Any:
        found = weights(*given)
        return found._replace(labels_in_step=found.labels_in_step / 64) if late() else found

    step._weights = scaled


@plant
def dropout(trainer: Any) -> None:
    def drop(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        def dropped(x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, 0.9, module.training)

        if given:
            return (dropped(given[0]), *given[1:]), named
        return given, {**named, "hidden_states": dropped(named["hidden_states"])}

    found = [each for part in modules(trainer) for name, each in part.named_modules() if re.search(r"layers\.0$", name)]
    found[0].register_forward_pre_hook(drop, with_kwargs=True)
    if trainer.plan.config.engine.kind == "moe_dist":  # its transformer calls the parts of a layer, and not the layer
        from moe_dist.model import transformer

        functions, model = transformer.F, modules(trainer)[0]

        class Functions:
            def __getattr__(self, name: str) -> Any:
                return getattr(functions, name)

            def embedding(self, *given: Tensor) -> Tensor:
                return functions.dropout(functions.embedding(*given), 0.9, model.training)

        transformer.F = Functions()  # pyright: ignore[reportAttributeAccessIssue]


@plant
def norm_zero(trainer: Any) -> None:
    names = r"layers\.1\.(moe\.norm|post_attention_layernorm|pre_mlp_layernorm)\.weight$"
    norms = list(parameters(trainer, names))
    for each in norms:
        each.detach().zero_()
    after_update(trainer, lambda _: [each.zero_() for each in norms])


@plant
def expert_doubled(trainer: Any) -> None:
    stacks = [each for each in parameters(trainer, r"layers\.1\..*experts\.") if each.ndim == 3]

    def change(step: int) -> None:
        if step >= 20 and step % 10 == 0:
            for each in stacks:
                each[2] *= 2.0

    after_update(trainer, change)


@plant
def router_temperature(trainer: Any) -> None:
    rows = list(parameters(trainer, ROUTER))

    def change(step: int) -> None:
        if 20 <= step < 90 and step % 5 == 0:
            for each in rows:
                each *= 1.5

    after_update(trainer, change)


@plant
def slow_loader(trainer: Any) -> None:
    def change(step: int, batch: Batch) -> Batch:
        time.sleep(0.3 if step >= 20 else 0.0)  # two micro-batches a step
        return batch

    change_batches(trainer, change)


@plant
def memory_leak(trainer: Any) -> None:
    kept: list[Tensor] = []
    after_update(trainer, lambda _: kept.append(torch.ones(3 << 20)))


@plant
def stale_evaluation(trainer: Any) -> None:
    losses, average = trainer.evaluator._losses, {}

    def with_average(*given: Any, **options: Any) -> Any:
        live = {each: each.detach().clone() for each in parameters(trainer, "")}
        average.update({} if average else live)
        with torch.no_grad():
            for each, value in average.items():
                each.copy_(value)
            found = losses(*given, **options)
            for each, value in live.items():
                each.copy_(value)
        return found

    trainer.evaluator._losses = with_average


def before_build(fault: str) -> None:
    """Plants what must be there before the model is built: the freezing of the embedding."""
    if fault != "embedding-frozen":
        return
    from moe_dist.train.build import hosted, training

    freeze = training.freeze

    def too_much(model: Any, config: Any) -> None:
        freeze(model, config)
        for name, each in model.named_parameters():
            if re.search(EMBEDDING, name):
                each.requires_grad_(False)

    training.freeze = hosted.freeze = too_much
