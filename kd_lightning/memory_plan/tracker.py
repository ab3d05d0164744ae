"""Tracks memory and communication of a step, on real or fake tensors."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ELSEWHERE = "host"  # the kind of memory that is not on the GPU and not in the total
COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the context, tracks every storage from its first use until it is freed.

    Each storage has a kind, which is a free name: "activations" unless `hold` gives another. Two kinds are set here:
    "gathered" for parameters of other ranks and communication buffers, and "gradients" for this rank's shard of
    reduced gradients.

    Args:
        fake: a `FakeTensorMode` in which large floating-point tensors are created; small ones and integers stay real,
            so that control flow that depends on token ids is the same as in a run. None: all tensors are real.
        widths: kinds of matrices that are recognized by their width.

    Attributes:
        now: bytes by kind.
        peak: the largest total so far.
        most: the peak of each kind so far; the peaks of kinds occur at different times.
        collectives: the number of collectives by name.
        collective_bytes: their bytes, of the larger side of each.
    """

    def __init__(self, fake: FakeTensorMode | None = None, widths: Mapping[int, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.widths = fake, dict(widths or {})
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = self.total = 0
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}
        self._resize = torch.UntypedStorage.resize_

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Set the kind of the storages of these tensors."""
        for tensor in tensors:
            self._put(kind, tensor, rename=True)

    def add(self, kind: str, size: int) -> None:
        """Add bytes that no tracked tensor has; a negative size removes them."""
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        if kind != ELSEWHERE:
            self.total += size
            self.peak = max(self.peak, self.total)

    def __enter__(self) -> Tracker:
        """Start tracking."""
        resize, tracker = self._resize, self

        @wraps(resize)
        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            tracker._resized(storage)
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]  # FSDP2 allocates and frees with it
        self.peak, self.most = self.total, Counter(self.now)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        """Stop tracking; the kinds of held storages are kept."""
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and track its outputs."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is dispatched again as operations on the local shards
        kwargs = kwargs or {}
        if active_fake_mode() is not None:
            return func(*args, **kwargs)  # a DTensor infers a shape
        name = func.__name__.split(".")[0]
        if self.fake is None or types or _tensors((args, kwargs)):
            result = func(*args, **kwargs)
        else:
            result = self._create(func, args, kwargs)
        outputs = _tensors(result)
        if name in COLLECTIVES:
            self._add_collective(COLLECTIVES[name], name, args, outputs)
        for tensor in outputs:
            self._put("activations", tensor)
        return result

    def _create(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a factory function: floating-point tensors with dimensions are fake, all others real."""
        assert self.fake is not None
        with self.fake:
            result = func(*args, **kwargs)
        real = isinstance(result, Tensor) and not (result.is_floating_point() and result.ndim)
        return func(*args, **kwargs) if real else result

    def _add_collective(self, kind: str, name: str, args: Any, outputs: list[Tensor]) -> None:
        sides = [*map(_tensors, args[:2]), outputs]
        self.collectives[kind] += 1
        self.collective_bytes[kind] += max(sum(tensor.nbytes for tensor in side) for side in sides)
        if name == "_allgather_base_":
            self.hold("gathered", sides[0])
        if name == "_reduce_scatter_base_":
            self.hold("gradients", sides[0])
            self.hold("gathered", sides[1])

    # -------------------------------------------------------------------------------------------------------- storages
    def _put(self, kind: str, tensor: Tensor, rename: bool = False) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            before, size, reference = self._held[key]
            if rename and before != kind:
                self.add(before, -size)
                self.add(kind, size)
                self._held[key] = (kind, size, reference)
            return
        if not rename and tensor.ndim == 2 and tensor.shape[1] in self.widths:
            kind = self.widths[tensor.shape[1]]
        size = storage.nbytes()
        self._held[key] = (kind, size, weakref.ref(storage, lambda _: self._gone(key)))
        self.add(kind, size)

    def _gone(self, key: int) -> None:
        kind, size, _ = self._held.pop(key)
        self.add(kind, -size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            kind, size, reference = self._held[key]
            self.add(kind, -size)
            kind = "gathered" if kind == "activations" else kind
            self._held[key] = (kind, storage.nbytes(), reference)
            self.add(kind, storage.nbytes())


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this rank holds for these tensors; shared storages are counted once."""
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def format_bytes(size: float) -> str:
    """Bytes with three digits and a binary unit."""
    power = min(int(math.log2(max(abs(size), 1)) // 10), 5)
    number = size / 1024**power
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
    return f"{number:.0f} {unit}" if power == 0 or abs(number) >= 100 else f"{number:.3g} {unit}"
