//! The words of the language that carry meaning: scalar types, state spaces, and every modifier.
//!
//! An instruction's dotted suffixes become a [`Modifiers`] bag of [`Mod`]s. The table
//! ([`crate::table`]) says which group a suffix belongs to, so `.hi` of `mul.hi` is
//! [`MulPart::Hi`] and `.hi` of `setp.hi` is [`Cmp::Hi`]; nobody reads strings again.

/// An enum of words with their spelling.
macro_rules! words {
    ($(#[$m:meta])* $name:ident { $($(#[$vm:meta])* $v:ident = $s:literal),* $(,)? }) => {
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $( $(#[$vm])* #[doc = concat!("`", $s, "`")] $v ),* }
        impl $name {
            /// Every member, in the order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$v),*];
            /// The spelling in PTX, without the leading dot.
            pub const fn text(self) -> &'static str { match self { $($name::$v => $s),* } }
            /// The member spelt `text` (no leading dot).
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($s => Some($name::$v),)* _ => None }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.text())
            }
        }
    };
}

pub(crate) use words;

words! {
    /// Fundamental, packed and alternate types (PTX ISA, "Types").
    Type {
        U8 = "u8", U16 = "u16", U32 = "u32", U64 = "u64",
        S8 = "s8", S16 = "s16", S32 = "s32", S64 = "s64",
        B8 = "b8", B16 = "b16", B32 = "b32", B64 = "b64", B128 = "b128",
        F16 = "f16", F16x2 = "f16x2", Bf16 = "bf16", Bf16x2 = "bf16x2",
        F32 = "f32", F32x2 = "f32x2", F64 = "f64", Tf32 = "tf32",
        Pred = "pred",
        U16x2 = "u16x2", S16x2 = "s16x2", U8x4 = "u8x4", S8x4 = "s8x4",
        B1 = "b1", U2 = "u2", S2 = "s2", U4 = "u4", S4 = "s4",
        E4m3 = "e4m3", E5m2 = "e5m2", E2m1 = "e2m1", E2m3 = "e2m3", E3m2 = "e3m2",
        E4m3x2 = "e4m3x2", E5m2x2 = "e5m2x2", E2m1x2 = "e2m1x2", E2m3x2 = "e2m3x2",
        E3m2x2 = "e3m2x2", Ue8m0x2 = "ue8m0x2", S2f6x2 = "s2f6x2",
        E4m3x4 = "e4m3x4", E5m2x4 = "e5m2x4", E2m1x4 = "e2m1x4", E2m3x4 = "e2m3x4",
        E3m2x4 = "e3m2x4",
        Ue8m0 = "ue8m0", Ue4m3 = "ue4m3",
        B8x16 = "b8x16", B6x16P32 = "b6x16_p32", B4x16P64 = "b4x16_p64",
        TexRef = "texref", SamplerRef = "samplerref", SurfRef = "surfref",
    }
}

impl Type {
    /// Width in bits of one value as memory and registers hold it; `.pred` has 1 and the opaque
    /// reference types have 64.
    pub const fn bits(self) -> u32 {
        use Type::*;
        match self {
            Pred | B1 => 1,
            U2 | S2 => 2,
            U4 | S4 | E2m1 => 4,
            E2m3 | E3m2 => 6,
            U8 | S8 | B8 | E4m3 | E5m2 | Ue8m0 | Ue4m3 | E2m1x2 => 8,
            U16 | S16 | B16 | F16 | Bf16 | E4m3x2 | E5m2x2 | E2m3x2 | E3m2x2 | Ue8m0x2 | S2f6x2
            | E2m1x4 => 16,
            U32 | S32 | B32 | F16x2 | Bf16x2 | F32 | Tf32 | U16x2 | S16x2 | U8x4 | S8x4
            | E4m3x4 | E5m2x4 | E2m3x4 | E3m2x4 => 32,
            U64 | S64 | B64 | F64 | F32x2 | TexRef | SamplerRef | SurfRef => 64,
            B128 | B8x16 | B6x16P32 | B4x16P64 => 128,
        }
    }

    /// Bytes of one value in memory (at least 1).
    pub const fn bytes(self) -> u32 {
        self.bits().div_ceil(8)
    }

    /// Whether it is a signed integer: `.s8` to `.s64` and the packed `.s16x2`, `.s8x4`.
    pub const fn is_signed(self) -> bool {
        use Type::*;
        matches!(self, S2 | S4 | S8 | S16 | S32 | S64 | S16x2 | S8x4)
    }

    /// Whether it is an unsigned integer: `.u8` to `.u64` and the packed `.u16x2`, `.u8x4`.
    pub const fn is_unsigned(self) -> bool {
        use Type::*;
        matches!(self, U2 | U4 | U8 | U16 | U32 | U64 | U16x2 | U8x4)
    }

    /// Whether it is untyped bits: `.b1` to `.b128`.
    pub const fn is_bits(self) -> bool {
        use Type::*;
        matches!(self, B1 | B8 | B16 | B32 | B64 | B128)
    }

    /// Whether it is a floating-point format, packed or not.
    pub const fn is_float(self) -> bool {
        !self.is_signed()
            && !self.is_unsigned()
            && !self.is_bits()
            && !matches!(
                self,
                Type::Pred
                    | Type::TexRef
                    | Type::SamplerRef
                    | Type::SurfRef
                    | Type::B8x16
                    | Type::B6x16P32
                    | Type::B4x16P64
            )
    }
}

words! {
    /// State spaces (PTX ISA, "State Spaces"). An address operand without one is generic.
    Space {
        Reg = "reg", Sreg = "sreg", Const = "const", Global = "global", Local = "local",
        Param = "param", ParamEntry = "param::entry", ParamFunc = "param::func",
        Shared = "shared", SharedCta = "shared::cta", SharedCluster = "shared::cluster",
        Tex = "tex", Generic = "generic",
    }
}

words! {
    /// Rounding modifiers: floating-point, then to integral values.
    Rounding {
        Rn = "rn", Rz = "rz", Rm = "rm", Rp = "rp", Rna = "rna", Rs = "rs",
        Rni = "rni", Rzi = "rzi", Rmi = "rmi", Rpi = "rpi",
    }
}

words! {
    /// Memory semantics, and the strength of plain accesses.
    Sem {
        Weak = "weak", Volatile = "volatile", Relaxed = "relaxed", Acquire = "acquire",
        Release = "release", AcqRel = "acq_rel", Sc = "sc", Mmio = "mmio",
    }
}

words! {
    /// Scope of a memory operation; `.gl` is membar's old name of [`Scope::Gpu`].
    Scope { Cta = "cta", Cluster = "cluster", Gpu = "gpu", Gl = "gl", Sys = "sys" }
}

words! {
    /// Comparison operators of set, setp and slct's kin.
    Cmp {
        Eq = "eq", Ne = "ne", Lt = "lt", Le = "le", Gt = "gt", Ge = "ge",
        Lo = "lo", Ls = "ls", Hi = "hi", Hs = "hs",
        Equ = "equ", Neu = "neu", Ltu = "ltu", Leu = "leu", Gtu = "gtu", Geu = "geu",
        Num = "num", Nan = "nan",
    }
}

words! {
    /// Combining operators: of set/setp with a predicate, of atomics and reductions, of redux,
    /// multimem, mma.b1 (`.and.popc`) and bar.red.
    Op {
        And = "and", Or = "or", Xor = "xor", Add = "add", Inc = "inc", Dec = "dec",
        Min = "min", Max = "max", Exch = "exch", Cas = "cas", Popc = "popc",
    }
}

words! {
    /// Part of a product or of a multiply-add.
    MulPart { Hi = "hi", Lo = "lo", Wide = "wide" }
}

words! {
    /// Cache operators of ld and st (first-generation form) and of cp.async.
    Cache { Ca = "ca", Cg = "cg", Cs = "cs", Lu = "lu", Cv = "cv", Wb = "wb", Wt = "wt", Ci = "ci" }
}

words! {
    /// Eviction priorities and prefetch sizes: hints that change no value.
    Hint {
        L1EvictNormal = "L1::evict_normal", L1EvictUnchanged = "L1::evict_unchanged",
        L1EvictFirst = "L1::evict_first", L1EvictLast = "L1::evict_last",
        L1NoAllocate = "L1::no_allocate",
        L2EvictNormal = "L2::evict_normal", L2EvictUnchanged = "L2::evict_unchanged",
        L2EvictFirst = "L2::evict_first", L2EvictLast = "L2::evict_last",
        L2CacheHint = "L2::cache_hint",
        L2P64 = "L2::64B", L2P128 = "L2::128B", L2P256 = "L2::256B",
        L1 = "L1", L2 = "L2", L1u = "L1u",
    }
}

words! {
    /// Matrix layouts of mma, wmma and their kin.
    Layout { Row = "row", Col = "col" }
}

words! {
    /// Every other suffix: what it means, the instruction's row of the table says.
    Flag {
        Abs = "abs", Aligned = "aligned", All = "all", Any = "any", Approx = "approx",
        B1024 = "b1024", B4e = "b4e", Ballot = "ballot", Bfly = "bfly",
        BlockScale = "block_scale", BulkGroup = "bulk_group", Cc = "cc", Clamp = "clamp",
        CpMask = "cp_mask", CtaGroup1 = "cta_group::1", CtaGroup2 = "cta_group::2", Dim1 = "1d",
        Dim2 = "2d", Dim3 = "3d", Dim4 = "4d", Dim5 = "5d", Down = "down", Ecl = "ecl",
        Ecr = "ecr", ExpectTx = "expect_tx", F4e = "f4e", Finite = "finite",
        Fractional = "fractional", Ftz = "ftz", Full = "full", Idx = "idx", Im2col = "im2col",
        Im2colNoOffs = "im2col_no_offs", Im2colW = "im2col::w", Im2colW128 = "im2col::w::128",
        Infinite = "infinite", Left = "l", M8n8 = "m8n8", M16n16 = "m16n16", M8n16 = "m8n16",
        M16n8 = "m16n8", CompleteTx = "mbarrier::complete_tx::bytes",
        MbarrierInit = "mbarrier_init", MulticastCluster = "multicast::cluster",
        MulticastAll = "multicast::cluster::all", Nan = "NaN", Nc = "nc",
        NoComplete = "noComplete", Noftz = "noftz", Noinc = "noinc", Normal = "normal",
        NotANumber = "notanumber", Number = "number", Oob = "oob", Parity = "parity",
        Popc = "popc", Right = "r", Range = "range", Rc16 = "rc16", Rc8 = "rc8", Read = "read",
        Relu = "relu", Sat = "sat", Satfinite = "satfinite", Shiftamt = "shiftamt", Sp = "sp",
        SpOrderedMetadata = "sp::ordered_metadata", Subnormal = "subnormal", Sync = "sync",
        SyncRestrictSharedCluster = "sync_restrict::shared::cluster",
        SyncRestrictSharedCta = "sync_restrict::shared::cta", Tile = "tile",
        TileGather4 = "tile::gather4", TileScatter4 = "tile::scatter4", To = "to",
        Trans = "trans", Uni = "uni", Unified = "unified", Up = "up", Wrap = "wrap", X1 = "x1",
        X2 = "x2", X4 = "x4", Xorsign = "xorsign", Alias = "alias", Async = "async",
        Proxy = "proxy", AsyncGeneric = "async::generic", Tensormap = "tensormap",
        TensormapGeneric = "tensormap::generic", AccF32 = "acc::f32", AccF16 = "acc::f16",
        LaunchDependents = "launch_dependents", Wait = "wait", Inc = "inc", Dec = "dec",
        Mask = "mask", KindF8f6f4 = "kind::f8f6f4", KindMxf4 = "kind::mxf4",
        KindMxf4nvf4 = "kind::mxf4nvf4", KindMxf8f6f4 = "kind::mxf8f6f4",
        ScaleVec1X = "scale_vec::1X", ScaleVec2X = "scale_vec::2X", ScaleVec4X = "scale_vec::4X",
        IsCanceled = "is_canceled", GetFirstCtaid = "get_first_ctaid",
        GetFirstCtaidX = "get_first_ctaid::x", GetFirstCtaidY = "get_first_ctaid::y",
        GetFirstCtaidZ = "get_first_ctaid::z", GlobalAddress = "global_address", Rank = "rank",
        BoxDim = "box_dim", GlobalDim = "global_dim", GlobalStride = "global_stride",
        ElementStride = "element_stride", Elemtype = "elemtype",
        InterleaveLayout = "interleave_layout", SwizzleMode = "swizzle_mode",
        SwizzleAtomicity = "swizzle_atomicity", FillMode = "fill_mode", Cvt = "cvt",
        MatrixA = "a", MatrixB = "b", MatrixC = "c", MatrixD = "d",
        A1d = "a1d", A2d = "a2d", Cube = "cube", Acube = "acube", Dim2ms = "2dms",
        A2dms = "a2dms", Base = "base", Level = "level", Grad = "grad", Trap = "trap",
        Zero = "zero", Formatted = "p", Green = "g", Width = "width", Height = "height",
        Depth = "depth", ChannelDataType = "channel_data_type", ChannelOrder = "channel_order",
        NormalizedCoords = "normalized_coords", ArraySize = "array_size",
        NumMipmapLevels = "num_mipmap_levels", NumSamples = "num_samples",
        ForceUnnormalizedCoords = "force_unnormalized_coords", FilterMode = "filter_mode",
        AddrMode0 = "addr_mode_0", AddrMode1 = "addr_mode_1", AddrMode2 = "addr_mode_2",
        MemoryLayout = "memory_layout", PlusOne = "po", Shr7 = "shr7", Shr15 = "shr15",
    }
}

/// `.m64n128k16`: rows, columns and depth of a matrix instruction; `m8n8` of ldmatrix has k 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shape {
    /// Rows of A and of D.
    pub m: u16,
    /// Columns of B and of D.
    pub n: u16,
    /// Columns of A, which are the rows of B.
    pub k: u16,
}

impl Shape {
    /// Reads `m16n8k16` or `m8n8`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (m, rest) = text.strip_prefix('m')?.split_once('n')?;
        let (n, k) = rest.split_once('k').unwrap_or((rest, "0"));
        Some(Shape { m: m.parse().ok()?, n: n.parse().ok()?, k: k.parse().ok()? })
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "m{}n{}", self.m, self.n)?;
        if self.k > 0 { write!(f, "k{}", self.k) } else { Ok(()) }
    }
}

/// One suffix of an instruction, typed by what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mod {
    /// A type such as `.f32`.
    Type(Type),
    /// A rounding such as `.rn`.
    Rounding(Rounding),
    /// A state space such as `.global`.
    Space(Space),
    /// Memory semantics such as `.acquire`.
    Sem(Sem),
    /// The scope of a memory operation, such as `.gpu`.
    Scope(Scope),
    /// A comparison such as `.lt`.
    Cmp(Cmp),
    /// A combining operator: `.add` of an atomic, `.and` of a setp.
    Op(Op),
    /// The part of a product: `.wide`, `.lo`, `.hi`.
    Part(MulPart),
    /// A cache operator such as `.cg`.
    Cache(Cache),
    /// A hint that changes no value, such as `.L2::128B`.
    Hint(Hint),
    /// The layout of a matrix, `.row` or `.col`.
    Layout(Layout),
    /// The shape of a matrix instruction, such as `.m16n8k16`.
    Shape(Shape),
    /// The vector length of ld and st: `.v2`, `.v4`, `.v8`.
    Vec(u8),
    /// Any other suffix, which is there or not.
    Flag(Flag),
}

impl Mod {
    /// Whether `text` (no leading dot) spells this suffix.
    pub fn is(&self, text: &str) -> bool {
        match self {
            Mod::Type(x) => x.text() == text,
            Mod::Rounding(x) => x.text() == text,
            Mod::Space(x) => x.text() == text,
            Mod::Sem(x) => x.text() == text,
            Mod::Scope(x) => x.text() == text,
            Mod::Cmp(x) => x.text() == text,
            Mod::Op(x) => x.text() == text,
            Mod::Part(x) => x.text() == text,
            Mod::Cache(x) => x.text() == text,
            Mod::Hint(x) => x.text() == text,
            Mod::Layout(x) => x.text() == text,
            Mod::Shape(x) => Shape::parse(text) == Some(*x),
            Mod::Vec(n) => text.strip_prefix('v').is_some_and(|d| d == n.to_string()),
            Mod::Flag(x) => x.text() == text,
        }
    }
}

impl std::fmt::Display for Mod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Mod::Type(x) => x.fmt(f),
            Mod::Rounding(x) => x.fmt(f),
            Mod::Space(x) => x.fmt(f),
            Mod::Sem(x) => x.fmt(f),
            Mod::Scope(x) => x.fmt(f),
            Mod::Cmp(x) => x.fmt(f),
            Mod::Op(x) => x.fmt(f),
            Mod::Part(x) => x.fmt(f),
            Mod::Cache(x) => x.fmt(f),
            Mod::Hint(x) => x.fmt(f),
            Mod::Layout(x) => x.fmt(f),
            Mod::Shape(x) => x.fmt(f),
            Mod::Vec(n) => write!(f, "v{n}"),
            Mod::Flag(x) => x.fmt(f),
        }
    }
}

/// The suffixes of one instruction, in the order written, behind typed accessors. Suffixes that
/// belong to the mnemonic ([`crate::table::Opcode::text`]) are not among them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Modifiers(pub std::sync::Arc<[Mod]>);

macro_rules! accessors {
    ($($(#[$m:meta])* $name:ident: $variant:ident -> $t:ty),* $(,)?) => { $(
        $(#[$m])*
        pub fn $name(&self) -> Option<$t> {
            self.0.iter().find_map(|m| if let Mod::$variant(x) = m { Some(*x) } else { None })
        }
    )* };
}

impl Modifiers {
    accessors! {
        /// The rounding modifier.
        rounding: Rounding -> Rounding,
        /// The (first) state space; `None` means generic addressing, or that the instruction
        /// has none.
        space: Space -> Space,
        /// How the access is ordered with others (`.relaxed`, `.acquire`, ..).
        sem: Sem -> Sem,
        /// Scope of a memory operation.
        scope: Scope -> Scope,
        /// The comparison of `setp` and its kin (`.lt`, `.equ`, ..).
        cmp: Cmp -> Cmp,
        /// What an atomic or a reduction combines by (`.add`, `.min`, ..).
        op: Op -> Op,
        /// `.hi`, `.lo` or `.wide` of a product.
        part: Part -> MulPart,
        /// How caches treat the access (`.ca`, `.cs`, ..).
        cache: Cache -> Cache,
        /// The shape of a matrix instruction's tiles (`.m16n8k16`, ..).
        shape: Shape -> Shape,
    }

    /// Whether that suffix is among them.
    pub fn has(&self, flag: Flag) -> bool {
        self.0.contains(&Mod::Flag(flag))
    }

    /// Whether that hint is among them.
    pub fn has_hint(&self, hint: Hint) -> bool {
        self.0.contains(&Mod::Hint(hint))
    }

    /// Vector length of ld and st: 1 where not written.
    pub fn vec(&self) -> u8 {
        self.0.iter().find_map(|m| if let Mod::Vec(n) = m { Some(*n) } else { None }).unwrap_or(1)
    }

    /// All types, in the order written (`cvt.rn.f16.f32` has `f16`, `f32`).
    pub fn types(&self) -> impl Iterator<Item = Type> + '_ {
        self.0.iter().filter_map(|m| if let Mod::Type(t) = m { Some(*t) } else { None })
    }

    /// The `i`th type, from 0.
    pub fn ty(&self, i: usize) -> Option<Type> {
        self.types().nth(i)
    }

    /// All state spaces, in the order written (destination before source in copies).
    pub fn spaces(&self) -> impl Iterator<Item = Space> + '_ {
        self.0.iter().filter_map(|m| if let Mod::Space(s) = m { Some(*s) } else { None })
    }

    /// All matrix layouts, in the order written.
    pub fn layouts(&self) -> impl Iterator<Item = Layout> + '_ {
        self.0.iter().filter_map(|m| if let Mod::Layout(s) = m { Some(*s) } else { None })
    }

    /// Every suffix that is only a yes or no.
    pub fn flags(&self) -> impl Iterator<Item = Flag> + '_ {
        self.0.iter().filter_map(|m| if let Mod::Flag(s) = m { Some(*s) } else { None })
    }
}

impl std::fmt::Display for Modifiers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|m| write!(f, ".{m}"))
    }
}
