//! `quantize_delayed`: the cast of delayed per-tensor scaling, a baseline that the DeepSeek-V3
//! report compares with (section 3.3.2; Transformer Engine's recipe).
//!
//! `q = saturating RNE of x scale`, and q's own scale is `scale_inv = 1 / scale`. Then x's largest
//! magnitude enters `history` in front, the oldest leaves, and the next step's scale follows:
//! `max_of_format / a / 2^margin` with a the history's largest (or newest), `scale` as it is where
//! a is 0 or not finite. The arithmetic is `fathom_numerics::quant::delayed`.

use fathom_numerics::formats::Format;
use fathom_numerics::quant::delayed::{AmaxAlgorithm, DelayedScaling};
use fathom_numerics::quant::{QuantError, Quantized, Source};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::ArrayView2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::op::codes::{Cast, cast_any, one_of, outputs, stored_as, undefined};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};
use crate::{Element, Tensor};

/// Casts to FP8 with the scale that earlier steps gave, and makes the next step's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeDelayed {
    /// `e4m3` or `e5m2`.
    #[schemars(extend("enum" = ["e4m3", "e5m2"]))]
    pub format: Format,
    /// Powers of two of headroom below the format's largest value.
    pub margin: u8,
    /// Which amax of the history counts: the largest or the newest.
    pub amax: AmaxAlgorithm,
}

impl QuantizeDelayed {
    fn scaling(&self) -> DelayedScaling {
        let margin = i32::from(self.margin);
        DelayedScaling { format: self.format, margin, algorithm: self.amax }
    }
}

/// The cast with one scale.
struct With<'a>(&'a QuantizeDelayed, f32);

impl Cast<Result<(Quantized, f32), QuantError>> for With<'_> {
    fn call<T: Element + Source>(
        self,
        x: ArrayView2<'_, T>,
    ) -> Result<(Quantized, f32), QuantError> {
        self.0.scaling().quantize(x, self.1)
    }
}

impl Op for QuantizeDelayed {
    const NAME: &'static str = "quantize_delayed";
    const INPUTS: &'static [Role] = &[input("x"), input("history"), input("scale")];
    const OUTPUTS: &'static [&'static str] = &["q", "scale_inv", "history", "scale"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (m, k, steps) = (3, 8, 4);
        let amax = AmaxAlgorithm::Max;
        Example::new(QuantizeDelayed { format: Format::E4M3, margin: 1, amax })
            .input("x", DType::BF16, shape![m, k])
            .positive("history", DType::F32, shape![steps])
            .positive("scale", DType::F32, shape![1])
            .output("q", shape![m, k])
            .output("scale_inv", shape![1, 1])
            .output("history", shape![steps])
            .output("scale", shape![1])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(x), Some(history), Some(scale)] = inputs else { unreachable!("mandatory") };
        one_of(Self::NAME, "format", self.format, &[Format::E4M3, Format::E5M2])?;
        rules::dtype(x, &[DType::F32, DType::BF16, DType::F16])?;
        rules::rank(x, 2, "[m, k]")?;
        rules::dtype(history, &[DType::F32])?;
        rules::rank(history, 1, "[steps]")?;
        if history.shape == [0] {
            rules::rank(history, 0, "[at least 1 step]")?;
        }
        rules::dtype(scale, &[DType::F32])?;
        rules::shape(scale, &[1])?;
        Ok(vec![
            rules::meta("q", stored_as(self.format), &x.shape),
            rules::meta("scale_inv", DType::F32, &[1, 1]),
            rules::meta("history", DType::F32, &history.shape),
            rules::meta("scale", DType::F32, &[1]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        2 * inputs[0].as_ref().expect("mandatory").elements()
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(x), Some(history), Some(scale)] = &inputs[..] else { unreachable!("mandatory") };
        let scale = scale.as_slice::<f32>()[0];
        let (cast, amax) = cast_any(x, With(self, scale)).map_err(|e| undefined(Self::NAME, &e))?;
        let mut history = history.as_slice::<f32>().to_vec();
        let next = self.scaling().next_scale(&mut history, amax, scale);
        let mut all = outputs(cast);
        all.push(Tensor::from_vec(&[history.len()], history));
        all.push(Tensor::from_vec(&[1], vec![next]));
        Ok(all)
    }
}
