//! Who executes an op: the trait [`Backend`] and its host implementations.
//!
//! A backend has one method that does work, [`Backend::execute`]; over it stands one typed method
//! per op, so that the model reads as a sequence of ops. Buffers are opaque: the model never looks
//! into one, it uploads, downloads and passes them on.
//!
//! - [`direct`]: what a backend has whose devices reach those of other ranks.
//! - [`Reference`]: the arithmetic of the op table, on the CPU.
//! - [`Meta`]: shapes only; every op becomes an [`fathom_trace::OpRecord`].
//! - [`Recorder`]: wraps any backend and shows every call to a hook.
//! - [`Ledger`]: wraps any backend and counts the bytes that are alive.

pub mod direct;
mod ledger;
mod meta;
mod record;
mod reference;

use std::ops::Range;
use std::rc::Rc;

use fathom_trace::{Component, DType, Group, Phase};

use direct::Direct;
pub use ledger::{Alive, Counted, Ledger};
pub use meta::{Load, Meta, MetaBuffer};
pub use record::{Call, Hook, Recorder, input_metas, op_record};
pub use reference::Reference;

use crate::op::list::for_each_op;
use crate::{DynOp, EngineError, Tensor};

/// Where in a step an op stands: what op records and error reports say beside the op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Optimizer step, counted from 1; 0 outside training.
    pub step: u64,
    /// Decoder layer, counted from 0; MTP modules follow the last layer.
    pub layer: Option<usize>,
    /// Part of the model: attention, dispatch, mlp, combine, embedding, head, optimizer and so on.
    pub component: Component,
    /// Forward, input-backward (gradient of the activations) or weight-backward.
    pub phase: Phase,
    /// Micro-batch of the step, counted from 0; none for work once a step, such as the optimizer's.
    pub micro_batch: Option<usize>,
}

impl Default for Place {
    fn default() -> Self {
        let (component, phase) = (Component::Optimizer, Phase::F);
        Place { step: 0, layer: None, component, phase, micro_batch: None }
    }
}

/// The result of a backend's method; what can go wrong is an [`EngineError`].
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

macro_rules! argument {
    (shared, $buffer:ty) => { &$buffer };
    (optional, $buffer:ty) => { Option<&$buffer> };
    (owned, $buffer:ty) => { $buffer };
    (optional_owned, $buffer:ty) => { Option<$buffer> };
}

macro_rules! pass {
    (shared, $x:ident) => {
        Some($x.clone())
    };
    (optional, $x:ident) => {
        $x.cloned()
    };
    (owned, $x:ident) => {
        Some($x)
    };
    (optional_owned, $x:ident) => {
        $x
    };
}

macro_rules! outputs {
    (1, $buffer:ty) => {
        $buffer
    };
    ($n:literal, $buffer:ty) => {
        [$buffer; $n]
    };
}

macro_rules! unpack {
    (array $out:expr) => {
        <[_; _]>::try_from($out)
            .unwrap_or_else(|_| panic!("the op's outputs are counted in its table"))
    };
    (1, $out:expr) => {{
        let [one] = unpack!(array $out);
        one
    }};
    ($n:literal, $out:expr) => {
        unpack!(array $out)
    };
}

macro_rules! typed_methods {
    ($($name:ident($file:ident::$op:ident; $($arg:ident: $kind:tt),*) -> $n:tt;)*) => {$(
        #[doc = concat!("Op `", stringify!($name), "`; inputs in the order of its roles.\n\n\
            # Errors\nAs [`Backend::execute`].")]
        #[allow(clippy::too_many_arguments)]
        fn $name(
            &self,
            op: &crate::ops::$file::$op,
            $($arg: argument!($kind, Self::Buffer)),*
        ) -> Result<outputs!($n, Self::Buffer)> {
            let out = self.execute(op, vec![$(pass!($kind, $arg)),*])?;
            Ok(unpack!($n, out))
        }
    )*};
}

/// The methods of a [`Backend`] around another of the same buffers that do nothing of their own:
/// `passes_on!(self => self.inner, B)`.
macro_rules! passes_on {
    ($self:ident => $inner:expr, $backend:ident) => {
        fn name(&$self) -> String {
            $inner.name()
        }

        fn upload(&$self, tensor: $crate::Tensor) -> $crate::backend::Result<$backend::Buffer> {
            $inner.upload(tensor)
        }

        fn download(
            &$self,
            buffer: &$backend::Buffer,
        ) -> $crate::backend::Result<$crate::Tensor> {
            $inner.download(buffer)
        }

        fn zeros(
            &$self,
            dtype: fathom_trace::DType,
            shape: &[usize],
        ) -> $crate::backend::Result<$backend::Buffer> {
            $inner.zeros(dtype, shape)
        }

        fn dtype(&$self, buffer: &$backend::Buffer) -> fathom_trace::DType {
            $inner.dtype(buffer)
        }

        fn shape(&$self, buffer: &$backend::Buffer) -> Vec<usize> {
            $inner.shape(buffer)
        }

        fn fuses(&$self) -> bool {
            $inner.fuses()
        }

        fn expert_counts(
            &$self,
            counts: &$backend::Buffer,
            local: std::ops::Range<usize>,
            slots: usize,
        ) -> $crate::backend::Result<Vec<usize>> {
            $inner.expert_counts(counts, local, slots)
        }
    };
}
pub(crate) use passes_on;

/// Executes ops on buffers of its own.
///
/// Inputs are shared handles; one passed by value (an accumulator) may be written in place.
pub trait Backend {
    /// A handle to a tensor wherever the backend keeps it; cloning it copies no elements.
    type Buffer: Clone + std::fmt::Debug;

    /// A short name for tables and errors: `reference`, `meta`.
    fn name(&self) -> String;

    /// Runs an op on its inputs, one entry per role in order; gives one buffer per output role.
    ///
    /// # Errors
    /// [`EngineError`] where the inputs do not fit the op or the backend cannot run it.
    fn execute(
        &self,
        op: &dyn DynOp,
        inputs: Vec<Option<Self::Buffer>>,
    ) -> Result<Vec<Self::Buffer>>;

    /// Brings a host tensor to the backend.
    ///
    /// # Errors
    /// [`EngineError::Failed`] where it has no room for it.
    fn upload(&self, tensor: Tensor) -> Result<Self::Buffer>;

    /// Brings a buffer's elements to the host.
    ///
    /// # Errors
    /// [`EngineError`] where the backend lost or never had them (`meta`).
    fn download(&self, buffer: &Self::Buffer) -> Result<Tensor>;

    /// A buffer whose elements are all zero bits, which every element type reads as the number 0.
    ///
    /// # Errors
    /// As [`Backend::upload`].
    fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Self::Buffer> {
        self.upload(Tensor::zeros(dtype, shape))
    }

    /// Element type of a buffer.
    fn dtype(&self, buffer: &Self::Buffer) -> DType;

    /// Shape of a buffer.
    fn shape(&self, buffer: &Self::Buffer) -> Vec<usize>;

    /// Whether one op that does the work of several is faster here than they are: what
    /// `recipe.fused` is where it is not set.
    fn fuses(&self) -> bool {
        false
    }

    /// Says where in the step the following ops stand, until the next call; backends that neither
    /// record nor report ignore it.
    fn at(&self, _place: Place) {}

    /// The rows that each of this rank's experts (`local`) gets: an explicit host value, read back
    /// from `counts` \[experts\]. `meta`, which has no values, draws it from its load distribution
    /// over `slots` (tokens times choices, of all ranks of the group).
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn expert_counts(
        &self,
        counts: &Self::Buffer,
        local: Range<usize>,
        _slots: usize,
    ) -> Result<Vec<usize>> {
        let counts = self.download(counts)?;
        Ok(counts.as_slice::<i32>()[local].iter().map(|&n| n as usize).collect())
    }

    /// The rows that each rank of the expert-parallel group sends to each expert, \[rank\]
    /// \[expert\], where its ranks exchange them; `None` where there is nobody to ask.
    ///
    /// # Errors
    /// As [`Backend::download`].
    fn group_counts(
        &self,
        _counts: &Self::Buffer,
        _group: Group,
    ) -> Result<Option<Vec<Vec<usize>>>> {
        Ok(None)
    }

    /// Connects the devices of a group's ranks, of which this one is number `index` of `size`,
    /// where they reach one another; `None` where what ranks exchange passes the host. All ranks of
    /// the group call it together; `meet` gives each what every one brings, in order.
    ///
    /// # Errors
    /// [`EngineError::Failed`], or those of `meet`.
    #[allow(clippy::type_complexity)]
    fn connect(
        &self,
        (_index, _size): (usize, usize),
        _meet: &dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Option<Rc<dyn Direct<Self::Buffer>>>> {
        Ok(None)
    }

    for_each_op!(typed_methods);
}
