"""Loads a module of many kernels, in CPU time: fathom emulate -- python large_module.py [MEGABYTES]

Wants cuda-bindings. Kernels are lowered when they are first asked for: one is, and its time told.
"""
import sys
import time

from cuda.bindings import driver

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 50
HEAD = ".version 8.5\n.target sm_90\n.address_size 64\n"


def kernel(number):
    body = "".join(
        f"mad.lo.s32 %r{j % 60 + 1}, %r{(j + 7) % 60 + 1}, {j}, %r{(j + 13) % 60 + 1};\n"
        f"ld.global.v4.f32 {{%f{j % 40 + 1}, %f{(j + 1) % 40 + 1}, %f{(j + 2) % 40 + 1}, "
        f"%f{(j + 3) % 40 + 1}}}, [%rd1+{16 * j}];\n"
        f"fma.rn.f32 %f{j % 40 + 1}, %f{(j + 3) % 40 + 1}, %f{(j + 9) % 40 + 1}, %f{j % 40 + 1};\n"
        f"@%p1 bra $L{j};\n$L{j}:\n"
        for j in range(60)
    )
    return (
        f".visible .entry k{number}(.param .u64 p)\n{{\n.reg .b32 %r<64>;\n.reg .f32 %f<44>;\n"
        f".reg .b64 %rd<4>;\n.reg .pred %p<4>;\nld.param.u64 %rd1, [p];\n"
        f"setp.eq.u64 %p1, %rd1, 0;\n{body}st.global.f32 [%rd1], %f3;\nret;\n}}\n"
    )


def ok(result):
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) > 1 else None


kernels, size = [], 0
while size < megabytes * 1e6:
    kernels.append(kernel(len(kernels)))
    size += len(kernels[-1])
text = (HEAD + "".join(kernels)).encode() + b"\0"
ok(driver.cuInit(0))
ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(0))))
begin = time.process_time()
module = ok(driver.cuModuleLoadData(text))
loaded = time.process_time()
function = ok(driver.cuModuleGetFunction(module, b"k7"))
ok(driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function))
print(f"{len(text) / 1e6:.1f} MB, {len(kernels)} kernels: loaded in {loaded - begin:.2f} s of CPU, "
      f"one lowered in {time.process_time() - loaded:.4f} s")
