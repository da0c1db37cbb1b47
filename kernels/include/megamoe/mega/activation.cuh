// Activations between the two GEMMs, in fp32, as megamoe/activation.py defines them.
#pragma once
#include "megamoe/ptx/quant.cuh"

namespace megamoe::mega {

constexpr float kLog2E = 1.4426950408889634f;

// 1 / (1 + exp(-v)) of two numbers by one reciprocal of their product: this unit is what an epilogue waits for. The
// bound keeps the product finite; below -41 the result is 1e-18 instead of less. A NaN reaches both: they are one
// token's.
MM_DEVICE float2 sigmoid(float u, float v) {
    const float a = 1.f + ptx::min_nan(ptx::ex2_approx(-u * kLog2E), 1e18f);
    const float b = 1.f + ptx::min_nan(ptx::ex2_approx(-v * kLog2E), 1e18f);
    const float r = ptx::rcp_approx(a * b);
    return make_float2(r * b, r * a);
}

// Two neighbouring columns of one row at a time.
struct SwiGlu {
    MM_DEVICE float2 operator()(float2 gate, float2 up) const {
        const float2 s = sigmoid(gate.x, gate.y);
        return make_float2(gate.x * s.x * up.x, gate.y * s.y * up.y);
    }
};

// A NaN passes the bounds unchanged, as torch.clamp has it.
struct Bounds {
    float limit;
    MM_DEVICE float low(float v) const { return ptx::min_nan(v, limit); }
    MM_DEVICE float both(float v) const { return ptx::max_nan(ptx::min_nan(v, limit), -limit); }
};

// DeepSeek-V4.
struct SwiGluLimited : Bounds {
    MM_DEVICE float2 operator()(float2 gate, float2 up) const {
        return SwiGlu{}(make_float2(low(gate.x), low(gate.y)), make_float2(both(up.x), both(up.y)));
    }
};

// gpt-oss.
struct SwiGluClamped : Bounds {
    float alpha;
    MM_DEVICE float2 operator()(float2 gate, float2 up) const {
        gate = make_float2(low(gate.x), low(gate.y));
        const float2 s = sigmoid(alpha * gate.x, alpha * gate.y);
        return make_float2(gate.x * s.x * (both(up.x) + 1.f), gate.y * s.y * (both(up.y) + 1.f));
    }
};

// gelu(gate), tanh approximation: gate / (1 + exp(-2 u)), u = sqrt(2 / pi) (gate + 0.044715 gate^3).
struct GeGlu {
    static MM_DEVICE float inner(float g) { return 2.f * 0.7978845608028654f * (g + 0.044715f * g * g * g); }
    MM_DEVICE float2 operator()(float2 gate, float2 up) const {
        const float2 s = sigmoid(inner(gate.x), inner(gate.y));
        return make_float2(gate.x * s.x * up.x, gate.y * s.y * up.y);
    }
};

// relu(h)^2 of one matrix, not gated; NaN stays NaN.
struct Relu2 {
    static MM_DEVICE float of(float h) {
        const float r = ptx::max_nan(h, 0.f);
        return r * r;
    }
    MM_DEVICE float2 operator()(float2 h) const { return make_float2(of(h.x), of(h.y)); }
};

}  // namespace megamoe::mega
