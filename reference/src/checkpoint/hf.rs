//! Checkpoints in Hugging Face's layout: `config.json`, one or many safetensors files, an index.
//!
//! Weights may be F64, F32, BF16, F16 or FP8 (E4M3, with `NAME_scale_inv` for every 128 x 128
//! block); experts may stand one by one or stacked; MTP modules are the layers after the last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fathom_numerics::formats::E4M3;
use fathom_trace::{DType, Parallel};
use half::f16;
use serde_json::Value;

use super::tensors::{self, TensorsError, TensorsFile};

pub use super::save::{SavedType, convert_folder, save, save_as, split};
use crate::Tensor;
use crate::backend::Backend;
use crate::config::{ConfigError, ModelConfig};
use crate::model::{Model, ParamKind, ParamSpec, Params, Part, convert};
use crate::precision::{Mode, Recipe};

/// Why a checkpoint cannot be loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of tensors.
    #[error(transparent)]
    Tensors(#[from] TensorsError),
    /// The folder holds no weights.
    #[error("{}: expected model.safetensors or model.safetensors.index.json", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// The index is not what it should be.
    #[error("{}: expected an object 'weight_map' of file names, found {found}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A tensor is absent.
    #[error("{}: tensor '{name}' is absent; expected shape {shape:?}", folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
        /// The tensor.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}, tensor '{name}': expected shape {expected:?}, found {found:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The configuration announces MTP modules that the files do not hold.
    #[error(
        "{}: config.json announces {announced} MTP modules (num_nextn_predict_layers), the files \
         hold {found}: '{name}' is absent; set num_nextn_predict_layers to {found} to load the \
         model without the others", folder.display()
    )]
    MissingMtp {
        /// The folder.
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
        /// What of it.
        reason: &'static str,
    },
    /// A model was to be converted into its own folder.
    #[error("{}: expected another folder to write to", folder.display())]
    SameFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// The model cannot be laid out.
    #[error(transparent)]
    Build(#[from] crate::model::BuildError),
    /// The backend refused a tensor.
    #[error(transparent)]
    Backend(#[from] crate::EngineError),
}

/// An opened checkpoint: its configuration and where its tensors lie.
#[derive(Debug)]
pub struct HfCheckpoint {
    /// The folder.
    pub folder: PathBuf,
    /// The architecture.
    pub config: ModelConfig,
    files: Vec<TensorsFile>,
    index: BTreeMap<String, usize>,
}

/// Side of the blocks that share a scale in FP8 checkpoints.
pub(super) const FP8_BLOCK: usize = 128;

impl HfCheckpoint {
    /// Opens a folder: reads the configuration and the headers of its files.
    ///
    /// # Errors
    /// [`HfError`].
    pub fn open(folder: &Path) -> Result<HfCheckpoint, HfError> {
        let config = ModelConfig::from_hf_file(&folder.join("config.json"))?;
        let mut files = Vec::new();
        for path in weight_files(folder)? {
            files.push(TensorsFile::open(&path)?);
        }
        let mut index = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            index.extend(file.entries.keys().map(|name| (name.clone(), number)));
        }
        let eh_proj = |d: usize| format!("model.layers.{}.eh_proj.weight", config.layers + d);
        let announced = config.mtp_depth;
        if let Some(found) = (0..announced).find(|&d| !index.contains_key(&eh_proj(d))) {
            let (folder, name) = (folder.to_owned(), eh_proj(found));
            return Err(HfError::MissingMtp { folder, announced, found, name });
        }
        Ok(HfCheckpoint { folder: folder.to_owned(), config, files, index })
    }

    /// The values of a model's parameters, in its master precision.
    ///
    /// # Errors
    /// [`HfError`] naming the tensor that is absent or has the wrong shape.
    pub fn load<B: Backend>(&self, model: &Model, backend: &B) -> Result<Params<B>, HfError> {
        let mut buffers = Vec::with_capacity(model.specs.len());
        for spec in &model.specs {
            buffers.push(backend.upload(self.parameter(spec, model.recipe.master())?)?);
        }
        Ok(Params { buffers })
    }

    /// Checks that every tensor of the configuration is there with its shape, without reading it.
    ///
    /// # Errors
    /// [`HfError`] naming the first tensor that is not.
    pub fn check_shapes(&self) -> Result<(), HfError> {
        let recipe = Recipe::new(Mode::Fp32);
        let model = Model::new(&self.config, recipe, Parallel::default(), 0)?;
        for spec in model.specs.iter().filter(|s| s.kind != ParamKind::SelectionBias) {
            for part in &spec.parts {
                match self.entry(&part.name) {
                    Some((file, entry)) if entry.shape != part.shape => {
                        return Err(HfError::Shape {
                            path: file.path.clone(),
                            name: part.name.clone(),
                            expected: part.shape.clone(),
                            found: entry.shape.clone(),
                        });
                    }
                    Some(_) => {}
                    None if self.part(part)?.is_some() => {}
                    None => return Err(self.missing(part)),
                }
            }
        }
        Ok(())
    }

    fn parameter(&self, spec: &ParamSpec, dtype: DType) -> Result<Tensor, HfError> {
        let mut bytes = Vec::with_capacity(spec.elements() * dtype.size());
        for part in &spec.parts {
            let tensor = match self.part(part)? {
                Some(tensor) => tensor,
                // Checkpoints of models that never moved the bias may leave it out.
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

    /// A checkpoint tensor under its own name, or cut out of stacked experts.
    fn part(&self, part: &Part) -> Result<Option<Tensor>, HfError> {
        if let Some(tensor) = self.float(&part.name, &part.shape)? {
            return Ok(Some(tensor));
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
        let (rows, columns) = (part.shape[0], part.shape[1]);
        let fused = match projection {
            "gate_proj" => Some(("gate_up_proj", 0, 2 * rows)),
            "up_proj" => Some(("gate_up_proj", rows, 2 * rows)),
            _ => None,
        };
        for (name, first, height) in [Some((projection, 0, rows)), fused].into_iter().flatten() {
            for suffix in ["", ".weight"] {
                let name = format!("{prefix}.experts.{name}{suffix}");
                if let Some(rows) = self.stacked(&name, expert, [first, rows, height, columns])? {
                    return Ok(Some(rows));
                }
            }
        }
        Ok(None)
    }

    /// Rows `first .. first + rows` of expert `expert` in a tensor \[experts, height, columns\].
    fn stacked(
        &self,
        name: &str,
        expert: usize,
        [first, rows, height, columns]: [usize; 4],
    ) -> Result<Option<Tensor>, HfError> {
        let Some((file, entry)) = self.entry(name) else {
            return Ok(None);
        };
        let experts = entry.shape.first().copied().unwrap_or(0);
        if entry.shape != [experts, height, columns] || expert >= experts {
            return Err(HfError::Shape {
                path: file.path.clone(),
                name: name.to_owned(),
                expected: vec![experts.max(expert + 1), height, columns],
                found: entry.shape.clone(),
            });
        }
        let row = columns * entry.dtype.size();
        let start = (expert * height + first) * row;
        let bytes = &file.bytes(entry)[start..start + rows * row];
        Ok(Some(widen(Tensor::from_bytes(entry.dtype, &[rows, columns], bytes))))
    }

    fn entry(&self, name: &str) -> Option<(&TensorsFile, &tensors::Entry)> {
        let names = [Some(name), name.strip_prefix("model.")];
        names.into_iter().flatten().find_map(|name| {
            let file = &self.files[*self.index.get(name)?];
            Some((file, &file.entries[name]))
        })
    }

    /// A tensor as F32 or F64; FP8 is multiplied by its blocks' scales.
    fn float(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, HfError> {
        let Some((file, entry)) = self.entry(name) else {
            return Ok(None);
        };
        let check = |name: &str, expected: &[usize], found: &[usize]| match expected == found {
            true => Ok(()),
            false => Err(HfError::Shape {
                path: file.path.clone(),
                name: name.to_owned(),
                expected: expected.to_vec(),
                found: found.to_vec(),
            }),
        };
        check(name, shape, &entry.shape)?;
        let tensor = Tensor::from_bytes(entry.dtype, &entry.shape, file.bytes(entry));
        if entry.dtype != DType::F8E4M3 {
            return Ok(Some(widen(tensor)));
        }
        let scale_name = format!("{name}_scale_inv");
        let blocks = [shape[0].div_ceil(FP8_BLOCK), shape[1].div_ceil(FP8_BLOCK)];
        let Some((scale_file, scale_entry)) = self.entry(&scale_name) else {
            let part = Part { name: scale_name, shape: blocks.to_vec() };
            return Err(self.missing(&part));
        };
        check(&scale_name, &blocks, &scale_entry.shape)?;
        let bytes = scale_file.bytes(scale_entry);
        let scale = convert(
            widen(Tensor::from_bytes(scale_entry.dtype, &scale_entry.shape, bytes)),
            DType::F32,
        );
        let scale = scale.as_slice::<f32>();
        let codes = tensor.reinterpret(DType::U8);
        let value = |(i, &code): (usize, &u8)| {
            let (row, column) = (i / shape[1], i % shape[1]);
            E4M3(code).to_f32() * scale[row / FP8_BLOCK * blocks[1] + column / FP8_BLOCK]
        };
        let values = codes.as_slice::<u8>().iter().enumerate().map(value).collect();
        Ok(Some(Tensor::from_vec(shape, values)))
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
    let text = std::fs::read_to_string(&path).map_err(io)?;
    let index = |found: String| HfError::Index { path: path.clone(), found };
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
