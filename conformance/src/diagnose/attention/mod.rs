//! Hypotheses about attention: mask, scale, softmax, the format of P, the order of rescaling.

mod table;

use std::collections::HashMap;

use fathom_numerics::formats::{Layout, Overflow, Rounding, to_f16};
use fathom_reference::Tensor;
use fathom_reference::op::compute_type::{Real, maximum, tree_sum_rows};
use fathom_reference::ops::attention::Attention;
use fathom_trace::DType;
use ndarray::{Array2, ArrayView2, Axis, Slice};

use super::hypothesis::{Expanded, Family, Hypothesis, Sample, spread, values};
use crate::case_file::CaseFile;

pub(super) use table::table;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    /// Itself and earlier ones; more by that many.
    Causal(isize),
    /// All of the segment.
    None,
    /// Aligned to the first key where there are more keys than queries.
    TopLeft,
    /// The last so many keys before it.
    Window(usize),
    /// Whole KV blocks only: the query's own, if not full, is left out.
    WholeBlocks,
    /// KV blocks up to that of the first row of a query tile of that many rows.
    FirstOfTile(usize),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    AsGiven,
    None,
    Twice,
    Of(f32),
    /// q times scale rounded to BF16 before the product.
    OnQuery,
}

/// What P passes through before it meets V.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Probabilities {
    AsGiven,
    F16,
    E4m3,
    /// Scaled by 448 to E4M3 and back.
    E4m3Scaled,
    Bf16,
    /// Not rounded: FP32 on CUDA cores.
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Exp {
    Exact,
    /// `exp2(s scale log2 e - m scale log2 e)` by one fma.
    Binary,
    /// `exp2((s - m) log2 e)`.
    BinaryLate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rescale {
    AsGiven,
    /// The accumulator is not rescaled when the maximum grows.
    NotOutput,
    NotSum,
    Neither,
    /// The maximum of all keys first: no rescaling.
    TwoPasses,
    /// No maximum is taken off.
    NoMaximum,
    /// The output divided by the sum after each block.
    EachBlock,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Sum {
    Unrounded,
    /// The sum takes P as rounded.
    Rounded,
    /// One after the other.
    Sequential,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum HeadOf {
    Grouped,
    /// Query head modulo key heads.
    Modulo,
    First,
    Next,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    Natural,
    /// In powers of two.
    Log2,
    WithoutMaximum,
    Maximum,
    Sum,
}

#[derive(Clone, Debug, PartialEq)]
struct Variant {
    mask: Mask,
    scale: Scale,
    probabilities: Probabilities,
    exp: Exp,
    rescale: Rescale,
    sum: Sum,
    head: HeadOf,
    kept: Kept,
    block_kv: usize,
    descending: bool,
    reciprocal: bool,
    /// Segments are ignored: all rows are one.
    merged: bool,
    /// A finite number stands for minus infinity.
    softcap: f32,
    first_key_dropped: bool,
    normalised: bool,
}

struct Case {
    block_kv: usize,
    low: bool,
    qk: usize,
    v: usize,
    heads: usize,
    grouped: bool,
    segments: usize,
    longer_keys: bool,
}

/// The hypotheses about one attention.
pub(super) struct AttentionFamily {
    expanded: Expanded<Variant>,
    op: Attention,
    low: bool,
    dtype: DType,
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    /// Elements of o that the file holds, before those of lse.
    o_elements: usize,
}

impl AttentionFamily {
    /// `None` for F64 and where there is nothing to attend to.
    pub(super) fn new(op: &Attention, file: &CaseFile) -> Option<AttentionFamily> {
        let input = |name: &str| {
            let x = &file.case.inputs[name];
            Array2::from_shape_vec(x.rows_columns(), values(x)).expect("dense")
        };
        let dtype = file.case.inputs["q"].dtype();
        let heads = op.shape;
        if dtype == DType::F64 || heads.heads * heads.v * heads.kv_heads == 0 || op.block_kv == 0 {
            return None;
        }
        let low = dtype == DType::BF16;
        let case = Case {
            block_kv: op.block_kv,
            low,
            qk: heads.qk,
            v: heads.v,
            heads: heads.heads,
            grouped: heads.kv_heads > 1,
            segments: op.segments.len(),
            longer_keys: !op.keys.is_empty() && op.keys != op.segments,
        };
        let given = Variant {
            mask: Mask::Causal(0),
            scale: Scale::AsGiven,
            probabilities: if low { Probabilities::Bf16 } else { Probabilities::AsGiven },
            exp: Exp::Exact,
            rescale: Rescale::AsGiven,
            sum: Sum::Unrounded,
            head: HeadOf::Grouped,
            kept: Kept::Natural,
            block_kv: op.block_kv,
            descending: false,
            reciprocal: false,
            merged: false,
            softcap: f32::INFINITY,
            first_key_dropped: false,
            normalised: true,
        };
        Some(AttentionFamily {
            expanded: Expanded::new(table::ROWS, &case, given),
            op: op.clone(),
            low,
            dtype,
            q: input("q"),
            k: input("k"),
            v: input("v"),
            o_elements: file.expected.get("o").map_or(0, Tensor::len),
        })
    }

    /// First key row of a query row's segment, its number of keys, and the query's place among
    /// them.
    fn segment(&self, v: &Variant, row: usize) -> (usize, usize, usize) {
        let keys = if self.op.keys.is_empty() { &self.op.segments } else { &self.op.keys };
        let (mut query, mut key) = (0, 0);
        for (&queries, &keys) in self.op.segments.iter().zip(keys) {
            if row < query + queries {
                if v.merged {
                    return (0, key + keys, key + row - query);
                }
                let base = if v.mask == Mask::TopLeft { 0 } else { keys - queries };
                return (key, keys, base + row - query);
            }
            (query, key) = (query + queries, key + keys);
        }
        unreachable!("segments add up to the rows")
    }

    /// Keys that a row's segment has before its first query's.
    fn before_queries(&self, row: usize) -> usize {
        let keys = if self.op.keys.is_empty() { &self.op.segments } else { &self.op.keys };
        let mut end = 0;
        let own = |(queries, _): &(&usize, &usize)| {
            end += **queries;
            row < end
        };
        self.op.segments.iter().zip(keys).find(own).map_or(0, |(queries, keys)| keys - queries)
    }

    /// The output row of one head, and its lse.
    fn head(&self, v: &Variant, row: usize, head: usize) -> (Vec<f32>, f32) {
        let s = self.op.shape;
        let group = head * s.kv_heads / s.heads;
        let kv_head = match v.head {
            HeadOf::Grouped => group,
            HeadOf::Modulo => head % s.kv_heads,
            HeadOf::First => 0,
            HeadOf::Next => (group + 1) % s.kv_heads,
        };
        let (first, keys, place) = self.segment(v, row);
        let (low, high) = match v.mask {
            Mask::Causal(more) => (0, (place + 1).saturating_add_signed(more).min(keys)),
            Mask::None => (0, keys),
            Mask::TopLeft => (0, (place + 1).min(keys)),
            Mask::Window(n) => ((place + 1).saturating_sub(n), place + 1),
            Mask::WholeBlocks => (0, (place + 1) / v.block_kv * v.block_kv),
            Mask::FirstOfTile(n) => {
                let query = place.saturating_sub(self.before_queries(row));
                let end = (place - query % n + 1).next_multiple_of(v.block_kv.min(keys.max(1)));
                (0, (place + 1).min(end))
            }
        };
        let low = if v.first_key_dropped { low.max(1) } else { low };
        let scale = match v.scale {
            Scale::AsGiven => self.op.scale as f32,
            Scale::None | Scale::OnQuery => 1.0,
            Scale::Twice => (self.op.scale * self.op.scale) as f32,
            Scale::Of(scale) => scale,
        };
        let part = |h: usize, width: usize| Slice::from(h * width..(h + 1) * width);
        let q = self.q.slice_axis(Axis(0), Slice::from(row..row + 1));
        let mut q = q.slice_axis(Axis(1), part(head, s.qk)).to_owned();
        if v.scale == Scale::OnQuery {
            let scale = self.op.scale as f32;
            q.mapv_inplace(|x| f32::load(&f32::store(vec![x * scale], &[1], self.dtype))[0]);
        }
        let keys = self.k.slice_axis(Axis(1), part(kv_head, s.qk));
        let values = self.v.slice_axis(Axis(1), part(kv_head, s.v));
        let mut state = State { m: f32::NEG_INFINITY, l: 0.0, o: Array2::zeros((1, s.v)) };
        let mut blocks: Vec<usize> = (0..high).step_by(v.block_kv).collect();
        if v.descending {
            blocks.reverse();
        }
        let scores = |begin: usize, end: usize| -> Vec<f32> {
            let keys = keys.slice_axis(Axis(0), Slice::from(first + begin..first + end));
            let mut p = Array2::zeros((1, end - begin));
            product(self.low, q.view(), keys.t(), &mut p, false);
            let capped = |s: f32| {
                let s = s * scale;
                let capped = v.softcap.is_finite();
                if capped { v.softcap * f64::from(s / v.softcap).tanh() as f32 } else { s }
            };
            let seen = |i: usize| begin + i >= low;
            let scores = p.iter().enumerate();
            scores.map(|(i, &s)| if seen(i) { capped(s) } else { f32::NEG_INFINITY }).collect()
        };
        let top = match v.rescale {
            Rescale::NoMaximum => Some(0.0),
            Rescale::TwoPasses => {
                let all = blocks.iter().map(|&b| scores(b, (b + v.block_kv).min(high)));
                Some(all.flatten().fold(f32::NEG_INFINITY, maximum))
            }
            _ => None,
        };
        for begin in blocks {
            let end = (begin + v.block_kv).min(high);
            let values = values.slice_axis(Axis(0), Slice::from(first + begin..first + end));
            state.block(v, self.low, scores(begin, end), top, values);
        }
        let State { m, l, o } = state;
        let divided = |x: &f32| match (v.normalised, v.reciprocal, v.rescale) {
            (false, ..) | (_, _, Rescale::EachBlock) => *x,
            (_, true, _) => x * (1.0 / l),
            _ => x / l,
        };
        let lse = match v.kept {
            Kept::Natural => m + Real::natural_log(l),
            Kept::Log2 => (m + Real::natural_log(l)) * std::f32::consts::LOG2_E,
            Kept::WithoutMaximum => Real::natural_log(l),
            Kept::Maximum => m,
            Kept::Sum => l,
        };
        (o.iter().map(divided).collect(), lse)
    }
}

/// What an online softmax carries from block to block.
struct State {
    m: f32,
    l: f32,
    o: Array2<f32>,
}

impl State {
    fn block(
        &mut self,
        v: &Variant,
        low: bool,
        mut p: Vec<f32>,
        top: Option<f32>,
        values: ArrayView2<'_, f32>,
    ) {
        let top = top.unwrap_or_else(|| p.iter().fold(self.m, |m, &s| maximum(m, s)));
        let exp = |xs: &mut [f32]| match v.exp {
            Exp::Exact => {
                xs.iter_mut().for_each(|x| *x -= top);
                f32::exp_slice(xs);
            }
            Exp::Binary => {
                let e = std::f32::consts::LOG2_E;
                xs.iter_mut().for_each(|x| *x = exp2(x.mul_add(e, -top * e)));
            }
            Exp::BinaryLate => {
                xs.iter_mut().for_each(|x| *x = exp2((*x - top) * std::f32::consts::LOG2_E));
            }
        };
        exp(&mut p);
        let mut alpha = [self.m];
        exp(&mut alpha);
        let alpha = if self.m == f32::NEG_INFINITY { 0.0 } else { alpha[0] };
        let rounded: Vec<f32> = p.iter().map(|&x| v.probabilities.through(x)).collect();
        let (of_sum, of_output) = match v.rescale {
            Rescale::NotOutput => (alpha, 1.0),
            Rescale::NotSum => (1.0, alpha),
            Rescale::Neither | Rescale::NoMaximum => (1.0, 1.0),
            _ => (alpha, alpha),
        };
        let before = self.l;
        let sum = match v.sum {
            Sum::Unrounded => tree_sum_rows([&p[..]], |[p]| p),
            Sum::Rounded => tree_sum_rows([&rounded[..]], |[p]| p),
            Sum::Sequential => p.iter().fold(0.0, |s, p| s + p),
        };
        self.l = self.l * of_sum + sum;
        self.m = top;
        let undo = if v.rescale == Rescale::EachBlock { before } else { 1.0 };
        self.o.iter_mut().for_each(|o| *o *= of_output * undo);
        let p = Array2::from_shape_vec((1, rounded.len()), rounded).expect("one row");
        // P beyond BF16 meets V as it is.
        let low = low && v.probabilities == Probabilities::Bf16;
        product(low, p.view(), values, &mut self.o, true);
        if v.rescale == Rescale::EachBlock {
            let l = self.l;
            self.o.iter_mut().for_each(|o| *o /= l);
        }
    }
}

fn exp2(x: f32) -> f32 {
    f64::from(x).exp2() as f32
}

impl Probabilities {
    fn through(self, x: f32) -> f32 {
        let e4m3 = |x: f32| {
            let code = Layout::E4M3.from_f32(x, Rounding::NearestEven, Overflow::Saturate);
            Layout::E4M3.to_f32(code)
        };
        match self {
            Probabilities::AsGiven | Probabilities::F32 => x,
            Probabilities::Bf16 => fathom_numerics::formats::to_bf16(x).to_f32(),
            Probabilities::F16 => to_f16(x).to_f32(),
            Probabilities::E4m3 => e4m3(x),
            Probabilities::E4m3Scaled => e4m3(x * 448.0) / 448.0,
        }
    }
}

/// `c = a b`, or `c += a b`, plain or on the BF16 tensor core.
fn product(
    low: bool,
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    c: &mut Array2<f32>,
    accumulate: bool,
) {
    if low {
        f32::gemm_bf16(a, b, c.view_mut(), accumulate)
    } else {
        f32::gemm(a, b, c.view_mut(), accumulate)
    }
}

impl Family for AttentionFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn cost_per_element(&self) -> u64 {
        let keys = (self.k.nrows() / self.op.segments.len().max(1)).max(1);
        (keys * (self.op.shape.qk + self.op.shape.v) / self.op.shape.v.max(1)) as u64
    }

    /// Whole heads of a few rows: an element costs as much as all of its head.
    fn choose(&self, differing: &[usize], all: usize, count: usize) -> Vec<usize> {
        let s = self.op.shape;
        let heads = self.q.nrows() * s.heads;
        let head = |e: usize| match e.checked_sub(self.o_elements) {
            Some(e) => e,
            None => e / s.v,
        };
        let wanted = (count / s.v).clamp(4, 256).min(heads);
        let mut chosen: Vec<usize> =
            spread(differing.len(), wanted / 2).map(|i| head(differing[i])).collect();
        chosen.extend(spread(heads, wanted - wanted / 2));
        chosen.sort_unstable();
        chosen.dedup();
        let of = |&h: &usize| {
            let o = (h * s.v..(h + 1) * s.v).filter(|e| *e < self.o_elements);
            o.chain(Some(self.o_elements + h).filter(|e| *e < all)).collect::<Vec<_>>()
        };
        chosen.iter().flat_map(of).collect()
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let v = self.expanded.variant(chosen);
        let s = self.op.shape;
        let mut known: HashMap<usize, (Vec<f32>, f32)> = HashMap::new();
        let element = |&e: &usize| {
            let (head, column) = match e.checked_sub(self.o_elements) {
                Some(head) => (head, None),
                None => (e / s.v, Some(e % s.v)),
            };
            let (o, lse) =
                known.entry(head).or_insert_with(|| self.head(&v, head / s.heads, head % s.heads));
            match column {
                Some(column) => f32::store(vec![o[column]], &[1], self.dtype).bits(0),
                None => f32::store(vec![*lse], &[1], DType::F32).bits(0),
            }
        };
        Some(sample.elements.iter().map(element).collect())
    }
}
