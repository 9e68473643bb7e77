/* Exponentials where what is made of them is rounded to bfloat16; for processors with AVX512. */

#pragma once

#include <immintrin.h>

#include "vectors.h"

#define AVX512 __attribute__((target("avx512f")))

/* 2^x, exactly 1 at 0 and 0 far below; relative error 3e-6, where bfloat16 has 2e-3. */
AVX512 INLINE __m512 power_of_two(__m512 x) {
    const __m512 power = _mm512_max_ps(x, _mm512_set1_ps(-300.0f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(power, whole); /* 2^rest by its series */
    __m512 sum = _mm512_set1_ps(1.33335581e-3f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.61812911e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.55041087e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40226507e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93147181e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* x / (1 + exp(-x)) */
AVX512 INLINE __m512 silu_nearly(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 divisor = _mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))));
    return _mm512_div_ps(x, divisor);
}
