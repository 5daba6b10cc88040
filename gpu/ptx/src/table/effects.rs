//! What instructions do that their slots do not say: where control goes, and what CTAs of other
//! clusters may notice.
//!
//! Registers that an instruction reads and writes are its slots' to say
//! ([`super::OperandKind::Dst`]).

use super::Opcode::{self, *};

/// Effect of an instruction beyond its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// None: it goes on with the next instruction, and no CTA of another cluster notices.
    Own,
    /// Accesses memory: others may rely on it where its `.sem` is stronger than weak, its memory
    /// global and its `.scope` wider than the CTA.
    Access,
    /// Reads and changes memory in one step: the order among threads shows in what they read,
    /// where the memory is global and the `.scope` wider than the CTA.
    Atomic,
    /// Combines with what memory holds, asynchronously and in no order: the order among CTAs
    /// shows in rounded sums, where the first space it names is global.
    Reduction,
    /// Reads or changes memory of several devices at once.
    Multimem,
    /// Goes elsewhere, or ends: nothing but the guard leads to the next instruction.
    Jump,
}

impl Opcode {
    /// Whether it multiplies matrices of a warpgroup asynchronously.
    pub fn is_wgmma(self) -> bool {
        matches!(self, WgmmaMmaAsync | WgmmaMmaAsyncSp)
    }

    /// Its effect. Without a line here a new instruction does not compile.
    #[rustfmt::skip]
    pub fn effect(self) -> Effect {
        match self {
            Bra | BrxIdx | Ret | Exit | Trap => Effect::Jump,
            Ld | St => Effect::Access,
            Atom | Red | Sured => Effect::Atomic,
            CpReduceAsyncBulk | CpReduceAsyncBulkTensor => Effect::Reduction,
            MultimemLdReduce | MultimemSt | MultimemRed | MultimemCpAsyncBulk
            | MultimemCpReduceAsyncBulk => Effect::Multimem,
            Add | Sub | Mul | Mad | Mul24 | Mad24 | Sad | Div | Rem | Abs | Neg | Min | Max
            | Popc | Clz | Bfind | Fns | Brev | Bfe | Bfi | Szext | Bmsk | Dp4a | Dp2a | Addc
            | Subc | Madc | And | Or | Xor | Not | Cnot | Lop3 | Shf | Shl | Shr | Testp
            | Copysign | Fma | Rcp | Sqrt | Rsqrt | Sin | Cos | Lg2 | Ex2 | Tanh | Set | Setp
            | Selp | Slct | Mov | Shfl | Prmt | Ldu | StAsync | StBulk | Prefetch | Prefetchu
            | Applypriority | Discard | Createpolicy | Isspacep | Cvta | Cvt | CvtPack | Mapa
            | Getctarank | CpAsync | CpAsyncCommitGroup | CpAsyncWaitGroup | CpAsyncWaitAll
            | CpAsyncMbarrierArrive | CpAsyncBulk | CpAsyncBulkPrefetch | CpAsyncBulkTensor
            | CpAsyncBulkPrefetchTensor | CpAsyncBulkCommitGroup | CpAsyncBulkWaitGroup
            | TensormapReplace | TensormapCpFenceproxy | Call | BarSync | BarArrive | BarRed
            | BarWarpSync | BarrierSync | BarrierArrive | BarrierRed | BarrierClusterArrive
            | BarrierClusterWait | Membar | Fence | FenceProxy | RedAsync | Vote | Match
            | Activemask | Redux | Griddepcontrol | Elect | MbarrierInit | MbarrierInval
            | MbarrierExpectTx | MbarrierCompleteTx | MbarrierArrive | MbarrierArriveDrop
            | MbarrierTestWait | MbarrierTryWait | MbarrierPendingCount
            | ClusterlaunchcontrolTryCancel | ClusterlaunchcontrolQueryCancel | WmmaLoad
            | WmmaStore | WmmaMma | Mma | Ldmatrix | Stmatrix | Movmatrix | WgmmaMmaAsync
            | WgmmaMmaAsyncSp | WgmmaFence | WgmmaCommitGroup | WgmmaWaitGroup | Stacksave
            | Stackrestore | Alloca | Vadd | Vsub | Vabsdiff | Vmin | Vmax | Vshl | Vshr | Vmad
            | Vset | Vadd2 | Vsub2 | Vavrg2 | Vabsdiff2 | Vmin2 | Vmax2 | Vset2 | Vadd4 | Vsub4
            | Vavrg4 | Vabsdiff4 | Vmin4 | Vmax4 | Vset4 | Brkpt | Nanosleep | Pmevent
            | Setmaxnreg | Tex | Tld4 | Txq | Istypep | Suld | Sust | Suq | Tcgen05 => Effect::Own,
        }
    }
}
