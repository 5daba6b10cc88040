//! Keys and values of multi-head latent attention from the up-projected latent and the shared key.
//!
//! Forward: `kv` \[t, heads * (nope + v)\] holds each head's position-free key and value; columns
//! `offset .. offset + rope` of `latent` hold the one key that carries positions. It is rotated
//! (as in op `rope`) and put behind every head's key: `k` \[t, heads * (nope + rope)\], `v`
//! \[t, heads * v\]. No arithmetic but the rotation. Source: arXiv 2412.19437, equations 1 to 5.
//!
//! Backward: the shared key's gradient is the sum over heads in ascending order, rotated back.

use fathom_trace::{DType, OpClass, TensorMeta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rope::{check_tables, rotate, table_rows};
use crate::Tensor;
use crate::op::compute_type::{FLOATS, Real, compute_dtype, in_real};
use crate::op::example::{Example, shape};
use crate::op::{Op, OpError, Role, input, rules};

/// Assembles keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlaKv {
    /// Heads of the queries.
    pub heads: usize,
    /// Columns of a head's key without position.
    pub nope: usize,
    /// Columns of the shared key with position.
    pub rope: usize,
    /// Columns of a head's value.
    pub v: usize,
    /// First column of the shared key in `latent`.
    pub offset: usize,
    /// Whether rotated pairs are neighbours.
    pub interleaved: bool,
}

/// Gradient of [`MlaKv`]; the same parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MlaKvBackward {
    /// Heads of the queries.
    pub heads: usize,
    /// Columns of a head's key without position.
    pub nope: usize,
    /// Columns of the shared key with position.
    pub rope: usize,
    /// Columns of a head's value.
    pub v: usize,
    /// Whether rotated pairs are neighbours.
    pub interleaved: bool,
}

impl Op for MlaKv {
    const NAME: &'static str = "mla_kv";
    const INPUTS: &'static [Role] =
        &[input("kv"), input("latent"), input("cos"), input("sin"), input("positions")];
    const OUTPUTS: &'static [&'static str] = &["k", "v"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (t, length, heads, nope, rope, v, offset) = (3, 5, 2, 4, 4, 3, 2);
        Example::new(MlaKv { heads, nope, rope, v, offset, interleaved: true })
            .input("kv", DType::BF16, shape![t, heads * (nope + v)])
            .input("latent", DType::BF16, shape![t, offset + rope])
            .input("cos", DType::F32, shape![length, rope / 2])
            .input("sin", DType::F32, shape![length, rope / 2])
            .indices("positions", shape![t], &[4, 0, 2])
            .output("k", shape![t, heads * (nope + rope)])
            .output("v", shape![t, heads * v])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(kv), Some(latent), Some(cos), Some(sin), Some(positions)] = inputs else {
            unreachable!("mandatory")
        };
        rules::at_least_one(Self::NAME, "v", self.v)?;
        rules::dtype(kv, FLOATS)?;
        rules::rank(kv, 2, "[t, heads * (nope + v)]")?;
        let t = kv.shape[0];
        rules::shape(kv, &[t, self.heads * (self.nope + self.v)])?;
        rules::dtype(latent, &[kv.dtype])?;
        rules::rank(latent, 2, "[t, offset + rope or more]")?;
        if latent.shape[0] != t || latent.shape[1] < self.offset + self.rope {
            let expected = format!("[{t}, {} + {} or more]", self.offset, self.rope);
            let found = latent.shape.clone();
            return Err(OpError::Shape { role: "latent".into(), expected, found });
        }
        check_tables(self.rope, t, compute_dtype(kv.dtype), [cos, sin, positions])?;
        Ok(vec![
            rules::meta("k", kv.dtype, &[t, self.heads * (self.nope + self.rope)]),
            rules::meta("v", kv.dtype, &[t, self.heads * self.v]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        3 * (inputs[0].as_ref().expect("mandatory").shape[0] * self.rope) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(kv), Some(latent), Some(cos), Some(sin), Some(positions)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let rows = table_rows(Self::NAME, positions, cos.shape()[0])?;
        let (t, dtype, half) = (rows.len(), kv.dtype(), self.rope / 2);
        let (nope, rope, v_dim) = (self.nope, self.rope, self.v);
        let wide = latent.shape()[1];
        Ok(in_real!(dtype, R => {
            let (kv, latent, cos, sin) = (R::load(kv), R::load(latent), R::load(cos), R::load(sin));
            let mut k = Vec::with_capacity(t * self.heads * (nope + rope));
            let mut v = Vec::with_capacity(t * self.heads * v_dim);
            for (row, &p) in rows.iter().enumerate() {
                let mut shared = latent[row * wide + self.offset..][..rope].to_vec();
                let (cos, sin) = (&cos[p * half..][..half], &sin[p * half..][..half]);
                rotate(&mut shared, cos, sin, self.interleaved, false);
                let width = self.heads * (nope + v_dim);
                for head in kv[row * width..][..width].chunks(nope + v_dim) {
                    k.extend_from_slice(&head[..nope]);
                    k.extend_from_slice(&shared);
                    v.extend_from_slice(&head[nope..]);
                }
            }
            vec![
                R::store(k, &[t, self.heads * (nope + rope)], dtype),
                R::store(v, &[t, self.heads * v_dim], dtype),
            ]
        }))
    }
}

impl Op for MlaKvBackward {
    const NAME: &'static str = "mla_kv_backward";
    const INPUTS: &'static [Role] =
        &[input("dk"), input("dv"), input("cos"), input("sin"), input("positions")];
    const OUTPUTS: &'static [&'static str] = &["dkv", "dshared"];
    const CLASS: OpClass = OpClass::Convert;

    fn example() -> Example {
        let (t, length, heads, nope, rope, v) = (3, 5, 2, 4, 4, 3);
        Example::new(MlaKvBackward { heads, nope, rope, v, interleaved: true })
            .input("dk", DType::BF16, shape![t, heads * (nope + rope)])
            .input("dv", DType::BF16, shape![t, heads * v])
            .input("cos", DType::F32, shape![length, rope / 2])
            .input("sin", DType::F32, shape![length, rope / 2])
            .indices("positions", shape![t], &[4, 0, 2])
            .output("dkv", shape![t, heads * (nope + v)])
            .output("dshared", shape![t, rope])
    }

    fn infer(&self, inputs: &[Option<TensorMeta>]) -> Result<Vec<TensorMeta>, OpError> {
        let [Some(dk), Some(dv), Some(cos), Some(sin), Some(positions)] = inputs else {
            unreachable!("mandatory")
        };
        rules::at_least_one(Self::NAME, "rope", self.rope)?;
        rules::dtype(dk, FLOATS)?;
        rules::rank(dk, 2, "[t, heads * (nope + rope)]")?;
        let t = dk.shape[0];
        rules::shape(dk, &[t, self.heads * (self.nope + self.rope)])?;
        rules::dtype(dv, &[dk.dtype])?;
        rules::shape(dv, &[t, self.heads * self.v])?;
        check_tables(self.rope, t, compute_dtype(dk.dtype), [cos, sin, positions])?;
        Ok(vec![
            rules::meta("dkv", dk.dtype, &[t, self.heads * (self.nope + self.v)]),
            rules::meta("dshared", dk.dtype, &[t, self.rope]),
        ])
    }

    fn flops(&self, inputs: &[Option<TensorMeta>]) -> u64 {
        let t = inputs[0].as_ref().expect("mandatory").shape[0];
        ((self.heads + 3) * t * self.rope) as u64
    }

    fn run(&self, inputs: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, OpError> {
        let [Some(dk), Some(dv), Some(cos), Some(sin), Some(positions)] = &inputs[..] else {
            unreachable!("mandatory")
        };
        let rows = table_rows(Self::NAME, positions, cos.shape()[0])?;
        let (t, dtype, half) = (rows.len(), dk.dtype(), self.rope / 2);
        let (nope, qk, v_dim) = (self.nope, self.nope + self.rope, self.v);
        let heads = self.heads;
        Ok(in_real!(dtype, R => {
            let (dk, dv, cos, sin) = (R::load(dk), R::load(dv), R::load(cos), R::load(sin));
            let mut dkv = Vec::with_capacity(t * heads * (nope + v_dim));
            let mut dshared = vec![R::ZERO; t * self.rope];
            for (row, (&p, dshared)) in rows.iter().zip(dshared.chunks_mut(self.rope)).enumerate() {
                for head in 0..heads {
                    let dk = &dk[(row * heads + head) * qk..][..qk];
                    dkv.extend_from_slice(&dk[..nope]);
                    dkv.extend_from_slice(&dv[(row * heads + head) * v_dim..][..v_dim]);
                    dshared.iter_mut().zip(&dk[nope..]).for_each(|(d, &k)| *d += k);
                }
                let (cos, sin) = (&cos[p * half..][..half], &sin[p * half..][..half]);
                rotate(dshared, cos, sin, self.interleaved, true);
            }
            vec![
                R::store(dkv, &[t, heads * (nope + v_dim)], dtype),
                R::store(dshared, &[t, self.rope], dtype),
            ]
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_is_the_transpose() {
        // <dk, k(kv, s)> + <dv, v(kv)> = <dkv, kv> + <ds, s>, for the map is linear.
        let (t, heads, nope, rope, v) = (3, 2, 4, 4, 3);
        let fill =
            |n: usize, a: f64| (0..n).map(|i| ((i as f64 + 1.0) * a).sin()).collect::<Vec<f64>>();
        let tensor = |r: usize, c: usize, a| Tensor::from_vec(&[r, c], fill(r * c, a));
        let angles = fill(5 * rope / 2, 0.7);
        let cos = Tensor::from_vec(&[5, rope / 2], angles.iter().map(|a| a.cos()).collect());
        let sin = Tensor::from_vec(&[5, rope / 2], angles.iter().map(|a| a.sin()).collect());
        let positions = Tensor::from_vec(&[t], vec![4i32, 0, 2]);
        let (kv, latent) = (tensor(t, heads * (nope + v), 0.3), tensor(t, 2 + rope, 0.9));
        let op = MlaKv { heads, nope, rope, v, offset: 2, interleaved: true };
        let tables = [Some(cos), Some(sin), Some(positions)];
        let mut inputs = vec![Some(kv.clone()), Some(latent.clone())];
        inputs.extend(tables.clone());
        let out = Op::run(&op, inputs).unwrap();
        let (dk, dv) = (tensor(t, heads * (nope + rope), 1.1), tensor(t, heads * v, 1.7));
        let back = MlaKvBackward { heads, nope, rope, v, interleaved: true };
        let mut inputs = vec![Some(dk.clone()), Some(dv.clone())];
        inputs.extend(tables);
        let grads = Op::run(&back, inputs).unwrap();
        let dot = |a: &Tensor, b: &Tensor| {
            a.as_slice::<f64>().iter().zip(b.as_slice::<f64>()).map(|(a, b)| a * b).sum::<f64>()
        };
        let shared =
            ndarray::ArrayView2::from_shape((t, 2 + rope), latent.as_slice::<f64>()).unwrap();
        let shared = Tensor::from_array(shared.slice(ndarray::s![.., 2..]).to_owned());
        let left = dot(&dk, &out[0]) + dot(&dv, &out[1]);
        let right = dot(&grads[0], &kv) + dot(&grads[1], &shared);
        assert!((left - right).abs() < 1e-12, "{left} against {right}");
        assert_eq!(out[0].dtype(), DType::F64);
    }
}
