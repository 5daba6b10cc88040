//! Pipeline schedules as explicit instruction streams, one list a rank.

use serde::{Deserialize, Serialize};

/// The schedules that can be simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ScheduleKind {
    /// All forwards, then all backwards.
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward.
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B with several stages a rank in a loop.
    #[serde(rename = "interleaved")]
    Interleaved,
    /// Zero bubble H1: 1F1B's memory, weight gradients fill the drain.
    #[serde(rename = "zb1p")]
    Zb1p,
    /// Zero bubble, two stages a rank in a V.
    #[serde(rename = "zb-v")]
    ZbV,
    /// Two directions, two copies of the weights.
    #[serde(rename = "chimera")]
    Chimera,
    /// DeepSeek's bidirectional schedule with overlapped pairs.
    #[serde(rename = "dualpipe")]
    DualPipe,
    /// DualPipe cut in half: a V on half the ranks.
    #[serde(rename = "dualpipev")]
    DualPipeV,
}
