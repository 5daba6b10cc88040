//! `--backend`: who executes the ops. Every subcommand that computes has the flag from here.

use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{DeviceKind, Gpu};
use fathom_libcuda::{Choices, prepare};

use crate::output::Outcome;

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
}

/// What the flag comes to.
pub enum Chosen {
    /// The reference.
    Reference,
    /// The kernels, on this device.
    Device(Box<Gpu>),
    /// The same command line was run once more, with the emulated driver in front; it ended so.
    Elsewhere(Outcome),
}

impl BackendArgs {
    /// Opens the device of the flag. `emulated` runs this program once more with our driver in
    /// front, unless that has been done.
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
            let (status, _) = prepare::run_again(Choices::default())?;
            return Ok(Chosen::Elsewhere(match status.code() {
                Some(0) => Outcome::Holds,
                Some(1) => Outcome::Fails,
                _ => Outcome::BadInput,
            }));
        }
        Ok(Chosen::Device(Box::new(Gpu::open(kind)?)))
    }
}

/// Evaluates an expression with `$backend` as the backend of the flag; where the command line was
/// run elsewhere, returns how that ended.
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
            $crate::backend::Chosen::Elsewhere(outcome) => return Ok(outcome),
        }
    };
}
pub(crate) use on_backend;
