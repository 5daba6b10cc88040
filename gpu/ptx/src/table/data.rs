//! Data movement and conversion, asynchronous copies, tensor maps.

use super::Opcode::*;
use super::pattern::{Section, row};

/// The types of loads and stores, and further sets.
macro_rules! types {
    ($more:literal) => {
        concat!("type=b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64", $more)
    };
}

const LOAD: &str = types!(
    "; space=const global local param param::entry param::func shared shared::cta shared::cluster"
);
const LOAD_COP: &str = types!(
    "; space=const global local param param::entry param::func shared shared::cta shared::cluster; \
     cop=ca cg cs lu cv"
);
const STORE: &str =
    types!("; space=global local param param::func shared shared::cta shared::cluster");
const STORE_COP: &str = types!(
    "; space=global local param param::func shared shared::cta shared::cluster; cop=wb cg cs wt"
);
const READ_ONLY: &str = types!("");
const READ_ONLY_COP: &str = types!("; cop=ca cg cs");
const CVT: &str = "dtype=u8 u16 u32 u64 s8 s16 s32 s64; atype=u8 u16 u32 u64 s8 s16 s32 s64";
const ASYNC: &str = "cop=ca; ss=shared shared::cta";
const ASYNCG: &str = "cop=cg; ss=shared shared::cta";
const SPACES: &str =
    "space=const global local shared shared::cta shared::cluster param param::entry; type=u32 u64";

/// Rows of these chapters.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Data Movement and Conversion Instructions",
        rows: &[
            row(
                Mov,
                "mov.type d:any*n, a:any*n",
                "type=pred b16 b32 b64 b128 u16 u32 u64 s16 s32 s64 f32 f64",
                "1.0",
                "d = a: a register, literal, special register or address; packs and unpacks \
                vectors",
            ),
            row(
                Mov,
                "mov.vec.type d:any*n, a:any*n",
                "type=b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64",
                "1.0",
                "d = a, a vector of that length",
            ),
            row(
                Shfl,
                "shfl.sync.mode.b32 d{|p:pred}, a, b:b32, c:b32, membermask:b32",
                "mode=up down bfly idx",
                "6.0 sm_30",
                "d = a of another lane of the warp; p = whether that lane is in range",
            ),
            row(
                Shfl,
                "shfl.mode.b32 d{|p:pred}, a, b:b32, c:b32",
                "mode=up down bfly idx",
                "3.0 sm_30",
                "shfl before Volta: no longer available from sm_70",
            ),
            row(
                Prmt,
                "prmt.b32{.mode} d, a, b, c",
                "mode=f4e b4e rc8 ecl ecr rc16",
                "2.0 sm_20",
                "d = four bytes picked from the eight of b:a, with sign replication",
            ),
            row(
                Ld,
                "ld{.weak}{.space}{.cop}{.policy}{.prefetch}{.vec}.type d:~t0*vec, [a]{, \
                policy:b64}",
                LOAD_COP,
                "1.0",
                "d = memory at a",
            ),
            row(
                Ld,
                "ld{.weak}{.space}{.l1hint}{.policy}{.prefetch}{.vec}.type d:~t0*vec, [a]{, \
                policy:b64}",
                LOAD,
                "7.4 sm_70",
                "d = memory at a",
            ),
            row(
                Ld,
                "ld.volatile{.space}{.prefetch}{.vec}.type d:~t0*vec, [a]",
                LOAD,
                "1.0",
                "d = memory at a, never cached in registers or elided",
            ),
            row(
                Ld,
                "ld.sem.scope{.space}{.l1hint}{.policy}{.prefetch}{.vec}.type d:~t0*vec, [a]{, \
                policy:b64}",
                "sem=relaxed acquire; type=b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 \
                f64; space=global shared shared::cta shared::cluster local param param::func",
                "6.0 sm_70",
                "d = memory at a, with that order and scope",
            ),
            row(
                Ld,
                "ld.mmio.sem.sys{.global}.type d:~t0, [a]",
                "sem=relaxed acquire; type=b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64",
                "8.2 sm_70",
                "d = memory-mapped I/O at a",
            ),
            row(
                Ld,
                "ld.global{.cop}.nc{.policy}{.prefetch}{.vec}.type d:~t0*vec, [a]{, policy:b64}",
                READ_ONLY_COP,
                "3.1 sm_32",
                "d = memory at a through the read-only cache",
            ),
            row(
                Ld,
                "ld.global.nc{.l1hint}{.policy}{.prefetch}{.vec}.type d:~t0*vec, [a]{, policy:b64}",
                READ_ONLY,
                "7.4 sm_70",
                "d = memory at a through the read-only cache",
            ),
            row(
                Ld,
                "ld{.weak}{.global}{.l1hint}{.l2hint}{.policy}{.prefetch}.vec.type d:~t0*vec, \
                [a]{, policy:b64}",
                "vec=v8; type=b32 u32 s32 f32",
                "8.8 sm_100",
                "d = 256 bits of memory at a",
            ),
            row(
                Ld,
                "ld{.weak}{.global}{.l1hint}{.l2hint}{.policy}{.prefetch}.vec.type d:~t0*vec, \
                [a]{, policy:b64}",
                "vec=v4; type=b64 u64 s64 f64",
                "8.8 sm_100",
                "d = 256 bits of memory at a",
            ),
            row(
                Ld,
                "ld.global.nc{.l1hint}{.l2hint}{.policy}{.prefetch}.vec.type d:~t0*vec, [a]{, \
                policy:b64}",
                "vec=v8; type=b32 u32 s32 f32",
                "8.8 sm_100",
                "d = 256 bits of memory at a through the read-only cache",
            ),
            row(
                Ld,
                "ld.global.nc{.l1hint}{.l2hint}{.policy}{.prefetch}.vec.type d:~t0*vec, [a]{, \
                policy:b64}",
                "vec=v4; type=b64 u64 s64 f64",
                "8.8 sm_100",
                "d = 256 bits of memory at a through the read-only cache",
            ),
            row(
                Ldu,
                "ldu{.global}{.vec}.type d:~t0*vec, [a]",
                "vec=v2 v4; type=b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64",
                "2.0 sm_20",
                "d = read-only memory at a, the same address in all threads of the warp",
            ),
            row(
                St,
                "st{.weak}{.space}{.cop}{.policy}{.vec}.type [a], b:~t0*vec{, policy:b64}",
                STORE_COP,
                "1.0",
                "memory at a = b",
            ),
            row(
                St,
                "st{.weak}{.space}{.l1hint}{.policy}{.vec}.type [a], b:~t0*vec{, policy:b64}",
                STORE,
                "7.4 sm_70",
                "memory at a = b",
            ),
            row(
                St,
                "st.volatile{.space}{.vec}.type [a], b:~t0*vec",
                STORE,
                "1.1",
                "memory at a = b, never elided",
            ),
            row(
                St,
                "st.sem.scope{.space}{.l1hint}{.policy}{.vec}.type [a], b:~t0*vec{, policy:b64}",
                "sem=relaxed release; type=b8 b16 b32 b64 b128 u8 u16 u32 u64 s8 s16 s32 s64 f32 \
                f64; space=global shared shared::cta shared::cluster local param param::func",
                "6.0 sm_70",
                "memory at a = b, with that order and scope",
            ),
            row(
                St,
                "st.mmio.sem.sys{.global}.type [a], b:~t0",
                "sem=relaxed release; type=b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64",
                "8.2 sm_70",
                "memory-mapped I/O at a = b",
            ),
            row(
                St,
                "st{.weak}{.global}{.l1hint}{.l2hint}{.policy}.vec.type [a], b:~t0*vec{, \
                policy:b64}",
                "vec=v8; type=b32 u32 s32 f32",
                "8.8 sm_100",
                "256 bits of memory at a = b",
            ),
            row(
                St,
                "st{.weak}{.global}{.l1hint}{.l2hint}{.policy}.vec.type [a], b:~t0*vec{, \
                policy:b64}",
                "vec=v4; type=b64 u64 s64 f64",
                "8.8 sm_100",
                "256 bits of memory at a = b",
            ),
            row(
                StAsync,
                "st.async{.weak}{.shared::cluster}.mbar{.vec}.type [a], b*vec, [m]",
                "vec=v2 v4; type=b32 b64 u32 u64 s32 s64 f32 f64",
                "8.1 sm_90",
                "shared memory of a cluster's CTA at a = b, asynchronously; then complete_tx on \
                the mbarrier m",
            ),
            row(
                StAsync,
                "st.async{.mmio}.release.scope{.global}.type [a], b",
                "scope=gpu sys; type=b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f32 f64",
                "8.7 sm_100",
                "global memory at a = b, asynchronously, after all earlier accesses",
            ),
            row(
                StBulk,
                "st.bulk{.weak}{.shared::cta} [a], size:u64, #zero:u64",
                "",
                "8.6 sm_100",
                "size bytes of shared memory at a = 0",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op.type d, [a]",
                "op=add; type=u32 s32 u64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op.type d, [a]",
                "op=min max; type=u32 s32 u64 s64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op.type d, [a]",
                "op=and or xor; type=b32 b64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op{.vec}.f32 d*vec, [a]",
                "op=add; vec=v2 v4",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op.f64 d, [a]",
                "op=add",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op{.acc}{.vec}.type d*vec, [a]",
                "acc=acc::f32; op=add min max; vec=v2 v4; type=f16x2 bf16x2",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op{.acc}.vec.type d*vec, [a]",
                "acc=acc::f32; op=add min max; type=f16 bf16",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce{.weak}{.global}.op{.acc}{.vec}.type d*vec, [a]",
                "acc=acc::f16; op=add min max; type=e4m3 e5m2 e4m3x2 e5m2x2 e4m3x4 e5m2x4",
                "8.6 sm_100a",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op.type d, [a]",
                "sem=relaxed acquire; op=add; type=u32 s32 u64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op.type d, [a]",
                "sem=relaxed acquire; op=min max; type=u32 s32 u64 s64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op.type d, [a]",
                "sem=relaxed acquire; op=and or xor; type=b32 b64",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op{.vec}.f32 d*vec, [a]",
                "sem=relaxed acquire; op=add; vec=v2 v4",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op.f64 d, [a]",
                "sem=relaxed acquire; op=add",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op{.acc}{.vec}.type d*vec, [a]",
                "sem=relaxed acquire; acc=acc::f32; op=add min max; vec=v2 v4; type=f16x2 bf16x2",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op{.acc}.vec.type d*vec, [a]",
                "sem=relaxed acquire; acc=acc::f32; op=add min max; type=f16 bf16",
                "8.1 sm_90",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemLdReduce,
                "multimem.ld_reduce.sem.scope{.global}.op{.acc}{.vec}.type d*vec, [a]",
                "sem=relaxed acquire; acc=acc::f16; op=add min max; type=e4m3 e5m2 e4m3x2 e5m2x2 \
                e4m3x4 e5m2x4",
                "8.6 sm_100a",
                "d = reduction over the copies behind a multicast address",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op.type [a], b",
                "stsem=relaxed release; op=add; type=u32 s32 u64",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op.type [a], b",
                "stsem=relaxed release; op=min max; type=u32 s32 u64 s64",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op.type [a], b",
                "stsem=relaxed release; op=and or xor; type=b32 b64",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op{.vec}.f32 [a], b*vec",
                "stsem=relaxed release; op=add; vec=v2 v4",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op.f64 [a], b",
                "stsem=relaxed release; op=add",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op{.vec}.type [a], b*vec",
                "stsem=relaxed release; op=add; vec=v2 v4; type=f16x2 bf16x2",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemRed,
                "multimem.red{.stsem.scope}{.global}.op.vec.type [a], b*vec",
                "stsem=relaxed release; op=add; type=f16 bf16",
                "8.1 sm_90",
                "every copy behind a multicast address = itself op b",
            ),
            row(
                MultimemSt,
                "multimem.st{.weak}{.global}.type [a], b",
                "type=b32 b64 u32 u64 s32 s64 f64",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st{.weak}{.global}{.vec}.type [a], b*vec",
                "vec=v2 v4; type=f32 f16x2 bf16x2",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st{.weak}{.global}.vec.type [a], b*vec",
                "type=f16 bf16",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st{.weak}{.global}{.vec}.type [a], b*vec",
                "type=e4m3 e5m2 e4m3x2 e5m2x2 e4m3x4 e5m2x4",
                "8.6 sm_100a",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st.stsem.scope{.global}.type [a], b",
                "stsem=relaxed release; type=b32 b64 u32 u64 s32 s64 f64",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st.stsem.scope{.global}{.vec}.type [a], b*vec",
                "stsem=relaxed release; vec=v2 v4; type=f32 f16x2 bf16x2",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st.stsem.scope{.global}.vec.type [a], b*vec",
                "stsem=relaxed release; type=f16 bf16",
                "8.1 sm_90",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemSt,
                "multimem.st.stsem.scope{.global}{.vec}.type [a], b*vec",
                "stsem=relaxed release; type=e4m3 e5m2 e4m3x2 e5m2x2 e4m3x4 e5m2x4",
                "8.6 sm_100a",
                "every copy behind a multicast address = b",
            ),
            row(
                MultimemCpAsyncBulk,
                "multimem.cp.async.bulk.global.shared::cta.bulk_group{.cp_mask} [a], [b], \
                size:u32{, mask:b16}",
                "",
                "9.1 sm_90",
                "bulk copy to every copy behind a multicast address",
            ),
            row(
                MultimemCpReduceAsyncBulk,
                "multimem.cp.reduce.async.bulk.global.shared::cta.bulk_group.op{.noftz}.type [a], \
                [b], size:u32",
                "op=add min max and or xor inc dec; type=b32 b64 u32 u64 s32 s64 f16 bf16 f32 f64",
                "9.1 sm_90",
                "bulk reduction into every copy behind a multicast address",
            ),
            row(
                Prefetch,
                "prefetch{.space}.level [a]",
                "space=global local; level=L1 L2",
                "2.0 sm_20",
                "fetch the cache line of a: no effect on values",
            ),
            row(
                Prefetch,
                "prefetch{.global}.level [a]",
                "level=L2::evict_last L2::evict_normal",
                "7.4 sm_80",
                "fetch the cache line of a with an eviction priority",
            ),
            row(
                Prefetch,
                "prefetch{.space}.tensormap [a]",
                "space=const param param::entry",
                "8.0 sm_90",
                "fetch the tensor map at a",
            ),
            row(
                Prefetchu,
                "prefetchu.L1 [a]",
                "",
                "2.0 sm_20",
                "fetch the line of a into the uniform cache",
            ),
            row(
                Applypriority,
                "applypriority{.global}.L2::evict_normal [a], #size:u32",
                "",
                "7.4 sm_80",
                "set the eviction priority of 128 bytes at a",
            ),
            row(
                Discard,
                "discard{.global}.L2 [a], #size:u32",
                "",
                "7.4 sm_80",
                "drop 128 bytes at a: their values become undefined",
            ),
            row(
                Createpolicy,
                "createpolicy.range{.global}.primary{.secondary}.b64 d, [a], size:u32, total:u32",
                "primary=L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged; \
                secondary=L2::evict_first L2::evict_unchanged",
                "7.4 sm_80",
                "d = a cache policy for an address range",
            ),
            row(
                Createpolicy,
                "createpolicy.fractional.primary{.secondary}.b64 d{, fraction:f32}",
                "primary=L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged; \
                secondary=L2::evict_first L2::evict_unchanged",
                "7.4 sm_80",
                "d = a cache policy for a fraction of accesses",
            ),
            row(
                Createpolicy,
                "createpolicy.cvt.L2.b64 d, a:b64",
                "",
                "7.4 sm_80",
                "d = a cache policy from an access property",
            ),
            row(
                Isspacep,
                "isspacep.space d:pred, a:any",
                "space=const global local shared shared::cta shared::cluster param param::entry",
                "2.0 sm_20",
                "d = whether the generic address a lies in that space",
            ),
            row(
                Cvta,
                "cvta.space.type d, a:~t0",
                SPACES,
                "2.0 sm_20",
                "d = generic address of a in that space",
            ),
            row(
                Cvta,
                "cvta.to.space.type d, a",
                SPACES,
                "2.0 sm_20",
                "d = address in that space of the generic address a",
            ),
            row(
                Mapa,
                "mapa{.shared::cluster}.type d, a, b:u32",
                "type=u32 u64",
                "7.8 sm_90",
                "d = the address that a has in CTA b of the cluster",
            ),
            row(
                Getctarank,
                "getctarank{.shared::cluster}.type d:u32, a",
                "type=u32 u64",
                "7.8 sm_90",
                "d = rank of the CTA that holds the shared address a",
            ),
        ],
    },
    Section {
        title: "Data Movement and Conversion Instructions: cvt",
        rows: &[
            row(
                Cvt,
                "cvt{.sat}.dtype.atype d:~t0, a:~t1",
                CVT,
                "1.0",
                "d = a, extended or truncated; with sat clamped to the range of dtype",
            ),
            row(
                Cvt,
                "cvt.rnd{.sat}.dtype.atype d:~t0, a:~t1",
                "dtype=f16 f64; atype=u8 u16 u32 u64 s8 s16 s32 s64",
                "1.0",
                "d = the integer a, rounded",
            ),
            row(
                Cvt,
                "cvt.rnd{.ftz}{.sat}.f32.atype d:~t0, a:~t1",
                "atype=u8 u16 u32 u64 s8 s16 s32 s64",
                "1.0",
                "d = the integer a, rounded",
            ),
            row(
                Cvt,
                "cvt.rnd.bf16.atype d:~t0, a:~t1",
                "atype=u8 u16 u32 u64 s8 s16 s32 s64",
                "7.8 sm_90",
                "d = the integer a, rounded",
            ),
            row(
                Cvt,
                "cvt.irnd{.sat}.dtype.atype d:~t0, a:~t1",
                "dtype=u8 u16 u32 u64 s8 s16 s32 s64; atype=f16 f64",
                "1.0",
                "d = a rounded to an integer and clamped; NaN gives 0, and 2^(n-1) where a side \
                is f64 or n is 64",
            ),
            row(
                Cvt,
                "cvt.irnd{.ftz}{.sat}.dtype.f32 d:~t0, a:~t1",
                "dtype=u8 u16 u32 u64 s8 s16 s32 s64",
                "1.0",
                "d = a rounded to an integer and clamped; NaN gives 0, and 2^(n-1) where a side \
                is f64 or n is 64",
            ),
            row(
                Cvt,
                "cvt.irnd.dtype.bf16 d:~t0, a:~t1",
                "dtype=u8 u16 u32 u64 s8 s16 s32 s64",
                "7.8 sm_90",
                "d = a rounded to an integer and clamped",
            ),
            row(
                Cvt,
                "cvt{.irnd}{.ftz}{.sat}.f32.f32 d:~t0, a:~t1",
                "",
                "1.0",
                "d = a, rounded to an integral value where asked",
            ),
            row(
                Cvt,
                "cvt{.irnd}{.sat}.f64.f64 d:~t0, a:~t1",
                "",
                "1.0",
                "d = a, rounded to an integral value where asked",
            ),
            row(
                Cvt,
                "cvt{.irnd}{.sat}.f16.f16 d:~t0, a:~t1",
                "",
                "4.2 sm_53",
                "d = a, rounded to an integral value where asked",
            ),
            row(
                Cvt,
                "cvt{.irnd}.bf16.bf16 d:~t0, a:~t1",
                "",
                "7.8 sm_90",
                "d = a, rounded to an integral value where asked",
            ),
            row(Cvt, "cvt{.ftz}{.sat}.type.f32 d:~t0, a:~t1", "type=f64", "1.0", "d = a, exactly"),
            row(Cvt, "cvt{.ftz}{.sat}.f32.f16 d:~t0, a:~t1", "", "1.0", "d = a, exactly"),
            row(Cvt, "cvt{.sat}.f64.f16 d:~t0, a:~t1", "", "1.0", "d = a, exactly"),
            row(Cvt, "cvt.rnd{.ftz}{.sat}.f32.f64 d:~t0, a:~t1", "", "1.0", "d = a, rounded"),
            row(Cvt, "cvt.rnd{.ftz}{.sat}.f16.f32 d:~t0, a:~t1", "", "1.0", "d = a, rounded"),
            row(Cvt, "cvt.rnd{.sat}.f16.f64 d:~t0, a:~t1", "", "1.0", "d = a, rounded"),
            row(Cvt, "cvt{.rnd}{.ftz}.f32.bf16 d:~t0, a:~t1", "", "7.1 sm_80", "d = a, exactly"),
            row(Cvt, "cvt{.rnd}.f64.bf16 d:~t0, a:~t1", "", "7.8 sm_90", "d = a, exactly"),
            row(Cvt, "cvt{.rnd}.f16.bf16 d:~t0, a:~t1", "", "7.8 sm_90", "d = a, rounded"),
            row(Cvt, "cvt.rnd.bf16.f64 d:~t0, a:~t1", "", "7.8 sm_90", "d = a, rounded"),
            row(Cvt, "cvt{.rnd}.bf16.f16 d:~t0, a:~t1", "", "7.8 sm_90", "d = a, rounded"),
            row(Cvt, "cvt.rnd{.ftz}.bf16.f32 d:~t0, a:~t1", "", "7.8 sm_90", "d = a, rounded"),
            row(
                Cvt,
                "cvt.frnd2{.relu}{.satfinite}.type.f32 d:~t0, a:~t1",
                "type=f16 bf16",
                "7.0 sm_80",
                "d = a rounded; relu: at least 0; satfinite: clamped to the largest finite value",
            ),
            row(
                Cvt,
                "cvt.frnd2{.relu}{.satfinite}.type.f32 d, a:t1, b:t1",
                "type=f16x2 bf16x2",
                "7.0 sm_80",
                "d = a rounded (upper half), b rounded (lower half)",
            ),
            row(
                Cvt,
                "cvt.rs{.relu}{.satfinite}.type.f32 d, a:t1, b:t1, rbits:b32",
                "type=f16x2 bf16x2",
                "8.7 sm_100a",
                "as cvt to a pair, stochastically rounded with the bits of rbits",
            ),
            row(
                Cvt,
                "cvt.rna{.satfinite}.tf32.f32 d:b32, a:t1",
                "",
                "7.0 sm_80",
                "d = a rounded to tf32, to nearest with ties away from zero",
            ),
            row(
                Cvt,
                "cvt.frnd2{.satfinite}{.relu}.tf32.f32 d:b32, a:t1",
                "",
                "7.8 sm_90",
                "d = a rounded to tf32",
            ),
            row(
                Cvt,
                "cvt.rn.satfinite{.relu}.type.f32 d:b16, a:t1, b:t1",
                "type=e4m3x2 e5m2x2",
                "7.8 sm_89",
                "d = a (upper byte) and b (lower byte) rounded to FP8, clamped to the largest \
                finite value",
            ),
            row(
                Cvt,
                "cvt.rn.satfinite{.relu}.type.atype d:b16, a:t1",
                "type=e4m3x2 e5m2x2; atype=f16x2",
                "7.8 sm_89",
                "d = each half of a rounded to FP8, clamped to the largest finite value",
            ),
            row(
                Cvt,
                "cvt.rn.satfinite{.relu}.type.bf16x2 d:b16, a:t1",
                "type=e4m3x2 e5m2x2",
                "9.1 sm_100a",
                "d = each half of a rounded to FP8",
            ),
            row(
                Cvt,
                "cvt.rn{.relu}.f16x2.type d:f16x2, a:b16",
                "type=e4m3x2 e5m2x2",
                "7.8 sm_89",
                "d = each FP8 byte of a, exactly",
            ),
            row(
                Cvt,
                "cvt.rn{.relu}.bf16x2.type d:b32, a:b16",
                "type=e4m3x2 e5m2x2",
                "9.1 sm_100a",
                "d = each FP8 byte of a, exactly",
            ),
            row(
                Cvt,
                "cvt.rs{.relu}.satfinite.type.f32 d:b32, a:t1*4, rbits:b32",
                "type=e4m3x4 e5m2x4 e2m3x4 e3m2x4",
                "8.7 sm_100a",
                "four values stochastically rounded",
            ),
            row(
                Cvt,
                "cvt.rs{.relu}.satfinite.e2m1x4.f32 d:b16, a:t1*4, rbits:b32",
                "",
                "8.7 sm_100a",
                "four values stochastically rounded",
            ),
            row(
                Cvt,
                "cvt.rn.satfinite{.relu}.type.f32 d:any, a:t1, b:t1",
                "type=e2m1x2 e2m3x2 e3m2x2",
                "8.6 sm_100a",
                "d = a and b rounded to FP4 or FP6",
            ),
            row(
                Cvt,
                "cvt.rn{.relu}.f16x2.type d:f16x2, a:any",
                "type=e2m1x2 e2m3x2 e3m2x2",
                "8.6 sm_100a",
                "d = the FP4 or FP6 pair a, exactly",
            ),
            row(
                Cvt,
                "cvt.frnd3{.satfinite}.ue8m0x2.f32 d:b16, a:t1, b:t1",
                "frnd3=rz rp",
                "8.6 sm_100a",
                "d = the exponents of a and b",
            ),
            row(
                Cvt,
                "cvt.frnd3{.satfinite}.ue8m0x2.bf16x2 d:b16, a:b32",
                "frnd3=rz rp",
                "8.6 sm_100a",
                "d = the exponents of the halves of a",
            ),
            row(
                Cvt,
                "cvt.rn.bf16x2.ue8m0x2 d:b32, a:b16",
                "",
                "8.6 sm_100a",
                "d = the powers of two of a",
            ),
            row(
                CvtPack,
                "cvt.pack.sat.type.s32 d:b32, a:s32, b:s32",
                "type=u16 s16",
                "6.5 sm_72",
                "d = a (upper) and b (lower), clamped to 16 bits",
            ),
            row(
                CvtPack,
                "cvt.pack.sat.type.s32.b32 d:b32, a:s32, b:s32, c:b32",
                "type=u2 s2 u4 s4 u8 s8",
                "6.5 sm_72",
                "d = c shifted left, then a and b clamped to the narrow type",
            ),
        ],
    },
    Section {
        title: "Data Movement and Conversion Instructions: Asynchronous copy",
        rows: &[
            row(
                CpAsync,
                "cp.async.cop.ss.global{.policy}{.prefetch} [d], [a], #size:u32{, src:u32}{, \
                policy:b64}",
                ASYNC,
                "7.0 sm_80",
                "copy 4, 8 or 16 bytes to shared memory; of them src are read, the rest zero",
            ),
            row(
                CpAsync,
                "cp.async.cop.ss.global{.policy}{.prefetch} [d], [a], #size:u32{, src:u32}{, \
                policy:b64}",
                ASYNCG,
                "7.0 sm_80",
                "copy 16 bytes to shared memory, past L1",
            ),
            row(
                CpAsync,
                "cp.async.cop.ss.global{.policy}{.prefetch} [d], [a], #size:u32, !ignore{, \
                policy:b64}",
                "cop=ca cg",
                "8.3 sm_80",
                "as cp.async; where ignore is true zeros are written",
            ),
            row(
                CpAsyncCommitGroup,
                "cp.async.commit_group",
                "",
                "7.0 sm_80",
                "the thread's cp.async since the last commit become a group",
            ),
            row(
                CpAsyncWaitGroup,
                "cp.async.wait_group #n:u32",
                "",
                "7.0 sm_80",
                "wait until at most n of the latest groups are pending",
            ),
            row(
                CpAsyncWaitAll,
                "cp.async.wait_all",
                "",
                "7.0 sm_80",
                "wait for all cp.async of the thread",
            ),
            row(
                CpAsyncMbarrierArrive,
                "cp.async.mbarrier.arrive{.noinc}{.ss}.b64 [m]",
                "",
                "7.0 sm_80",
                "arrive on the mbarrier m when the thread's earlier cp.async are complete",
            ),
            row(
                CpAsyncBulk,
                "cp.async.bulk.shared::cta.global.mbar{.policy} [d], [a], size:u32, [m]{, \
                policy:b64}",
                "",
                "8.6 sm_90",
                "bulk copy from global to own shared memory",
            ),
            row(
                CpAsyncBulk,
                "cp.async.bulk.shared::cluster.global.mbar{.multicast::cluster}{.policy} [d], \
                [a], size:u32, [m]{, mask:b16}{, policy:b64}",
                "",
                "8.0 sm_90",
                "bulk copy from global to shared memory, of each CTA in mask with multicast",
            ),
            row(
                CpAsyncBulk,
                "cp.async.bulk.shared::cluster.shared::cta.mbar [d], [a], size:u32, [m]",
                "",
                "8.0 sm_90",
                "bulk copy from own shared memory to a cluster's CTA",
            ),
            row(
                CpAsyncBulk,
                "cp.async.bulk.global.shared::cta.bulk_group{.policy}{.cp_mask} [d], [a], \
                size:u32{, policy:b64}{, mask:b16}",
                "",
                "8.0 sm_90",
                "bulk copy from shared to global memory",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.shared::cluster.shared::cta.mbar.op.type [d], [a], \
                size:u32, [m]",
                "op=and or xor; type=b32",
                "8.0 sm_90",
                "bulk reduction into the shared memory of a cluster CTA",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.shared::cluster.shared::cta.mbar.op.type [d], [a], \
                size:u32, [m]",
                "op=add; type=u32 s32 u64",
                "8.0 sm_90",
                "bulk reduction into the shared memory of a cluster CTA",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.shared::cluster.shared::cta.mbar.op.type [d], [a], \
                size:u32, [m]",
                "op=inc dec; type=u32",
                "8.0 sm_90",
                "bulk reduction into the shared memory of a cluster CTA",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.shared::cluster.shared::cta.mbar.op.type [d], [a], \
                size:u32, [m]",
                "op=min max; type=u32 s32",
                "8.0 sm_90",
                "bulk reduction into the shared memory of a cluster CTA",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{.policy}.op.type [d], [a], \
                size:u32{, policy:b64}",
                "op=and or xor; type=b32 b64",
                "8.0 sm_90",
                "bulk reduction into global memory",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{.policy}.op.type [d], [a], \
                size:u32{, policy:b64}",
                "op=add; type=u32 s32 u64 f32 f64",
                "8.0 sm_90",
                "bulk reduction into global memory",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{.policy}.op.type [d], [a], \
                size:u32{, policy:b64}",
                "op=inc dec; type=u32",
                "8.0 sm_90",
                "bulk reduction into global memory",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{.policy}.op.type [d], [a], \
                size:u32{, policy:b64}",
                "op=min max; type=u32 s32 u64 s64 f16 bf16",
                "8.0 sm_90",
                "bulk reduction into global memory",
            ),
            row(
                CpReduceAsyncBulk,
                "cp.reduce.async.bulk.global.shared::cta.bulk_group{.policy}.op.noftz.type [d], \
                [a], size:u32{, policy:b64}",
                "op=add; type=f16 bf16",
                "8.0 sm_90",
                "bulk addition into global memory, subnormals kept",
            ),
            row(
                CpAsyncBulkPrefetch,
                "cp.async.bulk.prefetch.L2.global{.policy} [a], size:u32{, policy:b64}",
                "",
                "8.0 sm_90",
                "fetch a range into L2",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cta.global{.tile}.mbar{.policy} [d], [t, c], \
                [m]{, policy:b64}",
                "",
                "8.6 sm_90",
                "copy a box of a tensor to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cta.global.im2col.mbar{.policy} [d], [t, c], \
                [m], offsets:u16*n{, policy:b64}",
                "dim=3d 4d 5d",
                "8.6 sm_90",
                "copy columns of a convolution to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cta.global.mode.mbar{.cta}{.policy} [d], [t, \
                c], [m], offsets:u16*n{, policy:b64}",
                "dim=3d 4d 5d; mode=im2col::w im2col::w::128; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy columns of a convolution to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cta.global.tile::gather4.mbar{.cta}{.policy} \
                [d], [t, c], [m]{, policy:b64}",
                "dim=2d; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy four rows of a tensor to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cta.global{.mode}.mbar.cta{.policy} [d], [t, \
                c], [m]{, policy:b64}",
                "mode=tile; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy a box of a tensor to shared memory, signalling an mbarrier of the CTA pair",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cluster.global{.tile}.mbar{.multicast::cluster}\
                {.policy} [d], [t, c], [m]{, mask:b16}{, policy:b64}",
                "",
                "8.0 sm_90",
                "copy a box of a tensor to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cluster.global.im2col.mbar{.multicast::cluster}\
                {.policy} [d], [t, c], [m], offsets:u16*n{, mask:b16}{, policy:b64}",
                "dim=3d 4d 5d",
                "8.0 sm_90",
                "copy columns of a convolution to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cluster.global.mode.mbar{.multicast::cluster}{\
                .cta}{.policy} [d], [t, c], [m], offsets:u16*n{, mask:b16}{, policy:b64}",
                "dim=3d 4d 5d; mode=im2col::w im2col::w::128; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy columns of a convolution to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cluster.global.tile::gather4.mbar{\
                .multicast::cluster}{.cta}{.policy} [d], [t, c], [m]{, mask:b16}{, policy:b64}",
                "dim=2d; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy four rows of a tensor to shared memory",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.shared::cluster.global{.mode}.mbar{.multicast::cluster}\
                .cta{.policy} [d], [t, c], [m]{, mask:b16}{, policy:b64}",
                "mode=tile; cta=cta_group::1 cta_group::2",
                "8.6 sm_100a",
                "copy a box of a tensor to shared memory, signalling an mbarrier of the CTA pair",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.global.shared::cta{.tile}.bulk_group{.policy} [t, c], \
                [a]{, policy:b64}",
                "",
                "8.0 sm_90",
                "copy shared memory to a box of a tensor",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.global.shared::cta.im2col_no_offs.bulk_group{.policy} \
                [t, c], [a]{, policy:b64}",
                "dim=3d 4d 5d",
                "8.0 sm_90",
                "copy shared memory to columns of a convolution",
            ),
            row(
                CpAsyncBulkTensor,
                "cp.async.bulk.tensor.dim.global.shared::cta.tile::scatter4.bulk_group{.policy} \
                [t, c], [a]{, policy:b64}",
                "dim=2d",
                "8.6 sm_100a",
                "copy shared memory to four rows of a tensor",
            ),
            row(
                CpReduceAsyncBulkTensor,
                "cp.reduce.async.bulk.tensor.dim.global.shared::cta.op{.tile}.bulk_group{.policy} \
                [t, c], [a]{, policy:b64}",
                "op=add min max inc dec and or xor",
                "8.0 sm_90",
                "reduce shared memory into a box of a tensor",
            ),
            row(
                CpReduceAsyncBulkTensor,
                "cp.reduce.async.bulk.tensor.dim.global.shared::cta.op.im2col_no_offs.bulk_group{\
                .policy} [t, c], [a]{, policy:b64}",
                "dim=3d 4d 5d; op=add min max inc dec and or xor",
                "8.0 sm_90",
                "reduce shared memory into columns of a convolution",
            ),
            row(
                CpAsyncBulkPrefetchTensor,
                "cp.async.bulk.prefetch.tensor.dim.L2.global{.tile}{.policy} [t, c]{, policy:b64}",
                "",
                "8.0 sm_90",
                "fetch a box of a tensor into L2",
            ),
            row(
                CpAsyncBulkPrefetchTensor,
                "cp.async.bulk.prefetch.tensor.dim.L2.global.im2col{.policy} [t, c], \
                offsets:u16*n{, policy:b64}",
                "dim=3d 4d 5d",
                "8.0 sm_90",
                "fetch columns of a convolution into L2",
            ),
            row(
                CpAsyncBulkPrefetchTensor,
                "cp.async.bulk.prefetch.tensor.dim.L2.global.mode{.policy} [t, c], \
                offsets:u16*n{, policy:b64}",
                "dim=3d 4d 5d; mode=im2col::w im2col::w::128",
                "8.6 sm_100a",
                "fetch columns of a convolution into L2",
            ),
            row(
                CpAsyncBulkPrefetchTensor,
                "cp.async.bulk.prefetch.tensor.dim.L2.global.tile::gather4{.policy} [t, c]{, \
                policy:b64}",
                "dim=2d",
                "8.6 sm_100a",
                "fetch four rows of a tensor into L2",
            ),
            row(
                CpAsyncBulkCommitGroup,
                "cp.async.bulk.commit_group",
                "",
                "8.0 sm_90",
                "the thread's bulk copies of bulk_group kind since the last commit become a group",
            ),
            row(
                CpAsyncBulkWaitGroup,
                "cp.async.bulk.wait_group{.read} #n:u32",
                "",
                "8.0 sm_90",
                "wait until at most n of the latest groups are pending; read: only their reads of \
                shared memory",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b64 [a], new:t0",
                "field=global_address; sp=global shared::cta",
                "8.3 sm_90a",
                "the global address of the tensor map at a = new",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b32 [a], new:t0",
                "field=rank; sp=global shared::cta",
                "8.3 sm_90a",
                "the rank, less one, of the tensor map at a = new",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b32 [a], #new:t0",
                "field=elemtype interleave_layout swizzle_mode fill_mode; sp=global shared::cta",
                "8.3 sm_90a",
                "a field of the tensor map at a = new",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b32 [a], #ord:b32, new:t0",
                "field=box_dim global_dim element_stride; sp=global shared::cta",
                "8.3 sm_90a",
                "entry ord of a field of the tensor map at a = new",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b64 [a], #ord:b32, new:t0",
                "field=global_stride; sp=global shared::cta",
                "8.3 sm_90a",
                "stride ord of the tensor map at a = new",
            ),
            row(
                TensormapReplace,
                "tensormap.replace.tile.field{.sp}.b1024.b32 [a], #new:t0",
                "field=swizzle_atomicity; sp=global shared::cta",
                "8.6 sm_100a",
                "the swizzle atomicity of the tensor map at a = new",
            ),
            row(
                TensormapCpFenceproxy,
                "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.scope.sync\
                .aligned [d], [a], #size:u32",
                "",
                "8.3 sm_90",
                "copy a tensor map to global memory and make it visible to the tensor-map proxy",
            ),
        ],
    },
];
