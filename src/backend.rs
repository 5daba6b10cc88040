//! `--backend`: who executes the ops. Every subcommand that computes has the flag from here.

use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};

use crate::output;

/// A backend by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendName {
    /// Plain Rust on the CPU
    Reference,
    /// Our kernels on a GPU
    Cuda,
    /// Our kernels on the emulated driver
    Emulated,
}

/// The flag; flatten it into a subcommand's arguments.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct BackendArgs {
    /// Backend that computes
    #[arg(long, value_name = "NAME", default_value = "reference")]
    backend: BackendName,
    /// Most bytes of device memory that are taken [default: all that the device has]
    #[arg(long, value_name = "BYTES")]
    device_memory: Option<usize>,
}

/// What the flag comes to.
pub enum Chosen {
    /// The reference.
    Reference,
    /// The kernels, on this device.
    Device(Box<Gpu>),
}

impl BackendArgs {
    /// Opens the device of the flag. `emulated` runs this program anew in this process, with our
    /// driver in front, unless that has been done.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn open(self) -> Result<Chosen, Box<dyn std::error::Error>> {
        let kind = match self.backend {
            BackendName::Reference => return Ok(Chosen::Reference),
            BackendName::Cuda => DeviceKind::Cuda,
            BackendName::Emulated => DeviceKind::Emulated,
        };
        let ours = matches!(driver::probe(), Driver::Present { emulated: true, .. });
        if kind == DeviceKind::Emulated && !ours && !prepare::is_prepared() {
            output::flush();
            match prepare::run_in_place(Choices::default())? {}
        }
        let gpu = Gpu::open(kind);
        prepare::loaded();
        let gpu = gpu?;
        if let Some(bytes) = self.device_memory {
            gpu.cap_memory(bytes);
        }
        Ok(Chosen::Device(Box::new(gpu)))
    }
}

/// Evaluates an expression with `$backend` as the backend of the flag.
macro_rules! on_backend {
    ($args:expr, $backend:ident => $body:expr) => {
        match $args.open()? {
            $crate::backend::Chosen::Reference => {
                let $backend = fathom_reference::backend::Reference;
                $body
            }
            $crate::backend::Chosen::Device(gpu) => {
                let $backend = fathom_gpu::Cuda::new(*gpu);
                $body
            }
        }
    };
}
pub(crate) use on_backend;
