//! The machine: runs the clusters of launches, warp by warp, and reports.
//!
//! A [`domain`] is a set of clusters that take turns on one host thread. Kernels whose CTAs
//! communicate run in one domain; all others have a domain a cluster, in parallel. What a warp is
//! stands in [`warp`], how it executes in [`turn`], what an operation sees in [`cx`].

pub mod access;
pub mod alu;
pub mod checks;
pub mod cluster;
pub mod cx;
pub mod domain;
pub mod lane;
pub mod layout;
pub mod mbarrier;
pub mod meeting;
pub mod op;
pub mod parallel;
pub mod plain;
pub mod product;
pub mod registers;
pub mod sectors;
pub mod special;
pub mod stats;
pub mod turn;
pub mod warp;
pub mod wgmma;
