// Shared-memory operands of WGMMA: tiles of rows of 128 bytes along K, 128-byte swizzle, 8 rows (1024 bytes) an atom.
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

template <int N>
MM_DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) ptx::pin_register(d[i]);
}

// One k-block: d = A x B (fresh) or d += A x B, issued and committed, not awaited. Code that has touched d itself pins
// it first; pinning it while an MMA is in flight makes the compiler wait for it.
template <class Elem, int N>
MM_DEVICE void issue_block(float (&d)[N / 2], u32 smem_a, u32 smem_b, bool fresh) {
    const u64 a = k_major_desc(smem_a), b = k_major_desc(smem_b);
    if (fresh) pin(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kMmaPerBlock; ++k)
        ptx::Wgmma<Elem, N>::run(d, along_k(a, k), along_k(b, k), (k > 0 || !fresh) ? 1u : 0u);
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
