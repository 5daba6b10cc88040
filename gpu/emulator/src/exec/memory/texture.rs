//! Textures and surfaces (PTX ISA, "Texture Instructions", "Surface Instructions"): lane by lane,
//! each by its object. What a fetch gives is [`crate::texture`]'s.

use fathom_ptx::ast::{Address, Instruction, Operand};
use fathom_ptx::table::Opcode;
use fathom_ptx::types::{Flag, Type};

use super::atomic::Combine;
use super::load_store::{elements, gather, scatter, target};
use crate::error::Ub;
use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};
use crate::machine::access::{Addr, Where, Words};
use crate::machine::cx::Cx;
use crate::machine::lane::{self, Lane};
use crate::machine::op::{Class, Step};
use crate::machine::registers::{LANES, Reg};
use crate::texture::{
    Address as Mode, At, Channel, Fetch, Level, Object, Outside, Place, Reader, Surface, Texels,
    Texture,
};

/// Lowers an instruction of this class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    match ins.op {
        Opcode::Tex | Opcode::Tld4 => fetch(l, ins),
        Opcode::Txq => texture_query(l, ins),
        Opcode::Suq => surface_query(l, ins),
        Opcode::Istypep => is_type(l, ins),
        Opcode::Suld => surface_load(l, ins),
        Opcode::Sust => surface_store(l, ins),
        Opcode::Sured => surface_reduce(l, ins),
        _ => unsupported(mnemonic(ins)),
    }
}

/// The shape of coordinates: how many count, whether a layer's number stands in front.
#[derive(Clone, Copy)]
struct Geometry {
    dims: usize,
    layers: bool,
    cube: bool,
}

impl Geometry {
    fn of(ins: &Instruction) -> Lowered<Geometry> {
        let shape = |dims, layers, cube| Ok(Geometry { dims, layers, cube });
        let found = ins.mods.flags().find_map(|flag| match flag {
            Flag::Dim1 => Some(shape(1, false, false)),
            Flag::Dim2 => Some(shape(2, false, false)),
            Flag::Dim3 => Some(shape(3, false, false)),
            Flag::A1d => Some(shape(1, true, false)),
            Flag::A2d => Some(shape(2, true, false)),
            Flag::Cube => Some(shape(2, false, true)),
            Flag::Acube => Some(shape(2, true, true)),
            _ => None,
        });
        found.unwrap_or_else(|| unsupported(mnemonic(ins)))
    }

    /// Coordinates that the instruction reads behind the number of the layer.
    fn count(self) -> usize {
        if self.cube { 3 } else { self.dims }
    }
}

/// The registers of an object and of its coordinates.
#[derive(Clone)]
struct Operands {
    object: Addr,
    layer: Option<Reg>,
    at: Vec<Reg>,
}

fn operands(l: &mut Lower<'_>, tensor: &Operand, geometry: Geometry) -> Lowered<Operands> {
    let Operand::Tensor(object, list) = tensor else {
        return unsupported("a texture or surface without coordinates");
    };
    let object = handle(l, object)?;
    let list = match &**list {
        [Operand::Vector(list)] => list,
        list => list,
    };
    let mut at = Vec::new();
    for operand in list {
        at.push(l.src(operand, Type::B32)?);
    }
    let layer = if geometry.layers { Some(at.remove(0)) } else { None };
    at.truncate(geometry.count());
    Ok(Operands { object, layer, at })
}

/// The register that holds an object's number.
fn handle(l: &mut Lower<'_>, object: &Address) -> Lowered<Addr> {
    match object.base {
        fathom_ptx::ast::Base::Reg(_) => l.address(object),
        _ => unsupported("textures and surfaces by the name of a variable (.texref, .surfref)"),
    }
}

impl Operands {
    fn layers(&self, cx: &Cx<'_>) -> [u32; LANES] {
        self.layer.map_or([0; LANES], |r| u32::read(cx, r))
    }

    /// Coordinates of the lanes, x first, the missing ones 0.
    fn words(&self, cx: &Cx<'_>) -> [[u32; LANES]; 3] {
        words(cx, &self.at)
    }
}

fn words(cx: &Cx<'_>, registers: &[Reg]) -> [[u32; LANES]; 3] {
    std::array::from_fn(|d| registers.get(d).map_or([0; LANES], |&r| u32::read(cx, r)))
}

fn of_lane(words: &[[u32; LANES]; 3], lane: usize) -> [u32; 3] {
    std::array::from_fn(|d| words[d][lane])
}

/// The object of a number; a fault where there is none.
fn object<'a>(cx: &mut Cx<'a>, lane: usize, number: u64, what: &str) -> Result<&'a Object, Step> {
    let grid = cx.grid;
    match grid.objects.get(&number) {
        Some(object) => Ok(&**object),
        None => {
            let message = format!("{number:#x} is no {what} object, or was destroyed");
            Err(cx.fail(Ub::BadDescriptor, Some(lane), Some(number), message))
        }
    }
}

fn texture<'a>(cx: &mut Cx<'a>, lane: usize, number: u64) -> Result<&'a Texture, Step> {
    match object(cx, lane, number, "texture")? {
        Object::Texture(texture) => Ok(texture),
        Object::Surface(_) => {
            let message = "a surface object where a texture object is expected";
            Err(cx.fail(Ub::BadDescriptor, Some(lane), Some(number), message))
        }
    }
}

fn surface<'a>(cx: &mut Cx<'a>, lane: usize, number: u64) -> Result<&'a Surface, Step> {
    match object(cx, lane, number, "surface")? {
        Object::Surface(surface) => Ok(surface),
        Object::Texture(_) => {
            let message = "a texture object where a surface object is expected";
            Err(cx.fail(Ub::BadDescriptor, Some(lane), Some(number), message))
        }
    }
}

/// Memory as one lane reads it.
struct LaneReader<'b, 'a> {
    cx: &'b mut Cx<'a>,
    lane: usize,
    /// Where the allocation was found last.
    near: &'b mut u32,
}

impl Reader for LaneReader<'_, '_> {
    type Error = Step;

    fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), Step> {
        let bytes = out.len() as u64;
        let grid = self.cx.grid;
        let Some(found) = grid.view.locate_near(self.near, address, bytes) else {
            return Err(self.cx.global_fault(self.lane, address, bytes));
        };
        if grid.settings.checks.uninit
            && let Some(at) = found.first_unwritten(address - found.base(), bytes)
        {
            let about = format!("{at} bytes into {}", found.describe());
            let at = Some(found.base() + at);
            let message = "a texture of memory that nobody wrote".to_owned();
            self.cx.report_about(Ub::Uninitialized, Some(self.lane), at, Some(about), message);
        }
        self.cx.order_range(self.lane, address, bytes, false);
        if grid.settings.profile {
            self.cx.stats.global_bytes_read += bytes;
        }
        found.load(address - found.base(), out);
        Ok(())
    }

    fn beyond(&mut self, texel: i64, texels: u32) {
        if self.cx.grid.settings.checks.memory {
            let message = format!("texel {texel} of a texture of {texels}, which reads as zero");
            self.cx.report(Ub::OutOfBounds, Some(self.lane), None, message);
        }
    }
}

/// How a fetch chooses its level: registers of a level of detail, or of derivatives.
#[derive(Clone)]
enum Chosen {
    Base,
    Detail(Reg, bool),
    Gradients(Vec<Reg>, Vec<Reg>),
}

/// tex and tld4.
fn fetch(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let geometry = Geometry::of(ins)?;
    let Some(ty) = ins.mods.ty(0) else { return unsupported(mnemonic(ins)) };
    let compares = ins.form.form().slots.iter().any(|slot| slot.name == "compare");
    if ty == Type::F16 || compares {
        return unsupported(mnemonic(ins));
    }
    let of = operands(l, &ins.operands[1], geometry)?;
    let counted = ins.op == Opcode::Tex && ins.mods.ty(1) == Some(Type::S32);
    let (results, resident) = match &ins.operands[0] {
        Operand::Pair(d, p) => (&**d, Some(l.dst_pred(p)?)),
        d => (d, None),
    };
    let mut targets = Vec::new();
    for operand in elements(results) {
        targets.push(l.dst(operand)?);
    }
    let mut list = |name: &str, most: usize| -> Lowered<Vec<Reg>> {
        let mut registers = Vec::new();
        for operand in ins.named(name).map_or(&[][..], elements).iter().take(most) {
            registers.push(l.src(operand, Type::B32)?);
        }
        Ok(registers)
    };
    let offset = list("offset", geometry.dims)?;
    let chosen = if ins.mods.has(Flag::Level) {
        Chosen::Detail(list("lod", 1)?[0], counted)
    } else if ins.mods.has(Flag::Grad) {
        Chosen::Gradients(list("dx", geometry.dims)?, list("dy", geometry.dims)?)
    } else {
        Chosen::Base
    };
    if geometry.cube && matches!(chosen, Chosen::Gradients(..)) {
        return unsupported(mnemonic(ins));
    }
    let component = ins.mods.flags().find_map(|flag| match flag {
        Flag::Right => Some(0),
        Flag::Green => Some(1),
        Flag::MatrixB => Some(2),
        Flag::MatrixA => Some(3),
        _ => None,
    });
    let component = component.filter(|_| ins.op == Opcode::Tld4);
    l.emit_action(Class::Tex, move |cx| {
        let objects = cx.addresses(of.object);
        let (layers, at) = (of.layers(cx), of.words(cx));
        let offsets = words(cx, &offset);
        let levels: [Level; LANES] = match &chosen {
            Chosen::Base => [Level::Base; LANES],
            Chosen::Detail(reg, true) => i32::read(cx, *reg).map(|v| Level::Detail(v as f32)),
            Chosen::Detail(reg, false) => f32::read(cx, *reg).map(Level::Detail),
            Chosen::Gradients(dx, dy) => {
                let (dx, dy) = (words(cx, dx), words(cx, dy));
                let of = |v: &[_; 3], lane| of_lane(v, lane).map(f32::from_bits);
                std::array::from_fn(|lane| Level::Gradients(of(&dx, lane), of(&dy, lane)))
            }
        };
        let mut out = [[0; LANES]; 4];
        let mut near = 0;
        let mut filtered = false;
        for lane in cx.lanes() {
            let texture = match texture(cx, lane, objects[lane]) {
                Ok(texture) => texture,
                Err(step) => return step,
            };
            if geometry.cube && !texture.cube {
                let message = "a texture that is no cube map, looked up as one";
                return cx.fail(Ub::BadDescriptor, Some(lane), Some(objects[lane]), message);
            }
            filtered |= component.is_none() && !counted && texture.is_filtered();
            let at = of_lane(&at, lane);
            let fetch = Fetch {
                dims: geometry.dims,
                layer: layers[lane],
                at: match counted {
                    true => At::Texel(at.map(|v| v as i32)),
                    false => At::Point(at.map(f32::from_bits)),
                },
                cube: geometry.cube,
                offset: of_lane(&offsets, lane).map(|v| v as i32),
                level: levels[lane],
            };
            let mut reader = LaneReader { cx: &mut *cx, lane, near: &mut near };
            let value = match component {
                Some(component) => texture.gather(&fetch, component, &mut reader),
                None => texture.fetch(&fetch, &mut reader),
            };
            match value {
                Ok(value) => (0..4).for_each(|c| out[c][lane] = value[c]),
                Err(step) => return step,
            }
        }
        cx.stats.filtered += u64::from(filtered);
        if ty == Type::F16x2 {
            let half = |v: u32| u32::from(half::f16::from_f32(f32::from_bits(v)).to_bits());
            for (pair, &d) in targets.iter().enumerate() {
                let value = |i: usize| half(out[2 * pair][i]) | half(out[2 * pair + 1][i]) << 16;
                u32::write(cx, d, std::array::from_fn(value));
            }
        } else {
            for (&d, value) in targets.iter().zip(out) {
                u32::write(cx, d, value);
            }
        }
        if let Some(p) = resident {
            cx.set_pred(p, !0);
        }
        Step::Next
    });
    Ok(())
}

/// OpenCL's numbers for a channel, which the queries of a format give.
fn channel_type(texels: &Texels, integers: bool) -> u32 {
    match texels.channel {
        Channel::S8 if !integers => 0x10d0,
        Channel::S16 if !integers => 0x10d1,
        Channel::U8 if !integers => 0x10d2,
        Channel::U16 if !integers => 0x10d3,
        Channel::S8 => 0x10d7,
        Channel::S16 => 0x10d8,
        Channel::S32 => 0x10d9,
        Channel::U8 => 0x10da,
        Channel::U16 => 0x10db,
        Channel::U32 => 0x10dc,
        Channel::F16 => 0x10dd,
        Channel::F32 => 0x10de,
    }
}

fn channel_order(texels: &Texels) -> u32 {
    match texels.channels {
        1 => 0x10b0,
        2 => 0x10b2,
        _ => 0x10b5,
    }
}

/// txq: an attribute of a texture.
fn texture_query(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let d = l.dst(&ins.operands[0])?;
    let Operand::Address(address) = &ins.operands[1] else { return unsupported(mnemonic(ins)) };
    let of = handle(l, address)?;
    let lod = match ins.named("lod") {
        Some(operand) => Some(l.src(operand, Type::B32)?),
        None => None,
    };
    let Some(query) = ins.mods.flags().find(|f| *f != Flag::Level) else {
        return unsupported(mnemonic(ins));
    };
    l.emit_action(Class::Tex, move |cx| {
        let objects = cx.addresses(of);
        let levels = lod.map_or([0; LANES], |r| u32::read(cx, r));
        let mut out = [0; LANES];
        for lane in cx.lanes() {
            let texture = match texture(cx, lane, objects[lane]) {
                Ok(texture) => texture,
                Err(step) => return step,
            };
            let level = (levels[lane] as usize).min(texture.levels.len() - 1);
            let (texels, sampler) = (&texture.levels[level], &texture.sampler);
            let mode = |d: usize| match sampler.address[d] {
                Mode::Wrap => 0,
                Mode::Mirror => 1,
                Mode::Clamp => 3,
                Mode::Border => 4,
            };
            let layers = texture.layered || texture.cube;
            out[lane] = match query {
                Flag::Width => texels.size[0],
                Flag::Height => texels.size[1],
                Flag::Depth if layers => 0,
                Flag::Depth => texels.size[2],
                Flag::ArraySize if layers => texels.size[2],
                Flag::ArraySize => 0,
                Flag::ChannelDataType => channel_type(texels, sampler.integers),
                Flag::ChannelOrder => channel_order(texels),
                Flag::NormalizedCoords => u32::from(sampler.normalized),
                Flag::ForceUnnormalizedCoords => u32::from(!sampler.normalized),
                Flag::NumMipmapLevels => texture.levels.len() as u32,
                Flag::NumSamples => 1,
                Flag::FilterMode => u32::from(sampler.linear),
                Flag::AddrMode0 => mode(0),
                Flag::AddrMode1 => mode(1),
                _ => mode(2),
            };
        }
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

/// suq: an attribute of a surface.
fn surface_query(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let d = l.dst(&ins.operands[0])?;
    let Operand::Address(address) = &ins.operands[1] else { return unsupported(mnemonic(ins)) };
    let of = handle(l, address)?;
    let Some(query) = ins.mods.flags().next() else { return unsupported(mnemonic(ins)) };
    l.emit_action(Class::Surface, move |cx| {
        let objects = cx.addresses(of);
        let mut out = [0; LANES];
        for lane in cx.lanes() {
            let surface = match surface(cx, lane, objects[lane]) {
                Ok(surface) => surface,
                Err(step) => return step,
            };
            let texels = &surface.texels;
            out[lane] = match query {
                Flag::Width => texels.size[0],
                Flag::Height => texels.size[1],
                Flag::Depth if surface.layered => 0,
                Flag::Depth => texels.size[2],
                Flag::ArraySize if surface.layered => texels.size[2],
                Flag::ArraySize => 0,
                Flag::ChannelDataType => channel_type(texels, true),
                Flag::ChannelOrder => channel_order(texels),
                // Of an array the layout is the device's own.
                _ => 0,
            };
        }
        u32::write(cx, d, out);
        Step::Next
    });
    Ok(())
}

/// istypep: a texture object is a texture with its sampler.
fn is_type(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let p = l.dst_pred(&ins.operands[0])?;
    let a = l.src(&ins.operands[1], Type::B64)?;
    let surfaces = ins.mods.ty(0) == Some(Type::SurfRef);
    l.emit_action(Class::Tex, move |cx| {
        let numbers = u64::read(cx, a);
        let grid = cx.grid;
        let holds = |number: u64| match grid.objects.get(&number).map(|o| &**o) {
            Some(Object::Texture(_)) => !surfaces,
            Some(Object::Surface(_)) => surfaces,
            None => false,
        };
        let mask = cx.lanes().fold(0, |mask, i| mask | u32::from(holds(numbers[i])) << i);
        cx.set_pred(p, mask);
        Step::Next
    });
    Ok(())
}

fn outside(ins: &Instruction) -> Outside {
    if ins.mods.has(Flag::Clamp) {
        Outside::Clamp
    } else if ins.mods.has(Flag::Zero) {
        Outside::Zero
    } else {
        Outside::Trap
    }
}

/// An instruction on a surface: its operands, and what its coordinates mean.
#[derive(Clone)]
struct Access {
    of: Operands,
    geometry: Geometry,
    formatted: bool,
    outside: Outside,
}

impl Access {
    fn new(l: &mut Lower<'_>, ins: &Instruction, tensor: usize) -> Lowered<Access> {
        let geometry = Geometry::of(ins)?;
        let of = operands(l, &ins.operands[tensor], geometry)?;
        let formatted = ins.mods.has(Flag::Formatted);
        Ok(Access { of, geometry, formatted, outside: outside(ins) })
    }

    /// The surface of each executing lane, and the address there; none where nothing is accessed.
    fn places<'a>(
        &self,
        cx: &mut Cx<'a>,
        bytes: impl Fn(&Surface) -> u32,
    ) -> Result<Vec<(usize, &'a Surface, u64)>, Step> {
        let objects = cx.addresses(self.of.object);
        let (layers, at) = (self.of.layers(cx), self.of.words(cx));
        let mut out = Vec::with_capacity(LANES);
        for lane in cx.lanes() {
            let surface = surface(cx, lane, objects[lane])?;
            let at = of_lane(&at, lane).map(|v| v as i32);
            let layer = self.geometry.layers.then_some(layers[lane]);
            let bytes = bytes(surface);
            let place =
                surface.place(self.geometry.dims, layer, at, bytes, self.formatted, self.outside);
            match place {
                Place::Nowhere => {}
                Place::At(address) if !address.is_multiple_of(u64::from(bytes)) => {
                    let message =
                        format!("{bytes} bytes of a surface from byte {} of a row", at[0]);
                    return Err(cx.fail(Ub::Misaligned, Some(lane), Some(address), message));
                }
                Place::At(address) => out.push((lane, surface, address)),
                Place::Beyond(d, room) => {
                    let found = if d == 2 && layer.is_some() { layers[lane] as i32 } else { at[d] };
                    let name = match (d, layer) {
                        (2, Some(_)) => "layer",
                        (0, _) => "x",
                        (1, _) => "y",
                        _ => "z",
                    };
                    let unit = if d == 0 && !self.formatted { "byte " } else { "" };
                    let end = if d == 0 { "bytes a row" } else { "places" };
                    let message = format!(
                        "{bytes} bytes at {name} = {unit}{found} of a surface with {room} {end}"
                    );
                    return Err(cx.fail(Ub::OutOfBounds, Some(lane), None, message));
                }
            }
        }
        Ok(out)
    }
}

/// suld.b: bytes as they are.
fn surface_load(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let access = Access::new(l, ins, 1)?;
    let mut targets = Vec::new();
    for operand in elements(&ins.operands[0]) {
        targets.push(target(l, operand, ty)?);
    }
    let bytes = ty.bytes() * targets.len() as u32;
    if bytes > 16 {
        return unsupported(mnemonic(ins));
    }
    l.emit_action(Class::Surface, move |cx| {
        let places = match access.places(cx, |_| bytes) {
            Ok(places) => places,
            Err(step) => return step,
        };
        let mut out: Words = [[0; LANES]; 4];
        let mut near = 0;
        for (lane, _, address) in places {
            let mut data = [0; 16];
            let mut reader = LaneReader { cx: &mut *cx, lane, near: &mut near };
            if let Err(step) = reader.read(address, &mut data[..bytes as usize]) {
                return step;
            }
            for (word, four) in out.iter_mut().zip(data.as_chunks::<4>().0) {
                word[lane] = u32::from_le_bytes(*four);
            }
        }
        for (k, target) in targets.iter().enumerate() {
            scatter(cx, *target, ty, &out, k);
        }
        Step::Next
    });
    Ok(())
}

/// A word as a channel holds it: floats and integers of its width, out of range to the nearest.
fn channel_bytes(channel: Channel, word: u32) -> [u8; 4] {
    let signed = |bits: u32| {
        let most = (1i64 << (bits - 1)) - 1;
        (i64::from(word as i32).clamp(-most - 1, most) as u32).to_le_bytes()
    };
    let unsigned = |most: u32| word.min(most).to_le_bytes();
    match channel {
        Channel::U8 => unsigned(0xff),
        Channel::U16 => unsigned(0xffff),
        Channel::S8 => signed(8),
        Channel::S16 => signed(16),
        Channel::F16 => {
            u32::from(half::f16::from_f32(f32::from_bits(word)).to_bits()).to_le_bytes()
        }
        Channel::U32 | Channel::S32 | Channel::F32 => word.to_le_bytes(),
    }
}

/// sust: bytes as they are, or (`.p`) a texel, whose channels that are not given become 0.
fn surface_store(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let ty = ins.mods.ty(0).unwrap_or(Type::B32);
    let access = Access::new(l, ins, 0)?;
    let mut sources = Vec::new();
    for operand in elements(&ins.operands[1]) {
        sources.push(l.src(operand, ty)?);
    }
    let width = ty.bytes() * sources.len() as u32;
    if width > 16 {
        return unsupported(mnemonic(ins));
    }
    l.emit_action(Class::Surface, move |cx| {
        let formatted = access.formatted;
        let bytes = |s: &Surface| if formatted { s.texels.bytes() } else { width };
        let places = match access.places(cx, bytes) {
            Ok(places) => places,
            Err(step) => return step,
        };
        let words = gather(cx, &sources, ty);
        for (lane, surface, address) in places {
            let mut data = Vec::with_capacity(16);
            if formatted {
                let Texels { channel, channels, .. } = surface.texels;
                for c in 0..channels as usize {
                    let word = if c < sources.len() { words[c][lane] } else { 0 };
                    data.extend(&channel_bytes(channel, word)[..channel.bytes() as usize]);
                }
            } else {
                words.iter().for_each(|word| data.extend(word[lane].to_le_bytes()));
                data.truncate(width as usize);
            }
            if let Err(step) = cx.write_global(lane, address, &data) {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}

/// sured: integers combined in place; of a texel (`.p`) the format says whether they have a sign.
fn surface_reduce(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    let (Some(ty), Some(op)) = (ins.mods.ty(0), ins.mods.op()) else {
        return unsupported(mnemonic(ins));
    };
    let access = Access::new(l, ins, 0)?;
    let source = l.src(&ins.operands[1], ty)?;
    let wide = ty.bits() == 64;
    l.emit_action(Class::Surface, move |cx| {
        let places = match access.places(cx, |_| ty.bytes()) {
            Ok(places) => places,
            Err(step) => return step,
        };
        let values = lane::read(cx, source, wide);
        for (lane, surface, address) in places {
            let ty = match (access.formatted, wide, surface.texels.channel.is_signed()) {
                (false, ..) => ty,
                (true, false, false) => Type::U32,
                (true, false, true) => Type::S32,
                (true, true, false) => Type::U64,
                (true, true, true) => Type::S64,
            };
            let combine = Combine { op, ty, flush: false };
            let value = values[lane];
            let old = cx.modify(Where::Global, lane, address, ty.bytes() as usize, |old| {
                u128::from(combine.apply(old as u64, value, 0))
            });
            if let Err(step) = old {
                return step;
            }
        }
        Step::Next
    });
    Ok(())
}
