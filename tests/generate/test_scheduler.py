"""Who joins, who runs, who leaves: the scheduler without a model; requests and their lengths."""

from __future__ import annotations

import random

import pytest

from megamoe.generate.requests import Request, workload
from megamoe.generate.scheduler import Scheduler


def request(i: int, prompt: int = 3, new: int = 2) -> Request:
    return Request(id=i, prompt=list(range(1, prompt + 1)), max_new_tokens=new)


def ids(step) -> list[int]:
    return [r.id for r in step.requests]


def test_requests_join_and_leave_in_order() -> None:
    scheduler = Scheduler([request(0, new=3), request(1, new=1), request(2)], max_rows=2)
    step = scheduler.next()
    assert (step.kind, ids(step)) == ("prefill", [0, 1])
    assert scheduler.record(step, [7, 8]) == [0]  # request 1 wanted one token
    step = scheduler.next()
    assert (step.kind, ids(step)) == ("prefill", [2])  # its row is taken at once
    assert scheduler.record(step, [9]) == [0, 1]
    step = scheduler.next()
    assert (step.kind, ids(step)) == ("decode", [0, 2])
    assert scheduler.record(step, [10, 11]) == [0]
    step = scheduler.next()
    assert (step.kind, ids(step)) == ("decode", [0])
    assert scheduler.record(step, [12]) == []
    assert scheduler.next().kind == "idle" and not scheduler.pending
    assert {r.id: r.output for r in scheduler.finished} == {0: [7, 10, 12], 1: [8], 2: [9, 11]}


def test_a_token_that_stops_ends_a_request() -> None:
    scheduler = Scheduler([request(0, new=9), request(1, new=9)], max_rows=2, stop=[5])
    assert scheduler.record(scheduler.next(), [4, 5]) == [0]
    assert scheduler.finished[0].output == [5] and scheduler.finished[0].stopped


def test_prefills_are_bounded_but_a_long_prompt_is_not_stuck() -> None:
    scheduler = Scheduler(
        [request(0, 2), request(1, 3), request(2, 40), request(3, 2)], max_rows=4, max_prefill_tokens=6
    )
    seen = []
    for _ in range(3):
        step = scheduler.next()
        seen.append(ids(step))
        scheduler.record(step, [1] * len(step.requests))
    assert seen == [[0, 1], [2], [3]]


@pytest.mark.parametrize("seed", range(100))
def test_everyone_is_served_once(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 12), rng.randint(1, 6)) for _ in range(rng.randint(0, 12))]
    max_rows, bound = rng.randint(1, 4), rng.randint(1, 20)
    scheduler = Scheduler(max_rows=max_rows, max_prefill_tokens=bound)
    for i, (prompt, new) in enumerate(lengths):
        scheduler.add(request(i, prompt, new))
    joined: list[int] = []
    steps = 0
    while scheduler.pending:
        step = scheduler.next()
        steps += 1
        assert 0 < len(step.requests) <= max_rows
        if step.kind == "prefill":
            joined += ids(step)
            longest = max(len(r.prompt) for r in step.requests)
            assert len(step.requests) == 1 or longest * len(step.requests) <= bound
        before = len(scheduler.running) + (len(step.requests) if step.kind == "prefill" else 0)
        stay = scheduler.record(step, [0] * len(step.requests))
        assert stay == sorted(set(stay)) and all(0 <= row < before for row in stay)
        assert len(stay) == len(scheduler.running) <= max_rows
    assert joined == list(range(len(lengths)))
    assert sorted((r.id, len(r.output)) for r in scheduler.finished) == [(i, n) for i, (_, n) in enumerate(lengths)]
    assert steps <= sum(new for _, new in lengths)


def test_workload_repeats_and_varies() -> None:
    arguments = {"prompt_length": 10, "new_tokens": 6, "vocabulary": 50}
    one, same, other = (workload(30, seed=seed, **arguments) for seed in (0, 0, 1))
    assert [r.prompt for r in one] == [r.prompt for r in same] != [r.prompt for r in other]
    assert {len(r.prompt) for r in one} <= set(range(5, 16)) and len({len(r.prompt) for r in one}) > 4
    assert {r.max_new_tokens for r in one} <= set(range(3, 10)) and len({r.max_new_tokens for r in one}) > 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: request(3, prompt=0), "request 3 has an empty prompt"),
        (lambda: request(3, new=0), "max_new_tokens of request 3 must be at least 1, got 0"),
        (lambda: Scheduler(max_rows=0), "max_rows and max_prefill_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
