//! Which accumulator each matrix instruction has: the data behind the tensor-core model.
//!
//! Source: arXiv 2511.10909 and its public model, validated there on hardware; the decomposition of
//! FP8 `mma.sync` on sm_90 is what ptxas emits. A row covers every combination of the formats and
//! depths it lists.

use super::{Accumulator, BlockScale, MmaError, MmaShape, Output, Types};
use crate::formats::Format;
use Arch::*;
use Format::*;
use Instr::*;

/// A GPU architecture, by its compute capability.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema))]
pub enum Arch {
    /// Volta, as in V100.
    #[cfg_attr(feature = "serde", serde(rename = "sm_70"))]
    Sm70,
    /// Turing, as in T4.
    #[cfg_attr(feature = "serde", serde(rename = "sm_75"))]
    Sm75,
    /// Ampere, as in A100.
    #[cfg_attr(feature = "serde", serde(rename = "sm_80"))]
    Sm80,
    /// Ada Lovelace (L40).
    #[cfg_attr(feature = "serde", serde(rename = "sm_89"))]
    Sm89,
    /// Hopper (H100, H800).
    #[cfg_attr(feature = "serde", serde(rename = "sm_90"))]
    Sm90,
    /// Blackwell, as in B200.
    #[cfg_attr(feature = "serde", serde(rename = "sm_100"))]
    Sm100,
    /// Blackwell, as in RTX cards.
    #[cfg_attr(feature = "serde", serde(rename = "sm_120"))]
    Sm120,
}

impl Arch {
    /// Every architecture of the table.
    pub const ALL: [Arch; 7] = [Sm70, Sm75, Sm80, Sm89, Sm90, Sm100, Sm120];

    /// `sm_90` and so on; a suffix such as the `a` of `sm_90a` is no part of it.
    pub fn name(self) -> &'static str {
        match self {
            Sm70 => "sm_70",
            Sm75 => "sm_75",
            Sm80 => "sm_80",
            Sm89 => "sm_89",
            Sm90 => "sm_90",
            Sm100 => "sm_100",
            Sm120 => "sm_120",
        }
    }

    /// The architecture of that name; `sm_90a` and `sm_100f` are those of `sm_90` and `sm_100`.
    ///
    /// # Errors
    /// [`MmaError::Arch`].
    pub fn parse(name: &str) -> Result<Arch, MmaError> {
        let base = name.trim_end_matches(['a', 'f']);
        let arch = Arch::ALL.into_iter().find(|a| a.name() == base);
        arch.ok_or_else(|| MmaError::Arch(name.to_string()))
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A family of matrix instructions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Instr {
    /// `mma.sync`: one warp, operands in registers.
    MmaSync,
    /// `wgmma.mma_async`, Hopper's: four warps, B (and A, if so chosen) in shared memory.
    Wgmma,
    /// `tcgen05.mma`, that of data-centre Blackwell: D in tensor memory.
    Tcgen05,
    /// `mma.sync` with `.block_scale`.
    MmaBlockScale,
    /// `tcgen05.mma` with `.block_scale`.
    Tcgen05BlockScale,
}

impl Instr {
    /// Every family of the table.
    pub const ALL: [Instr; 5] = [MmaSync, Wgmma, Tcgen05, MmaBlockScale, Tcgen05BlockScale];

    /// The name that case files use: `mma`, `wgmma`, `tcgen05.mma`, `mma.block_scale`,
    /// `tcgen05.mma.block_scale`.
    pub fn name(self) -> &'static str {
        match self {
            MmaSync => "mma",
            Wgmma => "wgmma",
            Tcgen05 => "tcgen05.mma",
            MmaBlockScale => "mma.block_scale",
            Tcgen05BlockScale => "tcgen05.mma.block_scale",
        }
    }

    /// The family of that [`name`](Instr::name).
    ///
    /// # Errors
    /// [`MmaError::Instr`].
    pub fn parse(name: &str) -> Result<Instr, MmaError> {
        let instr = Instr::ALL.into_iter().find(|i| i.name() == name);
        instr.ok_or_else(|| MmaError::Instr(name.to_string()))
    }

    /// Whether its operands come with block scales.
    pub fn block_scaled(self) -> bool {
        matches!(self, MmaBlockScale | Tcgen05BlockScale)
    }

    /// Whether the qualifier names C's type; elsewhere C has D's.
    fn names_c(self) -> bool {
        matches!(self, MmaSync | MmaBlockScale)
    }
}

impl std::fmt::Display for Instr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// In which order an instruction works off K.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Order {
    /// In steps of the accumulator's group, k ascending, starting from C.
    Ascending,
    /// Products with k = 0, 1 mod 4 from zero, then those with k = 2, 3 mod 4 on top, each in steps
    /// of the group, all elements converted to F16; then C is added with one rounding to nearest.
    /// FP8 `mma.sync` on sm_90, which has no such instruction: ptxas (12.9) emits F2FP conversions,
    /// two HMMAs of half the depth and an FADD or HADD2.
    PairsThenAddC,
}

/// The operand formats that a row covers.
#[derive(Clone, Copy, Debug)]
pub enum Operands {
    /// A and B of the same format, one of these.
    Same(&'static [Format]),
    /// A and B each any of these.
    Mixed(&'static [Format]),
}

/// A row of [`TABLE`]: the arithmetic of one instruction on one architecture, for some depths and
/// formats.
#[derive(Clone, Copy, Debug)]
pub struct MmaRow {
    /// The architecture whose instruction it is.
    pub arch: Arch,
    /// The instruction, by what it multiplies.
    pub instr: Instr,
    /// The k of the shapes covered.
    pub k: &'static [usize],
    /// Formats of A and B.
    pub operands: Operands,
    /// Format of D, and of C. Only `m8n8k4` of F16 also takes an F16 C with an F32 D.
    pub d: Format,
    /// Scale formats and block sizes; empty where there are none.
    pub scales: &'static [BlockScale],
    /// How products are grouped, aligned, summed and rounded.
    pub accumulator: Accumulator,
    /// The order of steps.
    pub order: Order,
}

impl MmaRow {
    /// Whether the row is the model of that instruction.
    pub fn covers(
        &self,
        arch: Arch,
        instr: Instr,
        shape: MmaShape,
        types: Types,
        scale: Option<BlockScale>,
    ) -> bool {
        let operands = match self.operands {
            Operands::Same(formats) => types.a == types.b && formats.contains(&types.a),
            Operands::Mixed(formats) => formats.contains(&types.a) && formats.contains(&types.b),
        };
        let c = types.c == types.d || (shape.k == 4 && types.a == F16 && types.c == F16);
        let scale = match scale {
            None => self.scales.is_empty(),
            Some(scale) => self.scales.contains(&scale),
        };
        let place = self.arch == arch && self.instr == instr && self.k.contains(&shape.k);
        place && operands && self.d == types.d && c && scale
    }
}

const FP8: &[Format] = &[E4M3, E5M2];
const FP8_FP4: &[Format] = &[E4M3, E5M2, E2M1];
const HALF: &[Format] = &[F16];
const HALVES: &[Format] = &[F16, Bf16];
const TF32: &[Format] = &[Tf32];
const FP4: &[Format] = &[E2M1];

const UE8M0_32: BlockScale = BlockScale { format: UE8M0, block: 32 };
const UE8M0_16: BlockScale = BlockScale { format: UE8M0, block: 16 };
const UE4M3_32: BlockScale = BlockScale { format: UE4M3, block: 32 };
const UE4M3_16: BlockScale = BlockScale { format: UE4M3, block: 16 };

/// What a row's `D` column says about the accumulator.
const fn out(d: Format) -> Output {
    match d {
        F16 => Output::F16,
        _ => Output::FULL,
    }
}

const fn row(
    arch: Arch,
    instr: Instr,
    k: &'static [usize],
    operands: Operands,
    d: Format,
    group: usize,
    fraction_bits: u32,
) -> MmaRow {
    let accumulator = Accumulator::tensor_core(group, fraction_bits, out(d));
    MmaRow { arch, instr, k, operands, d, scales: &[], accumulator, order: Order::Ascending }
}

const fn e8m13(row: MmaRow) -> MmaRow {
    MmaRow { accumulator: Accumulator { output: Output::E8M13, ..row.accumulator }, ..row }
}

const fn pairs_then_add_c(row: MmaRow) -> MmaRow {
    MmaRow { order: Order::PairsThenAddC, ..row }
}

const fn scaled(row: MmaRow, scales: &'static [BlockScale]) -> MmaRow {
    MmaRow { scales, ..row }
}

use Operands::{Mixed, Same};

/// Every matrix instruction whose arithmetic is known. `k` lists the depths covered; a group
/// smaller than k means several steps, a group at least k means one.
#[rustfmt::skip]
pub static TABLE: &[MmaRow] = &[
    //  arch   instr    k          operands         D    group  F
    row(Sm70,  MmaSync, &[4],      Same(HALF),      F32,  4, 23),
    row(Sm70,  MmaSync, &[4],      Same(HALF),      F16,  4, 23),

    row(Sm75,  MmaSync, &[4, 8],   Same(HALF),      F32,  8, 24),
    row(Sm75,  MmaSync, &[4, 8],   Same(HALF),      F16,  8, 24),

    row(Sm80,  MmaSync, &[8, 16],  Same(HALVES),    F32,  8, 24),
    row(Sm80,  MmaSync, &[8, 16],  Same(HALF),      F16,  8, 24),
    row(Sm80,  MmaSync, &[4, 8],   Same(TF32),      F32,  4, 24),

    row(Sm89,  MmaSync, &[8, 16],  Same(HALVES),    F32,  8, 24),
    row(Sm89,  MmaSync, &[8, 16],  Same(HALF),      F16,  8, 24),
    row(Sm89,  MmaSync, &[4, 8],   Same(TF32),      F32,  4, 24),
    e8m13(
    row(Sm89,  MmaSync, &[16, 32], Mixed(FP8),      F32, 16, 13)),
    row(Sm89,  MmaSync, &[16, 32], Mixed(FP8),      F16, 16, 13),

    row(Sm90,  MmaSync, &[8, 16],  Same(HALVES),    F32, 16, 25),
    row(Sm90,  MmaSync, &[8, 16],  Same(HALF),      F16, 16, 25),
    row(Sm90,  MmaSync, &[4, 8],   Same(TF32),      F32,  8, 25),
    pairs_then_add_c(
    row(Sm90,  MmaSync, &[16, 32], Mixed(FP8),      F32, 16, 25)),
    pairs_then_add_c(
    row(Sm90,  MmaSync, &[16, 32], Mixed(FP8),      F16, 16, 25)),
    e8m13(
    row(Sm90,  Wgmma,   &[32],     Mixed(FP8),      F32, 32, 13)),
    row(Sm90,  Wgmma,   &[32],     Mixed(FP8),      F16, 32, 13),
    row(Sm90,  Wgmma,   &[16],     Same(HALVES),    F32, 16, 25),
    row(Sm90,  Wgmma,   &[16],     Same(HALF),      F16, 16, 25),
    row(Sm90,  Wgmma,   &[8],      Same(TF32),      F32,  8, 25),

    row(Sm100, MmaSync, &[8, 16],  Same(HALVES),    F32, 16, 25),
    row(Sm100, MmaSync, &[8, 16],  Same(HALF),      F16, 16, 25),
    row(Sm100, MmaSync, &[4, 8],   Same(TF32),      F32,  8, 25),
    row(Sm100, Tcgen05, &[32],     Mixed(FP8_FP4),  F32, 32, 25),
    row(Sm100, Tcgen05, &[32],     Mixed(FP8_FP4),  F16, 32, 25),
    row(Sm100, Tcgen05, &[16],     Mixed(HALVES),   F32, 16, 25),
    row(Sm100, Tcgen05, &[16],     Same(HALF),      F16, 16, 25),
    row(Sm100, Tcgen05, &[8],      Same(TF32),      F32,  8, 25),
    scaled(
    row(Sm100, Tcgen05BlockScale, &[32], Mixed(FP8_FP4), F32, 32, 25), &[UE8M0_32]),
    scaled(
    row(Sm100, Tcgen05BlockScale, &[64], Same(FP4), F32, 64, 35), &[UE8M0_32, UE8M0_16, UE4M3_16]),

    row(Sm120, MmaSync, &[8, 16],  Same(HALVES),    F32, 16, 25),
    row(Sm120, MmaSync, &[8, 16],  Same(HALF),      F16, 16, 25),
    row(Sm120, MmaSync, &[4, 8],   Same(TF32),      F32,  8, 25),
    row(Sm120, MmaSync, &[16, 32], Mixed(FP8_FP4),  F32, 32, 25),
    row(Sm120, MmaSync, &[16, 32], Mixed(FP8_FP4),  F16, 32, 25),
    scaled(
    row(Sm120, MmaBlockScale, &[32], Mixed(FP8_FP4), F32, 32, 25), &[UE8M0_32]),
    scaled(
    row(Sm120, MmaBlockScale, &[64], Same(FP4), F32, 64, 35),
        &[UE8M0_32, UE8M0_16, UE4M3_32, UE4M3_16]),
];

/// What the table has for an architecture and instruction, for error messages.
pub(super) fn known(arch: Arch, instr: Instr) -> String {
    let describe = |row: &MmaRow| {
        let (Same(formats) | Mixed(formats)) = row.operands;
        let names: Vec<&str> = formats.iter().map(|f| f.name()).collect();
        format!("k {:?} of {} into {}", row.k, names.join("/"), row.d)
    };
    let rows: Vec<String> =
        TABLE.iter().filter(|r| r.arch == arch && r.instr == instr).map(describe).collect();
    if rows.is_empty() {
        let instrs: Vec<&str> = Instr::ALL
            .into_iter()
            .filter(|i| TABLE.iter().any(|r| r.arch == arch && r.instr == *i))
            .map(Instr::name)
            .collect();
        format!("{arch} has {}", instrs.join(", "))
    } else {
        format!("the table has {}", rows.join("; "))
    }
}

/// The parts of a qualifier: shape, operand types, scales.
type Qualifier = (MmaShape, Types, Option<BlockScale>);

/// Takes a PTX qualifier apart. `mma` names D, A, B, C; the others D, A, B; block-scaled ones put
/// the block before and the scale format after.
pub(super) fn parse_qualifier(instr: Instr, qualifier: &str) -> Result<Qualifier, MmaError> {
    let example = match instr {
        MmaSync => "m16n8k16.f32.bf16.bf16.f32",
        Wgmma => "m64n128k32.f32.e4m3.e4m3",
        Tcgen05 => "m128n64k16.f32.f16.f16",
        MmaBlockScale => "m16n8k32.block32.f32.e4m3.e4m3.f32.ue8m0",
        Tcgen05BlockScale => "m128n8k64.block16.f32.e2m1.e2m1.ue4m3",
    };
    let fail = |expected, found: Option<&str>| MmaError::Qualifier {
        qualifier: qualifier.to_string(),
        instr,
        expected,
        found: found.unwrap_or("the end").to_string(),
        example,
    };
    let mut parts = qualifier.split('.');
    let part = parts.next();
    let shape = part.and_then(parse_shape).ok_or_else(|| fail("a shape m..n..k..", part))?;
    let mut block = None;
    if instr.block_scaled() {
        let part = parts.next();
        let size = part.and_then(|p| p.strip_prefix("block")?.parse().ok());
        block = Some(size.ok_or_else(|| fail("block16 or block32", part))?);
    }
    let mut format = |expected| {
        let part = parts.next();
        part.and_then(Format::parse).ok_or_else(|| fail(expected, part))
    };
    let (d, a, b) = (format("D's type")?, format("A's type")?, format("B's type")?);
    let c = if instr.names_c() { format("C's type")? } else { d };
    let scale = match block {
        Some(block) => Some(BlockScale { format: format("the scales' type")?, block }),
        None => None,
    };
    match parts.next() {
        None => Ok((shape, Types { a, b, c, d }, scale)),
        part => Err(fail("the end", part)),
    }
}

fn parse_shape(shape: &str) -> Option<MmaShape> {
    let (m, nk) = shape.strip_prefix('m')?.split_once('n')?;
    let (n, k) = nk.split_once('k')?;
    Some(MmaShape { m: m.parse().ok()?, n: n.parse().ok()?, k: k.parse().ok()? })
}
