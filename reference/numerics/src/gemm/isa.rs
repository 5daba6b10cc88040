//! Which instruction set the GEMM kernels of this room run on. The choice changes speed, never
//! bits.

use std::sync::OnceLock;

/// An instruction set with kernels of its own. All of them give identical bits; tests hold every
/// one that the machine has against [`Isa::Portable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// AArch64 with Advanced SIMD.
    Neon,
    /// Plain Rust, on any machine: the readable form of the arithmetic.
    Portable,
}

impl Isa {
    /// The name used by `fathom doctor`, by benches and by the variable `FATHOM_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Whether this machine can execute the kernels of `self`.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            Isa::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Every instruction set that this machine has, the fastest first; never empty.
    pub fn available() -> impl Iterator<Item = Isa> {
        [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable]
            .into_iter()
            .filter(|isa| isa.is_available())
    }

    /// The fastest available one, found once; `FATHOM_ISA=avx2` (or another name) asks for a
    /// particular one, and is ignored where the machine does not have it.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let wanted = std::env::var("FATHOM_ISA").unwrap_or_default();
            Isa::available()
                .find(|isa| isa.name() == wanted)
                .or_else(|| Isa::available().next())
                .unwrap_or(Isa::Portable)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Isa;

    #[test]
    fn the_best_is_available_and_portable_always_is() {
        assert!(Isa::best().is_available());
        assert_eq!(Isa::available().last(), Some(Isa::Portable));
    }
}
