"""Megatron-Core on a machine without a GPU: its few CUDA-only touch points answered for the CPU, over gloo.

For tests and for trying things on a laptop; nothing here makes anything faster. Megatron-Core places tensors on
``torch.cuda.current_device()``, makes streams and events, keeps CUDA random states, and its distributed optimiser
compares tensor types with ``torch.cuda.FloatTensor``. Inside ``emulated_cuda`` these mean the CPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    """Everything on a CPU is in order already. All streams are one stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Event:
    """Has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait = record

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _CudaMeansCpu(TorchFunctionMode):
    """Factories and moves that name CUDA get the CPU; ``Tensor.type()`` names CUDA, as the optimiser expects it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return func(*args, **kwargs)


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    **more: Any,
) -> Any:
    """torch's, also for sizes in tensors: on a GPU megatron-core brings them to the host, on a CPU it leaves them."""
    recv, send = (None if s is None else list(map(int, s)) for s in (output_split_sizes, input_split_sizes))
    return _ALL_TO_ALL_SINGLE(output, input, recv, send, **more)


_ALL_TO_ALL_SINGLE = torch.distributed.all_to_all_single


def _on_cpu(where: Any) -> Any:
    named = isinstance(where, str | torch.device) and str(where).startswith("cuda")
    numbered = isinstance(where, int) and not isinstance(where, bool)
    return CPU if named or numbered else where


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Run Megatron-Core on the CPU inside; does nothing where CUDA is available. Process groups must be gloo's."""
    if torch.cuda.is_available():
        yield
        return
    answers: dict[str, Any] = {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_, **__: _Stream(),
        "default_stream": lambda *_, **__: _Stream(),
        "stream": lambda _: contextlib.nullcontext(),
        "current_device": lambda: CPU,
        "synchronize": lambda *_, **__: None,
        "set_device": lambda *_, **__: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
    }
    states: dict[str, Any] = {
        "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    # There is one generator instead of two, so each draw inside Megatron's own random state would be reported.
    quiet = mock.patch.object(logging.getLogger(megatron_random.__name__), "disabled", True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet)
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name, answer in states.items():
            stack.enter_context(mock.patch.object(megatron_random, name, answer))
        stack.enter_context(mock.patch.object(torch.distributed, "all_to_all_single", _all_to_all_single))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # it compiles small functions, for minutes
        stack.enter_context(_CudaMeansCpu())
        yield
