//! What an FP8 GEMM is told: operands with their scales, the knobs of the contract, and the errors
//! that say which of them do not fit.

use crate::formats::Format;
use crate::mma::{Accumulator, Output};
use ndarray::ArrayView2;

/// Which elements of an operand share a scale: `rows` along M (or N), `k` along K.
///
/// An operand `[rows, k]` has scales `[ceil(rows / block.rows), ceil(k / block.k)]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ScaleBlock {
    /// Rows of the operand that share a scale.
    pub rows: usize,
    /// Elements along K that share a scale.
    pub k: usize,
}

impl ScaleBlock {
    /// Activations and gradients: one scale for 1 row by 128 of K.
    pub const TILE_1X128: ScaleBlock = ScaleBlock { rows: 1, k: 128 };
    /// Weights: one scale for 128 rows by 128 of K.
    pub const BLOCK_128X128: ScaleBlock = ScaleBlock { rows: 128, k: 128 };
    /// One scale for each row, over all of K.
    pub const PER_ROW: ScaleBlock = ScaleBlock { rows: 1, k: usize::MAX };
    /// One scale for the whole operand.
    pub const PER_TENSOR: ScaleBlock = ScaleBlock { rows: usize::MAX, k: usize::MAX };

    /// The shape of the scales of a `rows x k` operand.
    pub fn scales(self, rows: usize, k: usize) -> (usize, usize) {
        (rows.div_ceil(self.rows), k.div_ceil(self.k))
    }
}

/// An FP8 matrix with its scales: K contiguous in meaning, whatever the views' strides.
#[derive(Clone, Copy, Debug)]
pub struct Fp8Operand<'a> {
    /// Codes `[rows, k]`; A has M rows, B has N (so B is stored as a Linear's weight is).
    pub codes: ArrayView2<'a, u8>,
    /// Scales, FP32, of the shape that `block` gives.
    pub scales: ArrayView2<'a, f32>,
    /// E4M3 or E5M2.
    pub format: Format,
    /// Which elements share a scale.
    pub block: ScaleBlock,
}

impl<'a> Fp8Operand<'a> {
    /// An E4M3 operand.
    pub fn e4m3(
        codes: ArrayView2<'a, u8>,
        scales: ArrayView2<'a, f32>,
        block: ScaleBlock,
    ) -> Fp8Operand<'a> {
        Fp8Operand { codes, scales, format: Format::E4M3, block }
    }

    /// E4M3 with a scale for every 1 x 128: activations, and both operands of wgrad.
    pub fn tile_1x128(codes: ArrayView2<'a, u8>, scales: ArrayView2<'a, f32>) -> Fp8Operand<'a> {
        Fp8Operand::e4m3(codes, scales, ScaleBlock::TILE_1X128)
    }

    /// E4M3 with a scale for every 128 x 128: weights.
    pub fn block_128x128(codes: ArrayView2<'a, u8>, scales: ArrayView2<'a, f32>) -> Fp8Operand<'a> {
        Fp8Operand::e4m3(codes, scales, ScaleBlock::BLOCK_128X128)
    }

    /// Rows: M for A, N for B.
    pub fn rows(&self) -> usize {
        self.codes.nrows()
    }

    /// The scale of an element.
    #[inline]
    pub fn scale(&self, row: usize, k: usize) -> f32 {
        self.scales[[row / self.block.rows, k / self.block.k]]
    }

    pub(super) fn check_block(&self) -> Result<(), GemmError> {
        match self.block {
            ScaleBlock { rows: 0, .. } => Err(GemmError::Zero("rows of a scale block")),
            ScaleBlock { k: 0, .. } => Err(GemmError::Zero("k of a scale block")),
            _ => Ok(()),
        }
    }

    pub(super) fn check(&self, operand: &'static str) -> Result<(), GemmError> {
        if !matches!(self.format, Format::E4M3 | Format::E5M2) {
            return Err(GemmError::Format { operand, found: self.format });
        }
        self.check_block()?;
        let expected = self.block.scales(self.codes.nrows(), self.codes.ncols());
        if self.scales.dim() != expected {
            return Err(GemmError::Scales {
                operand,
                shape: self.codes.dim(),
                block: self.block,
                expected,
                found: self.scales.dim(),
            });
        }
        Ok(())
    }
}

/// How a partial sum enters the FP32 accumulator at promotion.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Promote {
    /// `acc = fma(scale_a * scale_b, partial, acc)`: the contract.
    #[default]
    Fma,
    /// `acc = acc + (scale_a * scale_b) * partial`, the product rounded: a kernel without fma.
    MulAdd,
    /// `acc = acc + (partial * scale_a) * scale_b`, each rounded: scales applied in turn.
    ScalesInTurn,
}

/// The knobs of an FP8 GEMM. The default is Hopper's wgmma with promotion every 128.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GemmConfig {
    /// The tensor core's arithmetic within an interval.
    pub accumulator: Accumulator,
    /// Elements of K that the tensor core sums from zero before promotion; `None`: all of K. It
    /// divides both operands' scale blocks or is a multiple of them; where it is larger, the scales
    /// it spans must be equal.
    pub promotion_interval: Option<usize>,
    /// How a partial sum enters the FP32 accumulator.
    pub promote: Promote,
}

impl Default for GemmConfig {
    fn default() -> GemmConfig {
        GemmConfig {
            accumulator: Accumulator::HOPPER_FP8,
            promotion_interval: Some(128),
            promote: Promote::Fma,
        }
    }
}

/// What becomes of the old value of the output.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Accumulate {
    /// It is overwritten: the accumulator starts from +0.
    #[default]
    Overwrite,
    /// The accumulator starts from it, so that a shard's micro-batches chain: splitting K between
    /// two calls at a multiple of the interval changes no bit. Ours, for weight gradients.
    Chain,
    /// The product is computed from +0 and added to it at the end, one rounding: DeepGEMM's form.
    AddAtEnd,
}

/// Why a GEMM is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GemmError {
    /// K of the operands differs.
    #[error("a is {a:?} and b is {b:?}: expected the same K (second dimension) in both")]
    Depth {
        /// Shape of A.
        a: (usize, usize),
        /// Shape of B.
        b: (usize, usize),
    },
    /// The output has another shape than the product.
    #[error("{what} is {found:?}: expected {expected:?}")]
    Shape {
        /// The name of the tensor or list.
        what: &'static str,
        /// The shape it must have.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// Scales of the wrong shape.
    #[error(
        "{operand}_scale is {found:?}: expected {expected:?}, one scale for every {} x {} of {operand} {shape:?}",
        .block.rows, .block.k
    )]
    Scales {
        /// `a` or `b`.
        operand: &'static str,
        /// Shape of the operand.
        shape: (usize, usize),
        /// Its scale block.
        block: ScaleBlock,
        /// The scales' shape that follows.
        expected: (usize, usize),
        /// The scales' shape.
        found: (usize, usize),
    },
    /// A format that is not FP8.
    #[error("{operand} is {found}: expected e4m3 or e5m2")]
    Format {
        /// `a` or `b`.
        operand: &'static str,
        /// The format given.
        found: Format,
    },
    /// The interval and a scale block overlap in part.
    #[error(
        "promotion interval {interval} and {operand}'s scale block of {block} along K: expected one to \
         divide the other"
    )]
    Interval {
        /// The promotion interval.
        interval: usize,
        /// `a` or `b`.
        operand: &'static str,
        /// The block's extent along K.
        block: usize,
    },
    /// A promotion interval spans blocks of different scales, so no one scale fits its partial sum.
    #[error(
        "promotion interval {interval} spans scales that differ: {operand}_scale[{row}, {first}] is \
         {first_scale:e}, [{row}, {other}] is {other_scale:e}; expected equal scales within an interval \
         (per-tensor or per-row), or an interval of at most {block}"
    )]
    UnequalScales {
        /// The interval, K where there is none.
        interval: usize,
        /// `a` or `b`.
        operand: &'static str,
        /// Row of the scales.
        row: usize,
        /// First K block of the interval.
        first: usize,
        /// The scale of that block.
        first_scale: f32,
        /// A later K block of the interval.
        other: usize,
        /// The scale of that one.
        other_scale: f32,
        /// The block's extent along K.
        block: usize,
    },
    /// A knob that must be positive is zero.
    #[error("{0} is 0: expected at least 1")]
    Zero(&'static str),
    /// An accumulator that no FP32 holds.
    #[error("accumulator.output has {found} fraction bits: expected 1 to 23")]
    OutputBits {
        /// The bits given.
        found: u32,
    },
    /// Group sizes do not add up to K, or exceed M.
    #[error("{what}: expected {expected}, found {found}")]
    GroupSizes {
        /// The argument, `m_sizes` or `k_sizes`.
        what: &'static str,
        /// What they must be.
        expected: String,
        /// What they are.
        found: String,
    },
}

/// Checks the parameters of an accumulator.
pub(super) fn check_accumulator(accumulator: &Accumulator) -> Result<(), GemmError> {
    match accumulator.output {
        _ if accumulator.group == 0 => Err(GemmError::Zero("accumulator.group")),
        Output::F32 { fraction_bits } if !(1..=23).contains(&fraction_bits) => {
            Err(GemmError::OutputBits { found: fraction_bits })
        }
        _ => Ok(()),
    }
}

/// Checks operands against each other and against the knobs; afterwards every interval has one
/// scale for each row of A and of B.
pub(super) fn check(
    a: &Fp8Operand<'_>,
    b: &Fp8Operand<'_>,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    if a.codes.ncols() != b.codes.ncols() {
        return Err(GemmError::Depth { a: a.codes.dim(), b: b.codes.dim() });
    }
    if config.promotion_interval == Some(0) {
        return Err(GemmError::Zero("promotion_interval"));
    }
    check_accumulator(&config.accumulator)?;
    a.check("a")?;
    b.check("b")?;
    check_interval("a", a, config)?;
    check_interval("b", b, config)
}

fn check_interval(
    operand: &'static str,
    x: &Fp8Operand<'_>,
    config: &GemmConfig,
) -> Result<(), GemmError> {
    let (k, block) = (x.codes.ncols(), x.block.k);
    let interval = config.promotion_interval.unwrap_or(k).min(k);
    if interval == 0 || block >= k {
        return Ok(());
    }
    if interval <= block {
        return match block % interval {
            0 => Ok(()),
            _ => Err(GemmError::Interval { interval, operand, block }),
        };
    }
    if interval % block != 0 && interval < k {
        return Err(GemmError::Interval { interval, operand, block });
    }
    let blocks = interval.div_ceil(block);
    for (row, scales) in x.scales.outer_iter().enumerate() {
        for column in 0..scales.len() {
            let first = column / blocks * blocks;
            if scales[column].to_bits() != scales[first].to_bits() {
                return Err(GemmError::UnequalScales {
                    interval,
                    operand,
                    row,
                    first,
                    first_scale: scales[first],
                    other: column,
                    other_scale: scales[column],
                    block,
                });
            }
        }
    }
    Ok(())
}
