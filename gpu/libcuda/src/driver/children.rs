//! What kernels launch (CUDA's dynamic parallelism): run when the kernel has ended, one after the
//! other, in the order of the calls. Each ends with all that it launched itself before the next
//! begins. That is one of the orders that hardware may take, since a kernel cannot wait for what it
//! launched. `children.ptx` is the device's side of it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use fathom_emulator::{Function, LaunchConfig, Module};

use super::Driver;
use crate::abi::*;

/// The device runtime's functions that start work, in PTX.
pub(super) const TEXT: &str = include_str!("../children.ptx");

/// Whether a module with them was ever loaded: no other launch need look.
pub(super) static LINKED: AtomicBool = AtomicBool::new(false);

/// Bytes of a slot before the parameters, and of the whole.
const HEAD: usize = 64;
const SLOT: usize = HEAD + 4096;

/// What stands in the place of a kernel's address.
const COPY: u64 = 0;
const FILL: u64 = 1;

/// `cudaStreamTailLaunch`: behind everything else.
const TAIL: u64 = 3;

/// A slot that was handed in.
struct Child {
    kernel: u64,
    stream: u64,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    number: u32,
    params: Vec<u8>,
}

impl Child {
    fn read(slot: &[u8]) -> Child {
        let u32_at = |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().expect("4 bytes"));
        let three = |at: usize| [u32_at(at), u32_at(at + 4), u32_at(at + 8)];
        Child {
            kernel: u64_at(slot, 0),
            stream: u64_at(slot, 8),
            grid: three(16),
            block: three(28),
            shared_bytes: u32_at(40),
            number: u32_at(44),
            params: slot[HEAD..].to_vec(),
        }
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// What kernels of a module have launched since this was last asked, in order.
fn launched(module: &Module) -> R<Vec<Child>> {
    let symbols = (module.symbol("__fathom_children_counts"), module.symbol("__fathom_children"));
    let (Ok(counts), Ok(slots)) = symbols else { return Ok(Vec::new()) };
    let memory = module.device().memory();
    let (mut given, mut slot) = ([0; 4], vec![0; SLOT]);
    memory.read(counts.address, &mut given).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
    let given = u64::from(u32::from_le_bytes(given)).min(slots.bytes / SLOT as u64);
    if given > 0 {
        memory.write(counts.address, &[0; 8]).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
    }
    let mut children = Vec::new();
    for at in 0..given {
        let address = slots.address + at * SLOT as u64;
        memory.read(address, &mut slot).map_err(|_| ERROR_ILLEGAL_ADDRESS)?;
        children.push(Child::read(&slot));
    }
    children.retain(|child| child.number > 0);
    children.sort_by_key(|child| (child.stream == TAIL, child.number));
    Ok(children)
}

impl Driver {
    /// Runs what a kernel that has ended launched, and what that launched.
    pub(super) fn run_children(&self, parent: &Function) -> R {
        if !LINKED.load(Relaxed) {
            return Ok(());
        }
        let module = parent.module();
        for child in launched(module)? {
            // After an error nothing runs, as on hardware.
            if self.error().is_err() {
                break;
            }
            self.run_child(module, child)?;
        }
        Ok(())
    }

    fn run_child(&self, module: &Module, child: Child) -> R {
        let memory = module.device().memory();
        let [to, second, count] = [0, 8, 16].map(|at| u64_at(&child.params, at));
        let bad = |_| ERROR_ILLEGAL_ADDRESS;
        match child.kernel {
            COPY => memory.copy(to, second, count).map_err(bad),
            FILL => memory.fill(to, &[second as u8], count).map_err(bad),
            kernel => {
                let function = module.function_at(kernel).ok_or(ERROR_INVALID_HANDLE)?;
                let params = child.params[..function.param_bytes().min(SLOT - HEAD)].to_vec();
                let mut config = LaunchConfig::new(child.grid, child.block, params);
                config.dynamic_shared_bytes = child.shared_bytes;
                // A launch that cannot run is told and left out: the kernel that asked has ended.
                if self.can_launch(&function, &config).is_err() {
                    return Ok(());
                }
                self.run(&[(function, config)])
            }
        }
    }
}
