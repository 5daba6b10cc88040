//! An argument or a result of a call, where its caller has it.

use fathom_ptx::ast::{Operand, Symbol};
use fathom_ptx::types::Type;

use crate::lower::builder::{Lower, Lowered, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane;
use crate::machine::registers::{LANES, Reg};

/// An argument or result of a call on the caller's side.
#[derive(Clone, Copy)]
pub enum Argument {
    /// A `.param` variable: its offset in the caller's frame, in bytes.
    Frame(u32),
    /// A register, and whether it has 64 bits.
    Register(Reg, bool),
}

impl Argument {
    /// An operand of a call whose callee reads `bytes` of it.
    pub fn passed(l: &mut Lower<'_>, operand: &Operand, bytes: u32) -> Lowered<Argument> {
        match Argument::in_frame(l, operand, bytes)? {
            Some(argument) => Ok(argument),
            None => {
                let wide = bytes == 8;
                let reg = l.src(operand, if wide { Type::B64 } else { Type::B32 })?;
                Ok(Argument::Register(reg, wide))
            }
        }
    }

    /// An operand of a call that receives `bytes` of its result.
    pub fn received(l: &mut Lower<'_>, operand: &Operand, bytes: u32) -> Lowered<Argument> {
        if let Some(argument) = Argument::in_frame(l, operand, bytes)? {
            return Ok(argument);
        }
        let wide = bytes == 8;
        let reg = l.dst(operand)?;
        let bits = l.dst_bits(operand, if wide { 64 } else { 32 });
        if wide != (bits > 32) {
            return unsupported(format!("a result of {bytes} bytes in a register of {bits} bits"));
        }
        Ok(Argument::Register(reg, wide))
    }

    fn in_frame(l: &mut Lower<'_>, operand: &Operand, bytes: u32) -> Lowered<Option<Argument>> {
        match operand {
            Operand::Symbol(
                symbol @ (Symbol::Local(_) | Symbol::Param(_) | Symbol::Return(_)),
                _,
            ) => Ok(Some(Argument::Frame(l.frame_offset(*symbol)?))),
            _ if bytes > 8 => unsupported(format!("a parameter of {bytes} bytes in a register")),
            _ => Ok(None),
        }
    }

    /// Its value in each lane; `bytes` is 4 or 8.
    pub fn read(self, cx: &Cx<'_>, bytes: u32) -> [u64; LANES] {
        match self {
            Argument::Register(reg, wide) => lane::read(cx, reg, wide),
            Argument::Frame(at) => {
                let index = word_index(cx.local_base + at);
                let low = load_word(cx, index);
                let high = if bytes == 8 { load_word(cx, index + 1) } else { [0; LANES] };
                std::array::from_fn(|i| u64::from(high[i]) << 32 | u64::from(low[i]))
            }
        }
    }

    /// Sets it in the executing lanes; `bytes` is 4 or 8.
    pub fn write(self, cx: &mut Cx<'_>, bytes: u32, values: [u64; LANES]) {
        match self {
            Argument::Register(reg, wide) => lane::write(cx, reg, wide, values),
            Argument::Frame(at) => store(cx, word_index(cx.local_base + at), bytes == 8, values),
        }
    }

    /// Hands it to a callee, whose local memory wants it at address `to`.
    pub fn hand_over(self, cx: &mut Cx<'_>, to: u32, bytes: u32) {
        match self {
            Argument::Frame(at) => copy_words(cx, cx.local_base + at, to, bytes),
            Argument::Register(reg, wide) => {
                let values = lane::read(cx, reg, wide);
                store(cx, word_index(to), wide, values);
            }
        }
    }

    /// Takes it from a callee, whose local memory has it at address `from`.
    pub fn take_back(self, cx: &mut Cx<'_>, from: u32, bytes: u32) {
        match self {
            Argument::Frame(at) => copy_words(cx, from, cx.local_base + at, bytes),
            Argument::Register(reg, wide) => {
                let low = load_word(cx, word_index(from));
                let high = if wide { load_word(cx, word_index(from) + 1) } else { [0; LANES] };
                let value = |i: usize| u64::from(high[i]) << 32 | u64::from(low[i]);
                lane::write(cx, reg, wide, std::array::from_fn(value));
            }
        }
    }
}

/// Local memory is kept in words, each of all lanes.
fn word_index(address: u32) -> usize {
    (address / 4) as usize
}

fn load_word(cx: &Cx<'_>, index: usize) -> [u32; LANES] {
    cx.w.local[index * LANES..(index + 1) * LANES].try_into().expect("32 lanes")
}

fn store_word(cx: &mut Cx<'_>, index: usize, value: [u32; LANES]) {
    for lane in cx.lanes() {
        cx.w.local[index * LANES + lane] = value[lane];
    }
}

fn store(cx: &mut Cx<'_>, index: usize, wide: bool, values: [u64; LANES]) {
    store_word(cx, index, values.map(|v| v as u32));
    if wide {
        store_word(cx, index + 1, values.map(|v| (v >> 32) as u32));
    }
}

fn copy_words(cx: &mut Cx<'_>, from: u32, to: u32, bytes: u32) {
    for k in 0..bytes.div_ceil(4) as usize {
        let value = load_word(cx, word_index(from) + k);
        store_word(cx, word_index(to) + k, value);
    }
}
