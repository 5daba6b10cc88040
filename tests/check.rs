//! `fathom check` as a user runs it: every shared case passes, a flipped bit fails at its place.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn fathom(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fathom")).args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("{e} in {}", String::from_utf8_lossy(&output.stdout));
    })
}

/// Our own small cases, so that a stranger's clone tests itself.
fn own_cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/tests/cases")
}

fn all_cases() -> Vec<PathBuf> {
    let shared = fathom_trace::shared::dir().map(|d| d.join("cases"));
    [Some(own_cases()), shared].into_iter().flatten().collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[test]
fn every_case_agrees_in_every_bit() {
    for folder in all_cases() {
        let output = fathom(&["check", text(&folder), "--json"]);
        let report = json(&output);
        for file in report["files"].as_array().unwrap() {
            assert_eq!(file["status"], "pass", "{file:#}");
        }
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(report["files"].as_array().unwrap().len(), files_below(&folder).len());
    }
}

/// One bit of one expected output flipped, in every file: exit 1, and the right coordinates.
#[test]
fn a_flipped_bit_fails_with_its_coordinates() {
    let scratch = tempfile::tempdir().unwrap();
    for (number, path) in all_cases().iter().flat_map(|f| files_below(f)).enumerate() {
        let mut bytes = std::fs::read(&path).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let outputs: Vec<_> =
            header.as_object().unwrap().iter().filter(|(k, _)| k.starts_with("out.")).collect();
        let (name, tensor) = outputs[number % outputs.len()];
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        let offsets: [usize; 2] = serde_json::from_value(tensor["data_offsets"].clone()).unwrap();
        let elements: usize = shape.iter().product();
        let element = number * 7919 % elements;
        let size = (offsets[1] - offsets[0]) / elements;
        let byte = 8 + len + offsets[0] + element * size + number % size;
        bytes[byte] ^= 1 << (number % 8);

        let flipped = scratch.path().join("flipped.safetensors");
        std::fs::write(&flipped, bytes).unwrap();
        let output = fathom(&["check", text(&flipped), "--json"]);
        assert_eq!(output.status.code(), Some(1), "{}", path.display());
        let report = json(&output);
        let tensors = report["files"][0]["tensors"].as_array().unwrap();
        let found = tensors.iter().find(|t| t["name"] == **name).unwrap();
        assert_eq!(found["mismatches"], 1, "{}", path.display());
        let mut index = element;
        let mut expected = vec![0; shape.len()];
        for (i, size) in expected.iter_mut().zip(&shape).rev() {
            (*i, index) = (index % size, index / size);
        }
        assert_eq!(found["first"]["index"], serde_json::json!(expected), "{}", path.display());
        let hex = |key: &str| {
            u64::from_str_radix(&found["first"][key].as_str().unwrap()[2..], 16).unwrap()
        };
        assert_eq!((hex("file") ^ hex("contract")).count_ones(), 1);
        // The keys of version 0.1, kept for one version.
        assert_eq!((hex("expected"), hex("got")), (hex("file"), hex("contract")));
        assert!(tensors.iter().all(|t| t["name"] == **name || t["mismatches"] == 0));
    }
}

#[test]
fn outputs_are_saved_where_the_file_was_found() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let output = fathom(&["check", text(&own_cases()), "--save-outputs", text(&out)]);
    assert_eq!(output.status.code(), Some(0));
    let relative = |folder: &Path| -> Vec<PathBuf> {
        files_below(folder).iter().map(|p| p.strip_prefix(folder).unwrap().to_owned()).collect()
    };
    assert_eq!(relative(&out), relative(&own_cases()));

    // A file argument is saved under its name, and what was saved is what the file expects.
    let one = files_below(&own_cases()).remove(0);
    let output = fathom(&["check", text(&one), "--save-outputs", text(scratch.path())]);
    assert_eq!(output.status.code(), Some(0));
    let saved = std::fs::read(scratch.path().join(one.file_name().unwrap())).unwrap();
    let saved = safetensors::SafeTensors::deserialize(&saved).unwrap();
    let original = std::fs::read(&one).unwrap();
    let original = safetensors::SafeTensors::deserialize(&original).unwrap();
    assert!(!saved.is_empty());
    for (name, tensor) in saved.tensors() {
        assert_eq!(tensor.data(), original.tensor(&name).unwrap().data(), "{name}");
    }
}

#[test]
fn bad_input_exits_with_2_and_says_where() {
    let scratch = tempfile::tempdir().unwrap();
    let bad = scratch.path().join("bad.safetensors");
    std::fs::write(&bad, b"not a case").unwrap();
    let output = fathom(&["check", text(&bad), text(&own_cases()), "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let report = json(&output);
    assert_eq!(report["files"][0]["status"], "error");
    assert_eq!(report["files"][1]["status"], "pass", "one bad file does not hide the others");
    assert!(String::from_utf8_lossy(&output.stderr).contains("bad.safetensors"));

    for args in [
        &["check", "/no/such/path"][..],
        &["check"],
        &["check", text(scratch.path()), "--tolerance", "ulps=3"],
    ] {
        assert_eq!(fathom(args).status.code(), Some(2), "{args:?}");
    }
    let empty = tempfile::tempdir().unwrap();
    let output = fathom(&["check", text(empty.path())]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("found none in this folder"));
}

#[test]
fn a_tolerance_accepts_no_more_than_it_says() {
    let path = files_below(&own_cases()).into_iter().find(|p| text(p).contains("mma")).unwrap();
    let mut bytes = std::fs::read(path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let start = header["out.d"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + len + start] ^= 2; // two units in the last place
    let scratch = tempfile::tempdir().unwrap();
    let flipped = scratch.path().join("flipped.safetensors");
    std::fs::write(&flipped, bytes).unwrap();
    for (tolerance, code) in [("ulp=1", 1), ("ulp=2", 0), ("rel=1e-3", 0), ("rel=1e-12", 1)] {
        let output = fathom(&["check", text(&flipped), "--tolerance", tolerance]);
        assert_eq!(output.status.code(), Some(code), "{tolerance}");
    }
    // A NaN for a number is within no tolerance, not even the largest that can be written.
    let changed = scratch.path().join("nan.safetensors");
    edited(&flipped, &changed, |_, bytes| bytes[start..start + 4].fill(0xFF));
    for tolerance in ["ulp=18446744073709551615", "rel=1e300"] {
        let output = fathom(&["check", text(&changed), "--tolerance", tolerance]);
        assert_eq!(output.status.code(), Some(1), "{tolerance}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(" NaN "), "{tolerance}");
    }
}

/// A copy of a case file with another header and other data.
fn edited(from: &Path, to: &Path, edit: impl Fn(&mut Value, &mut Vec<u8>)) {
    let bytes = std::fs::read(from).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let mut data = bytes[8 + len..].to_vec();
    edit(&mut header, &mut data);
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    std::fs::write(to, [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat())
        .unwrap();
}

/// Written by `fathom case example`.
fn example(op: &str, folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let output = fathom(&["case", "example", op, "--out", text(&path)]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    path
}

/// Four files - one that passes, one that differs, one without outputs, one that is none - as
/// continuous integration reads them; their names hold what XML and GitHub escape.
#[test]
fn continuous_integration_gets_junit_and_annotations() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("cases");
    std::fs::create_dir(&folder).unwrap();
    let good = example("swiglu", &folder, "a pass.safetensors");
    let differs = folder.join("b<&\">%,:\u{1}.safetensors");
    edited(&good, &differs, |_, data| *data.last_mut().unwrap() ^= 1);
    edited(&good, &folder.join("c.safetensors"), |header, data| {
        // Of the two-byte tensors the output stands first, the input fills its place.
        let y = header.as_object_mut().unwrap().remove("out.y").unwrap();
        let at = |i: usize| y["data_offsets"][i].as_u64().unwrap() as usize;
        assert_eq!(at(0), 12, "behind the weights");
        data.drain(at(0)..at(1));
        header["x"]["data_offsets"] = serde_json::json!([12, data.len()]);
    });
    std::fs::write(folder.join("d.safetensors"), "none").unwrap();
    let junit = scratch.path().join("junit.xml");
    let args = ["check", text(&folder), "--json", "--github", "--junit", text(&junit)];
    let output = fathom(&args);
    assert_eq!(output.status.code(), Some(2));
    let statuses: Vec<Value> =
        json(&output)["files"].as_array().unwrap().iter().map(|f| f["status"].clone()).collect();
    assert_eq!(statuses, ["pass", "fail", "computed", "error"]);

    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let annotations: Vec<&str> = stderr.lines().filter(|l| l.starts_with("::error ")).collect();
    assert_eq!(annotations.len(), 2, "{stderr}");
    assert!(annotations[0].contains("b<&\">%25%2C%3A\u{1}.safetensors,title=swiglu differs::out."));
    assert!(annotations[0].contains("1 of "), "{stderr}");
    assert!(annotations[1].contains("d.safetensors,title=no verdict::"), "{stderr}");

    let xml = std::fs::read_to_string(&junit).unwrap();
    let counts = r#"tests="4" failures="1" errors="1" skipped="1""#;
    assert!(xml.contains(counts), "{xml}");
    assert!(xml.contains("b&lt;&amp;&quot;&gt;%,:\u{FFFD}.safetensors\" file="), "{xml}");
    assert_eq!(xml.matches("<testcase classname=\"swiglu\"").count(), 3);
    assert!(xml.contains("<testcase classname=\"unreadable\""), "{xml}");

    // No case file gives way to the verdicts.
    let bytes = std::fs::read(&good).unwrap();
    let output = fathom(&["check", text(&folder), "--junit", text(&good)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(std::fs::read(&good).unwrap() == bytes);

    let nowhere = scratch.path().join("no/such/folder/junit.xml");
    let output = fathom(&["check", text(&good), "--junit", text(&nowhere)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("junit.xml"));
}

#[test]
fn what_a_file_leaves_out_is_said() {
    let scratch = tempfile::tempdir().unwrap();
    let good = example("clip_factor", scratch.path(), "good.safetensors");
    // The last output leaves the file.
    let partial = scratch.path().join("partial.safetensors");
    edited(&good, &partial, |header, data| {
        let factor = header.as_object_mut().unwrap().remove("out.factor").unwrap();
        let norm = header["out.norm"]["data_offsets"].clone();
        assert_eq!(factor["data_offsets"][0], 0, "in front of norm");
        data.drain(..4);
        for name in ["out.norm", "partials"] {
            for end in header[name]["data_offsets"].as_array_mut().unwrap() {
                *end = (end.as_u64().unwrap() - 4).into();
            }
        }
        assert_ne!(header["out.norm"]["data_offsets"], norm);
    });
    let output = fathom(&["check", text(&partial), "--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(json(&output)["files"][0]["not_compared"], serde_json::json!(["out.factor"]));
    let output = fathom(&["check", text(&partial)]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("not in the file, not compared"));

    // Two tokens less than one: outputs that hold nothing agree, and that is said.
    let empty = scratch.path().join("empty.safetensors");
    let cast = example("cast", scratch.path(), "cast.safetensors");
    edited(&cast, &empty, |header, data| {
        data.clear();
        for name in ["x", "out.y"] {
            header[name]["shape"] = serde_json::json!([0, 5]);
            header[name]["data_offsets"] = serde_json::json!([0, 0]);
        }
    });
    let output = fathom(&["check", text(&empty)]);
    assert_eq!(output.status.code(), Some(0));
    let words = "1 pass, 0 fail; 1 of those that pass hold no element";
    assert!(String::from_utf8_lossy(&output.stdout).contains(words));
}

#[test]
fn the_table_names_both_sides() {
    let scratch = tempfile::tempdir().unwrap();
    let good = example("gemm_fp8", scratch.path(), "good.safetensors");
    let bad = scratch.path().join("bad.safetensors");
    edited(&good, &bad, |header, data| {
        let at = header["out.d"]["data_offsets"][0].as_u64().unwrap() as usize;
        data[at] ^= 1;
    });
    let output = fathom(&["check", text(&bad)]);
    assert_eq!(output.status.code(), Some(1));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.contains("[0, 0]: file 0x") && stdout.contains(", contract 0x"), "{stdout}");
}

#[test]
fn ops_are_listed_shown_and_their_examples_check() {
    let list = json(&fathom(&["case", "list", "--json"]));
    let ops = list["ops"].as_array().unwrap();
    assert!(ops.len() > 40);
    let table = fathom(&["case", "list"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("a, a_scale, b, b_scale, [c]"), "{table}");
    let scratch = tempfile::tempdir().unwrap();
    for op in ops {
        let name = op["op"].as_str().unwrap();
        example(name, scratch.path(), &format!("{name}.safetensors"));
    }
    let output = fathom(&["check", text(scratch.path()), "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let files = json(&output)["files"].as_array().unwrap().clone();
    assert_eq!(files.len(), ops.len());
    for file in files {
        let name = format!("{}.safetensors", file["op"].as_str().unwrap());
        assert!(file["file"].as_str().unwrap().ends_with(&format!("/{name}")), "{file:#}");
    }
    let output = fathom(&["replay", text(scratch.path())]);
    assert_eq!(output.status.code(), Some(0));

    let show = fathom(&["case", "show", "quantize_tile"]);
    let show = String::from_utf8_lossy(&show.stdout).into_owned();
    for part in ["F32, BF16, F16", "[m, ceil(k, tile)]", "e4m3 or e5m2 or e5m6", "Lower bound"] {
        assert!(show.contains(part), "'{part}' is not in: {show}");
    }
    assert_eq!(
        json(&fathom(&["case", "show", "gemm", "--json"]))["params"][2]["default"],
        serde_json::json!([])
    );
    for command in ["show", "example"] {
        let output = fathom(&["case", command, "gemm_fp"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("did you mean 'gemm_fp8'?"));
    }
}
