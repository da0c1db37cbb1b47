// Activations between the two GEMMs, in fp32, as megamoe/activation.py defines them.
#pragma once
#include "megamoe/ptx/quant.cuh"

namespace megamoe::mega {

constexpr float kLog2E = 1.4426950408889634f;

MM_DEVICE float sigmoid(float v) {
    return ptx::rcp_approx(1.f + ptx::ex2_approx(-v * kLog2E));
}

struct SwiGlu {
    MM_DEVICE float operator()(float gate, float up) const { return gate * sigmoid(gate) * up; }
};

// gpt-oss. A NaN passes the bounds unchanged, as torch.clamp has it.
struct SwiGluClamped {
    float limit, alpha;
    MM_DEVICE float operator()(float gate, float up) const {
        gate = ptx::min_nan(gate, limit);
        up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
        return gate * sigmoid(alpha * gate) * (up + 1.f);
    }
};

// gelu(gate), tanh approximation: gate / (1 + exp(-2 u)), u = sqrt(2 / pi) (gate + 0.044715 gate^3).
struct GeGlu {
    MM_DEVICE float operator()(float gate, float up) const {
        const float u = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return gate * sigmoid(2.f * u) * up;
    }
};

}  // namespace megamoe::mega
