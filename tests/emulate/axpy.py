"""Compiles a kernel with NVRTC, launches it through cuda-python, reads the result back."""
import ctypes

import numpy as np
from cuda.bindings import driver, nvrtc

SOURCE = b"""
extern "C" __global__ void axpy(float a, const float* x, const float* y, float* z, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) z[i] = a * x[i] + y[i];
}
"""


def ok(result):
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) == 2 else result[1:]


program = ok(nvrtc.nvrtcCreateProgram(SOURCE, b"axpy.cu", 0, [], []))
ok(nvrtc.nvrtcCompileProgram(program, 2, [b"--gpu-architecture=sm_90a", b"--fmad=false"]))
ptx = b" " * ok(nvrtc.nvrtcGetPTXSize(program))
ok(nvrtc.nvrtcGetPTX(program, ptx))

ok(driver.cuInit(0))
device = ok(driver.cuDeviceGet(0))
ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(device))))
function = ok(driver.cuModuleGetFunction(ok(driver.cuModuleLoadData(ptx)), b"axpy"))

n = 1000
rng = np.random.default_rng(0)
x, y = rng.random(n, dtype=np.float32), rng.random(n, dtype=np.float32)
z = np.zeros(n, np.float32)
dx, dy, dz = (ok(driver.cuMemAlloc(4 * n)) for _ in range(3))
ok(driver.cuMemcpyHtoD(dx, x.ctypes.data, 4 * n))
ok(driver.cuMemcpyHtoD(dy, y.ctypes.data, 4 * n))
stream = ok(driver.cuStreamCreate(0))
pointer = ctypes.c_void_p
values = (2.5, int(dx), int(dy), int(dz), n)
types = (ctypes.c_float, pointer, pointer, pointer, ctypes.c_int)
grid = (n + 255) // 256
ok(driver.cuLaunchKernel(function, grid, 1, 1, 256, 1, 1, 0, stream, (values, types), 0))
ok(driver.cuStreamSynchronize(stream))
ok(driver.cuMemcpyDtoH(z.ctypes.data, dz, 4 * n))
assert (z == np.float32(2.5) * x + y).all()
name = ok(driver.cuDeviceGetName(64, device)).split(b"\0")[0].decode()
print(f"{name}: equal")
