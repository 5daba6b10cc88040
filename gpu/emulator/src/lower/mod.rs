//! From syntax tree to micro-operations: an entry with every function that it may call.
//!
//! Registers get slots by liveness (`registers`), branches get the place where their sides meet
//! (`cfg`), variables get addresses, operands become slots: literals and addresses are constants
//! of the launch. What an instruction does is lowered by the file of its class in `crate::exec`.

pub mod builder;
pub mod cfg;
pub mod objects;
pub mod registers;
mod unfinished;
pub mod vectors;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use fathom_ptx::ast::{
    self, Address, Base, Body, Instruction, LocalId, Operand, Statement, Symbol, VarId,
};
use fathom_ptx::table::{Effect, Opcode};
use fathom_ptx::types::{Scope, Sem, Space};

use crate::error::{Ub, Unsupported};
use crate::exec;
use crate::exec::control::{branch, call};
use crate::exec::tensor::wgmma;
use crate::machine::layout::{FunctionInfo, Touch};
use crate::machine::op::{Class, NO_GUARD};
pub(crate) use crate::machine::op::{Code, Outline};
use crate::machine::plain;
use crate::machine::registers::WIDE;
use crate::preset::Preset;
use crate::program::Program;
use builder::{Lower, Lowered, resolve_alias, unsupported};
use cfg::Cfg;

/// Lowers an entry and what it may call.
///
/// # Errors
/// The first instruction at the beginning of the entry, or feature, that is not supported, with its
/// line. Instructions further on refuse who comes to them ([`Ub::NotEmulated`]).
pub(crate) fn lower(
    program: &Program,
    entry: usize,
    pressures: &[OnceLock<u32>],
) -> Result<Code, Unsupported> {
    let module = &program.ast;
    let reachable = reachable(program, entry);
    let outline = outline_of(program, entry, &reachable, pressures)?;
    let layout = lay_out_shared(program, &reachable);
    let (shared, shared_local) = (layout.shared, layout.locals);
    let function_of: BTreeMap<u32, u32> =
        reachable.iter().enumerate().map(|(i, &f)| (f as u32, i as u32)).collect();
    let empty = Body::default();
    let mut l = Lower::new(program, entry, &empty, function_of, (shared, shared_local));
    // Frames are laid out first: calls need the places of their callee's parameters.
    for &f in &reachable {
        l.functions.push(frame(&module.functions[f]));
    }
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
        l.first_name += body.registers.len() as u32;
    }
    Ok(Code {
        ops: l.ops,
        actions: l.actions,
        wgmmas: l.wgmmas,
        constants: l.constants,
        functions: l.functions,
        function_of: l.function_of,
        outline,
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

/// What is known of an entry, with the functions that it may call, before it is lowered: libraries
/// ask it of hundreds of kernels of which they launch few.
///
/// # Errors
/// Variables that no device has room for.
pub(crate) fn outline(
    program: &Program,
    entry: usize,
    pressures: &[OnceLock<u32>],
) -> Result<Outline, Unsupported> {
    outline_of(program, entry, &reachable(program, entry), pressures)
}

fn outline_of(
    program: &Program,
    entry: usize,
    reachable: &[usize],
    pressures: &[OnceLock<u32>],
) -> Result<Outline, Unsupported> {
    check_sizes(program, entry, reachable)?;
    let layout = lay_out_shared(program, reachable);
    let functions = &program.ast.functions;
    let pressure = |&f: &usize| {
        *pressures[f].get_or_init(|| {
            let body = functions[f].body.as_ref().expect("reachable functions have bodies");
            registers::allocate(body, &Cfg::new(body, functions[f].entry)).pressure
        })
    };
    // The registers of a thread are an estimate: the most that any one function has live.
    let pressure = reachable.iter().map(pressure).max().unwrap_or(0);
    let local_bytes = reachable.iter().map(|&f| {
        let body = functions[f].body.as_ref().expect("reachable functions have bodies");
        place_locals(body, frame(&functions[f]).local_bytes).1
    });
    Ok(Outline {
        declared_shared_bytes: layout.declared,
        static_shared_bytes: layout.dynamic_start,
        local_bytes: local_bytes.sum(),
        registers: (pressure + 8).min(most_registers(&functions[entry])),
    })
}

/// Where a function's variables lie in its frame of local memory, behind `from` bytes of
/// parameters and results, and the length of the frame.
fn place_locals(body: &Body, from: u32) -> (Vec<(LocalId, u32)>, u32) {
    let mut end = from;
    let mut places = Vec::new();
    for (i, v) in body.variables.iter().enumerate() {
        if matches!(v.space, Space::Local | Space::Param | Space::ParamFunc) {
            let at = end.next_multiple_of(v.alignment().max(4));
            places.push((LocalId(i as u32), at));
            end = at + (v.bytes() as u32).next_multiple_of(4);
        }
    }
    (places, end.next_multiple_of(16))
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
            // A kernel that is named is launched, not called.
            if module.functions[f].body.is_some()
                && !module.functions[f].entry
                && !list.contains(&f)
            {
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
    /// Lowers one function: its operations follow those of the functions before it.
    fn function_body(&mut self, body: &'a Body) -> Lowered {
        self.enter(body);
        call::load_register_params(self)?;
        let early =
            if self.body_has_wgmma { unfinished::statements(body, &self.cfg) } else { Vec::new() };
        for (i, statement) in body.statements.iter().enumerate() {
            self.places[i] = self.ops.len() as u32;
            let ins = match statement {
                Statement::Instruction(ins) => ins,
                Statement::Unsupported(unknown) => {
                    self.statement = i;
                    self.line = unknown.pos.line;
                    self.guard = self.guard_of(unknown.guard);
                    let first = self.ops.len();
                    self.put_off(not_in_the_table(unknown), first)?;
                    continue;
                }
                _ => continue,
            };
            self.statement = i;
            self.line = ins.pos.line;
            self.temps = [0; 2];
            if early.get(i).copied().unwrap_or(false) {
                // Whether or not the guard lets the instruction itself execute.
                self.guard = (NO_GUARD, false);
                wgmma::finish(self);
            }
            self.guard = self.guard_of(ins.guard);
            self.communicates |= communicates(ins);
            let first = self.ops.len() as u32;
            let lowered = exec::lower(self, ins);
            self.put_off(lowered, first as usize)?;
            self.note_touched(ins, first);
        }
        self.places[body.statements.len()] = self.ops.len() as u32;
        self.guard = (NO_GUARD, false);
        let end = self.ops.len() as u32;
        branch::function_end(self);
        self.patch_branches(end);
        let begins: Vec<u32> = self.cfg.blocks.iter().map(|b| self.places[b.start]).collect();
        plain::mark(&mut self.ops, self.info.start as usize, &begins);
        self.leave()
    }

    /// The slot of a guard's predicate, and whether it is negated.
    fn guard_of(&self, guard: Option<ast::Guard>) -> (u16, bool) {
        guard.map_or((NO_GUARD, false), |g| (self.registers.slot[g.reg.index()], g.negated))
    }

    /// An instruction that is not supported refuses an entry that begins with it. Behind a branch,
    /// and in functions that may be called, it stops who comes there: libraries have kernels for
    /// many purposes, of which a launch needs one.
    fn put_off(&mut self, lowered: Lowered, first: usize) -> Lowered {
        let Err(why) = lowered else { return Ok(()) };
        if self.index == 0 && self.cfg.block_of[self.statement] == 0 && self.guard.0 == NO_GUARD {
            return Err(why);
        }
        self.ops.truncate(first);
        self.branches.retain(|(at, _)| *at < first);
        self.approximate.retain(|(at, _)| *at < first as u32);
        self.tensor_core.retain(|(at, ..)| *at < first as u32);
        let message = format!("the emulator does not support {}", why.0);
        self.emit_action(Class::Control, move |cx| {
            let lane = cx.leader();
            cx.fail(Ub::NotEmulated, Some(lane), None, message.clone())
        });
        Ok(())
    }

    /// Sets up what belongs to one function: registers, local variables, places of statements.
    fn enter(&mut self, body: &'a Body) {
        self.body = body;
        self.line = self.function.pos.line;
        self.cfg = Cfg::new(body, self.function.entry);
        self.registers = registers::allocate(body, &self.cfg);
        self.read = registers::read(body);
        // Temporaries lie behind all registers: an instruction's operands outlive them.
        self.first_temp = [self.registers.slots, self.registers.wide_slots];
        self.most_temps = [0; 2];
        self.info = std::mem::take(&mut self.functions[self.index as usize]);
        self.info.start = self.ops.len() as u32;
        self.info.predicates = self.registers.predicates + 1;
        self.local.clear();
        let (places, end) = place_locals(body, self.info.local_bytes);
        self.local.extend(places);
        self.info.local_bytes = end;
        // Calls inside this function need its frame.
        self.functions[self.index as usize] = self.info.clone();
        self.points = objects::points(body, &self.program.ast);
        self.body_has_wgmma = body.instructions().any(|(_, i)| i.op.is_wgmma());
        self.places = vec![0; body.statements.len() + 1];
        self.branches.clear();
        self.returns.clear();
        self.guard = (NO_GUARD, false);
    }

    /// Gives branches their targets, which may stand behind them, so that only now all places are
    /// known. Until then [`MicroOp::imm`](crate::machine::op::MicroOp::imm) holds the statement.
    fn patch_branches(&mut self, end: u32) {
        for (op, statement) in std::mem::take(&mut self.branches) {
            self.ops[op].x = self.places[statement];
            self.ops[op].imm = self.meet_of(self.ops[op].imm as usize, end);
        }
        for op in std::mem::take(&mut self.returns) {
            self.ops[op].x = end;
            self.ops[op].imm = self.meet_of(self.ops[op].imm as usize, end);
        }
    }

    /// Writes down the size of the frame, which only the last instruction's temporaries settle.
    fn leave(&mut self) -> Lowered {
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

    /// The operation at which the sides of a branch in this statement meet, [`u64::MAX`] where
    /// they do not before they exit. Lanes that return from a device function meet at its end; in
    /// an entry nothing is there to be done together.
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
        if !self.body_has_wgmma || ins.op.is_wgmma() {
            return;
        }
        let (defs, uses) = registers::effects(ins);
        let names = |list: &[ast::RegId]| -> Vec<u32> {
            let values = list.iter().filter(|&&r| registers::width(self.type_of(r)) > 0);
            values.map(|r| self.first_name + r.index() as u32).collect()
        };
        // The sanitizer goes by the program's names, since a slot serves one register after
        // another. A move without a guard only gives a register another name.
        let copies = ins.op == Opcode::Mov && ins.guard.is_none();
        let touch = Touch { written: names(&defs), read: names(&uses), copies };
        if !touch.written.is_empty() || !touch.read.is_empty() {
            self.touched.insert(first, touch);
        }
    }
}

/// Whether CTAs of different clusters may notice each other by this instruction, so that their
/// order has to be the same in every run.
fn communicates(ins: &Instruction) -> bool {
    let global = matches!(ins.mods.space(), None | Some(Space::Global | Space::Generic));
    let beyond_cta = global && ins.mods.scope() != Some(Scope::Cta);
    match ins.op.effect() {
        Effect::Own | Effect::Jump => false,
        Effect::Access => beyond_cta && !matches!(ins.mods.sem(), None | Some(Sem::Weak)),
        Effect::Atomic => beyond_cta,
        Effect::Reduction => ins.mods.spaces().next() == Some(Space::Global),
        Effect::Multimem => true,
    }
}

/// Refuses an instruction that the table does not have, with the parser's suggestion.
fn not_in_the_table(unknown: &ast::Unsupported) -> Lowered {
    let word = unknown.text.split_whitespace().find(|w| !w.starts_with('@')).unwrap_or_default();
    let help = unknown.reason.lines().find_map(|l| l.split_once("= help: "));
    let help = help.map(|(_, h)| format!(" ({h})")).unwrap_or_default();
    unsupported(format!("the instruction {word}{help}"))
}
