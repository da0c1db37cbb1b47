"""What this machine can run: findings that ``python -m megamoe doctor`` prints. Nothing here raises or needs a GPU."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from typing import get_args

import torch
import torch.distributed as dist

from megamoe import env
from megamoe.bench.results import driver_version
from megamoe.engines.choose import PREFERENCE
from megamoe.errors import MegaMoEError
from megamoe.functional import explain_engines
from megamoe.kernels.jit import compiler
from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.store import DiskStore, default_root
from megamoe.problem import Problem, Recipe
from megamoe.symm_mem import select
from megamoe.symm_mem.backends import shm


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``ok`` None is plain information; ``advice`` says what to do about a no."""

    section: str
    name: str
    ok: bool | None
    detail: str
    advice: str = ""


# Distribution name, whether megamoe needs it, and what is lost without it.
PACKAGES: tuple[tuple[str, bool, str], ...] = (
    ("torch", True, ""),
    ("numpy", True, ""),
    ("safetensors", True, ""),
    ("rich", True, ""),
    ("matplotlib", True, ""),
    ("cuda-bindings", True, "compiling and launching kernels; pip install cuda-python"),
    ("nvidia-cuda-nvrtc", True, "compiling kernels; pip install nvidia-cuda-nvrtc"),
    ("nvidia-cuda-runtime", True, "the headers of FP8 and BF16 types; pip install nvidia-cuda-runtime"),
    ("nvidia-cuda-nvdisasm", False, "tests that read machine code; pip install 'megamoe[test]'"),
    ("nvshmem4py-cu13", False, "the nvshmem backend; pip install 'megamoe[nvshmem]'"),
)


def versions() -> Iterator[Finding]:
    """Platform, and each package that megamoe needs or can use."""
    supported = sys.platform in ("linux", "darwin")
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} CPU cores"
    yield Finding("versions", "system", supported, system, "" if supported else "use Linux or macOS")
    for name, needed, use in PACKAGES:
        try:
            yield Finding("versions", name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            cuda_only = "cuda" in name or "nvshmem" in name
            if cuda_only and sys.platform != "linux":
                yield Finding("versions", name, None, "not needed on this platform")
            elif needed:
                yield Finding("versions", name, False, "not installed", f"needed for {use or 'everything'}")
            else:
                yield Finding("versions", name, None, "not installed", f"optional: {use}")


def gpus() -> Iterator[Finding]:
    """Driver, then each visible CUDA device and whether the kernels are written for it."""
    driver = driver_version()
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        detail = f"no CUDA device is visible; driver {driver or 'not found'}, {build}"
        yield Finding("GPUs", "CUDA", False, detail, "the reference and staged engines run on the CPU")
        return
    yield Finding("GPUs", "CUDA", True, f"driver {driver or 'unknown'}, torch built for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gib = properties.total_memory / 2**30
        detail = f"{properties.name}, {capability}, {properties.multi_processor_count} SMs, {gib:.0f} GiB"
        ok = properties.major == 9
        advice = "" if ok else f"the kernels are for compute capability 9.0; {capability} runs reference and staged"
        yield Finding("GPUs", f"cuda:{index}", ok, detail, advice)


def links() -> Iterator[Finding]:
    """Which pairs of GPUs can address each other's memory, and the collectives that torch brings."""
    count = torch.cuda.device_count()
    if count < 2:
        yield Finding("links", "peer access", None, f"{count} CUDA device(s): no pair to look at")
    for a, b in combinations(range(count), 2):
        ok = torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
        advice = "" if ok else "mega needs NVLink or PCIe peer access between all its GPUs; staged runs without"
        yield Finding("links", f"cuda:{a} - cuda:{b}", ok, "peer access" if ok else "no peer access", advice)
    backends = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    for name, available in backends.items():
        ok = dist.is_available() and available()
        needed = name == "gloo" or count > 0
        detail = "built into torch" if ok else "not built into torch"
        advice = "" if ok or not needed else f"install a torch build with {name}"
        yield Finding("links", name, ok if needed else ok or None, detail, advice)


def symmetric_memory() -> Iterator[Finding]:
    """Each backend with the kinds of device it serves in this process, then the room for the shm backend's file."""
    devices = [torch.device("cpu"), torch.device("cuda", 0)]
    told = {device: select.why_not(device) for device in devices}
    for name in select.BACKENDS:
        served = [device.type for device in devices if told[device][name] is None]
        if served:
            yield Finding("symmetric memory", name, True, f"serves {' and '.join(served)}")
        else:
            yield Finding("symmetric memory", name, None, str(told[devices[-1]][name]))
    for folder, free in shm.room():
        detail = f"{folder} has {free / 2**30:.2f} GiB free" if free is not None else f"{folder} does not exist"
        advice = "" if free is not None else "set MEGAMOE_SHM_DIR to an existing folder"
        yield Finding("symmetric memory", "shm folder", None if free is not None else False, detail, advice)


def engines() -> Iterator[Finding]:
    """For each engine, best first, and kind of device: the recipes it runs here."""
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for name in PREFERENCE:
        for device in devices:
            told = {r: dict(explain_engines(_sample(r), device, None))[name] for r in get_args(Recipe)}
            unable = {recipe: why for recipe, why in told.items() if why is not None}
            able = [recipe for recipe in told if recipe not in unable]
            detail = f"runs {', '.join(able)}" if able else next(iter(unable.values()))
            if able and unable:
                detail += f"; not {', '.join(unable)}: {next(iter(unable.values()))}"
            yield Finding("engines", f"{name} on {device.type}", True if able else None, detail)


def _sample(recipe: Recipe) -> Problem:
    return Problem(hidden=1024, intermediate=512, num_experts=8, top_k=2, recipe=recipe)


def compilers() -> Iterator[Finding]:
    """NVRTC, by compiling a kernel for sm_90a; nvcc and nvdisasm, by looking; the folder of compiled kernels."""
    empty = KernelSource(name="doctor", code='extern "C" __global__ void doctor() {}', entry="doctor")
    wanted = compiler.chosen_compiler()
    for kind in get_args(compiler.CompilerKind):
        try:
            compiled = compiler.compile_source(empty, kind=kind)
            version = compiler.compiler_id(kind).split()[1]
            detail = f"{version} compiles for {empty.arch} ({len(compiled.cubin)} bytes)"
            yield Finding("compilers", kind, True, detail)
        except MegaMoEError as error:
            needed = kind == wanted
            advice = "" if not needed else "kernels can't be compiled; the reference and staged engines don't need them"
            yield Finding("compilers", kind, False if needed else None, str(error), advice)
    yield _cache_folder()


def _cache_folder() -> Finding:
    root = default_root()
    parent = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        advice = "set MEGAMOE_CACHE_DIR to a folder that can be; until then every process compiles anew"
        return Finding("compilers", "cache", False, f"{root} can't be written", advice)
    entries = list(DiskStore(root).entries())
    total = sum(entry.num_bytes for entry in entries) / 2**20
    return Finding("compilers", "cache", True, f"{root}: {len(entries)} kernels, {total:.1f} MiB")


def environment() -> Iterator[Finding]:
    """Each variable of the table that is set, and whether its text makes sense."""
    is_set = env.snapshot()
    if not is_set:
        yield Finding("environment", "variables", None, "none of megamoe's is set; the README lists them")
    for name, text in is_set.items():
        try:
            env.get(name)
            yield Finding("environment", name, True, text)
        except ValueError as error:
            yield Finding("environment", name, False, text, str(error))


SECTIONS: tuple[Callable[[], Iterator[Finding]], ...] = (
    versions,
    gpus,
    links,
    engines,
    symmetric_memory,
    compilers,
    environment,
)


def examine() -> list[Finding]:
    """Every finding, section by section; a probe that fails becomes a finding itself."""
    findings: list[Finding] = []
    for section in SECTIONS:
        try:
            findings.extend(section())
        except Exception as error:  # a doctor does not die of the patient's illness
            findings.append(
                Finding(section.__name__, "probe", False, f"{type(error).__name__}: {error}", "report this")
            )
    return findings
