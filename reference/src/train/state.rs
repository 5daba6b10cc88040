//! A trainer to a checkpoint, and back from one.
//!
//! Tensors are named `weights/NAME`, `first/NAME`, `second/NAME` (moments), `average/NAME` and
//! `amax/NAME` (histories of delayed scales) by the parameter; the header holds the run's
//! configuration, the counters and the place in the data.

use serde::{Deserialize, Serialize};

use super::taken::Taken;
use super::{TrainConfig, TrainError, Trainer};
use crate::backend::Backend;
use crate::checkpoint::training::Saved;
use crate::data::LoaderState;
use crate::model::Params;
use crate::optim::Optimizer;

/// What a training checkpoint's header holds beside its tensors.
#[derive(Debug, Serialize, Deserialize)]
pub struct Header {
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Updates of the optimizer so far, which its bias corrections count.
    pub updates: u64,
    /// The configuration of the run, complete but for `recipe.fused`.
    pub config: TrainConfig,
    /// The place in the data from which the next step reads.
    pub data: LoaderState,
}

impl Header {
    /// Reads the header of a checkpoint.
    ///
    /// # Errors
    /// [`TrainError::Setting`] where it is that of another version.
    pub fn of(saved: &Saved) -> Result<Header, TrainError> {
        serde_path_to_error::deserialize(&saved.header).map_err(|e| TrainError::Setting {
            key: format!("the checkpoint's header, {}", e.path()),
            message: e.inner().to_string(),
        })
    }
}

impl<B: Backend> Trainer<B> {
    /// Everything needed to go on from here to the bit.
    ///
    /// # Errors
    /// Those of the backend.
    pub fn save(&self) -> Result<Saved, TrainError> {
        let mut tensors = Vec::new();
        let download = |b: &B::Buffer| self.backend.download(b);
        for (spec, buffer) in self.model.specs.iter().zip(&self.params.buffers) {
            tensors.push((format!("weights/{}", spec.name), download(buffer)?));
        }
        let moments = [("first", &self.optimizer.first), ("second", &self.optimizer.second)];
        for (name, moments) in moments {
            for (spec, moment) in self.model.specs.iter().zip(moments) {
                if let Some(moment) = moment {
                    tensors.push((format!("{name}/{}", spec.name), download(moment)?));
                }
            }
        }
        if let Some(ema) = &self.ema {
            let named = self.model.specs.iter().zip(ema.read());
            tensors.extend(named.map(|(spec, t)| (format!("average/{}", spec.name), t)));
        }
        tensors.extend(self.amax.iter().flat_map(|amax| amax.save(&self.model)));
        let header = Header {
            tokens: self.tokens,
            updates: self.optimizer.updates,
            config: self.config.saved(),
            data: self.loader.state(),
        };
        let header = serde_json::to_value(header).expect("plain data");
        Ok(Saved { step: self.steps, header, tensors })
    }

    /// A run that goes on from a checkpoint, with the settings of `config`.
    ///
    /// # Errors
    /// [`TrainError`], where `config` asks for another model or other data than the checkpoint's.
    pub fn resume(config: TrainConfig, backend: B, saved: Saved) -> Result<Trainer<B>, TrainError> {
        let header = Header::of(&saved)?;
        let mut trainer = Trainer::prepare(config, backend)?;
        let (steps, mut taken) = (saved.step, Taken::new(&saved));
        let master = trainer.model.recipe.master();
        let moment = Optimizer::<B>::moment_dtype(&trainer.config.optim, &trainer.model);
        let (mut weights, mut average) = (Vec::new(), Vec::new());
        let (mut first, mut second) = (Vec::new(), Vec::new());
        for spec in &trainer.model.specs {
            weights.push(trainer.backend.upload(taken.take("weights", spec, master)?)?);
            for (kind, moments) in [("first", &mut first), ("second", &mut second)] {
                moments.push(match spec.trained() {
                    true => {
                        let tensor = taken.take(kind, spec, moment)?;
                        Some(trainer.backend.upload(tensor)?)
                    }
                    false => None,
                });
            }
            if trainer.config.optim.ema_decay > 0.0 {
                average.push(taken.take("average", spec, master)?);
            }
        }
        trainer.params = Params { buffers: weights };
        let (updates, optim) = (header.updates, trainer.config.optim.clone());
        trainer.optimizer = Optimizer { config: optim, updates, first, second };
        trainer.start_ema(average);
        if let Some(amax) = &mut trainer.amax {
            amax.restore(&trainer.model, &mut taken)?;
        }
        trainer.loader.restore(&header.data)?;
        (trainer.steps, trainer.tokens) = (steps, header.tokens);
        Ok(trainer)
    }
}
