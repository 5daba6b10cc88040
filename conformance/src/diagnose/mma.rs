//! Hypotheses about one tensor-core instruction (`mma`).

use fathom_numerics::formats::{Format, Rounding};
use fathom_numerics::mma::{
    Accumulator, Arch, Fraction, Instr, Mma as Instruction, Operand, Output, Terms,
};
use fathom_reference::ops::mma::{Mma, codes};
use fathom_reference::{Case, Tensor};

use super::{Axis, Family};

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

pub(super) struct MmaFamily {
    axes: Vec<Axis>,
    cores: Vec<Core>,
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

const ADDENDS: [(Addend, &str); 2] = [
    (Addend::Ignored, "C ignored"),
    (Addend::AddedAtEnd, "C added at the end, rounded to nearest"),
];

impl MmaFamily {
    pub(super) fn new(op: &Mma, case: &Case) -> MmaFamily {
        let given = op.instruction().expect("checked when the case was read");
        let (m, n, k) = (op.m, op.n, op.k);
        let batches = case.inputs["c"].len() / (m * n);
        let mut cores = Vec::new();
        let mut names = Vec::new();
        if given.scale.is_none() {
            for (name, core) in parametric(given.types.d) {
                names.push(name);
                cores.push(Core::Parametric(core));
            }
            for (arch, instr) in [
                (Arch::Sm70, Instr::MmaSync),
                (Arch::Sm75, Instr::MmaSync),
                (Arch::Sm80, Instr::MmaSync),
                (Arch::Sm89, Instr::MmaSync),
                (Arch::Sm90, Instr::MmaSync),
                (Arch::Sm90, Instr::Wgmma),
                (Arch::Sm100, Instr::Tcgen05),
            ] {
                let same = arch == given.row.arch && instr == given.row.instr;
                if !same
                    && Instruction::with_types(arch, instr, given.shape, given.types, None)
                        .is_some()
                {
                    names.push(format!("the arithmetic of {arch} {instr}"));
                    cores.push(Core::Other(arch, instr));
                }
            }
        }
        let axes = vec![
            Axis { name: "tensor core", alternatives: names },
            Axis { name: "C", alternatives: ADDENDS.iter().map(|a| a.1.to_owned()).collect() },
        ];
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
            axes,
            cores,
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
    fn axes(&self) -> &[Axis] {
        &self.axes
    }

    fn cost_per_element(&self) -> u64 {
        self.shape.2 as u64
    }

    fn evaluate(&self, choice: &[Option<usize>], elements: &[usize]) -> Option<Vec<u64>> {
        let (m, n, k) = self.shape;
        let addend = choice[1].map(|c| ADDENDS[c].0);
        let core = choice[0].map(|c| self.cores[c]);
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
        Some(elements.iter().map(element).collect())
    }
}
