//! Faults planted by hand, by which `fathom diagnose` is judged, and controls with none.
//!
//! The list was written by somebody who does not work on the tool and had read no more of it than
//! its public types, not its hypotheses. It is what FP8, MoE, cast, norm and attention kernels
//! really got wrong: faults were looked up among public bug reports and fixes (`seen` names the
//! repository and the number) and boiled down to the arithmetic that they do to one op; where
//! `seen` says 'after', the report is of another op or device, or does not tell the cause in full;
//! where it says 'from the contract', a rule of `docs/numerics.md` was broken in a way that a
//! kernel may well break it. No fault was chosen, changed or left out for what the tool says of
//! it. Where the tool named a fault in words that the author had not thought of, the words were
//! added; where its words fitted but its cause was another, they were narrowed.
//!
//! A fault's arithmetic is written out in this folder, as plain loops; the formats, the tensor core
//! and elementary functions below them are `fathom-numerics`'. Without their fault the loops give
//! the contract's bits, which the controls check.
//!
//! A fault is **found** when the verdict names its cause (`named`: alternatives, each of which is a
//! list of words that must all stand in the verdict) or bounds it to its tile and K blocks
//! (`place`). A verdict that says that it has no explanation names nothing.

mod attention;
mod casts;
mod controls;
mod data;
mod elementwise;
mod gemm;
mod gemm_data;
mod gemm_scales;
mod gemm_sums;
mod grouped;
mod judge;

use fathom_conformance::case_file::CaseFile;
use fathom_reference::Engine;
use fathom_reference::op::{Outputs, ReferenceEngine};
use rayon::prelude::*;

use judge::{Found, Place, claims, judge, names, verdict};

/// At least so many of the planted faults are found.
const FOUND: usize = 78;

/// One planted fault.
pub struct Fault {
    /// What the kernel does wrong.
    pub name: &'static str,
    /// The public report of it.
    pub seen: &'static str,
    /// The case file whose output such a kernel gave.
    pub plant: fn() -> CaseFile,
    /// What a verdict that names the cause says: alternatives of words in lower case, all of which
    /// must be there; `a|b` is either, `a*` any ending, `!a` a word that must not be there.
    pub named: &'static [&'static str],
    /// Where the fault lies, if in one tile and some K blocks.
    pub place: Option<Place>,
}

/// The families, in the order of the table.
const FAMILIES: &[(&str, &[Fault])] = &[
    ("FP8 GEMM: scales", gemm_scales::FAULTS),
    ("FP8 GEMM: sums", gemm_sums::FAULTS),
    ("FP8 GEMM: data", gemm_data::FAULTS),
    ("experts", grouped::FAULTS),
    ("casts", casts::FAULTS),
    ("RMSNorm, SwiGLU", elementwise::FAULTS),
    ("attention", attention::FAULTS),
];

fn contract(file: &CaseFile) -> Outputs {
    ReferenceEngine.run(&file.case).unwrap()
}

/// The first characters of a verdict, on one line.
fn short(verdict: &str) -> String {
    verdict.replace('\n', " ").chars().take(100).collect()
}

#[test]
fn every_planted_fault_shows_and_lies_where_it_says() {
    for fault in FAMILIES.iter().flat_map(|(_, faults)| *faults) {
        let file = (fault.plant)();
        let right = contract(&file);
        assert_eq!(right.keys().collect::<Vec<_>>(), file.expected.keys().collect::<Vec<_>>());
        assert!(right != file.expected, "{}: the contract's own output", fault.name);
        let Some(place) = &fault.place else { continue };
        let (planted, right) = (&file.expected["d"], &right["d"]);
        let differs: Vec<_> =
            (0..right.len()).filter(|&i| right.bits(i) != planted.bits(i)).collect();
        let columns = right.shape()[1];
        let bounds = |at: fn(usize, usize) -> usize| {
            let all = differs.iter().map(|&i| at(i, columns));
            all.clone().min().unwrap()..all.max().unwrap() + 1
        };
        assert_eq!(bounds(|i, columns| i / columns), place.rows, "{}", fault.name);
        assert_eq!(bounds(|i, columns| i % columns), place.columns, "{}", fault.name);
    }
}

/// Whether a fault is found, and its lines of the table.
fn row(fault: &Fault) -> (bool, String) {
    let (diagnosis, verdict) = verdict(&(fault.plant)());
    let how = judge(diagnosis.as_ref(), &verdict, fault.named, fault.place.as_ref());
    let words = match how {
        Found::ByName => "by name",
        Found::ByPlace => "by place",
        Found::Not if diagnosis.as_ref().is_some_and(claims) => "another cause",
        Found::Not => "not found",
    };
    let (name, seen, verdict) = (fault.name, fault.seen, short(&verdict));
    (how != Found::Not, format!("{words:13} {name} [{seen}]\n{:16}{verdict}\n", ""))
}

/// Prints the table of faults; the figure is a floor, so that what is found once stays found.
#[test]
fn planted_faults_are_found() {
    let (mut table, mut all, mut total) = (String::new(), 0, 0);
    for (family, faults) in FAMILIES {
        let rows: Vec<(bool, String)> = faults.par_iter().map(row).collect();
        let found = rows.iter().filter(|(found, _)| *found).count();
        table.extend(rows.into_iter().map(|(_, row)| row));
        table += &format!("-- {family}: {found} of {}\n\n", faults.len());
        (all, total) = (all + found, total + faults.len());
    }
    println!("{table}{all} of {total} planted faults are found");
    assert!(all >= FOUND, "{all} of {total} planted faults are found, expected at least {FOUND}");
}

#[test]
fn controls_get_no_cause() {
    controls::CONTROLS.par_iter().for_each(|control| {
        let file = (control.plant)();
        assert_eq!(contract(&file) == file.expected, control.right, "{}", control.name);
        let (diagnosis, verdict) = verdict(&file);
        println!("{}: {}", control.name, short(&verdict));
        let Some(diagnosis) = diagnosis else { return };
        assert_eq!(diagnosis.mismatches == 0, control.right, "{}: {verdict}", control.name);
        assert!(!claims(&diagnosis), "{}: {verdict}", control.name);
        for fault in FAMILIES.iter().flat_map(|(_, faults)| *faults) {
            let lead = names(&verdict, fault.named);
            assert!(!lead, "{}: '{}' is named: {verdict}", control.name, fault.name);
        }
    });
}
