"""Counts the bytes of live tensors on a fake device, for each part of the model and each phase."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Place = tuple[str, str]


class LiveMemory:
    """Counts the bytes of each storage, from the first `note` of a tensor with this storage until Python frees the
    storage. Freed bytes are subtracted at `place`, the (part, phase) of the last `note`.

    Attributes:
        grown: Bytes allocated minus bytes freed, by (part, phase).
        most: The largest number of live bytes in each (part, phase).
        layer: Index of the running layer, which the caller sets. Outside the layers, the index of the last layer that ran.
        layer_of_most: For each (part, phase), the value of `layer` when `most` was reached.
    """

    def __init__(self) -> None:
        self.place: Place = ("other", "build")
        self.live = 0
        self.grown: Counter[Place] = Counter()
        self.most: Counter[Place] = Counter()
        self.layer = 0
        self.layer_of_most: dict[Place, int] = {}
        self._sizes = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Empties `grown` and `most`; `live` keeps its value."""
        self.grown.clear()
        self.most.clear()

    def note(self, tensors: Iterable[Tensor], place: Place) -> None:
        """Counts the storages of an operation's tensors. New storages count as allocated at `place` (part, phase)."""
        self.place = place
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._sizes:
                size = self._sizes[storage] = [0]
                self._change(size, storage.nbytes())
                weakref.finalize(storage, self._change, size, 0)
        if self.live > self.most[place]:
            self.most[place], self.layer_of_most[place] = self.live, self.layer

    def _change(self, size: list[int], num_bytes: int) -> None:
        self.live += num_bytes - size[0]
        self.grown[self.place] += num_bytes - size[0]
        size[0] = num_bytes

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Follows storages that are resized, as FSDP2 does for gathered parameters."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, num_bytes: int) -> None:
            real(storage, num_bytes)
            if storage in self._sizes:
                self._change(self._sizes[storage], num_bytes)

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield
