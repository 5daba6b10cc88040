//! Hypotheses about SwiGLU: which half is the gate, which function it goes through, what is rounded
//! in between.

use fathom_numerics::elementary;
use fathom_numerics::formats::{to_bf16, to_f16};
use fathom_reference::op::compute_type::Real;
use fathom_reference::ops::swiglu::Swiglu;
use fathom_trace::DType;

use super::hypothesis::{Expanded, Family, Hypothesis, Row, Sample, each, one, one_if, values};
use crate::case_file::CaseFile;

/// Where gate and up of column c lie among the 2 i columns.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Halves {
    GateFirst,
    UpFirst,
    /// Gate and up of a column side by side.
    Interleaved,
    InterleavedUpFirst,
    /// Runs of that many columns of gate, then of up.
    Blocks(usize),
}

/// What the gate goes through.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    Silu,
    Sigmoid,
    /// `g sigmoid(1.702 g)`.
    Quick,
    Gelu,
    GeluTanh,
    Relu,
    Identity,
    /// Of the product of gate and up.
    OfProduct,
    /// Of both halves.
    OfBoth,
}

/// How the sigmoid is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sigmoid {
    Exact,
    /// `1 / (1 + exp2(-x log2 e))`.
    Exp2,
    /// `0.5 + 0.5 tanh(x / 2)`.
    Tanh,
    /// `g / (1 + exp(-g))`, one division.
    Divided,
    /// A multiplication by the rounded reciprocal.
    Reciprocal,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Narrow {
    F32,
    Bf16,
    F16,
}

impl Narrow {
    fn through(self, x: f32) -> f32 {
        match self {
            Narrow::F32 => x,
            Narrow::Bf16 => to_bf16(x).to_f32(),
            Narrow::F16 => to_f16(x).to_f32(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Weight {
    AsGiven,
    Ignored,
    Twice,
    OnGate,
    OnUp,
    Of(isize),
}

#[derive(Clone, Debug, PartialEq)]
struct Variant {
    halves: Halves,
    gate: Gate,
    sigmoid: Sigmoid,
    /// What silu of the gate passes through before it meets up.
    activated: Narrow,
    /// What the product passes through before the weight.
    product: Narrow,
    weight: Weight,
    /// Bound of the gate above and of up's magnitude.
    limit: f32,
    limit_gate_below: bool,
    plus_one: bool,
    output: Narrow,
    truncated: bool,
}

struct Case {
    weighted: bool,
    columns: usize,
}

#[derive(Clone)]
struct Named<T>(&'static str, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

const ROWS: &[Row<Case, Variant>] = &[
    Row {
        axis: "halves",
        name: "gate and up exchanged",
        meaning: "The second half of the columns goes through silu: gate and up are stored in the \
                  other order.",
        seen: "mlx-lm PR #767, TensorRT-LLM issue #1842",
        changes: |_| one(|v| v.halves = Halves::UpFirst),
    },
    Row {
        axis: "halves",
        name: "gate and up interleaved",
        meaning: "Even columns are taken as gate and odd ones as up.",
        seen: "aiter issue #5760, ATOM PR #885",
        changes: |_| one(|v| v.halves = Halves::Interleaved),
    },
    Row {
        axis: "halves",
        name: "up and gate interleaved",
        meaning: "Even columns are taken as up and odd ones as gate.",
        seen: "aiter issue #5760",
        changes: |_| one(|v| v.halves = Halves::InterleavedUpFirst),
    },
    Row {
        axis: "halves",
        name: "gate and up in turns of {} columns",
        meaning: "Gate and up are taken as interleaved in runs, as a GEMM's tile holds them.",
        seen: "kestrel PR #121",
        changes: |c| {
            let fits = |n: &usize| c.columns % n == 0 && *n < c.columns;
            each([8, 16, 32, 64, 128].into_iter().filter(fits), |v, n| v.halves = Halves::Blocks(n))
        },
    },
    Row {
        axis: "gate",
        name: "activation: {}",
        meaning: "The gate goes through another function than silu.",
        seen: "breakdown-minimind issue #3",
        changes: |_| {
            let all = [
                Named("sigmoid for silu", Gate::Sigmoid),
                Named("g sigmoid(1.702 g) for silu", Gate::Quick),
                Named("GELU for silu", Gate::Gelu),
                Named("GELU by tanh for silu", Gate::GeluTanh),
                Named("ReLU for silu", Gate::Relu),
                Named("no activation", Gate::Identity),
                Named("silu of the product of gate and up", Gate::OfProduct),
                Named("silu of gate and of up", Gate::OfBoth),
            ];
            each(all, |v, g| v.gate = g.1)
        },
    },
    Row {
        axis: "sigmoid",
        name: "sigmoid {}",
        meaning: "The sigmoid is computed by other operations, which round otherwise.",
        seen: "",
        changes: |_| {
            let all = [
                Named("by exp2 of x log2 e", Sigmoid::Exp2),
                Named("by tanh", Sigmoid::Tanh),
                Named("by one division g / (1 + exp(-g))", Sigmoid::Divided),
                Named("by a reciprocal", Sigmoid::Reciprocal),
            ];
            each(all, |v, s| v.sigmoid = s.1)
        },
    },
    Row {
        axis: "activated",
        name: "silu rounded to {} before up",
        meaning: "The activated gate passes through a narrower type before it is multiplied by up.",
        seen: "",
        changes: |_| {
            each([Named("BF16", Narrow::Bf16), Named("FP16", Narrow::F16)], |v, n| {
                v.activated = n.1
            })
        },
    },
    Row {
        axis: "product",
        name: "product rounded to {} before the weight",
        meaning: "silu(gate) up passes through a narrower type before the row's weight.",
        seen: "",
        changes: |c| {
            let all = [Named("BF16", Narrow::Bf16), Named("FP16", Narrow::F16)];
            each(all.into_iter().filter(|_| c.weighted).collect::<Vec<_>>(), |v, n| v.product = n.1)
        },
    },
    Row {
        axis: "weight",
        name: "weight {}",
        meaning: "The row's weight is left out, applied twice, another row's, or applied earlier.",
        seen: "",
        changes: |c| {
            let all = [
                Named("ignored", Weight::Ignored),
                Named("applied twice", Weight::Twice),
                Named("applied to the gate", Weight::OnGate),
                Named("applied to up", Weight::OnUp),
                Named("of the next row", Weight::Of(1)),
                Named("of the row before", Weight::Of(-1)),
            ];
            each(all.into_iter().filter(|_| c.weighted).collect::<Vec<_>>(), |v, w| v.weight = w.1)
        },
    },
    Row {
        axis: "limit",
        name: "gate and up clamped at {}",
        meaning: "The gate is bounded above and up on both sides, as in GPT-OSS.",
        seen: "tt-metal PR #42104",
        changes: |_| each([1.0f32, 5.0, 6.0, 7.0, 10.0, 20.0, 448.0], |v, l| v.limit = l),
    },
    Row {
        axis: "limit",
        name: "gate and up clamped at {} on both sides",
        meaning: "Gate and up are bounded on both sides.",
        seen: "",
        changes: |_| {
            each([1.0f32, 5.0, 6.0, 7.0, 10.0, 20.0, 448.0], |v, l| {
                v.limit = l;
                v.limit_gate_below = true;
            })
        },
    },
    Row {
        axis: "up",
        name: "up plus one",
        meaning: "One is added to up, as in GPT-OSS.",
        seen: "onnxruntime PR #25619",
        changes: |_| one(|v| v.plus_one = true),
    },
    Row {
        axis: "output",
        name: "output rounded to FP16 on the way",
        meaning: "The result passes through FP16.",
        seen: "",
        changes: |_| one(|v| v.output = Narrow::F16),
    },
    Row {
        axis: "output",
        name: "output rounded to BF16 on the way",
        meaning: "The result passes through BF16.",
        seen: "",
        changes: |_| one(|v| v.output = Narrow::Bf16),
    },
    Row {
        axis: "output",
        name: "output truncated to BF16",
        meaning: "The low 16 bits are cut off instead of rounded.",
        seen: "",
        changes: |c| one_if(c.columns > 0, |v| v.truncated = true),
    },
];

/// The table, for documentation.
pub(super) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}

/// The hypotheses about one SwiGLU.
pub(super) struct SwigluFamily {
    expanded: Expanded<Variant>,
    x: Vec<f32>,
    weight: Option<Vec<f32>>,
    /// Rows and columns of y.
    shape: (usize, usize),
    out: DType,
}

impl SwigluFamily {
    /// `None` for F64.
    pub(super) fn new(op: &Swiglu, file: &CaseFile) -> Option<SwigluFamily> {
        let x = &file.case.inputs["x"];
        let (rows, columns) = x.rows_columns();
        if x.dtype() == DType::F64 || rows * columns == 0 {
            return None;
        }
        let weight = file.case.inputs.get("weight").map(values);
        let case = Case { weighted: weight.is_some(), columns: columns / 2 };
        let given = Variant {
            halves: Halves::GateFirst,
            gate: Gate::Silu,
            sigmoid: Sigmoid::Exact,
            activated: Narrow::F32,
            product: Narrow::F32,
            weight: Weight::AsGiven,
            limit: f32::INFINITY,
            limit_gate_below: false,
            plus_one: false,
            output: Narrow::F32,
            truncated: false,
        };
        let expanded = Expanded::new(ROWS, &case, given);
        Some(SwigluFamily {
            expanded,
            x: values(x),
            weight,
            shape: (rows, columns / 2),
            out: op.out,
        })
    }

    fn element(&self, v: &Variant, row: usize, column: usize) -> f32 {
        let (rows, i) = self.shape;
        let (gate, up) = match v.halves {
            Halves::GateFirst => (column, i + column),
            Halves::UpFirst => (i + column, column),
            Halves::Interleaved => (2 * column, 2 * column + 1),
            Halves::InterleavedUpFirst => (2 * column + 1, 2 * column),
            Halves::Blocks(n) => {
                let at = column / n * 2 * n + column % n;
                (at, at + n)
            }
        };
        let x = &self.x[row * 2 * i..(row + 1) * 2 * i];
        let below = if v.limit_gate_below { -v.limit } else { f32::NEG_INFINITY };
        let clamp = |x: f32, low: f32| if x.is_nan() { x } else { x.max(low).min(v.limit) };
        let (mut g, mut u) = (clamp(x[gate], below), clamp(x[up], -v.limit));
        if v.plus_one {
            u += 1.0;
        }
        let of = |row: usize| self.weight.as_ref().map_or(1.0, |w| w[row]);
        let w = match v.weight {
            Weight::AsGiven => of(row),
            Weight::Ignored => 1.0,
            Weight::Twice => of(row) * of(row),
            Weight::Of(by) => of(row.saturating_add_signed(by).min(rows - 1)),
            Weight::OnGate => {
                g *= of(row);
                1.0
            }
            Weight::OnUp => {
                u *= of(row);
                1.0
            }
        };
        let y = match v.gate {
            Gate::OfProduct => silu(v.sigmoid, g * u),
            Gate::OfBoth => v.activated.through(silu(v.sigmoid, g)) * silu(v.sigmoid, u),
            _ => v.activated.through(activated(v, g)) * u,
        };
        v.product.through(y) * w
    }
}

fn sigmoid(how: Sigmoid, x: f32) -> f32 {
    let log2_e = std::f32::consts::LOG2_E;
    match how {
        Sigmoid::Exact | Sigmoid::Divided => elementary::sigmoid(x),
        Sigmoid::Exp2 => 1.0 / (1.0 + f64::from(-x * log2_e).exp2() as f32),
        Sigmoid::Tanh => 0.5 + 0.5 * f64::from(0.5 * x).tanh() as f32,
        Sigmoid::Reciprocal => 1.0 / (1.0 + elementary::exp(-x)),
    }
}

fn silu(how: Sigmoid, x: f32) -> f32 {
    match how {
        Sigmoid::Divided => x / (1.0 + elementary::exp(-x)),
        _ => x * sigmoid(how, x),
    }
}

fn activated(v: &Variant, g: f32) -> f32 {
    let x = f64::from(g);
    match v.gate {
        Gate::Sigmoid => sigmoid(v.sigmoid, g),
        Gate::Quick => g * sigmoid(v.sigmoid, 1.702 * g),
        Gate::Gelu => (x * 0.5 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32,
        Gate::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            (0.5 * x * (1.0 + inner.tanh())) as f32
        }
        Gate::Relu => g.max(0.0),
        Gate::Identity => g,
        _ => silu(v.sigmoid, g),
    }
}

/// The error function by its series and, beyond 3, its continued fraction.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= -a * a / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..60).rev().fold(0.0, |f, n| n as f64 / 2.0 / (a + f));
        1.0 - (-a * a).exp() / (std::f64::consts::PI.sqrt() * (a + fraction))
    };
    value.copysign(x)
}

impl Family for SwigluFamily {
    fn hypotheses(&self) -> &[Hypothesis] {
        &self.expanded.hypotheses
    }

    fn cost_per_element(&self) -> u64 {
        1024
    }

    fn evaluate(&self, chosen: &[usize], sample: &Sample) -> Option<Vec<u64>> {
        let v = self.expanded.variant(chosen);
        let element = |&e: &usize| {
            let y = v.output.through(self.element(&v, e / self.shape.1, e % self.shape.1));
            let cut = v.truncated && y.is_finite();
            let y = if cut { f32::from_bits(y.to_bits() & 0xFFFF_0000) } else { y };
            f32::store(vec![y], &[1], self.out).bits(0)
        };
        Some(sample.elements.iter().map(element).collect())
    }
}
