//! Launch files: one kernel launch as JSON beside its PTX, with arguments and expected outputs in
//! a case file. `fathom emulate run` executes one, `FATHOM_EXTRA_PTX` names a folder of them; the
//! format is described in docs/emulator.md.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use fathom_ptx::types::Type;
use fathom_trace::input::{self, MESSAGE, VALUE, shorten};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::config::LaunchConfig;
use crate::config::Settings;
use crate::device::Device;
use crate::error::Error;
use crate::launch::LaunchReport;
use crate::module::Module;
use crate::preset::Preset;

/// A launch file. Keys that describe how the PTX was compiled are allowed and ignored, but for
/// those that are nearly one of these.
#[derive(Clone, Debug, Deserialize)]
pub struct LaunchFile {
    /// Name of the kernel's entry in the PTX.
    pub entry: String,
    /// PTX file, relative to this one; this file's name with `.ptx` where absent.
    pub ptx: Option<String>,
    /// Case file, relative to this one; this file's name with `.safetensors` where absent.
    pub case: Option<String>,
    /// CTAs in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a CTA in x, y, z; `[threads, 1, 1]` where absent.
    pub block: Option<[u32; 3]>,
    /// Threads of a CTA where there is no `block`.
    #[serde(default)]
    pub threads: u32,
    /// CTAs of a cluster in x, y, z; no cluster where absent.
    pub cluster: Option<[u32; 3]>,
    /// Dynamic shared memory in bytes.
    #[serde(default)]
    pub shared_bytes: u32,
    /// Parameters in order.
    pub params: Vec<ParamEntry>,
    /// Scalars by parameter name.
    #[serde(default)]
    pub arguments: BTreeMap<String, serde_json::Number>,
    /// Tolerance of an output, as a multiple of max(1, |expected|); 0 (the bits) where absent.
    #[serde(default)]
    pub tolerance: BTreeMap<String, f64>,
    /// All other keys, which say how the PTX was compiled.
    #[serde(flatten)]
    pub others: BTreeMap<String, serde_json::Value>,
}

/// The keys of a launch file that mean something.
const KEYS: [&str; 11] = [
    "entry",
    "ptx",
    "case",
    "grid",
    "block",
    "threads",
    "cluster",
    "shared_bytes",
    "params",
    "arguments",
    "tolerance",
];

/// A parameter of a launch file.
#[derive(Clone, Debug, Deserialize)]
pub struct ParamEntry {
    /// Name by which arguments and tensors refer to it.
    pub name: String,
    /// `u64`, `u32`, `s32`, `f32`, ... as the PTX declares it.
    pub ptx_type: String,
}

/// How one output compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// Name of the buffer, which is a parameter of the kernel.
    pub name: String,
    /// How many elements were compared.
    pub elements: usize,
    /// Elements that differ.
    pub differing: usize,
    /// The first that differs: index, expected, found.
    pub first: Option<(usize, String, String)>,
}

/// What a launch file's run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The launch's report.
    pub report: LaunchReport,
    /// The outputs for which the case file has expected values.
    pub compared: Vec<Compared>,
}

impl Outcome {
    /// No findings, and every output as expected.
    pub fn holds(&self) -> bool {
        self.report.findings.is_empty() && self.compared.iter().all(|c| c.differing == 0)
    }
}

/// Runs a launch file on the device preset `gpu`.
///
/// # Errors
/// [`Error::File`] names file and place; else as [`Module::load`] and [`Device::launch`].
pub fn run_file(path: &Path, gpu: &str, settings: Settings) -> Result<Outcome, Error> {
    let fail = |file: &Path, what: String| Error::File { file: file.display().to_string(), what };
    let read = |path: &Path, limit| input::read(path, limit).map_err(|e| fail(path, e.to_string()));
    let text = read(path, input::CONFIG_BYTES)?;
    let launch: LaunchFile =
        serde_json::from_slice(&text).map_err(|e| fail(path, shorten(&e.to_string(), MESSAGE)))?;
    let beside = |name: &Option<String>, extension: &str| match name {
        Some(name) => path.with_file_name(name),
        None => path.with_extension(extension),
    };
    let ptx_path = beside(&launch.ptx, "ptx");
    let ptx = String::from_utf8(read(&ptx_path, input::TEXT_BYTES)?)
        .map_err(|_| fail(&ptx_path, "expected UTF-8 text".into()))?;
    let case_path = beside(&launch.case, "safetensors");
    let case = if case_path.exists() || launch.case.is_some() {
        read(&case_path, u64::MAX - 1)?
    } else {
        empty()
    };
    let tensors = SafeTensors::deserialize(&case)
        .map_err(|e| fail(&case_path, format!("expected a safetensors file: {e}")))?;
    launch.refuse_misspelt(&tensors).map_err(|wrong| match wrong {
        Misspelt::Launch(what) => fail(path, what),
        Misspelt::Case(what) => fail(&case_path, what),
    })?;

    let device = Device::new(Preset::named(gpu)?);
    device.configure(settings);
    // Errors of the text name its file, and a name that is not there both.
    let of_file = |e: Error| match e {
        Error::Ptx(text) => {
            let place = format!("--> {}:", ptx_path.display());
            Error::Ptx(text.replacen("--> ptx:", &place, 1))
        }
        Error::NotFound { .. } => fail(path, format!("entry: {}: {e}", ptx_path.display())),
        e => e,
    };
    let module = Module::load(&device, &ptx).map_err(of_file)?;
    let function = module.function(&launch.entry).map_err(of_file)?;
    let declared = function.params();
    if declared.len() != launch.params.len() {
        let what = format!("params: expected {}, found {}", declared.len(), launch.params.len());
        return Err(fail(path, what));
    }
    let mut params = vec![0; function.param_bytes()];
    let mut outputs = Vec::new();
    for (param, place) in launch.params.iter().zip(&declared) {
        let Some(ty) = Type::parse(&param.ptx_type) else {
            let found = shorten(&param.ptx_type, VALUE);
            return Err(fail(path, format!("params: {}: no PTX type is {found}", param.name)));
        };
        let fits = |bytes: usize| match place.bytes == bytes {
            true => Ok(()),
            false => {
                let (name, declared) = (&param.name, place.bytes);
                let what = format!("expected {declared} bytes as in the PTX, found {bytes}");
                Err(fail(path, format!("params: {name}: {what}")))
            }
        };
        let expected = tensors.tensor(&format!("out.{}", param.name)).ok();
        let input = tensors.tensor(&param.name).ok();
        let value = match (&input, &expected, launch.arguments.get(&param.name)) {
            (None, None, Some(number)) => {
                fits(ty.bytes() as usize)?;
                scalar(ty, number).ok_or_else(|| {
                    let what = format!("expected a {}, found {number}", param.ptx_type);
                    fail(path, format!("arguments.{}: {what}", param.name))
                })?
            }
            // Scratch pointers and the like are zero.
            (None, None, None) => 0,
            _ => {
                fits(8)?;
                let bytes = input.iter().chain(&expected).map(|t| t.data().len()).max();
                let address = device.alloc(bytes.unwrap_or(0) as u64)?;
                if let Some(tensor) = &input {
                    device.write(address, tensor.data())?;
                }
                if let Some(tensor) = expected {
                    outputs.push((param.name.clone(), address, tensor));
                }
                address
            }
        };
        params[place.offset..place.offset + place.bytes]
            .copy_from_slice(&value.to_le_bytes()[..place.bytes.min(8)]);
    }
    let block = launch.block.unwrap_or([launch.threads, 1, 1]);
    let mut config = LaunchConfig::new(launch.grid, block, params);
    config.dynamic_shared_bytes = launch.shared_bytes;
    config.cluster = launch.cluster.unwrap_or([1; 3]);
    let report = device.launch(&function, &config)?;
    let mut compared = Vec::new();
    for (name, address, expected) in outputs {
        let mut found = vec![0; expected.data().len()];
        device.read(address, &mut found)?;
        let tolerance = launch.tolerance.get(&name).copied().unwrap_or(0.0);
        compared.push(compare(name, expected.dtype(), expected.data(), &found, tolerance));
    }
    Ok(Outcome { report, compared })
}

/// The launch files (`*.json`) of a folder, sorted.
///
/// # Errors
/// [`Error::File`] where the folder cannot be read.
pub fn launch_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = std::fs::read_dir(folder)
        .map_err(|e| Error::File { file: folder.display().to_string(), what: e.to_string() })?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    Ok(files)
}

/// A safetensors file without tensors.
fn empty() -> Vec<u8> {
    let mut out = 2u64.to_le_bytes().to_vec();
    out.extend_from_slice(b"{}");
    out
}

/// The bits of a number as a scalar of the type; `None` where it has no such value.
fn scalar(ty: Type, number: &serde_json::Number) -> Option<u64> {
    let bits = ty.bits().min(64);
    let below = |value: i128| value < 1 << bits;
    match ty {
        Type::F32 => {
            let value = number.as_f64()? as f32;
            value.is_finite().then(|| u64::from(value.to_bits()))
        }
        Type::F64 => Some(number.as_f64()?.to_bits()),
        Type::F16 => Some(u64::from(half::f16::from_f64(number.as_f64()?).to_bits())),
        Type::Bf16 => Some(u64::from(half::bf16::from_f64(number.as_f64()?).to_bits())),
        _ => {
            let value = number.as_u64().map(i128::from).or(number.as_i64().map(i128::from))?;
            let least = if ty.is_signed() { -(1 << (bits - 1)) } else { 0 };
            let fits = if ty.is_signed() {
                (least..-least).contains(&value)
            } else {
                value >= least && below(value)
            };
            fits.then_some(value as u64)
        }
    }
}

/// A name in launch file or case that nothing answers to, in which of them.
enum Misspelt {
    Launch(String),
    Case(String),
}

impl LaunchFile {
    /// Refuses keys, arguments and tensors that would be passed over without a word.
    fn refuse_misspelt(&self, tensors: &SafeTensors<'_>) -> Result<(), Misspelt> {
        let near = |key: &str| {
            let most = if key.len() > 4 { 2 } else { 1 };
            KEYS.iter().find(|known| distance(known, &key.to_lowercase()) <= most)
        };
        if let Some((key, near)) = self.others.keys().find_map(|key| Some((key, near(key)?))) {
            return Err(Misspelt::Launch(format!("unknown key '{key}': did you mean '{near}'?")));
        }
        let names: Vec<&str> = self.params.iter().map(|p| p.name.as_str()).collect();
        let known = || format!("expected one of the params {}", names.join(", "));
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(**name)) {
            return Err(Misspelt::Launch(format!("params: two are called '{twice}'")));
        }
        for name in tensors.names() {
            if !seen.contains(name.strip_prefix("out.").unwrap_or(name)) {
                let found = shorten(name, VALUE);
                return Err(Misspelt::Case(format!("tensor '{found}': {}", known())));
            }
        }
        let has = |name: &str| tensors.names().contains(&name);
        for name in self.arguments.keys() {
            if !seen.contains(name.as_str()) {
                return Err(Misspelt::Launch(format!("arguments.{name}: {}", known())));
            }
            if has(name) || has(&format!("out.{name}")) {
                let what = "expected an argument or a tensor of this name, found both";
                return Err(Misspelt::Launch(format!("arguments.{name}: {what}")));
            }
        }
        for (name, tolerance) in &self.tolerance {
            if !has(&format!("out.{name}")) {
                let what = format!("expected a tensor 'out.{name}' in the case, found none");
                return Err(Misspelt::Launch(format!("tolerance.{name}: {what}")));
            }
            if *tolerance < 0.0 {
                let what = format!("expected at least 0, found {tolerance}");
                return Err(Misspelt::Launch(format!("tolerance.{name}: {what}")));
            }
        }
        Ok(())
    }
}

/// Letters to change, add or leave out between two words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn value(dtype: Dtype, bytes: &[u8]) -> Option<f64> {
    Some(match dtype {
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().ok()?),
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().ok()?)),
        Dtype::F16 => half::f16::from_le_bytes(bytes.try_into().ok()?).to_f64(),
        Dtype::BF16 => half::bf16::from_le_bytes(bytes.try_into().ok()?).to_f64(),
        _ => return None,
    })
}

fn compare(name: String, dtype: Dtype, expected: &[u8], found: &[u8], tolerance: f64) -> Compared {
    let size = (dtype.bitsize() / 8).max(1);
    let show = |bytes: &[u8]| {
        let hex: String = bytes.iter().rev().map(|b| format!("{b:02x}")).collect();
        value(dtype, bytes).map_or(format!("0x{hex}"), |v| format!("{v:e} (0x{hex})"))
    };
    let close = |e: &[u8], f: &[u8]| {
        e == f
            || tolerance > 0.0
                && match (value(dtype, e), value(dtype, f)) {
                    (Some(e), Some(f)) => (e - f).abs() <= tolerance * e.abs().max(1.0),
                    _ => false,
                }
    };
    let pairs = expected.chunks(size).zip(found.chunks(size)).enumerate();
    let differing: Vec<_> = pairs.filter(|(_, (e, f))| !close(e, f)).collect();
    Compared {
        name,
        elements: expected.len() / size,
        differing: differing.len(),
        first: differing.first().map(|(i, (e, f))| (*i, show(e), show(f))),
    }
}
