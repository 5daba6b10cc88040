//! From syntax tree to micro-operations: an entry with every function that it may call.
//!
//! Registers get slots by liveness (`registers`), branches get the place where their sides meet
//! (`cfg`), variables get addresses, operands become slots: literals and addresses are constants
//! of the launch. What an instruction does is lowered by the file of its class in `crate::exec`.

pub mod cfg;
pub mod objects;
pub mod registers;
mod unfinished;
pub mod vectors;

use std::collections::{BTreeMap, HashMap};

use fathom_ptx::ast::{
    self, Address, Base, Body, Instruction, LocalId, Operand, Statement, Symbol, VarId,
};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Scope, Sem, Space, Type};

use crate::error::Unsupported;
use crate::exec;
use crate::machine::access::Addr;
use crate::machine::cx::{Cx, PRED_FALSE, PRED_SINK, PRED_TRUE};
use crate::machine::lane::{CONSTANT, Reg, SINK, WIDE};
pub(crate) use crate::machine::op::Code;
use crate::machine::op::{
    Action, Class, Constant, FunctionInfo, MicroOp, NO_GUARD, Object, OpFn, Step, Touch,
};
use crate::module::Program;
use crate::preset::Preset;
use cfg::Cfg;
use objects::Points;
use registers::Registers;

/// Why an instruction cannot be lowered.
#[derive(Debug)]
pub struct Why(pub String);

/// Result of lowering.
pub type Lowered<T = ()> = Result<T, Why>;

/// Says that something is not supported.
pub fn unsupported<T>(what: impl Into<String>) -> Lowered<T> {
    Err(Why(what.into()))
}

/// The state of lowering one entry.
pub struct Lower<'a> {
    pub program: &'a Program,
    pub function: &'a ast::Function,
    pub body: &'a Body,
    cfg: Cfg,
    registers: Registers,
    pub ops: Vec<MicroOp>,
    actions: Vec<Action>,
    pub wgmmas: Vec<exec::wgmma::Operation>,
    constants: Vec<Constant>,
    constant_index: HashMap<Constant, u16>,
    /// Constants so far in the file of narrow slots and of wide ones.
    constant_slots: [u16; 2],
    pub info: FunctionInfo,
    functions: Vec<FunctionInfo>,
    function_of: BTreeMap<u32, u32>,
    /// Offsets of shared variables: module-scope, then function-scope of each function.
    shared: BTreeMap<VarId, u32>,
    shared_local: BTreeMap<(u32, LocalId), u32>,
    /// Function-scope variables in local memory: `.local` and `.param`.
    local: BTreeMap<LocalId, u32>,
    index: u32,
    statement: usize,
    guard: (u16, bool),
    line: u32,
    /// Temporaries of the instruction, narrow and wide; the most so far; their first slots.
    temps: [u32; 2],
    most_temps: [u32; 2],
    first_temp: [u32; 2],
    /// Operation index of each statement, for branch targets.
    places: Vec<u32>,
    /// Branches to patch: (operation, target statement).
    branches: Vec<(usize, usize)>,
    /// Operations that return: they go to the function's last operation.
    returns: Vec<usize>,
    pub communicates: bool,
    pub uses_heap: bool,
    touched: BTreeMap<u32, Touch>,
    /// Number of the function's first register among those of all functions.
    first_name: u32,
    objects: Vec<Object>,
    /// The variable that each register of the function points into.
    points: Vec<Points>,
    body_has_wgmma: bool,
    approximate: Vec<(u32, String)>,
    tensor_core: Vec<(u32, String, u64)>,
}

/// Lowers an entry and what it may call.
///
/// # Errors
/// The first instruction or feature that is not supported, with its line.
pub(crate) fn lower(program: &Program, entry: usize) -> Result<Code, Unsupported> {
    let module = &program.ast;
    let reachable = reachable(program, entry);
    check_sizes(program, entry, &reachable)?;
    let layout = lay_out_shared(program, &reachable);
    let (shared, shared_local) = (layout.shared, layout.locals);
    let function_of: BTreeMap<u32, u32> =
        reachable.iter().enumerate().map(|(i, &f)| (f as u32, i as u32)).collect();
    let empty = Body::default();
    let mut l = Lower {
        program,
        function: &module.functions[entry],
        body: &empty,
        cfg: Cfg::default(),
        registers: Registers::default(),
        ops: Vec::new(),
        actions: Vec::new(),
        wgmmas: Vec::new(),
        constants: Vec::new(),
        constant_index: HashMap::new(),
        constant_slots: [0; 2],
        info: FunctionInfo::default(),
        functions: Vec::new(),
        function_of,
        shared,
        shared_local,
        local: BTreeMap::new(),
        index: 0,
        statement: 0,
        guard: (NO_GUARD, false),
        line: 0,
        temps: [0; 2],
        most_temps: [0; 2],
        first_temp: [0; 2],
        places: Vec::new(),
        branches: Vec::new(),
        returns: Vec::new(),
        communicates: false,
        uses_heap: false,
        touched: BTreeMap::new(),
        first_name: 0,
        objects: Vec::new(),
        points: Vec::new(),
        body_has_wgmma: false,
        approximate: Vec::new(),
        tensor_core: Vec::new(),
    };
    // Frames are laid out first: calls need the places of their callee's parameters.
    for &f in &reachable {
        l.functions.push(frame(&module.functions[f]));
    }
    let mut pressure = 0;
    for (i, &f) in reachable.iter().enumerate() {
        l.function = &module.functions[f];
        l.index = i as u32;
        let body = l.function.body.as_ref().expect("reachable functions have bodies");
        l.function_body(body).map_err(|why| Unsupported {
            kernel: l.function.name.clone(),
            line: l.line,
            what: why.0,
            source_line: program.line(l.line).to_owned(),
        })?;
        pressure = pressure.max(l.registers.pressure);
        l.first_name += body.registers.len() as u32;
    }
    let local_bytes = l.functions.iter().map(|f| f.local_bytes).sum();
    Ok(Code {
        ops: l.ops,
        actions: l.actions,
        wgmmas: l.wgmmas,
        constants: l.constants,
        functions: l.functions,
        function_of: l.function_of,
        declared_shared_bytes: layout.declared,
        static_shared_bytes: layout.dynamic_start,
        local_bytes,
        registers: (pressure + 8).min(most_registers(&module.functions[entry])),
        communicates: l.communicates,
        uses_heap: l.uses_heap,
        touched: l.touched,
        objects: l.objects,
        launch_registers: launch_registers(&module.functions[entry]),
        approximate: l.approximate,
        tensor_core: l.tensor_core,
        name: module.functions[entry].name.clone(),
    })
}

/// Most bytes of local memory of a thread, and more than any CTA has of shared memory.
const MOST_LOCAL: u64 = 512 << 10;
const MOST_SHARED: u64 = 1 << 20;

/// Refuses variables in shared and local memory that no device has room for.
fn check_sizes(program: &Program, entry: usize, functions: &[usize]) -> Result<(), Unsupported> {
    let module = &program.ast;
    let shared = |s| matches!(s, Space::Shared | Space::SharedCta | Space::SharedCluster);
    let own = module.variables.iter().filter(|v| shared(v.space));
    let list = functions.iter().flat_map(|&f| {
        let function = &module.functions[f];
        let body = function.body.iter().flat_map(|b| &b.variables);
        let formal = function.params.iter().chain(&function.returns);
        body.chain(formal.filter(move |_| f != entry))
    });
    for v in own.chain(list) {
        let most = if shared(v.space) { MOST_SHARED } else { MOST_LOCAL };
        if v.bytes() > most || v.alignment() > 1 << 16 {
            return Err(Unsupported {
                kernel: module.functions[entry].name.clone(),
                line: module.functions[entry].pos.line,
                what: format!("{} bytes of the variable {}", v.bytes(), v.name),
                source_line: program.line(module.functions[entry].pos.line).to_owned(),
            });
        }
    }
    Ok(())
}

/// The entry and every function with a body that it may call, the entry first.
fn reachable(program: &Program, entry: usize) -> Vec<usize> {
    let module = &program.ast;
    let mut list = vec![entry];
    let mut i = 0;
    while i < list.len() {
        let body = module.functions[list[i]].body.as_ref();
        let mut add = |f: usize| {
            if module.functions[f].body.is_some() && !list.contains(&f) {
                list.push(f);
            }
        };
        let mut found = Vec::new();
        let mut indirect = false;
        for (_, ins) in body.iter().flat_map(|b| b.instructions()) {
            for operand in &ins.operands {
                if let Operand::Symbol(Symbol::Function(f), _) = operand {
                    found.push(resolve_alias(module, f.index()));
                }
            }
            indirect |= ins.call().is_some_and(|c| matches!(c.target, Operand::Reg(_)));
        }
        found.into_iter().for_each(&mut add);
        if indirect {
            (0..module.functions.len()).filter(|&f| !module.functions[f].entry).for_each(&mut add);
        }
        i += 1;
    }
    list
}

/// Registers a thread starts with, where ptxas knows and so obeys `setmaxnreg`.
fn launch_registers(entry: &ast::Function) -> Option<u32> {
    let most = registers_by_threads(entry)?;
    Some(entry.tuning.maxnreg.unwrap_or(most).min(most) & !7)
}

/// Registers a thread may have at most: ptxas spills what is more.
fn most_registers(entry: &ast::Function) -> u32 {
    entry.tuning.maxnreg.or_else(|| registers_by_threads(entry)).unwrap_or(MOST_REGISTERS)
}

const MOST_REGISTERS: u32 = 255;

/// With how many registers the CTAs fit that shall be on an SM, by `.maxntid` or `.reqntid` and
/// `.minnctapersm`. Each of an SM's four parts has 16,384 registers for its quarter of the warps.
fn registers_by_threads(entry: &ast::Function) -> Option<u32> {
    let threads = entry.tuning.reqntid.or(entry.tuning.maxntid)?.iter().product::<u32>().max(1);
    let warps = threads.div_ceil(Preset::WARP);
    let asked = entry.tuning.minnctapersm.unwrap_or(1).max(1);
    // More than fit is ignored.
    let ctas = if asked.saturating_mul(warps) > MOST_WARPS { 1 } else { asked };
    let a_part = (warps * ctas).div_ceil(4);
    Some((16_384 / 32 / a_part & !7).min(MOST_REGISTERS))
}

/// Warps that an SM holds.
const MOST_WARPS: u32 = 64;

fn resolve_alias(module: &ast::Module, f: usize) -> usize {
    module.aliases.iter().find(|(a, _)| a.index() == f).map_or(f, |(_, to)| to.index())
}

/// Places a function's local variables, parameters and results in its frame of local memory.
fn frame(function: &ast::Function) -> FunctionInfo {
    let mut info = FunctionInfo::default();
    let mut end = 0u32;
    let mut place = |bytes: u64, align: u32| {
        let at = end.next_multiple_of(align.max(4));
        end = at + (bytes as u32).next_multiple_of(4);
        (at, bytes as u32)
    };
    if !function.entry {
        info.params = function.params.iter().map(|v| place(v.bytes(), v.alignment())).collect();
        info.returns = function.returns.iter().map(|v| place(v.bytes(), v.alignment())).collect();
    }
    info.local_bytes = end.next_multiple_of(16);
    info
}

/// Where shared variables lie: of the module, and of functions by their number.
struct SharedLayout {
    shared: BTreeMap<VarId, u32>,
    locals: BTreeMap<(u32, LocalId), u32>,
    /// Bytes of the variables that have a size.
    declared: u32,
    /// Where dynamic shared memory begins: behind them, aligned.
    dynamic_start: u32,
}

/// Places the shared variables that the functions name; dynamic shared memory comes last.
fn lay_out_shared(program: &Program, functions: &[usize]) -> SharedLayout {
    let module = &program.ast;
    // The system's part is the same on every preset.
    const FIRST: u32 = 1024;
    let mut end = FIRST;
    let (mut shared, mut locals) = (BTreeMap::new(), BTreeMap::new());
    let mut dynamic: Vec<VarId> = Vec::new();
    let mut dynamic_locals = Vec::new();
    let mut place = |v: &ast::Variable| {
        let at = end.next_multiple_of(v.alignment());
        end = at + v.bytes() as u32;
        at
    };
    let is_shared = |s: Space| matches!(s, Space::Shared | Space::SharedCta | Space::SharedCluster);
    for (i, &f) in functions.iter().enumerate() {
        let body = module.functions[f].body.as_ref().expect("reachable functions have bodies");
        for (n, v) in body.variables.iter().enumerate().filter(|(_, v)| is_shared(v.space)) {
            let id = LocalId(n as u32);
            if v.bytes() == 0 {
                dynamic_locals.push((i as u32, id));
            } else {
                locals.insert((i as u32, id), place(v));
            }
        }
        for (_, ins) in body.instructions() {
            let mut visit = |symbol: &Symbol| {
                let Symbol::Variable(id) = *symbol else { return };
                let v = &module.variables[id.index()];
                if !is_shared(v.space) || shared.contains_key(&id) || dynamic.contains(&id) {
                    return;
                }
                if v.bytes() == 0 {
                    dynamic.push(id);
                } else {
                    shared.insert(id, place(v));
                }
            };
            ins.operands.iter().for_each(|o| symbols_in(o, &mut visit));
        }
    }
    let align = dynamic
        .iter()
        .map(|v| module.variables[v.index()].alignment())
        .max()
        .unwrap_or(16)
        .clamp(16, 1024);
    let start = end.next_multiple_of(align);
    shared.extend(dynamic.into_iter().map(|v| (v, start)));
    locals.extend(dynamic_locals.into_iter().map(|v| (v, start)));
    SharedLayout { shared, locals, declared: end - FIRST, dynamic_start: start - FIRST }
}

fn symbols_in(operand: &Operand, f: &mut impl FnMut(&Symbol)) {
    match operand {
        Operand::Symbol(s, _) => f(s),
        Operand::Address(Address { base: Base::Symbol(s), .. }) => f(s),
        Operand::Tensor(Address { base, .. }, list) => {
            if let Base::Symbol(s) = base {
                f(s);
            }
            list.iter().for_each(|o| symbols_in(o, f));
        }
        Operand::Vector(list) => list.iter().for_each(|o| symbols_in(o, f)),
        Operand::List(list) => list.iter().for_each(|o| symbols_in(o, f)),
        Operand::Pair(a, b) => {
            symbols_in(a, f);
            symbols_in(b, f);
        }
        _ => {}
    }
}

impl<'a> Lower<'a> {
    fn function_body(&mut self, body: &'a Body) -> Lowered {
        self.body = body;
        self.line = self.function.pos.line;
        self.cfg = Cfg::new(body, self.function.entry);
        self.registers = registers::allocate(body, &self.cfg);
        self.first_temp = [self.registers.slots, self.registers.wide_slots];
        self.most_temps = [0; 2];
        self.info = std::mem::take(&mut self.functions[self.index as usize]);
        self.info.start = self.ops.len() as u32;
        self.info.predicates = self.registers.predicates + 1;
        self.local.clear();
        for (i, v) in body.variables.iter().enumerate() {
            if matches!(v.space, Space::Local | Space::Param | Space::ParamFunc) {
                let at = self.info.local_bytes.next_multiple_of(v.alignment().max(4));
                self.local.insert(LocalId(i as u32), at);
                self.info.local_bytes = at + (v.bytes() as u32).next_multiple_of(4);
            }
        }
        self.info.local_bytes = self.info.local_bytes.next_multiple_of(16);
        // Calls inside this function need its frame.
        self.functions[self.index as usize] = self.info.clone();
        self.points = objects::points(body, &self.program.ast);
        self.body_has_wgmma = body.instructions().any(|(_, i)| i.op == Opcode::WgmmaMmaAsync);
        self.places = vec![0; body.statements.len() + 1];
        self.branches.clear();
        self.returns.clear();
        self.guard = (NO_GUARD, false);
        exec::control::load_register_params(self)?;
        let early = match self.body_has_wgmma {
            true => unfinished::statements(body, &self.cfg),
            false => Vec::new(),
        };
        for (i, statement) in body.statements.iter().enumerate() {
            self.places[i] = self.ops.len() as u32;
            let ins = match statement {
                Statement::Instruction(ins) => ins,
                Statement::Unsupported(unknown) => {
                    self.line = unknown.pos.line;
                    let word = unknown.text.split_whitespace().find(|w| !w.starts_with('@'));
                    let word = word.unwrap_or_default();
                    let help = unknown.reason.lines().find_map(|l| l.split_once("= help: "));
                    let help = help.map(|(_, h)| format!(" ({h})")).unwrap_or_default();
                    return unsupported(format!("the instruction {word}{help}"));
                }
                _ => continue,
            };
            self.statement = i;
            self.line = ins.pos.line;
            self.temps = [0; 2];
            if early.get(i).copied().unwrap_or(false) {
                self.guard = (NO_GUARD, false);
                exec::wgmma::finish(self);
            }
            self.guard = match ins.guard {
                Some(g) => (self.registers.slot[g.reg.index()], g.negated),
                None => (NO_GUARD, false),
            };
            self.note_communication(ins);
            let first = self.ops.len() as u32;
            exec::lower(self, ins)?;
            self.note_touched(ins, first);
        }
        self.places[body.statements.len()] = self.ops.len() as u32;
        self.guard = (NO_GUARD, false);
        let end = self.ops.len() as u32;
        exec::control::function_end(self);
        for (op, statement) in std::mem::take(&mut self.branches) {
            self.ops[op].x = self.places[statement];
            self.ops[op].imm = self.meet_of(self.ops[op].imm as usize, end);
        }
        for op in std::mem::take(&mut self.returns) {
            self.ops[op].x = end;
            self.ops[op].imm = self.meet_of(self.ops[op].imm as usize, end);
        }
        let info = &mut self.functions[self.index as usize];
        info.start = self.info.start;
        info.predicates = self.info.predicates;
        [info.slots, info.wide_slots] = [0, 1].map(|i| self.first_temp[i] + self.most_temps[i]);
        let most = info.slots.max(info.wide_slots);
        if most >= u32::from(WIDE) {
            return unsupported(format!("{most} live registers"));
        }
        Ok(())
    }

    /// Where the sides of a branch in this statement meet.
    fn meet_of(&self, statement: usize, end: u32) -> u64 {
        let block = self.cfg.block_of[statement];
        match self.cfg.meet[block] {
            Some(meet) => u64::from(self.places[self.cfg.blocks[meet].start]),
            None if self.cfg.reaches_end[block] && !self.function.entry => u64::from(end),
            None => u64::MAX,
        }
    }

    /// Remembers which registers an instruction touches once wgmmas may be in flight.
    fn note_touched(&mut self, ins: &Instruction, first: u32) {
        if !self.body_has_wgmma || ins.op == Opcode::WgmmaMmaAsync {
            return;
        }
        let (defs, uses) = registers::effects(ins);
        let names = |list: &[ast::RegId]| -> Vec<u32> {
            let values = list.iter().filter(|&&r| registers::width(self.type_of(r)) > 0);
            values.map(|r| self.first_name + r.index() as u32).collect()
        };
        // A move without a guard only gives a register another name.
        let copies = ins.op == Opcode::Mov && ins.guard.is_none();
        let touch = Touch { written: names(&defs), read: names(&uses), copies };
        if !touch.written.is_empty() || !touch.read.is_empty() {
            self.touched.insert(first, touch);
        }
    }

    /// The registers of an operand as the sanitizers know them.
    pub fn names(&self, operand: &Operand) -> Vec<u32> {
        registers::names(operand).into_iter().map(|r| self.first_name + r).collect()
    }

    fn note_communication(&mut self, ins: &Instruction) {
        use Opcode::*;
        let global = |l: &Self| {
            let space = ins.mods.space();
            let scope = ins.mods.scope();
            let _ = l;
            matches!(space, None | Some(Space::Global | Space::Generic))
                && scope != Some(Scope::Cta)
        };
        let strong = !matches!(ins.mods.sem(), None | Some(Sem::Weak));
        self.communicates |= match ins.op {
            Atom | Red => global(self),
            Ld | St => strong && global(self),
            CpReduceAsyncBulk => ins.mods.spaces().next() == Some(Space::Global),
            CpReduceAsyncBulkTensor => true,
            MultimemLdReduce | MultimemSt | MultimemRed | MultimemCpAsyncBulk => true,
            _ => false,
        };
    }

    /// Emits a micro-operation on slots.
    pub fn emit(
        &mut self,
        class: Class,
        run: OpFn,
        d: Reg,
        a: Reg,
        b: Reg,
        c: Reg,
    ) -> &mut MicroOp {
        let (guard, negated) = self.guard;
        self.ops.push(MicroOp {
            run,
            d,
            a,
            b,
            c,
            guard,
            negated,
            control: false,
            class,
            x: 0,
            imm: 0,
            line: self.line,
        });
        self.ops.last_mut().expect("just pushed")
    }

    /// Emits an operation with more operands than slots have room for.
    pub fn emit_action(
        &mut self,
        class: Class,
        action: impl Fn(&mut Cx<'_>) -> Step + Send + Sync + 'static,
    ) -> &mut MicroOp {
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            let code = &*cx.grid.code;
            code.actions[op.x as usize](cx)
        }
        let x = self.actions.len() as u32;
        self.actions.push(Box::new(action));
        let op = self.emit(class, run, 0, 0, 0, 0);
        op.x = x;
        op
    }

    /// Remembers that the coming operation is approximate.
    pub fn approximate(&mut self, ins: &Instruction) {
        self.approximate.push((self.ops.len() as u32, mnemonic(ins)));
    }

    /// Remembers that the coming operation is tensor-core work.
    pub fn tensor_core(&mut self, name: String, flops: u64) {
        self.tensor_core.push((self.ops.len() as u32, name, flops));
    }

    /// The current operation branches to this statement.
    pub fn branch_to(&mut self, statement: usize) {
        let at = self.ops.len() - 1;
        self.ops[at].imm = self.statement as u64;
        self.branches.push((at, statement));
    }

    /// The current operation branches to the function's end.
    pub fn branch_to_end(&mut self) {
        let at = self.ops.len() - 1;
        self.ops[at].imm = self.statement as u64;
        self.returns.push(at);
    }

    /// Index of the lowered function for one of the module's.
    pub fn callee(&self, f: usize) -> Option<u32> {
        self.function_of.get(&(resolve_alias(&self.program.ast, f) as u32)).copied()
    }

    /// Index of the function that is being lowered.
    pub fn callee_index(&self) -> u32 {
        self.index
    }

    /// Frame of a lowered function.
    pub fn frame_of(&self, callee: u32) -> &FunctionInfo {
        &self.functions[callee as usize]
    }

    /// A slot for the time of this instruction.
    pub fn temp(&mut self, wide: bool) -> Reg {
        let file = usize::from(wide);
        let at = self.first_temp[file] + self.temps[file];
        self.temps[file] += 1;
        self.most_temps[file] = self.most_temps[file].max(self.temps[file]);
        at as Reg | if wide { WIDE } else { 0 }
    }

    /// A constant of 32 or 64 bits.
    pub fn constant(&mut self, bits: u64, wide: bool) -> Reg {
        let bits = if wide { bits } else { bits & 0xffff_ffff };
        self.intern(Constant::Bits { bits, wide }, wide)
    }

    fn intern(&mut self, constant: Constant, wide: bool) -> Reg {
        if let Some(&at) = self.constant_index.get(&constant) {
            return at;
        }
        let next = &mut self.constant_slots[usize::from(wide)];
        let at = *next | CONSTANT | if wide { WIDE } else { 0 };
        *next += 1;
        assert!(*next < WIDE, "fewer than 16384 constants of a width");
        self.constants.push(constant);
        self.constant_index.insert(constant, at);
        at
    }

    /// Type of a register.
    pub fn type_of(&self, r: ast::RegId) -> Type {
        self.body.registers[r.index()].ty
    }

    /// Slot or predicate number of a register.
    pub fn reg(&self, r: ast::RegId) -> Reg {
        self.registers.slot[r.index()]
    }

    /// Whether an operand is a 64-bit register.
    pub fn is_wide(&self, operand: &Operand) -> bool {
        matches!(operand, Operand::Reg(r) if self.type_of(*r).bits() == 64)
    }

    /// A source operand of type `ty`.
    pub fn src(&mut self, operand: &Operand, ty: Type) -> Lowered<Reg> {
        let wide = ty.bits() > 32;
        match operand {
            Operand::Reg(r) if self.type_of(*r) == Type::Pred => {
                unsupported("a predicate where a value is expected")
            }
            Operand::Reg(r) => {
                let has = self.type_of(*r).bits() > 32;
                if wide && !has {
                    // A narrow register where a wide one is asked: zero-extended.
                    let (a, d) = (self.reg(*r), self.temp(true));
                    self.emit(Class::Move, exec::mov::WIDEN, d, a, 0, 0);
                    return Ok(d);
                }
                // The low half of a wide register where a narrow one is asked.
                if !wide && has {
                    let (a, d) = (self.reg(*r), self.temp(false));
                    self.emit(Class::Move, exec::mov::NARROW, d, a, 0, 0);
                    return Ok(d);
                }
                Ok(self.reg(*r))
            }
            _ if ty.bits() > 64 => unsupported("128 bits from what is no register"),
            Operand::Imm(imm) => Ok(self.constant(imm_bits(*imm, ty), wide)),
            Operand::Special(special) => {
                let d = self.temp(wide);
                exec::special::lower(self, *special, d, wide)?;
                Ok(d)
            }
            Operand::Symbol(symbol, addend) => self.symbol(*symbol, *addend, wide),
            other => unsupported(format!("operand {other:?}")),
        }
    }

    /// The address of a symbol as a value.
    pub fn symbol(&mut self, symbol: Symbol, addend: i64, wide: bool) -> Lowered<Reg> {
        if let Some(offset) = self.shared_offset(symbol) {
            let d = self.temp(wide);
            let bits = i64::from(offset).wrapping_add(addend) as u64;
            exec::mov::shared_address(self, d, bits, wide);
            return Ok(d);
        }
        match symbol {
            Symbol::Variable(_) | Symbol::Function(_) => {
                let symbol = match symbol {
                    Symbol::Function(f) => {
                        let f = resolve_alias(&self.program.ast, f.index());
                        Symbol::Function(ast::FuncId(f as u32))
                    }
                    other => other,
                };
                Ok(self.intern(Constant::Symbol { symbol, addend, wide }, wide))
            }
            Symbol::Local(_) | Symbol::Return(_) => {
                let offset = self.frame_offset(symbol)?;
                let d = self.temp(wide);
                let bits = i64::from(offset).wrapping_add(addend) as u64;
                exec::mov::local_address(self, d, bits, wide);
                Ok(d)
            }
            Symbol::Param(i) if self.function.entry => {
                let offset = self.entry_param(i)?;
                Ok(self.constant((offset as i64).wrapping_add(addend) as u64, wide))
            }
            Symbol::Param(_) => {
                let offset = self.frame_offset(symbol)?;
                let d = self.temp(wide);
                let bits = i64::from(offset).wrapping_add(addend) as u64;
                exec::mov::local_address(self, d, bits, wide);
                Ok(d)
            }
        }
    }

    /// Offset of a shared variable in the CTA's shared memory.
    pub fn shared_offset(&self, symbol: Symbol) -> Option<u32> {
        match symbol {
            Symbol::Variable(v) => self.shared.get(&v).copied(),
            Symbol::Local(v) => self.shared_local.get(&(self.index, v)).copied(),
            _ => None,
        }
    }

    /// Offset of a local variable, parameter or result in the function's frame.
    pub fn frame_offset(&self, symbol: Symbol) -> Lowered<u32> {
        let found = match symbol {
            Symbol::Local(v) => self.local.get(&v).copied(),
            Symbol::Param(i) => self.info.params.get(i as usize).map(|p| p.0),
            Symbol::Return(i) => self.info.returns.get(i as usize).map(|p| p.0),
            _ => None,
        };
        found.ok_or_else(|| Why(format!("{symbol:?} in local memory")))
    }

    /// Offset of a kernel parameter.
    pub fn entry_param(&self, i: u32) -> Lowered<u32> {
        let mut offset = 0u32;
        for (n, p) in self.function.params.iter().enumerate() {
            offset = offset.next_multiple_of(p.alignment());
            if n == i as usize {
                return Ok(offset);
            }
            offset += p.bytes() as u32;
        }
        unsupported(format!("kernel parameter {i}"))
    }

    /// A destination register.
    pub fn dst(&mut self, operand: &Operand) -> Lowered<Reg> {
        match operand {
            Operand::Reg(r) => Ok(self.reg(*r)),
            Operand::Sink => Ok(SINK),
            other => unsupported(format!("destination {other:?}")),
        }
    }

    /// Bits of a destination register; what goes to `_` is as wide as the instruction says.
    pub fn dst_bits(&self, operand: &Operand, otherwise: u32) -> u32 {
        match operand {
            Operand::Reg(r) => self.type_of(*r).bits(),
            _ => otherwise,
        }
    }

    /// A destination predicate.
    pub fn dst_pred(&self, operand: &Operand) -> Lowered<Reg> {
        match operand {
            Operand::Reg(r) if self.type_of(*r) == Type::Pred => Ok(self.reg(*r)),
            Operand::Sink => Ok(PRED_SINK),
            other => unsupported(format!("predicate destination {other:?}")),
        }
    }

    /// A source predicate, and whether it is negated.
    pub fn pred(&self, operand: &Operand) -> Lowered<(Reg, bool)> {
        match operand {
            Operand::Reg(r) => Ok((self.reg(*r), false)),
            Operand::Not(r) => Ok((self.reg(*r), true)),
            Operand::Imm(imm) => {
                let yes = imm.bits(Type::B64) != 0;
                Ok((if yes { PRED_TRUE } else { PRED_FALSE }, false))
            }
            other => unsupported(format!("predicate {other:?}")),
        }
    }

    /// An address operand in (not generic) space `space`; symbols resolve by their own space.
    pub fn addr(&mut self, operand: &Operand) -> Lowered<Addr> {
        match operand {
            Operand::Address(a) => self.address(a),
            other => unsupported(format!("address {other:?}")),
        }
    }

    /// As [`Self::addr`], of the address alone.
    pub fn address(&mut self, a: &Address) -> Lowered<Addr> {
        let offset = a.offset;
        match a.base {
            Base::Reg(r) => {
                let bits = self.type_of(r).bits();
                let wide = match bits {
                    32 | 64 => bits == 64,
                    _ => return unsupported(format!("an address in a register of {bits} bits")),
                };
                let object = match self.points.get(r.index()) {
                    Some(Points::To(symbol)) => self.object(*symbol),
                    _ => None,
                };
                Ok(Addr { reg: self.reg(r), wide, offset, own_shared: false, object })
            }
            Base::Absolute => {
                let reg = self.constant(0, true);
                Ok(Addr { reg, wide: true, offset, own_shared: false, object: None })
            }
            Base::Symbol(symbol) => {
                let object = self.object(symbol);
                if let Some(at) = self.shared_offset(symbol) {
                    let reg = self.constant(u64::from(at), true);
                    return Ok(Addr { reg, wide: true, offset, own_shared: true, object });
                }
                let reg = self.symbol(symbol, 0, true)?;
                Ok(Addr { reg, wide: true, offset, own_shared: false, object })
            }
        }
    }

    /// Index of the variable in shared or local memory behind a symbol, if it has a size.
    fn object(&mut self, symbol: Symbol) -> Option<u16> {
        let variable = match symbol {
            Symbol::Variable(v) => &self.program.ast.variables[v.index()],
            Symbol::Local(v) => &self.body.variables[v.index()],
            _ => return None,
        };
        let (start, local) = match self.shared_offset(symbol) {
            Some(start) => (start, false),
            None if variable.space == Space::Local => (self.frame_offset(symbol).ok()?, true),
            None => return None,
        };
        let bytes = variable.bytes() as u32;
        if bytes == 0 {
            return None;
        }
        let object = Object { name: variable.name.clone(), start, bytes, local };
        let known = self.objects.iter().position(|o| *o == object);
        let at = known.unwrap_or_else(|| {
            self.objects.push(object);
            self.objects.len() - 1
        });
        u16::try_from(at).ok()
    }

    /// The literal value of an operand.
    pub fn literal(&self, operand: &Operand) -> Option<u64> {
        if let Operand::Imm(imm) = operand { Some(imm.bits(Type::B64)) } else { None }
    }
}

/// Bits of a literal as an operand of `ty`; a literal in a half-precision instruction may be
/// written as single.
fn imm_bits(imm: ast::Imm, ty: Type) -> u64 {
    imm.bits(ty)
}

/// The mnemonic with its suffixes.
pub fn mnemonic(ins: &Instruction) -> String {
    format!("{}{}", ins.op.text(), ins.mods)
}
