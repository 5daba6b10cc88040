//! The tensor core: one algorithm ([`fused`]) and a table of what each instruction feeds it
//! ([`table`]).
//!
//! An NVIDIA matrix instruction computes each element of `D = A B + C` by fused dot-product-adds
//! (arXiv 2511.10909): products exact, all terms and the accumulator aligned to the largest
//! exponent among them and cut to `F` fraction bits below it, the cut terms summed exactly, the sum
//! rounded to the accumulator's format. Architectures differ in how many products share a step, in
//! F and in the output format; those are the fields of an [`Accumulator`], and [`TABLE`] holds them
//! for every instruction. An accumulator that no hardware has is written the same way.
//!
//! ```
//! use fathom_numerics::mma::{Arch, Instr, Mma};
//! let mma = Mma::find(Arch::Sm90, Instr::Wgmma, "m64n8k32.f32.e4m3.e4m3")?;
//! let (mut a, b) = ([0x38u32; 32], [0x38u32; 32]); // 1.0 everywhere
//! assert_eq!(f32::from_bits(mma.dot(&a, &b, 0)), 32.0);
//! a[0] = 0x7E; // 448 moves the cut to 2^-5: a C of 2^-6 is lost
//! assert_eq!(f32::from_bits(mma.dot(&a, &b, 0.015625f32.to_bits())), 479.0);
//! # Ok::<(), fathom_numerics::mma::MmaError>(())
//! ```

pub mod fused;
pub mod table;
mod wide;

use crate::formats::{Class, Format, Overflow, Rounding, canonical_f32};
pub use fused::{Accumulator, Fraction, Operand, Output, Terms};
use ndarray::{Array2, ArrayView2};
pub use table::{Arch, Instr, MmaRow, Order, TABLE};

/// The sizes of a matrix product: `d[m, n] = a[m, k] b[k, n] + c[m, n]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MmaShape {
    /// Rows of A and D.
    pub m: usize,
    /// Columns of B and D.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
}

/// Why an instruction is not in the table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MmaError {
    /// The qualifier is not of PTX's form.
    #[error(
        "qualifier '{qualifier}' of {instr}: expected {expected}, found '{found}'; \
         an example is '{example}'"
    )]
    Qualifier {
        /// The qualifier as given.
        qualifier: String,
        /// The instruction it belongs to.
        instr: Instr,
        /// What should stand at the place.
        expected: &'static str,
        /// What stands there.
        found: String,
        /// A well-formed qualifier.
        example: &'static str,
    },
    /// Well-formed, but no row of the table covers it.
    #[error("no tensor-core model for {instr} {qualifier} on {arch}; {known}")]
    Unknown {
        /// The architecture asked for.
        arch: Arch,
        /// The instruction asked for.
        instr: Instr,
        /// The qualifier asked for.
        qualifier: String,
        /// What the table has for this architecture and instruction.
        known: String,
    },
    /// The architecture's name is not one of the table's.
    #[error(
        "unknown architecture '{0}': expected one of sm_70, sm_75, sm_80, sm_89, sm_90, sm_100, sm_120"
    )]
    Arch(String),
    /// The instruction's name is not one of the table's.
    #[error(
        "unknown instruction '{0}': expected one of mma, wgmma, tcgen05.mma, mma.block_scale, \
         tcgen05.mma.block_scale"
    )]
    Instr(String),
}

/// Operand formats of one matrix instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Types {
    /// Format of A's elements.
    pub a: Format,
    /// Format of B's elements.
    pub b: Format,
    /// Format of C: F32 or F16.
    pub c: Format,
    /// Format of D: F32 or F16.
    pub d: Format,
}

/// Scales of a block-scaled instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockScale {
    /// UE8M0 or UE4M3.
    pub format: Format,
    /// Elements of K that share a scale.
    pub block: usize,
}

/// One matrix instruction, resolved: a row of the table with its shape and types chosen.
#[derive(Clone, Copy, Debug)]
pub struct Mma {
    /// The row of the table.
    pub row: &'static MmaRow,
    /// The shape in the qualifier; only k bears on the bits.
    pub shape: MmaShape,
    /// The operand formats in the qualifier.
    pub types: Types,
    /// The scales in the qualifier, for block-scaled instructions.
    pub scale: Option<BlockScale>,
}

impl Mma {
    /// Looks up an instruction by its PTX qualifier, such as `m16n8k16.f32.bf16.bf16.f32`,
    /// `m64n128k32.f32.e4m3.e4m3` (wgmma) or `m128n8k64.block16.f32.e2m1.e2m1.ue4m3`.
    ///
    /// # Errors
    /// [`MmaError::Qualifier`] where it is malformed, [`MmaError::Unknown`] where no row covers it.
    pub fn find(arch: Arch, instr: Instr, qualifier: &str) -> Result<Mma, MmaError> {
        let (shape, types, scale) = table::parse_qualifier(instr, qualifier)?;
        Mma::with_types(arch, instr, shape, types, scale).ok_or_else(|| MmaError::Unknown {
            arch,
            instr,
            qualifier: qualifier.to_string(),
            known: table::known(arch, instr),
        })
    }

    /// Looks up an instruction by its parts; `None` where no row of the table covers it.
    pub fn with_types(
        arch: Arch,
        instr: Instr,
        shape: MmaShape,
        types: Types,
        scale: Option<BlockScale>,
    ) -> Option<Mma> {
        let row = TABLE.iter().find(|row| row.covers(arch, instr, shape, types, scale))?;
        Some(Mma { row, shape, types, scale })
    }

    /// One element of D: `a . b + c` over codes of the instruction's formats, `a` and `b` of length
    /// k (E2M1 one code an element, unpacked).
    ///
    /// # Panics
    /// If the instruction is block-scaled, or the lengths are not k.
    pub fn dot(&self, a: &[u32], b: &[u32], c: u32) -> u32 {
        assert!(self.scale.is_none(), "{} is block-scaled: use dot_scaled", self.row.instr);
        self.dot_scaled(a, b, &[], &[], c)
    }

    /// One element of D of a block-scaled instruction: `k / block` scale codes for each operand.
    ///
    /// # Panics
    /// If a slice has another length than the instruction says.
    pub fn dot_scaled(
        &self,
        a: &[u32],
        b: &[u32],
        scale_a: &[u32],
        scale_b: &[u32],
        c: u32,
    ) -> u32 {
        let blocks = self.scale.map_or(0, |s| self.shape.k / s.block);
        assert_eq!((a.len(), b.len()), (self.shape.k, self.shape.k), "a and b are k long");
        assert_eq!((scale_a.len(), scale_b.len()), (blocks, blocks), "a scale for each block");
        let a: Vec<Operand> = a.iter().map(|&x| self.operand(self.types.a, x)).collect();
        let b: Vec<Operand> = b.iter().map(|&x| self.operand(self.types.b, x)).collect();
        let scale = |codes: &[u32]| -> Vec<Operand> {
            let format = self.scale.map_or(Format::UE8M0, |s| s.format);
            codes.iter().map(|&x| Operand::decode(format, x)).collect()
        };
        self.dot_decoded(&a, &b, &scale(scale_a), &scale(scale_b), c)
    }

    /// The whole product `D = A B + C`: a\[m, k\], b\[k, n\], c\[m, n\] of codes; m and n are the
    /// views' own. The bits do not depend on m and n.
    ///
    /// # Panics
    /// If the views' shapes disagree with each other or with the instruction's k.
    pub fn mma(
        &self,
        a: ArrayView2<'_, u32>,
        b: ArrayView2<'_, u32>,
        c: ArrayView2<'_, u32>,
    ) -> Array2<u32> {
        let none = |rows, columns| Array2::zeros((rows, columns));
        let (scale_a, scale_b) = (none(a.nrows(), 0), none(0, b.ncols()));
        assert!(self.scale.is_none(), "{} is block-scaled: use mma_scaled", self.row.instr);
        self.mma_scaled(a, b, scale_a.view(), scale_b.view(), c)
    }

    /// [`Mma::mma`] with block scales scale_a\[m, k/block\], scale_b\[k/block, n\].
    ///
    /// # Panics
    /// If the views' shapes disagree with each other or with the instruction's k and block.
    pub fn mma_scaled(
        &self,
        a: ArrayView2<'_, u32>,
        b: ArrayView2<'_, u32>,
        scale_a: ArrayView2<'_, u32>,
        scale_b: ArrayView2<'_, u32>,
        c: ArrayView2<'_, u32>,
    ) -> Array2<u32> {
        let (m, n, k) = (a.nrows(), b.ncols(), self.shape.k);
        let blocks = self.scale.map_or(0, |s| k / s.block);
        assert_eq!(a.dim(), (m, k), "a is [m, k]");
        assert_eq!(b.dim(), (k, n), "b is [k, n]");
        assert_eq!(c.dim(), (m, n), "c is [m, n]");
        assert_eq!(scale_a.dim(), (m, blocks), "scale_a is [m, k/block]");
        assert_eq!(scale_b.dim(), (blocks, n), "scale_b is [k/block, n]");
        // Each operand is decoded once, rows of A and columns of B contiguous.
        let scale_format = self.scale.map_or(Format::UE8M0, |s| s.format);
        let decode = |view: ArrayView2<'_, u32>| -> Vec<Operand> {
            view.iter().map(|&x| Operand::decode(scale_format, x)).collect()
        };
        let a: Vec<Operand> = a.iter().map(|&x| self.operand(self.types.a, x)).collect();
        let b: Vec<Operand> = b.t().iter().map(|&x| self.operand(self.types.b, x)).collect();
        let (scale_a, scale_b) = (decode(scale_a), decode(scale_b.t()));
        Array2::from_shape_fn((m, n), |(i, j)| {
            self.dot_decoded(
                &a[i * k..][..k],
                &b[j * k..][..k],
                &scale_a[i * blocks..][..blocks],
                &scale_b[j * blocks..][..blocks],
                c[[i, j]],
            )
        })
    }

    /// The format that elements of `format` enter the multipliers in.
    fn multiplied_as(&self, format: Format) -> Format {
        match self.row.order {
            Order::Ascending => format,
            Order::PairsThenAddC => Format::F16,
        }
    }

    /// Decodes an element of A or B. Where FP8 is converted to F16 first, a subnormal E4M3 becomes
    /// a normal F16, which changes its nominal exponent.
    fn operand(&self, format: Format, code: u32) -> Operand {
        let multiplied_as = self.multiplied_as(format);
        if multiplied_as == format {
            return Operand::decode(format, code);
        }
        let value = format.layout().to_f32(code);
        let converted =
            multiplied_as.layout().from_f32(value, Rounding::NearestEven, Overflow::Ieee);
        Operand::decode(multiplied_as, converted)
    }

    /// One element of D from decoded operands, in the row's order of steps.
    fn dot_decoded(
        &self,
        a: &[Operand],
        b: &[Operand],
        scale_a: &[Operand],
        scale_b: &[Operand],
        c: u32,
    ) -> u32 {
        let accumulator = &self.row.accumulator;
        let fraction = |format| self.multiplied_as(format).layout().fraction_bits;
        let (fraction_a, fraction_b) = (fraction(self.types.a), fraction(self.types.b));
        let terms = Terms { a, b, scale_a, scale_b, fraction_a, fraction_b };
        match (self.row.order, self.scale) {
            (Order::Ascending, None) => accumulator.chain(&terms, self.accumulator_code(c)),
            (Order::Ascending, Some(scale)) => accumulator.block_scaled(&terms, scale, c),
            (Order::PairsThenAddC, _) => {
                // k = 0, 1 mod 4 from zero, then k = 2, 3 mod 4, then C by a rounded addition.
                let half = |x: &[Operand], half: usize| -> Vec<Operand> {
                    let of_half = |(k, _): &(usize, &Operand)| k / 2 % 2 == half;
                    x.iter().enumerate().filter(of_half).map(|(_, o)| *o).collect()
                };
                let sum = (0..2).fold(0, |sum, i| {
                    let (a, b) = (half(a, i), half(b, i));
                    accumulator.chain(&Terms { a: &a, b: &b, ..terms }, sum)
                });
                self.add_c(sum, c)
            }
        }
    }

    /// C in the accumulator's format: an F16 C widens where D is F32.
    fn accumulator_code(&self, c: u32) -> u32 {
        match (self.types.c, self.types.d) {
            (Format::F16, Format::F32) => match Format::F16.unpack(c).class {
                Class::Nan => 0x7FFF_FFFF,
                _ => Format::F16.layout().to_f32(c).to_bits(),
            },
            _ => c,
        }
    }

    fn add_c(&self, sum: u32, c: u32) -> u32 {
        match self.types.d {
            Format::F16 => {
                let exact = |code| Format::F16.layout().to_f32(code);
                // The FP32 sum of two FP16 values is exact or far above half an ulp of FP16.
                u32::from(crate::formats::to_f16(exact(sum) + exact(c)).to_bits())
            }
            _ => canonical_f32(f32::from_bits(sum) + f32::from_bits(c)).to_bits(),
        }
    }
}
