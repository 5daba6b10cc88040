//! AdamW and clipping against PyTorch 2.15: `torch.optim.AdamW` (betas 0.9, 0.95; eps 1e-8; weight
//! decay 0.1 on the first tensor, none on the second; not fused, not foreach) after
//! `clip_grad_norm_(..., 1.0)`, in F32 on the CPU, four steps with a changing learning rate. The
//! figures below are its inputs and outputs.

// The figures stand as PyTorch printed them.
#![allow(clippy::excessive_precision)]

use fathom_reference::Tensor;
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::ops::adamw::AdamW;
use fathom_reference::ops::clip_factor::ClipFactor;
use fathom_reference::ops::sum_of_squares::SumOfSquares;
use fathom_reference::optim::scalar;
use fathom_trace::DType;

/// PyTorch rounds elsewhere (`m + (1 - beta1) (g - m)`, fused multiply-adds): some units in the
/// last place, 6e-8 each, a step.
const RELATIVE: f32 = 1e-6;

const WEIGHTS: [&[f32]; 2] = [
    &[
        8.032760620e-01,
        1.748333871e-01,
        8.897809684e-02,
        -6.137180328e-01,
        4.618244991e-02,
        -1.368259192e+00,
    ],
    &[3.374950886e-01, 1.011115909e+00, -1.435179353e+00, 9.774317741e-01],
];

struct Step {
    learning_rate: f64,
    gradients: [&'static [f32]; 2],
    norm: f64,
    weights: [&'static [f32]; 2],
}

const STEPS: [Step; 4] = [
    Step {
        learning_rate: 0.01,
        gradients: [
            &[
                5.220499635e-02,
                1.237916723e-01,
                -8.646356314e-02,
                2.989608422e-02,
                4.192186520e-02,
                -7.985432632e-03,
            ],
            &[9.264108539e-02, 8.156775683e-02, 4.951890185e-02, -1.643169858e-02],
        ],
        norm: 2.149382830e-01,
        weights: [
            &[
                7.924727798e-01,
                1.646585464e-01,
                9.888911992e-02,
                -6.231043339e-01,
                3.613626957e-02,
                -1.356890917e+00,
            ],
            &[3.274950981e-01, 1.001115918e+00, -1.445179343e+00, 9.874317646e-01],
        ],
    },
    Step {
        learning_rate: 0.02,
        gradients: [
            &[
                -2.033886433e+00,
                -3.177322388e+00,
                2.243089914e+00,
                7.167522311e-01,
                -1.176450729e+00,
                4.557446837e-01,
            ],
            &[-3.551199675e+00, 1.603082180e+00, -4.353068352e+00, -1.888122082e+00],
        ],
        norm: 7.685317039e+00,
        weights: [
            &[
                8.027599454e-01,
                1.746371984e-01,
                8.833432943e-02,
                -6.399362087e-01,
                4.676554725e-02,
                -1.366984963e+00,
            ],
            &[3.393183351e-01, 9.825465679e-01, -1.431685567e+00, 1.002982736e+00],
        ],
    },
    Step {
        learning_rate: 0.005,
        gradients: [
            &[
                7.720755041e-02,
                -1.239950806e-01,
                2.267505825e-01,
                6.045545451e-03,
                6.710177660e-01,
                7.310018539e-01,
            ],
            &[2.180804908e-01, 5.085067749e-01, -1.096263409e+00, 1.061653346e-01],
        ],
        norm: 1.605185151e+00,
        weights: [
            &[
                8.040832281e-01,
                1.770983040e-01,
                8.511859924e-02,
                -6.432753801e-01,
                4.454502463e-02,
                -1.369710684e+00,
            ],
            &[3.406529129e-01, 9.779200554e-01, -1.427601576e+00, 1.005089402e+00],
        ],
    },
    Step {
        learning_rate: 0.005,
        gradients: [
            &[
                -9.394968033e+00,
                -3.235782623e+00,
                -1.054710865e+01,
                8.237727165e+00,
                -5.270502090e+00,
                8.107258797e+00,
            ],
            &[-8.045926094e+00, -1.050064182e+01, -1.096535683e+00, 3.529672623e+00],
        ],
        norm: 2.366441536e+01,
        weights: [
            &[
                8.068078160e-01,
                1.798931658e-01,
                8.581721038e-02,
                -6.464423537e-01,
                4.417808726e-02,
                -1.372974515e+00,
            ],
            &[3.431973755e-01, 9.775834680e-01, -1.424066305e+00, 1.005112052e+00],
        ],
    },
];

/// Moments of the first tensor after the last step.
const MOMENTS: [&[f32]; 2] = [
    &[
        -5.300248787e-02,
        -4.508903250e-02,
        -1.451794896e-02,
        4.488325864e-02,
        6.007768679e-03,
        7.946649939e-02,
    ],
    &[
        1.126793586e-02,
        9.588082321e-03,
        1.504456066e-02,
        6.490373053e-03,
        1.191354450e-02,
        1.588089578e-02,
    ],
];

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from_vec(&[values.len()], values.to_vec())
}

fn assert_near(what: &str, found: &Tensor, expected: &[f32]) {
    for (i, (f, e)) in found.as_slice::<f32>().iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= RELATIVE * e.abs(), "{what}, element {i}: {f} against {e}");
    }
}

#[test]
fn four_clipped_steps_are_pytorchs() {
    let backend = Reference;
    let mut weights = WEIGHTS.map(tensor);
    let zeros = || WEIGHTS.map(|w| Tensor::zeros(DType::F32, &[w.len()]));
    let (mut first, mut second) = (zeros(), zeros());
    for (t, step) in STEPS.iter().enumerate() {
        let gradients = step.gradients.map(tensor);
        let mut partials = Tensor::zeros(DType::F32, &[2]);
        for (slot, gradient) in gradients.iter().enumerate() {
            let op = SumOfSquares { slot };
            partials = backend.sum_of_squares(&op, gradient, partials).unwrap();
        }
        let op = ClipFactor { max_norm: Some(1.0) };
        let [norm, factor] = backend.clip_factor(&op, &partials).unwrap();
        assert!((scalar(&norm) - step.norm).abs() <= f64::from(RELATIVE) * step.norm);
        let t = t as i32 + 1;
        for i in 0..2 {
            let op = AdamW {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                decay: 1.0 - step.learning_rate * [0.1, 0.0][i],
                step_size: step.learning_rate / (1.0 - 0.9f64.powi(t)),
                correction: (1.0 - 0.95f64.powi(t)).sqrt(),
            };
            let (w, m, v) = (weights[i].clone(), first[i].clone(), second[i].clone());
            let [w, m, v] = backend.adamw(&op, w, m, v, &gradients[i], &factor).unwrap();
            assert_near(&format!("step {t}, tensor {i}"), &w, step.weights[i]);
            (weights[i], first[i], second[i]) = (w, m, v);
        }
    }
    assert_near("first moment", &first[0], MOMENTS[0]);
    assert_near("second moment", &second[0], MOMENTS[1]);
}
