//! Which arithmetic produced this output?
//!
//! Hypotheses are rows of tables ([`hypothesis`]): for products (`gemm`), single tensor-core
//! instructions (`mma`), casts (`quantize`), RMSNorm, SwiGLU, attention, and for any output
//! (`output`). The search recomputes the output with every single deviation, then with pairs among
//! the best, and ranks them by the elements that agree ([`search`]). Where nothing explains all
//! elements, [`localise`] says where the others lie, and for products which K blocks they come
//! from.
//!
//! To add a hypothesis: copy a row of a table. `docs/diagnose.md` lists them.

mod attention;
mod gemm;
pub mod hypothesis;
pub mod localise;
mod mma;
mod offsets;
mod output;
mod page;
mod quantize;
mod rms_norm;
pub mod search;
mod swiglu;
mod tiles;
pub mod verdict;

use fathom_reference::ops::attention::Attention;
use fathom_reference::ops::mma::Mma;
use fathom_reference::ops::quantize_block::QuantizeBlock;
use fathom_reference::ops::quantize_tile::QuantizeTile;
use fathom_reference::ops::rms_norm::RmsNorm;
use fathom_reference::ops::swiglu::Swiglu;
use fathom_reference::{EngineError, Tensor};
use fathom_trace::DType;
use serde::Serialize;

use crate::case_file::{CaseFile, OUT};
use crate::compare;
use hypothesis::{Family, KBlocks, values};
use localise::Region;
pub use page::page;
use search::{Ranked, Search};
pub use verdict::Cause;
use verdict::Evidence;

/// What was found about a case file's output.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// Name of the op.
    pub op: String,
    /// Elements of the file's outputs.
    pub elements: usize,
    /// Elements on which hypotheses were compared; fewer than all where all would take too long.
    pub examined: usize,
    /// Elements, of all, that differ from the contract's output.
    pub mismatches: usize,
    /// The answer in one sentence.
    pub verdict: String,
    /// The cause that the verdict names; `None` where it names none.
    pub cause: Option<Cause>,
    /// Whether the cause agrees with every element examined.
    pub explained: bool,
    /// Hypotheses, the best first.
    pub hypotheses: Vec<Ranked>,
    /// Hypotheses tried, pairs included.
    pub tried: usize,
    /// Which K blocks the difference comes from; `None` where that cannot be said.
    pub k_blocks: Option<KBlocks>,
    /// Where the elements lie that differ from the contract's output; `None` where all agree.
    pub region: Option<Region>,
    /// Distances of the differing elements: `(largest ulp of the bucket, elements)`.
    pub ulp_histogram: Vec<(u64, usize)>,
    /// The differing elements of the (first) output, for a picture.
    #[serde(skip)]
    pub map: Map,
}

/// Which elements of a matrix differ from the contract's.
#[derive(Debug, Default)]
pub struct Map {
    /// Name of the tensor.
    pub tensor: String,
    /// Rows of the matrix; leading dimensions are folded into them.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Row-major, whether the element differs.
    pub differs: Vec<bool>,
}

/// Why a case cannot be diagnosed.
#[derive(Debug, thiserror::Error)]
pub enum DiagnoseError {
    /// The file holds no output.
    #[error("expected an output tensor ('out.<role>') to explain, found none")]
    NothingExpected,
    /// The reference could not compute the case.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Finds the arithmetic behind a case file's outputs; `progress` is called with the number of
/// hypotheses tried so far.
///
/// # Errors
/// [`DiagnoseError`] where there is nothing to explain or the reference cannot compute the case.
pub fn diagnose(
    file: &CaseFile,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Diagnosis, DiagnoseError> {
    use fathom_reference::{Engine, op::ReferenceEngine};
    let outputs = ReferenceEngine.run(&file.case)?;
    let roles = file.case.op.outputs().iter().filter(|r| file.expected.contains_key(**r));
    // The file's and the contract's tensors, in the order of the op's roles.
    let pairs: Vec<(&str, &Tensor, &Tensor)> =
        roles.map(|r| (*r, &file.expected[*r], &outputs[*r])).filter(|p| !p.1.is_empty()).collect();
    if pairs.is_empty() {
        return Err(DiagnoseError::NothingExpected);
    }
    let bits = |of: &dyn Fn(usize) -> Tensor| -> Vec<u64> {
        let all = (0..pairs.len()).flat_map(|p| {
            let t = of(p);
            (0..t.len()).map(move |i| t.bits(i))
        });
        all.collect()
    };
    let theirs = bits(&|p| pairs[p].1.clone());
    let contract = bits(&|p| pairs[p].2.clone());
    let differing: Vec<usize> = (0..theirs.len()).filter(|&i| theirs[i] != contract[i]).collect();

    let families = families(file, &pairs);
    let search = Search {
        families: &families,
        file: &theirs,
        contract: &contract,
        dtypes: pairs.iter().map(|p| (p.1.len(), p.1.dtype())).collect(),
        progress,
    };
    let found = search.run(&differing);
    // The first output that differs is what is described and drawn.
    let differs = |p: &&(&str, &Tensor, &Tensor)| p.1.bytes() != p.2.bytes();
    let (role, first_file, first_contract) = *pairs.iter().find(differs).unwrap_or(&pairs[0]);
    let map = map(role, first_file, first_contract);
    let region = Region::of(&map, first_file, first_contract);
    let explained = found.ranked[0].agree == found.examined;
    let unexplained = !explained && !differing.is_empty();
    let k_blocks =
        if unexplained { families[0].along_k(&theirs, &contract, &differing) } else { None };
    let by_place = if unexplained { families[0].by_place(&differing) } else { None };
    let old = ["acc", "c"].iter().find_map(|role| file.case.inputs.get(*role));
    let offset = match unexplained {
        true => offsets::find(first_file, first_contract)
            .or_else(|| tiles::find(first_file, first_contract, old)),
        false => None,
    };
    let evidence = Evidence {
        found: &found,
        elements: theirs.len(),
        mismatches: differing.len(),
        region: region.as_ref(),
        k_blocks: k_blocks.as_ref(),
        by_place: by_place.as_ref(),
        offset: offset.as_ref(),
        single_bits: differing.iter().all(|&i| (theirs[i] ^ contract[i]).count_ones() == 1),
    };
    let verdict = evidence.verdict();
    Ok(Diagnosis {
        op: file.case.op.name().to_owned(),
        elements: theirs.len(),
        examined: found.examined,
        mismatches: differing.len(),
        verdict: verdict.words,
        cause: verdict.cause,
        explained: verdict.explained,
        hypotheses: found.ranked,
        tried: found.tried,
        k_blocks,
        region,
        ulp_histogram: histogram(&pairs),
        map,
    })
}

/// The op's own hypotheses, where there are some, then those about any output.
fn families(file: &CaseFile, pairs: &[(&str, &Tensor, &Tensor)]) -> Vec<Box<dyn Family>> {
    let any = file.case.op.as_any();
    let (_, first_file, first_contract) = pairs[0];
    let own: Option<Box<dyn Family>> = if let Some(op) = any.downcast_ref::<Mma>() {
        Some(Box::new(mma::MmaFamily::new(op, &file.case)))
    } else if let Some(op) = any.downcast_ref::<QuantizeTile>() {
        Some(Box::new(quantize::QuantizeFamily::tile(op, file)))
    } else if let Some(op) = any.downcast_ref::<QuantizeBlock>() {
        Some(Box::new(quantize::QuantizeFamily::block(op, file)))
    } else if let Some(op) = any.downcast_ref::<RmsNorm>() {
        rms_norm::RmsNormFamily::new(op, file).map(|f| Box::new(f) as Box<dyn Family>)
    } else if let Some(op) = any.downcast_ref::<Swiglu>() {
        swiglu::SwigluFamily::new(op, file).map(|f| Box::new(f) as Box<dyn Family>)
    } else if let Some(op) = any.downcast_ref::<Attention>() {
        attention::AttentionFamily::new(op, file).map(|f| Box::new(f) as Box<dyn Family>)
    } else {
        let outputs = || (values(first_file), values(first_contract));
        let gemm = gemm::GemmFamily::new(&file.case, outputs);
        gemm.map(|f| Box::new(f) as Box<dyn Family>)
    };
    let tensors = pairs.iter().map(|p| (p.1.clone(), p.2.clone())).collect();
    own.into_iter().chain([Box::new(output::OutputFamily::new(tensors)) as _]).collect()
}

/// Every hypothesis by what it is about: name, meaning, where it was seen; `...` stands for a
/// parameter of the name.
pub fn catalogue() -> Vec<(&'static str, Vec<[String; 3]>)> {
    let rows = |table: Vec<[&'static str; 3]>| -> Vec<[String; 3]> {
        let row = |[name, meaning, seen]: [&str; 3]| {
            [name.replace("{}", "..."), meaning.to_owned(), seen.to_owned()]
        };
        table.into_iter().map(row).collect()
    };
    vec![
        ("Products: gemm_fp8, grouped_gemm_fp8, gemm, grouped_gemm", rows(gemm::table())),
        ("Casts: quantize_tile, quantize_block", rows(quantize::table())),
        ("One instruction: mma", rows(mma::table())),
        ("rms_norm", rows(rms_norm::table())),
        ("swiglu", rows(swiglu::table())),
        ("attention", rows(attention::table())),
        ("Any output", rows([output::table(), offsets::table(), tiles::table()].concat())),
    ]
}

/// A number with thousands separators.
pub fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn map(role: &str, file: &Tensor, contract: &Tensor) -> Map {
    let (rows, columns) = match file.shape() {
        [] => (1, 1),
        _ => file.rows_columns(),
    };
    let differs = (0..file.len()).map(|i| file.bits(i) != contract.bits(i)).collect();
    Map { tensor: format!("{OUT}{role}"), rows, columns, differs }
}

/// Differing elements by distance, in buckets of powers of two.
fn histogram(pairs: &[(&str, &Tensor, &Tensor)]) -> Vec<(u64, usize)> {
    let mut buckets = std::collections::BTreeMap::new();
    for (_, file, contract) in pairs {
        let dtype: DType = file.dtype();
        for i in 0..file.len() {
            if file.bits(i) != contract.bits(i) {
                let distance = compare::ulp_distance(dtype, file.bits(i), contract.bits(i)).max(1);
                let bucket = distance.checked_next_power_of_two().unwrap_or(u64::MAX);
                *buckets.entry(bucket).or_insert(0) += 1;
            }
        }
    }
    buckets.into_iter().collect()
}
