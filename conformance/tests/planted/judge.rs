//! Whether a diagnosis found a planted fault: its verdict names the cause, or it says where.

use std::ops::Range;

use fathom_conformance::case_file::CaseFile;
use fathom_conformance::diagnose::{Diagnosis, diagnose};

/// Where a fault lies that is one tile's, over some K blocks of 128.
pub struct Place {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    pub k_blocks: Range<usize>,
}

/// How a fault was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Found {
    ByName,
    ByPlace,
    Not,
}

/// What the tool says of a case; for an op that it refuses, the refusal as the verdict.
pub fn verdict(file: &CaseFile) -> (Option<Diagnosis>, String) {
    match diagnose(file, &|_| ()) {
        Ok(diagnosis) => {
            let verdict = diagnosis.verdict.clone();
            (Some(diagnosis), verdict)
        }
        Err(error) => (None, format!("refused: {error}")),
    }
}

/// Words in lower case; signs part words, but for those inside numbers (`1e-10`, `0.25`) and `_`.
fn words(text: &str) -> Vec<String> {
    let spaced = text.to_lowercase().replace("..=", " to ").replace("..", " to ");
    let all: Vec<char> = spaced.chars().collect();
    let digit = |at: Option<usize>| at.and_then(|at| all.get(at)).is_some_and(char::is_ascii_digit);
    let kept = |at: usize| match all[at] {
        '.' => digit(at.checked_sub(1)) && digit(Some(at + 1)),
        '-' => digit(at.checked_sub(2)) && all[at - 1] == 'e' && digit(Some(at + 1)),
        c => c.is_alphanumeric() || c == '_',
    };
    let apart: String = (0..all.len()).map(|at| if kept(at) { all[at] } else { ' ' }).collect();
    apart.split_whitespace().map(str::to_owned).collect()
}

/// A pattern's word: alternatives parted by `|`, a trailing `*` for any ending.
fn matches(pattern: &str, word: &str) -> bool {
    pattern.split('|').any(|option| match option.strip_suffix('*') {
        Some(stem) => word.starts_with(stem),
        None => word == option,
    })
}

/// A verdict that says that nothing explains the output, or that the op is not known, names
/// nothing, whichever words stand in it.
fn denies(verdict: &str) -> bool {
    let text = verdict.to_lowercase();
    let denials = ["no hypothes", "none of the", "nothing explains", "no cause", "unexplained"];
    text.starts_with("refused") || denials.iter().any(|d| text.contains(d))
}

/// Whether every word of an alternative stands in the verdict.
pub fn names(verdict: &str, named: &[&str]) -> bool {
    let said = words(verdict);
    let all = |alternative: &&str| {
        alternative.split(' ').all(|pattern| match pattern.strip_prefix('!') {
            Some(absent) => !said.iter().any(|word| matches(absent, word)),
            None => said.iter().any(|word| matches(pattern, word)),
        })
    };
    !denies(verdict) && named.iter().any(all)
}

/// The K blocks that a text speaks of: `K block 3`, `K blocks 6 and 7`, `K blocks 6 to 7`, or
/// elements as `k 768..1024`.
fn k_blocks(text: &str) -> Vec<usize> {
    let words = words(text);
    let mut found = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let after = |n: usize| words.get(at + n).map_or("", String::as_str);
        let number = |n: usize| after(n).parse::<usize>().ok();
        if word != "k" {
            continue;
        }
        if matches!(after(1), "block" | "blocks") {
            let Some(first) = number(2) else { continue };
            match (after(3), number(4)) {
                ("to" | "through", Some(last)) => found.extend(first..=last),
                ("and", Some(second)) => found.extend([first, second]),
                _ => found.push(first),
            }
        } else if let (Some(first), "to", Some(end)) = (number(1), after(2), number(3))
            && first % 128 == 0
            && end > first
        {
            found.extend(first / 128..end.div_ceil(128));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether the diagnosis bounds the fault by just this tile and speaks of just these K blocks.
fn places(diagnosis: &Diagnosis, place: &Place) -> bool {
    let Some(region) = &diagnosis.region else { return false };
    let inclusive = |range: &Range<usize>| (range.start, range.end - 1);
    region.rows == inclusive(&place.rows)
        && region.columns == inclusive(&place.columns)
        && k_blocks(&diagnosis.verdict) == place.k_blocks.clone().collect::<Vec<_>>()
}

/// Whether diagnosis names the planted defect, and what it says instead.
pub fn judge(
    diagnosis: Option<&Diagnosis>,
    verdict: &str,
    named: &[&str],
    place: Option<&Place>,
) -> Found {
    if names(verdict, named) {
        return Found::ByName;
    }
    match (diagnosis, place) {
        (Some(diagnosis), Some(place)) if places(diagnosis, place) => Found::ByPlace,
        _ => Found::Not,
    }
}

/// Whether the diagnosis claims a cause for all of the output, or a K block.
pub fn claims(diagnosis: &Diagnosis) -> bool {
    let deviates = diagnosis.hypotheses.first().is_some_and(|h| !h.deviations.is_empty());
    let localised = !denies(&diagnosis.verdict) && !k_blocks(&diagnosis.verdict).is_empty();
    diagnosis.explained && deviates || localised
}

#[test]
fn a_word_alone_names_nothing() {
    let named = ["promot* 32", "a_scale|scale* power* two"];
    assert!(names("All elements agree with promotion every 32, the rest as given", &named));
    assert!(names("scales cut to a power of two", &named));
    assert!(!names("promotion every 320", &named), "a number is a whole word");
    assert!(!names("no hypothesis explains it; promotion every 32 comes closest", &named));
    assert!(!names("refused: promotion 32", &named));
    assert!(!names("promotion", &named));
    assert!(names("rows of 100", &["rows 100 !64"]) && !names("rows 100, 64", &["rows 100 !64"]));
    let signs = words("power-of-two a_scale's floor, 1e-10: 0.25. split-K");
    assert_eq!(
        signs,
        ["power", "of", "two", "a_scale", "s", "floor", "1e-10", "0.25", "split", "k"]
    );
}

#[test]
fn k_blocks_are_read_from_words_and_elements() {
    assert_eq!(k_blocks("K block 3 is missing"), [3]);
    assert_eq!(k_blocks("K blocks 6 and 7; K block 6"), [6, 7]);
    assert_eq!(k_blocks("K blocks 2..=4"), [2, 3, 4]);
    assert_eq!(k_blocks("elements k 768..1024"), [6, 7]);
    assert!(k_blocks("every K block, k 100..228, block 3").is_empty());
}
