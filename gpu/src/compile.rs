//! CUDA C++ to PTX by NVRTC at run time, kept on disk by content.
//!
//! A kernel is compiled for one set of constants ([`Compiler::compile`]'s `defines`: shapes,
//! element types). The PTX is stored in a folder under the blake3 of everything that goes into it:
//! source, headers, options, NVRTC's version. It is written beside its place and renamed, so that
//! processes that compile the same kernel at once do each other no harm.
//!
//! NVRTC's reference: NVIDIA's document "NVRTC", sections 3 (user interface) and 4 (options).

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::Write;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;

use fathom_reference::files;
use libloading::Library;

use crate::assembly::Assembly;
use crate::nvrtc::Nvrtc;

/// A CUDA source of `gpu/kernels`; its path there is the name in NVRTC's messages.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Path below `gpu/kernels`, by which the kernel is named.
    pub name: &'static str,
    /// The text of the source.
    pub text: &'a str,
}

/// The [`Source`] of this path below `gpu/kernels`.
macro_rules! source {
    ($path:literal) => {
        $crate::compile::Source {
            name: $path,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/", $path)),
        }
    };
}
pub(crate) use source;

/// The FP8 GEMM: entry `fp8_gemm_1d2d`, constants `N`, `K`, `OUTPUT_F32` (0 or 1) and `STAGES`.
pub const FP8_GEMM_1D2D: Source<'static> = source!("gemm/sm90_fp8_gemm_1d2d.cu");

// The kernels, and what they may include by the path that they name: every `*.cu` and `*.cuh` of
// `gpu/kernels`, as `build.rs` found them.
include!(concat!(env!("OUT_DIR"), "/headers.rs"));

/// The kernel's source of this path below `gpu/kernels`.
pub fn source_named(name: &str) -> Option<Source<'static>> {
    SOURCES.iter().find(|source| source.name == name).copied()
}

/// Options of every kernel: Hopper with its architecture-specific instructions, nothing contracted
/// (the numerics contract), C++17.
const OPTIONS: [&str; 3] = ["--gpu-architecture=sm_90a", "--fmad=false", "-std=c++17"];

/// Why a kernel could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The loader refused one of NVRTC's libraries, or a function is not in it.
    #[error("{}: {message}; expected NVRTC, see `fathom kernels fetch-nvrtc`", path.display())]
    Load {
        /// The library that could not be loaded.
        path: PathBuf,
        /// The loader's words.
        message: String,
    },
    /// A call of NVRTC failed for a reason other than the source.
    #[error("{call} failed for {source_name}: {message}")]
    Call {
        /// Name of NVRTC's function that failed.
        call: &'static str,
        /// Name of the kernel's source.
        source_name: &'static str,
        /// NVRTC's name for the error code.
        message: String,
    },
    /// The source does not compile with these options.
    #[error("{source_name} does not compile with {options:?}:\n{log}")]
    Source {
        /// Name of the kernel's source.
        source_name: &'static str,
        /// All options of the compilation, constants included.
        options: Vec<String>,
        /// NVRTC's log, with file and line.
        log: String,
    },
    /// A constant's name or value that cannot be handed to NVRTC.
    #[error("option {found:?}: expected no NUL byte")]
    Option {
        /// The option that it would be.
        found: String,
    },
    /// The cache folder refused.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// A compiled kernel, from NVRTC or from the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// PTX text, as `cuModuleLoadData` takes it (without the closing NUL).
    pub ptx: String,
    /// NVRTC's warnings; empty where the PTX came from the cache.
    pub log: String,
    /// Whether the PTX came from the cache.
    pub cached: bool,
}

type Program = *mut c_void;

/// NVRTC's functions that are used here, and where results are kept.
#[derive(Clone)]
pub struct Compiler {
    api: Api,
    version: (i32, i32),
    cache: PathBuf,
    planted: Option<Source<'static>>,
}

impl Compiler {
    /// Loads NVRTC; results are kept in `cache`, which is made when first written to.
    ///
    /// # Errors
    /// [`CompileError::Load`], or [`CompileError::Call`] where it does not tell its version.
    pub fn new(nvrtc: &Nvrtc, cache: &Path) -> Result<Compiler, CompileError> {
        let api = Api::load(nvrtc)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to live integers.
        let code = unsafe { (api.version)(&mut major, &mut minor) };
        api.check("nvrtcVersion", "no source", code)?;
        let cache = cache.to_owned();
        Ok(Compiler { api, version: (major, minor), cache, planted: None })
    }

    /// The same compiler, for which the source or header of this name has this text: so tests plant
    /// defects.
    pub fn with_planted(self, source: Source<'static>) -> Compiler {
        Compiler { planted: Some(source), ..self }
    }

    /// The source, or what was planted under its name.
    fn given<'a>(&self, source: Source<'a>) -> Source<'a> {
        self.planted.filter(|planted| planted.name == source.name).unwrap_or(source)
    }

    /// NVRTC's version, (13, 0) for 13.0.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Whether `source` with these constants is in the cache.
    pub fn is_cached(&self, source: Source<'_>, defines: &[(&str, u64)]) -> bool {
        self.cached(source, &options(defines)).is_file()
    }

    /// Where the cache keeps it.
    fn cached(&self, source: Source<'_>, options: &[String]) -> PathBuf {
        self.cache.join(format!("{}.ptx", self.key(source, options)))
    }

    /// Compiles `source` with these constants (`-Dname=value`), or takes it from the cache.
    ///
    /// # Errors
    /// [`CompileError`]; the cache is then as it was before.
    pub fn compile(
        &self,
        source: Source<'_>,
        defines: &[(&str, u64)],
    ) -> Result<Compiled, CompileError> {
        let options = options(defines);
        let path = self.cached(source, &options);
        match std::fs::read_to_string(&path) {
            Ok(ptx) => return Ok(Compiled { ptx, log: String::new(), cached: true }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(CompileError::Cache { path, source }),
        }
        let (ptx, log) = self.run(source, options, Product::Ptx)?;
        let ptx = text_of(ptx);
        self.keep(&path, &ptx).map_err(|source| CompileError::Cache { path, source })?;
        Ok(Compiled { ptx, log, cached: false })
    }

    /// Machine code for these constants, with the assembler's report; nothing is kept.
    ///
    /// # Errors
    /// [`CompileError`].
    pub fn assemble(
        &self,
        source: Source<'_>,
        defines: &[(&str, u64)],
    ) -> Result<Assembly, CompileError> {
        let mut options = options(defines);
        options.push("--ptxas-options=-v".to_owned());
        let (cubin, report) = self.run(source, options, Product::Cubin)?;
        Ok(Assembly { cubin, report })
    }

    /// The name in the cache: a hash of all that the PTX depends on, each part with its length.
    fn key(&self, source: Source<'_>, options: &[String]) -> String {
        let version = format!("{}.{}", self.version.0, self.version.1);
        let sources = HEADERS.iter().chain([&source]).map(|s| self.given(*s));
        let texts = sources.flat_map(|s| [s.name, s.text]);
        let parts = texts.chain(options.iter().map(String::as_str)).chain([version.as_str()]);
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    fn keep(&self, path: &Path, ptx: &str) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.cache)?;
        files::replace(path, |file, _| file.write_all(ptx.as_bytes()))
    }

    /// One NVRTC program from start to end: what it makes, and its log.
    fn run(
        &self,
        source: Source<'_>,
        options: Vec<String>,
        product: Product,
    ) -> Result<(Vec<u8>, String), CompileError> {
        let fail = |call, code| self.api.check(call, source.name, code);
        let text =
            |s: &str| CString::new(s).map_err(|_| CompileError::Option { found: s.to_owned() });
        let (name, body) = (text(source.name)?, text(self.given(source).text)?);
        let strings = |list: Vec<&str>| list.into_iter().map(text).collect::<Result<Vec<_>, _>>();
        let header_names = strings(HEADERS.iter().map(|h| h.name).collect())?;
        let headers = strings(HEADERS.iter().map(|h| self.given(*h).text).collect())?;
        let c_options = strings(options.iter().map(String::as_str).collect())?;
        let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();

        let mut program: Program = ptr::null_mut();
        // SAFETY: the strings outlive the calls and end in NUL; the arrays have the lengths given;
        // the program is destroyed once, by the guard.
        unsafe {
            let code = (self.api.create)(
                &mut program,
                body.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                pointers(&headers).as_ptr(),
                pointers(&header_names).as_ptr(),
            );
            fail("nvrtcCreateProgram", code)?;
            let _guard = Guard { api: &self.api, program };
            let given = pointers(&c_options);
            let result = (self.api.compile)(program, given.len() as c_int, given.as_ptr());
            let failed = |(call, code)| self.failed(call, source, code);
            let log =
                read(program, self.api.log_size, self.api.log).map(text_of).map_err(failed)?;
            if result == COMPILATION {
                return Err(CompileError::Source { source_name: source.name, options, log });
            }
            fail("nvrtcCompileProgram", result)?;
            let (size, get) = match product {
                Product::Ptx => (self.api.ptx_size, self.api.ptx),
                Product::Cubin => (self.api.cubin_size, self.api.cubin),
            };
            Ok((read(program, size, get).map_err(failed)?, log))
        }
    }

    fn failed(&self, call: &'static str, source: Source<'_>, code: c_int) -> CompileError {
        CompileError::Call { call, source_name: source.name, message: self.api.word(code) }
    }
}

/// The options of every kernel, then its constants.
fn options(defines: &[(&str, u64)]) -> Vec<String> {
    let defines = defines.iter().map(|(name, value)| format!("-D{name}={value}"));
    OPTIONS.iter().map(|o| o.to_string()).chain(defines).collect()
}

/// What is taken of a compiled program.
#[derive(Clone, Copy)]
enum Product {
    Ptx,
    Cubin,
}

/// `NVRTC_ERROR_COMPILATION`: the log says why.
const COMPILATION: c_int = 6;

struct Guard<'a> {
    api: &'a Api,
    program: Program,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was created by this API and is destroyed only here. A failure leaks
        // memory and nothing else.
        unsafe { (self.api.destroy)(&mut self.program) };
    }
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// Reads what NVRTC hands out by size and copy.
///
/// # Safety
/// The program is live, and both functions belong together.
unsafe fn read(program: Program, size: Size, get: Get) -> Result<Vec<u8>, (&'static str, c_int)> {
    let mut bytes = 0;
    // SAFETY: the program is live by contract; the buffer has the size that NVRTC asked for.
    unsafe {
        match size(program, &mut bytes) {
            0 => {}
            code => return Err(("nvrtcGet...Size", code)),
        }
        let mut buffer = vec![0u8; bytes];
        match get(program, buffer.as_mut_ptr().cast()) {
            0 => Ok(buffer),
            code => Err(("nvrtcGet...", code)),
        }
    }
}

/// A text of NVRTC's up to its closing NUL.
fn text_of(bytes: Vec<u8>) -> String {
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// The entry points (nvrtc.h), of libraries that stay loaded.
#[derive(Clone, Copy)]
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Get,
    ptx_size: Size,
    ptx: Get,
    cubin_size: Size,
    cubin: Get,
}

impl Api {
    fn load(nvrtc: &Nvrtc) -> Result<Api, CompileError> {
        let open = |path: &Path| {
            // SAFETY: loading NVRTC runs NVIDIA's initialisers and nothing else.
            unsafe { Library::new(path) }.map_err(|e| load_error(path, &e))
        };
        // First: NVRTC looks for its builtins by name, and finds them when they are loaded.
        let builtins = open(&nvrtc.builtins)?;
        // Never unloaded: NVRTC's own handlers run when the process ends, which may be while a
        // thread still has a compiler to drop.
        std::mem::forget(builtins);
        let library = ManuallyDrop::new(open(&nvrtc.library)?);
        let missing = |e: libloading::Error| load_error(&nvrtc.library, &e);
        // SAFETY: the types are those of nvrtc.h; the functions live as long as the library, which
        // stays.
        unsafe {
            Ok(Api {
                version: *library.get(b"nvrtcVersion\0").map_err(missing)?,
                error: *library.get(b"nvrtcGetErrorString\0").map_err(missing)?,
                create: *library.get(b"nvrtcCreateProgram\0").map_err(missing)?,
                destroy: *library.get(b"nvrtcDestroyProgram\0").map_err(missing)?,
                compile: *library.get(b"nvrtcCompileProgram\0").map_err(missing)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize\0").map_err(missing)?,
                log: *library.get(b"nvrtcGetProgramLog\0").map_err(missing)?,
                ptx_size: *library.get(b"nvrtcGetPTXSize\0").map_err(missing)?,
                ptx: *library.get(b"nvrtcGetPTX\0").map_err(missing)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize\0").map_err(missing)?,
                cubin: *library.get(b"nvrtcGetCUBIN\0").map_err(missing)?,
            })
        }
    }

    fn word(&self, code: c_int) -> String {
        // SAFETY: NVRTC returns a string of its own for every code.
        unsafe { CStr::from_ptr((self.error)(code)) }.to_string_lossy().into_owned()
    }

    fn check(
        &self,
        call: &'static str,
        source_name: &'static str,
        code: c_int,
    ) -> Result<(), CompileError> {
        match code {
            0 => Ok(()),
            code => Err(CompileError::Call { call, source_name, message: self.word(code) }),
        }
    }
}

fn load_error(path: &Path, error: &libloading::Error) -> CompileError {
    CompileError::Load { path: path.to_owned(), message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::assembly::Resources;
    use crate::kernels::quantize_tile::SOURCE as QUANTIZE_TILE;

    fn tile_constants(bf16: u64, scale: u64) -> [(&'static str, u64); 4] {
        [("X_BF16", bf16), ("TILE", 128), ("FORMAT", 0), ("SCALE", scale)]
    }

    /// A compiler with a cache of its own; `None`, said loudly, where there is no NVRTC.
    fn compiler() -> Option<(Compiler, tempfile::TempDir)> {
        let nvrtc = crate::nvrtc::find_or_fetch_for_tests()?;
        let cache = tempfile::tempdir().unwrap();
        Some((Compiler::new(&nvrtc, cache.path()).unwrap(), cache))
    }

    #[test]
    fn quantize_tile_compiles_for_every_input_and_scale_without_warning() {
        let Some((compiler, _cache)) = compiler() else { return };
        for (bf16, scale) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let defines = tile_constants(bf16, scale);
            let compiled = compiler.compile(QUANTIZE_TILE, &defines).unwrap();
            assert_eq!(compiled.log.trim(), "");
            for part in [".target sm_90a", ".entry quantize_tile", "cvt.rn.satfinite.e4m3x2.f32"] {
                assert!(compiled.ptx.contains(part), "no {part}");
            }
            assert_eq!(compiled.ptx.contains("ld.global.nc.u16"), bf16 == 1, "bf16 {bf16}");
        }
    }

    #[test]
    fn the_fp8_gemm_compiles_without_warning_and_refuses_more_stages_than_fit() {
        let Some((compiler, _cache)) = compiler() else { return };
        let compile = |output_f32, stages| {
            let shape = [("N", 300), ("K", 520)];
            let rest = [("OUTPUT_F32", output_f32), ("STAGES", stages)];
            compiler.compile(FP8_GEMM_1D2D, &[shape, rest].concat())
        };
        for (output_f32, stages) in [(0, 5), (1, 6)] {
            let compiled = compile(output_f32, stages).unwrap();
            assert_eq!(compiled.log.trim(), "");
            let count = |part| compiled.ptx.matches(part).count();
            // A promotion is one fma an accumulator and four steps, however often it is unrolled.
            assert!(count("wgmma.mma_async") >= 4);
            assert_eq!(count("fma.rn.f32"), 16 * count("wgmma.mma_async"));
            assert_eq!(count("stmatrix") > 0, output_f32 == 0);
        }
        let message = compile(0, 7).unwrap_err().to_string();
        assert!(message.contains("too many stages"), "{message}");
    }

    /// NVRTC runs ptxas for the real architecture that it is given, and hands out its report.
    #[test]
    fn ptxas_reports_no_spills_and_no_warning() {
        let Some((compiler, _cache)) = compiler() else { return };
        for (output_f32, stages) in [(0, 5), (1, 6)] {
            let shape = [("N", 4096), ("K", 7168)];
            let rest = [("OUTPUT_F32", output_f32), ("STAGES", stages)];
            let assembly = compiler.assemble(FP8_GEMM_1D2D, &[shape, rest].concat()).unwrap();
            let found = assembly.resources("fp8_gemm_1d2d").unwrap();
            assert_eq!(found, Resources { registers: 168, ..Resources::default() });
            assert_eq!(assembly.warnings(), [""; 0], "{}", assembly.report);
            assert!(assembly.cubin.starts_with(b"\x7FELF"));
        }
    }

    #[test]
    fn every_header_of_the_folder_is_given_to_nvrtc() {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut found = Vec::new();
        for folder in std::fs::read_dir(&kernels).unwrap().map(|e| e.unwrap().path()) {
            for file in std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
                if file.extension().is_some_and(|e| e == "cuh") {
                    let name = file.strip_prefix(&kernels).unwrap().to_str().unwrap().to_owned();
                    found.push((name, std::fs::read_to_string(&file).unwrap()));
                }
            }
        }
        found.sort();
        let given: Vec<_> =
            HEADERS.iter().map(|h| (h.name.to_owned(), h.text.to_owned())).collect();
        assert_eq!(given, found);
        assert!(given.iter().any(|(name, _)| name == "common/reduce.cuh"));
    }

    #[test]
    fn the_second_time_comes_from_the_cache_and_other_constants_do_not() {
        let Some((compiler, cache)) = compiler() else { return };
        let first = compiler.compile(QUANTIZE_TILE, &tile_constants(0, 0)).unwrap();
        let again = compiler.compile(QUANTIZE_TILE, &tile_constants(0, 0)).unwrap();
        let other = compiler.compile(QUANTIZE_TILE, &tile_constants(0, 1)).unwrap();
        assert!(!first.cached && again.cached && !other.cached);
        assert_eq!(first.ptx, again.ptx);
        assert_ne!(first.ptx, other.ptx);
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_planted_is_compiled_in_place_of_source_or_header() {
        let Some((compiler, cache)) = compiler() else { return };
        let broken = "#error planted";
        for name in [QUANTIZE_TILE.name, "quant/cast.cuh"] {
            let nvrtc = crate::nvrtc::find().unwrap();
            let planted = Compiler::new(&nvrtc, cache.path()).unwrap();
            let planted = planted.with_planted(Source { name, text: broken });
            compiler.compile(QUANTIZE_TILE, &tile_constants(0, 0)).unwrap();
            let message = planted.compile(QUANTIZE_TILE, &tile_constants(0, 0)).unwrap_err();
            assert!(message.to_string().contains("planted"), "{name}: {message}");
        }
    }

    #[test]
    fn an_error_carries_the_log_and_leaves_nothing_behind() {
        let Some((compiler, cache)) = compiler() else { return };
        let broken = Source { name: "broken.cu", text: "__global__ void f() {\n  nonsense;\n}\n" };
        let message = compiler.compile(broken, &[("N", 3)]).unwrap_err().to_string();
        for part in ["broken.cu(2)", "\"nonsense\" is undefined", "-DN=3"] {
            assert!(message.contains(part), "no {part} in {message}");
        }
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_library_that_is_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libnvrtc-builtins.so");
        std::fs::write(&path, b"not a library").unwrap();
        let nvrtc = Nvrtc { builtins: path.clone(), library: path.clone() };
        let error = Compiler::new(&nvrtc, folder.path()).err().unwrap();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}
