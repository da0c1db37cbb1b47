// Where a cast's values come from: a matrix, or an activation of one. A source is a type with
//   cols                  columns it yields
//   Raw, load(raw, row, col)  what comes from memory; zeros, without an access, from col = cols on
//   Kept, hold(raw)       what a thread keeps: a Held
#pragma once
#include "megamoe/quant/values.cuh"

namespace megamoe::quant {

template <class T>
struct ElementBytes {
    static constexpr int value = T::kBytes;
};
template <>
struct ElementBytes<float> {
    static constexpr int value = 4;
};

// x [rows, cols] with row stride ld.
template <class T>
struct Matrix {
    using Raw = Held<T>;
    using Kept = Held<T>;
    const u8* x;
    i64 ld;
    i32 cols;

    MM_DEVICE void load(Raw& raw, i64 row, i32 col) const {
        quant::load(raw, x + (row * ld + col) * ElementBytes<T>::value, cols - col);
    }
    MM_DEVICE Kept hold(const Raw& raw) const { return raw; }
};

MM_DEVICE float sigmoid(float x) {
    return ptx::rcp_approx(1.f + ptx::ex2_approx(-1.4426950408889634f * x));
}

// The activations of megamoe/activation.py, in fp32.
struct SwiGlu {
    static constexpr bool kGated = true;
    static MM_DEVICE float of(float gate, float up, float, float) { return gate * sigmoid(gate) * up; }
};

struct SwiGluLimited {
    static constexpr bool kGated = true;
    static MM_DEVICE float of(float gate, float up, float limit, float) {
        gate = ptx::min_nan(gate, limit);
        return gate * sigmoid(gate) * ptx::max_nan(ptx::min_nan(up, limit), -limit);
    }
};

struct SwiGluClamped {
    static constexpr bool kGated = true;
    static MM_DEVICE float of(float gate, float up, float limit, float alpha) {
        gate = ptx::min_nan(gate, limit);
        up = ptx::max_nan(ptx::min_nan(up, limit), -limit);
        return gate * sigmoid(alpha * gate) * (up + 1.f);
    }
};

// gelu with tanh: 0.5 (1 + tanh(z)) is sigmoid(2 z).
struct GeGlu {
    static constexpr bool kGated = true;
    static MM_DEVICE float of(float gate, float up, float, float) {
        const float z2 = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
        return gate * sigmoid(z2) * up;
    }
};

struct Relu2 {
    static constexpr bool kGated = false;
    static MM_DEVICE float of(float h, float, float, float) {
        const float r = ptx::max_nan(h, 0.f);
        return r * r;
    }
};

// activation(h) [rows, cols] of h [rows, 2 cols] (gate columns, then up columns; [rows, cols] if not gated), each row
// times weight[row] unless weight is null.
template <class T, class Activation>
struct Activated {
    struct Raw {
        Held<T> gate, up;
        float weight;
    };
    using Kept = Held<float>;
    const u8* h;
    i64 ld;
    i32 cols;
    const float* weight;
    float limit, alpha;

    MM_DEVICE void load(Raw& raw, i64 row, i32 col) const {
        const u8* p = h + (row * ld + col) * ElementBytes<T>::value;
        quant::load(raw.gate, p, cols - col);
        if constexpr (Activation::kGated) quant::load(raw.up, p + i64(cols) * ElementBytes<T>::value, cols - col);
        raw.weight = weight != nullptr && col < cols ? __ldg(weight + row) : 1.f;
    }

    MM_DEVICE Kept hold(const Raw& raw) const {
        float gate[kValues], up[kValues];
        raw.gate.get(gate);
        if constexpr (Activation::kGated) raw.up.get(up);
        Kept kept;
#pragma unroll
        for (int i = 0; i < kValues; ++i)
            kept.bits[i] =
                __float_as_uint(Activation::of(gate[i], Activation::kGated ? up[i] : 0.f, limit, alpha) * raw.weight);
        return kept;
    }
};

}  // namespace megamoe::quant
