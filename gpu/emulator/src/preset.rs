//! Device presets: the GPUs of `fathom-config` that the emulator can be.

use std::ops::{Deref, DerefMut};

use fathom_config::presets::GPUS;
use fathom_config::{CudaDevice, Gpu};

use crate::error::Error;

/// An emulated device: what CUDA reports of it, and what the machine needs beside.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// Key of the preset, `h800` for instance.
    pub key: String,
    /// Streaming multiprocessors of the GPU.
    pub sm_count: u32,
    cuda: CudaDevice,
}

impl Deref for Preset {
    type Target = CudaDevice;

    fn deref(&self) -> &CudaDevice {
        &self.cuda
    }
}

impl DerefMut for Preset {
    fn deref_mut(&mut self) -> &mut CudaDevice {
        &mut self.cuda
    }
}

impl Preset {
    /// Lanes of a warp.
    pub const WARP: u32 = 32;
    /// Threads of a CTA at most.
    pub const MAX_THREADS_PER_BLOCK: u32 = 1024;
    /// 32-bit registers of an SM, and of a CTA at most.
    pub const REGISTERS_PER_SM: u32 = 65536;
    /// Bytes of constant memory that a module has at most.
    pub const CONST_BYTES: u32 = 65536;
    /// CTAs of a grid at most, in x, y, z.
    pub const MAX_GRID: [u32; 3] = [0x7fff_ffff, 65535, 65535];
    /// Threads of a CTA at most, in x, y, z.
    pub const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];

    /// Every GPU of which the project says what CUDA reports, and `next`, sorted by key.
    pub fn all() -> Vec<Preset> {
        let mut presets: Vec<Preset> = GPUS.iter().filter_map(|(key, _)| preset(key)).collect();
        presets.extend(next());
        presets.sort_by(|a, b| a.key.cmp(&b.key));
        presets
    }

    /// The preset called `key` (`h800`, for instance).
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
        let by_threads = self.threads_per_sm / (warps * 32);
        let per_warp = (registers.max(1) * 32).next_multiple_of(256);
        // Each of the four parts of an SM has a quarter of them.
        let by_registers = (Self::REGISTERS_PER_SM / per_warp & !3) / warps;
        let shared = (shared_bytes + self.shared_bytes_reserved).next_multiple_of(128);
        let by_shared = self.shared_bytes_per_sm / shared;
        by_threads.min(by_registers).min(by_shared).min(self.blocks_per_sm)
    }
}

/// `next`: the RTX PRO 6000 with a compute capability of 13.0, for which no library of today has
/// machine code. Libraries that choose between machine code and PTX by themselves, as cuBLAS does,
/// then hand over their PTX.
fn next() -> Option<Preset> {
    let mut next = preset("rtx-pro-6000")?;
    next.key = "next".into();
    next.name = "next GPU (emulated)".into();
    next.compute_capability = [13, 0];
    Some(next)
}

fn preset(key: &str) -> Option<Preset> {
    let gpu = Gpu::preset(key).expect("a preset of ours");
    let mut cuda = gpu.cuda?;
    cuda.name.push_str(" (emulated)");
    Some(Preset { key: key.to_owned(), sm_count: gpu.sms as u32, cuda })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_load_and_unknown_one_lists_them() {
        let keys: Vec<_> = Preset::all().into_iter().map(|p| p.key).collect();
        assert_eq!(keys, ["a100", "h100", "h200", "h800", "next", "rtx-pro-6000"]);
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
