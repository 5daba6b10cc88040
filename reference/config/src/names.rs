//! The known name that an unknown one was meant to be.

use fathom_trace::input::{VALUE, shorten};

/// The known name with the smallest edit distance, if it is near enough to be meant; else the
/// shortest that `name` is the beginning of.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    // Of names at the same distance the one that begins alike is meant.
    let alike = |k: &str| name.bytes().zip(k.bytes()).take_while(|(a, b)| a == b).count();
    let distances = known.iter().map(|k| (strsim::levenshtein(name, k), *k));
    let (distance, best) = distances.min_by_key(|(d, k)| (*d, usize::MAX - alike(k)))?;
    // One letter for another is no misspelling.
    let shares_letters = distance < name.len().max(best.len());
    if shares_letters && distance <= 1 + name.len() / 3 {
        return Some(best);
    }
    // The beginning of a longer name, most often without its unit.
    let longer = known.iter().filter(|k| name.len() >= 3 && k.starts_with(name));
    longer.min_by_key(|k| k.len()).copied()
}

/// The message for `name` where only `known` names are: all of them, and the nearest.
pub fn unknown_name(name: &str, known: &[&str]) -> String {
    let hint = nearest(name, known).map_or(String::new(), |n| format!("; did you mean '{n}'?"));
    let name = shorten(name, VALUE);
    format!("unknown name '{name}'; expected one of {}{hint}", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_a_misspelling_or_a_longer_one() {
        assert_eq!(nearest("dualpip", &["dualpipe", "gpipe"]), Some("dualpipe"));
        assert_eq!(nearest("zzzzzz", &["dualpipe", "gpipe"]), None);
        assert_eq!(nearest("nic_bytes", &["nic_bytes_per_s", "nics"]), Some("nic_bytes_per_s"));
        assert_eq!(nearest("x", &["y", "z"]), None);
        assert_eq!(nearest("epp", &["pp", "ep"]), Some("ep"));
    }

    #[test]
    fn an_unknown_name_is_told_what_there_is() {
        let said = unknown_name("gpip", &["dualpipe", "gpipe"]);
        let expected =
            "unknown name 'gpip'; expected one of dualpipe, gpipe; did you mean 'gpipe'?";
        assert_eq!(said, expected);
    }
}
