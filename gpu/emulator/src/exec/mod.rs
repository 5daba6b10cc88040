//! What each instruction does: one file a class, each with a `lower` that turns an instruction
//! into micro-operations.
//!
//! | file | instructions |
//! |---|---|
//! | [`arith::int`] | integer arithmetic, bit operations, dp4a, carries |
//! | [`arith::float`] | f32 and f64 arithmetic, comparisons and approximations |
//! | [`arith::half`] | f16 and bf16 arithmetic, packed or not |
//! | [`arith::cvt`] | conversions |
//! | [`arith::pred`] | setp, set, selp, slct, predicate logic |
//! | [`arith::mov`] | moves, packing, prmt, cvta, mapa |
//! | [`arith::video`], [`arith::video_scalar`] | video instructions on several elements, on one |
//! | [`memory::load_store`] | ld, st, cache hints |
//! | [`memory::atomic`] | atom, red |
//! | [`memory::cp_async`] | cp.async and its groups |
//! | [`memory::bulk`], [`memory::tma`] | bulk copies, st.async, red.async; tensor copies |
//! | [`memory::multimem`] | memory of several devices at once |
//! | [`memory::texture`] | textures and surfaces |
//! | [`memory::tensormap`] | tensormap.replace, tensormap.cp_fenceproxy |
//! | [`tensor::matrix`] | ldmatrix, stmatrix, movmatrix |
//! | [`tensor::mma`], [`tensor::wmma`] | matrix products of a warp |
//! | [`tensor::sparse`] | those with a sparse A |
//! | [`tensor::block_scale`] | those of a warp with block scales |
//! | [`tensor::wgmma`] | those of a warpgroup, with [`tensor::operand`]s in shared memory |
//! | [`control::branch`], [`control::call`] | branches, exit, trap; calls |
//! | [`control::barrier`] | bar, barrier, cluster barriers, griddepcontrol, nanosleep |
//! | [`control::fence`] | fence, membar |
//! | [`control::shuffle`] | shfl, vote, match, redux, elect; how lanes meet: [`control::members`] |
//! | [`control::mbarrier`] | mbarrier objects |
//!
//! Which lanes execute, what they read and what is reported is [`crate::machine`]'s.

pub mod arith;
pub mod control;
pub mod memory;
pub mod tensor;

use fathom_ptx::ast::{Instruction, Operand};
use fathom_ptx::table::Opcode;

use arith::{cvt, float, half, int, mov, pred, video, video_scalar};
use control::{barrier, branch, mbarrier, shuffle};
use memory::{atomic, bulk, cp_async, load_store, multimem, tensormap, texture, tma};
use tensor::{matrix, mma, wgmma, wmma};

use crate::lower::builder::{Lower, Lowered, mnemonic, unsupported};

/// Lowers one instruction by the file of its class.
pub fn lower(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    // Most classes look at the operands that are there. Where several are optional, only their
    // places tell them apart.
    let optional = ins.form.form().slots.iter().filter(|slot| slot.optional).count();
    let has_gaps = ins.operands.contains(&Operand::None);
    if has_gaps && ins.op != Opcode::Call && optional < 2 {
        let mut dense = ins.clone();
        dense.operands.retain(|o| *o != Operand::None);
        return by_class(l, &dense);
    }
    by_class(l, ins)
}

fn by_class(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    use Opcode::*;
    match ins.op {
        Add | Sub | Mul | Mad | Fma | Div | Abs | Neg | Min | Max | Rcp | Sqrt | Rsqrt | Sin
        | Cos | Lg2 | Ex2 | Tanh | Testp | Copysign => arithmetic(l, ins),
        Mul24 | Mad24 | Sad | Rem | Popc | Clz | Bfind | Fns | Brev | Bfe | Bfi | Szext | Bmsk
        | Dp4a | Dp2a | Addc | Subc | Madc | Cnot | Lop3 | Shf | Shl | Shr => int::lower(l, ins),
        And | Or | Xor | Not if ins.mods.ty(0) == Some(fathom_ptx::types::Type::Pred) => {
            pred::logic(l, ins)
        }
        And | Or | Xor | Not => int::lower(l, ins),
        Set | Setp | Selp | Slct => pred::lower(l, ins),
        Mov | Prmt | Cvta | Isspacep | Mapa | Getctarank => mov::lower(l, ins),
        Cvt | CvtPack => cvt::lower(l, ins),
        Ld | Ldu | St | Prefetch | Prefetchu | Applypriority | Discard | Createpolicy => {
            load_store::lower(l, ins)
        }
        Atom | Red => atomic::lower(l, ins),
        Bra | BrxIdx | Call | Ret | Exit | Trap | Brkpt => branch::lower(l, ins),
        Shfl | Vote | Match | Redux | Activemask | Elect => shuffle::lower(l, ins),
        BarSync | BarArrive | BarRed | BarWarpSync | BarrierSync | BarrierArrive | BarrierRed
        | BarrierClusterArrive | BarrierClusterWait | Membar | Fence | FenceProxy
        | Griddepcontrol | Nanosleep | Setmaxnreg | Pmevent => barrier::lower(l, ins),
        CpAsync | CpAsyncCommitGroup | CpAsyncWaitGroup | CpAsyncWaitAll => cp_async::lower(l, ins),
        Mma => mma::lower(l, ins),
        WmmaLoad | WmmaStore | WmmaMma => wmma::lower(l, ins),
        WgmmaMmaAsync | WgmmaMmaAsyncSp | WgmmaFence | WgmmaCommitGroup | WgmmaWaitGroup => {
            wgmma::lower(l, ins)
        }
        MbarrierInit
        | MbarrierInval
        | MbarrierExpectTx
        | MbarrierCompleteTx
        | MbarrierArrive
        | MbarrierArriveDrop
        | MbarrierTestWait
        | MbarrierTryWait
        | MbarrierPendingCount
        | CpAsyncMbarrierArrive => mbarrier::lower(l, ins),
        CpAsyncBulk
        | CpReduceAsyncBulk
        | CpAsyncBulkCommitGroup
        | CpAsyncBulkWaitGroup
        | CpAsyncBulkPrefetch
        | CpAsyncBulkPrefetchTensor
        | StAsync
        | RedAsync => bulk::lower(l, ins),
        CpAsyncBulkTensor | CpReduceAsyncBulkTensor => tma::lower(l, ins),
        TensormapReplace | TensormapCpFenceproxy => tensormap::lower(l, ins),
        Ldmatrix | Stmatrix | Movmatrix => matrix::lower(l, ins),
        Vadd2 | Vsub2 | Vavrg2 | Vabsdiff2 | Vmin2 | Vmax2 | Vset2 | Vadd4 | Vsub4 | Vavrg4
        | Vabsdiff4 | Vmin4 | Vmax4 | Vset4 => video::lower(l, ins),
        Tex | Tld4 | Txq | Istypep | Suld | Sust | Sured | Suq => texture::lower(l, ins),
        Vadd | Vsub | Vabsdiff | Vmin | Vmax | Vshl | Vshr | Vmad | Vset => {
            video_scalar::lower(l, ins)
        }
        MultimemLdReduce | MultimemSt | MultimemRed => multimem::lower(l, ins),
        StBulk
        | MultimemCpAsyncBulk
        | MultimemCpReduceAsyncBulk
        | ClusterlaunchcontrolTryCancel
        | ClusterlaunchcontrolQueryCancel
        | Stacksave
        | Stackrestore
        | Alloca
        | Tcgen05 => unsupported(format!("the instruction {}", mnemonic(ins))),
    }
}

/// add, mul and their kin exist for every kind of type.
fn arithmetic(l: &mut Lower<'_>, ins: &Instruction) -> Lowered {
    use fathom_ptx::types::Type::*;
    match ins.mods.types().last() {
        Some(F32 | F64 | F32x2) => float::lower(l, ins),
        Some(F16 | F16x2 | Bf16 | Bf16x2) => half::lower(l, ins),
        _ => int::lower(l, ins),
    }
}
