from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamoe.errors import CompileError
from megamoe.kernels.jit.compiler import compile_source
from megamoe.kernels.jit.source import KernelSource, reached_headers
from megamoe.kernels.jit.structs import TensorMap, cuda_args, cuda_struct


class Epilogue(enum.Enum):
    PLAIN = "plain"
    SWIGLU = "swiglu"


class Tag(enum.IntEnum):
    LOW = 3
    HIGH = 40


@dataclass(frozen=True)
class Config:
    block_m: int = 128
    negative: int = -5
    large: int = 2**40
    huge: int = 2**63 + 1
    promote: bool = True
    scale: float = 0.1
    epilogue: Epilogue = Epilogue.SWIGLU
    tag: Tag = Tag.HIGH


class Args(ctypes.Structure):
    _fields_ = (
        ("maps", TensorMap * 2),
        ("x", ctypes.c_void_p),
        ("flag", ctypes.c_uint8),
        ("num_rows", ctypes.c_int32),
        ("counts", (ctypes.c_uint64 * 3) * 2),
        ("alpha", ctypes.c_float),
        ("pad", ctypes.c_uint8 * 60),
    )


def compile_text(text: str) -> None:
    compile_source(KernelSource("check", text + '\nextern "C" __global__ void check() {}', "check"))


def test_config_becomes_the_constants_that_python_holds() -> None:
    text = cuda_struct("Config", Config(), smem_bytes=229376)
    compile_text(
        text + "static_assert(Config::block_m == 128 && Config::negative == -5 && Config::large == 1ll << 40);"
        "static_assert(Config::huge == (1ull << 63) + 1 && Config::promote && Config::scale == 0.1f);"
        "static_assert(Config::epilogue == Config::Epilogue::SWIGLU && (int)Config::epilogue == 1);"
        "static_assert((int)Config::tag == 40 && (int)Config::Tag::LOW == 3 && Config::smem_bytes == 229376);"
    )
    with pytest.raises(CompileError, match="static assertion failed"):
        compile_text(text + "static_assert(Config::block_m == 64);")


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, float("inf"), 1e300, "text", None])
def test_config_refuses_what_cuda_cannot_hold(value: object) -> None:
    @dataclass(frozen=True)
    class Bad:
        field: object

    with pytest.raises(ValueError, match="field must"):
        cuda_struct("Bad", Bad(value))


def test_arguments_have_one_layout_on_both_sides() -> None:
    text = cuda_args("Args", Args)
    compile_text(text + "static_assert(MEGAMOE_OFFSETOF(Args, num_rows) == 268 && sizeof(Args().counts) == 48);")
    moved = text.replace("  int num_rows;\n", "").replace("  float alpha;\n", "  float alpha;\n  int num_rows;\n")
    assert moved != text
    with pytest.raises(CompileError, match=r"Args\.num_rows: layout in Python"):
        compile_text(moved)


def test_arguments_refuse_layouts_that_cuda_would_change() -> None:
    class Late(ctypes.Structure):
        _fields_ = (("n", ctypes.c_int64), ("map", TensorMap))

    class Short(ctypes.Structure):
        _fields_ = (("map", TensorMap), ("n", ctypes.c_int64))

    class Nested(ctypes.Structure):
        _fields_ = (("inner", Late),)

    with pytest.raises(ValueError, match=r"Late\.map holds a TensorMap at offset 8"):
        cuda_args("Late", Late)
    with pytest.raises(ValueError, match=r'multiple of 64, got 136: end it with \("pad", ctypes.c_uint8 \* 56\)'):
        cuda_args("Short", Short)
    with pytest.raises(ValueError, match=r"Nested\.inner must be"):
        cuda_args("Nested", Nested)


def test_only_reached_headers_count(tmp_path: Path) -> None:
    folder = tmp_path / "megamoe"
    folder.mkdir()
    (folder / "a.cuh").write_text('#pragma once\n  #  include "megamoe/b.cuh"\n#include <cstdint>\n')
    (folder / "b.cuh").write_text('#include "megamoe/a.cuh"\n')
    (folder / "c.cuh").write_text("unreached\n")
    code = '#include "megamoe/a.cuh"\n// #include is only seen at a line\'s start: #include "megamoe/c.cuh"\n'
    before = reached_headers(code, root=tmp_path)
    assert set(before.ours) == {"megamoe/a.cuh", "megamoe/b.cuh"}
    (folder / "c.cuh").write_text("still unreached\n")
    assert reached_headers(code, root=tmp_path).digest() == before.digest()
    (folder / "b.cuh").write_text('#include "megamoe/a.cuh"\n\n')
    assert reached_headers(code, root=tmp_path).digest() != before.digest()
    (folder / "b.cuh").unlink()
    with pytest.raises(CompileError, match=r'megamoe/a\.cuh includes "megamoe/b\.cuh"'):
        reached_headers(code, root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"name": "a/b"}, "name must be"), ({"entry": "a b"}, "entry must be"), ({"arch": "compute_90"}, "arch must")],
)
def test_source_refuses_nonsense(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KernelSource(**{"name": "n", "code": "", "entry": "e", **changes})  # type: ignore[arg-type]
