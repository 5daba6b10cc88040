//! The event engine: plays the instruction streams of all ranks on their compute and communication streams.
