"""Runs NVIDIA's libraries and those that stand on them, as PyPI has them, on the emulated driver.

    pip install numpy nvidia-cuda-runtime nvidia-cublas nvidia-nccl-cu13 cupy-cuda13x[ctk] warp-lang
    python tests/emulate/libraries.py [cublas] [cublaslt] [nccl] [processes] [cupy] [warp] [--check LIST]

FATHOM names the program (default: fathom). The exit code is 1 where a result is wrong or a part did not
come to its end. Inputs are small whole numbers, so that every order of
additions gives the same result, which NumPy says. docs/emulator.md has what was found so.
"""
import ctypes
import os
import pathlib
import subprocess
import sys

# By part: the options of `fathom emulate` that it needs. A library that chooses between machine code
# and PTX by itself hands over PTX to a GPU that is newer than it.
PARTS = {
    "cublas": ["--gpu", "next"],
    "cublaslt": ["--gpu", "next"],
    "nccl": ["--gpu", "rtx-pro-6000", "--devices", "4"],
    "processes": ["--gpu", "rtx-pro-6000", "--devices", "2"],
    "cupy": ["--gpu", "rtx-pro-6000"],
    "warp": ["--gpu", "rtx-pro-6000"],
}


wrong = []


def told(name, right):
    """Prints an outcome; none: the library refused."""
    if right is not None and not right:
        wrong.append(name)
    print(f"{name:34} {'refused' if right is None else 'right' if right else 'WRONG'}", flush=True)


def library(name):
    """A library of one of NVIDIA's packages."""
    import nvidia
    found = sorted(p for root in nvidia.__path__ for p in pathlib.Path(root).rglob(name))
    return ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)


class Runtime:
    """The few calls of the CUDA runtime that are needed."""

    def __init__(self):
        self.calls = library("libcudart.so.1[0-9]")

    def check(self, result):
        if result:
            raise RuntimeError(f"the CUDA runtime says {result}")

    def device(self, index):
        self.check(self.calls.cudaSetDevice(index))

    def stream(self):
        stream = ctypes.c_void_p()
        self.check(self.calls.cudaStreamCreate(ctypes.byref(stream)))
        return stream

    def room(self, size):
        address = ctypes.c_void_p()
        self.check(self.calls.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)))
        return address

    def copy(self, to, source, size, direction):
        self.check(self.calls.cudaMemcpy(to, source, ctypes.c_size_t(size), direction))

    def upload(self, array):
        address = self.room(array.nbytes)
        self.copy(address, array.ctypes.data_as(ctypes.c_void_p), array.nbytes, 1)
        return address

    def download(self, address, array):
        self.copy(array.ctypes.data_as(ctypes.c_void_p), address, array.nbytes, 2)
        return array


def cublas():
    import numpy as np
    runtime = Runtime()
    library("libcublasLt.so.1[0-9]")
    blas = library("libcublas.so.1[0-9]")
    handle = ctypes.c_void_p()
    if blas.cublasCreate_v2(ctypes.byref(handle)):
        raise RuntimeError("cublasCreate failed")
    random = np.random.default_rng(0)
    scalar = lambda value, dtype: np.array([value], dtype).ctypes.data_as(ctypes.c_void_p)
    upper = lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    plain = {"sgemm": ("cublasSgemm_v2", np.float32), "dgemm": ("cublasDgemm_v2", np.float64),
             "hgemm": ("cublasHgemm", np.float16)}
    # cudaDataType of the operands, and how they are made.
    mixed = {"bf16 into f32": (14, upper), "f16 into f32": (2, lambda x: x.astype(np.float16))}
    for m, n, k in [(128, 96, 64), (256, 256, 128), (70, 33, 17)]:
        # Column-major, so that NumPy sees the transposes.
        a, b = (random.integers(-4, 5, s).astype(np.float64) for s in [(k, m), (n, k)])
        expected = b @ a
        for name, (call, dtype) in plain.items():
            c = runtime.upload(np.zeros((n, m), dtype))
            failed = getattr(blas, call)(
                handle, 0, 0, m, n, k, scalar(1, dtype), runtime.upload(a.astype(dtype)), m,
                runtime.upload(b.astype(dtype)), k, scalar(0, dtype), c, m)
            out = runtime.download(c, np.zeros((n, m), dtype))
            told(f"cublas {name} {m}x{n}x{k}", None if failed else (out == expected).all())
        for name, (kind, make) in mixed.items():
            c = runtime.upload(np.zeros((n, m), np.float32))
            failed = blas.cublasGemmEx(
                handle, 0, 0, m, n, k, scalar(1, np.float32), runtime.upload(make(a)), kind, m,
                runtime.upload(make(b)), kind, k, scalar(0, np.float32), c, 0, m, 68, -1)
            out = runtime.download(c, np.zeros((n, m), np.float32))
            told(f"cublas {name} {m}x{n}x{k}", None if failed else (out == expected).all())


# E4M3's codes of the whole numbers from -4 to 4.
E4M3 = {-4: 0xC8, -3: 0xC4, -2: 0xC0, -1: 0xB8, 0: 0x00, 1: 0x38, 2: 0x40, 3: 0x44, 4: 0x48}


def cublaslt():
    """Products of FP8, and of BF16 beside them; A transposed, as FP8 has to be."""
    import numpy as np
    runtime, lt = Runtime(), library("libcublasLt.so.1[0-9]")

    def check(result):
        if result:
            raise RuntimeError(f"cuBLASLt says {result}")

    handle, u64, i64 = ctypes.c_void_p(), ctypes.c_uint64, ctypes.c_int64
    check(lt.cublasLtCreate(ctypes.byref(handle)))

    def attribute(call, of, name, value):
        check(call(of, name, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))))

    def layout(kind, rows, columns):
        made = ctypes.c_void_p()
        check(lt.cublasLtMatrixLayoutCreate(ctypes.byref(made), kind, u64(rows), u64(columns), i64(rows)))
        return made

    random, one, zero = np.random.default_rng(0), ctypes.c_float(1), ctypes.c_float(0)
    f32, bf16 = 0, 14
    upper = lambda x: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    # cudaDataType of the operands, how they are made, that of the result and its bytes.
    operands = {"e4m3": (28, lambda x: np.vectorize(E4M3.get)(x).astype(np.uint8)), "bf16": (bf16, upper)}
    results = {"bf16": (bf16, 2), "f32": (f32, 4)}
    kinds = [(f"{a} into {c}", *operands[a], *results[c]) for a in operands for c in results]
    for m, n, k in [(64, 48, 128), (256, 128, 256)]:
        a, b = (random.integers(-4, 5, s) for s in [(m, k), (n, k)])
        expected = (b @ a.T).astype(np.float32)
        for name, operand, make, kind, width in kinds:
            device = [runtime.upload(make(x)) for x in (a, b)]
            job, preference, found = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
            # CUBLAS_COMPUTE_32F, CUBLASLT_MATMUL_DESC_TRANSA, and the most workspace.
            check(lt.cublasLtMatmulDescCreate(ctypes.byref(job), 68, f32))
            attribute(lt.cublasLtMatmulDescSetAttribute, job, 3, ctypes.c_int32(1))
            check(lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
            space = runtime.room(1 << 25)
            attribute(lt.cublasLtMatmulPreferenceSetAttribute, preference, 1, u64(1 << 25))
            la, lb, lc = layout(operand, k, m), layout(operand, k, n), layout(kind, m, n)
            c = runtime.upload(np.zeros((n, m * width), np.uint8))
            # cublasLtMatmulHeuristicResult_t: the algorithm is its beginning.
            algorithm = (ctypes.c_uint64 * 32)()
            failed = lt.cublasLtMatmulAlgoGetHeuristic(
                handle, job, la, lb, lc, lc, preference, 1, algorithm, ctypes.byref(found))
            if not failed:
                failed = lt.cublasLtMatmul(
                    handle, job, ctypes.byref(one), device[0], la, device[1], lb, ctypes.byref(zero), c, lc,
                    c, lc, algorithm, space, ctypes.c_size_t(1 << 25), None)
            if failed:
                print(f"    status {failed}, {found.value} algorithms")
            out = runtime.download(c, np.zeros((n, m), np.uint16 if width == 2 else np.float32))
            bits = expected.view(np.uint32)
            wanted = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if width == 2 else expected
            told(f"cublaslt {name} {m}x{n}x{k}",
                 None if failed else (out == wanted).all())


class Nccl:
    """NCCL, with errors as exceptions."""

    def __init__(self):
        self.calls = library("libnccl.so.2")
        self.calls.ncclGetErrorString.restype = ctypes.c_char_p

    def check(self, result):
        if result:
            raise RuntimeError(f"NCCL says {self.calls.ncclGetErrorString(result).decode()}")


class UniqueId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


def rank(index, ranks, file):
    """A process with one device of several: joins by the id in a file, and adds up."""
    import numpy as np
    runtime, nccl = Runtime(), Nccl()
    runtime.device(index)
    unique = UniqueId()
    ctypes.memmove(ctypes.byref(unique), pathlib.Path(file).read_bytes(), 128)
    comm, stream, count = ctypes.c_void_p(), runtime.stream(), 1000
    nccl.check(nccl.calls.ncclCommInitRank(ctypes.byref(comm), ranks, unique, index))
    own = np.arange(count, dtype=np.float32) * (index + 1)
    send, receive = runtime.upload(own), runtime.room(4 * count)
    nccl.check(nccl.calls.ncclAllReduce(send, receive, ctypes.c_size_t(count), 7, 0, comm, stream))
    runtime.check(runtime.calls.cudaStreamSynchronize(stream))
    out = runtime.download(receive, np.zeros(count, np.float32))
    told(f"nccl all-reduce, process {index} of {ranks}",
         (out == np.arange(count) * sum(range(1, ranks + 1))).all())


def processes():
    import tempfile
    ranks, nccl, unique = 2, Nccl(), UniqueId()
    nccl.check(nccl.calls.ncclGetUniqueId(ctypes.byref(unique)))
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(unique))
        file.flush()
        others = [subprocess.Popen([sys.executable, __file__, "--rank", str(r), str(ranks), file.name])
                  for r in range(ranks)]
        if any([other.wait() for other in others]):
            wrong.append("processes")


def nccl():
    import numpy as np
    runtime, opened = Runtime(), Nccl()
    calls, check = opened.calls, opened.check
    random, f32, number = np.random.default_rng(0), 7, ctypes.c_size_t
    for ranks in [2, 4]:
        communicators = (ctypes.c_void_p * ranks)()
        check(calls.ncclCommInitAll(communicators, ranks, (ctypes.c_int * ranks)(*range(ranks))))
        comms = [ctypes.c_void_p(c) for c in communicators]
        for count in [64, 5000]:
            own = [random.integers(-8, 9, count).astype(np.float32) for _ in range(ranks)]
            part, whole = count // ranks, sum(own)
            send, receive, streams = [], [], []
            for rank in range(ranks):
                runtime.device(rank)
                send.append(runtime.upload(own[rank]))
                receive.append(runtime.room(4 * count * ranks))
                streams.append(runtime.stream())

            def run(name, call, expected):
                check(calls.ncclGroupStart())
                for r in range(ranks):
                    check(call(r, send[r], receive[r], comms[r], streams[r]))
                check(calls.ncclGroupEnd())
                right = True
                for r in range(ranks):
                    runtime.device(r)
                    runtime.check(runtime.calls.cudaStreamSynchronize(streams[r]))
                    wanted = expected(r)
                    out = runtime.download(receive[r], np.zeros_like(wanted))
                    right = right and (out == wanted).all()
                told(f"nccl {name}, {ranks} devices, {count}", right)

            def exchange(r, s, d, c, q):
                failed = calls.ncclSend(s, number(count), f32, (r + 1) % ranks, c, q)
                return failed or calls.ncclRecv(d, number(count), f32, (r - 1) % ranks, c, q)

            run("all-reduce", lambda r, s, d, c, q: calls.ncclAllReduce(s, d, number(count), f32, 0, c, q),
                lambda r: whole)
            run("all-reduce max", lambda r, s, d, c, q: calls.ncclAllReduce(s, d, number(count), f32, 2, c, q),
                lambda r: np.maximum.reduce(own))
            run("reduce", lambda r, s, d, c, q: calls.ncclReduce(s, receive[r], number(count), f32, 0, 0, c, q),
                lambda r: whole if r == 0 else np.zeros(0, np.float32))
            run("broadcast", lambda r, s, d, c, q: calls.ncclBroadcast(s, d, number(count), f32, 1, c, q),
                lambda r: own[1])
            run("all-gather", lambda r, s, d, c, q: calls.ncclAllGather(s, d, number(count), f32, c, q),
                lambda r: np.concatenate(own))
            run("reduce-scatter", lambda r, s, d, c, q: calls.ncclReduceScatter(s, d, number(part), f32, 0, c, q),
                lambda r: whole[r * part:(r + 1) * part])
            run("send and receive", exchange, lambda r: own[(r - 1) % ranks])


def cupy():
    import cupy as cp
    import numpy as np
    x, y = cp.arange(1000, dtype=cp.float32), np.arange(1000, dtype=np.float32)
    raw = cp.RawKernel('extern "C" __global__ void k(const float* a, float* b, int n) {'
                       "int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) b[i] = a[i] + 1; }", "k")
    out = cp.zeros_like(x)
    raw((4,), (256,), (x, out, 1000))
    norm = cp.ReductionKernel("T x", "T y", "x * x", "a + b", "y = a", "0", "squares")
    same = lambda a, b: np.array_equal(cp.asnumpy(a), b)
    told("cupy arithmetic", same(x * 2 + 1, y * 2 + 1))
    told("cupy sum, max, mean", (float(x.sum()), float(x.max()), float(x.mean())) == (499500, 999, 499.5))
    told("cupy raw kernel", same(out, y + 1))
    told("cupy reduction kernel", float(norm(x[:100])) == float((y[:100] ** 2).sum()))
    told("cupy sort, argsort", same(cp.sort(x[::-1]), y) and same(cp.argsort(-x), np.arange(1000)[::-1]))
    told("cupy cumsum", same(cp.cumsum(x), np.cumsum(y)))
    told("cupy unique, nonzero", same(cp.unique(x % 7), np.arange(7)) and same(cp.nonzero(x > 990)[0], np.arange(991, 1000)))


def warp():
    import numpy as np
    import warp as wp

    @wp.kernel
    def axpy(a: float, x: wp.array(dtype=float), y: wp.array(dtype=float)):
        y[wp.tid()] = a * x[wp.tid()] + y[wp.tid()]

    @wp.kernel
    def total(x: wp.array(dtype=float), out: wp.array(dtype=float)):
        wp.atomic_add(out, 0, x[wp.tid()])

    numbers = np.arange(1000, dtype=np.float32)
    array = lambda values: wp.array(values, dtype=float, device="cuda:0")
    x, y, out = array(numbers), array(np.ones_like(numbers)), array(np.zeros(1, np.float32))
    wp.launch(axpy, dim=1000, inputs=[2.0, x, y], device="cuda:0")
    wp.launch(total, dim=1000, inputs=[x, out], device="cuda:0")
    told("warp user kernel", np.array_equal(y.numpy(), 2 * numbers + 1))
    told("warp atomics", out.numpy()[0] == 499500)
    told("warp array_sum", wp.utils.array_sum(x) == 499500)


def main(*parts):
    if parts[:1] == ("--inside",):
        globals()[parts[1]]()
        return len(wrong) > 0
    if parts[:1] == ("--rank",):
        rank(int(parts[1]), int(parts[2]), parts[3])
        return len(wrong) > 0
    failed, checks = False, []
    if "--check" in parts:
        at = parts.index("--check")
        checks, parts = list(parts[at:at + 2]), parts[:at] + parts[at + 2:]
    for part in parts or PARTS:
        command = [os.environ.get("FATHOM", "fathom"), "emulate", *PARTS[part], *checks, "--"]
        failed |= subprocess.run([*command, sys.executable, __file__, "--inside", part]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
