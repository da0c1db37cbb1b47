"""A fact is stated once, in Python; the CUDA twin is text generated from it, with asserts that the two agree."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import math
import re
from typing import Any


class TensorMap(ctypes.Structure):
    """The 128 bytes of a CUtensorMap as a field of a kernel's arguments; assign what ``tensor_map.encode`` gives."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


_SCALARS: dict[Any, str] = {
    ctypes.c_int8: "signed char",
    ctypes.c_uint8: "unsigned char",
    ctypes.c_int16: "short",
    ctypes.c_uint16: "unsigned short",
    ctypes.c_int32: "int",
    ctypes.c_uint32: "unsigned int",
    ctypes.c_int64: "long long",
    ctypes.c_uint64: "unsigned long long",
    ctypes.c_float: "float",
    ctypes.c_double: "double",
    ctypes.c_void_p: "void*",
    TensorMap: "megamoe::TensorMap",
}


def cuda_struct(name: str, config: Any, **derived: int | float | bool | enum.Enum) -> str:
    """``config`` (a dataclass instance) as a struct of compile-time constants.

    Fields may be int, bool, float (rounded to 32 bits) or Enum; an Enum class becomes a nested
    ``enum class``, its members numbered by their values if those are integers, else in order. ``derived`` adds facts
    that Python computed from the fields. Example::

        >>> print(cuda_struct("Config", Config(block_m=128, promote=True), smem_bytes=229376))
        struct Config {
          static constexpr int block_m = 128;
          static constexpr bool promote = true;
          static constexpr int smem_bytes = 229376;
        };

    Raises:
        ValueError: a field of another type, an integer beyond 64 bits, a float that is not finite.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    enums = {type(v): None for v in (*fields.values(), *derived.values()) if isinstance(v, enum.Enum)}
    lines = [f"struct {_identifier(name)} {{"]
    lines += [f"  {_enum_text(e)}" for e in enums]
    for key, value in {**fields, **derived}.items():
        ctype, literal = _constant(key, value)
        lines.append(f"  static constexpr {ctype} {_identifier(key)} = {literal};")
    return "\n".join([*lines, "};\n"])


def cuda_args(name: str, args: type[ctypes.Structure]) -> str:
    """``args`` (run-time arguments of a kernel) as a CUDA struct of the same layout, each offset asserted.

    Field types: the sized integers, c_float, c_double, c_void_p (``void*``), ``TensorMap``, and arrays of these.
    The kernel takes it as ``extern "C" __global__ void entry(const __grid_constant__ Args args)``. Example::

        >>> class Args(ctypes.Structure):
        ...     _fields_ = [("x", ctypes.c_void_p), ("num_rows", ctypes.c_int32)]

    Raises:
        ValueError: another field type, or a TensorMap at an offset that is not a multiple of 64 (put maps first), or
            a struct with maps whose size is not a multiple of 64.
    """
    _identifier(name)
    size = ctypes.sizeof(args)
    lines, asserts, holds_map = ['#include "megamoe/common/args.cuh"', f"struct {name} {{"], [], False
    for field in args._fields_:
        key = _identifier(field[0])
        ctype: Any = field[1]
        if len(field) > 2:
            raise ValueError(f"{name}.{key} is a bit field; kernel arguments cannot hold one")
        offset = getattr(args, key).offset
        element: Any = ctype
        dims = ""
        while isinstance(element, type) and issubclass(element, ctypes.Array):
            dims += f"[{element._length_}]"
            element = element._type_
        if element not in _SCALARS:
            raise ValueError(f"{name}.{key} must be a sized integer, float, pointer or TensorMap, got {ctype}")
        if element is TensorMap:
            holds_map = True
            if offset % 64:
                raise ValueError(
                    f"{name}.{key} holds a TensorMap at offset {offset}, not a multiple of 64: put it first"
                )
        lines.append(f"  {_SCALARS[element]} {key}{dims};")
        asserts.append(f'static_assert(MEGAMOE_OFFSETOF({name}, {key}) == {offset}, "{name}.{key}: layout in Python");')
    if holds_map and size % 64:
        # CUDA pads the struct to its alignment and the driver would read past the end of Python's.
        pad = f'("pad", ctypes.c_uint8 * {64 - size % 64})'
        raise ValueError(
            f"{name} holds a TensorMap, so its size must be a multiple of 64, got {size}: end it with {pad}"
        )
    asserts.append(f'static_assert(sizeof({name}) == {size}, "{name}: size in Python");')
    return "\n".join([*lines, "};", *asserts, ""])


def _identifier(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"{name!r} is not a C identifier")
    return name


def _enum_text(cls: type[enum.Enum]) -> str:
    members = ", ".join(f"{_identifier(m.name)} = {_enum_number(m)}" for m in cls)
    return f"enum class {_identifier(cls.__name__)} : int {{ {members} }};"


def _enum_number(member: enum.Enum) -> int:
    if all(isinstance(m.value, int) for m in type(member)):
        return int(member.value)
    return list(type(member)).index(member)


def _constant(key: str, value: Any) -> tuple[str, str]:
    """CUDA type and literal of one compile-time constant."""
    if isinstance(value, enum.Enum):
        return type(value).__name__, f"{type(value).__name__}::{value.name}"
    if isinstance(value, bool):
        return "bool", "true" if value else "false"
    if isinstance(value, int):
        if -(2**31) < value < 2**31:
            return "int", str(value)
        if -(2**63) < value < 2**63:
            return "long long", f"{value}ll"
        if 0 < value < 2**64:
            return "unsigned long long", f"{value}ull"
        raise ValueError(f"{key} must fit into 64 bits, got {value}")
    if isinstance(value, float) and math.isfinite(rounded := ctypes.c_float(value).value):
        return "float", f"{rounded.hex()}f"
    raise ValueError(f"{key} must be an int, bool, finite float or Enum, got {value!r}")
