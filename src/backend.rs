//! `--backend`: who executes the ops. Every subcommand that computes has the flag from here.

use std::ops::Range;

use fathom_gpu::driver::{self, Driver};
use fathom_gpu::{DeviceKind, Gpu};
use fathom_libcuda::{Choices, MOST_DEVICES, prepare};

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
    /// Most bytes of device memory that are taken, by each rank [default: all that the device has]
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
    /// Opens the device of the flag.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn open(self) -> Result<Chosen, Box<dyn std::error::Error>> {
        Ok(match self.open_for(0..1)? {
            None => Chosen::Reference,
            Some(mut gpus) => Chosen::Device(Box::new(gpus.remove(0))),
        })
    }

    /// Opens the devices of these ranks of a machine, one each; none for the reference. `emulated`
    /// runs this program anew in this process, with our driver in front, unless that has been done;
    /// the driver then has a device for each rank up to the last of these.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn open_for(
        self,
        local_ranks: Range<usize>,
    ) -> Result<Option<Vec<Gpu>>, Box<dyn std::error::Error>> {
        let kind = match self.backend {
            BackendName::Reference => return Ok(None),
            BackendName::Cuda => DeviceKind::Cuda,
            BackendName::Emulated => DeviceKind::Emulated,
        };
        let ours = matches!(driver::probe(), Driver::Present { emulated: true, .. });
        if kind == DeviceKind::Emulated && !ours && !prepare::is_prepared() {
            output::flush();
            let devices = local_ranks.end.min(MOST_DEVICES.into());
            match prepare::run_in_place(Choices { devices, ..Choices::default() })? {}
        }
        let gpus: Result<Vec<Gpu>, _> =
            local_ranks.map(|local_rank| Gpu::open_for(kind, local_rank)).collect();
        prepare::loaded();
        let gpus = gpus?;
        if let Some(bytes) = self.device_memory {
            gpus.iter().for_each(|gpu| gpu.cap_memory(bytes));
        }
        Ok(Some(gpus))
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
