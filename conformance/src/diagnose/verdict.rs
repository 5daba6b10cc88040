//! The answer in one sentence: cause, what it means, where, where it was seen.

use serde::Serialize;

use super::grouped;
use super::hypothesis::{Hypothesis, KBlocks, OUTPUT};
use super::localise::Region;
use super::search::{Found, Ranked};

/// Share of the difference that weights of K blocks account for where they are its cause.
const SETTLED: f64 = 0.98;

/// The cause that the evidence names.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    /// Short name; two deviations at once are joined by 'and'.
    pub name: String,
    /// What a kernel does that gives such an output.
    pub meaning: String,
    /// Where public code did it; empty where none is known to us.
    pub seen: String,
    /// Elements examined that agree with it.
    pub agree: usize,
    /// Share of the differing elements that would agree by chance.
    pub chance: f64,
}

/// What the verdict is made of.
pub(super) struct Evidence<'a> {
    pub(super) found: &'a Found,
    pub(super) elements: usize,
    pub(super) mismatches: usize,
    pub(super) region: Option<&'a Region>,
    pub(super) k_blocks: Option<&'a KBlocks>,
    /// A cause that follows from where the differing elements lie, and where.
    pub(super) by_place: Option<&'a (Hypothesis, String)>,
    /// A value or factor that explains the differing elements, and some of its values.
    pub(super) offset: Option<&'a (Hypothesis, String)>,
    /// Whether each differing element differs by one bit.
    pub(super) single_bits: bool,
}

/// The sentence, the cause it names, and whether that explains every element examined.
pub(super) struct Verdict {
    pub(super) words: String,
    pub(super) cause: Option<Cause>,
    pub(super) explained: bool,
}

impl Cause {
    fn of(ranked: &Ranked) -> Cause {
        let join = |of: fn(&Hypothesis) -> &str, by: &str| {
            let all: Vec<&str> =
                ranked.hypotheses.iter().map(of).filter(|s| !s.is_empty()).collect();
            all.join(by)
        };
        Cause {
            name: ranked.deviations.join(" and "),
            meaning: join(|h| h.meaning, " "),
            seen: join(|h| h.seen, ", "),
            agree: ranked.agree,
            chance: ranked.chance,
        }
    }

    fn explanation(&self) -> String {
        let meaning = self.meaning.trim_end_matches('.');
        match &self.seen[..] {
            "" => format!(" ({meaning})"),
            seen => format!(" ({meaning}; seen in {seen})"),
        }
    }
}

impl Evidence<'_> {
    fn sampled(&self) -> String {
        match self.found.examined < self.elements {
            true => format!(
                " (of {} in the file; the others were not examined)",
                grouped(self.elements)
            ),
            false => String::new(),
        }
    }

    fn place(&self) -> String {
        let region = self.region.map(|r| format!("; the differing elements {}", r.words()));
        let blocks = self.k_blocks.map(|k| format!("; along K: {}", k.words));
        region.unwrap_or_default() + &blocks.unwrap_or_default()
    }

    /// The verdict: the strongest statement that the evidence bears.
    pub(super) fn verdict(&self) -> Verdict {
        self.agrees()
            .or_else(|| self.explained())
            .or_else(|| self.explained_where_differing())
            .or_else(|| self.by_place())
            .or_else(|| self.isolated())
            .or_else(|| self.offset())
            .or_else(|| self.strong_lead())
            .or_else(|| self.along_k())
            .unwrap_or_else(|| self.nothing())
    }

    fn agrees(&self) -> Option<Verdict> {
        (self.mismatches == 0).then(|| Verdict {
            words: format!(
                "all {} elements agree with: the parameters as given",
                grouped(self.elements)
            ),
            cause: None,
            explained: true,
        })
    }

    fn explained(&self) -> Option<Verdict> {
        let (ranked, examined) = (&self.found.ranked, self.found.examined);
        let best = &ranked[0];
        if best.agree != examined || best.deviations.is_empty() {
            return None;
        }
        let cause = Cause::of(best);
        let like: Vec<_> = ranked[1..]
            .iter()
            .filter(|r| r.agree == examined && r.deviations.len() == best.deviations.len())
            .map(|r| r.deviations.join(" and "))
            .take(4)
            .collect();
        let mut words = format!(
            "all {} elements{} agree with: {}{}",
            grouped(examined),
            self.sampled(),
            best.words(),
            cause.explanation()
        );
        if !like.is_empty() {
            words += &format!("; on this input the same bits as: {}", like.join("; "));
        }
        if self.mismatches < 4 {
            words += &format!(
                "; only {} of them differ from the contract, so this may be chance",
                self.mismatches
            );
        }
        if let Some(region) = self.region.filter(|r| r.is_part()) {
            words += &format!("; the elements that differ from the contract {}", region.place());
        }
        Some(Verdict { words, cause: Some(cause), explained: true })
    }

    fn explained_where_differing(&self) -> Option<Verdict> {
        let Found { ranked, mismatched, tried, .. } = self.found;
        let of_output = |r: &&Ranked| r.hypotheses.first().is_some_and(|h| h.axis == OUTPUT);
        let all = ranked
            .iter()
            .filter(|r| r.agree_of_mismatched == *mismatched)
            .filter(|r| r.beyond_chance(*mismatched, *tried));
        let part = all.clone().find(of_output).or_else(|| all.clone().next())?;
        let cause = Cause::of(part);
        let words = format!(
            "the {} differing elements{} agree with: {}{}; the others with the parameters as \
             given{}",
            grouped(*mismatched),
            self.sampled(),
            part.words(),
            cause.explanation(),
            self.place()
        );
        Some(Verdict { words, cause: Some(cause), explained: false })
    }

    /// A few elements that differ while all others agree to the bit.
    fn isolated(&self) -> Option<Verdict> {
        if self.mismatches > (self.elements / 1000).clamp(1, 8) {
            return None;
        }
        let region = self.region?;
        let how = match (self.single_bits, self.mismatches) {
            (true, 1) => "by one bit",
            (true, _) => "each by one bit",
            _ => "by more than one bit",
        };
        let places: Vec<String> = region.first.iter().map(|(r, c)| format!("[{r}, {c}]")).collect();
        let words = format!(
            "{} of {} elements differ{}, {how}, at {}; all others agree with the contract to the \
             bit, which no arithmetic on the list does: look for corrupted memory, a race, or one \
             thread's store",
            grouped(self.mismatches),
            grouped(self.elements),
            if self.mismatches == 1 { "s" } else { "" },
            places.join(", ")
        );
        Some(Verdict { words, cause: None, explained: false })
    }

    fn by_place(&self) -> Option<Verdict> {
        let (hypothesis, place) = self.by_place?;
        let cause = Cause {
            name: hypothesis.name.clone(),
            meaning: hypothesis.meaning.to_owned(),
            seen: hypothesis.seen.to_owned(),
            agree: self.elements - self.mismatches,
            chance: 0.0,
        };
        let words = format!(
            "all {} differing elements lie where just this shows: {}{}; {place}{}",
            grouped(self.mismatches),
            cause.name,
            cause.explanation(),
            self.place()
        );
        Some(Verdict { words, cause: Some(cause), explained: false })
    }

    fn offset(&self) -> Option<Verdict> {
        let (hypothesis, values) = self.offset?;
        let cause = Cause {
            name: hypothesis.name.clone(),
            meaning: hypothesis.meaning.to_owned(),
            seen: hypothesis.seen.to_owned(),
            agree: self.elements,
            chance: 0.0,
        };
        let words = format!(
            "all {} differing elements agree, within their rounding, with: {}{}; {values}{}",
            grouped(self.mismatches),
            cause.name,
            cause.explanation(),
            self.place()
        );
        Some(Verdict { words, cause: Some(cause), explained: true })
    }

    fn along_k(&self) -> Option<Verdict> {
        let k = self.k_blocks?;
        let cause = Cause {
            name: k.words.clone(),
            meaning: "Weights of K blocks, solved for from the differing elements.".to_owned(),
            seen: String::new(),
            agree: self.found.examined - self.found.mismatched,
            chance: 0.0,
        };
        let lead = self.lead().map_or(String::new(), |l| format!("; {l}"));
        let region = self.region.map(|r| format!("; the differing elements {}", r.words()));
        // What all of the difference follows from is the cause, whatever moved the last bits.
        let bits = if k.accounts_for >= SETTLED {
            "within rounding, "
        } else {
            "no hypothesis gives the bits, but "
        };
        let words = format!(
            "{bits}{:.1} % of the difference is that {}{}{lead}",
            100.0 * k.accounts_for,
            k.words,
            region.unwrap_or_default()
        );
        Some(Verdict { words, cause: Some(cause), explained: false })
    }

    /// The hypothesis that agrees with the most differing elements, the simplest of equals.
    fn nearest(&self) -> Option<&Ranked> {
        let key = |r: &&Ranked| (r.agree_of_mismatched, std::cmp::Reverse(r.deviations.len()));
        // Of equals `max_by_key` takes the last: from the back, the first.
        self.found.ranked.iter().rev().max_by_key(key)
    }

    /// A lead that agrees with half of the differing elements says more than weights of K blocks.
    fn strong_lead(&self) -> Option<Verdict> {
        let strong = self.nearest()?.agree_of_mismatched * 2 >= self.found.mismatched;
        (strong && self.lead().is_some()).then(|| self.nothing())
    }

    /// The nearest hypothesis, where it agrees beyond chance.
    fn lead(&self) -> Option<String> {
        let Found { mismatched, tried, .. } = self.found;
        let best = self.nearest()?;
        let share = |x: usize| 100.0 * x as f64 / (*mismatched).max(1) as f64;
        best.is_lead(*mismatched, *tried).then(|| {
            format!(
                "nearest is {} with {:.1} % of the differing elements agreeing, {:.1} % being \
                 expected by chance{}",
                best.words(),
                share(best.agree_of_mismatched),
                100.0 * best.chance,
                Cause::of(best).explanation()
            )
        })
    }

    fn nothing(&self) -> Verdict {
        let Found { mismatched, tried, .. } = self.found;
        let lead = self.lead();
        let nearest = lead.clone().unwrap_or_else(|| {
            let best = self.nearest();
            let (agree, chance) = best.map_or((0, 0.0), |r| (r.agree_of_mismatched, r.chance));
            format!(
                "none of {} hypotheses is a lead: the best agrees with {} of {} differing elements \
                 examined, {:.1} % being expected by chance",
                grouped(*tried),
                grouped(agree),
                grouped(*mismatched),
                100.0 * chance
            )
        });
        let words = format!(
            "no hypothesis explains all {} elements{}: {} of the file differ from the contract; \
             {nearest}{}",
            grouped(self.found.examined),
            self.sampled(),
            grouped(self.mismatches),
            self.place()
        );
        let best = self.nearest().filter(|_| lead.is_some());
        Verdict { words, cause: best.map(Cause::of), explained: false }
    }
}
