//! Tensor copies: a box comes swizzled, zero outside of the tensor, to every CTA of a multicast.

use fathom_emulator::{
    Checks, Device, LaunchConfig, MapElement, Mode, Module, Params, Preset, Settings, TensorMap,
};

const PTX: &str = "
.version 8.5
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dyn[];
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 out, .param .u32 y)
{
    .shared .align 8 .b64 bar;
    .reg .pred %p<4>;
    .reg .b16 %h;
    .reg .b32 %r<16>;
    .reg .b64 %rd<8>;
    mov.b64 %rd0, map;
    cvta.param.u64 %rd1, %rd0;
    ld.param.u64 %rd2, [out];
    ld.param.u32 %r1, [y];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %cluster_ctarank;
    mov.u32 %r4, bar;
    mov.u32 %r5, dyn;
    setp.ne.u32 %p0, %r2, 0;
    @%p0 bra READY;
    mbarrier.init.shared.b64 [%r4], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r4], 1024;
READY:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    or.b32 %r6, %r2, %r3;
    setp.ne.u32 %p1, %r6, 0;
    mov.b16 %h, 3;
    mov.u32 %r7, -32;
    @!%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r5], [%rd1, {%r7, %r1}], [%r4], %h;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0;
    @!%p2 bra WAIT;
    shl.b32 %r8, %r2, 4;
    add.u32 %r9, %r5, %r8;
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r9];
    mad.lo.u32 %r14, %r3, 1024, %r8;
    cvt.u64.u32 %rd4, %r14;
    add.u64 %rd5, %rd2, %rd4;
    st.global.v4.u32 [%rd5], {%r10, %r11, %r12, %r13};
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ret;
}
";

#[test]
fn a_swizzled_box_with_multicast() {
    let device = Device::new(Preset::named("h800").unwrap());
    device.configure(Settings { checks: Checks::ALL, ..Settings::default() });
    // 16-bit elements, 100 columns of which a row has 128; the value tells row and column.
    let (rows, columns, pitch) = (11u16, 100u16, 128u16);
    let mut data = vec![0u16; usize::from(rows * pitch)];
    for r in 0..rows {
        for c in 0..columns {
            data[usize::from(r * pitch + c)] = (r + 1) * 256 + c;
        }
    }
    let address = device.upload(&data).unwrap();
    let out = device.alloc(2048).unwrap();
    let map = TensorMap {
        element: MapElement::U16,
        rank: 2,
        address,
        dims: [u64::from(columns), u64::from(rows), 1, 1, 1],
        strides_bytes: [u64::from(pitch) * 2, 0, 0, 0],
        box_dims: [64, 8, 1, 1, 1],
        element_strides: [1; 5],
        interleave: 0,
        swizzle: 3,
        l2_promotion: 0,
        fill_nan: false,
        mode: Mode::Tiled,
    };
    let module = Module::load(&device, PTX).unwrap();
    let first_row = 5u16;
    let params = Params::new().with_bytes(&map.encode().unwrap(), 64).with(out);
    let params = params.with(u32::from(first_row)).into_bytes();
    let mut config = LaunchConfig::new([2, 1, 1], [64, 1, 1], params);
    config.cluster = [2, 1, 1];
    config.dynamic_shared_bytes = 1024;
    let report = device.launch(&module.function("k").unwrap(), &config).unwrap();
    for finding in &report.findings {
        eprintln!("{finding}");
    }
    assert!(report.findings.is_empty());
    assert_eq!(report.record.tma_bytes_read, 1024);
    let got: Vec<u16> = device.download(out, 1024).unwrap();
    for cta in 0..2 {
        for r in 0..8u16 {
            for c in 0..64u16 {
                // Columns start at -32: half of each row of the box is outside.
                let (row, column) = (first_row + r, i32::from(c) - 32);
                let inside = row < rows && column >= 0;
                let expected = if inside { (row + 1) * 256 + column as u16 } else { 0 };
                // 16-byte units of a 128-byte row are exchanged by the row's number.
                let at = r * 64 + ((c / 8) ^ r) * 8 + c % 8;
                let found = got[usize::from(cta * 512 + at)];
                assert_eq!(found, expected, "CTA {cta}, row {r}, column {c}");
            }
        }
    }
}
