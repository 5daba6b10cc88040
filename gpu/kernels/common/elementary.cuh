// Elementary functions on f32 from IEEE operations only, to the bit those of
// fathom_numerics::elementary (reference/numerics/src/elementary): the same steps, line by line.
//
// NOTES
// - Every rounding is written: __fadd_rn, __fsub_rn, __fmul_rn, __fdiv_rn, __fsqrt_rn, __fmaf_rn.
//   These are never contracted. Compile with --fmad=false all the same, and with --ftz=false,
//   --prec-div=true and --prec-sqrt=true (the defaults without --use_fast_math).
// - No table in memory: the words of 2/pi are selected, since an index that differs by lane would
//   put the table into local or constant memory.
// - The file keeps to what C and CUDA C++ share, so that a test compiles it for the host as well.
// - Steps, coefficients and measured errors: docs/elementary.md.
#ifndef FATHOM_COMMON_ELEMENTARY_CUH
#define FATHOM_COMMON_ELEMENTARY_CUH

#define FATHOM_FN static __device__ __forceinline__

FATHOM_FN float fathom_bits(unsigned int bits) { return __uint_as_float(bits); }

// The one NaN that every function returns.
FATHOM_FN float fathom_nan_if(bool is_nan, float y) {
    return is_nan ? fathom_bits(0x7FFFFFFFu) : y;
}

// ---- exp2, exp, sigmoid, silu, tanh -----------------------------------------------------------

#define FATHOM_MAGIC fathom_bits(0x4B400000u)     // 1.5 * 2^23
#define FATHOM_LOG2_E fathom_bits(0x3FB8AA3Bu)    // log2(e) to 24 bits
#define FATHOM_LOG2_E_REST fathom_bits(0x32A57060u)
#define FATHOM_LN2_HIGH fathom_bits(0x3F317200u)  // ln 2 to 16 bits
#define FATHOM_LN2_LOW fathom_bits(0x35BFBE8Eu)
#define FATHOM_LN2 fathom_bits(0x3F317218u)       // ln 2 to 24 bits
#define FATHOM_LN2_REST fathom_bits(0xB102E308u)

// y * 2^n for |n| <= 250, in two multiplications, of which only the second can round.
FATHOM_FN float fathom_scale(float y, int n) {
    int half = n >> 1;
    int rest = n - half;
    float a = fathom_bits((unsigned int)(half + 127) << 23);
    float b = fathom_bits((unsigned int)(rest + 127) << 23);
    return __fmul_rn(__fmul_rn(y, a), b);
}

// e^(r + r_low) as high + low; |r| <= 0.3467, |r_low| <= 2^-25.
FATHOM_FN void fathom_exp_reduced(float r, float r_low, float* high, float* low) {
    float q = fathom_bits(0x3AB56268u);
    q = __fmaf_rn(q, r, fathom_bits(0x3C091EE4u));
    q = __fmaf_rn(q, r, fathom_bits(0x3D2AAC2Cu));
    q = __fmaf_rn(q, r, fathom_bits(0x3E2AAA46u));
    q = __fmaf_rn(q, r, fathom_bits(0x3EFFFFFEu));
    float r2 = __fmul_rn(r, r);
    float sum = __fadd_rn(1.0f, r);
    float rest = __fsub_rn(r, __fsub_rn(sum, 1.0f));
    rest = __fmaf_rn(r_low, sum, rest);
    float tail = __fmaf_rn(r2, q, rest);
    *high = __fadd_rn(sum, tail);
    *low = __fsub_rn(tail, __fsub_rn(*high, sum));
}

// e^x = (high + low) * 2^n for |x| <= 110; returns n.
FATHOM_FN int fathom_exp_parts(float x, float* high, float* low) {
    float shifted = __fmaf_rn(x, FATHOM_LOG2_E, FATHOM_MAGIC);
    int n = (int)(__float_as_uint(shifted) - 0x4B400000u);
    float whole = __fsub_rn(shifted, FATHOM_MAGIC);
    float near = __fmaf_rn(-whole, FATHOM_LN2_HIGH, x);
    float r = __fmaf_rn(-whole, FATHOM_LN2_LOW, near);
    float r_low = __fmaf_rn(-whole, FATHOM_LN2_LOW, __fsub_rn(near, r));
    fathom_exp_reduced(r, r_low, high, low);
    return n;
}

// 2^x.
FATHOM_FN float fathom_exp2(float x) {
    float c = x > 130.0f ? 130.0f : x;
    c = c < -152.0f ? -152.0f : c;
    float shifted = __fadd_rn(c, FATHOM_MAGIC);
    int n = (int)(__float_as_uint(shifted) - 0x4B400000u);
    float fraction = __fsub_rn(c, __fsub_rn(shifted, FATHOM_MAGIC));
    float r = __fmul_rn(fraction, FATHOM_LN2);
    float r_low = __fmaf_rn(fraction, FATHOM_LN2, -r);
    r_low = __fmaf_rn(fraction, FATHOM_LN2_REST, r_low);
    float high, low;
    fathom_exp_reduced(r, r_low, &high, &low);
    return fathom_nan_if(x != x, fathom_scale(high, n));
}

// e^x.
FATHOM_FN float fathom_exp(float x) {
    float c = x > 90.0f ? 90.0f : x;
    c = c < -110.0f ? -110.0f : c;
    float high, low;
    int n = fathom_exp_parts(c, &high, &low);
    return fathom_nan_if(x != x, fathom_scale(high, n));
}

// sigmoid(x) = (high + low) * 2^n: 1/(1+e) for x >= 0, e/(1+e) below, where e = e^-|x|. The
// quotient is refined by its exact remainder, which also takes in the low part of e and the
// rounding of 1+e. Returns n.
FATHOM_FN int fathom_sigmoid_parts(float x, float* quotient, float* quotient_low) {
    float a = fathom_bits(__float_as_uint(x) & 0x7FFFFFFFu);
    a = a > 110.0f ? 110.0f : a;
    float high, low;
    int n = fathom_exp_parts(-a, &high, &low);
    float e = fathom_scale(high, n);
    float e_low = fathom_scale(low, n);
    float sum = __fadd_rn(1.0f, e);
    float sum_low = __fadd_rn(__fsub_rn(e, __fsub_rn(sum, 1.0f)), e_low);
    bool below = x < 0.0f;
    float numerator = below ? high : 1.0f;
    float numerator_low = below ? low : 0.0f;
    n = below ? n : 0;
    float inverse = __fdiv_rn(1.0f, sum);
    *quotient = __fmul_rn(numerator, inverse);
    float remainder = __fmaf_rn(-*quotient, sum, numerator);
    remainder = __fmaf_rn(-*quotient, sum_low, __fadd_rn(remainder, numerator_low));
    *quotient_low = __fmul_rn(remainder, inverse);
    return n;
}

// 1 / (1 + e^-x).
FATHOM_FN float fathom_sigmoid(float x) {
    float high, low;
    int n = fathom_sigmoid_parts(x, &high, &low);
    return fathom_nan_if(x != x, fathom_scale(__fadd_rn(high, low), n));
}

// x * sigmoid(x), scaled by the power of two last, so that only the result can be subnormal.
FATHOM_FN float fathom_silu(float x) {
    float high, low;
    int n = fathom_sigmoid_parts(x, &high, &low);
    float a = fathom_bits(__float_as_uint(x) & 0x7FFFFFFFu);
    float c = a > 110.0f ? 110.0f : a;
    float product = __fmul_rn(c, high);
    float product_low = __fmaf_rn(c, high, -product);
    product_low = __fmaf_rn(c, low, product_low);
    float y = fathom_scale(__fadd_rn(product, product_low), n);
    y = fathom_bits(__float_as_uint(y) | (__float_as_uint(x) & 0x80000000u));
    y = x > 110.0f ? x : y;
    return fathom_nan_if(x != x, y);
}

// tanh: the polynomial below 0.625, 1 - 2 / (e^2x + 1) above, where one bit at most cancels.
FATHOM_FN float fathom_tanh(float x) {
    float a = fathom_bits(__float_as_uint(x) & 0x7FFFFFFFu);
    float c = a > 10.0f ? 10.0f : a;
    float z = __fmul_rn(c, c);
    float t = fathom_bits(0xBBBA8671u);
    t = __fmaf_rn(t, z, fathom_bits(0x3CA8FC67u));
    t = __fmaf_rn(t, z, fathom_bits(0xBD5C1AD2u));
    t = __fmaf_rn(t, z, fathom_bits(0x3E08837Bu));
    t = __fmaf_rn(t, z, fathom_bits(0xBEAAAA99u));
    float near = __fmaf_rn(__fmul_rn(c, z), t, c);
    float high, low;
    int n = fathom_exp_parts(__fadd_rn(c, c), &high, &low);
    float far = __fsub_rn(1.0f, __fdiv_rn(2.0f, __fadd_rn(fathom_scale(high, n), 1.0f)));
    float y = c < 0.625f ? near : far;
    y = fathom_bits(__float_as_uint(y) | (__float_as_uint(x) & 0x80000000u));
    return fathom_nan_if(x != x, y);
}

// ---- log2, log --------------------------------------------------------------------------------

// log(x) = e ln 2 + high + low, for positive finite x; f - f^2/2 is kept exactly. Returns e.
FATHOM_FN float fathom_log_parts(float x, float* high, float* low) {
    bool subnormal = x < fathom_bits(0x00800000u);
    float scaled = subnormal ? __fmul_rn(x, 8388608.0f) : x;
    int offset = subnormal ? 150 : 127;
    unsigned int shifted = __float_as_uint(scaled) + (0x3F800000u - 0x3F3504F3u);
    float e = __int2float_rn((int)(shifted >> 23) - offset);
    float f = __fsub_rn(fathom_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u), 1.0f);
    float p = fathom_bits(0x3D89BAC6u);
    p = __fmaf_rn(p, f, fathom_bits(0xBDEF1FF1u));
    p = __fmaf_rn(p, f, fathom_bits(0x3DF3BB41u));
    p = __fmaf_rn(p, f, fathom_bits(0xBDFE1A2Au));
    p = __fmaf_rn(p, f, fathom_bits(0x3E119686u));
    p = __fmaf_rn(p, f, fathom_bits(0xBE2AAD4Du));
    p = __fmaf_rn(p, f, fathom_bits(0x3E4CD2A6u));
    p = __fmaf_rn(p, f, fathom_bits(0xBE800008u));
    p = __fmaf_rn(p, f, fathom_bits(0x3EAAAAA3u));
    float half = __fmul_rn(__fmul_rn(0.5f, f), f);
    float half_low = __fmaf_rn(__fmul_rn(0.5f, f), f, -half);
    float cube = __fmul_rn(__fmul_rn(f, f), f);
    float tail = __fmaf_rn(cube, p, -half_low);
    *high = __fsub_rn(f, half);
    *low = __fadd_rn(__fsub_rn(__fsub_rn(f, *high), half), tail);
    return e;
}

// The values outside (0, inf): -inf at either zero, inf at inf, NaN below zero and at NaN.
FATHOM_FN float fathom_log_specials(float x, float y) {
    y = x == fathom_bits(0x7F800000u) ? x : y;
    y = x == 0.0f ? fathom_bits(0xFF800000u) : y;
    return x >= 0.0f ? y : fathom_bits(0x7FFFFFFFu);
}

// log2(x) = e + (high + low) log2(e).
FATHOM_FN float fathom_log2(float x) {
    float high, low;
    float e = fathom_log_parts(x, &high, &low);
    float product = __fmul_rn(high, FATHOM_LOG2_E);
    float rest = __fmaf_rn(high, FATHOM_LOG2_E, -product);
    rest = __fmaf_rn(high, FATHOM_LOG2_E_REST, rest);
    rest = __fmaf_rn(low, FATHOM_LOG2_E, rest);
    float sum = __fadd_rn(e, product);
    float carried = __fsub_rn(product, __fsub_rn(sum, e));
    return fathom_log_specials(x, __fadd_rn(sum, __fadd_rn(carried, rest)));
}

// log(x) = e ln 2 + high + low.
FATHOM_FN float fathom_log(float x) {
    float high, low;
    float e = fathom_log_parts(x, &high, &low);
    float whole = __fmul_rn(e, FATHOM_LN2_HIGH);
    float rest = __fmaf_rn(e, FATHOM_LN2_LOW, low);
    float sum = __fadd_rn(whole, high);
    float carried = __fsub_rn(high, __fsub_rn(sum, whole));
    return fathom_log_specials(x, __fadd_rn(sum, __fadd_rn(carried, rest)));
}

// ---- rsqrt ------------------------------------------------------------------------------------

// 1 / sqrt(x): root and quotient, then one correction by their exact remainders.
FATHOM_FN float fathom_rsqrt(float x) {
    // 2^-100: below it the remainder of the root would be subnormal.
    bool tiny = x < fathom_bits(0x0D800000u);
    float scaled = tiny ? __fmul_rn(x, fathom_bits(0x57800000u)) : x;
    float root = __fsqrt_rn(scaled);
    float y = __fdiv_rn(1.0f, root);
    float root_remainder = __fmaf_rn(-root, root, scaled);
    float remainder = __fmaf_rn(-y, root, 1.0f);
    float half = __fmul_rn(0.5f, __fmul_rn(__fmul_rn(root_remainder, y), y));
    y = __fmaf_rn(y, __fsub_rn(remainder, half), y);
    y = tiny ? __fmul_rn(y, fathom_bits(0x4B800000u)) : y;
    y = x == fathom_bits(0x7F800000u) ? 0.0f : y;
    y = x == 0.0f ? __fdiv_rn(1.0f, x) : y;
    return x >= 0.0f ? y : fathom_bits(0x7FFFFFFFu);
}

// ---- sin, cos ---------------------------------------------------------------------------------

// A word of zeros, then the first 224 bits of 2/pi, most significant first.
FATHOM_FN unsigned int fathom_two_over_pi(unsigned int word) {
    unsigned int w01 = (word & 1u) ? 0xA2F9836Eu : 0x00000000u;
    unsigned int w23 = (word & 1u) ? 0xFC2757D1u : 0x4E441529u;
    unsigned int w45 = (word & 1u) ? 0xDB629599u : 0xF534DDC0u;
    unsigned int w67 = (word & 1u) ? 0xFE5163ABu : 0x3C439041u;
    unsigned int w03 = (word & 2u) ? w23 : w01;
    unsigned int w47 = (word & 2u) ? w67 : w45;
    return (word & 4u) ? w47 : w03;
}

// |x| = quadrant * pi/2 + r + r_low modulo 2 pi, with |r| <= pi/4; from the bits of |x|.
FATHOM_FN unsigned int fathom_trig_reduce(unsigned int magnitude, float* r, float* r_low) {
    const float pi_2 = fathom_bits(0x3FC90FDBu);
    const float pi_2_rest = fathom_bits(0xB33BBD2Eu);
    // |x| = m * 2^(exponent - 150). Bits of 2/pi that contribute multiples of 4 are skipped.
    unsigned int exponent = magnitude >> 23;
    unsigned long long m = (magnitude & 0x007FFFFFu) | 0x00800000u;
    unsigned int start = exponent < 126u ? 6u : exponent - 120u;
    unsigned int word = start >> 5;
    unsigned int left = start & 31u;
    unsigned int right = 31u - left;
    unsigned int t0 = fathom_two_over_pi(word);
    unsigned int t1 = fathom_two_over_pi(word + 1u);
    unsigned int t2 = fathom_two_over_pi(word + 2u);
    unsigned int t3 = fathom_two_over_pi(word + 3u);
    unsigned long long w0 = (t0 << left) | ((t1 >> 1) >> right);
    unsigned long long w1 = (t1 << left) | ((t2 >> 1) >> right);
    unsigned long long w2 = (t2 << left) | ((t3 >> 1) >> right);
    // |x| * 2/pi modulo 4, as an integer over 2^62.
    unsigned long long product = ((m * w0) << 32) + m * w1 + ((m * w2) >> 32);
    unsigned int quadrant = (unsigned int)((product + (1ull << 61)) >> 62);
    // The signed distance to that quadrant, over 2^64, as three exact floats.
    unsigned long long fraction = product << 2;
    int top = (int)(unsigned int)(fraction >> 32) >> 8;
    float high = __fmul_rn(__int2float_rn(top), fathom_bits(0x33800000u));
    int next = (int)((unsigned int)(fraction >> 16) & 0x00FFFFFFu);
    float middle = __fmul_rn(__int2float_rn(next), fathom_bits(0x27800000u));
    int last = (int)((unsigned int)fraction & 0xFFFFu);
    float low = __fmul_rn(__int2float_rn(last), fathom_bits(0x1F800000u));
    float h = __fadd_rn(high, middle);
    float l = __fadd_rn(__fsub_rn(middle, __fsub_rn(h, high)), low);
    *r = __fmul_rn(h, pi_2);
    *r_low = __fmaf_rn(h, pi_2, -*r);
    *r_low = __fmaf_rn(h, pi_2_rest, *r_low);
    *r_low = __fmaf_rn(l, pi_2, *r_low);
    // Below pi/4 the argument is its own remainder.
    bool near = magnitude <= 0x3F490FDAu;
    *r = near ? fathom_bits(magnitude) : *r;
    *r_low = near ? 0.0f : *r_low;
    return near ? 0u : quadrant;
}

// sin and cos of r + r_low on |r| <= pi/4.
FATHOM_FN void fathom_sin_cos_reduced(float r, float r_low, float* sine, float* cosine) {
    float z = __fmul_rn(r, r);
    float half = __fmul_rn(0.5f, z);
    float w = __fsub_rn(1.0f, half);
    float s = fathom_bits(0x363E1627u);
    s = __fmaf_rn(s, z, fathom_bits(0xB9502CAAu));
    s = __fmaf_rn(s, z, fathom_bits(0x3C0888BAu));
    s = __fmaf_rn(s, z, fathom_bits(0xBE2AAAABu));
    *sine = __fadd_rn(r, __fmaf_rn(__fmul_rn(r, z), s, __fmul_rn(r_low, w)));
    float c = fathom_bits(0x37CCF406u);
    c = __fmaf_rn(c, z, fathom_bits(0xBAB60614u));
    c = __fmaf_rn(c, z, fathom_bits(0x3D2AAAA5u));
    float z_low = __fmaf_rn(r, r, -z);
    float rest = __fmaf_rn(z_low, -0.5f, __fsub_rn(__fsub_rn(1.0f, w), half));
    float turn = __fmaf_rn(__fmul_rn(z, z), c, -__fmul_rn(r, r_low));
    *cosine = __fadd_rn(w, __fadd_rn(rest, turn));
}

// sin x and cos x; NaN at infinity.
FATHOM_FN void fathom_sin_cos(float x, float* sin_x, float* cos_x) {
    unsigned int magnitude = __float_as_uint(x) & 0x7FFFFFFFu;
    float r, r_low;
    unsigned int quadrant = fathom_trig_reduce(magnitude, &r, &r_low);
    float sine, cosine;
    fathom_sin_cos_reduced(r, r_low, &sine, &cosine);
    bool odd = (quadrant & 1u) != 0u;
    float s = odd ? cosine : sine;
    float c = odd ? sine : cosine;
    unsigned int s_sign = ((quadrant & 2u) << 30) ^ (__float_as_uint(x) & 0x80000000u);
    unsigned int c_sign = ((quadrant + 1u) & 2u) << 30;
    bool not_finite = magnitude >= 0x7F800000u;
    *sin_x = fathom_nan_if(not_finite, fathom_bits(__float_as_uint(s) ^ s_sign));
    *cos_x = fathom_nan_if(not_finite, fathom_bits(__float_as_uint(c) ^ c_sign));
}

// sin x.
FATHOM_FN float fathom_sin(float x) {
    float s, c;
    fathom_sin_cos(x, &s, &c);
    return s;
}

// cos x.
FATHOM_FN float fathom_cos(float x) {
    float s, c;
    fathom_sin_cos(x, &s, &c);
    return c;
}

#endif  // FATHOM_COMMON_ELEMENTARY_CUH
