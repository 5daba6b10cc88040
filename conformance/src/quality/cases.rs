//! The cases that kernels are measured on: `cases.toml`, data with a line a tensor.

use std::collections::BTreeMap;

use fathom_reference::op::op_from;
use fathom_reference::{Case, Tensor};
use fathom_trace::DType;
use serde::Deserialize;

use crate::conform::draw::{Draw, as_dtype};
use crate::conform::values::Values;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    case: Vec<Line>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    op: String,
    params: serde_json::Value,
    inputs: BTreeMap<String, String>,
}

/// A case with its inputs in words.
pub struct Measured {
    /// The op on its inputs.
    pub case: Case,
    /// Types and shapes of the inputs, the largest first.
    pub shape: String,
}

/// All cases, in the order of the table.
pub fn all() -> Vec<Measured> {
    let table: Table = toml::from_str(include_str!("cases.toml")).expect("a table of cases");
    table.case.iter().map(measured).collect()
}

fn measured(line: &Line) -> Measured {
    let op = op_from(&line.op, &line.params).unwrap_or_else(|e| panic!("{}: {e}", line.op));
    let tensors = line.inputs.iter().enumerate();
    let inputs: BTreeMap<String, Tensor> =
        tensors.map(|(at, (role, words))| (role.clone(), tensor(words, at as u64))).collect();
    let largest = op.inputs().iter().filter_map(|role| {
        let tensor = inputs.get(role.name)?;
        Some((tensor.shape().iter().product::<usize>(), line.inputs[role.name].as_str()))
    });
    let mut largest: Vec<(usize, &str)> = largest.collect();
    // A stable order: inputs of one size stand as the op has them.
    largest.sort_by_key(|(elements, _)| std::cmp::Reverse(*elements));
    let shape = largest.iter().take(2).map(|(_, words)| *words).collect::<Vec<_>>().join(", ");
    Measured { case: Case { op, inputs }, shape }
}

/// The tensor of a line's words: `BF16 64x7168`, `positive 16`, `permutation 32`, `below-8 4x2`.
fn tensor(words: &str, stream: u64) -> Tensor {
    let (kind, shape) = words.split_once(' ').unwrap_or_else(|| panic!("{words}: two words"));
    let shape: Vec<usize> =
        shape.split('x').map(|n| n.parse().unwrap_or_else(|e| panic!("{words}: {e}"))).collect();
    let len: usize = shape.iter().product();
    let draw = Draw { values: Values::Normal, seed: 1 };
    if kind == "positive" {
        return draw.positive(stream, DType::F32, &shape);
    }
    if kind == "permutation" {
        let keys = draw.words(stream, len);
        let mut order: Vec<i32> = (0..len as i32).collect();
        order.sort_by_key(|&i| keys[i as usize]);
        return Tensor::from_vec(&shape, order);
    }
    if let Some(bound) = kind.strip_prefix("below-") {
        return draw.indices(stream, &shape, bound.parse().expect("a number"));
    }
    let dtype = DType::from_name(kind).unwrap_or_else(|| panic!("{words}: an element type"));
    match dtype {
        DType::F8E4M3 => {
            Tensor::from_vec(&shape, Values::Normal.e4m3(1, stream, len)).reinterpret(dtype)
        }
        DType::F32 | DType::BF16 => {
            as_dtype(Values::Normal.floats(1, stream, len, false), dtype, &shape)
        }
        other => panic!("{words}: no values of {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_but_copies_is_measured_on_a_case_that_its_op_takes() {
        let cases = all();
        for Measured { case, shape } in &cases {
            case.infer().unwrap_or_else(|e| panic!("{} {shape}: {e}", case.op.name()));
        }
        // What is copies of the driver, the identity on one rank, or the launch of a neighbour.
        let without = [
            "all_gather",
            "all_reduce",
            "attention_cached",
            "concat_columns",
            "concat_rows",
            "context_exchange",
            "recv",
            "reduce_scatter",
            "send",
            "slice_columns",
            "slice_rows",
        ];
        let measured = |op: &str| cases.iter().any(|m| m.case.op.name() == op);
        for op in fathom_gpu::kernels::KERNELS.iter().map(|kernel| kernel.op) {
            assert_eq!(measured(op), !without.contains(&op), "{op}");
        }
    }
}
