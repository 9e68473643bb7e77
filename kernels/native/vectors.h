/* Sixteen lanes of float by GCC's vector extensions: the same arithmetic on whatever the machine has. */

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define LINE_BYTES 64
#define INLINE static inline __attribute__((always_inline))

/* One source, compiled for what the machine turns out to have. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))

typedef float vec __attribute__((vector_size(64)));
typedef float vec_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t half_u __attribute__((vector_size(32), aligned(2), may_alias));
typedef int16_t short_vec __attribute__((vector_size(32)));
typedef int8_t byte_u __attribute__((vector_size(16), aligned(1), may_alias));

INLINE vec load(const void *base, ptrdiff_t at, int is_bf16) {
    if (is_bf16) {
        half_u raw = *(const half_u *)((const uint16_t *)base + at);
        return (vec)(__builtin_convertvector(raw, uvec) << 16);
    }
    return (vec) * (const vec_u *)((const float *)base + at);
}

/* x as bfloat16, to nearest and ties to even, in the high halves; the low ones are of no meaning. */
INLINE uvec high_halves(vec x) {
    const uvec bits = (uvec)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const uvec is_number = (uvec)(x == x);
    return (rounded & is_number) | ((bits | 0x400000) & ~is_number); /* what is no number stays none */
}

INLINE void store(void *base, ptrdiff_t at, vec x, int is_bf16) {
    if (!is_bf16) {
        *(vec_u *)((float *)base + at) = (vec_u)x;
        return;
    }
    *(half_u *)((uint16_t *)base + at) = __builtin_convertvector(high_halves(x) >> 16, half_u);
}

INLINE vec splat(float x) { return x - (vec){}; }

/* By way of 16 bits: GCC 12 has one instruction for each doubling, but takes bytes to 32 bits one by one. */
INLINE vec load_bytes(const int8_t *base, ptrdiff_t at) {
    const short_vec wide = __builtin_convertvector(*(const byte_u *)(base + at), short_vec);
    return __builtin_convertvector(__builtin_convertvector(wide, ivec), vec);
}

/* Store the nearest integers, halves up; |x| < 128. */
INLINE void store_bytes(int8_t *base, ptrdiff_t at, vec x) {
    const vec raised = x + 0.5f;
    ivec whole = __builtin_convertvector(raised, ivec); /* towards zero */
    whole += __builtin_convertvector(whole, vec) > raised;
    *(byte_u *)(base + at) = __builtin_convertvector(__builtin_convertvector(whole, short_vec), byte_u);
}

INLINE vec larger(vec a, vec b) {
    ivec is = a > b;
    return (vec)(((ivec)a & is) | ((ivec)b & ~is));
}

INLINE float horizontal_sum(vec x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float horizontal_max(vec x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

/* exp(x) for x <= 0, exactly 1 at 0 and exactly 0 far below; relative error 2e-7. Cephes' expf, by lanes. */
INLINE vec exp_of(vec x) {
    ivec is_zero = x < -87.0f; /* and -inf */
    x = (vec)((ivec)x & ~is_zero);
    vec scaled = x * 1.44269504088896341f - 0.5f; /* x <= 0: truncating this rounds to nearest */
    ivec n = __builtin_convertvector(scaled, ivec);
    vec whole = __builtin_convertvector(n, vec);
    vec rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    vec poly = splat(1.9875691500e-4f);
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    poly = poly * rest * rest + rest + 1.0f;
    vec power = (vec)((n + 127) << 23);
    return (vec)((ivec)(poly * power) & ~is_zero);
}

INLINE float exp_one(float x) {
    vec y = exp_of(splat(x));
    return y[0];
}
