"""Simulates CUDA tensors without a GPU. Fake tensors have shapes, dtypes and devices, but no values and no memory.

`preloaded` returns the environment of a process in which autograd accepts fake CUDA tensors; `preloaded` needs a C++
compiler. In this process, `stand_ins` replaces calls of the CUDA driver, and `Recorder` counts each operation on a fake
CUDA tensor.
"""

import ctypes
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dist.errors import ResourceError
from moe_dist.megatron.cpu_trial import Idle
from research.fake_gpu.live_memory import LiveMemory

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
# Operations that launch no kernel: allocations, and changes of metadata. Views and queries of a tensor launch none, either.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach_", "record_stream", "resize_", "set_", "squeeze_", "unsqueeze_"),
    *("unsafe_split", "_assert_tensor_metadata", "_unsafe_view"),
}
COPIES = ("_to_copy", "copy_")
# In-place operations that do not read their target. All other in-place operations read their target. Names may also begin
# with `_foreach_`.
WRITE_ONLY = {"copy_", "fill_", "index_copy_", "zero_"}
PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "_grouped_mm": 0}  # index of the argument that is the first factor
# Pairs (operation, argument) in which the schema says that the operation writes the argument, although it does not. AdamW
# writes gradients only if there is a gradient scale.
UNCHANGED = {("_fused_adamw_", "grads")}
WAIT_SECONDS = 1e-3  # seconds between any two fake CUDA events


def preloaded() -> dict[str, str]:
    """Returns the environment variables of a process that simulates a CUDA device. The first call compiles a library,
    which takes 5 s of CPU time. Raises ResourceError if the C++ compiler is missing, or if the compilation fails."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    home = Path(spec.origin).parent
    key = sha256(f"{torch.__version__} {home} {SOURCE.read_text()}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_dist"
    library = cache / f"fake_cuda_{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        # The library must have the ABI of torch's wheels. With another ABI, std::string has other names in the symbols
        # that the library needs.
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = ["-std=c++20", "-O0", "-shared", "-fPIC", abi, *includes, str(SOURCE), "-o", str(partial), *libraries]
        compiler = os.environ.get("CXX", "c++")
        try:
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            raise ResourceError(
                f"counting without a GPU compiles {SOURCE.name} by the C++ compiler {compiler!r} (CXX), which failed: "
                f"{detail.strip()[-300:]}; install g++ or set CXX"
            ) from error
        partial.rename(library)  # atomic, because several processes may compile at once
    return {**os.environ, "LD_PRELOAD": str(library)}


def enter() -> None:
    """Prepares this process, which must have been started with `preloaded`, for backward passes over fake CUDA tensors."""
    ctypes.CDLL(None).stand_in()
    torch.autograd.set_multithreading_enabled(False)  # a dispatch mode acts in one thread only


class Work(NamedTuple):
    """One operation. `kind` is "gemm", "grouped" or "attention" for matrix products, else "copy". For products of fp32
    numbers, "fp32" is appended to the kind. `rows` is the number of rows of an expert in a grouped product. In other
    products it is the median of the three sizes, because the time of a narrow product depends on its bytes. `num_bytes`
    is the number of bytes read or written."""

    part: str
    phase: str
    kind: str
    rows: int
    flops: int
    num_bytes: int


class Sent(NamedTuple):
    """One collective. `num_bytes` is the number of bytes that this rank sends to other ranks, or receives from them, if
    that number is larger. For sums along a ring, it is the number of sent bytes. `ranks` is 0 if the tensors do not show
    the number of ranks. `whole` is true for integer tensors."""

    part: str
    phase: str
    name: str
    ranks: int
    num_bytes: int
    whole: bool


class Recorder(TorchDispatchMode):
    """Counts operations on fake CUDA tensors for each `part` and `phase`. The caller sets these two attributes.

    Attributes:
        work, sent: How often each operation, and each collective, occurred.
        kernels, num_bytes: Number of launched kernels, and number of bytes that they read and write, by (part, phase).
        collectives: Number of collectives by (part, phase, name).
        syncs: How often the host waits for the device, by (phase, name or source line).
        copies: Number of copies between host and device on which the host waits, by (phase, source line).
        mixed: Source lines of operations with both CPU and CUDA tensors.
        sorted_sums: Number of backward passes of indexing, by part. On CUDA each of them sorts, to add without atomics.
        memory: Bytes of live tensors, by (part, phase).
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.phase = "other", "build"
        self.work: Counter[Work] = Counter()
        self.sent: Counter[Sent] = Counter()
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        self.collectives: Counter[tuple[str, str, str]] = Counter()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.mixed: Counter[str] = Counter()
        self.sorted_sums: Counter[str] = Counter()
        self.order: list[str] = []
        self.memory = LiveMemory()
        self.inside: tuple[str, int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, place = func.overloadpacket.__name__, (self.part, self.phase)
        taken = _tensors((args, kwargs))
        made = _tensors(out)
        tensors = [*taken, *(each for each in made if not any(each is other for other in taken))]
        on_device = [each for each in tensors if each.device.type == "cuda"]
        if not on_device:
            return out
        self.memory.note(on_device, place)
        if func.namespace == "c10d":
            self.collectives[(*place, name)] += 1
            self.sent[Sent(*place, name, *_sent(name, args))] += 1
            self.order.append(name)
            return out
        question = func._schema.returns and not made
        empty = not any(each.numel() for each in on_device)  # torch launches nothing for empty tensors
        if func.is_view or question or name in FREE or empty:
            return out
        on_host = [each for each in tensors if each.device.type == "cpu" and (each.dim() or name in COPIES)]
        if on_host and name in COPIES:
            queued = (kwargs or {}).get("non_blocking", len(args) > 2 and bool(args[2]))
            self.copies[self.phase, source_line()] += not queued
        elif on_host:
            self.mixed[f"{name} at {source_line()}"] += 1
        if name in ("index_put", "index_put_", "_index_put_impl_") and self.phase == "backward":
            self.sorted_sums[self.part] += 1
        self.kernels[place] += 1
        moved = sum(each.nbytes for each in (*on_device, *_changed(func, args, kwargs or {})))
        self.num_bytes[place] += moved
        self.work[Work(*place, *(self.inside or _product(name, args)), moved)] += 1
        return out

    @contextmanager
    def computing(self, kind: str, flops: int) -> Iterator[None]:
        """Gives all operations inside the context this kind and these FLOPs, because they simulate another kernel."""
        self.inside = (kind, 0, flops)
        try:
            yield
        finally:
            self.inside = None

    def read(self, name: str) -> None:
        """Counts one wait of the host for a value."""
        self.syncs[self.phase, name] += 1


def source_line() -> str:
    """Returns the innermost line of moe_dist on the call stack."""
    ours = [each for each in traceback.extract_stack() if f"{os.sep}moe_dist{os.sep}" in each.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"


def _tensors(values: Any) -> list[Tensor]:
    """Returns the tensors in `values`; for a sharded tensor, this rank's shard."""
    found = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
    return [each._local_tensor if isinstance(each, DTensor) else each for each in found]


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the tensors on the device that an operation both reads and changes."""
    name = func.overloadpacket.__name__
    if name.removeprefix("_foreach_") in WRITE_ONLY:
        return []
    found = []
    for place, argument in enumerate(func._schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
        if writes and (name, argument.name) not in UNCHANGED:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return [each for each in found if each.device.type == "cuda"]


def _product(name: str, args: Any) -> tuple[str, int, int]:
    """Returns the values of `Work.kind`, `Work.rows` and `Work.flops` for an operation."""
    if name not in PRODUCTS:
        return "copy", 0, 0
    first, second = args[PRODUCTS[name] :][:2]
    rows, inner, columns = first.shape[-2], first.shape[-1], second.shape[-1]
    if name == "_grouped_mm":  # [Q, D] by [E, D, F] in forward, [D, Q] by [Q, F] for weight gradients
        pairs, experts = (rows, second.shape[0]) if second.dim() == 3 else (inner, args[2].shape[0])
        return "grouped", pairs // max(1, experts), 2 * rows * inner * columns
    times = first.shape[0] if name == "bmm" else 1
    kind = "gemm" if first.element_size() < 4 else "gemm fp32"
    return kind, sorted((rows, inner, columns))[1], 2 * times * rows * inner * columns


def _sent(name: str, args: Any) -> tuple[int, int, bool]:
    """Returns the number of ranks, the bytes and `whole` (see `Sent`) of a collective. The first arguments of the
    collective must be its output and its input."""
    tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
    sizes = [each.nbytes for each in tensors]
    whole = not tensors[0].is_floating_point()
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return max(sizes) // max(1, min(sizes)), max(sizes) - min(sizes), whole
    return 0, 2 * sum(sizes) if name == "allreduce_" else max(sizes), whole


class _Event(Idle):
    def elapsed_time(self, _: Any) -> float:
        return WAIT_SECONDS * 1e3


class _OneKernel(torch.autograd.Function):
    """An operation that counts as one kernel in forward and, as on CUDA, as one kernel per input in backward. On the
    host, torch would split the operation into several operations."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(like, *inputs)
        return torch.ops.aten.sigmoid(like)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.ops.aten.sigmoid(each) for each in ctx.saved_tensors)


class _Attention(_OneKernel):
    """Attention as one kernel in forward and three kernels in backward, without the blocks above the diagonal."""

    @staticmethod
    def forward(ctx: Any, recorder: "Recorder", *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = inputs
        ctx.recorder, ctx.flops = recorder, q.numel() // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        with recorder.computing("attention", ctx.flops):
            return _OneKernel.forward(ctx, *inputs)[..., : v.shape[-1]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with ctx.recorder.computing("attention", ctx.flops * 5 // 6):  # 5 / 2 of forward's products, in 3 kernels
            return None, *_OneKernel.backward(ctx, gradient)


def _reads(recorder: Recorder) -> Iterator[tuple[str, Any]]:
    answers = {
        "tolist": lambda tensor: np.zeros(tuple(tensor.shape)).tolist(),
        "item": lambda tensor: 1.0 if tensor.is_floating_point() else 0,
        "numpy": lambda tensor: np.zeros(tuple(tensor.shape)),
        "cpu": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype),
        "__bool__": lambda _: False,
        "__int__": lambda _: 0,
        "__float__": lambda _: 1.0,
        "__index__": lambda _: 0,
    }
    for name, answer in answers.items():
        real = getattr(Tensor, name)

        def read(
            self: Tensor, *args: Any, _name: str = name, _answer: Any = answer, _real: Any = real, **named: Any
        ) -> Any:
            if not isinstance(self, FakeTensor):
                return _real(self, *args, **named)
            if self.device.type == "cuda":
                recorder.read(source_line())
            return _answer(self)

        yield name, read


@contextmanager
def stand_ins(recorder: Recorder) -> Iterator[None]:
    """Removes calls of the CUDA driver. Replaces reads of fake values by zeros, and lets `recorder` count these reads.
    Norm and attention become one kernel each, as on a GPU."""
    from moe_dist.model import attention, transformer
    from moe_dist.moe import kernel_choice

    stream, real_backward = Idle(), Tensor.backward

    def backward(self: Tensor, *args: Any, **named: Any) -> None:
        recorder.phase, recorder.part = "backward", "loss"
        real_backward(self, *args, **named)
        recorder.phase = recorder.part = "step"

    cuda = {
        "Stream": Idle,
        "Event": _Event,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "device_count": lambda: 8,
        "get_device_capability": lambda device=None: (9, 0),
        "set_device": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: recorder.read(source_line()),
    }
    tensor = {
        **dict(_reads(recorder)),
        "backward": backward,
        "pin_memory": lambda self, *_: self,
        "is_pinned": lambda self, *_: False,
    }
    accelerator = {"current_stream": cuda["current_stream"]}
    functions = {
        "rms_norm": lambda x, _, *weight, **__: _OneKernel.apply(x, *(each for each in weight if isinstance(each, Tensor)))
    }
    with ExitStack() as stack:
        stack.enter_context(recorder.memory.resizes())
        fake = {"tolist": tensor["tolist"]}  # a fake tensor's `tolist` would read numbers one by one
        replaced = (
            (torch.cuda, cuda),
            (torch.accelerator, accelerator),
            (Tensor, tensor),
            (FakeTensor, fake),
            (torch.nn.functional, functions),
        )
        for owner, names in replaced:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.object(attention, "attend", lambda q, k, v, *_: _Attention.apply(recorder, q, k, v)))
        stack.enter_context(mock.patch.object(transformer, "make_mask", attention.dense_mask))
        stack.enter_context(mock.patch.object(kernel_choice, "why_differ", return_value=None))  # fake values differ
        yield


def child(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` in a process with fake CUDA. The result has the output and the exit code."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=preloaded(), cwd=root, capture_output=True, text=True, check=False
    )
