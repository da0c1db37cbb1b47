// Shared-memory operands of WGMMA, 128-byte swizzle, 8 rows of 128 bytes (1024 bytes) an atom. The rows of a K-major
// tile run along K: one k-block each. Those of an MN-major tile (bf16 only) run along M or N: a k-block is 64 of them,
// a chunk of 64 columns, and wider tiles are chunks one after the other (8192 bytes each). Either way 64 of M or N take
// 8192 bytes.
#pragma once
#include "megamoe/ptx/wgmma.cuh"

namespace megamoe {

constexpr u32 kRowBytes = 128;       // one k-block of a row
constexpr u32 kAtomBytes = 8 * 128;  // tiles start at multiples of this
constexpr int kMmaPerBlock = 4;      // a k-block is four MMAs of 32 bytes along K

// K-major descriptor: start, stride between 8-row atoms (1024), swizzle mode 1 = 128 bytes (PTX ISA, "matrix
// descriptor").
MM_DEVICE u64 k_major_desc(u32 smem) {
    constexpr u64 kFixed = (u64{1} << 62) | (u64{kAtomBytes >> 4} << 32) | (u64{1} << 16);
    return kFixed | ((smem & 0x3ffff) >> 4);
}

// Moves a K-major descriptor by whole MMAs along K (32 bytes each) inside the swizzle atom.
MM_DEVICE u64 along_k(u64 desc, int mma) {
    return desc + mma * 2;
}

// Which direction of an operand is contiguous in memory.
enum class Major { K, MN };
constexpr int kChunkMn = 64;                         // bf16 of one row of an MN-major chunk
constexpr u32 kChunkMnBytes = kChunkMn * kRowBytes;  // 64 rows: one k-block of bf16

// MN-major descriptor: with a swizzle the leading offset goes from one chunk of 64 columns to the next (8192), the
// stride from 8 k to the next 8 (1024): canonical layout ((8, n), (8, k)) : ((1, LBO), (8, SBO)) in units of 16 bytes.
MM_DEVICE u64 mn_major_desc(u32 smem) {
    constexpr u64 kFixed = (u64{1} << 62) | (u64{kAtomBytes >> 4} << 32) | (u64{kChunkMnBytes >> 4} << 16);
    return kFixed | ((smem & 0x3ffff) >> 4);
}

template <Major kMajor>
MM_DEVICE u64 operand_desc(u32 smem) {
    return kMajor == Major::K ? k_major_desc(smem) : mn_major_desc(smem);
}

// The same along K for both majors: an MMA of bf16 takes 16 rows of an MN-major chunk, two atoms.
template <Major kMajor>
MM_DEVICE u64 operand_along_k(u64 desc, int mma) {
    return kMajor == Major::K ? along_k(desc, mma) : desc + mma * (2 * kAtomBytes >> 4);
}

template <int N>
MM_DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) ptx::pin_register(d[i]);
}

// One k-block: d = A x B (fresh) or d += A x B, issued and committed, not awaited. Code that has touched d itself pins
// it first; pinning it while an MMA is in flight makes the compiler wait for it.
template <class Elem, int N, Major kMajorA = Major::K, Major kMajorB = Major::K>
MM_DEVICE void issue_block(float (&d)[N / 2], u32 smem_a, u32 smem_b, bool fresh) {
    const u64 a = operand_desc<kMajorA>(smem_a), b = operand_desc<kMajorB>(smem_b);
    if (fresh) pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kMmaPerBlock; ++k)
        ptx::Wgmma<Elem, N>::template run<kMajorA == Major::MN, kMajorB == Major::MN>(
            d, operand_along_k<kMajorA>(a, k), operand_along_k<kMajorB>(b, k), (k > 0 || !fresh) ? 1u : 0u);
    ptx::wgmma_commit();
}

// Zeroes d so that d[1], d[2] and every second pair after them stand in aligned register pairs, hence d[0] in an odd
// register.
template <int N>
MM_DEVICE void zero_odd_pairs(float (&d)[N]) {
    d[0] = 0.f, d[N - 1] = 0.f;
#pragma unroll
    for (int i = 1; i + 1 < N; i += 2) ptx::zero_pair(d[i], d[i + 1]);
}

}  // namespace megamoe
