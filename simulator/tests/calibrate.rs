//! Kineto traces: small ones of our own, malformed ones, and the published profile where it is at
//! hand.

use std::io::Write;

use fathom_config::Gpu;
use fathom_simulator::calibrate::{PROFILE_FITTING_GEMMS, fit_gemms, parse_table};
use fathom_simulator::kernel_time::Constants;
use fathom_simulator::kineto::KinetoTrace;
use proptest::prelude::*;

const SMALL: &str = r#"{"deviceProperties": [{"name": "GPU", "numSms": 132}], "traceEvents": [
    {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 0, "dur": 100},
    {"ph": "X", "cat": "user_annotation", "name": "attn", "ts": 10, "dur": 20},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 12, "dur": 1, "args": {"correlation": 1}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 40, "dur": 1, "args": {"correlation": 2}},
    {"ph": "X", "cat": "kernel", "name": "my_gemm", "ts": "1000.5", "dur": 30, "tid": 7,
     "args": {"stream": 7, "correlation": 1, "grid": [2, 56, 1]}},
    {"ph": "X", "cat": "kernel", "name": "ncclAllReduce", "ts": 1020.5, "dur": 40,
     "args": {"stream": 9, "correlation": 2, "grid": [20, 1, 1]}}]}"#;

#[test]
fn streams_overlap_and_annotations() {
    let trace = KinetoTrace::from_bytes("t", SMALL.as_bytes()).unwrap();
    let s = trace.summary();
    assert_eq!((s.kernels, s.sms, s.device.as_str()), (2, 132, "GPU"));
    assert_eq!((s.span_s, s.compute_busy_s, s.communication_s), (60e-6, 30e-6, 40e-6));
    assert_eq!(s.hidden_fraction, 0.25);
    // The innermost annotation wins.
    assert_eq!(s.phases.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["step", "attn"]);
    assert_eq!(
        (s.gemms[0].phase.as_str(), s.gemms[0].ctas, s.gemms[0].mean_us),
        ("attn", 112, 30.0)
    );
}

#[test]
fn gzip_is_seen_by_its_first_bytes() {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(SMALL.as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    let trace = KinetoTrace::from_bytes("t", &packed).unwrap();
    assert_eq!(trace, KinetoTrace::from_bytes("t", SMALL.as_bytes()).unwrap());
    let cut = KinetoTrace::from_bytes("cut.gz", &packed[..packed.len() / 2]).unwrap_err();
    assert!(cut.to_string().starts_with("cut.gz: cannot unpack"), "{cut}");
}

#[test]
fn errors_name_the_file_and_the_event() {
    for (text, part) in [
        ("", "JSON"),
        ("{}", "traceEvents"),
        ("[]", "no kernels"),
        (
            r#"[{"ph": "X", "cat": "kernel", "name": "k", "ts": null, "dur": 1}]"#,
            "event 0 ('k'): 'ts'",
        ),
    ] {
        let e = KinetoTrace::from_bytes("f.json", text.as_bytes()).unwrap_err().to_string();
        assert!(e.starts_with("f.json") && e.contains(part), "{e}");
    }
}

/// FIGURES section 2.
#[test]
fn the_published_profile_reads_as_published() {
    let profile = "traces/deepseek-v3-h800-dualpipe-chunk.json.gz";
    let Some(path) = fathom_trace::shared::need(profile) else { return };
    let s = KinetoTrace::read(&path).unwrap().summary();
    let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
    assert_eq!(ms(s.span_s), "129.0");
    assert_eq!(ms(s.compute_busy_s), "124.3");
    assert_eq!(ms(s.communication_s), "114.5");
    assert_eq!(ms(s.payload_s), "80.5");
    assert_eq!(ms(s.rendezvous_s), "33.0");
    assert_eq!(format!("{:.1}", s.hidden_fraction * 100.0), "96.3");
    let ten = s.phases.iter().filter(|p| p.name.contains('(')).count();
    assert_eq!(ten, 10);
}

/// The constants in use are those that the fit gives, to the digits they are written with.
#[test]
fn the_fit_gives_the_constants_in_use() {
    let table = parse_table("fitting half", PROFILE_FITTING_GEMMS).unwrap();
    let gpu = Gpu::preset("h800").unwrap();
    let c = fit_gemms(&gpu, 112, &table, Constants::FITTED).unwrap();
    let used = Constants::FITTED;
    println!("{c:?}");
    for (fitted, written) in [
        (c.mma_efficiency, used.mma_efficiency),
        (c.promotion_cycles, used.promotion_cycles),
        (c.tile_cycles, used.tile_cycles),
        (c.contention, used.contention),
    ] {
        assert!((fitted / written - 1.0).abs() < 2e-3, "{fitted} against {written}");
    }
}

#[test]
fn a_table_with_a_bad_cell_says_where() {
    let header = "name,kind,m,n,k,mean_us,min_us\n";
    for (row, part) in [
        ("a,fp9,1,1,1,1,1", "unknown kind 'fp9'"),
        ("a,bf16,0,1,1,1,1", "m is '0'"),
        ("a,bf16,1,1,1,1,-1", "min_us is '-1'"),
        ("a,bf16,1", "expected 7 cells, found 3"),
    ] {
        let e = parse_table("t.csv", &format!("{header}{row}\n")).unwrap_err().to_string();
        assert!(e.starts_with("t.csv: line 2") && e.contains(part), "{e}");
    }
    let gpu = Gpu::preset("h800").unwrap();
    assert!(fit_gemms(&gpu, 112, &[], Constants::FITTED).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever bytes come in, the reader answers.
    #[test]
    fn any_bytes_give_a_trace_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = KinetoTrace::from_bytes("fuzz", &bytes);
    }

    /// A valid trace with bytes overwritten, and with values of other types.
    #[test]
    fn a_damaged_trace_gives_a_trace_or_an_error(
        at in prop::collection::vec((0usize..SMALL.len(), any::<u8>()), 1..6),
        swap in 0usize..8,
    ) {
        let swaps = ["-1", "1e308", "null", "[]", "\"x\"", "{}", "99999999999999999999", "true"];
        let mut bytes = SMALL.replace("\"dur\": 30", &format!("\"dur\": {}", swaps[swap])).into_bytes();
        if let Ok(trace) = KinetoTrace::from_bytes("fuzz", &bytes) {
            let _ = trace.summary();
        }
        for (i, b) in at {
            let n = bytes.len();
            bytes[i % n] = b;
        }
        if let Ok(trace) = KinetoTrace::from_bytes("fuzz", &bytes) {
            let _ = trace.summary();
        }
    }
}
