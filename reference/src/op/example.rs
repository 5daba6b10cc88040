//! Examples: a small complete case of every op, from which `fathom case example` writes a file and
//! from which the table of `docs/case-files.md` is drawn.
//!
//! An op builds its example beside its definition. `shape!` keeps a shape's sizes and the words
//! that stand in its source, so that the documentation cannot say another shape than the example
//! has. Values are a function of the role's place alone: an example has the same bits everywhere.

use std::collections::BTreeMap;

use fathom_numerics::formats::{E4M3, Overflow, Rounding};
use fathom_numerics::philox::Philox;
use fathom_trace::DType;
use half::{bf16, f16};

use super::{Case, DynOp, Op};
use crate::Tensor;

/// A shape, as sizes and in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The sizes as the op's source spells them, `[t, heads * qk]` for instance.
    pub words: &'static str,
    /// The sizes, outermost dimension first.
    pub sizes: Vec<usize>,
}

/// A [`Shape`] of the expressions given, row-major.
macro_rules! shape {
    ($($size:expr),* $(,)?) => {
        $crate::op::example::Shape {
            words: concat!("[", stringify!($($size),*), "]"),
            sizes: vec![$($size),*],
        }
    };
}
pub(crate) use shape;

/// `a / b`, rounded up; short, because it stands in the documentation's shapes.
pub(crate) const fn ceil(a: usize, b: usize) -> usize {
    a.div_ceil(b)
}

/// What an input of an example holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Values {
    /// Bell-shaped around 0, rounded to the element type.
    Normal,
    /// Positive, around 0.01: scales, probabilities.
    Positive,
    /// These numbers: indices, positions.
    Given(Vec<i32>),
    /// Nothing: the example does without this optional input.
    Absent,
}

/// An input of an example.
#[derive(Clone, Debug)]
pub struct Described {
    /// The input's role.
    pub role: &'static str,
    /// Its element type in the example; the op may take others.
    pub dtype: DType,
    /// Its shape in the example.
    pub shape: Shape,
    values: Values,
}

impl Described {
    /// Whether the example has this input; an optional one may be described only.
    pub fn is_given(&self) -> bool {
        self.values != Values::Absent
    }
}

/// A small complete case of an op, whose shapes have words.
#[derive(Debug)]
pub struct Example {
    /// The op with its parameters.
    pub op: Box<dyn DynOp>,
    /// Every input in the order of the op's roles.
    pub inputs: Vec<Described>,
    /// Role and shape of every output, in the order of the op's roles.
    pub outputs: Vec<(&'static str, Shape)>,
}

impl Example {
    /// An example of `op`, so far without tensors.
    pub fn new(op: impl Op) -> Example {
        Example { op: Box::new(op), inputs: Vec::new(), outputs: Vec::new() }
    }

    fn with(mut self, role: &'static str, dtype: DType, shape: Shape, values: Values) -> Example {
        self.inputs.push(Described { role, dtype, shape, values });
        self
    }

    /// The next input, of ordinary numbers.
    #[must_use]
    pub fn input(self, role: &'static str, dtype: DType, shape: Shape) -> Example {
        self.with(role, dtype, shape, Values::Normal)
    }

    /// The next input, of positive numbers.
    #[must_use]
    pub fn positive(self, role: &'static str, dtype: DType, shape: Shape) -> Example {
        self.with(role, dtype, shape, Values::Positive)
    }

    /// The next input: these indices.
    #[must_use]
    pub fn indices(self, role: &'static str, shape: Shape, values: &[i32]) -> Example {
        self.with(role, DType::I32, shape, Values::Given(values.to_vec()))
    }

    /// The next input, which the op takes with other parameters than the example's.
    #[must_use]
    pub fn absent(self, role: &'static str, dtype: DType, shape: Shape) -> Example {
        self.with(role, dtype, shape, Values::Absent)
    }

    /// The next output.
    #[must_use]
    pub fn output(mut self, role: &'static str, shape: Shape) -> Example {
        self.outputs.push((role, shape));
        self
    }

    /// The case itself.
    pub fn case(&self) -> Case {
        let given = self.inputs.iter().enumerate().filter(|(_, input)| input.is_given());
        let inputs: BTreeMap<_, _> =
            given.map(|(place, input)| (input.role.to_owned(), tensor(input, place))).collect();
        Case { op: self.op.boxed(), inputs }
    }
}

/// The input's elements, drawn from the stream of its place.
fn tensor(input: &Described, place: usize) -> Tensor {
    let shape = &input.shape.sizes[..];
    if let Values::Given(indices) = &input.values {
        return Tensor::from_vec(shape, indices.clone());
    }
    let mut numbers = vec![0f32; shape.iter().product()];
    Philox::new(1, place as u64).normals(0, &mut numbers);
    if input.values == Values::Positive {
        numbers.iter_mut().for_each(|x| *x = x.abs() * 0.01 + 0.001);
    }
    let numbers = numbers.into_iter();
    match input.dtype {
        DType::F64 => Tensor::from_vec(shape, numbers.map(f64::from).collect()),
        DType::F32 => Tensor::from_vec(shape, numbers.collect::<Vec<f32>>()),
        DType::BF16 => Tensor::from_vec(shape, numbers.map(bf16::from_f32).collect()),
        DType::F16 => Tensor::from_vec(shape, numbers.map(f16::from_f32).collect()),
        DType::F8E4M3 => {
            let code = |x| E4M3::from_f32(x, Rounding::NearestEven, Overflow::Saturate).to_bits();
            Tensor::from_vec(shape, numbers.map(code).collect()).reinterpret(DType::F8E4M3)
        }
        other => unreachable!("{}: an example has no numbers of {other}", input.role),
    }
}
