//! Whether an operand fits a slot: kind, register type and width, literal, vector length.
//!
//! The rules are ptxas': a register fits an instruction's type of the same width where one of
//! both is untyped (`.b32`), both are integers, or both are the same float format; ld, st and cvt
//! also take wider registers.

use crate::ast::*;
use crate::table::{Length, Opcode, OperandKind, Slot, Want};
use crate::types::*;

/// Checks one operand.
///
/// # Errors
/// A message: what was expected, what was found.
pub(crate) fn operand(
    slot: &Slot,
    mods: &Modifiers,
    op: Opcode,
    operand: &Operand,
    body: &Body,
) -> Result<(), String> {
    if op == Opcode::Mov {
        return mov(slot, mods, operand, body);
    }
    if slot.name == "_" {
        return expect(matches!(operand, Operand::Sink), "`_`", operand, body);
    }
    match slot.kind {
        OperandKind::Address => {
            return expect(matches!(operand, Operand::Address(_)), "an address", operand, body);
        }
        OperandKind::Tensor => {
            return match operand {
                Operand::Tensor(_, list) => coordinates(op, list, mods, body),
                _ => expect(false, "`[object, {coordinates}]`", operand, body),
            };
        }
        OperandKind::Label => {
            let fits = matches!(operand, Operand::Label(_) | Operand::Table(_));
            return expect(fits, "a label", operand, body);
        }
        OperandKind::Imm => {
            return expect(matches!(operand, Operand::Imm(_)), "a literal", operand, body);
        }
        OperandKind::Pred => {
            let reg = match operand {
                Operand::Reg(r) | Operand::Not(r) => *r,
                Operand::Imm(Imm::Int(_) | Imm::Uint(_)) => return Ok(()),
                _ => return expect(false, "a predicate", operand, body),
            };
            let fits = body.registers[reg.index()].ty == Type::Pred;
            return expect(fits, "a predicate", operand, body);
        }
        OperandKind::Dst | OperandKind::Src => {}
    }
    match (operand, slot.pair) {
        (Operand::Pair(first, second), Some((want, _))) => {
            match &**first {
                vector @ Operand::Vector(_) => value(slot, mods, op, vector, body)?,
                one => element(op, slot, slot.want, mods, one, body)?,
            }
            element(op, slot, want, mods, second, body)
        }
        (_, Some((_, false))) => expect(false, "`d|p`", operand, body),
        _ => value(slot, mods, op, operand, body),
    }
}

/// The coordinates of a texture or surface: as many as its geometry has, a number of a layer first
/// where it has layers. Three of them come with a fourth that is not looked at.
fn coordinates(op: Opcode, list: &[Operand], mods: &Modifiers, body: &Body) -> Result<(), String> {
    use Opcode::{Suld, Sured, Sust, Tex, Tld4};
    if !matches!(op, Tex | Tld4 | Suld | Sust | Sured) {
        return Ok(());
    }
    let has = |flag| mods.has(flag);
    let layers = [Flag::A1d, Flag::A2d, Flag::Acube, Flag::A2dms].into_iter().any(has);
    let count = match () {
        () if has(Flag::Dim1) => 1,
        () if has(Flag::Dim2) || has(Flag::A1d) => 2,
        () => 4,
    };
    // A vector register stands for all its elements.
    let whole = match list {
        [Operand::Reg(r)] if body.registers[r.index()].vector > 1 => {
            Some(usize::from(body.registers[r.index()].vector))
        }
        _ => None,
    };
    let found = whole.unwrap_or(list.len());
    if found != count {
        return Err(format!("expected {count} coordinates, found {found}"));
    }
    let ty = match op {
        Tex => mods.ty(1).unwrap_or(Type::F32),
        Tld4 => Type::F32,
        _ => Type::S32,
    };
    for (i, operand) in list.iter().enumerate() {
        let ty = if layers && i == 0 { Type::U32 } else { ty };
        let fits = match operand {
            Operand::Reg(_) if whole.is_some() => true,
            Operand::Reg(r) | Operand::Component(r, _) => {
                compatible(body.registers[r.index()].ty, ty, 32, false)
            }
            Operand::Imm(imm) => literal(*imm, ty),
            _ => false,
        };
        expect(fits, &format!("a coordinate of type .{ty}"), operand, body)?;
    }
    Ok(())
}

/// A register, literal or vector.
fn value(
    slot: &Slot,
    mods: &Modifiers,
    op: Opcode,
    operand: &Operand,
    body: &Body,
) -> Result<(), String> {
    let want = match (slot.length, slot.want) {
        // A thread holds two halves of a matrix in one register.
        (Length::Fragment(_), Want::Nth(i)) if mods.ty(usize::from(i)) == Some(Type::F16) => {
            Want::Exactly(Type::B32)
        }
        (_, want) => want,
    };
    let count = length(slot, mods);
    match operand {
        Operand::Vector(list) => {
            let fits = match count {
                Some(n) => list.len() == n && slot.length != Length::Scalar,
                None => true,
            };
            if !fits {
                let n = count.unwrap_or(1);
                return Err(format!("expected {n} elements, found {}", list.len()));
            }
            list.iter().try_for_each(|e| element(op, slot, want, mods, e, body))
        }
        // A vector register stands for all its elements.
        Operand::Reg(r) if body.registers[r.index()].vector > 1 => {
            let register = &body.registers[r.index()];
            if count.is_none_or(|n| n == usize::from(register.vector)) {
                Ok(())
            } else {
                Err(format!(
                    "expected {} elements, found a .v{}",
                    count.unwrap_or(1),
                    register.vector
                ))
            }
        }
        _ if count.is_some_and(|n| n != 1) || braces(slot.length) => {
            let n = count.unwrap_or(1);
            expect(false, &format!("a vector of {n} elements"), operand, body)
        }
        Operand::Sink if !sink_allowed(op) => expect(false, "a register", operand, body),
        _ => element(op, slot, want, mods, operand, body),
    }
}

/// Whether even one element stands in braces.
fn braces(length: Length) -> bool {
    matches!(length, Length::Fragment(_) | Length::Num)
}

/// How many elements; `None` where any number will do.
fn length(slot: &Slot, mods: &Modifiers) -> Option<usize> {
    match slot.length {
        Length::Scalar => Some(1),
        Length::Exactly(n) => Some(usize::from(n)),
        Length::Vec => Some(usize::from(mods.vec())),
        Length::Num => {
            let times = if mods.has(Flag::X4) { 4 } else { 1 + usize::from(mods.has(Flag::X2)) };
            Some(if mods.has(Flag::M16n16) { 2 * times } else { times })
        }
        Length::Fragment(matrix) => fragment(matrix, mods),
        Length::Any => None,
    }
}

/// Registers that one thread holds of matrix `a`, `b`, `c` or `d`.
fn fragment(matrix: u8, mods: &Modifiers) -> Option<usize> {
    let shape = mods.shape()?;
    let types: Vec<Type> = mods.types().collect();
    // mma names the types of D, A, B, C; wgmma those of D, A, B.
    let (d, a, b) = (*types.first()?, *types.get(1)?, *types.get(2)?);
    let c = types.get(3).copied().unwrap_or(d);
    let (m, n, k) = (usize::from(shape.m), usize::from(shape.n), usize::from(shape.k));
    let (elements, ty) = match matrix {
        b'a' => (m * k, a),
        b'b' => (n * k, b),
        b'c' => (m * n, c),
        _ => (m * n, d),
    };
    // A warpgroup has 128 threads, and only its D is here; m8n8k4 in f16 works on quads of lanes.
    let threads = match (shape.m, shape.k) {
        (64, _) => 128,
        (8, 4) if a == Type::F16 => 8,
        _ => 32,
    };
    let register_bits = if ty == Type::F64 { 64 } else { 32 };
    let bits = match ty {
        Type::Tf32 => 32,
        t => t.bits() as usize,
    };
    Some(elements * bits / (threads * register_bits))
}

/// Whether a lone `_` may take the result.
fn sink_allowed(op: Opcode) -> bool {
    matches!(
        op,
        Opcode::Atom
            | Opcode::MbarrierArrive
            | Opcode::MbarrierArriveDrop
            | Opcode::Ld
            | Opcode::Shfl
    )
}

fn element(
    op: Opcode,
    slot: &Slot,
    want: Want,
    mods: &Modifiers,
    operand: &Operand,
    body: &Body,
) -> Result<(), String> {
    let nth = |i: u8| mods.ty(usize::from(i)).unwrap_or(Type::B32);
    let (ty, scale, wider) = match want {
        Want::Any => (None, 1, false),
        Want::Exactly(t) => (Some(t), 1, false),
        Want::Nth(i) => (Some(nth(i)), 1, false),
        Want::Double(i) => (Some(nth(i)), 2, false),
        Want::AtLeast(i) => (Some(nth(i)), 1, true),
    };
    let expected = || {
        let or = if slot.kind == OperandKind::Src { " or a literal" } else { "" };
        match ty {
            Some(t) if scale == 2 => format!("a register twice as wide as .{t}{or}"),
            Some(t) if wider => format!("a register at least as wide as .{t}{or}"),
            Some(t) => format!("a register of type .{t}{or}"),
            None => format!("a register{or}"),
        }
    };
    let fits = match operand {
        Operand::Sink => slot.kind == OperandKind::Dst || slot.length != Length::Scalar,
        Operand::Reg(r) => {
            let register = &body.registers[r.index()];
            register.vector == 1
                && ty.is_none_or(|t| compatible(register.ty, t, t.bits() * scale, wider))
        }
        Operand::Component(r, _) => {
            let register = &body.registers[r.index()];
            ty.is_none_or(|t| compatible(register.ty, t, t.bits() * scale, wider))
        }
        Operand::Negated(r, selector) => {
            op == Opcode::Vmad
                && !mods.has(Flag::PlusOne)
                && slot.kind == OperandKind::Src
                && compatible(body.registers[r.index()].ty, Type::B32, 32, false)
                && selector.is_none_or(|selector| selects(op, slot, selector))
        }
        Operand::Selected(r, selector) => {
            ty.is_some_and(|t| compatible(body.registers[r.index()].ty, t, t.bits(), false))
                && selects(op, slot, *selector)
        }
        Operand::Imm(imm) if slot.kind == OperandKind::Src => ty.is_none_or(|t| literal(*imm, t)),
        Operand::Symbol(..) => {
            use Opcode::{Cvta, Getctarank, Isspacep, Istypep, Mapa};
            let takes = matches!(op, Cvta | Mapa | Getctarank | Isspacep | Istypep);
            slot.kind == OperandKind::Src && takes
        }
        Operand::Special(_) => slot.kind == OperandKind::Src && op == Opcode::Cvt,
        _ => false,
    };
    if fits { Ok(()) } else { expect(false, &expected(), operand, body) }
}

/// Whether a video instruction takes this selector: in the destination a mask (`.b20`), in the
/// first two sources any two half-words or four bytes of both; a scalar one takes one byte or
/// half-word.
fn selects(op: Opcode, slot: &Slot, selector: Selector) -> bool {
    use Opcode::{Vabsdiff, Vadd, Vmad, Vmax, Vmin, Vset, Vshl, Vshr, Vsub};
    if matches!(op, Vadd | Vsub | Vabsdiff | Vmin | Vmax | Vshl | Vshr | Vset | Vmad) {
        let most = if selector.halves { 2 } else { 4 };
        let place = matches!(slot.name.as_str(), "a" | "b") || slot.name == "d" && op != Vmad;
        return place && selector.count == 1 && selector.parts[0] < most;
    }
    let text = op.text();
    let (halves, elements) = match text.as_bytes().last() {
        Some(b'2') if text.starts_with('v') => (true, 2),
        Some(b'4') if text.starts_with('v') => (false, 4),
        _ => return false,
    };
    let parts = &selector.parts[..usize::from(selector.count)];
    let fits = match slot.name.as_str() {
        "d" => parts.windows(2).all(|p| p[0] > p[1]) && parts[0] < elements,
        "a" | "b" => {
            parts.len() == usize::from(elements) && parts.iter().all(|&p| p < 2 * elements)
        }
        _ => false,
    };
    selector.halves == halves && fits
}

/// Whether a register of type `reg` may stand where an instruction of type `ty`, `bits` wide,
/// asks for one.
pub(crate) fn compatible(reg: Type, ty: Type, bits: u32, wider: bool) -> bool {
    if reg == Type::Pred || ty == Type::Pred {
        return reg == ty;
    }
    let width = if wider { reg.bits() >= bits } else { reg.bits() == bits };
    let integer = |t: Type| t.is_signed() || t.is_unsigned();
    width && (reg.is_bits() || ty.is_bits() || reg == ty || (integer(reg) && integer(ty)))
}

fn literal(imm: Imm, ty: Type) -> bool {
    match imm {
        Imm::Int(_) | Imm::Uint(_) => !ty.is_float(),
        Imm::F32(_) | Imm::F64(_) => ty.is_bits() || matches!(ty, Type::F32 | Type::F64),
    }
}

/// mov: one width on both sides; a vector packs or unpacks (PTX ISA, "mov").
fn mov(slot: &Slot, mods: &Modifiers, operand: &Operand, body: &Body) -> Result<(), String> {
    let ty = mods.ty(0).unwrap_or(Type::B32);
    let bits = ty.bits() * u32::from(mods.vec());
    let source = slot.kind == OperandKind::Src;
    let fits = match operand {
        Operand::Reg(r) => {
            let register = &body.registers[r.index()];
            let whole = register.ty.bits() * u32::from(register.vector);
            let packed = register.vector > 1 || bits != ty.bits();
            whole == bits && (packed || compatible(register.ty, ty, bits, false))
        }
        Operand::Component(r, _) => compatible(body.registers[r.index()].ty, ty, bits, false),
        Operand::Vector(list) => {
            let width = |o: &Operand| match o {
                Operand::Reg(r) => Some(body.registers[r.index()].ty.bits()),
                _ => None,
            };
            let widths: Option<u32> = list.iter().map(width).sum();
            let (all, bits) = (widths.unwrap_or(bits), bits);
            matches!(list.len(), 2 | 4 | 8 | 16) && all == bits
        }
        Operand::Imm(imm) => source && (ty == Type::Pred || literal(*imm, ty)),
        Operand::Symbol(..) | Operand::Special(_) => source,
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let what = format!("a register, literal, vector or address of {bits} bits");
    expect(false, &what, operand, body)
}

/// What may not stand together although each suffix has its place; ptxas' rules.
pub(crate) fn rule(op: Opcode, mods: &Modifiers) -> Result<(), &'static str> {
    let space = mods.space();
    let cached = matches!(space, None | Some(Space::Global | Space::Generic));
    let bits = mods.ty(0).map_or(0, Type::bits) * u32::from(mods.vec());
    let strong = !matches!(mods.sem(), None | Some(Sem::Weak));
    let hinted = mods.0.iter().any(|m| matches!(m, Mod::Hint(_)));
    if hinted && !cached && matches!(op, Opcode::Ld | Opcode::St | Opcode::Atom | Opcode::Red) {
        return Err("cache hints are for global memory");
    }
    let simd = op.text().starts_with('v') && op.text().ends_with(['2', '4']);
    if mods.has(Flag::Sat) && mods.op() == Some(Op::Add) && simd {
        return Err("a saturated result cannot be accumulated");
    }
    if matches!(op, Opcode::Ld | Opcode::St | Opcode::Ldu) {
        let wide = cached
            && matches!((mods.ty(0).map(Type::bits), mods.vec()), (Some(32), 8) | (Some(64), 4));
        if bits > 128 && !wide {
            return Err("at most 128 bits are accessed, of .global 256 as .v8 of 32 or .v4 of 64");
        }
        use Space::{Const, Local, Param, ParamEntry, ParamFunc};
        let private = matches!(space, Some(Const | Param | ParamEntry | ParamFunc));
        let local = space == Some(Local) && mods.sem() != Some(Sem::Volatile);
        if strong && (private || local) {
            return Err("this space has no volatile or ordered accesses");
        }
    }
    Ok(())
}

fn expect(fits: bool, what: &str, found: &Operand, body: &Body) -> Result<(), String> {
    if fits { Ok(()) } else { Err(format!("expected {what}, found {}", describe(found, body))) }
}

fn describe(operand: &Operand, body: &Body) -> String {
    let register = |r: &RegId| {
        let register = &body.registers[r.index()];
        match register.vector {
            1 => format!("`{}` of type .{}", register.name, register.ty),
            n => format!("`{}` of type .v{n} .{}", register.name, register.ty),
        }
    };
    match operand {
        Operand::Reg(r) => register(r),
        Operand::Component(r, _) => format!("an element of {}", register(r)),
        Operand::Selected(r, selector) => format!("`.{selector}` of {}", register(r)),
        Operand::Special(s) => format!("the special register `{}`", s.kind),
        Operand::Imm(Imm::Int(_) | Imm::Uint(_)) => "an integer".into(),
        Operand::Imm(_) => "a floating-point literal".into(),
        Operand::Vector(v) => format!("a vector of {}", v.len()),
        Operand::Sink => "`_`".into(),
        Operand::Address(_) => "an address".into(),
        Operand::Tensor(..) => "tensor coordinates".into(),
        Operand::Symbol(..) => "the address of a variable or function".into(),
        Operand::Label(_) => "a label".into(),
        Operand::Table(_) => "a table of targets".into(),
        Operand::Not(r) | Operand::Negated(r, _) => format!("the negation of {}", register(r)),
        Operand::Pair(..) => "a pair".into(),
        Operand::List(_) => "a list".into(),
        Operand::None => "nothing".into(),
    }
}
