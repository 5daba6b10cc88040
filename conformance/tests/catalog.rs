//! Every op of the table by its example: it is what it says, `check` passes on it and fails on one
//! flipped bit, it replays, and the documentation's table is its own.

use std::path::{Path, PathBuf};

use fathom_conformance::case_file::{self, CaseFile};
use fathom_conformance::check::{self, FileReport, Status, Target, Tolerance};
use fathom_conformance::record::{Options, Recording};
use fathom_conformance::{catalog, replay};
use fathom_reference::Tensor;
use fathom_reference::backend::{Backend, Reference};
use fathom_reference::op::{OPS, OpEntry, ReferenceEngine, op_from};
use serde_json::{Value, json};

fn checked(path: &Path) -> FileReport {
    let target = Target { path: path.to_owned(), relative: PathBuf::from("case") };
    check::check(&target, &ReferenceEngine, Tolerance::Bits, None)
}

fn written(folder: &Path, op: &OpEntry) -> (PathBuf, CaseFile) {
    let file = catalog::example(op).unwrap_or_else(|e| panic!("{}: {e}", op.name));
    let path = folder.join(format!("{}.safetensors", op.name));
    case_file::write(&path, &file).unwrap();
    (path, file)
}

#[test]
fn an_example_has_the_roles_and_shapes_that_it_describes() {
    for op in OPS {
        let example = (op.example)();
        let case = example.case();
        assert_eq!(example.op.name(), op.name);
        let described: Vec<&str> = example.inputs.iter().map(|i| i.role).collect();
        let roles: Vec<&str> = op.inputs.iter().map(|r| r.name).collect();
        assert_eq!(described, roles, "{}", op.name);
        let described = example.outputs.iter().map(|(role, shape)| (*role, shape.sizes.clone()));
        let announced = case.infer().unwrap_or_else(|e| panic!("{}: {e}", op.name));
        let announced: Vec<_> = announced.iter().map(|m| (&*m.role, m.shape.clone())).collect();
        assert_eq!(announced, described.collect::<Vec<_>>(), "{}", op.name);
    }
}

#[test]
fn every_example_passes_and_fails_with_one_flipped_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (number, op) in OPS.iter().enumerate() {
        let (path, mut file) = written(folder.path(), op);
        let bytes = std::fs::read(&path).unwrap();
        let report = checked(&path);
        assert_eq!(report.status, Status::Pass, "{}: {:?}", op.name, report.error);
        assert_eq!(report.tensors.len(), op.outputs.len());
        assert!(report.tensors.iter().all(|d| d.elements > 0), "{}", op.name);
        // What is read is what was written.
        let again = case_file::parse(&bytes, &path).unwrap();
        case_file::write(&path, &again).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "{}", op.name);
        for role in op.outputs {
            let good = file.expected[*role].clone();
            let mut bits = good.bytes().to_vec();
            let place = number * 7919 % bits.len();
            bits[place] ^= 1 << (number % 8);
            let bad = Tensor::from_bytes(good.dtype(), good.shape(), &bits);
            file.expected.insert((*role).to_owned(), bad);
            case_file::write(&path, &file).unwrap();
            let report = checked(&path);
            assert_eq!(report.status, Status::Fail, "{} {role}", op.name);
            let differing: Vec<_> = report.tensors.iter().filter(|d| d.mismatches > 0).collect();
            assert_eq!((differing.len(), differing[0].mismatches), (1, 1), "{} {role}", op.name);
            assert_eq!(differing[0].name, format!("out.{role}"));
            file.expected.insert((*role).to_owned(), good);
        }
    }
}

/// Executed on a recorded backend, written by the recorder, replayed.
#[test]
fn every_example_is_recorded_and_replays() {
    let folder = tempfile::tempdir().unwrap();
    let cases = folder.path().join("run");
    let recording =
        Recording::open(&Options { cases: Some(cases.clone()), ..Options::default() }).unwrap();
    let backend = recording.wrap(Reference);
    for op in OPS {
        let case = (op.example)().case();
        let inputs: Vec<_> = case
            .ordered_inputs()
            .unwrap()
            .into_iter()
            .map(|input| input.map(|tensor| backend.upload(tensor).unwrap()))
            .collect();
        backend.execute(&*case.op, inputs).unwrap();
    }
    assert_eq!(recording.finish().unwrap().cases, OPS.len() as u64);
    let targets = replay::cases(&cases).unwrap();
    let reports = targets.iter().filter_map(|t| replay::replay(t, &ReferenceEngine, &[]));
    let ops = replay::by_op(&reports.collect::<Vec<_>>());
    assert!(ops.iter().all(|op| op.pass == 1 && op.cases == 1), "{ops:#?}");
    assert_eq!(ops.len(), OPS.len());
}

/// The table of ops in the book; `FATHOM_BLESS=1` rewrites it.
#[test]
fn the_page_on_case_files_holds_the_table_of_ops() {
    const BEGIN: &str = "<!-- The table of ops; rewritten with FATHOM_BLESS=1 \
                         cargo test -p fathom-conformance --test catalog -->\n";
    const END: &str = "<!-- End of the table of ops -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/case-files.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the page marks where the table begins");
    let (_, after) = rest.split_once(END).expect("the page marks where the table ends");
    let expected = format!("{before}{BEGIN}\n{}\n{END}{after}", catalog::markdown());
    if std::env::var_os("FATHOM_BLESS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(
        page == expected,
        "docs/case-files.md: its table is not that of the ops; run FATHOM_BLESS=1 cargo test \
         -p fathom-conformance --test catalog"
    );
}

#[test]
fn types_and_defaults_are_those_of_the_structs() {
    let entry = |name: &str| {
        catalog::entries().into_iter().find(|e| e.op == name).expect("an op of the table")
    };
    let gemm = entry("gemm_fp8");
    let param = |name: &str| gemm.params.iter().find(|p| p.name == name).unwrap();
    let kind = |name: &str| param(name).kind.as_str();
    assert_eq!(kind("arch"), "sm_90 or sm_100");
    assert_eq!(kind("promotion_interval"), "integer or null");
    assert_eq!(kind("a_tile"), "[integer or null, integer or null]");
    assert_eq!(kind("accumulator.group"), "integer");
    assert_eq!(param("m").default, None);
    assert_eq!(param("promotion_interval").default, Some(Value::Null));
    assert_eq!(param("accumulate").default, Some(json!("overwrite")));
    assert_eq!(param("promote").default, Some(json!("fma")));
    let attention = entry("attention");
    let keys = attention.params.iter().find(|p| p.name == "keys").unwrap();
    assert_eq!((keys.kind.as_str(), &keys.default), ("[integer, ..]", &Some(json!([]))));
    let dtypes = |name: &str| -> Vec<String> {
        entry(name).inputs.iter().map(|t| t.dtype.clone()).collect()
    };
    assert_eq!(dtypes("attention"), ["F32, BF16, F64", "as q", "as q"]);
    assert_eq!(dtypes("all_gather"), ["any"]);
    assert_eq!(dtypes("concat_columns"), ["any", "as a", "as a"]);
    assert_eq!(dtypes("dispatch"), ["any", "I32"]);
    let rope = dtypes("rope");
    assert_eq!((&*rope[1], &*rope[3]), ("F32 with x F32, BF16; F64 with x F64", "I32"));
}

#[test]
fn all_missing_and_unknown_names_are_said_at_once() {
    let says = |op: &str, params: Value, parts: &[&str]| {
        let message = op_from(op, &params).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    };
    let params = json!({"arch": "sm_90", "m": 4, "k": 128, "promoton_interval": 128, "x": 1});
    says(
        "gemm_fp8",
        params,
        &[
            "params of gemm_fp8: missing 'n' (integer), 'a_tile' ([integer or null, ",
            "'b_block' (",
            "'d' (f32 or bf16)",
            "unknown 'promoton_interval' (did you mean 'promotion_interval'?), 'x'",
        ],
    );
    let params = json!({"shape": {"heads": 2, "qk": 2, "vv": 1}, "scale": 1, "segments": []});
    says(
        "attention",
        params,
        &["'shape.kv_heads' (integer), 'shape.v' (integer), 'block_kv'", "'shape.vv' (did you"],
    );
    says("gem", json!({}), &["unknown op 'gem', did you mean 'gemm'?"]);
    says("cast", json!({"out": "F31"}), &["params of cast, at 'out'", "F31"]);
    says("cast", json!([]), &["params of cast"]);
    says(
        "quantize_tile",
        json!({"format": "e4m3", "tile": 1e30, "scale": "f32", "amax_floor": 1}),
        &["tile"],
    );

    let entry = OPS.iter().find(|e| e.name == "gemm_fp8").unwrap();
    let mut case = (entry.example)().case();
    let b = case.inputs.remove("b").unwrap();
    case.inputs.remove("b_scale");
    let message = case.infer().unwrap_err().to_string();
    let expected = "tensors of gemm_fp8: missing 'b' (F8_E4M3 or F8_E5M2, [6, 160]), \
                    'b_scale' (F32, [1, 2])";
    assert_eq!(message, expected);
    // Under wrong names, and an output without its prefix.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.safetensors");
    let d = catalog::example(entry).unwrap().expected["d"].clone();
    case.inputs.extend([("bb".to_owned(), b), ("d".to_owned(), d)]);
    let tensors = case.inputs.iter().map(|(name, t)| (name.clone(), t)).collect();
    let params = case.op.params().to_string();
    let metadata =
        [("op", "gemm_fp8".to_owned()), ("params", params)].map(|(k, v)| (k.to_owned(), v));
    case_file::write_tensors(&path, tensors, &metadata.into()).unwrap();
    let message = case_file::read(&path).unwrap_err().to_string();
    assert!(message.contains("missing 'b' (F8"), "{message}");
    let unknown = "unknown 'bb' (did you mean 'b'?), 'd' (did you mean 'out.d'?)";
    assert!(message.contains(unknown), "{message}");

    // Shapes that nothing fixes stand in words.
    let entry = OPS.iter().find(|e| e.name == "attention").unwrap();
    let mut case = (entry.example)().case();
    case.inputs.clear();
    let message = case.infer().unwrap_err().to_string();
    let words = "'q' (F32 or BF16 or F64, [t, heads * qk]), 'k' (";
    assert!(message.contains(words), "{message}");
}
