"""Reads the folder of a dense model into its experts, and exports a dense model that got experts (`dense.add_experts`)."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.storage import new_folder, write_durably, write_tensors
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.hf.adapters import lora_fields
from moe_dist.hf.host.banks import GUIDE, PROJECTIONS, Bank
from moe_dist.hf.host.lora_names import hosted_tensors
from moe_dist.hf.peft_files import CONFIG_FILE, WEIGHTS_FILE
from moe_dist.hf.served_fields import CODE, DENSE_CODE, DENSE_MAP, token_ids

FAMILY = "family"  # prefix of all names in an export, and the field with the dense model's configuration


class CopiedTensors:
    """The tensors of a folder that become experts: FFNs of a dense model, or the experts of an export, of which a run may
    make more. New experts are copies of the old ones in turn, and their routers keep initial values.

    Args:
        local: Logical ids of this rank's experts.
    """

    def __init__(self, model: Any, local: Sequence[int]) -> None:
        self._family, self._local = model.family, local
        self.banks: Sequence[Bank] = model.banks if hasattr(model.family, "moe_dist_banks") else ()
        self._blocks = {bank.block for bank in self.banks if not is_adapted(model.family)}
        self._stacks = {bank.experts for bank in self.banks}
        self._routers = {f"{bank.router}.weight": len(bank.ids) for bank in self.banks}
        self._found: dict[str, Any] = {}

    def takes(self, target: str, tensor: Any) -> bool:
        """Returns whether the tensor, named as in the family, is kept for `copy` or left out."""
        module, _, leaf = target.removesuffix(".weight").rpartition(".")
        if module in self._stacks or (module in self._blocks and leaf in PROJECTIONS):
            self._found[f"{module}.{leaf}"] = tensor
            return True
        return tensor.get_shape()[0] < self._routers.get(target, 0)

    def copy(self, set_whole: Callable[[Tensor, Tensor], object]) -> set[str]:
        """Sets the experts. Returns the names of parameters that have their values, or keep initial ones."""
        done = set(self._routers)
        for bank in self.banks:
            for name, parameter in self._family.get_submodule(bank.experts).named_parameters(recurse=False):
                if (stack := self._stack(bank, name)) is not None:
                    set_whole(parameter, stack.float())
                    done.add(f"{bank.experts}.{name}")
        return done

    def _stack(self, bank: Bank, name: str) -> Tensor | None:
        local = bank.local(self._local)
        if (stored := self._found.get(f"{bank.experts}.{name}")) is not None:
            count = stored.get_shape()[0]
            rows = [stored[expert % count : expert % count + 1] for expert in local]
            return torch.cat(rows) if rows else stored[:0]
        parts = {"gate_up_proj": PROJECTIONS[:2], "down_proj": PROJECTIONS[2:]}.get(name, ())
        found = [self._found.get(f"{bank.block}.{part}") for part in parts]
        if not found or None in found:
            return None
        matrix = torch.cat([each[:] for each in found if each is not None])
        return matrix.expand(len(local), *matrix.shape)


def is_adapted(family: Any) -> bool:
    """Returns whether the experts of a dense family are adapters."""
    return hasattr(family.get_submodule(family.moe_dist_banks[0].experts), "ffn")


@torch.no_grad()
def merge_experts(family: Any) -> None:
    """Adds each layer's only LoRA expert to the frozen FFN, and removes the expert. Raises ConfigError if a layer has
    several."""
    if (most := max(bank.ids.stop for bank in family.moe_dist_banks)) > 1:
        raise ConfigError(
            f"model.moe.groups: layers have {most} LoRA experts, and only a single one can be merged into the FFN; export "
            "them with --adapters",
            see=GUIDE,
        )
    for bank in family.moe_dist_banks:
        block, experts = family.get_submodule(bank.block), family.get_submodule(bank.experts)
        for target in experts.section.targets:
            a, b = (getattr(experts, f"{target}_proj_lora_{matrix}")[0] for matrix in "AB")
            block.get_submodule(f"{target}_proj").weight.add_(b @ a, alpha=experts.section.alpha / experts.section.rank)
        delattr(block, bank.group)


def groups_of(model: ModelSection, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Returns the sizes, modalities and token ids of the groups of experts, for `write_dense`."""
    ids = token_ids(model, manifest) if len(model.moe.groups) > 1 else {}
    sizes = {
        name: group.model_dump(include={"num_experts", "top_k", "modalities"}) for name, group in model.moe.groups.items()
    }
    return {name: {**each, "token_ids": ids.get(name)} for name, each in sizes.items()}


def write_dense(family: Any, out: Path, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a dense family with experts as a folder with code. `groups` is what `groups_of` returns."""
    from transformers.initialization import no_init_weights

    from moe_dist.hf.served.modeling_moe_dist_dense import MoeDistDenseConfig, MoeDistDenseModel

    config = MoeDistDenseConfig(
        family=family.config.to_dict(),
        blocks=list(dict.fromkeys(bank.block for bank in family.moe_dist_banks)),
        expert_groups=dict(groups),
        auto_map=DENSE_MAP,  # pyright: ignore[reportCallIssue]
    )
    with no_init_weights():
        served = MoeDistDenseModel(config, family)
    served.save_pretrained(out, max_shard_size="4GB")
    for name in DENSE_CODE:
        shutil.copyfile(CODE / name, out / name)


def adapters_by_expert(out: Path, model: ModelSection, base_name: str | None, read: Callable[[str], Tensor]) -> int:
    """Writes the LoRA experts of a dense family: `<group>/expert_<n>` is a folder of PEFT with the adapters of a token that
    chooses this expert, those of `model.lora` among them, and `routers.safetensors` has the rows of the routers. Returns
    the number of tensors.

    Args:
        read: Returns a tensor of a checkpoint by its logical name.
    """
    from moe_dist.hf.host.dense import hosted_family

    section: Any = model.moe.experts
    others = model.lora
    with torch.device("meta"):
        banks: Sequence[Bank] = hosted_family(model).moe_dist_banks
    targets = [f"{each}_proj" for each in section.targets]
    fields = lora_fields(section, base_name or str(Path(str(model.folder)).absolute()), targets, None)
    if others is not None:
        fields["target_modules"] = [*targets, *others.targets]
        fields |= {"rank_pattern": dict.fromkeys(others.targets, others.rank)}
        fields |= {"alpha_pattern": dict.fromkeys(others.targets, others.alpha)}
    written = 0
    with new_folder(out) as folder:
        routers = {f"{bank.router}.weight": read(f"{FAMILY}.{bank.router}.weight").contiguous() for bank in banks}
        write_tensors(folder / "routers.safetensors", routers)
        for group, expert in {(bank.group, expert): None for bank in banks for expert in range(len(bank.ids))}:
            place = folder / group / f"expert_{expert}"
            place.mkdir(parents=True)
            named = {
                f"base_model.model.{bank.block}.{target}.lora_{matrix}.weight": read(
                    f"{FAMILY}.{bank.experts}.{expert}.{target}_lora_{matrix}"
                ).contiguous()
                for bank in banks
                if bank.group == group
                for target in targets
                for matrix in "AB"
            }
            named |= {name: each.contiguous() for name, each in hosted_tensors(model, read)} if others else {}
            write_tensors(place / WEIGHTS_FILE, named)
            write_durably(place / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())
            written += len(named)
    return written + len(routers)
