"""Writes a checkpoint of adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT stores the adapters A_e [r, I] and B_e [O, r] of a layer's n experts e in two joint matrices:

    lora_A [n r, I]   A_e in the rows e r to (e + 1) r
    lora_B [O, r n]   column j of B_e in the column j n + e

In most families an expert matrix is stored as [n, O, I], but in gpt-oss it is transposed, [n, I, O]. lora_A and lora_B have
the same shapes in both cases. The rows of lora_B for the outputs of gate and up follow the family's order. In gpt-oss they
alternate: gate 0, up 0, gate 1, up 1, ...

PEFT wraps the parameters of a module one after the other. The wrapper of `down_proj` therefore contains the wrapper of
`gate_up_proj` as its `base_layer`. An adapter that all experts share is written once per expert.

Shape letters: n experts, r rank, I inputs and O outputs of a matrix.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.base import GUIDE, KEY, Base, find_base
from moe_dist.checkpoint.contents import Contents, open_checkpoint
from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.storage import new_folder, write_durably, write_tensors
from moe_dist.checkpoint.whole_tensors import tensor_reader
from moe_dist.config.experts.ffn import AdaptedClampedFFNExpertsSection, AdaptedFFNExpertsSection
from moe_dist.config.model_schema import ModelSection
from moe_dist.errors import ConfigError
from moe_dist.hf.data_files import README, TOKENIZER_FILE, run_lines
from moe_dist.hf.exporting import checked_config
from moe_dist.hf.forms import Form, choose_form
from moe_dist.hf.importing import HUGGINGFACE, imported_values
from moe_dist.hf.names import projection_name
from moe_dist.hf.peft_files import CONFIG_FILE, WEIGHTS_FILE, joint
from moe_dist.moe.experts.lora import PROJECTIONS

_MODEL = "base_model.model.model.layers"
_SHARED = "mlp.shared_expert"  # name of the shared expert's module in Qwen2-MoE
# Last parts of names that PEFT treats as weights of routed experts in target_modules, but not in target_parameters.
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_PARAMETERS = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


def export_adapters(checkpoint: Path, out: Path, *, base_name: str | None = None) -> int:
    """Writes the adapters of a checkpoint into the new folder `out`, which PEFT can load. Returns the number of tensors.

    Args:
        checkpoint: Folder of a checkpoint of adapters, or of a run with such a checkpoint.
        base_name: Name or folder of the base as a Hugging Face model, for `base_model_name_or_path`. If None, the
            folder that was imported is used, unless the import changed the model.

    Raises:
        ConfigError: `out` exists, PEFT's format cannot store the adapters, or no transformers family can express the base.
            The message gives the reason.
        DataError: the checkpoint is damaged, or its base is missing or has another content hash.
        CheckpointError: `out` cannot be written.
    """
    contents = open_checkpoint(find_checkpoint(checkpoint))
    if KEY not in contents.state.values:
        raise ConfigError(f"{contents.folder}: holds no adapters, train.only is not adapters; export it without --adapters")
    base = find_base(Base.noted(contents.state.values, contents.folder), contents.folder)  # raises if the base differs
    model = checked_config(contents).model
    form, original = _form_of_base(base)
    if problems := _problems(model) or _problems_of_base(model, base, form):
        fix = "export the merged model (without --adapters), or use the run itself (tools.generate, tools.evaluate)"
        raise ConfigError([f"{problem}; {fix}" for problem in problems], see=GUIDE)
    return write_peft(out, model, base_name or original, base, peft_tensors(model, tensor_reader(contents)))


def write_peft(
    out: Path, model: ModelSection, base_name: str | None, base: Contents | Path, tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Writes adapters, with PEFT's names, into the new folder `out`. Returns the number of tensors. `base` is the base's
    checkpoint or Hugging Face folder."""
    named = {name: tensor.contiguous() for name, tensor in tensors}
    with new_folder(out) as folder:
        write_durably(folder / CONFIG_FILE, (json.dumps(peft_config(model, base_name), indent=2) + "\n").encode())
        write_durably(folder / README, _readme(base_name, base))
        write_tensors(folder / WEIGHTS_FILE, named)
    return len(named)


def peft_config(model: ModelSection, base_name: str | None) -> dict[str, Any]:
    """Returns the fields of adapter_config.json. If experts and attention differ in rank or alpha, rank_pattern and
    alpha_pattern contain the values for attention."""
    if (lora := model.lora) is not None:
        other = [each for each in lora.targets if each.rpartition(".")[2] in _OF_EXPERTS]
        modules = [each for each in lora.targets if each not in other]
        return lora_fields(lora, base_name, modules, [*lora.parameters, *(f"{each}.weight" for each in other)])
    experts, attention = model.moe.experts, model.attention_lora
    adapted = isinstance(experts, AdaptedFFNExpertsSection)
    main: Any = experts if adapted else attention
    parts = [projection_name(target) for target in attention.targets] if attention else []
    shared = [f"{_SHARED}.{part}_proj" for part in PROJECTIONS] if _on_shared_expert(model) else []
    parameters = [_PARAMETERS[target] for target in experts.targets] if adapted else None
    return {
        **lora_fields(main, base_name, parts + shared, parameters),
        "rank_pattern": {part: attention.rank for part in parts if attention and attention.rank != main.rank},
        "alpha_pattern": {part: attention.alpha for part in parts if attention and attention.alpha != main.alpha},
    }


def lora_fields(
    lora: Any, base_name: str | None, modules: Sequence[str], parameters: Sequence[str] | None
) -> dict[str, Any]:
    """Returns the fields of adapter_config.json for adapters of one rank and alpha."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "target_parameters": parameters,
    }


def peft_tensors(model: ModelSection, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields each matrix under PEFT's name. `read` returns a tensor of the checkpoint by its logical name. Because values
    are only moved, it may also return another tensor of the same shape, such as the gradient."""
    attention = model.attention_lora
    experts: Any = model.moe.experts
    for layer in range(model.num_layers):
        for target in attention.targets if attention else ():
            for matrix in "ab":
                name = f"{_MODEL}.{layer}.self_attn.{projection_name(target)}.lora_{matrix.upper()}.weight"
                yield name, read(f"layers.{layer}.attention.adapters.{target}.{matrix}")
        for part in PROJECTIONS if _on_shared_expert(model) and layer in model.moe_layers else ():
            for matrix in "ab":
                name = f"{_MODEL}.{layer}.{_SHARED}.{part}_proj.lora_{matrix.upper()}.weight"
                yield name, read(f"layers.{layer}.moe.shared.{part}.adapter.{matrix}")
        if isinstance(experts, AdaptedFFNExpertsSection) and layer in model.moe_layers:
            for target in experts.targets:
                inner = ".base_layer" if target == "gate_up" and "down" in experts.targets else ""
                prefix = f"{_MODEL}.{layer}.mlp.experts{inner}"
                a, b = (torch.stack([read(name) for name in names]) for names in adapter_names(model, layer, target))
                if target == "gate_up" and isinstance(experts, AdaptedClampedFFNExpertsSection):
                    b = b.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # rows of gate and up alternate
                yield f"{prefix}.lora_A.weight", joint("A", a)
                yield f"{prefix}.lora_B.weight", joint("B", b)


def adapter_names(model: ModelSection, layer: int, target: str) -> list[list[str]]:
    """Returns the logical names of one layer's A matrices, one per expert, then the names of its B matrices. The model must
    have one expert group."""
    ((group, section),) = model.moe.groups.items()
    prefix, experts = f"layers.{layer}.moe.experts.{group}", range(section.num_experts)
    if isinstance(model.moe.experts, AdaptedFFNExpertsSection) and model.moe.experts.shared:
        return [[f"{prefix}.adapters.{target}.{matrix}"] * section.num_experts for matrix in "ab"]
    return [[f"{prefix}.{expert}.{target}_{matrix}" for expert in experts] for matrix in "ab"]


def _on_shared_expert(model: ModelSection) -> bool:
    return isinstance(model.moe.experts, AdaptedFFNExpertsSection) and model.moe.experts.shared_expert


def _problems(model: ModelSection) -> list[str]:
    problems: list[str] = []
    if model.moe.experts.over_frozen_ffn:
        problems.append(f"model.moe.experts.kind={model.moe.experts.kind}: PEFT has no router for LoRA experts")
    elif not model.moe.experts.adapts_ffns and any(group.num_experts > 1 for group in model.moe.groups.values()):
        problems.append(
            "model.moe.experts.kind=ffn: with LoRA on the attention alone the routers of a mixture are trained, too, and "
            "they are no adapters"
        )
    if len(model.moe.groups) > 1 or any(group.num_null for group in model.moe.groups.values()):
        problems.append("model.moe.groups: null experts or several groups, which no family of transformers has")
    return problems


def _form_of_base(base: Contents) -> tuple[Form, str | None]:
    """Returns the export form of the base, and the folder from which the base was imported. The folder is None if the
    family has changed since the import."""
    noted, _ = imported_values(base.state.values)
    form = choose_form(checked_config(base).model, tensor_reader(base), noted, must=False)
    said = base.state.values.get(HUGGINGFACE)
    folder = said.get("folder") if isinstance(said, dict) and form.family.name == noted else None
    return form, folder if isinstance(folder, str) else None


def _problems_of_base(model: ModelSection, base: Contents, form: Form) -> list[str]:
    if form.family.layout not in ("plain", "interleaved"):
        reasons = form.reasons or [f"the form {form.family.name} has another layout of layers, or brings its own code"]
        return [f"{base.folder}: PEFT cannot name the layers of this base: {each}" for each in reasons]
    if _on_shared_expert(model) and form.family.shared and form.family.shared.module != _SHARED:
        return [
            f"model.moe.experts.shared_expert=true: PEFT takes {form.family.shared.module}.gate_proj of {form.family.name} "
            "for a routed expert"
        ]
    return []


def _readme(base_name: str | None, base: Contents | Path) -> bytes:
    name = base_name or "BASE"
    told = ["LoRA adapters in PEFT's form, exported by moe_dist."]
    if base_name is None and isinstance(base, Contents):
        told[0] += f" moe_dist made their base; this command writes it for transformers as the folder `{name}`:"
        told += ["", "```console", f"$ moe-dist export-hf {base.folder.absolute()} --out {name}", "```"]
    files = base if isinstance(base, Path) else base.folder.parent / HUGGINGFACE
    tokenizer = name if (files / TOKENIZER_FILE).is_file() else None
    model = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), ".")'
    lines = ["from peft import PeftModel", *run_lines(model, tokenizer=tokenizer)]
    return "\n".join([*told, "", "```python", *lines, "```", ""]).encode()
