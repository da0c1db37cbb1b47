"""The comparison that every other test leans on: it sees a zeroed row, a NaN, a wrong element, and names them."""

from __future__ import annotations

import pytest
import torch

from megamoe.testing.numerics import assert_close, difference, row_difference

EXPECTED = torch.arange(1.0, 13.0).view(4, 3)


def test_difference_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    assert difference(x, y) == pytest.approx(1 - 2 * float(x @ y) / float(x @ x + y @ y), rel=1e-12)
    assert difference(x, x) == 0
    assert difference(torch.zeros(3), torch.zeros(3)) == 0
    assert difference(x, torch.zeros_like(x)) == 1
    assert difference(x, -x) == pytest.approx(2)


def test_row_difference_sees_each_row() -> None:
    actual = EXPECTED.clone()
    actual[2] = 0
    assert row_difference(actual, EXPECTED).tolist() == [0, 0, 1, 0]
    assert row_difference(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_equal_passes_and_empty_passes() -> None:
    assert_close(EXPECTED, EXPECTED.clone(), whole=0, row=0)
    assert_close(torch.empty(0, 3), torch.empty(0, 3), whole=0, row=0)
    with_nan = EXPECTED.clone()
    with_nan[1, 1] = float("nan")
    assert_close(with_nan, with_nan.clone(), whole=0, row=0)


def test_zeroed_row_fails_though_the_whole_is_close() -> None:
    expected = torch.ones(10_000, 2)
    actual = expected.clone()
    actual[1234] = 0
    with pytest.raises(AssertionError, match=r"worst row 1234 d = 1\.000e\+00"):
        assert_close(actual, expected, whole=1e-3, row=1e-4)


def test_failure_names_the_worst_element_and_both_values() -> None:
    actual = EXPECTED.clone()
    actual[3, 1] = 99
    with pytest.raises(AssertionError, match=r"y \(4, 3\) torch.float32.*worst element \[3, 1\]: 99, expected 11"):
        assert_close(actual, EXPECTED, whole=1e-5, row=1e-4, what="y")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stray_non_finite_fails_with_its_place(value: float) -> None:
    actual = EXPECTED.clone()
    actual[0, 2] = value
    with pytest.raises(AssertionError, match=r"first at \[0, 2\]"):
        assert_close(actual, EXPECTED, whole=1, row=1)
    with pytest.raises(AssertionError, match=r"first at \[0, 2\]"):
        assert_close(EXPECTED, actual, whole=1, row=1)


def test_shape_mismatch_fails() -> None:
    with pytest.raises(AssertionError, match=r"shape \(4, 3\), expected \(3, 4\)"):
        assert_close(EXPECTED, EXPECTED.T, whole=1, row=1)


def test_nan_and_inf_are_told_apart() -> None:
    a, b = EXPECTED.clone(), EXPECTED.clone()
    a[0, 0], b[0, 0] = float("nan"), float("inf")
    with pytest.raises(AssertionError):
        assert_close(a, b, whole=1, row=1)
