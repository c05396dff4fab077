"""Runs megatron-core on CPU with gloo, for trials (engine.cpu_trial), measurements and tests. Stand-ins replace CUDA's
functions.

    with megatron_on_cpu(), model_parallel(ep=2):
        ...                                       # Megatron builds, computes and communicates on CPU tensors

megatron-core has no CPU path: it asks `torch.cuda` for devices, streams and random states, makes tensors on "cuda", and
compares `Tensor.type()` with CUDA's names. Inside the context, CUDA's names refer to stand-ins. They are restored on exit.
A stand-in for a stream does nothing, because a CPU executes in order. Functions that Megatron passes to torch.compile stay
uncompiled. Numerical results are right, but measured times are CPU times.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

CPU = torch.device("cpu")


class Replacement(NamedTuple):
    """An attribute `name` of `owner` that has the value `value` inside the context."""

    owner: Any
    name: str
    value: Any


class Idle:
    """Stands in for CUDA streams and events. A CPU executes in order, so streams never wait and events are complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def __enter__(self) -> "Idle":
        return self

    def record_event(self, event: Any = None) -> Any:
        return event or Idle()

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a tensor constructor such as `torch.empty`, so that `device="cuda..."` allocates on the CPU."""

    def constructor(*arguments: Any, **options: Any) -> Any:
        if "cuda" in str(options.get("device")):
            options["device"] = CPU
        options.pop("pin_memory", None)  # the tensors stay in CPU memory, so pinning is useless
        return make(*arguments, **options)

    return constructor


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Replaces `torch.compile`: returns the function uncompiled or, without a function, a decorator that does so."""
    return function or (lambda decorated: decorated)


def _typed_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `Tensor.type()` return "torch.cuda.FloatTensor", because Megatron's optimizers compare with that name."""

    def type_of(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        answer = original(self, *arguments, **options)
        return answer if arguments or options else answer.replace("torch.", "torch.cuda.", 1)

    return type_of


def _stay(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Stands in for Megatron's `maybe_move_tensor_to_cpu`, which skips CPU tensors. Converts to numpy if `as_numpy`."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def cuda_replacements() -> Sequence[Replacement]:
    """Returns the attributes of torch that must be replaced, with their values."""
    stream = Idle()
    cuda: dict[str, Any] = {
        "current_device": _returning(CPU),
        "current_stream": _returning(stream),
        "default_stream": _returning(stream),
        "stream": _returning(contextlib.nullcontext()),
        "set_stream": _returning(None),
        "set_device": _returning(None),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "is_current_stream_capturing": _returning(False),
        "memory_allocated": _returning(0),
        "max_memory_allocated": _returning(0),
        "get_device_capability": _returning((0, 0)),
        "get_device_properties": _returning(
            SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1)
        ),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Stream": Idle,
        "Event": Idle,
        **{name: getattr(torch, name) for name in ("FloatTensor", "IntTensor", "LongTensor")},
    }
    constructors = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like", "rand",
                    "randn")  # fmt: skip
    return [
        *(Replacement(torch.cuda, name, value) for name, value in cuda.items()),
        *(Replacement(torch, name, _on_cpu(getattr(torch, name))) for name in constructors),
        # Megatron wraps fused functions in torch.compile at import. This would load the whole compiler: 10 s per process.
        Replacement(torch, "compile", _uncompiled),
        Replacement(torch, "Stream", Idle),
        Replacement(torch.Tensor, "cuda", lambda self, *_, **__: self),
        Replacement(torch.Tensor, "type", _typed_as_cuda(torch.Tensor.type)),
        Replacement(torch.nn.Module, "cuda", lambda self, *_, **__: self),
    ]


def megatron_replacements() -> Sequence[Replacement]:
    """Returns the attributes of megatron-core that must be replaced. Replace torch's attributes before calling this."""
    random, moe, dispatchers = (
        importlib.import_module(f"megatron.core.{name}")
        for name in ("tensor_parallel.random", "transformer.moe.moe_utils", "transformer.moe.token_dispatcher")
    )
    return [
        Replacement(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        Replacement(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        Replacement(dispatchers, "maybe_move_tensor_to_cpu", _stay),
        # megatron-core 0.16.1 defines this name only if TransformerEngine is installed, but reads it in every router.
        Replacement(moe, "te_general_gemm", getattr(moe, "te_general_gemm", None)),
    ]


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[Sequence[Replacement]]:
    """Makes it possible to import, build and run megatron-core on the CPU inside the context. Yields the replacements."""
    replaced: list[Replacement] = []
    with torch.device("meta"):
        torch.empty(0)  # torch lists its constructors once; with stand-ins in the list, `with torch.device` has no effect
    with contextlib.ExitStack() as stack:
        for replacements in (cuda_replacements, megatron_replacements):
            for each in replacements():
                stack.enter_context(mock.patch.object(each.owner, each.name, each.value, create=True))
                replaced.append(each)
        yield replaced
