"""``KernelSource`` -> cubin, by NVRTC (default, in process) or nvcc. Neither needs a GPU or a driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megamoe import env
from megamoe.errors import CompileError, EngineUnavailableError
from megamoe.kernels.jit.ptxas import PtxasReport
from megamoe.kernels.jit.source import Headers, KernelSource, reached_headers

CompilerKind = Literal["nvrtc", "nvcc"]
COMMON_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_LOCATION = re.compile(r"^(\S+?)\((\d+)\): (?:catastrophic )?error", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: machine code, the compiler's whole log, and what ptxas said about the entry."""

    cubin: bytes
    log: str
    report: PtxasReport


def chosen_compiler() -> CompilerKind:
    """The compiler that MEGAMOE_COMPILER asks for."""
    kind: CompilerKind = env.get("MEGAMOE_COMPILER")
    return kind


@cache
def compiler_id(kind: CompilerKind) -> str:
    """Kind and exact version, part of every cache key. Raises EngineUnavailableError if the compiler is missing."""
    if kind == "nvcc":
        text = subprocess.run([nvcc_path(), "--version"], check=True, capture_output=True, text=True).stdout
        match = re.search(r"V([\d.]+)", text)
        return f"nvcc {match.group(1) if match else text.strip()}"
    nvrtc = _nvrtc()
    major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    # NVRTC tells no patch level; the library's size stands for it.
    from cuda import pathfinder

    path = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    return f"nvrtc {major}.{minor} {os.stat(path).st_size if path else ''}".strip()


@cache
def toolkit_headers() -> Path | None:
    """Folder that holds cuda_fp8.h and cuda_bf16.h, None if no CUDA headers are installed."""
    try:
        from cuda import pathfinder
    except ImportError:
        return None
    found = pathfinder.find_nvidia_header_directory("cudart")
    return Path(found) if found else None


def headers_of(source: KernelSource) -> Headers:
    """Every header that ``source`` reaches, ours and the toolkit's."""
    return reached_headers(source.code, toolkit_root=toolkit_headers())


def compile_source(
    source: KernelSource, *, kind: CompilerKind | None = None, headers: Headers | None = None
) -> Compiled:
    """Compile ``source``; ``headers`` saves reading them again.

    Raises:
        CompileError: with the errors, the lines they point at, and ``log`` and ``listing`` in full.
        EngineUnavailableError: the compiler is not installed.
    """
    kind = kind or chosen_compiler()
    headers = headers or headers_of(source)
    options = [f"--gpu-architecture={source.arch}", *COMMON_OPTIONS, *source.options]
    if (root := toolkit_headers()) is not None:
        options.append(f"-I{root}")
    build = _build_nvcc if kind == "nvcc" else _build_nvrtc
    cubin, log = build(source, headers, options)
    if cubin is None:
        raise _failure(source, headers, kind, log)
    try:
        return Compiled(cubin, log, PtxasReport.from_log(log, source.entry))
    except ValueError as error:
        raise CompileError(f"kernel {source.name}: {error}", log=log, listing=listing(source.code)) from None


def listing(code: str) -> str:
    """``code`` with line numbers."""
    return "\n".join(f"{number:5d} | {line}" for number, line in enumerate(code.splitlines(), 1))


def nvcc_path() -> str:
    """nvcc of CUDA_HOME, else the one on PATH."""
    found = shutil.which("nvcc", path=_cuda_home_bin()) or shutil.which("nvcc")
    if found is None:
        raise EngineUnavailableError("MEGAMOE_COMPILER=nvcc, but no nvcc stands in CUDA_HOME/bin or on PATH")
    return found


def _cuda_home_bin() -> str | None:
    home = env.get("CUDA_HOME")
    return os.path.join(home, "bin") if home else None


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise EngineUnavailableError(f"NVRTC could not be loaded ({error}); install nvidia-cuda-nvrtc") from error
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """The values of an NVRTC call; CompileError if it failed."""
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC failed: {result[0].name}")
    return result[1] if len(result) == 2 else result[1:]


def _build_nvrtc(source: KernelSource, headers: Headers, options: list[str]) -> tuple[bytes | None, str]:
    nvrtc = _nvrtc()
    # Where a driver is present NVRTC keeps machine code itself, and a hit comes without the ptxas report.
    options = [*options, "--no-cache"]
    names = [name.encode() for name in headers.ours]
    texts = [text.encode() for text in headers.ours.values()]
    program = _checked(
        nvrtc,
        nvrtc.nvrtcCreateProgram(source.code.encode(), f"{source.name}.cu".encode(), len(names), texts, names),
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log_bytes = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log_bytes))
        log = log_bytes.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return None, log or status.name
        cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _build_nvcc(source: KernelSource, headers: Headers, options: list[str]) -> tuple[bytes | None, str]:
    with tempfile.TemporaryDirectory(prefix="megamoe-nvcc-") as folder:
        # Exactly the texts that were hashed are compiled, not what stands on disk by now.
        for name, text in headers.ours.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        Path(folder, f"{source.name}.cu").write_text(source.code, encoding="utf-8")
        command = [nvcc_path(), "-cubin", *options, "-I.", f"{source.name}.cu", "-o", "out.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        return (Path(folder, "out.cubin").read_bytes() if done.returncode == 0 else None), log


def _failure(source: KernelSource, headers: Headers, kind: CompilerKind, log: str) -> CompileError:
    """CompileError that shows the lines the log points at."""
    texts = {f"{source.name}.cu": source.code, **headers.ours}
    shown = []
    for name, number in dict.fromkeys(_LOCATION.findall(log)):
        if name in texts:
            lines = listing(texts[name]).splitlines()
            at = int(number) - 1
            shown.append("\n".join([f"{name}:", *lines[max(0, at - 3) : at + 3]]))
        if len(shown) == 3:
            break
    message = "\n\n".join([f"kernel {source.name} did not compile with {kind} for {source.arch}", log.strip(), *shown])
    return CompileError(message, log=log, listing=listing(source.code))
