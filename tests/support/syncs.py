"""Counts where the host would wait for a GPU: all reads of a tensor's values by Python, on any device."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
# The shapes of the results depend on values, so on CUDA the host waits. The first operation reads a single number.
OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount", "equal",
       "is_nonzero")  # fmt: skip


class _Ops(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        boolean_repeat = name == "repeat_interleave" and kwargs.get("output_size") is None
        to_host = name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and args[0].device.type != "cpu"
        if name in OPS or boolean_index or boolean_repeat or to_host:
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """Yields the names of the reads within the block, in order. Operations within a read are not counted again."""
    seen: list[str] = []

    def noted(name: str, original: Any) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before = len(seen)
            value = original(self, *args, **kwargs)
            seen[before:] = [name]
            return value

        return read

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, noted(name, getattr(torch.Tensor, name))))
        stack.enter_context(_Ops(seen))
        yield seen
