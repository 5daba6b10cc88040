// Integer names of fixed width (NVRTC has no <stdint.h> of its own), and division that rounds up.
#ifndef FATHOM_COMMON_TYPES_CUH
#define FATHOM_COMMON_TYPES_CUH

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define FATHOM_DEVICE static __device__ __forceinline__

template <typename T>
FATHOM_DEVICE constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

#endif
