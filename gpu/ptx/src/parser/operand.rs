//! Literals, constant expressions and operands.

use super::names::{Local, Names};
use super::*;
use crate::error::ErrorKind;

/// Deepest nesting of a constant expression.
const MAX_NESTING: u32 = 64;
/// Longest vector operand (wgmma has 128).
const MAX_VECTOR: usize = 256;

/// Binary operators of constant expressions, with their precedence.
const BINARY: &[(&str, u32)] = &[
    ("||", 1),
    ("&&", 2),
    ("|", 3),
    ("^", 4),
    ("&", 5),
    ("==", 6),
    ("!=", 6),
    ("<", 7),
    ("<=", 7),
    (">", 7),
    (">=", 7),
    ("<<", 8),
    (">>", 8),
    ("+", 9),
    ("-", 9),
    ("*", 10),
    ("/", 10),
    ("%", 10),
];

impl<'a> Parser<'a> {
    /// A number in the text, with its sign.
    pub(super) fn literal(&mut self) -> Result<Imm> {
        let token = self.token;
        match (token.kind, number(token.text)) {
            (TokenKind::Number, Some(imm)) => {
                self.next();
                Ok(imm)
            }
            (TokenKind::Word, _) if token.text == "WARP_SZ" => {
                self.next();
                Ok(Imm::Int(32))
            }
            (TokenKind::Number, None) => {
                Err(self.error_at(token, format!("`{}` is not a number", shorten(token.text))))
            }
            _ => self.expected("a number"),
        }
    }

    /// A constant expression (PTX ISA, "Constant Expressions").
    pub(super) fn constant(&mut self) -> Result<Imm> {
        self.ternary(0)
    }

    fn ternary(&mut self, depth: u32) -> Result<Imm> {
        let condition = self.binary(1, depth)?;
        if !self.eat("?") {
            return Ok(condition);
        }
        let yes = self.ternary(depth + 1)?;
        self.expect(":")?;
        let no = self.ternary(depth + 1)?;
        Ok(if condition.bits(Type::B64) != 0 { yes } else { no })
    }

    fn binary(&mut self, least: u32, depth: u32) -> Result<Imm> {
        let mut left = self.unary(depth)?;
        while self.token.kind == TokenKind::Punct {
            let Some((op, level)) =
                BINARY.iter().find(|(op, level)| *op == self.token.text && *level >= least)
            else {
                break;
            };
            let token = self.next();
            let right = self.binary(level + 1, depth + 1)?;
            left = fold(op, left, right).ok_or_else(|| {
                self.error_at(token, "this constant expression divides by zero or mixes in floats")
            })?;
        }
        Ok(left)
    }

    fn unary(&mut self, depth: u32) -> Result<Imm> {
        if depth > MAX_NESTING {
            return self.expected("an expression nested at most 64 deep");
        }
        if self.eat("-") {
            return Ok(match self.unary(depth + 1)? {
                Imm::Int(v) => Imm::Int(v.wrapping_neg()),
                Imm::Uint(v) => Imm::Int((v as i64).wrapping_neg()),
                Imm::F32(b) => Imm::F32(b ^ 1 << 31),
                Imm::F64(b) => Imm::F64(b ^ 1 << 63),
            });
        }
        if self.eat("+") {
            return self.unary(depth + 1);
        }
        if self.eat("~") {
            return Ok(Imm::Int(!(self.unary(depth + 1)?.bits(Type::B64) as i64)));
        }
        if self.eat("!") {
            return Ok(Imm::Int(i64::from(self.unary(depth + 1)?.bits(Type::B64) == 0)));
        }
        if self.eat("(") {
            let signed = self.token.text == ".s64";
            if self.eat_directive(".s64") || self.eat_directive(".u64") {
                self.expect(")")?;
                let value = self.unary(depth + 1)?.bits(Type::B64);
                return Ok(if signed { Imm::Int(value as i64) } else { Imm::Uint(value) });
            }
            let value = self.ternary(depth + 1)?;
            self.expect(")")?;
            return Ok(value);
        }
        self.literal()
    }

    /// An operand of an instruction. `branch`: an unknown name is a label.
    pub(super) fn operand(&mut self, names: &mut Names<'a>, branch: bool) -> Result<Operand> {
        match self.token.kind {
            TokenKind::Word if self.token.text != "WARP_SZ" => self.named(names, branch),
            TokenKind::Punct => match self.token.text {
                "{" => self.vector_or_pair(names),
                "[" => self.address(names),
                "(" if !branch => self.constant().map(Operand::Imm),
                "!" => self.negated(names),
                "-" if self.negates_a_register() => self.negative(names),
                "-" | "+" | "~" => self.constant().map(Operand::Imm),
                _ => self.expected("an operand or `;`"),
            },
            TokenKind::Number | TokenKind::Word => self.constant().map(Operand::Imm),
            _ => self.expected("an operand"),
        }
    }

    fn negated(&mut self, names: &mut Names<'a>) -> Result<Operand> {
        self.next();
        let token = self.token;
        match self.named(names, false)? {
            Operand::Reg(r) => Ok(Operand::Not(r)),
            _ => Err(self.error_at(token, "expected a predicate register behind `!`")),
        }
    }

    /// Whether the present `-` stands before a name.
    fn negates_a_register(&self) -> bool {
        let next = self.lexer.clone().token();
        next.kind == TokenKind::Word && next.text != "WARP_SZ"
    }

    fn negative(&mut self, names: &mut Names<'a>) -> Result<Operand> {
        self.next();
        let token = self.token;
        match self.named(names, false)? {
            Operand::Reg(r) => Ok(Operand::Negated(r, None)),
            Operand::Selected(r, selector) => Ok(Operand::Negated(r, Some(selector))),
            _ => Err(self.error_at(token, "expected a register behind `-`")),
        }
    }

    pub(super) fn vector(&mut self, names: &mut Names<'a>) -> Result<Vec<Operand>> {
        self.expect("{")?;
        let mut list = Vec::new();
        while !self.token.is("}") {
            if self.token.is("{") || self.token.is("[") {
                return self.expected("an element of a vector");
            }
            if list.len() == MAX_VECTOR {
                return self.expected("a vector of at most 256 elements");
            }
            list.push(self.operand(names, false)?);
            if !self.eat(",") {
                break;
            }
        }
        self.expect("}")?;
        Ok(list)
    }

    /// A vector, or (of a texture's results) a vector and a predicate: `{a, b, c, d}|p`.
    fn vector_or_pair(&mut self, names: &mut Names<'a>) -> Result<Operand> {
        let vector = Operand::Vector(self.vector(names)?.into());
        if !self.eat("|") {
            return Ok(vector);
        }
        let second = self.word("a second destination")?;
        let second = self.resolve(second, names, false)?;
        Ok(Operand::Pair(Box::new(vector), Box::new(second)))
    }

    /// `(a, b)` of a call.
    pub(super) fn list(&mut self, names: &mut Names<'a>) -> Result<Vec<Operand>> {
        self.expect("(")?;
        let mut list = Vec::new();
        while !self.token.is(")") {
            list.push(self.operand(names, false)?);
            if !self.eat(",") {
                break;
            }
        }
        self.expect(")")?;
        Ok(list)
    }

    /// `[base+offset]` or `[base, {coordinates}]`
    fn address(&mut self, names: &mut Names<'a>) -> Result<Operand> {
        self.expect("[")?;
        let base = if self.token.kind == TokenKind::Word && self.token.text != "WARP_SZ" {
            let token = self.token;
            match self.named(names, false)? {
                Operand::Reg(r) => Address { base: Base::Reg(r), offset: self.addend()? },
                Operand::Symbol(s, offset) => Address { base: Base::Symbol(s), offset },
                _ => {
                    return Err(self.error_at(token, "expected a register, a variable or a number"));
                }
            }
        } else {
            let offset = self.constant()?.bits(Type::B64) as i64;
            Address { base: Base::Absolute, offset }
        };
        if self.eat(",") {
            // A texture or surface of one dimension may have its coordinate without braces.
            let coordinates = match self.token.is("{") {
                true => self.vector(names)?,
                false => vec![self.operand(names, false)?],
            };
            if self.token.is(",") {
                let what = "a sampler beside its texture (`.texmode_independent`) is not known";
                let error = self.error_at(self.token, what);
                return Err(error.of_kind(ErrorKind::UnknownInstruction));
            }
            self.expect("]")?;
            return Ok(Operand::Tensor(base, coordinates.into()));
        }
        self.expect("]")?;
        Ok(Operand::Address(base))
    }

    /// An operand that begins with a name.
    fn named(&mut self, names: &mut Names<'a>, branch: bool) -> Result<Operand> {
        let token = self.next();
        let first = match component(self.token.text.strip_prefix('.').unwrap_or_default()) {
            Some(lane) if self.token.kind == TokenKind::Directive => {
                self.apart(token, lane, names)?
            }
            _ => self.resolve(token, names, branch)?,
        };
        if !self.token.is("|") {
            return Ok(first);
        }
        self.next();
        let second = self.word("a second destination")?;
        let second = self.resolve(second, names, false)?;
        Ok(Operand::Pair(Box::new(first), Box::new(second)))
    }

    /// A component that stands apart from its register: `%tid .x`.
    fn apart(&mut self, token: Token<'a>, lane: u8, names: &mut Names<'a>) -> Result<Operand> {
        let suffix = self.next();
        if let Some(special) = special(&format!("{}{}", token.text, suffix.text)) {
            return Ok(Operand::Special(special));
        }
        match names.lookup(token.text) {
            Some(Local::Reg(r)) if has_element(&names.body, r, lane) => {
                Ok(Operand::Component(r, lane))
            }
            _ => {
                let what = format!("`{}` has no `{}`", shorten(token.text), suffix.text);
                Err(self.error_at(token, what))
            }
        }
    }

    fn resolve(
        &mut self,
        token: Token<'a>,
        names: &mut Names<'a>,
        branch: bool,
    ) -> Result<Operand> {
        if token.text == "_" {
            return Ok(Operand::Sink);
        }
        let found = names.lookup(token.text);
        let symbol = match found {
            Some(Local::Reg(r)) => return Ok(Operand::Reg(r)),
            Some(Local::Table(t)) => return Ok(Operand::Table(t)),
            Some(Local::Variable(v)) => Some(Symbol::Local(v)),
            Some(Local::Param(i)) => Some(Symbol::Param(i)),
            Some(Local::Return(i)) => Some(Symbol::Return(i)),
            None => self.globals.get(token.text).copied().filter(|_| !branch),
        };
        if let Some(symbol) = symbol {
            return Ok(Operand::Symbol(symbol, self.addend()?));
        }
        if let Some(special) = special(token.text) {
            return Ok(Operand::Special(special));
        }
        if let Some((register, parts)) = token.text.rsplit_once('.')
            && let Some(selector) = Selector::parse(parts)
            && let Some(Local::Reg(r)) = names.lookup(register)
        {
            return Ok(Operand::Selected(r, selector));
        }
        if let Some((vector, lane)) = token.text.rsplit_once('.')
            && let Some(Local::Reg(r)) = names.lookup(vector)
            && let Some(lane) = component(lane)
            && has_element(&names.body, r, lane)
        {
            return Ok(Operand::Component(r, lane));
        }
        if branch {
            return Ok(Operand::Label(names.mention(token)));
        }
        let what = if token.text.starts_with('%') { "register" } else { "name" };
        Err(self.error_at(token, format!("{what} `{}` is not declared", shorten(token.text))))
    }
}

fn has_element(body: &Body, register: RegId, lane: u8) -> bool {
    let vector = body.registers[register.index()].vector;
    vector > 1 && lane < vector
}

fn component(text: &str) -> Option<u8> {
    match text {
        "x" | "r" => Some(0),
        "y" | "g" => Some(1),
        "z" | "b" => Some(2),
        "w" | "a" => Some(3),
        _ => None,
    }
}

/// The special register spelt `text`, with lane and number.
pub(crate) fn special(text: &str) -> Option<SpecialReg> {
    if !text.starts_with('%') {
        return None;
    }
    let (name, lane) = match text.split_once('.') {
        Some((n, l)) => (n, Some(component(l)?)),
        None => (text, None),
    };
    if let Some(kind) = Special::parse(name) {
        let numbered = matches!(kind, Special::Pm | Special::Pm64 | Special::Envreg)
            || kind == Special::ReservedSmemOffset;
        let fits = lane.is_none() || kind.is_vector();
        return (fits && !numbered).then_some(SpecialReg { kind, lane, index: 0 });
    }
    let families = [
        (Special::Envreg, "%envreg", "", 32),
        (Special::Pm64, "%pm", "_64", 8),
        (Special::Pm, "%pm", "", 8),
        (Special::ReservedSmemOffset, "%reserved_smem_offset_", "", 2),
    ];
    families.into_iter().find_map(|(kind, prefix, suffix, count)| {
        let number = text.strip_prefix(prefix)?.strip_suffix(suffix)?;
        let index: u8 = number.parse().ok().filter(|n| *n < count)?;
        (number == index.to_string()).then_some(SpecialReg { kind, lane: None, index })
    })
}

/// A number as PTX writes it.
pub(crate) fn number(text: &str) -> Option<Imm> {
    let lower = text.as_bytes().get(1).map(u8::to_ascii_lowercase);
    if text.starts_with('0') {
        match lower {
            Some(b'f') if text.len() == 10 => {
                return u32::from_str_radix(&text[2..], 16).ok().map(Imm::F32);
            }
            Some(b'd') if text.len() == 18 => {
                return u64::from_str_radix(&text[2..], 16).ok().map(Imm::F64);
            }
            _ => {}
        }
    }
    let (digits, unsigned) = match text.strip_suffix(['U', 'u']) {
        Some(d) => (d, true),
        None => (text, false),
    };
    let value = match (digits.starts_with('0'), lower) {
        (true, Some(b'x')) => u64::from_str_radix(&digits[2..], 16).ok()?,
        (true, Some(b'b')) => u64::from_str_radix(&digits[2..], 2).ok()?,
        (true, _) if digits.len() > 1 && digits.bytes().all(|b| b.is_ascii_digit()) => {
            u64::from_str_radix(&digits[1..], 8).ok()?
        }
        _ if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok()?,
        _ if !unsigned && digits.contains(['.', 'e', 'E']) => {
            return digits.parse::<f64>().ok().map(|v| Imm::F64(v.to_bits()));
        }
        _ => return None,
    };
    match i64::try_from(value) {
        Ok(v) if !unsigned => Some(Imm::Int(v)),
        _ => Some(Imm::Uint(value)),
    }
}

/// A binary operator on integers; `None` where it has no value.
fn fold(op: &str, left: Imm, right: Imm) -> Option<Imm> {
    let integer = |i| match i {
        Imm::Int(v) => Some((v, false)),
        Imm::Uint(v) => Some((v as i64, true)),
        Imm::F32(_) | Imm::F64(_) => None,
    };
    let ((a, ua), (b, ub)) = (integer(left)?, integer(right)?);
    let unsigned = ua || ub;
    let (x, y) = (a as u64, b as u64);
    let truth = |t: bool| Some(Imm::Int(i64::from(t)));
    let value = match op {
        "+" => a.wrapping_add(b),
        "-" => a.wrapping_sub(b),
        "*" => a.wrapping_mul(b),
        "/" if unsigned => x.checked_div(y)? as i64,
        "%" if unsigned => x.checked_rem(y)? as i64,
        "/" => (b != 0).then(|| a.wrapping_div(b))?,
        "%" => (b != 0).then(|| a.wrapping_rem(b))?,
        "<<" => x.checked_shl(b as u32).filter(|_| y < 64).unwrap_or(0) as i64,
        ">>" if ua => x.checked_shr(b as u32).filter(|_| y < 64).unwrap_or(0) as i64,
        ">>" => a >> y.min(63),
        "&" => a & b,
        "|" => a | b,
        "^" => a ^ b,
        "&&" => return truth(a != 0 && b != 0),
        "||" => return truth(a != 0 || b != 0),
        "==" => return truth(a == b),
        "!=" => return truth(a != b),
        "<" => return truth(if unsigned { x < y } else { a < b }),
        "<=" => return truth(if unsigned { x <= y } else { a <= b }),
        ">" => return truth(if unsigned { x > y } else { a > b }),
        ">=" => return truth(if unsigned { x >= y } else { a >= b }),
        _ => return None,
    };
    Some(if unsigned { Imm::Uint(value as u64) } else { Imm::Int(value) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("017"), Some(Imm::Int(15)));
        assert_eq!(number("0x1fU"), Some(Imm::Uint(31)));
        assert_eq!(number("0b101"), Some(Imm::Int(5)));
        assert_eq!(number("18446744073709551615"), Some(Imm::Uint(u64::MAX)));
        assert_eq!(number("0f3F800000"), Some(Imm::F32(0x3F80_0000)));
        assert_eq!(number("0d3FF0000000000000"), Some(Imm::F64(1f64.to_bits())));
        assert_eq!(number("1.5"), Some(Imm::F64(1.5f64.to_bits())));
        for bad in ["0x", "0f3F8", "12ab", "09", "0xG", "99999999999999999999"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }

    #[test]
    fn special_registers() {
        let tid = SpecialReg { kind: Special::Tid, lane: Some(0), index: 0 };
        assert_eq!(special("%tid.x"), Some(tid));
        let pm = SpecialReg { kind: Special::Pm64, lane: None, index: 3 };
        assert_eq!(special("%pm3_64"), Some(pm));
        let env = SpecialReg { kind: Special::Envreg, lane: None, index: 31 };
        assert_eq!(special("%envreg31"), Some(env));
        for bad in ["%envreg32", "%laneid.x", "%tid.q", "tid.x", "%pm", "%envreg"] {
            assert_eq!(special(bad), None, "{bad}");
        }
    }
}
