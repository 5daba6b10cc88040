//! The state of lowering one entry, and what the files of [`crate::exec`] build with: operands as
//! slots, constants of the launch, addresses, temporaries, micro-operations.

use std::collections::{BTreeMap, HashMap};

use fathom_ptx::ast::{
    self, Address, Base, Body, Instruction, LocalId, Operand, Special, SpecialReg, Symbol, VarId,
};
use fathom_ptx::types::{Space, Type};

use super::cfg::Cfg;
use super::objects::Points;
use super::registers::{self, Registers};
use crate::machine::access::Addr;
use crate::machine::cx::{Cx, PRED_FALSE, PRED_SINK, PRED_TRUE};
use crate::machine::layout::{Constant, FunctionInfo, Object, Touch};
use crate::machine::op::{Action, Class, MicroOp, NO_GUARD, OpFn, Step};
use crate::machine::registers::{CONSTANT, Reg, SINK, WIDE};
use crate::machine::wgmma::Operation;
use crate::machine::{alu, lane, special};
use crate::program::Program;

/// Why an instruction cannot be lowered.
#[derive(Debug)]
pub struct Why(pub String);

/// What lowering gives, or why the emulator cannot do this.
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
    pub(super) cfg: Cfg,
    pub(super) registers: Registers,
    pub ops: Vec<MicroOp>,
    pub(super) actions: Vec<Action>,
    pub wgmmas: Vec<Operation>,
    pub(super) constants: Vec<Constant>,
    pub(super) constant_index: HashMap<Constant, u16>,
    /// Constants so far in the file of narrow slots and of wide ones.
    pub(super) constant_slots: [u16; 2],
    pub info: FunctionInfo,
    pub(super) functions: Vec<FunctionInfo>,
    pub(super) function_of: BTreeMap<u32, u32>,
    /// Offsets of shared variables: module-scope, then function-scope of each function.
    pub(super) shared: BTreeMap<VarId, u32>,
    pub(super) shared_local: BTreeMap<(u32, LocalId), u32>,
    /// Function-scope variables in local memory: `.local` and `.param`.
    pub(super) local: BTreeMap<LocalId, u32>,
    pub(super) index: u32,
    pub(super) statement: usize,
    pub(super) guard: (u16, bool),
    pub(super) line: u32,
    /// Temporaries of the instruction, narrow and wide; the most so far; their first slots.
    pub(super) temps: [u32; 2],
    pub(super) most_temps: [u32; 2],
    pub(super) first_temp: [u32; 2],
    /// Operation index of each statement, for branch targets.
    pub(super) places: Vec<u32>,
    /// Branches to patch: (operation, target statement).
    pub(super) branches: Vec<(usize, usize)>,
    /// Operations that return: they go to the function's last operation.
    pub(super) returns: Vec<usize>,
    pub communicates: bool,
    pub uses_heap: bool,
    pub(super) touched: BTreeMap<u32, Touch>,
    /// Whether each register of the function is read anywhere in it.
    pub(super) read: Vec<bool>,
    /// Number of the function's first register among those of all functions.
    pub(super) first_name: u32,
    pub(super) objects: Vec<Object>,
    /// The variable that each register of the function points into.
    pub(super) points: Vec<Points>,
    pub(super) body_has_wgmma: bool,
    pub(super) approximate: Vec<(u32, String)>,
    pub(super) tensor_core: Vec<(u32, String, u64)>,
}

/// A 32-bit register into a 64-bit one, zero-extended.
const WIDEN: OpFn = |cx, op| alu::unary::<u32, u64, _>(cx, op, u64::from);

/// The low half of a 64-bit register.
const NARROW: OpFn = |cx, op| alu::unary::<u64, u32, _>(cx, op, |a| a as u32);

/// The function that a name stands for, in the end.
pub fn resolve_alias(module: &ast::Module, f: usize) -> usize {
    module.aliases.iter().find(|(a, _)| a.index() == f).map_or(f, |(_, to)| to.index())
}

impl<'a> Lower<'a> {
    /// At the start of an entry; `shared` are the offsets of shared variables, of the module and
    /// of functions.
    pub(super) fn new(
        program: &'a Program,
        entry: usize,
        body: &'a Body,
        function_of: BTreeMap<u32, u32>,
        (shared, shared_local): (BTreeMap<VarId, u32>, BTreeMap<(u32, LocalId), u32>),
    ) -> Lower<'a> {
        Lower {
            program,
            function: &program.ast.functions[entry],
            body,
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
            read: Vec::new(),
            first_name: 0,
            objects: Vec::new(),
            points: Vec::new(),
            body_has_wgmma: false,
            approximate: Vec::new(),
            tensor_core: Vec::new(),
        }
    }
}

impl Lower<'_> {
    /// The registers of an operand as the sanitizers know them.
    pub fn names(&self, operand: &Operand) -> Vec<u32> {
        registers::names(operand).into_iter().map(|r| self.first_name + r).collect()
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
            plain: 0,
            fmas: 0,
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

    /// The type that a register of this function is declared with.
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
                    self.emit(Class::Move, WIDEN, d, a, 0, 0);
                    return Ok(d);
                }
                // The low half of a wide register where a narrow one is asked.
                if !wide && has {
                    let (a, d) = (self.reg(*r), self.temp(false));
                    self.emit(Class::Move, NARROW, d, a, 0, 0);
                    return Ok(d);
                }
                Ok(self.reg(*r))
            }
            _ if ty.bits() > 64 => unsupported("128 bits from what is no register"),
            Operand::Imm(imm) => Ok(self.constant(imm.bits(ty), wide)),
            Operand::Special(special) => {
                let d = self.temp(wide);
                self.special(*special, d, wide)?;
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
            self.shared_address(d, bits, wide);
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
                self.local_address(d, bits, wide);
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
                self.local_address(d, bits, wide);
                Ok(d)
            }
        }
    }

    /// Emits `d = special register`.
    pub fn special(&mut self, special: SpecialReg, d: Reg, wide: bool) -> Lowered {
        let SpecialReg { kind, index, .. } = special;
        let element = special.lane.unwrap_or(0) as usize;
        if kind == Special::Pm || kind == Special::Pm64 {
            return unsupported("performance counters");
        }
        self.emit_action(Class::Move, move |cx| {
            let values = special::read(cx, kind, element, index);
            lane::write(cx, d, wide, values);
            Step::Next
        });
        Ok(())
    }

    /// Emits `d = address of a shared variable`, which depends on the CTA's rank.
    fn shared_address(&mut self, d: Reg, offset: u64, wide: bool) {
        self.emit_action(Class::Move, move |cx| {
            let value = offset + (u64::from(cx.rank()) << 24);
            lane::broadcast(cx, d, wide, value);
            Step::Next
        });
    }

    /// Emits `d = offset in local memory of something in the frame`.
    fn local_address(&mut self, d: Reg, offset: u64, wide: bool) {
        self.emit_action(Class::Move, move |cx| {
            let value = offset + u64::from(cx.local_base);
            lane::broadcast(cx, d, wide, value);
            Step::Next
        });
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

    /// Whether an operand is a register that some instruction of the function reads.
    pub fn is_read(&self, operand: &Operand) -> bool {
        matches!(operand, Operand::Reg(r) if self.read[r.index()])
    }

    /// The slot of a destination, for a value of any type but a predicate; `_` is [`SINK`].
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

    /// The number of a destination predicate; `_` is [`PRED_SINK`].
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

/// The mnemonic with its suffixes.
pub fn mnemonic(ins: &Instruction) -> String {
    format!("{}{}", ins.op.text(), ins.mods)
}
