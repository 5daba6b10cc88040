//! What each instruction of the table betrays of itself when probed, as one would probe hardware,
//! against the figures of arXiv 2511.10909 written down once more.

use fathom_numerics::formats::{Format, Overflow, Rounding};
use fathom_numerics::mma::{Arch, Instr, Mma};

/// (architecture, instruction, qualifier, products a step, fraction bits of the alignment, fraction
/// bits of the result).
type Figures = (&'static str, &'static str, &'static str, usize, i32, u32);

#[rustfmt::skip]
const PUBLISHED: &[Figures] = &[
    ("sm_70",  "mma",         "m8n8k4.f32.f16.f16.f32",       4, 23, 23),
    ("sm_70",  "mma",         "m8n8k4.f32.f16.f16.f16",       4, 23, 23),
    ("sm_70",  "mma",         "m8n8k4.f16.f16.f16.f16",       4, 23, 10),
    ("sm_75",  "mma",         "m16n8k8.f32.f16.f16.f32",      8, 24, 23),
    ("sm_75",  "mma",         "m16n8k8.f16.f16.f16.f16",      8, 24, 10),
    ("sm_75",  "mma",         "m8n8k4.f32.f16.f16.f32",       4, 24, 23),
    ("sm_80",  "mma",         "m16n8k16.f32.f16.f16.f32",     8, 24, 23),
    ("sm_80",  "mma",         "m16n8k16.f32.bf16.bf16.f32",   8, 24, 23),
    ("sm_80",  "mma",         "m16n8k8.f32.bf16.bf16.f32",    8, 24, 23),
    ("sm_80",  "mma",         "m16n8k16.f16.f16.f16.f16",     8, 24, 10),
    ("sm_80",  "mma",         "m16n8k8.f32.tf32.tf32.f32",    4, 24, 23),
    ("sm_80",  "mma",         "m16n8k4.f32.tf32.tf32.f32",    4, 24, 23),
    ("sm_89",  "mma",         "m16n8k16.f32.bf16.bf16.f32",   8, 24, 23),
    ("sm_89",  "mma",         "m16n8k8.f32.tf32.tf32.f32",    4, 24, 23),
    ("sm_89",  "mma",         "m16n8k32.f32.e4m3.e4m3.f32",  16, 13, 13),
    ("sm_89",  "mma",         "m16n8k16.f32.e5m2.e4m3.f32",  16, 13, 13),
    ("sm_89",  "mma",         "m16n8k32.f16.e4m3.e5m2.f16",  16, 13, 10),
    ("sm_90",  "mma",         "m16n8k16.f32.bf16.bf16.f32",  16, 25, 23),
    ("sm_90",  "mma",         "m16n8k16.f16.f16.f16.f16",    16, 25, 10),
    ("sm_90",  "mma",         "m16n8k8.f32.tf32.tf32.f32",    8, 25, 23),
    ("sm_90",  "wgmma",       "m64n8k32.f32.e4m3.e4m3",      32, 13, 13),
    ("sm_90",  "wgmma",       "m64n256k32.f32.e5m2.e4m3",    32, 13, 13),
    ("sm_90",  "wgmma",       "m64n8k32.f16.e4m3.e4m3",      32, 13, 10),
    ("sm_90",  "wgmma",       "m64n8k16.f32.f16.f16",        16, 25, 23),
    ("sm_90",  "wgmma",       "m64n8k16.f32.bf16.bf16",      16, 25, 23),
    ("sm_90",  "wgmma",       "m64n8k16.f16.f16.f16",        16, 25, 10),
    ("sm_90",  "wgmma",       "m64n8k8.f32.tf32.tf32",        8, 25, 23),
    ("sm_100", "mma",         "m16n8k16.f32.f16.f16.f32",    16, 25, 23),
    ("sm_100", "mma",         "m16n8k8.f32.tf32.tf32.f32",    8, 25, 23),
    ("sm_100", "tcgen05.mma", "m64n8k32.f32.e4m3.e5m2",      32, 25, 23),
    ("sm_100", "tcgen05.mma", "m128n8k32.f16.e5m2.e5m2",     32, 25, 10),
    ("sm_100", "tcgen05.mma", "m64n8k16.f32.bf16.bf16",      16, 25, 23),
    ("sm_100", "tcgen05.mma", "m64n8k16.f16.f16.f16",        16, 25, 10),
    ("sm_100", "tcgen05.mma", "m64n8k8.f32.tf32.tf32",        8, 25, 23),
    ("sm_120", "mma",         "m16n8k32.f32.e4m3.e4m3.f32",  32, 25, 23),
    ("sm_120", "mma",         "m16n8k32.f16.e5m2.e4m3.f16",  32, 25, 10),
    ("sm_120", "mma",         "m16n8k16.f32.bf16.bf16.f32",  16, 25, 23),
];

fn mma(figures: &Figures) -> Mma {
    let (arch, instr) = (Arch::parse(figures.0).unwrap(), Instr::parse(figures.1).unwrap());
    Mma::find(arch, instr, figures.2).unwrap()
}

/// A code of a value that the format holds.
fn code(format: Format, x: f64) -> u32 {
    let layout = match format {
        Format::Tf32 => Format::F32.layout(),
        _ => format.layout(),
    };
    let code = layout.from_f64(x, Rounding::TowardZero, Overflow::Ieee);
    assert_eq!(layout.to_f64(code), x, "{format} holds {x}");
    code
}

/// The sum of products `terms[k].0 * terms[k].1` and c, all values.
fn dot(mma: &Mma, terms: &[(usize, f64, f64)], c: f64) -> f64 {
    let (mut a, mut b) = (vec![0; mma.shape.k], vec![0; mma.shape.k]);
    for &(k, x, y) in terms {
        (a[k], b[k]) = (code(mma.types.a, x), code(mma.types.b, y));
    }
    let d = mma.dot(&a, &b, code(mma.types.c, c));
    mma.types.d.layout().to_f64(d)
}

/// 2^10 and its negative cancel and leave what the alignment kept of a third term.
const CANCEL: [(usize, f64, f64); 2] = [(0, 32.0, 32.0), (1, -32.0, 32.0)];

fn fraction_bits(mma: &Mma) -> i32 {
    let kept = |bits: i32| dot(mma, &CANCEL, 2f64.powi(10 - bits)) != 0.0;
    (0..30).take_while(|&bits| kept(bits)).last().unwrap()
}

/// A product too small for the step of the cancelling ones survives in a step of its own.
fn products_a_step(mma: &Mma) -> usize {
    let small = 2f64.powi(10 - fraction_bits(mma) - 1);
    let (x, y) = if small < 2f64.powi(-9) { (2f64.powi(-8), small * 256.0) } else { (small, 1.0) };
    let lost = |k: &usize| dot(mma, &[CANCEL[0], CANCEL[1], (*k, x, y)], 0.0) == 0.0;
    2 + (2..mma.shape.k).take_while(lost).count()
}

/// How many bits of a sum come out.
fn result_bits(mma: &Mma) -> u32 {
    let d = dot(mma, &[(0, 1.0, 1.0)], 0.0);
    assert_eq!(d, 1.0);
    let kept = |bits: &u32| {
        let fraction = 2f64.powi(-(*bits as i32));
        let sum = dot(mma, &[(0, 1.0, 1.0)], fraction);
        sum == 1.0 + fraction
    };
    (1..=30).take_while(kept).last().unwrap()
}

#[test]
fn probes_find_the_published_figures() {
    for figures in PUBLISHED {
        let mma = mma(figures);
        let found = (products_a_step(&mma), fraction_bits(&mma), result_bits(&mma));
        assert_eq!(found, (figures.3, figures.4, figures.5), "{figures:?}");
    }
}

#[test]
fn fp32_results_are_truncated_and_fp16_results_rounded() {
    for figures in PUBLISHED {
        let mma = mma(figures);
        if mma.types.c != mma.types.d {
            continue; // an FP16 C cannot hold the probe for an FP32 result
        }
        // (1 + 3u) + 1 with u the last bit of the result is 2 (1 + 1.5 u), a tie.
        let u = 2f64.powi(-(figures.5 as i32));
        let last = if mma.types.d == Format::F16 { 2.0 * u } else { u };
        for sign in [1.0, -1.0] {
            let sum = dot(&mma, &[(0, sign * 16.0, 16.0)], sign * 256.0 * (1.0 + 3.0 * u));
            assert_eq!(sum, sign * 512.0 * (1.0 + last), "{figures:?}");
        }
    }
}

#[test]
fn block_scaled_fp4_keeps_thirty_five_bits() {
    let qualifiers = [
        (Arch::Sm100, Instr::Tcgen05BlockScale, "m128n8k64.block16.f32.e2m1.e2m1.ue4m3"),
        (Arch::Sm100, Instr::Tcgen05BlockScale, "m128n8k64.block32.f32.e2m1.e2m1.ue8m0"),
        (Arch::Sm120, Instr::MmaBlockScale, "m16n8k64.block16.f32.e2m1.e2m1.f32.ue4m3"),
    ];
    for (arch, instr, qualifier) in qualifiers {
        let mma = Mma::find(arch, instr, qualifier).unwrap();
        let scale = mma.scale.unwrap();
        let one = vec![code(scale.format, 1.0); 64 / scale.block];
        let mut a = vec![code(Format::E2M1, 0.0); 64];
        (a[0], a[20]) = (code(Format::E2M1, 1.0), code(Format::E2M1, -1.0));
        let b = vec![code(Format::E2M1, 1.0); 64];
        let kept = |bits: i32| mma.dot_scaled(&a, &b, &one, &one, 2f32.powi(-bits).to_bits()) != 0;
        let bits = (0..60).take_while(|&bits| kept(bits)).last().unwrap();
        assert_eq!(bits, 35, "{qualifier}");
    }
}

#[test]
fn fp8_mma_on_hopper_is_two_f16_instructions_and_an_addition() {
    let mma = Mma::find(Arch::Sm90, Instr::MmaSync, "m16n8k32.f32.e4m3.e4m3.f32").unwrap();
    let big = 256.0;
    // k = 0 and 1 share an instruction with 4, 5, ..., not with 2 and 3: 2^16 - 2^16 + 2^-10 loses
    // its
    // last term (F = 25) where all three are in one step.
    let sum = |k: usize| {
        dot(&mma, &[(0, big, big), (1, -big, big), (k, 2f64.powi(-5), 2f64.powi(-5))], 0.0)
    };
    let lost: Vec<usize> = (2..32).filter(|&k| sum(k) == 0.0).collect();
    assert_eq!(lost, (2..32).filter(|k| k % 4 < 2).collect::<Vec<_>>());
    // C meets the products only in a last addition, rounded to nearest: of 128, whose ulp is 2^-16,
    // a
    // quarter of an ulp is lost, and three quarters round up.
    let quarter = |k| (k, 2f64.powi(-9), 2f64.powi(-9));
    assert_eq!(dot(&mma, &[quarter(0)], 128.0), 128.0);
    let three = [quarter(0), quarter(1), quarter(2)];
    assert_eq!(dot(&mma, &three, 128.0), 128.0 + 2f64.powi(-16));
}
