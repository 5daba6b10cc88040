//! The arithmetic of matrix instructions, shared by mma and wgmma: codes in, codes out.
//!
//! Floating-point products are those of `fathom_numerics::mma`, by its fast GEMMs where they cover
//! the accumulator; integer products are exact and wrap (or saturate), binary ones count bits.

use fathom_numerics::formats::Format;
use fathom_numerics::mma::{Arch, Instr, Mma, MmaShape, Types};
use fathom_ptx::ast::Instruction;
use fathom_ptx::types::{Flag, Op, Type};
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::preset::Preset;

/// One kind of matrix product.
#[derive(Clone, Debug)]
pub struct Product {
    kind: Kind,
    /// Bits of an element of A and B.
    pub bits: u32,
    /// Type of C and D elements.
    pub accumulator: Type,
}

#[derive(Clone, Debug)]
enum Kind {
    /// The model on Ampere and on Hopper.
    Float([Option<Box<Mma>>; 2]),
    Double,
    Integer {
        a_signed: bool,
        b_signed: bool,
        saturate: bool,
    },
    Binary {
        and: bool,
    },
}

fn format(ty: Type) -> Option<Format> {
    Some(match ty {
        Type::F16 => Format::F16,
        Type::Bf16 => Format::Bf16,
        Type::Tf32 => Format::Tf32,
        Type::F32 => Format::F32,
        Type::E4m3 => Format::E4M3,
        Type::E5m2 => Format::E5M2,
        _ => return None,
    })
}

impl Product {
    /// The product of an instruction with these types; `None` where its arithmetic is not known.
    pub fn new(
        ins: &Instruction,
        instr: Instr,
        shape: MmaShape,
        [d, a, b, c]: [Type; 4],
    ) -> Option<Product> {
        let kind = if a == Type::F64 {
            Kind::Double
        } else if a == Type::B1 {
            Kind::Binary { and: ins.mods.op() == Some(Op::And) }
        } else if d == Type::S32 {
            Kind::Integer {
                a_signed: a.is_signed(),
                b_signed: b.is_signed(),
                saturate: ins.mods.has(Flag::Satfinite),
            }
        } else {
            let types = Types { a: format(a)?, b: format(b)?, c: format(c)?, d: format(d)? };
            let find = |arch| Mma::with_types(arch, instr, shape, types, None).map(Box::new);
            let both = [find(Arch::Sm80), find(Arch::Sm90)];
            if both.iter().all(Option::is_none) {
                return None;
            }
            Kind::Float(both)
        };
        Some(Product { kind, bits: a.bits(), accumulator: d })
    }

    /// `d = a b^T + d`: a is m x k, b is n x k, d is m x n, all row-major; elements are codes in
    /// words (for f64 their bits).
    pub fn run(&self, preset: &Preset, [m, n, k]: [usize; 3], a: &[u64], b: &[u64], d: &mut [u64]) {
        match &self.kind {
            Kind::Float(both) => {
                let hopper = preset.compute_capability[0] >= 9;
                let order = if hopper { [1, 0] } else { [0, 1] };
                let mma = order.into_iter().find_map(|i| both[i].as_deref());
                let mma = mma.expect("one architecture at least");
                float(mma, [m, n, k], a, b, d);
            }
            Kind::Double => {
                for i in 0..m * n {
                    let (row, column) = (i / n, i % n);
                    d[i] = (0..k)
                        .fold(f64::from_bits(d[i]), |sum, p| {
                            let x = f64::from_bits(a[row * k + p]);
                            x.mul_add(f64::from_bits(b[column * k + p]), sum)
                        })
                        .to_bits();
                }
            }
            Kind::Integer { a_signed, b_signed, saturate } => {
                let extend = |v: u64, signed: bool| {
                    let shift = 64 - self.bits;
                    if signed { (v << shift) as i64 >> shift } else { v as i64 }
                };
                for i in 0..m * n {
                    let (row, column) = (i / n, i % n);
                    let sum = (0..k).fold(i64::from(d[i] as i32), |sum, p| {
                        let x = extend(a[row * k + p], *a_signed);
                        sum + x * extend(b[column * k + p], *b_signed)
                    });
                    let sum = if *saturate {
                        sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX))
                    } else {
                        sum
                    };
                    d[i] = u64::from(sum as u32);
                }
            }
            Kind::Binary { and } => {
                for i in 0..m * n {
                    let (row, column) = (i / n, i % n);
                    let count = (0..k).fold(d[i] as u32, |sum, p| {
                        let (x, y) = (a[row * k + p], b[column * k + p]);
                        sum.wrapping_add((if *and { x & y } else { x ^ y }) as u32)
                    });
                    d[i] = u64::from(count);
                }
            }
        }
    }
}

fn float(mma: &Mma, [m, n, k]: [usize; 3], a: &[u64], b: &[u64], d: &mut [u64]) {
    let narrow = |v: &[u64]| -> Vec<u32> { v.iter().map(|&x| x as u32).collect() };
    let (a, b) = (narrow(a), narrow(b));
    let mut c: Vec<u32> = d.iter().map(|&x| x as u32).collect();
    float_codes(mma, [m, n, k], &a, &b, &mut c);
    d.iter_mut().zip(c).for_each(|(d, c)| *d = u64::from(c));
}

/// As [`Product::run`], of floating-point codes in words of 32 bits.
fn float_codes(mma: &Mma, [m, n, k]: [usize; 3], a: &[u32], b: &[u32], d: &mut [u32]) {
    let a = ArrayView2::from_shape((m, k), a).expect("m x k");
    let b = ArrayView2::from_shape((n, k), b).expect("n x k");
    let mut d = ArrayViewMut2::from_shape((m, n), d).expect("m x n");
    let product = mma.mma(a, b.t(), d.view());
    d.assign(&product);
}
