"""Makes hints about runs whose data have pictures: an encoder without gradient, and pictures with most of the loss."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.routing_hints import Hint

_ENCODER = re.compile(r"(^|\.)(visual|vision_(tower|model|encoder))\.")  # names of transformers
IMAGE = "image"


def untrained_encoder(measured: Sequence[Record], records: Sequence[Record]) -> Iterator[Hint]:
    """Warns about an encoder that got no gradient in two measured steps that read pictures. `measured` are the last records
    with `Record.weights`, `records` those of the last steps."""
    epochs = {record.step: record.epochs.get(IMAGE, 0.0) for record in records}
    read = [record for record in measured if record.epochs.get(IMAGE, 0.0) > epochs.get(record.step - 1, np.inf)]
    if len(read) < 2:
        return
    for record in read:
        assert record.weights is not None
        of_encoder_N = np.array([_ENCODER.search(name) is not None for name in record.weights.names], bool)
        if not of_encoder_N.any() or record.weights.squares_N3[of_encoder_N, 2].any():
            return
    yield Hint(
        "untrained/encoder",
        f"no gradient reaches the encoder of pictures in steps {read[0].step} and {read[-1].step}, though the run trains "
        "it and read pictures; see updates in metrics.jsonl; does detach cut it off, or is its projector's output zero?",
    )


def heavy_pictures(records: Sequence[Record], most: float | None) -> Iterator[Hint]:
    """Warns if labels of pictures had more than the share `most` of the loss of a window's steps, in nats."""
    nats = dict.fromkeys(records[-1].labels, 0.0)
    for record in records:
        for name, count in record.labels.items():
            nats[name] += count * (record.losses.get(name) or 0.0)
    whole = sum(nats.values())
    if most is not None and whole > 0 and (share := nats.get(IMAGE, 0.0) / whole) > most:
        yield Hint(
            f"share/{IMAGE}",
            f"pictures have {share:.0%} of the loss in the last {len(records)} steps, more than "
            f"monitor.most_picture_loss={most}; see loss/{IMAGE} and data/epochs in TensorBoard; give sources of text more "
            "weight in data.weights, or raise the limit",
        )
