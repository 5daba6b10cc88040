//! The table of what attention kernels do otherwise.

use super::{Case, Exp, HeadOf, Kept, Mask, Probabilities, Rescale, Scale, Sum, Variant};
use crate::diagnose::hypothesis::{Row, each, one, one_if};

#[derive(Clone)]
struct Named<T>(String, T);

impl<T> std::fmt::Display for Named<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn named<T, const N: usize>(all: [(&str, T); N]) -> Vec<Named<T>> {
    all.into_iter().map(|(n, x)| Named(n.to_owned(), x)).collect()
}

pub(super) const ROWS: &[Row<Case, Variant>] = &[
    Row {
        axis: "mask",
        name: "causal mask {}",
        meaning: "A query sees one key more or less than itself and the earlier ones.",
        seen: "",
        changes: |_| {
            let all = named([
                ("one key too far", 1isize),
                ("one key too short: not the query itself", -1),
                ("two keys too far", 2),
            ]);
            each(all, |v, Named(_, n)| v.mask = Mask::Causal(n))
        },
    },
    Row {
        axis: "mask",
        name: "no causal mask",
        meaning: "Every query sees every key of its segment.",
        seen: "",
        changes: |_| one(|v| v.mask = Mask::None),
    },
    Row {
        axis: "mask",
        name: "causal mask aligned top-left",
        meaning: "With more keys than queries, query i sees keys up to i instead of its place from the \
                  end.",
        seen: "FlashAttention issues #951 and #517, sparkinfer issue #3",
        changes: |c| one_if(c.longer_keys, |v| v.mask = Mask::TopLeft),
    },
    Row {
        axis: "mask",
        name: "sliding window of {} keys",
        meaning: "Earlier keys are masked as well.",
        seen: "",
        changes: |_| each([16, 32, 64, 128, 256, 512, 1024, 4096], |v, n| v.mask = Mask::Window(n)),
    },
    Row {
        axis: "mask",
        name: "keys behind the last whole KV block dropped",
        meaning: "The loop over KV blocks runs keys / block times, rounded down.",
        seen: "",
        changes: |_| one(|v| v.mask = Mask::WholeBlocks),
    },
    Row {
        axis: "mask",
        name: "last KV blocks of query tiles of {} rows left out: counted from the tile's first row",
        meaning: "The loop over keys ends behind the block of the tile's first row instead of its \
                  last.",
        seen: "rocMLIR PR #2165",
        changes: |_| each([16, 32, 64, 128, 256], |v, n| v.mask = Mask::FirstOfTile(n)),
    },
    Row {
        axis: "mask",
        name: "segments ignored",
        meaning: "Queries see the keys of earlier segments: cu_seqlens is not used.",
        seen: "",
        changes: |c| one_if(c.segments > 1 && !c.longer_keys, |v| v.merged = true),
    },
    Row {
        axis: "mask",
        name: "the first key dropped",
        meaning: "The first key of each segment does not enter.",
        seen: "",
        changes: |_| one(|v| v.first_key_dropped = true),
    },
    Row {
        axis: "scale",
        name: "softmax scale {}",
        meaning: "The dots are multiplied by another number than the given scale, or by none.",
        seen: "tt-metal issue #33304, composable_kernel PR #526",
        changes: |c| {
            let mut all = named([("missing", Scale::None), ("applied twice", Scale::Twice)]);
            let d = c.qk as f32;
            let others = [
                ("1 / sqrt(width)", 1.0 / d.sqrt()),
                ("1 / width", 1.0 / d),
                ("sqrt(width)", d.sqrt()),
                ("1 / sqrt(128)", 1.0 / 128f32.sqrt()),
                ("1 / sqrt(64)", 0.125),
                ("1 / sqrt(192)", 1.0 / 192f32.sqrt()),
                ("1 / sqrt(576)", 1.0 / 576f32.sqrt()),
            ];
            all.extend(others.map(|(n, s)| Named(n.to_owned(), Scale::Of(s))));
            // The width with V's, with or without a rotary part, or of all heads.
            let widths = [16, 32, 48, 80, 96, 112, 160, 224, 256, 320, 384, 512].into_iter();
            let widths = widths.chain([c.v, c.qk + c.v, c.qk + 64, c.qk * c.heads]);
            all.extend(
                widths.map(|w| Named(format!("1 / sqrt({w})"), Scale::Of(1.0 / (w as f32).sqrt()))),
            );
            each(all, |v, Named(_, s)| v.scale = s)
        },
    },
    Row {
        axis: "scale",
        name: "scale applied to q in its own type",
        meaning: "q is multiplied by the scale and rounded before the dots.",
        seen: "",
        changes: |_| one(|v| v.scale = Scale::OnQuery),
    },
    Row {
        axis: "P",
        name: "P {}",
        meaning: "The probabilities meet V in another format.",
        seen: "",
        changes: |c| {
            let all = named([
                ("rounded to FP16", Probabilities::F16),
                ("rounded to E4M3", Probabilities::E4m3),
                ("scaled by 448 and rounded to E4M3", Probabilities::E4m3Scaled),
            ]);
            let other = if c.low {
                Named("kept in FP32".to_owned(), Probabilities::F32)
            } else {
                Named("rounded to BF16".to_owned(), Probabilities::Bf16)
            };
            each(all.into_iter().chain([other]).collect::<Vec<_>>(), |v, Named(_, p)| {
                v.probabilities = p
            })
        },
    },
    Row {
        axis: "exp",
        name: "exp {}",
        meaning: "The exponential is computed by exp2 with log2 e folded in, which rounds otherwise.",
        seen: "",
        changes: |_| {
            let all = named([
                ("as exp2 with the scale folded in", Exp::Binary),
                ("as exp2 of the difference times log2 e", Exp::BinaryLate),
            ]);
            each(all, |v, Named(_, e)| v.exp = e)
        },
    },
    Row {
        axis: "rescale",
        name: "rescaling: {}",
        meaning: "What earlier blocks left is rescaled otherwise when the maximum grows.",
        seen: "",
        changes: |_| {
            let all = named([
                ("the output not rescaled", Rescale::NotOutput),
                ("the sum not rescaled", Rescale::NotSum),
                ("neither sum nor output rescaled", Rescale::Neither),
                ("the maximum of all keys first", Rescale::TwoPasses),
                ("no maximum taken off", Rescale::NoMaximum),
                ("the output divided after each block", Rescale::EachBlock),
            ]);
            each(all, |v, Named(_, r)| v.rescale = r)
        },
    },
    Row {
        axis: "sum",
        name: "the sum takes {}",
        meaning: "The denominator is added up otherwise.",
        seen: "",
        changes: |_| {
            let all = named([
                ("P as rounded", Sum::Rounded),
                ("keys one after the other", Sum::Sequential),
            ]);
            each(all, |v, Named(_, s)| v.sum = s)
        },
    },
    Row {
        axis: "block",
        name: "KV blocks of {} rows",
        meaning: "The online softmax goes by another number of keys at a time.",
        seen: "",
        changes: |c| {
            let sizes = [1, 8, 16, 32, 48, 64, 80, 96, 112, 128, 176, 192, 256, 512, 1 << 30];
            let given = c.block_kv;
            let word = |n: usize| if n == 1 << 30 { "all".to_owned() } else { n.to_string() };
            let all = sizes.into_iter().filter(|n| *n != given).map(|n| Named(word(n), n));
            each(all.collect::<Vec<_>>(), |v, Named(_, n)| v.block_kv = n)
        },
    },
    Row {
        axis: "order",
        name: "KV blocks from the last to the first",
        meaning: "The online softmax goes through the keys backwards.",
        seen: "FlashAttention issue #2082",
        changes: |_| one(|v| v.descending = true),
    },
    Row {
        axis: "division",
        name: "output times the reciprocal of the sum",
        meaning: "o * (1 / l) is rounded twice where o / l is rounded once.",
        seen: "",
        changes: |_| one(|v| v.reciprocal = true),
    },
    Row {
        axis: "division",
        name: "output not divided by the sum",
        meaning: "The softmax is not normalised.",
        seen: "",
        changes: |_| one(|v| v.normalised = false),
    },
    Row {
        axis: "head",
        name: "key head {}",
        meaning: "Query heads read another key head than their group's.",
        seen: "",
        changes: |c| {
            let all = named([
                ("by query head modulo key heads", HeadOf::Modulo),
                ("0 for all", HeadOf::First),
                ("of the next group", HeadOf::Next),
            ]);
            each(all.into_iter().filter(|_| c.grouped).collect::<Vec<_>>(), |v, Named(_, h)| {
                v.head = h
            })
        },
    },
    Row {
        axis: "softcap",
        name: "scores capped by {} tanh(s / {})",
        meaning: "Scores go through a soft cap, as in Gemma 2.",
        seen: "LMDeploy PR #2842",
        changes: |_| {
            let all = [20.0f32, 30.0, 50.0].map(|c| Named(format!("{c}|{c}"), c));
            each(all, |v, Named(_, c)| v.softcap = c)
        },
    },
    Row {
        axis: "lse",
        name: "lse {}",
        meaning: "The logarithm of the sum is stored in another form.",
        seen: "",
        changes: |_| {
            let all = named([
                ("as a logarithm to base 2", Kept::Log2),
                ("without the maximum", Kept::WithoutMaximum),
                ("is the maximum", Kept::Maximum),
                ("is the sum", Kept::Sum),
            ]);
            each(all, |v, Named(_, k)| v.kept = k)
        },
    },
];

/// The table, for documentation.
pub(in crate::diagnose) fn table() -> Vec<[&'static str; 3]> {
    ROWS.iter().map(|r| [r.name, r.meaning, r.seen]).collect()
}
