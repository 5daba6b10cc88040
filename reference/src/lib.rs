//! DeepSeek-V3 itself: the op table, quantisation, layers, model, checkpoints, data, optimizer,
//! training and generation, written once over the trait `Backend`.
//!
//! This room wraps the exact arithmetic of `fathom-numerics` and has none of its own; it knows no
//! GPU, no simulator and no command line.
