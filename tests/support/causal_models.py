"""Builds whole models in evaluation mode from a configuration. As after training, biases and thresholds are not 0."""

import torch

from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.build.training import build_model


def evaluated_model(config: Config) -> Transformer:
    """Returns the model on one rank, with random weights."""
    groups = expert_groups(config.model.moe)
    placement = ExpertPlacement(groups, (tuple(range(sum(group.num_experts for group in groups))),))
    model = build_model(config, placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=0, std=0.3)
    for layer in model.moe_modules():
        for path, buffer in layer.router.named_buffers():
            if path.endswith("bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()))
        for path, parameter in layer.router.named_parameters():
            if path.endswith("level"):  # a buffer of the `threshold` router
                parameter.data.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
        if isinstance(layer.router, ExpertChoiceRouter):
            for gate in layer.router.gates():
                gate.threshold.copy_(torch.linspace(0.5, 0.6, gate.threshold.numel()))
                gate.statistics.copy_(torch.linspace(0.1, 0.9, gate.statistics.numel()).view_as(gate.statistics))
    for router in model.depth_routers():
        if router.causal == "threshold":
            router.threshold.fill_(0.5)
    return model.eval()
