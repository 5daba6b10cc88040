//! Everything about a GEMM that may deviate, as data.

use fathom_numerics::formats::{Format, Overflow, Rounding, to_bf16, to_f16};
use fathom_numerics::gemm::{Accumulate, Promote};
use fathom_numerics::mma::Accumulator;

use super::problem::Problem;

/// How the codes of an operand are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reading {
    AsGiven,
    /// The bits read as another format.
    As(Format),
    /// The values rounded to another format first, to nearest even, saturating.
    ConvertedTo(Format),
    /// Subnormal codes count as zero.
    Flushed,
    /// The sign bit ignored.
    Unsigned,
    /// Every two codes of K exchanged.
    PairsExchanged,
    /// Every four codes of K reversed, as by another byte order.
    WordsReversed,
    /// Every group of 32 in a block of 128 reads the block's first group.
    FirstGroup,
    /// Chunks of 16 bytes exchanged as a swizzle of that many bytes a row does.
    Swizzled(usize),
}

/// Where an operand's codes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    AsGiven,
    /// As if the same memory were laid out `[k, rows]`.
    Transposed,
    /// The row this far on, the last one repeated.
    Row(isize),
    /// The elements of K this far on, within K; those outside stay.
    Along(isize),
}

/// What the tensor core computes: all that decides the partial sums.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Core {
    pub(super) accumulator: Accumulator,
    /// Elements of K from zero to promotion.
    pub(super) interval: usize,
    /// FP8 `mma.sync` on sm_90: F16 products in halves of each 32, added to the sum in FP32.
    pub(super) mma_sync: bool,
    /// An interval's sum starts from the one before instead of zero.
    pub(super) carried: bool,
    /// The part of each block of 128 elements of K that enters.
    pub(super) within: (usize, usize),
    /// Groups within an interval from the last to the first.
    pub(super) groups_descending: bool,
    /// Elements of K that enter; beyond K, memory behind the row's end does.
    pub(super) extent: usize,
    pub(super) readings: [Reading; 2],
    pub(super) places: [Place; 2],
    /// Which expert's weights a row is multiplied by.
    pub(super) expert: Expert,
    /// Blocks whose products are left out on the tensor core.
    pub(super) blocks: Blocks,
}

/// Which expert a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Expert {
    AsGiven,
    /// The expert this far on, cyclically.
    Next(isize),
    /// One expert's weights for all rows.
    Only(usize),
    /// Groups begin this many rows later.
    Offset(isize),
    /// Groups begin at multiples of that many rows.
    Aligned(usize),
    /// As given, but the rows behind the last group are the last expert's.
    LastForPadding,
}

/// Which K block's scale a K block takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum BlockOf {
    Own,
    Next(isize),
    Always(usize),
    /// The last block takes this one's.
    LastTakes(usize),
    /// One block takes this far block's: (block, from).
    OneTakes(usize, usize),
    /// Of every so many blocks, all take the first's.
    FirstOf(usize),
    /// Of every so many blocks, all take the last's.
    LastOf(usize),
    /// Blocks are of that many elements of K.
    Of(usize),
    Reversed,
    /// Block modulo that.
    Modulo(usize),
    /// The block of the row's largest scale.
    Largest,
    /// Of every so many blocks, in reverse order.
    ReversedIn(usize),
}

/// Which row of scales a row takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum RowOf {
    Own,
    Next(isize),
    Always(usize),
    /// The last row of scales is this one.
    LastTakes(usize),
    /// The first (or last) row of its tile of that many rows.
    TileFirst(usize),
    TileLast(usize),
    /// Groups of that many rows.
    Of(usize),
    Modulo(usize),
    /// Counted from the first row of the row's expert.
    WithinExpert,
    /// Of the expert this far on.
    OfExpert(isize),
    /// Of that expert for all.
    OnlyExpert(usize),
    Reversed,
    /// With that bit of the row's number flipped, cleared, or set.
    Xor(usize),
    Without(usize),
    With(usize),
}

/// What becomes of a scale's value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ScaleValue {
    AsGiven,
    One,
    Bf16,
    F16,
    Pow2Up,
    Pow2Down,
    Pow2Nearest,
    /// Rounded up at half of the fraction's way: 1.5.
    Pow2Half,
    Reciprocal,
    Squared,
    /// 1 in the last block.
    OneInLast,
    /// Times another row's, in the rows that have an earlier one.
    TimesRow(Earlier),
}

/// Which earlier row of scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Earlier {
    First,
    Previous,
}

/// The scale of an operand's row and K block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ScaleOf {
    pub(super) block: BlockOf,
    pub(super) row: RowOf,
    pub(super) value: ScaleValue,
    pub(super) layout: ScaleLayout,
}

/// How the memory of scales is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ScaleLayout {
    AsGiven,
    /// As if laid out `[columns, rows]`, rows padded to a multiple of that.
    Transposed(usize),
    /// As if each row's scales were padded to a multiple of that.
    Padded(usize),
}

/// Where in an interval its scale is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum End {
    First,
    Last,
    /// The interval's number taken as a block's.
    Counted,
}

/// When scales enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scaling {
    /// At each promotion.
    AtPromotion(Promote),
    /// Operands dequantised first: to BF16 for the tensor core, or to FP32 for fma.
    BeforeBf16,
    BeforeF16,
    BeforeFp32,
    /// Once at the end, by the first block's.
    AtTheEnd,
}

/// A narrower type that an FP32 number passes through.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Narrow {
    F32,
    Bf16,
    F16,
    E4m3,
}

impl Narrow {
    pub(super) fn through(self, x: f32) -> f32 {
        match self {
            Narrow::F32 => x,
            Narrow::Bf16 => to_bf16(x).to_f32(),
            Narrow::F16 => to_f16(x).to_f32(),
            Narrow::E4m3 => {
                let layout = Format::E4M3.layout();
                layout.to_f32(layout.from_f32(x, Rounding::NearestEven, Overflow::Saturate))
            }
        }
    }
}

/// What the result goes through before the cast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Activation {
    None,
    Relu,
    Silu,
    Gelu,
    ReluSquared,
}

impl Activation {
    pub(super) fn of(self, x: f32) -> f32 {
        let wide = f64::from(x);
        match self {
            Activation::None => x,
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::ReluSquared => {
                if x < 0.0 {
                    0.0
                } else {
                    x * x
                }
            }
            Activation::Silu => (wide / (1.0 + (-wide).exp())) as f32,
            Activation::Gelu => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
                (0.5 * wide * (1.0 + inner.tanh())) as f32
            }
        }
    }
}

/// The order in which intervals of K are worked off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Order {
    Ascending,
    Descending,
    EvenFirst,
    /// Begins there and wraps around.
    From(usize),
    /// Sums of even and of odd blocks, added at the end.
    TwoChains,
    /// All partial sums added by a halving tree.
    Tree,
}

/// Which K blocks of 128 enter, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Blocks {
    All,
    Without(usize),
    Twice(usize),
    /// Each counted that many times.
    Times(usize),
    Only(usize),
    /// From that block on, and those before it not.
    From(usize),
}

impl Blocks {
    /// How often a block of 128 elements of K is counted.
    pub(super) fn weight(self, block: usize) -> usize {
        match self {
            Blocks::All => 1,
            Blocks::Without(b) => usize::from(block != b),
            Blocks::Twice(b) => 1 + usize::from(block == b),
            Blocks::Times(n) => n,
            Blocks::Only(b) => usize::from(block == b),
            Blocks::From(b) => usize::from(block >= b),
        }
    }
}

/// How parts of split-K are added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Split {
    pub(super) parts: usize,
    /// The type that each part is rounded to.
    pub(super) part: Narrow,
    /// The type that the sum is kept in.
    pub(super) sum: Narrow,
    pub(super) descending: bool,
    pub(super) dealt: Dealt,
}

/// Which K blocks each part of split-K gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Dealt {
    /// Runs of `ceil(blocks / parts)`, the last shorter.
    Ceil,
    /// Runs of `floor(blocks / parts)`, the last longer.
    Floor,
    /// Runs whose lengths differ by one, the longer first.
    Even,
    /// Every `parts`-th block.
    InTurn,
}

impl Dealt {
    /// Blocks of each part.
    pub(super) fn parts(self, order: &[usize], parts: usize) -> Vec<Vec<usize>> {
        let count = order.len();
        let run = |from: usize, to: usize| order[from.min(count)..to.min(count)].to_vec();
        let (ceil, floor) = (count.div_ceil(parts), count / parts);
        let of = |p: usize| match self {
            Dealt::Ceil => run(p * ceil, (p + 1) * ceil),
            Dealt::Floor => run(p * floor, if p + 1 == parts { count } else { (p + 1) * floor }),
            Dealt::Even => {
                let begin = |p: usize| p * floor + p.min(count % parts);
                run(begin(p), begin(p + 1))
            }
            Dealt::InTurn => order.iter().copied().skip(p).step_by(parts).collect(),
        };
        (0..parts).map(of).filter(|part| !part.is_empty()).collect()
    }
}

/// The cast to the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cast {
    Nearest,
    Truncated,
    /// Half away from zero: 0x8000 added before truncation.
    HalfUp,
    Via(Narrow),
}

/// A GEMM with its deviations.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Variant {
    pub(super) core: Core,
    pub(super) scaling: Scaling,
    pub(super) scales: [ScaleOf; 2],
    /// Rows take b's scales and columns a's.
    pub(super) scales_exchanged: bool,
    /// Where a scale is read in an interval that spans blocks.
    pub(super) end: End,
    pub(super) partial: Narrow,
    pub(super) accumulator: Narrow,
    pub(super) order: Order,
    pub(super) blocks: Blocks,
    pub(super) split: Split,
    pub(super) accumulate: Accumulate,
    /// What c is multiplied by.
    pub(super) beta: f32,
    pub(super) alpha: f32,
    pub(super) activation: Activation,
    pub(super) cast: Cast,
}

impl Variant {
    pub(super) fn given(p: &Problem) -> Variant {
        let scale = ScaleOf {
            block: BlockOf::Own,
            row: RowOf::Own,
            value: ScaleValue::AsGiven,
            layout: ScaleLayout::AsGiven,
        };
        Variant {
            core: Core {
                accumulator: p.accumulator,
                interval: p.interval,
                mma_sync: false,
                carried: false,
                within: (0, 128),
                groups_descending: false,
                extent: p.k,
                readings: [Reading::AsGiven; 2],
                places: [Place::AsGiven; 2],
                expert: Expert::AsGiven,
                blocks: Blocks::All,
            },
            scaling: Scaling::AtPromotion(p.promote),
            scales: [scale; 2],
            scales_exchanged: false,
            end: End::First,
            partial: Narrow::F32,
            accumulator: Narrow::F32,
            order: Order::Ascending,
            blocks: Blocks::All,
            split: Split {
                parts: 1,
                part: Narrow::F32,
                sum: Narrow::F32,
                descending: false,
                dealt: Dealt::Ceil,
            },
            accumulate: p.accumulate,
            beta: 1.0,
            alpha: 1.0,
            activation: Activation::None,
            cast: Cast::Nearest,
        }
    }
}

impl ScaleValue {
    pub(super) fn of(self, scale: f32, last: bool) -> f32 {
        let exponent = f32::from_bits(scale.to_bits() & 0x7F80_0000);
        let exact = scale == exponent;
        match self {
            // The other row's scale is multiplied in where rows are known.
            ScaleValue::AsGiven | ScaleValue::TimesRow(_) => scale,
            ScaleValue::One => 1.0,
            ScaleValue::OneInLast => {
                if last {
                    1.0
                } else {
                    scale
                }
            }
            ScaleValue::Bf16 => to_bf16(scale).to_f32(),
            ScaleValue::F16 => to_f16(scale).to_f32(),
            ScaleValue::Pow2Up => {
                if exact {
                    scale
                } else {
                    exponent * 2.0
                }
            }
            ScaleValue::Pow2Down => exponent,
            ScaleValue::Pow2Nearest => {
                let up = scale > exponent * std::f32::consts::SQRT_2;
                if up { exponent * 2.0 } else { exponent }
            }
            ScaleValue::Pow2Half => {
                if scale >= exponent * 1.5 {
                    exponent * 2.0
                } else {
                    exponent
                }
            }
            ScaleValue::Reciprocal => 1.0 / scale,
            ScaleValue::Squared => scale * scale,
        }
    }
}

impl Reading {
    /// The format that the read codes are in.
    pub(super) fn format(self, given: Format) -> Format {
        match self {
            Reading::As(format) | Reading::ConvertedTo(format) => format,
            _ => given,
        }
    }

    /// For each 8-bit code as given, the code that enters.
    pub(super) fn table(self, given: Format) -> [u8; 256] {
        std::array::from_fn(|code| {
            let code = code as u32;
            let layout = given.layout();
            let entered = match self {
                Reading::ConvertedTo(to) => to.layout().from_f32(
                    layout.to_f32(code),
                    Rounding::NearestEven,
                    Overflow::Saturate,
                ),
                Reading::Flushed => {
                    let normal = code & 0x7F >= 1 << layout.fraction_bits;
                    if normal { code } else { code & 0x80 }
                }
                Reading::Unsigned => code & 0x7F,
                _ => code,
            };
            entered as u8
        })
    }

    /// Where along K a row's code comes from.
    pub(super) fn along(self, row: usize, k: usize, extent: usize) -> usize {
        let from = match self {
            Reading::FirstGroup => k / 128 * 128 + k % 32,
            // PTX ISA, swizzling modes: the chunk's number is combined with bits of the row's.
            Reading::Swizzled(bytes) => k ^ (row / (128 / bytes) % (bytes / 16) * 16),
            Reading::PairsExchanged => k ^ 1,
            Reading::WordsReversed => k ^ 3,
            _ => k,
        };
        if from < extent { from } else { k }
    }
}
