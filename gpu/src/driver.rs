//! Which CUDA driver library the loader finds, and the devices it has.

use std::ffi::{CStr, c_char, c_int};

use libloading::Library;

/// The symbol by which the emulated driver can be told from NVIDIA's.
pub const EMULATED_MARK: &CStr = c"fathom_emulated_driver";

/// What `libcuda.so.1` is on this machine.
#[derive(Clone, Debug)]
pub enum Driver {
    /// None could be loaded.
    Absent {
        /// The loader's words.
        reason: String,
    },
    /// One was loaded, but it gives no device.
    Unusable {
        /// The failing call and its code.
        reason: String,
        /// Whether it is the emulated one.
        emulated: bool,
    },
    /// One was loaded and initialised.
    Present {
        /// CUDA version it supports, 13000 for 13.0.
        version: i32,
        /// The devices that it has, by ordinal.
        devices: Vec<Device>,
        /// Whether it is the emulated one.
        emulated: bool,
    },
}

/// A device as the driver describes it.
#[derive(Clone, Debug)]
pub struct Device {
    /// Name of the device.
    pub name: String,
    /// Compute capability, (9, 0) for Hopper.
    pub compute_capability: (i32, i32),
    /// How many streaming multiprocessors it has.
    pub sm_count: i32,
    /// Device memory in bytes.
    pub memory_bytes: usize,
}

/// `CU_DEVICE_ATTRIBUTE_*` numbers of the driver API.
const MULTIPROCESSOR_COUNT: c_int = 16;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const COMPUTE_CAPABILITY_MINOR: c_int = 76;

/// Loads the driver library, initialises it and asks for its devices.
pub fn probe() -> Driver {
    // SAFETY: loading libcuda runs its initialisers, which are those of the system's own driver (or
    // of the emulated one, which has none).
    let library = match unsafe { Library::new("libcuda.so.1") } {
        Ok(library) => library,
        Err(error) => return Driver::Absent { reason: error.to_string() },
    };
    // SAFETY: only the symbol's presence is asked for.
    let emulated = unsafe { library.get::<*const u8>(EMULATED_MARK.to_bytes_with_nul()) }.is_ok();
    match Api::new(&library).and_then(|api| api.devices()) {
        Ok((version, devices)) => Driver::Present { version, devices, emulated },
        Err(reason) => Driver::Unusable { reason, emulated },
    }
}

/// The few entry points that a description needs.
struct Api<'a> {
    version: libloading::Symbol<'a, unsafe extern "C" fn(*mut c_int) -> c_int>,
    init: libloading::Symbol<'a, unsafe extern "C" fn(u32) -> c_int>,
    count: libloading::Symbol<'a, unsafe extern "C" fn(*mut c_int) -> c_int>,
    get: libloading::Symbol<'a, unsafe extern "C" fn(*mut c_int, c_int) -> c_int>,
    name: libloading::Symbol<'a, unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int>,
    attribute: libloading::Symbol<'a, unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int>,
    memory: libloading::Symbol<'a, unsafe extern "C" fn(*mut usize, c_int) -> c_int>,
}

impl<'a> Api<'a> {
    fn new(library: &'a Library) -> Result<Api<'a>, String> {
        let missing = |e: libloading::Error| e.to_string();
        // SAFETY: the types are those of the CUDA driver API (cuda.h).
        unsafe {
            Ok(Api {
                version: library.get(b"cuDriverGetVersion\0").map_err(missing)?,
                init: library.get(b"cuInit\0").map_err(missing)?,
                count: library.get(b"cuDeviceGetCount\0").map_err(missing)?,
                get: library.get(b"cuDeviceGet\0").map_err(missing)?,
                name: library.get(b"cuDeviceGetName\0").map_err(missing)?,
                attribute: library.get(b"cuDeviceGetAttribute\0").map_err(missing)?,
                memory: library.get(b"cuDeviceTotalMem_v2\0").map_err(missing)?,
            })
        }
    }

    fn devices(&self) -> Result<(i32, Vec<Device>), String> {
        let (mut version, mut count) = (0, 0);
        // SAFETY: every pointer is to a live local of the type that the call writes.
        unsafe {
            check("cuInit", (self.init)(0))?;
            check("cuDriverGetVersion", (self.version)(&mut version))?;
            check("cuDeviceGetCount", (self.count)(&mut count))?;
        }
        let devices = (0..count).map(|ordinal| self.device(ordinal)).collect::<Result<_, _>>()?;
        Ok((version, devices))
    }

    fn device(&self, ordinal: c_int) -> Result<Device, String> {
        let (mut device, mut memory_bytes) = (0, 0);
        let mut name: [c_char; 128] = [0; 128];
        // SAFETY: as above; the name's length is passed, and the driver terminates it.
        let name = unsafe {
            check("cuDeviceGet", (self.get)(&mut device, ordinal))?;
            let length = name.len() as c_int;
            check("cuDeviceGetName", (self.name)(name.as_mut_ptr(), length, device))?;
            check("cuDeviceTotalMem", (self.memory)(&mut memory_bytes, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above.
            let code = unsafe { (self.attribute)(&mut value, which, device) };
            check("cuDeviceGetAttribute", code).map(|()| value)
        };
        Ok(Device {
            name,
            compute_capability: (
                attribute(COMPUTE_CAPABILITY_MAJOR)?,
                attribute(COMPUTE_CAPABILITY_MINOR)?,
            ),
            sm_count: attribute(MULTIPROCESSOR_COUNT)?,
            memory_bytes,
        })
    }
}

fn check(call: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} returned CUDA error {code}")) }
}
