//! The trace files: round trip, refusals, and the published JSON schemas.

use std::collections::BTreeMap;
use std::path::Path;

use fathom_trace::{
    Component, DType, Group, GroupKind, KernelRecord, OpClass, OpRecord, Phase, TensorMeta, jsonl,
};

fn op() -> OpRecord {
    OpRecord {
        seq: 3,
        step: 0,
        rank: 7,
        op: "gemm_fp8".to_owned(),
        class: OpClass::Gemm,
        params: BTreeMap::from([("promotion".to_owned(), serde_json::json!(128))]),
        inputs: vec![TensorMeta { role: "a".into(), dtype: DType::F8E4M3, shape: vec![64, 128] }],
        outputs: vec![TensorMeta { role: "d".into(), dtype: DType::F32, shape: vec![64, 8] }],
        flops: 2 * 64 * 8 * 128,
        bytes_read: 64 * 128,
        bytes_written: 64 * 8 * 4,
        bytes_sent: 0,
        group: Some(Group { kind: GroupKind::Ep, size: 64 }),
        layer: Some(3),
        component: Component::Mlp,
        phase: Phase::F,
        micro_batch: Some(0),
    }
}

fn write<R: jsonl::Record>(records: &[R]) -> Vec<u8> {
    let mut writer = jsonl::Writer::new(Vec::new()).unwrap();
    records.iter().for_each(|r| writer.write(r).unwrap());
    writer.finish().unwrap()
}

#[test]
fn what_is_written_is_read() {
    let ops = vec![op(), OpRecord { group: None, layer: None, micro_batch: None, ..op() }];
    let text = write(&ops);
    assert_eq!(jsonl::read::<OpRecord>(&text[..], Path::new("t")).unwrap(), ops);

    let kernels = vec![KernelRecord { kernel: "k".into(), grid: [2, 1, 1], ..Default::default() }];
    let text = write(&kernels);
    assert_eq!(jsonl::read::<KernelRecord>(&text[..], Path::new("t")).unwrap(), kernels);
}

#[test]
fn other_kinds_versions_and_fields_are_refused_with_their_line() {
    let error =
        |text: &str| jsonl::read::<OpRecord>(text.as_bytes(), Path::new("t.jsonl")).unwrap_err();
    assert!(error("").to_string().starts_with("t.jsonl:1: expected the header"));
    let kernel = error("{\"fathom_trace\":\"kernel\",\"version\":1}\n");
    assert!(kernel.to_string().contains("found {\"fathom_trace\":\"kernel\""), "{kernel}");
    for version in [1, 3] {
        let other = error(&format!("{{\"fathom_trace\":\"op\",\"version\":{version}}}\n"));
        let (found, expected) = (format!("\"version\":{version}"), "\"version\":2");
        let message = other.to_string();
        assert!(message.starts_with("t.jsonl:1: expected"), "{message}");
        assert!(message.contains(&found) && message.contains(expected), "{message}");
    }

    let good = String::from_utf8(write(&[op()])).unwrap();
    let bad = good.replace("\"flops\"", "\"flop\"");
    let message = error(&bad).to_string();
    assert!(message.starts_with("t.jsonl:2:") && message.contains("flop"), "{message}");
}

/// `schema/*.json` are derived from the types. To renew them after a change:
/// `FATHOM_RENEW=1 cargo test -p fathom-trace`.
#[test]
fn published_schemas_are_those_of_the_types() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
    for (name, schema) in [
        ("op_record.schema.json", schemars::schema_for!(OpRecord)),
        ("kernel_record.schema.json", schemars::schema_for!(KernelRecord)),
    ] {
        let derived = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        let path = folder.join(name);
        if std::env::var_os("FATHOM_RENEW").is_some() {
            std::fs::write(&path, &derived).unwrap();
        }
        let published = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(published == derived, "{name} is not the schema of its type; renew it");
    }
}
