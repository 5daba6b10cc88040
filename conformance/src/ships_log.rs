//! A ship's log, made up sentence by sentence: text from which a model of a million parameters
//! learns whole sentences within a few hundred steps, for the demonstration.

use fathom_numerics::philox::Philox;

/// A sentence: words, and places where one of several goes.
type Sentence = &'static [&'static [&'static str]];

const OPENINGS: [Sentence; 4] = [
    &[
        &["At dawn", "At noon", "At dusk", "In the first watch", "In the night"],
        &["the brig", "the schooner", "our ship", "the old whaler"],
        &["lay at anchor", "stood to the north", "ran before the wind", "drifted with the tide"],
        &["off the cape.", "in the sound.", "near the reef.", "along the coast."],
    ],
    &[
        &["The wind came", "A breeze came", "Rain came"],
        &["from the west", "from the south", "out of the north", "over the islands"],
        &["and held all day.", "and died by evening.", "and the sea grew calm."],
    ],
    &[
        &["Fog lay", "A long swell ran", "Ice was seen", "Whales were seen"],
        &["all around us", "to the north", "close to the shore"],
        &["until noon.", "until the bell.", "and the crew kept watch."],
    ],
    &[
        &["The mate", "The captain", "The boy", "The pilot"],
        &["saw a light", "heard the surf", "saw smoke", "heard a bell"],
        &["on the shore", "beyond the point", "far astern"],
        &["and woke the others.", "and said nothing.", "and wrote it down."],
    ],
];

const SOUNDINGS: [Sentence; 3] = [
    &[
        &["The lead gave", "We sounded and found", "The line ran out to"],
        &["four fathoms", "nine fathoms", "twelve fathoms", "forty fathoms"],
        &["over sand.", "over mud.", "over white shells.", "and no bottom."],
    ],
    &[
        &["Under the keel were", "By the mark there were"],
        &["four fathoms,", "nine fathoms,", "twelve fathoms,", "forty fathoms,"],
        &["so we held our course.", "so we let go the anchor.", "so we wore ship."],
    ],
    &[
        &["The water was", "The channel was"],
        &["deep and green", "shallow and clear", "dark and still"],
        &["where the chart shows a shoal.", "as the old chart says."],
    ],
];

const ENDS: [Sentence; 3] = [
    &[
        &["The cook", "The carpenter", "The boy", "The mate"],
        &["mended the sail", "sang at the wheel", "caught a fish", "told of his home"],
        &["and all were glad.", "until the stars came out.", "and the dog slept."],
    ],
    &[
        &["All is well", "Nothing more to write", "The pumps are dry"],
        &["aboard tonight.", "this day.", "and the ship is sound."],
    ],
    &[
        &["Tomorrow we hope", "With luck we hope", "If the wind holds we hope"],
        &["to raise the light.", "to see land.", "to be home."],
    ],
];

/// `entries` entries, a paragraph each: an opening, a sounding, an end. The same in every run.
pub fn ships_log(entries: usize) -> String {
    let noise = Philox::new(0, 0);
    let mut drawn = 0;
    let mut draw = |among: usize| {
        drawn += 1;
        noise.word(drawn) as usize % among
    };
    let mut text = String::new();
    for day in 1..=entries {
        text += &format!("Day {day}.");
        for kind in [&OPENINGS[..], &SOUNDINGS[..], &ENDS[..]] {
            for words in kind[draw(kind.len())] {
                text.push(' ');
                text += words[draw(words.len())];
            }
        }
        text += "\n\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_whole_and_always_the_same() {
        let text = ships_log(50);
        assert_eq!(text, ships_log(50));
        assert_eq!(text.matches("Day ").count(), 50);
        assert!(text.split("\n\n").filter(|e| !e.is_empty()).all(|e| e.ends_with('.')));
    }
}
