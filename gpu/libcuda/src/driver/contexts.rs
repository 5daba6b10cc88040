//! The contexts of a thread: a stack whose top is current.

use std::cell::RefCell;
use std::mem::ManuallyDrop;

use crate::abi::*;

/// What a client wants called when a context goes that it has stored something in: with the
/// context, the key and the value.
pub(crate) type Destructor = unsafe extern "C" fn(Handle, usize, usize);

/// A value that a client has stored under a key in a context.
pub(crate) type Stored = (usize, Option<Destructor>);

thread_local! {
    /// Never dropped: clients free what they have when their thread's other values are gone.
    static CONTEXTS: ManuallyDrop<RefCell<Vec<Handle>>> =
        const { ManuallyDrop::new(RefCell::new(Vec::new())) };
}

/// This thread's current context; 0 where there is none.
pub(crate) fn current_context() -> Handle {
    CONTEXTS.with(|stack| stack.borrow().last().copied().unwrap_or(0))
}

/// Replaces the top of this thread's context stack.
pub(crate) fn set_context(context: Handle) {
    CONTEXTS.with(|stack| {
        let mut stack = stack.borrow_mut();
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
    });
}

/// Pushes onto this thread's context stack.
pub(crate) fn push_context(context: Handle) {
    CONTEXTS.with(|stack| stack.borrow_mut().push(context));
}

/// Runs a call with another context on top of this thread's stack.
pub(crate) fn within<T>(context: Handle, call: impl FnOnce() -> R<T>) -> R<T> {
    push_context(context);
    let result = call();
    pop_context();
    result
}

/// Pops this thread's context stack.
pub(crate) fn pop_context() -> Option<Handle> {
    CONTEXTS.with(|stack| stack.borrow_mut().pop())
}
