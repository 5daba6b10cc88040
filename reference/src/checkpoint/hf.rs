//! Checkpoints in Hugging Face's layout: `config.json`, one or many safetensors files, an index.
//!
//! Weights may be F64, F32, BF16, F16 or FP8 (E4M3, with `NAME_scale_inv` for every 128 x 128
//! block); experts may stand one by one or stacked; MTP modules are the layers after the last.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use fathom_numerics::formats::E4M3;
use fathom_trace::{DType, Parallel};
use half::f16;
use serde_json::Value;

use super::tensors::{Entry, TensorsError, TensorsFile};

pub use super::save::{SavedType, convert_folder, save, save_as, save_tokenizer, split};
use crate::backend::Backend;
use crate::files::{self, VALUE, shorten};
use crate::memory::room::NoRoom;
use crate::model::{Model, ParamKind, ParamSpec, Params, Part, convert};
use crate::precision::{Mode, Recipe};
use crate::{Tensor, data};
use fathom_config::{ConfigError, ModelConfig};

/// Why a checkpoint cannot be loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// The folder's `config.json` cannot be read, or says what no architecture here has.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of tensors cannot be read or written.
    #[error(transparent)]
    Tensors(#[from] TensorsError),
    /// The folder holds no weights.
    #[error("{}: expected model.safetensors or model.safetensors.index.json", folder.display())]
    NoWeights {
        /// The folder that the error is about.
        folder: PathBuf,
    },
    /// The index is not what it should be.
    #[error("{}: expected an object 'weight_map' of file names, found {found}", path.display())]
    Index {
        /// The index file that lists the tensors.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A tensor is absent.
    #[error("{}: tensor '{name}' is absent; expected shape {shape:?}", folder.display())]
    Missing {
        /// The folder that the error is about.
        folder: PathBuf,
        /// The tensor that the error is about.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}, tensor '{name}': expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The file that the error is about.
        path: PathBuf,
        /// The tensor that the error is about.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's element type is none that weights have.
    #[error("{}, tensor '{name}': expected element type {expected}, found {found}", path.display())]
    ElementType {
        /// The file that the error is about.
        path: PathBuf,
        /// The tensor that the error is about.
        name: String,
        /// The types that are read there.
        expected: &'static str,
        /// The type in the file.
        found: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("{}, tensor '{name}': expected finite numbers, found {found} at {index}",
            path.display())]
    NotFinite {
        /// The file that the error is about.
        path: PathBuf,
        /// The tensor that the error is about.
        name: String,
        /// Row-major index in the model's part of it.
        index: usize,
        /// The number that was found.
        found: f64,
    },
    /// Two files hold a tensor of one name.
    #[error("{} and {}: both hold tensor '{name}', expected one", first.display(), second.display())]
    Twice {
        /// The file that has it first.
        first: PathBuf,
        /// The file that has it again.
        second: PathBuf,
        /// The tensor that the error is about.
        name: String,
    },
    /// The files hold tensors that the configuration has no use for.
    #[error("{}, tensor '{name}': expected only what config.json asks for{}{}", path.display(),
            match others { 0 => String::new(), n => format!(", as of {n} other tensors") },
            if *mtp { "; --without-mtp leaves MTP modules out" } else { "" })]
    Unused {
        /// The file that the error is about.
        path: PathBuf,
        /// The first of them by name.
        name: String,
        /// How many there are beside it.
        others: usize,
        /// Whether it belongs to an MTP module beyond the announced.
        mtp: bool,
    },
    /// The configuration announces MTP modules that the files do not hold.
    #[error(
        "{}: config.json announces {announced} MTP modules (num_nextn_predict_layers), the files \
         hold {found}: '{name}' is absent; --without-mtp goes on without MTP modules, or set \
         num_nextn_predict_layers to {found} to load the model without the others", folder.display()
    )]
    MissingMtp {
        /// The folder that the error is about.
        folder: PathBuf,
        /// Modules of the configuration.
        announced: usize,
        /// Modules in the files.
        found: usize,
        /// The first absent tensor.
        name: String,
    },
    /// The architecture has no form in this layout.
    #[error("this architecture cannot be written as a deepseek_v3 configuration: {reason}")]
    Unspeakable {
        /// What of the architecture that layout cannot say.
        reason: &'static str,
    },
    /// A model was to be converted into its own folder.
    #[error("{}: expected another folder to write to", folder.display())]
    SameFolder {
        /// The folder that the error is about.
        folder: PathBuf,
    },
    /// The model cannot be laid out.
    #[error(transparent)]
    Build(#[from] crate::model::BuildError),
    /// The backend refused a tensor.
    #[error(transparent)]
    Backend(#[from] crate::EngineError),
    /// The tokenizer cannot be written beside the weights.
    #[error(transparent)]
    Tokenizer(#[from] data::DataError),
    /// The model is larger than the memory.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// An opened checkpoint: its configuration and where its tensors lie. The files stay mapped, their
/// values are read only when they are asked for.
#[derive(Debug)]
pub struct HfCheckpoint {
    /// The folder that the error is about.
    pub folder: PathBuf,
    /// The architecture that `config.json` describes; without MTP modules where they were left out.
    pub config: ModelConfig,
    files: Vec<TensorsFile>,
    index: BTreeMap<String, usize>,
    /// Whether MTP modules are left out, whatever the configuration and the files say.
    without_mtp: bool,
}

/// Element types of weights that are read as they are.
const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];
const FLOAT_NAMES: &str = "F64, F32, F16 or BF16";

/// Where a part of a parameter lies.
struct Found<'a> {
    file: &'a TensorsFile,
    name: String,
    entry: &'a Entry,
    /// Rows of the tensor as it lies in the file, from the first byte on.
    start: usize,
    shape: &'a [usize],
    /// Name, file and entry of the blocks' scales of FP8.
    scale: Option<(String, &'a TensorsFile, &'a Entry)>,
}

/// Side of the blocks that share a scale in FP8 checkpoints.
pub(super) const FP8_BLOCK: usize = 128;

impl HfCheckpoint {
    /// Opens a folder: reads the configuration and the headers of its files, no weights.
    ///
    /// # Errors
    /// [`HfError`].
    pub fn open(folder: &Path) -> Result<HfCheckpoint, HfError> {
        HfCheckpoint::open_as(folder, false)
    }

    /// As [`HfCheckpoint::open`]; `without_mtp` leaves MTP modules out, announced or held.
    ///
    /// # Errors
    /// [`HfError`].
    pub fn open_as(folder: &Path, without_mtp: bool) -> Result<HfCheckpoint, HfError> {
        let mut config = ModelConfig::from_hf_file(&folder.join("config.json"))?;
        if without_mtp {
            config.mtp_depth = 0;
        }
        let mut files: Vec<TensorsFile> = Vec::new();
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        for path in weight_files(folder)? {
            let file = TensorsFile::open(&path)?;
            for name in file.entries.keys() {
                if let Some(other) = index.insert(name.clone(), files.len()) {
                    let (first, second) = (files[other].path.clone(), path);
                    return Err(HfError::Twice { first, second, name: name.clone() });
                }
            }
            files.push(file);
        }
        let eh_proj = |d: usize| format!("model.layers.{}.eh_proj.weight", config.layers + d);
        let announced = config.mtp_depth;
        if let Some(found) = (0..announced).find(|&d| !index.contains_key(&eh_proj(d))) {
            let (folder, name) = (folder.to_owned(), eh_proj(found));
            return Err(HfError::MissingMtp { folder, announced, found, name });
        }
        Ok(HfCheckpoint { folder: folder.to_owned(), config, files, index, without_mtp })
    }

    /// The values of a model's parameters, in its master precision.
    ///
    /// # Errors
    /// [`HfError`] naming the tensor that is absent, has the wrong shape or type or is not finite;
    /// where the model is the whole of the folder's, one that it has no use for.
    pub fn load<B: Backend>(&self, model: &Model, backend: &B) -> Result<Params<B>, HfError> {
        self.check(model)?;
        let mut buffers = Vec::with_capacity(model.specs.len());
        for spec in &model.specs {
            buffers.push(backend.upload(self.parameter(spec, model.recipe.master())?)?);
        }
        Ok(Params { buffers })
    }

    /// Checks that every tensor of the configuration is there with its shape, and none that it has
    /// no use for, without reading them.
    ///
    /// # Errors
    /// [`HfError`] naming the first tensor that is not as it should be.
    pub fn check_shapes(&self) -> Result<(), HfError> {
        let recipe = Recipe::new(Mode::Fp32);
        self.check(&Model::new(&self.config, recipe, Parallel::default(), 0)?)
    }

    /// Checks that every tensor of the model is there with its shape, and, where the model is
    /// whole, none that it has no use for.
    pub(crate) fn check(&self, model: &Model) -> Result<(), HfError> {
        let mut used = BTreeSet::new();
        for spec in &model.specs {
            for part in &spec.parts {
                match self.find(part)? {
                    Some(found) => {
                        used.extend(found.scale.into_iter().map(|(name, ..)| name));
                        used.insert(found.name);
                    }
                    // Checkpoints of models that never moved the bias may leave it out.
                    None if spec.kind == ParamKind::SelectionBias => {}
                    None => return Err(self.missing(part)),
                }
            }
        }
        let whole = model.parallel == Parallel::default();
        if whole { self.refuse_unused(model, &used) } else { Ok(()) }
    }

    /// Refuses tensors that nobody asked for: the configuration is another model's then.
    fn refuse_unused(&self, model: &Model, used: &BTreeSet<String>) -> Result<(), HfError> {
        let ModelConfig { layers, mtp_depth, tie_word_embeddings, .. } = model.config;
        // A model that is trained on may leave out modules that the folder announces.
        let fewer = mtp_depth < self.config.mtp_depth;
        let is_module = |layer: usize| {
            let name = format!("model.layers.{layer}.eh_proj.weight");
            layer >= layers && self.index.contains_key(&name)
        };
        let module = |name: &str| layer_of(name).is_some_and(is_module);
        let idle = |name: &&String| {
            let copy = name.ends_with(".embed_tokens.weight")
                || name.ends_with(".shared_head.head.weight")
                || name.strip_suffix("_scale_inv").is_some_and(|of| used.contains(of));
            let announced = layer_of(name).is_some_and(|l| l < layers + self.config.mtp_depth);
            let tied = tie_word_embeddings && name.as_str() == "lm_head.weight";
            let known = (copy || fewer) && module(name) && announced
                || tied
                || name.ends_with("rotary_emb.inv_freq")
                || self.without_mtp && module(name);
            !used.contains(*name) && !known
        };
        let mut unused = self.index.keys().filter(idle);
        let Some(name) = unused.next() else { return Ok(()) };
        Err(HfError::Unused {
            path: self.files[self.index[name]].path.clone(),
            name: name.clone(),
            others: unused.count(),
            mtp: module(name),
        })
    }

    fn parameter(&self, spec: &ParamSpec, dtype: DType) -> Result<Tensor, HfError> {
        let mut bytes = Vec::with_capacity(spec.elements() * dtype.size());
        for part in &spec.parts {
            let tensor = match self.find(part)? {
                Some(found) => {
                    let tensor = found.read();
                    found.refuse_not_finite(&tensor)?;
                    tensor
                }
                None if spec.kind == ParamKind::SelectionBias => {
                    Tensor::zeros(DType::F32, &part.shape)
                }
                None => return Err(self.missing(part)),
            };
            bytes.extend_from_slice(convert(tensor, dtype).bytes());
        }
        Ok(Tensor::from_bytes(dtype, &spec.shape, &bytes))
    }

    fn missing(&self, part: &Part) -> HfError {
        let (folder, name) = (self.folder.clone(), part.name.clone());
        HfError::Missing { folder, name, shape: part.shape.clone() }
    }

    /// Where a checkpoint tensor lies: under its own name, or among stacked experts.
    fn find<'a>(&'a self, part: &'a Part) -> Result<Option<Found<'a>>, HfError> {
        if let Some(found) = self.whole(part)? {
            return Ok(Some(found));
        }
        let Some((prefix, rest)) = part.name.split_once(".experts.") else {
            return Ok(None);
        };
        let Some((expert, projection)) = rest.split_once('.') else {
            return Ok(None);
        };
        let (Ok(expert), Some(projection)) =
            (expert.parse::<usize>(), projection.strip_suffix(".weight"))
        else {
            return Ok(None);
        };
        let rows = part.shape[0];
        let fused = match projection {
            "gate_proj" => Some(("gate_up_proj", 0, 2 * rows)),
            "up_proj" => Some(("gate_up_proj", rows, 2 * rows)),
            _ => None,
        };
        for (name, first, height) in [Some((projection, 0, rows)), fused].into_iter().flatten() {
            for suffix in ["", ".weight"] {
                let name = format!("{prefix}.experts.{name}{suffix}");
                if let Some(found) = self.stacked(name, part, expert, first, height)? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    /// Rows of expert `expert`, from `first` on, in a tensor \[experts, height, columns\].
    fn stacked<'a>(
        &'a self,
        name: String,
        part: &'a Part,
        expert: usize,
        first: usize,
        height: usize,
    ) -> Result<Option<Found<'a>>, HfError> {
        let Some((name, file, entry)) = self.entry(&name) else {
            return Ok(None);
        };
        let columns = part.shape[1];
        let experts = entry.shape.first().copied().unwrap_or(0);
        let expected = [experts.max(expert + 1), height, columns];
        shaped(file, name, entry, &expected)?;
        typed(file, name, entry, &FLOATS, FLOAT_NAMES)?;
        let start = (expert * height + first) * columns * entry.dtype.size();
        let (name, shape) = (name.to_owned(), &part.shape[..]);
        Ok(Some(Found { file, name, entry, start, shape, scale: None }))
    }

    /// A tensor of its own; FP8 comes with its blocks' scales.
    fn whole<'a>(&'a self, part: &'a Part) -> Result<Option<Found<'a>>, HfError> {
        let Some((name, file, entry)) = self.entry(&part.name) else {
            return Ok(None);
        };
        let shape = &part.shape[..];
        shaped(file, name, entry, shape)?;
        let own = name.to_owned();
        if entry.dtype != DType::F8E4M3 {
            typed(file, name, entry, &FLOATS, "F64, F32, F16, BF16 or F8_E4M3")?;
            return Ok(Some(Found { file, name: own, entry, start: 0, shape, scale: None }));
        }
        let &[rows, columns] = shape else {
            typed(file, name, entry, &FLOATS, FLOAT_NAMES)?;
            return Ok(None);
        };
        let blocks = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
        let scale_name = format!("{}_scale_inv", part.name);
        let Some((name, scale_file, scale)) = self.entry(&scale_name) else {
            return Err(self.missing(&Part { name: scale_name, shape: blocks.to_vec() }));
        };
        shaped(scale_file, name, scale, &blocks)?;
        typed(scale_file, name, scale, &FLOATS, FLOAT_NAMES)?;
        let scale = Some((name.to_owned(), scale_file, scale));
        Ok(Some(Found { file, name: own, entry, start: 0, shape, scale }))
    }

    /// A tensor by its name, which some checkpoints write without `model.`.
    fn entry(&self, name: &str) -> Option<(&str, &TensorsFile, &Entry)> {
        let names = [Some(name), name.strip_prefix("model.")];
        names.into_iter().flatten().find_map(|name| {
            let (name, &number) = self.index.get_key_value(name)?;
            let file = &self.files[number];
            Some((name.as_str(), file, &file.entries[name]))
        })
    }
}

/// The layer in a tensor's name.
fn layer_of(name: &str) -> Option<usize> {
    name.split_once("layers.")?.1.split('.').next()?.parse().ok()
}

fn shaped(file: &TensorsFile, name: &str, at: &Entry, expected: &[usize]) -> Result<(), HfError> {
    if at.shape == expected {
        return Ok(());
    }
    Err(HfError::Shape {
        path: file.path.clone(),
        name: name.to_owned(),
        expected: expected.to_vec(),
        found: at.shape.clone(),
    })
}

fn typed(
    file: &TensorsFile,
    name: &str,
    at: &Entry,
    read: &[DType],
    expected: &'static str,
) -> Result<(), HfError> {
    if read.contains(&at.dtype) {
        return Ok(());
    }
    let (path, name, found) = (file.path.clone(), name.to_owned(), at.dtype.name());
    Err(HfError::ElementType { path, name, expected, found })
}

impl Found<'_> {
    /// The values as F32 or F64; FP8 is multiplied by its blocks' scales.
    fn read(&self) -> Tensor {
        let bytes = self.shape.iter().product::<usize>() * self.entry.dtype.size();
        let all = self.file.bytes(self.entry);
        let own = &all[self.start..self.start + bytes];
        let tensor = Tensor::from_bytes(self.entry.dtype, self.shape, own);
        let Some((_, scale_file, scale)) = &self.scale else {
            return widen(tensor);
        };
        let blocks = scale.shape[1];
        let scale = Tensor::from_bytes(scale.dtype, &scale.shape, scale_file.bytes(scale));
        let scale = convert(widen(scale), DType::F32);
        let scale = scale.as_slice::<f32>();
        let columns = self.shape[1];
        let codes = tensor.reinterpret(DType::U8);
        let value = |(i, &code): (usize, &u8)| {
            let (row, column) = (i / columns, i % columns);
            E4M3(code).to_f32() * scale[row / FP8_BLOCK * blocks + column / FP8_BLOCK]
        };
        let values = codes.as_slice::<u8>().iter().enumerate().map(value).collect();
        Tensor::from_vec(self.shape, values)
    }

    fn refuse_not_finite(&self, read: &Tensor) -> Result<(), HfError> {
        let Some((index, found)) = read.first_not_finite() else {
            return Ok(());
        };
        let (path, name) = (self.file.path.clone(), self.name.clone());
        Err(HfError::NotFinite { path, name, index, found })
    }
}

/// F16 and BF16 become F32; F32 and F64 stay.
fn widen(tensor: Tensor) -> Tensor {
    match tensor.dtype() {
        DType::F16 => {
            let values = tensor.as_slice::<f16>().iter().map(|x| x.to_f32()).collect();
            Tensor::from_vec(tensor.shape(), values)
        }
        DType::BF16 => convert(tensor, DType::F32),
        _ => tensor,
    }
}

/// The files that hold the weights, in order of name.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, HfError> {
    let path = folder.join("model.safetensors.index.json");
    if !path.is_file() {
        let single = folder.join("model.safetensors");
        if single.is_file() {
            return Ok(vec![single]);
        }
        return Err(HfError::NoWeights { folder: folder.to_owned() });
    }
    let io = |source| TensorsError::Io { path: path.clone(), source };
    let text = files::read_text(&path, files::TEXT_BYTES).map_err(io)?;
    let index =
        |found: String| HfError::Index { path: path.clone(), found: shorten(&found, VALUE) };
    let json: Value = serde_json::from_str(&text).map_err(|e| index(e.to_string()))?;
    let Some(map) = json["weight_map"].as_object() else {
        return Err(index(json["weight_map"].to_string()));
    };
    let mut names: Vec<&str> = Vec::new();
    for value in map.values() {
        names.push(value.as_str().ok_or_else(|| index(value.to_string()))?);
    }
    names.sort_unstable();
    names.dedup();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}
