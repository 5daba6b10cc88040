//! `add_rms_norm` and `add_rms_norm_quantize`: a residual's sum and the norm behind it in one pass
//! over the rows, with the cast of the norm's result too.
//!
//! To the bit: [`Add`] of two or three tensors, whose `y` is here `h`; then [`RmsNorm`] of all
//! columns of the `h` that was rounded; then [`QuantizeTile`] of what that rounded. `h` is always
//! given, since the residual goes on from it; the norm's `y` beside its codes only where `keep`
//! says so (a router's gate reads it), else it has no rows.

use fathom_trace::{OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::example::{Example, ceil, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};
use crate::ops::add::Add;
use crate::ops::quantize_tile::QuantizeTile;
use crate::ops::rms_norm::RmsNorm;
use crate::ops::rms_norm_quantize::RmsNormQuantize;

/// A sum of two or three matrices, and RMSNorm of its rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AddRmsNorm {
    /// The sum, whose `out` is the element type of `h`.
    pub add: Add,
    /// The norm of all columns of `h`.
    pub norm: RmsNorm,
}

/// A sum of two or three matrices, RMSNorm of its rows, and the cast of the norm's result with a
/// scale for every 1 x `tile`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AddRmsNormQuantize {
    /// The sum, whose `out` is the element type of `h`.
    pub add: Add,
    /// The norm of all columns of `h`, whose `out` is the element type of what is cast.
    pub norm: RmsNorm,
    /// The cast of the norm's result.
    pub cast: QuantizeTile,
    /// Whether `y` is given.
    pub keep: bool,
}

/// The sum, as the norm's input.
fn sum(
    op: &'static str,
    add: &Add,
    norm: &RmsNorm,
    terms: &[Option<TensorMeta>],
) -> Result<TensorMeta, OpError> {
    let h = add.infer(terms).map_err(|e| e.within(op, "add"))?.remove(0);
    rules::rank(&h, 2, "[t, width]")?;
    let whole = [("norm.offset", norm.offset, 0), ("norm.width", norm.width, h.shape[1])];
    for (path, found, expected) in whole {
        if found != expected {
            let message = format!("expected {expected}, for all columns of h; found {found}");
            return Err(OpError::Params { op, path: path.to_owned(), message });
        }
    }
    Ok(TensorMeta { role: "h".to_owned(), ..h })
}

/// The terms of the sum, and the weight.
fn split<T: Clone>(inputs: &[Option<T>]) -> (&[Option<T>], Option<T>) {
    (&inputs[..3], inputs[3].clone())
}

/// The sum's tensor, and the norm's inputs.
fn run_sum(
    add: &Add,
    inputs: Vec<Option<Tensor>>,
) -> Result<(Tensor, Vec<Option<Tensor>>), OpError> {
    let (terms, weight) = split(&inputs);
    let h = Op::run(add, terms.to_vec())?.remove(0);
    Ok((h.clone(), vec![Some(h), weight]))
}

impl Op for AddRmsNorm {
    const NAME: &'static str = "add_rms_norm";
    const INPUTS: &'static [Role] = &[input("a"), input("b"), optional("c"), input("weight")];
    const OUTPUTS: &'static [&'static str] = &["h", "y", "rstd"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        use fathom_trace::DType;

        let (t, width) = (3, 6);
        let (add, out) = (Add { out: DType::BF16 }, DType::BF16);
        let norm = RmsNorm { eps: 1e-6, offset: 0, width, out };
        Example::new(AddRmsNorm { add, norm })
            .input("a", DType::BF16, shape![t, width])
            .input("b", DType::BF16, shape![t, width])
            .input("c", DType::BF16, shape![t, width])
            .input("weight", DType::F32, shape![width])
            .output("h", shape![t, width])
            .output("y", shape![t, width])
            .output("rstd", shape![t])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let (terms, weight) = split(inputs);
        let h = sum(Self::NAME, &self.add, &self.norm, terms)?;
        let normed = self.norm.infer(&[Some(h.clone()), weight]);
        let mut outputs = vec![h];
        outputs.extend(normed.map_err(|e| e.within(Self::NAME, "norm"))?);
        Ok(outputs)
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let (terms, weight) = split(inputs);
        let h = sum(Self::NAME, &self.add, &self.norm, terms).expect("infer accepted the inputs");
        self.add.flops(terms) + self.norm.flops(&[Some(h), weight])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let (h, inputs) = run_sum(&self.add, inputs)?;
        let mut outputs = vec![h];
        outputs.extend(Op::run(&self.norm, inputs)?);
        Ok(outputs)
    }
}

impl AddRmsNormQuantize {
    /// Norm and cast as the op that they are.
    fn normed(&self) -> RmsNormQuantize {
        let AddRmsNormQuantize { norm, cast, keep, .. } = self;
        RmsNormQuantize { norm: norm.clone(), cast: cast.clone(), keep: *keep }
    }
}

impl Op for AddRmsNormQuantize {
    const NAME: &'static str = "add_rms_norm_quantize";
    const INPUTS: &'static [Role] = AddRmsNorm::INPUTS;
    const OUTPUTS: &'static [&'static str] = &["h", "y", "q", "scale", "rstd"];
    const CLASS: OpClass = OpClass::Row;

    fn example() -> Example {
        use fathom_numerics::formats::Format;
        use fathom_numerics::quant::ScaleKind;
        use fathom_trace::DType;

        let (t, width, tile) = (3, 160, 128);
        let (add, out) = (Add { out: DType::BF16 }, DType::BF16);
        let norm = RmsNorm { eps: 1e-6, offset: 0, width, out };
        let (format, scale) = (Format::E4M3, ScaleKind::Pow2);
        let cast = QuantizeTile { format, tile, scale, amax_floor: 1e-4 };
        Example::new(AddRmsNormQuantize { add, norm, cast, keep: true })
            .input("a", DType::BF16, shape![t, width])
            .input("b", DType::BF16, shape![t, width])
            .input("c", DType::BF16, shape![t, width])
            .input("weight", DType::F32, shape![width])
            .output("h", shape![t, width])
            .output("y", shape![t, width])
            .output("q", shape![t, width])
            .output("scale", shape![t, ceil(width, tile)])
            .output("rstd", shape![t])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let (terms, weight) = split(inputs);
        let h = sum(Self::NAME, &self.add, &self.norm, terms)?;
        let normed = self.normed().infer(&[Some(h.clone()), weight]);
        let mut outputs = vec![h];
        outputs.extend(normed.map_err(|e| e.within(Self::NAME, ""))?);
        Ok(outputs)
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let (terms, weight) = split(inputs);
        let h = sum(Self::NAME, &self.add, &self.norm, terms).expect("infer accepted the inputs");
        self.add.flops(terms) + self.normed().flops(&[Some(h), weight])
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let (h, inputs) = run_sum(&self.add, inputs)?;
        let mut outputs = vec![h];
        let normed = Op::run(&self.normed(), inputs);
        outputs.extend(normed.map_err(|e| e.within(Self::NAME, ""))?);
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Reference};

    fn same(a: &Tensor, b: &Tensor) -> bool {
        a.shape() == b.shape() && a.dtype() == b.dtype() && a.bytes() == b.bytes()
    }

    fn metas(inputs: &[Option<Tensor>]) -> Vec<Option<TensorMeta>> {
        inputs.iter().map(|x| x.as_ref().map(|x| x.meta("x"))).collect()
    }

    /// Sum, then norm, of two terms and of three: every bit of the one op, and their FLOPs.
    #[test]
    fn it_is_the_sum_then_the_norm() {
        let case = AddRmsNorm::example().case();
        let op: &AddRmsNorm = case.op.as_any().downcast_ref().unwrap();
        let mut inputs = case.ordered_inputs().unwrap();
        for terms in [3, 2] {
            if terms == 2 {
                inputs[2] = None;
            }
            let [Some(a), Some(b), c, Some(weight)] = &inputs[..] else { panic!("all are given") };
            let h = Reference.add(&op.add, a, b, c.as_ref()).unwrap();
            let [y, rstd] = Reference.rms_norm(&op.norm, &h, weight).unwrap();
            let found = Reference.add_rms_norm(op, a, b, c.as_ref(), weight).unwrap();
            assert!(found.iter().zip(&[h, y, rstd]).all(|(a, b)| same(a, b)), "{terms} terms");
            assert_eq!(Op::flops(op, &metas(&inputs)), (terms - 1 + 4) * 3 * 6);
        }
    }

    /// Sum, norm, then cast, with and without `y`: every bit of the one op, and their FLOPs.
    #[test]
    fn it_is_the_sum_then_the_norm_then_the_cast() {
        let case = AddRmsNormQuantize::example().case();
        let op: &AddRmsNormQuantize = case.op.as_any().downcast_ref().unwrap();
        let inputs = case.ordered_inputs().unwrap();
        let [Some(a), Some(b), c, Some(weight)] = &inputs[..] else { panic!("all are given") };
        let h = Reference.add(&op.add, a, b, c.as_ref()).unwrap();
        let [y, rstd] = Reference.rms_norm(&op.norm, &h, weight).unwrap();
        let [q, scale] = Reference.quantize_tile(&op.cast, &y).unwrap();
        let expected = [h, y, q, scale, rstd];
        let found = Reference.add_rms_norm_quantize(op, a, b, c.as_ref(), weight).unwrap();
        assert!(found.iter().zip(&expected).all(|(a, b)| same(a, b)));
        let bare = AddRmsNormQuantize { keep: false, ..op.clone() };
        let found = Reference.add_rms_norm_quantize(&bare, a, b, c.as_ref(), weight).unwrap();
        assert_eq!(found[1].shape(), [0, 160]);
        assert!([0, 2, 3, 4].iter().all(|&i| same(&found[i], &expected[i])));
        assert_eq!(Op::flops(op, &metas(&inputs)), (2 + 4 + 2) * 3 * 160);
    }

    #[test]
    fn a_wrong_part_is_named_by_its_place() {
        let case = AddRmsNormQuantize::example().case();
        let op: &AddRmsNormQuantize = case.op.as_any().downcast_ref().unwrap();
        let metas = metas(&case.ordered_inputs().unwrap());
        let refused = |op: AddRmsNormQuantize| Op::infer(&op, &metas).unwrap_err().to_string();
        let norm = RmsNorm { width: 159, ..op.norm.clone() };
        let expected = "params of add_rms_norm_quantize, at 'norm.width': expected 160, for all \
                        columns of h; found 159";
        assert_eq!(refused(AddRmsNormQuantize { norm, ..op.clone() }), expected);
        let cast = QuantizeTile { tile: 0, ..op.cast.clone() };
        let expected =
            "params of add_rms_norm_quantize, at 'cast.tile': expected at least 1, found 0";
        assert_eq!(refused(AddRmsNormQuantize { cast, ..op.clone() }), expected);
    }
}
