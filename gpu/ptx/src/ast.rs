//! The syntax tree: a [`Module`] with names resolved to indices.
//!
//! The parser resolves every name while it reads: registers to [`RegId`], labels to [`LabelId`],
//! variables and functions to [`Symbol`]. Function bodies are flat lists of [`Statement`]s;
//! nested scopes are markers, so neither reading nor walking a body recurses.

use crate::table::{FormId, Opcode};
use crate::types::{Modifiers, Space, Type};

/// A place in the source text: line and column, both counted from 1 (columns in characters).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pos {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub col: u32,
}

impl std::fmt::Display for Pos {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.line, self.col)
    }
}

macro_rules! ids {
    ($($(#[$m:meta])* $name:ident),*) => { $(
        $(#[$m])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
        impl $name {
            /// The index as `usize`.
            pub const fn index(self) -> usize { self.0 as usize }
        }
    )* };
}

ids! {
    /// A register of one function: index into [`Body::registers`].
    RegId,
    /// A label of one function: index into [`Body::labels`].
    LabelId,
    /// A module-scope variable: index into [`Module::variables`].
    VarId,
    /// A function-scope variable (`.local`, `.shared`, `.param`): index into [`Body::variables`].
    LocalId,
    /// A function or entry: index into [`Module::functions`].
    FuncId,
    /// A `.branchtargets`, `.calltargets` or `.callprototype` list: index into [`Body::tables`].
    TableId
}

/// One PTX module (translation unit).
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Module {
    /// `.version major.minor` of the PTX ISA.
    pub version: (u32, u32),
    /// `.target`: the architecture that the module is written for.
    pub target: Target,
    /// `.address_size`, 32 or 64 (64 where the directive is absent).
    pub address_size: u32,
    /// Module-scope variables, in order of first declaration.
    pub variables: Vec<Variable>,
    /// Functions and entries, in order of first declaration.
    pub functions: Vec<Function>,
    /// `.alias name, aliasee;`: the alias, then the function that it stands for.
    pub aliases: Vec<(FuncId, FuncId)>,
    /// `.file index "name"` directives.
    pub files: Vec<SourceFile>,
    /// Everything at module scope, in source order.
    pub items: Vec<Item>,
}

/// `.target sm_90a, debug, ...`
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Target {
    /// Compute capability times ten: 90 for `sm_90a`.
    pub sm: u32,
    /// `a` (architecture-specific) or `f` (family-specific) targets.
    pub suffix: Option<char>,
    /// Further words: `debug`, `texmode_independent`, `map_f64_to_f32`, ...
    pub options: Vec<String>,
}

/// A `.file` directive: a source file that `.loc` directives refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The number `.loc` refers to.
    pub index: u32,
    /// File name as written.
    pub name: String,
}

/// What stands at module scope, in source order.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A module-scope variable, where it is declared or defined.
    Variable(VarId),
    /// A function without a body (a prototype).
    Declare(FuncId),
    /// A function with its body.
    Define(FuncId),
    /// An alias: index into [`Module::aliases`].
    Alias(usize),
    /// A `.file` directive: index into [`Module::files`].
    File(usize),
    /// `.pragma` strings at module scope.
    Pragma(Vec<String>),
}

/// The linking directive of a variable or function: who sees its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Linkage {
    /// None: visible in this module only.
    #[default]
    Internal,
    /// `.extern`: defined in another module.
    Extern,
    /// `.visible`: other modules may refer to it.
    Visible,
    /// `.weak`: as `.visible`, but another definition of the name wins.
    Weak,
    /// `.common`: several modules may define it, the largest counts.
    Common,
}

/// A variable or parameter: where it lives, and its type.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// Name as written.
    pub name: String,
    /// Where the name stands.
    pub pos: Pos,
    /// Linking directive; [`Linkage::Internal`] for parameters and function-scope variables.
    pub linkage: Linkage,
    /// State space; [`Space::Reg`] only for register parameters of `.func`.
    pub space: Space,
    /// `.constN` bank of a banked constant variable (deprecated syntax).
    pub bank: Option<u32>,
    /// `.align` in bytes, where written.
    pub align: Option<u32>,
    /// Type of the variable, or of its elements where it is an array.
    pub ty: Type,
    /// Vector length of an element: 1, 2 or 4.
    pub vector: u8,
    /// Array dimensions, outermost first; `None` for an empty `[]`.
    pub dims: Vec<Option<u64>>,
    /// Initialiser, where written; the rest of the variable is zero.
    pub init: Option<Init>,
    /// `.attribute(.managed)`.
    pub managed: bool,
    /// `.attribute(.unified(uuid1, uuid2))`.
    pub unified: Option<(u64, u64)>,
    /// `.ptr .space .align N` of a kernel parameter.
    pub ptr: Option<PtrAttr>,
    /// The register that a register parameter (`.reg`) of a `.func` stands for, in a definition.
    pub register: Option<RegId>,
}

/// `.ptr` attribute of a kernel parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PtrAttr {
    /// The space pointed to; `None` is generic.
    pub space: Option<Space>,
    /// Alignment in bytes of what it points to, where written.
    pub align: Option<u32>,
}

impl Variable {
    /// Bytes of one element.
    pub fn element_bytes(&self) -> u64 {
        u64::from(self.ty.bytes()) * u64::from(self.vector)
    }

    /// Bytes in memory; an empty dimension counts from the initialiser, or as zero
    /// (`.extern .shared x[]`).
    pub fn bytes(&self) -> u64 {
        let listed = match &self.init {
            Some(Init::List(l)) => l.len() as u64,
            Some(_) => 1,
            None => 0,
        };
        self.dims
            .iter()
            .map(|d| d.unwrap_or(listed))
            .fold(self.element_bytes(), |n, d| n.saturating_mul(d))
    }

    /// Alignment in bytes: `.align`, else the size of one element (natural alignment).
    pub fn alignment(&self) -> u32 {
        self.align.unwrap_or(self.ty.bytes() * u32::from(self.vector)).max(1)
    }
}

/// The initialiser of a `.global` or `.const` variable.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// A literal, of the type of the element that it initialises.
    Imm(Imm),
    /// The address of a variable or function: `name`, `name+4`, `generic(name)+4`,
    /// `0xFF00(name)` (a mask that selects one byte of the address).
    Symbol {
        /// The variable or function whose address is taken.
        symbol: Symbol,
        /// Byte offset added to the address.
        addend: i64,
        /// Written `generic(name)`: the generic address, else the address in its space.
        generic: bool,
        /// Mask that selects one byte of the address, where written.
        mask: Option<u64>,
    },
    /// `{ ... }`, nested as the dimensions are.
    List(Vec<Init>),
}

/// The contents of an initialised variable.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Image {
    /// Little-endian bytes, zero where nothing is written; [`Variable::bytes`] of them.
    pub bytes: Vec<u8>,
    /// Addresses to be written over `bytes` when they are known.
    pub relocations: Vec<Relocation>,
}

/// An address to be written into an [`Image`] once it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Byte offset within the image.
    pub offset: u64,
    /// Bytes of the address to write.
    pub size: u32,
    /// The variable or function whose address is written.
    pub symbol: Symbol,
    /// Bytes that are added to the address.
    pub addend: i64,
    /// Whether the generic address is meant, else the address in its space.
    pub generic: bool,
    /// The address is shifted right by this many bits before it is written (byte masks).
    pub shift: u32,
}

/// A kernel (`.entry`) or device function (`.func`).
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Name as written.
    pub name: String,
    /// Where the name stands (the definition's, where there is one).
    pub pos: Pos,
    /// Whether it is an `.entry` (kernel), else a `.func`.
    pub entry: bool,
    /// Whether others see it: `.visible`, `.extern`, `.weak`, or none of them.
    pub linkage: Linkage,
    /// Return values, of a `.func` only.
    pub returns: Vec<Variable>,
    /// The formal parameters in order.
    pub params: Vec<Variable>,
    /// Performance-tuning and cluster directives: `.maxntid` and its kin.
    pub tuning: Tuning,
    /// The body; `None` for a declaration.
    pub body: Option<Body>,
}

/// Performance-tuning and cluster directives of a function.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Tuning {
    /// `.maxntid nx, ny, nz` (absent dimensions are 1).
    pub maxntid: Option<[u32; 3]>,
    /// `.reqntid nx, ny, nz` (absent dimensions are 1).
    pub reqntid: Option<[u32; 3]>,
    /// `.maxnreg n`: most registers per thread.
    pub maxnreg: Option<u32>,
    /// `.minnctapersm n`: CTAs that an SM is to hold at least.
    pub minnctapersm: Option<u32>,
    /// `.maxnctapersm n`: CTAs that an SM is to hold at most (deprecated).
    pub maxnctapersm: Option<u32>,
    /// `.reqnctapercluster nx, ny, nz` (absent dimensions are 1).
    pub reqnctapercluster: Option<[u32; 3]>,
    /// `.explicitcluster`: every launch must give the size of its clusters.
    pub explicitcluster: bool,
    /// `.maxclusterrank n`: most CTAs of a cluster.
    pub maxclusterrank: Option<u32>,
    /// `.blocksareclusters`: the grid of a launch counts clusters, not CTAs.
    pub blocksareclusters: bool,
    /// `.noreturn`: the function never returns to its caller.
    pub noreturn: bool,
    /// `.abi_preserve n`: general-purpose registers that the function preserves.
    pub abi_preserve: Option<u32>,
    /// `.abi_preserve_control n`: control registers that the function preserves.
    pub abi_preserve_control: Option<u32>,
    /// `.attribute(.unified(uuid1, uuid2))` of a function.
    pub unified: Option<(u64, u64)>,
    /// `.pragma` strings between header and body.
    pub pragmas: Vec<String>,
}

/// The body of a function: a flat list with its tables of names.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Body {
    /// Registers that some instruction names, in order of first use; a declared register that is
    /// never named has no entry.
    pub registers: Vec<Register>,
    /// Labels, in order of first mention.
    pub labels: Vec<Label>,
    /// Function-scope variables, in the order in which they stand.
    pub variables: Vec<Variable>,
    /// Branch-target, call-target and prototype lists.
    pub tables: Vec<Table>,
    /// The statements, in source order.
    pub statements: Vec<Statement>,
}

/// A register that some instruction names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Register {
    /// Name as written, `%` included.
    pub name: String,
    /// The type that it was declared with.
    pub ty: Type,
    /// Vector length (`.reg .v4 .f32 %v`), else 1.
    pub vector: u8,
}

/// A label: the same name may stand for several labels of one function, in different scopes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Name as written.
    pub name: String,
    /// Index into [`Body::statements`] of its [`Statement::Label`].
    pub statement: u32,
}

/// One item of a function's body, in source order.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    /// An instruction that fits a row of the table.
    Instruction(Instruction),
    /// The place that a label marks.
    Label(LabelId),
    /// `{`: a scope of names begins.
    BeginScope,
    /// `}`: the innermost scope ends.
    EndScope,
    /// `.reg .type names;`: the registers that a scope declares.
    Registers(RegDecl),
    /// The declaration of a function-scope variable.
    Variable(LocalId),
    /// `name: .branchtargets ...;` and its kin.
    Table(TableId),
    /// `.pragma "...";` strings inside the body.
    Pragma(Vec<String>),
    /// `.loc`: the instructions that follow, up to the next one, stem from there.
    Loc(Loc),
    /// An instruction that is known but never executed (sm_100's), or, where the
    /// parser was told to go on, one that it does not know.
    Unsupported(Box<Unsupported>),
}

/// An instruction that is kept as text only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// Where its guard or mnemonic starts.
    pub pos: Pos,
    /// The predicate under which it would execute; the text has it too.
    pub guard: Option<Guard>,
    /// Its text, without the semicolon.
    pub text: String,
    /// Why it is not read, with line and source.
    pub reason: String,
}

/// A declaration of registers: `.reg .v4 .f32 a, b<10>;`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegDecl {
    /// Vector length of each register, else 1.
    pub vector: u8,
    /// Type of each register.
    pub ty: Type,
    /// Names as written; with a count N, `name<N>` declares `name0` to `name(N-1)`.
    pub names: Vec<(String, Option<u32>)>,
}

/// A `.loc` directive: the place in another source that the following instructions stem from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loc {
    /// Number of a `.file` directive.
    pub file: u32,
    /// Line in that file, from 1.
    pub line: u32,
    /// Column in that file, as the directive gives it.
    pub col: u32,
    /// `function_name label+offset, inlined_at file line col`, where written: the place at which
    /// the function was inlined.
    pub inlined_at: Option<InlinedAt>,
}

/// The second half of a `.loc`: the place at which a function was inlined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlinedAt {
    /// Label in `.debug_str` that names the inlined function.
    pub function: String,
    /// Byte offset from that label.
    pub offset: i64,
    /// Number of a `.file` directive.
    pub file: u32,
    /// Line in that file.
    pub line: u32,
    /// Column in that file.
    pub col: u32,
}

/// A list that an indirect branch or call refers to.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// The label before the directive, by which instructions name the list.
    pub name: String,
    /// What the list holds.
    pub kind: TableKind,
}

/// Contents of a [`Table`], by its directive.
#[derive(Clone, Debug, PartialEq)]
pub enum TableKind {
    /// `.branchtargets L0, L1, ...;`: where a `brx.idx` may jump to.
    Branch(Vec<LabelId>),
    /// `.calltargets f, g, ...;`: the functions that an indirect call may call.
    Call(Vec<FuncId>),
    /// `.callprototype (ret) _ (params) .noreturn ...;`: the signature of an indirect call's
    /// target.
    Prototype {
        /// Return values of the target.
        returns: Vec<Variable>,
        /// Formal parameters of the target.
        params: Vec<Variable>,
        /// `.noreturn`, `.abi_preserve` and `.abi_preserve_control`.
        tuning: Tuning,
    },
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Symbol {
    /// A module-scope variable.
    Variable(VarId),
    /// A function-scope variable.
    Local(LocalId),
    /// A formal parameter: index into [`Function::params`].
    Param(u32),
    /// A formal return value: index into [`Function::returns`].
    Return(u32),
    /// A function or entry.
    Function(FuncId),
}

/// One instruction, resolved against the table of instructions.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    /// Where its guard or mnemonic starts.
    pub pos: Pos,
    /// `@p` or `@!p`, where written.
    pub guard: Option<Guard>,
    /// What it does, by its mnemonic.
    pub op: Opcode,
    /// The row of the table that it matches, which says how its operands are read.
    pub form: FormId,
    /// Its dotted suffixes, typed.
    pub mods: Modifiers,
    /// Its operands, one for each slot of its form ([`FormId::form`]): an optional operand that
    /// is not there is [`Operand::None`], so that the `i`th operand always means the same.
    /// `call` has four: list of return values, target, list of arguments, prototype or target
    /// table.
    pub operands: Vec<Operand>,
}

/// The guard predicate of an instruction: it executes only in lanes where the guard holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guard {
    /// A `.pred` register.
    pub reg: RegId,
    /// `@!p`: executes where the predicate is false.
    pub negated: bool,
}

/// Which bytes (`.b3210`) or half-words (`.h10`) a video instruction takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Selector {
    /// Whether parts are half-words, else bytes.
    pub halves: bool,
    /// How many are named, up to 4.
    pub count: u8,
    /// Their numbers, 0 to 7, as written; the last is of the lowest element.
    pub parts: [u8; 4],
}

impl Selector {
    /// Reads `b3210`, `h1` and the like.
    pub fn parse(text: &str) -> Option<Selector> {
        let (halves, digits) = match text.as_bytes() {
            [b'b', digits @ ..] => (false, digits),
            [b'h', digits @ ..] => (true, digits),
            _ => return None,
        };
        let most = if halves { 2 } else { 4 };
        let fits = (1..=most).contains(&digits.len());
        if !fits || !digits.iter().all(|d| (b'0'..b'8').contains(d)) {
            return None;
        }
        let mut parts = [0; 4];
        parts.iter_mut().zip(digits).for_each(|(part, digit)| *part = digit - b'0');
        Some(Selector { halves, count: digits.len() as u8, parts })
    }
}

impl std::fmt::Display for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.halves { "h" } else { "b" })?;
        self.parts[..usize::from(self.count)].iter().try_for_each(|part| write!(f, "{part}"))
    }
}

/// An operand of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register, by its number in the function.
    Reg(RegId),
    /// One component of a vector register: `.x` (or `.r`), `.y` (`.g`), `.z` (`.b`), `.w` (`.a`)
    /// are 0 to 3.
    Component(RegId, u8),
    /// Bytes or half-words of a register in a video instruction: `%r1.b3210`.
    Selected(RegId, Selector),
    /// A special register such as `%tid.x`.
    Special(SpecialReg),
    /// A number in the text.
    Imm(Imm),
    /// `{a, b, ...}` of any length: elements of a vector, or parts that are packed.
    Vector(Box<[Operand]>),
    /// `_`: a result that is not wanted, or an element that is not there.
    Sink,
    /// `[base+offset]`: an address in memory.
    Address(Address),
    /// `[base, {c0, c1}]` of cp.async.bulk.tensor and of textures; `base` may be an address with
    /// offset. Further operands in the brackets (`[tex, sampler, {..}]`) stand before the last.
    Tensor(Address, Box<[Operand]>),
    /// The address of a variable or function as a value: `name` or `name+4`.
    Symbol(Symbol, i64),
    /// The label that a branch jumps to.
    Label(LabelId),
    /// A list of targets, or a call's prototype.
    Table(TableId),
    /// `!p`: a predicate, negated.
    Not(RegId),
    /// `-%r1.h0`: an operand of `vmad`, negated, which may be a part of a register.
    Negated(RegId, Option<Selector>),
    /// `p|q`: two destinations.
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` of a call: return values or arguments.
    List(Vec<Operand>),
    /// An optional operand that is not there.
    None,
}

/// `[base+offset]`: an address, its state space being the instruction's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// What the offset is added to.
    pub base: Base,
    /// Bytes that are added to the base, negative too.
    pub offset: i64,
}

/// The base of an address, to which the offset is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A register that holds an address.
    Reg(RegId),
    /// The address of a variable, parameter or function.
    Symbol(Symbol),
    /// An absolute address: the offset is all there is.
    Absolute,
}

/// A literal operand or initialiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Imm {
    /// Integer without suffix, or with a negative value.
    Int(i64),
    /// Integer with suffix `U`, or too large for `s64`.
    Uint(u64),
    /// `0fXXXXXXXX`: the bits of an IEEE single.
    F32(u32),
    /// `0dXXXXXXXXXXXXXXXX` or a decimal: the bits of an IEEE double.
    F64(u64),
}

impl Imm {
    /// The bits of this literal as an operand of type `ty` (PTX ISA, "Operand Type Conversion"
    /// of constants): integers are truncated to the width; a float literal becomes the float
    /// format where `ty` is one (singles and doubles only, rounded to nearest even), else its own
    /// bits.
    pub fn bits(self, ty: Type) -> u64 {
        let value = match (self, ty) {
            (Imm::Int(v), _) => v as u64,
            (Imm::Uint(v), _) => v,
            (Imm::F32(b), Type::F64) => f64::from(f32::from_bits(b)).to_bits(),
            (Imm::F64(b), Type::F32 | Type::Tf32) => {
                u64::from((f64::from_bits(b) as f32).to_bits())
            }
            (Imm::F32(b), _) => u64::from(b),
            (Imm::F64(b), _) => b,
        };
        match ty.bits() {
            n if n >= 64 => value,
            n => value & ((1 << n) - 1),
        }
    }
}

/// A special register (PTX ISA, "Special Registers").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpecialReg {
    /// The register, numbered families once.
    pub kind: Special,
    /// `.x` to `.w` (0 to 3) of a vector one; `None` where the whole is meant.
    pub lane: Option<u8>,
    /// Number of `%pm0`, `%pm0_64`, `%envreg0`, `%reserved_smem_offset_<n>`, else 0.
    pub index: u8,
}

crate::types::words! {
    /// Special registers by name, numbered families once.
    Special {
        Tid = "%tid", Ntid = "%ntid", Laneid = "%laneid", Warpid = "%warpid",
        Nwarpid = "%nwarpid", Ctaid = "%ctaid", Nctaid = "%nctaid", Smid = "%smid",
        Nsmid = "%nsmid", Gridid = "%gridid",
        IsExplicitCluster = "%is_explicit_cluster", Clusterid = "%clusterid",
        Nclusterid = "%nclusterid", ClusterCtaid = "%cluster_ctaid",
        ClusterNctaid = "%cluster_nctaid", ClusterCtarank = "%cluster_ctarank",
        ClusterNctarank = "%cluster_nctarank",
        LanemaskEq = "%lanemask_eq", LanemaskLe = "%lanemask_le", LanemaskLt = "%lanemask_lt",
        LanemaskGe = "%lanemask_ge", LanemaskGt = "%lanemask_gt",
        Clock = "%clock", ClockHi = "%clock_hi", Clock64 = "%clock64",
        Pm = "%pm", Pm64 = "%pm_64", Envreg = "%envreg",
        Globaltimer = "%globaltimer", GlobaltimerLo = "%globaltimer_lo",
        GlobaltimerHi = "%globaltimer_hi",
        ReservedSmemOffsetBegin = "%reserved_smem_offset_begin",
        ReservedSmemOffsetEnd = "%reserved_smem_offset_end",
        ReservedSmemOffsetCap = "%reserved_smem_offset_cap",
        ReservedSmemOffset = "%reserved_smem_offset_",
        TotalSmemSize = "%total_smem_size", AggrSmemSize = "%aggr_smem_size",
        DynamicSmemSize = "%dynamic_smem_size", CurrentGraphExec = "%current_graph_exec",
    }
}

impl Special {
    /// Type of the value (PTX ISA, "Special Registers").
    pub const fn ty(self) -> Type {
        match self {
            Special::Clock64
            | Special::Pm64
            | Special::Globaltimer
            | Special::Gridid
            | Special::CurrentGraphExec => Type::U64,
            Special::IsExplicitCluster => Type::Pred,
            Special::Envreg => Type::B32,
            _ => Type::U32,
        }
    }

    /// Whether it has components `.x` to `.w`.
    pub const fn is_vector(self) -> bool {
        matches!(
            self,
            Special::Tid
                | Special::Ntid
                | Special::Ctaid
                | Special::Nctaid
                | Special::Clusterid
                | Special::Nclusterid
                | Special::ClusterCtaid
                | Special::ClusterNctaid
        )
    }
}

/// The four operands of a call, borrowed from an [`Instruction`].
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Return values, in order.
    pub returns: &'a [Operand],
    /// [`Operand::Symbol`] of a function, or a register (indirect).
    pub target: &'a Operand,
    /// Arguments, in order.
    pub args: &'a [Operand],
    /// Prototype or target list, of an indirect call only.
    pub table: Option<TableId>,
}

impl Instruction {
    /// The operand in the slot of that name in the form's syntax (`policy`, `mask`, `offsets`);
    /// `None` where the form has no such slot or the operand is not there.
    pub fn named(&self, slot: &str) -> Option<&Operand> {
        let i = self.form.form().slots.iter().position(|s| s.name == slot)?;
        self.operands.get(i).filter(|o| **o != Operand::None)
    }

    /// The parts of a `call`; `None` for any other instruction.
    pub fn call(&self) -> Option<Call<'_>> {
        match (self.op, self.operands.as_slice()) {
            (Opcode::Call, [Operand::List(returns), target, Operand::List(args), last]) => {
                let table = if let Operand::Table(t) = last { Some(*t) } else { None };
                Some(Call { returns, target, args, table })
            }
            _ => None,
        }
    }
}

impl Module {
    /// The function or entry of that name.
    pub fn function(&self, name: &str) -> Option<(FuncId, &Function)> {
        let i = self.functions.iter().position(|f| f.name == name)?;
        Some((FuncId(i as u32), &self.functions[i]))
    }

    /// The module-scope variable of that name.
    pub fn variable(&self, name: &str) -> Option<(VarId, &Variable)> {
        let i = self.variables.iter().position(|v| v.name == name)?;
        Some((VarId(i as u32), &self.variables[i]))
    }
}

impl Body {
    /// The instructions of the body, each with its index into [`Body::statements`].
    pub fn instructions(&self) -> impl Iterator<Item = (usize, &Instruction)> {
        self.statements.iter().enumerate().filter_map(|(i, s)| match s {
            Statement::Instruction(ins) => Some((i, ins)),
            _ => None,
        })
    }
}
