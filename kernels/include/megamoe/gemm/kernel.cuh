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
constexpr u32 kStagingBytes = 2048;  // a warp's, see store_rows
constexpr u32 kMathBarrier = 1;      // named barrier of both math warpgroups

MM_DEVICE constexpr int gcd(int a, int b) {
    return b == 0 ? a : gcd(b, a % b);
}

template <class C>
struct Layout {
    static constexpr bool kBlockScaled = C::scaling == C::Scaling::BLOCK;
    static constexpr u32 kA = C::block_m * kRowBytes, kB = C::block_n * kRowBytes;
    static constexpr u32 kStage = kA + kB;
    static constexpr u32 kScalesA = kBlockScaled ? C::block_m * 4 : 0;
    static constexpr u32 kScalesAt = C::num_stages * kStage;
    static constexpr u32 kStagingAt = kScalesAt + C::num_stages * kScalesA;
    static constexpr u32 kBarriersAt = kStagingAt + kMathWarps * kStagingBytes;
    static constexpr u32 kAbortAt = kBarriersAt + C::num_stages * 16;
    static constexpr u32 kTotal = kAbortAt + 16;
    // Columns of one math warpgroup: both take all columns of 64 rows each, or half the columns of the same 64 rows.
    static constexpr int kCols = C::block_m == 128 ? C::block_n : C::block_n / 2;
    static constexpr int kColAlign = gcd(128, C::block_m == 128 ? C::block_n : gcd(C::block_n, C::block_n / 2));
    static_assert(kTotal == C::smem_bytes, "the Python estimate of shared memory differs");
    static_assert(C::block_m == 64 || C::block_m == 128);
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
    constexpr u64 kPolicyA = ptx::kEvictNormal, kPolicyB = ptx::kEvictNormal;
    constexpr u32 kBytes = L::kStage + L::kScalesA;
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
            if constexpr (L::kBlockScaled)
                ptx::tma_load_2d(x.smem + L::kScalesAt + x.pipe.stage * L::kScalesA, &x.args.map_sfa, full, t.m0, kb,
                                 kPolicyA);
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

    MM_DEVICE i32 first_row() const { return C::block_m == 128 ? group * 64 : 0; }
    MM_DEVICE i32 first_col() const { return C::block_m == 128 ? 0 : group * L::kCols; }

    MM_DEVICE void run() {
        const u32 a = x.smem + first_row() * kRowBytes;
        const u32 b = x.smem + L::kA + first_col() * kRowBytes;
        Tile t;
        while (x.sched.next(t)) {
            const i32 col = t.n0 + first_col();
            if constexpr (C::scaling == C::Scaling::NONE) {
                DirectSum<typename C::Elem, L::kCols> sum;
                sum.run(x.pipe, x.limit, a, b, L::kStage, t.num_kb, lane);
                store(t, [&](int i) { return sum.d[i]; });
            } else {
                PromotedSum<L::kCols> sum;
                sum.clear();
                auto at = [&](int i) { return sum.d[i / (sum.kPart / 2)][i % (sum.kPart / 2)]; };
                if constexpr (C::scaling == C::Scaling::BLOCK) {
                    BlockScale<L::kCols, L::kColAlign> scale;
                    scale.sfa = x.smem + L::kScalesAt + (first_row() + warp * 16 + lane / 4) * 4;
                    scale.stage_bytes = L::kScalesA;
                    scale.first = 128 - col % 128;
                    const i32 n_blocks = ceil_div(x.args.n, 128);
                    scale.b.start(static_cast<const float*>(x.args.scales_b) +
                                      static_cast<i64>(t.group) * n_blocks * x.args.scales_b_ld,
                                  x.args.scales_b_ld, n_blocks, col, t.kb0, t.num_kb, lane);
                    sum.run(x.pipe, x.limit, a, b, L::kStage, t.num_kb, lane, scale);
                    store(t, at);
                } else {
                    sum.run(x.pipe, x.limit, a, b, L::kStage, t.num_kb, lane, NoScale{});
                    scale_rows(t, col, sum);
                    store(t, at);
                }
            }
        }
    }

    // Per-token times per-channel scales, once per tile. Rows and columns that do not exist are scaled by whatever is
    // in range and never stored.
    template <class Sum>
    MM_DEVICE void scale_rows(const Tile& t, i32 col, Sum& sum) const {
        const i32 row = t.m0 + first_row() + warp * 16 + lane / 4;
        const float* sb = static_cast<const float*>(x.args.scales_b) + static_cast<i64>(t.group) * x.args.n;
        float sa[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
            sa[h] = static_cast<const float*>(x.args.scales_a)[min_of(row + 8 * h, x.args.m - 1)];
#pragma unroll
        for (int p = 0; p < Sum::kParts; ++p)
#pragma unroll
            for (int i = 0; i < Sum::kPart / 2; ++i) {
                const i32 c = col + p * Sum::kPart + i / 4 * 8 + lane % 4 * 2 + i % 2;
                sum.d[p][i] *= sa[i / 2 % 2] * sb[min_of(c, x.args.n - 1)];
            }
    }

    template <class At>
    MM_DEVICE void store(const Tile& t, At&& at) const {
        const i32 row = first_row() + warp * 16;
        const i32 col = t.n0 + first_col();
        const i64 ld = x.args.d_ld;
        if constexpr (C::share == C::Share::SPLIT_K) {
            reduce_and_store(t, at);
        } else if constexpr (C::out_bf16) {
            store_rows<L::kCols>(
                WarpRows<u16>{static_cast<u16*>(x.args.d) + (t.m0 + row) * ld + col, ld, t.rows - row, x.args.n - col},
                x.smem + L::kStagingAt + (group * 4 + warp) * kStagingBytes, lane, at);
        } else {
            store_rows_f32<L::kCols, C::accumulate>(
                WarpRows<float>{static_cast<float*>(x.args.d) + (t.m0 + row) * ld + col, ld, t.rows - row,
                                x.args.n - col},
                lane, at);
        }
    }

    // Split K: each CTA parks its sums where the stages were (every copy has landed and been read), then adds up its
    // share of the columns over the cluster in CTA order: the same order, so the same bits, every time.
    template <class At>
    MM_DEVICE void reduce_and_store(const Tile& t, At&& at) const {
        constexpr int kColumns8 = L::kCols / 8;
        const u32 slot = x.smem + (group * kWarpgroupSize + warp * kWarpSize + lane) * 16;
        constexpr u32 kPitch = kMathThreads * 16;
        static_assert(kColumns8 * kPitch <= L::kScalesAt, "sums do not fit in the stages");
        ptx::named_barrier(kMathBarrier, kMathThreads);
#pragma unroll
        for (int j = 0; j < kColumns8; ++j) {
            const float4 v = make_float4(at(4 * j), at(4 * j + 1), at(4 * j + 2), at(4 * j + 3));
            ptx::st_shared_v4(slot + j * kPitch, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y),
                                                            __float_as_uint(v.z), __float_as_uint(v.w)));
        }
        ptx::cluster_arrive();
        ptx::cluster_wait();
        const i32 row = first_row() + warp * 16 + lane / 4;
        const i32 col = t.n0 + first_col() + lane % 4 * 2;
        for (int j = x.cta; j < kColumns8; j += C::cluster) {
            float4 v[C::cluster];
#pragma unroll
            for (int q = 0; q < C::cluster; ++q) v[q] = ptx::ld_cluster_v4_f32(ptx::map_to_cta(slot + j * kPitch, q));
            float4 s = v[0];
#pragma unroll
            for (int q = 1; q < C::cluster; ++q) s.x += v[q].x, s.y += v[q].y, s.z += v[q].z, s.w += v[q].w;
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
    const u32 warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
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
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    if (warp >= kMathWarps) {
        ptx::set_max_registers_down<40>();
        if (warp == kMathWarps && ptx::elect_one()) load<C>(x);
        __syncwarp();
        if constexpr (C::share == C::Share::SPLIT_K) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        }
    } else {
        ptx::set_max_registers_up<232>();
        Math<C>{x, warp / 4, warp % 4, lane}.run();
    }
    // No CTA leaves while another may still write to its stages, arrive on its barriers or read its sums.
    if constexpr (C::cluster > 1) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

}  // namespace megamoe::gemm
