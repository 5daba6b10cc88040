//! The elementary functions against f64 and 192-bit floats on a sample of inputs (all 2^32 of them:
//! `examples/sweep_elementary.rs`), every instruction set against every other, and the CUDA header
//! against Rust.

mod cuda_header;
mod oracle;

use fathom_numerics::elementary::{Function, Isa};
use oracle::Worst;

const SEED: u64 = 0x0FA7_0E1E;
const RANDOM_INPUTS: usize = 1 << 19;

/// SplitMix64 (Steele, Lea, Flood 2014), so that the sample is the same everywhere.
fn random_bits(count: usize) -> Vec<u32> {
    let mut state = SEED;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Every exponent of both signs with the fractions around its ends and its middle.
fn boundaries() -> Vec<u32> {
    let fractions =
        [0, 1, 2, 3, 0x3504F2, 0x3504F3, 0x3504F4, 0x400000, 0x7FFFFD, 0x7FFFFE, 0x7FFFFF];
    (0..512u32).flat_map(|e| fractions.map(|m| (e << 23) | m)).collect()
}

/// Inputs around which the steps change course: thresholds, overflow, underflow, RoPE's angles.
fn landmarks() -> Vec<u32> {
    let near = [
        0.625,
        110.0,
        90.0,
        88.72284,
        -87.33655,
        -103.97208,
        -110.0,
        128.0,
        -126.0,
        -149.0,
        -150.0,
        -152.0,
        130.0,
        10.0,
        std::f32::consts::FRAC_PI_4,
        std::f32::consts::FRAC_PI_2,
        std::f32::consts::PI,
        131072.0,
        1.0,
    ];
    let mut bits = Vec::new();
    for x in near.into_iter().flat_map(|x: f32| [x, -x]) {
        bits.extend((0..2001u32).map(|i| x.to_bits().wrapping_add(i).wrapping_sub(1000)));
    }
    // Where log2 was once 1.09 ulp off: just below sqrt(2), f^2/2 has to be carried exactly.
    bits.extend(0x3FB4_7000..0x3FB4_9000);
    bits.extend((0..=131_072u32).step_by(7).map(|position| (position as f32).to_bits()));
    bits
}

fn sample() -> Vec<u32> {
    let mut inputs = random_bits(RANDOM_INPUTS);
    inputs.extend(boundaries());
    inputs.extend(landmarks());
    inputs
}

#[test]
fn errors_are_within_their_bounds() {
    let inputs = sample();
    for &f in Function::ALL {
        let worst = oracle::sweep(f, Isa::best(), &inputs);
        assert!(
            worst.max_ulp <= f.bound_ulp(),
            "{}(0x{:08X}): error {} ulp, bound {}",
            f.name(),
            worst.at,
            worst.max_ulp,
            f.bound_ulp()
        );
    }
}

#[test]
fn oracle_sees_errors() {
    let one_off = f32::from_bits(1f32.exp().to_bits() + 1);
    let error = oracle::error_ulp(one_off, 1f64.exp());
    let precise = oracle::error_ulp_high_precision(Function::Exp, 1.0, one_off);
    assert!((error - precise).abs() < 1e-7 && error > 0.5, "{error} against {precise}");
    assert_eq!(oracle::error_ulp(f32::from_bits(0x7FC0_0000), f64::NAN), f64::INFINITY);
    assert_eq!(oracle::error_ulp(-0.0, 0.0), f64::INFINITY);
    let mut worst = Worst::NONE;
    worst.add(Function::Exp, 1.0, one_off);
    assert_eq!((worst.at, worst.correctly_rounded), (1f32.to_bits(), 0));
}

#[test]
fn split_does_not_change_the_verdict() {
    let inputs = boundaries();
    let whole = oracle::sweep(Function::Log, Isa::best(), &inputs);
    let (a, b) = inputs.split_at(1000);
    let (a, b) = (
        oracle::sweep(Function::Log, Isa::best(), a),
        oracle::sweep(Function::Log, Isa::best(), b),
    );
    for merged in [Worst::NONE.merge(a).merge(b), a.merge(b).merge(Worst::NONE)] {
        assert_eq!((merged.inputs, merged.max_ulp), (whole.inputs, whole.max_ulp));
        assert_eq!(merged.correctly_rounded, whole.correctly_rounded);
    }
}

#[test]
fn instruction_sets_agree_to_the_bit() {
    let inputs = sample();
    for &f in Function::ALL {
        let want: Vec<u32> =
            inputs.iter().map(|&bits| f.eval(f32::from_bits(bits)).to_bits()).collect();
        for isa in Isa::available() {
            let mut ys: Vec<f32> = inputs.iter().map(|&bits| f32::from_bits(bits)).collect();
            f.apply(isa, &mut ys);
            for ((x, y), want) in inputs.iter().zip(&ys).zip(&want) {
                let got = y.to_bits();
                assert_eq!(got, *want, "{} on {isa:?} at 0x{x:08X}: 0x{got:08X}", f.name());
            }
        }
    }
}
