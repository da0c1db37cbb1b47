"""sdist and wheel hold what git tracks, nothing less and nothing more, and install one import name."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import megamoe
from tests.repo import LINKED, ROOT, is_checkout, tracked

pytestmark = pytest.mark.skipif(not is_checkout(), reason="needs a git checkout")


def export(target: Path) -> None:
    """Copy every tracked file, links as links: a stale build folder would ship deleted files."""
    for name in tracked():
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, destination, follow_symlinks=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one sdist and the wheel built from it, without network."""
    source, out = tmp_path_factory.mktemp("export"), tmp_path_factory.mktemp("dist")
    export(source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def packaged() -> set[str]:
    """Tracked files of the four package folders under the names they have once installed."""
    names = set()
    for name in tracked():
        top = name.split("/")[0]
        if (ROOT / name).is_symlink():
            continue
        if top == "megamoe":
            names.add(name)
        elif top in LINKED:
            names.add(f"megamoe/{name}")
    return names


def test_wheel_holds_what_git_tracks(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"megamoe-{megamoe.__version__}-py3-none-any.whl", "the wheel must stay pure Python"
    assert wheel.stat().st_size < 1_000_000, f"{wheel.stat().st_size} bytes; the wheel must stay under 1 MB"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, extra = packaged() - names, names - packaged()
    assert not missing, f"tracked, not in the wheel (package-data in pyproject.toml?): {sorted(missing)}"
    assert not extra, f"in the wheel, not tracked: {sorted(extra)}"


def test_sdist_holds_what_git_tracks(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    grafted = {name for name in tracked() if name.split("/")[0] in ("tests", "launch_scripts", "docs")}
    expected = packaged() | grafted | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert not (missing := expected - names), f"tracked, not in the sdist (MANIFEST.in?): {sorted(missing)}"
    generated = {name for name in names if name.startswith("megamoe.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    extra = names - expected - generated - {"MANIFEST.in", ".clang-format"}
    assert not extra, f"in the sdist, not tracked: {sorted(extra)}"


def test_wheel_installs_one_import_name(built: Path, tmp_path: Path) -> None:
    """Unpacked away from the checkout, the wheel imports, brings its headers, and adds no top-level ``kernels``."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"megamoe", f"megamoe-{megamoe.__version__}.dist-info"}
    code = "import megamoe, megamoe.kernels, megamoe.dispatch, megamoe.symm_mem; print(megamoe.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_version_is_stated_once() -> None:
    assert f'version = "{megamoe.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_from_the_repository_root() -> None:
    """It probes for a package named ``kernels`` and finds ours when the root is on sys.path."""
    code = "import transformers; from transformers import AutoConfig"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
