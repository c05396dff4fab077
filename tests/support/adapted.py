"""Builds models with adapters on an imported base, on one rank, and saves them in checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.plan.preflight import layout_without_data
from moe_dist.train.build.training import build_model, freeze
from moe_dist.train.start.base_weights import begin_on_base

ONE = {"num_experts": 1, "top_k": 1}
MOLE = {"num_experts": 3, "num_null": 1, "top_k": 2}


class Adapted:
    """A model with new adapters on the base `imported`, a folder that `moe-dist import-hf` wrote.

    Args:
        group: Fields of the model's only expert group that differ from the base's group.
        experts: Fields of the section of LoRA experts; None for no LoRA experts.
        ffn: Fields of the section of LoRA on the base's own experts; None for no LoRA there.
        attention: Fields of the section of LoRA on the attention; None for no LoRA on the attention.
    """

    def __init__(
        self,
        imported: Path,
        folder: Path,
        *,
        group: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
        ffn: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
    ) -> None:
        values = yaml.safe_load((imported / "config.yaml").read_text())
        values["run"]["init_rules"], values["train"]["only"] = ["adapt"], "adapters"
        values["data"]["path"] = str(folder / "no data")  # the tests must not depend on this machine's data
        values["parallel"] |= {"device": "cpu", "precision": "fp32"}
        moe, values["model"]["attention_lora"] = values["model"]["moe"], attention
        if experts is not None:
            moe["experts"] = {"kind": "lora", **experts}
            moe["router"] = {"kind": "top_k", "normalise": "none"}
            moe["groups"]["all"] |= group or {}
        if ffn is not None:
            moe["experts"] = {"kind": "ffn_lora", **ffn}  # `ffn` may choose another kind
        self.config = Config.model_validate_json(json.dumps(values))
        layout_without_data(self.config)  # a run makes the same layout
        placement = replicated_placement(expert_groups(self.config.model.moe))
        self.model: Transformer = build_model(self.config, placement, ep_rank=0, ep_group=None)
        initialise(self.model, placement, ep_rank=0, device=torch.device("cpu"), seed=7, std=0.3)
        freeze(self.model, self.config)
        assert self.config.model.moe.experts.replicated == (experts is not None)
        self.manager = CheckpointManager(folder, keep=1, lease_check=lambda: None)
        self.layout = RankLayout(placement)
        self.base, self.report = begin_on_base(self.config, self.manager, self.model, self.layout)

    def draw(self, seed: int = 0) -> None:
        """Draws the adapters' second matrices, which start at 0, as if they were trained."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith((".b", "_b")):
                    parameter.normal_(0.0, 0.2, generator=generator)

    def save(self) -> Path:
        """Saves a checkpoint of the adapters."""
        values = {"config": self.config.model_dump(mode="json"), "base": {**vars(self.base)}}
        return self.manager.save(3, capture(self.model, None, self.layout, part="trained", values=values))
