//! The list of ops: what is said of an op beside its own file, once.
//!
//! A line reads `name(file::Type; inputs) -> outputs;`. From it follow the table
//! [`OPS`](super::OPS) (case files, `check`, `conform`, record and replay go through it) and the
//! typed method `name` of [`Backend`](crate::backend::Backend). The inputs stand in the order of
//! the op's roles, each with how a caller hands it over:
//!
//! | word | argument of the method | for |
//! |---|---|---|
//! | `shared` | `&Buffer` | what the op reads |
//! | `optional` | `Option<&Buffer>` | the same, where it may be absent |
//! | `owned` | `Buffer` | what the op may write in place (an accumulator) |
//! | `optional_owned` | `Option<Buffer>` | the same, where it may be absent |
//!
//! Names, order and number are compared with the op's own constants by a test of this file.

/// Calls the macro `$with` with the whole list.
macro_rules! for_each_op {
    ($with:ident) => {
        $with! {
            adamw(adamw::AdamW; w: owned, m: owned, v: owned, grad: shared, factor: shared) -> 3;
            add(add::Add; a: shared, b: shared, c: optional) -> 1;
            add_rms_norm(
                add_rms_norm::AddRmsNorm; a: shared, b: shared, c: optional, weight: shared
            ) -> 3;
            add_rms_norm_quantize(
                add_rms_norm::AddRmsNormQuantize; a: shared, b: shared, c: optional, weight: shared
            ) -> 5;
            all_gather(collective::AllGather; x: shared) -> 1;
            all_reduce(collective::AllReduce; x: shared) -> 1;
            attention(attention::Attention; q: shared, k: shared, v: shared) -> 2;
            attention_backward(
                attention::AttentionBackward; q: shared, k: shared, v: shared, o: shared,
                lse: shared, d_o: shared
            ) -> 3;
            attention_cached(attention_cached::AttentionCached; q: shared, cache: shared) -> 1;
            attention_latent(attention_latent::AttentionLatent; q: shared, cache: shared) -> 1;
            balance_loss(balance::BalanceLoss; scores: shared, indices: optional) -> 2;
            cast(cast::Cast; x: shared) -> 1;
            clip_factor(clip_factor::ClipFactor; partials: shared) -> 2;
            combine(dispatch::Combine; y: shared, inverse: shared) -> 1;
            concat_columns(concat_columns::ConcatColumns; a: shared, b: shared, c: optional) -> 1;
            concat_rows(concat_rows::ConcatRows; a: shared, b: shared) -> 1;
            context_exchange(context_exchange::ContextExchange; x: shared) -> 1;
            cross_entropy(
                cross_entropy::CrossEntropy; x: shared, weight: shared, targets: shared
            ) -> 2;
            cross_entropy_backward(
                cross_entropy::CrossEntropyBackward; x: shared, weight: shared, targets: shared,
                lse: shared, acc: owned
            ) -> 2;
            dequantize(dequantize::Dequantize; q: shared, scale: shared) -> 1;
            dispatch(dispatch::Dispatch; x: shared, rows: shared) -> 1;
            dispatch_codes(dispatch::DispatchCodes; q: shared, scale: shared, rows: shared) -> 2;
            dispatch_plan(dispatch::DispatchPlan; indices: shared) -> 3;
            drop_tokens(drop_tokens::DropTokens; indices: shared, scores: shared) -> 2;
            ema(ema::Ema; e: owned, w: shared) -> 1;
            gather_rows(gather_rows::GatherRows; table: shared, ids: shared) -> 1;
            gemm(gemm::Gemm; a: shared, b: shared, c: optional_owned) -> 1;
            gemm_fp8(
                gemm_fp8::GemmFp8; a: shared, a_scale: shared, b: shared, b_scale: shared,
                c: optional_owned
            ) -> 1;
            grouped_gemm(grouped_gemm::GroupedGemm; a: shared, b: shared, c: optional_owned) -> 1;
            grouped_gemm_fp8(
                grouped_gemm_fp8::GroupedGemmFp8; a: shared, a_scale: shared, b: shared, b_scale: shared
            ) -> 1;
            mla_absorb_query(mla_absorb::MlaAbsorbQuery; q: shared, w: shared) -> 1;
            mla_absorb_value(mla_absorb::MlaAbsorbValue; o: shared, w: shared) -> 1;
            mla_kv(
                mla_kv::MlaKv; kv: shared, latent: shared, cos: shared, sin: shared,
                positions: shared
            ) -> 2;
            mla_kv_backward(
                mla_kv::MlaKvBackward; dk: shared, dv: shared, cos: shared, sin: shared,
                positions: shared
            ) -> 2;
            mma(
                mma::Mma; a: shared, b: shared, c: shared, scale_a: optional, scale_b: optional
            ) -> 1;
            quantize_block(quantize_block::QuantizeBlock; x: shared) -> 2;
            quantize_delayed(
                quantize_delayed::QuantizeDelayed; x: shared, history: shared, scale: shared
            ) -> 4;
            quantize_tile(quantize_tile::QuantizeTile; x: shared) -> 2;
            quantize_weight(quantize_weight::QuantizeWeight; w: shared) -> 4;
            recv(collective::Recv; x: shared) -> 1;
            reduce_scatter(collective::ReduceScatter; x: shared) -> 1;
            rms_norm(rms_norm::RmsNorm; x: shared, weight: shared) -> 2;
            rms_norm_backward(
                rms_norm::RmsNormBackward; dy: shared, x: shared, weight: shared, rstd: shared,
                residual: optional
            ) -> 1;
            rms_norm_backward_quantize(
                rms_norm_backward_quantize::RmsNormBackwardQuantize; dy: shared, x: shared,
                weight: shared, rstd: shared, residual: optional
            ) -> 3;
            rms_norm_quantize(rms_norm_quantize::RmsNormQuantize; x: shared, weight: shared) -> 4;
            rms_norm_wgrad(
                rms_norm::RmsNormWgrad; dy: shared, x: shared, rstd: shared, acc: owned
            ) -> 1;
            rope(rope::Rope; x: owned, cos: shared, sin: shared, positions: shared) -> 1;
            router(router::Router; logits: shared, bias: optional) -> 3;
            router_backward(
                router::RouterBackward; dweights: shared, scores: shared, indices: shared,
                dscores: optional
            ) -> 1;
            scatter_add_rows(scatter_add_rows::ScatterAddRows; x: shared, ids: shared, acc: owned) -> 1;
            send(collective::Send; x: shared) -> 1;
            slice_columns(slice_columns::SliceColumns; x: shared) -> 1;
            slice_rows(slice_rows::SliceRows; x: shared) -> 1;
            sum_of_squares(sum_of_squares::SumOfSquares; x: shared, partials: owned) -> 1;
            swiglu(swiglu::Swiglu; x: shared, weight: optional) -> 1;
            swiglu_backward(swiglu::SwigluBackward; dy: shared, x: shared, weight: optional) -> 2;
            swiglu_backward_quantize(
                swiglu_quantize::SwigluBackwardQuantize; dy: shared, x: shared, x_scale: optional,
                weight: optional
            ) -> 4;
            swiglu_quantize(
                swiglu_quantize::SwigluQuantize; x: shared, x_scale: optional, weight: optional
            ) -> 2;
            transpose_codes(transpose_codes::TransposeCodes; q: shared, scale: shared) -> 2;
            transpose_quantize(transpose_quantize::TransposeQuantize; x: shared, x_scale: optional) -> 2;
            wgrad_fp8(
                wgrad_fp8::WgradFp8; dy: shared, dy_scale: shared, x: shared, x_scale: shared, acc: owned
            ) -> 1;
        }
    };
}
pub(crate) use for_each_op;

#[cfg(test)]
mod tests {
    use super::super::table::entry;
    use super::super::*;

    /// An op as its line in the list has it.
    struct Line {
        name: &'static str,
        entry: OpEntry,
        /// Each with the word behind it.
        inputs: &'static [(&'static str, &'static str)],
        outputs: usize,
    }

    macro_rules! lines {
        ($($name:ident(
            $file:ident::$op:ident; $($input:ident: $word:ident),*
        ) -> $outputs:literal;)*) => {
            [$(Line {
                name: stringify!($name),
                entry: entry::<crate::ops::$file::$op>(),
                inputs: &[$((stringify!($input), stringify!($word))),*],
                outputs: $outputs,
            }),*]
        };
    }

    #[test]
    fn every_line_says_what_the_ops_own_file_says() {
        for line in for_each_op!(lines) {
            let own = &line.entry;
            assert_eq!(line.name, own.name, "list.rs against the op's NAME");
            // A role may be a word that Rust keeps for itself: `do` is `d_o` here.
            let letters = |name: &str| name.replace('_', "");
            let said = line.inputs.iter().map(|(x, word)| (letters(x), word.contains("optional")));
            let roles = own.inputs.iter().map(|r| (letters(r.name), r.optional));
            assert_eq!(said.collect::<Vec<_>>(), roles.collect::<Vec<_>>(), "{}: INPUTS", own.name);
            assert_eq!(line.outputs, own.outputs.len(), "{}: OUTPUTS", own.name);
        }
    }

    #[test]
    fn the_list_is_in_alphabetical_order() {
        assert!(op_names().is_sorted(), "{:?}", op_names());
    }

    /// An op whose file is written but that no line names would be known to nobody.
    #[test]
    fn every_op_that_is_defined_stands_in_the_list() {
        let list = include_str!("list.rs");
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            let defined = text.lines().filter_map(|l| l.strip_prefix("impl Op for "));
            for op in defined.filter_map(|rest| rest.strip_suffix(" {")) {
                let line = format!("::{op};");
                let path = path.display();
                assert!(list.contains(&line), "{path} defines {op}: add its line to op/list.rs");
            }
        }
    }
}
