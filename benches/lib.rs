//! Benchmarks only: the files beside this one are criterion targets, `records/` keeps runs with
//! their machine and date. Nothing here is tested for time; `docs/performance.md` quotes the
//! records.
#![forbid(unsafe_code)]
