// D = A x B^T for A [M, K] and B [G, N, K], K-major: one persistent kernel, a loader warp and two math warpgroups.
//
// Read it top to bottom: arguments, shared memory, loader, math, entry. `Config` is generated from GemmConfig
// (kernels/gemm/config.py), `Args` with it.
#pragma once
#include "megamoe/epilogue/store.cuh"
#include "megamoe/mma/mainloop.cuh"
#include "megamoe/ptx/tma.cuh"
#include "megamoe/sched/grouping.cuh"
#include "megamoe/sync/pipeline.cuh"

namespace megamoe::gemm {

constexpr int kMathThreads = 256, kThreads = 384;
constexpr int kMathWarps = kMathThreads / kWarpSize;

MM_DEVICE constexpr int gcd(int a, int b) {
    return b == 0 ? a : gcd(b, a % b);
}

template <class C>
struct Layout {
    static constexpr bool kBlockScaled = C::scaling == C::Scaling::BLOCK, kSplitK = C::share == C::Share::SPLIT_K;
    // A math warpgroup takes all columns of every second 64 rows, or half the columns of the same 64 rows.
    static constexpr bool kHalves = C::block_m == 64;
    static constexpr int kCols = kHalves ? C::block_n / 2 : C::block_n, kRowBlocks = kHalves ? 1 : C::block_m / 128;
    static constexpr int kColAlign = gcd(128, kHalves ? gcd(C::block_n, C::block_n / 2) : C::block_n);
    // Split K: groups of 8 columns whose sums one CTA collects at most.
    static constexpr int kMine = kSplitK ? (kCols / 8 + C::cluster - 1) / C::cluster : 0;

    static constexpr u32 kA = C::block_m * kRowBytes, kB = C::block_n * kRowBytes;
    static constexpr u32 kStage = kA + kB;
    // Scales of A in a stage. Copies start at multiples of 16 bytes; where a tile may start at any row, up to 3 rows
    // before it come along, each 128 rows in a box of their own, on 128 bytes.
    static constexpr bool kAnyRow = C::Grouping::kGrouped;
    static constexpr u32 kScaleCopies = kAnyRow ? kRowBlocks : 1;
    static constexpr u32 kScaleBox = kAnyRow ? (kHalves ? 64 : 128) + 4 : C::block_m;  // rows of one copy
    static constexpr u32 kScalePitch = kAnyRow ? 640 : 512;
    static constexpr u32 kScalesA = !kBlockScaled ? 0 : kAnyRow ? kScaleCopies * kScalePitch : C::block_m * 4;
    // Per math warp: chunks of staging. The collected sums of split K stand in the same place.
    static constexpr u32 kStaging = kChunkBytes * (C::async_store ? kRowBlocks * kCols / kChunkCols : 1);
    static constexpr u32 kSums = C::cluster * kMine * kMathThreads * 16;

    static constexpr u32 kStagingAt = C::num_stages * kStage;
    static constexpr u32 kScalesAt = kStagingAt + (kSplitK ? kSums : kMathWarps * kStaging);
    static constexpr u32 kBarriersAt = kScalesAt + C::num_stages * kScalesA;
    static constexpr u32 kSumsBarrierAt = kBarriersAt + C::num_stages * 16;
    static constexpr u32 kAbortAt = kSumsBarrierAt + 8;
    static constexpr u32 kTotal = kAbortAt + 8;
    // A CTA starts with 168 registers a thread (launch bounds); its roles can only share those out among themselves.
    // Asking for more in all would block for ever, where no wait's limit sees it.
    static constexpr int kMathRegisters = kSplitK ? 232 : 240, kLoaderRegisters = kSplitK ? 40 : 24;
    static_assert(kMathRegisters * kMathThreads + kLoaderRegisters * (kThreads - kMathThreads) <= 168 * kThreads);

    static_assert(kTotal == C::smem_bytes, "the Python estimate of shared memory differs");
    static_assert(C::block_m == 64 || C::block_m == 128 || C::block_m == 256);
};

template <class C>
struct Context {
    using L = Layout<C>;
    static constexpr int kReaders = (C::share == C::Share::A || C::share == C::Share::B) ? 2 : 1;
    using Pipe = Pipeline<C::num_stages, kReaders>;
    using Sched = Scheduler<typename C::Grouping, C>;

    const Args& args;
    u32 smem, cta;
    Pipe pipe;
    WaitLimit limit;
    Sched sched;
};

// One elected lane keeps the ring of stages full.
template <class C>
MM_DEVICE void load(Context<C>& x) {
    using L = Layout<C>;
    constexpr int kBlockK = kRowBytes / C::Elem::kBytes;
    // A weight that is read once should not push anything else out of L2.
    constexpr u64 kPolicyA = ptx::kEvictNormal, kPolicyB = C::stream_b ? ptx::kEvictFirst : ptx::kEvictNormal;
    constexpr u32 kBytes = L::kStage + (L::kBlockScaled ? L::kScaleCopies * L::kScaleBox * 4 : 0);
    constexpr u16 kBoth = 3;
    Tile t;
    while (x.sched.next(t)) {
        for (i32 kb = t.kb0; kb < t.kb0 + t.num_kb; ++kb) {
            x.pipe.wait_empty(x.limit);
            const u32 full = x.pipe.full(x.pipe.stage);
            const u32 a = x.smem + x.pipe.stage * L::kStage, b = a + L::kA;
            const i32 row_b = t.group * x.args.n + t.n0;
            ptx::mbarrier_arrive_expect_tx(full, kBytes);
            if constexpr (C::share == C::Share::A) {
                constexpr i32 kHalf = C::block_m / 2;
                ptx::tma_load_2d_multicast(a + x.cta * kHalf * kRowBytes, &x.args.map_a, full, kb * kBlockK,
                                           t.m0 + x.cta * kHalf, kBoth, kPolicyA);
            } else {
                ptx::tma_load_2d(a, &x.args.map_a, full, kb * kBlockK, t.m0, kPolicyA);
            }
            if constexpr (C::share == C::Share::B) {
                constexpr i32 kHalf = C::block_n / 2;
                ptx::tma_load_2d_multicast(b + x.cta * kHalf * kRowBytes, &x.args.map_b, full, kb * kBlockK,
                                           row_b + x.cta * kHalf, kBoth, kPolicyB);
            } else {
                ptx::tma_load_2d(b, &x.args.map_b, full, kb * kBlockK, row_b, kPolicyB);
            }
            if constexpr (L::kBlockScaled) {
#pragma unroll
                for (int r = 0; r < static_cast<int>(L::kScaleCopies); ++r)
                    ptx::tma_load_2d(x.smem + L::kScalesAt + x.pipe.stage * L::kScalesA + r * L::kScalePitch,
                                     &x.args.map_sfa, full, (t.m0 + r * 128) / 4 * 4, kb, kPolicyA);
            }
            x.pipe.advance();
        }
    }
}

// The sum of one warpgroup's 64 rows by L::kCols columns over this CTA's k-blocks, then through `store`.
template <class C>
struct Math {
    using L = Layout<C>;
    Context<C>& x;
    u32 group, warp, lane;  // math warpgroup, warp in it, lane

    MM_DEVICE i32 first_row() const { return L::kHalves ? 0 : group * 64; }
    MM_DEVICE u32 a() const { return x.smem + first_row() * kRowBytes; }
    MM_DEVICE u32 b() const { return x.smem + L::kA + first_col() * kRowBytes; }
    MM_DEVICE i32 first_col() const { return L::kHalves ? group * L::kCols : 0; }

    MM_DEVICE void run() {
        if constexpr (C::scaling == C::Scaling::NONE) {
            DirectSum<typename C::Elem, L::kCols> sum;
            Tile t;
            while (x.sched.next(t)) {
                sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane);
                if (C::async_store && lane == 0) ptx::bulk_wait_read();
                store(t, 0, [&](int i) { return sum.d[i]; });
            }
        } else if constexpr (C::scaling == C::Scaling::BLOCK) {
            BlockScale<L::kCols, L::kColAlign> scale;
            scale.stage_bytes = L::kScalesA;
            scale.block_bytes = L::kScalePitch;
            promoted(scale, [&](const Tile& t) {
                const i32 col = t.n0 + first_col(), n_blocks = ceil_div(x.args.n, 128);
                scale.sfa =
                    x.smem + L::kScalesAt + ((L::kAnyRow ? t.m0 % 4 : 0) + first_row() + warp * 16 + lane / 4) * 4;
                scale.first = 128 - col % 128;
                scale.b.start(static_cast<const float*>(x.args.scales_b) +
                                  static_cast<i64>(t.group) * n_blocks * x.args.scales_b_ld,
                              x.args.scales_b_ld, n_blocks, col, t.kb0, t.num_kb, lane);
            });
        } else {
            NoScale scale;
            promoted(scale, [](const Tile&) {});
        }
    }

    // `begin(tile)` asks for a tile's scales: of the first tile before all, of each next one before the last is stored.
    template <class Scale, class Begin>
    MM_DEVICE void promoted(Scale& scale, Begin&& begin) {
        PromotedSum<L::kRowBlocks, L::kCols> sum;
        Tile t, next;
        bool more = x.sched.next(t);
        if (more) begin(t);
        while (more) {
            sum.clear();
            sum.run(x.pipe, x.limit, a(), b(), L::kStage, t.num_kb, lane, scale);
            more = x.sched.next(next);
            if (more) begin(next);
            if (C::async_store && lane == 0) ptx::bulk_wait_read();
#pragma unroll
            for (int r = 0; r < L::kRowBlocks; ++r) {
                auto at = [&](int i) { return sum.d[r][i / (sum.kPart / 2)][i % (sum.kPart / 2)]; };
                if constexpr (C::scaling == C::Scaling::ROW) {
                    const float scale_a[2] = {row_scale(t, r, 0), row_scale(t, r, 1)};
                    store(t, r, [&](int i) { return at(i) * (scale_a[i / 2 % 2] * col_scale(t, i)); });
                } else {
                    store(t, r, at);
                }
            }
            t = next;
        }
    }

    // Per-token times per-channel scales of accumulator i of a row block, fetched as it is stored. Rows and columns
    // that do not exist are scaled by whatever is in range and never stored.
    MM_DEVICE float row_scale(const Tile& t, int row_block, int h) const {
        const i32 row = t.m0 + first_row() + row_block * 128 + warp * 16 + lane / 4 + 8 * h;
        return static_cast<const float*>(x.args.scales_a)[min_of(row, x.args.m - 1)];
    }

    MM_DEVICE float col_scale(const Tile& t, int i) const {
        const i32 col = min_of(t.n0 + first_col() + i / 4 * 8 + static_cast<i32>(lane % 4) * 2 + i % 2, x.args.n - 1);
        // A volatile load stays where it is used: gathered up front, a tile's scales would not fit into registers.
        return ptx::ld_global_nc_f32(static_cast<const float*>(x.args.scales_b) + static_cast<i64>(t.group) * x.args.n +
                                     col);
    }

    template <class At>
    MM_DEVICE void store(const Tile& t, int row_block, At&& at) const {
        const i32 row = first_row() + row_block * 128 + warp * 16, rows = t.rows - row;
        const i32 col = t.n0 + first_col(), cols = x.args.n - col;
        const i64 ld = x.args.d_ld, offset = static_cast<i64>(t.m0 + row) * ld + col;
        const u32 staging = x.smem + L::kStagingAt + (group * 4 + warp) * L::kStaging +
                            (C::async_store ? row_block * L::kCols / kChunkCols * kChunkBytes : 0);
        if constexpr (L::kSplitK) {
            reduce_and_store(t, at);
        } else if constexpr (!C::out_bf16) {
            store_rows_f32<L::kCols, C::accumulate>(
                WarpRows<float>{static_cast<float*>(x.args.d) + offset, ld, rows, cols}, lane, at);
        } else {
            if constexpr (C::async_store) {
                if (!C::Grouping::kGrouped || rows >= 16)
                    return store_rows_async<L::kCols>(&x.args.map_d, t.m0 + row, col, staging, lane, at);
            }
            store_rows<L::kCols>(WarpRows<u16>{static_cast<u16*>(x.args.d) + offset, ld, rows, cols}, staging, lane,
                                 at);
        }
    }

    // Split K: CTA q of the cluster collects the sums of every q-th group of 8 columns from all CTAs, itself included,
    // and adds them in CTA order: the same order, so the same bits, every time.
    template <class At>
    MM_DEVICE void reduce_and_store(const Tile& t, At&& at) const {
        constexpr int kColumns8 = L::kCols / 8;
        constexpr u32 kPitch = kMathThreads * 16;
        const u32 mine = x.smem + L::kStagingAt + (group * kWarpgroupSize + warp * kWarpSize + lane) * 16;
        const u32 bar = x.smem + L::kSumsBarrierAt;
#pragma unroll
        for (int j = 0; j < kColumns8; ++j) {
            const u32 slot = mine + (x.cta * L::kMine + j / C::cluster) * kPitch;
            ptx::st_async_v4_f32(ptx::map_to_cta(slot, j % C::cluster), at(4 * j), at(4 * j + 1), at(4 * j + 2),
                                 at(4 * j + 3), ptx::map_to_cta(bar, j % C::cluster));
        }
        wait_phase(bar, 0, WaitCode::kSums, 0, x.limit);
        const i32 row = first_row() + warp * 16 + lane / 4;
        const i32 col = t.n0 + first_col() + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < L::kMine; ++i) {
            const i32 j = i * C::cluster + x.cta;
            if (j >= kColumns8) break;
            float4 s = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int q = 0; q < C::cluster; ++q) {
                const uint4 v = ptx::ld_shared_v4(mine + (q * L::kMine + i) * kPitch);
                s.x += __uint_as_float(v.x), s.y += __uint_as_float(v.y);
                s.z += __uint_as_float(v.z), s.w += __uint_as_float(v.w);
            }
            put(t, row, col + 8 * j, s.x, s.y);
            put(t, row + 8, col + 8 * j, s.z, s.w);
        }
    }

    MM_DEVICE void put(const Tile& t, i32 row, i32 col, float u, float v) const {
        if (row >= t.rows || col >= x.args.n) return;
        const i64 at = static_cast<i64>(t.m0 + row) * x.args.d_ld + col;
        if constexpr (C::out_bf16) {
            *reinterpret_cast<u32*>(static_cast<u16*>(x.args.d) + at) = ptx::pack_bf16(u, v);
        } else {
            float2* p = reinterpret_cast<float2*>(static_cast<float*>(x.args.d) + at);
            if constexpr (C::accumulate) u += p->x, v += p->y;
            *p = make_float2(u, v);
        }
    }
};

template <class C>
MM_DEVICE void entry(const Args& args) {
    using L = Layout<C>;
    extern __shared__ __align__(1024) u8 memory[];
    const u32 smem = ptx::smem_addr(memory);
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0), lane = threadIdx.x % kWarpSize;
    const u32 cta = C::cluster > 1 ? ptx::cluster_cta_rank() : 0;

    typename C::Grouping grouping{static_cast<const int*>(args.table), args.m, args.max_m};
    Context<C> x{args,
                 smem,
                 cta,
                 typename Context<C>::Pipe(smem + L::kBarriersAt),
                 WaitLimit{smem + L::kAbortAt, args.limit_ns, static_cast<WaitRecord*>(args.record)},
                 typename Context<C>::Sched(grouping, args.num_groups, args.n, args.num_kb, cta)};
    if (threadIdx.x == 0) {
        x.pipe.init(kMathWarps);
        if constexpr (L::kSplitK) {
            // Sums of every CTA for the groups of 8 columns that this one collects, 16 bytes a math thread each.
            const u32 groups = (L::kCols / 8 - cta + C::cluster - 1) / C::cluster;
            ptx::mbarrier_init(smem + L::kSumsBarrierAt, 1);
            ptx::mbarrier_arrive_expect_tx(smem + L::kSumsBarrierAt, groups * C::cluster * kMathThreads * 16);
        }
        ptx::st_shared_i32(smem + L::kAbortAt, 0);
        ptx::mbarrier_init_fence();
    }
    if (warp == kMathWarps && lane == 0) {
        ptx::prefetch_tensor_map(&args.map_a);
        ptx::prefetch_tensor_map(&args.map_b);
        if (L::kBlockScaled) ptx::prefetch_tensor_map(&args.map_sfa);
    }
    __syncthreads();
    if constexpr (C::cluster > 1) {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    if (warp >= kMathWarps) {
        ptx::set_max_registers_down<L::kLoaderRegisters>();
        if (warp == kMathWarps && ptx::elect_one()) load<C>(x);
    } else {
        ptx::set_max_registers_up<L::kMathRegisters>();
        Math<C>{x, warp / 4, warp % 4, lane}.run();
        if (C::async_store && lane == 0) ptx::bulk_wait_read();
    }
    // No CTA leaves while another may still write to its stages or arrive on its barriers.
    if constexpr (C::cluster > 1) {
        ptx::cluster_arrive_relaxed();
        ptx::cluster_wait();
    }
}

}  // namespace megamoe::gemm
