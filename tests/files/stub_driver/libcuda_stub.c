/* A libcuda.so.1 for machines without a GPU: "device memory" is host memory, copies are memcpy, streams do nothing.
 *
 * It is just enough for KvikIO to run its compat mode, so that gpudcp's use of the real KvikIO is tested. It is not a
 * CUDA driver: cuInit says that there is no device, and nothing here can launch a kernel.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, ERROR_INVALID_VALUE = 1, ERROR_NO_DEVICE = 100, ERROR_NOT_SUPPORTED = 801 };
enum { POINTER_CONTEXT = 1, POINTER_MEMORY_TYPE = 2, POINTER_DEVICE_POINTER = 3, POINTER_HOST_POINTER = 4 };
enum { MEMORY_TYPE_DEVICE = 2 };

static int the_context, the_stream, the_event;

#define ANSWERS(name, answer) int name() { return answer; }

ANSWERS(cuInit, ERROR_NO_DEVICE)
ANSWERS(cuCtxCreate_v4, ERROR_NO_DEVICE)
ANSWERS(cuCtxDestroy_v2, SUCCESS)
ANSWERS(cuCtxPushCurrent_v2, SUCCESS)
ANSWERS(cuStreamSynchronize, SUCCESS)
ANSWERS(cuStreamDestroy_v2, SUCCESS)
ANSWERS(cuEventSynchronize, SUCCESS)
ANSWERS(cuEventDestroy_v2, SUCCESS)
ANSWERS(cuEventRecord, SUCCESS)
ANSWERS(cuEventQuery, SUCCESS)
ANSWERS(cuLaunchHostFunc, ERROR_NOT_SUPPORTED)
ANSWERS(cuMemHostRegister_v2, SUCCESS)
ANSWERS(cuMemHostUnregister, SUCCESS)
ANSWERS(cuDevicePrimaryCtxRelease_v2, SUCCESS)

int cuDriverGetVersion(int *version) { *version = 12000; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 0; return SUCCESS; }
int cuDeviceGetAttribute(int *value) { *value = 0; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context) { *context = &the_context; return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { *context = &the_context; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = &the_context; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuStreamCreate(void **stream) { *stream = &the_stream; return SUCCESS; }
int cuEventCreate(void **event) { *event = &the_event; return SUCCESS; }
int cuGetErrorName(int error, const char **name) { (void)error; *name = "STUB_ERROR"; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "an error of the stub"; return SUCCESS; }

int cuMemHostAlloc(void **memory, size_t nbytes)
{
    /* Page-aligned, as pinned memory is: KvikIO writes it with O_DIRECT. */
    *memory = aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096);
    return *memory ? SUCCESS : ERROR_INVALID_VALUE;
}
int cuMemFreeHost(void *memory) { free(memory); return SUCCESS; }
int cuMemGetAddressRange_v2(void **base, size_t *nbytes, void *memory)
{
    *base = memory;
    *nbytes = 1;
    return SUCCESS;
}
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t nbytes) { memcpy(to, from, nbytes); return SUCCESS; }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t nbytes) { memcpy(to, from, nbytes); return SUCCESS; }
int cuMemcpyAsync(void *to, const void *from, size_t nbytes) { memcpy(to, from, nbytes); return SUCCESS; }
int cuMemcpyBatchAsync_v2(void **to, void **from, size_t *nbytes, size_t count)
{
    for (size_t i = 0; i < count; ++i) memcpy(to[i], from[i], nbytes[i]);
    return SUCCESS;
}

int cuPointerGetAttribute(void *data, int attribute, void *pointer)
{
    switch (attribute) {
    case POINTER_CONTEXT: *(void **)data = &the_context; return SUCCESS;
    case POINTER_MEMORY_TYPE: *(unsigned *)data = MEMORY_TYPE_DEVICE; return SUCCESS;
    case POINTER_DEVICE_POINTER:
    case POINTER_HOST_POINTER: *(void **)data = pointer; return SUCCESS;
    default: return ERROR_INVALID_VALUE;
    }
}
int cuPointerGetAttributes(unsigned count, int *attributes, void **data, void *pointer)
{
    for (unsigned i = 0; i < count; ++i) {
        int answer = cuPointerGetAttribute(data[i], attributes[i], pointer);
        if (answer != SUCCESS) return answer;
    }
    return SUCCESS;
}
