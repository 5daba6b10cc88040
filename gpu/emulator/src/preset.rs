//! Device presets: the limits and names of a GPU, as data (`presets.toml`).

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::Error;

/// Limits and identity of an emulated device. All sizes are bytes, clocks kHz.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// Key of the preset, `h800` for instance.
    #[serde(skip)]
    pub key: String,
    /// Marketing name, with `(emulated)` after it.
    pub name: String,
    /// Compute capability: major, minor.
    pub compute_capability: [u32; 2],
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// SM clock; `clock64` counts emulated cycles of it.
    pub clock_khz: u32,
    /// Memory clock.
    pub memory_clock_khz: u32,
    /// Memory bus width in bits.
    pub memory_bus_bits: u32,
    /// Device memory; allocations beyond it fail.
    pub memory_bytes: u64,
    /// Level-2 cache.
    pub l2_bytes: u32,
    /// Shared memory of one SM.
    pub shared_bytes_per_sm: u32,
    /// Shared memory a CTA may have without opting in.
    pub shared_bytes_per_block: u32,
    /// Shared memory a CTA may have after opting in.
    pub shared_bytes_per_block_optin: u32,
    /// Shared memory the system keeps of each CTA, at its start.
    pub shared_bytes_reserved: u32,
    /// Largest portable cluster; 1 where there are no clusters.
    pub max_cluster_ctas: u32,
    /// Largest cluster with the non-portable attribute set.
    pub max_cluster_ctas_nonportable: u32,
}

impl Preset {
    /// Warp width.
    pub const WARP: u32 = 32;
    /// Threads of a CTA at most.
    pub const MAX_THREADS_PER_BLOCK: u32 = 1024;
    /// Threads resident on an SM at most.
    pub const MAX_THREADS_PER_SM: u32 = 2048;
    /// CTAs resident on an SM at most.
    pub const MAX_BLOCKS_PER_SM: u32 = 32;
    /// 32-bit registers of an SM, and of a CTA at most.
    pub const REGISTERS_PER_SM: u32 = 65536;
    /// Constant memory of a module.
    pub const CONST_BYTES: u32 = 65536;
    /// CTAs of a grid at most, in x, y, z.
    pub const MAX_GRID: [u32; 3] = [0x7fff_ffff, 65535, 65535];
    /// Threads of a CTA at most, in x, y, z.
    pub const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];

    /// Every preset, sorted by key.
    pub fn all() -> Vec<Preset> {
        let map: BTreeMap<String, Preset> =
            toml::from_str(include_str!("../presets.toml")).expect("presets.toml is valid");
        map.into_iter().map(|(key, preset)| Preset { key, ..preset }).collect()
    }

    /// The preset called `key` (`h100`, `h800`, `h200`, `a100`).
    ///
    /// # Errors
    /// [`Error::UnknownPreset`] names the known ones.
    pub fn named(key: &str) -> Result<Preset, Error> {
        let all = Self::all();
        let known = all.iter().map(|p| p.key.as_str()).collect::<Vec<_>>().join(", ");
        all.into_iter()
            .find(|p| p.key == key)
            .ok_or_else(|| Error::UnknownPreset { found: key.into(), known })
    }

    /// CTAs of `threads` threads, `registers` a thread and `shared_bytes` that fit on an SM.
    pub fn blocks_per_sm(&self, threads: u32, registers: u32, shared_bytes: u32) -> u32 {
        let warps = threads.div_ceil(32).max(1);
        let by_threads = Self::MAX_THREADS_PER_SM / (warps * 32);
        let per_warp = (registers.max(1) * 32).next_multiple_of(256);
        // Each of the four parts of an SM has a quarter of them.
        let by_registers = (Self::REGISTERS_PER_SM / per_warp & !3) / warps;
        let shared = (shared_bytes + self.shared_bytes_reserved).next_multiple_of(128);
        let by_shared = self.shared_bytes_per_sm / shared;
        by_threads.min(by_registers).min(by_shared).min(Self::MAX_BLOCKS_PER_SM)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_load_and_unknown_one_lists_them() {
        let keys: Vec<_> = Preset::all().into_iter().map(|p| p.key).collect();
        assert_eq!(keys, ["a100", "h100", "h200", "h800"]);
        let message = Preset::named("v100").unwrap_err().to_string();
        assert!(message.contains("v100") && message.contains("a100, h100, h200, h800"));
    }

    #[test]
    fn occupancy_follows_the_scarcest_resource() {
        let h100 = Preset::named("h100").unwrap();
        assert_eq!(h100.blocks_per_sm(128, 32, 0), 16);
        assert_eq!(h100.blocks_per_sm(128, 255, 0), 2);
        assert_eq!(h100.blocks_per_sm(384, 168, 200 * 1024), 1);
        // 23 warps of 88 registers, five a part: not two CTAs of eleven.
        assert_eq!(h100.blocks_per_sm(352, 88, 0), 1);
        assert_eq!(h100.blocks_per_sm(352, 80, 0), 2);
        assert_eq!(h100.blocks_per_sm(32, 16, 100 * 1024), 2);
    }
}
