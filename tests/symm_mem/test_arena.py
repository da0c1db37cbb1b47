"""The layout of a symmetric buffer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.symm_mem.arena import MAX_ALIGN, Arena, Field

_DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]


@st.composite
def _fields(draw, max_size=8):
    names = draw(st.lists(st.from_regex(r"\A[a-z_]{1,6}\Z"), min_size=1, max_size=max_size, unique=True))
    fields = []
    for name in names:
        dtype = draw(st.sampled_from(_DTYPES))
        aligns = [a for a in (1, 2, 8, 16, 64, 128, MAX_ALIGN) if a >= dtype.itemsize]
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        fields.append(Field(name, tuple(shape), dtype, draw(st.sampled_from(aligns))))
    return fields


@settings(max_examples=50, deadline=None)
@given(_fields())
def test_fields_are_aligned_apart_and_inside(fields):
    arena = Arena(*fields)
    end = 0
    for field in fields:
        start = arena.offsets[field.name]
        assert start % field.align == 0
        assert end <= start < end + field.align
        end = start + field.num_bytes
    assert max(end, 1) <= arena.num_bytes < max(end, 1) + arena.align
    assert arena.num_bytes % arena.align == 0


@settings(max_examples=50, deadline=None)
@given(_fields())
def test_views_cover_exactly_their_bytes(fields):
    arena = Arena(*fields)
    whole = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    expected = torch.zeros_like(whole)
    for number, field in enumerate(fields, start=1):
        view = arena.view(whole, field.name)
        assert view.shape == field.shape and view.dtype == field.dtype and view.is_contiguous()
        view.view(torch.uint8).fill_(number) if view.dim() else view.unsqueeze(0).view(torch.uint8).fill_(number)
        expected[arena.offsets[field.name] :][: field.num_bytes] = number
    assert torch.equal(whole, expected)


@settings(max_examples=50, deadline=None)
@given(_fields(max_size=3), _fields(max_size=3))
def test_equality_is_that_of_all_fields(fields, others):
    assert Arena(*fields) == Arena(*fields) and hash(Arena(*fields)) == hash(Arena(*fields))
    assert Arena(*fields).digest == Arena(*fields).digest
    assert (Arena(*fields) == Arena(*others)) == (fields == others)
    assert (Arena(*fields).digest == Arena(*others).digest) == (fields == others)


def test_an_example_in_numbers():
    arena = Arena(Field("x", (4, 8), torch.bfloat16), Field("flags", (3,), torch.int32, align=8))
    assert (arena.offsets, arena.num_bytes, arena.align) == ({"x": 0, "flags": 64}, 128, 128)
    assert "flags" in repr(arena)


def test_explain_accounts_for_every_byte():
    arena = Arena(Field("tokens", (100, 64), torch.bfloat16), Field("flags", (3,), torch.int32))
    lines = arena.explain().splitlines()
    assert lines[1].split() == ["tokens", "0", "12800", "0.01", "bfloat16", "[100,", "64]"]
    assert lines[2].split()[:3] == ["flags", "12800", "12"]
    assert lines[3].split() == ["total", "12928", "0.01", "of", "which", "padding", "116"]


def test_nothing_but_empty_fields_still_has_bytes():
    arena = Arena(Field("x", (0, 8), torch.bfloat16))
    assert arena.num_bytes == 128
    assert arena.view(torch.zeros(128, dtype=torch.uint8), "x").shape == (0, 8)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Arena, "at least one field"),
        (lambda: Arena(Field("x", (1,)), Field("x", (2,))), "names must differ, got x, x"),
        (lambda: Field("", (1,)), "one word, got ''"),
        (lambda: Field("a b", (1,)), "one word, got 'a b'"),
        (lambda: Field("x", (1, -2)), r"field x: sizes must be at least 0, got \(1, -2\)"),
        (lambda: Field("x", (1,), torch.int64, 4), r"power of two from 8 \(one torch.int64\) to 4096, got 4"),
        (lambda: Field("x", (1,), align=48), "got 48"),
        (lambda: Field("x", (1,), align=8192), "got 8192"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
