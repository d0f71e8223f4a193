"""Arrays of any library on their way to the core, which reads and writes C-contiguous ones in CPU memory, and back.

An array that is contiguous and on the CPU is used itself; any other goes through a copy. Results are arrays of the library that
the argument is from, and where it is: numpy (also for lists and numbers), torch, CuPy, JAX, and whatever speaks DLPack. No
library is imported here before an array of it has come.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from roundel.errors import InvalidArgumentError

__all__ = ["Staged", "stage", "stage_all"]

CPU, CUDA_HOST = 1, 3  # DLPack's device types


class Staged:
    """A caller's array and the buffer that stands for it in the core. This class: numpy's arrays, lists and numbers.

    is_copy: the buffer is nobody else's. device: what ranks compare, -1 for the CPU, else the device's index.
    """

    device = -1

    def __init__(self, array: Any, what: str) -> None:
        self.array, self.what = array, what
        self.buffer, self.is_copy = self.stage()

    def stage(self) -> tuple[Any, bool]:
        given = np.asarray(self.array)
        contiguous = given if given.flags.c_contiguous else given.copy(order="C")
        return contiguous, given is not self.array or contiguous is not given

    def own(self) -> Any:
        """The buffer, or a copy of it, that may be written to without the caller's array changing."""
        return self.buffer if self.is_copy else np.array(self.buffer)

    def give(self, result: Any) -> Any:
        """A result of the core as a new array of the caller's library."""
        return result

    def require_writable(self) -> None:
        """Raise InvalidArgumentError where the caller's array cannot be changed."""
        if not isinstance(self.array, np.ndarray):
            raise InvalidArgumentError(f"{self.what}: expected an array to change in place, got {type(self.array).__name__}")
        if not self.array.flags.writeable:
            raise InvalidArgumentError(f"{self.what}: expected a writable array, got a read-only one")

    def write_back(self) -> Any:
        """The caller's array with what is in the buffer now."""
        if self.is_copy:
            self.array[...] = self.buffer
        return self.array


class _Exchanged(Staged):
    """Of a library that is known by its __dlpack__ only."""

    def stage(self) -> tuple[Any, bool]:
        device, _ = self.array.__dlpack_device__()
        if device not in (CPU, CUDA_HOST):
            raise InvalidArgumentError(
                f"{self.what}: expected an array in CPU memory, or one of torch, CuPy or JAX, "
                f"got {type(self.array).__name__} on a device of DLPack's type {int(device)}"
            )
        return self.array, False

    def own(self) -> Any:
        return np.from_dlpack(self.array).copy()

    def give(self, result: Any) -> Any:
        """Of numpy, where the library does not say (by the array API standard) how to make one of its own."""
        if not hasattr(self.array, "__array_namespace__"):
            return result
        return self.array.__array_namespace__().from_dlpack(result)

    def require_writable(self) -> None:
        """Whether the core may write is said by the exchanged capsule."""


class _Cupy(Staged):
    def stage(self) -> tuple[Any, bool]:
        self.device = self.array.device.id
        return sys.modules["cupy"].asnumpy(self.array, order="C"), True

    def give(self, result: Any) -> Any:
        with self.array.device:
            return sys.modules["cupy"].asarray(result)

    def require_writable(self) -> None:
        """All of them are."""

    def write_back(self) -> Any:
        self.array[...] = self.give(self.buffer)
        return self.array


class _Jax(Staged):
    def stage(self) -> tuple[Any, bool]:
        jax = sys.modules["jax"]
        if isinstance(self.array, jax.core.Tracer):
            raise InvalidArgumentError(f"{self.what}: expected an array with values, got one that is being traced (jax.jit)")
        device = min(self.array.devices(), key=lambda d: d.id)
        self.device = -1 if device.platform == "cpu" else device.id
        return np.ascontiguousarray(self.array).reshape(self.array.shape), False

    def give(self, result: Any) -> Any:
        same_shape = result.shape == self.array.shape
        where = self.array.sharding if same_shape else min(self.array.devices(), key=lambda d: d.id)
        return sys.modules["jax"].device_put(result, where)

    def require_writable(self) -> None:
        raise InvalidArgumentError(f"{self.what}: JAX's arrays cannot be changed in place: use {self.what.rstrip('_')}()")


class _Torch(Staged):
    def stage(self) -> tuple[Any, bool]:
        from roundel.torch import staging  # torch is there: it made the tensor

        self.tensor = staging.stage(self.array, self.what)
        self.device = staging.device_of(self.tensor)
        return self.tensor.buffer, self.tensor.is_copy

    def own(self) -> Any:
        return self.buffer if self.is_copy else self.buffer.clone()

    def give(self, result: Any) -> Any:
        return self.tensor.give(result)

    def require_writable(self) -> None:
        """All of them are."""

    def write_back(self) -> Any:
        return self.tensor.write_back()


def stage(array: Any, what: str, in_place: bool = False) -> Staged:
    """The array, ready for the core. Raises InvalidArgumentError for what is none, or cannot be changed `in_place`."""
    if isinstance(array, np.ndarray):
        staged = Staged(array, what)
    elif _is(array, "torch", "Tensor"):
        staged = _Torch(array, what)
    elif _is(array, "cupy", "ndarray"):
        staged = _Cupy(array, what)
    elif _is(array, "jax", "Array"):
        staged = _Jax(array, what)
    else:
        staged = (_Exchanged if hasattr(array, "__dlpack__") else Staged)(array, what)
    if in_place:
        staged.require_writable()
    return staged


def _is(array: Any, library: str, name: str) -> bool:
    kind = getattr(sys.modules.get(library), name, None)
    return kind is not None and isinstance(array, kind)


def stage_all(arrays: Iterable[Any], what: str, in_place: bool = False) -> list[Staged]:
    """For a grouped operation. Raises InvalidArgumentError unless they are arrays, at least one, and all on one device."""
    if isinstance(arrays, str) or hasattr(arrays, "shape") or not isinstance(arrays, Iterable):
        raise InvalidArgumentError(f"{what}: expected a list of arrays, got {type(arrays).__name__}")
    staged = [stage(array, what, in_place) for array in arrays]
    if not staged:
        raise InvalidArgumentError(f"{what}: expected at least one array, got an empty list")
    if len({s.device for s in staged}) > 1:
        raise InvalidArgumentError(f"{what}: expected arrays of one device, got {sorted({s.device for s in staged})}")
    return staged
