//! Who executes an op: the trait [`Backend`] and its host implementations.
//!
//! A backend has one method that does work, [`Backend::execute`]; over it stands one typed method
//! an op, so that the model reads as a sequence of ops. Buffers are opaque: the model never looks
//! into one, it uploads, downloads and passes them on.
//!
//! - [`Reference`]: the arithmetic of the op table, on the CPU.
//! - [`Meta`]: shapes only; every op becomes an [`fathom_trace::OpRecord`].
//! - [`Recorder`]: wraps any backend and shows every call to a hook.
//! - [`Ledger`]: wraps any backend and counts the bytes that are alive.

mod ledger;
mod meta;
mod record;
mod reference;

use std::ops::Range;

use fathom_trace::{Component, DType, Phase};

pub use ledger::{Alive, Counted, Ledger};
pub use meta::{Load, Meta, MetaBuffer};
pub use record::{Call, Hook, Recorder, input_metas, op_record};
pub use reference::Reference;

use crate::ops::attention::{Attention, AttentionBackward};
use crate::ops::balance::BalanceLoss;
use crate::ops::collective::{AllGather, AllReduce, Recv, ReduceScatter, Send};
use crate::ops::cross_entropy::{CrossEntropy, CrossEntropyBackward};
use crate::ops::dispatch::{Combine, Dispatch, DispatchPlan};
use crate::ops::drop_tokens::DropTokens;
use crate::ops::elementwise::{Add, Cast, ConcatColumns, GatherRows, ScatterAddRows, SliceColumns};
use crate::ops::fp8::{Dequantize, GroupedGemmFp8, QuantizeWeight, TransposeQuantize, WgradFp8};
use crate::ops::gemm::Gemm;
use crate::ops::gemm_fp8::GemmFp8;
use crate::ops::grouped_gemm::GroupedGemm;
use crate::ops::latent::{
    AttentionCached, AttentionLatent, ConcatRows, MlaAbsorbQuery, MlaAbsorbValue, SliceRows,
};
use crate::ops::mla_kv::{MlaKv, MlaKvBackward};
use crate::ops::optim::{AdamW, ClipFactor, Ema, SumOfSquares};
use crate::ops::quantize::{QuantizeBlock, QuantizeTile};
use crate::ops::rms_norm::{RmsNorm, RmsNormBackward, RmsNormWgrad};
use crate::ops::rope::Rope;
use crate::ops::router::{Router, RouterBackward};
use crate::ops::swiglu::{Swiglu, SwigluBackward};
use crate::{DynOp, EngineError, Tensor};

/// Where in a step an op stands: what op records and error reports say beside the op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Optimizer step.
    pub step: u64,
    /// Decoder layer, counted from 0; MTP modules follow the last layer.
    pub layer: Option<usize>,
    /// Part of the layer.
    pub component: Component,
    /// Forward, input-backward or weight-backward.
    pub phase: Phase,
    /// Micro-batch of the step.
    pub micro_batch: Option<usize>,
}

impl Default for Place {
    fn default() -> Self {
        let (component, phase) = (Component::Optimizer, Phase::F);
        Place { step: 0, layer: None, component, phase, micro_batch: None }
    }
}

/// The result of a backend's method.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;

macro_rules! argument {
    (req, $buffer:ty) => { &$buffer };
    (opt, $buffer:ty) => { Option<&$buffer> };
    (own, $buffer:ty) => { $buffer };
    (take, $buffer:ty) => { Option<$buffer> };
}

macro_rules! pass {
    (req, $x:ident) => {
        Some($x.clone())
    };
    (opt, $x:ident) => {
        $x.cloned()
    };
    (own, $x:ident) => {
        Some($x)
    };
    (take, $x:ident) => {
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
    ($($name:ident($op:ty; $($arg:ident: $kind:tt),*) -> $n:tt;)*) => {$(
        #[doc = concat!("Op `", stringify!($name), "`; inputs in the order of its roles.\n\n\
            # Errors\nAs [`Backend::execute`].")]
        #[allow(clippy::too_many_arguments)]
        fn $name(
            &self,
            op: &$op,
            $($arg: argument!($kind, Self::Buffer)),*
        ) -> Result<outputs!($n, Self::Buffer)> {
            let out = self.execute(op, vec![$(pass!($kind, $arg)),*])?;
            Ok(unpack!($n, out))
        }
    )*};
}

/// Executes ops on buffers of its own.
///
/// Inputs are shared handles; one passed by value (an accumulator) may be written in place.
pub trait Backend {
    /// A handle to a tensor wherever the backend keeps it; cloning it copies no elements.
    type Buffer: Clone + std::fmt::Debug;

    /// A short name for tables and errors.
    fn name(&self) -> String;

    /// Runs an op on its inputs, one entry a role in order; gives one buffer an output role.
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

    /// A buffer of zero bits.
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

    /// Says where in the step the following ops stand.
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

    typed_methods! {
        add(Add; a: req, b: req, c: opt) -> 1;
        adamw(AdamW; w: own, m: own, v: own, grad: req, factor: req) -> 3;
        all_gather(AllGather; x: req) -> 1;
        all_reduce(AllReduce; x: req) -> 1;
        attention(Attention; q: req, k: req, v: req) -> 2;
        attention_cached(AttentionCached; q: req, cache: req) -> 1;
        attention_latent(AttentionLatent; q: req, cache: req) -> 1;
        attention_backward(
            AttentionBackward; q: req, k: req, v: req, o: req, lse: req, d_o: req
        ) -> 3;
        balance_loss(BalanceLoss; scores: req, indices: opt) -> 2;
        cast(Cast; x: req) -> 1;
        clip_factor(ClipFactor; partials: req) -> 2;
        combine(Combine; y: req, inverse: req) -> 1;
        concat_columns(ConcatColumns; a: req, b: req, c: opt) -> 1;
        concat_rows(ConcatRows; a: req, b: req) -> 1;
        cross_entropy(CrossEntropy; x: req, weight: req, targets: req) -> 2;
        cross_entropy_backward(
            CrossEntropyBackward; x: req, weight: req, targets: req, lse: req, acc: own
        ) -> 2;
        dequantize(Dequantize; q: req, scale: req) -> 1;
        dispatch(Dispatch; x: req, rows: req) -> 1;
        dispatch_plan(DispatchPlan; indices: req) -> 3;
        drop_tokens(DropTokens; indices: req, scores: req) -> 2;
        ema(Ema; e: own, w: req) -> 1;
        gather_rows(GatherRows; table: req, ids: req) -> 1;
        gemm(Gemm; a: req, b: req, c: take) -> 1;
        gemm_fp8(
            GemmFp8; a: req, a_scale: req, b: req, b_scale: req, c: take
        ) -> 1;
        grouped_gemm(GroupedGemm; a: req, b: req, c: take) -> 1;
        grouped_gemm_fp8(
            GroupedGemmFp8; a: req, a_scale: req, b: req, b_scale: req
        ) -> 1;
        mla_absorb_query(MlaAbsorbQuery; q: req, w: req) -> 1;
        mla_absorb_value(MlaAbsorbValue; o: req, w: req) -> 1;
        mla_kv(MlaKv; kv: req, latent: req, cos: req, sin: req, positions: req) -> 2;
        mla_kv_backward(
            MlaKvBackward; dk: req, dv: req, cos: req, sin: req, positions: req
        ) -> 2;
        quantize_block(QuantizeBlock; x: req) -> 2;
        quantize_tile(QuantizeTile; x: req) -> 2;
        quantize_weight(QuantizeWeight; w: req) -> 4;
        recv(Recv; x: req) -> 1;
        reduce_scatter(ReduceScatter; x: req) -> 1;
        rms_norm(RmsNorm; x: req, weight: req) -> 2;
        rms_norm_backward(
            RmsNormBackward; dy: req, x: req, weight: req, rstd: req, residual: opt
        ) -> 1;
        rms_norm_wgrad(RmsNormWgrad; dy: req, x: req, rstd: req, acc: own) -> 1;
        rope(Rope; x: own, cos: req, sin: req, positions: req) -> 1;
        router(Router; logits: req, bias: opt) -> 3;
        router_backward(
            RouterBackward; dweights: req, scores: req, indices: req, dscores: opt
        ) -> 1;
        scatter_add_rows(ScatterAddRows; x: req, ids: req, acc: own) -> 1;
        send(Send; x: req) -> 1;
        slice_columns(SliceColumns; x: req) -> 1;
        slice_rows(SliceRows; x: req) -> 1;
        sum_of_squares(SumOfSquares; x: req, partials: own) -> 1;
        swiglu(Swiglu; x: req, weight: opt) -> 1;
        swiglu_backward(SwigluBackward; dy: req, x: req, weight: opt) -> 2;
        transpose_quantize(TransposeQuantize; x: req, x_scale: opt) -> 2;
        wgrad_fp8(
            WgradFp8; dy: req, dy_scale: req, x: req, x_scale: req, acc: own
        ) -> 1;
    }
}
