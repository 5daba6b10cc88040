//! Branches, calls, exit, trap, and the device functions that the driver provides.

use fathom_ptx::ast::{Instruction, Operand, Symbol};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::Type;

use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::lower::cfg::targets;
use crate::machine::access::Where;
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, MicroOp, Step};
use crate::machine::registers::{LANES, Reg};
use crate::machine::warp::{Frame, Wait};
use crate::program::FUNCTION_WINDOW;

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Bra => {
            let Some(&target) = targets(l.body, ins).first() else {
                return unsupported(mnemonic(ins));
            };
            l.emit(Class::Control, branch, 0, 0, 0, 0);
            l.branch_to(target);
            Ok(())
        }
        Opcode::BrxIdx => brx(l, ins),
        Opcode::Ret if !l.function.entry => {
            l.emit(Class::Control, branch, 0, 0, 0, 0);
            l.branch_to_end();
            Ok(())
        }
        Opcode::Ret | Opcode::Exit => {
            l.emit(Class::Control, exit, 0, 0, 0, 0);
            Ok(())
        }
        Opcode::Trap | Opcode::Brkpt => {
            let name = ins.op.text();
            l.emit_action(Class::Control, move |cx| {
                let lane = cx.leader();
                cx.fail(Ub::Trap, Some(lane), None, format!("the kernel executed {name}"))
            });
            Ok(())
        }
        Opcode::Call => call(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

fn branch(_: &mut Cx<'_>, _: &MicroOp) -> Step {
    Step::Branch
}

fn exit(_: &mut Cx<'_>, _: &MicroOp) -> Step {
    Step::Exit
}

/// One comparison and branch a target; an index beyond the table goes nowhere defined.
fn brx(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let index = l.src(&ins.operands[0], Type::U32)?;
    fn step(cx: &mut Cx<'_>, op: &MicroOp) -> Step {
        let (a, b) = (u32::read(cx, op.a), u32::read(cx, op.b));
        let equal = (0..LANES).fold(0, |m, i| m | u32::from(a[i] == b[i]) << i);
        cx.mask &= equal;
        if cx.mask == 0 { Step::Next } else { Step::Branch }
    }
    for (i, target) in targets(l.body, ins).into_iter().enumerate() {
        let number = l.constant(i as u64, false);
        l.emit(Class::Control, step, 0, index, number, 0);
        l.branch_to(target);
    }
    l.emit_action(Class::Control, |cx| {
        let lane = cx.leader();
        cx.fail(Ub::BadControlFlow, Some(lane), None, "brx.idx with an index beyond its targets")
    });
    Ok(())
}

/// Refuses what needs parameters in registers; parameters otherwise arrive in local memory.
pub fn load_register_params(l: &mut Lower<'_>) -> Lowered {
    let f = l.function;
    if f.params.iter().chain(&f.returns).any(|v| v.register.is_some()) {
        return unsupported("device functions with parameters in registers");
    }
    Ok(())
}

/// What stands behind a function's last instruction.
pub fn function_end(l: &mut Lower<'_>) {
    if l.function.entry {
        l.emit(Class::Control, exit, 0, 0, 0, 0);
        return;
    }
    l.emit_action(Class::Control, |cx| {
        let group = &mut cx.w.groups[cx.at];
        let Some(frame) = group.frames.pop() else {
            return cx.fail(Ub::BadControlFlow, None, None, "return without a call");
        };
        group.pc = frame.return_pc;
        group.base = frame.base;
        group.pred_base = frame.pred_base;
        group.local_base = frame.local_base;
        group.join = frame.join;
        group.wait = Wait::Ready;
        Step::Control
    });
}

/// An argument or result of a call on the caller's side.
#[derive(Clone, Copy)]
enum Place {
    /// A `.param` variable: offset in the caller's frame.
    Frame(u32),
    /// A register, and whether it has 64 bits.
    Register(Reg, bool),
}

fn place(l: &mut Lower<'_>, operand: &Operand, source: bool, bytes: u32) -> Lowered<Place> {
    if let Operand::Symbol(symbol @ (Symbol::Local(_) | Symbol::Param(_) | Symbol::Return(_)), _) =
        operand
    {
        return Ok(Place::Frame(l.frame_offset(*symbol)?));
    }
    if bytes > 8 {
        return unsupported(format!("a parameter of {bytes} bytes in a register"));
    }
    let wide = bytes == 8;
    let ty = if wide { Type::B64 } else { Type::B32 };
    let reg = if source { l.src(operand, ty)? } else { l.dst(operand)? };
    let bits = l.dst_bits(operand, ty.bits());
    if !source && wide != (bits > 32) {
        return unsupported(format!("a result of {bytes} bytes in a register of {bits} bits"));
    }
    Ok(Place::Register(reg, wide))
}

fn call(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let Some(call) = ins.call() else { return unsupported(mnemonic(ins)) };
    let direct = match call.target {
        Operand::Symbol(Symbol::Function(f), _) => {
            let name = &l.program.ast.functions[f.index()].name;
            match l.callee(f.index()) {
                Some(callee) => Some(callee),
                None => return builtin(l, &name.clone(), call.returns, call.args),
            }
        }
        _ => None,
    };
    let own = l.callee_index();
    let (params, returns) = match direct {
        Some(callee) => {
            let info = l.frame_of(callee);
            (info.params.clone(), info.returns.clone())
        }
        // The prototype gives the layout of an indirect callee.
        None => prototype(l, ins)?,
    };
    let mut args = Vec::new();
    for (operand, &(offset, bytes)) in call.args.iter().zip(&params) {
        args.push((place(l, operand, true, bytes)?, offset, bytes));
    }
    let target = match direct {
        Some(_) => 0,
        None => l.src(call.target, Type::U64)?,
    };
    let op = l.emit_action(Class::Control, move |cx| enter(cx, own, direct, target, &args));
    op.control = true;
    if call.returns.is_empty() {
        return Ok(());
    }
    let mut results = Vec::new();
    for (operand, &(offset, bytes)) in call.returns.iter().zip(&returns) {
        results.push((place(l, operand, false, bytes)?, offset, bytes));
    }
    l.emit_action(Class::Control, move |cx| {
        let above = cx.local_base + cx.grid.code.functions[own as usize].local_bytes;
        for &(to, offset, bytes) in &results {
            let from = ((above + offset) / 4) as usize;
            match to {
                Place::Frame(at) => {
                    let to = ((cx.local_base + at) / 4) as usize;
                    copy_words(cx, from, to, bytes.div_ceil(4) as usize);
                }
                Place::Register(reg, wide) => {
                    let low: [u32; LANES] = word(cx, from);
                    let high: [u32; LANES] = if wide { word(cx, from + 1) } else { [0; LANES] };
                    let value = |i: usize| u64::from(high[i]) << 32 | u64::from(low[i]);
                    lane::write(cx, reg, wide, std::array::from_fn(value));
                }
            }
        }
        Step::Next
    });
    Ok(())
}

type Places = Vec<(u32, u32)>;

fn prototype(l: &Lower<'_>, ins: &Instruction) -> Lowered<(Places, Places)> {
    use fathom_ptx::ast::TableKind;
    let table = ins.call().and_then(|c| c.table).map(|t| &l.body.tables[t.index()].kind);
    match table {
        Some(TableKind::Prototype { returns, params, .. }) => {
            let mut end = 0u32;
            let mut lay = |v: &fathom_ptx::ast::Variable| {
                let at = end.next_multiple_of(v.alignment().max(4));
                end = at + (v.bytes() as u32).next_multiple_of(4);
                (at, v.bytes() as u32)
            };
            let params = params.iter().map(&mut lay).collect();
            let returns = returns.iter().map(&mut lay).collect();
            Ok((params, returns))
        }
        Some(TableKind::Call(list)) => match list.first().and_then(|f| l.callee(f.index())) {
            Some(callee) => {
                let info = l.frame_of(callee);
                Ok((info.params.clone(), info.returns.clone()))
            }
            None => unsupported("a call table without functions"),
        },
        _ => unsupported("an indirect call without prototype"),
    }
}

fn word(cx: &Cx<'_>, index: usize) -> [u32; LANES] {
    cx.w.local[index * LANES..(index + 1) * LANES].try_into().expect("32 lanes")
}

fn copy_words(cx: &mut Cx<'_>, from: usize, to: usize, count: usize) {
    for k in 0..count {
        let value = word(cx, from + k);
        store_word(cx, to + k, value);
    }
}

fn store_word(cx: &mut Cx<'_>, index: usize, value: [u32; LANES]) {
    for lane in cx.lanes() {
        cx.w.local[index * LANES + lane] = value[lane];
    }
}

/// Frames deeper than this are a runaway recursion.
const MAX_DEPTH: usize = 1024;

fn enter(
    cx: &mut Cx<'_>,
    own: u32,
    direct: Option<u32>,
    target: Reg,
    args: &[(Place, u32, u32)],
) -> Step {
    let code = &*cx.grid.code;
    let callee = match direct {
        Some(callee) => callee,
        None => {
            let addresses = u64::read(cx, target);
            let first = addresses[cx.leader()];
            let same = cx.lanes().fold(0, |m, i| m | u32::from(addresses[i] == first) << i);
            if same != cx.mask {
                // Lanes with another target take their turn after this one.
                cx.w.groups[cx.at].pc = cx.pc;
                cx.w.split(cx.at, same, cx.pc, cx.pc, Some(cx.pc + 1));
                return Step::Regrouped;
            }
            let function = first.wrapping_sub(FUNCTION_WINDOW) / 16;
            let found = u32::try_from(function).ok().and_then(|f| code.function_of.get(&f));
            match found {
                Some(&callee) if first >= FUNCTION_WINDOW => callee,
                _ => {
                    let lane = cx.leader();
                    let message = "indirect call of something that is no function";
                    return cx.fail(Ub::BadControlFlow, Some(lane), Some(first), message);
                }
            }
        }
    };
    if cx.w.groups[cx.at].frames.len() >= MAX_DEPTH {
        let lane = cx.leader();
        return cx.fail(Ub::BadControlFlow, Some(lane), None, "calls nest too deeply");
    }
    let caller = &code.functions[own as usize];
    let info = &code.functions[callee as usize];
    let base = cx.base as u32 + caller.slots.max(caller.wide_slots);
    let pred_base = cx.pred_base as u32 + caller.predicates;
    let local_base = cx.local_base + caller.local_bytes;
    cx.w.grow(base, pred_base, info);
    cx.w.grow_local(local_base + info.local_bytes);
    for &(from, offset, bytes) in args {
        let to = ((local_base + offset) / 4) as usize;
        match from {
            Place::Frame(at) => {
                let from = ((cx.local_base + at) / 4) as usize;
                copy_words(cx, from, to, bytes.div_ceil(4) as usize);
            }
            Place::Register(reg, wide) => {
                let value = lane::read(cx, reg, wide);
                store_word(cx, to, value.map(|v| v as u32));
                if wide {
                    store_word(cx, to + 1, value.map(|v| (v >> 32) as u32));
                }
            }
        }
    }
    let return_pc = cx.pc + 1;
    let group = &mut cx.w.groups[cx.at];
    group.frames.push(Frame {
        return_pc,
        base: group.base,
        pred_base: group.pred_base,
        local_base: group.local_base,
        join: group.join,
    });
    group.pc = info.start;
    group.base = base;
    group.pred_base = pred_base;
    group.local_base = local_base;
    // The caller's join is waited for again after the return; exits still leave it.
    Step::Control
}

/// vprintf, __assertfail, malloc, free, cudaGraphSetConditional.
fn builtin(l: &mut Lower<'_>, name: &str, returns: &[Operand], args: &[Operand]) -> Lowered {
    let mut values = Vec::new();
    for (i, operand) in args.iter().enumerate() {
        let bytes = if name == "__assertfail" && i == 2 { 4 } else { 8 };
        values.push((place(l, operand, true, bytes)?, bytes));
    }
    let result = match returns.first() {
        Some(o) => Some(place(l, o, false, if name == "malloc" { 8 } else { 4 })?),
        None => None,
    };
    match name {
        "vprintf" => {
            l.emit_action(Class::Misc, move |cx| {
                let format = argument(cx, values[0].0, 8);
                let list = argument(cx, values[1].0, 8);
                for lane in cx.lanes() {
                    match print(cx, lane, format[lane], list[lane]) {
                        Ok(text) => {
                            let at = cx.cluster.ctas[cx.cta].linear;
                            cx.stats.printed.push((at, text));
                        }
                        Err(step) => return step,
                    }
                }
                if let Some(to) = result {
                    set_result(cx, to, 0);
                }
                Step::Next
            });
            Ok(())
        }
        "__assertfail" => {
            l.emit_action(Class::Misc, move |cx| {
                let lane = cx.leader();
                let [message, file, line, function] =
                    std::array::from_fn(|i| argument(cx, values[i].0, values[i].1)[lane]);
                let mut text = |address| string(cx, lane, address).unwrap_or_default();
                let message = format!(
                    "assertion `{}` failed in {} ({}:{})",
                    text(message),
                    text(function),
                    text(file),
                    line
                );
                cx.fail(Ub::Trap, Some(lane), None, message)
            });
            Ok(())
        }
        "malloc" => {
            // Which addresses come back depends on the order of CTAs: it has to be fixed.
            l.communicates = true;
            l.uses_heap = true;
            let to = match returns.first() {
                Some(o) => place(l, o, false, 8)?,
                None => return Ok(()),
            };
            l.emit_action(Class::Misc, move |cx| {
                let bytes = argument(cx, values[0].0, 8);
                let reuse = !cx.grid.settings.checks.races;
                let mut made = [0; LANES];
                let mut heap = cx.grid.heap.as_ref().expect("its code calls malloc").lock();
                let heap = heap.as_mut().expect("no panic holds this lock");
                for lane in cx.lanes() {
                    made[lane] = heap.malloc(bytes[lane], reuse);
                }
                set_wide_result(cx, to, made);
                Step::Next
            });
            Ok(())
        }
        "free" => {
            l.communicates = true;
            l.uses_heap = true;
            l.emit_action(Class::Misc, move |cx| {
                let address = argument(cx, values[0].0, 8);
                for lane in cx.lanes() {
                    let heap = cx.grid.heap.as_ref().expect("its code calls free");
                    if !heap.lock().expect("no panic holds this lock").free(address[lane]) {
                        let message = "free of what malloc did not return, or that is freed";
                        return cx.fail(Ub::UseAfterFree, Some(lane), Some(address[lane]), message);
                    }
                }
                Step::Next
            });
            Ok(())
        }
        // A graph's condition is a word of device memory, and its handle the word's address.
        "cudaGraphSetConditional" => {
            l.communicates = true;
            l.emit_action(Class::Misc, move |cx| {
                let handle = argument(cx, values[0].0, 8);
                let value = argument(cx, values[1].0, 4);
                for lane in cx.lanes() {
                    let word = (value[lane] as u32).to_le_bytes();
                    if let Err(step) = cx.write_global(lane, handle[lane], &word) {
                        return step;
                    }
                }
                Step::Next
            });
            Ok(())
        }
        other => unsupported(format!("the external function {other}")),
    }
}

fn argument(cx: &Cx<'_>, from: Place, bytes: u32) -> [u64; LANES] {
    match from {
        Place::Register(reg, wide) => lane::read(cx, reg, wide),
        Place::Frame(at) => {
            let index = ((cx.local_base + at) / 4) as usize;
            let low = word(cx, index);
            let high = if bytes == 8 { word(cx, index + 1) } else { [0; LANES] };
            std::array::from_fn(|i| u64::from(high[i]) << 32 | u64::from(low[i]))
        }
    }
}

fn set_result(cx: &mut Cx<'_>, to: Place, value: u32) {
    match to {
        Place::Register(reg, wide) => lane::broadcast(cx, reg, wide, u64::from(value)),
        Place::Frame(at) => {
            let index = ((cx.local_base + at) / 4) as usize;
            store_word(cx, index, [value; LANES]);
        }
    }
}

fn set_wide_result(cx: &mut Cx<'_>, to: Place, values: [u64; LANES]) {
    match to {
        Place::Register(reg, wide) => lane::write(cx, reg, wide, values),
        Place::Frame(at) => {
            let index = ((cx.local_base + at) / 4) as usize;
            store_word(cx, index, values.map(|v| v as u32));
            store_word(cx, index + 1, values.map(|v| (v >> 32) as u32));
        }
    }
}

/// One value of generic memory, for one lane.
fn peek(cx: &mut Cx<'_>, lane: usize, address: u64, bytes: u32) -> Result<u64, Step> {
    let mask = std::mem::replace(&mut cx.mask, 1 << lane);
    let mut out = [[0; LANES]; 4];
    let result = cx.load(Where::Generic, &[address; LANES], bytes, &mut out);
    cx.mask = mask;
    result?;
    Ok(u64::from(out[1][lane]) << 32 | u64::from(out[0][lane]))
}

fn string(cx: &mut Cx<'_>, lane: usize, mut address: u64) -> Result<String, Step> {
    let mut bytes = Vec::new();
    loop {
        let byte = peek(cx, lane, address, 1)? as u8;
        if byte == 0 || bytes.len() > 4096 {
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.push(byte);
        address += 1;
    }
}

/// Formats as C's printf does, from a list of naturally aligned values.
fn print(cx: &mut Cx<'_>, lane: usize, format: u64, list: u64) -> Result<String, Step> {
    let format = string(cx, lane, format)?;
    let mut at = list;
    let mut out = String::new();
    let mut rest = format.as_str();
    while let Some(percent) = rest.find('%') {
        out.push_str(&rest[..percent]);
        rest = &rest[percent + 1..];
        let end =
            rest.find(|c: char| c.is_ascii_alphabetic() && !"hlLqjzt".contains(c) || c == '%');
        let Some(end) = end else { break };
        let (spec, kind) = (&rest[..end], rest.as_bytes()[end]);
        rest = &rest[end + 1..];
        if kind == b'%' {
            out.push('%');
            continue;
        }
        let long = spec.contains("l") || spec.contains(['q', 'j', 'z', 't']);
        let bytes = if long
            || matches!(kind, b's' | b'p')
            || kind.is_ascii_alphabetic() && b"eEfFgGaA".contains(&kind)
        {
            8
        } else {
            4
        };
        at = at.next_multiple_of(u64::from(bytes));
        let value = peek(cx, lane, at, bytes)?;
        at += u64::from(bytes);
        let flags = spec.trim_end_matches(|c: char| "hlLqjzt".contains(c));
        let text = match kind {
            b's' => string(cx, lane, value)?,
            _ => scalar(flags, kind, value, bytes),
        };
        out.push_str(&pad(flags, &text, kind));
    }
    out.push_str(rest);
    Ok(out)
}

fn scalar(flags: &str, kind: u8, value: u64, bytes: u32) -> String {
    let signed = if bytes == 8 { value as i64 } else { i64::from(value as u32 as i32) };
    let precision = flags.split_once('.').and_then(|(_, p)| p.parse::<usize>().ok());
    let float = f64::from_bits(value);
    let plus = if flags.contains('+') && kind != b'u' { "+" } else { "" };
    match kind {
        b'd' | b'i' if signed >= 0 => format!("{plus}{signed}"),
        b'd' | b'i' => signed.to_string(),
        b'u' => value.to_string(),
        b'x' => format!("{value:x}"),
        b'X' => format!("{value:X}"),
        b'o' => format!("{value:o}"),
        b'p' => format!("{value:#x}"),
        b'c' => char::from(value as u8).to_string(),
        b'e' | b'E' => exponent(float, precision.unwrap_or(6)),
        b'g' | b'G' => general(float, precision.unwrap_or(6)),
        _ => format!("{float:.*}", precision.unwrap_or(6)),
    }
}

fn exponent(v: f64, precision: usize) -> String {
    let text = format!("{v:.precision$e}");
    match text.split_once('e') {
        Some((m, e)) => {
            let e: i32 = e.parse().unwrap_or(0);
            format!("{m}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        None => text,
    }
}

fn general(v: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let power = if v == 0.0 || !v.is_finite() { 0 } else { v.abs().log10().floor() as i32 };
    let trim = |s: String| match s.contains('.') {
        true => s.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => s,
    };
    if power < -4 || power >= precision as i32 {
        let text = exponent(v, precision - 1);
        return match text.split_once('e') {
            Some((m, e)) => format!("{}e{e}", trim(m.to_owned())),
            None => text,
        };
    }
    trim(format!("{v:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

fn pad(flags: &str, text: &str, kind: u8) -> String {
    let left = flags.contains('-');
    let digits = flags.trim_start_matches(['-', '+', ' ', '#']);
    let zero = digits.starts_with('0') && !left && kind != b's';
    let width: usize = digits.split('.').next().and_then(|w| w.parse().ok()).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    match (left, zero) {
        (true, _) => format!("{text}{}", " ".repeat(missing)),
        (_, true) => match text.strip_prefix('-') {
            Some(rest) => format!("-{}{rest}", "0".repeat(missing)),
            None => format!("{}{text}", "0".repeat(missing)),
        },
        _ => format!("{}{text}", " ".repeat(missing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_in_c() {
        assert_eq!(pad("05", &scalar("05", b'd', -42i64 as u64, 8), b'd'), "-0042");
        assert_eq!(scalar(".2", b'f', 2.25159f64.to_bits(), 8), "2.25");
        assert_eq!(scalar("", b'g', 0.0001f64.to_bits(), 8), "0.0001");
        assert_eq!(scalar("", b'g', 1e10f64.to_bits(), 8), "1e+10");
        assert_eq!(scalar("", b'e', 12345.0f64.to_bits(), 8), "1.234500e+04");
        assert_eq!(scalar("", b'd', 0xffff_ffff, 4), "-1");
        assert_eq!(pad("-4", "ab", b's'), "ab  ");
    }
}
