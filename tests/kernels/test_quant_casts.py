"""The cast kernels against their twins, bit for bit, on random dense data with poisoned outputs.

Each test runs twice: on the CPU by ``emulator.py``, and, marked ``gpu``, on the device, with more and larger shapes.
"""

from __future__ import annotations

import math

import pytest
import torch

from megamoe.activation import Activation, ActivationName
from megamoe.kernels.quant import casts, reference
from megamoe.kernels.quant.layouts import Layout, aligned_columns, check_scales
from tests.kernels import emulator

ROWS = [(1, 8), (3, 136), (5, 128), (37, 264), (2, 1048)]
ROWS_GPU = [*ROWS, (257, 7168), (1000, 2880), (4096, 2048), (131, 14336), (70000, 128)]


def dense(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.rand((*shape[:-1], 1), generator=generator) * 40 - 20
    return (torch.randn(shape, generator=generator) * torch.exp2(octaves)).to(dtype)


def shapes(device: torch.device, small: list[tuple[int, int]], large: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return large if device.type == "cuda" else small


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits at every element."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.dtype == torch.float8_e4m3fn:
        a, b = actual.view(torch.uint8).cpu(), expected.view(torch.uint8).cpu()
    else:
        a, b = (t.contiguous().view(torch.int32).cpu() for t in (actual, expected))
    if not torch.equal(a, b):
        at = tuple(int(i) for i in (a != b).nonzero()[0])
        raise AssertionError(
            f"{int((a != b).sum())} of {a.numel()} elements differ, first at {at}: {actual[at]}, not {expected[at]}"
        )


def zeros_to_the_stride(q: torch.Tensor) -> None:
    """The bytes between the last column and the aligned row stride are zeros."""
    columns = q.shape[-1]
    full = torch.as_strided(q, (q.shape[:-1].numel(), aligned_columns(columns)), (aligned_columns(columns), 1))
    assert (full.view(torch.uint8)[:, columns:] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "power_of_two", "layout"),
    [
        (torch.bfloat16, False, "row"),
        (torch.bfloat16, False, "sm90"),
        (torch.bfloat16, True, "sm100"),
        (torch.float32, True, "row"),
    ],
)
def test_cast_1x128(quant_device: torch.device, dtype: torch.dtype, power_of_two: bool, layout: Layout) -> None:
    for m, k in shapes(quant_device, ROWS, ROWS_GPU):
        x = dense(m, k, dtype=dtype).to(quant_device)
        q, scale = casts.cast_1x128(x, power_of_two=power_of_two, layout=layout)
        expected_q, expected = reference.cast_1x128(x, power_of_two=power_of_two, layout=layout)
        same(q, expected_q)
        same(scale, expected)
        zeros_to_the_stride(q)
        check_scales(scale, rows=m, columns=k, layout=layout)


@pytest.mark.parametrize("layout", ["row", "sm90", "sm100"])
def test_a_batch_is_one_matrix_after_the_other(quant_device: torch.device, layout: Layout) -> None:
    x = dense(3, 2, 5, 648).to(quant_device)
    q, scale = casts.cast_1x128(x, power_of_two=layout == "sm100", layout=layout)
    expected_q, expected = reference.cast_1x128(x, power_of_two=layout == "sm100", layout=layout)
    same(q, expected_q)
    same(scale, expected)
    assert scale.stride() == expected.stride()


def test_rows_may_be_strided(quant_device: torch.device) -> None:
    x = dense(9, 512).to(quant_device)[::2, 64:320]
    for cast, twin in ((casts.cast_1x128, reference.cast_1x128), (casts.cast_row, reference.cast_row)):
        for actual, expected in zip(cast(x), twin(x), strict=True):
            same(actual, expected)


def test_cast_row(quant_device: torch.device) -> None:
    for m, k in shapes(quant_device, [(1, 8), (11, 520), (2, 7168)], [*ROWS_GPU, (33, 70000)]):
        for dtype in (torch.bfloat16, torch.float32) if quant_device.type == "cuda" else (torch.bfloat16,):
            x = dense(m, k, dtype=dtype).to(quant_device)
            q, scale = casts.cast_row(x)
            expected_q, expected = reference.cast_row(x)
            same(q, expected_q)
            same(scale, expected)
            zeros_to_the_stride(q)


def test_a_row_too_long_for_the_registers_is_read_twice(
    quant_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(casts, "row_shape", lambda columns, element, *, activated: (64, 2, False))
    x = dense(5, 2600).to(quant_device)
    x[1, 3], x[2, 2599], x[4] = torch.nan, torch.inf, 0
    q, scale = casts.cast_row(x, power_of_two=True)
    expected_q, expected = reference.cast_row(x, power_of_two=True)
    same(q, expected_q)
    same(scale, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_cast_128x128(quant_device: torch.device, dtype: torch.dtype, transposed: bool) -> None:
    small = [((144, 136), 1), ((2, 288, 72), 2)]
    large = [*small, ((3, 5760, 2880), 2), ((2, 2048, 7168), 1), ((1000, 520), 1)]
    for shape, parts in large if quant_device.type == "cuda" else small:
        w = dense(*shape, dtype=dtype).to(quant_device)
        if transposed:
            actual, expected = (m.cast_128x128_both(w, parts=parts) for m in (casts, reference))
            same(actual.q_t, expected.q_t)
            same(actual.scale_t, expected.scale_t)
            zeros_to_the_stride(actual.q_t)
            q, scale, expected_q, expected_scale = actual.q, actual.scale, expected.q, expected.scale
        else:
            (q, scale), (expected_q, expected_scale) = (m.cast_128x128(w, parts=parts) for m in (casts, reference))
        same(q, expected_q)
        same(scale, expected_scale)
        zeros_to_the_stride(q)


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.bfloat16, "row"), (torch.bfloat16, "sm90"), (torch.float32, "sm100")]
)
def test_cast_1x128_with_the_transposed_copy(quant_device: torch.device, dtype: torch.dtype, layout: Layout) -> None:
    for m, k in shapes(quant_device, [(1, 8), (136, 264), (300, 72)], [*ROWS_GPU, (8192, 4096)]):
        x = dense(m, k, dtype=dtype).to(quant_device)
        power_of_two = layout == "sm100"
        actual, expected = (
            module.cast_1x128_both(x, power_of_two=power_of_two, layout=layout) for module in (casts, reference)
        )
        for name in ("q", "scale", "q_t", "scale_t"):
            same(getattr(actual, name), getattr(expected, name))
        zeros_to_the_stride(actual.q)
        zeros_to_the_stride(actual.q_t)
        check_scales(actual.scale_t, rows=k, columns=m, layout=layout)


@pytest.mark.parametrize("sizes", [[5, 0, 128, 130, 0, 40], [0], [0, 0, 300], [256, 256], list(range(40))])
def test_groups_start_blocks_of_the_transposed_copy(quant_device: torch.device, sizes: list[int]) -> None:
    owned = sum(sizes)
    x = dense(owned + 7, 72).to(quant_device)
    offsets = torch.tensor([0, *sizes]).cumsum(0).int().to(quant_device)
    actual, expected = (module.cast_1x128_both(x, offsets=offsets, layout="sm90") for module in (casts, reference))
    same(actual.q[:owned], expected.q[:owned])
    same(actual.scale[:owned], expected.scale[:owned])
    same(actual.q_t, expected.q_t)
    same(actual.scale_t, expected.scale_t)
    at = reference.transposed_blocks(offsets).tolist()
    assert at[-1] <= actual.scale_t.shape[1]
    for g, size in enumerate(sizes):
        rows = x[int(offsets[g]) : int(offsets[g]) + size]
        alone = reference.cast_1x128(rows.t()) if size else (torch.zeros(72, 0), None)
        same(actual.q_t[:, at[g] * 128 : at[g] * 128 + size], alone[0].to(actual.q_t.dtype))


def test_threads_in_another_order_give_the_same(quant_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier too few shows as a difference between forward and backward; on a GPU, between repeats."""
    x = dense(200, 136).to(quant_device)
    first = [*casts.cast_1x128_both(x), *casts.cast_128x128_both(x), *casts.cast_row(x)]
    if quant_device.type == "cpu":
        monkeypatch.setattr(casts, "launch", emulator.Emulator(backward=True).launch)
    again = [*casts.cast_1x128_both(x), *casts.cast_128x128_both(x), *casts.cast_row(x)]
    for a, b in zip(first, again, strict=True):
        same(a, b)


def test_nan_and_infinity_stay_in_their_token(quant_device: torch.device) -> None:
    x = dense(160, 264)
    x[3, 5], x[3, 130], x[70, 263], x[159] = torch.nan, torch.inf, -torch.inf, torch.nan
    x = x.to(quant_device)
    for cast in ("cast_1x128", "cast_row", "cast_128x128", "cast_1x128_both"):
        actual, expected = getattr(casts, cast)(x), getattr(reference, cast)(x)
        for a, b in zip(actual, expected, strict=True):
            same(a, b)
        assert torch.equal(actual[0].float().isnan(), ~x.isfinite())
        assert actual[1].isfinite().all()


def test_zeros_and_the_smallest_numbers(quant_device: torch.device) -> None:
    x = torch.zeros(6, 256)
    x[1, 0], x[2, 7], x[3] = 2.0**-149, 2.0**-133, 2.0**-120
    x[4, 200] = torch.finfo(torch.float32).max
    x = x.to(quant_device)
    for power_of_two in (False, True):
        actual, expected = (m.cast_1x128(x, power_of_two=power_of_two) for m in (casts, reference))
        same(actual[0], expected[0])
        same(actual[1], expected[1])


@pytest.mark.parametrize("name", ["swiglu", "swiglu_clamped", "geglu", "relu2"])
def test_activation_and_cast(quant_device: torch.device, name: ActivationName) -> None:
    activation = Activation(name=name)
    everything = name == "swiglu" or quant_device.type == "cuda"
    for m, k in shapes(quant_device, [(3, 136)], [(3, 136), (500, 2048), (129, 2880)]):
        generator = torch.Generator().manual_seed(m)
        h = (torch.randn(m, 2 * k if activation.gated else k, generator=generator) * 2).bfloat16()
        h[0, 1], h[1, 2] = torch.nan, torch.inf
        h, weights = h.to(quant_device), torch.rand(m, generator=generator).to(quant_device)
        for row_weight in (None, weights):
            value = _exact(activation, h.double()) * (1 if row_weight is None else row_weight.double().unsqueeze(1))
            _close_to(*casts.cast_1x128(h, activation=activation, row_weight=row_weight), value.float(), by_row=False)
            if everything:
                _close_to(*casts.cast_row(h, activation=activation, row_weight=row_weight), value.float(), by_row=True)
                q, scale, q_t, scale_t = casts.cast_1x128_both(h, activation=activation, row_weight=row_weight)
                _close_to(q, scale, value.float(), by_row=False)
                _close_to(q_t, scale_t, value.t().float(), by_row=False)


def _exact(activation: Activation, h: torch.Tensor) -> torch.Tensor:
    """activation(h) in fp64. Where 1 + tanh(u) has no digits left, at u = -18, sigmoid(2 u) has all of its own."""
    if activation.name != "geglu":
        return activation(h)
    gate, up = h.chunk(2, dim=-1)
    return gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)) * up


def _close_to(q: torch.Tensor, scale: torch.Tensor, value: torch.Tensor, *, by_row: bool) -> None:
    """q and scale are a cast of ``value`` within half a step, but for 2^-14: fast exponentials of numbers up to 100."""
    finite = value.isfinite()
    assert torch.equal(q.float().isnan(), ~finite)
    twin, dequantise = (
        (reference.cast_row, reference.dequantise_row) if by_row else (reference.cast_1x128, reference.dequantise_1x128)
    )
    assert torch.allclose(scale, twin(value)[1], rtol=2.0**-14, atol=0)
    spread = scale.unsqueeze(-1) if by_row else scale.repeat_interleave(128, -1)[:, : value.shape[1]]
    half_step = (value.abs() * 2.0**-4).maximum(spread * 2.0**-10)
    worst = ((dequantise(q, scale) - value).abs() / (half_step + value.abs() * 2.0**-14))[finite].max()
    assert worst <= 1, f"off by {float(worst)} times the bound"


def test_no_rows(quant_device: torch.device) -> None:
    x = torch.zeros(0, 256, dtype=torch.bfloat16, device=quant_device)
    for cast in ("cast_1x128", "cast_row", "cast_128x128", "cast_1x128_both", "cast_128x128_both"):
        for actual, expected in zip(getattr(casts, cast)(x), getattr(reference, cast)(x), strict=True):
            assert actual.shape == expected.shape and actual.dtype == expected.dtype


def test_bad_input_is_refused_with_what_was_got(quant_device: torch.device) -> None:
    x = torch.zeros(4, 256, dtype=torch.bfloat16, device=quant_device)
    for call, words in (
        (lambda: casts.cast_1x128(x, layout="sm100"), "needs power_of_two=True"),
        (lambda: casts.cast_1x128(x.half()), "got torch.float16"),
        (lambda: casts.cast_1x128(x[:, :12]), r"columns \(12 here\)"),
        (lambda: casts.cast_row(x[:, 1:9]), "aligned address"),
        (lambda: casts.cast_1x128(x.t()), "dense rows"),
        (lambda: casts.cast_1x128(x, row_weight=torch.ones(4)), "none was given"),
        (
            lambda: casts.cast_row(x, activation=Activation(), row_weight=torch.ones(3)),
            r"row_weight must be fp32 \(4,\)",
        ),
        (lambda: casts.cast_128x128_both(x, parts=2), "multiple of 16 rows in each, got 2"),
        (lambda: casts.cast_1x128_both(x, offsets=torch.zeros(2)), "offsets must be int32"),
        (lambda: casts.cast_1x128_both(x.view(2, 2, 256)), r"a matrix \[M, K\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.gpu
def test_a_graph_replays_casts() -> None:
    x = dense(512, 2048).cuda()
    casts.cast_1x128_both(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = casts.cast_1x128_both(x)
    x.copy_(dense(512, 2048, seed=1))
    graph.replay()
    for a, b in zip(actual, reference.cast_1x128_both(x), strict=True):
        same(a, b)
