"""Buffers of rows that live for one exchange: taken before it, given back after it, and used again by the next layer."""

import torch
from torch import Tensor


class RowBuffers:
    """A free list of flat storages, as many as were ever in use at once; each grows to the largest that was asked of it.

    Only what no backward reads may be taken here: rows on their way out, which the collective has read when it ends, and
    rows that arrive to be added to others. A fresh allocation of this size costs the host one page fault for each 4 KiB,
    more than the copy into it; on CUDA the caching allocator would do as well.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """Uninitialised rows [num_rows, D] with the width, dtype and device of `like` [*, D]."""
        width = like.shape[-1]
        num_bytes = num_rows * width * like.element_size()
        for index, storage in enumerate(self._free):
            if storage.device == like.device:
                del self._free[index]
                break
        else:
            storage = torch.empty(0, dtype=torch.uint8, device=like.device)
        if storage.shape[0] < num_bytes:
            storage = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        return storage[:num_bytes].view(like.dtype).view(num_rows, width)

    def give(self, rows: Tensor) -> None:
        """Takes rows back; their values may change from now on."""
        storage = rows.untyped_storage()
        self._free.append(torch.empty(0, dtype=torch.uint8, device=rows.device).set_(storage, 0, (storage.nbytes(),)))  # pyright: ignore

    def clear(self) -> None:
        """Forgets the storages that are free now."""
        self._free.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages that are free now."""
        return sum(storage.untyped_storage().nbytes() for storage in self._free)
