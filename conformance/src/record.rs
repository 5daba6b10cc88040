//! Recording a run: op calls as case files, and the op trace.
//!
//! Any job that computes on a backend records with two lines; without a target in [`Options`] the
//! wrapper only passes calls on:
//!
//! ```
//! # use fathom_conformance::record::{Options, RecordError, Recording};
//! # use fathom_reference::backend::Reference;
//! # let options = Options::default();
//! let recording = Recording::open(&options)?;
//! let backend = recording.wrap(Reference);
//! // ... the run on `backend` ...
//! let written = recording.finish()?;
//! # assert_eq!(written.cases, 0);
//! # Ok::<(), RecordError>(())
//! ```
//!
//! A case file is named `STEP-NUMBER-PLACE-OP.safetensors`: the step, the call's number within the
//! step (counted over all calls, so that a chosen few have the names they have among all), layer,
//! component and phase. The names sort in order of execution. Its metadata says the same beside
//! `op` and `params`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fathom_reference::backend::{Backend, Call, Hook, Place, Recorder, input_metas, op_record};
use fathom_reference::files::Beside;
use fathom_reference::op::op_names;
use fathom_reference::{DynOp, EngineError, Tensor};
use fathom_trace::OpRecord;
use fathom_trace::jsonl::Writer;

use crate::case_file::{self, CaseFileError, OUT};

/// What is recorded, and where to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Folder for case files, which must be empty or absent; none: no case files.
    pub cases: Option<PathBuf>,
    /// Ops whose calls become case files; all where empty.
    pub ops: Vec<String>,
    /// Optimizer steps whose calls become case files; all where empty.
    pub steps: Vec<u64>,
    /// Layers whose calls become case files; all (and what belongs to no layer) where empty.
    pub layers: Vec<usize>,
    /// File for the op trace, which is always of every call; none: no trace.
    pub op_trace: Option<PathBuf>,
}

/// Why a recording failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The folder holds something already.
    #[error("{}: expected an empty or absent folder to record into, found {found}", path.display())]
    NotEmpty {
        /// The folder of recorded cases.
        path: PathBuf,
        /// The name of something in it.
        found: String,
    },
    /// No op has this name.
    #[error("unknown op '{found}' to record; known are {}", op_names().join(", "))]
    UnknownOp {
        /// The name that was asked for.
        found: String,
    },
    /// Options choose ops to record where no folder was named.
    #[error("ops, steps or layers to record were chosen, but no folder to record into")]
    NoFolder,
}

/// What a recording wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Case files that were written.
    pub cases: u64,
    /// Bytes of the tensors in them.
    pub bytes: u64,
    /// Records in the op trace.
    pub ops: u64,
}

/// A running recording; clones share it, so that every backend that they wrap is recorded into one.
#[derive(Clone)]
pub struct Recording {
    options: Rc<Options>,
    state: Rc<RefCell<State>>,
}

/// A backend that is recorded: it computes as before, and each call goes to the recording.
pub type Recorded<B> = Recorder<B, Recording>;

struct State {
    /// Calls so far of every step.
    calls: BTreeMap<u64, u64>,
    trace: Option<Writer<OpRecord, BufWriter<Beside>>>,
    written: Written,
}

impl Recording {
    /// Begins a recording: makes the folder and the trace's temporary file.
    ///
    /// # Errors
    /// [`RecordError`]; nothing has been written then.
    pub fn open(options: &Options) -> Result<Recording, RecordError> {
        let known = op_names();
        if let Some(found) = options.ops.iter().find(|op| !known.contains(&op.as_str())) {
            return Err(RecordError::UnknownOp { found: found.clone() });
        }
        let chosen =
            !(options.ops.is_empty() && options.steps.is_empty() && options.layers.is_empty());
        if chosen && options.cases.is_none() {
            return Err(RecordError::NoFolder);
        }
        if let Some(path) = &options.cases {
            let io = |source| RecordError::Io { path: path.clone(), source };
            std::fs::create_dir_all(path).map_err(io)?;
            if let Some(entry) = std::fs::read_dir(path).map_err(io)?.next() {
                let found = entry.map_err(io)?.file_name().to_string_lossy().into_owned();
                return Err(RecordError::NotEmpty { path: path.clone(), found });
            }
        }
        let trace = options.op_trace.as_deref().map(begin_trace).transpose()?;
        let state = State { calls: BTreeMap::new(), trace, written: Written::default() };
        Ok(Recording { options: Rc::new(options.clone()), state: Rc::new(RefCell::new(state)) })
    }

    /// The backend `inner`, recorded.
    pub fn wrap<B: Backend>(&self, inner: B) -> Recorded<B> {
        Recorder::with_hook(inner, self.clone())
    }

    /// Ends the recording: the op trace takes its name. Calls after this are not traced.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn finish(&self) -> Result<Written, RecordError> {
        let mut state = self.state.borrow_mut();
        if let (Some(trace), Some(path)) = (state.trace.take(), &self.options.op_trace) {
            let io = |source| RecordError::Io { path: path.clone(), source };
            let file = trace.finish().map_err(io)?.into_inner();
            file.map_err(|e| io(e.into_error()))?.finish().map_err(io)?;
        }
        Ok(state.written)
    }

    fn wants(&self, op: &str, place: Place) -> bool {
        let Options { cases, ops, steps, layers, .. } = &*self.options;
        cases.is_some()
            && (ops.is_empty() || ops.iter().any(|name| name == op))
            && (steps.is_empty() || steps.contains(&place.step))
            && (layers.is_empty() || place.layer.is_some_and(|layer| layers.contains(&layer)))
    }
}

fn begin_trace(path: &Path) -> Result<Writer<OpRecord, BufWriter<Beside>>, RecordError> {
    let io = |source| RecordError::Io { path: path.to_owned(), source };
    let file = Beside::begin(path).map_err(io)?;
    Writer::new(BufWriter::new(file)).map_err(io)
}

/// The error of an op that could not be recorded.
fn failed(engine: String, op: &dyn DynOp, reason: &dyn std::fmt::Display) -> EngineError {
    let reason = format!("recording it: {reason}");
    EngineError::Failed { engine, op: op.name().to_owned(), reason }
}

impl<B: Backend> Hook<B> for Recording {
    fn begins(
        &self,
        backend: &B,
        op: &dyn DynOp,
        inputs: &[Option<B::Buffer>],
        place: Place,
    ) -> Result<bool, EngineError> {
        let mut state = self.state.borrow_mut();
        *state.calls.entry(place.step).or_default() += 1;
        let seq = state.written.ops;
        if let Some(trace) = &mut state.trace {
            let record = op_record(op, input_metas(backend, op, inputs), seq, 0, place)?;
            trace.write(&record).map_err(|e| failed(backend.name(), op, &e))?;
            state.written.ops += 1;
        }
        Ok(self.wants(op.name(), place))
    }

    fn finished(&self, call: &Call<'_, B>) -> Result<(), EngineError> {
        let Some(folder) = &self.options.cases else {
            return Ok(());
        };
        let mut state = self.state.borrow_mut();
        let number = state.calls[&call.place.step] - 1;
        let path = folder.join(file_name(call.op, number, call.place));
        let bytes = write_case(&path, call, number)?;
        state.written.cases += 1;
        state.written.bytes += bytes;
        Ok(())
    }
}

/// Component and phase as the op trace spells them.
fn spelled(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        other => unreachable!("components and phases are words, not {other:?}"),
    }
}

fn file_name(op: &dyn DynOp, number: u64, place: Place) -> String {
    let Place { step, layer, component, phase, micro_batch } = place;
    let micro_batch = micro_batch.map_or(String::new(), |m| format!("mb{m:03}-"));
    let layer = layer.map_or(String::new(), |l| format!("layer{l:02}-"));
    let (component, phase) = (spelled(&component), spelled(&phase));
    let op = op.name();
    format!("{step:06}-{number:06}-{micro_batch}{layer}{component}-{phase}-{op}.safetensors")
}

/// Writes a call as a case; gives the bytes of its tensors.
fn write_case<B: Backend>(
    path: &Path,
    call: &Call<'_, B>,
    number: u64,
) -> Result<u64, EngineError> {
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (role, buffer) in call.op.inputs().iter().zip(call.inputs) {
        if let Some(buffer) = buffer {
            tensors.push((role.name.to_owned(), call.backend.download(buffer)?));
        }
    }
    for (role, buffer) in call.op.outputs().iter().zip(call.outputs) {
        tensors.push((format!("{OUT}{role}"), call.backend.download(buffer)?));
    }
    let Place { step, layer, component, phase, micro_batch } = call.place;
    let mut metadata = BTreeMap::from([
        ("op".to_owned(), call.op.name().to_owned()),
        ("params".to_owned(), call.op.params().to_string()),
        ("source".to_owned(), format!("recorded on backend {}", call.backend.name())),
        ("step".to_owned(), step.to_string()),
        ("call".to_owned(), number.to_string()),
        ("component".to_owned(), spelled(&component)),
        ("phase".to_owned(), spelled(&phase)),
    ]);
    metadata.extend(layer.map(|l| ("layer".to_owned(), l.to_string())));
    metadata.extend(micro_batch.map(|m| ("micro_batch".to_owned(), m.to_string())));
    let bytes = tensors.iter().map(|(_, t)| t.bytes().len() as u64).sum();
    let views = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    case_file::write_tensors(path, views, &metadata)
        .map_err(|e: CaseFileError| failed(call.backend.name(), call.op, &e))?;
    Ok(bytes)
}
