//! `gemm_fp8`: `d[m, n] = a[m, k] b[n, k]^T` of scaled FP8 operands, as Hopper computes it.
//!
//! Within a promotion interval along k the tensor core sums from zero in groups of 32; then
//! `acc = fma(scale_a * scale_b, partial, acc)`, k ascending; the output is cast to nearest even
//! (DeepSeek-V3 report, section 3.3.2; `docs/numerics.md`). The arithmetic is
//! `fathom_numerics::gemm`; b is stored `[n, k]`, as a Linear's weight is. Inputs: a, b F8_E4M3 or
//! F8_E5M2; a_scale\[ceil(m / tile), ceil(k / tile)\], b_scale\[ceil(n / block), ceil(k / block)\]
//! F32; for `accumulate` also c\[m, n\] F32, the old value of the output.

use fathom_numerics::formats::{Format, Rounding};
use fathom_numerics::gemm::{self, Accumulate, GemmConfig, Promote};
use fathom_numerics::mma::{Accumulator, Arch, Fraction, Output};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::{Block, FP8, extents, one_of, operand, scales, stored_as, undefined};
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// `d = a b^T` of scaled FP8 operands, as the tensor core computes it; c may be added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GemmFp8 {
    /// Whose tensor core: `sm_90` (13 fraction bits) or `sm_100` (25).
    #[schemars(extend("enum" = ["sm_90", "sm_100"]))]
    pub arch: Arch,
    /// Rows of a and d.
    pub m: usize,
    /// Rows of b, columns of d.
    pub n: usize,
    /// Columns of a and b.
    pub k: usize,
    /// Elements of k that the tensor core sums before promotion; `null`: all of k. Above a scale
    /// block it is defined only where the scales it spans are equal.
    pub promotion_interval: Option<usize>,
    /// Extent of a's scale tile along m and k; `null`: the whole dimension.
    pub a_tile: Block,
    /// Extent of b's scale block along n and k; `null`: the whole dimension.
    pub b_block: Block,
    /// Output: `f32` or `bf16`.
    #[schemars(extend("enum" = ["f32", "bf16"]))]
    pub d: Format,
    /// What becomes of c.
    #[serde(default, skip_serializing_if = "is_default")]
    pub accumulate: Accumulate,
    /// How a partial sum is promoted.
    #[serde(default, skip_serializing_if = "is_default")]
    pub promote: Promote,
    /// A tensor core that no hardware has, for what-if studies; overrides that of `arch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accumulator: Option<AccumulatorParams>,
}

fn is_default<T: Default + PartialEq>(x: &T) -> bool {
    *x == T::default()
}

/// A parametric tensor core: see `fathom_numerics::mma::Accumulator`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccumulatorParams {
    /// Products a step.
    pub group: usize,
    /// Fraction bits kept below the largest exponent; `null`: the sum is exact.
    pub fraction_bits: Option<u32>,
    /// How aligned terms are cut to them.
    pub align: Rounding,
    /// Fraction bits of the FP32 that holds the sum between steps, 1 to 23.
    pub output_fraction_bits: u32,
    /// How the sum is rounded to it.
    pub round: Rounding,
}

/// The FP8 tensor core of an architecture that this op knows.
fn of_arch(arch: Arch) -> Option<Accumulator> {
    match arch {
        Arch::Sm90 => Some(Accumulator::HOPPER_FP8),
        Arch::Sm100 => Some(Accumulator::BLACKWELL_FP8),
        _ => None,
    }
}

impl GemmFp8 {
    /// The contract's GEMM on Hopper: 1x128 tiles times 128x128 blocks, promotion every 128.
    pub fn hopper(m: usize, n: usize, k: usize, d: Format) -> GemmFp8 {
        GemmFp8 {
            arch: Arch::Sm90,
            m,
            n,
            k,
            promotion_interval: Some(128),
            a_tile: [Some(1), Some(128)],
            b_block: [Some(128), Some(128)],
            d,
            accumulate: Accumulate::Overwrite,
            promote: Promote::Fma,
            accumulator: None,
        }
    }

    /// The knobs as `fathom-numerics` takes them.
    pub fn config(&self) -> GemmConfig {
        let accumulator = match self.accumulator {
            Some(p) => Accumulator {
                group: p.group,
                fraction: p.fraction_bits.map_or(Fraction::Exact, Fraction::Bits),
                align: p.align,
                output: Output::F32 { fraction_bits: p.output_fraction_bits },
                round: p.round,
            },
            None => of_arch(self.arch).expect("infer refuses other architectures"),
        };
        GemmConfig {
            accumulator,
            promotion_interval: self.promotion_interval,
            promote: self.promote,
        }
    }

    fn params_error(path: &str, message: &str) -> OpError {
        OpError::Params { op: Self::NAME, path: path.to_owned(), message: message.to_owned() }
    }
}

impl Op for GemmFp8 {
    const NAME: &'static str = "gemm_fp8";
    const INPUTS: &'static [Role] =
        &[input("a"), input("a_scale"), input("b"), input("b_scale"), optional("c")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::Gemm;

    fn example() -> Example {
        let (m, n, k) = (4, 6, 160);
        let (a_tile, b_block) = ([1, 128], [128, 128]);
        Example::new(GemmFp8::hopper(m, n, k, Format::Bf16))
            .input("a", DType::F8E4M3, shape![m, k])
            .positive("a_scale", DType::F32, shape![ceil(m, a_tile[0]), ceil(k, a_tile[1])])
            .input("b", DType::F8E4M3, shape![n, k])
            .positive("b_scale", DType::F32, shape![ceil(n, b_block[0]), ceil(k, b_block[1])])
            .absent("c", DType::F32, shape![m, n])
            .output("d", shape![m, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(a), Some(a_scale), Some(b), Some(b_scale), c] = inputs else {
            unreachable!("checked by the table");
        };
        one_of(Self::NAME, "d", self.d, &[Format::F32, Format::Bf16])?;
        if of_arch(self.arch).is_none() {
            let message = format!("expected sm_90 or sm_100, found {}", self.arch);
            return Err(Self::params_error("arch", &message));
        }
        if let Some(p) = self.accumulator {
            if !(1..=23).contains(&p.output_fraction_bits) {
                let path = "accumulator.output_fraction_bits";
                return Err(Self::params_error(path, "expected 1 to 23"));
            }
            if p.fraction_bits.is_some_and(|bits| bits > 60) {
                let path = "accumulator.fraction_bits";
                return Err(Self::params_error(path, "expected at most 60, or null for exact"));
            }
        }
        extents(Self::NAME, &[("a_tile", self.a_tile), ("b_block", self.b_block)])?;
        for (codes, scale, rows, block) in
            [(a, a_scale, self.m, self.a_tile), (b, b_scale, self.n, self.b_block)]
        {
            rules::dtype(codes, FP8)?;
            rules::shape(codes, &[rows, self.k])?;
            rules::dtype(scale, &[DType::F32])?;
            rules::shape(scale, &scales(block, rows, self.k))?;
        }
        match (self.accumulate, c) {
            (Accumulate::Overwrite, Some(_)) => {
                let message = "accumulate is overwrite, which takes no c".to_owned();
                return Err(OpError::Undefined { op: Self::NAME, message });
            }
            (Accumulate::Overwrite, None) => {}
            (_, None) => return Err(OpError::missing(Self::NAME, "c")),
            (_, Some(c)) => {
                rules::dtype(c, &[DType::F32])?;
                rules::shape(c, &[self.m, self.n])?;
            }
        }
        Ok(vec![rules::meta("d", stored_as(self.d), &[self.m, self.n])])
    }

    fn flops(&self, _inputs: &[Option<TensorMeta>]) -> u64 {
        2 * self.m as u64 * self.n as u64 * self.k as u64
    }

    fn run(&self, mut inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let c = inputs.pop().expect("one entry a role");
        let [Some(a), Some(a_scale), Some(b), Some(b_scale)] = &inputs[..] else {
            unreachable!("checked by infer");
        };
        let (a, b) = (operand(a, a_scale, self.a_tile), operand(b, b_scale, self.b_block));
        let shape = (self.m, self.n);
        let mut d = match c {
            Some(c) => Array2::from_shape_vec(shape, c.into_vec()).expect("checked by infer"),
            None => Array2::zeros(shape),
        };
        gemm::gemm_fp8_into(&a, &b, d.view_mut(), self.accumulate, &self.config())
            .map_err(|e| undefined(Self::NAME, &e))?;
        Ok(vec![match self.d {
            Format::Bf16 => Tensor::from_array(gemm::cast_bf16(d.view())),
            _ => Tensor::from_array(d),
        }])
    }
}
