//! Scopes of a function: registers, variables, labels, tables.

use super::*;

/// What a name of a function stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Local {
    Reg(RegId),
    Variable(LocalId),
    Param(u32),
    Return(u32),
    Table(TableId),
}

#[derive(Default)]
struct Scope<'a> {
    names: FxHashMap<&'a str, Local>,
    /// `name<N>`: type, vector length, N.
    families: FxHashMap<&'a str, (Type, u8, u32)>,
    /// Declared but not yet named registers.
    declared: FxHashMap<&'a str, (Type, u8)>,
    labels: FxHashMap<&'a str, LabelId>,
    /// Labels that were mentioned, each with its slot.
    mentioned: FxHashMap<&'a str, (LabelId, Token<'a>)>,
}

/// The names of one function while its body is read.
///
/// A label may be mentioned before it stands, and an inner scope may yet define a label that an
/// outer one has. So a mention gets a provisional slot in its scope; when the scope ends, the slot
/// is bound to the scope's label or moves outwards.
pub(crate) struct Names<'a> {
    scopes: Vec<Scope<'a>>,
    pub(crate) body: Body,
    /// For every slot, the slot it was merged into.
    forward: Vec<u32>,
}

impl<'a> Names<'a> {
    pub(crate) fn new() -> Self {
        Names { scopes: vec![Scope::default()], body: Body::default(), forward: Vec::new() }
    }

    pub(crate) fn depth(&self) -> usize {
        self.scopes.len()
    }

    fn inner(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("a function has a scope")
    }

    pub(crate) fn begin(&mut self) {
        self.scopes.push(Scope::default());
    }

    /// Ends the innermost scope; gives a label that nothing defines, if it was the last scope.
    pub(crate) fn end(&mut self) -> Result<(), Token<'a>> {
        let scope = self.scopes.pop().expect("scopes are balanced");
        let mut undefined: Option<Token<'a>> = None;
        for (name, (slot, token)) in scope.mentioned {
            if let Some(label) = scope.labels.get(name) {
                self.forward[slot.index()] = label.0;
            } else if let Some(outer) = self.scopes.last_mut() {
                let (target, _) = *outer.mentioned.entry(name).or_insert((slot, token));
                self.forward[slot.index()] = target.0;
            } else if undefined.is_none_or(|u| token.start < u.start) {
                undefined = Some(token);
            }
        }
        undefined.map_or(Ok(()), Err)
    }

    fn slot(&mut self) -> LabelId {
        let id = self.forward.len() as u32;
        self.forward.push(id);
        LabelId(id)
    }

    /// A mention of a label.
    pub(crate) fn mention(&mut self, token: Token<'a>) -> LabelId {
        if let Some((slot, _)) = self.inner().mentioned.get(token.text) {
            return *slot;
        }
        let slot = self.slot();
        self.inner().mentioned.insert(token.text, (slot, token));
        slot
    }

    fn taken(&self, name: &str) -> bool {
        let scope = self.scopes.last().expect("a function has a scope");
        scope.names.contains_key(name)
            || scope.declared.contains_key(name)
            || scope.labels.contains_key(name)
    }

    /// A label's place; false where the name is taken.
    pub(crate) fn label(&mut self, name: &'a str) -> Option<LabelId> {
        if self.taken(name) {
            return None;
        }
        let slot = self.slot();
        self.inner().labels.insert(name, slot);
        self.body.labels.push(Label { name: name.to_string(), statement: 0 });
        Some(slot)
    }

    /// Gives slots their final numbers: labels in order of their place.
    pub(crate) fn finish(mut self) -> Body {
        let mut number = vec![u32::MAX; self.forward.len()];
        let mut names = std::mem::take(&mut self.body.labels);
        let mut labels = Vec::with_capacity(names.len());
        for (statement, label) in
            self.body.statements.iter().enumerate().filter_map(|(i, s)| match s {
                Statement::Label(slot) => Some((i as u32, *slot)),
                _ => None,
            })
        {
            number[label.index()] = labels.len() as u32;
            let name = std::mem::take(&mut names[labels.len()].name);
            labels.push(Label { name, statement });
        }
        let resolve = |id: &mut LabelId| {
            let mut slot = id.0;
            while self.forward[slot as usize] != slot {
                slot = self.forward[slot as usize];
            }
            id.0 = number[slot as usize];
        };
        for statement in &mut self.body.statements {
            match statement {
                Statement::Label(id) => resolve(id),
                Statement::Instruction(instruction) => {
                    for operand in &mut instruction.operands {
                        if let Operand::Label(id) = operand {
                            resolve(id);
                        }
                    }
                }
                _ => {}
            }
        }
        for table in &mut self.body.tables {
            if let TableKind::Branch(list) = &mut table.kind {
                list.iter_mut().for_each(resolve);
            }
        }
        self.body.labels = labels;
        self.body
    }

    /// Declares a variable, parameter or table; false where the name is taken.
    pub(crate) fn declare(&mut self, name: &'a str, local: Local) -> bool {
        let free = !self.taken(name);
        if free {
            self.inner().names.insert(name, local);
        }
        free
    }

    /// Declares a register or a family of them; false where the name is taken. A family `a<2>` is
    /// `a0` and `a1`: beside it there may be an `a`.
    pub(crate) fn register(
        &mut self,
        name: &'a str,
        ty: Type,
        vector: u8,
        count: Option<u32>,
    ) -> bool {
        let free = match count {
            Some(_) => !self.inner().families.contains_key(name),
            None => !self.taken(name),
        };
        if free {
            match count {
                Some(n) => {
                    self.inner().families.insert(name, (ty, vector, n));
                }
                None => {
                    self.inner().declared.insert(name, (ty, vector));
                }
            }
        }
        free
    }

    /// What `name` stands for, from the innermost scope outwards.
    pub(crate) fn lookup(&mut self, name: &'a str) -> Option<Local> {
        for scope in self.scopes.iter_mut().rev() {
            if let Some(local) = scope.names.get(name) {
                return Some(*local);
            }
            let found = scope.declared.get(name).copied().or_else(|| scope.member(name));
            if let Some((ty, vector)) = found {
                let id = RegId(self.body.registers.len() as u32);
                self.body.registers.push(Register { name: name.to_string(), ty, vector });
                scope.names.insert(name, Local::Reg(id));
                return Some(Local::Reg(id));
            }
        }
        None
    }
}

impl Scope<'_> {
    /// Whether `name` is a family's name followed by a number below its count.
    fn member(&self, name: &str) -> Option<(Type, u8)> {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count().min(9);
        (1..=digits).find_map(|n| {
            let (family, number) = name.split_at(name.len() - n);
            let (ty, vector, count) = *self.families.get(family)?;
            let canonical = n == 1 || !number.starts_with('0');
            (canonical && number.parse::<u32>().ok()? < count).then_some((ty, vector))
        })
    }
}
