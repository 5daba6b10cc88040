//! The layers: each in parts (attention, dispatch, mlp, combine), each part with a forward, an
//! input-backward and a weight-backward.
//!
//! A layer's struct holds parameter ids and sizes only. A forward gives what the backward needs as
//! a value of its own (`...Kept`); an input-backward leaves in it what the weight-backward needs.
//! All numbers stay in the backend's buffers.

mod activation;
pub mod attention;
pub mod context;
pub mod delayed;
pub mod feed_forward;
pub mod linear;
pub mod mlp;
pub mod moe;
pub mod operand;
pub mod parts;
pub mod residual;
pub mod rope;
pub mod union;

pub use context::{Balance, BalanceKind, Capacity, Cx, Gradients, Weights};
pub use linear::{Linear, Norm};
pub use parts::Context;
