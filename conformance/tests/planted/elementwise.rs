//! RMSNorm and SwiGLU: roundings in between, the wrong mean, halves and weights that are mixed up.

use fathom_conformance::case_file::CaseFile;
use fathom_numerics::elementary::sigmoid;
use fathom_numerics::formats::to_bf16;
use fathom_numerics::reduce::RowTree;
use fathom_reference::Tensor;
use fathom_reference::ops::rms_norm::RmsNorm;
use fathom_reference::ops::swiglu::Swiglu;
use fathom_trace::DType;
use half::bf16;
use ndarray::Array2;

use super::Fault;
use super::data::{Random, bf16_tensor, case_file, cut_bf16, rounded};

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "RMSNorm: eps is 1e-5, not the model's 1e-6",
        seen: "apache/tvm #15856",
        plant: other_eps,
        named: &["eps* 1e-5|0.00001|other|another", "eps* larger|ten|10"],
        place: None,
    },
    Fault {
        name: "RMSNorm: the normalised value is rounded to BF16 before the weight",
        seen: "vllm-project/vllm-xpu-kernels #536",
        plant: rounded_before_weight,
        named: &["bf16 before|normali*|intermediate|twice weight*|rounded"],
        place: None,
    },
    Fault {
        name: "RMSNorm: the mean is over the padded width",
        seen: "after tile-ai/tilelang-ascend #890",
        plant: padded_width,
        named: &["1024", "mean|width|divi* padded|padding|power"],
        place: None,
    },
    Fault {
        name: "RMSNorm: the reciprocal root is multiplied into the weight first",
        seen: "flagos-ai/FlagGems #5009",
        plant: weight_first,
        named: &[
            "rstd|root|reciprocal weight first|before|order",
            "order multipl*|product*|factor*",
        ],
        place: None,
    },
    Fault {
        name: "RMSNorm: the output is cut to BF16",
        seen: "ROCm/aiter #5151",
        plant: norm_cut,
        named: &["bf16|output* cut|truncat*|rz", "toward zero"],
        place: None,
    },
    Fault {
        name: "SwiGLU: gate and up are exchanged",
        seen: "sgl-project/sglang #32430",
        plant: exchanged,
        named: &["gate up swapped|exchanged|interchanged|order|reversed"],
        place: None,
    },
    Fault {
        name: "SwiGLU: gate and up are taken as interleaved",
        seen: "ROCm/aiter #5760",
        plant: interleaved,
        named: &["interleav*", "gate up alternat*|even|odd"],
        place: None,
    },
    Fault {
        name: "SwiGLU: silu is rounded to BF16 before the product",
        seen: "ByteDance-Seed/VeOmni #857",
        plant: silu_rounded,
        named: &["silu|gate|intermediate bf16"],
        place: None,
    },
    Fault {
        name: "SwiGLU: another model's clamp is applied",
        seen: "after vllm-project/vllm #57984",
        plant: clamped,
        named: &["clamp*|limit*|clip*"],
        place: None,
    },
    Fault {
        name: "SwiGLU: the routing weight is applied twice",
        seen: "from the contract",
        plant: weight_twice,
        named: &["weight* twice|squared|square|again|two"],
        place: None,
    },
];

const ROWS: usize = 64;
const WIDTH: usize = 768;
const EPS: f32 = 1e-6;

/// Hidden states of a first layer: mean squares around 4e-4, where eps is felt.
struct Norm {
    x: Array2<f32>,
    weight: Vec<f32>,
}

impl Norm {
    fn new(seed: u64) -> Norm {
        let mut random = Random::new(seed);
        let x = rounded(&(random.activations(ROWS, WIDTH) * 0.004));
        let weight = random.normals(WIDTH).into_iter().map(|n| 1.0 + 0.2 * n).collect();
        Norm { x, weight }
    }

    fn rstd(&self, row: usize, divisor: usize, eps: f32) -> f32 {
        let x = self.x.row(row);
        let squares = RowTree::new(16, 16).fold(WIDTH, |acc: f32, i| acc + x[i] * x[i]);
        1.0 / (squares / divisor as f32 + eps).sqrt()
    }

    /// `y(x, rstd, weight)` of every element.
    fn file(
        self,
        rstd: impl Fn(&Norm, usize) -> f32,
        y: impl Fn(f32, f32, f32) -> bf16,
    ) -> CaseFile {
        let roots: Vec<f32> = (0..ROWS).map(|row| rstd(&self, row)).collect();
        let y = Array2::from_shape_fn((ROWS, WIDTH), |(i, c)| {
            y(self.x[[i, c]], roots[i], self.weight[c])
        });
        let op = RmsNorm { eps: 1e-6, offset: 0, width: WIDTH, out: DType::BF16 };
        let inputs =
            [("x", bf16_tensor(&self.x)), ("weight", Tensor::from_vec(&[WIDTH], self.weight))];
        let rstd = Tensor::from_vec(&[ROWS], roots);
        case_file(op, &inputs, &[("y", Tensor::from_array(y)), ("rstd", rstd)])
    }
}

fn right_rstd(norm: &Norm, row: usize) -> f32 {
    norm.rstd(row, WIDTH, EPS)
}

fn right_y(x: f32, rstd: f32, weight: f32) -> bf16 {
    to_bf16(x * rstd * weight)
}

/// The contract's RMSNorm, by this file's loops.
pub fn norm_without_fault() -> CaseFile {
    Norm::new(930).file(right_rstd, right_y)
}

fn other_eps() -> CaseFile {
    Norm::new(121).file(|norm, row| norm.rstd(row, WIDTH, 1e-5), right_y)
}

fn rounded_before_weight() -> CaseFile {
    Norm::new(122).file(right_rstd, |x, rstd, w| to_bf16(to_bf16(x * rstd).to_f32() * w))
}

fn padded_width() -> CaseFile {
    Norm::new(123).file(|norm, row| norm.rstd(row, 1024, EPS), right_y)
}

fn weight_first() -> CaseFile {
    Norm::new(124).file(right_rstd, |x, rstd, w| to_bf16(x * (rstd * w)))
}

fn norm_cut() -> CaseFile {
    Norm::new(125).file(right_rstd, |x, rstd, w| cut_bf16(x * rstd * w))
}

const INNER: usize = 256;

/// A routed expert's gate and up, with the weight of each row.
struct Glu {
    x: Array2<f32>,
    weight: Vec<f32>,
}

impl Glu {
    fn new(seed: u64) -> Glu {
        let mut random = Random::new(seed);
        let x = rounded(&random.activations(ROWS, 2 * INNER));
        let weight = random.normals(ROWS).into_iter().map(|n| 0.3 * sigmoid(n)).collect();
        Glu { x, weight }
    }

    /// `y(row of x, column, weight)` of every element, rounded to BF16.
    fn file(self, y: impl Fn(&[f32], usize, f32) -> f32) -> CaseFile {
        let y = Array2::from_shape_fn((ROWS, INNER), |(i, c)| {
            to_bf16(y(self.x.row(i).as_slice().unwrap(), c, self.weight[i]))
        });
        let op = Swiglu { out: DType::BF16 };
        let inputs =
            [("x", bf16_tensor(&self.x)), ("weight", Tensor::from_vec(&[ROWS], self.weight))];
        case_file(op, &inputs, &[("y", Tensor::from_array(y))])
    }
}

fn swiglu(gate: f32, up: f32, weight: f32) -> f32 {
    gate * sigmoid(gate) * up * weight
}

/// The contract's SwiGLU, by this file's loops.
pub fn swiglu_without_fault() -> CaseFile {
    Glu::new(931).file(|x, c, w| swiglu(x[c], x[INNER + c], w))
}

fn exchanged() -> CaseFile {
    Glu::new(131).file(|x, c, w| swiglu(x[INNER + c], x[c], w))
}

fn interleaved() -> CaseFile {
    Glu::new(132).file(|x, c, w| swiglu(x[2 * c], x[2 * c + 1], w))
}

fn silu_rounded() -> CaseFile {
    Glu::new(133).file(|x, c, w| to_bf16(x[c] * sigmoid(x[c])).to_f32() * x[INNER + c] * w)
}

fn clamped() -> CaseFile {
    Glu::new(134).file(|x, c, w| swiglu(x[c].min(10.0), x[INNER + c].clamp(-10.0, 10.0), w))
}

fn weight_twice() -> CaseFile {
    Glu::new(135).file(|x, c, w| swiglu(x[c], x[INNER + c], w) * w)
}
