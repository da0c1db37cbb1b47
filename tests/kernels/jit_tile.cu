// D [64, 64] fp32 = A [64, K] @ B [64, K]^T, e4m3, one warpgroup: the smallest kernel with TMA, mbarrier and WGMMA.
// Stands alone on purpose: the JIT's tests depend on no header but the generated arguments. Args comes before it.
constexpr int kRows = 64, kBlockK = 128, kTileBytes = kRows * kBlockK;

__device__ unsigned smem_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

__device__ unsigned long long descriptor(const void* tile, int k) {  // 128-byte swizzle, 8 rows of 128 bytes an atom
    unsigned long long address = smem_address(tile) + k;
    return ((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ void load(void* tile, const megamoe::TensorMap* map, int k, unsigned long long* bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            smem_address(tile)),
        "l"(map), "r"(k), "r"(0), "r"(smem_address(bar))
        : "memory");
}

extern "C" __global__ void __launch_bounds__(128) tile(const __grid_constant__ Args args) {
    extern __shared__ __align__(1024) unsigned char smem[];
    unsigned char *a = smem, *b = smem + kTileBytes;
    auto* bar = reinterpret_cast<unsigned long long*>(smem + 2 * kTileBytes);
    float d[32] = {};
    if (threadIdx.x == 0) {
        asm volatile(
            "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(smem_address(bar)));
    }
    __syncthreads();
    for (int k = 0, phase = 0; k < args.k; k += kBlockK, phase ^= 1) {
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)),
                         "r"(2 * kTileBytes)
                         : "memory");
            load(a, &args.a, k, bar);
            load(b, &args.b, k, bar);
        }
        for (unsigned done = 0; !done;) {
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(smem_address(bar)), "r"(phase)
                : "memory");
        }
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        for (int step = 0; step < kBlockK; step += 32) {
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
                "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                "%22, "
                "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1;"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
                  "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                  "+f"(d[30]), "+f"(d[31])
                : "l"(descriptor(a, step)), "l"(descriptor(b, step)));
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
        __syncthreads();  // both tiles are read before the next loads overwrite them
    }
    // Thread's rows: lane / 4 and + 8 within its warp's 16; columns: pairs at 2 * (lane % 4), every 8.
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    auto* out = static_cast<float*>(args.d);
    for (int i = 0; i < 32; ++i) {
        out[(row + (i % 4 / 2) * 8) * kRows + column + i / 4 * 8 + i % 2] = d[i];
    }
}
