//! Rows compiled to patterns, and how an instruction's suffixes are matched against them.
//!
//! The notation of a row's `syntax`:
//!
//! - suffixes: `.word` is one of the set of that name (the row's own sets, then [`GROUPS`]), else
//!   the literal suffix; `{.a}` is optional, `{.a.b}` both or neither. As in ptxas, the order of
//!   suffixes is free, except that types, state spaces and layouts keep theirs.
//! - operands: `d` is a register that is written (any name that begins with `d`), `+d` one that
//!   is read as well; any other name is a register or literal that is read; `[a]` an address;
//!   `[t, c]` a tensor map with its coordinates; `#n` a literal; `!c` a predicate that may be
//!   negated; `&l` a label; `d{|q:pred}` an optional second destination; `{, x}` an optional
//!   operand.
//! - behind a colon, the type: `t0` is the first type suffix (the default), `t1` the second,
//!   `2t0` twice as wide, `~t0` at least as wide, a type's name itself, `any`. Behind a star, the
//!   length of a vector operand: a number, `vec` (the `.v2` suffix), `num` (`.x4`), `a b c d` (a
//!   fragment of that matrix), `n` (any).

use super::Opcode;
use crate::types::*;

/// One row of the table, as written.
#[derive(Clone, Copy, Debug)]
pub struct InstructionRow {
    /// What it does.
    pub op: Opcode,
    /// Syntax, in the notation of [`mod@crate::table::pattern`].
    pub syntax: &'static str,
    /// Named sets: `type=u16 u32; rnd=rn rz`.
    pub sets: &'static str,
    /// Since when: `1.0` or `7.8 sm_90`: the PTX ISA version, and the target where not all have it.
    pub since: &'static str,
    /// One line of semantics.
    pub semantics: &'static str,
}

/// Shorthand for a [`InstructionRow`].
pub const fn row(
    op: Opcode,
    syntax: &'static str,
    sets: &'static str,
    since: &'static str,
    semantics: &'static str,
) -> InstructionRow {
    InstructionRow { op, syntax, sets, since, semantics }
}

/// A group of rows under the title that the PTX ISA gives their section.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// Title of the section.
    pub title: &'static str,
    /// The forms that it may have, the first that fits counts.
    pub rows: &'static [InstructionRow],
}

/// Sets that every row may name.
pub const GROUPS: &[(&str, &str)] = &[
    ("rnd", "rn rz rm rp"),
    ("irnd", "rni rzi rmi rpi"),
    ("frnd2", "rn rz"),
    ("space", "global shared shared::cta shared::cluster"),
    ("ss", "shared shared::cta"),
    ("scope", "cta cluster gpu sys"),
    ("icmp", "eq ne lt le gt ge lo ls hi hs"),
    ("fcmp", "eq ne lt le gt ge equ neu ltu leu gtu geu num nan"),
    ("bool", "and or xor"),
    ("vec", "v2 v4 v8"),
    ("num", "x1 x2 x4"),
    (
        "l1hint",
        "L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate",
    ),
    ("l2hint", "L2::evict_normal L2::evict_first L2::evict_last"),
    ("policy", "L2::cache_hint"),
    ("prefetch", "L2::64B L2::128B L2::256B"),
    ("dim", "1d 2d 3d 4d 5d"),
    ("alayout", "row col"),
    ("blayout", "row col"),
    ("layout", "row col"),
    ("mbar", "mbarrier::complete_tx::bytes"),
];

/// What a suffix pattern accepts.
#[derive(Clone, Debug)]
pub struct SuffixSet {
    /// Any one of these.
    pub choices: Vec<Mod>,
    /// Elements of one pair of braces share a number: all or none of them; 0 is required.
    pub group: u8,
    /// The set's name, empty for a literal.
    pub name: String,
}

/// Type of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The `i`th type suffix.
    Nth(u8),
    /// Twice as wide as the `i`th type suffix.
    Double(u8),
    /// At least as wide as the `i`th type suffix.
    AtLeast(u8),
    /// That type and no other.
    Exactly(Type),
    /// Registers of any type and width.
    Any,
}

/// Length of a vector operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Not a vector.
    Scalar,
    /// Exactly so many (1 may be written without braces).
    Exactly(u16),
    /// As many as the `.v2`, `.v4`, `.v8` suffix says.
    Vec,
    /// As many as ldmatrix' shape and `.x1`, `.x2`, `.x4` say.
    Num,
    /// A thread's share of matrix `a`, `b`, `c` or `d` of the shape suffix.
    Fragment(u8),
    /// Any type will do.
    Any,
}

/// OperandKind of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandKind {
    /// A register that is written.
    Dst,
    /// A register or literal that is read.
    Src,
    /// A number in the text.
    Imm,
    /// `[a]`
    Address,
    /// `[map, {c0, ..}]`
    Tensor,
    /// A label to jump to.
    Label,
    /// A predicate that may be negated.
    Pred,
}

/// An operand pattern.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Name, for messages and docs.
    pub name: String,
    /// What may stand there: a register, an address, a label, ..
    pub kind: OperandKind,
    /// Which types it may have.
    pub want: Want,
    /// How many elements it has as a vector.
    pub length: Length,
    /// A destination that is a source too.
    pub read_too: bool,
    /// May be left out.
    pub optional: bool,
    /// A second destination behind `|`: its type, and whether it may be left out.
    pub pair: Option<(Want, bool)>,
}

/// A compiled row.
#[derive(Clone, Debug)]
pub struct Form {
    /// The row that it was made of.
    pub row: &'static InstructionRow,
    /// Title of its section.
    pub title: &'static str,
    /// What each suffix of the syntax may be, in order.
    pub elements: Vec<SuffixSet>,
    /// What each operand may be, in order.
    pub slots: Vec<Slot>,
}

fn literal(text: &str) -> Mod {
    parse_default(text).unwrap_or_else(|| {
        panic!("suffix `.{text}` of the table is not a word of gpu/ptx/src/types.rs")
    })
}

fn parse_default(t: &str) -> Option<Mod> {
    Type::parse(t)
        .map(Mod::Type)
        .or_else(|| Rounding::parse(t).map(Mod::Rounding))
        .or_else(|| Space::parse(t).map(Mod::Space))
        .or_else(|| Sem::parse(t).map(Mod::Sem))
        .or_else(|| Scope::parse(t).map(Mod::Scope))
        .or_else(|| MulPart::parse(t).map(Mod::Part))
        .or_else(|| Cache::parse(t).map(Mod::Cache))
        .or_else(|| Hint::parse(t).map(Mod::Hint))
        .or_else(|| Layout::parse(t).map(Mod::Layout))
        .or_else(|| vector(t).map(Mod::Vec))
        .or_else(|| Flag::parse(t).map(Mod::Flag))
        .or_else(|| Shape::parse(t).map(Mod::Shape))
}

fn vector(t: &str) -> Option<u8> {
    match t {
        "v2" => Some(2),
        "v4" => Some(4),
        "v8" => Some(8),
        _ => None,
    }
}

/// The typed suffix that `text` is in the set `name`.
fn member(name: &str, text: &str) -> Mod {
    let typed = match name {
        "cmp" | "icmp" | "fcmp" => Cmp::parse(text).map(Mod::Cmp),
        "op" | "bool" | "redop" => Op::parse(text).map(Mod::Op),
        "flag" => Flag::parse(text).map(Mod::Flag),
        _ => None,
    };
    typed.unwrap_or_else(|| literal(text))
}

/// `m64n*k16` stands for n = 8, 16, ... 256; `m64n%k32` for 8, 16, 24, 32, 48, 64, ... 256.
fn expand(text: &str, name: &str, out: &mut Vec<Mod>) {
    if let Some((m, k)) = text.split_once('*') {
        out.extend((1..=32).map(|i| literal(&format!("{m}{}{k}", 8 * i))));
    } else if let Some((m, k)) = text.split_once('%') {
        let ns = (1..=32).map(|i| 8 * i).filter(|n| *n <= 32 || n % 16 == 0);
        out.extend(ns.map(|n| literal(&format!("{m}{n}{k}"))));
    } else {
        out.push(member(name, text));
    }
}

fn choices(name: &str, sets: &[(&str, &str)]) -> (Vec<Mod>, String) {
    let found = sets.iter().chain(GROUPS).find(|(n, _)| *n == name);
    let mut out = Vec::new();
    match found {
        Some((_, words)) => {
            words.split_whitespace().for_each(|w| expand(w, name, &mut out));
            (out, name.to_string())
        }
        None => (vec![literal(name)], String::new()),
    }
}

/// The named sets of a row.
pub fn sets(row: &InstructionRow) -> Vec<(&'static str, &'static str)> {
    row.sets
        .split(';')
        .filter_map(|s| s.split_once('='))
        .map(|(n, w)| (n.trim(), w.trim()))
        .collect()
}

/// Compiles a row. Panics on a row that is not in the notation: the table is part of the program.
pub fn compile(row: &'static InstructionRow, title: &'static str) -> Form {
    let (suffixes, operands) = row.syntax.split_once(' ').unwrap_or((row.syntax, ""));
    let rest = suffixes
        .strip_prefix(row.op.text())
        .unwrap_or_else(|| panic!("row `{}` does not begin with `{}`", row.syntax, row.op.text()));
    let (elements, slots) = if operands == "..." && suffixes == row.op.text() {
        (Vec::new(), Vec::new())
    } else if operands == "..." {
        (compile_suffixes(rest, &sets(row)), Vec::new())
    } else {
        (compile_suffixes(rest, &sets(row)), compile_slots(operands))
    };
    Form { row, title, elements, slots }
}

fn compile_suffixes(mut rest: &str, sets: &[(&str, &str)]) -> Vec<SuffixSet> {
    let mut elements = Vec::new();
    let mut group = 0;
    let mut braces = 0;
    while !rest.is_empty() {
        if let Some(r) = rest.strip_prefix('{') {
            braces += 1;
            group = braces;
            rest = r;
        } else if let Some(r) = rest.strip_prefix('}') {
            group = 0;
            rest = r;
        } else {
            let r = rest.strip_prefix('.').unwrap_or_else(|| panic!("`{rest}`: expected `.`"));
            let end = r.find(['.', '{', '}']).unwrap_or(r.len());
            let (choices, name) = choices(&r[..end], sets);
            elements.push(SuffixSet { choices, group, name });
            rest = &r[end..];
        }
    }
    elements
}

/// Splits at commas that stand outside brackets; a leading `{,` marks an optional operand.
fn compile_slots(operands: &str) -> Vec<Slot> {
    let mut slots = Vec::new();
    let mut rest = operands.trim();
    while !rest.is_empty() {
        let (optional, inner, tail) = if let Some(r) = rest.strip_prefix("{,") {
            let end = r.find('}').expect("closing brace of an optional operand");
            (true, &r[..end], &r[end + 1..])
        } else {
            let r = rest.strip_prefix(',').unwrap_or(rest).trim_start();
            let mut depth = 0;
            let end = r
                .char_indices()
                .find(|&(i, c)| {
                    match c {
                        '[' => depth += 1,
                        ']' => depth -= 1,
                        _ => {}
                    }
                    depth == 0 && (c == ',' || (c == '{' && r[i..].starts_with("{,")))
                })
                .map_or(r.len(), |(i, _)| i);
            (false, &r[..end], &r[end..])
        };
        slots.push(compile_slot(inner.trim(), optional));
        rest = tail.trim_start();
    }
    slots
}

fn compile_slot(text: &str, optional: bool) -> Slot {
    let (main, pair) = match (text.split_once("{|"), text.split_once('|')) {
        (Some((m, p)), _) => (m, Some((want(p.trim_end_matches('}')), true))),
        (None, Some((m, p))) => (m, Some((want(p), false))),
        (None, None) => (text, None),
    };
    let plain = main.strip_prefix('+').unwrap_or(main);
    let (read_too, main) = (plain.len() < main.len(), plain);
    let (kind, body) = match main.as_bytes().first() {
        Some(b'[') if main.contains(',') => (OperandKind::Tensor, main),
        Some(b'[') => (OperandKind::Address, main),
        Some(b'#') => (OperandKind::Imm, &main[1..]),
        Some(b'!') => (OperandKind::Pred, &main[1..]),
        Some(b'&') => (OperandKind::Label, &main[1..]),
        Some(b'd') => (OperandKind::Dst, main),
        _ => (OperandKind::Src, main),
    };
    let (head, length) = match body.split_once('*') {
        None => (body, Length::Scalar),
        Some((h, "vec")) => (h, Length::Vec),
        Some((h, "num")) => (h, Length::Num),
        Some((h, "n")) => (h, Length::Any),
        Some((h, m @ ("a" | "b" | "c" | "d"))) => (h, Length::Fragment(m.as_bytes()[0])),
        Some((h, n)) => (h, Length::Exactly(n.parse().expect("vector length"))),
    };
    let name = head.split(':').next().unwrap_or(head).to_string();
    let want = if kind == OperandKind::Pred { Want::Exactly(Type::Pred) } else { want(head) };
    Slot { name, kind, want, length, read_too, optional, pair }
}

fn want(text: &str) -> Want {
    let Some((_, code)) = text.split_once(':') else { return Want::Nth(0) };
    let nth = |s: &str| s.strip_prefix('t').and_then(|d| d.parse::<u8>().ok());
    if code == "any" {
        Want::Any
    } else if let Some(i) = code.strip_prefix('2').and_then(nth) {
        Want::Double(i)
    } else if let Some(i) = code.strip_prefix('~').and_then(nth) {
        Want::AtLeast(i)
    } else if let Some(i) = nth(code) {
        Want::Nth(i)
    } else {
        Want::Exactly(Type::parse(code).unwrap_or_else(|| panic!("operand type `{code}`")))
    }
}

/// Why suffixes do not fit a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// The `i`th suffix written has no place in the form.
    Unexpected(usize),
    /// An element of the form is missing: its index.
    Missing(usize),
}

impl Form {
    /// Whether the instruction is known by name only: any suffix, any operand, never executed.
    pub fn recognised(&self) -> bool {
        self.row.syntax.ends_with(" ...") && self.row.op != Opcode::Call
    }

    /// The syntax without the notation of types: `ld{.weak}{.space}.type d, [a]{, policy}`.
    pub fn syntax(&self) -> String {
        let mut out = String::new();
        let mut code = false;
        for (i, c) in self.row.syntax.char_indices() {
            let second = self.row.syntax.as_bytes().get(i + 1) == Some(&b':');
            let inside = i > 0 && self.row.syntax.as_bytes()[i - 1] == b':';
            match c {
                ':' if !second && !inside => code = true,
                '*' => code = true,
                ',' | '|' | '}' | ']' | '{' | ' ' => code = false,
                _ => {}
            }
            if !code && !matches!(c, '#' | '&' | '+') {
                out.push(if c == '!' { ' ' } else { c });
            }
        }
        out.replace("  ", " ")
    }

    /// Fits the suffixes `words` (without dots, without the opcode's own); gives them typed, in
    /// the form's order. On failure also says how many words fitted.
    pub fn fit(&self, words: &[&str]) -> Result<Vec<Mod>, (usize, Misfit)> {
        let mut used = vec![false; words.len()];
        let mut mods = Vec::with_capacity(words.len());
        let mut taken = vec![false; self.elements.len()];
        for (e, element) in self.elements.iter().enumerate() {
            if let Some((w, m)) = element.take(words, &used) {
                used[w] = true;
                taken[e] = true;
                mods.push(m);
            } else if element.group == 0 {
                let fitted = used.iter().filter(|u| **u).count();
                return Err((fitted, Misfit::Missing(e)));
            }
        }
        let fitted = used.iter().filter(|u| **u).count();
        if let Some(w) = used.iter().position(|u| !u) {
            return Err((fitted, Misfit::Unexpected(w)));
        }
        let whole = |g: u8| {
            let mut of = self.elements.iter().zip(&taken).filter(|(e, _)| e.group == g);
            let first = of.next().map(|(_, t)| *t);
            of.all(|(_, t)| Some(*t) == first)
        };
        let broken = self.elements.iter().position(|e| e.group > 0 && !whole(e.group));
        match broken {
            Some(e) => Err((fitted, Misfit::Missing(e))),
            None => Ok(mods),
        }
    }
}

impl SuffixSet {
    /// Types, spaces and layouts are positional: only the first that is left may fit.
    fn take(&self, words: &[&str], used: &[bool]) -> Option<(usize, Mod)> {
        let positional: Option<fn(&str) -> bool> = match self.choices.first() {
            Some(Mod::Type(_)) => Some(|w| Type::parse(w).is_some()),
            Some(Mod::Space(_)) => Some(|w| Space::parse(w).is_some()),
            Some(Mod::Layout(_)) => Some(|w| Layout::parse(w).is_some()),
            _ => None,
        };
        for (i, word) in words.iter().enumerate().filter(|(i, _)| !used[*i]) {
            if let Some(m) = self.choices.iter().find(|m| m.is(word)) {
                return Some((i, *m));
            }
            if positional.is_some_and(|same_class| same_class(word)) {
                return None;
            }
        }
        None
    }
}
