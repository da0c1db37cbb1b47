"""Tables are made from the files they cite, and those in the repository are current."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe import env
from megamoe.bench import results, tables
from tests.bench.test_results import WHENCE, row
from tests.repo import ROOT


def block(spec: str, content: str = "old\n") -> str:
    return f"before\n<!-- table: {spec} -->\n{content}<!-- end table -->\nafter\n"


def body(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_tables_of_the_repository_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--root", str(ROOT), "--check"]) == 0, (
        f"run python -m megamoe.bench.tables: {capsys.readouterr().out}"
    )


def test_readme_prints_every_environment_variable() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: env -->" in readme
    assert not [v.name for v in env.TABLE if f"| `{v.name}` |" not in readme]


def test_a_table_filters_sorts_and_computes(tmp_path: Path) -> None:
    rows = [
        row(8, 20.0, floor_us=10.0, peers={"other": 30.0}),
        row(16, 10.0, floor_us=10.0),
        row(32, 5.0, engine="staged", floor_us=1.0),
    ]
    results.save(tmp_path, "moe", rows, machine="2x GPU")
    text = tables.regenerate(block("moe engine=mega columns=tokens,us,us/floor,vs:other sort=us"), tmp_path)
    assert text.startswith("before\n")
    assert text.endswith("<!-- end table -->\nafter\n")
    assert body(text) == [
        ["tokens", "us", "us/floor", "vs:other"],
        ["---"] * 4,
        ["16", "10", "1", ""],
        ["8", "20", "2", "1.5"],
    ]
    assert tables.regenerate(text, tmp_path) == text
    default = body(tables.regenerate(block("moe"), tmp_path))
    assert default[0][-1] == "vs:other"
    assert default[2][default[0].index("us/floor")] == "2"


def test_checks_are_counted_by_file_and_machine(tmp_path: Path) -> None:
    def check(what: str, outcome: str, **more: str) -> results.Row:
        return {"what": what, "outcome": outcome, "seconds": 1.0, **WHENCE, **more}

    rows = [check("a.py::x", "passed"), check("a.py::y", "failed", date="2026-02-02", commit="def")]
    results.save(tmp_path, "check", rows, machine="2x GPU")
    results.save(tmp_path, "check", [check("a.py::x", "passed")], machine="1x GPU")
    _, _, first, second = body(tables.regenerate(block("checks"), tmp_path))
    assert first == ["`a.py`", "1x GPU", "1", "0", "2026-01-01", "abc"]
    assert second == ["`a.py`", "2x GPU", "1", "1", "2026-02-02", "def"]
    results.save(tmp_path, "check", [check("a.py::z", "passed", date="2026-02-02", commit="abe")], machine="2x GPU")
    assert body(tables.regenerate(block("checks"), tmp_path))[3][-2:] == ["2026-02-02", "abe, def"]


def test_ratios_are_peers_over_ours(tmp_path: Path) -> None:
    rows = [row(8, 2.0, peers={"a": 1.0, "b": 4.0}), row(16, 2.0, peers={"a": 4.0}), row(32, 2.0)]
    results.save(tmp_path, "moe", rows, machine="2x GPU")
    header, _, *lines = body(tables.regenerate(block("ratios of=moe by=case"), tmp_path))
    assert header == ["case", "peer", "cases", "geometric mean", "least", "most", "machine"]
    assert lines == [
        ["flash", "a", "2", "1.00", "0.50", "2.00", "2x GPU"],
        ["flash", "b", "1", "2.00", "2.00", "2.00", "2x GPU"],
    ]


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert tables.regenerate(block("moe case=flash"), tmp_path) == block("moe case=flash", tables.NOTHING)


def test_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'speed'"):
        tables.regenerate(block("speed"), tmp_path)


def test_check_fails_on_a_stale_table_and_a_run_mends_it(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(block("env"))
    assert tables.main(["--root", str(tmp_path), "--check"]) == 1
    assert readme.read_text() == block("env")
    assert tables.main(["--root", str(tmp_path)]) == 0
    assert tables.main(["--root", str(tmp_path), "--check"]) == 0
    assert env.TABLE[0].meaning in readme.read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (1234.5, "1234"),
        (99.94, "99.9"),
        (0.5, "0.5"),
        (1.5e-7, "1.5e-07"),
        (0.0, "0"),
        (8, "8"),
        ("a", "a"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert tables.cell(value) == text


def test_pipes_do_not_break_a_row() -> None:
    assert tables.markdown(["a"], [["x|y"]]).endswith("| x\\|y |\n")
