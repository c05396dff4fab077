"""A tiny model in ERNIE-4.5-VL's form, and batches with pictures for it."""

from typing import Any

import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.data.picture_batch import PictureBatch
from tests.support.tiny import IMAGE_IDS

PLACEHOLDER, VIDEO = 62, 63  # token ids of the modality `image`
BEGIN, END = IMAGE_IDS[0], IMAGE_IDS[0] + 1
_TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
_TEXT |= {"intermediate_size": 24, "moe_intermediate_size": [16, 8], "moe_num_experts": 4, "moe_k": 2, "pad_token_id": 0}
_TEXT |= {"moe_num_shared_experts": 1, "max_position_embeddings": 64, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 1, 2]}}
_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "hidden_act": "silu"}
ERNIE: dict[str, Any] = {
    "text_config": {**_TEXT, "tie_word_embeddings": False},
    "vision_config": _VISION,
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "image_start_token_id": BEGIN,
    "image_end_token_id": END,
    "video_start_token_id": 50,
    "video_end_token_id": 51,
    "tie_word_embeddings": False,
}
MODEL: dict[str, Any] = {"family": "ernie4_5_vl_moe", "fields": ERNIE, "moe": {"groups": {}}}


def picture_batch(seed: int, pictures: tuple[int, ...], *, documents: int = 1, length: int = 64) -> Batch:
    """Returns a batch with one row for each entry of `pictures`, the number of pictures in the row's first document."""
    draw = torch.Generator().manual_seed(seed)
    rows, grids, pixels = [], [], list[Tensor]()
    for count in pictures:
        row = list[int]()
        for _ in range(count):
            height, width = (2 * int(torch.randint(1, 3, (), generator=draw)) for _ in range(2))
            row += [int(torch.randint(4, 48, (), generator=draw)), BEGIN, *[PLACEHOLDER] * (height * width // 4), END]
            grids.append([1, height, width])
            pixels.append(torch.randn(height * width, 48, generator=draw))
        rows.append(torch.cat([torch.tensor(row).long(), torch.randint(4, 48, (length - len(row),), generator=draw)]))
    tokens_BS = torch.stack(rows)
    documents_BS = (torch.arange(length) * documents // length).int().expand_as(tokens_BS)
    positions_BS = (torch.arange(length) % (length // documents)).expand_as(tokens_BS)
    labels_BS = torch.cat([tokens_BS[:, 1:], tokens_BS[:, :1]], dim=1)
    last_BS = positions_BS == length // documents - 1
    labels_BS = labels_BS.masked_fill(last_BS | (labels_BS >= IMAGE_IDS[0]), IGNORED)
    none_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    more = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)} if pixels else {}
    modality_BS = (tokens_BS >= IMAGE_IDS[0]).long()
    values = (tokens_BS, labels_BS, positions_BS, documents_BS, modality_BS, 0 * labels_BS, none_BS, none_BS)
    return PictureBatch(*values, more=more)


def joined(batches: list[Any]) -> Batch:
    """Returns one batch with the rows and pictures of all `batches`."""
    names = {name for each in batches for name in each.more}
    more = {name: torch.cat([each.more[name] for each in batches if each.more]) for name in names}
    tensors = {name: torch.cat([getattr(each, name) for each in batches]) for name in vars(batches[0]) if name != "more"}
    return PictureBatch(**tensors, more=more)
