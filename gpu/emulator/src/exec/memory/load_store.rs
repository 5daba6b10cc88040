//! Loads and stores, and the cache hints that change no value.

use fathom_ptx::ast::{Address, Base, Instruction, Operand, Symbol};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Sem, Space, Type};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Addr, Where, Words, advance};
use crate::machine::checks::global::Strength;
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Ld | Opcode::Ldu => load(l, ins),
        Opcode::St => store(l, ins),
        Opcode::Createpolicy => {
            // A policy is opaque and changes no value.
            let d = l.dst(&ins.operands[0])?;
            l.emit_action(Class::Misc, move |cx| {
                lane::broadcast(cx, d, true, 0);
                Step::Next
            });
            Ok(())
        }
        _ => {
            l.emit_action(Class::Misc, |_| Step::Next);
            Ok(())
        }
    }
}

/// The space that an access means, by its suffix and its base.
pub fn space_of(l: &Lower<'_>, space: Option<Space>, operand: &Operand) -> Where {
    match space {
        Some(Space::Global | Space::Const) => Where::Global,
        Some(Space::Shared | Space::SharedCta | Space::SharedCluster) => Where::Shared,
        Some(Space::Local) => Where::Local,
        Some(Space::Param | Space::ParamEntry | Space::ParamFunc) => match operand {
            Operand::Address(Address { base: Base::Symbol(Symbol::Param(_)), .. })
                if l.function.entry =>
            {
                Where::Param
            }
            Operand::Address(Address { base: Base::Symbol(_), .. }) => Where::Local,
            _ if l.function.entry => Where::Param,
            _ => Where::Local,
        },
        _ => Where::Generic,
    }
}

/// How strong a load or store is; atomics are relaxed where nothing is said.
pub fn strength(ins: &Instruction) -> Strength {
    match ins.mods.sem() {
        None | Some(Sem::Weak) => Strength::Weak,
        Some(Sem::Acquire) => Strength::Acquire,
        Some(Sem::Release) => Strength::Release,
        Some(Sem::AcqRel | Sem::Sc) => Strength::AcquireRelease,
        Some(Sem::Relaxed | Sem::Volatile | Sem::Mmio) => Strength::Relaxed,
    }
}

fn class(space: Where, write: bool) -> Class {
    match (space, write) {
        (Where::Global, false) => Class::LdGlobal,
        (Where::Global, true) => Class::StGlobal,
        (Where::Shared, false) => Class::LdShared,
        (Where::Shared, true) => Class::StShared,
        (Where::Local, _) => Class::Local,
        (Where::Param, _) => Class::LdParam,
        (Where::Generic, _) => Class::Generic,
    }
}

/// The elements of an operand: those of a vector, or itself.
pub(super) fn elements(operand: &Operand) -> &[Operand] {
    match operand {
        Operand::Vector(list) => list,
        one => std::slice::from_ref(one),
    }
}

/// A register that a load fills.
#[derive(Clone, Copy)]
pub(super) struct Target {
    reg: Reg,
    bits: u32,
}

fn load(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let space = space_of(l, ins.mods.space(), &ins.operands[1]);
    let strength = strength(ins);
    let addr = l.addr(&ins.operands[1])?;
    let mut targets = Vec::new();
    for operand in elements(&ins.operands[0]) {
        targets.push(target(l, operand, ty)?);
    }
    let bytes = ty.bytes() * targets.len() as u32;
    if bytes > 32 || !bytes.is_power_of_two() {
        return unsupported(mnemonic(ins));
    }
    if space == Where::Param {
        return load_param(l, ins, targets, ty);
    }
    let idle = idle_bytes(l, elements(&ins.operands[0]), ty.bytes());
    if let ([target], Type::B32 | Type::F32 | Type::U32 | Type::S32, 32) =
        (&targets[..], ty, targets[0].bits)
    {
        let d = target.reg;
        l.emit_action(class(space, false), move |cx| {
            let addresses = cx.addresses(addr);
            cx.within(addr, &addresses, 4);
            let mut out: Words = [[0; LANES]; 4];
            cx.strength = strength;
            let loaded = cx.load(space, &addresses, 4, &mut out);
            cx.strength = Strength::Weak;
            if let Err(step) = loaded {
                return step;
            }
            u32::write(cx, d, out[0]);
            Step::Next
        });
        return Ok(());
    }
    l.emit_action(class(space, false), move |cx| {
        let mut addresses = cx.addresses(addr);
        cx.within(addr, &addresses, u64::from(bytes));
        let (mut left, mut idle) = (&targets[..], idle);
        // What is longer than 16 bytes goes in two.
        let step = bytes.min(16);
        let chunk = targets.len() / (bytes / step) as usize;
        while !left.is_empty() {
            let mut out: Words = [[0; LANES]; 4];
            (cx.strength, cx.idle_bytes) = (strength, idle);
            let loaded = cx.load(space, &addresses, step, &mut out);
            (cx.strength, cx.idle_bytes) = (Strength::Weak, 0);
            if let Err(fault) = loaded {
                return fault;
            }
            for (k, target) in left[..chunk].iter().enumerate() {
                scatter(cx, *target, ty, &out, k);
            }
            (left, idle) = (&left[chunk..], idle >> step);
            advance(&mut addresses, step);
        }
        Step::Next
    });
    Ok(())
}

/// Bytes of a vector that are loaded with others, for a register that nothing reads: padding of a
/// structure, say. Of a load that nothing reads at all there are none.
fn idle_bytes(l: &Lower<'_>, elements: &[Operand], bytes: u32) -> u32 {
    let of = |k: usize| (!0u32 >> (32 - bytes)) << (k as u32 * bytes);
    let idle = elements.iter().enumerate().filter(|(_, o)| !l.is_read(o));
    let idle = idle.fold(0, |mask, (k, _)| mask | of(k));
    if elements.iter().any(|o| l.is_read(o)) { idle } else { 0 }
}

/// The register of an element of type `ty`.
pub(super) fn target(l: &mut Lower<'_>, operand: &Operand, ty: Type) -> Lowered<Target> {
    Ok(Target { reg: l.dst(operand)?, bits: l.dst_bits(operand, ty.bits()) })
}

/// Writes element `k` of what was loaded to its register.
pub(super) fn scatter(cx: &mut Cx<'_>, target: Target, ty: Type, words: &Words, k: usize) {
    let bits = ty.bits().max(8);
    let d = target.reg;
    match bits {
        32 if target.bits <= 32 => u32::write(cx, d, words[k]),
        128 => {
            let pair = |i: usize| -> [u64; LANES] {
                std::array::from_fn(|lane| {
                    u64::from(words[i + 1][lane]) << 32 | u64::from(words[i][lane])
                })
            };
            u64::write(cx, d, pair(0));
            u64::write(cx, d + 1, pair(2));
        }
        64 => {
            let (low, high) = (&words[2 * k], &words[2 * k + 1]);
            let value = |lane: usize| u64::from(high[lane]) << 32 | u64::from(low[lane]);
            u64::write(cx, d, std::array::from_fn(value));
        }
        _ => {
            let at = k as u32 * bits;
            let word = &words[(at / 32) as usize];
            let mask = (1u64 << bits) - 1;
            let shift = 64 - bits;
            let value = |lane: usize| {
                let v = u64::from(word[lane] >> (at % 32)) & mask;
                if ty.is_signed() { ((v << shift) as i64 >> shift) as u64 } else { v }
            };
            lane::write(cx, d, target.bits > 32, std::array::from_fn(value));
        }
    }
    if target.bits > 64 && bits < 128 {
        let low = i64::read(cx, d);
        let high = |lane: usize| if ty.is_signed() { low[lane] >> 63 } else { 0 };
        i64::write(cx, d + 1, std::array::from_fn(high));
    }
}

/// Kernel parameters are the same in every thread.
fn load_param(l: &mut Lower<'_>, ins: &Instruction, targets: Vec<Target>, ty: Type) -> Lowered {
    let Operand::Address(a) = &ins.operands[1] else { return unsupported(mnemonic(ins)) };
    let (Base::Symbol(Symbol::Param(i)), bytes) = (a.base, ty.bytes() as usize) else {
        let addr = l.addr(&ins.operands[1])?;
        return load_param_at(l, addr, targets, ty);
    };
    let start = i64::from(l.entry_param(i)?) + a.offset;
    l.emit_action(Class::LdParam, move |cx| {
        for (k, target) in targets.iter().enumerate() {
            let at = start as usize + k * bytes;
            let mut buffer = [0; 16];
            let range = cx.grid.config.params.get(at..at + bytes);
            let Some(range) = range else {
                let message = format!("parameters end before byte {}", at + bytes);
                return cx.fail(crate::Ub::OutOfBounds, None, Some(at as u64), message);
            };
            buffer[..bytes].copy_from_slice(range);
            let words: Words = std::array::from_fn(|w| {
                let word = buffer[4 * w..4 * w + 4].try_into().expect("4 bytes");
                [u32::from_le_bytes(word); LANES]
            });
            scatter(cx, *target, ty, &words, 0);
        }
        Step::Next
    });
    Ok(())
}

fn load_param_at(l: &mut Lower<'_>, addr: Addr, targets: Vec<Target>, ty: Type) -> Lowered {
    l.emit_action(Class::LdParam, move |cx| {
        let mut addresses = cx.addresses(addr);
        for target in &targets {
            let mut out: Words = [[0; LANES]; 4];
            if let Err(step) = cx.load(Where::Param, &addresses, ty.bytes(), &mut out) {
                return step;
            }
            scatter(cx, *target, ty, &out, 0);
            advance(&mut addresses, ty.bytes());
        }
        Step::Next
    });
    Ok(())
}

fn store(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let space = space_of(l, ins.mods.space(), &ins.operands[0]);
    let strength = strength(ins);
    let addr = l.addr(&ins.operands[0])?;
    let mut sources = Vec::new();
    for operand in elements(&ins.operands[1]) {
        sources.push(l.src(operand, ty)?);
    }
    let bytes = ty.bytes() * sources.len() as u32;
    if bytes > 32 || !bytes.is_power_of_two() {
        return unsupported(mnemonic(ins));
    }
    l.emit_action(class(space, true), move |cx| {
        let mut addresses = cx.addresses(addr);
        cx.within(addr, &addresses, u64::from(bytes));
        let step = bytes.min(16);
        let chunk = sources.len() / (bytes / step) as usize;
        for part in sources.chunks(chunk) {
            let words = gather(cx, part, ty);
            cx.strength = strength;
            let stored = cx.store(space, &addresses, step, &words);
            cx.strength = Strength::Weak;
            if let Err(fault) = stored {
                return fault;
            }
            advance(&mut addresses, step);
        }
        Step::Next
    });
    Ok(())
}

/// Packs registers into what is stored.
pub(super) fn gather(cx: &Cx<'_>, sources: &[Reg], ty: Type) -> Words {
    let mut words: Words = [[0; LANES]; 4];
    let bits = ty.bits().max(8);
    for (k, &reg) in sources.iter().enumerate() {
        match bits {
            32 => words[k] = u32::read(cx, reg),
            64 | 128 => {
                for half in 0..(bits / 64) as usize {
                    let value = u64::read(cx, reg + half as u16);
                    let [low, high] = &mut words[2 * (k + half)..][..2] else { unreachable!() };
                    for lane in 0..LANES {
                        low[lane] = value[lane] as u32;
                        high[lane] = (value[lane] >> 32) as u32;
                    }
                }
            }
            _ => {
                let at = k as u32 * bits;
                let value = u32::read(cx, reg);
                let mask = (1u32 << bits) - 1;
                let word = &mut words[(at / 32) as usize];
                for lane in 0..LANES {
                    word[lane] |= (value[lane] & mask) << (at % 32);
                }
            }
        }
    }
    words
}
