//! Our FP8 GEMM kernel launched on the emulator's own library, without a driver between: for the
//! demonstration and the benchmarks. Real use goes through `fathom_gpu` and the driver API.

use fathom_emulator::{
    Device, Error, Function, LaunchConfig, LaunchReport, MapElement, Mode, Module, Params, Preset,
    Settings, TensorMap,
};
use fathom_gpu::kernels::gemm_fp8::plan;
use fathom_numerics::quant::Quantized;

/// SMs of the emulated H800.
const SMS: usize = 132;

/// The constants of `fathom_gpu::compile::FP8_GEMM_1D2D` that this launch is for: BF16 output.
pub fn defines(n: usize, k: usize) -> [(&'static str, u64); 4] {
    plan([1, n, k], false, SMS).defines
}

/// One launch of the kernel, as often as wanted.
pub struct Fp8Gemm {
    device: Device,
    function: Function,
    config: LaunchConfig,
    d: u64,
    elements: usize,
}

impl Fp8Gemm {
    /// `d[m, n] = a[m, k] b[n, k]^T` on an emulated H800 by the kernel in `ptx`, compiled with
    /// [`defines`].
    ///
    /// # Errors
    /// What the emulator says of the PTX or of memory.
    ///
    /// # Panics
    /// Where k is no multiple of 16, n none of 8 or m none of 4: rows are not padded here.
    pub fn new(ptx: &str, a: &Quantized, b: &Quantized) -> Result<Fp8Gemm, Error> {
        let ((m, k), n) = (a.codes.dim(), b.codes.nrows());
        assert!(k % 16 == 0 && n % 8 == 0 && m % 4 == 0, "{m} x {n} x {k}");
        let device = Device::new(Preset::named("h800")?);
        let module = Module::load(&device, ptx)?;
        let plan = plan([m, n, k], false, SMS);
        let function = module.function(plan.entry)?;
        let upload = |codes: &ndarray::Array2<u8>| {
            device.upload(codes.as_standard_layout().as_slice().expect("standard layout"))
        };
        let transposed = a.scales.t().as_standard_layout().into_owned();
        let scale_a = device.upload(transposed.as_slice().expect("standard layout"))?;
        let scale_b = b.scales.as_standard_layout().into_owned();
        let scale_b = device.upload(scale_b.as_slice().expect("standard layout"))?;
        let d = device.alloc(2 * (m * n) as u64)?;
        let (codes_a, codes_b) = (upload(&a.codes)?, upload(&b.codes)?);
        let [m64, n64, k64] = [m, n, k].map(|x| x as u64);
        let [box_a, box_b, box_scale, box_d] = plan.boxes;
        let scales = [m64, k64.div_ceil(128)];
        let params = Params::new()
            .with_bytes(&map(MapElement::U8, codes_a, [k64, m64], box_a, SWIZZLE_128B), 64)
            .with_bytes(&map(MapElement::U8, codes_b, [k64, n64], box_b, SWIZZLE_128B), 64)
            .with_bytes(&map(MapElement::F32, scale_a, scales, box_scale, SWIZZLE_NONE), 64)
            .with_bytes(&map(MapElement::Bf16, d, [n64, m64], box_d, SWIZZLE_128B), 64)
            .with(scale_b)
            .with(d)
            .with(n64)
            .with(m as u32);
        let fathom_gpu::launch::LaunchConfig { grid, block, shared_bytes, .. } = plan.config;
        let mut config = LaunchConfig::new([grid, 1, 1], [block, 1, 1], params.into_bytes());
        config.dynamic_shared_bytes = shared_bytes;
        Ok(Fp8Gemm { device, function, config, d, elements: m * n })
    }

    /// Launches the kernel with the emulator's settings, and gives its report.
    ///
    /// # Errors
    /// Where the emulator does not have an instruction of it.
    pub fn run(&self, settings: Settings) -> Result<LaunchReport, Error> {
        self.device.configure(settings);
        self.device.launch(&self.function, &self.config)
    }

    /// The bits of `d` \[m, n\] in BF16, row-major.
    ///
    /// # Errors
    /// None after a launch.
    pub fn output(&self) -> Result<Vec<u16>, Error> {
        self.device.download(self.d, self.elements)
    }
}

/// The swizzles of a tensor map, as the driver API counts them.
const SWIZZLE_NONE: u32 = 0;
const SWIZZLE_128B: u32 = 3;

/// A dense matrix, innermost dimension first, in boxes of rows and columns.
fn map(
    element: MapElement,
    address: u64,
    dims: [u64; 2],
    (rows, columns): (u32, u32),
    swizzle: u32,
) -> [u8; 128] {
    let map = TensorMap {
        element,
        rank: 2,
        address,
        dims: [dims[0], dims[1], 1, 1, 1],
        strides_bytes: [dims[0] * u64::from(element.bytes()), 0, 0, 0],
        box_dims: [columns, rows, 1, 1, 1],
        element_strides: [1; 5],
        interleave: 0,
        swizzle,
        l2_promotion: 0,
        fill_nan: false,
        mode: Mode::Tiled,
    };
    map.encode().expect("sizes that a map takes")
}
