//! What a search of layouts varies, as a scenario says it; [`mod@crate::search`] goes through it.

use fathom_schedule::ScheduleKind;
use serde::{Deserialize, Serialize};

use super::Recompute;

/// What is varied: TOML table `[search]`. A list of one value keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SearchSpace {
    /// Numbers of tensor-parallel ranks to try.
    pub tp: Vec<u64>,
    /// Numbers of context-parallel ranks to try.
    pub cp: Vec<u64>,
    /// Numbers of pipeline stages to try.
    pub pp: Vec<u64>,
    /// Expert-parallel ranks; 1 for dense models whatever the list.
    pub ep: Vec<u64>,
    /// ZeRO stages, 0 to 3.
    pub zero: Vec<u8>,
    /// Pipeline schedules to try.
    pub schedule: Vec<ScheduleKind>,
    /// Stages that a rank holds in the interleaved schedule.
    pub interleave: Vec<u64>,
    /// Sequences of a micro-batch.
    pub micro_batch: Vec<u64>,
    /// What is recomputed in the backward.
    pub recompute: Vec<Recompute>,
    /// GPUs of the cluster; empty keeps the scenario's.
    pub gpus: Vec<u64>,
    /// Most bytes per GPU that a rank may hold, in 1e9; 0 takes the GPU's memory less its headroom.
    pub memory_limit_gb: f64,
}

impl Default for SearchSpace {
    fn default() -> Self {
        SearchSpace {
            tp: vec![1, 2, 4, 8],
            cp: vec![1, 2],
            pp: vec![1, 2, 4, 8, 16, 32],
            ep: vec![1, 4, 8, 16, 32, 64, 128],
            zero: vec![0, 1],
            schedule: ScheduleKind::ALL.to_vec(),
            interleave: vec![2, 4],
            micro_batch: vec![1, 2, 4],
            recompute: vec![Recompute::None, Recompute::Selective, Recompute::Full],
            gpus: Vec::new(),
            memory_limit_gb: 0.0,
        }
    }
}

impl SearchSpace {
    /// The same lists with every value once, where it stands first.
    pub(crate) fn without_repetition(&self) -> SearchSpace {
        fn once<T: PartialEq + Clone>(list: &[T]) -> Vec<T> {
            let first = |(i, x): &(usize, &T)| !list[..*i].contains(x);
            list.iter().enumerate().filter(first).map(|(_, x)| x.clone()).collect()
        }
        SearchSpace {
            tp: once(&self.tp),
            cp: once(&self.cp),
            pp: once(&self.pp),
            ep: once(&self.ep),
            zero: once(&self.zero),
            schedule: once(&self.schedule),
            interleave: once(&self.interleave),
            micro_batch: once(&self.micro_batch),
            recompute: once(&self.recompute),
            gpus: once(&self.gpus),
            memory_limit_gb: self.memory_limit_gb,
        }
    }
}
