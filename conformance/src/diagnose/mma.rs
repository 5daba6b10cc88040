//! Hypotheses about one tensor-core instruction (`mma`).

use fathom_numerics::formats::{Format, Rounding};
use fathom_numerics::mma::{
    Accumulator, Arch, Fraction, Instr, Mma as Instruction, Operand, Output, Terms,
};
use fathom_reference::ops::mma::{Mma, codes};
use fathom_reference::{Case, Tensor};

use super::hypothesis::{Change, Expanded, Family, Hypothesis, Row, Sample, each, one};

/// Ways to compute the instruction.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Core {
    /// A parametric accumulator.
    Parametric(Accumulator),
    /// Another architecture's instruction on the same types.
    Other(Arch, Instr),
}

/// What becomes of C.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Addend {
    Ignored,
    AddedAtEnd,
}

/// What varies about the instruction.
#[derive(Clone, Debug, PartialEq)]
struct Variant {
    /// None: the instruction's own.
    core: Option<Core>,
    addend: Option<Addend>,
}

const ROWS: &[Row<Instruction, Variant>] = &[
    Row {
        axis: "tensor core",
        name: "the arithmetic of {}",
        meaning: "The result is another architecture's, or another instruction's on the same types.",
        seen: "DeepGEMM issue #176",
        changes: |i| others(i),
    },
    Row {
        axis: "tensor core",
        name: "tensor core with {}",
        meaning: "Products are aligned to that many bits and summed in groups of that many.",
        seen: "DeepGEMM issue #37",
        changes: |i| {
            let usable = i.scale.is_none();
            let all = parametric(i.types.d).into_iter().filter(|_| usable);
            let core = |(name, core)| Named(name, Core::Parametric(core));
            each(all.map(core).collect::<Vec<_>>(), |v: &mut Variant, c: Named| v.core = Some(c.1))
        },
    },
    Row {
        axis: "C",
        name: "C ignored",
        meaning: "The incoming accumulator does not enter: scale-d is 0.",
        seen: "",
        changes: |_| one(|v| v.addend = Some(Addend::Ignored)),
    },
    Row {
        axis: "C",
        name: "C added at the end, rounded to nearest",
        meaning: "The products are summed from zero and C is added by an ordinary addition.",
        seen: "",
        changes: |_| one(|v| v.addend = Some(Addend::AddedAtEnd)),
    },
];

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

#[derive(Clone)]
struct Named(String, Core);

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Other instructions on the same types.
fn others(given: &Instruction) -> Vec<Change<Variant>> {
    let all = [
        (Arch::Sm70, Instr::MmaSync),
        (Arch::Sm75, Instr::MmaSync),
        (Arch::Sm80, Instr::MmaSync),
        (Arch::Sm89, Instr::MmaSync),
        (Arch::Sm90, Instr::MmaSync),
        (Arch::Sm90, Instr::Wgmma),
        (Arch::Sm100, Instr::Tcgen05),
    ];
    let fits = |&(arch, instr): &(Arch, Instr)| {
        let same = arch == given.row.arch && instr == given.row.instr;
        let known = || Instruction::with_types(arch, instr, given.shape, given.types, None);
        !same && given.scale.is_none() && known().is_some()
    };
    let named = |(a, i)| Named(format!("{a} {i}"), Core::Other(a, i));
    let all: Vec<_> = all.into_iter().filter(fits).map(named).collect();
    each(all, |v, c| v.core = Some(c.1))
}

/// The hypotheses about one instruction.
pub(super) struct MmaFamily {
    expanded: Expanded<Variant>,
    given: Instruction,
    /// Operands of every batch entry: rows of A, columns of B.
    a: Vec<Vec<Operand>>,
    b: Vec<Vec<Operand>>,
    scale_a: Vec<Vec<u32>>,
    scale_b: Vec<Vec<u32>>,
    a_codes: Vec<Vec<u32>>,
    b_codes: Vec<Vec<u32>>,
    c: Tensor,
    shape: (usize, usize, usize),
}

impl MmaFamily {
    pub(super) fn new(op: &Mma, case: &Case) -> MmaFamily {
        let given = op.instruction().expect("checked when the case was read");
        let (m, n, k) = (op.m, op.n, op.k);
        let batches = case.inputs["c"].len() / (m * n);
        let each =
            |name: &str, format: Format, shape, along_rows, transpose: bool| -> Vec<Vec<u32>> {
                let Some(tensor) = case.inputs.get(name) else { return vec![Vec::new(); batches] };
                (0..batches)
                    .map(|i| {
                        let codes = codes(tensor, format, i, shape, along_rows);
                        if transpose {
                            codes.t().iter().copied().collect()
                        } else {
                            codes.into_iter().collect()
                        }
                    })
                    .collect()
            };
        let types = given.types;
        let a_codes = each("a", types.a, (m, k), true, false);
        let b_codes = each("b", types.b, (k, n), false, true);
        let (scale_format, blocks) =
            given.scale.map_or((Format::UE8M0, 0), |s| (s.format, k / s.block));
        let decode = |format: Format, codes: &[Vec<u32>]| -> Vec<Vec<Operand>> {
            codes.iter().map(|c| c.iter().map(|&x| Operand::decode(format, x)).collect()).collect()
        };
        MmaFamily {
            a: decode(types.a, &a_codes),
            b: decode(types.b, &b_codes),
            scale_a: each("scale_a", scale_format, (m, blocks), true, false),
            scale_b: each("scale_b", scale_format, (blocks, n), true, true),
            a_codes,
            b_codes,
            c: case.inputs["c"].clone(),
            shape: (m, n, k),
            expanded: Expanded::new(ROWS, &given, Variant { core: None, addend: None }),
            given,
        }
    }
}

/// Accumulators that instructions have or that people take them to have.
fn parametric(d: Format) -> Vec<(String, Accumulator)> {
    let output = if d == Format::F16 { Output::F16 } else { Output::FULL };
    let mut all = Vec::new();
    for bits in [13, 14, 22, 23, 24, 25] {
        for group in [4, 8, 16, 32] {
            let kept = if d != Format::F16 && bits < 23 {
                Output::F32 { fraction_bits: bits }
            } else {
                output
            };
            let core = Accumulator::tensor_core(group, bits, kept);
            all.push((format!("{bits} fraction bits, groups of {group}"), core));
        }
    }
    let exact = |group| Accumulator {
        group,
        fraction: Fraction::Exact,
        align: Rounding::TowardZero,
        output,
        round: Rounding::NearestEven,
    };
    all.push(("an exact sum, rounded once to nearest".to_owned(), exact(64)));
    all.push(("one fma a product, k ascending".to_owned(), exact(1)));
    all
}

impl Family for MmaFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn cost_per_element(&self) -> u64 {
        self.shape.2 as u64
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let (m, n, k) = self.shape;
        let Variant { core, addend } = self.expanded.variant(chosen);
        let other = match core {
            Some(Core::Other(arch, instr)) => Some(Instruction::with_types(
                arch,
                instr,
                self.given.shape,
                self.given.types,
                None,
            )?),
            _ => None,
        };
        let types = self.given.types;
        let dot = |batch: usize, i: usize, j: usize, c: u32| -> u32 {
            if let Some(Core::Parametric(accumulator)) = core {
                let terms = Terms {
                    a: &self.a[batch][i * k..][..k],
                    b: &self.b[batch][j * k..][..k],
                    scale_a: &[],
                    scale_b: &[],
                    fraction_a: types.a.layout().fraction_bits,
                    fraction_b: types.b.layout().fraction_bits,
                };
                return accumulator.chain(&terms, c);
            }
            let (a, b) = (&self.a_codes[batch][i * k..][..k], &self.b_codes[batch][j * k..][..k]);
            let blocks = self.given.scale.map_or(0, |s| k / s.block);
            match other {
                Some(other) => other.dot(a, b, c),
                None if blocks == 0 => self.given.dot(a, b, c),
                None => {
                    let scale_a = &self.scale_a[batch][i * blocks..][..blocks];
                    let scale_b = &self.scale_b[batch][j * blocks..][..blocks];
                    self.given.dot_scaled(a, b, scale_a, scale_b, c)
                }
            }
        };
        let layout = types.d.layout();
        let element = |&e: &usize| {
            let (batch, i, j) = (e / (m * n), e / n % m, e % n);
            let c = self.c.bits(e) as u32;
            let bits = match addend {
                None => dot(batch, i, j, c),
                Some(Addend::Ignored) => dot(batch, i, j, 0),
                Some(Addend::AddedAtEnd) => {
                    let sum = layout.to_f64(dot(batch, i, j, 0)) + layout.to_f64(c);
                    layout.from_f64(
                        sum,
                        Rounding::NearestEven,
                        fathom_numerics::formats::Overflow::Ieee,
                    )
                }
            };
            u64::from(bits)
        };
        Some(sample.elements.iter().map(element).collect())
    }
}
