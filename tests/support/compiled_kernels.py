"""Compiles each Triton kernel for a GPU architecture without a GPU, and prints as JSON what ptxas reports.

Usage: python -m tests.support.compiled_kernels 80 90 100.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from moe_dist.model.kernels.cross_entropy import BLOCK, cross_entropy_backward_kernel, cross_entropy_kernel
from moe_dist.model.kernels.norm_rotary import norm_rotary_backward_kernel, norm_rotary_kernel
from moe_dist.model.kernels.norm_rotary import sizes as row_sizes
from moe_dist.moe.kernels.choose import choose_backward_kernel, choose_kernel
from moe_dist.moe.kernels.expert_choice import TINY, candidates_kernel, sums_kernel, take_kernel
from moe_dist.moe.kernels.plan import arrive_kernel, collect_kernel, count_kernel, place_kernel, scan_kernel
from moe_dist.moe.kernels.rows import gather_rows_kernel, row_sum_kernel
from moe_dist.moe.kernels.swiglu import swiglu_backward_kernel, swiglu_kernel

WIDTH = {"BLOCK": 1024}
WIDE = {"D": 2048, **WIDTH}
FFN = {"F": 1536, "ROW": 3072, "UP": 1536, **WIDTH}  # F is no multiple of the block
TOP_8 = {"C": 64, "E": 64, "K": 8, "AMONG": 0, "ROWS": 16, "COLUMNS": 64, "CHOICES": 8}
NULLS = {"C": 16, "E": 8, "K": 3, "AMONG": 1, "ROWS": 64, "COLUMNS": 16, "CHOICES": 4}
MANY = {"C": 300, "E": 256, "K": 8, "AMONG": 1, "ROWS": 2, "COLUMNS": 512, "CHOICES": 8}
CHOOSE = (
    "logits:*fp32 group_T:*i64 group_of_column:*i64 top_k:*i64 scale:fp32 choice:*i64 token:*i64 expert:*i64 weight:*fp32 "
    "sums:*fp32 T:i32"
)
CHOOSE_BACKWARD = (
    "logits:*fp32 group_T:*i64 group_of_column:*i64 top_k:*i64 scale:fp32 choice:*i64 grad_weight:*fp32 grad_prob:*fp32 "
    "grad_square:*fp32 out:*fp32 T:i32"
)
KERNELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "gather": (gather_rows_kernel, "table:*bf16 index:*i64 out:*bf16", WIDE),
}
for order in ("i64", "i32"):  # the integer types of sorts and plan kernels
    for words, base, both in (("pairs", False, False), ("rows", True, False), ("gradients of gate and up", False, True)):
        arguments = f"own:*bf16 received:*bf16 base:*bf16 order:*{order} first:*i32 out:*bf16 num_own:i32"
        KERNELS[f"sum of {words}, {order}"] = (row_sum_kernel, arguments, {**WIDE, "HAS_BASE": base, "BOTH": both})
for words, layout in (("one tensor", FFN), ("two tensors", {**FFN, "ROW": FFN["F"], "UP": 0})):
    KERNELS[f"swiglu, {words}"] = (swiglu_kernel, "weight:*fp32 gate:*bf16 up:*bf16 out:*bf16", layout)
    KERNELS[f"swiglu backward, {words}"] = (
        swiglu_backward_kernel,
        "grad:*bf16 weight:*fp32 gate:*bf16 up:*bf16 grad_weight:*fp32 grad_gate:*bf16 grad_up:*bf16",
        layout,
    )
for words, sizes in (("top 8 of 64", TOP_8), ("null columns", NULLS), ("many columns", MANY)):
    KERNELS[f"choose, {words}"] = (choose_kernel, CHOOSE, {**sizes, "G": 2, "CHOSEN": False})
    KERNELS[f"choose backward, {words}"] = (choose_backward_kernel, CHOOSE_BACKWARD, sizes)

CHOICE = "logits:*fp32 group_T:*i64 group_of_expert:*i64"
for words, experts, groups in (("8 experts", 8, 2), ("300 experts", 300, 1)):
    columns = triton.next_power_of_2(experts)
    sizes = {"E": experts, "ROWS": 1024 // columns, "COLUMNS": columns}
    KERNELS[f"experts choose: candidates, {words}"] = (
        candidates_kernel,
        f"{CHOICE} out:*fp32 counts:*i64 T:i32",
        sizes,
    )
    KERNELS[f"experts choose: take, {words}"] = (
        take_kernel,
        "logits:*fp32 order:*i64 order_of_scores:*i64 capacity:*fp64 candidates:*i64 taken:*u8 kth_score:*fp32 T:i32",
        sizes,
    )
    KERNELS[f"experts choose: sums, {words}"] = (
        sums_kernel,
        f"{CHOICE} threshold:*fp32 taken:*u8 sums:*fp32 T:i32",
        {**sizes, "G": groups, "TINY": TINY},
    )

LISTS = "own:*i32 arrived:*i32 runs:*i64"
KERNELS["plan: scan"] = (
    scan_kernel,
    "counts:*i32 column_M:*i64 starts:*i32 totals:*i32 message:*i64 B:i32",
    {"BLOCK": 256},
)
KERNELS["plan: arrive"] = (arrive_kernel, f"{LISTS} order:*i64 row:*i64 num_own:i32 X:i32 H:i32", {"BLOCK": 256})
for words, experts, ranks, choices in (("64 experts", 64, 8, 8), ("300 experts", 300, 64, 8), ("8 experts", 8, 8, 3)):
    bins, places = triton.next_power_of_2(experts), triton.next_power_of_2(ranks)
    sizes = {"K": choices, "W": ranks, "E": experts, "ROWS": 1024 // bins, "BINS": bins, "PLACES": places}
    tables = "expert:*i64 place_E:*i64 bin_E:*i64"
    KERNELS[f"plan: count, {words}"] = (count_kernel, f"{tables} counts:*i32 T:i32 B:i32", sizes)
    lists = "starts:*i32 totals:*i32 pair:*i64 index:*i32 token:*i64 order:*i32 first:*i32 T:i32 B:i32"
    KERNELS[f"plan: place, {words}"] = (place_kernel, f"{tables} {lists}", sizes)
    slots = triton.next_power_of_2(-(-experts // ranks))
    KERNELS[f"plan: collect, {words}"] = (
        collect_kernel,
        f"{LISTS} order:*i32 first:*i32 num_own:i32 X:i32 H:i32 steps:i32 R:i32",
        {"ROWS": 512 // slots, "SLOTS": slots},
    )

ROWS = "weight:*bf16 cos:*fp32 sin:*fp32 out:*bf16"
for words, heads, width, weights, angles, adjacent in (
    ("norm, 128", 1, 128, 128, 0, False),
    ("norm, 2048", 1, 2048, 2048, 0, False),
    ("norm, 7168", 1, 7168, 7168, 0, False),
    ("rotate, halves", 16, 128, 0, 64, False),
    ("rotate, part of a head", 16, 192, 0, 32, False),
    ("rotate, neighbours", 16, 128, 0, 64, True),
    ("normed rotary, 16 heads", 16, 128, 2048, 64, False),
    ("normed rotary, 64 heads, each", 64, 128, 128, 64, False),
    ("normed rotary, 3 heads, neighbours", 3, 80, 240, 40, True),
):
    weight, cos = (torch.empty(size) if size else None for size in (weights, angles))
    constants = row_sizes(torch.empty(1, heads, width), weight, cos, adjacent)
    flags = {"NORM": weights > 0, "SIGN": 1.0, "REST": 128 if width > 2 * constants["HALF"] else 0}
    for wide in (False, True) if not angles else (False,):
        name = f"{words}{', for the router' * wide}"
        KERNELS[name] = (
            norm_rotary_kernel,
            f"x:*bf16 {ROWS} wide:*fp32 eps:fp32 M:i32",
            {**constants, **flags, "WIDE": wide},
        )
        if weights:
            KERNELS[f"backward of {name}"] = (
                norm_rotary_backward_kernel,
                f"grad:*bf16 grad_wide:*fp32 x:*bf16 {ROWS} sums:*fp32 eps:fp32 M:i32 steps:i32",
                {**constants, "WIDE": wide},
            )
LOSS = {"V": 50304, "BLOCK": BLOCK}
KERNELS["cross entropy"] = (cross_entropy_kernel, "logits:*bf16 label_T:*i64 loss:*fp32 log_z:*fp32", LOSS)
KERNELS["cross entropy backward"] = (
    cross_entropy_backward_kernel,
    "logits:*bf16 label_T:*i64 log_z:*fp32 grad:*fp32 out:*bf16",
    LOSS,
)


def report(kernel: Any, arguments: str, constants: dict[str, Any], architecture: int) -> dict[str, int]:
    """Returns the number of registers per thread, the spilled bytes, and the bytes of shared memory per block."""
    signature = dict(each.split(":") for each in arguments.split())
    options = {"num_warps": constants.get("num_warps", 4)}
    constants = {name: value for name, value in constants.items() if name != "num_warps"}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] == "*"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = re.search(r"\.target (\S+?)[,\s]", made.asm["ptx"])
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {name: re.search(rf"(\d+) {words}", text) for name, words in WORDS.items()}
    return {name: int(match[1]) if match else 0 for name, match in found.items()} | {
        "vectors": len(re.findall(r"(?:ld|st)\.global\.\S*v4", made.asm["ptx"])),
        "shared": made.metadata.shared,
    }


WORDS = {
    "registers": "registers",
    "stores": "bytes spill stores",
    "loads": "bytes spill loads",
    "stack": "bytes stack frame",
}

if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(json.dumps({name: report(*kernel, architecture=int(each)) for name, kernel in KERNELS.items()}))
