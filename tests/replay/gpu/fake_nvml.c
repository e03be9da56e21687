/* A small libnvidia-ml.so.1: two GPUs whose power sensors update every 100 ms and whose counters agree with them.
 *
 * FAKE_NVML_LOG   file that every change of a clock is appended to; the last line of a GPU is its state
 * FAKE_NVML_MODE  "none": no GPU; "broken": the driver does not start; "denied": clocks may not be changed;
 *                 "denied1": not those of GPU 1; "bare": GPU without most sensors; "old": no power fields; "lost": GPU
 *                 fell off the bus
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { COUNT = 2, FIRST_MHZ = 210, LAST_MHZ = 1980, STEP_MHZ = 15, MEMORY_MHZ = 2619 };

typedef struct { unsigned index; } *device_t;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency_us;
    uint32_t type, status;
    union { double d; uint32_t u; uint64_t ull; } value;
} field_t;

static struct { unsigned index; } devices[COUNT] = {{0}, {1}};

static int mode(const char *name) {
    const char *set = getenv("FAKE_NVML_MODE");
    return set && strcmp(set, name) == 0;
}

static uint64_t update(void) { /* 100 ms updates since boot */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 10 + now.tv_nsec / 100000000;
}

static uint32_t base_mw(device_t d) { return 100000 + 50000 * d->index; }

static unsigned locked_mhz(device_t d) { /* 0: not locked */
    unsigned gpu, mhz, found = 0;
    const char *path = getenv("FAKE_NVML_LOG");
    FILE *log = path ? fopen(path, "r") : NULL;
    while (log && fscanf(log, "%u %u\n", &gpu, &mhz) == 2)
        if (gpu == d->index) found = mhz;
    if (log) fclose(log);
    return found;
}

static int change(device_t d, unsigned mhz) {
    if (mode("denied") || (mode("denied1") && d->index == 1)) return NO_PERMISSION;
    FILE *log = fopen(getenv("FAKE_NVML_LOG"), "a");
    fprintf(log, "%u %u\n", d->index, mhz);
    fclose(log);
    return SUCCESS;
}

static int sensor(void) { return mode("bare") ? NOT_SUPPORTED : mode("lost") ? GPU_IS_LOST : SUCCESS; }

int nvmlInitWithFlags(unsigned flags) { return mode("broken") ? DRIVER_NOT_LOADED : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = mode("none") ? 0 : COUNT; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    if (index >= COUNT) return INVALID_ARGUMENT;
    *device = (device_t)&devices[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(device_t d, char *text, unsigned size) {
    snprintf(text, size, "GPU-fake-%u", d->index);
    return SUCCESS;
}

int nvmlDeviceGetName(device_t d, char *text, unsigned size) {
    snprintf(text, size, mode("bare") ? "NVIDIA Nothing" : "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}

int nvmlDeviceGetFieldValues(device_t d, int count, field_t *fields) {
    for (int i = 0; i < count; i++) {
        fields[i].status = mode("old") ? NOT_SUPPORTED : sensor();
        if (fields[i].field == 186) fields[i].value.u = base_mw(d) + 1000 * (update() % 7);
        else if (fields[i].field == 185) fields[i].value.u = base_mw(d) + 3000;
        else fields[i].status = INVALID_ARGUMENT;
    }
    return mode("lost") ? GPU_IS_LOST : SUCCESS;
}

int nvmlDeviceGetPowerUsage(device_t d, unsigned *mw) { *mw = base_mw(d) + 3000; return sensor(); }

int nvmlDeviceGetTotalEnergyConsumption(device_t d, uint64_t *mj) {
    uint64_t n = update(), rest = n % 7;
    *mj = (n * base_mw(d) + 1000 * (n / 7 * 21 + rest * (rest - 1) / 2)) / 10;
    return sensor();
}

int nvmlDeviceGetClockInfo(device_t d, unsigned type, unsigned *mhz) {
    unsigned locked = locked_mhz(d);
    *mhz = type == 2 ? MEMORY_MHZ : locked ? locked : LAST_MHZ;
    return sensor();
}

int nvmlDeviceGetTemperature(device_t d, unsigned kind, unsigned *celsius) { *celsius = 40 + d->index; return sensor(); }
int nvmlDeviceGetUtilizationRates(device_t d, unsigned *rates) { rates[0] = 55; rates[1] = 11; return sensor(); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t d, unsigned long long *bits) { *bits = 2; return sensor(); }

static int list(unsigned first, unsigned last, unsigned *count, unsigned *clocks) {
    unsigned have = (last - first) / STEP_MHZ + 1, room = *count;
    *count = have;
    if (!clocks || room < have) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < have; i++) clocks[i] = last - i * STEP_MHZ; /* descending, as the driver lists them */
    return SUCCESS;
}

int nvmlDeviceGetSupportedMemoryClocks(device_t d, unsigned *count, unsigned *clocks) {
    if (mode("bare")) { *count = 0; return SUCCESS; }
    return list(MEMORY_MHZ, MEMORY_MHZ, count, clocks);
}

int nvmlDeviceGetSupportedGraphicsClocks(device_t d, unsigned memory, unsigned *count, unsigned *clocks) {
    if (memory != MEMORY_MHZ) return INVALID_ARGUMENT;
    return list(FIRST_MHZ, LAST_MHZ, count, clocks);
}

int nvmlDeviceSetGpuLockedClocks(device_t d, unsigned low, unsigned high) {
    return low == high ? change(d, low) : INVALID_ARGUMENT;
}
int nvmlDeviceResetGpuLockedClocks(device_t d) { return change(d, 0); }

const char *nvmlErrorString(int code) {
    switch (code) {
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case NO_PERMISSION: return "Insufficient Permissions";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Fake Error";
    }
}
