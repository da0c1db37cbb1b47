"""transformers' expert layouts and back, against one expert worked out by hand; what is kept from call to call."""

from __future__ import annotations

import pytest
import torch

from megamoe.adapters.transformers.layout import Layout
from megamoe.adapters.transformers.relaid import Relaid

E, H, I = 3, 8, 16  # noqa: E741 - the paper's letter
LAYOUTS = [Layout(transposed=t, interleaved=i) for t in (False, True) for i in (False, True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back(layout: Layout) -> None:
    w13 = torch.arange(E * 2 * I * H, dtype=torch.float32).view(E, 2 * I, H)
    w2 = torch.arange(E * H * I, dtype=torch.float32).view(E, H, I)
    b13 = torch.arange(E * 2 * I, dtype=torch.float32).view(E, 2 * I)
    gate_up, down = layout.from_w13(w13), layout.from_w2(w2)
    assert gate_up.shape == ((E, H, 2 * I) if layout.transposed else (E, 2 * I, H))
    assert down.shape == ((E, I, H) if layout.transposed else (E, H, I))
    assert torch.equal(layout.to_w13(gate_up), w13)
    assert torch.equal(layout.to_w2(down), w2)
    assert torch.equal(layout.to_b13(layout.from_b13(b13)), b13)


def test_gpt_oss_takes_even_columns_as_gate() -> None:
    gate_up = torch.randn(E, H, 2 * I)
    w13 = Layout(transposed=True, interleaved=True).to_w13(gate_up)
    x = torch.randn(H)
    h = x @ gate_up[1]
    torch.testing.assert_close(w13[1] @ x, torch.cat([h[0::2], h[1::2]]))


def test_plain_layout_moves_nothing() -> None:
    w13 = torch.randn(E, 2 * I, H)
    assert Layout().plain and Layout().to_w13(w13) is w13


def test_made_once_and_again_after_a_change() -> None:
    layout = Layout(transposed=True, interleaved=True)
    calls = []

    def transform(t: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return layout.to_w13(t)

    parameter = torch.nn.Parameter(torch.randn(E, H, 2 * I))
    relaid = Relaid(transform)
    with torch.no_grad():
        first = relaid.get(parameter)
        assert relaid.get(parameter) is first and len(calls) == 1
        assert first.is_contiguous() and torch.equal(first, layout.to_w13(parameter))
        parameter.add_(1)  # as an optimiser does
        assert torch.equal(relaid.get(parameter), layout.to_w13(parameter)) and len(calls) == 2
        parameter.data = parameter.data.clone()
        relaid.get(parameter)
        assert len(calls) == 3
        parameter.data.add_(1)  # raises no counter: the one change that has to be told
        relaid.forget()
        assert torch.equal(relaid.get(parameter), layout.to_w13(parameter))


def test_training_drops_what_was_kept() -> None:
    layout = Layout(transposed=True)
    parameter = torch.nn.Parameter(torch.randn(E, H, 2 * I))
    relaid = Relaid(layout.to_w13)
    with torch.no_grad():
        relaid.get(parameter)
    made = relaid.get(parameter)
    weight = torch.randn_like(made)
    (made * weight).sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, layout.from_w13(weight))
    version = parameter._version
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
        parameter.add_(1)  # as FSDP2 gathers
    assert parameter._version == version
    with torch.no_grad():
        assert torch.equal(relaid.get(parameter), layout.to_w13(parameter))
