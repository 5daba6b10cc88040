//! Variables, parameters, functions and their headers.

use super::*;

/// Deepest nesting of an initialiser.
const MAX_NESTING: usize = 32;
/// Largest initialised variable, in bytes.
const MAX_IMAGE: u64 = 1 << 32;

impl<'a> Parser<'a> {
    /// A linking directive and what it qualifies: a function or a variable.
    pub(super) fn declaration(&mut self) -> Result<()> {
        let mut linkage = Linkage::Internal;
        loop {
            linkage = match self.token.text {
                ".extern" => Linkage::Extern,
                ".visible" => Linkage::Visible,
                ".weak" => Linkage::Weak,
                ".common" => Linkage::Common,
                ".entry" => return self.function(linkage, true),
                ".func" => return self.function(linkage, false),
                _ => break,
            };
            self.next();
        }
        let first = self.token;
        for (name, variable) in self.variables(linkage)? {
            if matches!(variable.space, Space::Reg | Space::Sreg | Space::Local) {
                let what = format!("`.{}` variables stand inside functions only", variable.space);
                return Err(self.error_at(first, what));
            }
            self.add_global(name, variable)?;
        }
        Ok(())
    }

    /// Adds a variable, or completes the earlier declaration of the same name.
    fn add_global(&mut self, name: &'a str, variable: Variable) -> Result<()> {
        match self.globals.get(name) {
            None => {
                let id = VarId(self.module.variables.len() as u32);
                self.globals.insert(name, Symbol::Variable(id));
                self.module.items.push(Item::Variable(id));
                self.module.variables.push(variable);
                Ok(())
            }
            Some(Symbol::Variable(id)) => {
                let old = &mut self.module.variables[id.index()];
                match (old.linkage, variable.linkage) {
                    (Linkage::Extern, _) => *old = variable,
                    (_, Linkage::Extern) => {}
                    _ => return Err(self.duplicate(variable.pos, name)),
                }
                Ok(())
            }
            Some(_) => Err(self.duplicate(variable.pos, name)),
        }
    }

    pub(super) fn duplicate(&self, pos: Pos, name: &str) -> Error {
        let width = name.chars().count() as u32;
        Error::new(self.source, pos, width, format!("`{name}` is defined twice"))
    }

    /// `.space {.align n} {.attribute(..)} {.v4} .type name{[n]} {= init}, ...;`
    pub(super) fn variables(&mut self, linkage: Linkage) -> Result<Vec<(&'a str, Variable)>> {
        let head = self.variable_head(linkage)?;
        let mut all = Vec::new();
        loop {
            let mut variable = head.clone();
            let name = self.variable_name(&mut variable)?;
            if self.eat("=") {
                variable.init = Some(self.init(0)?);
                if variable.bytes() > MAX_IMAGE {
                    let what = format!("`{name}` is initialised and larger than 4 GiB");
                    return Err(Error::new(self.source, variable.pos, 1, what));
                }
            }
            all.push((name, variable));
            if !self.eat(",") {
                break;
            }
        }
        self.expect(";")?;
        Ok(all)
    }

    /// Everything in front of the name.
    fn variable_head(&mut self, linkage: Linkage) -> Result<Variable> {
        let Some((space, bank)) = space(self.token.text) else {
            return self.expected("a state space such as `.global`, or another directive");
        };
        self.next();
        let mut variable = Variable {
            name: String::new(),
            pos: self.token.pos,
            linkage,
            space,
            bank,
            align: None,
            ty: Type::B8,
            vector: 1,
            dims: Vec::new(),
            init: None,
            managed: false,
            unified: None,
            ptr: None,
            register: None,
        };
        let mut typed = false;
        while self.token.kind == TokenKind::Directive {
            match self.token.text {
                ".align" => variable.align = Some(self.directive_value("an alignment")?),
                ".attribute" => self.attributes(&mut variable.managed, &mut variable.unified)?,
                ".v2" | ".v4" => {
                    variable.vector = if self.token.text == ".v2" { 2 } else { 4 };
                    self.next();
                }
                ".ptr" => variable.ptr = Some(self.pointer()?),
                text => match scalar_type(text) {
                    Some(ty) if !typed => {
                        (variable.ty, typed) = (ty, true);
                        self.next();
                    }
                    _ => return self.expected("a type such as `.b32`, or a name"),
                },
            }
        }
        if variable.align.is_some_and(|a| !a.is_power_of_two()) {
            return self.expected("an alignment that is a power of two in front of this");
        }
        if typed { Ok(variable) } else { self.expected("a type such as `.b32`") }
    }

    fn directive_value(&mut self, what: &str) -> Result<u32> {
        self.next();
        self.integer(what)
    }

    /// `.ptr {.space} {.align n}`
    fn pointer(&mut self) -> Result<PtrAttr> {
        self.next();
        let space = space(self.token.text).map(|(s, _)| s);
        if space.is_some() {
            self.next();
        }
        let aligned = self.token.text == ".align";
        let align = if aligned { Some(self.directive_value("an alignment")?) } else { None };
        Ok(PtrAttr { space, align })
    }

    /// `.attribute(.managed, .unified(a, b))`
    fn attributes(&mut self, managed: &mut bool, unified: &mut Option<(u64, u64)>) -> Result<()> {
        self.next();
        self.expect("(")?;
        loop {
            if self.eat_directive(".managed") {
                *managed = true;
            } else if self.eat_directive(".unified") {
                self.expect("(")?;
                let first = self.constant()?.bits(Type::B64);
                self.expect(",")?;
                let second = self.constant()?.bits(Type::B64);
                self.expect(")")?;
                *unified = Some((first, second));
            } else {
                return self.expected("`.managed` or `.unified`");
            }
            if !self.eat(",") {
                break;
            }
        }
        self.expect(")")
    }

    /// `name{[n]..}`
    fn variable_name(&mut self, variable: &mut Variable) -> Result<&'a str> {
        let name = self.word("a name")?;
        variable.pos = name.pos;
        variable.name = name.text.to_string();
        while self.eat("[") {
            if variable.dims.len() == MAX_NESTING {
                return self.expected("at most 32 dimensions");
            }
            if self.eat("]") {
                variable.dims.push(None);
            } else {
                let size = self.constant_integer("an array size")?;
                variable.dims.push(Some(size));
                self.expect("]")?;
            }
        }
        Ok(name.text)
    }

    fn init(&mut self, depth: usize) -> Result<Init> {
        if depth > MAX_NESTING {
            return self.expected("an initialiser nested at most 32 deep");
        }
        if self.eat("{") {
            let mut list = Vec::new();
            while !self.token.is("}") {
                list.push(self.init(depth + 1)?);
                if !self.eat(",") {
                    break;
                }
            }
            self.expect("}")?;
            return Ok(Init::List(list));
        }
        if self.token.kind == TokenKind::Word && self.token.text != "WARP_SZ" {
            return self.init_symbol(None);
        }
        let value = self.constant()?;
        if self.eat("(") {
            let init = self.init_symbol(Some(value.bits(Type::B64)))?;
            self.expect(")")?;
            return Ok(init);
        }
        Ok(Init::Imm(value))
    }

    /// `name`, `name+4`, `generic(name)+4`; inside a mask's parentheses with `mask`.
    fn init_symbol(&mut self, mask: Option<u64>) -> Result<Init> {
        let mut name = self.word("the name of a variable or function")?;
        let generic = name.text == "generic" && self.eat("(");
        if generic {
            name = self.word("the name of a variable or function")?;
        }
        let Some(symbol) = self.globals.get(name.text).copied() else {
            return Err(self.error_at(name, format!("`{}` is not declared", shorten(name.text))));
        };
        let mut addend = self.addend()?;
        if generic {
            self.expect(")")?;
            addend = addend.wrapping_add(self.addend()?);
        }
        Ok(Init::Symbol { symbol, addend, generic, mask })
    }

    /// `+n` or `-n`, else 0.
    pub(super) fn addend(&mut self) -> Result<i64> {
        let negative = self.token.is("-");
        if !negative && !self.token.is("+") {
            return Ok(0);
        }
        self.next();
        let value = self.constant()?;
        let (Imm::Int(_) | Imm::Uint(_)) = value else { return self.expected("an offset") };
        let value = value.bits(Type::B64) as i64;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    /// `( .param .b32 a, ... )`
    pub(super) fn parameters(&mut self) -> Result<Vec<(&'a str, Variable)>> {
        let mut all = Vec::new();
        self.expect("(")?;
        while !self.token.is(")") {
            let mut variable = self.variable_head(Linkage::Internal)?;
            if !matches!(variable.space, Space::Param | Space::Reg) {
                return self.expected("a parameter in `.param` or `.reg`, in front of this");
            }
            let name = self.variable_name(&mut variable)?;
            all.push((name, variable));
            if !self.eat(",") {
                break;
            }
        }
        self.expect(")")?;
        Ok(all)
    }

    fn function(&mut self, linkage: Linkage, entry: bool) -> Result<()> {
        self.next();
        let mut tuning = Tuning::default();
        self.tuning(&mut tuning)?;
        let returns = if self.token.is("(") { self.parameters()? } else { Vec::new() };
        let name = self.word("a function's name")?;
        let params = if self.token.is("(") { self.parameters()? } else { Vec::new() };
        self.tuning(&mut tuning)?;
        let strip = |list: &[(&str, Variable)]| list.iter().map(|(_, v)| v.clone()).collect();
        let function = Function {
            name: name.text.to_string(),
            pos: name.pos,
            entry,
            linkage,
            returns: strip(&returns),
            params: strip(&params),
            tuning,
            body: None,
        };
        let id = self.declare(name.text, function.clone())?;
        if self.eat(";") {
            self.module.items.push(Item::Declare(id));
            return Ok(());
        }
        let function = self.body(function, &returns, &params)?;
        self.module.functions[id.index()] = function;
        self.module.items.push(Item::Define(id));
        Ok(())
    }

    fn declare(&mut self, name: &'a str, function: Function) -> Result<FuncId> {
        match self.globals.get(name) {
            None => {
                let id = FuncId(self.module.functions.len() as u32);
                self.globals.insert(name, Symbol::Function(id));
                self.module.functions.push(function);
                Ok(id)
            }
            Some(Symbol::Function(id)) => {
                let defined = self.module.functions[id.index()].body.is_some();
                if defined && !self.token.is(";") {
                    return Err(self.duplicate(function.pos, name));
                }
                Ok(*id)
            }
            Some(_) => Err(self.duplicate(function.pos, name)),
        }
    }

    /// Tuning, cluster and other directives of a function.
    pub(super) fn tuning(&mut self, tuning: &mut Tuning) -> Result<()> {
        while self.token.kind == TokenKind::Directive {
            match self.token.text {
                ".maxntid" => tuning.maxntid = Some(self.extent()?),
                ".reqntid" => tuning.reqntid = Some(self.extent()?),
                ".reqnctapercluster" => tuning.reqnctapercluster = Some(self.extent()?),
                ".maxnreg" => tuning.maxnreg = Some(self.directive_value("a count")?),
                ".minnctapersm" => tuning.minnctapersm = Some(self.directive_value("a count")?),
                ".maxnctapersm" => tuning.maxnctapersm = Some(self.directive_value("a count")?),
                ".maxclusterrank" => tuning.maxclusterrank = Some(self.directive_value("a count")?),
                ".abi_preserve" => tuning.abi_preserve = Some(self.directive_value("a count")?),
                ".abi_preserve_control" => {
                    tuning.abi_preserve_control = Some(self.directive_value("a count")?);
                }
                ".explicitcluster" => {
                    self.next();
                    tuning.explicitcluster = true;
                }
                ".blocksareclusters" => {
                    self.next();
                    tuning.blocksareclusters = true;
                }
                ".noreturn" => {
                    self.next();
                    tuning.noreturn = true;
                }
                ".attribute" => self.attributes(&mut false, &mut tuning.unified)?,
                ".pragma" => {
                    self.next();
                    tuning.pragmas.extend(self.strings()?);
                    self.expect(";")?;
                }
                _ => return self.expected("a directive of a function, `{` or `;`"),
            }
        }
        Ok(())
    }

    /// `nx{, ny{, nz}}`
    fn extent(&mut self) -> Result<[u32; 3]> {
        let mut extent = [self.directive_value("a size")?, 1, 1];
        for size in &mut extent[1..] {
            if self.eat(",") {
                *size = self.integer("a size")?;
            }
        }
        Ok(extent)
    }
}
