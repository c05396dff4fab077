"""Makes the inputs of families that have a picture encoder.

A rank without pictures must issue the same collectives as the other ranks, and DDP waits for a gradient of each weight. On
such a rank the encoder therefore encodes the smallest possible picture, and the result is multiplied by 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.host.banks import GUIDE
from moe_dist.hf.host.family import tokens_of_a_picture


def groups_of_types(group_BS: Tensor, more: Mapping[str, Tensor]) -> Tensor:
    """Returns each token's group. `moe_mm_token_type_ids` (0 is text), if present, replaces groups except padding (-1)."""
    types_BS = more.get("moe_mm_token_type_ids")
    return group_BS if types_BS is None else torch.where(group_BS < 0, group_BS, types_BS.bool().long())


def picture_inputs(
    family: Any, tokens_BS: Tensor, positions_BS: Tensor, group_BS: Tensor, more: Mapping[str, Tensor], *, banks: bool
) -> dict[str, Any]:
    """Returns the keyword arguments of the family's forward. `more` has the batch's pictures (`PictureBatch.more`). `banks`
    tells whether pictures have separate experts. Costs a host sync.

    Raises:
        DataError: the batch has placeholders of pictures but no pictures, or placeholders are in the group of text experts.
    """
    config, vision = family.config, family.config.vision_config
    image_BS, video_BS = tokens_BS == config.image_token_id, tokens_BS == getattr(config, "video_token_id", -1)
    has_pictures = not {"pixel_values", "pixel_values_videos"}.isdisjoint(more)
    picture_BS = image_BS | video_BS
    _check(picture_BS, picture_BS & (group_BS == 0) & banks, has_pictures=has_pictures)
    inputs: dict[str, Any] = {name: each for name, each in more.items() if not name.endswith("token_type_ids")}
    if tokens_of_a_picture(config):
        inputs["position_ids"] = positions_BS
        if has_pictures:
            return {"input_ids": tokens_BS, **inputs}
        embedded_BSD = family.get_input_embeddings()(tokens_BS)
        found = family.get_image_features(_smallest(vision, embedded_BSD)["pixel_values"], return_dict=True)
        return {"inputs_embeds": embedded_BSD + 0.0 * torch.cat(list(found.pooler_output)).sum(), **inputs}
    places_3BS = inputs.pop("position_ids", positions_BS.expand(3, *positions_BS.shape))
    if has_pictures and "position_ids" not in more:
        grids = {name: each for name, each in inputs.items() if name.endswith("_grid_thw")}
        places_3BS, _ = family.model.get_rope_index(tokens_BS, image_BS.int() + 2 * video_BS.int(), **grids)
    # A token has four positions: one by which the family's mask separates documents, then time, height and width.
    inputs["position_ids"] = torch.cat([positions_BS[None], places_3BS])
    if has_pictures:
        return {"input_ids": tokens_BS, **inputs}
    embedded_BSD = family.get_input_embeddings()(tokens_BS)
    found = family.get_image_features(*_smallest(vision, embedded_BSD).values(), return_dict=True)
    features = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]  # Qwen3-VL's enter early layers
    unused = sum(torch.cat(each).sum() for each in features)
    return {"inputs_embeds": embedded_BSD + 0.0 * unused, **inputs}


def _smallest(vision: Any, like: Tensor) -> dict[str, Tensor]:
    """Returns the black pixels of an encoder's smallest picture, [patches, width], and its grid; or, if the encoder takes
    pictures of one size, pixels [1, 3, size, size]."""
    if not hasattr(vision, "spatial_merge_size"):
        return {"pixel_values": like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)}
    side = vision.spatial_merge_size
    width = vision.in_channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    grid = torch.tensor([[1, side, side]], device=like.device)
    return {"pixel_values": like.new_zeros(side**2, width), "image_grid_thw": grid}


@torch.no_grad()
def check_encoder(model: Any) -> None:
    """Raises ConfigError if what a model says after a picture does not depend on the picture, or if its encoder makes
    another number of tokens than the configuration says. Collective."""
    config, like = model.family.config, next(model.parameters())
    marks = [config.image_token_id, getattr(config, "video_token_id", -1)]
    text = next(each for each in range(len(marks) + 1) if each not in marks)
    count = tokens_of_a_picture(config)
    tokens_BS = torch.tensor([[text, *[config.image_token_id] * (count or 1), text, text]], device=like.device)
    zeros_BS, positions_BS = torch.zeros_like(tokens_BS), torch.arange(tokens_BS.shape[1], device=like.device)[None]
    group_BS = (tokens_BS == config.image_token_id).long() * (len({bank.group for bank in model.banks}) > 1)
    inputs = _smallest(config.vision_config, like.new_zeros((), dtype=torch.float32))
    black = inputs["pixel_values"]
    if count and (made := _features(model, black)) != count:
        raise ConfigError(
            f"model.folder: the encoder makes {made} tokens of a picture, and config.json says image_seq_length={count}, "
            f"by which the data are prepared; correct config.json ({GUIDE}#pictures)"
        )
    slope = torch.linspace(-2, 2, black.numel(), device=like.device).view_as(black)
    training = model.training
    model.eval()
    logits = [
        model(tokens_BS, positions_BS, zeros_BS, group_BS, more={**inputs, "pixel_values": each})[0][:, -1]
        for each in (slope, -slope)
    ]
    model.train(training)
    if torch.equal(*logits):
        raise ConfigError(
            "model.folder: the model's logits do not depend on pictures, because its encoder's or projector's output is "
            f"constant; look at how their weights were made or loaded ({GUIDE}#pictures)"
        )


def _features(model: Any, pixels: Tensor) -> int:
    found: list[int] = []
    projector = model.family.model.multi_modal_projector  # called alone, the encoder's sharded weights are not gathered
    hook = projector.register_forward_hook(lambda _module, _inputs, output: found.append(output.shape[1]))
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=pixels.device)
        model(ids, ids, ids, ids)
    finally:
        hook.remove()
    return found[0]


def _check(picture_BS: Tensor, as_text_BS: Tensor, *, has_pictures: bool) -> None:
    any_picture, any_as_text = torch.stack([picture_BS.any(), as_text_BS.any()]).tolist()
    if any_picture and not has_pictures:
        raise DataError(
            "the batch has placeholder tokens of pictures, but no pixel_values: the model would read the placeholder's "
            f"embedding in place of a picture; give the pictures in the batch ({GUIDE}#pictures)"
        )
    if any_as_text:
        raise DataError(
            "moe_mm_token_type_ids: placeholder tokens of pictures have type 0, so text experts would compute them, and no "
            "vision expert would be trained; give moe_mm_token_type_ids in the batch, or the modality of pictures to these "
            f"token ids in the manifest ({GUIDE}#pictures)"
        )
