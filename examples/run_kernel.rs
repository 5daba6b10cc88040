//! Runs a kernel on the emulated GPU, with every check on, and reads what the checks found: the
//! kernel misses a barrier.
//!
//! `cargo run --release --example run_kernel`

use fathom_emulator::{Checks, Device, LaunchConfig, Module, Params, Preset, Settings};

/// Each thread hands its number to its neighbour through shared memory.
const NEIGHBOUR: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry neighbour(.param .u64 out)
{
    .reg .b32 %r<6>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 slots[256];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, slots;
    shl.b32 %r3, %r1, 2;
    add.u32 %r4, %r2, %r3;
    st.shared.u32 [%r4], %r1;
    // bar.sync 0 is missing here.
    xor.b32 %r4, %r3, 128;
    add.u32 %r4, %r2, %r4;
    ld.shared.u32 %r5, [%r4];
    ld.param.u64 %rd1, [out];
    cvta.to.global.u64 %rd1, %rd1;
    mul.wide.u32 %rd2, %r1, 4;
    add.u64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r5;
    ret;
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::new(Preset::named("h100")?);
    device.configure(Settings { checks: Checks::ALL, ..device.settings() });
    let module = Module::load(&device, NEIGHBOUR)?;
    let out = device.upload(&[0u32; 64])?;
    let params = Params::new().with(out).into_bytes();
    let config = LaunchConfig::new([1, 1, 1], [64, 1, 1], params);
    let report = device.launch(&module.function("neighbour")?, &config)?;
    println!("{:?}", &device.download::<u32>(out, 64)?[..4]);
    for finding in &report.findings {
        println!("{finding}");
    }
    Ok(())
}
