//! A stream beside the one on which a device computes: what goes to other devices travels on it,
//! ordered with the computing by events. [`crate::nccl`] and [`crate::peer`] say how it goes.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream};
use fathom_reference::backend::direct::Landing;
use fathom_reference::{EngineError, backend::Result};
use fathom_trace::DType;

use crate::device::{Gpu, GpuError};
use crate::tensor::DeviceTensor;

/// The stream, which one rank's thread uses.
pub(crate) struct Lane {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) stream: Arc<CudaStream>,
    /// What transfers read, which lives until the stream is through with them.
    in_flight: RefCell<VecDeque<(CudaEvent, Vec<DeviceTensor>)>>,
}

impl Lane {
    /// A new stream of the device.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Lane, GpuError> {
        let stream = gpu.stream().context().new_stream().map_err(GpuError::of("cuStreamCreate"))?;
        Ok(Lane { gpu: Arc::clone(gpu), stream, in_flight: RefCell::default() })
    }

    /// New buffers for what comes, and leave to go for what the stream is through with.
    ///
    /// # Errors
    /// As [`Gpu::tensor`].
    pub(crate) fn room(&self, room: &[(DType, Vec<usize>)]) -> Result<Vec<DeviceTensor>, GpuError> {
        let mut in_flight = self.in_flight.borrow_mut();
        while in_flight.front().is_some_and(|(done, _)| done.is_complete()) {
            in_flight.pop_front();
        }
        self.gpu.purpose("exchange", "rows");
        room.iter().map(|(dtype, shape)| self.gpu.tensor(*dtype, shape)).collect()
    }

    /// What follows on the stream comes after what the device was given to compute: what is sent
    /// has been computed by then, and new buffers are free of older work.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub(crate) fn after_computing(&self) -> Result<(), GpuError> {
        self.stream.join(self.gpu.stream()).map_err(GpuError::of("cuStreamWaitEvent"))
    }

    /// The end of a transfer that reads `held` and fills `made`.
    ///
    /// # Errors
    /// [`GpuError::Driver`].
    pub(crate) fn landing(
        &self,
        held: Vec<DeviceTensor>,
        made: Vec<DeviceTensor>,
    ) -> Result<Landing<DeviceTensor>, GpuError> {
        let record = || self.stream.record_event(None).map_err(GpuError::of("cuEventRecord"));
        self.in_flight.borrow_mut().push_back((record()?, held));
        let landed = Landed { made, done: record()?, stream: self.gpu.stream().clone() };
        let engine = self.gpu.kind().name();
        Ok(Box::new(move || landed.land().map_err(failed(engine))))
    }
}

/// For `map_err`: an exchange's error as an engine's.
pub(crate) fn failed<E: std::fmt::Display>(engine: &str) -> impl Fn(E) -> EngineError {
    move |error| {
        let (engine, op) = (engine.to_owned(), "exchange".to_owned());
        EngineError::Failed { engine, op, reason: error.to_string() }
    }
}

/// New buffers, which the device may touch once they are full.
struct Landed {
    made: Vec<DeviceTensor>,
    done: CudaEvent,
    /// The stream on which the device computes.
    stream: Arc<CudaStream>,
}

impl Landed {
    fn land(mut self) -> Result<Vec<DeviceTensor>, GpuError> {
        self.stream.wait(&self.done).map_err(GpuError::of("cuStreamWaitEvent"))?;
        Ok(std::mem::take(&mut self.made))
    }
}

impl Drop for Landed {
    /// Buffers that nobody wants any more are given back in the order of the computing stream.
    fn drop(&mut self) {
        if !self.made.is_empty() {
            // A failure means that the context is lost, which the next call reports.
            let _ = self.stream.wait(&self.done);
        }
    }
}
