"""What gradients look like on the wire. 16-bit sums accumulate in float32, so a compressed all-reduce rounds twice."""

from __future__ import annotations

import torch

__all__ = ["Compression", "Compressor"]


class Compressor:
    """compress() before a collective, decompress() after it. wire_dtype(dtype): what a tensor of `dtype` travels as."""

    wire: torch.dtype | None = None

    @classmethod
    def wire_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """`dtype` itself unless it is a wider floating type than the wire's."""
        wider = cls.wire is not None and dtype.is_floating_point and dtype.itemsize > cls.wire.itemsize
        return cls.wire if wider else dtype

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """The tensor to send, and what decompress() needs to know."""
        if cls.wire is None:
            return tensor, tensor.dtype
        return tensor.to(cls.wire_dtype(tensor.dtype)), tensor.dtype

    @classmethod
    def decompress(cls, tensor: torch.Tensor, context: torch.dtype) -> torch.Tensor:
        """The received tensor in its first dtype."""
        return tensor if tensor.dtype == context else tensor.to(context)


class _None(Compressor):
    pass


class _FP16(Compressor):
    wire = torch.float16


class _BF16(Compressor):
    wire = torch.bfloat16


class Compression:
    """The choices: none, fp16 (10 bits of mantissa, up to 65504), bf16 (7 bits, float32's range)."""

    none = _None
    fp16 = _FP16
    bf16 = _BF16
