"""The table of environment variables: every default parses, nonsense is refused with the variable's meaning."""

from __future__ import annotations

import pytest

from megamoe import env


def test_every_default_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.TABLE:
        monkeypatch.delenv(variable.name, raising=False)
        env.get(variable.name)


def test_names_are_unique_and_described() -> None:
    names = [variable.name for variable in env.TABLE]
    assert len(set(names)) == len(names)
    for variable in env.TABLE:
        assert variable.meaning.endswith("."), f"{variable.name}: the meaning is a sentence"


def test_set_value_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "2.5")
    assert env.get("MEGAMOE_TIMEOUT_S") == 2.5
    monkeypatch.setenv("MEGAMOE_PRINT_HEURISTICS", "1")
    assert env.get("MEGAMOE_PRINT_HEURISTICS") is True


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("MEGAMOE_TIMEOUT_S", "0", "greater than 0"),
        ("MEGAMOE_TIMEOUT_S", "soon", "soon"),
        ("MEGAMOE_ENGINE", "fast", "auto, reference, staged, mega"),
        ("MEGAMOE_PRINT_HEURISTICS", "yes", "0 or 1"),
    ],
)
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=expected) as caught:
        env.get(name)
    assert f"{name}={text!r}" in str(caught.value)


def test_unknown_variable_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        env.get("MEGAMOE_NO_SUCH_THING")


def test_snapshot_carries_only_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "5")
    monkeypatch.setenv("UNRELATED", "x")
    values = env.snapshot()
    assert values["MEGAMOE_TIMEOUT_S"] == "5"
    assert "UNRELATED" not in values
    monkeypatch.setenv("MEGAMOE_TIMEOUT_S", "7")
    monkeypatch.setenv("MEGAMOE_ENGINE", "staged")
    env.restore(values)
    assert env.get("MEGAMOE_TIMEOUT_S") == 5
    assert env.snapshot() == values
