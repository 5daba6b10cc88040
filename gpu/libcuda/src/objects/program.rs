//! Loaded code: modules of a context, libraries of the process, and their functions.
//!
//! A library belongs to no context: each context that uses it gets one module of it, whose
//! variables all of the library's kernels in that context share.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::Mutex;

use fathom_emulator::{Function, Image, Managed, Module};

use crate::abi::*;

/// A module of a context.
pub(crate) struct Loaded {
    pub module: Module,
    pub context: Handle,
    pub functions: Mutex<BTreeMap<String, Handle>>,
}

/// A function of a module, with what the client has chosen for it.
pub(crate) struct Callable {
    pub function: Function,
    pub module: Handle,
    pub name: CString,
    pub chosen: Mutex<Chosen>,
    pub stateful: Mutex<Stateful>,
}

/// What launches of a function are to be, as it was set before CUDA 4.
#[derive(Clone, Default)]
pub(crate) struct Stateful {
    /// Threads of a CTA; a launch without them is refused.
    pub block: Option<[u32; 3]>,
    pub shared_bytes: u32,
    /// The block of parameters, as far as it was set.
    pub params: Vec<u8>,
}

/// Attributes of a function that clients set; `None` where they have not.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chosen {
    /// Bytes of dynamic shared memory at most.
    pub dynamic_shared: Option<i32>,
    /// Share of shared memory in the L1 cache in percent, a hint.
    pub carveout: Option<i32>,
    /// CTAs of a cluster in x, y, z.
    pub cluster: [Option<i32>; 3],
    /// Whether clusters larger than portable ones are allowed.
    pub nonportable_cluster: Option<i32>,
    /// `CUclusterSchedulingPolicy`, a hint.
    pub cluster_scheduling: Option<i32>,
}

/// A library of the process.
pub(crate) struct Library {
    pub image: Image,
    pub managed: Managed,
    /// Its module a context.
    pub modules: Mutex<BTreeMap<Handle, Handle>>,
    pub kernels: Mutex<BTreeMap<String, Handle>>,
}

/// A kernel of a library.
#[derive(Clone)]
pub(crate) struct Kernel {
    pub library: Handle,
    pub name: String,
}
