//! The syntax tree back to text: parsing what this prints gives the same tree, positions apart.

use std::fmt::{Display, Formatter, Result, Write};

use crate::ast::*;
use crate::types::{Flag, Mod};

impl Display for Module {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let suffix = self.target.suffix.map(String::from).unwrap_or_default();
        writeln!(f, ".version {}.{}", self.version.0, self.version.1)?;
        write!(f, ".target sm_{}{suffix}", self.target.sm)?;
        self.target.options.iter().try_for_each(|o| write!(f, ", {o}"))?;
        writeln!(f, "\n.address_size {}\n", self.address_size)?;
        self.items.iter().try_for_each(|item| write!(f, "{}", self.text_of(item)))
    }
}

/// One item of a module, as text that ends with a line's end.
#[derive(Debug)]
pub struct ItemText<'a> {
    module: &'a Module,
    item: &'a Item,
}

impl Module {
    /// An item as text; [`Item::Declare`] of a function that has a body is its header.
    pub fn text_of<'a>(&'a self, item: &'a Item) -> ItemText<'a> {
        ItemText { module: self, item }
    }
}

impl Display for ItemText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let module = self.module;
        match self.item {
            Item::Variable(v) => variable(f, module, &module.variables[v.index()], None, ";\n"),
            Item::Declare(i) => header(f, module, &module.functions[i.index()], ";\n"),
            Item::Define(i) => {
                let function = &module.functions[i.index()];
                header(f, module, function, "\n")?;
                body(f, module, function)
            }
            Item::Alias(i) => {
                let (alias, aliasee) = module.aliases[*i];
                let name = |id: FuncId| &module.functions[id.index()].name;
                writeln!(f, ".alias {}, {};", name(alias), name(aliasee))
            }
            Item::File(i) => {
                let file = &module.files[*i];
                writeln!(f, ".file {} \"{}\"", file.index, file.name)
            }
            Item::Pragma(strings) => pragma(f, strings),
        }
    }
}

fn pragma(f: &mut Formatter<'_>, strings: &[String]) -> Result {
    let quoted: Vec<String> = strings.iter().map(|s| format!("\"{s}\"")).collect();
    writeln!(f, ".pragma {};", quoted.join(", "))
}

fn linkage(l: Linkage) -> &'static str {
    match l {
        Linkage::Internal => "",
        Linkage::Extern => ".extern ",
        Linkage::Visible => ".visible ",
        Linkage::Weak => ".weak ",
        Linkage::Common => ".common ",
    }
}

fn variable(
    f: &mut Formatter<'_>,
    module: &Module,
    v: &Variable,
    function: Option<&Function>,
    end: &str,
) -> Result {
    write!(f, "{}.{}", linkage(v.linkage), v.space)?;
    v.bank.map_or(Ok(()), |b| write!(f, "{b}"))?;
    let mut attributes = Vec::new();
    if v.managed {
        attributes.push(".managed".to_string());
    }
    if let Some((a, b)) = v.unified {
        attributes.push(format!(".unified({a}, {b})"));
    }
    if !attributes.is_empty() {
        write!(f, " .attribute({})", attributes.join(", "))?;
    }
    v.align.map_or(Ok(()), |a| write!(f, " .align {a}"))?;
    if v.vector > 1 {
        write!(f, " .v{}", v.vector)?;
    }
    write!(f, " .{}", v.ty)?;
    if let Some(ptr) = v.ptr {
        write!(f, " .ptr")?;
        ptr.space.map_or(Ok(()), |s| write!(f, " .{s}"))?;
        ptr.align.map_or(Ok(()), |a| write!(f, " .align {a}"))?;
    }
    write!(f, " {}", v.name)?;
    for dim in &v.dims {
        match dim {
            Some(n) => write!(f, "[{n}]")?,
            None => write!(f, "[]")?,
        }
    }
    if let Some(value) = &v.init {
        write!(f, " = ")?;
        init(f, module, function, value)?;
    }
    f.write_str(end)
}

fn init(f: &mut Formatter<'_>, m: &Module, function: Option<&Function>, i: &Init) -> Result {
    match i {
        Init::Imm(value) => imm(f, *value),
        Init::Symbol { symbol, addend, generic, mask } => {
            let name = symbol_name(m, function, *symbol);
            let plus = if *addend == 0 { String::new() } else { format!("+{addend}") };
            match (mask, generic) {
                (Some(mask), true) => write!(f, "0x{mask:X}(generic({name}){plus})"),
                (Some(mask), false) => write!(f, "0x{mask:X}({name}{plus})"),
                (None, true) => write!(f, "generic({name}){plus}"),
                (None, false) => write!(f, "{name}{plus}"),
            }
        }
        Init::List(list) => {
            f.write_char('{')?;
            for (n, item) in list.iter().enumerate() {
                f.write_str(if n > 0 { ", " } else { "" })?;
                init(f, m, function, item)?;
            }
            f.write_char('}')
        }
    }
}

fn imm(f: &mut Formatter<'_>, value: Imm) -> Result {
    match value {
        Imm::Int(v) => write!(f, "{v}"),
        Imm::Uint(v) => write!(f, "{v}U"),
        Imm::F32(b) => write!(f, "0f{b:08X}"),
        Imm::F64(b) => write!(f, "0d{b:016X}"),
    }
}

fn symbol_name<'a>(m: &'a Module, function: Option<&'a Function>, symbol: Symbol) -> &'a str {
    let local = |list: fn(&Function) -> &[Variable], i: usize| {
        function.map_or("", |f| list(f)[i].name.as_str())
    };
    match symbol {
        Symbol::Variable(v) => &m.variables[v.index()].name,
        Symbol::Function(i) => &m.functions[i.index()].name,
        Symbol::Param(i) => local(|f| &f.params, i as usize),
        Symbol::Return(i) => local(|f| &f.returns, i as usize),
        Symbol::Local(v) => {
            function.and_then(|f| f.body.as_ref()).map_or("", |b| &b.variables[v.index()].name)
        }
    }
}

fn parameters(f: &mut Formatter<'_>, module: &Module, list: &[Variable]) -> Result {
    f.write_char('(')?;
    for (i, v) in list.iter().enumerate() {
        f.write_str(if i > 0 { ", " } else { "" })?;
        variable(f, module, v, None, "")?;
    }
    f.write_char(')')
}

fn header(f: &mut Formatter<'_>, module: &Module, function: &Function, end: &str) -> Result {
    let kind = if function.entry { ".entry " } else { ".func " };
    write!(f, "{}{kind}", linkage(function.linkage))?;
    if let Some((a, b)) = function.tuning.unified {
        write!(f, ".attribute(.unified({a}, {b})) ")?;
    }
    if !function.returns.is_empty() {
        parameters(f, module, &function.returns)?;
    }
    write!(f, " {}", function.name)?;
    parameters(f, module, &function.params)?;
    tuning(f, &function.tuning)?;
    f.write_str(end)
}

fn tuning(f: &mut Formatter<'_>, t: &Tuning) -> Result {
    let extents = [
        (".maxntid", t.maxntid),
        (".reqntid", t.reqntid),
        (".reqnctapercluster", t.reqnctapercluster),
    ];
    for (name, extent) in extents {
        extent.map_or(Ok(()), |[x, y, z]| write!(f, " {name} {x}, {y}, {z}"))?;
    }
    let counts = [
        (".maxnreg", t.maxnreg),
        (".minnctapersm", t.minnctapersm),
        (".maxnctapersm", t.maxnctapersm),
        (".maxclusterrank", t.maxclusterrank),
        (".abi_preserve", t.abi_preserve),
        (".abi_preserve_control", t.abi_preserve_control),
    ];
    for (name, count) in counts {
        count.map_or(Ok(()), |n| write!(f, " {name} {n}"))?;
    }
    let flags = [
        (".explicitcluster", t.explicitcluster),
        (".blocksareclusters", t.blocksareclusters),
        (".noreturn", t.noreturn),
    ];
    for (name, set) in flags {
        f.write_str(if set { " " } else { "" })?;
        f.write_str(if set { name } else { "" })?;
    }
    if !t.pragmas.is_empty() {
        f.write_char(' ')?;
        pragma(f, &t.pragmas)?;
    }
    Ok(())
}

fn body(f: &mut Formatter<'_>, module: &Module, function: &Function) -> Result {
    let Some(body) = &function.body else { return Ok(()) };
    let at = Scope { module, function, body };
    writeln!(f, "{{")?;
    for statement in &body.statements {
        at.statement(f, statement)?;
    }
    writeln!(f, "}}")
}

#[derive(Clone, Copy)]
struct Scope<'a> {
    module: &'a Module,
    function: &'a Function,
    body: &'a Body,
}

impl Scope<'_> {
    fn statement(&self, f: &mut Formatter<'_>, statement: &Statement) -> Result {
        match statement {
            Statement::Instruction(i) => self.instruction(f, i),
            Statement::Label(l) => writeln!(f, "{}:", self.body.labels[l.index()].name),
            Statement::BeginScope => writeln!(f, "{{"),
            Statement::EndScope => writeln!(f, "}}"),
            Statement::Registers(d) => {
                let vector = if d.vector > 1 { format!(" .v{}", d.vector) } else { String::new() };
                let name = |(n, c): &(String, Option<u32>)| match c {
                    Some(c) => format!("{n}<{c}>"),
                    None => n.clone(),
                };
                let names: Vec<String> = d.names.iter().map(name).collect();
                writeln!(f, "\t.reg{vector} .{} {};", d.ty, names.join(", "))
            }
            Statement::Variable(v) => {
                let v = &self.body.variables[v.index()];
                variable(f, self.module, v, Some(self.function), ";\n")
            }
            Statement::Table(t) => self.table(f, &self.body.tables[t.index()]),
            Statement::Pragma(strings) => pragma(f, strings),
            Statement::Loc(loc) => {
                write!(f, "\t.loc {} {} {}", loc.file, loc.line, loc.col)?;
                if let Some(i) = &loc.inlined_at {
                    let (name, offset) = (&i.function, i.offset);
                    let plus = if offset == 0 { String::new() } else { format!("+{offset}") };
                    let place = format!("{} {} {}", i.file, i.line, i.col);
                    write!(f, ", function_name {name}{plus}, inlined_at {place}")?;
                }
                writeln!(f)
            }
            Statement::Unsupported(u) => writeln!(f, "\t{};", u.text),
        }
    }

    fn table(&self, f: &mut Formatter<'_>, table: &Table) -> Result {
        write!(f, "{}: ", table.name)?;
        let join = |names: Vec<&str>| names.join(", ");
        match &table.kind {
            TableKind::Branch(labels) => {
                let name = |l: &LabelId| self.body.labels[l.index()].name.as_str();
                writeln!(f, ".branchtargets {};", join(labels.iter().map(name).collect()))
            }
            TableKind::Call(functions) => {
                let name = |i: &FuncId| self.module.functions[i.index()].name.as_str();
                writeln!(f, ".calltargets {};", join(functions.iter().map(name).collect()))
            }
            TableKind::Prototype { returns, params, tuning: t } => {
                write!(f, ".callprototype ")?;
                if !returns.is_empty() {
                    parameters(f, self.module, returns)?;
                }
                write!(f, " _ ")?;
                parameters(f, self.module, params)?;
                tuning(f, t)?;
                writeln!(f, ";")
            }
        }
    }

    fn instruction(&self, f: &mut Formatter<'_>, i: &Instruction) -> Result {
        f.write_char('\t')?;
        if let Some(guard) = i.guard {
            let not = if guard.negated { "!" } else { "" };
            write!(f, "@{not}{} ", self.register(guard.reg))?;
        }
        f.write_str(i.op.text())?;
        let suffix = |m: &&Mod| **m != Mod::Flag(Flag::Unified);
        i.mods.0.iter().filter(suffix).try_for_each(|m| write!(f, ".{m}"))?;
        let call = i.call();
        let absent = |o: &&Operand| match o {
            Operand::None => false,
            Operand::List(list) => !(call.is_some() && list.is_empty()),
            _ => true,
        };
        for (n, operand) in i.operands.iter().filter(absent).enumerate() {
            f.write_str(if n > 0 { ", " } else { " " })?;
            self.operand(f, operand)?;
            if i.mods.has(Flag::Unified) && matches!(operand, Operand::Address(_)) {
                f.write_str(".unified")?;
            }
        }
        writeln!(f, ";")
    }

    fn register(&self, r: RegId) -> &str {
        &self.body.registers[r.index()].name
    }

    fn list(&self, f: &mut Formatter<'_>, list: &[Operand], close: [char; 2]) -> Result {
        f.write_char(close[0])?;
        for (n, operand) in list.iter().enumerate() {
            f.write_str(if n > 0 { ", " } else { "" })?;
            self.operand(f, operand)?;
        }
        f.write_char(close[1])
    }

    fn address(&self, f: &mut Formatter<'_>, a: Address) -> Result {
        match a.base {
            Base::Reg(r) => f.write_str(self.register(r))?,
            Base::Symbol(s) => f.write_str(symbol_name(self.module, Some(self.function), s))?,
            Base::Absolute => return write!(f, "{}", a.offset),
        }
        if a.offset == 0 { Ok(()) } else { write!(f, "+{}", a.offset) }
    }

    fn operand(&self, f: &mut Formatter<'_>, operand: &Operand) -> Result {
        match operand {
            Operand::Reg(r) => f.write_str(self.register(*r)),
            Operand::Component(r, lane) => {
                write!(f, "{}.{}", self.register(*r), lane_name(*lane))
            }
            Operand::Selected(r, selector) => write!(f, "{}.{selector}", self.register(*r)),
            Operand::Special(s) => special(f, *s),
            Operand::Imm(value) => imm(f, *value),
            Operand::Vector(list) => self.list(f, list, ['{', '}']),
            Operand::List(list) => self.list(f, list, ['(', ')']),
            Operand::Sink => f.write_char('_'),
            Operand::Address(a) => {
                f.write_char('[')?;
                self.address(f, *a)?;
                f.write_char(']')
            }
            Operand::Tensor(a, list) => {
                f.write_char('[')?;
                self.address(f, *a)?;
                f.write_str(", ")?;
                self.list(f, list, ['{', '}'])?;
                f.write_char(']')
            }
            Operand::Symbol(s, offset) => {
                f.write_str(symbol_name(self.module, Some(self.function), *s))?;
                if *offset == 0 { Ok(()) } else { write!(f, "+{offset}") }
            }
            Operand::Label(l) => f.write_str(&self.body.labels[l.index()].name),
            Operand::Table(t) => f.write_str(&self.body.tables[t.index()].name),
            Operand::Not(r) => write!(f, "!{}", self.register(*r)),
            Operand::Negated(r, selector) => {
                write!(f, "-{}", self.register(*r))?;
                selector.map_or(Ok(()), |selector| write!(f, ".{selector}"))
            }
            Operand::Pair(first, second) => {
                self.operand(f, first)?;
                f.write_char('|')?;
                self.operand(f, second)
            }
            Operand::None => Ok(()),
        }
    }
}

fn lane_name(lane: u8) -> char {
    char::from(b"xyzw"[usize::from(lane.min(3))])
}

fn special(f: &mut Formatter<'_>, s: SpecialReg) -> Result {
    match s.kind {
        Special::Pm | Special::Envreg | Special::ReservedSmemOffset => {
            write!(f, "{}{}", s.kind, s.index)
        }
        Special::Pm64 => write!(f, "%pm{}_64", s.index),
        _ => write!(f, "{}", s.kind),
    }?;
    s.lane.map_or(Ok(()), |lane| write!(f, ".{}", lane_name(lane)))
}

impl Module {
    /// The same module with every position zero: to compare modules by content.
    #[must_use]
    pub fn without_positions(mut self) -> Self {
        let clear = |list: &mut Vec<Variable>| list.iter_mut().for_each(|v| v.pos = Pos::default());
        clear(&mut self.variables);
        for function in &mut self.functions {
            function.pos = Pos::default();
            clear(&mut function.params);
            clear(&mut function.returns);
            let Some(body) = &mut function.body else { continue };
            clear(&mut body.variables);
            for table in &mut body.tables {
                if let TableKind::Prototype { returns, params, .. } = &mut table.kind {
                    clear(returns);
                    clear(params);
                }
            }
            for statement in &mut body.statements {
                match statement {
                    Statement::Instruction(i) => i.pos = Pos::default(),
                    Statement::Unsupported(u) => {
                        u.pos = Pos::default();
                        u.reason.clear();
                    }
                    _ => {}
                }
            }
        }
        self
    }
}
