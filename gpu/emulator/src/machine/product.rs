//! The arithmetic of matrix instructions, shared by mma and wgmma: codes in, codes out.
//!
//! Floating-point products are those of `fathom_numerics::mma`, by its fast GEMMs where they cover
//! the accumulator; integer products are exact and wrap (or saturate), binary ones count bits.

use std::cell::RefCell;
use std::rc::Rc;

use fathom_numerics::formats::Format;
use fathom_numerics::gemm::tensor_core::TensorCore;
use fathom_numerics::gemm::{Accumulate, Isa, gemm_unscaled_on};
use fathom_numerics::mma::{Accumulator, Arch, Instr, Mma, MmaShape, Order, Types};
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
    /// The model on each of [`ARCHITECTURES`] that has the instruction.
    Float([Option<Box<Mma>>; ARCHITECTURES.len()]),
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

/// The architectures of emulated devices, oldest first.
const ARCHITECTURES: [Arch; 3] = [Arch::Sm80, Arch::Sm90, Arch::Sm120];

/// The model on a device; that of the nearest architecture which has the instruction, older ones
/// first, where its own has not.
fn on<'a>(models: &'a [Option<Box<Mma>>; ARCHITECTURES.len()], preset: &Preset) -> Option<&'a Mma> {
    let own = match preset.compute_capability[0] {
        ..=8 => 0,
        9 => 1,
        _ => 2,
    };
    let mut nearest = (0..=own).rev().chain(own + 1..models.len());
    nearest.find_map(|i| models[i].as_deref())
}

/// The format of a floating-point type of A, B, C or D; none where it has no arithmetic here.
pub fn format(ty: Type) -> Option<Format> {
    Some(match ty {
        Type::F16 => Format::F16,
        Type::Bf16 => Format::Bf16,
        Type::Tf32 => Format::Tf32,
        Type::F32 => Format::F32,
        Type::E4m3 => Format::E4M3,
        Type::E5m2 => Format::E5M2,
        Type::E2m1 => Format::E2M1,
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
            let models = ARCHITECTURES.map(find);
            if models.iter().all(Option::is_none) {
                return None;
            }
            Kind::Float(models)
        };
        Some(Product { kind, bits: a.bits(), accumulator: d })
    }

    /// `d = a b^T + d`: a is m x k, b is n x k, d is m x n, all row-major; elements are codes in
    /// words (for f64 their bits).
    pub fn run(&self, preset: &Preset, [m, n, k]: [usize; 3], a: &[u64], b: &[u64], d: &mut [u64]) {
        if let Kind::Double = self.kind {
            for i in 0..m * n {
                let (row, column) = (i / n, i % n);
                d[i] = (0..k)
                    .fold(f64::from_bits(d[i]), |sum, p| {
                        let x = f64::from_bits(a[row * k + p]);
                        x.mul_add(f64::from_bits(b[column * k + p]), sum)
                    })
                    .to_bits();
            }
            return;
        }
        let narrow = |v: &[u64]| -> Vec<u32> { v.iter().map(|&x| x as u32).collect() };
        let mut c = narrow(d);
        self.run32(preset, [m, n, k], &narrow(a), &narrow(b), &mut c);
        d.iter_mut().zip(c).for_each(|(d, c)| *d = u64::from(c));
    }

    /// As [`Product::run`], of codes of up to 32 bits.
    pub fn run32(&self, preset: &Preset, size: [usize; 3], a: &[u32], b: &[u32], d: &mut [u32]) {
        match &self.kind {
            Kind::Float(models) => {
                let mma = on(models, preset).expect("one architecture at least");
                float(mma, size, a, b, d);
            }
            Kind::Double => unreachable!("64-bit codes"),
            Kind::Integer { a_signed, b_signed, saturate } => {
                self.integer([*a_signed, *b_signed], *saturate, size, a, b, d);
            }
            Kind::Binary { and } => {
                let [m, n, k] = size;
                for i in 0..m * n {
                    let (row, column) = (i / n, i % n);
                    d[i] = (0..k).fold(d[i], |sum, p| {
                        let (x, y) = (a[row * k + p], b[column * k + p]);
                        sum.wrapping_add(if *and { x & y } else { x ^ y })
                    });
                }
            }
        }
    }

    fn integer(
        &self,
        signed: [bool; 2],
        saturate: bool,
        [m, n, k]: [usize; 3],
        a: &[u32],
        b: &[u32],
        d: &mut [u32],
    ) {
        let shift = 32 - self.bits;
        let extend = |v: u32, signed: bool| {
            i64::from(if signed { (v << shift) as i32 >> shift } else { v as i32 })
        };
        for i in 0..m * n {
            let (row, column) = (i / n, i % n);
            let sum = (0..k).fold(i64::from(d[i] as i32), |sum, p| {
                sum + extend(a[row * k + p], signed[0]) * extend(b[column * k + p], signed[1])
            });
            let limit = |sum: i64| sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX));
            d[i] = if saturate { limit(sum) } else { sum } as u32;
        }
    }
}

thread_local! {
    /// The tensor cores that this thread has used; there are a handful of arithmetics.
    static CORES: RefCell<Vec<CoreEntry>> = const { RefCell::new(Vec::new()) };
}

type CoreEntry = ((Accumulator, Format, Format), Rc<TensorCore>);

impl Product {
    /// What [`Self::core`] computes: products of the same arithmetic may be chained along K.
    pub fn arithmetic(&self, preset: &Preset) -> Option<(Accumulator, Format, Format)> {
        let Kind::Float(models) = &self.kind else { return None };
        let mma = on(models, preset)?;
        let plain = mma.row.order == Order::Ascending && mma.types.d == Format::F32;
        plain.then_some((mma.row.accumulator, mma.types.a, mma.types.b))
    }

    /// The packing kernels for this product, where it has an FP32 accumulator in plain order.
    pub fn core(&self, preset: &Preset) -> Option<Rc<TensorCore>> {
        let key = self.arithmetic(preset)?;
        CORES.with_borrow_mut(|cores| {
            if let Some((_, core)) = cores.iter().find(|(k, _)| *k == key) {
                return Some(core.clone());
            }
            let core = Rc::new(TensorCore::new(key.0, key.1, key.2)?);
            cores.push((key, core.clone()));
            Some(core)
        })
    }
}

/// A floating-point product: by the fast exact GEMM where it computes this accumulator in this
/// order, else by the model itself.
fn float(mma: &Mma, [m, n, k]: [usize; 3], a: &[u32], b: &[u32], d: &mut [u32]) {
    let a = ArrayView2::from_shape((m, k), a).expect("m x k");
    let b = ArrayView2::from_shape((n, k), b).expect("n x k");
    let types = mma.types;
    let fast = types.a == types.b
        && types.c == Format::F32
        && types.d == Format::F32
        && mma.row.order == Order::Ascending;
    if fast {
        let singles: &mut [f32] = bytemuck::cast_slice_mut(d);
        let out = ArrayViewMut2::from_shape((m, n), singles).expect("m x n");
        let accumulator = &mma.row.accumulator;
        gemm_unscaled_on(Isa::best(), types.a, a, b, out, Accumulate::Chain, accumulator)
            .expect("the shapes fit");
        return;
    }
    let mut d = ArrayViewMut2::from_shape((m, n), d).expect("m x n");
    let product = mma.mma(a, b.t(), d.view());
    d.assign(&product);
}
