"""Makes hints about training from the records of a window of steps: losses, gradients, routers' scores, and ranks' data.

Rules compare a number with its own history by median and median absolute deviation, because a loss has no usual scale.
All rules are pure functions. Shape letters are as in `metrics.py`; S is the number of steps, D the number of ranks that
read different data.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_dist.monitor.metrics import Record, group_choices
from moe_dist.monitor.routing_hints import ENOUGH, Hint
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.placement.placement import ExpertGroup

EVERY = 5  # most rules judge every so many steps, because some take milliseconds with many ranks
RECENT = 10  # a rule that needs no whole window judges this many last steps
SURE = 8.0  # a difference counts if it is this many times its standard error, or a step's noise
STEADY = 0.02  # a training loss that rises by less than this fraction is no news, however small its noise
LOSS_FALL = 0.99  # a loss does not fall if it is above this many times the first window's
SPIKE, SPIKES = 0.1, 3  # a spike is at least this fraction of the loss, and a hint needs this many spikes in a window
GROWTH, GROWN = 10.0, 5  # a gradient explodes if the median of the last GROWN steps is GROWTH times that of older steps
GAP = 1.5  # held-out loss over training loss that a run which repeats its data should not reach
ODD = 0.1  # fraction by which a rank's loss may exceed the other ranks', and a source's loss its own earlier loss
OTHER_WORDS, SAME_WORDS = 0.15, 2.0  # distance of a rank's token ids from the others', and over that of two halves
OTHER_SCALE = 2.0  # factor between the weights of two ranks' losses
ALIKE, LEARNT = 0.2, 0.9  # sources of a new model begin with losses that differ less; then a loss falls below this share
PAYS = 4  # a modality pays for another if its held-out loss rises in each of so many evaluations, while the other's falls
SMALL_UPDATE = 2e-4  # if the loss does not fall, updates below this fraction of the weights are the cause
REPEATS = 3  # the number of times that a batch may recur by chance is below this


class Evaluated(NamedTuple):
    """Held-out losses after a step, their numbers of tokens, and the median training losses of the last steps, all by
    modality. Expert choice sees later tokens in training, so that its held-out loss of the same kind is taken."""

    step: int
    held_out: Mapping[str, float]
    tokens: Mapping[str, int]
    training: Mapping[str, float]

    @classmethod
    def of(cls, result: EvaluationResult, records: Sequence[Record]) -> "Evaluated":
        known = {name: [v for r in records if (v := r.losses.get(name)) is not None] for name in result.loss}
        training = {name: float(np.median(losses)) for name, losses in known.items() if len(losses) >= RECENT}
        return cls(result.step, {**result.loss, **result.choice_loss}, result.tokens, training)


def noise(values: np.ndarray) -> float:
    """Returns the standard deviation of most values, from their median absolute deviation. Outliers change it little."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if values.size else 0.0


def loss_trend(
    losses: Sequence[float], first: Sequence[float], window: int, update: float = math.nan, *, trained: bool = False
) -> Iterator[Hint]:
    """Warns if the last window's loss is above that of the window before, or is no lower than `first`, the losses of the
    run's first window (empty if unknown), and does not fall. `update` is the size of an update / that of the weights. A run
    that began with `trained` weights may have little left to learn, so that only small updates are named."""
    if len(losses) < 2 * window or not first:
        return
    before, now = np.array(losses[:window]), np.array(losses[window:])
    begin, middle, end = (float(np.median(part)) for part in (first, before, now))
    # Of the difference of two medians. Differences of neighbours have the noise of two steps, and no trend.
    error = 1.25 * math.sqrt((noise(np.diff(before)) ** 2 + noise(np.diff(now)) ** 2) / 2 / window)
    if end - middle > max(SURE * error, STEADY * abs(middle)):
        yield Hint(
            "loss",
            f"the loss rose from {middle:.3f} to {end:.3f} (medians of {window} steps); see loss/total and "
            "optim/grad_norm; try a lower optimizer.lr or a longer warm-up",
        )
    elif end > LOSS_FALL * begin and middle - end <= SURE * error and (not trained or update < SMALL_UPDATE):
        yield Hint(
            "loss",
            f"the loss does not fall: {end:.3f} now, {begin:.3f} at first (medians of {window} steps); see loss/total and "
            + (
                f"optim/lr: an update is only {update:.1g} of the weights (usual: 0.001 to 0.03); try a higher optimizer.lr"
                if update < SMALL_UPDATE
                else "optim/lr; try another optimizer.lr, and look at the data: can a label be told from its inputs?"
            ),
        )


def loss_spikes(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a modality whose loss jumps in several single steps and then returns, as it does for corrupt batches."""
    for name in records[-1].losses:
        known = [(r.step, v, r.labels[name]) for r in records if (v := r.losses.get(name)) is not None]
        enough = np.median([labels for *_, labels in known]) / 4 if known else 0.0
        steps_S, loss_S = (
            np.array([each[:2] for each in known if each[2] >= enough and math.isfinite(each[1])]).reshape(-1, 2).T
        )
        if len(loss_S) < 3 * RECENT:
            continue
        # A step is compared with its neighbours, because the loss falls. The first and last steps have too few of these.
        usual_S = np.median(np.lib.stride_tricks.sliding_window_view(loss_S, RECENT + 1), axis=1)
        steps_S, loss_S = steps_S[RECENT // 2 : -RECENT // 2], loss_S[RECENT // 2 : -RECENT // 2]
        above_S = loss_S - usual_S
        spikes = np.flatnonzero(above_S > np.maximum(SURE * noise(above_S), SPIKE * np.abs(usual_S)))
        if len(spikes) >= SPIKES:
            last = spikes[-1]
            steps = ", ".join(f"{steps_S[at]:.0f}" for at in spikes[-SPIKES:])
            yield Hint(
                f"spike/{name}",
                f"the {name} loss jumped in {len(spikes)} of the last {len(loss_S)} steps, to {loss_S[last]:.3f} at last "
                f"(usual: {usual_S[last]:.3f}), and returned; see loss/{name}; look at the data that these steps read "
                f"(steps {steps}): are they corrupt, or of another source?",
            )


def growth(values: Sequence[float]) -> float:
    """Returns the last steps' median over the median of the older half of the steps. Returns 0 if this is no clear growth.
    The newer half may have grown already."""
    known = np.array([v for v in values if v > 0 and math.isfinite(v)])
    if len(known) < 3 * RECENT:
        return 0.0
    before, now = np.log(known[: len(known) // 2]), float(np.median(np.log(known[-GROWN:])))
    grown = now - float(np.median(before))
    return math.exp(grown) if grown > max(math.log(GROWTH), SURE / 2 * noise(before)) else 0.0


def exploding(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns if the routers' logits or the gradient explode, which is seen before the loss rises."""
    found = {tag: growth([v for r in records if (v := r.scalars.get(tag))]) for tag in ("loss/z", "optim/grad_norm")}
    if found["loss/z"]:
        yield Hint(
            "logits",
            f"the routers' logits explode: loss/z is {found['loss/z']:.3g} x its median before; see loss/z and "
            "moe/router_entropy; try a larger loss.z, and a lower optimizer.lr",
        )
    elif found["optim/grad_norm"]:
        yield Hint(
            "gradient",
            f"the gradient explodes: its norm is {found['optim/grad_norm']:.3g} x its median before; see optim/grad_norm; "
            "try a lower optimizer.lr or optimizer.clip_norm, or a longer warm-up",
        )


def overfit(evaluations: Sequence[Evaluated], epochs: Mapping[str, float]) -> Iterator[Hint]:
    """Warns if a held-out loss rises while the training loss falls, or is far above the training loss."""
    last = evaluations[-1]
    for name in last.training:
        # Only losses over the same tokens are compared; the final evaluation has more tokens.
        alike = [e for e in evaluations if e.tokens.get(name) == last.tokens.get(name) and name in e.training]
        held = [e.held_out[name] for e in alike[-3:]]
        rises = len(held) == 3 and held[0] < held[1] < held[2] and held[2] > 1.005 * held[0]
        if rises and last.training[name] < alike[-3].training[name]:
            what = f"rose from {held[0]:.3f} to {held[2]:.3f} in three evaluations, while the training loss fell"
        elif last.held_out[name] > GAP * last.training[name]:
            what = f"is {last.held_out[name]:.3f}"
        else:
            continue
        best = min((e for e in evaluations if name in e.held_out), key=lambda e: e.held_out[name])
        yield Hint(
            f"overfit/{name}",
            f"the held-out {name} loss {what}, but the training loss is {last.training[name]:.3f}: the model learns its "
            f"data by heart ({epochs.get(name, 0.0):.1f} epochs so far); see eval/{name}, loss/{name} and data/epochs; try "
            f"more data or fewer steps (the best evaluation was after step {best.step}); does a rank repeat its data?",
        )


def same_choices(records: Sequence[Record], groups: Sequence[ExpertGroup], moe_layers: Sequence[int]) -> Iterator[Hint]:
    """Warns about a router that gives all tokens the same scores, or ranks the experts in the same order for all tokens."""
    if len(records) < RECENT or records[-1].skipped:  # scores of nan choose the same experts, too
        return
    choices_LC, tokens_LG = (np.sum([r.arrays[n] for r in records[-RECENT:]], axis=0) for n in ("choices_LC", "tokens_LG"))
    entropy_LG = records[-1].arrays.get("entropy_LG", np.zeros(tokens_LG.shape))
    for g, (group, part) in enumerate(zip(groups, group_choices(choices_LC, groups), strict=True)):
        columns_LC, tokens_L = np.concatenate(part, axis=1), tokens_LG[:, g]
        none_LC = columns_LC == 0
        same_L = (none_LC | (columns_LC == tokens_L[:, None])).all(1) & none_LC.any(1) & (tokens_L >= ENOUGH)
        for layer in np.flatnonzero(same_L)[:1]:
            taken = ", ".join(str(each) for each in np.flatnonzero(~none_LC[layer])[: group.top_k])
            equal = entropy_LG[layer, g] > 0.999 * math.log(group.num_columns)
            what = (
                "gives all tokens the same scores (as with weights of zero)"
                if equal
                else "ranks the experts in the same order for all tokens"
            )
            yield Hint(
                f"router/{group.name}",
                f"the router of layer {moe_layers[layer]} {what}, so that all tokens of group {group.name} choose {taken}; "
                f"see moe/load/{group.name} and moe/relative_entropy; look at the weights and the gradient of this router",
            )


def first_bad_layer(record: Record, moe_layers: Sequence[int]) -> int | None:
    """Returns the first layer whose router had scores that were not finite; None if there was none."""
    entropy_LG, tokens_LG = record.arrays.get("entropy_LG"), record.arrays["tokens_LG"]
    bad_L = np.zeros(0, bool) if entropy_LG is None else (~np.isfinite(entropy_LG) & (tokens_LG > 0)).any(1)
    return moe_layers[int(bad_L.argmax())] if bad_L.any() else None


def repeated_data(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a rank whose batches equal its own earlier batches, or those of another rank."""
    first, last = records[0], records[-1]
    passed = [last.epochs[name] - first.epochs[name] for name in last.epochs if last.epochs[name] > first.epochs[name]]
    if min(passed, default=0.0) > LOSS_FALL:  # the data are small, and batches recur by right
        return
    digests = np.concatenate([record.data_D2[:, 0] for record in records])
    digests = digests[digests > 0]
    if len(np.unique(digests)) == len(digests):
        return
    seen: dict[float, int] = {}
    again: Counter[tuple[int, int]] = Counter()  # (rank, rank that read the batch before) -> number of batches
    for record in records:
        for rank, digest in enumerate(record.data_D2[:, 0].tolist()):
            if digest:
                again[rank, seen.get(digest, -1)] += digest in seen
                seen.setdefault(digest, rank)
    (rank, other), times = max(again.items(), key=lambda each: each[1], default=((0, 0), 0))
    if times >= REPEATS:
        whose = "of its earlier steps" if rank == other else f"that rank {other} reads"
        yield Hint(
            "repeats",
            f"rank {rank} reads the same batches {whose}: {times} times in the last {len(records)} steps, though the run "
            f"passed {max(passed, default=0.0):.2g} epochs of its data; look at how this rank reads its data: its rank "
            "number, seed and position",
        )


def odd_source(records: Sequence[Record], first: Mapping[str, float]) -> Iterator[Hint]:
    """Warns about a source of the data whose loss rises while the others' losses do not, or whose loss has never fallen
    while the others' have. `first` has the median losses of the run's first steps; empty if unknown."""
    read: dict[str, list[float]] = defaultdict(list)
    for name, loss in (each for record in records for each in record.source_losses.items()):
        read[name] += [loss] if math.isfinite(loss) else []
    known = {name: np.array(losses) for name, losses in read.items() if len(losses) >= 3 * RECENT}
    if len(known) < 2:
        return
    rank = next((f" ({hint.text.partition(',')[0]})" for hint in odd_rank(records)), "")
    advice = f"; look at the data of this source{rank}: are they corrupt, or of another kind?"
    now = {name: float(np.median(loss_S[-RECENT:])) for name, loss_S in known.items()}
    before = {name: float(np.median(loss_S[: len(loss_S) // 2])) for name, loss_S in known.items()}
    new_model = known.keys() <= first.keys() and np.ptp([*first.values()]) < ALIKE * min(first.values())
    for name, loss_S in known.items():
        others = [each for each in known if each != name]
        # Differences of neighbours have the noise of two steps, and no trend.
        error = 1.25 * noise(np.diff(loss_S[: len(loss_S) // 2])) * math.sqrt((1 / RECENT + 2 / len(loss_S)) / 2)
        rise = now[name] - before[name]
        if rise > max(ODD * before[name], SURE * error) and all(now[o] / before[o] - 1 < ODD / 2 for o in others):
            text = (
                f"the loss of source {name} rose from {before[name]:.3f} to {now[name]:.3f} (medians of the last "
                f"{len(loss_S)} steps), and the other sources' losses did not rise"
            )
        elif new_model and now[name] > LOSS_FALL * first[name] and all(now[o] < LEARNT * first[o] for o in others):
            text = (
                f"the loss of source {name} does not fall: {now[name]:.3f} now, {first[name]:.3f} at first, and the other "
                "sources' losses fall"
            )
        else:
            continue
        yield Hint(f"source/{name}", text + advice)


def pays(evaluations: Sequence[Evaluated]) -> Iterator[Hint]:
    """Warns about a modality whose held-out loss and training loss rise steadily while those of another modality fall."""
    last = evaluations[-1]
    # Only losses over the same tokens are compared; the final evaluation has more tokens.
    alike = [e for e in evaluations if e.tokens == last.tokens and e.training.keys() == last.training.keys()][-PAYS:]
    if len(alike) < PAYS:
        return

    def steady(name: str, sign: int) -> bool:
        held = sign * np.array([e.held_out[name] for e in alike])
        trained = sign * (last.training[name] - alike[0].training[name])
        return bool((np.diff(held) > 0).all() and held[-1] - held[0] > STEADY * abs(held[0]) and trained > 0)

    falling = [name for name in last.training if steady(name, -1)]
    for name in last.training:
        if falling and steady(name, 1):
            yield Hint(
                f"pays/{name}",
                f"{name} pays for {falling[0]}: since step {alike[0].step} the held-out {name} loss rose each time "
                f"(from {alike[0].held_out[name]:.3f} to {last.held_out[name]:.3f}), as its training loss did, while "
                f"{falling[0]} fell from {alike[0].held_out[falling[0]]:.3f} to {last.held_out[falling[0]]:.3f}; see "
                f"eval/{name}; try a larger share of {name} in data.weights, a lower optimizer.lr, or more {name} experts",
            )


def odd_rank(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a rank whose loss is always above that of the other ranks, which read the same mix of data."""
    known = [r.data_D2[:, 1] for r in records if len(r.data_D2) > 1 and np.isfinite(r.data_D2).all()]
    if len(known) < 2 * RECENT:
        return
    loss_SD = np.stack(known)
    rank = int(np.median(loss_SD, axis=0).argmax())
    others_S = np.median(np.delete(loss_SD, rank, axis=1), axis=1)
    above_S = loss_SD[:, rank] - others_S
    above, others = float(np.median(above_S)), float(np.median(others_S))
    if above > max(ODD * others, SURE * 1.25 * noise(above_S) / math.sqrt(len(above_S))):
        yield Hint(
            "data",
            f"rank {rank} has a loss of {above + others:.3f}, and the other ranks have {others:.3f} (medians of "
            f"{len(loss_SD)} steps), although all read the same mix; look at the data that this rank reads: are they "
            "corrupt, or of another source?",
        )


def odd_scale(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a rank whose loss has another weight in the gradient than the other ranks' losses."""
    known = [r.loss_scale_D for r in records[-RECENT:] if len(r.loss_scale_D) > 1 and np.isfinite(r.loss_scale_D).all()]
    if len(known) < RECENT:
        return
    scale_D = np.abs(np.median(known, axis=0))
    for rank, scale in enumerate(scale_D.tolist()):
        others = float(np.median(np.delete(scale_D, rank)))
        if scale > OTHER_SCALE * others:
            yield Hint(
                "unequal",
                f"the loss of rank {rank} enters the gradient {scale / max(others, 1e-30):.3g} x as strongly as the other "
                f"ranks' losses (medians of {RECENT} steps): does its code scale the loss once more than theirs?",
            )


def odd_words(records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about a rank whose token ids have other frequencies than the other ranks', which read the same mix of data.
    Distances are of total variation, between ids modulo a number."""
    known = [r.words_DK for r in records if len(r.words_DK) > 1 and r.words_DK.sum(1).all()]
    if len(known) < 3 * RECENT:
        return
    words_2DK = np.stack([np.sum(known[::2], axis=0), np.sum(known[1::2], axis=0)])
    share_2DK = words_2DK / words_2DK.sum(2, keepdims=True)
    share_DK = share_2DK.mean(0)
    others_DK = (share_DK.sum(0) - share_DK) / (len(share_DK) - 1)
    away_D = np.abs(share_DK - others_DK).sum(1).round(6) / 2
    chance = float(np.abs(share_2DK[0] - share_2DK[1]).sum(1).max()) / 2  # of two halves of a rank's own steps
    rank = len(away_D) - 1 - int(away_D[::-1].argmax())  # of two ranks the second, because rank 0 reads what it should
    if away_D[rank] > max(OTHER_WORDS, SAME_WORDS * chance):
        yield Hint(
            "words",
            f"rank {rank} reads other token ids than the other ranks: their frequencies differ by {away_D[rank]:.0%} "
            f"(between two halves of a rank's own steps: {chance:.0%}), although all ranks read the same mix; does "
            "it have the data and the tokenizer of the others?",
        )
