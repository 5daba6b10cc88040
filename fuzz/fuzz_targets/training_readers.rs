//! No file makes the readers of training panic: run.toml, text and JSON Lines, tokenizer.json, an
//! architecture's config.json, safetensors. What reads is used: tokenised, packed, written again.
#![no_main]

use std::path::Path;

use fathom_reference::checkpoint::tensors::TensorsFile;
use fathom_config::ModelConfig;
use fathom_reference::data::{DataConfig, Format, Loader, SourceConfig, Tokenizer};
use fathom_reference::train::TrainConfig;
use libfuzzer_sys::fuzz_target;

fn load(format: Format, file: &Path) {
    let mut config = DataConfig {
        sources: vec![SourceConfig::new(format, Some(file.to_owned()))],
        ..DataConfig::default()
    };
    config.tokenizer.vocab_size = 300;
    let Ok(mut loader) = Loader::open(&config, 16, 1) else { return };
    for _ in 0..4 {
        let _ = loader.next();
    }
}

fuzz_target!(|data: (u8, &[u8])| {
    let (reader, bytes) = data;
    let file = std::env::temp_dir().join(format!("fathom-fuzz-{}", std::process::id()));
    std::fs::write(&file, bytes).expect("a writable temporary folder");
    match reader % 6 {
        0 => load(Format::Text, &file),
        1 => load(Format::Jsonl, &file),
        2 => {
            if let Ok(tokenizer) = Tokenizer::from_json(bytes, &file)
                && let Ok(ids) = tokenizer.encode("The quick brown fox, 1234 — 汉字\n")
            {
                tokenizer.decode(&ids);
            }
        }
        3 => {
            if let Ok(config) = TrainConfig::read(&file, &[]) {
                // A file may be named beside this one, so only what was resolved is read again.
                std::fs::write(&file, config.to_toml()).expect("a writable temporary folder");
                assert_eq!(TrainConfig::read(&file, &[]).expect("what was written reads"), config);
            }
        }
        4 => drop(ModelConfig::from_hf_file(&file)),
        _ => {
            if let Ok(file) = TensorsFile::open(&file) {
                file.entries.keys().for_each(|name| drop(file.tensor(name)));
            }
        }
    }
});
