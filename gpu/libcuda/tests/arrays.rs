//! CUDA arrays and mipmaps, copies to and from them, and the objects of textures and surfaces, on
//! the host and in kernels.

mod client;

use client::{call, download, function, launch, start, upload};

/// `CUDA_ARRAY3D_DESCRIPTOR`: width, height, depth; format, channels, flags.
type Shape = ([usize; 3], [u32; 3]);

/// `CUDA_MEMCPY3D` as words: the source's place, then the destination's, then the extent.
type Copy = [usize; 25];

const HOST: usize = 1;
const DEVICE: usize = 2;
const ARRAY: usize = 3;

/// `CU_AD_FORMAT_UNSIGNED_INT16`, `CUDA_ARRAY3D_LAYERED` and `CUDA_ARRAY3D_SURFACE_LDST`.
const U16: u32 = 2;
const LAYERED: u32 = 1;
const SURFACE: u32 = 2;
const INVALID_VALUE: i32 = 1;

/// One end of a copy: x in bytes, y, z, level, kind, host, device, array, reserved, pitch, height.
fn end(at: [usize; 3], kind: usize, place: usize, pitch: usize, height: usize) -> [usize; 11] {
    let mut end = [at[0], at[1], at[2], 0, kind, 0, 0, 0, 0, pitch, height];
    end[4 + kind] = place;
    end
}

fn copy(from: [usize; 11], to: [usize; 11], extent: [usize; 3]) -> i32 {
    let words: Vec<usize> = [&from[..], &to, &extent].concat();
    let words: Copy = words.try_into().unwrap();
    call!("cuMemcpy3D", (*const Copy), (&words))
}

fn array(shape: Shape) -> Result<usize, i32> {
    let mut array = 0usize;
    match call!("cuArray3DCreate", (*mut usize, *const Shape), (&mut array, &shape)) {
        0 => Ok(array),
        code => Err(code),
    }
}

#[test]
fn arrays_hold_what_is_copied_and_objects_tell_what_they_are_of() {
    start();
    copies_keep_to_the_box();
    arrays_are_refused_that_cannot_be();
    levels_halve();
    objects_are_read_back();
    kernels_fetch_from_every_resource();
    kernels_write_surfaces();
}

fn copies_keep_to_the_box() {
    // Pairs of u16, 5 x 4 x 3: a box of 2 x 3 x 2 from memory with gaps, to x = 1, y = 1, z = 1.
    let made = array(([5, 4, 3], [U16, 2, 0])).unwrap();
    let mut shape: Shape = ([0; 3], [9; 3]);
    assert_eq!(call!("cuArray3DGetDescriptor", (*mut Shape, usize), (&mut shape, made)), 0);
    assert_eq!(shape, ([5, 4, 3], [U16, 2, 0]));
    let zeros = [0u32; 60];
    let whole = [20, 4, 3];
    let from = end([0; 3], HOST, zeros.as_ptr() as usize, 20, 4);
    assert_eq!(copy(from, end([0; 3], ARRAY, made, 0, 0), whole), 0);
    let values: Vec<u32> = (1..=40).collect();
    let device = upload(&values);
    let from = end([0; 3], DEVICE, device as usize, 4 * 4, 5);
    let to = end([4, 1, 1], ARRAY, made, 0, 0);
    assert_eq!(copy(from, to, [8, 3, 2]), 0);
    let mut read = [7u32; 60];
    let to = end([0; 3], HOST, read.as_mut_ptr() as usize, 20, 4);
    assert_eq!(copy(end([0; 3], ARRAY, made, 0, 0), to, whole), 0);
    for (i, value) in read.into_iter().enumerate() {
        let (x, y, z) = (i % 5, i / 5 % 4, i / 20);
        let inside = (1..3).contains(&x) && (1..4).contains(&y) && z >= 1;
        let expected = if inside { values[(x - 1) + 4 * ((y - 1) + 5 * (z - 1))] } else { 0 };
        assert_eq!(value, expected, "at {x}, {y}, {z}");
    }
    // One more in any direction leaves the array.
    for extent in [[17, 3, 2], [16, 4, 2], [16, 3, 3]] {
        let from = end([0; 3], HOST, zeros.as_ptr() as usize, 20, 4);
        assert_eq!(copy(from, end([4, 1, 1], ARRAY, made, 0, 0), extent), INVALID_VALUE);
    }
    // From one array to another, and a row to memory.
    let other = array(([5, 4, 3], [U16, 2, 0])).unwrap();
    let (from, to) = (end([0; 3], ARRAY, made, 0, 0), end([0; 3], ARRAY, other, 0, 0));
    assert_eq!(copy(from, to, whole), 0);
    let first = end([4, 1, 1], ARRAY, other, 0, 0);
    assert_eq!(copy(first, end([0; 3], DEVICE, device as usize, 0, 0), [8, 1, 1]), 0);
    assert_eq!(download(device, 3), [1, 2, 3]);
    for made in [made, other] {
        assert_eq!(call!("cuArrayDestroy", (usize), (made)), 0);
    }
    let gone = end([0; 3], ARRAY, made, 0, 0);
    assert_ne!(copy(gone, end([0; 3], DEVICE, device as usize, 0, 0), [4, 1, 1]), 0);
}

fn arrays_are_refused_that_cannot_be() {
    for shape in [
        ([0, 1, 0], [U16, 1, 0]),
        ([4, 0, 2], [U16, 1, 0]),
        ([4, 4, 0], [U16, 3, 0]),
        ([4, 4, 0], [0, 1, 0]),
        ([4, 4, 0], [U16, 1, LAYERED]),
        // A cube map that is none.
        ([4, 5, 6], [U16, 1, 4]),
    ] {
        assert_eq!(array(shape), Err(INVALID_VALUE), "{shape:?}");
    }
    // One-dimensional layers.
    let layers = array(([4, 0, 2], [U16, 1, LAYERED])).unwrap();
    assert_eq!(call!("cuArrayDestroy", (usize), (layers)), 0);
}

fn levels_halve() {
    let shape: Shape = ([12, 5, 3], [U16, 1, LAYERED]);
    let mut mipmap = 0usize;
    let create =
        call!("cuMipmappedArrayCreate", (*mut usize, *const Shape, u32), (&mut mipmap, &shape, 99));
    assert_eq!(create, 0);
    let level = |i: u32| {
        let (mut level, mut shape): (usize, Shape) = (0, ([0; 3], [0; 3]));
        let code =
            call!("cuMipmappedArrayGetLevel", (*mut usize, usize, u32), (&mut level, mipmap, i));
        if code == 0 {
            call!("cuArray3DGetDescriptor", (*mut Shape, usize), (&mut shape, level));
        }
        (code, shape.0, level)
    };
    let sizes = [[12, 5, 3], [6, 2, 3], [3, 1, 3], [1, 1, 3]];
    for (i, size) in sizes.into_iter().enumerate() {
        assert_eq!((level(i as u32).0, level(i as u32).1), (0, size));
    }
    assert_eq!(level(4).0, INVALID_VALUE);
    // A level goes with its mipmap, not alone.
    assert_eq!(call!("cuArrayDestroy", (usize), (level(0).2)), INVALID_VALUE);
    assert_eq!(call!("cuMipmappedArrayDestroy", (usize), (mipmap)), 0);
}

/// `CUDA_RESOURCE_DESC` of an array, and its type.
fn of_array(array: usize) -> [usize; 18] {
    let mut resource = [0; 18];
    resource[1] = array;
    resource
}

fn objects_are_read_back() {
    let plain = array(([4, 4, 0], [U16, 1, 0])).unwrap();
    let writable = array(([4, 4, 0], [U16, 1, SURFACE])).unwrap();
    let texture: [u32; 26] = std::array::from_fn(|i| if i < 14 { i as u32 % 3 } else { 0 });
    let mut object = 0u64;
    let create = |object: *mut u64, resource: &[usize; 18]| {
        call!(
            "cuTexObjectCreate",
            (*mut u64, *const [usize; 18], *const [u32; 26], usize),
            (object, resource, &texture, 0)
        )
    };
    assert_eq!(create(&mut object, &of_array(plain)), 0);
    let (mut resource, mut read) = ([9; 18], [9; 26]);
    let back = call!("cuTexObjectGetTextureDesc", (*mut [u32; 26], u64), (&mut read, object));
    assert_eq!((back, read), (0, texture));
    let back =
        call!("cuTexObjectGetResourceDesc", (*mut [usize; 18], u64), (&mut resource, object));
    assert_eq!((back, resource[0] as u32, resource[1]), (0, 0, plain));
    assert_eq!(call!("cuTexObjectDestroy", (u64), (object)), 0);
    assert_ne!(call!("cuTexObjectDestroy", (u64), (object)), 0);
    // No array, and memory that ends too early.
    assert_ne!(create(&mut object, &of_array(1)), 0);
    let at = upload(&[0; 16]);
    let linear = |bytes| {
        let mut resource = [0; 18];
        resource[0] = 2;
        resource[1..4].copy_from_slice(&[at as usize, 0x20 | 1 << 32, bytes]);
        resource
    };
    assert_eq!(create(&mut object, &linear(64)), 0);
    assert_eq!(create(&mut object, &linear(1 << 20)), INVALID_VALUE);
    // Surfaces want arrays that were made for them.
    let surface = |array| {
        let mut object = 0u64;
        let resource = of_array(array);
        call!("cuSurfObjectCreate", (*mut u64, *const [usize; 18]), (&mut object, &resource))
    };
    assert_eq!((surface(plain), surface(writable)), (INVALID_VALUE, 0));
}

const KERNELS: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry fetch(.param .u64 object, .param .u64 out)
{
    .reg .u64 %o, %p; .reg .b32 %r<4>; .reg .f32 %x, %y;
    ld.param.u64 %o, [object];
    ld.param.u64 %p, [out];
    mov.f32 %x, 0f3FC00000;
    mov.f32 %y, 0f40000000;
    tex.2d.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {%x, %y}];
    st.global.v4.b32 [%p], {%r0, %r1, %r2, %r3};
    tex.1d.v4.u32.s32 {%r0, %r1, %r2, %r3}, [%o, {2}];
    st.global.v4.b32 [%p+16], {%r0, %r1, %r2, %r3};
    tex.level.2d.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {%x, %y}], 0f3F800000;
    st.global.v4.b32 [%p+32], {%r0, %r1, %r2, %r3};
    tex.a2d.v4.u32.f32 {%r0, %r1, %r2, %r3}, [%o, {1, %x, %y, %y}];
    st.global.v4.b32 [%p+48], {%r0, %r1, %r2, %r3};
    ret;
}
.visible .entry write(.param .u64 object, .param .u64 out)
{
    .reg .u64 %o;
    ld.param.u64 %o, [object];
    sust.b.2d.b16.trap [%o, {4, 3}], {0x1234};
    sust.p.2d.b32.trap [%o, {0, 1}], {70000};
    ret;
}
";

/// A `CUDA_TEXTURE_DESC`: address modes, filter, flags; no levels but those of a mipmap.
fn desc(filter: u32, flags: u32) -> [u32; 26] {
    let mut desc = [0; 26];
    desc[..5].copy_from_slice(&[1, 1, 1, filter, flags]);
    desc[9] = 9f32.to_bits();
    desc
}

/// What the kernel fetches from a texture of this resource, and the view of it that is given.
fn fetched(resource: [usize; 18], desc: [u32; 26], view: Option<[usize; 14]>) -> Vec<u32> {
    let mut object = 0u64;
    let view = view.as_ref().map_or(std::ptr::null(), |view| &raw const *view);
    let create = call!(
        "cuTexObjectCreate",
        (*mut u64, *const [usize; 18], *const [u32; 26], *const [usize; 14]),
        (&mut object, &resource, &desc, view)
    );
    assert_eq!(create, 0);
    let out = upload(&[9; 16]);
    assert_eq!(launch(function(KERNELS, "fetch"), 0, 1, &[object, out]), 0);
    // The kernel is over before its object is gone.
    assert_eq!(call!("cuTexObjectDestroy", (u64), (object)), 0);
    download(out, 16)
}

/// `CU_TRSF_READ_AS_INTEGER`.
const AS_INTEGERS: u32 = 1;

fn kernels_fetch_from_every_resource() {
    // 4 x 3 bytes, in an array and in memory whose rows are 32 bytes apart.
    let bytes: Vec<u8> = (0..12).map(|i| 20 * i + 7).collect();
    let plain = array(([4, 3, 0], [1, 1, 0])).unwrap();
    let to = end([0; 3], ARRAY, plain, 0, 0);
    assert_eq!(copy(end([0; 3], HOST, bytes.as_ptr() as usize, 4, 3), to, [4, 3, 1]), 0);
    let found = fetched(of_array(plain), desc(0, AS_INTEGERS), None);
    assert_eq!((found[0], found[4]), (u32::from(bytes[2 * 4 + 1]), u32::from(bytes[2])));
    // As a number up to 1, and halfway between rows 1 and 2.
    let one = |i: usize| f32::from(bytes[i]) / 255.0;
    let found = fetched(of_array(plain), desc(0, 0), None);
    assert_eq!(f32::from_bits(found[0]), one(9));
    let found = fetched(of_array(plain), desc(1, 0), None);
    let middle = (f64::from(one(5)) + f64::from(one(9))) / 2.0;
    assert_eq!(f32::from_bits(found[0]), middle as f32);

    let mut rows = [0u32; 32];
    for (row, bytes) in bytes.chunks(4).enumerate() {
        rows[8 * row] = u32::from_le_bytes(bytes.try_into().unwrap());
    }
    let at = upload(&rows) as usize;
    let mut pitched = [0; 18];
    pitched[0] = 3;
    pitched[1..6].copy_from_slice(&[at, 1 | 1 << 32, 4, 3, 32]);
    let found = fetched(pitched, desc(0, AS_INTEGERS), None);
    assert_eq!((found[0], found[4]), (u32::from(bytes[9]), u32::from(bytes[2])));

    // A row of plain memory: pairs of 16 bits, the third of them.
    let mut linear = [0; 18];
    linear[0] = 2;
    let words = upload(&[1, 2, 0xfffe_0003]) as usize;
    linear[1..4].copy_from_slice(&[words, 9 | 2 << 32, 12]);
    let found = fetched(linear, desc(0, AS_INTEGERS), None);
    assert_eq!(found[4..8], [3, -2i32 as u32, 0, 0]);

    // Layers: the second; through a view of the last two the third.
    let layers = array(([4, 3, 3], [1, 1, LAYERED])).unwrap();
    for layer in 0..3 {
        let bytes: Vec<u8> = bytes.iter().map(|b| b / 2 + 40 * layer as u8).collect();
        let from = end([0; 3], HOST, bytes.as_ptr() as usize, 4, 3);
        let to = end([0, 0, layer], ARRAY, layers, 0, 0);
        assert_eq!(copy(from, to, [4, 3, 1]), 0);
    }
    let of_layer = |layer: u32| u32::from(bytes[9]) / 2 + 40 * layer;
    assert_eq!(fetched(of_array(layers), desc(0, AS_INTEGERS), None)[12], of_layer(1));
    let mut view = [0; 14];
    view[5] = 1 | 2 << 32;
    assert_eq!(fetched(of_array(layers), desc(0, AS_INTEGERS), Some(view))[12], of_layer(2));

    // The second level of a mipmap has 2 x 1 texels.
    let shape: Shape = ([4, 3, 0], [0x20, 1, 0]);
    let (mut mipmap, mut level) = (0usize, 0usize);
    let create =
        call!("cuMipmappedArrayCreate", (*mut usize, *const Shape, u32), (&mut mipmap, &shape, 2));
    assert_eq!(create, 0);
    let get = call!("cuMipmappedArrayGetLevel", (*mut usize, usize, u32), (&mut level, mipmap, 1));
    assert_eq!(get, 0);
    let small = [2.5f32, 3.5];
    let from = end([0; 3], HOST, small.as_ptr() as usize, 8, 1);
    assert_eq!(copy(from, end([0; 3], ARRAY, level, 0, 0), [8, 1, 1]), 0);
    let mut resource = of_array(mipmap);
    resource[0] = 1;
    assert_eq!(f32::from_bits(fetched(resource, desc(0, 0), None)[8]), 3.5);
}

fn kernels_write_surfaces() {
    let written = array(([4, 4, 0], [U16, 1, SURFACE])).unwrap();
    let zeros = [0u16; 16];
    let from = end([0; 3], HOST, zeros.as_ptr() as usize, 8, 4);
    assert_eq!(copy(from, end([0; 3], ARRAY, written, 0, 0), [8, 4, 1]), 0);
    let mut object = 0u64;
    let resource = of_array(written);
    let create =
        call!("cuSurfObjectCreate", (*mut u64, *const [usize; 18]), (&mut object, &resource));
    assert_eq!(create, 0);
    assert_eq!(launch(function(KERNELS, "write"), 0, 1, &[object, 0]), 0);
    let mut read = [7u16; 16];
    let to = end([0; 3], HOST, read.as_mut_ptr() as usize, 8, 4);
    assert_eq!(copy(end([0; 3], ARRAY, written, 0, 0), to, [8, 4, 1]), 0);
    let mut expected = zeros;
    // By bytes, the third texel of the last row; by texels, the largest that 16 bits hold.
    (expected[12 + 2], expected[4]) = (0x1234, 0xffff);
    assert_eq!(read, expected);
    assert_eq!(call!("cuSurfObjectDestroy", (u64), (object)), 0);
}
