// What argument structs generated from Python (kernels/jit/structs.py) need.
#pragma once

// NVRTC knows no offsetof; its front end's own spelling is a constant expression there.
#if defined(__CUDACC_RTC__)
#define MEGAMOE_OFFSETOF(type, member) ((unsigned long long)__INTADDR__(&(((type*)0)->member)))
#else
#define MEGAMOE_OFFSETOF(type, member) __builtin_offsetof(type, member)
#endif

namespace megamoe {

// A CUtensorMap as it travels inside a kernel's arguments.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 64, "layout of CUtensorMap");

}  // namespace megamoe
