//! Tokens to the syntax tree: module scope, directives, declarations.
//!
//! `body` reads function bodies, `operand` operands and literals, `names` resolves names, `fit`
//! fits instructions to the table.

use rustc_hash::FxHashMap;

use crate::ast::*;
use crate::error::{Error, Result};
use crate::lexer::{Lexer, Token, TokenKind};
use crate::types::{Space, Type};

mod body;
mod declare;
mod fit;
mod names;
mod operand;

/// How to parse a module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Keep an instruction that the table does not know, or that does not fit it, as
    /// [`Statement::Unsupported`] instead of failing: a module is of use without the kernel that
    /// holds it.
    pub keep_unknown: bool,
}

/// Parses a module; every instruction must fit the table.
///
/// # Errors
/// The first place that is not PTX, with line, column and what was expected.
pub fn parse(source: &str) -> Result<Module> {
    parse_with(source, Options::default())
}

/// Parses a module under [`Options`].
///
/// # Errors
/// As [`parse`].
pub fn parse_with(source: &str, options: Options) -> Result<Module> {
    Parser::new(source, options).module()
}

pub(crate) struct Parser<'a> {
    source: &'a str,
    options: Options,
    lexer: Lexer<'a>,
    token: Token<'a>,
    module: Module,
    globals: FxHashMap<&'a str, Symbol>,
    fits: FxHashMap<&'a str, fit::Fits>,
    /// Where the operands of the present instruction begin; kept for its memory alone.
    places: Vec<Token<'a>>,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str, options: Options) -> Self {
        let mut lexer = Lexer::new(source);
        let token = lexer.token();
        let module = Module { address_size: 64, ..Module::default() };
        let (globals, fits) = (FxHashMap::default(), FxHashMap::default());
        Parser { source, options, lexer, token, module, globals, fits, places: Vec::new() }
    }

    // Tokens

    fn next(&mut self) -> Token<'a> {
        std::mem::replace(&mut self.token, self.lexer.token())
    }

    fn eat(&mut self, punct: &str) -> bool {
        let found = self.token.is(punct);
        if found {
            self.next();
        }
        found
    }

    fn eat_directive(&mut self, text: &str) -> bool {
        let found = self.token.kind == TokenKind::Directive && self.token.text == text;
        if found {
            self.next();
        }
        found
    }

    fn error_at(&self, token: Token<'_>, message: impl Into<String>) -> Error {
        let width = token.text.lines().next().unwrap_or("").chars().count();
        Error::new(self.source, token.pos, width as u32, message)
    }

    fn found(&self) -> String {
        match self.token.kind {
            TokenKind::End => "the end of the file".into(),
            TokenKind::Bad if self.token.text == "/*" => "a comment that never ends".into(),
            TokenKind::Bad if self.token.text.starts_with('"') => "a string that never ends".into(),
            _ => format!("`{}`", shorten(self.token.text)),
        }
    }

    fn expected<T>(&self, what: &str) -> Result<T> {
        Err(self.error_at(self.token, format!("expected {what}, found {}", self.found())))
    }

    fn expect(&mut self, punct: &str) -> Result<()> {
        if self.eat(punct) { Ok(()) } else { self.expected(&format!("`{punct}`")) }
    }

    fn word(&mut self, what: &str) -> Result<Token<'a>> {
        if self.token.kind == TokenKind::Word { Ok(self.next()) } else { self.expected(what) }
    }

    /// One literal, not an expression.
    fn integer<T: TryFrom<i64>>(&mut self, what: &str) -> Result<T> {
        let token = self.token;
        let negative = self.eat("-");
        let value =
            if self.token.kind == TokenKind::Number { self.literal()? } else { Imm::F32(0) };
        self.in_range(value, negative, token, what)
    }

    /// A constant expression that gives an integer; `what` it is for, for errors.
    fn constant_integer<T: TryFrom<i64>>(&mut self, what: &str) -> Result<T> {
        let token = self.token;
        let value = self.constant()?;
        self.in_range(value, false, token, what)
    }

    fn in_range<T: TryFrom<i64>>(
        &self,
        value: Imm,
        negative: bool,
        token: Token<'_>,
        what: &str,
    ) -> Result<T> {
        let value = match value {
            Imm::Int(v) => Some(if negative { v.wrapping_neg() } else { v }),
            Imm::Uint(v) => i64::try_from(v).ok().filter(|_| !negative),
            _ => None,
        };
        value
            .and_then(|v| T::try_from(v).ok())
            .ok_or_else(|| self.error_at(token, format!("expected {what}: an integer in range")))
    }

    fn string(&mut self) -> Result<String> {
        if self.token.kind != TokenKind::String {
            return self.expected("a string");
        }
        let text = self.next().text;
        Ok(text[1..text.len() - 1].to_string())
    }

    fn strings(&mut self) -> Result<Vec<String>> {
        let mut all = vec![self.string()?];
        while self.eat(",") {
            all.push(self.string()?);
        }
        Ok(all)
    }

    // Module scope

    fn module(mut self) -> Result<Module> {
        if !self.eat_directive(".version") {
            return self.expected("`.version`, with which a PTX module begins");
        }
        self.module.version = self.version()?;
        if !self.eat_directive(".target") {
            return self.expected("`.target`");
        }
        self.module.target = self.target()?;
        while self.token.kind != TokenKind::End {
            self.item()?;
        }
        Ok(self.module)
    }

    fn version(&mut self) -> Result<(u32, u32)> {
        let token = self.token;
        let parsed = token
            .text
            .split_once('.')
            .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
            .filter(|_| token.kind == TokenKind::Number);
        match parsed {
            Some(v) => {
                self.next();
                Ok(v)
            }
            None => self.expected("a version such as 8.5"),
        }
    }

    fn target(&mut self) -> Result<Target> {
        let mut target = Target::default();
        loop {
            let word = self.word("a target such as sm_90a")?;
            if let Some(sm) = word.text.strip_prefix("sm_").or(word.text.strip_prefix("compute_")) {
                let digits = sm.trim_end_matches(['a', 'f']);
                target.suffix = sm.chars().last().filter(|c| !c.is_ascii_digit());
                target.sm = digits
                    .parse()
                    .map_err(|_| self.error_at(word, "expected a target such as sm_90a"))?;
            } else {
                target.options.push(word.text.to_string());
            }
            if !self.eat(",") {
                return Ok(target);
            }
        }
    }

    fn item(&mut self) -> Result<()> {
        if self.eat(";") {
            return Ok(());
        }
        if self.token.kind != TokenKind::Directive {
            return self.expected("a directive");
        }
        match self.token.text {
            ".address_size" => {
                self.next();
                self.module.address_size = self.integer("32 or 64")?;
                Ok(())
            }
            ".version" => {
                self.next();
                self.version().map(|_| ())
            }
            ".target" => {
                self.next();
                self.target().map(|_| ())
            }
            ".file" => self.file(),
            ".section" => self.section(),
            ".loc" => self.loc().map(|_| ()),
            ".pragma" => {
                self.next();
                let strings = self.strings()?;
                self.expect(";")?;
                self.module.items.push(Item::Pragma(strings));
                Ok(())
            }
            ".alias" => self.alias(),
            _ => self.declaration(),
        }
    }

    /// `.file 1 "name"{, timestamp, size}`
    fn file(&mut self) -> Result<()> {
        self.next();
        let index = self.integer("a file number")?;
        let name = self.string()?;
        while self.eat(",") {
            self.constant()?;
        }
        self.module.items.push(Item::File(self.module.files.len()));
        self.module.files.push(SourceFile { index, name });
        Ok(())
    }

    /// `.section .debug_info { ... }`: skipped.
    fn section(&mut self) -> Result<()> {
        let start = self.next();
        self.next();
        self.expect("{")?;
        let mut depth = 1;
        while depth > 0 {
            match self.token {
                t if t.is("{") => depth += 1,
                t if t.is("}") => depth -= 1,
                t if t.kind == TokenKind::End => {
                    return Err(self.error_at(start, "this section never ends"));
                }
                _ => {}
            }
            self.next();
        }
        Ok(())
    }

    /// `.loc file line col{, function_name label{+offset}, inlined_at file line col}`
    fn loc(&mut self) -> Result<Loc> {
        self.next();
        let file = self.integer("a file number")?;
        let line = self.integer("a line")?;
        let col = self.integer("a column")?;
        let mut loc = Loc { file, line, col, inlined_at: None };
        if self.eat(",") {
            self.word("`function_name`")?;
            let function = self.word("a label in .debug_str")?.text.to_string();
            let offset = if self.eat("+") { self.integer("an offset")? } else { 0 };
            self.expect(",")?;
            self.word("`inlined_at`")?;
            let file = self.integer("a file number")?;
            let line = self.integer("a line")?;
            let col = self.integer("a column")?;
            loc.inlined_at = Some(InlinedAt { function, offset, file, line, col });
        }
        Ok(loc)
    }

    fn alias(&mut self) -> Result<()> {
        self.next();
        let alias = self.function_name()?;
        self.expect(",")?;
        let aliasee = self.function_name()?;
        self.expect(";")?;
        self.module.items.push(Item::Alias(self.module.aliases.len()));
        self.module.aliases.push((alias, aliasee));
        Ok(())
    }

    fn function_name(&mut self) -> Result<FuncId> {
        let name = self.word("a function's name")?;
        match self.globals.get(name.text) {
            Some(Symbol::Function(f)) => Ok(*f),
            _ => Err(self.error_at(name, format!("no function `{}` is declared", name.text))),
        }
    }
}

/// At most 40 characters of `text`.
pub(crate) fn shorten(text: &str) -> String {
    let first = text.lines().next().unwrap_or("");
    if first.chars().count() <= 40 {
        first.to_string()
    } else {
        first.chars().take(37).chain("...".chars()).collect()
    }
}

/// The state space a directive names, with the bank of `.constN`.
pub(crate) fn space(directive: &str) -> Option<(Space, Option<u32>)> {
    let word = directive.strip_prefix('.')?;
    if let Some(bank) = word.strip_prefix("const").filter(|b| !b.is_empty()) {
        return bank.parse().ok().map(|b| (Space::Const, Some(b)));
    }
    Space::parse(word).filter(|s| *s != Space::Generic).map(|s| (s, None))
}

/// The type a directive names.
pub(crate) fn scalar_type(directive: &str) -> Option<Type> {
    directive.strip_prefix('.').and_then(Type::parse)
}
