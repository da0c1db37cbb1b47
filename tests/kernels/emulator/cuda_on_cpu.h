// Enough of CUDA to run a kernel on the CPU, one block after the other, every thread a fiber. Fibers give way at
// barriers and shuffles only, in an order that the caller chooses: forward and backward together show a forgotten
// barrier. A barrier or shuffle that not all threads reach ends the process with a sentence.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
    unsigned x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned v) {
    return bits_as<float>(v);
}
inline unsigned __float_as_uint(float v) {
    return bits_as<unsigned>(v);
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __frcp_rn(float a) {
    return 1.f / a;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}

namespace emulator {

enum class State { kReady, kBlock, kWarp, kDone };

struct Fiber {
    ucontext_t context;
    char* stack;
    State state;
    unsigned value, mask, partner, result;
};

inline Fiber all_fibers[1024];  // zeros: stacks are taken on first use and kept
inline unsigned num_fibers;
struct {
    Fiber& operator[](unsigned i) const { return all_fibers[i]; }
    Fiber* begin() const { return all_fibers; }
    Fiber* end() const { return all_fibers + num_fibers; }
} const fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline void (*body)();

inline void wait(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void release_block() {
    unsigned any = 0;
    for (Fiber& f : fibers) {
        if (f.state == State::kDone) continue;
        if (f.state != State::kBlock) return;
        any |= f.value;
    }
    for (Fiber& f : fibers)
        if (f.state == State::kBlock) f.result = any, f.state = State::kReady;
}

inline void release_warp(unsigned of) {
    const unsigned first = of / 32 * 32, mask = fibers[of].mask;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            const Fiber& f = fibers[first + lane];
            if (f.state != State::kWarp || f.mask != mask) return;
        }
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            Fiber& f = fibers[first + lane];
            f.result = fibers[first + f.partner].value;
            f.state = State::kReady;
        }
}

inline void start() {
    body();
    fibers[current].state = State::kDone;
    release_block();
    swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block(unsigned threads, bool backward) {
    num_fibers = threads;
    for (Fiber& f : fibers) {
        constexpr size_t kStack = 64 << 10;
        if (!f.stack) f.stack = static_cast<char*>(std::malloc(kStack));
        getcontext(&f.context);
        f.context.uc_stack = {f.stack, 0, kStack};
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
        f.state = State::kReady;
    }
    for (;;) {
        bool ran = false, done = true;
        for (unsigned i = 0; i < threads; ++i) {
            current = backward ? threads - 1 - i : i;
            if (fibers[current].state == State::kReady) {
                threadIdx = {current, 0, 0};
                swapcontext(&scheduler, &fibers[current].context);
                ran = true;
            }
        }
        for (const Fiber& f : fibers) done &= f.state == State::kDone;
        if (done) return;
        if (!ran) {
            std::fprintf(stderr, "block (%u, %u, %u): a barrier or shuffle waits for threads that do not come\n",
                         blockIdx.x, blockIdx.y, blockIdx.z);
            std::abort();
        }
    }
}

// A switch of fibers changes threadIdx; whoever waits sets it back.
inline unsigned wait_for_block(unsigned value) {
    const unsigned self = current;
    fibers[self].value = value;
    fibers[self].state = State::kBlock;
    release_block();
    if (fibers[self].state == State::kBlock) wait(State::kBlock);
    current = self, threadIdx = {self, 0, 0};
    return fibers[self].result;
}

}  // namespace emulator

inline void __syncthreads() {
    emulator::wait_for_block(0);
}
inline int __syncthreads_or(int value) {
    return emulator::wait_for_block(value != 0);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
    using namespace emulator;
    const unsigned self = current;
    fibers[self].value = bits_as<unsigned>(value), fibers[self].mask = mask, fibers[self].partner = self % 32 ^ lanes;
    fibers[self].state = State::kWarp;
    release_warp(self);
    if (fibers[self].state == State::kWarp) wait(State::kWarp);
    current = self, threadIdx = {self, 0, 0};
    return bits_as<T>(fibers[self].result);
}
