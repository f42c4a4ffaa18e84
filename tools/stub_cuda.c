/* A libcuda.so.1 whose calls succeed and do nothing, so that Triton's launcher runs without a GPU. */
#include "cuda.h"
#undef cuCtxGetCurrent
#define DONE return CUDA_SUCCESS
static long launches;
long stub_launches(void) { return launches; }
CUresult cuInit(unsigned flags) { DONE; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; DONE; }
CUresult cuDeviceGetCount(int *count) { *count = 1; DONE; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; DONE; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; DONE; }
CUresult cuCtxSetCurrent(CUcontext context) { DONE; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; DONE; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; DONE; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { DONE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice d) { *context = (CUcontext)1; DONE; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 65536;
    }
    DONE;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    DONE;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { DONE; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { DONE; }
CUresult cuGetErrorString(CUresult result, const char **text) { *text = "stub"; DONE; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)2; DONE; }
CUresult cuModuleLoadData(CUmodule *module, const void *data) { *module = (CUmodule)1; DONE; }
CUresult cuModuleUnload(CUmodule module) { DONE; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    DONE;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; DONE; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; DONE; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
    ++launches;
    DONE;
}
