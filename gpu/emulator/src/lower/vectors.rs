//! Vector registers (`.reg .v4 .f32 v`) become scalar ones before anything is lowered: `v.x` is a
//! register, and `v` the vector operand `{v.x, v.y, v.z, v.w}`.

use fathom_ptx::ast::{Body, Instruction, Module, Operand, RegId, Register, Statement};

/// Splits the vector registers of all functions.
pub fn split(module: &mut Module) {
    let bodies = module.functions.iter_mut().filter_map(|f| f.body.as_mut());
    bodies.filter(|b| b.registers.iter().any(|r| r.vector > 1)).for_each(split_body);
}

fn split_body(body: &mut Body) {
    // The first element takes the vector's place, the others follow all registers.
    let mut elements: Vec<Vec<RegId>> = Vec::new();
    for i in 0..body.registers.len() {
        let length = body.registers[i].vector;
        let mut list = vec![RegId(i as u32)];
        for _ in 1..length {
            list.push(RegId(body.registers.len() as u32));
            body.registers.push(Register { vector: 1, ..body.registers[i].clone() });
        }
        body.registers[i].vector = 1;
        elements.push(list);
    }
    for statement in &mut body.statements {
        if let Statement::Instruction(Instruction { operands, .. }) = statement {
            operands.iter_mut().for_each(|o| split_operand(o, &elements));
        }
    }
}

fn split_operand(operand: &mut Operand, elements: &[Vec<RegId>]) {
    match operand {
        Operand::Component(r, lane) => {
            *operand = Operand::Reg(elements[r.index()][usize::from(*lane)]);
        }
        Operand::Reg(r) if elements[r.index()].len() > 1 => {
            let list = elements[r.index()].iter().map(|&r| Operand::Reg(r)).collect();
            *operand = Operand::Vector(list);
        }
        Operand::Vector(list) => list.iter_mut().for_each(|o| split_operand(o, elements)),
        Operand::List(list) => list.iter_mut().for_each(|o| split_operand(o, elements)),
        Operand::Tensor(_, list) => list.iter_mut().for_each(|o| split_operand(o, elements)),
        Operand::Pair(a, b) => {
            split_operand(a, elements);
            split_operand(b, elements);
        }
        _ => {}
    }
}
