//! Green contexts.

use crate::abi::Handle;

/// A green context.
#[derive(Clone, Copy)]
pub(crate) struct Green {
    /// The context that stands for it.
    pub context: Handle,
    pub sms: u32,
}
