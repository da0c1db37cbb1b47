"""CUtensorMap: what TMA needs to know of a tensor, encoded by the driver and kept.

Encoding takes microseconds and a launch should not, so maps are kept by everything that goes into them. A map holds an
address, not a tensor: the same address, sizes and strides make the same map, whichever tensor stands there.
"""

from __future__ import annotations

import ctypes
import enum
from functools import cache, lru_cache
from typing import Any

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.jit.driver import bind_context, checked, driver, is_invalid_context
from megamoe.kernels.jit.structs import TensorMap


class Swizzle(enum.IntEnum):
    """CUtensorMapSwizzle: how 16-byte chunks of a row are permuted in shared memory."""

    NONE = 0
    B32 = 1
    B64 = 2
    B128 = 3


class Promotion(enum.IntEnum):
    """CUtensorMapL2promotion: bytes that L2 fetches for a miss."""

    NONE = 0
    B64 = 1
    B128 = 2
    B256 = 3


# CUtensorMapDataType. FP8 travels as bytes; TMA computes on neither.
_DATA_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.float8_e8m0fnu: 0,
    torch.int32: 3,
    torch.int64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLE_BYTES = {Swizzle.B32: 32, Swizzle.B64: 64, Swizzle.B128: 128}


def tensor_map(
    tensor: torch.Tensor,
    box: tuple[int, ...],
    *,
    swizzle: Swizzle = Swizzle.B128,
    promotion: Promotion = Promotion.B128,
) -> TensorMap:
    """Map of ``tensor`` as it lies in memory, in boxes of ``box`` elements (outermost first, like ``shape``).

    Elements of a box beyond the tensor's end read as 0 and are not written. Assign the result to a ``TensorMap`` field
    of the kernel's arguments.

    Raises:
        ValueError: what TMA cannot do: more than 5 dimensions, an innermost stride other than 1, an address or outer
            stride off 16 bytes, a box beyond 256 a dimension, or wider than the swizzle.
    """
    return encode(
        tensor.data_ptr(),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        box=box,
        swizzle=swizzle,
        promotion=promotion,
    )


@lru_cache(maxsize=65536)
def encode(
    address: int,
    *,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: Swizzle = Swizzle.B128,
    promotion: Promotion = Promotion.B128,
) -> TensorMap:
    """``tensor_map`` for memory that no tensor stands for; ``strides`` in elements, outermost first."""
    _check(address, dtype=dtype, shape=shape, strides=strides, box=box, swizzle=swizzle)
    rank, item = len(shape), dtype.itemsize
    # The driver counts from the innermost dimension and takes outer strides in bytes.
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
    outer = (ctypes.c_uint64 * max(rank - 1, 1))(*(s * item for s in reversed(strides[:-1])))
    boxes = (ctypes.c_uint32 * rank)(*reversed(box))
    steps = (ctypes.c_uint32 * rank)(*([1] * rank))
    # The driver writes only to 64-byte aligned memory, which ctypes does not promise.
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    aligned = TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)
    function, kind = _encode_function(), _DATA_TYPES[dtype]
    facts = (kind, rank, address, sizes, outer, boxes, steps, 0, swizzle, promotion, 0)
    status = function(ctypes.byref(aligned), *facts)
    if is_invalid_context(status):
        bind_context(torch.cuda.current_device())
        status = function(ctypes.byref(aligned), *facts)
    checked(
        (driver().CUresult(status),),
        f"encoding a TMA map of {dtype} {list(shape)} with strides {list(strides)} and box {list(box)}",
    )
    return TensorMap.from_buffer_copy(aligned)


def _check(
    address: int,
    *,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: Swizzle,
) -> None:
    """Refuse in a sentence what the driver would refuse with a number."""
    if dtype not in _DATA_TYPES:
        raise ValueError(f"TMA has no data type for {dtype}")
    if not 1 <= len(shape) <= 5 or not len(shape) == len(strides) == len(box):
        raise ValueError(f"TMA takes 1 to 5 dimensions and a box of as many, got shape {shape} and box {box}")
    if min(shape) < 1:
        raise ValueError(f"TMA cannot map an empty tensor, got shape {shape}")
    item = dtype.itemsize
    if strides[-1] != 1 and shape[-1] != 1:
        raise ValueError(f"TMA needs an innermost stride of 1, got strides {strides}")
    if address % 16:
        raise ValueError(f"TMA needs an address divisible by 16, got {address:#x}")
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if stride * item % 16 or stride * item >= 2**40:
            raise ValueError(
                f"TMA needs strides divisible by 16 bytes, got {stride} elements of {item} bytes (size {size})"
            )
    if any(not 1 <= extent <= 256 for extent in box):
        raise ValueError(f"TMA takes boxes of 1 to 256 elements in each dimension, got {box}")
    if box[-1] * item % 16:
        raise ValueError(f"TMA needs a box of a multiple of 16 bytes innermost, got {box[-1]} elements of {item} bytes")
    if swizzle and box[-1] * item > _SWIZZLE_BYTES[swizzle]:
        limit = _SWIZZLE_BYTES[swizzle]
        raise ValueError(f"a box of {box[-1] * item} bytes innermost is wider than its swizzle of {limit} bytes")


@cache
def _encode_function() -> Any:
    """``cuTensorMapEncodeTiled`` through ctypes: the bindings' CUtensorMap is not aligned to 64 bytes."""
    driver()
    try:
        function = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise EngineUnavailableError(f"the CUDA driver offers no TMA maps: {error}") from error
    u32, pointer = ctypes.c_uint32, ctypes.c_void_p
    function.argtypes = [pointer, u32, u32, pointer, pointer, pointer, pointer, pointer, u32, u32, u32, u32]
    function.restype = ctypes.c_int
    return function
