//! What a PyTorch-profiler (Kineto) trace of one's own machine says.
//!
//! The reader takes the Chrome trace that the profiler exports, plain or gzipped: kernels with
//! their stream, the annotations under which the host launched them, overlap of computation and
//! communication. It never panics on a malformed file.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use fathom_trace::input;
use serde::Serialize;
use serde_json::Value;

use crate::error::SimError;

/// Largest file that is unpacked, bytes.
const LIMIT: u64 = 1 << 32;

/// One kernel, copy or memset on a stream, as the profiler saw it.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceKernel {
    /// Name as the profiler wrote it.
    pub name: String,
    /// Number of the CUDA stream that it ran on.
    pub stream: i64,
    /// Start, microseconds from the first kernel.
    pub start_us: f64,
    /// How long it took, in microseconds.
    pub duration_us: f64,
    /// Grid of CTAs in x, y, z; zeros for copies.
    pub grid: [u64; 3],
    /// Index of the innermost annotation under which the host launched it.
    pub annotation: Option<usize>,
}

impl TraceKernel {
    fn end_us(&self) -> f64 {
        self.start_us + self.duration_us
    }

    /// Whether it moves data between GPUs, by the names of the common libraries.
    pub fn communicates(&self) -> bool {
        let name = self.name.to_ascii_lowercase();
        [
            "nccl",
            "internode",
            "intranode",
            "all_to_all",
            "alltoall",
            "nvshmem",
            "deep_ep",
            "dispatch_layout",
        ]
        .iter()
        .any(|part| name.contains(part))
    }

    /// Whether it only counts, tells or waits (layout, notify, barrier) instead of moving a
    /// payload.
    pub fn is_rendezvous(&self) -> bool {
        let name = self.name.to_ascii_lowercase();
        ["notify", "barrier", "dispatch_layout"].iter().any(|part| name.contains(part))
    }

    /// Whether it is a matrix multiplication; helpers that live in a GEMM library's namespace are
    /// not.
    pub fn is_gemm(&self) -> bool {
        let name = self.name.to_ascii_lowercase();
        let helper = ["transpose", "tensormap"].iter().any(|part| name.contains(part));
        name.contains("gemm") && !helper
    }
}

/// A named range of the host's timeline, a phase of the step for instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Annotation {
    /// Name of the range.
    pub name: String,
    /// Start and end on the host, microseconds of the trace's clock.
    pub span_us: (f64, f64),
}

/// A PyTorch-profiler (Kineto) trace as read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KinetoTrace {
    /// Name of the first device.
    pub device: String,
    /// SMs of that device, 0 where the trace does not say.
    pub sms: u64,
    /// Kernels of all streams, in the order of their starts.
    pub kernels: Vec<TraceKernel>,
    /// Annotations of the host, in the order of their starts.
    pub annotations: Vec<Annotation>,
}

impl KinetoTrace {
    /// Reads a trace file, gzipped or plain; [`SimError`] where it cannot be read or unpacked, is
    /// no profiler trace or holds no kernel.
    pub fn read(path: &Path) -> Result<KinetoTrace, SimError> {
        let bytes = input::read(path, LIMIT).map_err(|e| SimError::io(path, e))?;
        KinetoTrace::from_bytes(&path.display().to_string(), &bytes)
    }

    /// A trace from the bytes of a file; `file` names it in errors.
    pub fn from_bytes(file: &str, bytes: &[u8]) -> Result<KinetoTrace, SimError> {
        let mut text = Vec::new();
        let plain = if bytes.starts_with(&[0x1f, 0x8b]) {
            flate2::read::MultiGzDecoder::new(bytes)
                .take(LIMIT)
                .read_to_end(&mut text)
                .map_err(|e| SimError::input(file, format!("cannot unpack: {e}")))?;
            text.as_slice()
        } else {
            bytes
        };
        let root: Value = serde_json::from_slice(plain).map_err(|e| {
            SimError::input(file, format!("expected a profiler trace in JSON: {e}"))
        })?;
        let events = match &root {
            Value::Array(list) => list,
            _ => root.get("traceEvents").and_then(Value::as_array).ok_or_else(|| {
                SimError::input(
                    file,
                    "no 'traceEvents': expected the trace that torch.profiler exports",
                )
            })?,
        };
        let mut trace = KinetoTrace::default();
        if let Some(device) = root.get("deviceProperties").and_then(|d| d.get(0)) {
            trace.device =
                device.get("name").and_then(Value::as_str).unwrap_or_default().to_string();
            trace.sms = device.get("numSms").and_then(Value::as_u64).unwrap_or(0);
        }
        trace.collect(file, events)?;
        Ok(trace)
    }

    fn collect(&mut self, file: &str, events: &[Value]) -> Result<(), SimError> {
        let mut launches: BTreeMap<u64, f64> = BTreeMap::new();
        let mut correlations = Vec::new();
        for (index, event) in events.iter().enumerate() {
            let text = |key: &str| event.get(key).and_then(Value::as_str).unwrap_or_default();
            if text("ph") != "X" {
                continue;
            }
            let category = text("cat").to_ascii_lowercase();
            let kernel = matches!(category.as_str(), "kernel" | "gpu_memcpy" | "gpu_memset");
            let host = matches!(category.as_str(), "cuda_runtime" | "cuda_driver");
            if !kernel && !host && category != "user_annotation" {
                continue;
            }
            let number = |key: &str| {
                number(event.get(key)).filter(|v| v.is_finite()).ok_or_else(|| {
                    let name = text("name");
                    SimError::input(file, format!("event {index} ('{name}'): '{key}' is no number"))
                })
            };
            let (start, duration) = (number("ts")?, number("dur")?.max(0.0));
            let args = event.get("args");
            let correlation = args.and_then(|a| a.get("correlation")).and_then(Value::as_u64);
            if host {
                if let Some(c) = correlation {
                    launches.insert(c, start);
                }
            } else if kernel {
                let stream = args.and_then(|a| a.get("stream")).or(event.get("tid"));
                correlations.push(correlation);
                self.kernels.push(TraceKernel {
                    name: text("name").to_string(),
                    stream: stream.and_then(Value::as_i64).unwrap_or(0),
                    start_us: start,
                    duration_us: duration,
                    grid: grid(args.and_then(|a| a.get("grid"))),
                    annotation: None,
                });
            } else {
                let name = text("name").to_string();
                self.annotations.push(Annotation { name, span_us: (start, start + duration) });
            }
        }
        if self.kernels.is_empty() {
            return Err(SimError::input(file, "no kernels in it: was the GPU profiled?"));
        }
        self.order(&launches, &correlations);
        Ok(())
    }

    /// Finds every kernel's annotation, sorts, and counts time from the first kernel.
    fn order(&mut self, launches: &BTreeMap<u64, f64>, correlations: &[Option<u64>]) {
        self.annotations.sort_by(|a, b| a.span_us.0.total_cmp(&b.span_us.0));
        for (kernel, correlation) in self.kernels.iter_mut().zip(correlations) {
            let Some(at) = correlation.and_then(|c| launches.get(&c)) else { continue };
            let within = |a: &&(usize, &Annotation)| a.1.span_us.0 <= *at && *at < a.1.span_us.1;
            // The innermost is the one that began last.
            let listed: Vec<(usize, &Annotation)> = self.annotations.iter().enumerate().collect();
            kernel.annotation = listed.iter().rev().find(within).map(|(i, _)| *i);
        }
        self.kernels
            .sort_by(|a, b| a.start_us.total_cmp(&b.start_us).then(a.stream.cmp(&b.stream)));
        let first = self.kernels[0].start_us;
        for kernel in &mut self.kernels {
            kernel.start_us -= first;
        }
    }

    /// What the trace says in numbers: busy and hidden time, streams, phases, GEMMs.
    pub fn summary(&self) -> TraceSummary {
        let (mut comm, mut compute) = (Vec::new(), Vec::new());
        let comm_streams = self.communication_streams();
        let mut streams: BTreeMap<i64, StreamSummary> = BTreeMap::new();
        for k in &self.kernels {
            let communicates = comm_streams.contains(&k.stream);
            let list = if communicates { &mut comm } else { &mut compute };
            list.push((k.start_us, k.end_us()));
            let s = streams.entry(k.stream).or_insert(StreamSummary {
                stream: k.stream,
                communicates,
                kernels: 0,
                busy_s: 0.0,
            });
            s.kernels += 1;
            s.busy_s += k.duration_us / 1e6;
        }
        let span = self.kernels.iter().map(TraceKernel::end_us).fold(0.0, f64::max);
        let (compute, comm) = (union(compute), union(comm));
        let comm_us = length(&comm);
        let kind = |rendezvous: bool| -> f64 {
            let of = |k: &&TraceKernel| k.communicates() && k.is_rendezvous() == rendezvous;
            self.kernels.iter().filter(of).map(|k| k.duration_us).sum()
        };
        TraceSummary {
            device: self.device.clone(),
            sms: self.sms,
            kernels: self.kernels.len(),
            span_s: span / 1e6,
            compute_busy_s: length(&compute) / 1e6,
            communication_s: comm_us / 1e6,
            payload_s: kind(false) / 1e6,
            rendezvous_s: kind(true) / 1e6,
            hidden_fraction: if comm_us > 0.0 { overlap(&compute, &comm) / comm_us } else { 1.0 },
            streams: streams.into_values().collect(),
            phases: self.phases(),
            gemms: self.gemms(),
        }
    }

    /// Streams that spend most of their time on communication.
    fn communication_streams(&self) -> Vec<i64> {
        let mut time: BTreeMap<i64, (f64, f64)> = BTreeMap::new();
        for k in &self.kernels {
            let entry = time.entry(k.stream).or_default();
            entry.0 += k.duration_us;
            entry.1 += if k.communicates() { k.duration_us } else { 0.0 };
        }
        time.into_iter().filter(|(_, (all, comm))| *comm > all / 2.0).map(|(s, _)| s).collect()
    }

    /// Kernels by annotation, in order of the annotations.
    fn by_annotation(&self) -> Vec<Vec<&TraceKernel>> {
        let mut groups = vec![Vec::new(); self.annotations.len()];
        for k in &self.kernels {
            if let Some(i) = k.annotation {
                groups[i].push(k);
            }
        }
        groups
    }

    /// Means by annotation name, in order of first appearance.
    fn phases(&self) -> Vec<PhaseSummary> {
        let mut phases: Vec<PhaseSummary> = Vec::new();
        for (annotation, kernels) in self.annotations.iter().zip(self.by_annotation()) {
            if kernels.is_empty() {
                continue;
            }
            let begin = kernels.iter().map(|k| k.start_us).fold(f64::INFINITY, f64::min);
            let end = kernels.iter().map(|k| k.end_us()).fold(0.0, f64::max);
            let busy = length(&union(kernels.iter().map(|k| (k.start_us, k.end_us())).collect()));
            let found = phases.iter().position(|p| p.name == annotation.name);
            let i = found.unwrap_or_else(|| {
                let name = annotation.name.clone();
                phases.push(PhaseSummary { name, count: 0, mean_s: 0.0, mean_busy_s: 0.0 });
                phases.len() - 1
            });
            let p = &mut phases[i];
            p.count += 1;
            // Running means.
            p.mean_s += ((end - begin) / 1e6 - p.mean_s) / p.count as f64;
            p.mean_busy_s += (busy / 1e6 - p.mean_busy_s) / p.count as f64;
        }
        phases
    }

    /// GEMM kernels by annotation name and place among the GEMMs of the annotation.
    fn gemms(&self) -> Vec<GemmSummary> {
        let mut found: BTreeMap<(String, usize), Vec<&TraceKernel>> = BTreeMap::new();
        for (annotation, kernels) in self.annotations.iter().zip(self.by_annotation()) {
            for (place, kernel) in kernels.into_iter().filter(|k| k.is_gemm()).enumerate() {
                found.entry((annotation.name.clone(), place)).or_default().push(kernel);
            }
        }
        found
            .into_iter()
            .map(|((phase, place), kernels)| {
                let times = || kernels.iter().map(|k| k.duration_us);
                GemmSummary {
                    phase,
                    place,
                    count: kernels.len(),
                    ctas: kernels[0].grid.iter().product(),
                    mean_us: times().sum::<f64>() / kernels.len() as f64,
                    min_us: times().fold(f64::INFINITY, f64::min),
                }
            })
            .collect()
    }
}

/// A number that may be written as one or as text.
fn number(value: Option<&Value>) -> Option<f64> {
    match value? {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    }
}

fn grid(value: Option<&Value>) -> [u64; 3] {
    let list = value.and_then(Value::as_array);
    std::array::from_fn(|i| list.and_then(|l| l.get(i)).and_then(Value::as_u64).unwrap_or(0))
        .map(|g| g.min(1 << 31))
}

/// Disjoint intervals that cover the same time.
fn union(mut spans: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut out: Vec<(f64, f64)> = Vec::new();
    for (a, b) in spans {
        match out.last_mut() {
            Some(last) if a <= last.1 => last.1 = last.1.max(b),
            _ => out.push((a, b)),
        }
    }
    out
}

fn length(spans: &[(f64, f64)]) -> f64 {
    spans.iter().map(|(a, b)| b - a).sum()
}

/// Time that lies in both of two lists of disjoint, sorted intervals.
fn overlap(x: &[(f64, f64)], y: &[(f64, f64)]) -> f64 {
    let (mut i, mut j, mut total) = (0, 0, 0.0);
    while let (Some(a), Some(b)) = (x.get(i), y.get(j)) {
        total += (a.1.min(b.1) - a.0.max(b.0)).max(0.0);
        if a.1 < b.1 { i += 1 } else { j += 1 }
    }
    total
}

/// The work of one stream.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamSummary {
    /// Number of the CUDA stream.
    pub stream: i64,
    /// Whether most of its time is communication.
    pub communicates: bool,
    /// Kernels that ran on it.
    pub kernels: usize,
    /// Sum of their durations, seconds.
    pub busy_s: f64,
}

/// The kernels launched under annotations of one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseSummary {
    /// Name of the annotations.
    pub name: String,
    /// Annotations of that name that launched a kernel.
    pub count: usize,
    /// From the first kernel's start to the last one's end, mean, seconds.
    pub mean_s: f64,
    /// Time with a kernel running, mean, seconds.
    pub mean_busy_s: f64,
}

/// A GEMM that recurs under annotations of one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GemmSummary {
    /// Name of the annotations.
    pub phase: String,
    /// Place among the GEMMs of its annotation, from 0.
    pub place: usize,
    /// How often it was seen.
    pub count: usize,
    /// CTAs of its first launch.
    pub ctas: u64,
    /// Mean duration, microseconds.
    pub mean_us: f64,
    /// Shortest duration, microseconds.
    pub min_us: f64,
}

/// A trace in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceSummary {
    /// Name of the first device.
    pub device: String,
    /// SMs of that device, 0 where the trace does not say.
    pub sms: u64,
    /// Kernels of all streams.
    pub kernels: usize,
    /// From the first kernel's start to the last one's end, seconds.
    pub span_s: f64,
    /// Seconds during which some compute stream has a kernel running.
    pub compute_busy_s: f64,
    /// Seconds during which some communication stream has a kernel running.
    pub communication_s: f64,
    /// Seconds of the communication kernels that move data.
    pub payload_s: f64,
    /// Seconds of the communication kernels that notify or wait.
    pub rendezvous_s: f64,
    /// Share of the communication under which computation runs.
    pub hidden_fraction: f64,
    /// The work of each stream.
    pub streams: Vec<StreamSummary>,
    /// Means of each phase, which is what annotations of one name launch.
    pub phases: Vec<PhaseSummary>,
    /// The GEMMs that recur under annotations.
    pub gemms: Vec<GemmSummary>,
}
