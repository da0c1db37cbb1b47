// A CUDA driver that launches nothing and prints what it was asked to, so that launches are tested without a GPU.
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUresult fail(const char* name) {  // FAKE_FAIL="cuLaunchKernelEx 720" makes that call return 720
    const char* wish = getenv("FAKE_FAIL");
    size_t n = strlen(name);
    return wish && !strncmp(wish, name, n) && wish[n] == ' ' ? (CUresult)atoi(wish + n) : CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) {
    return fail("cuInit");
}
CUresult cuDriverGetVersion(int* version) {
    return *version = CUDA_VERSION, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult e, const char** s) {
    return *s = "as the fake driver was told", CUDA_SUCCESS;
}
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jo, void** jv, unsigned nj,
                           CUlibraryOption* lo, void** lv, unsigned nl) {
    printf("load %.3s\n", (const char*)code + 1);
    *library = (CUlibrary)0x11;
    return fail("cuLibraryLoadData");
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    printf("kernel %s\n", name);
    *kernel = (CUkernel)0x22;
    return fail("cuLibraryGetKernel");
}
CUresult cuKernelSetAttribute(CUfunction_attribute a, int value, CUkernel kernel, CUdevice device) {
    printf("attribute %d=%d device %d\n", a, value, device);
    return fail("cuKernelSetAttribute");
}
static _Thread_local CUcontext current;
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = (CUcontext)(0x1000l + device);
    return fail("cuDevicePrimaryCtxRetain");
}
CUresult cuCtxSetCurrent(CUcontext context) {
    printf("context %p\n", (void*)context);
    current = context;
    return fail("cuCtxSetCurrent");
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    int n;  // SaxpyArgs.n
    memcpy(&n, (char*)params[0] + 16, 4);
    printf("launch %p grid %u %u %u block %u %u %u smem %u stream %p n %d\n", (void*)f, c->gridDimX, c->gridDimY,
           c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, (void*)c->hStream, n);
    for (unsigned i = 0; i < c->numAttrs; ++i) {
        const CUlaunchAttribute* a = &c->attrs[i];
        if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            printf("cluster %u %u %u\n", a->value.clusterDim.x, a->value.clusterDim.y, a->value.clusterDim.z);
        if (a->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) printf("cooperative %d\n", a->value.cooperative);
        if (a->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            printf("pdl %d\n", a->value.programmaticStreamSerializationAllowed);
    }
    return fail("cuLaunchKernelEx");
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    if ((unsigned long)map % 64) return CUDA_ERROR_INVALID_VALUE;
    printf("map type %d at %p", type, address);
    for (unsigned i = 0; i < rank; ++i) printf(" dim %lu box %u step %u", dims[i], box[i], steps[i]);
    for (unsigned i = 0; i + 1 < rank; ++i) printf(" stride %lu", strides[i]);
    printf(" interleave %d swizzle %d promotion %d fill %d\n", interleave, swizzle, promotion, fill);
    for (int i = 0; i < 16; ++i) map->opaque[i] = 100 + i;
    return fail("cuTensorMapEncodeTiled");
}
CUresult cuGetProcAddress_v2(const char* name, void** f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* found) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (found) *found = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}
