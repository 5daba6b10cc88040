//! Function bodies: statements, register and variable declarations, calls.

use super::fit::Fits;
use super::names::{Local, Names};
use super::*;
use crate::table::Opcode;

/// Deepest nesting of scopes.
const MAX_SCOPES: usize = 256;
/// Most registers that one declaration may stand for.
const MAX_FAMILY: u32 = 1 << 24;

impl<'a> Parser<'a> {
    /// `{ ... }` of a function, whose header is in `function`.
    pub(super) fn body(
        &mut self,
        mut function: Function,
        returns: &[(&'a str, Variable)],
        params: &[(&'a str, Variable)],
    ) -> Result<Function> {
        let mut names = Names::new();
        let mut header = |list: &[(&'a str, Variable)], into: &mut [Variable], returned: bool| {
            for (i, (name, variable)) in list.iter().enumerate() {
                let i = i as u32;
                let free = if variable.space == Space::Reg {
                    let free = names.register(name, variable.ty, variable.vector, None);
                    if let Some(Local::Reg(r)) = names.lookup(name) {
                        into[i as usize].register = Some(r);
                    }
                    free
                } else if returned {
                    names.declare(name, Local::Return(i))
                } else {
                    names.declare(name, Local::Param(i))
                };
                if !free && *name != "_" {
                    return Err(self.duplicate(variable.pos, name));
                }
            }
            Ok(())
        };
        header(returns, &mut function.returns, true)?;
        header(params, &mut function.params, false)?;
        if !self.token.is("{") {
            return self.expected("`{` or `;`");
        }
        let open = self.next();
        loop {
            if self.token.kind == TokenKind::End {
                let what = format!("the body of `{}` never ends", shorten(&function.name));
                return Err(self.error_at(open, what));
            }
            if self.eat("}") {
                let last = names.depth() == 1;
                if !last {
                    names.body.statements.push(Statement::EndScope);
                }
                if let Err(token) = names.end() {
                    let what = format!("label `{}` is not defined", shorten(token.text));
                    return Err(self.error_at(token, what));
                }
                if last {
                    break;
                }
            } else {
                self.statement(&mut names)?;
            }
        }
        function.body = Some(names.finish());
        Ok(function)
    }

    fn statement(&mut self, names: &mut Names<'a>) -> Result<()> {
        match (self.token.kind, self.token.text) {
            (TokenKind::Punct, ";") => {
                self.next();
                Ok(())
            }
            (TokenKind::Punct, "{") => {
                if names.depth() == MAX_SCOPES {
                    return self.expected("scopes nested at most 256 deep");
                }
                self.next();
                names.begin();
                names.body.statements.push(Statement::BeginScope);
                Ok(())
            }
            (TokenKind::Punct, "@") => {
                let at = self.next();
                let negated = self.eat("!");
                let token = self.word("a predicate register")?;
                let guard = match names.lookup(token.text) {
                    Some(Local::Reg(reg)) if names.body.registers[reg.index()].ty == Type::Pred => {
                        Guard { reg, negated }
                    }
                    _ => {
                        let what = format!("`{}` is not a predicate", shorten(token.text));
                        return Err(self.error_at(token, what));
                    }
                };
                self.instruction(names, Some(guard), at)
            }
            (TokenKind::Directive, ".reg") => self.registers(names),
            (TokenKind::Directive, ".loc") => {
                let loc = self.loc()?;
                names.body.statements.push(Statement::Loc(loc));
                Ok(())
            }
            (TokenKind::Directive, ".pragma") => {
                self.next();
                let strings = self.strings()?;
                self.expect(";")?;
                names.body.statements.push(Statement::Pragma(strings));
                Ok(())
            }
            (TokenKind::Directive, ".section") => self.section(),
            (TokenKind::Directive, ".file") => self.file(),
            (TokenKind::Directive, _) => self.local_variables(names),
            (TokenKind::Word, _) => self.label_or_instruction(names),
            _ => self.expected("an instruction, a directive, a label or `}`"),
        }
    }

    /// `.reg {.v4} .type a, b<10>;`
    fn registers(&mut self, names: &mut Names<'a>) -> Result<()> {
        self.next();
        let vector = match self.token.text {
            ".v2" => 2,
            ".v4" => 4,
            _ => 1,
        };
        if vector > 1 {
            self.next();
        }
        let Some(ty) = scalar_type(self.token.text) else {
            return self.expected("a register's type such as `.b32`");
        };
        self.next();
        let mut declared = Vec::new();
        loop {
            let name = self.word("a register's name")?;
            let count = if self.eat("<") {
                let count: u32 = self.integer("a number of registers")?;
                if count > MAX_FAMILY {
                    return self.expected("at most 2^24 registers in front of this");
                }
                self.expect(">")?;
                Some(count)
            } else {
                None
            };
            if !names.register(name.text, ty, vector, count) {
                return Err(self.duplicate(name.pos, name.text));
            }
            declared.push((name.text.to_string(), count));
            if !self.eat(",") {
                break;
            }
        }
        self.expect(";")?;
        let declaration = RegDecl { vector, ty, names: declared };
        names.body.statements.push(Statement::Registers(declaration));
        Ok(())
    }

    fn local_variables(&mut self, names: &mut Names<'a>) -> Result<()> {
        let mut linkage = Linkage::Internal;
        if self.eat_directive(".extern") {
            linkage = Linkage::Extern;
        }
        for (name, variable) in self.variables(linkage)? {
            let id = LocalId(names.body.variables.len() as u32);
            if !names.declare(name, Local::Variable(id)) {
                return Err(self.duplicate(variable.pos, name));
            }
            names.body.variables.push(variable);
            names.body.statements.push(Statement::Variable(id));
        }
        Ok(())
    }

    fn label_or_instruction(&mut self, names: &mut Names<'a>) -> Result<()> {
        let word = self.next();
        if !self.eat(":") {
            return self.mnemonic(names, None, word, word);
        }
        match self.token.text {
            ".branchtargets" | ".calltargets" | ".callprototype" => {
                let kind = self.table(names)?;
                let id = TableId(names.body.tables.len() as u32);
                if !names.declare(word.text, Local::Table(id)) {
                    return Err(self.duplicate(word.pos, word.text));
                }
                names.body.tables.push(Table { name: word.text.to_string(), kind });
                names.body.statements.push(Statement::Table(id));
            }
            _ => match names.label(word.text) {
                Some(label) => names.body.statements.push(Statement::Label(label)),
                None => return Err(self.duplicate(word.pos, word.text)),
            },
        }
        Ok(())
    }

    fn table(&mut self, names: &mut Names<'a>) -> Result<TableKind> {
        let directive = self.next();
        let kind = match directive.text {
            ".branchtargets" => {
                let mut labels = Vec::new();
                loop {
                    let label = self.word("a label")?;
                    labels.push(names.mention(label));
                    if !self.eat(",") {
                        break;
                    }
                }
                TableKind::Branch(labels)
            }
            ".calltargets" => {
                let mut functions = vec![self.function_name()?];
                while self.eat(",") {
                    functions.push(self.function_name()?);
                }
                TableKind::Call(functions)
            }
            _ => {
                let returns = if self.token.is("(") { self.parameters()? } else { Vec::new() };
                self.word("`_`")?;
                let params = if self.token.is("(") { self.parameters()? } else { Vec::new() };
                let mut tuning = Tuning::default();
                self.tuning(&mut tuning)?;
                let strip = |l: Vec<(&str, Variable)>| l.into_iter().map(|(_, v)| v).collect();
                TableKind::Prototype { returns: strip(returns), params: strip(params), tuning }
            }
        };
        self.expect(";")?;
        Ok(kind)
    }

    fn instruction(
        &mut self,
        names: &mut Names<'a>,
        guard: Option<Guard>,
        start: Token<'a>,
    ) -> Result<()> {
        let word = self.word("an instruction")?;
        self.mnemonic(names, guard, start, word)
    }

    /// An instruction whose mnemonic is read; `start` is its guard or mnemonic.
    fn mnemonic(
        &mut self,
        names: &mut Names<'a>,
        guard: Option<Guard>,
        start: Token<'a>,
        word: Token<'a>,
    ) -> Result<()> {
        let resume = (self.lexer.clone(), self.token);
        let word = self.suffixes(word);
        let read = match self.fits(word) {
            Ok(Fits::Recognised(op)) => {
                let what = format!("`{op}` is known but not executed");
                let reason = self.error_at(word, what);
                return self.unsupported(names, guard, start, reason);
            }
            Ok(Fits::Forms(Opcode::Call, forms)) => {
                self.call(names, forms[0].0, forms[0].1.clone())
            }
            Ok(Fits::Forms(op, forms)) => self.operands(names, word, op, &forms),
            Err(e) => Err(e),
        };
        match read {
            Ok((op, form, mods, operands)) => {
                let instruction = Instruction { pos: start.pos, guard, op, form, mods, operands };
                names.body.statements.push(Statement::Instruction(instruction));
                Ok(())
            }
            Err(e) if self.options.keep_unknown => {
                (self.lexer, self.token) = resume;
                self.unsupported(names, guard, start, e)
            }
            Err(e) => Err(e),
        }
    }

    /// A mnemonic with the suffixes that stand apart from it: `lop3 .b32`.
    fn suffixes(&mut self, word: Token<'a>) -> Token<'a> {
        let mut whole = word;
        while self.token.kind == TokenKind::Directive {
            let last = self.next();
            whole.text = &self.source[word.start..last.start + last.text.len()];
        }
        whole
    }

    /// Keeps the text up to the semicolon.
    fn unsupported(
        &mut self,
        names: &mut Names<'a>,
        guard: Option<Guard>,
        start: Token<'a>,
        reason: Error,
    ) -> Result<()> {
        while !self.token.is(";") {
            if self.token.kind == TokenKind::End || self.token.kind == TokenKind::Bad {
                return Err(reason);
            }
            self.next();
        }
        let text = self.source[start.start..self.token.start].trim_end().to_string();
        self.next();
        let unsupported = Unsupported { pos: start.pos, guard, text, reason: reason.to_string() };
        names.body.statements.push(Statement::Unsupported(Box::new(unsupported)));
        Ok(())
    }

    /// `call{.uni} {(returns),} target {, (arguments)} {, table}`
    fn call(
        &mut self,
        names: &mut Names<'a>,
        form: crate::table::FormId,
        mods: crate::types::Modifiers,
    ) -> Result<super::fit::Fitted> {
        let mut returns = Vec::new();
        if self.token.is("(") {
            returns = self.list(names)?;
            self.expect(",")?;
        }
        let token = self.token;
        let target = self.operand(names, false)?;
        if !matches!(target, Operand::Reg(_) | Operand::Symbol(Symbol::Function(_), 0)) {
            return Err(self.error_at(token, "expected a function or a register to call"));
        }
        let mut args = Vec::new();
        let mut table = Operand::None;
        if self.eat(",") {
            if self.token.is("(") {
                args = self.list(names)?;
            } else {
                table = self.operand(names, false)?;
            }
            if self.eat(",") {
                table = self.operand(names, false)?;
            }
        }
        if !matches!(table, Operand::None | Operand::Table(_)) {
            return self.expected("a prototype or a list of targets in front of this");
        }
        self.expect(";")?;
        let operands = vec![Operand::List(returns), target, Operand::List(args), table];
        Ok((Opcode::Call, form, mods, operands))
    }
}
