"""Estimates the accuracy of a router that knows the label, by fitting router logits to the right answer of each question.

    r_i* = argmin_r CE(f(x_i, r), y_i),   by gradient descent from the model's own routing (RoMA, arXiv 2511.07419)

The fitted r is an offset of the router logits in the chosen layers, at the last token of the prompt and at the answer's
tokens. The accuracy is only an estimate: more steps may reach a higher accuracy. No router knows the label at inference.

Shape letters: B questions of a batch, S positions, L chosen layers, C columns of a router, D hidden, T = B x S.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_dist.config.model_schema import MoESection
from moe_dist.data.batch import IGNORED
from moe_dist.errors import ConfigError
from moe_dist.inference.likelihood import Continuation
from moe_dist.model.transformer import Transformer
from moe_dist.plan.policies import expert_groups
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleBatch, SampleMaker
from moe_dist.train.router_tuning.samples import TuningSample

STEPS, RATE = 10, 0.3  # number of Adam steps, and Adam's learning rate in logits
# The gradient of the logit of an expert that was not chosen is rounding noise of at most 1e-8. With Adam's default epsilon
# of 1e-8, Adam would make full steps in the direction of this noise.
EPSILON = 1e-4
_BATCH = 16  # questions per batch


@dataclass
class Oracle:
    """Fits the routing to the right answers, and then answers the questions."""

    model: Transformer  # in evaluation mode, and accepted by `check_routers`
    maker: SampleMaker  # makes batches from prompts and answers
    group_of_modality: Tensor  # int64 [M], index of the expert group of each of the M modalities
    places: Sequence[int]  # indices, among all MoE layers, of the layers whose routing is fitted

    def __post_init__(self) -> None:
        routers = [layer.router for layer in self.model.moe_modules()]
        self._routers: list[nn.Module] = [routers[place] for place in self.places]
        # A router computes logits = h W^T, and W has full row rank. The input h + offset pinv(W)^T therefore adds the
        # offset to the logits.
        rows = [next(router.parameters()).detach() for router in self._routers]
        self._inverse_LCD = torch.stack([torch.linalg.pinv(rows_CD).T for rows_CD in rows])

    def __call__(self, written: Sequence[Sequence[Continuation]], answers: Sequence[int]) -> list[int]:
        """Returns, for each question, the index of the answer choice with the highest log-likelihood per token.

        Args:
            written: The answer choices of each question, as tokens to score.
            answers: Index of the right answer choice of each question.
        """
        # Questions are sorted by length, longest first, so that the batches have little padding.
        order = sorted(range(len(written)), key=lambda place: -max(len(c.context) + len(c.tokens) for c in written[place]))
        taken = [0] * len(written)
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            offset_BLC = self._fitted([written[place][answers[place]] for place in places])
            scores = [
                self._nats([written[place][choice] for place in places], offset_BLC)
                for choice in range(len(written[places[0]]))
            ]
            for place, choice in zip(places, torch.stack(scores).argmax(0).tolist(), strict=True):
                taken[place] = choice
        return taken

    def _fitted(self, right: Sequence[Continuation]) -> Tensor:
        """Fits the offsets of the logits, float32 [B, L, C]. The questions do not influence each other: the loss is a sum
        over questions, and Adam scales each offset separately."""
        batch = self._batch(right)
        offset_BLC = torch.zeros(len(right), *self._inverse_LCD.shape[:2], requires_grad=True)
        optimizer = torch.optim.Adam([offset_BLC], lr=RATE, eps=EPSILON)
        for _ in range(STEPS):
            (offset_BLC.grad,) = torch.autograd.grad(self._losses(batch, offset_BLC).sum(), [offset_BLC])
            optimizer.step()
        return offset_BLC.detach()

    @torch.no_grad()
    def _nats(self, choices: Sequence[Continuation], offset_BLC: Tensor) -> Tensor:
        """Returns the log-likelihood per token of one answer choice of each question [B]."""
        return -self._losses(self._batch(choices), offset_BLC)

    def _losses(self, batch: SampleBatch, offset_BLC: Tensor) -> Tensor:
        """Returns for each question the mean cross entropy of the answer's tokens [B]."""
        scored_BS = batch.labels_BS != IGNORED
        with self._moved(scored_BS, offset_BLC):
            losses_BS, _ = forward(self.model, batch, self.group_of_modality, losses=True)
        return torch.where(scored_BS, losses_BS, 0.0).sum(1) / scored_BS.sum(1)

    @contextmanager
    def _moved(self, scored_BS: Tensor, offset_BLC: Tensor) -> Iterator[None]:
        """Inside the context, routers add the fitted offset to the logits of tokens with a scored label. These tokens
        predict the answer."""

        def hook(place: int) -> Any:
            def change(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
                del module
                moved_BD = offset_BLC[:, place] @ self._inverse_LCD[place]
                moved_TD = (scored_BS[:, :, None] * moved_BD[:, None]).flatten(0, 1)
                return (arguments[0] + moved_TD, *arguments[1:])

            return change

        with ExitStack() as stack:
            for place, router in enumerate(self._routers):
                stack.enter_context(router.register_forward_pre_hook(hook(place)))
            yield

    def _batch(self, continuations: Sequence[Continuation]) -> SampleBatch:
        return self.maker.make(
            [TuningSample(np.array(each.context, np.int64), np.array(each.tokens, np.int64)) for each in continuations]
        )


def check_routers(section: MoESection) -> None:
    """Checks that an oracle can fit the router. Tokens must choose among the experts of one group, all true.

    Raises:
        ConfigError: the configuration has a router or experts of a different kind.
    """
    groups, router = expert_groups(section), section.router
    if not router.softmax_top_k or len(groups) > 1 or any(group.num_columns > group.num_experts for group in groups):
        there = ", ".join(f"{group.name} ({group.num_experts} true of {group.num_columns} columns)" for group in groups)
        raise ConfigError(
            f"asks: oracle: takes a top_k router of one group without null or zero-computation experts, not {router.kind} "
            f"over {there}; leave it out of the arm's asks"
        )
