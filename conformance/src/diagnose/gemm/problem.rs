//! What the GEMM family knows of a case: operands, scales and sizes in one form for `gemm_fp8`,
//! `grouped_gemm_fp8`, `gemm` and `grouped_gemm`.

use std::collections::BTreeSet;

use fathom_numerics::formats::Format;
use fathom_numerics::gemm::{Accumulate, Promote};
use fathom_numerics::mma::Accumulator;
use fathom_reference::ops::gemm::{Gemm, Layout};
use fathom_reference::ops::gemm_fp8::GemmFp8;
use fathom_reference::ops::grouped_gemm::GroupedGemm;
use fathom_reference::ops::grouped_gemm_fp8::GroupedGemmFp8;
use fathom_reference::{Case, Tensor};
use fathom_trace::DType;
use half::bf16;
use ndarray::ArrayView2;

/// Operand codes, row-major `[rows, k]`.
pub(super) enum Codes {
    Fp8(Vec<u8>, Format),
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

impl Codes {
    pub(super) fn format(&self) -> Format {
        match self {
            Codes::Fp8(_, format) => *format,
            Codes::Bf16(_) => Format::Bf16,
            Codes::F32(_) => Format::F32,
        }
    }

    pub(super) fn is_fp8(&self) -> bool {
        matches!(self, Codes::Fp8(..))
    }

    /// The code at a place in memory, 0 behind the end.
    pub(super) fn at(&self, flat: usize) -> u32 {
        match self {
            Codes::Fp8(codes, _) => codes.get(flat).map_or(0, |&c| c.into()),
            Codes::Bf16(codes) => codes.get(flat).map_or(0, |&c| c.into()),
            Codes::F32(codes) => codes.get(flat).map_or(0, |c| c.to_bits()),
        }
    }
}

/// An operand with its scales: `[rows, k]`, scales `[scale_rows, scale_columns]`.
pub(super) struct Operand {
    pub(super) codes: Codes,
    /// Rows, of one expert where there are several.
    pub(super) rows: usize,
    pub(super) scales: Vec<f32>,
    /// Rows of scales, of one expert.
    pub(super) scale_rows: usize,
    pub(super) scale_columns: usize,
    /// Rows and elements of K that share a scale.
    pub(super) block: [usize; 2],
}

/// The output's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Out {
    F32,
    Bf16,
}

/// A matrix product `d[m, n] = a[m, k] b[n, k]^T`, each row with the weights of its expert.
pub(super) struct Problem {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) c: Option<Vec<f32>>,
    pub(super) out: Out,
    pub(super) accumulate: Accumulate,
    pub(super) accumulator: Accumulator,
    /// Elements of K before promotion, at most K.
    pub(super) interval: usize,
    pub(super) promote: Promote,
    /// Rows of each expert, one after the other; rows behind them are zero. Empty: one expert.
    pub(super) counts: Vec<usize>,
    /// The file's output as numbers, and the contract's.
    pub(super) file: Vec<f32>,
    pub(super) contract: Vec<f32>,
}

/// The file's output and the contract's.
type Numbers = (Vec<f32>, Vec<f32>);

fn fp8(t: &Tensor) -> Codes {
    let format = if t.dtype() == DType::F8E5M2 { Format::E5M2 } else { Format::E4M3 };
    Codes::Fp8(t.bytes().to_vec(), format)
}

fn scaled(codes: &Tensor, scale: &Tensor, block: [Option<usize>; 2]) -> Operand {
    let rows = codes.shape()[codes.shape().len() - 2];
    let [.., scale_rows, scale_columns] = scale.shape()[..] else { unreachable!("checked") };
    Operand {
        codes: fp8(codes),
        rows,
        scales: scale.as_slice::<f32>().to_vec(),
        scale_rows,
        scale_columns,
        block: block.map(|extent| extent.unwrap_or(usize::MAX)),
    }
}

/// An operand without scales, as rows along k.
fn plain(t: &Tensor, rows_first: bool) -> Option<Operand> {
    fn laid_out<T: Copy>(all: &[T], rows: usize, columns: usize, rows_first: bool) -> Vec<T> {
        if rows_first {
            return all.to_vec();
        }
        let matrices = all.chunks(rows * columns).filter(|m| !m.is_empty());
        let view = |m| ArrayView2::from_shape((rows, columns), m).expect("dense").reversed_axes();
        matrices.flat_map(|m| view(m).iter().copied().collect::<Vec<T>>()).collect()
    }
    let [.., rows, columns] = t.shape()[..] else { return None };
    let codes = match t.dtype() {
        DType::BF16 => {
            let bits: Vec<u16> = t.as_slice::<bf16>().iter().map(|x| x.to_bits()).collect();
            Codes::Bf16(laid_out(&bits, rows, columns, rows_first))
        }
        DType::F32 => Codes::F32(laid_out(t.as_slice::<f32>(), rows, columns, rows_first)),
        _ => return None,
    };
    let rows = if rows_first { rows } else { columns };
    Some(Operand {
        codes,
        rows,
        // One for each expert.
        scales: vec![1.0; t.shape()[..t.shape().len() - 2].iter().product()],
        scale_rows: 1,
        scale_columns: 1,
        block: [usize::MAX; 2],
    })
}

impl Problem {
    pub(super) fn fp8(op: &GemmFp8, case: &Case, (file, contract): Numbers) -> Problem {
        let config = op.config();
        let input = |name: &str| &case.inputs[name];
        Problem {
            m: op.m,
            n: op.n,
            k: op.k,
            a: scaled(input("a"), input("a_scale"), op.a_tile),
            b: scaled(input("b"), input("b_scale"), op.b_block),
            c: case.inputs.get("c").map(|c| c.as_slice::<f32>().to_vec()),
            out: if op.d == Format::F32 { Out::F32 } else { Out::Bf16 },
            accumulate: op.accumulate,
            accumulator: config.accumulator,
            interval: op.promotion_interval.unwrap_or(usize::MAX).min(op.k.max(1)),
            promote: config.promote,
            counts: Vec::new(),
            file,
            contract,
        }
    }

    /// `None` where the output is neither F32 nor BF16, and without experts.
    pub(super) fn grouped_fp8(
        op: &GroupedGemmFp8,
        case: &Case,
        (file, contract): Numbers,
    ) -> Option<Problem> {
        let input = |name: &str| &case.inputs[name];
        let (a, b) = (input("a"), input("b"));
        let k = a.shape()[1];
        if op.counts.is_empty() {
            return None;
        }
        Some(Problem {
            m: a.shape()[0],
            n: b.shape()[1],
            k,
            a: scaled(a, input("a_scale"), op.a_tile),
            b: scaled(b, input("b_scale"), op.b_block),
            c: None,
            out: out(op.out)?,
            accumulate: Accumulate::Overwrite,
            accumulator: Accumulator::HOPPER_FP8,
            interval: op.promotion_interval.unwrap_or(usize::MAX).min(k.max(1)),
            promote: Promote::Fma,
            counts: op.counts.clone(),
            file,
            contract,
        })
    }

    /// `None` for F64, for segments of K, and where c is added, which the tensor core chains.
    pub(super) fn plain(op: &Gemm, case: &Case, (file, contract): Numbers) -> Option<Problem> {
        let a_rows = op.layout != Layout::Tn;
        if !op.segments.is_empty() || case.inputs.contains_key("c") {
            return None;
        }
        Problem::unscaled(op.layout, a_rows, op.out, case, Vec::new(), (file, contract))
    }

    /// As [`Problem::plain`]; `None` for wgrad's layout, too.
    pub(super) fn grouped(
        op: &GroupedGemm,
        case: &Case,
        (file, contract): Numbers,
    ) -> Option<Problem> {
        let accumulated = case.inputs.contains_key("c");
        if op.layout == Layout::Tn || op.counts.is_empty() || accumulated {
            return None;
        }
        Problem::unscaled(op.layout, true, op.out, case, op.counts.clone(), (file, contract))
    }

    fn unscaled(
        layout: Layout,
        a_rows: bool,
        to: DType,
        case: &Case,
        counts: Vec<usize>,
        (file, contract): Numbers,
    ) -> Option<Problem> {
        let a = plain(&case.inputs["a"], a_rows)?;
        let b = plain(&case.inputs["b"], layout == Layout::Nt)?;
        let shape = case.inputs["a"].shape();
        let k = if a_rows { shape[1] } else { shape[0] };
        let bf16 = matches!(a.codes, Codes::Bf16(_));
        Some(Problem {
            m: a.rows,
            n: b.rows,
            k,
            a,
            b,
            c: None,
            out: out(to)?,
            accumulate: Accumulate::Overwrite,
            accumulator: if bf16 { Accumulator::HOPPER_16BIT } else { Accumulator::FP32_FMA },
            interval: k.max(1),
            promote: Promote::Fma,
            counts,
            file,
            contract,
        })
    }

    pub(super) fn is_fp8(&self) -> bool {
        self.a.codes.is_fp8()
    }

    pub(super) fn experts(&self) -> usize {
        self.counts.len().max(1)
    }

    /// K blocks of 128.
    pub(super) fn k_blocks(&self) -> usize {
        self.k.div_ceil(128)
    }

    /// Whether every row of both operands has one scale over each interval of that length.
    pub(super) fn uniform_over(&self, interval: usize) -> bool {
        [&self.a, &self.b].iter().all(|x| {
            if x.block[1] >= self.k || interval <= x.block[1] {
                return true;
            }
            let blocks = interval.div_ceil(x.block[1]);
            let rows = x.scales.chunks(x.scale_columns.max(1));
            let same = |c: &[f32]| c.iter().all(|s| s.to_bits() == c[0].to_bits());
            rows.flat_map(|row| row.chunks(blocks)).all(same)
        })
    }

    /// Round factors near the median ratio of the file's to the contract's elements.
    pub(super) fn factors(&self) -> Vec<f32> {
        let usable =
            |(_, f, c): &(usize, f32, f32)| c.abs() > 0.0 && c.is_finite() && f.is_finite();
        let all = self.file.iter().zip(&self.contract).enumerate();
        let pairs = all.map(|(i, (f, c))| (i, *f, *c)).filter(usable);
        let mut ratios: Vec<f32> = pairs.filter(|p| p.1 != p.2).map(|p| p.1 / p.2).collect();
        if ratios.is_empty() {
            return Vec::new();
        }
        let middle = ratios.len() / 2;
        let median = *ratios.select_nth_unstable_by(middle, f32::total_cmp).1;
        let k = self.k as f32;
        let powers = (-12..=12).map(|e| 2f32.powi(e));
        let others = [
            3.0,
            1.5,
            1.0 / 3.0,
            10.0,
            0.1,
            100.0,
            0.01,
            448.0,
            1.0 / 448.0,
            240.0,
            1.0 / 240.0,
            448.0 * 448.0,
            1.0 / (448.0 * 448.0),
            57344.0,
            1.0 / 57344.0,
            448.0 / 240.0,
            240.0 / 448.0,
            k.sqrt(),
            1.0 / k.sqrt(),
            1.0 / k,
            k,
            127.0,
            1.0 / 127.0,
        ];
        let near = |f: &f32| (f / median - 1.0).abs() < 0.05;
        let signs = powers.chain(others).flat_map(|f| [f, -f]);
        let found: BTreeSet<u32> =
            signs.filter(near).filter(|f| *f != 1.0).map(f32::to_bits).collect();
        found.into_iter().map(f32::from_bits).collect()
    }
}

fn out(dtype: DType) -> Option<Out> {
    match dtype {
        DType::F32 => Some(Out::F32),
        DType::BF16 => Some(Out::Bf16),
        _ => None,
    }
}
