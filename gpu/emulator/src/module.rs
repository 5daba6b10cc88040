//! Loaded modules: PTX text, its variables in device memory, its kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use fathom_ptx::ast;
use fathom_ptx::types::Space;
use fathom_ptx::{ErrorKind, Options, parse_with};

use crate::config::LaunchConfig;
use crate::device::Device;
use crate::error::{Error, Unsupported};
use crate::lower::{self, Code, Outline};
use crate::memory::AllocationKind;
use crate::preset::Preset;
use crate::program::{FUNCTION_WINDOW, Program};

/// A program and what was lowered of it; shared by all loads of the same text.
#[derive(Debug)]
struct Compiled {
    program: Arc<Program>,
    code: Vec<OnceLock<Result<Arc<Code>, Unsupported>>>,
    outlines: Vec<OnceLock<Option<Outline>>>,
    /// Registers that a function has live at once.
    pressures: Vec<OnceLock<u32>>,
}

static CACHE: Mutex<Option<HashMap<blake3::Hash, Weak<Compiled>>>> = Mutex::new(None);

impl Compiled {
    fn parse(text: &str) -> Result<Arc<Compiled>, Error> {
        let text = text.trim_end_matches('\0');
        let hash = blake3::hash(text.as_bytes());
        let mut cache = CACHE.lock().expect("no panic holds this lock");
        let cache = cache.get_or_insert_default();
        if let Some(compiled) = cache.get(&hash).and_then(Weak::upgrade) {
            return Ok(compiled);
        }
        // An instruction that the table does not know is refused with the kernel that holds it.
        let mut ast = fathom_ptx::parse(text)
            .or_else(|e| match e.kind {
                ErrorKind::UnknownInstruction => parse_with(text, Options { keep_unknown: true }),
                ErrorKind::Malformed => Err(e),
            })
            .map_err(|e| Error::Ptx(e.to_string()))?;
        lower::vectors::split(&mut ast);
        let count = ast.functions.len();
        let compiled = Arc::new(Compiled {
            program: Arc::new(Program::new(ast, text)),
            code: (0..count).map(|_| OnceLock::new()).collect(),
            outlines: (0..count).map(|_| OnceLock::new()).collect(),
            pressures: (0..count).map(|_| OnceLock::new()).collect(),
        });
        cache.insert(hash, Arc::downgrade(&compiled));
        Ok(compiled)
    }

    /// The micro-operations of an entry and of every function it may call.
    fn code(&self, entry: usize) -> Result<Arc<Code>, Unsupported> {
        let lower = || lower::lower(&self.program, entry, &self.pressures).map(Arc::new);
        self.code[entry].get_or_init(lower).clone()
    }

    /// What an entry needs of an SM; none where no device has room for its variables.
    fn outline(&self, entry: usize) -> Option<Outline> {
        let outline = || lower::outline(&self.program, entry, &self.pressures).ok();
        *self.outlines[entry].get_or_init(outline)
    }
}

/// Where a variable of a module lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Address in global memory (constant variables lie there too).
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Whether it is a `.const` variable.
    pub constant: bool,
}

struct ModuleInner {
    device: Device,
    compiled: Arc<Compiled>,
    symbols: Vec<Option<Symbol>>,
}

/// A module loaded on a device. Its variables are freed with the last handle.
#[derive(Clone)]
pub struct Module(Arc<ModuleInner>);

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Module {:?}", self.image().entries())
    }
}

impl Drop for ModuleInner {
    fn drop(&mut self) {
        for (variable, symbol) in self.compiled.program.ast.variables.iter().zip(&self.symbols) {
            if let Some(symbol) = symbol.as_ref().filter(|_| !variable.managed) {
                // Freed at most once: only this handle knows the address.
                let _ = self.device.free(symbol.address);
            }
        }
    }
}

/// PTX text that was parsed and is on no device yet; clones are the same text.
#[derive(Clone, Debug)]
pub struct Image(Arc<Compiled>);

impl Image {
    /// Parses PTX text (a trailing NUL is fine).
    ///
    /// # Errors
    /// [`Error::Ptx`] with line and column.
    pub fn parse(text: &str) -> Result<Image, Error> {
        Compiled::parse(text).map(Image)
    }

    /// Names of its kernels, in source order.
    pub fn entries(&self) -> Vec<&str> {
        let functions = &self.0.program.ast.functions;
        functions.iter().filter(|f| f.entry && f.body.is_some()).map(|f| &*f.name).collect()
    }

    /// Its `.version`, times ten.
    pub fn version(&self) -> u32 {
        self.0.program.ast.version.0 * 10 + self.0.program.ast.version.1
    }
}

/// The managed variables of a text, in memory of this process that every device reaches at the
/// same address. They stay, since the program may hold pointers to them.
#[derive(Clone, Debug)]
pub struct Managed(Vec<Option<Symbol>>);

impl Managed {
    /// Places them and gives them their first values.
    ///
    /// # Errors
    /// None that is known: the memory is fresh.
    pub fn new(device: &Device, image: &Image) -> Result<Managed, Error> {
        let mut symbols = Vec::new();
        for variable in &image.0.program.ast.variables {
            if !variable.managed {
                symbols.push(None);
                continue;
            }
            let bytes = variable.bytes();
            let address = device.managed_variable(bytes, variable.alignment().into());
            if let Some(image) = variable.image() {
                device.write(address, &image.bytes)?;
            }
            symbols.push(Some(Symbol { address, bytes, constant: false }));
        }
        Ok(Managed(symbols))
    }

    /// Such a variable of the text it was made for, by name.
    pub fn symbol(&self, image: &Image, name: &str) -> Option<Symbol> {
        let mut named = image.0.program.ast.variables.iter().zip(&self.0);
        named.find(|(variable, _)| variable.name == name).and_then(|(_, symbol)| symbol.clone())
    }
}

impl Module {
    /// Parses PTX text (a trailing NUL is fine) and places its variables on `device`.
    ///
    /// # Errors
    /// [`Error::Ptx`] with line and column; [`Error::Memory`] where variables do not fit.
    pub fn load(device: &Device, text: &str) -> Result<Module, Error> {
        let image = Image::parse(text)?;
        Self::place(device, &image, &Managed::new(device, &image)?)
    }

    /// Places the variables of a parsed text on `device`, but for the managed ones, which
    /// several modules of one text may share.
    ///
    /// # Errors
    /// [`Error::Memory`] where variables do not fit.
    pub fn place(device: &Device, image: &Image, managed: &Managed) -> Result<Module, Error> {
        let compiled = image.0.clone();
        let mut symbols = Vec::new();
        for (variable, shared) in compiled.program.ast.variables.iter().zip(&managed.0) {
            symbols.push(match variable.space {
                Space::Global if variable.managed => shared.clone(),
                Space::Global | Space::Const => {
                    let bytes = variable.bytes();
                    let kind = AllocationKind::Variable(variable.name.clone());
                    let align = u64::from(variable.alignment());
                    let address = device.memory().alloc(device.index(), bytes, align, kind)?;
                    let constant = variable.space == Space::Const;
                    Some(Symbol { address, bytes, constant })
                }
                _ => None,
            });
        }
        let module = Module(Arc::new(ModuleInner { device: device.clone(), compiled, symbols }));
        module.initialise()?;
        Ok(module)
    }

    fn initialise(&self) -> Result<(), Error> {
        let ast = &self.0.compiled.program.ast;
        for (variable, symbol) in ast.variables.iter().zip(&self.0.symbols) {
            let Some(symbol) = symbol else { continue };
            // Without initialiser a variable is zero, as fresh memory is.
            let Some(mut image) = variable.image() else { continue };
            if variable.managed && image.relocations.is_empty() {
                continue;
            }
            for r in &image.relocations {
                let address = self.address_of(r.symbol).wrapping_add(r.addend as u64) >> r.shift;
                let at = r.offset as usize;
                image.bytes[at..at + r.size as usize]
                    .copy_from_slice(&address.to_le_bytes()[..r.size as usize]);
            }
            self.0.device.write(symbol.address, &image.bytes)?;
        }
        Ok(())
    }

    /// The address of a module-scope variable or function.
    pub(crate) fn address_of(&self, symbol: ast::Symbol) -> u64 {
        match symbol {
            ast::Symbol::Variable(v) => {
                self.0.symbols[v.index()].as_ref().map_or(0, |symbol| symbol.address)
            }
            ast::Symbol::Function(f) => FUNCTION_WINDOW + 16 * f.index() as u64,
            _ => 0,
        }
    }

    /// The device it is loaded on.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    pub(crate) fn program(&self) -> &Arc<Program> {
        &self.0.compiled.program
    }

    /// The text it was placed from.
    pub fn image(&self) -> Image {
        Image(self.0.compiled.clone())
    }

    /// A kernel by name.
    ///
    /// # Errors
    /// [`Error::NotFound`] lists the kernels there are.
    pub fn function(&self, name: &str) -> Result<Function, Error> {
        let functions = &self.0.compiled.program.ast.functions;
        let index = functions.iter().position(|f| f.entry && f.body.is_some() && f.name == name);
        match index {
            Some(index) => Ok(Function { module: self.clone(), index }),
            None => Err(Error::NotFound {
                what: "entry",
                name: name.into(),
                known: self.image().entries().join(", "),
            }),
        }
    }

    /// The kernel that PTX's `mov` gives this address for.
    pub fn function_at(&self, address: u64) -> Option<Function> {
        let functions = &self.0.compiled.program.ast.functions;
        let index = (address.checked_sub(FUNCTION_WINDOW)? / 16) as usize;
        let found = functions.get(index).filter(|f| f.entry && f.body.is_some());
        found.map(|_| Function { module: self.clone(), index })
    }

    /// A `.global` or `.const` variable by name.
    ///
    /// # Errors
    /// [`Error::NotFound`] lists the variables there are.
    pub fn symbol(&self, name: &str) -> Result<Symbol, Error> {
        let variables = &self.0.compiled.program.ast.variables;
        let found =
            variables.iter().zip(&self.0.symbols).find(|(v, s)| v.name == name && s.is_some());
        match found {
            Some((_, symbol)) => Ok(symbol.clone().expect("just checked")),
            None => {
                let named = variables.iter().zip(&self.0.symbols).filter(|(_, s)| s.is_some());
                let known = named.map(|(v, _)| &*v.name).collect::<Vec<_>>().join(", ");
                Err(Error::NotFound { what: "variable", name: name.into(), known })
            }
        }
    }
}

/// One kernel parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Name in the PTX.
    pub name: String,
    /// Byte offset in [`LaunchConfig::params`].
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// What `cuFuncGetAttribute` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Threads of a CTA at most.
    pub max_threads: u32,
    /// Bytes of shared memory that a CTA has by variables declared with a size.
    pub declared_shared_bytes: u32,
    /// The same, up to where dynamic shared memory may begin.
    pub static_shared_bytes: u32,
    /// Bytes of the module's constant memory.
    pub const_bytes: u32,
    /// Bytes of local memory that a thread has.
    pub local_bytes: u32,
    /// Estimate of the 32-bit registers of a thread: the most that are live at once.
    pub registers: u32,
    /// `.target` number, 90 for `sm_90a`.
    pub target: u32,
    /// Threads of a block in x, y, z that the kernel demands (`.reqntid`); none: any.
    pub required_block: Option<[u32; 3]>,
    /// CTAs of a cluster in x, y, z that the kernel demands (`.reqnctapercluster`); none: any.
    pub required_cluster: Option<[u32; 3]>,
}

/// A kernel of a loaded module.
#[derive(Clone, Debug)]
pub struct Function {
    module: Module,
    index: usize,
}

impl Function {
    fn ast(&self) -> &ast::Function {
        &self.module.0.compiled.program.ast.functions[self.index]
    }

    /// Name of the entry, as the PTX has it.
    pub fn name(&self) -> &str {
        &self.ast().name
    }

    /// The module it belongs to.
    pub fn module(&self) -> &Module {
        &self.module
    }

    pub(crate) fn code(&self) -> Result<Arc<Code>, Error> {
        Ok(self.module.0.compiled.code(self.index)?)
    }

    /// Its parameters with their offsets: each at its alignment, in order.
    pub fn params(&self) -> Vec<Param> {
        let mut offset = 0usize;
        let mut out = Vec::new();
        for p in &self.ast().params {
            offset = offset.next_multiple_of(p.alignment() as usize);
            let bytes = p.bytes() as usize;
            out.push(Param { name: p.name.clone(), offset, bytes });
            offset += bytes;
        }
        out
    }

    /// Length of [`LaunchConfig::params`] in bytes.
    pub fn param_bytes(&self) -> usize {
        self.params().last().map_or(0, |p| p.offset + p.bytes)
    }

    /// The cluster a launch gets: the kernel's own where it requires one, else the launch's.
    pub fn cluster(&self, config: &LaunchConfig) -> [u32; 3] {
        match self.ast().tuning.reqnctapercluster {
            Some(required) if config.cluster == [1; 3] => required,
            _ => config.cluster,
        }
    }

    /// Attributes. Registers, local and static shared memory are 32, 0 and 0 where no device has
    /// room for the kernel's variables.
    pub fn attributes(&self) -> Attributes {
        let ast = &self.module.0.compiled.program.ast;
        let tuning = &self.ast().tuning;
        let block = tuning.reqntid.or(tuning.maxntid);
        let threads = block.map_or(Preset::MAX_THREADS_PER_BLOCK, |b| b.iter().product());
        let outline = self.module.0.compiled.outline(self.index);
        let constants = ast.variables.iter().filter(|v| v.space == Space::Const);
        let registers = outline.as_ref().map_or(32, |o| o.registers.clamp(16, 255));
        Attributes {
            max_threads: threads.min(Preset::MAX_THREADS_PER_BLOCK),
            declared_shared_bytes: outline.as_ref().map_or(0, |o| o.declared_shared_bytes),
            static_shared_bytes: outline.as_ref().map_or(0, |o| o.static_shared_bytes),
            const_bytes: constants.map(|v| v.bytes() as u32).sum(),
            local_bytes: outline.as_ref().map_or(0, |o| o.local_bytes),
            registers: tuning.maxnreg.map_or(registers, |m| registers.min(m)),
            target: ast.target.sm,
            required_block: tuning.reqntid,
            required_cluster: tuning.reqnctapercluster,
        }
    }
}
