"""Scores answers of instruction data: an answer is right if each scored token is the model's most likely one.

Shape letters: B sequences, S positions of a sequence, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.train.loss import forward


@torch.no_grad()
def answers(model: Transformer, batches: Mapping[str, Sequence[Batch]], group_of_modality: Tensor) -> dict[str, Any]:
    """For each source its documents, right answers and accuracy; and the mean accuracy over sources.

    A document that was cut at the end of a sequence counts once for each piece with a scored token.
    """
    found: dict[str, Any] = {}
    for source, of_source in batches.items():
        documents = right = 0
        for batch in of_source:
            logits_BSV, _ = forward(model, batch, group_of_modality)
            one, all_right = right_documents(logits_BSV.argmax(-1), batch)
            documents, right = documents + one, right + all_right
        found[source] = {"documents": documents, "right": right, "accuracy": right / documents if documents else 0.0}
    return {"accuracy": sum(each["accuracy"] for each in found.values()) / len(found), "by_source": found}


def right_documents(likeliest_BS: Tensor, batch: Batch) -> tuple[int, int]:
    """Number of a batch's documents with scored tokens, and of those whose scored tokens are all the most likely ones."""
    scored_BS = batch.labels_BS != IGNORED
    wrong_BS = scored_BS & (likeliest_BS != batch.labels_BS)
    row_BS = torch.arange(len(scored_BS))[:, None].expand_as(scored_BS)
    keys = torch.stack([row_BS, batch.documents_BS.to(row_BS.dtype)], dim=-1)
    documents, wrong = (len(torch.unique(keys[mask_BS], dim=0)) for mask_BS in (scored_BS, wrong_BS))
    return documents, documents - wrong
