"""``Kernel``: a cubin on the devices of this process, and its launch.

A cuLibrary belongs to no context: one load serves every device. The launch fills a ``CUlaunchConfig`` that was built
once; what a call adds is the grid, the stream and the address of the arguments.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.kernels.jit.cache import KernelCache, default_cache
from megamoe.kernels.jit.compiler import Compiled
from megamoe.kernels.jit.driver import bind_context, checked, driver, is_invalid_context
from megamoe.kernels.jit.source import KernelSource

_STATIC_SMEM_LIMIT = 48 * 1024  # above this a kernel has to ask for dynamic shared memory by attribute


@dataclass(frozen=True, kw_only=True)
class LaunchShape:
    """What a kernel's launches have in common.

    Args:
        threads: threads of a block.
        smem_bytes: dynamic shared memory of a block.
        cluster: blocks of a cluster along x; the grid must be divisible by it.
        cooperative: every block resident at once, or the launch is refused.
        pdl: programmatic dependent launch: may start before its predecessor in the stream ends, and has to execute
            ``griddepcontrol.wait`` before it reads what that one writes.
    """

    threads: int
    smem_bytes: int = 0
    cluster: int = 1
    cooperative: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be 1 to 1024, got {self.threads}")
        if not 0 <= self.smem_bytes <= 227 * 1024:
            raise ValueError(f"smem_bytes must be 0 to {227 * 1024} (SM90), got {self.smem_bytes}")
        if self.cluster not in (1, 2, 4, 8, 16):
            raise ValueError(f"cluster must be 1, 2, 4, 8 or 16, got {self.cluster}")


class Module:
    """Machine code in the driver, shared by every ``Kernel`` of one source."""

    def __init__(self, compiled: Compiled, entry: str) -> None:
        cu = driver()
        self.compiled = compiled  # the driver may read the cubin later than the load
        self.entry = entry
        loaded = cu.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0)
        self.library = checked(loaded, f"loading the machine code of {entry}")
        self.kernel = checked(cu.cuLibraryGetKernel(self.library, entry.encode()), f"finding {entry} in its cubin")
        self.function = cu.CUfunction(int(self.kernel))
        self._smem_bytes: dict[int, int] = {}

    def prepare(self, device: int, shape: LaunchShape) -> None:
        """Set what the driver keeps per kernel and device, so that ``shape`` may be launched there."""
        cu = driver()
        attributes = cu.CUfunction_attribute
        most = max(shape.smem_bytes, self._smem_bytes.get(device, 0))
        if most + self.compiled.report.smem_bytes > _STATIC_SMEM_LIMIT:
            limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            result = cu.cuKernelSetAttribute(limit, most, self.kernel, device)
            checked(result, f"asking for {most} bytes of shared memory for {self.entry}")
        self._smem_bytes[device] = most
        if shape.cluster > 8:
            allow = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            result = cu.cuKernelSetAttribute(allow, 1, self.kernel, device)
            checked(result, f"asking for clusters of {shape.cluster} for {self.entry}")


class Kernel:
    """A loaded kernel with the shape of its launches. Made by ``load``; threads may share one."""

    def __init__(self, module: Module, shape: LaunchShape) -> None:
        self.module = module
        self.shape = shape
        self._launch = driver().cuLaunchKernelEx
        self._prepared: set[int] = set()
        self._local = threading.local()

    def launch(self, args: ctypes.Structure, grid: int | tuple[int, int, int], *, stream: int | None = None) -> None:
        """Queue the kernel on the current device; ``args`` may be changed as soon as this returns.

        Args:
            args: the kernel's one parameter, of the type whose CUDA twin ``cuda_args`` made.
            grid: number of blocks (not of clusters).
            stream: raw handle; torch's current stream of the current device if None.

        Raises:
            MegaMoEError: the driver refused; the sentence says what and why.
        """
        device: int = torch._C._cuda_getDevice()
        if device not in self._prepared:
            self._prepare(device)
        try:
            config, block = self._local.state
        except AttributeError:
            config, block = self._local.state = self._config(), (ctypes.c_void_p * 1)()
        config.gridDimX, config.gridDimY, config.gridDimZ = (grid, 1, 1) if isinstance(grid, int) else grid
        config.hStream = torch._C._cuda_getCurrentRawStream(device) if stream is None else stream
        block[0] = ctypes.addressof(args)
        (status,) = self._launch(config, self.module.function, ctypes.addressof(block), 0)
        if status != 0:
            if is_invalid_context(status):
                bind_context(device)
                (status,) = self._launch(config, self.module.function, ctypes.addressof(block), 0)
            checked((status,), f"launching {self.module.entry} with grid {grid} and {self.shape}")

    def max_blocks_per_sm(self) -> int:
        """Blocks of this kernel that fit on one multiprocessor of the current device."""
        self._prepare(torch._C._cuda_getDevice())
        query = driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
        result = query(self.module.function, self.shape.threads, self.shape.smem_bytes)
        return int(checked(result, f"asking for the occupancy of {self.module.entry}"))

    def _prepare(self, device: int) -> None:
        with _LOADING:
            bind_context(device)
            self.module.prepare(device, self.shape)
            self._prepared.add(device)

    def _config(self) -> Any:
        """A ``CUlaunchConfig`` of this thread but for grid and stream."""
        cu = driver()
        config = cu.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = self.shape.threads, 1, 1
        config.sharedMemBytes = self.shape.smem_bytes
        ids, attributes = cu.CUlaunchAttributeID, []
        if self.shape.cluster > 1:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            value = attribute.value
            value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = self.shape.cluster, 1, 1
            attributes.append(attribute)
        if self.shape.cooperative:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        if self.shape.pdl:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        return config


_MODULES: dict[KernelSource, Module] = {}
_KERNELS: dict[tuple[KernelSource, LaunchShape], Kernel] = {}
_LOADING = threading.Lock()


def load(source: KernelSource, shape: LaunchShape, *, cache: KernelCache | None = None) -> Kernel:
    """The kernel of ``source``, compiled if no cache holds it, loaded once a process; shapes share the machine code.

    Raises:
        CompileError: it did not compile.
        EngineUnavailableError: no driver, or no compiler.
    """
    found = _KERNELS.get((source, shape))
    if found is not None:
        return found
    compiled = (cache or default_cache()).get(source)
    with _LOADING:
        if source not in _MODULES:
            _MODULES[source] = Module(compiled, source.entry)
        return _KERNELS.setdefault((source, shape), Kernel(_MODULES[source], shape))
