//! Our FP8 GEMM kernel launched on the emulator's own library, without a driver between: for the
//! demonstration and the benchmarks. Real use goes through `fathom_gpu` and the driver API.

use fathom_emulator::{
    Device, Element, Error, Function, LaunchConfig, LaunchReport, Mode, Module, Params, Preset,
    Settings, TensorMap,
};
use fathom_numerics::quant::Quantized;

/// The constants of `fathom_gpu::compile::FP8_GEMM_1D2D` that this launch is for: bf16 output.
pub fn defines(n: usize, k: usize) -> [(&'static str, u64); 4] {
    [("N", n as u64), ("K", k as u64), ("OUTPUT_F32", 0), ("STAGES", STAGES)]
}

const STAGES: u64 = 5;
/// Stages with their barriers, and the output tile (docs/kernels.md).
const SHARED_BYTES: u32 = STAGES as u32 * 33_296 + 32_768;

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
        let function = module.function("fp8_gemm_1d2d")?;
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
        let params = Params::new()
            .with_bytes(&map(Element::U8, codes_a, [k64, m64], [128, 128], 3), 64)
            .with_bytes(&map(Element::U8, codes_b, [k64, n64], [128, 64], 3), 64)
            .with_bytes(&map(Element::F32, scale_a, [m64, k64.div_ceil(128)], [128, 1], 0), 64)
            .with_bytes(&map(Element::Bf16, d, [n64, m64], [64, 64], 3), 64)
            .with(scale_b)
            .with(d)
            .with(n64)
            .with(m as u32);
        let tiles = 2 * m.div_ceil(256) * n.div_ceil(128);
        let grid = [tiles.min(132) as u32, 1, 1];
        let mut config = LaunchConfig::new(grid, [384, 1, 1], params.into_bytes());
        config.dynamic_shared_bytes = SHARED_BYTES;
        Ok(Fp8Gemm { device, function, config, d, elements: m * n })
    }

    /// Launches it.
    ///
    /// # Errors
    /// Where the emulator does not have an instruction of it.
    pub fn run(&self, settings: Settings) -> Result<LaunchReport, Error> {
        self.device.configure(settings);
        self.device.launch(&self.function, &self.config)
    }

    /// The bits of `d`, row-major.
    ///
    /// # Errors
    /// None after a launch.
    pub fn output(&self) -> Result<Vec<u16>, Error> {
        self.device.download(self.d, self.elements)
    }
}

/// A dense matrix, innermost dimension first.
fn map(
    element: Element,
    address: u64,
    dims: [u64; 2],
    box_dims: [u32; 2],
    swizzle: u32,
) -> [u8; 128] {
    let map = TensorMap {
        element,
        rank: 2,
        address,
        dims: [dims[0], dims[1], 1, 1, 1],
        strides_bytes: [dims[0] * u64::from(element.bytes()), 0, 0, 0],
        box_dims: [box_dims[0], box_dims[1], 1, 1, 1],
        element_strides: [1; 5],
        interleave: 0,
        swizzle,
        l2_promotion: 0,
        fill_nan: false,
        mode: Mode::Tiled,
    };
    map.encode().expect("sizes that a map takes")
}
