//! What the driver does with code: parsing, loading, and finding functions.

use std::ffi::CString;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use fathom_emulator::{Error, Image, Managed, Module};

use super::contexts::current_context;
use super::{Driver, children};
use crate::abi::*;
use crate::objects::program::{Callable, Kernel, Library, Loaded};
use crate::say::say;

/// PTX ISA of the CUDA version that the driver claims, times ten.
const PTX_VERSION: u32 = 95;

/// What CUDA's device runtime, which is machine code, gives cooperative kernels.
const COOPERATIVE: &str = include_str!("../cooperative.ptx");

/// The text with the device runtime's functions, where it calls those that are here.
fn with_device_runtime(ptx: &str) -> Option<String> {
    let calls = |names: &str| {
        let called = |line: &str| line.contains(".extern .func") && line.contains(names);
        ptx.contains(names) && ptx.lines().any(called)
    };
    let mut texts = vec![ptx.to_owned()];
    if calls("cudaCG") {
        texts.push(COOPERATIVE.to_owned());
    }
    if calls("__cudaCDP2") {
        texts.push(children::TEXT.to_owned());
        children::LINKED.store(true, Relaxed);
    }
    // What cannot be linked is refused as it is.
    if texts.len() > 1 { crate::link::link(&texts).ok() } else { None }
}

/// Parses PTX; what is wrong with it goes to stderr and into `log`.
pub(crate) fn parse(ptx: &str, log: &mut String) -> R<Image> {
    let refuse = |words: String, code: CuResult, log: &mut String| {
        say!("{words}");
        log.push_str(&words);
        Err(code)
    };
    let linked = with_device_runtime(ptx);
    match Image::parse(linked.as_deref().unwrap_or(ptx)) {
        Err(error) => refuse(error.to_string(), ERROR_INVALID_PTX, log),
        Ok(image) if image.version() > PTX_VERSION => {
            let version = |v: u32| format!("{}.{}", v / 10, v % 10);
            let words = format!(
                "the PTX is of .version {}: expected at most {}, that of the driver's CUDA",
                version(image.version()),
                version(PTX_VERSION)
            );
            refuse(words, ERROR_UNSUPPORTED_PTX_VERSION, log)
        }
        Ok(image) => Ok(image),
    }
}

/// The number of an error that loading met, after its words on stderr.
fn refused(error: Error) -> CuResult {
    say!("{error}");
    match error {
        Error::Memory(_) => ERROR_OUT_OF_MEMORY,
        _ => ERROR_INVALID_PTX,
    }
}

impl Driver {
    /// Loads a parsed text in the current context.
    pub(crate) fn load(&self, image: &Image) -> R<Handle> {
        self.place(image, &Managed::new(&self.devices[0], image).map_err(refused)?)
    }

    fn place(&self, image: &Image, managed: &Managed) -> R<Handle> {
        let device = &self.devices[self.current()?];
        let module = Module::place(device, image, managed).map_err(refused)?;
        let (context, functions) = (current_context(), Mutex::default());
        Ok(self.modules.insert(Arc::new(Loaded { module, context, functions })))
    }

    /// Forgets a module and its functions.
    pub(crate) fn unload(&self, module: Handle) -> R {
        let loaded = self.modules.remove(module)?;
        for function in loaded.functions.lock().expect("no panic holds this lock").values() {
            self.functions.remove(*function)?;
        }
        Ok(())
    }

    /// The function of that name in a module; the same handle each time.
    pub(crate) fn function(&self, module: Handle, name: &str) -> R<Handle> {
        let loaded = self.modules.get(module)?;
        let mut functions = loaded.functions.lock().expect("no panic holds this lock");
        if let Some(handle) = functions.get(name) {
            return Ok(*handle);
        }
        let function = loaded.module.function(name).map_err(|_| ERROR_NOT_FOUND)?;
        let c_name = CString::new(name).map_err(|_| ERROR_NOT_FOUND)?;
        let callable = Callable {
            function,
            module,
            name: c_name,
            chosen: Mutex::default(),
            stateful: Mutex::default(),
        };
        let handle = self.functions.insert(Arc::new(callable));
        functions.insert(name.to_owned(), handle);
        Ok(handle)
    }

    /// Makes a library of a parsed text.
    pub(crate) fn library(&self, image: Image) -> R<Handle> {
        let managed = Managed::new(&self.devices[0], &image).map_err(refused)?;
        let (modules, kernels) = (Mutex::default(), Mutex::default());
        Ok(self.libraries.insert(Arc::new(Library { image, managed, modules, kernels })))
    }

    /// The module of a library in the current context, loaded at the first use.
    pub(crate) fn module_of(&self, library: Handle) -> R<Handle> {
        self.current()?;
        let library = self.libraries.get(library)?;
        let mut modules = library.modules.lock().expect("no panic holds this lock");
        // A module is gone with its context.
        if let Some(module) = modules.get(&current_context())
            && self.modules.get(*module).is_ok()
        {
            return Ok(*module);
        }
        let module = self.place(&library.image, &library.managed)?;
        modules.insert(current_context(), module);
        Ok(module)
    }

    /// The kernel of that name in a library; the same handle each time.
    pub(crate) fn kernel(&self, library: Handle, name: &str) -> R<Handle> {
        let found = self.libraries.get(library)?;
        if !found.image.entries().contains(&name) {
            return Err(ERROR_NOT_FOUND);
        }
        let mut kernels = found.kernels.lock().expect("no panic holds this lock");
        let kernel = || self.kernels.insert(Kernel { library, name: name.to_owned() });
        Ok(*kernels.entry(name.to_owned()).or_insert_with(kernel))
    }

    /// Forgets a library, its kernels and its modules.
    pub(crate) fn unload_library(&self, library: Handle) -> R {
        let library = self.libraries.remove(library)?;
        for kernel in library.kernels.lock().expect("no panic holds this lock").values() {
            self.kernels.remove(*kernel)?;
        }
        for module in library.modules.lock().expect("no panic holds this lock").values() {
            // It may have gone with its context.
            let _ = self.unload(*module);
        }
        Ok(())
    }

    /// The `CUfunction` behind a `CUfunction` or, in the current context, a `CUkernel`.
    pub(crate) fn function_handle(&self, handle: Handle) -> R<Handle> {
        if self.functions.get(handle).is_ok() {
            return Ok(handle);
        }
        let kernel = self.kernels.get(handle)?;
        self.function(self.module_of(kernel.library)?, &kernel.name)
    }

    /// As [`Driver::function_handle`], the function itself.
    pub(crate) fn callable(&self, handle: Handle) -> R<Arc<Callable>> {
        self.functions.get(self.function_handle(handle)?)
    }
}
