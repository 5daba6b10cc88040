// Many launches of a kernel that does next to nothing, in CPU time of the process and by the clock:
//   nvcc -arch=sm_90 -o launches launches.cu && fathom emulate -- ./launches 20000
#include <cstdio>
#include <cstdlib>
#include <ctime>

__global__ void count(int* p) {
    if (threadIdx.x == 0) p[0]++;
}

static double now(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char** argv) {
    int n = argc > 1 ? atoi(argv[1]) : 100000;
    int* p;
    cudaMalloc(&p, sizeof(int));
    cudaMemset(p, 0, sizeof(int));
    count<<<1, 32>>>(p);
    cudaDeviceSynchronize();
    double cpu = now(CLOCK_PROCESS_CPUTIME_ID), clock = now(CLOCK_MONOTONIC);
    for (int i = 0; i < n; i++) count<<<1, 32>>>(p);
    cudaDeviceSynchronize();
    cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    clock = now(CLOCK_MONOTONIC) - clock;
    int counted = 0;
    cudaMemcpy(&counted, p, sizeof(int), cudaMemcpyDeviceToHost);
    printf("%d launches: %.2f us of CPU, %.2f us by the clock each\n", n, 1e6 * cpu / n, 1e6 * clock / n);
    return counted == n + 1 ? 0 : 1;
}
