//! The ops, one a file (a forward with its backward, and exchanges that differ by a line, share
//! one): parameters, roles of inputs and outputs with their dtype and shape rules, FLOPs, class,
//! arithmetic. What all of them have in common is [`crate::op`].
//!
//! To add an op: copy a neighbour's file, declare it here (`mod`) and in `op/list.rs`. Table,
//! methods of `Backend`, record and replay, case files, `check`, `conform` and the simulator follow
//! from that; what is still missing (a page, a kernel) is named by a test that fails.

pub mod adamw;
pub mod add;
pub mod add_rms_norm;
pub mod attention;
pub mod attention_cached;
pub mod attention_latent;
pub mod balance;
pub mod cast;
pub mod clip_factor;
pub mod collective;
pub mod concat_columns;
pub mod concat_rows;
pub mod context_exchange;
pub mod cross_entropy;
pub mod dequantize;
pub mod dispatch;
pub mod drop_tokens;
pub mod ema;
pub mod gather_rows;
pub mod gemm;
pub mod gemm_fp8;
pub mod grouped_gemm;
pub mod grouped_gemm_fp8;
pub mod mla_absorb;
pub mod mla_kv;
pub mod mma;
pub mod quantize_block;
pub mod quantize_delayed;
pub mod quantize_tile;
pub mod quantize_weight;
pub mod rms_norm;
pub mod rms_norm_backward_quantize;
pub mod rms_norm_quantize;
pub mod rope;
pub mod router;
pub mod scatter_add_rows;
pub mod slice_columns;
pub mod slice_rows;
pub mod sum_of_squares;
pub mod swiglu;
pub mod swiglu_quantize;
pub mod transpose_codes;
pub mod transpose_quantize;
pub mod wgrad_fp8;
