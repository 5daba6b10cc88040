//! Run-time choice of instructions for loops that the compiler vectorises.
//!
//! A body written once, `#[inline(always)]` and branch-free, is compiled for AVX-512, for AVX2 with
//! FMA and for whatever the target guarantees (on AArch64 that is NEON and FMA). Inside,
//! `f32::mul_add` becomes one instruction where it is a library call elsewhere. IEEE operations are
//! the same function of their operands on every path, so the bits are too.

pub(crate) use crate::gemm::Isa;

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

            assert!(isa.is_available(), "this machine has no {}", isa.name());
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the machine has the features, as asserted above.
                $crate::isa::Isa::Avx2 => unsafe { avx2_fma($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the machine has the features, as asserted above.
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                _ => portable($($arg),*),
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
