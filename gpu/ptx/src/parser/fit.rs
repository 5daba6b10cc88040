//! Fits instructions to the table: suffixes first (cached by mnemonic), then operands.

use std::sync::Arc;

use super::names::Names;
use super::*;
use crate::error::ErrorKind;
use crate::table::pattern::Misfit;
use crate::table::{self, FormId, Opcode, Slot};
use crate::types::*;
use crate::validate;

/// The forms that a mnemonic with its suffixes fits.
#[derive(Clone, Debug)]
pub(crate) enum Fits {
    /// Known, never executed: operands are not read.
    Recognised(Opcode),
    /// One or more forms; operands decide.
    Forms(Opcode, Arc<[(FormId, Modifiers)]>),
}

/// An instruction without its guard and place.
pub(crate) type Fitted = (Opcode, FormId, Modifiers, Vec<Operand>);

impl<'a> Parser<'a> {
    /// The forms for a mnemonic.
    pub(super) fn fits(&mut self, word: Token<'a>) -> Result<Fits> {
        if let Some(fits) = self.fits.get(word.text) {
            return Ok(fits.clone());
        }
        let fits = self.find(word)?;
        self.fits.insert(word.text, fits.clone());
        Ok(fits)
    }

    fn find(&self, word: Token<'_>) -> Result<Fits> {
        // Without the blanks and comments in front of suffixes.
        let mut lexer = Lexer::new(word.text);
        let pieces =
            std::iter::from_fn(|| Some(lexer.token()).filter(|t| t.kind != TokenKind::End));
        let written: &str = &pieces.map(|t| t.text).collect::<String>();
        // `bar.cta.sync` is `bar.sync`, `barrier.cta.sync` is `barrier.sync`.
        let plain = match written.split_once(".cta.") {
            Some((bar @ ("bar" | "barrier"), rest)) => format!("{bar}.{rest}"),
            _ => written.to_string(),
        };
        let Some((op, suffixes)) = table::split(&plain) else {
            let error = self
                .error_at(word, format!("unknown instruction `{}`", shorten(written)))
                .of_kind(ErrorKind::UnknownInstruction);
            return Err(match table::nearest(written) {
                Some(op) => error.help(format!("nearest is `{op}`")),
                None => error,
            });
        };
        let words: Vec<&str> = suffixes.split('.').skip(1).collect();
        let mut fitting = Vec::new();
        let mut best: Option<(usize, FormId, Misfit)> = None;
        let mut broken = None;
        for id in table::forms_of(op) {
            if id.form().recognised() {
                return Ok(Fits::Recognised(op));
            }
            match id.form().fit(&words) {
                Ok(mods) => {
                    let mods = Modifiers(mods.into());
                    match validate::rule(op, &mods) {
                        Ok(()) => fitting.push((*id, mods)),
                        Err(message) => broken = Some(message),
                    }
                }
                Err((fitted, misfit)) => {
                    if best.as_ref().is_none_or(|(n, ..)| fitted > *n) {
                        best = Some((fitted, *id, misfit));
                    }
                }
            }
        }
        if let (true, Some(message)) = (fitting.is_empty(), broken) {
            let message = format!("`{}`: {message}", shorten(written));
            return Err(self.error_at(word, message));
        }
        if fitting.is_empty() {
            return Err(self.misfit(word, op, &words, best));
        }
        Ok(Fits::Forms(op, fitting.into()))
    }

    fn misfit(
        &self,
        word: Token<'_>,
        op: Opcode,
        words: &[&str],
        best: Option<(usize, FormId, Misfit)>,
    ) -> Error {
        let Some((_, id, misfit)) = best else {
            return self.error_at(word, format!("`{op}` has no form"));
        };
        let form = id.form();
        let message = match misfit {
            Misfit::Unexpected(w) => {
                format!("`.{}` does not belong to `{op}` here", shorten(words[w]))
            }
            Misfit::Missing(e) => {
                let element = &form.elements[e];
                let some: Vec<String> =
                    element.choices.iter().take(12).map(|m| format!(".{m}")).collect();
                let more = if element.choices.len() > 12 { " ..." } else { "" };
                format!("`{}` lacks one of {}{more}", shorten(word.text), some.join(" "))
            }
        };
        self.error_at(word, message).help(format!("expected `{}`", form.syntax()))
    }

    /// Operands up to the semicolon, fitted to the first form that takes them.
    pub(super) fn operands(
        &mut self,
        names: &mut Names<'a>,
        word: Token<'a>,
        op: Opcode,
        forms: &[(FormId, Modifiers)],
    ) -> Result<Fitted> {
        let mut places = std::mem::take(&mut self.places);
        places.clear();
        let slots = forms.iter().map(|(id, _)| id.form().slots.len()).max();
        let mut operands = Vec::with_capacity(slots.unwrap_or(0));
        let mut unified = false;
        let branch = matches!(op, Opcode::Bra | Opcode::BrxIdx);
        if !self.token.is(";") {
            loop {
                places.push(self.token);
                operands.push(self.operand(names, branch)?);
                unified |= self.eat_directive(".unified");
                if !self.eat(",") {
                    break;
                }
            }
        }
        if !self.token.is(";") {
            return self.expected("`,` or `;`");
        }
        let mut best: Option<(usize, String, FormId)> = None;
        for (id, mods) in forms {
            match assign(id.form().slots.as_slice(), mods, op, operands, &names.body) {
                Ok(assigned) => {
                    self.next();
                    self.places = places;
                    let mods = if unified { with_unified(mods) } else { mods.clone() };
                    return Ok((op, *id, mods, assigned));
                }
                Err((back, at, message)) => {
                    operands = back;
                    if best.as_ref().is_none_or(|(n, ..)| at > *n) {
                        best = Some((at, message, *id));
                    }
                }
            }
        }
        let (at, message, id) = best.unwrap_or((0, "has no form".into(), forms[0].0));
        let place = places.get(at).copied().unwrap_or(word);
        let message = format!("`{}`: {message}", shorten(word.text));
        let help = format!("expected `{}`", id.form().syntax());
        Err(self.error_at(place, message).help(help))
    }
}

fn with_unified(mods: &Modifiers) -> Modifiers {
    Modifiers(mods.0.iter().copied().chain([Mod::Flag(Flag::Unified)]).collect())
}

/// What goes wrong: the operands back, which one (for ranking), and the message.
type Refused = (Vec<Operand>, usize, String);

/// Gives every slot its operand, [`Operand::None`] where it is absent.
fn assign(
    slots: &[Slot],
    mods: &Modifiers,
    op: Opcode,
    mut operands: Vec<Operand>,
    body: &Body,
) -> Result<Vec<Operand>, Refused> {
    let by_rule = |slot: &Slot| slot.optional.then(|| presence(&slot.name, mods)).flatten();
    let needed = slots.iter().filter(|s| by_rule(s).unwrap_or(!s.optional)).count();
    let free = slots.iter().filter(|s| s.optional && by_rule(s).is_none()).count();
    if operands.len() < needed || operands.len() > needed + free {
        let wanted =
            if free > 0 { format!("{needed} to {}", needed + free) } else { needed.to_string() };
        let message = format!("takes {wanted} operands, found {}", operands.len());
        return Err((operands, 0, message));
    }
    let mut spare = operands.len() - needed;
    let mut given = 0;
    let mut absent = Vec::new();
    for (at, slot) in slots.iter().enumerate() {
        let here = by_rule(slot).unwrap_or_else(|| {
            let here = !slot.optional || spare > 0;
            spare -= usize::from(slot.optional && here);
            here
        });
        if !here {
            absent.push(at);
            continue;
        }
        if let Err(message) = validate::operand(slot, mods, op, &operands[given], body) {
            let message = format!("operand {} ({}): {message}", given + 1, slot.name);
            return Err((operands, given, message));
        }
        given += 1;
    }
    for at in absent {
        operands.insert(at, Operand::None);
    }
    Ok(operands)
}

/// Whether an optional operand of that name is there, where a suffix decides.
fn presence(name: &str, mods: &Modifiers) -> Option<bool> {
    match name {
        "policy" => Some(mods.has_hint(Hint::L2CacheHint)),
        "mask" => Some(mods.has(Flag::MulticastCluster) || mods.has(Flag::CpMask)),
        "offsets" => {
            Some([Flag::Im2col, Flag::Im2colW, Flag::Im2colW128].into_iter().any(|f| mods.has(f)))
        }
        _ => None,
    }
}
