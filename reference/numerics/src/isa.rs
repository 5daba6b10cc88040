//! Run-time choice of instructions for loops that the compiler vectorises.
//!
//! A body written once, `#[inline(always)]` and branch-free, is compiled for AVX-512, for AVX2 with
//! FMA and for whatever the target guarantees. Inside, `f32::mul_add` becomes one instruction where
//! it is a library call elsewhere. IEEE operations are the same function of their operands on every
//! path, so the bits are too.

/// An instruction set that slice kernels can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Whatever the compilation target guarantees (on AArch64 that includes NEON and FMA).
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2Fma,
    /// x86-64 with AVX-512 F, BW, DQ and VL, AVX2 and FMA.
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

    /// Panics if this machine does not have the instructions: the check before every wide call.
    pub(crate) fn require(self) {
        assert!(self.is_available(), "this machine does not have the instructions of {self:?}");
    }
}

/// Declares a function once and compiles it for every [`Isa`]; its first argument becomes the `Isa`
/// to run on.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2_fma($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                portable($($arg),*)
            }

            isa.require();
            match isa {
                $crate::isa::Isa::Portable => portable($($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `require` has seen the features on this machine.
                $crate::isa::Isa::Avx2Fma => unsafe { avx2_fma($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `require` has seen the features on this machine.
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("`require` has refused {isa:?}"),
            }
        }
    };
}
pub(crate) use multiversion;

/// The steps of a function of one f32. A trait and not a closure: its method can be
/// `#[inline(always)]`, the call of a long closure or function item is not always inlined.
pub(crate) trait Steps<R>: Copy {
    /// The function at `x`; to be `#[inline(always)]`.
    fn at(self, x: f32) -> R;
}

/// `steps` of one element, with a hardware FMA where there is one.
#[inline]
pub(crate) fn one<R>(x: f32, steps: impl Steps<R>) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "fma")]
        fn fused<R>(x: f32, steps: impl Steps<R>) -> R {
            steps.at(x)
        }
        if is_x86_feature_detected!("fma") {
            // SAFETY: the machine has FMA.
            return unsafe { fused(x, steps) };
        }
    }
    steps.at(x)
}

multiversion! {
    /// `steps` of every element, in place.
    pub(crate) fn map(xs: &mut [f32], steps: impl Steps<f32>) {
        for x in xs {
            *x = steps.at(*x);
        }
    }
}

multiversion! {
    /// `steps` of every element: `first` holds the arguments and becomes the first results.
    pub(crate) fn map_pair(first: &mut [f32], second: &mut [f32], steps: impl Steps<(f32, f32)>) {
        for (a, b) in first.iter_mut().zip(second) {
            (*a, *b) = steps.at(*a);
        }
    }
}
