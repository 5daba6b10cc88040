//! What the halves of a layer hand to each other: the residual, and back its gradient. Where ops
//! are fused each goes over in the form that the op behind takes, so that no part does another's
//! work twice and schedules move the parts as they are.

use crate::backend::{Backend, Result};
use crate::layers::Cx;
use crate::layers::operand::Operand;
use crate::ops::add::Add;

/// The residual \[t, hidden\] behind attention.
#[derive(Clone, Debug)]
pub enum Residual<B: Backend> {
    /// What it comes to, \[t, hidden\].
    Sum(B::Buffer),
    /// What is to be added up: the norm behind does it in one op.
    Terms(B::Buffer, B::Buffer),
}

impl<B: Backend> Residual<B> {
    /// `x + y`, or both where the norm behind adds them up.
    pub(crate) fn new(cx: &Cx<'_, B>, x: &B::Buffer, y: B::Buffer) -> Result<Self> {
        if cx.fuses() {
            return Ok(Residual::Terms(x.clone(), y));
        }
        Ok(Residual::Sum(cx.backend.add(&Add { out: cx.activation() }, x, &y, None)?))
    }
}

/// The gradient of a [`Residual`]'s sum.
#[derive(Clone, Debug)]
pub struct ResidualGradient<B: Backend> {
    /// The gradient \[t, hidden\].
    pub dh: B::Buffer,
    /// The same as the product behind reads it, where the norm's gradient was cast on its way out.
    pub operand: Option<Operand<B>>,
}
