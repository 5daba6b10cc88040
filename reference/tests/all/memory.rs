//! What a step keeps, measured on the reference backend, against what is predicted without
//! computing.

use fathom_config::ModelConfig;
use fathom_reference::backend::Reference;
use fathom_reference::memory;
use fathom_reference::model::Batch;
use fathom_reference::precision::Mode;

fn config() -> ModelConfig {
    let mut config = ModelConfig::preset("small").unwrap();
    (config.layers, config.vocab_size, config.hidden_size) = (2, 96, 64);
    config
}

#[test]
fn every_policy_keeps_what_is_predicted_and_its_peak_is_the_predicted_one() {
    for mode in Mode::ALL {
        let mut kept = Vec::new();
        for (name, recipe) in memory::policies(mode) {
            let predicted = memory::predict(&config(), &recipe, 2, 24).unwrap();
            let sequence: Vec<u32> = (0..24).map(|i| i * 5 % 96).collect();
            let batch = Batch::from_sequences(&[sequence.clone(), sequence]);
            let measured = memory::measure(&config(), &recipe, Reference, &batch).unwrap();
            assert_eq!(measured, predicted, "{mode:?}, {name}");
            println!("{} {name}: kept {} peak {}", mode.name(), measured.kept, measured.peak);
            kept.push(measured.kept);
        }
        let (everything, nothing) = (kept[1], kept[2]);
        assert!(nothing < everything * 3 / 4, "{mode:?}: {kept:?}");
        // Each choice alone saves something, and less than all of them.
        assert!(kept[3..].iter().all(|&k| nothing < k && k < everything), "{mode:?}: {kept:?}");
    }
}

#[test]
fn kept_activations_grow_with_the_micro_batch() {
    let recipe = fathom_reference::precision::Recipe::new(Mode::Fp8);
    let of = |sequences| memory::predict(&config(), &recipe, sequences, 128).unwrap().kept;
    let (one, two, three) = (of(1), of(2), of(3));
    assert_eq!(three - two, two - one);
    // The tables of the positions are common.
    assert!(two > one * 19 / 10 && two < 2 * one);
}
