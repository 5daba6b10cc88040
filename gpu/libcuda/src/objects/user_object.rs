//! User objects: what of a client's a graph keeps alive.

use std::sync::Mutex;

use crate::abi::HostFn;

/// An object of the client, counted.
pub(crate) struct UserObject {
    pub data: usize,
    pub destroy: HostFn,
    pub count: Mutex<u64>,
}
