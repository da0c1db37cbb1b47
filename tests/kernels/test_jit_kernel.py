from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamoe.kernels.jit.cache import KernelCache
from megamoe.kernels.jit.compiler import toolkit_headers
from megamoe.kernels.jit.kernel import LaunchShape, load
from megamoe.kernels.jit.source import KernelSource
from megamoe.kernels.jit.structs import cuda_args
from megamoe.kernels.jit.tensor_map import Swizzle, tensor_map
from tests.kernels.jit_kernels import SaxpyArgs, TileArgs, saxpy, tile

HERE = Path(__file__).parent
PREPARE = """
import torch
torch._C._cuda_getDevice = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 0x77
torch.cuda.current_stream = lambda device=None: None
from megamoe.kernels.jit.kernel import LaunchShape, load
from tests.kernels.jit_kernels import SaxpyArgs, saxpy
"""


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = toolkit_headers()
    if shutil.which("gcc") is None or headers is None or not (headers / "cuda.h").is_file():
        pytest.skip("the fake driver needs gcc and cuda.h")
    folder = tmp_path_factory.mktemp("driver")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        f"-I{headers}",
        str(HERE / "fake_driver.c"),
        "-o",
        str(folder / "libcuda.so.1"),
    ]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-ldl"], check=True)
    return folder


def run_with(fake_driver: Path, cache: Path, code: str, **extra: str) -> str:
    """What the fake driver was asked for, and what ``code`` printed."""
    KernelCache(cache).get(saxpy())  # NVRTC asks the driver more than the fake one knows
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_driver), "MEGAMOE_CACHE_DIR": str(cache), **extra}
    preload = f"import ctypes; ctypes.CDLL('{fake_driver}/libcuda.so.1', ctypes.RTLD_GLOBAL)\n"
    done = subprocess.run(
        [sys.executable, "-u", "-c", preload + PREPARE + code],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_launch_reaches_the_driver_as_it_was_meant(fake_driver: Path, tmp_path: Path) -> None:
    out = run_with(
        fake_driver,
        tmp_path,
        """
shape = LaunchShape(threads=128, smem_bytes=200 * 1024, cluster=2, cooperative=True, pdl=True)
kernel = load(saxpy(), shape)
assert load(saxpy(), shape) is kernel
args = SaxpyArgs(n=41)
kernel.launch(args, (6, 5, 4))
args.n = 42
kernel.launch(args, 132, stream=0x99)
""",
    )
    assert out.splitlines() == [
        "load ELF",
        "kernel saxpy",
        "context 0x1000",
        f"attribute 8={200 * 1024} device 0",
        "launch 0x22 grid 6 5 4 block 128 1 1 smem 204800 stream 0x77 n 41",
        "cluster 2 1 1", "cooperative 1", "pdl 1",
        "launch 0x22 grid 132 1 1 block 128 1 1 smem 204800 stream 0x99 n 42",
        "cluster 2 1 1", "cooperative 1", "pdl 1",
    ]  # fmt: skip


def test_threads_and_shapes_share_the_machine_code(fake_driver: Path, tmp_path: Path) -> None:
    out = run_with(
        fake_driver,
        tmp_path,
        """
import threading
small, large = (load(saxpy(), LaunchShape(threads=32, smem_bytes=kb * 1024)) for kb in (64, 128))
for kernel in (large, small):
    kernel.launch(SaxpyArgs(n=1), 1)
thread = threading.Thread(target=small.launch, args=(SaxpyArgs(n=2), 1))
thread.start()
thread.join()
""",
    )
    launch = "launch 0x22 grid 1 1 1 block 32 1 1 smem {} stream 0x77 n {}"
    assert out.splitlines() == [
        "load ELF", "kernel saxpy",
        "context 0x1000", "attribute 8=131072 device 0", launch.format(131072, 1),
        "context 0x1000", "attribute 8=131072 device 0", launch.format(65536, 1),  # never lowered
        "context 0x1000", launch.format(65536, 2),  # a thread without a context gets one
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        ("cuLaunchKernelEx 720", "launching saxpy with grid 500 .* all blocks must be resident at once"),
        ("cuLibraryLoadData 209", "loading the machine code of saxpy failed: .*another architecture"),
        ("cuInit 100", "CUDA driver cannot start: CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_a_refusal_of_the_driver_becomes_a_sentence(
    fake_driver: Path, tmp_path: Path, failure: str, sentence: str
) -> None:
    out = run_with(
        fake_driver,
        tmp_path,
        f"""
import re
from megamoe.errors import MegaMoEError
try:
    load(saxpy(), LaunchShape(threads=32)).launch(SaxpyArgs(), 500)
except MegaMoEError as error:
    assert re.search({sentence!r}, str(error)), error
    print("refused")
""",
        FAKE_FAIL=failure,
    )
    assert out.endswith("refused\n")


def test_a_tensor_map_is_encoded_once_innermost_first_and_aligned(fake_driver: Path, tmp_path: Path) -> None:
    out = run_with(
        fake_driver,
        tmp_path,
        """
from megamoe.kernels.jit.tensor_map import Promotion, Swizzle, encode
from tests.kernels.jit_kernels import TileArgs
args = TileArgs()
for _ in range(2):
    args.b = encode(0x1000, dtype=torch.float8_e4m3fn, shape=(3, 100, 256), strides=(51200, 512, 1), box=(1, 64, 128))
args.a = encode(0x2000, dtype=torch.bfloat16, shape=(512,), strides=(1,), box=(256,), swizzle=Swizzle.NONE,
                promotion=Promotion.B256)
assert list(args.b.opaque) == list(range(100, 116))
""",
    )
    assert out.splitlines() == [
        "map type 0 at 0x1000 dim 256 box 128 step 1 dim 100 box 64 step 1 dim 3 box 1 step 1 stride 512 stride 51200"
        " interleave 0 swizzle 3 promotion 2 fill 0",
        "map type 9 at 0x2000 dim 512 box 256 step 1 interleave 0 swizzle 0 promotion 3 fill 0",
    ]


@pytest.mark.parametrize(
    ("tensor", "box", "sentence"),
    [
        (torch.empty(4, 24, dtype=torch.uint8), (4, 16), "strides divisible by 16 bytes"),
        (torch.empty(32, 4).T, (4, 32), "innermost stride of 1"),
        (torch.empty(4, 64, dtype=torch.bfloat16), (4, 128), "wider than its swizzle"),
        (torch.empty(4, 64), (4, 3), "multiple of 16 bytes innermost"),
        (torch.empty(4, 64), (300, 4), "boxes of 1 to 256"),
        (torch.empty(0, 64), (1, 4), "empty tensor"),
        (torch.empty(4, 64), (4,), "a box of as many"),
        (torch.empty(4, 64, dtype=torch.complex64), (4, 4), "no data type"),
    ],
)
def test_maps_that_tma_cannot_do_are_refused(tensor: torch.Tensor, box: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tensor_map(tensor, box)


@pytest.mark.parametrize("bad", [{"threads": 0}, {"threads": 32, "smem_bytes": 1 << 20}, {"threads": 32, "cluster": 3}])
def test_launch_shapes_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LaunchShape(**bad)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_saxpy_on_every_device() -> None:
    kernel = load(saxpy(), LaunchShape(threads=256))
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            x, y = torch.randn(2, 100_001, device="cuda")
            expected = torch.addcmul(y, x, torch.full_like(x, 2.5))
            kernel.launch(SaxpyArgs(x.data_ptr(), y.data_ptr(), x.numel(), 2.5), -(-x.numel() // 256))
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_cluster_cooperative_launch_and_its_graph(pdl: bool) -> None:
    class Args(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p),)

    code = """
extern "C" __global__ void who(const __grid_constant__ Args args) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  extern __shared__ int slot[];
  unsigned rank, size, theirs;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\\nmov.u32 %1, %%cluster_nctarank;" : "=r"(rank), "=r"(size));
  slot[0] = blockIdx.x;
  asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
  unsigned here = (unsigned)__cvta_generic_to_shared(slot);
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(here), "r"((rank + 1) % size));
  int seen;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(seen) : "r"(theirs));
  asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");
  if (threadIdx.x == 0) static_cast<int*>(args.out)[blockIdx.x] += seen + 1000 * (int)size;
}
"""
    blocks = torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2
    source = KernelSource("who", cuda_args("Args", Args) + code, "who")
    kernel = load(source, LaunchShape(threads=64, smem_bytes=200_000, cluster=2, cooperative=True, pdl=pdl))
    out = torch.zeros(blocks, dtype=torch.int32, device="cuda")
    args = Args(out.data_ptr())
    kernel.launch(args, blocks)
    expected = 2000 + (torch.arange(blocks, device="cuda", dtype=torch.int32) ^ 1)
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(args, blocks)
        kernel.launch(args, blocks)
    graph.replay()
    assert torch.equal(out, 3 * expected)
    assert kernel.max_blocks_per_sm() == 1


@pytest.mark.gpu
def test_tma_and_wgmma_multiply() -> None:
    kernel = load(tile(), LaunchShape(threads=128, smem_bytes=2 * 64 * 128 + 16))
    for k in (128, 1024):
        a, b = torch.randint(-2, 3, (2, 64, k), device="cuda").to(torch.float8_e4m3fn)
        d = torch.full((64, 64), torch.nan, device="cuda")
        args = TileArgs(d=d.data_ptr(), k=k)
        args.a, args.b = (tensor_map(t, (64, 128), swizzle=Swizzle.B128) for t in (a, b))
        kernel.launch(args, 1)
        # Whole numbers below 2^12, where the 13 bits that Hopper keeps of a running sum lose nothing.
        assert torch.equal(d.double(), a.double() @ b.double().T)


@pytest.mark.gpu
def test_a_refused_launch_leaves_the_context_usable() -> None:
    kernel = load(saxpy(), LaunchShape(threads=1024, smem_bytes=200_000, cooperative=True))
    from megamoe.errors import MegaMoEError

    with pytest.raises(MegaMoEError, match="all blocks must be resident"):
        kernel.launch(SaxpyArgs(), 100_000)
    assert int(torch.ones(3, device="cuda").sum()) == 3
