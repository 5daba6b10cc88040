//! `mma`: one tensor-core instruction on a batch of tiles, `d = a b + c`.
//!
//! The arithmetic is the row of `fathom_numerics::mma::TABLE` that `arch`, `instr` and `qualifier`
//! select (arXiv 2511.10909). Shapes, row-major, any leading batch dimensions: a\[.., m, k\],
//! b\[.., k, n\], c\[.., m, n\] -> d\[.., m, n\]; block-scaled instructions also take
//! scale_a\[.., m, k/block\] and scale_b\[.., k/block, n\]. E2M1 is packed two a byte along k, low
//! nibble first (dtype U8, k/2 bytes); TF32 operands are F32, whose low 13 bits are dropped; UE4M3
//! scales are stored as F8_E4M3.

use fathom_numerics::formats::Format;
use fathom_numerics::formats::packed::unpack_e2m1;
use fathom_numerics::mma::{Arch, Instr, Mma as Instruction};
use fathom_trace::{DType, OpClass, TensorMeta};
use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Tensor;
use crate::op::codes::stored_as;
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, optional, rules};

/// One tensor-core instruction on a batch of tiles, `d = a b + c`. Sizes and types repeat what the
/// qualifier says and must agree with it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mma {
    /// `sm_70`, `sm_75`, `sm_80`, `sm_89`, `sm_90`, `sm_100` or `sm_120`.
    pub arch: String,
    /// `mma`, `wgmma`, `tcgen05.mma`, `mma.block_scale` or `tcgen05.mma.block_scale`.
    pub instr: String,
    /// Shape and types as in PTX, `m64n8k32.f32.e4m3.e4m3` for instance.
    pub qualifier: String,
    /// Rows of a and d.
    pub m: usize,
    /// Columns of b and d.
    pub n: usize,
    /// Columns of a, rows of b.
    pub k: usize,
    /// Format of a.
    pub a: String,
    /// Format of b.
    pub b: String,
    /// Format of c and d.
    pub d: String,
    /// Format of the scales of a block-scaled instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<String>,
    /// Elements along k that share a scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
}

impl Mma {
    /// The table's row, after checking that the parameters agree with the qualifier.
    ///
    /// # Errors
    /// [`OpError::Params`] naming the parameter.
    pub fn instruction(&self) -> Result<Instruction, OpError> {
        let wrong = |path: &str, message: String| OpError::Params {
            op: Self::NAME,
            path: path.to_owned(),
            message,
        };
        let arch = Arch::parse(&self.arch).map_err(|e| wrong("arch", e.to_string()))?;
        let instr = Instr::parse(&self.instr).map_err(|e| wrong("instr", e.to_string()))?;
        let mma = Instruction::find(arch, instr, &self.qualifier)
            .map_err(|e| wrong("qualifier", e.to_string()))?;
        let (scale, block) = match mma.scale {
            Some(s) => (Some(s.format.name().to_owned()), Some(s.block)),
            None => (None, None),
        };
        let agree = [
            ("m", self.m.to_string(), mma.shape.m.to_string()),
            ("n", self.n.to_string(), mma.shape.n.to_string()),
            ("k", self.k.to_string(), mma.shape.k.to_string()),
            ("a", self.a.clone(), mma.types.a.name().to_owned()),
            ("b", self.b.clone(), mma.types.b.name().to_owned()),
            ("d", self.d.clone(), mma.types.d.name().to_owned()),
            ("scale", format!("{:?}", self.scale), format!("{scale:?}")),
            ("block", format!("{:?}", self.block), format!("{block:?}")),
        ];
        for (path, found, expected) in agree {
            if found != expected {
                let qualifier = &self.qualifier;
                return Err(wrong(
                    path,
                    format!("expected {expected} as in qualifier '{qualifier}', found {found}"),
                ));
            }
        }
        Ok(mma)
    }
}

/// Length along k as stored.
fn stored_k(format: Format, k: usize) -> usize {
    if format == Format::E2M1 { k / 2 } else { k }
}

/// The codes of one matrix of a batch, unpacked: `[rows, columns]`; `along_rows` says along which
/// dimension packed codes lie.
pub fn codes(
    tensor: &Tensor,
    format: Format,
    batch: usize,
    shape: (usize, usize),
    along_rows: bool,
) -> Array2<u32> {
    let packed = format == Format::E2M1;
    let stored = match (packed, along_rows) {
        (false, _) => shape,
        (true, true) => (shape.0, shape.1 / 2),
        (true, false) => (shape.0 / 2, shape.1),
    };
    let at = |i, j| tensor.bits(batch * stored.0 * stored.1 + i * stored.1 + j) as u32;
    Array2::from_shape_fn(shape, |(i, j)| match (packed, along_rows) {
        (false, _) => at(i, j),
        (true, true) => u32::from(unpack_e2m1(at(i, j / 2) as u8)[j % 2].0),
        (true, false) => u32::from(unpack_e2m1(at(i / 2, j) as u8)[i % 2].0),
    })
}

impl Op for Mma {
    const NAME: &'static str = "mma";
    const INPUTS: &'static [Role] =
        &[input("a"), input("b"), input("c"), optional("scale_a"), optional("scale_b")];
    const OUTPUTS: &'static [&'static str] = &["d"];
    const CLASS: OpClass = OpClass::Gemm;

    fn example() -> Example {
        let (m, n, k, block) = (64, 8, 32, 32);
        let words = |word: &str| word.to_owned();
        Example::new(Mma {
            arch: words("sm_90"),
            instr: words("wgmma"),
            qualifier: words("m64n8k32.f32.e4m3.e4m3"),
            m,
            n,
            k,
            a: words("e4m3"),
            b: words("e4m3"),
            d: words("f32"),
            scale: None,
            block: None,
        })
        .input("a", DType::F8E4M3, shape![m, k])
        .input("b", DType::F8E4M3, shape![k, n])
        .input("c", DType::F32, shape![m, n])
        .absent("scale_a", DType::F8E8M0, shape![m, k / block])
        .absent("scale_b", DType::F8E8M0, shape![k / block, n])
        .output("d", shape![m, n])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let mma = self.instruction()?;
        let [Some(a), Some(b), Some(c), scale_a, scale_b] = inputs else {
            unreachable!("checked by the table");
        };
        if c.shape.len() < 2 {
            rules::rank(c, 2, "[.., m, n]")?;
        }
        let batch = &c.shape[..c.shape.len() - 2];
        let shaped = |t: &TensorMeta, format, rows: usize, columns: usize| {
            rules::dtype(t, &[stored_as(format)])?;
            rules::shape(t, &[batch, &[rows, columns]].concat())
        };
        shaped(c, mma.types.d, self.m, self.n)?;
        shaped(a, mma.types.a, self.m, stored_k(mma.types.a, self.k))?;
        shaped(b, mma.types.b, stored_k(mma.types.b, self.k), self.n)?;
        match (mma.scale, scale_a, scale_b) {
            (Some(s), Some(scale_a), Some(scale_b)) => {
                shaped(scale_a, s.format, self.m, self.k / s.block)?;
                shaped(scale_b, s.format, self.k / s.block, self.n)?;
            }
            (None, None, None) => {}
            (Some(_), a, _) => {
                let role = if a.is_none() { "scale_a" } else { "scale_b" };
                return Err(OpError::missing(Self::NAME, role));
            }
            (None, a, _) => {
                let role = if a.is_some() { "scale_a" } else { "scale_b" };
                return Err(OpError::unknown_roles(Self::NAME, &[role], &["a", "b", "c"]));
            }
        }
        Ok(vec![rules::meta("d", stored_as(mma.types.d), &c.shape)])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let elements: usize = inputs[2].as_ref().map_or(0, |c| c.shape.iter().product());
        2 * (elements * self.k) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let mma = self.instruction()?;
        let [Some(a), Some(b), Some(c), scale_a, scale_b] = &inputs[..] else {
            unreachable!("checked by infer");
        };
        let (m, n, k) = (self.m, self.n, self.k);
        let mut bits = Vec::with_capacity(c.len());
        for batch in 0..c.len() / (m * n) {
            let a = codes(a, mma.types.a, batch, (m, k), true);
            let b = codes(b, mma.types.b, batch, (k, n), false);
            let c = codes(c, mma.types.d, batch, (m, n), true);
            let d = match (mma.scale, scale_a, scale_b) {
                (Some(s), Some(scale_a), Some(scale_b)) => {
                    let scale_a = codes(scale_a, s.format, batch, (m, k / s.block), true);
                    let scale_b = codes(scale_b, s.format, batch, (k / s.block, n), false);
                    mma.mma_scaled(a.view(), b.view(), scale_a.view(), scale_b.view(), c.view())
                }
                _ => mma.mma(a.view(), b.view(), c.view()),
            };
            bits.extend(d);
        }
        let shape = c.shape();
        Ok(vec![match mma.types.d {
            Format::F16 => {
                let bits = bits.into_iter().map(|x| half::f16::from_bits(x as u16)).collect();
                Tensor::from_vec::<half::f16>(shape, bits)
            }
            _ => Tensor::from_vec::<f32>(shape, bits.into_iter().map(f32::from_bits).collect()),
        }])
    }
}
