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

from megamoe.errors import MegaMoEError
from megamoe.kernels.jit.cache import KernelCache, default_cache
from megamoe.kernels.jit.compiler import Compiled
from megamoe.kernels.jit.driver import checked, driver, explain
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


class Kernel:
    """A loaded kernel. Made by ``load``; threads may share one."""

    def __init__(self, compiled: Compiled, entry: str, shape: LaunchShape) -> None:
        self.compiled = compiled
        self.entry = entry
        self.shape = shape
        cu = driver()
        self._cubin = compiled.cubin  # the driver may read it later than the load
        self._library = checked(
            cu.cuLibraryLoadData(self._cubin, [], [], 0, [], [], 0), f"loading the machine code of {entry}"
        )
        self._kernel = checked(cu.cuLibraryGetKernel(self._library, entry.encode()), f"finding {entry} in its cubin")
        self._function = cu.CUfunction(int(self._kernel))
        self._launch = cu.cuLaunchKernelEx
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
        (status,) = self._launch(config, self._function, ctypes.addressof(block), 0)
        if status != 0:
            raise MegaMoEError(f"launching {self.entry} with grid {grid} and {self.shape} failed: {explain(status)}")

    def max_blocks_per_sm(self) -> int:
        """Blocks of this kernel that fit on one multiprocessor of the current device."""
        self._prepare(torch._C._cuda_getDevice())
        query = driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
        result = query(self._function, self.shape.threads, self.shape.smem_bytes)
        return int(checked(result, f"asking for the occupancy of {self.entry}"))

    def _prepare(self, device: int) -> None:
        """Attributes that are kept per device; the first call there creates torch's context if there is none."""
        cu = driver()
        torch.cuda.current_stream(device)
        limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        total = self.shape.smem_bytes + self.compiled.report.smem_bytes
        if total > _STATIC_SMEM_LIMIT:
            result = cu.cuKernelSetAttribute(limit, self.shape.smem_bytes, self._kernel, device)
            checked(result, f"asking for {self.shape.smem_bytes} bytes of shared memory for {self.entry}")
        if self.shape.cluster > 8:
            allow = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            result = cu.cuKernelSetAttribute(allow, 1, self._kernel, device)
            checked(result, f"asking for clusters of {self.shape.cluster} for {self.entry}")
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


_LOADED: dict[tuple[KernelSource, LaunchShape], Kernel] = {}
_LOADING = threading.Lock()


def load(source: KernelSource, shape: LaunchShape, *, cache: KernelCache | None = None) -> Kernel:
    """The kernel of ``source``, compiled if no cache holds it, loaded once a process for each ``shape``.

    Raises:
        CompileError: it did not compile.
        EngineUnavailableError: no driver, or no compiler.
    """
    found = _LOADED.get((source, shape))
    if found is not None:
        return found
    compiled = (cache or default_cache()).get(source)
    with _LOADING:
        if (found := _LOADED.get((source, shape))) is None:
            found = _LOADED[source, shape] = Kernel(compiled, source.entry, shape)
        return found
