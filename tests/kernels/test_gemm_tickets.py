"""Counters of units: one a stream, one for each launch in a graph."""

from __future__ import annotations

import pytest
import torch

from megamoe.kernels.gemm import tickets


class Device:
    """What the counters ask of torch: the current stream, and whether it is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = 0, False
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: self.stream, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: self.capturing, raising=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(tickets, "_zeros", lambda device, words=2: torch.zeros(words, dtype=torch.int32))
        monkeypatch.setattr(tickets, "_SPARES", {})
        tickets._of_stream.cache_clear()

    def synchronize(self) -> None:
        assert not self.capturing, "a capture must not wait"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_streams_have_a_counter_each(device: Device) -> None:
    first, again = tickets.of_launch(0), tickets.of_launch(0)
    device.stream = 7
    other = tickets.of_launch(0)
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    assert first.shape == (2,) and not first.any()
    assert tickets.of_launch(1).data_ptr() not in (first.data_ptr(), other.data_ptr())
    tickets._of_stream.cache_clear()


def test_launches_in_graphs_never_share_one(device: Device) -> None:
    eager = tickets.of_launch(0)
    device.capturing = True
    captured = [tickets.of_launch(0) for _ in range(tickets._CAPTURED + 3)]
    assert len({counter.data_ptr() for counter in (eager, *captured)}) == len(captured) + 1
    assert all(counter.shape == (2,) and not counter.any() for counter in captured)
    tickets._of_stream.cache_clear()


def test_a_capture_before_any_launch_gets_one_too(device: Device) -> None:
    device.capturing = True
    first, second = tickets.of_launch(0), tickets.of_launch(0)
    assert first.data_ptr() != second.data_ptr() and not tickets._SPARES
