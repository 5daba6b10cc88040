//! Runs one function's steps over one element or a slice with the instructions that the machine has.
//!
//! The steps are `#[inline(always)]` and branch-free; inlined into a `#[target_feature]` loop the
//! compiler vectorises them, and `f32::mul_add` becomes one instruction where it is a library call
//! elsewhere. IEEE operations are the same function of their operands on every path.

/// An instruction set that slice kernels can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the compilation target guarantees (on AArch64 that includes NEON and FMA).
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2Fma,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// Every instruction set that this program has kernels for.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2Fma, Isa::Avx512];

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2Fma => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2Fma.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2Fma | Isa::Avx512 => false,
        }
    }

    /// The widest instruction set of this machine.
    pub fn best() -> Isa {
        if Isa::Avx512.is_available() {
            Isa::Avx512
        } else if Isa::Avx2Fma.is_available() {
            Isa::Avx2Fma
        } else {
            Isa::Portable
        }
    }

    fn require(self) {
        assert!(self.is_available(), "this machine does not have the instructions of {self:?}");
    }
}

/// `steps` of one element.
#[inline]
pub(crate) fn one<R>(x: f32, steps: impl Fn(f32) -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "fma")]
        fn fused<R>(x: f32, steps: impl Fn(f32) -> R) -> R {
            steps(x)
        }
        if is_x86_feature_detected!("fma") {
            // SAFETY: the machine has FMA.
            return unsafe { fused(x, steps) };
        }
    }
    steps(x)
}

/// `steps` of every element, in place.
pub(crate) fn map(isa: Isa, xs: &mut [f32], steps: impl Fn(f32) -> f32) {
    isa.require();
    #[inline(always)]
    fn body(xs: &mut [f32], steps: impl Fn(f32) -> f32) {
        for x in xs {
            *x = steps(*x);
        }
    }
    match isa {
        Isa::Portable => body(xs, steps),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2Fma => {
            #[target_feature(enable = "avx2,fma")]
            fn wide(xs: &mut [f32], steps: impl Fn(f32) -> f32) {
                body(xs, steps)
            }
            // SAFETY: `require` has seen AVX2 and FMA.
            unsafe { wide(xs, steps) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn wide(xs: &mut [f32], steps: impl Fn(f32) -> f32) {
                body(xs, steps)
            }
            // SAFETY: `require` has seen all of these features.
            unsafe { wide(xs, steps) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2Fma | Isa::Avx512 => unreachable!("`require` has refused {isa:?}"),
    }
}

/// `steps` of every element: `first` holds the arguments and becomes the first results.
pub(crate) fn map_pair(
    isa: Isa,
    first: &mut [f32],
    second: &mut [f32],
    steps: impl Fn(f32) -> (f32, f32),
) {
    isa.require();
    #[inline(always)]
    fn body(first: &mut [f32], second: &mut [f32], steps: impl Fn(f32) -> (f32, f32)) {
        for (a, b) in first.iter_mut().zip(second) {
            (*a, *b) = steps(*a);
        }
    }
    match isa {
        Isa::Portable => body(first, second, steps),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2Fma => {
            #[target_feature(enable = "avx2,fma")]
            fn wide(a: &mut [f32], b: &mut [f32], steps: impl Fn(f32) -> (f32, f32)) {
                body(a, b, steps)
            }
            // SAFETY: `require` has seen AVX2 and FMA.
            unsafe { wide(first, second, steps) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn wide(a: &mut [f32], b: &mut [f32], steps: impl Fn(f32) -> (f32, f32)) {
                body(a, b, steps)
            }
            // SAFETY: `require` has seen all of these features.
            unsafe { wide(first, second, steps) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2Fma | Isa::Avx512 => unreachable!("`require` has refused {isa:?}"),
    }
}
