// Compiles gpu/kernels/common/elementary.cuh for the host: CUDA's intrinsics as C operations, each
// rounded once (build with -ffp-contract=off). Usage: host_shim FUNCTION < f32 bits > f32 bits.
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define __device__
#define __forceinline__ inline

static inline float __uint_as_float(unsigned int u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned int __float_as_uint(float f) { unsigned int u; memcpy(&u, &f, 4); return u; }
static inline float __int2float_rn(int i) { return (float)i; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

#include "elementary.cuh"

static const struct {
    const char *name;
    float (*function)(float);
} table[] = {
    {"exp2", fathom_exp2},       {"exp", fathom_exp},   {"log2", fathom_log2},
    {"log", fathom_log},         {"silu", fathom_silu}, {"sigmoid", fathom_sigmoid},
    {"rsqrt", fathom_rsqrt},     {"tanh", fathom_tanh}, {"sin", fathom_sin},
    {"cos", fathom_cos},
};

int main(int argc, char **argv) {
    static float buffer[4096];
    for (unsigned i = 0; i < sizeof table / sizeof *table; i++) {
        if (argc != 2 || strcmp(argv[1], table[i].name) != 0) continue;
        size_t count;
        while ((count = fread(buffer, 4, 4096, stdin)) > 0) {
            for (size_t k = 0; k < count; k++) buffer[k] = table[i].function(buffer[k]);
            fwrite(buffer, 4, count, stdout);
        }
        return fflush(stdout) != 0;
    }
    fprintf(stderr, "usage: host_shim FUNCTION\n");
    return 2;
}
