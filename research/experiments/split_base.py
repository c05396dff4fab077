"""Makes a mixture of experts from an imported dense model, without training. Its routing can be improved.

    python -m research.experiments.split_base .cache/hf/smollm2-import --data .cache/data/smollm2-words --out FOLDER

Each FFN is divided into experts, and a token takes only some of them. Neurons that are active on the same tokens are in the
same expert (as in MoEfication, arXiv 2110.01786). A router row predicts the logarithm of the norm of the expert's output.
It is a linear regression on the FFN's inputs. The weights of experts are near 1, because the logits are small.

Shape letters: T tokens, D hidden size, F width of the FFN, n experts, N = F / n neurons of an expert.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.errors import ConfigError
from moe_dist.inference.loaded_run import CheckpointReader, LoadedRun, causal_problems, find_trained
from moe_dist.model.transformer import Transformer
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.train.objective.loss import forward
from research.experiments.domain_probe import recorded_inputs
from research.experiments.instructed import check_new

GROUP = "all"  # the expert group of an import
ROUNDS = 10  # number of rounds of the clustering of neurons
RIDGE = 1e-2  # penalty of the ridge regression, as a fraction of the inputs' mean square
SPREAD = 0.25  # standard deviation of the logits: small, so that the experts of a token have nearly equal weights


@dataclass(frozen=True)
class Cut:
    """The division of an FFN into experts."""

    neurons_nN: Tensor  # int64, the neurons of each expert
    rows_nD: Tensor  # router rows


@torch.no_grad()
def cut(x_TD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, *, experts: int) -> Cut:
    """Divides the neurons of an FFN among experts, and fits router rows. Both steps use the FFN's inputs `x_TD`."""
    hidden_TF = F.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)
    neurons_nN = cluster((hidden_TF * down_DF.norm(dim=0)).abs().T, experts=experts)
    outputs = [hidden_TF[:, neurons] @ down_DF[:, neurons].T for neurons in neurons_nN]
    wanted_Tn = torch.stack([each.norm(dim=1) for each in outputs], dim=1).clamp_min(1e-9).log()
    return Cut(neurons_nN, regression(x_TD, wanted_Tn))


def cluster(activity_FT: Tensor, *, experts: int) -> Tensor:
    """Returns the neurons of each expert, int64 [n, N]. The experts are clusters of equal size of the neurons' activities.

    In each round, a neuron goes to the expert with the most similar mean activity (by cosine) that is not full. Neurons for
    which one expert is clearly the best choose first.
    """
    activity_FT = F.normalize(activity_FT.float(), dim=1)
    size = len(activity_FT) // experts
    neurons_nN = torch.randperm(len(activity_FT), generator=torch.Generator().manual_seed(0)).view(experts, size)
    for _ in range(ROUNDS):
        mean_nT = F.normalize(torch.stack([activity_FT[neurons].mean(0) for neurons in neurons_nN]), dim=1)
        similarity_Fn = activity_FT @ mean_nT.T
        best_F2 = similarity_Fn.topk(2, dim=1).values
        members: list[list[int]] = [[] for _ in range(experts)]
        order_Fn = similarity_Fn.argsort(dim=1, descending=True).tolist()
        for neuron in (best_F2[:, 0] - best_F2[:, 1]).argsort(descending=True).tolist():
            expert = next(each for each in order_Fn[neuron] if len(members[each]) < size)
            members[expert].append(neuron)
        neurons_nN = torch.tensor(members).sort(dim=1).values
    return neurons_nN


def regression(x_TD: Tensor, wanted_Tn: Tensor) -> Tensor:
    """Returns router rows [n, D]. Their logits predict `wanted_Tn` minus its mean over all tokens and experts, but are
    scaled to the standard deviation SPREAD."""
    x_TD, wanted_Tn = x_TD.double(), wanted_Tn.double()
    square_DD = x_TD.T @ x_TD
    ridge_DD = RIDGE * square_DD.diagonal().mean() * torch.eye(len(square_DD), dtype=torch.float64)
    rows_nD = torch.linalg.solve(square_DD + ridge_DD, x_TD.T @ (wanted_Tn - wanted_Tn.mean())).T
    logits_Tn = x_TD @ rows_nD.T
    return (rows_nD * SPREAD / (logits_Tn - logits_Tn.mean(1, keepdim=True)).std()).float()


def split_config(config: Config, *, experts: int, top_k: int) -> Config:
    """Returns the configuration of the mixture. The weights of a token's experts sum to `top_k`.

    Raises:
        ConfigError: the model is no dense import, or its FFN's width is no multiple of `experts`.
    """
    (group,) = config.model.moe.groups.values()
    if group.num_experts != 1 or group.ffn_dim % experts or not 1 < top_k < experts:
        raise ConfigError(
            f"--experts {experts} --top-k {top_k}: takes a dense import whose FFN width, {group.ffn_dim} here, is a "
            "multiple of the experts, and 2 to experts - 1 choices"
        )
    changed = config.model_dump(mode="json")
    changed["model"]["moe"]["groups"][GROUP] |= {
        "num_experts": experts,
        "top_k": top_k,
        "ffn_dim": group.ffn_dim // experts,
    }
    changed["model"]["moe"]["router"] |= {"normalise": "true_chosen", "scale": float(top_k)}
    return Config.model_validate_json(json.dumps(changed))


def inputs_of_ffns(model: Transformer, batches: Sequence[Batch], groups: Tensor) -> list[Tensor]:
    """Returns, for each layer, the inputs of the FFN [T, D], at all tokens of the batches except padding."""
    found: list[list[Tensor]] = [[] for _ in model.moe_modules()]
    with torch.no_grad(), recorded_inputs(model) as inputs:
        for batch in batches:
            inputs.clear()
            forward(model, batch, groups)
            for parts, x_TD in zip(found, inputs, strict=True):
                parts.append(x_TD[~batch.padding_BS.flatten()])
    return [torch.cat(parts) for parts in found]


def split(trained: LoadedRun, out: Path, *, experts: int, top_k: int, sequences: int, length: int) -> None:
    """Makes the mixture from held-out sequences of the data, and writes it as the checkpoint of the folder `out`."""
    config = split_config(trained.config, experts=experts, top_k=top_k)
    device = torch.device("cpu")
    dense = CheckpointReader(trained.folder.parent, trained.config, device)
    model = dense.read(trained.folder)
    batches = [
        batch
        for source in trained.manifest.sources
        for batch in heldout_batches(
            config.data.path,
            trained.manifest,
            source=source,
            seq_len=length,
            sequences=sequences,
            micro_batch=4,
            rank=0,
            world_size=1,
        )
    ]
    inputs = inputs_of_ffns(model, batches, torch.tensor(trained.group_of_modality))
    made = CheckpointReader(out / "checkpoints", config, device)
    old, new = dense.state.tensors(), made.state.tensors()
    for name, tensor in new.items():
        if name in old and old[name].shape == tensor.shape:
            tensor.copy_(old[name])
    for layer, x_TD in zip(config.model.moe_layers, inputs, strict=True):
        before = f"layers.{layer}.moe.experts.{GROUP}"
        gate_FD, up_FD, down_DF = (old[f"{before}.0.{name}"] for name in ("gate", "up", "down"))
        parts = cut(x_TD, gate_FD, up_FD, down_DF, experts=experts)
        for expert, neurons in enumerate(parts.neurons_nN):
            new[f"{before}.{expert}.gate"].copy_(gate_FD[neurons])
            new[f"{before}.{expert}.up"].copy_(up_FD[neurons])
            new[f"{before}.{expert}.down"].copy_(down_DF[:, neurons])
        new[f"layers.{layer}.moe.router.{GROUP}.true"].copy_(parts.rows_nD)
    manager = CheckpointManager(out / "checkpoints", keep=1, lease_check=lambda: None)
    manager.save(0, replace(made.state, values={"config": config.model_dump(mode="json")}))


@reports_errors()
def main(
    folder: Annotated[Path, typer.Argument(help="Dense model that moe-dist import-hf imported.")],
    data: Annotated[Path, typer.Option(help="Data set on whose held-out documents experts and routers are fitted.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    experts: Annotated[int, typer.Option(min=2, help="Experts of each FFN.")] = 8,
    top_k: Annotated[int, typer.Option(min=2, help="Experts that a token takes.")] = 6,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
) -> None:
    """Cut the FFNs, and fit the routers."""
    check_new(out)
    trained = find_trained(folder, data=data, allow=causal_problems)
    split(trained, out, experts=experts, top_k=top_k, sequences=sequences, length=length)
    print(f"{out}: {experts} experts a layer, of which a token takes {top_k}")


if __name__ == "__main__":
    run_command(main)
