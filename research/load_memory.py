"""`python -m research.load_memory --gigabytes 16` measures the host memory of ranks that read a folder of transformers.

It writes a folder in Qwen3-MoE's form with random weights in fp32, starts ranks with expert parallelism and FSDP2, and
reads the folder as a run does. Counted are anonymous pages (RssAnon): pages of mapped files are the system's, which drops
them when memory is short. As root, each rank is in a control group (cgroup v1) of its own, whose limit on memory counts
both; the system ends a rank that needs more.
"""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.multiprocessing as mp
import typer
from safetensors.torch import save_file

from moe_dist.config.load import load_config
from moe_dist.parallel.mesh import destroy_world, init_world, make_mesh
from moe_dist.plan.preflight import check
from moe_dist.runtime.command_line import print_done, run_command
from moe_dist.train.build.training import EngineContext

PRESET, GIB = "configs/qwen3_moe_transformers_tiny_cpu.yaml", 1 << 30
GROUPS = Path("/sys/fs/cgroup/memory")
HIDDEN, EXPERTS, WIDTH, WORDS = 2048, 64, 768, 4608


def write_folder(folder: Path, layers: int) -> int:
    """Writes the model, one file a layer. Returns its number of bytes."""
    from transformers import Qwen3MoeConfig

    fields: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    fields |= {"num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": WIDTH, "norm_topk_prob": True}
    fields |= {"hidden_size": HIDDEN, "num_hidden_layers": layers, "vocab_size": WORDS, "max_position_embeddings": 256}
    folder.mkdir(parents=True)
    Qwen3MoeConfig(**fields, tie_word_embeddings=False).save_pretrained(folder)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "rest": {
            "model.embed_tokens.weight": (WORDS, HIDDEN),
            "lm_head.weight": (WORDS, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    }
    for layer in range(layers):
        head = f"model.layers.{layer}"
        found: dict[str, Any] = {
            f"{head}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        found |= {f"{head}.self_attn.{name}_norm.weight": (128,) for name in "qk"}
        for name, rows in (("q", 2048), ("k", 512), ("v", 512)):
            found[f"{head}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        found |= {f"{head}.self_attn.o_proj.weight": (HIDDEN, 2048), f"{head}.mlp.gate.weight": (EXPERTS, HIDDEN)}
        for expert in range(EXPERTS):
            own = f"{head}.mlp.experts.{expert}"
            found |= {f"{own}.{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")}
            found[f"{own}.down_proj.weight"] = (HIDDEN, WIDTH)
        shapes[f"layer-{layer}"] = found
    names, total = {}, 0
    for part, found in shapes.items():
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in found.items()}
        save_file(tensors, folder / f"{part}.safetensors")
        names |= dict.fromkeys(tensors, f"{part}.safetensors")
        total += sum(each.numel() * 4 for each in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return total


def anonymous() -> int:
    """Returns this process's anonymous pages in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def join_group(rank: int, limit: int) -> None:
    """Puts this process into a control group with a limit on its memory in bytes, if the system allows it."""
    if os.access(GROUPS, os.W_OK):
        group = GROUPS / f"load_memory_{rank}"
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))


def rank_main(rank: int, ranks: int, folder: str, store: str, limit: int) -> None:
    torch.set_num_threads(1)
    join_group(rank, limit)
    cpu = torch.device("cpu")
    init_world(f"file://{store}", rank=rank, world_size=ranks, device=cpu, timeout=3600.0)
    batch = {"train.global_batch": ranks, "train.micro_batch": 1, "parallel.ep": ranks, "parallel.data": "fsdp2"}
    changes = {"model.folder": folder, "model.family": None, "model.fields": {}, **batch}
    config = load_config(PRESET, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    checked = check(config, world_size=ranks)
    mesh = make_mesh(ep=ranks, device=cpu, timeout=3600.0, ranks_per_node=ranks)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    with config.engine.build(EngineContext(config, checked.manifest, checked.placement, mesh)) as training:
        begin = time.perf_counter()
        training.begin()
        seconds = time.perf_counter() - begin
        done.set()
        model: Any = training.parallel.model
        kept = sum(each.to_local().nbytes if hasattr(each, "to_local") else each.nbytes for each in model.parameters())
    figures = [before / GIB, kept / GIB, anonymous() / GIB, peak[0] / GIB, seconds]
    Path(f"{store}.{rank}.json").write_text(json.dumps(figures))
    destroy_world()


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the folder in GB.")] = 16.0,
    ranks: Annotated[int, typer.Option(help="Number of ranks.")] = 8,
    limit: Annotated[float, typer.Option(help="Limit of a rank's memory in GiB (cgroup v1, as root).")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder of the model, which is deleted.")] = Path(".cache/load_memory"),
    record: Annotated[Path | None, typer.Option(help="JSON file of the figures.")] = None,
) -> None:
    """Measure the memory of ranks that read a large folder."""
    shutil.rmtree(out, ignore_errors=True)
    layers = max(1, round(gigabytes * 1e9 / (4 * EXPERTS * 3 * HIDDEN * WIDTH)))
    try:
        size = write_folder(out / "model", layers)
        given = (ranks, str((out / "model").absolute()), str((out / "store").absolute()), int(limit * GIB))
        mp.spawn(rank_main, given, nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        found = [json.loads((out / f"store.{rank}.json").read_text()) for rank in range(ranks)]
    finally:
        shutil.rmtree(out, ignore_errors=True)
        for group in GROUPS.glob("load_memory_*"):
            group.rmdir()
    columns = ("before", "parameters", "after", "peak", "seconds")
    largest = {name: round(max(column), 3) for name, column in zip(columns, zip(*found, strict=True), strict=True)}
    over = max(peak - before - kept for before, kept, _, peak, _ in found)
    limited = limit if os.access(GROUPS, os.W_OK) else None
    figures: dict[str, Any] = {"folder_gb": round(size / 1e9, 2), "ranks": ranks, "limit_gib": limited}
    figures |= {"largest_gib": largest, "over_parameters_gib": round(over, 3)}
    if record is not None:
        record.write_text(json.dumps(figures, indent=1) + "\n")
    print_done(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_command(main)
