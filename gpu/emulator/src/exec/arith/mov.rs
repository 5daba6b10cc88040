//! Moves, packing and unpacking, prmt, and conversions between address spaces.

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Space, Type};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Where, window};
use crate::machine::alu::{self, bin, un};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, MicroOp, OpFn, Step};
use crate::machine::registers::LANES;
use crate::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};

fn copy32(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
    alu::unary::<u32, u32, _>(cx, op, |a| a)
}

fn copy64(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
    alu::unary::<u64, u64, _>(cx, op, |a| a)
}

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Mov => mov(l, ins),
        Opcode::Prmt => prmt(l, ins),
        Opcode::Cvta => cvta(l, ins),
        Opcode::Isspacep => isspacep(l, ins),
        Opcode::Mapa | Opcode::Getctarank => mapa(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

fn mov(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let [to, from] = &ins.operands[..] else { return unsupported(mnemonic(ins)) };
    if let (Type::Pred, Operand::Special(_)) = (ty, from) {
        // %is_explicit_cluster, the only special predicate.
        let d = l.dst_pred(to)?;
        l.emit_action(Class::Move, move |cx| {
            let value = if cx.grid.cluster == [1; 3] { 0 } else { !0 };
            cx.set_pred(d, value);
            Step::Next
        });
        return Ok(());
    }
    if ty == Type::Pred {
        let d = l.dst_pred(to)?;
        let (p, negated) = l.pred(from)?;
        l.emit_action(Class::Move, move |cx| {
            let value = cx.pred(p) ^ if negated { !0 } else { 0 };
            cx.set_pred(d, value);
            Step::Next
        });
        return Ok(());
    }
    match (to, from) {
        (Operand::Vector(parts), Operand::Vector(from)) => {
            // Vector to vector, element by element, through copies.
            let mut moves = Vec::new();
            for (to, from) in parts.iter().zip(from) {
                // `mov.b64` of a whole vector has the width of two elements.
                let wide = l.dst_bits(to, ty.bits()) > 32;
                let element = if wide { Type::B64 } else { Type::B32 };
                moves.push((l.dst(to)?, l.src(from, element)?, wide));
            }
            l.emit_action(Class::Move, move |cx| {
                let values: Vec<[u64; LANES]> =
                    moves.iter().map(|&(_, a, wide)| lane::read(cx, a, wide)).collect();
                for (&(d, _, wide), v) in moves.iter().zip(values) {
                    lane::write(cx, d, wide, v);
                }
                Step::Next
            });
            Ok(())
        }
        (Operand::Vector(parts), from) => unpack(l, parts, from, ty),
        (to, Operand::Vector(parts)) => pack(l, to, parts, ty),
        (to, from) if ty.bits() == 128 => {
            let (d, a) = (l.dst(to)?, l.src(from, ty)?);
            l.emit(Class::Move, copy64, d, a, 0, 0);
            l.emit(Class::Move, copy64, d + 1, a + 1, 0, 0);
            Ok(())
        }
        (to, Operand::Special(special)) => {
            let d = l.dst(to)?;
            let wide = l.dst_bits(to, ty.bits()) == 64;
            l.special(*special, d, wide)
        }
        (to, from) => {
            let a = l.src(from, ty)?;
            let d = l.dst(to)?;
            let run = if ty.bits() == 64 { copy64 } else { copy32 };
            l.emit(Class::Move, run, d, a, 0, 0);
            Ok(())
        }
    }
}

fn unpack(l: &mut Lower<'_>, parts: &[Operand], from: &Operand, ty: Type) -> Lowered {
    let a = l.src(from, ty)?;
    let width = ty.bits() / parts.len() as u32;
    let mut to = Vec::new();
    for part in parts {
        let sink = matches!(part, Operand::Sink);
        to.push(if sink { None } else { Some(l.dst(part)?) });
    }
    if let ([Some(lo), Some(hi)], 32) = (&to[..], ty.bits()) {
        fn run(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
            let a = u32::read(cx, op.a);
            u32::write(cx, op.d, a.map(|v| v & 0xffff));
            u32::write(cx, op.b, a.map(|v| v >> 16));
            Step::Next
        }
        l.emit(Class::Move, run, *lo, a, *hi, 0);
        return Ok(());
    }
    let bits = ty.bits();
    l.emit_action(Class::Move, move |cx| {
        let low = lane::read(cx, a, bits >= 64);
        let high = if bits == 128 { lane::read(cx, a + 1, true) } else { [0; LANES] };
        for (i, d) in to.iter().enumerate() {
            let Some(d) = *d else { continue };
            let shift = i as u32 * width;
            let mask = if width >= 64 { !0 } else { (1u64 << width) - 1 };
            let word = if shift >= 64 { &high } else { &low };
            lane::write(cx, d, width == 64, word.map(|v| v >> (shift % 64) & mask));
        }
        Step::Next
    });
    Ok(())
}

fn pack(l: &mut Lower<'_>, to: &Operand, parts: &[Operand], ty: Type) -> Lowered {
    let width = ty.bits() / parts.len() as u32;
    let part_ty = match width {
        8 => Type::B8,
        16 => Type::B16,
        32 => Type::B32,
        _ => Type::B64,
    };
    let mut from = Vec::new();
    for part in parts {
        from.push(l.src(part, part_ty)?);
    }
    let d = l.dst(to)?;
    if let ([lo, hi], 32) = (&from[..], ty.bits()) {
        let run = bin!(u32, u32 => u32, |lo, hi| lo & 0xffff | hi << 16);
        l.emit(Class::Move, run, d, *lo, *hi, 0);
        return Ok(());
    }
    let bits = ty.bits();
    l.emit_action(Class::Move, move |cx| {
        let mut words = [[0u64; LANES]; 2];
        for (i, &a) in from.iter().enumerate() {
            let shift = i as u32 * width;
            let mask = if width >= 64 { !0 } else { (1u64 << width) - 1 };
            let value = lane::read(cx, a, width == 64);
            let word = &mut words[(shift / 64) as usize];
            for lane in 0..LANES {
                word[lane] |= (value[lane] & mask) << (shift % 64);
            }
        }
        lane::write(cx, d, bits >= 64, words[0]);
        if bits == 128 {
            lane::write(cx, d + 1, true, words[1]);
        }
        Step::Next
    });
    Ok(())
}

fn prmt(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let [a, b, c] = [
        l.src(&ins.operands[1], Type::B32)?,
        l.src(&ins.operands[2], Type::B32)?,
        l.src(&ins.operands[3], Type::B32)?,
    ];
    let d = l.dst(&ins.operands[0])?;
    let mode = ins.mods.flags().next();
    l.emit_action(Class::Alu, move |cx| {
        let (x, y, z) = (u32::read(cx, a), u32::read(cx, b), u32::read(cx, c));
        let out = std::array::from_fn(|i| permute(x[i], y[i], z[i], mode));
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

fn permute(a: u32, b: u32, c: u32, mode: Option<Flag>) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let s = c & 3;
    // Selectors of the special modes (PTX ISA, "prmt", tables of modes).
    let selectors: [u32; 4] = match mode {
        None => [c & 15, c >> 4 & 15, c >> 8 & 15, c >> 12 & 15],
        Some(Flag::F4e) => [s, s + 1, s + 2, s + 3],
        Some(Flag::B4e) => [s, (s + 7) & 7, (s + 6) & 7, (s + 5) & 7],
        Some(Flag::Rc8) => [s; 4],
        Some(Flag::Ecl) => [s, s.max(1), s.max(2), 3],
        Some(Flag::Ecr) => [0, s.min(1), s.min(2), s],
        _ => {
            let h = if s & 1 != 0 { 2 } else { 0 };
            [h, h + 1, h, h + 1]
        }
    };
    let pick = |sel: u32| {
        let byte = bytes[(sel & 7) as usize];
        if sel & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte }
    };
    u32::from_le_bytes(selectors.map(pick))
}

/// The window that a space's addresses have in generic addressing.
fn base_of(space: Option<Space>) -> u64 {
    match space {
        Some(Space::Shared | Space::SharedCta | Space::SharedCluster) => SHARED_WINDOW,
        Some(Space::Local) => LOCAL_WINDOW,
        Some(Space::Param | Space::ParamEntry) => PARAM_WINDOW,
        _ => 0,
    }
}

fn cvta(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::U64);
    let to = ins.mods.has(Flag::To);
    let base = base_of(ins.mods.space());
    let wide = ty.bits() == 64;
    let a = l.src(&ins.operands[1], ty)?;
    let d = l.dst(&ins.operands[0])?;
    if base == 0 || !wide {
        l.emit(Class::Move, if wide { copy64 } else { copy32 }, d, a, 0, 0);
        return Ok(());
    }
    let base = l.constant(base, true);
    let run = if to {
        bin!(u64, u64 => u64, |a, b| a.wrapping_sub(b))
    } else {
        bin!(u64, u64 => u64, |a, b| a.wrapping_add(b))
    };
    l.emit(Class::Move, run, d, a, base, 0);
    Ok(())
}

fn isspacep(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let wide = l.is_wide(&ins.operands[1]);
    let a = l.src(&ins.operands[1], if wide { Type::U64 } else { Type::U32 })?;
    let p = l.dst_pred(&ins.operands[0])?;
    let space = ins.mods.space();
    l.emit_action(Class::Alu, move |cx| {
        let addresses = lane::read(cx, a, wide);
        let mut mask = 0;
        for (i, &address) in addresses.iter().enumerate() {
            let place = window(address).0;
            let yes = match space {
                Some(Space::SharedCta | Space::Shared) => {
                    let own = u64::from(cx.rank()) << 24;
                    place == Where::Shared && (address - SHARED_WINDOW) & !0xff_ffff == own
                }
                Some(Space::SharedCluster) => place == Where::Shared,
                Some(Space::Local) => place == Where::Local,
                Some(Space::Param | Space::ParamEntry) => place == Where::Param,
                Some(Space::Const) => false,
                _ => place == Where::Global && address > WINDOW_BYTES,
            };
            mask |= u32::from(yes) << i;
        }
        cx.set_pred(p, mask);
        Step::Next
    });
    Ok(())
}

/// mapa: the same offset in another CTA of the cluster. getctarank: whose it is.
fn mapa(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::U64);
    let a = l.src(&ins.operands[1], ty)?;
    let wide = ty.bits() == 64;
    let d = l.dst(&ins.operands[0])?;
    if ins.op == Opcode::Getctarank {
        let run = if wide {
            un!(u64 => u32, |a| (a >> 24) as u32 & 0xff)
        } else {
            un!(u32 => u32, |a| a >> 24 & 0xff)
        };
        l.emit(Class::Move, run, d, a, 0, 0);
        return Ok(());
    }
    let b = l.src(&ins.operands[2], Type::U32)?;
    let run = if wide {
        bin!(u64, u32 => u64, |a, b| a & !0xff00_0000 | u64::from(b) << 24)
    } else {
        bin!(u32, u32 => u32, |a, b| a & 0xff_ffff | b << 24)
    };
    l.emit(Class::Move, run, d, a, b, 0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations() {
        let (a, b) = (0x3322_1100, 0x7766_5584);
        assert_eq!(permute(a, b, 0x7531, None), 0x7755_3311);
        assert_eq!(permute(a, b, 0xc, None), 0xff);
        assert_eq!(permute(a, b, 1, Some(Flag::F4e)), 0x8433_2211);
        assert_eq!(permute(a, b, 1, Some(Flag::B4e)), 0x6677_0011);
        assert_eq!(permute(a, b, 2, Some(Flag::Rc8)), 0x2222_2222);
        assert_eq!(permute(a, b, 1, Some(Flag::Rc16)), 0x3322_3322);
    }
}
