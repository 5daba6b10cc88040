// A kernel that leaves its memory, and what the host sees after it: exits with the error's number.
__global__ void write(int *at) { *at = 1; }

int main() {
  write<<<1, 1>>>(reinterpret_cast<int *>(16));
  return cudaDeviceSynchronize() == cudaErrorIllegalAddress ? 7 : 0;
}
