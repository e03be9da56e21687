/* A small libcuda.so.1: two GPUs, in another order than NVML's, whose one kernel draws power for as long as it is told.
 *
 * FAKE_NVML_POWER  the file of lines `GPU T_NS MILLIWATTS` that fake_nvml.c reads; a launch appends BUSY_MW and, for
 *                  its end, REST_MW
 * FAKE_CUDA_MODE   "none": no GPU; "broken": the driver does not start; "old": PTX is refused; "fails": the kernel does
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_PTX = 218,
       NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { COUNT = 2, MULTIPROCESSORS = 132, BUSY_MW = 600000, REST_MW = 100000, BLOCKING_SYNC = 4 };

static int current = -1, retained = -1, loaded; /* the device of the context in use; whether the kernel is there */
static int64_t end_ns;

static int mode(const char *name) {
    const char *set = getenv("FAKE_CUDA_MODE");
    return set && strcmp(set, name) == 0;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int cuInit(unsigned flags) { return mode("broken") ? NOT_INITIALIZED : mode("none") ? NO_DEVICE : SUCCESS; }
int cuDeviceGetCount(int *count) { *count = COUNT; return SUCCESS; }

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal + 10; /* a handle is no index */
    return ordinal < COUNT ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, 0, 16);
    uuid[0] = 0xab;
    uuid[15] = COUNT - 1 - (device - 10); /* the NVML index */
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = MULTIPROCESSORS;
    return attribute == 16 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) { return flags == BLOCKING_SYNC ? SUCCESS : INVALID_VALUE; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
    retained = device;
    *context = &retained;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    if (device != retained) return INVALID_CONTEXT;
    retained = current = -1;
    loaded = 0;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) { current = context ? retained : -1; return SUCCESS; }

int cuModuleLoadData(void **module, const char *ptx) {
    if (current < 0) return INVALID_CONTEXT;
    if (mode("old") || !strstr(ptx, ".visible .entry burn(.param .u64 ")) return INVALID_PTX;
    loaded = 1;
    *module = &loaded;
    return SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    if (module != &loaded || strcmp(name, "burn") != 0) return NOT_FOUND;
    *function = &end_ns;
    return SUCCESS;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    if (function != &end_ns || gx != 2 * MULTIPROCESSORS || gy * gz * by * bz != 1 || bx < 256) return INVALID_VALUE;
    if (current < 0 || !loaded) return INVALID_CONTEXT;
    FILE *file = fopen(getenv("FAKE_NVML_POWER"), "a");
    if (!file) abort();
    int64_t start_ns = now_ns(), gpu = COUNT - 1 - (current - 10);
    end_ns = start_ns + *(int64_t *)parameters[0];
    fprintf(file, "%lld %lld %d\n%lld %lld %d\n", (long long)gpu, (long long)start_ns, BUSY_MW, (long long)gpu,
            (long long)end_ns, REST_MW);
    fclose(file);
    return SUCCESS;
}

int cuStreamSynchronize(void *stream) {
    struct timespec end = {end_ns / 1000000000LL, end_ns % 1000000000LL};
    if (mode("fails")) return LAUNCH_FAILED;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL);
    return SUCCESS;
}

int cuGetErrorString(int code, const char **text) {
    switch (code) {
        case NOT_INITIALIZED: *text = "initialization error"; break;
        case NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
        case INVALID_PTX: *text = "a PTX JIT compilation failed"; break;
        case LAUNCH_FAILED: *text = "unspecified launch failure"; break;
        default: *text = NULL; return INVALID_VALUE;
    }
    return SUCCESS;
}
