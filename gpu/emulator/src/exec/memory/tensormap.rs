//! Tensor maps in memory: reading one, and the instructions that change one on the device.

use fathom_ptx::ast::Instruction;
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Space, Type};

use super::bulk::shared;
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::cx::Cx;
use crate::machine::lane;
use crate::machine::op::{Class, Step};
use crate::memory::{PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use crate::tensormap::{MapElement, TensorMap};

/// Reads and decodes the tensor map at a generic address.
pub fn map_at(cx: &mut Cx<'_>, lane: usize, address: u64) -> Result<TensorMap, Step> {
    let mut bytes = [0; TensorMap::BYTES];
    if address.wrapping_sub(PARAM_WINDOW) < WINDOW_BYTES {
        let at = (address - PARAM_WINDOW) as usize;
        match cx.grid.config.params.get(at..at + TensorMap::BYTES) {
            Some(range) => bytes.copy_from_slice(range),
            None => {
                let message = "a tensor map beyond the parameters";
                return Err(cx.fail(Ub::OutOfBounds, Some(lane), Some(address), message));
            }
        }
    } else {
        let Some(found) = cx.grid.view.locate(address, bytes.len() as u64).cloned() else {
            return Err(cx.global_fault(lane, address, bytes.len() as u64));
        };
        found.load(address - found.base(), &mut bytes);
    }
    if !address.is_multiple_of(64) {
        let message = "a tensor map needs an address that is a multiple of 64";
        return Err(cx.fail(Ub::Misaligned, Some(lane), Some(address), message));
    }
    TensorMap::decode(&bytes)
        .map_err(|e| cx.fail(Ub::BadDescriptor, Some(lane), Some(address), e.to_string()))
}

/// tensormap.replace: one field of a map in memory; tensormap.cp_fenceproxy: a map to global
/// memory.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    if ins.op == Opcode::TensormapCpFenceproxy {
        let to = l.addr(&ins.operands[0])?;
        let from = l.addr(&ins.operands[1])?;
        l.emit_action(Class::Fence, move |cx| {
            let lane = cx.leader();
            let (target, source) = (cx.address(to), shared(cx.address(from)));
            let outcome = (|| {
                let (cta, offset) = cx.shared_place(lane, source, 128)?;
                let data = cx.shared_bytes(cta)[offset..offset + 128].to_vec();
                cx.map_changed(target);
                cx.write_global(lane, target, &data)
            })();
            outcome.err().unwrap_or(Step::Next)
        });
        return Ok(());
    }
    let addr = l.addr(&ins.operands[0])?;
    let ty = ins.mods.types().last().unwrap_or(Type::B32);
    let last = ins.operands.len() - 1;
    let value = l.src(&ins.operands[last], ty)?;
    let ordinal = if last == 2 { l.literal(&ins.operands[1]).unwrap_or(0) as usize } else { 0 };
    let in_shared = matches!(ins.mods.space(), Some(Space::Shared | Space::SharedCta));
    let wide = ty.bits() == 64;
    let field = ins.mods.flags().find(|f| !matches!(f, Flag::Tile | Flag::B1024));
    let Some(field) = field else { return unsupported(mnemonic(ins)) };
    l.emit_action(Class::Misc, move |cx| {
        let lane = cx.leader();
        let (address, value) = (cx.address(addr), lane::read(cx, value, wide)[lane]);
        let in_shared = in_shared || address.wrapping_sub(SHARED_WINDOW) < WINDOW_BYTES;
        let outcome = (|| {
            let mut bytes = [0; TensorMap::BYTES];
            if in_shared {
                let (cta, offset) = cx.shared_place(lane, shared(address), 128)?;
                bytes.copy_from_slice(&cx.shared_bytes(cta)[offset..offset + 128]);
            } else {
                cx.read_global(lane, address, &mut bytes)?;
            }
            // Maps made on the device begin as zeros.
            let decoded = if bytes == [0; TensorMap::BYTES] {
                Ok(TensorMap::blank())
            } else {
                TensorMap::decode(&bytes)
            };
            let mut map = decoded.map_err(|e| {
                cx.fail(Ub::BadDescriptor, Some(lane), Some(address), e.to_string())
            })?;
            replace(&mut map, field, ordinal, value);
            let bytes = map.encode_unchecked();
            if in_shared {
                let (cta, offset) = cx.shared_place(lane, shared(address), 128)?;
                cx.shared_bytes(cta)[offset..offset + 128].copy_from_slice(&bytes);
                return Ok(());
            }
            cx.map_changed(address);
            cx.write_global(lane, address, &bytes)
        })();
        outcome.err().unwrap_or(Step::Next)
    });
    Ok(())
}

fn replace(map: &mut TensorMap, field: Flag, ordinal: usize, value: u64) {
    let ordinal = ordinal.min(4);
    match field {
        Flag::GlobalAddress => map.address = value,
        // Rank is given less one, as the instruction defines it.
        Flag::Rank => map.rank = value as u32 + 1,
        Flag::BoxDim => map.box_dims[ordinal] = value as u32,
        Flag::GlobalDim => map.dims[ordinal] = value,
        Flag::GlobalStride => map.strides_bytes[ordinal.min(3)] = value,
        Flag::ElementStride => map.element_strides[ordinal] = value as u32,
        Flag::Elemtype => {
            if let Some(element) = MapElement::from_ptx(value as u32) {
                map.element = element;
            }
        }
        Flag::InterleaveLayout => map.interleave = value as u32,
        Flag::SwizzleMode => map.swizzle = value as u32,
        Flag::FillMode => map.fill_nan = value != 0,
        _ => {}
    }
}
