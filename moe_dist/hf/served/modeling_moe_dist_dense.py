"""A dense model of transformers whose FFNs moe_dist turned into experts, for transformers. Needs transformers only.

The token id determines the group of experts. A token takes the top k of its group's experts, with weights that add up to 1.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter


class MoeDistDenseConfig(PreTrainedConfig):
    """Configuration of the dense model, and of its experts.

    Attributes:
        family: Fields of the dense model's configuration, with its `model_type`.
        blocks: Paths of the FFNs that became experts.
        expert_groups: For each group `num_experts`, `top_k` and `token_ids` (ranges [first, last + 1] of its token ids;
            null for a single group).
    """

    model_type = "moe_dist_dense"

    family: dict | None = None
    blocks: list | None = None
    expert_groups: dict | None = None


class ExpertGroup(nn.Module):
    """A router and its experts, all copies of one FFN at first."""

    def __init__(self, ffn, num_experts, top_k):
        super().__init__()
        width, hidden_size = ffn.gate_proj.weight.shape
        sizes = {"hidden_size": hidden_size, "intermediate_size": width}
        config = MixtralConfig(**sizes, num_local_experts=num_experts, num_experts_per_tok=top_k)
        config._experts_implementation = "grouped_mm"
        self.gate, self.experts = MixtralTopKRouter(config), MixtralExperts(config)
        self.experts.act_fn = ffn.act_fn

    def forward(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.gate.weight.float())
        weights, chosen = logits.softmax(-1).topk(self.gate.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(hidden_states.dtype)
        return self.experts(hidden_states, chosen, weights)


class ExpertBlock(nn.Module):
    """Takes the place of an FFN. `model.groups` has the group of each token of the forward."""

    def __init__(self, ffn, groups, model):
        super().__init__()
        self.model = (model,)  # in a tuple, so that it is no child
        for name, group in groups.items():
            self.add_module(name, ExpertGroup(ffn, group["num_experts"], group["top_k"]))

    def forward(self, hidden_states):
        hidden, groups = hidden_states.flatten(0, -2), self.model[0].groups
        if len(self._modules) == 1:
            return next(self.children())(hidden).view_as(hidden_states)
        output = torch.zeros_like(hidden)
        for number, group in enumerate(self.children()):
            (at,) = torch.where(groups == number)
            output = output.index_copy(0, at, group(hidden[at]))
        return output.view_as(hidden_states)


class MoeDistDenseModel(PreTrainedModel):
    """The family's model with experts. Call `generate` as that of the family."""

    config_class = MoeDistDenseConfig
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config, family=None):
        super().__init__(config)
        self.groups = None
        if family is None:
            fields = AutoConfig.for_model(**config.family)
            has_text_model = fields.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            family = (AutoModelForCausalLM if has_text_model else AutoModelForImageTextToText).from_config(fields)
            for path in config.blocks:
                holder, _, name = path.rpartition(".")
                block = ExpertBlock(family.get_submodule(path), config.expert_groups, self)
                setattr(family.get_submodule(holder), name, block)
        if hasattr(mapping := getattr(family.model, "vocabulary_mapping", None), "image_tokens"):
            mapping.__dict__["image_tokens"] = []  # Chameleon forbids pictures in the output
        self.family = family
        self._tied_weights_keys = {f"family.{a}": f"family.{b}" for a, b in (family._tied_weights_keys or {}).items()}
        family.register_forward_pre_hook(self._find_groups, with_kwargs=True)
        self.post_init()

    def _find_groups(self, _module, _inputs, given):
        ids = given["input_ids"].flatten()
        self.groups = torch.zeros_like(ids)
        for number, group in enumerate(self.config.expert_groups.values()):
            for first, end in group["token_ids"] or ():
                self.groups[(ids >= first) & (ids < end)] = number

    def _init_weights(self, module):
        pass  # a folder has all weights

    def get_input_embeddings(self):
        return self.family.get_input_embeddings()

    def forward(self, input_ids=None, **given):
        """Takes and returns what the family's forward does."""
        return self.family(input_ids=input_ids, **given)

    def generate(self, input_ids=None, **given):
        return self.family.generate(input_ids, **given)
