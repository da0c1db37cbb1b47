// Bulk tensor copies (TMA). A TensorMap is 128 opaque bytes encoded by the host, passed as a __grid_constant__
// parameter.
#pragma once
#include "megamoe/common/args.cuh"
#include "megamoe/common/types.cuh"

namespace megamoe::ptx {

// L2 eviction policies as cp.async.bulk takes them (encodings that createpolicy.fractional gives).
constexpr u64 kEvictNormal = 0x1000000000000000ull;
constexpr u64 kEvictFirst = 0x12f0000000000000ull;

MM_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

MM_DEVICE void tma_load_2d(u32 dst, const TensorMap* map, u32 bar, i32 x, i32 y, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "l"(policy)
        : "memory");
}

// The same box into L2 alone.
MM_DEVICE void tma_prefetch_2d(const TensorMap* map, i32 x, i32 y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}

MM_DEVICE void tma_load_3d(u32 dst, const TensorMap* map, u32 bar, i32 x, i32 y, i32 z, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

// The same bytes land at the same offset in every CTA of `cta_mask` and complete on the barrier at `bar`'s offset
// there.
MM_DEVICE void tma_load_2d_multicast(u32 dst, const TensorMap* map, u32 bar, i32 x, i32 y, u16 cta_mask, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "h"(cta_mask), "l"(policy)
        : "memory");
}

MM_DEVICE void tma_load_3d_multicast(u32 dst, const TensorMap* map, u32 bar, i32 x, i32 y, i32 z, u16 cta_mask,
                                     u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "h"(cta_mask), "l"(policy)
        : "memory");
}

// `bytes`, a multiple of 16, that lie together; both addresses on 16 bytes.
MM_DEVICE void bulk_load(u32 dst, const void* src, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(dst),
        "l"(src), "r"(bytes), "r"(bar), "l"(policy)
        : "memory");
}

// Box of a tensor map's shape from shared to global memory; what lies outside of the tensor is not written.
MM_DEVICE void tma_store_2d(const TensorMap* map, u32 src, i32 x, i32 y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
                 "r"(x), "r"(y)
                 : "memory");
}

MM_DEVICE void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all bulk stores of this thread have read their source.
MM_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// What this thread has written to shared memory becomes visible to the copy engine and the tensor cores.
MM_DEVICE void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace megamoe::ptx
