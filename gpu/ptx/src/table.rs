//! The table of instructions: one row per form, for parser, validator, documentation and tests.
//!
//! A row is written much as the PTX ISA writes syntax: `mad.part{.sat}.type d, a, b, c`;
//! [`pattern`] explains the notation and compiles it. The rows themselves are data, in one file per
//! group of chapters. To add an instruction, add its [`Opcode`], a row, and its [`Effect`].

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::types::words;
pub use effects::Effect;
pub use pattern::{Form, InstructionRow, Length, OperandKind, Section, Slot, SuffixSet, Want};

mod arithmetic;
mod data;
mod effects;
mod float;
mod matrix;
pub mod pattern;
mod sync;
mod texture;
mod video;

/// A row of the table, by its index in [`forms`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FormId(pub u16);

words! {
    /// What an instruction does, by mnemonic. The spelling is the part of the mnemonic that every
    /// form of it begins with.
    Opcode {
        // Integer and logic
        Add = "add", Sub = "sub", Mul = "mul", Mad = "mad", Mul24 = "mul24", Mad24 = "mad24",
        Sad = "sad", Div = "div", Rem = "rem", Abs = "abs", Neg = "neg", Min = "min", Max = "max",
        Popc = "popc", Clz = "clz", Bfind = "bfind", Fns = "fns", Brev = "brev", Bfe = "bfe",
        Bfi = "bfi", Szext = "szext", Bmsk = "bmsk", Dp4a = "dp4a", Dp2a = "dp2a",
        Addc = "addc", Subc = "subc", Madc = "madc",
        And = "and", Or = "or", Xor = "xor", Not = "not", Cnot = "cnot", Lop3 = "lop3",
        Shf = "shf", Shl = "shl", Shr = "shr",
        // Floating point
        Testp = "testp", Copysign = "copysign", Fma = "fma", Rcp = "rcp", Sqrt = "sqrt",
        Rsqrt = "rsqrt", Sin = "sin", Cos = "cos", Lg2 = "lg2", Ex2 = "ex2", Tanh = "tanh",
        // Comparison and selection
        Set = "set", Setp = "setp", Selp = "selp", Slct = "slct",
        // Data movement and conversion
        Mov = "mov", Shfl = "shfl", Prmt = "prmt", Ld = "ld", Ldu = "ldu", St = "st",
        StAsync = "st.async", StBulk = "st.bulk", MultimemLdReduce = "multimem.ld_reduce",
        MultimemSt = "multimem.st", MultimemRed = "multimem.red",
        MultimemCpAsyncBulk = "multimem.cp.async.bulk",
        MultimemCpReduceAsyncBulk = "multimem.cp.reduce.async.bulk",
        Prefetch = "prefetch", Prefetchu = "prefetchu",
        Applypriority = "applypriority", Discard = "discard", Createpolicy = "createpolicy",
        Isspacep = "isspacep", Cvta = "cvta", Cvt = "cvt", CvtPack = "cvt.pack", Mapa = "mapa",
        Getctarank = "getctarank",
        CpAsync = "cp.async", CpAsyncCommitGroup = "cp.async.commit_group",
        CpAsyncWaitGroup = "cp.async.wait_group", CpAsyncWaitAll = "cp.async.wait_all",
        CpAsyncMbarrierArrive = "cp.async.mbarrier.arrive",
        CpAsyncBulk = "cp.async.bulk", CpReduceAsyncBulk = "cp.reduce.async.bulk",
        CpAsyncBulkPrefetch = "cp.async.bulk.prefetch",
        CpAsyncBulkTensor = "cp.async.bulk.tensor",
        CpReduceAsyncBulkTensor = "cp.reduce.async.bulk.tensor",
        CpAsyncBulkPrefetchTensor = "cp.async.bulk.prefetch.tensor",
        CpAsyncBulkCommitGroup = "cp.async.bulk.commit_group",
        CpAsyncBulkWaitGroup = "cp.async.bulk.wait_group",
        TensormapReplace = "tensormap.replace", TensormapCpFenceproxy = "tensormap.cp_fenceproxy",
        // Control flow
        Bra = "bra", BrxIdx = "brx.idx", Call = "call", Ret = "ret", Exit = "exit",
        // Parallel synchronisation
        BarSync = "bar.sync", BarArrive = "bar.arrive", BarRed = "bar.red",
        BarWarpSync = "bar.warp.sync",
        BarrierSync = "barrier.sync", BarrierArrive = "barrier.arrive",
        BarrierRed = "barrier.red",
        BarrierClusterArrive = "barrier.cluster.arrive",
        BarrierClusterWait = "barrier.cluster.wait",
        Membar = "membar", Fence = "fence",
        FenceProxy = "fence.proxy", Atom = "atom", Red = "red", RedAsync = "red.async",
        Vote = "vote", Match = "match", Activemask = "activemask", Redux = "redux",
        Griddepcontrol = "griddepcontrol", Elect = "elect",
        MbarrierInit = "mbarrier.init", MbarrierInval = "mbarrier.inval",
        MbarrierExpectTx = "mbarrier.expect_tx", MbarrierCompleteTx = "mbarrier.complete_tx",
        MbarrierArrive = "mbarrier.arrive", MbarrierArriveDrop = "mbarrier.arrive_drop",
        MbarrierTestWait = "mbarrier.test_wait", MbarrierTryWait = "mbarrier.try_wait",
        MbarrierPendingCount = "mbarrier.pending_count",
        ClusterlaunchcontrolTryCancel = "clusterlaunchcontrol.try_cancel",
        ClusterlaunchcontrolQueryCancel = "clusterlaunchcontrol.query_cancel",
        // Matrices
        WmmaLoad = "wmma.load", WmmaStore = "wmma.store", WmmaMma = "wmma.mma",
        Mma = "mma", Ldmatrix = "ldmatrix", Stmatrix = "stmatrix",
        Movmatrix = "movmatrix",
        WgmmaMmaAsync = "wgmma.mma_async", WgmmaMmaAsyncSp = "wgmma.mma_async.sp",
        WgmmaFence = "wgmma.fence", WgmmaCommitGroup = "wgmma.commit_group",
        WgmmaWaitGroup = "wgmma.wait_group",
        // Stack, video, miscellaneous
        Stacksave = "stacksave", Stackrestore = "stackrestore", Alloca = "alloca",
        Vadd = "vadd", Vsub = "vsub", Vabsdiff = "vabsdiff", Vmin = "vmin", Vmax = "vmax",
        Vshl = "vshl", Vshr = "vshr", Vmad = "vmad", Vset = "vset",
        Vadd2 = "vadd2", Vsub2 = "vsub2", Vavrg2 = "vavrg2", Vabsdiff2 = "vabsdiff2",
        Vmin2 = "vmin2", Vmax2 = "vmax2", Vset2 = "vset2",
        Vadd4 = "vadd4", Vsub4 = "vsub4", Vavrg4 = "vavrg4", Vabsdiff4 = "vabsdiff4",
        Vmin4 = "vmin4", Vmax4 = "vmax4", Vset4 = "vset4",
        Brkpt = "brkpt", Nanosleep = "nanosleep", Pmevent = "pmevent", Trap = "trap",
        Setmaxnreg = "setmaxnreg",
        // Textures and surfaces
        Tex = "tex", Tld4 = "tld4", Txq = "txq", Istypep = "istypep",
        Suld = "suld", Sust = "sust", Sured = "sured", Suq = "suq",
        // Fifth-generation tensor cores (sm_100 and later)
        Tcgen05 = "tcgen05",
    }
}

struct Table {
    forms: Vec<Form>,
    by_opcode: HashMap<Opcode, Vec<FormId>>,
    by_name: HashMap<&'static str, Opcode>,
}

/// Every section, in the order of the documentation.
pub fn sections() -> impl Iterator<Item = &'static Section> {
    [
        arithmetic::SECTIONS,
        float::SECTIONS,
        data::SECTIONS,
        matrix::SECTIONS,
        sync::SECTIONS,
        texture::SECTIONS,
        video::SECTIONS,
    ]
    .into_iter()
    .flatten()
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut forms = Vec::new();
    let mut by_opcode: HashMap<Opcode, Vec<FormId>> = HashMap::new();
    for section in sections() {
        for row in section.rows {
            by_opcode.entry(row.op).or_default().push(FormId(forms.len() as u16));
            forms.push(pattern::compile(row, section.title));
        }
    }
    let by_name = Opcode::ALL.iter().map(|op| (op.text(), *op)).collect();
    Table { forms, by_opcode, by_name }
});

/// Every form, compiled; a [`FormId`] is an index into it.
pub fn forms() -> &'static [Form] {
    &TABLE.forms
}

/// The forms of an opcode, in the order of the table.
pub fn forms_of(op: Opcode) -> &'static [FormId] {
    TABLE.by_opcode.get(&op).map_or(&[], Vec::as_slice)
}

impl FormId {
    /// The compiled row.
    pub fn form(self) -> &'static Form {
        &TABLE.forms[usize::from(self.0)]
    }
}

/// Splits a mnemonic into its opcode (the longest that fits) and the suffixes behind it.
pub fn split(mnemonic: &str) -> Option<(Opcode, &str)> {
    let mut end = mnemonic.len();
    loop {
        if let Some(op) = TABLE.by_name.get(&mnemonic[..end]) {
            return Some((*op, &mnemonic[end..]));
        }
        end = mnemonic[..end].rfind('.')?;
    }
}

/// The opcode whose spelling is nearest to `text`, if any is near.
pub fn nearest(text: &str) -> Option<Opcode> {
    let word = |s: &str| s.split('.').next().unwrap_or("").to_string();
    let first = word(text);
    // The first word decides, then the rest as far as the opcode's spelling goes.
    let distance = |op: &Opcode| {
        let spelling = op.text();
        let end = text.char_indices().nth(spelling.len()).map_or(text.len(), |(i, _)| i);
        (strsim::levenshtein(&word(spelling), &first), strsim::levenshtein(spelling, &text[..end]))
    };
    let best = Opcode::ALL.iter().min_by_key(|op| distance(op))?;
    (distance(best).0 <= 1 + first.len() / 4).then_some(*best)
}
