// Instruction rates of a multiprocessor: each kernel repeats one instruction on independent registers and notes the
// clocks that its block took. One block a multiprocessor; `n` turns of the loop; `sink` keeps the results alive.

#define BEGIN                        \
    __syncthreads();                 \
    long long began = clock64();
#define END(value)                                                            \
    __syncthreads();                                                          \
    long long ended = clock64();                                              \
    if (threadIdx.x == 0) clocks[blockIdx.x] = ended - began;                 \
    if ((value) == 12345.678f) sink[blockIdx.x] = (value);

// 8 a turn.
extern "C" __global__ void ffma(float* sink, long long* clocks, int n) {
    float a[8], b = 1.0f + 1e-7f * threadIdx.x, c = 1e-9f;
    for (int i = 0; i < 8; i++) a[i] = i + threadIdx.x;
    BEGIN
    for (int k = 0; k < n; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(a[i]) : "f"(b), "f"(c));
    END(a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7])
}

extern "C" __global__ void mufu_ex2(float* sink, long long* clocks, int n) {
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = 1e-3f * (i + threadIdx.x);
    BEGIN
    for (int k = 0; k < n; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(a[i]));
    END(a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7])
}

extern "C" __global__ void ldmatrix_x4(float* sink, long long* clocks, int n) {
    __shared__ __align__(128) unsigned data[2048];
    for (int i = threadIdx.x; i < 2048; i += blockDim.x) data[i] = i;
    unsigned at = (unsigned)__cvta_generic_to_shared(data) + (threadIdx.x & 31) * 16, r[4], sum = 0;
    BEGIN
    for (int k = 0; k < n; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                         : "r"(at + 512 * i));
            sum += r[0];
        }
    END(__uint_as_float(sum))
}

extern "C" __global__ void mma_f16_m16n8k16(float* sink, long long* clocks, int n) {
    float d[8][4] = {};
    unsigned a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5};
    BEGIN
    for (int k = 0; k < n; k++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    float s = 0;
    for (int i = 0; i < 8; i++) s += d[i][0] + d[i][3];
    END(s)
}

extern "C" __global__ void mma_tf32_m16n8k8(float* sink, long long* clocks, int n) {
    float d[8][4] = {};
    unsigned a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {4, 5};
    BEGIN
    for (int k = 0; k < n; k++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile(
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    float s = 0;
    for (int i = 0; i < 8; i++) s += d[i][0] + d[i][3];
    END(s)
}

// Warpgroup products. The descriptors have no swizzle; what the shared memory holds does not matter.
__device__ inline unsigned long long descriptor(const void* p) {
    unsigned long long at = (unsigned)__cvta_generic_to_shared(p);
    return ((at & 0x3FFFF) >> 4) | (8ull << 16) | (16ull << 32);
}
#define FENCE asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#define WAIT asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#define D8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])

extern "C" __global__ void wgmma_f16_m64n16k16_ss(float* sink, long long* clocks, int n) {
    __shared__ __align__(1024) unsigned data[4096];
    for (int i = threadIdx.x; i < 4096; i += blockDim.x) data[i] = 0;
    float d[8] = {};
    unsigned long long a = descriptor(data), b = descriptor(data + 2048);
    BEGIN
    for (int k = 0; k < n; k++) {
        FENCE
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, "
                         "1, 1, 1, 0, 0;"
                         : D8(d)
                         : "l"(a), "l"(b));
        WAIT
    }
    END(d[0] + d[7])
}

extern "C" __global__ void wgmma_tf32_m64n16k8_rs(float* sink, long long* clocks, int n) {
    __shared__ __align__(1024) unsigned data[4096];
    for (int i = threadIdx.x; i < 4096; i += blockDim.x) data[i] = 0;
    float d[8] = {};
    unsigned r[4] = {threadIdx.x, 1, 2, 3};
    unsigned long long b = descriptor(data);
    BEGIN
    for (int k = 0; k < n; k++) {
        FENCE
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%0, %1, %2, %3, %4, %5, %6, %7}, "
                         "{%8, %9, %10, %11}, %12, 1, 1, 1;"
                         : D8(d)
                         : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(b));
        WAIT
    }
    END(d[0] + d[7])
}

extern "C" __global__ void wgmma_f16_m64n48k16_ss(float* sink, long long* clocks, int n) {
    __shared__ __align__(1024) unsigned data[4096];
    for (int i = threadIdx.x; i < 4096; i += blockDim.x) data[i] = 0;
    float d[8] = {}, e[8] = {}, f[8] = {};
    unsigned long long a = descriptor(data), b = descriptor(data + 2048);
    BEGIN
    for (int k = 0; k < n; k++) {
        FENCE
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
                         "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}, %24, %25, 1, 1, 1, 0, 0;"
                         : D8(d), D8(e), D8(f)
                         : "l"(a), "l"(b));
        WAIT
    }
    END(d[0] + e[1] + f[7])
}
