//! Text to tokens.
//!
//! A word keeps the dotted suffixes that follow it (`ld.global.b32`, `%tid.x`), a directive is a
//! dot and one word (`.reg`, `.param::entry`). Comments, `#` lines and `@@DWARF` lines are skipped.

use crate::ast::Pos;

/// What kind of token a piece of text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// `add.f32`, `%r1`, `$L__BB0_1`, `_`
    Word,
    /// `.reg`
    Directive,
    /// `12`, `0x1F`, `0f3F800000`, `1.5`, `9.0`
    Number,
    /// `"text"`
    String,
    /// One character of punctuation, or `<<`, `>>`, `==`, `!=`, `<=`, `>=`, `&&`, `||`.
    Punct,
    /// End of the text.
    End,
    /// A character that PTX does not have, or an unterminated string or comment.
    Bad,
}

/// A token: a piece of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// What kind of token it is.
    pub kind: TokenKind,
    /// Its text as it stands in the source.
    pub text: &'a str,
    /// Where it starts: line and column, from 1.
    pub pos: Pos,
    /// Byte offset in the source at which it starts.
    pub start: usize,
}

impl Token<'_> {
    /// Whether the token is this piece of punctuation.
    pub fn is(&self, punct: &str) -> bool {
        self.kind == TokenKind::Punct && self.text == punct
    }
}

/// The lexer: gives tokens one by one; after the end, [`TokenKind::End`] for ever.
#[derive(Clone, Debug)]
pub struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: u32,
    line_start: usize,
    /// The last place whose column was counted, and that column.
    counted: (usize, u32),
}

const fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || b == b'$'
}

impl<'a> Lexer<'a> {
    /// A lexer at the beginning of `source`.
    pub fn new(source: &'a str) -> Self {
        Lexer { source, at: 0, line: 1, line_start: 0, counted: (0, 1) }
    }

    fn byte(&self, ahead: usize) -> u8 {
        self.source.as_bytes().get(self.at + ahead).copied().unwrap_or(0)
    }

    fn newline(&mut self) {
        self.at += 1;
        self.line += 1;
        self.line_start = self.at;
    }

    fn skip_line(&mut self) {
        let rest = &self.source.as_bytes()[self.at..];
        self.at += rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
    }

    /// Skips blanks and comments; false in front of an unterminated comment.
    fn skip_blanks(&mut self) -> bool {
        loop {
            let alone = || self.source[self.line_start..self.at].trim().is_empty();
            match (self.byte(0), self.byte(1)) {
                (b'\n', _) => self.newline(),
                (b' ' | b'\t' | b'\r' | 0x0B | 0x0C, _) => self.at += 1,
                (0, _) if self.at < self.source.len() => self.at += 1,
                (b'/', b'/') => self.skip_line(),
                (b'/', b'*') => {
                    let Some(length) = self.source[self.at + 2..].find("*/") else { return false };
                    let end = self.at + 2 + length + 2;
                    while let Some(n) = self.source[self.at..end].find('\n') {
                        self.at += n;
                        self.newline();
                    }
                    self.at = end;
                }
                (b'#', _) if alone() => self.skip_line(),
                (b'@', b'@') if alone() => self.skip_line(),
                _ => return true,
            }
        }
    }

    /// Counts on from the last place on the same line, so that long lines stay cheap.
    fn pos(&mut self) -> Pos {
        let (from, col) =
            if self.counted.0 < self.line_start { (self.line_start, 1) } else { self.counted };
        let col = col + self.source[from..self.at].chars().count() as u32;
        self.counted = (self.at, col);
        Pos { line: self.line, col }
    }

    /// The next token, without the blanks and comments before it.
    pub fn token(&mut self) -> Token<'a> {
        let terminated = self.skip_blanks();
        let (start, pos) = (self.at, self.pos());
        let kind = if terminated { self.scan() } else { TokenKind::Bad };
        if !terminated {
            self.at = self.source.len();
        }
        let text = if terminated { &self.source[start..self.at] } else { "/*" };
        Token { kind, text, pos, start }
    }

    fn scan(&mut self) -> TokenKind {
        let b = self.byte(0);
        match b {
            0 => TokenKind::End,
            b'"' => self.string(),
            b'0'..=b'9' => self.number(),
            b'.' if self.byte(1).is_ascii_alphabetic() || self.byte(1) == b'_' => {
                self.at += 1;
                self.word(false);
                TokenKind::Directive
            }
            b'%' | b'$' | b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                self.at += 1;
                let start = self.at;
                self.word(true);
                if b == b'%' && self.at == start { TokenKind::Punct } else { TokenKind::Word }
            }
            _ => self.punct(),
        }
    }

    /// Word characters, `::word`, and where asked `.word`.
    fn word(&mut self, dotted: bool) {
        loop {
            if is_word(self.byte(0)) {
                self.at += 1;
            } else if self.byte(0) == b':' && self.byte(1) == b':' && is_word(self.byte(2)) {
                self.at += 3;
            } else if dotted && self.byte(0) == b'.' && is_word(self.byte(1)) {
                self.at += 2;
            } else {
                return;
            }
        }
    }

    fn string(&mut self) -> TokenKind {
        self.at += 1;
        loop {
            match self.byte(0) {
                b'"' => {
                    self.at += 1;
                    return TokenKind::String;
                }
                b'\n' => return TokenKind::Bad,
                b'\\' if self.byte(1).is_ascii_graphic() => self.at += 2,
                0 if self.at >= self.source.len() => return TokenKind::Bad,
                _ => self.at += 1,
            }
            while !self.source.is_char_boundary(self.at) {
                self.at += 1;
            }
        }
    }

    fn number(&mut self) -> TokenKind {
        let prefixed = self.byte(0) == b'0'
            && matches!(self.byte(1), b'x' | b'X' | b'f' | b'F' | b'd' | b'D' | b'b' | b'B');
        while is_word(self.byte(0))
            || (self.byte(0) == b'.' && self.byte(1).is_ascii_digit() && !prefixed)
            || (!prefixed
                && matches!(self.byte(0), b'+' | b'-')
                && matches!(self.source.as_bytes()[self.at - 1], b'e' | b'E'))
        {
            self.at += 1;
        }
        if self.byte(0) == b'.' && !prefixed && !is_word(self.byte(1)) {
            self.at += 1;
        }
        TokenKind::Number
    }

    fn punct(&mut self) -> TokenKind {
        let two = self.source.get(self.at..self.at + 2).unwrap_or("");
        if matches!(two, "<<" | ">>" | "==" | "!=" | "<=" | ">=" | "&&" | "||") {
            self.at += 2;
            return TokenKind::Punct;
        }
        let c = self.source[self.at..].chars().next().unwrap_or('\0');
        self.at += c.len_utf8();
        if "{}[]()<>,;:+-*/%!|&^~?=@.".contains(c) { TokenKind::Punct } else { TokenKind::Bad }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(source: &str) -> Vec<(TokenKind, &str)> {
        let mut lexer = Lexer::new(source);
        std::iter::from_fn(|| {
            let t = lexer.token();
            (t.kind != TokenKind::End).then_some((t.kind, t.text))
        })
        .collect()
    }

    #[test]
    fn words_keep_their_suffixes() {
        use TokenKind::*;
        let got = texts("@!%p1 ld.shared::cta.v4.b32 {%r1,_}, [%rd1+-8]; // ünï\n.param::entry");
        let want = [
            (Punct, "@"),
            (Punct, "!"),
            (Word, "%p1"),
            (Word, "ld.shared::cta.v4.b32"),
            (Punct, "{"),
            (Word, "%r1"),
            (Punct, ","),
            (Word, "_"),
            (Punct, "}"),
            (Punct, ","),
            (Punct, "["),
            (Word, "%rd1"),
            (Punct, "+"),
            (Punct, "-"),
            (Number, "8"),
            (Punct, "]"),
            (Punct, ";"),
            (Directive, ".param::entry"),
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn numbers_and_lines() {
        use TokenKind::*;
        let got = texts("0f3F800000 0x1FU 1.5e-3 9.4 12. \"a\\\"b\" $L__1: /* x\n y */ z");
        let want = [
            (Number, "0f3F800000"),
            (Number, "0x1FU"),
            (Number, "1.5e-3"),
            (Number, "9.4"),
            (Number, "12."),
            (String, "\"a\\\"b\""),
            (Word, "$L__1"),
            (Punct, ":"),
            (Word, "z"),
        ];
        assert_eq!(got, want);
        let mut lexer = Lexer::new("/* x\n y */ z");
        assert_eq!(lexer.token().pos, Pos { line: 2, col: 7 });
    }

    #[test]
    fn bad_input_is_a_token() {
        assert_eq!(texts("/* never closed"), [(TokenKind::Bad, "/*")]);
        assert_eq!(texts("\"open\nx"), [(TokenKind::Bad, "\"open"), (TokenKind::Word, "x")]);
        assert_eq!(texts("é"), [(TokenKind::Bad, "é")]);
    }
}
