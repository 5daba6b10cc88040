//! What stands behind the handles that clients hold, as data: what the driver does with it stands
//! in [`driver`](crate::driver).

pub(crate) mod array;
pub(crate) mod event;
pub(crate) mod graph;
pub(crate) mod green;
pub(crate) mod handles;
pub(crate) mod operation;
pub(crate) mod pool;
pub(crate) mod program;
pub(crate) mod stream;
pub(crate) mod user_object;
pub(crate) mod virtual_memory;
