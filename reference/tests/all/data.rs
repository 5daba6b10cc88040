//! Loading data: formats and their errors, packing, masks, fill-in-the-middle, positions.

use std::path::{Path, PathBuf};

use fathom_reference::data::{
    DataConfig, DataError, Format, Loader, SourceConfig, Split, TokenizerConfig,
};
use fathom_reference::model::Batch;
use proptest::prelude::*;

/// A folder with files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    folder
}

/// Settings of these sources with a small vocabulary, plain: no shuffling, no rearranging.
fn plain(sources: Vec<SourceConfig>) -> DataConfig {
    DataConfig {
        sources,
        tokenizer: TokenizerConfig { vocab_size: 300, ..TokenizerConfig::default() },
        shuffle: false,
        fim_rate: 0.0,
        split_rate: 0.0,
        ..DataConfig::default()
    }
}

fn source(format: Format, path: &Path) -> SourceConfig {
    SourceConfig::new(format, Some(path.to_owned()))
}

fn batches(loader: &mut Loader, n: usize) -> Vec<Batch> {
    (0..n).map(|_| loader.next().unwrap()).collect()
}

#[test]
fn the_default_is_the_built_in_corpus() {
    let mut loader = Loader::open(&DataConfig::default(), 256, 1).unwrap();
    assert_eq!(loader.vocab_size(), 1024);
    assert_eq!(loader.tokenizer().eos(), 0);
    let batch = loader.next().unwrap();
    assert_eq!((batch.tokens.len(), batch.targets.len()), (256, 256));
    assert_eq!(batch.segments, [256]);
    let text = loader.tokenizer().decode(&batch.tokens);
    assert!(text.len() > 400, "{text}");
    // The same call gives the same tokenizer, data and sequences.
    let mut again = Loader::open(&DataConfig::default(), 256, 1).unwrap();
    assert_eq!(again.tokenizer().json(), loader.tokenizer().json());
    assert_eq!(again.digest(), loader.digest());
    assert_eq!(again.next().unwrap(), batch);
    assert_ne!(Loader::open(&DataConfig::default(), 256, 2).unwrap().next().unwrap(), batch);
}

/// Without masks, sequences are the documents, each with its end, one after the other.
#[test]
fn joined_sequences_spell_the_documents() {
    let files: [(&str, &[u8]); 3] = [
        ("a.txt", b"first document\n"),
        ("b/c.txt", b"second"),
        ("d.txt", "dr\u{ef}tte\n".as_bytes()),
    ];
    let folder = folder(&files);
    let config = plain(vec![source(Format::Text, folder.path())]);
    let mut loader = Loader::open(&config, 7, 1).unwrap();
    let all = batches(&mut loader, 30);
    let tokens: Vec<u32> = all.iter().flat_map(|b| b.tokens.clone()).collect();
    let targets: Vec<i32> = all.iter().flat_map(|b| b.targets.clone()).collect();
    let next: Vec<i32> = tokens[1..].iter().map(|&t| t as i32).collect();
    assert_eq!(targets[..targets.len() - 1], next);
    let texts: Vec<String> =
        tokens.split(|&t| t == 0).map(|ids| loader.tokenizer().decode(ids)).collect();
    assert_eq!(texts[..4], ["first document\n", "second", "dr\u{ef}tte\n", "first document\n"]);
}

#[test]
fn masked_sequences_keep_documents_apart() {
    let lines = b"{\"p\": \"ask\", \"r\": \"answer\"}\n\n{\"p\": \"why?\", \"r\": \"so\"}\n";
    let folder = folder(&[("x.jsonl", lines)]);
    let mut source = source(Format::Jsonl, folder.path());
    source.prompt_response = Some(["p".into(), "r".into()]);
    let mut config = plain(vec![source]);
    config.mask_documents = true;
    // Without merges a byte is a token: 3 + 6 + 1 and 4 + 2 + 1 tokens.
    config.tokenizer.vocab_size = 260;
    let mut loader = Loader::open(&config, 12, 1).unwrap();
    let [a, b, c] = [(); 3].map(|()| loader.next().unwrap());
    assert_eq!(
        (a.segments, b.segments, &c),
        (vec![10, 2], vec![7, 5], &{
            let mut again = Loader::open(&config, 12, 1).unwrap();
            again.next().unwrap()
        })
    );
    let text = |tokens: &[i32]| {
        let ids: Vec<u32> = tokens.iter().filter(|&&t| t >= 0).map(|&t| t as u32).collect();
        loader.tokenizer().decode(&ids)
    };
    assert_eq!(a.targets[..2], [-1, -1]);
    assert_eq!(text(&a.targets), "answer");
    assert_eq!((a.targets[8], a.tokens[9], &a.targets[9..]), (0, 0, &[-1, -1, -1][..]));
    assert_eq!(a.tokens[10..], [0, 0]);
    assert_eq!(text(&b.targets), "so");
    // Longer than a sequence: cut, each piece a segment of its own, nothing lost.
    let mut short = Loader::open(&config, 4, 1).unwrap();
    let all = batches(&mut short, 5);
    let segments: Vec<_> = all.iter().map(|b| b.segments.clone()).collect();
    assert_eq!(segments, [vec![4], vec![4], vec![2, 2], vec![4], vec![1, 3]]);
    let targets: Vec<i32> = all.iter().flat_map(|b| b.targets.clone()).collect();
    assert_eq!(text(&targets), "answersoa");
}

/// Settings that use everything, over two sources.
fn everything(folder: &Path, mask: bool) -> DataConfig {
    let mut text = source(Format::Text, &folder.join("text"));
    text.split = Split::Paragraph;
    let mut pairs = source(Format::Jsonl, &folder.join("pairs.jsonl"));
    pairs.prompt_response = Some(["p".into(), "r".into()]);
    pairs.weight = 0.5;
    let mut config = plain(vec![text, pairs]);
    (config.shuffle, config.fim_rate, config.split_rate) = (true, 0.5, 0.5);
    config.mask_documents = mask;
    config
}

fn everything_folder() -> tempfile::TempDir {
    let text: String = (0..40).map(|i| format!("Paragraph {i}; ends.\n{{\n}}\n\n")).collect();
    let pairs: String =
        (0..9).map(|i| format!("{{\"p\":\"q{i}\",\"r\":\"a {i}.\\n\"}}\n")).collect();
    folder(&[("text/a", text.as_bytes()), ("pairs.jsonl", pairs.as_bytes())])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    /// A restored position gives the sequences that followed it, at every place.
    #[test]
    fn a_restored_position_continues_to_the_bit(
        mask: bool,
        seq_len in 1usize..70,
        seed: u64,
    ) {
        let folder = everything_folder();
        let config = everything(folder.path(), mask);
        let mut loader = Loader::open(&config, seq_len, seed).unwrap();
        let mut states = Vec::new();
        let mut all = Vec::new();
        for _ in 0..24 {
            states.push(loader.state());
            all.push(loader.next().unwrap());
        }
        let mut other = Loader::open(&config, seq_len, seed).unwrap();
        for (k, state) in states.iter().enumerate().rev() {
            let text = serde_json::to_string(state).unwrap();
            other.restore(&serde_json::from_str(&text).unwrap()).unwrap();
            prop_assert_eq!(&other.state(), state);
            for batch in &all[k..(k + 3).min(all.len())] {
                prop_assert_eq!(&other.next().unwrap(), batch);
            }
        }
        for batch in &all {
            prop_assert_eq!(batch.tokens.len(), seq_len);
            prop_assert_eq!(batch.targets.len(), seq_len);
            prop_assert_eq!(batch.segments.iter().sum::<usize>(), seq_len);
        }
    }
}

/// Each epoch has every document once; sources share the tokens by weight.
#[test]
fn epochs_are_permutations_and_weights_are_shares() {
    let folder = everything_folder();
    let mut config = everything(folder.path(), false);
    (config.fim_rate, config.split_rate) = (0.0, 0.0);
    let mut loader = Loader::open(&config, 64, 5).unwrap();
    assert_eq!(loader.documents(), [40, 9]);
    let tokens: Vec<u32> = batches(&mut loader, 60).iter().flat_map(|b| b.tokens.clone()).collect();
    let texts: Vec<String> =
        tokens.split(|&t| t == 0).map(|ids| loader.tokenizer().decode(ids)).collect();
    let paragraphs: Vec<&String> = texts.iter().filter(|t| t.starts_with("Para")).collect();
    assert!(paragraphs.len() > 90, "{}", paragraphs.len());
    for epoch in paragraphs.chunks_exact(40) {
        let mut epoch = epoch.to_vec();
        epoch.sort();
        epoch.dedup();
        assert_eq!(epoch.len(), 40);
    }
    assert_ne!(paragraphs[..40], paragraphs[40..80]);
    let [text, pairs] = [0, 1].map(|i| loader.state().sources[i].tokens as f64);
    // Within a document of the weights' ratio.
    assert!((text - 2.0 * pairs).abs() < 64.0, "{text} {pairs}");
}

#[test]
fn fill_in_the_middle_rearranges_a_share_of_the_documents() {
    let documents: String = (0..2000).map(|i| format!("doc \u{e9}\u{4e2d} number {i}\n")).collect();
    let folder = folder(&[("x", documents.as_bytes())]);
    let mut text = source(Format::Text, folder.path());
    text.split = Split::Line;
    let mut config = plain(vec![text]);
    config.fim_rate = 0.1;
    let mut loader = Loader::open(&config, 1000, 3).unwrap();
    let mut tokens: Vec<u32> = Vec::new();
    while loader.state().sources[0].epoch == 0 {
        tokens.extend(loader.next().unwrap().tokens);
    }
    let (mut seen, mut rearranged) = (0, 0);
    for (i, ids) in tokens.split(|&t| t == 0).take(2000).enumerate() {
        let whole = format!("doc \u{e9}\u{4e2d} number {i}\n");
        seen += 1;
        if ids[0] != 1 {
            assert_eq!(loader.tokenizer().decode(ids), whole);
            continue;
        }
        rearranged += 1;
        let parts: Vec<String> =
            ids[1..].split(|t| *t == 2 || *t == 3).map(|p| loader.tokenizer().decode(p)).collect();
        let [prefix, suffix, middle] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(format!("{prefix}{middle}{suffix}"), whole);
    }
    // Five standard errors of 2000 draws at 0.1.
    assert!(seen == 2000 && (133..=267).contains(&rearranged), "{rearranged} of {seen}");
}

#[test]
fn a_state_of_other_data_is_refused() {
    let folder = everything_folder();
    let config = everything(folder.path(), false);
    let state = Loader::open(&config, 64, 5).unwrap().state();
    let refused = |config: &DataConfig, seq_len, seed, what: &str| {
        let error = Loader::open(config, seq_len, seed).unwrap().restore(&state).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    };
    refused(&config, 64, 6, "expected seed 6, found 5");
    refused(&config, 32, 5, "expected sequence length 32, found 64");
    let mut other = config.clone();
    other.sources.pop();
    refused(&other, 64, 5, "expected data");
    let mut other = config.clone();
    other.tokenizer.vocab_size = 264;
    refused(&other, 64, 5, "expected tokenizer");
    let mut beyond = state.clone();
    beyond.sources[0].position = 40;
    let mut loader = Loader::open(&config, 64, 5).unwrap();
    assert!(loader.restore(&beyond).is_err());
    beyond = state.clone();
    beyond.offset = 1 << 20;
    assert!(loader.restore(&beyond).is_err());
    loader.restore(&state).unwrap();
}

#[test]
fn bad_input_is_named() {
    let folder = folder(&[
        ("latin.txt", b"fine\nfine\ncaf\xe9 au lait\n"),
        ("cut.txt", b"caf\xc3"),
        ("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": \n"),
        ("field.jsonl", b"{\"text\": \"a\"}\n\n{\"body\": \"b\", \"id\": 1}\n"),
        ("kind.jsonl", b"{\"text\": 3}\n"),
        ("list.jsonl", b"[1]\n"),
        ("bytes.jsonl", b"{\"text\": \"\xff\"}\n"),
        ("empty.txt", b""),
    ]);
    let at = |name: &str| folder.path().join(name);
    let error = |source: SourceConfig| Loader::open(&plain(vec![source]), 8, 1).unwrap_err();
    for (name, wants) in [
        ("latin.txt", "line 3: expected UTF-8 text, found byte 0xe9 at offset 13"),
        ("cut.txt", "line 1: expected UTF-8 text, found byte 0xc3 at offset 3"),
        ("broken.jsonl", "line 2: expected a JSON object, found broken JSON: EOF"),
        ("field.jsonl", "line 3: expected a field 'text', found fields body, id"),
        ("kind.jsonl", "line 1: expected a string in field 'text', found a number"),
        ("list.jsonl", "line 1: expected a JSON object, found a list"),
        ("bytes.jsonl", "line 1: expected a JSON object, found broken JSON"),
        ("empty.txt", "expected at least one document that is not empty, found none"),
        ("missing.txt", "No such file"),
    ] {
        let jsonl = name.ends_with("jsonl");
        let format = if jsonl { Format::Jsonl } else { Format::Text };
        let error = error(source(format, &at(name))).to_string();
        assert!(error.contains(wants) && error.contains(name), "{name}: {error}");
    }
    let mut weight = source(Format::Text, &at("latin.txt"));
    weight.weight = 0.0;
    let message = error(weight).to_string();
    assert!(message.contains("sources[0].weight: expected above 0, found 0"), "{message}");
    let mut bare = SourceConfig::new(Format::Text, None);
    bare.weight = 1.0;
    assert!(error(bare).to_string().contains("sources[0].path: expected a file or folder"));
    let unknown: Result<DataConfig, _> = toml::from_str("shuffel = true");
    assert!(unknown.unwrap_err().to_string().contains("shuffel"));
    let config: DataConfig = toml::from_str(
        "mask_documents = true\n[[sources]]\nformat = \"jsonl\"\npath = \"x\"\n\
         prompt_response = [\"p\", \"r\"]",
    )
    .unwrap();
    assert_eq!(config.sources[0].prompt_response, Some(["p".into(), "r".into()]));
}

/// A file that changed after it was indexed is an error, not other text.
#[test]
fn a_file_that_changed_is_an_error() {
    let folder = folder(&[("x.txt", b"some text that is long enough\n")]);
    let config = plain(vec![source(Format::Text, folder.path())]);
    let mut loader = Loader::open(&config, 8, 1).unwrap();
    std::fs::write(folder.path().join("x.txt"), "short").unwrap();
    let error = (0..9).find_map(|_| loader.next().err()).expect("an error");
    assert!(matches!(error, DataError::Io { .. }), "{error}");
    assert!(loader.next().is_err());
    std::fs::write(folder.path().join("x.txt"), "some text that is long enough\n").unwrap();
    loader.next().unwrap();
}

/// Whatever the bytes and the limits, the documents of a text file spell the file.
fn split_file(content: &[u8], split: Split, max: usize) -> Result<Vec<String>, DataError> {
    let folder = folder(&[("x", content)]);
    let mut text = source(Format::Text, folder.path());
    (text.split, text.max_document_bytes) = (split, max);
    let mut config = plain(vec![text]);
    config.duplicates.exact = false;
    let mut loader = Loader::open(&config, 16, 1)?;
    let mut tokens = Vec::new();
    while loader.state().sources[0].epoch == 0 {
        tokens.extend(loader.next()?.tokens);
    }
    let count = loader.documents()[0] as usize;
    Ok(tokens.split(|&t| t == 0).take(count).map(|d| loader.tokenizer().decode(d)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn documents_spell_their_file(
        lines in prop::collection::vec("[a-c \u{e9}\u{1f600}]{0,12}", 1..12),
        split in prop::sample::select(vec![Split::File, Split::Paragraph, Split::Line]),
        max in 4usize..40,
    ) {
        let text = lines.join("\n") + ".";
        let documents = split_file(text.as_bytes(), split, max).unwrap();
        prop_assert_eq!(documents.concat(), text);
        prop_assert!(documents.iter().all(|d| d.len() <= max), "{:?}", documents);
    }

    /// Any bytes: an error that names the file, or documents; never a panic.
    #[test]
    fn any_bytes_are_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        json: bool,
        ascii: bool,
    ) {
        if ascii {
            bytes.iter_mut().for_each(|b| *b &= 0x7f);
        }
        if json {
            bytes.splice(0..0, *b"{\"text\": \"a\"}\n{\"text\": \"");
        }
        let folder = folder(&[("x", &bytes)]);
        let format = if json { Format::Jsonl } else { Format::Text };
        let mut config = plain(vec![source(format, &folder.path().join("x"))]);
        config.tokenizer.vocab_size = 260;
        match Loader::open(&config, 8, 1) {
            Ok(mut loader) => prop_assert_eq!(loader.next().unwrap().tokens.len(), 8),
            Err(e) => prop_assert!(e.to_string().contains('x'), "{}", e),
        }
    }
}

#[test]
fn near_duplicates_are_dropped_across_sources() {
    let long: String = (0..300).map(|i| format!("word{i} ")).collect();
    let json = serde_json::json!({ "text": long.replace("word7 ", "other ") }).to_string();
    let folder = folder(&[("a.txt", long.as_bytes()), ("b.jsonl", json.as_bytes())]);
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let mut config =
        plain(vec![source(Format::Text, &path("a.txt")), source(Format::Jsonl, &path("b.jsonl"))]);
    Loader::open(&config, 8, 1).unwrap();
    config.duplicates.near = true;
    let error = Loader::open(&config, 8, 1).unwrap_err().to_string();
    assert!(error.contains("b.jsonl") && error.contains("duplicates of earlier ones"), "{error}");
}

#[cfg(feature = "parquet")]
mod parquet_files {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A file with columns `id` and `text`, one list of texts a row group.
    fn write(path: &Path, groups: &[Vec<String>]) {
        let schema = "message m { required binary id (UTF8); optional binary text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().build());
        let file = std::fs::File::create(path).unwrap();
        let mut file = SerializedFileWriter::new(file, schema, properties).unwrap();
        for texts in groups {
            let mut group = file.next_row_group().unwrap();
            let values: Vec<ByteArray> = texts.iter().map(|t| t.as_str().into()).collect();
            for levels in [None, Some(vec![1; texts.len()])] {
                let mut column = group.next_column().unwrap().unwrap();
                let writer = column.typed::<ByteArrayType>();
                writer.write_batch(&values, levels.as_deref(), None).unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        file.close().unwrap();
    }

    #[test]
    fn every_row_of_every_row_group_once_an_epoch_and_positions_restore() {
        let folder = folder(&[]);
        let text = |g: usize, r: usize| format!("group {g} row {r}");
        let groups: Vec<Vec<String>> = [5, 1, 9]
            .iter()
            .enumerate()
            .map(|(g, &n)| (0..n).map(|r| text(g, r)).collect())
            .collect();
        write(&folder.path().join("a.parquet"), &groups);
        let mut config = plain(vec![source(Format::Parquet, folder.path())]);
        config.shuffle = true;
        let mut loader = Loader::open(&config, 16, 3).unwrap();
        assert_eq!(loader.documents(), [15]);
        let (mut tokens, mut states) = (Vec::new(), Vec::new());
        while loader.state().sources[0].epoch < 2 {
            states.push(loader.state());
            tokens.push(loader.next().unwrap());
        }
        let all: Vec<u32> = tokens.iter().flat_map(|b| b.tokens.clone()).collect();
        let texts: Vec<String> =
            all.split(|&t| t == 0).map(|ids| loader.tokenizer().decode(ids)).collect();
        let mut want = groups.concat();
        want.sort();
        for epoch in texts[..30].chunks(15) {
            let mut epoch = epoch.to_vec();
            // Rows of a group stay together, so that one group is held at a time.
            let changes = epoch.windows(2).filter(|w| w[0][..7] != w[1][..7]).count();
            assert_eq!(changes, 2);
            epoch.sort();
            assert_eq!(epoch, want);
        }
        for (state, batch) in states.iter().zip(&tokens).rev() {
            loader.restore(state).unwrap();
            assert_eq!(&loader.next().unwrap(), batch);
        }
    }

    #[test]
    fn bad_parquet_is_named() {
        let folder = folder(&[("broken.parquet", b"PAR1 and no more")]);
        let path = folder.path().join("good.parquet");
        write(&path, &[vec!["a".into()]]);
        let error = |source| Loader::open(&plain(vec![source]), 8, 1).unwrap_err().to_string();
        let mut other = source(Format::Parquet, &path);
        other.text_field = "body".into();
        let message = error(other);
        assert!(message.contains("expected a column 'body', found columns id, text"), "{message}");
        let message = error(source(Format::Parquet, &folder.path().join("broken.parquet")));
        assert!(message.contains("broken.parquet, the footer: expected a Parquet"), "{message}");
    }
}

#[cfg(not(feature = "parquet"))]
#[test]
fn parquet_needs_its_feature() {
    let folder = folder(&[("x.parquet", b"PAR1")]);
    let error = Loader::open(&plain(vec![source(Format::Parquet, folder.path())]), 8, 1);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("cargo feature parquet"), "{error}");
}
