//! The decoding form against the training form, and the independence of a token's bits from how
//! many tokens are decoded together.

use fathom_config::ModelConfig;
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::model::{Batch, Model, StepSettings};
use fathom_reference::precision::{Mode, Recipe};
use fathom_trace::Parallel;

#[test]
fn decoding_gives_the_training_form_and_its_bits_do_not_depend_on_the_calls() {
    let config = ModelConfig::preset("small").unwrap();
    let tokens: Vec<u32> = (0..90).map(|i| (i * i * 7 + 3 * i) % 1024).collect();
    for (mode, bound) in [(Mode::Fp32, 1e-5), (Mode::F64, 1e-12)] {
        let backend = Reference;
        let model = Model::new(&config, Recipe::new(mode), Parallel::default(), 0).unwrap();
        let params = model.init(&backend, 3).unwrap();
        let weights = model.weights(&backend, &params).unwrap();
        let batch =
            model.batch(&backend, &Batch::from_sequences(std::slice::from_ref(&tokens))).unwrap();
        let settings = StepSettings { mtp_scales: vec![1.0], ..StepSettings::default() };
        let forward = model.forward(&backend, &weights, &batch, &settings, false).unwrap();
        let mut cache = model.cache();
        let whole = model.decode(&backend, &weights, &mut cache, &tokens).unwrap();
        let floats = |t: &fathom_reference::Tensor| -> Vec<f64> {
            match t.dtype() {
                fathom_trace::DType::F64 => t.as_slice::<f64>().to_vec(),
                _ => t.as_slice::<f32>().iter().map(|&x| x.into()).collect(),
            }
        };
        let close = |a: &fathom_reference::Tensor, b: &fathom_reference::Tensor| {
            let (a, b) = (floats(a), floats(b));
            let norm = |x: Vec<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = norm(a.iter().zip(&b).map(|(a, b)| a - b).collect()) / norm(b);
            assert!(error < bound, "{mode:?}: {error:e}");
        };
        close(&whole, &forward.hidden);
        // One by one, with a rejected draft in between: the same bits.
        let mut single = model.cache();
        let width = config.hidden_size;
        for (i, &token) in tokens.iter().enumerate() {
            if i == 70 {
                model.decode(&backend, &weights, &mut single, &[5, 6]).unwrap();
                single.truncate(&backend, 70).unwrap();
            }
            let row = model.decode(&backend, &weights, &mut single, &[token]).unwrap();
            assert_eq!(floats(&row), floats(&whole)[i * width..(i + 1) * width], "token {i}");
        }
        assert_eq!((single.len(), single.bytes(&backend)), (90, cache.bytes(&backend)));
        let row = backend.shape(&whole)[1];
        assert_eq!(row, width);
        // The MTP module's decoding form on the main model's hidden states.
        let mut drafts = model.draft_cache(0);
        let size = forward.hidden.dtype().size();
        let hidden = fathom_reference::Tensor::from_bytes(
            forward.hidden.dtype(),
            &[89, width],
            &forward.hidden.bytes()[..89 * width * size],
        );
        let input = (&hidden, &tokens[1..]);
        let drafted = model.draft(&backend, &weights, 0, &mut drafts, input).unwrap();
        close(&drafted, &forward.mtp[0].0);
    }
}
