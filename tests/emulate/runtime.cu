// What a program on the CUDA runtime does first: devices, memory, symbols, launches, printf,
// attributes, occupancy, streams and events. Every check prints its name where it fails.
#include <cstdio>
#include <cstring>
#include <vector>

__device__ int counter = 40;
__constant__ float factors[4];
__managed__ int shared_with_host = 5;

__global__ void add(const float *a, const float *b, float *c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    c[i] = a[i] + b[i];
}

__global__ void use_symbols(float *out) {
  extern __shared__ float room[];
  room[threadIdx.x] = factors[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = room[3 - threadIdx.x];
  if (threadIdx.x == 0) {
    atomicAdd(&counter, 2);
    shared_with_host += 10;
    printf("kernel of %d threads\n", blockDim.x);
  }
}

// Of a second kernel the variable is the same one.
__global__ void read_counter(int *out) { *out = counter; }

static int failures = 0;

static void check(bool holds, const char *what) {
  if (!holds) {
    failures++;
    printf("FAILED: %s (%s)\n", what, cudaGetErrorString(cudaPeekAtLastError()));
  }
}

static bool ok(cudaError_t error) { return error == cudaSuccess; }

int main() {
  cudaDeviceProp properties;
  check(ok(cudaGetDeviceProperties(&properties, 0)), "properties");
  check(strstr(properties.name, "(emulated)") != nullptr, "name of the device");
  check(properties.major == 9 && properties.warpSize == 32, "capability");

  const int n = 1000;
  std::vector<float> a(n), b(n), c(n);
  for (int i = 0; i < n; i++)
    a[i] = i, b[i] = 2 * i;
  float *da, *db, *dc;
  check(ok(cudaMalloc(&da, 4 * n)) && ok(cudaMalloc(&db, 4 * n)) && ok(cudaMalloc(&dc, 4 * n)), "malloc");
  cudaMemcpy(da, a.data(), 4 * n, cudaMemcpyHostToDevice);
  cudaMemcpy(db, b.data(), 4 * n, cudaMemcpyHostToDevice);
  add<<<(n + 127) / 128, 128>>>(da, db, dc, n);
  check(ok(cudaGetLastError()) && ok(cudaDeviceSynchronize()), "launch");
  cudaMemcpy(c.data(), dc, 4 * n, cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int i = 0; i < n; i++)
    wrong += c[i] != 3 * i;
  check(wrong == 0, "sums");

  float values[4] = {1, 2, 3, 4};
  check(ok(cudaMemcpyToSymbol(factors, values, sizeof values)), "copy to a symbol");
  use_symbols<<<1, 4, 16>>>(dc);
  int count = 0, *dcount;
  cudaMalloc(&dcount, 4);
  read_counter<<<1, 1>>>(dcount);
  cudaMemcpy(&count, dcount, 4, cudaMemcpyDeviceToHost);
  check(count == 42, "one variable of two kernels");
  check(ok(cudaMemcpyFromSymbol(&count, counter, 4)) && count == 42, "copy from a symbol");
  check(shared_with_host == 15, "managed variable");
  cudaMemcpy(values, dc, sizeof values, cudaMemcpyDeviceToHost);
  check(values[0] == 4 && values[3] == 1, "shared memory");

  cudaFuncAttributes attributes;
  check(ok(cudaFuncGetAttributes(&attributes, use_symbols)), "attributes");
  check(attributes.maxThreadsPerBlock == 1024 && attributes.constSizeBytes == 16, "their values");
  use_symbols<<<1, 4, 100 << 10>>>(dc);
  check(cudaGetLastError() == cudaErrorInvalidValue, "shared memory without opting in");
  check(ok(cudaFuncSetAttribute(use_symbols, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10)), "opting in");
  use_symbols<<<1, 4, 100 << 10>>>(dc);
  check(ok(cudaGetLastError()), "shared memory after opting in");
  int grid = 0, block = 0;
  check(ok(cudaOccupancyMaxPotentialBlockSize(&grid, &block, add)), "occupancy");
  check(block == 1024 && grid == 2 * properties.multiProcessorCount, "its values");

  cudaStream_t stream;
  cudaEvent_t begin, end;
  cudaStreamCreate(&stream);
  cudaEventCreate(&begin), cudaEventCreate(&end);
  cudaEventRecord(begin, stream);
  add<<<(n + 127) / 128, 128, 0, stream>>>(da, db, dc, n);
  cudaEventRecord(end, stream);
  float milliseconds = 0;
  check(ok(cudaEventSynchronize(end)) && ok(cudaEventElapsedTime(&milliseconds, begin, end)), "events");
  check(milliseconds > 0, "time");

  check(ok(cudaFree(da)) && ok(cudaDeviceReset()), "free and reset");
  printf("%d failures\n", failures);
  return failures != 0;
}
