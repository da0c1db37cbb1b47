"""What the README says is so: its example runs, its links and files exist, its lists are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch

import megamoe
from megamoe import cli
from megamoe.engines.choose import PREFERENCE
from megamoe.functional import explain_engines
from megamoe.mega import runner
from megamoe.problem import Problem, Recipe
from tests.repo import ROOT, is_checkout

README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    return str(code)


def test_example_learns_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    # torch's own threads may abort a rank at its interpreter's end, after all is done (megamoe/leave.py); so they do,
    # one run in eight on a busy machine, where the example is a plain DDP model without any of ours.
    script.write_text(example() + "import os, sys\nsys.stdout.flush()\nos._exit(0)\n", encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(megamoe.__file__).parent.parent)}  # also where not installed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in ("0", "1"):
        losses = [float(v) for v in re.findall(rf"rank {rank} step \d+ loss ([\d.]+)", done.stdout)]
        assert len(losses) == 30
        assert losses[-1] < 0.5 * losses[0], losses


def test_engine_table_says_what_the_engines_say() -> None:
    rows = {row[0].strip("`"): row for row in table_after("## Engines")}
    for name in PREFERENCE:
        runs = [recipe for recipe in get_args(Recipe) if runs_somewhere(name, recipe)]
        assert rows[name][2] == ", ".join(runs), name


def table_after(heading: str) -> list[list[str]]:
    section = README.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def runs_somewhere(engine: str, recipe: Recipe) -> bool:
    problem = Problem(hidden=256, intermediate=256, num_experts=8, top_k=2, recipe=recipe)
    if engine == "mega":  # what the kernel can do where there is a GPU for it
        return runner.why_not(problem, problem.num_experts) is None
    return dict(explain_engines(problem, torch.device("cpu"), None))[engine] is None


@pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")
def test_links_and_files_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"
    for folder in re.findall(r"^(\w+)/ ", README, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")
def test_every_page_can_be_reached() -> None:
    architecture = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"architecture.md"}
    missing = sorted(name for name in pages if f"]({name})" not in architecture)
    assert not missing, f"docs/architecture.md links to every page, not yet to {', '.join(missing)}"


@pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")
def test_the_two_commands_name_files_that_exist() -> None:
    for script in re.findall(r"launch_scripts/\w+\.py", README):
        assert (ROOT / script).is_file(), script
    for command in re.findall(r"python -m megamoe (\w+)", README):
        assert command in cli.COMMANDS


def test_supported_pythons_are_those_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if "Python :: 3." in c]
    assert f"Python {versions[0]} to {versions[-1]}" in README
    assert project["requires-python"] == f">={versions[0]}"
