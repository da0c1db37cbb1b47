"""The walls of docs/architecture.md: who may import, include, write assembly, and read the environment."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo import LINKED, ROOT, is_checkout, library_files, tracked

LEAVES = {"megamoe.env", "megamoe.errors"}
# Frameworks that the package plugs into and never needs: named in adapters (and, as peers, in benchmarks) only.
FRAMEWORKS = {"transformers", "megatron", "vllm", "sglang", "torchtitan", "deep_gemm", "flashinfer"}

# Rooms of the device headers from the ground up: a room may include itself and every level below its own.
DEVICE_LEVELS = (("common",), ("ptx",), ("sync",), ("comm", "mma"), ("sched", "epilogue"), ("gemm", "mega"))
DEVICE_ALLOWED = {
    room: {room, *(below for level in DEVICE_LEVELS[:height] for below in level)}
    for height, rooms in enumerate(DEVICE_LEVELS)
    for room in rooms
} | {"quant": {"quant", "common", "ptx", "sync"}}
DEVICE_ALLOWED["mega"].add("quant")  # casts on the way
DEVICE_FORBIDDEN = ("cute/", "cutlass/", "cuda/std", "cooperative_groups")


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; ``from a import b`` counts as ``a.b``, a relative import as ``.``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "."
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_faults(path: str, tree: ast.Module) -> list[str]:
    """Imports of one file (path relative to the root, through the links) that break the one-way flow."""
    parts = Path(path).parts
    room = f"megamoe.{parts[1]}" if parts[0] == "megamoe" and parts[1] in LINKED else None
    faults = []
    for line, name in imports(tree):
        top = name.split(".")[0]
        if top == "":
            faults.append(f"{path}:{line}: relative import; write megamoe.…")
        elif top in LINKED:
            faults.append(f"{path}:{line}: imports top-level {name}; write megamoe.{name}")
        elif room and top == "megamoe":
            module = ".".join(name.split(".")[:2])
            if module != room and module not in LEAVES:
                faults.append(f"{path}:{line}: {room} must not import {name}")
        elif top in FRAMEWORKS and not {"adapters", "bench", "tests"} & set(parts):
            faults.append(f"{path}:{line}: {name} is imported in megamoe/adapters only")
    return faults


def include_faults(path: str, text: str) -> list[str]:
    """Includes of one device file (path relative to include/megamoe) that run against the order."""
    room = Path(path).parts[0].split(".")[0]
    if room not in DEVICE_ALLOWED:
        return [f"{path}: {room} is no room of the device headers ({', '.join(DEVICE_ALLOWED)})"]
    faults = []
    for included in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, flags=re.MULTILINE):
        if included.startswith(DEVICE_FORBIDDEN):
            faults.append(f"{path}: includes {included}; headers stand on their own")
        if included.startswith("megamoe/"):
            other = included.split("/")[1].split(".")[0]
            if other not in DEVICE_ALLOWED[room]:
                faults.append(f"{path}: {room} must not include {included}")
    return faults


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def environment_faults(path: str, tree: ast.Module) -> list[str]:
    """Places that read or write the environment."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    ]
    return [f"{path}:{line}: environment variables are read in megamoe/env.py" for line in found]


def device_files() -> list[tuple[str, str]]:
    """(path relative to include/megamoe, text) of every device header and kernel under it."""
    base = Path("megamoe/kernels/include/megamoe")
    files = [path for suffix in (".cuh", ".cu", ".h") for path in library_files(suffix) if path.is_relative_to(base)]
    return [(str(path.relative_to(base)), (ROOT / path).read_text(encoding="utf-8")) for path in files]


def test_imports_run_one_way() -> None:
    files = [
        *library_files(".py"),
        *(p.relative_to(ROOT) for d in ("tests", "launch_scripts") for p in (ROOT / d).rglob("*.py")),
    ]
    assert len(files) > 20
    assert not (faults := [f for path in files for f in import_faults(str(path), parse(path))]), "\n".join(faults)


def test_device_includes_run_one_way() -> None:
    assert not (faults := [f for path, text in device_files() for f in include_faults(path, text)]), "\n".join(faults)


def test_device_order_is_the_documented_one() -> None:
    order = " <- ".join(level[0] if len(level) == 1 else f"{{{', '.join(level)}}}" for level in DEVICE_LEVELS)
    assert order in (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_assembly_stands_in_ptx_only() -> None:
    faults = [
        path
        for path, text in device_files()
        if re.search(r"\basm\b", without_comments(text)) and not path.startswith("ptx")
    ]
    assert not faults, f"inline assembly outside ptx/: {', '.join(faults)}"


def test_environment_is_read_in_one_file() -> None:
    # testing/ starts ranks the way torchrun does, through the environment.
    files = [p for p in library_files(".py") if str(p) != "megamoe/env.py" and not p.is_relative_to("megamoe/testing")]
    assert not (faults := [f for p in files for f in environment_faults(str(p), parse(p))]), "\n".join(faults)


def test_top_level_folders_are_free_of_effects() -> None:
    """Other projects probe for packages called ``kernels``; importing ours from the root must do nothing."""
    for name in LINKED:
        body = parse(Path("megamoe") / name / "__init__.py").body
        effects = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        assert not effects, f"{name}/__init__.py holds more than a docstring (line {effects[0].lineno})"


@pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")
def test_no_file_names_a_machine() -> None:
    """A path of one machine in the tree breaks on every other."""
    machine = re.compile(r"(?:^|[\s\"'=(:])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+)/")
    faults = []
    for name in tracked():
        path = ROOT / name
        if path.is_symlink() or path.suffix in {".png", ".gz"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine.search(line):
                faults.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not faults, "\n".join(faults)


@pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")
def test_files_keep_one_job() -> None:
    """Not a failure: a file over 400 lines asks its reader whether it still has one job."""
    for name in tracked():
        if name.endswith((".py", ".cu", ".cuh")) and not (ROOT / name).is_symlink():
            lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
            if lines > 400:
                warnings.warn(f"{name} has {lines} lines: does it still have one job?", stacklevel=1)


def test_the_checks_see_what_they_forbid() -> None:
    """Each wall, with a planted breach."""
    kernel = "megamoe/kernels/jit/x.py"
    for text in ("from megamoe import problem", "import megamoe.symm_mem.arena", "from . import y", "import kernels"):
        assert import_faults(kernel, ast.parse(text)), text
    for text in (
        "from megamoe.env import get",
        "import megamoe.errors",
        "from megamoe.kernels.jit import cache",
        "import os",
    ):
        assert not import_faults(kernel, ast.parse(text)), text
    assert import_faults("megamoe/layer.py", ast.parse("import transformers"))
    assert not import_faults("megamoe/adapters/hf.py", ast.parse("import transformers"))
    assert include_faults("sync/wait.cuh", '#include "megamoe/gemm/dense.cuh"')
    assert include_faults("ptx/a.cuh", "#include <cute/tensor.hpp>")
    assert not include_faults("gemm/dense.cuh", '#include "megamoe/sync/wait.cuh"\n#include <cuda_fp8.h>')
    assert environment_faults("x.py", ast.parse("import os\nos.environ['A']"))
    assert environment_faults("x.py", ast.parse("from os import getenv"))
    assert not re.search(r"\basm\b", without_comments("// asm in a comment\n/* asm */ int a;"))
