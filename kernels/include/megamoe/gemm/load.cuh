// The loader: one elected lane keeps the ring of stages full.
#pragma once
#include "megamoe/gemm/layout.cuh"
#include "megamoe/ptx/tma.cuh"

namespace megamoe::gemm {

// kRows of M or N of one k-block, to every CTA of the cluster if kBoth. K-major: one box of rows of 128 bytes along K,
// groups below each other (`row` counts all). MN-major: the map is [groups, K, M or N], a box 64 k by 64 of M or N, so
// that K ends where the group's matrix does and what lies beyond reads as 0.
template <Major kMajor, int kRows, bool kBoth>
MM_DEVICE void load_operand(u32 dst, const TensorMap* map, u32 full, i32 k, i32 row, i32 group, u64 policy) {
    constexpr u16 kMask = 3;
    if constexpr (kMajor == Major::K) {
        if constexpr (kBoth)
            ptx::tma_load_2d_multicast(dst, map, full, k, row, kMask, policy);
        else
            ptx::tma_load_2d(dst, map, full, k, row, policy);
    } else {
        static_assert(kRows % kChunkMn == 0);
#pragma unroll
        for (int i = 0; i < kRows; i += kChunkMn) {
            if constexpr (kBoth)
                ptx::tma_load_3d_multicast(dst + i * kRowBytes, map, full, row + i, k, group, kMask, policy);
            else
                ptx::tma_load_3d(dst + i * kRowBytes, map, full, row + i, k, group, policy);
        }
    }
}

template <class C>
MM_DEVICE void load(Context<C>& x) {
    using L = Layout<C>;
    // A weight that is read once should not push anything else out of L2.
    constexpr u64 kPolicyA = ptx::kEvictNormal, kPolicyB = C::evict_first ? ptx::kEvictFirst : ptx::kEvictNormal;
    constexpr u32 kScaleBytes = L::kScaleCopies * L::kScaleBox * 4 + (L::kVectors ? C::block_n * 4 : 0);
    // Where a group's rows end in the first half of a tile, the other half is not copied: such a tile has few MMAs, and
    // takes as long as its copies do.
    constexpr bool kTwoA = C::copies_a == 2;
    constexpr u32 kRestOfA = kTwoA ? C::block_m / 2 * kRowBytes : 0;
    constexpr u32 kBytes = C::block_m * kRowBytes - kRestOfA + L::kB + (L::kScaled ? kScaleBytes : 0);
    // Where two CTAs share an operand each loads one half of it for both.
    constexpr bool kBothA = C::share == C::Share::A, kBothB = C::share == C::Share::B;
    constexpr int kRowsA = C::block_m / (kBothA || kTwoA ? 2 : 1), kRowsB = C::block_n / (kBothB ? 2 : 1);
    // The copy engine starts at multiples of 16 bytes along an operand's contiguous dimension; anything else is an
    // illegal instruction.
    constexpr int kBytesPerElem = C::Elem::kBytes;
    static_assert(C::block_k * kBytesPerElem % 16 == 0);
    if constexpr (L::kMajorA == Major::K && C::Grouping::kByK)
        static_assert(C::Grouping::kBeginAlign * kBytesPerElem % 16 == 0, "a group may begin off 16 bytes");
    static_assert(L::kMajorA == Major::K || !L::kAnyRow, "a tile may begin at any row, an MN-major copy may not");
    const u32 half_a = kBothA ? x.cta * kRowsA : 0, half_b = kBothB ? x.cta * kRowsB : 0;
    Tile t;
    while (x.sched.next(t)) {
        const u32 drawn = C::tickets ? x.draw() : 0;
        const bool rest_of_a = kTwoA && t.rows > kRowsA;
        const i32 group_b = C::Grouping::kByK ? 0 : t.group;
        const i32 row_b = (C::b_mn ? 0 : group_b * x.args.n) + t.n0 + half_b;
        for (i32 kb = t.kb0; kb < t.kb0 + t.num_kb; ++kb) {
            x.pipe.wait_empty(x.limit);
            if (C::told && kb == 0) x.tell(t);
            const u32 full = x.pipe.full(x.pipe.stage);
            const u32 a = x.smem + x.pipe.stage * L::kStage, b = a + L::kA;
            const i32 k = t.k0 + kb * C::block_k;
            ptx::mbarrier_arrive_expect_tx(full, kBytes + (rest_of_a ? kRestOfA : 0));
            load_operand<L::kMajorA, kRowsA, kBothA>(a + half_a * kRowBytes, &x.args.map_a, full, k, t.m0 + half_a, 0,
                                                     kPolicyA);
            if (rest_of_a)
                load_operand<L::kMajorA, kRowsA, kBothA>(a + kRestOfA, &x.args.map_a, full, k, t.m0 + kRowsA, 0,
                                                         kPolicyA);
            load_operand<L::kMajorB, kRowsB, kBothB>(b + half_b * kRowBytes, &x.args.map_b, full, k, row_b, group_b,
                                                     kPolicyB);
            if constexpr (L::kScaled) {
                const u32 scales = x.smem + L::kScalesAt + x.pipe.stage * L::kScales;
                const i32 block = t.k0 / C::block_k + kb;
#pragma unroll
                for (int r = 0; r < static_cast<int>(L::kScaleCopies); ++r)
                    ptx::tma_load_2d(scales + r * L::kScalePitch, &x.args.map_sfa, full, (t.m0 + r * 128) / 4 * 4,
                                     block, kPolicyA);
                if constexpr (L::kVectors)
                    ptx::tma_load_2d(scales + L::kScalesA, &x.args.map_sfb, full, t.n0, block, kPolicyB);
            }
            x.pipe.advance();
        }
        if constexpr (C::tickets) x.sched.unit = x.sched.step + drawn;
    }
    if constexpr (C::tickets) x.draws_are_over();
    if constexpr (C::told) {
        x.pipe.wait_empty(x.limit);
        x.tell(Tile{});
        ptx::mbarrier_arrive(x.pipe.full(x.pipe.stage));
    }
}

}  // namespace megamoe::gemm
