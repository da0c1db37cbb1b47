"""Activations against formulas written out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megamoe import Activation


def by_hand(activation: Activation, gate: float, up: float) -> float:
    sigmoid = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    if activation.name == "swiglu":
        return gate * sigmoid(gate) * up
    if activation.name == "geglu":
        return 0.5 * gate * (1 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = min(gate, activation.limit), max(-activation.limit, min(up, activation.limit))
    if activation.name == "swiglu_limited":
        return gate * sigmoid(gate) * up
    return gate * sigmoid(activation.alpha * gate) * (up + 1)


@pytest.mark.parametrize("name", ["swiglu", "swiglu_limited", "swiglu_clamped", "geglu"])
def test_gated_matches_the_formula(name: str) -> None:
    activation = Activation(name)  # type: ignore[arg-type]
    gates = [-30.0, -7.5, -1.0, 0.0, 0.3, 6.9, 7.1, 30.0]
    ups = [-9.0, -7.0, -0.5, 0.0, 0.5, 7.0, 9.0, 2.0]
    pairs = [(g, u) for g in gates for u in ups]
    h13 = torch.tensor([[g for g, _ in pairs] + [u for _, u in pairs]], dtype=torch.float64)
    expected = torch.tensor([[by_hand(activation, g, u) for g, u in pairs]], dtype=torch.float64)
    torch.testing.assert_close(activation(h13), expected, rtol=1e-12, atol=1e-12)


def test_relu2_squares_and_keeps_the_width() -> None:
    h = torch.tensor([[-2.0, 0.0, 3.0]])
    assert Activation("relu2")(h).tolist() == [[0.0, 0.0, 9.0]]
    assert not Activation("relu2").gated


@pytest.mark.parametrize("name", ["swiglu", "swiglu_limited", "swiglu_clamped", "geglu", "relu2"])
def test_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    # Away from the kinks of clamp and relu, where a finite difference means nothing.
    h13 = (torch.randn(5, 12, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(Activation(name), (h13,))  # type: ignore[arg-type]


def test_clamp_limit_and_alpha_are_used() -> None:
    h13 = torch.tensor([[100.0, 100.0]], dtype=torch.float64)
    for limit, alpha in ((7.0, 1.702), (3.0, 0.5)):
        activation = Activation("swiglu_clamped", limit=limit, alpha=alpha)
        assert float(activation(h13)) == pytest.approx(by_hand(activation, 100.0, 100.0), rel=1e-12)


def test_keeps_the_dtype() -> None:
    for name in ("swiglu", "swiglu_limited", "swiglu_clamped", "geglu", "relu2"):
        assert Activation(name)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"swiglu_clamped.*got 'gelu'"):
        Activation("gelu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["swiglu", "swiglu_limited", "swiglu_clamped", "geglu", "relu2"])
def test_backward_by_hand_equals_autograd(name: str) -> None:
    """Also at the corners: at and beyond the clamp, and at 0."""
    activation = Activation(name, limit=1.5)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    h13 = 2 * torch.randn(50, 16, generator=g, dtype=torch.float64)
    h13[:5] = torch.tensor([1.5, -1.5, 0.0, 1.6, -1.6], dtype=torch.float64)[:, None]
    h13.requires_grad_()
    grad = torch.randn(activation(h13).shape, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(activation(h13), h13, grad)
    torch.testing.assert_close(activation.backward(h13.detach(), grad), expected, rtol=1e-12, atol=1e-14)
