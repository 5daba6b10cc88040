"""Asks NVRTC and nvJitLink for machine code, as most programs do, and runs what they give."""
import numpy as np
from cuda.bindings import driver, nvjitlink, nvrtc

KERNEL = b"""
extern __device__ int f(int);
extern "C" __global__ void k(int* p) { p[threadIdx.x] = f(threadIdx.x); }
"""
FUNCTION = b"__device__ int f(int x) { return 7 * x + 1; }"


def ok(result):
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else result[1:]


def compiled(source, what, *options):
    """A source as `what`: CUBIN, PTX or LTOIR."""
    program = ok(nvrtc.nvrtcCreateProgram(source, b"k.cu", 0, [], []))
    options = [b"--gpu-architecture=sm_90", *options]
    ok(nvrtc.nvrtcCompileProgram(program, len(options), options))
    data = b" " * ok(getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    ok(getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data


def linked(inputs, *options):
    options = ["-arch=sm_90", *options]
    link = nvjitlink.create(len(options), options)
    for kind, data in inputs:
        nvjitlink.add_data(link, getattr(nvjitlink.InputType, kind), data, len(data), "part")
    nvjitlink.complete(link)
    cubin = bytearray(nvjitlink.get_linked_cubin_size(link))
    nvjitlink.get_linked_cubin(link, cubin)
    nvjitlink.destroy(link)
    return bytes(cubin)


def run(image):
    at = ok(driver.cuMemAlloc(4 * 32))
    function = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(image)), b"k"))
    address = np.array([int(at)], np.uint64)
    params = np.array([address.ctypes.data], np.uint64)
    ok(driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, 0, params.ctypes.data, 0))
    found = np.zeros(32, np.int32)
    ok(driver.cuMemcpyDtoH(found.ctypes.data, at, 4 * 32))
    return (found == 7 * np.arange(32) + 1).all()


ok(driver.cuInit(0))
ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(ok(driver.cuDeviceGet(0))))))
whole = FUNCTION + KERNEL.replace(b"extern __device__ int f(int);", b"")
print("NVRTC's cubin:", run(compiled(whole, "CUBIN")))
rdc, lto = b"--relocatable-device-code=true", b"-dlto"
parts = {kind: [compiled(s, kind, rdc) for s in (KERNEL, FUNCTION)] for kind in ("CUBIN", "PTX")}
parts["LTOIR"] = [compiled(s, "LTOIR", rdc, lto) for s in (KERNEL, FUNCTION)]
for first, second, *options in [
    ("CUBIN", "CUBIN"),
    ("PTX", "CUBIN"),
    ("LTOIR", "LTOIR", "-lto"),
    ("LTOIR", "PTX", "-lto"),
]:
    inputs = [(first, parts[first][0]), (second, parts[second][1])]
    print(f"nvJitLink's of {first} and {second}:", run(linked(inputs, *options)))
# What is wrong is still said by nvJitLink itself.
try:
    linked([("PTX", b".version 8.0\n.target sm_90\n.address_size 64\nnonsense\0")])
except nvjitlink.nvJitLinkError as error:
    print("nvJitLink's error:", str(error).split(" ")[0])
